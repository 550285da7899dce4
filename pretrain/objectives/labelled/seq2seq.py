"""Sequence to sequence: a decoder or an encoder-decoder learns the target text of each document's prompt."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary, padded_length
from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import at, encode_decode, family, head
from pretrain.core.quick.table import GENERATING
from pretrain.objectives import Loss
from pretrain.objectives._answers import greedy, prompts_of
from pretrain.objectives._fine_tuning import examples_of, filled, texts_of
from pretrain.objectives._metrics import generation
from pretrain.objectives._token_loss import token_loss
from pretrain.objectives.labelled import FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Seq2Seq(FineTuning[str]):
    """Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv:1910.10683).

    Every task as text to text: the prompt is `prompt` with the document's columns in its braces (`{text}`), and the
    loss is the mean of -log p(y_t | prompt, y_<t) over the tokens y of `target` and its end, never over the prompt. A
    decoder reads `begin prompt target end` as one sequence, an encoder-decoder the prompt in its encoder. Metrics are
    of greedy answers of at most `answer` tokens. Too long prompts lose their beginning, targets their end.
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")
    predicted: ClassVar[float] = 0.25  # the answer's share of an example, about
    version: ClassVar[int] = 2  # batches are padded to a handful of shapes: a step's FLOPs are others
    metric_names: ClassVar[tuple[str, ...]] = ("exact_match", "token_f1", "rouge_l")

    prompt: str = "{text}\n"
    target: str = "target"
    answer: Count = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None]
        except ValueError as error:
            raise PretrainError(f"seq2seq: prompt {self.prompt!r}: {error}; accepted: text with {{column}}") from error
        if not names or not all(name.isidentifier() for name in names):
            raise PretrainError(f"seq2seq: prompt {self.prompt!r}: accepted: text with at least one {{column}}")

    @property
    def task(self) -> str:
        """A model made anew generates."""
        return GENERATING

    @property
    def columns(self) -> tuple[str, ...]:
        """Those in the prompt, and the target's."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name]
        return (*dict.fromkeys(names), self.target)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The prompt's columns, and the target."""
        return self.columns[:-1], (self.target,)

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model as it is; it must be one that generates."""
        if not model.can_generate():
            raise PretrainError(f"seq2seq: {type(model).__name__} generates no text: accepted: a causal or seq2seq LM")
        return model

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """`prompt_BL`, filled on the left, and `target_BM` with its end, filled on the right with -100; `mask_BL`."""
        examples = examples_of(rows, self.name)
        assert context.encoder is not None, "examples come with an encoder"
        vocabulary = context.vocabulary
        begin = [] if vocabulary.before is None else [vocabulary.before]
        end = [] if vocabulary.eos is None else [vocabulary.eos]
        most = max(1, context.length // 2 - len(end))
        whole = context.encoder.ids(texts_of(examples, self.target))
        targets = [[*ids[:most], *end] for ids in whole]
        room = context.length - max(map(len, targets)) - len(begin)
        if room < 1:
            raise PretrainError(f"length {context.length}: accepted: room for a prompt and its target")
        prompts = [self.prompt.format(**example.columns) for example in examples]
        asked = context.encoder.ids(prompts)
        context.cut.update(
            b for b, (p, t) in enumerate(zip(asked, whole, strict=True)) if len(p) > room or len(t) > most
        )
        inputs = [[*begin, *ids[max(0, len(ids) - room) :]] for ids in asked]
        lengths_B = torch.tensor([len(ids) for ids in inputs])
        # An answer needs its room after the prompt; in training the widths alone matter, which are to be few.
        most = room + len(begin) if context.predicting else context.length
        width = min(padded_length(int(lengths_B.max()), context.length), most)
        prompt_BL, mask_BL = prompts_of(inputs, vocabulary.pad, width)
        target_BM = filled(targets, IGNORE, padded_length(max(map(len, targets)), context.length))
        weight = (target_BM != IGNORE).sum()
        return {
            "prompt_BL": prompt_BL, "mask_BL": mask_BL, "target_BM": target_BM, "weight": weight,
            "tokens": lengths_B.sum() + weight,
        }  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean cross-entropy of the targets' tokens."""
        target_BM = batch["target_BM"]
        # What stands where there is no target is seen by no token that has one: any id will do.
        given_BM = target_BM.clamp(min=0)
        if family(model).decoder_blocks is not None:
            return _encoded(model, *_with_end(model, batch), given_BM, target_BM)
        tokens_BL = torch.cat([batch["prompt_BL"], given_BM], 1)
        document_BL = torch.cat([batch["mask_BL"], (target_BM != IGNORE).long()], 1)
        next_BL = torch.full_like(tokens_BL, IGNORE)
        next_BL[:, batch["prompt_BL"].shape[1] - 1 : -1] = target_BM
        position_BL = (document_BL.cumsum(1) - 1).clamp(min=0)
        whole = {"tokens_BL": tokens_BL, "document_BL": document_BL, "position_BL": position_BL, "target_BL": next_BL}
        return Loss(token_loss(model, whole, causal=True).value, {})

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[str]:
        """The greedy answer to each prompt, as text."""
        assert context.encoder is not None, "examples come with an encoder"
        tokenizer = context.encoder.tokenizer
        ids_BL, mask_BL = batch["prompt_BL"], batch["mask_BL"]
        if family(model).decoder_blocks is not None:
            ids_BL, mask_BL = _with_end(model, batch)
        return greedy(model, tokenizer, ids_BL, mask_BL, self.answer)

    def expected(self, examples: Sequence[Example], context: Context) -> list[str]:
        """The targets."""
        return [text.strip() for text in texts_of(examples, self.target)]

    def metrics(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Exact match, F1 of words, ROUGE-L."""
        return generation(predictions, references)


def _with_end(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The prompts and their mask for an encoder, which reads the text's end as well."""
    given = at(model, "config").eos_token_id
    end = given[0] if isinstance(given, list) else given
    prompt_BL, mask_BL = batch["prompt_BL"], batch["mask_BL"]
    if end is None:
        return prompt_BL, mask_BL
    ends_B1 = torch.full_like(prompt_BL[:, :1], end)
    return torch.cat([prompt_BL, ends_B1], 1), torch.cat([mask_BL, torch.ones_like(ends_B1)], 1)


def _encoded(model: nn.Module, prompt_BL: Tensor, mask_BL: Tensor, given_BM: Tensor, target_BM: Tensor) -> Loss:
    """The loss of an encoder-decoder, whose decoder starts from the token that its configuration names."""
    start = at(model, "config").decoder_start_token_id
    decoder_BM = torch.cat([torch.full_like(given_BM[:, :1], start), given_BM[:, :-1]], 1)
    weight_VE, bias_V = head(model)
    states_BME = encode_decode(model, prompt_BL, decoder_BM, mask_BL, torch.ones_like(decoder_BM))
    return Loss(linear_cross_entropy(states_BME, weight_VE, target_BM, bias_V=bias_V)[0], {})
