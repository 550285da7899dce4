"""Which language to tune on for another: the most similar by its embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core.errors import PretrainError, unknown
from pretrain.core.files import read_object
from pretrain.core.folders import checkpoint_of
from pretrain.core.method import Ref
from pretrain.evaluation import Evaluation, Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


@dataclass(frozen=True)
class SourceLanguage(Evaluation):
    """LangSAMP: Language-Script Aware Multilingual Pretraining (arXiv:2409.18199).

    The language whose labelled text a model is best tuned on to work in another one without any: the candidate whose
    language embedding has the largest cosine with the target's. `embeddings` is the stage that trained with the
    objective `langsamp`, or the checkpoint in its folder `languages`. Targets are the languages of the documents'
    domains (`deu_Latn`, or `deu`), candidates `sources` (empty: all other languages). By domain: `similarity/LANGUAGE`
    for each candidate; over all, `nearest_similarity`, the mean of the largest. The model itself is not asked.
    """

    embeddings: Ref
    sources: tuple[str, ...] = ()

    @property
    def passes(self) -> float:
        """The model reads nothing."""
        return 0.0

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The similarities for the documents' domains."""
        by_language = self.similarities()
        domains = sorted({str(document.get("domain", "")) for document in documents})
        by_domain: dict[str, dict[str, float]] = {}
        for domain in domains:
            language = domain.partition("_")[0]
            if language not in by_language:
                raise unknown("language", language, list(by_language))
            by_domain[domain] = {f"similarity/{name}": value for name, value in by_language[language].items()}
        nearest = [max(values.values()) for values in by_domain.values()]
        return Measured({"nearest_similarity": float(np.mean(nearest))}, by_domain)

    def similarities(self) -> dict[str, dict[str, float]]:
        """For each language the cosine of its embedding with that of each candidate, itself left out."""
        from pretrain.core.weights import load_tensors
        from pretrain.objectives.language.langsamp import FOLDER

        place = Path(self.embeddings)
        folder = checkpoint_of(place / FOLDER if (place / FOLDER).is_dir() else place)
        names = read_object(folder / "config.json").get("languages")
        if not isinstance(names, list) or len(names) < 2:
            raise PretrainError(
                f"source_language: embeddings {self.embeddings}: no embeddings of several languages; accepted: a stage "
                f"that trained with the objective langsamp, or its folder {FOLDER!r}"
            )
        table_KE = load_tensors(folder / "model.safetensors")["tables.language.weight"].float().numpy()
        unit_KE = table_KE / np.maximum(np.linalg.norm(table_KE, axis=1, keepdims=True), 1e-12)
        absent = next((name for name in self.sources if name not in names), None)
        if absent is not None:
            raise unknown("language", absent, names)
        cosine_KK, sources = unit_KE @ unit_KE.T, self.sources or tuple(names)
        return {
            target: {s: float(cosine_KK[row, names.index(s)]) for s in sources if s != target}
            for row, target in enumerate(names)
        }
