"""`pretrain new` takes pages of HTML for the text that they hold, unless they stand beside code."""

from __future__ import annotations

import pytest

from pretrain.new.corpora import corpus
from pretrain.new.look import look

SPANISH = (
    "Los registros del sistema que el administrador mira por la mañana se guardan con los de ayer para una copia. "
)
ENGLISH = (
    "The records of the system that the administrator reads in the morning are kept with those of the day for him. "
)


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def pages(folder, text, count=30):
    for n in range(count):
        put(folder / f"{n}.html", f"<html><script>let the = of(and)</script><body><p>{text * 5}{n}</p></body></html>")


def test_a_folder_of_pages_is_prose_and_its_language_is_that_of_the_text(tmp_path):
    pages(tmp_path, SPANISH)
    put(tmp_path / "style.css", "p { color: red }\n")
    seen = look(str(tmp_path))
    assert (seen.kind, seen.languages, seen.endings) == ("prose", ("Spanish",), (".html",))
    assert not any("<" in prompt for prompt in seen.prompts)
    written = corpus(seen, "pretrain", None)
    assert "pages: markup}" not in written and "of pages their text (pages: markup" in written


def test_beside_code_pages_are_markup_and_the_recipe_says_what_that_is(tmp_path):
    pages(tmp_path, ENGLISH, 3)
    put(tmp_path / "main.py", "".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(200)))
    seen = look(str(tmp_path))
    written = corpus(seen, "pretrain", None)
    assert seen.kind == "code" and "pages: markup}" in written and "tags and all" in written


@pytest.mark.parametrize("translated", [30, 20])
def test_folders_of_translations_are_domains_whose_pages_stay_together(tmp_path, translated):
    pages(tmp_path / "en", ENGLISH)
    pages(tmp_path / "es", ENGLISH)
    pages(tmp_path / "es", SPANISH, translated)
    written = corpus(look(str(tmp_path)), "pretrain", None)
    for folder, language in (("en", "English"), ("es", "Spanish")):
        assert f"{{files: {tmp_path}/{folder}, domain: {language}, group: path}}" in written


def test_folders_of_other_texts_are_domains_alone(tmp_path):
    for folder, text in (("en", ENGLISH), ("es", SPANISH)):
        for n in range(30):
            put(tmp_path / folder / f"{folder}-{n}.txt", f"{text * 3}{n}")
    assert "group" not in corpus(look(str(tmp_path)), "pretrain", None)
