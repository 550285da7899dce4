"""One example of each data operation, objective, optimiser, schedule, policy and evaluation, as their contracts use it.

A method is made from its defaults; `FIELDS` says what else one needs, or what makes it act within a few steps. A new
method is covered without being listed here, as long as its defaults will do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import yaml
from conftest import TASK, TINY
from gradient_cases import FAMILY, first, two_words

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.method import Method, method_class
from pretrain.core.models.families import new_model
from pretrain.core.quick.table import listed
from pretrain.core.registry import methods
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.recipe import load
from pretrain.stages import dump
from pretrain.surgery import Inputs


@dataclass(frozen=True)
class Material:
    """What examples are made of."""

    prepared: Path  # with `corpus`, `tokenizer` and `tokens`
    folder: Path  # where checkpoints and tasks are put
    stories: list[dict[str, str]]

    @cached_property
    def tokenizer(self) -> Any:
        """Of 512 entries."""
        return load_tokenizer(self.prepared / "tokenizer")

    @cached_property
    def words(self) -> dict[str, str]:
        """Two classes, each with a word that is one token."""
        return two_words(Vocabulary.of(self.tokenizer))

    def model(self, family: str = "llama", task: str = "causal", seed: int = 0, **more: Any) -> Any:
        """A tiny model of the tokenizer's entries, in evaluation mode."""
        return new_model(
            family, TINY[family] | more, task=task, vocabulary=Vocabulary.of(self.tokenizer), seed=seed
        ).eval()

    def fields(self, name: str) -> dict[str, Any]:
        """The hyperparameters of a method's example."""
        return FIELDS.get(name, lambda _: {})(self)

    def saved(self, seed: int) -> str:
        """The folder of a causal checkpoint."""
        place = self.folder / f"causal-{seed}"
        if not place.exists():
            checkpoint.save(self.model(seed=seed, initializer_range=0.3), self.tokenizer, place)
        return str(place)

    def languages(self) -> str:
        """A folder of embeddings of languages, named as the stories' domains."""
        from pretrain.objectives.language.langsamp import LanguageConfig, LanguageEmbeddings

        place = self.folder / "languages"
        if not place.exists():
            names = sorted({story["domain"] for story in self.stories})
            made = LanguageEmbeddings(LanguageConfig(languages=names, scripts=["Latn"], hidden_size=8))
            checkpoint.save(made, self.tokenizer, place)
        return str(place)

    def writing(self, said: str = "", **places: str) -> dict[str, Any]:
        """The fields of an operation that has texts written: prompts by name, short enough for a tiny model.

        The model writes at random or, where that is given, what is `said` after a prompt that ends with `SIGN`.
        """
        path = self.folder / f"{'-'.join(places)}.json"
        path.write_text(json.dumps({name: {"user": text} for name, text in places.items()}))
        fields = {"prompts": str(path), "shortest": 0, "unfinished": "keep"}
        if said:
            return fields | {"generator": self.scripted(said), "max_new_tokens": 24, "temperature": 0.0}
        return fields | {"generator": self.saved(0), "max_new_tokens": 4, "temperature": 1.0}

    def scripted(self, said: str) -> str:
        """The folder of a causal checkpoint that has learnt to say that after `SIGN`."""
        place = self.folder / f"scripted-{crc32(said.encode())}"
        if not place.exists():
            model, end = self.model(initializer_range=0.1, max_position_embeddings=512), Vocabulary.of(self.tokenizer)
            after = [*encode(self.tokenizer, [SIGN + said])[0].tolist(), end.eos]
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            learnt = 0  # steps in a row at which it was sure
            for step in range(2000):
                story = self.stories[step % len(self.stories)]["text"]
                before = [end.begin, *encode(self.tokenizer, [story])[0].tolist()[: 5 + 7 * step % 70]]
                ids_1L = torch.tensor([before + after])
                labels_1L = ids_1L.clone()
                labels_1L[:, : len(before) + 1] = -100
                optimizer.zero_grad()
                loss = model.train()(input_ids=ids_1L, labels=labels_1L).loss
                learnt = learnt + 1 if float(loss.detach()) < 0.02 else 0
                if learnt == 20:
                    break
                loss.backward()
                optimizer.step()
            checkpoint.save(model.eval(), self.tokenizer, place)
        return str(place)

    def cloze(self) -> str:
        """A folder of local lm-eval tasks."""
        from pretrain.evaluation.tasks.harness import write_cloze

        place = self.folder / "cloze"
        return str(place if place.exists() else write_cloze(self.stories[:40], place, items=12).parent)


SIGN = " =>"
GRAPH = '{"entities":["a","b"]}'
FIELDS: dict[str, Callable[[Material], dict[str, Any]]] = {
    "prompt_template": lambda m: {"prompt": {"method": "prompt_classification", "words": m.words}},
    "clear": lambda m: {"model": m.saved(0), "task": {"method": "seq2seq", "target": "label", "answer": 2}, "responses": 2},
    "spin": lambda m: {"generator": m.saved(0), "target": "label", "max_new_tokens": 4, "temperature": 1.0, "refusal": "I cannot"},
    "prox": lambda m: m.writing("normalize('e','E')", chunk=f"{{text}}{SIGN}") | {"least_words": 1, "tokens": 60},
    "transform_llm": lambda m: m.writing("\nQuestion: a\nAnswer: b", q=f"{{text}}{SIGN}") | {"tokens": 16, "real": True},
    "llm2llm": lambda m: m.writing("\n1. Question: a b\nAnswer: 0", similar=f"{{text}}{{target}}{SIGN}") | {"student": m.saved(0), "task": {"method": "seq2seq", "target": "label", "answer": 2}},
    "wrap": lambda m: m.writing(medium="{text}:") | {"tokens": 16},
    "entigraph": lambda m: m.writing(
        GRAPH, entities=f"{{document}}{SIGN}", pairs=f"{{document}}{{entity1}}{{entity2}}{SIGN}", triples=f"{{document}}{{entity1}}{{entity2}}{{entity3}}{SIGN}",
    ) | {"real": True},
    "decontaminate": lambda m: {"corpora": (str(m.prepared / "corpus"),), "length": 5},
    "gopher_quality": lambda m: {"least_words": 8, "stop_words": 0, "letter_words": 0.5},
    "gopher_repetition": lambda m: {"top": (0.3, 0.3, 0.3)},
    "fineweb_quality": lambda m: {"ended_lines": 0.0, "newlines": 0.4, "short_lines": 0.9},
    "c4_quality": lambda m: {"sentences": 0},
    **dict.fromkeys(("line_deduplication", "paragraph_deduplication"), lambda m: {"least_words": 3}),
    "exact_substring_deduplication": lambda m: {"length": 12, "least_words": 3},
    "column_filter": lambda m: {"column": "quality", "least": 0.0, "most": 8.0},
    "language": lambda m: {"characters": 500} if pytest.importorskip("py3langid") else {},
    "repair_text": lambda m: {"html": True} if pytest.importorskip("ftfy") else {},
    "miniplm": lambda m: {"teacher": m.saved(0), "reference": m.saved(1)},
    "preselect": lambda m: {"models": tuple(map(m.saved, range(3))), "ability": (1.0, 2.0, 3.0), "ratio": 0.3},
    "salt_ds": lambda m: {"model": m.saved(0), "top_k": 100},
    "simcore": lambda m: {"model": m.saved(0), "target": str(m.prepared / "corpus"), "share": 0.5, "clusters": 3},
    "quality_subset": lambda m: {"domain": "python", "share": 0.5},
    "bertin": lambda m: {"share": 0.5, "order": 3},
    "conda": lambda m: {"update_gap": 2},
    "soap": lambda m: {"precondition_frequency": 2},
    "batch_size_warmup": lambda m: {"at": (0.3, 0.7)},
    "sequence_length_warmup": lambda m: {"at": (0.3, 0.7)},
    "lawa": lambda m: {"k": 2, "every": 3.0},
    "restart": lambda m: {"every": 1, "window": 1, "rise": 1e-6},
    "domain_upsampling": lambda m: {"mixture": {"docstrings": 1.0}, "share": 0.6},
    "odm": lambda m: {"warmup": 0.0},
    "stability_gap": lambda m: {"domain": "python", "epochs": 3.0},
    "toremi": lambda m: {"interval": 2, "switch": 0.5},
    "gradual_pruning": lambda m: {"every": 2},
    "sub_structure": lambda m: {"layers": 1, "share": 1.0},
    "increlora_allocation": lambda m: {"target_rank": 2.0, "incre_interval": 2, "top_h": 2},
    **dict.fromkeys(("dp_sgd", "ew_tune"), lambda m: {"noise_multiplier": 1.0}),
    "harness": lambda m: {"folder": m.cloze()},
    "generation_verification_gap": lambda m: {"generations": 4, "max_new_tokens": 2},
    "scbench": lambda m: {"contexts": 1, "turns": 2, "length": 320, "width": 4},
    "min_k": lambda m: {"length": 48},
    "ast_probe": lambda m: {"epochs": 2, "rank": 8, "validation": 0.2, "test": 0.3},
    "intrinsic_dimension_d90": lambda m: {"label": "label", "dimensions": (40, 80), "steps": 4, "length": 24, "rates": (1e-2,), "subspace_rates": (1e-2,)},
    "retrieval": lambda m: {"shortest": 8},
    "domain_specificity": lambda m: {"general": m.saved(0)},
    "source_language": lambda m: {"embeddings": m.languages()},
    "probe": lambda m: {"label": "label"},
    "label_words": lambda m: {"words": {"a": ("first", "one"), "b": ("second",)}},
    "nmtune": lambda m: {"label": "label", "steps": 3},
    "error_correction": lambda m: {"objective": "tagging", "rate": 5.0},
    "label_noise": lambda m: {"rate": 0.5},
    "dictionary_tags": lambda m: {"dictionary": str(m.prepared / "corpus"), "tag": "domain"},
    "long_tail_entities": lambda m: {"triples": str(m.prepared / "corpus"), "head": "domain", "relation": None, "tail": "text"},
    "taxonomy_pairs": lambda m: {"concept": "label"},
    "reference_classifier": lambda m: {"positive": (str(m.prepared / "corpus"),)},
    "document_age": lambda m: {"date": "number"},
    "transferability": lambda m: {"label": "label"},
}  # fmt: skip
INNER = {"causal": "causal_lm", "masked": "masked_lm"}
# What fits an objective to a family, where its defaults fit another.
FITTED: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt_classification": lambda family: {"lm": TASK[family], "template": "{text} is {mask}"},
    **dict.fromkeys(
        ("ctcd", "distillation", "pela_pretraining", "self_distillation"),
        lambda family: {"objective": INNER[TASK[family]]},
    ),
}
STAGES: dict[str, tuple[dict[str, Any], str]] = {
    "data operation": ({"stage": "data", "sources": [{"stdlib": True}]}, "operations.0"),
    "optimiser": ({}, "optimizer"), "schedule": ({}, "schedule"), "policy": ({}, "policies.0"),
    "objective": ({}, "objective"),
    "evaluation": ({"stage": "evaluate", "checkpoint": ".", "corpus": "c"}, "evaluations.0"),
}  # fmt: skip


def names(kind: str) -> list[str]:
    """The methods of a kind."""
    return [name for name, row in methods().items() if row.kind == kind]


def example(name: str, material: Material) -> Any:
    """A method that can be used."""
    cls: Any = method_class(name)
    given = material.fields(name)
    small = {"resamples": 20} if "resamples" in {item.name for item in fields(cls)} else {}
    return cls(**small | given)


def with_codebooks(model: Any) -> Any:
    """The model with small codebooks, drawn without text."""
    made: Any = method_class("codebook_features")(codes=16, k=2, initialisation="normal")
    return made(model)


def with_experts(model: Any) -> Any:
    """The model with two experts and a router, of drawn tokens."""
    ids_BL = torch.randint(3, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    made: Any = method_class("read_me")(embedding_dim=16)
    return made(model, Inputs(batches=[{"input_ids": ids_BL, "domain_B": torch.arange(2)}]))


# What measures a model that a surgery has changed.
OPERATED: dict[str, Callable[[Any], Any]] = {"code_activations": with_codebooks, "expert_cache": with_experts}


def declared(name: str) -> list[str]:
    """The tiny families that a method says it works on."""
    return [f for f in TINY if (entry := listed(f)) is not None and entry.among(method_class(name).families)]


def undeclared(name: str) -> list[str]:
    """The others."""
    return [f for f in TINY if f not in declared(name)]


def reread(method: Method, folder: Path, family: str = "llama") -> Method:
    """The method as a recipe's text gives it."""
    stage, place = STAGES[method.kind]
    earlier = [
        {"stage": "data", "name": "c", "sources": [{"stdlib": True}]},
        {"stage": "tokenizer", "name": "t", "corpus": "c"},
    ]
    train = {
        "stage": "train", "corpus": "c", "tokenizer": "t", "budget": {"steps": 1}, "length": 64, "model": {"family": family, **TINY[family]},
    }  # fmt: skip
    field, _, number = place.partition(".")
    said = json.loads(json.dumps(dump(method)))
    text = yaml.safe_dump({"stages": [*earlier, (stage or train) | {field: [said] if number else said}]})
    (folder / "recipe.yaml").write_text(text)
    value = getattr(load(folder / "recipe.yaml").stages[-1], field)
    return value[0] if number else value


def trainable(name: str) -> str:
    """A family that an objective is shown on."""
    return FAMILY.get(name) or first(method_class(name).families)


__all__ = [
    "FIELDS", "FITTED", "OPERATED", "Material", "declared", "example", "names", "reread", "trainable", "undeclared",
]  # fmt: skip
