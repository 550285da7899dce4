"""What lm-eval needs of us: a model of its kind, and its tasks' YAML with files in place of datasets from the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

import evaluate
import numpy as np
import torch
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import metric_registry
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode, text_of
from pretrain.core.errors import PretrainError, listed, nearest, unknown
from pretrain.core.files import JSONObject
from pretrain.core.foreign import yaml
from pretrain.core.generation.continuations import BATCH_TOKENS, judge, sample
from pretrain.core.generation.forward import why_not
from pretrain.core.generation.loop import decode
from pretrain.core.generation.options import Options, SettingFields
from pretrain.core.generation.settings import options_of
from pretrain.core.models.features import evaluating
from pretrain.core.system.templates import bounded
from pretrain.evaluation._predictions import framed, predictions

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

READERS = ("json", "csv", "parquet", "text")
DESCRIBING = ("add_env_info", "get_git_commit_hash")
NEW_TOKENS = 256  # of an answer, where a task does not say

Task = JSONObject  # of a YAML file


class OurModel(TemplateLM):
    """A model and its tokenizer as lm-eval wants them.

    A text begins as the documents that the model was trained on do; special tokens' names in it are plain text. A
    context and its continuation are encoded together and parted, and too long ones lose tokens from the left.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.length = model, tokenizer, length
        self.vocabulary = Vocabulary.of(tokenizer)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.vocabulary.pad if self.vocabulary.eos is None else self.vocabulary.eos

    @property
    def prefix_token_id(self) -> int:
        """What a text begins with."""
        return self.eot_token_id if self.vocabulary.begin is None else self.vocabulary.begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """A text's tokens, the one that begins it first unless that is not wanted."""
        begin = self.vocabulary.begin if add_special_tokens is not False else None
        return ([] if begin is None else [begin]) + encode(self.tokenizer, [string])[0].tolist()

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether its tokens are the likeliest."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Instance], **_: object) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, after in requests:
            if len(after) > self.length:
                raise PretrainError(
                    f"harness: a continuation of {len(after)} tokens, {text[:40]!r}: accepted: at most {self.length}"
                )
            pairs.append((context[-(self.length + 1 - len(after)) :], after))
        return [(judgement.logp, judgement.greedy) for judgement in judge(self.model, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that each predict tokens of their own."""
        texts = [request.args[0] for request in requests]
        documents = framed(self.tokenizer, self.vocabulary, texts, end=False)
        return [-float(prediction.nll_T.sum()) for prediction in predictions(self.model, documents, length=self.length)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled answers up to the first of the texts that end one.

        What a request does not say is as the checkpoint's `generation_config` has it. Greedy ones that end alike are
        answered together, sampled ones by themselves, so that what is drawn for one does not depend on the others.
        """
        asked = [_Asked.of(request.args[1], self.length) for request in requests]
        prompts = [
            (self.tok_encode(request.args[0]) or [self.prefix_token_id])[-(self.length - each.most) :]
            for request, each in zip(requests, asked, strict=True)
        ]
        answers = [""] * len(requests)
        for lot in _lots(asked, prompts):
            each, longest = asked[lot[0]], max(len(prompts[i]) for i in lot)
            sampled = bool(each.options.get("do_sample", False))
            options = options_of(
                self.model, self.tokenizer, longest, max_new_tokens=each.most, stop=each.until,
                temperature=float(each.options.get("temperature", 1.0)) if sampled else 0.0,
                top_p=float(each.options.get("top_p", 1.0)) if sampled else 1.0, **each.further(),
            )  # fmt: skip
            for i, tokens in zip(lot, self._continued([prompts[i] for i in lot], options), strict=True):
                text = text_of(self.tokenizer, tokens, skip_special_tokens=True)
                for end in each.until:
                    text = text.split(end)[0]
                answers[i] = text
        return answers

    def _continued(self, prompts: Sequence[Sequence[int]], options: SettingFields) -> list[list[int]]:
        """What follows each prompt. Padding would count as text with what looks at the tokens before."""
        longest = max(map(len, prompts))
        alone = options.get("processors") is not None or len(prompts) == 1
        if alone or why_not(self.model, longest + options["max_new_tokens"]) is not None:
            return [sample(self.model, ids, 1, **options, generator=self.generator)[0] for ids in prompts]
        rows = [[options["pad"]] * (longest - len(ids)) + list(ids) for ids in prompts]
        ids_BL = torch.tensor(rows, device=self.model.device)
        lengths_B1 = torch.tensor([[len(ids)] for ids in prompts], device=self.model.device)
        mask_BL = torch.arange(longest, device=self.model.device) >= longest - lengths_B1
        with evaluating(self.model):
            new_BN = decode(self.model, ids_BL, attention_mask_BL=mask_BL, **options)[:, longest:]
        return [Options(**options).cut(row) for row in new_BN.tolist()]


@dataclass(frozen=True)
class _Asked:
    """What a request to continue a text asks for."""

    most: int
    until: tuple[str, ...]
    options: JSONObject

    @classmethod
    def of(cls, options: JSONObject, length: int) -> _Asked:
        until = options.get("until") or []
        most = int(options.get("max_gen_toks", NEW_TOKENS))
        if most >= length:
            raise PretrainError(f"harness: max_gen_toks {most}: accepted: below the length {length}")
        return cls(most, tuple(filter(None, [until] if isinstance(until, str) else until)), options)

    def further(self) -> JSONObject:
        """The fields of `GenerationConfig` besides those that are options here."""
        ours = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
        known = GenerationConfig().to_dict()
        if wrong := [name for name in self.options if name not in ours and name not in known]:
            raise PretrainError(
                f"harness: generation_kwargs: {wrong[0]!r}{nearest(wrong[0], known)}: accepted: until, max_gen_toks, "
                "or a field of transformers' GenerationConfig"
            )
        return {name: value for name, value in self.options.items() if name not in ours}


def _lots(asked: Sequence[_Asked], prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The numbers of the requests to answer together: greedy, alike, of about one length."""
    alike: dict[str, list[int]] = {}
    for i, each in enumerate(asked):
        key = i if each.options.get("do_sample", False) else json.dumps(each.options, sort_keys=True, default=str)
        alike.setdefault(str(key), []).append(i)
    for numbers in alike.values():
        numbers.sort(key=lambda i: len(prompts[i]), reverse=True)
        rows = max(1, BATCH_TOKENS // (len(prompts[numbers[0]]) + asked[numbers[0]].most))
        yield from (numbers[start : start + rows] for start in range(0, len(numbers), rows))


def configurations(folder: Path, tasks: Sequence[str], cache: Path) -> list[Task]:
    """The tasks of a folder by name, all of them by default, their data files found beside them."""
    read = [_read(path) for path in sorted(folder.glob("*.yaml"))]
    known = {task["task"]: task for task in read}
    if not known:
        raise PretrainError(f"harness: folder {folder}: accepted: one with lm-eval tasks, NAME.yaml")
    for name in tasks:
        if name not in known:
            raise unknown(f"task in {folder}", name, known)
    return [_local(folder, known[name], cache) for name in tasks or known]


def _read(path: Path) -> Task:
    try:
        task = cast("Task", yaml.loads(yaml.read_text(path), str(path))[0])
    except PretrainError as error:
        raise PretrainError(f"harness: {error}; accepted: YAML without tags such as !function") from error
    if not isinstance(task, dict) or not isinstance(task.get("task"), str) or "include" in task or "group" in task:
        raise PretrainError(f"harness: {path}: accepted: one task with its name, `task: NAME`, and no include or group")
    for entry in task.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if name not in metric_registry or (isinstance(entry, dict) and entry.get("hf_evaluate")):
            raise PretrainError(
                f"harness: {path}: metric {name!r}: accepted: {listed(sorted(metric_registry), str(name))}"
            )
    return task


def _local(folder: Path, task: Task, cache: Path) -> Task:
    """A task with the whole paths of its files, which must be there: nothing is fetched."""
    name, reader = task["task"], task.get("dataset_path")
    if reader not in READERS:
        raise PretrainError(f"harness: task {name}: dataset_path {reader!r}: accepted: {', '.join(READERS)}")
    kwargs = dict(task.get("dataset_kwargs") or {})
    files = kwargs.get("data_files")
    if not files:
        raise PretrainError(f"harness: task {name}: dataset_kwargs has no data_files; accepted: files of the folder")
    kwargs["cache_dir"] = str(cache)

    def placed(value: object) -> object:
        if isinstance(value, dict):
            return {split: placed(file) for split, file in value.items()}
        if isinstance(value, list):
            return [placed(file) for file in value]
        path = folder / str(value)
        if "://" in str(value) or not path.is_file():
            raise PretrainError(f"harness: task {name}: data_files {value!r}: accepted: a file in {folder}")
        return str(path.resolve())

    return task | {"dataset_kwargs": kwargs | {"data_files": placed(files)}}


class _Bounded(ImmutableSandboxedEnvironment):
    """Templates that are made and filled in within bounds before they are for each document.

    To make one computes what is constant in it, and may be as long as to fill it in.
    """

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True)
        self.kept: dict[str, Template] = {}  # lm-eval makes a template anew for each document

    def filled(self, source: str, columns: Mapping[str, object]) -> str:
        """The text of a template."""
        if source not in self.kept:
            bounded(lambda: self.from_string(source).render(**columns), "a template of the task")
            self.kept[source] = self.from_string(source)
        return self.kept[source].render(**columns)


def _refused(metric: object, *_: object, **__: object) -> NoReturn:
    raise PretrainError(f"harness: metric {metric!r}: accepted: a metric of lm-eval; files of code are never run")


def _nothing(*_: object) -> None:
    """In place of what describes the machine."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """No code of a task is run, and the streams of random numbers that lm-eval seeds are afterwards as they were.

    A task's templates are a program of Jinja, which reaches all of Python where it is not kept in; a metric that
    lm-eval does not know is looked for as a file of Python. Nor are the programs run by which lm-eval describes the
    machine (pip and git among them): that is not read here, and takes longer than a small task.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    templates, apply, load = utils.env, utils.apply_template, evaluate.load
    contained = _Bounded()
    contained.filters |= templates.filters
    described = {name: getattr(evaluator, name) for name in DESCRIBING}
    utils.env, utils.apply_template, evaluate.load = contained, contained.filled, _refused
    vars(evaluator).update(dict.fromkeys(DESCRIBING, _nothing))
    try:
        yield
    finally:
        utils.env, utils.apply_template, evaluate.load = templates, apply, load
        vars(evaluator).update(described)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
