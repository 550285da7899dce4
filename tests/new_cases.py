"""What `pretrain new` is pointed at in the tests: a folder or a file of each kind."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from typer.testing import CliRunner

from pretrain.cli import app

ENGLISH = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "was",
    "with",
    "his",
    "for",
    "her",
    "river",
    "mountain",
    "house",
    "stone",
    "window",
    "garden",
    "letter",
    "winter",
]
FRENCH = [
    "le",
    "la",
    "les",
    "des",
    "et",
    "dans",
    "une",
    "est",
    "que",
    "pour",
    "pas",
    "qui",
    "maison",
    "rivière",
    "montagne",
    "jardin",
    "lettre",
    "hiver",
    "matin",
]
KINDS = ["code", "prose", "labels", "chat", "pairs", "images", "tags", "numbers"]


def new(*arguments: object) -> str:
    """What the command prints; its error is raised."""
    outcome = CliRunner().invoke(app, ["new", *map(str, arguments)])
    if outcome.exception is not None:
        raise outcome.exception
    return outcome.output


def sentences(words, rng, count):
    return ". ".join(" ".join(rng.choices(words, k=8)).capitalize() for _ in range(count)) + "."


def write_prose(folder: Path) -> None:
    rng = random.Random(0)
    for name, words in {"en": ENGLISH, "fr": FRENCH}.items():
        (folder / name).mkdir(parents=True)
        for number in range(25):
            (folder / name / f"{number}.txt").write_text(sentences(words, rng, 20), encoding="utf-8")


def write_code(folder: Path, stories) -> None:
    (folder / "web").mkdir(parents=True)
    for number, story in enumerate(s for s in stories if s["domain"] == "python"):
        (folder / f"m{number}.py").write_text(story["text"][:2000], encoding="utf-8")
    for number in range(4):
        (folder / "web" / f"{number}.js").write_text(f"export const a{number} = (b) => b + {number};\n" * 20)
    (folder / ".env").write_text("TOKEN=1\n")
    (folder / "logo.bin").write_bytes(b"\0" * 64)


def write_reviews(path: Path, count: int = 90) -> None:
    rng = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["number", "review", "sentiment"])
        for number in range(count):
            good = rng.random() < 0.5
            table.writerow([number, f"{sentences(ENGLISH, rng, 1)} {'great' if good else 'awful'} {number}",
                            "positive" if good else "negative"])  # fmt: skip


def write_lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chats(count: int = 60):
    for number in range(count):
        turns = [("user", f"What is {number} plus one?"), ("assistant", f"It is {number + 1}."), ("user", "Thanks."),
                 ("assistant", f"You are welcome, {number}.")]  # fmt: skip
        yield {"messages": [{"role": role, "content": words} for role, words in turns]}


def write_images(folder: Path) -> None:
    from PIL import Image

    for grey, name in ((40, "dark"), (200, "light")):
        (folder / name).mkdir(parents=True)
        for number in range(24):
            Image.new("RGB", (36, 40), (grey, number * 9, 90)).save(folder / name / f"{number}.png")


def write_kind(here: Path, kind: str, stories, base: Path) -> tuple[Path, list[object]]:
    """Something of a kind in a folder, and what else `new` is given for it."""
    rng = random.Random(1)
    more: list[object] = []
    if kind == "code":
        place = here / "code"
        write_code(place, stories)
    elif kind == "prose":
        place = here / "prose"
        write_prose(place)
    elif kind == "labels":
        place = here / "reviews.csv"
        write_reviews(place)
    elif kind == "chat":
        place, more = here / "chat.jsonl", ["--init", base]
        write_lines(place, chats())
    elif kind == "pairs":
        place, more = here / "pairs.jsonl", ["--init", base]
        write_lines(
            place, ({"prompt": f"Count on from {n}, please", "response": f"So {n + 1} it is"} for n in range(60))
        )
    elif kind == "images":
        place = here / "shapes"
        write_images(place)
    elif kind == "tags":
        place = here / "names.jsonl"
        words = [rng.choices(ENGLISH, k=6) for _ in range(80)]
        write_lines(
            place, ({"text": " ".join([*w, f"Ann{n}"]), "tags": ["O"] * 6 + ["B-PER"]} for n, w in enumerate(words))
        )
    else:
        place = here / "scores.tsv"
        rows = [f"{sentences(ENGLISH, rng, 1)} {n}\t{n / 7:.3f}" for n in range(80)]
        place.write_text("text\tscore\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return place, more
