"""Proxy-tuning: the arithmetic of the logits, and which models fit together."""

from __future__ import annotations

import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.decoding import _beside
from pretrain.decoding.ensembles.proxy_tuning import ProxyTuning

PROMPTS_BL = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
MASK_BL = (torch.arange(9) >= torch.tensor([[0], [3], [7]])).long()


@pytest.fixture
def saved(tiny, tmp_path):
    """`saved("one", "llama", seed=1)`: the folder of a checkpoint in float64."""

    def make(name, family="llama", tokenizer=None, **fields):
        checkpoint.save(tiny(family, **fields).double(), tokenizer, tmp_path / name)
        return str(tmp_path / name)

    return make


def test_a_model_that_is_its_own_anti_expert_becomes_the_expert(tiny, saved):
    model = tiny("llama", seed=1).double()
    method = ProxyTuning(saved("tuned", "gpt2", seed=2), saved("untuned", seed=1))
    wanted_BN = decode(checkpoint.load(method.expert)[0], PROMPTS_BL, max_new_tokens=12)
    assert torch.equal(method.generate(model, PROMPTS_BL, max_new_tokens=12), wanted_BN)
    assert not torch.equal(decode(model, PROMPTS_BL, max_new_tokens=12), wanted_BN)


@pytest.mark.parametrize("alpha", [1.0, 0.3, -2.0])
def test_tokens_are_those_of_the_formula_without_any_cache(tiny, saved, alpha):
    model = tiny("llama", seed=1).double()
    method = ProxyTuning(saved("expert", seed=2), saved("anti", "gpt2", seed=3), alpha)
    expert, anti = (checkpoint.load(folder)[0] for folder in (method.expert, method.anti_expert))
    output_BN = method.generate(model, PROMPTS_BL, attention_mask_BL=MASK_BL, max_new_tokens=10)
    for row in range(3):
        ids_N = PROMPTS_BL[row][MASK_BL[row] == 1]
        for token in output_BN[row, 9:]:
            with torch.no_grad():
                base_V, expert_V, anti_V = (
                    m(ids_N[None], use_cache=False).logits[0, -1] for m in (model, expert, anti)
                )
            assert token == (base_V + alpha * (expert_V - anti_V)).argmax()
            ids_N = torch.cat([ids_N, token[None]])


def test_the_distribution_is_the_papers_product(tiny, saved):
    method = ProxyTuning("a", "b")
    base_BV, expert_BV, anti_BV = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0)).double()
    product_BV = base_BV.softmax(-1) * expert_BV.softmax(-1) / anti_BV.softmax(-1)
    share_BV = method.logits(base_BV, expert_BV, anti_BV).softmax(-1)
    assert torch.allclose(share_BV, product_BV / product_BV.sum(-1, keepdim=True))


def test_a_checkpoint_is_read_once_and_again_when_it_changed(tiny, saved, monkeypatch):
    model, folder = tiny("llama", seed=1).double(), saved("proxy", seed=2)
    method, read = ProxyTuning(folder, folder), []
    load = checkpoint.load
    monkeypatch.setattr(_beside, "load", lambda *a, **k: read.append(a) or load(*a, **k))
    for _ in range(3):
        method.generate(model, PROMPTS_BL, max_new_tokens=2)
    assert len(read) == 1
    saved("proxy", seed=5)
    method.generate(model, PROMPTS_BL, max_new_tokens=2)
    assert len(read) == 2


def test_a_recipe_names_the_proxies(prepared, tiny, saved):
    from pretrain.corpus.tokenizers import load_tokenizer
    from pretrain.stages.decode import Decode, continue_prompt

    tokenizer = load_tokenizer(prepared / "tokenizer")
    folders = [saved(name, tokenizer=tokenizer, vocab_size=len(tokenizer), seed=k) for k, name in enumerate("abc")]
    said = {"method": "proxy_tuning", "expert": "tuned", "anti_expert": "untuned"}
    stage = Decode(checkpoint="base", prompts=["def"], method=said)
    assert stage.references() == {"checkpoint": "base", "method.expert": "tuned", "method.anti_expert": "untuned"}
    stage = stage.pointing_to({"method.expert": folders[1], "method.anti_expert": folders[2]})
    model, own = checkpoint.load(folders[0])
    assert continue_prompt(model, own, "def f", method=stage.method, max_new_tokens=5, temperature=0)["tokens"] <= 5


def test_models_that_do_not_fit_are_refused(prepared, tiny, saved):
    from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer

    with pytest.raises(PretrainError, match="alpha nan: accepted: a finite number"):
        ProxyTuning("a", "b", float("nan"))
    model, same, wide = tiny("llama"), saved("same"), saved("wide", vocab_size=98)
    for folders, field in (((wide, same), "expert"), ((same, wide), "anti_expert")):
        with pytest.raises(PretrainError, match=f"{field} .*wide: a vocabulary of 98 tokens: accepted: the model's 97"):
            ProxyTuning(*folders).generate(model, PROMPTS_BL)
    with pytest.raises(PretrainError, match="expert .*BertForMaskedLM: accepted: a causal"):
        ProxyTuning(saved("bert", "bert"), same).generate(model, PROMPTS_BL)
    with pytest.raises(PretrainError, match="nowhere"):
        ProxyTuning("nowhere", same).generate(model, PROMPTS_BL)
    own = load_tokenizer(prepared / "tokenizer")
    other = train_tokenizer(["another text, of other words " * 20, "which has other pieces"] * 3, vocab_size=len(own))
    folders = [
        saved(name, tokenizer=tokenizer, vocab_size=len(own)) for name, tokenizer in (("own", own), ("other", other))
    ]
    base = checkpoint.load(folders[0])[0]
    with pytest.raises(PretrainError, match="token .* in anti_expert .*other and .* in the model; accepted"):
        ProxyTuning(folders[0], folders[1]).generate(base, PROMPTS_BL)
