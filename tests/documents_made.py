"""Files that hold documents, made for tests: pages, PDFs, records of the web, archives."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path
from random import Random

WORDS = {
    "en": "The house stands at the edge of the forest, and nobody has lived in it for many years. ",
    "de": "Das Haus steht am Rand des Waldes, und seit vielen Jahren hat niemand mehr darin gewohnt. Es wäre schön. ",
    "fr": "La maison se trouve à la lisière de la forêt, et personne n'y a habité depuis des années. ",
}
# Words enough for texts that do not repeat themselves, each with words that tell its language.
VOCABULARY = {
    "en": "the house and of to with that were have from their which would there about garden river winter children stood under "
    "between mountain letters written morning evening travelled towards village because although nothing everything remembered "
    "window through another whether during against within carried brought silver quiet narrow bridge market people",
    "de": "das Haus und der die mit dass waren haben von ihre welche würde dort über Garten Fluss Winter Kinder standen unter "
    "zwischen Gebirge Briefe geschrieben Morgen Abend reisten gegen Dorf weil obwohl nichts alles erinnerten Fenster durch "
    "andere während innerhalb getragen gebracht silbern still schmal Brücke Markt Leute schön größer müssen",
    "fr": "la maison et de les avec que étaient avoir leurs laquelle serait sur jardin rivière hiver enfants sous entre montagne "
    "lettres écrites matin soir voyageaient vers village parce bien rien tout souvenaient fenêtre travers autre pendant contre "
    "dans porté apporté argent calme étroit pont marché gens était même après",
    "es": "la casa y de los con que estaban tener sus cual sería sobre jardín río invierno niños bajo entre montaña cartas "
    "escritas mañana tarde viajaban hacia pueblo porque aunque nada todo recordaban ventana través otro durante contra dentro "
    "llevado traído plata tranquilo estrecho puente mercado gente también después",
}
MENU = "".join(f'<li><a href="/{n}">Menu entry {n}</a></li>' for n in range(12))


def page(text: str, charset: str = "utf-8", named: bool = True) -> bytes:
    """A page of HTML with a menu, the text in an article, and a footer."""
    meta = f'<meta charset="{charset}">' if named else ""
    paragraphs = "".join(f"<p>{part}</p>" for part in text.split("\n"))
    body = f"<nav><ul>{MENU}</ul></nav><article><h1>Title</h1>{paragraphs}</article><footer>All rights</footer>"
    return f"<!DOCTYPE html><html><head>{meta}<title>T</title></head><body>{body}</body></html>".encode(charset)


def pdf(*pages: str, password: str | None = None) -> bytes:
    """A PDF of pages of text in one line each; a page of no text is empty, as that of a scan is for who reads text."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    for text in pages:
        sheet = writer.add_blank_page(595, 842)
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 800 Td ({text}) Tj ET".encode("latin-1") if text else b"")
        sheet[NameObject("/Contents")] = writer._add_object(stream)
        named = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
        fonts = DictionaryObject({NameObject("/F1"): named})
        sheet[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    if password is not None:
        writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    writer.write(made := io.BytesIO())
    return made.getvalue()


def warc(answers: list[tuple[str, str, str, bytes]], packed: bool = True) -> bytes:
    """A WARC file of answers: URL, status, type, bytes."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    writer = WARCWriter(made := io.BytesIO(), gzip=packed)
    writer.write_record(writer.create_warcinfo_record("x.warc", {"software": "a test"}))
    for url, status, kind, data in answers:
        heads = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.0")
        request = StatusAndHeaders("GET / HTTP/1.0", [("Host", "example.org")], is_http_request=True)
        writer.write_record(writer.create_warc_record(url, "request", http_headers=request))
        writer.write_record(writer.create_warc_record(url, "response", payload=io.BytesIO(data), http_headers=heads))
    return made.getvalue()


def zipped(files: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of files."""
    with zipfile.ZipFile(made := io.BytesIO(), "w", packing) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


def tarred(files: dict[str, bytes], others: list[tarfile.TarInfo] | None = None) -> bytes:
    """A tar of files, and of entries that are none."""
    with tarfile.open(fileobj=(made := io.BytesIO()), mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in others or []:
            archive.addfile(info)
    return made.getvalue()


def prose(language: str, seed: int, sentences: int = 14) -> str:
    """A text of sentences in a language, other ones with each seed."""
    random, words = Random(f"{language} {seed}"), VOCABULARY[language].split()
    lines = [" ".join(random.choices(words, k=random.randrange(8, 15))).capitalize() + "." for _ in range(sentences)]
    return "\n".join(" ".join(lines[start : start + 4]) for start in range(0, sentences, 4))


def mixed_folder(home: Path) -> None:
    """Documents of every kind in three languages and a few in a fourth, and files that are broken in every way."""
    encodings = {"en": "utf-8", "de": "iso-8859-1", "fr": "utf-8", "es": "utf-8"}
    for language, encoding in encodings.items():
        for n in range(5):
            put(home / "web" / language / f"{n}.html", page(prose(language, n), encoding))
    put(home / "web" / "again.html", (home / "web" / "en" / "0.html").read_bytes())
    put(home / "web" / "broken.html", page(prose("de", 100), "iso-8859-1").replace(b"iso-8859-1", b"utf-8"))
    for n in range(3):
        put(home / "papers" / f"{n}.pdf", pdf(*prose("en", 10 + n).split("\n")))
    put(home / "papers" / "cut.pdf", pdf(prose("en", 20).replace("\n", " "))[:300])
    put(home / "papers" / "scan.pdf", pdf("", ""))
    cells = [{"cell_type": "markdown", "source": prose("fr", 30 + n)} for n in range(3)]
    put(home / "notes" / "book.ipynb", json.dumps({"cells": cells}))
    put(home / "notes" / "latin.txt", prose("fr", 40).encode("iso-8859-1"))
    put(home / "notes" / "guide.rst", prose("en", 41))
    for n in range(8):
        put(home / "notes" / f"{n}.md", f"# To do on day {n}")
    files = {
        f"{language}/{n}.txt": prose(language, 50 + n).encode() for language in ("en", "de", "fr") for n in range(4)
    }
    put(home / "old.zip", zipped(files))
    put(home / "older.tar.gz", gzip.compress(tarred({f"{n}.md": prose("de", 60 + n).encode() for n in range(4)})))
    put(home / "cut.zip", zipped(files)[:500])
    answers = [(f"http://example.org/{n}", "200 OK", "text/html", page(prose("en", 70 + n))) for n in range(3)]
    put(home / "crawl.warc.gz", warc(answers))


def put(path: Path, data: bytes | str) -> Path:
    """A file of these bytes, in folders that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path
