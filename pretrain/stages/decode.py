"""`decode`: continue prompts, or the beginnings of held-out documents, with a checkpoint; writes `samples.json`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, model_validator

from pretrain.core.bounds import Count, NonNegative, PositiveShare
from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import write_json
from pretrain.core.quick.positions import positions
from pretrain.core.quick.vocabulary import check_references, numbers_of
from pretrain.corpus.store import Corpus
from pretrain.decoding import Decoding
from pretrain.records import StageResult
from pretrain.stages import DecodingField, Estimate, Given, Job, Record, Ref, Stage, checkpoint_of, corpus_of
from pretrain.stages._estimates import decoding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.core.generation.options import OptionFields

TEMPERATURE, TOP_P = 0.8, 0.95  # of sampling, unless it is said otherwise
BEGINNING = 200  # letters of a held-out document that make a prompt, or half of it if that is less


class Decode(Stage):
    """Continue prompts, or the beginnings of held-out documents, with a checkpoint; writes `samples.json`.

    Models that `core.generation.forward` can run are decoded by its loop, the others by `transformers`' `generate`.

    checkpoint: The model that continues.
    prompts: Texts to continue.
    corpus: Whose held-out documents give beginnings to continue too, beside how they go on in truth.
    documents: How many of them.
    method: A decoding method in place of plain sampling; given temperature and top_p only if it samples.
    max_new_tokens: Tokens of each continuation at most.
    temperature: Of sampling, 0 takes the likeliest token; 0.8 by default.
    top_p: Probability from which tokens are drawn, the likeliest first; 0.95 by default.
    """

    stage: Literal["decode"] = "decode"
    checkpoint: Ref
    prompts: list[str] = []
    corpus: Ref | None = None
    documents: Count = 3
    method: DecodingField | None = None
    max_new_tokens: Count = 64
    temperature: NonNegative | None = None
    top_p: PositiveShare | None = None

    model_config = ConfigDict(protected_namespaces=())

    @model_validator(mode="after")
    def _something_to_continue(self) -> Decode:
        if not self.prompts and self.corpus is None:
            raise ValueError("prompts []: accepted: at least one, or a corpus whose held-out documents begin them")
        return self

    @model_validator(mode="after")
    def _method_samples(self) -> Decode:
        try:
            sampling(self.method, self.temperature, self.top_p)
        except PretrainError as error:
            raise ValueError(str(error)) from error
        return self

    def estimate(self, given: Given) -> Estimate:
        """A forward pass for each token."""
        count = len(self.prompts) + (self.documents if self.corpus else 0)
        letters = sum(map(len, self.prompts)) + BEGINNING * (count - len(self.prompts))
        return decoding(given, letters, count * self.max_new_tokens)

    def run(self, job: Job) -> StageResult:
        """Write `samples.json`."""
        from pretrain.stages.evaluate import load_text

        model, tokenizer = load_text(checkpoint_of(job.inputs["checkpoint"]))
        held_out = beginnings(Corpus(corpus_of(job.inputs["corpus"])), self.documents) if self.corpus else []
        samples = [
            continue_prompt(
                model, tokenizer, prompt, method=self.method, max_new_tokens=self.max_new_tokens,
                temperature=self.temperature, top_p=self.top_p, seed=job.seed + number,
            )
            for number, prompt in enumerate([*self.prompts, *(prompt for prompt, _ in held_out)])
        ]  # fmt: skip
        for sample, (_, rest) in zip(samples[len(self.prompts) :], held_out, strict=True):
            tokens = tokenizer(rest, add_special_tokens=False)["input_ids"][: self.max_new_tokens]
            sample["truth"] = tokenizer.decode(tokens)
        write_json(job.folder / "samples.json", {"samples": samples})
        seconds = sum(s["seconds"] for s in samples)
        return {"metrics": {"tokens_per_second": sum(s["tokens"] for s in samples) / max(seconds, 1e-9)}}


def beginnings(corpus: Corpus, most: int) -> list[tuple[str, str]]:
    """Of at most so many held-out documents their beginning, to the end of a word if there is one, and the rest."""
    texts = [str(document.get("text") or "") for document in corpus.sample("test", 4 * most)]
    cut = []
    for text in texts:
        half = text[: min(BEGINNING, len(text) // 2)]
        end = max(half.rfind(" "), half.rfind("\n"))
        prompt = half[:end] if end > 0 else half
        if prompt.strip():
            cut.append((prompt, text[len(prompt) :]))
    return cut[:most]


def sampling(method: Decoding | None, temperature: float | None, top_p: float | None) -> tuple[float, float]:
    """The temperature and top_p to decode with; an error where a method that does not sample is asked to."""
    if method is None or method.samples:
        return TEMPERATURE if temperature is None else temperature, TOP_P if top_p is None else top_p
    if temperature or (top_p or 1) < 1:
        option = f"temperature {temperature}" if temperature else f"top_p {top_p}"
        raise PretrainError(
            f"{option}: the method {method.name!r} does not sample; accepted: temperature 0 and no top_p"
        )
    return 0.0, 1.0


def _fitting(ids: list[int], others: int, most: int | None) -> list[int]:
    """The end of a prompt that fits into a model's positions beside `others`; says how much of it is cut."""
    if most is None or len(ids) + others <= most:
        return ids
    room = most - others
    if room < 1:
        raise PretrainError(f"max_new_tokens leave no room for a prompt: the model has {most:,} positions in all")
    warn(
        f"the prompt has {len(ids):,} tokens, and beside {others:,} others the model has positions for {room:,}: "
        f"its first {len(ids) - room:,} tokens are cut off"
    )
    return ids[-room:]


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    method: Decoding | None = None,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
) -> Record:
    """One continuation: prompt, continuation, tokens, seconds; with `chat` the answer to the prompt as a message."""
    import torch

    from pretrain.core.batch import Vocabulary
    from pretrain.core.encoding import chat_tokens
    from pretrain.core.generation.forward import why_not
    from pretrain.core.generation.loop import decode
    from pretrain.core.models.families import at

    if method is None and not model.can_generate():
        raise PretrainError(f"{type(model).__name__} predicts no next token; accepted: a causal or seq2seq model")
    temperature, top_p = sampling(method, temperature, top_p)
    if method is not None:
        check_references(method, numbers_of(tokenizer), "the model")
    vocabulary = Vocabulary.of(tokenizer)
    before = [vocabulary.bos] if vocabulary.bos is not None else []
    if chat:
        before, rest = chat_tokens(tokenizer, prompt)
    else:
        rest = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = before + rest
    if method is None and not model.config.is_encoder_decoder:  # methods for long prompts have ways of their own
        ids = before + _fitting(ids[len(before) :], len(before) + max_new_tokens, positions(model.config.to_dict()))
    input_BL = torch.tensor([ids or [vocabulary.pad]], device=model.device)
    torch.manual_seed(seed)
    options: OptionFields = {"max_new_tokens": max_new_tokens, "eos": vocabulary.eos, "pad": vocabulary.pad}
    sampled: OptionFields = {**options, "temperature": temperature, "top_p": top_p}
    started = time.perf_counter()
    with torch.no_grad():
        if method is not None:
            output_BN = method.generate(model, input_BL, **(sampled if method.samples else options))
        elif why_not(model, input_BL.shape[1] + max_new_tokens) is None:
            output_BN = decode(model, input_BL, **sampled)
        else:
            output_BN = at(model, "generate")(
                input_BL, attention_mask=torch.ones_like(input_BL), max_new_tokens=max_new_tokens,
                eos_token_id=vocabulary.eos, pad_token_id=vocabulary.pad, do_sample=temperature > 0,
                **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}),
            )  # fmt: skip
    # An encoder-decoder answers with its decoder's tokens alone, after the one that it starts from.
    given = 1 if method is None and model.config.is_encoder_decoder else input_BL.shape[1]
    new = output_BN[0, given:].tolist()
    return {
        "prompt": prompt,
        "continuation": tokenizer.decode(new, skip_special_tokens=True),
        "method": method.name if method is not None else ("sampling" if temperature else "greedy"),
        "tokens": len(new),
        "seconds": time.perf_counter() - started,
    }
