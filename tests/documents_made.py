"""Files that hold documents, made for tests: pages, PDFs, records of the web, archives."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

WORDS = {
    "en": "The house stands at the edge of the forest, and nobody has lived in it for many years. ",
    "de": "Das Haus steht am Rand des Waldes, und seit vielen Jahren hat niemand mehr darin gewohnt. Es wäre schön. ",
    "fr": "La maison se trouve à la lisière de la forêt, et personne n'y a habité depuis des années. ",
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


def put(path: Path, data: bytes | str) -> Path:
    """A file of these bytes, in folders that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path
