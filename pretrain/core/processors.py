"""Processors: what turns a document's columns into a model's inputs, and is saved with the checkpoint.

Tokenizers, image processors, feature extractors and the processors that hold several of them are `transformers`' own;
for series of numbers, where it has none, `SeriesProcessor` stands here. `inputs_of` is the one way from documents to
tensors. Code that a checkpoint brings is run only with consent (`core/foreign/code.py`).

Shape letters: B documents, T time steps or samples, C channels.
"""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
import transformers
from numpy.typing import ArrayLike, NDArray
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchEncoding,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor

from pretrain.core.batch import Batch
from pretrain.core.batch import Document as Document
from pretrain.core.encoding import encoded
from pretrain.core.encoding.stored import check_opened, check_stored
from pretrain.core.errors import PretrainError, brief, nearest
from pretrain.core.files import read_object
from pretrain.core.folders import verify
from pretrain.core.foreign.code import consented, needs_consent
from pretrain.core.foreign.configs import unmarked
from pretrain.core.foreign.parsing import gave_up, parsing
from pretrain.core.quick.trust import check_trust, offline
from pretrain.core.quick.vocabulary import stored_numbers
from pretrain.core.samples import IMAGES, eight_bits

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

KINDS = (PreTrainedTokenizerBase, BaseImageProcessor, FeatureExtractionMixin, ProcessorMixin)
Processor: TypeAlias = "PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin"
Stored: TypeAlias = Mapping[str, bytes]  # a file as a column holds it: its `bytes`
STEP = 16  # tokens are padded to a multiple of it: few shapes, and the work of each is metered once
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip
PROCESSORS = ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor")  # in an `auto_map`
PREPROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class Extractor(Protocol):
    """What `transformers`' image processors and feature extractors do, of which the base classes say nothing."""

    sampling_rate: int  # of those of recordings

    def __call__(self, documents: Sequence[object], **options: object) -> Batch:
        """The model's inputs by name."""


class SeriesProcessor(FeatureExtractionMixin):
    """Series of numbers, time x channels, as `past_values` and `past_observed_mask` of `length` steps.

    A longer series gives its middle, a shorter one is filled with zeros before its beginning; what is filled, and what
    is not a number, is marked as not observed. `standardise` brings each series and channel to mean 0 and deviation 1.
    """

    model_input_names = ["past_values", "past_observed_mask"]

    def __init__(self, length: int = 64, channels: int = 1, standardise: bool = False, **more: object) -> None:
        for name, value in {"length": length, "channels": channels}.items():
            if value < 1:
                raise PretrainError(f"SeriesProcessor: {name} {value}: accepted: 1 or more")
        super().__init__(**more)
        self.length, self.channels, self.standardise = length, channels, standardise

    def __call__(self, series: Sequence[ArrayLike]) -> Batch:
        """`past_values` (B, T, C), float32, and `past_observed_mask`, bool, of the same shape."""
        values_BTC = np.zeros((len(series), self.length, self.channels), np.float32)
        seen_BTC = np.zeros(values_BTC.shape, bool)
        for b, values in enumerate(series):
            values_TC = np.asarray(values, np.float32)
            if values_TC.ndim != 2 or values_TC.shape[1] != self.channels or not len(values_TC):
                raise PretrainError(f"a series of shape {values_TC.shape}; accepted: time x {self.channels} channels")
            start = max(0, (len(values_TC) - self.length) // 2)
            values_TC = values_TC[start : start + self.length]
            seen_TC = np.isfinite(values_TC)
            if self.standardise:
                mean_C, deviation_C = _moments(values_TC, seen_TC)
                values_TC = (values_TC - mean_C) / np.maximum(deviation_C, 1e-6)
            values_BTC[b, -len(values_TC) :] = np.where(seen_TC, values_TC, 0)
            seen_BTC[b, -len(values_TC) :] = seen_TC
        return {"past_values": torch.from_numpy(values_BTC), "past_observed_mask": torch.from_numpy(seen_BTC)}


def _moments(
    values_TC: NDArray[np.float32], seen_TC: NDArray[np.bool_]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    count_C = np.maximum(seen_TC.sum(0), 1)
    mean_C = np.where(seen_TC, values_TC, 0).sum(0) / count_C
    return mean_C, np.sqrt((np.where(seen_TC, values_TC - mean_C, 0) ** 2).sum(0) / count_C)


SETTINGS: dict[str, tuple[type | UnionType, str]] = {  # of tokenizers, what type they are of
    "model_max_length": (int | float, "a number of tokens"),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
                    (str | dict, "a token, as a text or an object")),
    **dict.fromkeys(("clean_up_tokenization_spaces", "add_prefix_space", "add_bos_token", "add_eos_token",
                     "split_special_tokens"), (bool, "true or false")),
    "chat_template": (str | dict | list, "a template, or templates by name"),
}  # fmt: skip
OURS = {"SeriesProcessor": SeriesProcessor}


def new_processor(name: str, fields: Mapping[str, Any]) -> Processor:
    """A processor from the name of a class of `transformers` (or `SeriesProcessor`) and its fields.

    Raises `PretrainError` for what is no such class, and for fields that it cannot be made with.
    """
    with quiet():
        made = OURS.get(name) or getattr(transformers, name, None)
    if not (isinstance(made, type) and issubclass(made, KINDS)):
        known = [n for n in dir(transformers) if n.endswith(("Processor", "FeatureExtractor", "Tokenizer"))]
        raise PretrainError(
            f"processor class {name!r}{nearest(name, [*OURS, *known])}; accepted: a processor, image processor, "
            f"feature extractor or tokenizer of transformers {transformers.__version__}, or {', '.join(OURS)}"
        )
    try:
        with quiet():
            accepted = _fields_of(made)
            for field in fields if accepted else ():
                if field not in accepted:
                    raise PretrainError(f"unknown field {field!r} of processor {name}{nearest(field, accepted)}")
            return made(**fields)
    except PretrainError:
        raise
    except Exception as error:  # whatever a constructor makes of a value that does not suit it
        raise PretrainError(f"processor {name}: {type(error).__name__} {' '.join(str(error).split())[:300]}") from error


def _fields_of(made: type) -> set[str]:
    """The fields that a processor's class knows, which its constructor does not tell; empty where none can be made."""
    try:
        blank = made()
    except (TypeError, ValueError, OSError):
        return set()
    starts = [vars(cls)["__init__"] for cls in made.__mro__ if "__init__" in vars(cls)]
    parameters = {name for start in starts for name in inspect.signature(start).parameters}
    return parameters | set(vars(blank)) | set(getattr(getattr(made, "valid_kwargs", None), "__annotations__", ()))


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers prints of its choices and of what does not fit: an error says it in one line."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def load_processor(folder: Path | str) -> Processor | None:
    """The processor of a folder: a tokenizer, or what `preprocessor_config.json` names; None where there is none."""
    folder = Path(folder)
    present = [folder / name for name in (*PREPROCESSOR_FILES, *TOKENIZER_FILES) if (folder / name).exists()]
    if not present:
        return None
    verify(folder, lambda name: not name.endswith(".safetensors"))
    check_trust(folder)
    _check_settings(folder / "tokenizer_config.json")
    check_stored(folder)
    keys = PROCESSORS if present[0].name in PREPROCESSOR_FILES else ("AutoTokenizer",)
    try:
        with quiet(), offline(), unmarked(folder) as place:
            made = (brought_opener(folder, *keys) or _opener(place))(place)
            check_opened(folder, tokenizer_in(made))
            return made
    except PretrainError:
        raise
    except BaseException as error:  # tokenizers raises plain `Exception`, or panics
        if not isinstance(error, Exception) and not gave_up(error):
            raise
        for path in present:
            if path.suffix == ".json":
                read_object(path)  # names the file when it is the one that is damaged
        kind = "processor" if present[0].name in PREPROCESSOR_FILES else "tokenizer"
        raise PretrainError(f"{folder}: the {kind} cannot be loaded: {_reason(folder, error)}") from error


def _check_settings(path: Path) -> None:
    """Refuse settings of a tokenizer that are only wrong where it is used."""
    settings = read_object(path) if path.is_file() else {}
    for name, (kinds, accepted) in SETTINGS.items():
        value = settings.get(name)
        odd = isinstance(value, bool) != (kinds is bool) or (isinstance(value, float) and math.isnan(value))
        if value is not None and (odd or not isinstance(value, kinds)):
            raise PretrainError(f"{path}: {name} {brief(value)}: accepted: {accepted}")
    for name in ("padding_side", "truncation_side"):
        if settings.get(name, "left") not in ("left", "right"):
            raise PretrainError(f"{path}: {name} {brief(settings[name])}: accepted: left, right")


def _reason(folder: Path, error: BaseException) -> str:
    return needs_consent(folder, "config.json").removeprefix("; ") or " ".join(str(error).split())[:300]


def brought_opener(folder: Path, *keys: str) -> Callable[[Path], Processor] | None:
    """How what the folder's code has for these keys of `auto_map` is opened; None where nothing is, or may be run."""
    code = consented(folder)
    made = code.first_of(*keys) if code is not None else None
    if made is None:
        return None
    if not issubclass(made, KINDS):
        raise PretrainError(f"{folder}: {made.__name__} of its code is no processor of transformers")
    return partial(made.from_pretrained, local_files_only=True)


def _opener(folder: Path) -> Callable[[Path], Processor]:
    """How the folder's processor is opened."""
    kinds: dict[str, type[AutoImageProcessor | AutoFeatureExtractor]] = {
        "image_processor_type": AutoImageProcessor,
        "feature_extractor_type": AutoFeatureExtractor,
    }
    opened: Callable[..., Processor] = AutoTokenizer.from_pretrained
    for path in filter(Path.exists, (folder / name for name in PREPROCESSOR_FILES)):
        facts = read_object(path)
        if facts.get("feature_extractor_type") in OURS:
            ours = OURS[facts.pop("feature_extractor_type")]
            with parsing(str(path), "the file as it was written"):
                made = ours(**facts)
            return lambda _: made
        opened = AutoProcessor.from_pretrained
        if "processor_class" not in facts:
            opened = next((kind.from_pretrained for key, kind in kinds.items() if key in facts), opened)
        break
    return partial(opened, local_files_only=True, trust_remote_code=False)


def check_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase | None, size: object) -> None:
    """Refuse a tokenizer that gives tokens for which the model has no row; one for padding is in no text."""
    if tokenizer is None or not isinstance(size, int) or isinstance(size, bool):
        return
    numbers = {**tokenizer.get_vocab(), **(stored_numbers(folder) or {})}  # an added token's, too, which is passed over
    if max(numbers.values(), default=-1) < size:
        return
    beyond = [name for name, each in numbers.items() if each >= size and name != tokenizer.pad_token]
    if beyond:
        raise PretrainError(
            f"{folder}: token {numbers[beyond[0]]} of its tokenizer, {beyond[0][:40]!r}, has no row in the model; "
            f"accepted: tokens from 0 to {size - 1}, as vocab_size in config.json says"
        )


def tokenizer_in(processor: Processor | None) -> PreTrainedTokenizerBase | None:
    """The processor's tokenizer: itself, the one that it holds, or None."""
    if processor is None or isinstance(processor, PreTrainedTokenizerBase):
        return processor
    return getattr(processor, "tokenizer", None)


def columns_of(processor: Processor) -> tuple[str, ...]:
    """The columns of a document that the processor reads."""
    return tuple(column for column, _ in _parts(processor))


def _parts(processor: Processor) -> list[tuple[str, Processor]]:
    """The processor's parts by the column that each reads."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return [("text", processor)]
    if isinstance(processor, SeriesProcessor):
        return [("series", processor)]
    if isinstance(processor, BaseImageProcessor):
        return [("image", processor)]
    if isinstance(processor, FeatureExtractionMixin):
        return [("audio", processor)]
    held = [getattr(processor, name, None) for name in ("tokenizer", "image_processor", "feature_extractor")]
    return [part for inner in held if inner is not None for part in _parts(inner)]


UNITS = {"text": "tokens", "image": "images", "audio": "samples", "series": "steps"}  # what a batch's `tokens` counts


def unit_of(processor: Processor | None) -> str:
    """What the `tokens` of a processor's inputs are, in a word; `tokens` where they are of several kinds."""
    columns = [column for column, _ in _parts(processor)] if processor is not None else []
    return UNITS[columns[0]] if len(columns) == 1 else "tokens"


def inputs_of(processor: Processor, documents: Sequence[Document], length: int) -> Batch:
    """The documents as a model's arguments, under `transformers`' own names, and `tokens` (), how many they hold.

    `length` is the most tokens or samples of one document; of what is longer the beginning is taken. Tokens are those
    of its text, samples those of a recording, steps those of a series; an image counts as one.
    """
    batch: Batch = {}
    tokens = 0
    for column, part in _parts(processor):
        missing = next((d for d in documents if d.get(column) is None), None)
        if missing is not None:
            raise PretrainError(f"document {missing.get('id')!r} has no {column!r}; accepted: one in each document")
        inputs, count = _READERS[column](part, [d[column] for d in documents], length)
        batch |= inputs
        tokens += count
    return batch | {"tokens": torch.tensor(tokens)}


def _read_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> tuple[Batch, int]:
    step = max(n for n in range(1, STEP + 1) if not length % n)  # tokenizers take no other numbers

    def encode(padding: bool | str, longest: int) -> BatchEncoding:
        return encoded(
            tokenizer, list(texts), truncation=True, max_length=longest, padding=padding, pad_to_multiple_of=step,
            split_special_tokens=True, return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip

    inputs = encode(True, length)
    if not inputs["input_ids"].numel():  # no text has a token; models take no row without any
        inputs = encode("max_length", step)
    return dict(inputs), int(inputs["attention_mask"].sum())


def _read_images(processor: Extractor, images: Sequence[Image | Stored], length: int) -> tuple[Batch, int]:
    pixels = processor([image_of(image) for image in images], return_tensors="pt")
    return dict(pixels), len(images)


def _read_audio(extractor: Extractor, recordings: Sequence[Stored], length: int) -> tuple[Batch, int]:
    waves = [samples_of(recording, extractor.sampling_rate)[:length] for recording in recordings]
    features = extractor(
        waves, sampling_rate=extractor.sampling_rate, padding=True, pad_to_multiple_of=max(1, length // STEP),
        return_tensors="pt",
    )  # fmt: skip
    return dict(features), sum(map(len, waves))


def _read_series(processor: SeriesProcessor, series: Sequence[ArrayLike], length: int) -> tuple[Batch, int]:
    inputs = processor(series)
    return inputs, int(inputs["past_observed_mask"].any(-1).sum())


_READERS: dict[str, Callable[[Any, Sequence[Any], int], tuple[Batch, int]]] = {
    "text": _read_text, "image": _read_images, "audio": _read_audio, "series": _read_series,
}  # fmt: skip


def image_of(value: Image | Stored) -> Image:
    """A column's image as RGB, decoded where it is still a file's `{"bytes", "path"}`."""
    from PIL import Image

    try:
        image = value if isinstance(value, Image.Image) else Image.open(io.BytesIO(value["bytes"]), formats=IMAGES)
        return eight_bits(image).convert("RGB")
    except PretrainError:
        raise
    except Exception as error:  # pillow has many ways to tell of a broken file
        raise PretrainError(f"an image cannot be read ({error}); accepted: {{bytes, path}} of PNG, JPEG, …") from error


def samples_of(value: Stored, rate: int) -> NDArray[np.float32]:
    """A column's recording as `samples_T`, mean of its channels, at `rate` samples a second."""
    import soundfile
    from scipy.signal import resample_poly

    try:
        samples_TC, stored_rate = soundfile.read(io.BytesIO(value["bytes"]), dtype="float32", always_2d=True)
    except (TypeError, KeyError, RuntimeError, ValueError, OSError) as error:
        raise PretrainError(f"a recording cannot be read ({error}); accepted: {{bytes, path}} of WAV, FLAC") from error
    samples_T = samples_TC.mean(1)
    if stored_rate != rate:
        common = np.gcd(stored_rate, rate)
        samples_T = resample_poly(samples_T, rate // common, stored_rate // common).astype(np.float32)
    return samples_T
