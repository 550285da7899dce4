"""The text of PDF files, page by page, by `pypdf`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import BinaryIO

from pretrain.core.system.extras import extras_named


class Encrypted(OSError):
    """A PDF that only its password opens."""


def pages(file: BinaryIO) -> Iterator[str]:
    """The text of each page; empty of a page that is a picture, as scans are.

    Raises `Encrypted`, and whatever `pypdf` raises of a file that is damaged or none.
    """
    with extras_named():
        import pypdf
        from pypdf.errors import DependencyError
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # of what is odd in a file it tells line upon line
    reader = pypdf.PdfReader(file)
    try:
        opened = not reader.is_encrypted or bool(reader.decrypt(""))  # many are only kept from being changed
    except (DependencyError, NotImplementedError) as error:
        raise Encrypted("it is encrypted") from error
    if not opened:
        raise Encrypted("it is encrypted")
    for page in reader.pages:
        yield page.extract_text()
