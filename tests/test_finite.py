"""Outputs that are not finite become no label, no measure and no token: one line says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.generation.continuations import judge, sample
from pretrain.core.generation.finite import NotFinite, check_logits
from pretrain.core.generation.forward import why_not
from pretrain.core.generation.options import Options
from pretrain.core.method import method_class
from pretrain.core.models.features import evaluating
from pretrain.core.models.heads import with_head
from pretrain.core.models.likelihood import document_nll
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.evaluation.likelihood.held_out import HeldOut
from pretrain.inference.predict import predict
from pretrain.interactive import generate
from pretrain.stages.evaluate import measure

TEXTS = [f"def f{n}(): return {n}" for n in range(40)]
WRONG = r"the outputs of the .* are not finite \(NaN or infinity\); accepted: a model with finite outputs"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=290)


def overflowing(model):
    """The model with finite weights of which a sum within it is too large for float32."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer.1" in name or "layers.1" in name:
                parameter.fill_(1e38)
    return model


KINDS = ["single", "several", "number", "tags"]


@pytest.fixture(scope="module")
def classifier(tiny, tokenizer):
    """A classifier of each kind of answer."""

    def make(kind: str):
        labels = ["number"] if kind == "number" else ["bad", "good"]
        base = tiny("bert", vocab_size=290)
        model = with_head(base, "token" if kind == "tags" else "sequence", labels, Vocabulary.of(tokenizer))
        if kind == "several":
            model.config.problem_type = "multi_label_classification"
        return model.eval()

    return make


@pytest.mark.promise(
    "What others have written",
    "Outputs of a model that are not finite, of finite weights whose sums overflow too, become no label, no measure and no token: `predict` names the first row of which they are, an evaluation itself.",
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_label_is_made_of_outputs_that_are_not_finite(classifier, tokenizer, kind):
    assert len(predict((classifier(kind), tokenizer), TEXTS, batch_size=4)) == len(TEXTS)
    with pytest.raises(PretrainError, match=rf"^text 0: {WRONG}"):
        predict((overflowing(classifier(kind)), tokenizer), TEXTS, batch_size=4)
    model = classifier(kind)
    model.classifier.register_forward_hook(lambda module, given, output: output * float("nan"))
    with pytest.raises(PretrainError, match=rf"^text 0: {WRONG}"):
        predict((model, tokenizer), TEXTS, batch_size=4)


def test_the_first_row_is_named_whatever_the_batches(classifier, tokenizer):
    model, texts = classifier("single"), [f"{'y ' * (12 - n % 7)}{n}" for n in range(20)]
    masks = []
    model.register_forward_pre_hook(
        lambda module, given, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    limit = len(tokenizer(texts[3])["input_ids"])

    def spoil(module, given, output):
        return output.masked_fill((masks[-1].sum(1) <= limit)[:, None], float("inf"))

    model.classifier.register_forward_hook(spoil)
    first = next(n for n, text in enumerate(texts) if len(tokenizer(text)["input_ids"]) <= limit)
    assert first > 0
    with pytest.raises(PretrainError, match=f"^text {first}: "):
        predict((model, tokenizer), texts, batch_size=3)


@pytest.mark.promise("What others have written", "Outputs of a model that are not finite")
def test_no_measure_is_made_of_them(tiny, classifier, tokenizer, tmp_path):
    documents = [{"text": text, "label": "good", "domain": "d"} for text in TEXTS]
    causal = overflowing(tiny("llama", vocab_size=290))
    task = method_class("task", "evaluation")(objective={"method": "classification", "label": "label"})
    for model, method in ((causal, HeldOut(length=16)), (overflowing(classifier("single")), task)):
        with pytest.raises(PretrainError, match=rf"^{method.name}: {WRONG}"):
            measure(model, tokenizer, documents, [method])
    with pytest.raises(NotFinite):
        document_nll(causal, [np.arange(9)], length=8)
    with pytest.raises(NotFinite):
        judge(causal, [([3, 4], [5, 6])])
    with torch.no_grad():
        head = tiny("llama", vocab_size=290)
        head.lm_head.weight.fill_(3e38)  # only what the head makes of them overflows
    with pytest.raises(NotFinite):
        judge(head, [([3, 4], [5, 6])])
    with pytest.raises(NotFinite):
        document_nll(head, [np.arange(9)], length=8)


@pytest.mark.promise("What others have written", "Outputs of a model that are not finite")
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mamba"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_made_of_them(tiny, tokenizer, family, temperature):
    from transformers import MambaConfig, MambaForCausalLM

    if family == "mamba":  # whose own `generate` is used
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaConfig(vocab_size=290, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    else:
        model = tiny(family, vocab_size=290)
    assert isinstance(generate(model, tokenizer, "def", temperature=temperature, max_new_tokens=2), str)
    with torch.no_grad():
        [*model.parameters()][-1].fill_(float("nan"))
    with pytest.raises(PretrainError, match=WRONG):
        generate(model, tokenizer, "def", temperature=temperature, max_new_tokens=2)


@pytest.mark.parametrize("method", ["speculative_decoding", "prompt_lookup", "kivi"])
def test_no_method_of_decoding_makes_tokens_of_them(tiny, tokenizer, method, tmp_path):
    model = overflowing(tiny("llama", vocab_size=290))
    given = {}
    if method == "speculative_decoding":
        checkpoint.save(tiny("llama", vocab_size=290), tokenizer, tmp_path / "draft")
        given = {"draft": str(tmp_path / "draft")}
    made = method_class(method, "decoding")(**given)
    with pytest.raises(PretrainError, match=WRONG):
        generate(model, tokenizer, "def", method=made, max_new_tokens=4)


def test_minus_infinity_is_the_logit_of_what_must_not_be_chosen_and_padding_is_no_output(tiny):
    check_logits(torch.tensor([[0.0, -torch.inf]]), "model")
    for value in (torch.inf, torch.nan):
        with pytest.raises(NotFinite, match="model") as error:
            check_logits(torch.tensor([[0.0, 1.0], [value, 0.0]]), "model")
        assert error.value.rows == (1,)
    with pytest.raises(NotFinite):
        Options().pick(torch.full((1, 4), -torch.inf), None, torch.zeros(1, 1))
    model = tiny("bert")
    model.bert.register_forward_hook(
        lambda module, given, named, output: spoil(named, output), with_kwargs=True, prepend=True
    )

    def spoil(named, output):
        output.last_hidden_state = output.last_hidden_state.masked_fill(
            named["attention_mask"][..., None] == 0, torch.nan
        )
        return output

    mask_BL = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with evaluating(model):
        assert (
            model.bert(input_ids=torch.ones(2, 3, dtype=torch.long), attention_mask=mask_BL)
            .last_hidden_state.isnan()
            .any()
        )
    assert not model._forward_hooks


def test_a_model_that_is_watched_is_decoded_as_ever(tiny):
    model = tiny("llama")
    with evaluating(model):
        assert why_not(model, 8) is None
    assert len(sample(model, [3, 4], 2, max_new_tokens=2)) == 2
