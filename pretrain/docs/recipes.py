"""The page of the recipes."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from pretrain.recipe import load

LABELLED = """## A labelled table

A classifier of the texts of a table, here `reviews.csv` with the columns `review` and `sentiment`. `pretrain new
reviews.csv` writes such a recipe with an encoder that is trained on the texts first, sized for them; this one goes on
from a checkpoint, where there is one (a folder, a run, a name of the hub).

```yaml
name: reviews
stages:
  - name: corpus
    stage: data
    # required: rows without a label are left out; header: false for a CSV whose first row is one like the others
    # numbers: [price] of a regression: a cell that is no number is a bad row, named, or passed over by on_error: skip
    sources: [{files: reviews.csv, text: review, required: [sentiment], on_error: skip}]
    validation: 0.1
    test: 0.1
  - name: classifier
    stage: train
    corpus: corpus
    init: path/to/checkpoint
    objective: {method: classification, label: sentiment}
    length: 128
    batch_rows: 16
    optimizer: {method: adamw, lr: 2e-5}
    schedule: {method: linear, warmup: 0.1}
    budget: {epochs: 3}
    policies: [{method: keep_best, metric: accuracy, better: higher}]
  - name: evaluation
    stage: evaluate
    checkpoint: classifier
    corpus: corpus
    evaluations: [{method: task, objective: {method: classification, label: sentiment}}]
    compressors: false
```

```
pretrain run reviews.yaml
pretrain predict runs/reviews more.csv --text review --output labels.csv     # without a header: --no-header --text 0
pretrain evaluate runs/reviews --data more.csv --text review --label sentiment
```

From Python: `pretrain.predict("runs/reviews", texts)`, or of what `pretrain.load` gives: `pretrain.predict((model,
tokenizer), texts)` and `pretrain.evaluate(model, tokenizer, [{"text": "…", "sentiment": "good"}, …])`.

Numbers in place of labels: `{method: regression, label: stars}`; a tag for each word: `{method: tagging, tags: tags}`;
answers: `{method: seq2seq, target: reply}`; a second text beside the first: `pair: other`. A classifier of several
labels a row, trained elsewhere, is measured by `evaluate --data` with a list or `a; b` in its column.
"""


def recipe_page(folder: Path) -> str:
    """The recipes: what each says of itself, its stages, and how to run it; then those that are papers."""
    lines = ["<!-- Made from the recipes by `make docs`; edit those. -->\n", "# Recipes\n"]
    for path in [*sorted(folder.glob("*.yaml")), *sorted((folder / "papers").glob("*.yaml"))]:
        text, place = path.read_text(encoding="utf-8").splitlines(), path.relative_to(folder)
        comment = takewhile(lambda line: line.startswith("#"), text)
        stages = [f"`{stage.name}` ({stage.stage})" for stage in load(path).stages]
        lines += [f"## [{path.stem}](../recipes/{place.as_posix()})\n", *(line[1:].strip() for line in comment)]
        lines += ["\n" + " → ".join(stages) + "\n", f"```\npretrain run recipes/{place.as_posix()}\n```\n"]
    lines.append(LABELLED)
    return "\n".join(lines).rstrip() + "\n"
