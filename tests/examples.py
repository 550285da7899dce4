"""The shelf: tiny models, a tokenizer and texts, made once, and one small example of each surgery and decoding method.

The contracts of a kind run over `names(kind)`, so that a new method is held to them without being listed. One whose
defaults do not fit a model of width 32 has its fields in `FIELDS`; one that works on an operated model, in `AFTER`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from conftest import TASK, TINY
from torch import Tensor

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.method import method_class
from pretrain.core.models.families import new_model
from pretrain.core.quick.table import listed
from pretrain.core.registry import methods
from pretrain.corpus.store import write_corpus
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.surgery import Inputs

TEXTS = ["the quick brown fox jumps over the lazy dog, then the dog sleeps while the fox is quick"] * 3
MORE = ["The Dog returns a value, a vulpine fox returns it; zebras sleep over there"] * 3
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "returns", "vulpine", "value")


class Shelf:
    """What examples are made of, each made once; models and tokenizers are handed out as copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """A copy of what `make` gives, which is called for the first alone."""
        if key not in self._made:
            self._made[key] = make()
        return copy.deepcopy(self._made[key])

    @cached_property
    def tokenizer(self) -> Any:
        """A byte-level tokenizer of some 290 entries, with a mask."""
        return train_tokenizer(TEXTS, vocab_size=290, mask=True)

    def model(self, family: str, seed: int = 0, **fields: Any) -> Any:
        """A tiny model in the tokenizer's entries, in evaluation mode."""
        made = lambda: new_model(  # noqa: E731
            family, TINY[family] | fields, task=TASK[family], vocabulary=Vocabulary.of(self.tokenizer), seed=seed
        ).eval()
        return self.once((family, seed, *sorted(fields.items())), made)

    def decoded(self, family: str) -> Any:
        """A tiny causal model whose greedy tokens vary, of 1024 positions and more."""
        return self.model(family, **WIDE, **({"n_positions": 1024} if family == "gpt2" else {}))

    def batches(self) -> list[dict[str, Tensor]]:
        """Text to calibrate on: two batches of two rows, each row two documents and padding."""
        ids_BL = torch.randint(3, len(self.tokenizer), (4, 24), generator=torch.Generator().manual_seed(0))
        document_BL = torch.tensor([1] * 10 + [2] * 9 + [0] * 5).expand(4, 24)
        place_BL = torch.cat([torch.arange(10), torch.arange(9), torch.arange(5)]).expand(4, 24)
        whole = {"input_ids": ids_BL, "attention_mask": document_BL, "position_ids": place_BL}
        whole["domain_B"] = torch.tensor([0, 1, 0, 1])
        return [{name: value[row : row + 2] for name, value in whole.items()} for row in (0, 2)]

    def fields(self, name: str, family: str) -> Fields:
        """The hyperparameters of a method's example."""
        return FIELDS[name](self, family) if name in FIELDS else {}

    def saved(self, family: str, seed: int = 0, **fields: Any) -> str:
        """The folder of a model's checkpoint."""
        folder = self.folder / "-".join(map(str, (family, seed, *fields.values())))
        if not folder.exists():
            checkpoint.save(self.model(family, seed, **fields), copy.deepcopy(self.tokenizer), folder)
        return str(folder)

    @cached_property
    def other_tokenizer(self) -> str:
        """The folder of a tokenizer of another text."""
        train_tokenizer(MORE, vocab_size=310).save_pretrained(self.folder / "tokenizer")
        return str(self.folder / "tokenizer")

    @cached_property
    def corpus(self) -> str:
        """The folder of a corpus of that other text."""
        documents = [{"text": text, "domain": "text", "id": str(number)} for number, text in enumerate(MORE)]
        write_corpus(documents, self.folder / "corpus", validation=0, test=0)
        return str(self.folder / "corpus")

    @cached_property
    def vectors(self) -> str:
        """A file of word vectors."""
        path = self.folder / "words.vec"
        numbers = torch.randn(len(WORDS), 5, generator=torch.Generator().manual_seed(0)).tolist()
        rows = (f"{word} {' '.join(map(str, row))}" for word, row in zip(WORDS, numbers, strict=True))
        path.write_text("\n".join((f"{len(WORDS)} 5", *rows)) + "\n", encoding="utf-8")
        return str(path)

    def coprocessor(self, family: str) -> str:
        """The folder of a coprocessor of `decoded(family)`."""
        folder = self.folder / f"{family}-coprocessor"
        if not folder.exists():
            model = self.decoded(family)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                checkpoint.save(method_class("cache_augmentation")(latents=2).modules(model), None, folder)
        return str(folder)


WIDE = {"initializer_range": 0.4}  # models whose greedy tokens vary

Fields = dict[str, Any]
FIELDS: dict[str, Callable[[Shelf, str], Fields]] = {
    "dsee": lambda shelf, family: {"rank": 4, "nonzero": 8},
    "dylora": lambda shelf, family: {"rank": 4},
    **dict.fromkeys(("streaming_llm", "expected_attention"), lambda shelf, family: {"n_sink": 1}),
    "speculative_decoding": lambda shelf, family: {"draft": shelf.saved(family, 1, **WIDE)},
    "kivi": lambda shelf, family: {"bits": 4, "group_size": 2, "residual_length": 2},
    "snapkv": lambda shelf, family: {"window_size": 2, "kernel_size": 3},
    "dylora_truncate": lambda shelf, family: {"rank": 2},
    "increlora": lambda shelf, family: {"max_rank": 4},
    "intrinsic_dimension": lambda shelf, family: {"dimension": 40},
    "lora": lambda shelf, family: {"rank": 4},
    "peft_adapter": lambda shelf, family: {"config": {"r": 2, "target_modules": "all-linear"}},
    "lst": lambda shelf, family: {"reduction": 2},
    "spafit": lambda shelf, family: {  # biases in a block, or scales where it has none, and LoRA in another
        "n1": 0, "n2": 1, "scales": family in ("llama", "qwen3", "modernbert"),
    },
    "exit_heads": lambda shelf, family: {"exits": (1,), "epochs": 1},
    "flexi_depth": lambda shelf, family: {"layers": 1, "reduction": 4},
    "codebook_features": lambda shelf, family: {"codes": 16, "k": 2},
    "compressor": lambda shelf, family: {
        "target_bytes": 70_000, "vocabulary": (), "heads": (2, 4), "width": (16, 32), "feed_forward": (32, 48),
        "layers": (1, 2), "length": 24, "population": 4, "generations": 2,
    },
    "autodistil_search": lambda shelf, family: {
        "hidden_size": (16, 32), "num_attention_heads": (2, 4), "num_hidden_layers": (1, 2), "mlp_ratio": (1.0, 1.5), "head_size": 8,
    },
    "gptq": lambda shelf, family: {"group_size": 8, "block_size": 16},
    "awq": lambda shelf, family: {"group_size": 8, "ratios": 3},
    "pre_calibration": lambda shelf, family: {"group_size": 8, "steps": 2},
    "sparse_llm": lambda shelf, family: {  # which with other activations prunes layer by layer
        "epochs": 1, "block_size": 16, "solver": "sparse_llm" if family in ("llama", "qwen3") else "wanda",
    },
    "bert2bert": lambda shelf, family: {"intermediate_size": 160, "num_hidden_layers": 3},
    "g_stack": lambda shelf, family: {"growth": 2},
    "orthogonal_growth": lambda shelf, family: {"first": 0, "last": 0},
    "uncurl": lambda shelf, family: {"experts": 2},
    "read_me": lambda shelf, family: {"embedding_dim": 16},
    "instruction_residual": lambda shelf, family: {"base": shelf.saved(family, 1), "instruct": shelf.saved(family, 2)},
    "instruction_vector": lambda shelf, family: {"base": shelf.saved(family, 1), "instruct": shelf.saved(family, 2)},
    "model_soup": lambda shelf, family: {"recipe": "uniform"},
    "slerp": lambda shelf, family: {"other": shelf.saved(family, 1), "t": {"attn": (0.0, 1.0), "*": 0.5}},
    "task_arithmetic": lambda shelf, family: {"models": (shelf.saved(family, 1), shelf.saved(family, 2)), "weights": (0.4, (0.1, 0.7))},
    "breadcrumbs": lambda shelf, family: {"models": (shelf.saved(family, 1), shelf.saved(family, 2))},
    "dare": lambda shelf, family: {"models": (shelf.saved(family, 1), shelf.saved(family, 2))},
    "della": lambda shelf, family: {"models": (shelf.saved(family, 1), shelf.saved(family, 2))},
    "linear_merge": lambda shelf, family: {"models": (shelf.saved(family, 1), shelf.saved(family, 2))},
    "model_stock": lambda shelf, family: {"models": (shelf.saved(family, 1), shelf.saved(family, 2))},
    "passthrough": lambda shelf, family: {"models": (shelf.saved(family, 1),), "slices": ((0, 0, 2), (1, 1, 2))},
    "ties": lambda shelf, family: {"models": (shelf.saved(family, 1), shelf.saved(family, 2))},
    "ofa": lambda shelf, family: {  # in factors where there is one table
        "tokenizer": shelf.other_tokenizer, "vectors": (shelf.vectors,),
        "dimension": 8 if family in ("gpt2", "bert", "modernbert") else 0,
    },
    "trim_scripts": lambda shelf, family: {"scripts": ("Latin",)},
    "contextual_rows": lambda shelf, family: {"tokenizer": shelf.other_tokenizer, "corpus": shelf.corpus, "length": 16},
    "vocabulary_curriculum": lambda shelf, family: {"threshold": 20.0, "quantile": 1.0, "new_tokens": 5},
    "vocabulary_expansion": lambda shelf, family: {"tokenizer": shelf.other_tokenizer, "initialisation": "mean"},
    "pyramid_infer": lambda shelf, family: {"min_context_length": 4},
    "latent_deliberation": lambda shelf, family: {"coprocessor": shelf.coprocessor(family)},
    "sleep_time": lambda shelf, family: {"rounds": 1, "notes_tokens": 4, "separator": " ", "tokenizer": shelf.saved(family)},
    "proxy_tuning": lambda shelf, family: {"expert": shelf.saved(family, 1, **WIDE), "anti_expert": shelf.saved(family, 2, **WIDE)},
    "softmax_cascade": lambda shelf, family: {"exits": (1,), "thresholds": (0.3,)},
    "homer": lambda shelf, family: {"max_chunk_len": 8},
    "minference": lambda shelf, family: {"vertical": 2, "slash": 2, "last_q": 2},
}  # fmt: skip
PLAIN: dict[str, Callable[[Shelf, str], Fields]] = {  # with which a decoding method that is not lossless is plain decoding
    "pyramid_infer": lambda shelf, family: {"prefill_decay_ratio": 1.0, "gen_decay_ratio": 1.0, "gen_compress_ratio": 1.0},
    **dict.fromkeys(
        ("streaming_llm", "snapkv", "h2o", "expected_attention"), lambda shelf, family: {"compression_ratio": 0.0}
    ),
    "kivi": lambda shelf, family: {},  # prompts shorter than what stays whole
    "sleep_time": lambda shelf, family: {"rounds": 0},
    "proxy_tuning": lambda shelf, family: {name: shelf.saved(family, 1, **WIDE) for name in ("expert", "anti_expert")},
    "softmax_cascade": lambda shelf, family: {"exits": (1,), "thresholds": (2.0,)},  # above every probability
    "homer": lambda shelf, family: {},  # prompts of one chunk
    "code_steering": lambda shelf, family: {},  # no codes
    "minference": lambda shelf, family: {},  # prompts shorter than what is kept
}  # fmt: skip
NEVER_PLAIN = {"latent_deliberation": "what the coprocessor adds to the cache is always seen"}
AFTER = {"dylora_truncate": "dylora", "merge_adapters": "lora"}  # what a surgery works on


def names(kind: str) -> list[str]:
    """All methods of a kind, of this package."""
    return [name for name, row in methods().items() if row.kind == kind and row.ours]


def declared(name: str, family: str) -> bool:
    """Whether a method says that it works on models of a type: of a family it names, or on any."""
    entry = listed(family)
    return entry is not None and entry.among(methods()[name].families)


def example(name: str, shelf: Shelf, family: str = "llama") -> Any:
    """The method with hyperparameters of a size for the shelf's models."""
    return method_class(name)(**shelf.fields(name, family))


def operated(name: str, shelf: Shelf, family: str) -> tuple[Any, Any]:
    """A tiny model after the surgery, and its tokenizer; the same for the same arguments."""

    def operate() -> tuple[Any, Any]:
        model = operated(AFTER[name], shelf, family)[0] if name in AFTER else shelf.model(family)
        inputs = Inputs(copy.deepcopy(shelf.tokenizer), shelf.batches(), [shelf.model(family, 1)], seed=1)
        made = example(name, shelf, family)(model, inputs)
        return made.eval(), inputs.extra.get("tokenizer", inputs.tokenizer)

    return shelf.once((name, family), operate) if name in AFTER.values() else operate()


IDS = torch.tensor([[1, 5, 9, 11, 40, 2]])


def logits(model: Any, *, grad: bool = False, ids_BL: Tensor = IDS) -> Tensor:
    """The logits of `ids_BL`, of an encoder-decoder for the decoder's positions."""
    extra = {"decoder_input_ids": ids_BL} if model.config.is_encoder_decoder else {}
    with torch.set_grad_enabled(grad):
        return model.eval()(ids_BL, **extra).logits


def trained(model: Any, seed: int = 0, by: float = 0.1) -> Any:
    """As if it had been trained: whatever is not frozen gets other numbers."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn_like(parameter)
    return model
