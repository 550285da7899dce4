"""Text: files and folders, tables, notebooks, and data sets of the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.foreign import json
from pretrain.core.foreign.archives import BROKEN, Place, open_text
from pretrain.core.foreign.documents.members import ARCHIVES
from pretrain.core.foreign.parsing import raise_memory, reason
from pretrain.core.packages import Package
from pretrain.corpus.leaks import key_in, looks_generated
from pretrain.corpus.sources._chat import exchanges, is_chat, turns_of, written
from pretrain.corpus.sources._containers import READERS, Reader, Row, ending, no_column, read_json, reader_of, unread
from pretrain.corpus.sources._files import Document, Size, Source, Wrong, evenly, given, name_of, read_pieces, size_of
from pretrain.corpus.sources._paths import Named, Taken, below, check_group, group_of, located, stamp, stamps
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources._tables import extent, is_number
from pretrain.corpus.sources.opened import documents
from pretrain.corpus.sources.opened.archives import inside, is_archive

OnError = Literal["stop", "skip"]
Conversations = Literal["answers", "whole"]

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
    group: str | None = None  # which files lie on one side of the split together: stem, path, or a regular expression
    hidden: bool = False  # whether to take files and folders whose names begin with a dot
    secrets: bool = False  # whether to take files that look like secrets, or hold what looks like a key or a password
    ignored: bool = False  # whether to take what `.gitignore` names
    generated: bool = False  # whether to take what programs have written: minified, lock files, very long lines of code

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None:
            check_group(self.group)

    def domains(self) -> None:
        """Those of files and rows are not known before they are read."""

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        yield from (document for _, document in self.placed(skipped))

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
            for where, document in pages(path, name, wrong, skipped):
                if self._fit(document["text"], "", where, skipped, alone and where == name):
                    yield where, document | {"domain": domain} | ({} if ending(path) == ".warc" else group)
        elif (reader := self._table(path)) is not None and not self._is_text(path, reader, skipped.longest):
            read = reader(path, name, self.text, wrong, skipped)
            yield from _documents(_counted(islice(read, rows), skipped), name, self, skipped, wrong)
            if rows is not None and next(read, None) is not None:
                skipped.begun.append(name)
        else:
            for number, (text, whole) in enumerate(read_pieces(path, skipped, wrong, name)):
                if not self._fit(text, ending(path), name, skipped, alone):
                    break
                place = {"id": name} if whole else {"id": f"{name}#{number}", "group": name}
                yield name, {"text": text, "domain": domain} | place | group

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
            return size
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
        return extent(_documents(rows, str(path), source, skipped, wrong), path)
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


def wrong_of(on_error: OnError, skipped: Skipped) -> Wrong:
    """What is done with what cannot be read."""

    def wrong(where: str, what: str, reason: str, accepted: str) -> None:
        if on_error == "stop":
            raise PretrainError(f"{where}: {what}; accepted: {accepted}, or on_error: skip")
        skipped.add(reason, name_of(where))

    return wrong


@dataclass(frozen=True)
class HubDataset(Source):
    """A data set of the `datasets` library: a name on the hub, or a local folder written by it; streaming if asked."""

    dataset: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    text: str = "text"
    domain: str | None = None
    limit: Count | None = None  # read at most so many documents
    on_error: OnError = "stop"  # what rows without the column do: stop, or skip
    conversations: Conversations = "answers"  # as for files

    def domains(self) -> None:
        """Those of files and rows are not known before they are read."""

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        rows = ((f"{self.dataset}, row {number}", row) for number, row in enumerate(self._open(), 1))
        documents = _documents(rows, self.dataset, self, skipped, wrong_of(self.on_error, skipped))
        for number, (_, document) in enumerate(documents):
            if self.limit is not None and number >= self.limit:
                return
            yield document

    def _open(self) -> Iterator[Document]:
        import datasets

        place = Path(self.dataset)
        try:
            if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
                data = datasets.load_from_disk(self.dataset)
                data = data[self.split] if isinstance(data, datasets.DatasetDict) else data
            else:
                data = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise PretrainError(f"data set {self.dataset!r} cannot be loaded: {reason}") from error
        return self._rows(data)

    def _rows(self, data: Iterable[Document]) -> Iterator[Document]:
        count = 0
        try:
            for row in data:
                count += 1
                yield row
        except Exception as error:  # of its files, its columns' types, and what is installed for them
            raise_memory(error, self.dataset)
            what = f"data set {self.dataset!r} cannot be read after row {count} ({reason(error)})"
            raise PretrainError(f"{what}; accepted: a data set that `datasets` reads to its end") from error

    def state(self) -> object:
        return [stamp(path) for path in below(Path(self.dataset))] if Path(self.dataset).exists() else None


def _documents(
    rows: Iterator[Row], name: str, source: Files | HubDataset, skipped: Skipped, wrong: Wrong
) -> Iterator[Row]:
    """Documents from rows with columns, each with where it stands."""
    for where, row in rows:
        column = source.text
        if column not in row and column.isdecimal() and int(column) < len(row):  # a column by its number
            column = list(row)[int(column)]
        if column not in row:
            columns = ", ".join(sorted(row)) or "an object with columns"
            as_text = ", or tables: text to read the file as it stands" if isinstance(source, Files) else ""
            wrong(where, no_column(column, row), f"rows without the column {column!r}", f"{columns}{as_text}")
            continue
        text = row[column]
        if not given(row, column):
            skipped.add("empty", name_of(where))
            continue
        required = source.required if isinstance(source, Files) else ()
        absent = next((name for name in required if not given(row, name)), None)
        if absent is not None:
            skipped.add(f"rows without {absent}", name_of(where))
            continue
        if isinstance(source, Files) and not _of_numbers(row, source.numbers, where, wrong):
            continue
        place = name_of(where)
        if is_chat(text):
            answers = list(_answers(text, source, row, name, place))
            if not answers:
                skipped.add("conversations without an answer", name_of(where))
            yield from ((where, answer) for answer in answers)
            continue
        if not isinstance(text, str):
            wrong(where, f"column {column!r} is {type(text).__name__}, not text", "rows without text", "text")
            continue
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character, as broken JSON holds
            skipped.add("not UTF-8", name_of(where))
            continue
        rest = {k: v for k, v in row.items() if k not in (column, "text", "domain", "id")}
        facts = {"text": text, "domain": _domain(source, row, name), "id": str(row.get("id", place))}
        yield where, facts | rest


def _counted(rows: Iterator[Row], skipped: Skipped) -> Iterator[Row]:
    for row in rows:
        skipped.rows += 1
        yield row


def _of_numbers(row: Document, columns: tuple[str, ...], where: str, wrong: Wrong) -> bool:
    """Whether a row has a number in each of some columns; it is told where not."""
    odd = next((name for name in columns if not is_number(row.get(name))), None)
    if odd is not None:
        what = f"column {odd!r} holds {row[odd]!r}, no number" if odd in row else no_column(odd, row)
        wrong(where, what, f"rows without a number in {odd}", "numbers")
    return odd is None


def _domain(source: Files | HubDataset, row: Document, name: str) -> str:
    """The domain of a row: the source's, the row's, or that of its file."""
    if source.domain is not None and source.domain not in row:
        return source.domain
    return str(row.get(source.domain or "domain") or _stem(name))


@lru_cache(maxsize=64)
def _stem(name: str) -> str:
    return Path(name).name.split(".")[0]


def _answers(
    chat: list[object], source: Files | HubDataset, row: Document, name: str, place: str
) -> Iterator[Document]:
    """The documents of a conversation; all of one conversation lie on one side of the split."""
    known, domain = str(row.get("id", place)), _domain(source, row, name)
    turns, answers = turns_of(chat) or [], list(exchanges(chat))
    if source.conversations == "whole":
        if answers:
            messages = [{"role": role, "content": words} for role, words in turns]
            yield {"text": written(turns), "messages": messages, "domain": domain, "id": known}
        return
    for number, (text, answer) in enumerate(answers):
        yield {"text": text, "target": answer, "domain": domain, "id": f"{known}:{number}", "group": known}
