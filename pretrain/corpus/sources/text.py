"""Text: files and folders, tables, notebooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import ClassVar, Literal

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.foreign import json
from pretrain.core.foreign.archives import BROKEN, Place, open_text
from pretrain.core.foreign.documents.members import ARCHIVES
from pretrain.core.packages import Package
from pretrain.corpus.leaks import key_in, looks_generated
from pretrain.corpus.sources._containers import READERS, Reader, Row, ending, read_json, reader_of, unread
from pretrain.corpus.sources._files import Document, Part, Size, Source, Wrong, evenly, read_pieces, size_of
from pretrain.corpus.sources._paths import Named, Taken, check_group, group_of, located, stamps
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources._tables import extent
from pretrain.corpus.sources.content.parts import parts
from pretrain.corpus.sources.content.rows import Columns, Conversations, OnError, counted_rows, documents_of, wrong_of
from pretrain.corpus.sources.opened import documents
from pretrain.corpus.sources.opened.archives import inside, is_archive

ENDINGS = (*READERS, *documents.READERS, *ARCHIVES)
OPENED = 4  # tables of a kind, to know how much of them is text


@dataclass(frozen=True)
class Files(Source):
    """A file, a folder, a glob or a URL: text and code (a document a file), and the rows of tables.

    Tables are `.csv`, `.tsv`, `.jsonl`, arrays in `.json`, `.parquet`, `.arrow`, `.feather` and `.orc`; their text is
    the column `text`, their other columns stay beside it. What stands between the cells of a `.csv` is told by its
    first line: the first of comma, semicolon, tab and `|` that it has outside of quotes. A column that holds
    conversations (lists of `{role, content}`) gives a document for each answer of the assistant's: its text is what
    comes before, `user: …`, its `target` the answer; with `conversations: whole` one for each conversation, with its
    turns in `messages`. A notebook (`.ipynb`) gives a document a cell. Text may be
    compressed (`.gz`, `.bz2`, `.xz`, `.zst`). A URL is one that `fsspec` opens: `s3://`, `gs://`, `https://`.

    With `pip install 'pretrain[documents]'`: of HTML (`.html`, `.htm`, `.xhtml`) the text that a page is about, with
    its lists, definitions, tables, notes and code, without menus, banners, footers, forms and lists of links, in the
    encoding that the page names (`corpus.json` counts in `pages` how much of their text was taken; `pages: markup`
    reads pages as they stand, tags and all, as whoever writes HTML sees it); of a PDF the text of its pages; of `.warc`
    the pages of HTML that servers answered with, each with its `url`. An archive (`.zip`, `.tar`, `.tgz`, `.tar.gz`,
    `.tar.xz`, `.tar.zst`, …) is read as a folder of its files would be, without being laid on disk: `suffixes` are of
    them where an archive's own ending is not all that they name. Archives in archives are passed over, and so are
    links, names that lead out of the archive, PDFs that a password protects and documents without text, as scans are.

    `suffixes` keeps only the files of a folder that end so (empty: all that are text). The domain is `domain`, or the
    column of that name where the file has one, or the file's suffix without its dot. With `package` the path is one
    inside that package. Of a folder's files those are left out that are hidden, that look like secrets (`.env`,
    `*.pem`, `id_rsa`, `credentials*`, …) or hold what looks like a key or a password, that `.gitignore` names, and that
    programs have written (`*.min.js`, lock files, code in very long lines). They, binary files, containers of other
    kinds and all else that is passed over are listed in `corpus.json`, with the reason. A line, row or file that cannot
    be read ends the stage, or with `on_error: skip` is passed over too.

    A text is one document, however long, so that a corpus of a single file has nothing to hold out. With `separator` it
    is as many as stand between it, and with `pieces` one that is longer is several, cut where a paragraph ends, else a
    line, else a word. Each may be held out by itself: pieces of a book are measured by a model that has read the rest
    of it. Rows of tables stay as they are.

    Files that are a document each lie on one side of the split together where `group` says that they belong together,
    as translations of a page do: `stem` by their names, `path` by their paths below `files` (of sources that are a
    folder of a language each), both without endings and codes of languages, as `.html`, `.es.html` and `.pt-br.html`;
    anything else is a regular expression, and what its first group (or all of it) matches in the path below `files`
    is the group: with `/(.+)` that is what follows the first folder. A file that it does not match stands alone.
    """

    version: ClassVar[int] = 2  # more of the text of pages of HTML

    files: str
    suffixes: tuple[str, ...] = ()
    text: str = "text"  # the column that holds the text, for tables
    domain: str | None = None
    package: Package | None = None
    on_error: OnError = "stop"  # what bad lines, bad bytes and rows without the column do: stop, or skip
    header: bool | None = None  # whether a CSV's first row names its columns; by default if no number stands in it
    required: tuple[str, ...] = ()  # columns without which a row is passed over, as one without a label
    numbers: tuple[str, ...] = ()  # columns of numbers: a row with anything else in one is bad, as `on_error` takes it
    conversations: Conversations = "answers"  # of what a conversation makes a document: of each answer, or of the whole
    pages: Literal["text", "markup"] = "text"  # markup: HTML is read as it stands, tags and all
    tables: Literal["rows", "text"] = "rows"  # text: tables and notebooks are read as they stand, a document each
    separator: str | None = None  # what stands between the documents of a text, as `<|endoftext|>`
    pieces: Count | None = None  # a longer text comes in pieces of at most so many characters, a document each
    group: str | None = None  # which files lie on one side of the split together: stem, path, or a regular expression
    hidden: bool = False  # whether to take files and folders whose names begin with a dot
    secrets: bool = False  # whether to take files that look like secrets, or hold what looks like a key or a password
    ignored: bool = False  # whether to take what `.gitignore` names
    generated: bool = False  # whether to take what programs have written: minified, lock files, very long lines of code

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None:
            check_group(self.group)
        if self.separator == "":
            raise PretrainError("separator '': accepted: what stands between documents, as '<|endoftext|>'")
        if self.group is not None and self.parted:
            raise PretrainError(f"group {self.group!r}: accepted: none where a text is several documents")

    def domains(self) -> None:
        """Those of files and rows are not known before they are read."""

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        yield from (document for _, document in self.placed(skipped))

    def by_file(self, skipped: Skipped) -> list[Part]:
        files = self.located(skipped)
        placed = [self.inside(name, path, skipped, alone=len(files) == 1) for name, path in files]
        return [(path.stat().st_size, map(itemgetter(1), rows)) for (_, path), rows in zip(files, placed, strict=True)]

    def placed(self, skipped: Skipped, rows: int | None = None) -> Iterator[Row]:
        """The documents, each with where it stands, as messages say it; of each table at most so many `rows`."""
        files = self.located(skipped)
        for name, path in files:
            yield from self.inside(name, path, skipped, rows, len(files) == 1)

    def located(self, skipped: Skipped) -> list[Named]:
        """The files that are read, with their ids; those that are not wanted are noted in `skipped`."""
        files = located(self.files, self.package, self.suffixes, skipped, self._taken())
        if self.text != "text" and not any(is_archive(path) or self._table(path) for _, path in files):
            accepted = f"files with columns ({', '.join(READERS)})"
            raise PretrainError(f"text {self.text!r}: there is no table at {self.files!r}; accepted: {accepted}")
        return files

    def inside(
        self, name: str, path: Path, skipped: Skipped, rows: int | None = None, alone: bool = False
    ) -> Iterator[Row]:
        """The documents of one of the files, which is perhaps `alone`: what it is then is no reason to pass it over."""
        wrong = wrong_of(self.on_error, skipped)
        if is_archive(path):
            for inner, member in inside(path, name, self.suffixes, self._taken(), wrong, skipped):
                yield from self._read(member, inner, wrong, skipped, rows)
        elif alone and (kind := self._unread(path)) is not None:
            raise PretrainError(f"{name} is {kind}; accepted: text, or one of {', '.join(ENDINGS)}")
        else:
            yield from self._read(path, name, wrong, skipped, rows, alone)

    def _read(
        self, path: Place, name: str, wrong: Wrong, skipped: Skipped, rows: int | None, alone: bool = False
    ) -> Iterator[Row]:
        """The documents of a file; one that is `alone` has been asked for by its name."""
        domain = self.domain or ending(path).lstrip(".") or "text"
        group = {} if self.group is None else group_of(name, self.files, self.group)
        if (kind := self._unread(path)) is not None:
            skipped.add(kind, name)
        elif (pages := documents.reader_of(path, self.pages == "markup")) is not None:
            rows_of = pages(path, name, wrong, skipped)
            if self.parted:
                yield from self._parts((row["text"] for _, row in rows_of), name, domain, skipped)
                return
            for where, document in rows_of:
                if self._fit(document["text"], "", where, skipped, alone and where == name):
                    yield where, document | {"domain": domain} | ({} if ending(path) == ".warc" else group)
        elif (reader := self._table(path)) is not None and not self._is_text(path, reader, skipped.longest):
            read = reader(path, name, self.text, wrong, skipped)
            yield from documents_of(counted_rows(islice(read, rows), skipped), name, self.columns, skipped, wrong)
            if rows is not None and next(read, None) is not None:
                skipped.begun.append(name)
        else:
            pieces = read_pieces(path, skipped, wrong, name)
            if self.parted:
                yield from self._parts((text for text, _ in pieces), name, domain, skipped)
                return
            for number, (text, whole) in enumerate(pieces):
                if not number and not whole:
                    skipped.add(f"documents cut to {skipped.longest:,} characters", name)
                if not self._fit(text, ending(path), name, skipped, alone):
                    break
                place = {"id": name} if whole else {"id": f"{name}#{number}", "group": name}
                yield name, {"text": text, "domain": domain} | place | group

    @property
    def parted(self) -> bool:
        """Whether a text may be several documents."""
        return self.separator is not None or self.pieces is not None

    def _parts(self, chunks: Iterator[str], name: str, domain: str, skipped: Skipped) -> Iterator[Row]:
        """The documents of a text, each one by itself."""
        for number, text in enumerate(
            parts(chunks, self.separator, min(self.pieces or skipped.longest, skipped.longest))
        ):
            where = f"{name}#{number}"
            if self._fit(text, "", where, skipped, False):
                yield where, {"text": text, "domain": domain, "id": where}

    @property
    def columns(self) -> Columns:
        """How rows of tables are read."""
        as_text = ", or tables: text to read the file as it stands"
        return Columns(self.text, self.domain, self.conversations, self.required, self.numbers, as_text)

    def _table(self, path: Place) -> Reader | None:
        """What reads the rows of a file, where it is a table and is to be read as one."""
        return reader_of(path, self.header) if self.tables == "rows" else None

    def _unread(self, path: Place) -> str | None:
        """What a file is that is not read."""
        return None if ending(path) in documents.READERS else unread(path)

    def _taken(self) -> Taken:
        """Which files are taken."""
        return Taken(self.hidden, self.secrets, self.ignored or self.package is not None, self.generated)

    def _fit(self, text: str, end: str, name: str, skipped: Skipped, alone: bool) -> bool:
        """Whether a text of a file with the ending `end` may be learnt: it holds no key, no program has written it."""
        if not self.secrets and self.package is None and (key := key_in(text)):
            if alone:
                what = f"{name}, {key}: looks like a key or a password"
                raise PretrainError(f"{what}; accepted: another file, or secrets: true to read it")
            skipped.add("holding what looks like a key or a password", f"{name}, {key}")
            return False
        if not self.generated and not alone and self.package is None and (why := looks_generated(text, end)):
            skipped.add(why, name)
            return False
        return True

    def _is_text(self, path: Place, reader: Reader, longest: int) -> bool:
        """Whether a `.json` file is one object without the column, as settings are: text like any other."""
        if reader is not read_json or self.text != "text":
            return False
        try:
            with open_text(path) as opened:
                start = opened.read(4096).lstrip()
                return start.startswith("{") and not _is_row(start + opened.read(longest), self.text)
        except BROKEN:
            return False

    def size(self) -> Size | None:
        if self.package is not None or "://" in self.files:
            return None
        paths = [path for _, path in located(self.files, None, self.suffixes, taken=self._taken())]
        kinds = sorted({ending(path) for path in paths} & set(READERS)) if self.tables == "rows" else []
        size = documents.about((path for path in paths if ending(path) not in kinds), self.pages == "markup")
        tables = [self._extent([path for path in paths if ending(path) == kind]) for kind in kinds]
        if not tables:
            return size._replace(documents=0) if self.parted else size
        return Size(
            size.bytes + sum(table.bytes for table in tables), whole=size.bytes + sum(table.whole for table in tables)
        )

    def extent(self) -> Size:
        """Of a table its bytes of text, its documents, and all its bytes."""
        return self._extent([path for _, path in located(self.files, None, self.suffixes, taken=self._taken())])

    def _extent(self, paths: list[Path]) -> Size:
        """Of tables of a kind, from the first rows of a few of them."""
        seen, some = [], evenly([path for path in paths if path.exists()], OPENED)
        for path in some:
            stat = path.stat()
            seen.append(_extent_of(replace(self, on_error="skip", numbers=()), path, stat.st_size, stat.st_mtime_ns))
        times = size_of(paths).bytes / max(1.0, size_of(some).bytes)
        return Size(*(times * sum(values) for values in zip(*seen, strict=True))) if seen else Size(0)

    def state(self) -> object:
        return stamps(self.files, self.package, self.suffixes, self._taken())


@lru_cache(maxsize=64)
def _extent_of(source: Files, path: Path, *_: int) -> Size:
    """Of one table, while it stays as it is; what cannot be read is taken for text."""
    reader = reader_of(path, source.header)
    assert reader is not None, "it was seen to be a table"
    skipped = Skipped()
    try:
        if source._is_text(path, reader, skipped.longest):
            return size_of([path])
        wrong = wrong_of("skip", skipped)
        rows = reader(path, str(path), source.text, wrong, skipped)
        return extent(documents_of(rows, str(path), source.columns, skipped, wrong), path)
    except (PretrainError, OSError, ValueError):
        return size_of([path])


def _is_row(content: str, column: str) -> bool:
    """Whether a JSON text that begins with an object holds rows: the object has the column, or lines are objects."""
    try:
        return isinstance(json.loads(content, halves=True).get(column), str)
    except json.NotJSON:
        try:
            return isinstance(json.loads(content.lstrip().partition("\n")[0], halves=True), dict)
        except json.NotJSON:  # JSON with comments, or a template
            return False
