"""`decode`: continue prompts, or the beginnings of held-out documents, with a checkpoint; writes `samples.json`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import ConfigDict, model_validator

from pretrain.core.bounds import Count, NonNegative, Seed, Share, check_value
from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import write_json
from pretrain.core.quick.positions import positions
from pretrain.core.quick.vocabulary import check_references, numbers_of
from pretrain.corpus.store import Corpus
from pretrain.decoding import Decoding
from pretrain.dial.configs import shape_from
from pretrain.dial.shapes import Shape
from pretrain.records import StageResult
from pretrain.stages import DecodingField, Estimate, Given, Job, Record, Ref, Stage, checkpoint_of, corpus_of
from pretrain.stages._estimates import FLOOR, RECORDS, Left, bytes_of_token, left_in, training_seconds

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.core.generation.computed import Computed
    from pretrain.core.generation.healing import Healing
    from pretrain.core.generation.options import SettingFields

BEGINNING = 200  # letters of a held-out document that make a prompt, or half of it if that is less
DECODING = 0.2  # of the rate of training, a token at a time
NEAR = 8  # tokens before new ones that say how those are written


class Decode(Stage):
    """Continue prompts, or the beginnings of held-out documents, with a checkpoint; writes `samples.json`.

    What the checkpoint's `generation_config` says besides (end tokens, stop strings, top_k, min_p, penalties, …) holds
    too. Models that `core.generation.forward` can run are decoded by its loop, others by `transformers`' `generate`.
    FLOPs are those of the positions that models computed, guesses that were rejected too; `tokens_per_pass` says how
    many tokens a pass of the model gave after the prompt's, 1 without a method that guesses.

    checkpoint: The model that continues.
    prompts: Texts to continue.
    chat: Whether prompts are a user's messages, to be answered in the checkpoint's chat template.
    corpus: Whose held-out documents give beginnings to continue too, beside how they go on in truth.
    documents: How many of them.
    method: A decoding method in place of plain sampling; given temperature and top_p only if it samples.
    max_new_tokens: Tokens of each continuation at most.
    temperature: Of sampling; 0 takes the likeliest token; the checkpoint's `generation_config`'s by default, or 0.8.
    top_p: Probability from which tokens are drawn, the likeliest first: 1 is all, 0 the likeliest token; by default the
        checkpoint's, or 0.95.
    stop: Texts that end a continuation, besides the checkpoint's; the first of them stands at its end.
    token_healing: Whether a prompt's last word is written anew, in tokens that go on with it ("def " to " main").
    """

    stage: Literal["decode"] = "decode"
    checkpoint: Ref
    prompts: list[str] = []
    chat: bool = False
    corpus: Ref | None = None
    documents: Count = 3
    method: DecodingField | None = None
    max_new_tokens: Count = 64
    temperature: NonNegative | None = None
    top_p: Share | None = None
    stop: list[str] = []
    token_healing: bool = True

    model_config = ConfigDict(protected_namespaces=())

    @model_validator(mode="after")
    def _something_to_continue(self) -> Decode:
        if not self.prompts and self.corpus is None:
            raise ValueError("prompts []: accepted: at least one, or a corpus whose held-out documents begin them")
        return self

    @model_validator(mode="after")
    def _method_samples(self) -> Decode:
        try:
            check_sampling(self.method, self.temperature, self.top_p)
        except PretrainError as error:
            raise ValueError(str(error)) from error
        return self

    def estimate(self, given: Given) -> Estimate:
        """A forward pass for each token, and those of the models that a method has beside."""
        count = len(self.prompts) + (self.documents if self.corpus else 0)
        letters = sum(map(len, self.prompts)) + BEGINNING * (count - len(self.prompts))
        return decoding(given, letters, count * self.max_new_tokens, self.method, count)

    def run(self, job: Job) -> StageResult:
        """Write `samples.json`."""
        from pretrain.core.encoding import encoded, text_of
        from pretrain.stages.evaluate import load_text

        opener = self.method.load if self.method else None
        model, tokenizer = load_text(checkpoint_of(job.inputs["checkpoint"]), opener)
        held_out = beginnings(Corpus(corpus_of(job.inputs["corpus"])), self.documents) if self.corpus else []
        samples = [
            continue_prompt(
                model, tokenizer, prompt, method=self.method, max_new_tokens=self.max_new_tokens,
                temperature=self.temperature, top_p=self.top_p, stop=self.stop, seed=job.seed + number,
                chat=self.chat and number < len(self.prompts), token_healing=self.token_healing,
            )
            for number, prompt in enumerate([*self.prompts, *(prompt for prompt, _ in held_out)])
        ]  # fmt: skip
        for sample, (_, rest) in zip(samples[len(self.prompts) :], held_out, strict=True):
            tokens = encoded(tokenizer, rest, add_special_tokens=False)["input_ids"][: self.max_new_tokens]
            sample["truth"] = text_of(tokenizer, tokens)
        write_json(job.folder / "samples.json", {"samples": samples})
        seconds = sum(s["seconds"] for s in samples)
        measured = self.method.measured(model) if self.method else {}
        speed = {"tokens_per_second": sum(s["tokens"] for s in samples) / max(seconds, 1e-9)}
        return {"metrics": speed | _passes(samples) | measured, "flops": self._flops(job, samples)}

    def _flops(self, job: Job, samples: Sequence[Record]) -> int:
        """Those of the positions that models computed, as a plan counts each: a meter would slow what is timed.

        Of a model whose positions cannot be counted, those of the tokens that were read and written.
        """
        given = {place: left_in(folder) for place, folder in job.inputs.items() if isinstance(folder, Path)}
        read, new = (sum(sample[name] for sample in samples) for name in ("read", "written"))
        made = decoded(given, read, new, self.method, len(samples), _counted(samples))
        return round(sum(flops for _, flops in made))


def _counted(samples: Sequence[Record]) -> dict[str, Counted]:
    """What models computed for samples in all."""
    each = [sample.get("computed", {}) for sample in samples]
    return {
        place: Counted(*(sum(work[place][what] for work in each if place in work) for what in Counted._fields))
        for place in {place for work in each for place in work}
    }


def _passes(samples: Sequence[Record]) -> dict[str, float]:
    """The model's passes after its prompts', and how many tokens each gave; nothing where none are known."""
    counted = [sample for sample in samples if "passes" in sample]
    later = sum(sample["passes"] for sample in counted)
    if not later:
        return {}
    return {"passes": later, "tokens_per_pass": sum(max(0, s["written"] - 1) for s in counted) / later}


def decoding(
    given: Given, characters: float, new: float, method: Decoding | None = None, prompts: float = 1.0
) -> Estimate:
    """Of continuing prompts of so many characters by so many tokens; of a method with the models that it has beside."""
    model = given.get("checkpoint", Left())
    letters = bytes_of_token(model.vocabulary) if model.vocabulary else 1.0
    made = decoded(given, characters / letters, new, method, prompts)
    if not made or not model.vocabulary:
        return Estimate()
    flops, weights = sum(each for _, each in made), sum(shape.weights for shape, _ in made)
    seconds = sum(training_seconds(each, shape.width) for shape, each in made)
    disk = RECORDS + characters + 2 * new * letters  # a continuation, and often the true one beside it
    return Estimate(flops, FLOOR + 4.0 * weights, seconds / DECODING + 1, disk)


class Counted(NamedTuple):
    """Positions that a model has computed, those of them whose logits it has made, and in how many passes."""

    positions: int
    logits: int
    passes: int

    def flops(self, shape: Shape, read: float, later: float, length: int) -> float:
        """Those of so many tokens read and written, in texts of `length`; in a pass guesses see one another besides."""
        guesses = max(0.0, self.positions - read - later) / max(1, self.passes)
        body, head = shape.forward(length, 0.0), shape.forward(0) - shape.forward(0, 0.0)
        more = shape.forward(round(length + guesses), 0.0) - body
        return self.positions * body + max(0.0, self.positions - read) * more + self.logits * head


def decoded(
    given: Given, read: float, new: float, method: Decoding | None = None, prompts: float = 1.0,
    counted: Mapping[str, Counted] | None = None,
) -> list[tuple[Shape, float]]:  # fmt: skip
    """The FLOPs of reading and of writing so many tokens in all, by model; nothing where the model's shape is unknown.

    `prompts` are those that they are of, alike. Of a method also the models that it has beside. Where a model has been
    `counted`, by the field that names it, its positions are those, however many tokens they were for.
    """
    model = given.get("checkpoint", Left())
    shape = shape_from(model.config)
    if shape is None:
        return []
    length, later = max(1, round((read + new) / max(1.0, prompts))), max(0.0, new - prompts)  # a first token is read

    def flops(place: str, shape: Shape, share: float) -> float:
        body, whole = shape.forward(length, 0.0), shape.forward(length)
        if counted is not None and place in counted:
            return counted[place].flops(shape, read, later, length)
        return read * (share > 0) * body + later * share * whole + prompts * (whole - body)

    share = method.computed() if method else 1.0
    made = [(shape, flops("checkpoint", shape.with_blocks(model.blocks), share))]
    for name in method.references() if method else ():
        place = f"method.{name}"
        beside = given.get(place, Left())
        other = shape_from(beside.config)
        if method is not None and other is not None:
            other, share = other.with_blocks(beside.blocks), method.computed(name)
            made.append((other, flops(place, other, share)))
    return made


def beginnings(corpus: Corpus, most: int) -> list[tuple[str, str]]:
    """Of at most so many held-out documents their beginning, to the end of a word if there is one, and the rest.

    Each domain is taken from in turn.
    """
    by_domain: dict[str, list[tuple[str, str]]] = {}
    for document in corpus.sample("test", 16 * most, ("text", "domain")):
        text = str(document.get("text") or "")
        half = text[: min(BEGINNING, len(text) // 2)]
        end = max(half.rfind(" "), half.rfind("\n"))
        prompt = half[:end] if end > 0 else half
        if prompt.strip():
            by_domain.setdefault(str(document.get("domain")), []).append((prompt, text[len(prompt) :]))
    turns = zip_longest(*by_domain.values())
    return [beginning for turn in turns for beginning in turn if beginning is not None][:most]


def check_sampling(method: Decoding | None, temperature: float | None, top_p: float | None) -> None:
    """Refuse to have a method sample that does not."""
    if method is not None and not method.samples and (temperature or (top_p or 1) < 1):
        option = f"temperature {temperature}" if temperature else f"top_p {top_p}"
        raise PretrainError(
            f"{option}: the method {method.name!r} does not sample; accepted: temperature 0 and no top_p"
        )


def _fitting(ids: list[int], others: int, most: int | None) -> list[int]:
    """The end of a prompt that fits into a model's positions beside `others`; says how much of it is cut."""
    if most is None or len(ids) + others <= most:
        return ids
    room = most - others
    if room < 1:
        raise PretrainError(
            f"max_new_tokens: what is to be written leaves no room for a prompt: {others:,} of the model's {most:,} "
            "positions, with its marks; accepted: fewer"
        )
    warn(
        f"the prompt has {len(ids):,} tokens, and beside {others:,} others the model has positions for {room:,}: "
        f"its first {len(ids) - room:,} tokens are cut off"
    )
    return ids[-room:]


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, new: int, most: int | None, chat: bool, heal: bool
) -> tuple[list[int], Healing | None]:
    """A prompt's tokens, begun as a text is or framed as a user's message, with room for `new` among `most`.

    With `heal` without those of its last word, and what writes them again.
    """
    from pretrain.core.batch import Vocabulary
    from pretrain.core.encoding import chat_tokens, encoded
    from pretrain.core.generation.healing import healing

    vocabulary = Vocabulary.of(tokenizer)
    before = [vocabulary.before] if vocabulary.before is not None else []
    if chat:
        before, rest = chat_tokens(tokenizer, prompt)
    else:
        rest = encoded(tokenizer, prompt, add_special_tokens=False)["input_ids"]
    rest = _fitting(rest, len(before) + new, most)
    healed = healing(tokenizer, prompt, rest, len(before)) if heal and not chat else None
    ids = before + rest
    return (ids if healed is None else ids[: healed.length]), healed


def _written(tokenizer: PreTrainedTokenizerBase, ids: list[int], again: Sequence[int], new: list[int]) -> str:
    """The text of new tokens behind a prompt's, and behind what of the prompt they write again."""
    from pretrain.core.encoding import text_of

    near = ids[-NEAR:]  # a first token's space, or a character of several, is only told beside what it follows
    prompt = text_of(tokenizer, [*near, *again], skip_special_tokens=True)
    whole = text_of(tokenizer, [*near, *new], skip_special_tokens=True)
    return whole[len(prompt) :] if whole.startswith(prompt) else text_of(tokenizer, new, skip_special_tokens=True)


def sampled(
    model: PreTrainedModel, method: Decoding | None, temperature: float | None, top_p: float | None
) -> tuple[float, float]:
    """The temperature and top_p of an answer: asked for, or the model's; greedy where a method cannot sample."""
    from pretrain.core.generation.settings import sampling

    check_sampling(method, temperature, top_p)
    return sampling(model, temperature, top_p) if method is None or method.samples else (0.0, 1.0)


def continued(
    model: PreTrainedModel, input_BL: Tensor, options: SettingFields, method: Decoding | None = None
) -> Tensor:
    """`tokens_BN` after unpadded prompts: by a method, the loop here, or for models it cannot run `generate`."""
    import torch

    from pretrain.core.generation.finite import watching
    from pretrain.core.generation.forward import why_not
    from pretrain.core.generation.loop import decode
    from pretrain.core.generation.settings import generate

    with torch.no_grad(), watching(model):
        if method is not None:
            return method.generate(model, input_BL, **options)
        if why_not(model, input_BL.shape[1] + options["max_new_tokens"]) is None:
            return decode(model, input_BL, **options)
        return generate(model, input_BL, torch.ones_like(input_BL), options)


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    method: Decoding | None = None,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    chat: bool = False,
    token_healing: bool = True,
) -> Record:
    """One continuation: prompt, continuation, tokens, seconds; with `chat` the answer to the prompt as a message.

    `read` are the tokens of the prompt; `passes` those of the model after the prompt's, which gives the first token,
    and `tokens_per_pass` what each of them gave; `computed` the positions that models went through, and of how many
    they made logits. What is not asked for is as the model's `generation_config` has it. With `token_healing` the
    prompt's last word is written anew, in tokens that go on with it. Raises `PretrainError` for values outside their
    bounds.
    """
    import torch

    from pretrain.core.batch import Vocabulary
    from pretrain.core.generation.computed import counting
    from pretrain.core.generation.options import Options
    from pretrain.core.generation.settings import options_of

    if method is None and not model.can_generate():
        raise PretrainError(f"{type(model).__name__} predicts no next token; accepted: a causal or seq2seq model")
    check_value("seed", seed, Seed)
    for name, value, hint in (("temperature", temperature, NonNegative), ("top_p", top_p, Share)):
        check_value(name, value, hint) if value is not None else None
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    check_value("stop", stop, tuple[str, ...])
    temperature, top_p = sampled(model, method, temperature, top_p)
    Options(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    if method is not None:
        check_references(method, numbers_of(tokenizer), "the model")
    answers = bool(model.config.is_encoder_decoder)  # to a text that stays whole
    whole = answers or (method is not None and method.longer)
    most = None if whole else positions(model.config.to_dict())
    ids, healed = _prompt_ids(tokenizer, prompt, max_new_tokens, most, chat, token_healing and not answers)
    again = healed.again if healed is not None else ()
    input_BL = torch.tensor([ids or [Vocabulary.of(tokenizer).pad]], device=model.device)
    torch.manual_seed(seed)
    options = options_of(
        model, tokenizer, input_BL.shape[1], max_new_tokens=max_new_tokens + len(again), temperature=temperature,
        top_p=top_p, stop=stop, healing=healed,
    )  # fmt: skip
    started = time.perf_counter()
    with counting(model) as computed:
        output_BN = continued(model, input_BL, options, method)
    # An encoder-decoder answers with its decoder's tokens alone, after the one that it starts from.
    given = 1 if method is None and answers else input_BL.shape[1]
    new = output_BN[0, given:].tolist()
    return {
        "prompt": prompt,
        "continuation": _written(tokenizer, [] if chat or answers else ids, again, new),
        "method": method.name if method is not None else ("sampling" if temperature else "greedy"),
        "tokens": max(0, len(new) - len(again)),
        "read": input_BL.shape[1],
        "written": len(new),  # with those of the prompt's last word
        "seconds": time.perf_counter() - started,
    } | _work(computed, len(new))


def _work(computed: Mapping[str, Computed], new: int) -> Record:
    """What models computed for new tokens: positions by model, the model's passes after the prompt, tokens of each."""
    model = computed.get("checkpoint")
    if model is None or not model.passes:  # its blocks are not known, or are not what computes
        return {}
    later = model.passes - (model.prompt or 1)
    more = {"tokens_per_pass": max(0, new - 1) / later} if later else {}  # the first is of the prompt's pass
    done = {place: {what: getattr(each, what) for what in Counted._fields} for place, each in computed.items()}
    return {"passes": later} | more | {"computed": done}
