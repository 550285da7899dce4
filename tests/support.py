"""Which method works on which model type: each is run on a tiny model of the type, and what comes of it recorded.

    python tests/support.py [KIND ...] --record     # writes docs/support.json, from which docs/support.md is made

A pair works if it does what `check` asks of its kind of method; it is refused if it ends with the one clear error. All
else is a defect, and keeps its type out of the record. Without types those are tried that the record has not yet.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conftest
import examples
import examples_training
import gradient_cases
import torch
import zoo
from examples import Shelf, logits, operated
from examples_training import Material

from pretrain.core import checkpoint
from pretrain.core.batch import Batch, counts
from pretrain.core.errors import PretrainError
from pretrain.core.generation.forward import why_not
from pretrain.core.generation.loop import decode
from pretrain.core.method import method_class
from pretrain.core.models.families import family
from pretrain.core.registry import methods
from pretrain.stages.evaluate import evaluate
from pretrain.training.compatible import check_families

COLUMNS = ("objective", "evaluation", "surgery", "decoding")
PAGE = Path(__file__).parent.parent / "docs" / "support.json"
OWN = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")  # of the vocabulary at hand
WORKS = "works"


@contextmanager
def known(kind: str) -> Iterator[None]:
    """While open, the examples make models of this type."""
    small = {name: value for name, value in zoo.fields(kind).items() if name not in OWN}
    conftest.TINY[kind], conftest.TASK[kind] = small, zoo.TASKS[kind]
    gradient_cases.GENERATES[kind] = zoo.TASKS[kind]
    try:
        yield
    finally:
        for table in (conftest.TINY, conftest.TASK, gradient_cases.GENERATES):
            table.pop(kind)


def names() -> list[str]:
    """The methods of the table's columns, by their kind."""
    rows = [(COLUMNS.index(row.kind), name) for name, row in methods().items() if row.kind in COLUMNS and row.ours]
    return [name for _, name in sorted(rows)]


FUNCTION = "def f{0}(a, b):\n    x = a * {0} - b\n    return [x, b]\n\n\n"


class _Named:
    """A method of which only the name and the families matter."""

    def __init__(self, name: str) -> None:
        self.name, self.families = name, methods()[name].families


class Bench:
    """What the methods are tried with."""

    def __init__(self, prepared: Path, stories: list[dict[str, str]], folder: Path) -> None:
        self.shelf, self.material = Shelf(folder), Material(prepared, folder, stories)

    def outcome(self, name: str, kind: str) -> str:
        """`WORKS`, or the error with which the method refuses the type."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_families([_Named(name)], family(self.shelf.model(kind)))
                getattr(self, f"check_{methods()[name].kind}")(name, kind)
        except PretrainError as error:
            assert "\n" not in str(error), error
            return str(error)
        return WORKS

    made: Any = None  # what makes models in place of tiny ones

    def given(self, name: str, kind: str) -> dict[str, Any]:
        """What fits an objective to the type."""
        return examples_training.FITTED.get(name, lambda _: {})(kind)

    def rows(self, case: gradient_cases.Case) -> list[Any]:
        """What an objective is tried on."""
        return case.rows[:2]

    def ids(self, tokenizer: Any) -> torch.Tensor:
        """The tokens `ids_BL` that an operated model is shown."""
        return examples.IDS

    def documents(self) -> list[dict[str, Any]]:
        """Of two domains, with all columns that evaluations read; the text is a function of Python and a comment."""
        stories = self.material.stories
        python = [story for story in stories if story["domain"] == "python"]
        chosen = [*python[:12], *[story for story in stories if story["domain"] != "python"][:12]]
        return [
            {
                "text": FUNCTION.format(n) + "\n# ".join(["", *text[:200].splitlines()]), "domain": story["domain"], "id": str(n), "label": "ab"[n % 2],
                "source": text[:60], "target": text[60:100], "prompt": text[:30], "answer": text[30:36], "group": str(n % 12),
            }
            for n, story in enumerate(chosen) if (text := story["text"])
        ]  # fmt: skip

    def check_objective(self, name: str, kind: str) -> None:
        """Its loss is finite, and so is a gradient that is not 0."""
        folder = self.shelf.folder / f"{name}-{kind}"
        folder.mkdir(exist_ok=True)
        case = gradient_cases.build(name, self.given(name, kind), kind, self.material.prepared, folder, self.made)
        batch: Batch = case.objective.prepare(self.rows(case), case.context)
        value, _ = case.trainee([batch], [dict.fromkeys(counts(batch), 1.0)])
        value.backward()
        gradients = [p.grad for p in case.trainee.parameters() if p.grad is not None]
        assert math.isfinite(float(value.detach())) and all(bool(torch.isfinite(g).all()) for g in gradients)
        assert any(bool(g.any()) for g in gradients)

    def check_evaluation(self, name: str, kind: str) -> None:
        """Its metrics are numbers."""
        evaluation = examples_training.example(name, self.material)
        model = self.material.model(kind, conftest.TASK[kind], seed=3)
        if name in ("task", "error_correction"):
            model.config.architectures = [type(model).__name__]
            vocabulary = examples.Vocabulary.of(self.material.tokenizer)
            model = evaluation.method.ready(model, ("a", "b"), vocabulary, 0).eval()
        model = examples_training.OPERATED.get(name, lambda plain: plain)(model)
        metrics = evaluate(model, self.material.tokenizer, self.documents(), [evaluation], compressors=False)["metrics"]
        assert metrics and not any(math.isinf(value) for value in metrics.values())

    def check_surgery(self, name: str, kind: str) -> None:
        """The operated model is finite, and its checkpoint opens as what was saved."""
        model, tokenizer = operated(name, self.shelf, kind)
        ids_BL = self.ids(tokenizer)
        ours = logits(model, ids_BL=ids_BL)
        assert bool(torch.isfinite(ours).all())
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(model, tokenizer, Path(folder) / "c")
            again, _ = checkpoint.load(Path(folder) / "c")
            assert torch.allclose(logits(again, ids_BL=ids_BL), ours, atol=1e-5)

    def check_decoding(self, name: str, kind: str) -> None:
        """It continues prompts; with fields with which it changes nothing, as plain decoding does."""
        model = self.shelf.model(kind)
        ids_BL = torch.tensor([self.shelf.tokenizer("the quick fox over", add_special_tokens=False)["input_ids"]])
        if why_not(model, ids_BL.shape[1] + 4) is None:
            plain_BN = decode(model, ids_BL, max_new_tokens=4, pad=0)
        elif model.can_generate() and not model.config.is_encoder_decoder:
            options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            plain_BN = model.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), **options)
        else:
            raise PretrainError(f"{type(model).__name__} writes no text after a prompt; accepted: a causal model")
        plain = examples.PLAIN.get(name, lambda shelf, kind: shelf.fields(name, kind))
        made: Any = method_class(name)(**plain(self.shelf, kind))
        output_BN = made.generate(model, ids_BL, max_new_tokens=4, pad=0)
        assert output_BN.shape == plain_BN.shape
        assert name in examples.NEVER_PLAIN or torch.equal(output_BN, plain_BN)


def recorded(kind: str, row: dict[str, str], before: dict[str, Any]) -> dict[str, Any]:
    """As the file has it: what the type is made for, the methods that work, and those that refuse it."""
    works = {name: True for name in before.get("works", ())} | {name: False for name in before.get("refused", ())}
    works |= {name: outcome == WORKS for name, outcome in row.items()}
    here = [name for name in names() if name in works]
    return {
        "kind": zoo.TASKS[kind],
        "works": [name for name in here if works[name]],
        "refused": [name for name in here if not works[name]],
    }


def main() -> None:
    """Record the table, or print the defects."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    known_rows = json.loads(options.page.read_text()) if options.page.exists() else {}
    done = known_rows if options.record and not options.methods else {}
    rest = [kind for kind in zoo.TASKS if kind not in done]
    with tempfile.TemporaryDirectory() as folder:
        stories = conftest.real_documents()
        bench = Bench(conftest.prepare(stories, Path(folder) / "prepared"), stories, Path(folder))
        defects = 0
        for kind in options.kinds or rest:
            row: dict[str, str] = {}
            with known(kind):
                for name in options.methods or names():
                    try:
                        row[name] = bench.outcome(name, kind)
                    except Exception as error:
                        row[name] = f"DEFECT {type(error).__name__}: {str(error)[:200]}"
                        print(kind, name, row[name].replace("\n", " "), flush=True)
            print(kind, sum(value == WORKS for value in row.values()), "of", len(row), flush=True)
            new = sum(value.startswith("DEFECT") for value in row.values())
            defects += new
            if options.record and not new:
                known_rows = {k: known_rows[k] for k in known_rows if k in zoo.TASKS} | {
                    kind: recorded(kind, row, known_rows.get(kind, {}))
                }
                options.page.write_text(json.dumps(known_rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.exit(bool(defects))


if __name__ == "__main__":
    main()
