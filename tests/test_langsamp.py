"""LangSAMP: the head is told language and script, the encoder is not; embeddings are kept apart and compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Row, Vocabulary, counts
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import new_model
from pretrain.evaluation.probes.source_language import SourceLanguage
from pretrain.evaluation.probes.translation_retrieval import TranslationRetrieval
from pretrain.objectives.language.langsamp import LangSAMP
from pretrain.objectives.language.masked_lm import MaskedLM

DOMAINS = ("news", "web", "wiki", "other")
TAGS = {"wiki": "srp_Cyrl", "news": "deu_Latn", "web": "srp_Latn", "other": "deu_Latn"}
VOCABULARY = Vocabulary(size=97, pad=0, bos=1, eos=2, mask=3, special=frozenset(range(4)))
XLMR = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}


def made(family):
    """A tiny model without dropout, and the way from its encoder's states to its logits as `transformers` has it."""
    fields = TINY.get(family, XLMR)
    model = new_model(family, fields, task="masked", vocabulary=VOCABULARY, seed=1).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    to_logits = {
        "bert": lambda h: model.cls(h),
        "modernbert": lambda h: model.decoder(model.head(h)),
        "xlm-roberta": lambda h: model.lm_head(h),
        "mpnet": lambda h: model.lm_head(h),
    }
    return model, to_logits[family]


def rows(domains, pieces=((18, 6), (24,), (20,))):
    rng = np.random.default_rng(0)
    return [
        Row(
            rng.integers(4, 97, sum(sizes)).astype(np.int32),
            np.cumsum([0, *sizes[:-1]]).astype(np.int32),
            np.arange(len(sizes)),
            domain,
            index,
        )
        for index, (domain, sizes) in enumerate(zip(domains, pieces))
    ]


def context():
    return Context(VOCABULARY, 24, np.random.default_rng(0), domains=DOMAINS)


def prepared(objective, domains=(0, 1, 2)):
    return objective.prepare(rows(domains), context())


@pytest.mark.parametrize("family", ["bert", "modernbert", "xlm-roberta", "mpnet"])
def test_without_numbers_it_is_masked_lm_and_with_them_the_head_of_the_published_code(family):
    """The published head: features + language + script, through the dense layer, its norm and the decoder."""
    model, to_logits = made(family)
    objective = LangSAMP(TAGS)
    tables, batch = objective.modules(model), prepared(objective)
    plain = MaskedLM().prepare(rows((0, 1, 2)), context())
    assert all(torch.equal(batch[name], value) for name, value in plain.items())
    for table in tables.tables.values():
        table.weight.data.zero_()
    nothing = objective.loss(model, batch, tables)
    assert torch.equal(nothing.value, MaskedLM().loss(model, plain).value)
    language = dict(zip(["deu", "srp"], torch.randn(2, 32), strict=True))
    script = dict(zip(["Cyrl", "Latn"], torch.randn(2, 32), strict=True))
    tables.tables["language"].weight.data = torch.stack([*language.values()])
    tables.tables["script"].weight.data = torch.stack([*script.values()])
    found = objective.loss(model, batch, tables)
    total, count = 0.0, 0
    for row, domain in enumerate(DOMAINS[:3]):
        name, writing = TAGS[domain].split("_")
        for piece in batch["document_BL"][row].unique():
            at = batch["document_BL"][row] == piece
            if piece == 0 or not (target := batch["target_BL"][row][at]).ge(0).any():
                continue
            states = model.base_model(batch["tokens_BL"][row][at][None]).last_hidden_state
            logits = to_logits(states + language[name] + script[writing])[0]
            total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum").detach())
            count += int(target.ge(0).sum())
    assert (
        float(found.value.detach()) == pytest.approx(total / count, rel=1e-5)
        and abs(float((found.value - nothing.value).detach())) > 1e-3
    )
    before = model(batch["tokens_BL"]).logits
    assert not model.base_model._forward_hooks and torch.equal(model(batch["tokens_BL"]).logits, before)


def test_gradients_reach_the_rows_of_the_batchs_languages_alone():
    model, _ = made("bert")
    objective = LangSAMP(TAGS | {"more": "fra_Arab"})
    tables = objective.modules(model)
    objective.loss(model, prepared(objective, (0, 3, 0)), tables).value.backward()
    assert tables.config.languages == ["deu", "fra", "srp"] and tables.config.scripts == ["Arab", "Cyrl", "Latn"]
    moved = {name: table.weight.grad.abs().sum(-1).gt(0).tolist() for name, table in tables.tables.items()}
    assert moved == {"language": [True, False, False], "script": [False, False, True]}
    assert all(p.grad is not None for p in model.bert.encoder.parameters())


def test_domains_of_one_tag_share_a_row_and_either_embedding_can_be_left_out():
    model, _ = made("bert")
    batch = prepared(LangSAMP(TAGS), (0, 1, 3))
    assert batch["language_B"].tolist() == [0, 1, 0] and batch["script_B"].tolist() == [1, 1, 1]
    assert counts(batch)["weight"] == int((batch["target_BL"] >= 0).sum())
    for use in ("language", "script"):
        only = LangSAMP(TAGS, **{f"use_{other}": other == use for other in ("language", "script")})
        tables = only.modules(model)
        assert [*tables.tables] == [use]
        torch.testing.assert_close(
            tables(batch["language_B"], batch["script_B"]), tables.tables[use](batch[f"{use}_B"])
        )
    torch.manual_seed(0)
    spread = LangSAMP({str(n): f"l{n}_S{n}" for n in range(60)}).modules(model).tables["language"].weight.std()
    assert float(spread) == pytest.approx(model.config.initializer_range, rel=0.1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        PretrainError, match="langsamp: languages web: 'German': accepted: a language and its script, as deu_Latn"
    ):
        LangSAMP({"web": "German"})
    with pytest.raises(PretrainError, match="langsamp: no languages: accepted: the tag of each domain"):
        LangSAMP({})
    with pytest.raises(PretrainError, match="domain in langsamp's languages 'wiki'"):
        prepared(LangSAMP({"news": "deu_Latn", "web": "deu_Latn"}))
    with pytest.raises(PretrainError, match="random"):
        LangSAMP(TAGS, masked=0.9, random=0.3)


def test_the_nearest_languages_are_told_from_the_stage_that_trained_their_embeddings(tmp_path):
    model, _ = made("bert")
    objective = LangSAMP({name: f"{name}_Latn" for name in ("deu", "fra", "nld")})
    ((folder, exported),) = objective.export(objective.modules(model)).items()
    exported.tables["language"].weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]).repeat(1, 16)
    checkpoint.save(exported, None, tmp_path / folder / "checkpoint")
    documents = [{"text": "x", "domain": "nld_Latn"}, {"text": "y", "domain": "fra"}]
    found = SourceLanguage(str(tmp_path))(model, None, documents)
    assert found.domains["nld_Latn"] == {"similarity/deu": pytest.approx(0.6), "similarity/fra": pytest.approx(0.8)}
    assert found.domains["fra"] == {"similarity/deu": pytest.approx(0.0), "similarity/nld": pytest.approx(0.8)}
    assert found.metrics["nearest_similarity"] == pytest.approx(0.8)
    chosen = SourceLanguage(str(tmp_path / folder), ("deu",))(model, None, documents)
    assert [*chosen.domains["nld_Latn"]] == ["similarity/deu"]
    with pytest.raises(PretrainError, match="language 'pol'"):
        SourceLanguage(str(tmp_path))(model, None, [{"text": "z", "domain": "pol_Latn"}])
    checkpoint.save(model, None, tmp_path / "model")
    with pytest.raises(PretrainError, match="no embeddings of several languages; accepted: a stage that trained"):
        SourceLanguage(str(tmp_path / "model"))(model, None, documents)
    plain = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert {*plain.state_dict()} == {*model.state_dict()}


def test_a_translation_is_looked_for_among_all_texts_of_its_language(tiny, monkeypatch):
    from pretrain.evaluation.probes import translation_retrieval as module

    vectors = {
        "a1": (1, 0, 0),
        "a2": (0, 1, 0),
        "a3": (0, 0, 1),
        "b1": (1, 0.1, 0),
        "b2": (1, 0, 0),
        "b9": (0, 0.9, 1),
        "c1": (1, 0, 0),
    }
    monkeypatch.setattr(module, "Framing", lambda *_: type("Framing", (), {"length": 9}))
    monkeypatch.setattr(module.Vocabulary, "of", lambda tokenizer: None)
    monkeypatch.setattr(module, "encode", lambda tokenizer, texts: texts)
    monkeypatch.setattr(
        module, "text_features", lambda model, pieces, *_, **__: np.array([vectors[p] for p in pieces], np.float32)
    )
    documents = [{"text": name, "domain": name[0], "group": name[1]} for name in vectors]
    found = TranslationRetrieval(resamples=20)(None, None, documents)
    # a1 -> b1 (second, b2 is nearer) and c1; a2 -> b2 (last); b1 -> a1, c1; b2 -> a2 (second of equals); c1 -> a1, b1 (second)
    assert found.domains["a"]["recall@1"] == pytest.approx(1 / 3) and found.domains["a"]["mrr@10"] == pytest.approx(
        (1 / 2 + 1 / 3 + 1) / 3
    )
    assert found.domains["c"]["mrr@10"] == pytest.approx(3 / 4) and found.metrics["translation_queries"] == 8
    with pytest.raises(PretrainError, match="no document has a translation in another domain"):
        TranslationRetrieval()(None, None, documents[:3])
