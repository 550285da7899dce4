"""Hooks of MkDocs: what of the repository the pages lead to becomes pages of the site, the notebook among them."""

from __future__ import annotations

import json
import posixpath
import re
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]  # of the repository
SHOWN = "files"  # where in the site the repository's files are shown
CURVES = "claims.html"  # a page that is there already, with the name of the one made from claims.md
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
_HEAD = re.compile(r"<th\b[^>]*>(.*?)</th>", re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file of the repository that a page leads to, and for the notebook."""
    from mkdocs.structure.files import File

    docs = Path(config.docs_dir)
    places = {outside(file.src_uri, link) for file in files for link in _links(file.src_uri, docs)}
    for place in sorted(filter(None, places)):
        files.append(File.generated(config, f"{SHOWN}/{place}.md", content=_shown(place)))
    for notebook in docs.glob("*.ipynb"):
        files.append(File.generated(config, f"{notebook.stem}.md", content=_cells(notebook)))
    if (docs / CURVES).is_file():  # which MkDocs leaves out, for its name
        files.append(File.generated(config, "curves.html", abs_src_path=str(docs / CURVES)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to what is no page of `docs/` to the page that shows it."""

    def shown(match: re.Match[str]) -> str:
        place = outside(page.file.src_uri, match[1])
        folder = posixpath.dirname(page.file.src_uri) or "."
        return posixpath.relpath(f"{SHOWN}/{place}.md", folder) if place else match[1]

    if page.file.src_uri.startswith(f"{SHOWN}/"):
        return markdown
    markdown = _LINK.sub(shown, markdown).replace(f"]({CURVES})", "](curves.html)")
    return markdown.replace(".ipynb)", ".md)")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Name in each cell of a table the head of its column, which stands above it where a page is narrow."""
    return _TABLE.sub(lambda table: labelled(table[0]), html)


def labelled(table: str) -> str:
    """A table in HTML with `data-label` in its cells."""
    heads = [re.sub(r"<[^>]+>", "", head).strip().replace('"', "&quot;") for head in _HEAD.findall(table)]

    def row(match: re.Match[str]) -> str:
        places = count()
        return re.sub(
            r"<td\b", lambda _: f'<td data-label="{heads[n] if (n := next(places)) < len(heads) else ""}"', match[0]
        )

    return _ROW.sub(row, table)


def outside(page: str, link: str) -> str | None:
    """The file of the repository, outside of `docs/`, that a link of a page of `docs/` leads to."""
    place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if place.startswith("docs/") or not (ROOT / place).is_file() else place


def _links(page: str, docs: Path) -> list[str]:
    return _LINK.findall((docs / page).read_text(encoding="utf-8")) if page.endswith(".md") else []


def _shown(place: str) -> str:
    """A file of the repository as a page."""
    text, language = (ROOT / place).read_text(encoding="utf-8"), place.rpartition(".")[2]
    return f"---\nsearch: {{exclude: true}}\n---\n# {place}\n\n````{language}\n{text}````\n"


def _cells(notebook: Path) -> str:
    """A notebook's cells as a page."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts) + "\n"
