"""Masked language modelling whose head is told the language and the script, so that token states need not tell them.

Shape letters: B rows, L positions, E width, D documents in rows of their own, M positions of the longest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import PositiveShare, Share
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.models.families import Apart, apart, at, base
from pretrain.objectives import Loss, Objective
from pretrain.objectives._masking import check_shares
from pretrain.objectives._token_loss import token_loss
from pretrain.objectives.language.masked_lm import MaskedLM

FOLDER = "languages"  # of a stage that trained with it


@dataclass(frozen=True)
class LangSAMP(Objective):
    """LangSAMP: Language-Script Aware Multilingual Pretraining (arXiv:2409.18199).

    `masked_lm` whose head reads h + e_language + e_script in place of the encoder's last states h: learnable embeddings
    of the row's language and of its script, so that h itself can be neutral between languages. As in the published code
    they begin as the model's own do, normal with its `initializer_range`, and are added to all positions before the
    head's first layer. `languages` gives the tag of each domain of the corpus as `LANGUAGE_Script`, `deu_Latn`;
    domains may share one. `use_language` and `use_script` switch off either (the paper's ablations).

    The embeddings are trained beside the model and are no part of its checkpoint: an encoder is used without any tag,
    as it was. They stand in the stage's folder `languages`, where the evaluation `source_language` compares them.
    """

    families: ClassVar[tuple[str, ...]] = ("masked",)
    task: ClassVar[str] = "masked"
    token_weights: ClassVar[bool] = True

    languages: dict[str, str]
    rate: PositiveShare = 0.15
    masked: Share = 0.8
    random: Share = 0.1
    use_language: bool = True
    use_script: bool = True

    def __post_init__(self) -> None:
        """Refuse tags that are no tags, none at all, and shares of more than all."""
        super().__post_init__()
        check_shares(self.name, self.masked, self.random)
        for domain, tag in self.languages.items():
            if not re.fullmatch(r"[^\W_]+_[^\W_]+", tag):
                raise PretrainError(
                    f"langsamp: languages {domain}: {tag!r}: accepted: a language and its script, as deu_Latn",
                    place=("languages", domain),
                )
        if not self.languages:
            raise PretrainError("langsamp: no languages: accepted: the tag of each domain", place=("languages",))

    def _named(self) -> tuple[list[str], list[str]]:
        """The languages and the scripts, in the order of their rows."""
        languages, scripts = zip(*(tag.split("_") for tag in self.languages.values()), strict=True)
        return sorted({*languages}), sorted({*scripts})

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """What `masked_lm` prepares, and `language_B` and `script_B`: the rows of the two tables."""
        batch = MaskedLM(rate=self.rate, masked=self.masked, random=self.random).prepare(rows, context)
        languages, scripts = self._named()
        tags = [self._tag(context.domains[row.domain]).split("_") for row in rows]
        batch["language_B"] = torch.tensor([languages.index(language) for language, _ in tags])
        batch["script_B"] = torch.tensor([scripts.index(script) for _, script in tags])
        return batch

    def _tag(self, domain: str) -> str:
        if domain not in self.languages:
            raise unknown("domain in langsamp's languages", domain, list(self.languages))
        return self.languages[domain]

    def modules(self, model: nn.Module) -> nn.Module:
        """The embeddings."""
        languages, scripts = self._named()
        config = at(model, "config")
        return LanguageEmbeddings(LanguageConfig(
            languages=languages if self.use_language else [], scripts=scripts if self.use_script else [],
            hidden_size=config.hidden_size, initializer_range=getattr(config, "initializer_range", 0.02),
        ))  # fmt: skip

    def export(self, modules: nn.Module | None) -> dict[str, PreTrainedModel]:
        """The embeddings."""
        assert isinstance(modules, LanguageEmbeddings), "langsamp trains embeddings beside the model: see `modules`"
        return {FOLDER: modules}

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over the chosen tokens."""
        assert isinstance(modules, LanguageEmbeddings), "langsamp trains embeddings beside the model: see `modules`"
        added_BE = modules(batch["language_B"], batch["script_B"])
        added_BLE = added_BE[:, None]
        if apart(model):  # documents are given to it in rows of their own
            document_BL = batch["document_BL"]
            rows, longest = batch["sizes_2"].tolist()
            row_BL = torch.arange(len(document_BL), device=document_BL.device)[:, None].expand_as(document_BL)
            added_BLE = added_BE[Apart(document_BL, (rows, longest)).to_rows(row_BL.contiguous(), 0)]

        def add(_: nn.Module, __: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
            output["last_hidden_state"] = output["last_hidden_state"] + added_BLE
            return output

        handle = base(model).register_forward_hook(add)
        try:
            return token_loss(model, batch, causal=False)
        finally:
            handle.remove()


class LanguageConfig(PreTrainedConfig):
    """The names of the rows of `LanguageEmbeddings`."""

    model_type = "langsamp"

    def __init__(
        self, languages: Sequence[str] = (), scripts: Sequence[str] = (), hidden_size: int = 0,
        initializer_range: float = 0.02, **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(**more)
        self.languages, self.scripts = list(languages), list(scripts)
        self.hidden_size, self.initializer_range = hidden_size, initializer_range


class LanguageEmbeddings(PreTrainedModel):
    """A table of the languages and one of the scripts; none where there are no names."""

    config_class = LanguageConfig

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config)
        self.tables = nn.ModuleDict({
            name: nn.Embedding(len(names), config.hidden_size)
            for name, names in (("language", config.languages), ("script", config.scripts)) if names
        })  # fmt: skip
        self.post_init()
        for table in self.tables.values():
            nn.init.normal_(at(table, "weight"), std=config.initializer_range)

    def forward(self, language_B: Tensor, script_B: Tensor) -> Tensor:
        """`e_BE`, the sum of the two."""
        numbers: Mapping[str, Tensor] = {"language": language_B, "script": script_B}
        total_BE = torch.zeros(len(language_B), self.config.hidden_size, device=language_B.device)
        for name, table in self.tables.items():
            total_BE = total_BE + table(numbers[name])
        return total_BE
