"""What is in a folder or a file: code, prose, a table or images, by a look at its names and its beginnings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.archives import Place
from pretrain.core.samples import IMAGES as FORMATS
from pretrain.corpus.leaks import key_in, looks_generated
from pretrain.corpus.sources import Files, Skipped
from pretrain.corpus.sources._containers import READERS, ending
from pretrain.corpus.sources._files import evenly, read_pieces, read_text
from pretrain.corpus.sources._paths import Taken, located
from pretrain.corpus.sources.audio import SUFFIXES as RECORDINGS
from pretrain.corpus.sources.images import SUFFIXES as IMAGES
from pretrain.corpus.sources.opened.archives import is_archive
from pretrain.corpus.sources.opened.documents import about
from pretrain.corpus.store import side
from pretrain.new.tables import Table, read_table
from pretrain.new.texts.cutting import Cut, beginning, cut_of, parts_of
from pretrain.new.texts.languages import LANGUAGE_OF, MARKUP, prose_language
from pretrain.new.texts.opened import PAGED, ended, files_in, is_opened, most_of, plain, texts_of, why_not
from pretrain.new.texts.prompts import prompts

PROSE = (".txt", ".md", ".rst", ".text", ".tex", ".org", ".adoc", ".markdown", "")  # and others that are text
SAMPLE = 24  # texts that are opened to tell their language
PAGES = 12  # of HTML that are read for prompts
FEW = 400  # documents, of which each is read: whether the splits will have some of them
SHARES = (0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25)
# Files, or rows, to hold out in each split: of 500 rows an accuracy of 0.8 is good to 0.035, of 100 to 0.08.
HELD, ROWS_HELD = 40, 500
LIKELY = 5  # documents of a split: that there are none happens once in 150 times
UNKNOWN = 12  # documents of which it is not known where they go: fewer are cut, or none is held out
MODEST = 0.1  # of the documents at most for that, where so few are enough to have some
MUCH = 8 << 20  # bytes of text that may be read for that
NAMED = ("secret-looking", "holding what looks like a key or a password")  # of which each name is told
ALL_NAMES = 10
FEW_LOOSE = 3  # files beside folders that a recipe names each
BROUGHT = (".js", ".mjs", ".css", ".scss")  # what pages bring along
BESIDE = 0.1  # of the bytes of pages, from which on they belong to the code beside them
_TAGS = re.compile(r"(?is)<(script|style|head)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>")
LOOKED = 64 << 20  # bytes of files that are opened to see what may not be learnt of them


@dataclass(frozen=True)
class Look:
    """What lies at a place. `kind` is code, prose, table or images."""

    place: str  # as a recipe names it
    kind: str
    files: tuple[Path, ...]  # of that kind
    bytes: float
    text: float = 0.0  # of these, where the files hold more than texts
    languages: tuple[str, ...] = ()  # the commonest first
    endings: tuple[str, ...] = ()
    domains: tuple[tuple[str, str], ...] = ()  # a folder for each language, and what lies beside them: path, language
    cut: Cut | None = None  # where a file is many documents
    parallel: bool = False  # the domains' folders hold files of the same paths
    table: Table | None = None
    classes: tuple[str, ...] = ()  # folders of images
    side: int = 0  # pixels that most images have at least
    share: float = 0.0  # of the documents that can be held out twice; 0: too few
    prompts: tuple[str, ...] = ()  # lines of its texts to go on from
    others: tuple[str, ...] = ()  # tables beside it
    over: str = ""  # what was passed over
    undecoded: tuple[str, ...] = ()  # files that are not UTF-8, with the line


def look(
    place: str, *, text: str | None = None, label: str | None = None, pair: str | None = None, table: bool = False
) -> Look:
    """Look at a folder or a file; `table` asks for a table even where most is text, as a column does."""
    skipped = Skipped()
    paths = [path for _, path in located(place, None, (), skipped, Taken(ignored=False, generated=False))]
    for path in paths:
        if (what := why_not(path)) is not None:
            skipped.add(what, path)
    paths = [path for path in paths if why_not(path) is None]
    groups: dict[str, list[Path]] = {"images": [], "recordings": [], "table": [], "code": [], "prose": []}
    for path in paths:
        kind = most_of(path, _kind) if is_archive(path) else _kind(path, len(paths) == 1)
        if is_archive(path) and kind not in ("code", "prose"):
            more = f"of {kind.rstrip('s')}s, to be unpacked first" if kind else "without text, or damaged"
            skipped.add(f"archives {more}", path)
        else:
            groups[kind].append(path) if kind else skipped.add(f"{path.suffix or 'other'} files", path)
    _sort_pages(groups)
    undecoded = _unfit(groups, skipped)
    chosen = _most(groups, table or any(column is not None for column in (text, label, pair)))
    if chosen == "recordings":
        raise PretrainError(
            f"{place} holds recordings; accepted: text, tables, images; recipes/speech.yaml begins with them"
        )
    if chosen is None:
        over = f" (passed over: {skipped})" if skipped.reasons else ""
        if undecoded:
            more = f" and {len(undecoded) - 1} more" if len(undecoded) > 1 else ""
            raise PretrainError(
                f"{place}: not UTF-8: {_inside(undecoded[0], place)}{more}{over}; accepted: text in UTF-8 (iconv -f "
                "latin1 -t utf-8 makes it)"
            )
        raise PretrainError(f"{place}: nothing to learn from{over}; accepted: code, text, tables, chats or images")
    size = sum(path.stat().st_size for path in groups[chosen])
    taken = ("code", "prose") if chosen == "code" else (chosen,)
    for path in (path for kind, others in groups.items() if kind not in taken for path in others):
        skipped.add(f"{path.suffix or 'other'} files", path)
    odd = tuple(undecoded) if chosen in ("code", "prose") else ()
    seen = Look(place, chosen, tuple(groups[chosen]), size, over=_over(skipped, place), undecoded=odd)
    if chosen == "table":
        return _table(seen, text, label, pair)
    makers = {"images": _images, "code": _code, "prose": _prose}
    return makers[chosen](seen, groups)


def _sort_pages(groups: dict[str, list[Path]]) -> None:
    """Take pages of HTML for prose, unless they stand beside code that is more than what pages bring along."""
    pages = [path for path in groups["code"] if ending(path) in MARKUP]
    code = [path for path in groups["code"] if ending(path) not in (*MARKUP, *BROUGHT)]
    if pages and sum(path.stat().st_size for path in code) < BESIDE * sum(path.stat().st_size for path in pages):
        groups["prose"] = sorted([*groups["prose"], *pages])
        groups["code"] = [path for path in groups["code"] if ending(path) not in MARKUP]


def _plain(path: Path, text: str) -> str:
    """About the text of a page, without the time that its extraction takes; any other text as it stands."""
    return unescape(_TAGS.sub(" ", text)) if ending(path) in MARKUP else text


def _unfit(groups: dict[str, list[Path]], skipped: Skipped) -> list[str]:
    """Take out what the source would leave out for what it holds; the places of files that are not UTF-8.

    Of very many files only the first are opened: the rest is told when the corpus is made.
    """
    budget, undecoded = LOOKED, list[str]()
    alone = sum(map(len, groups.values())) == 1
    for kind in ("code", "prose"):
        kept = [path for path in groups[kind] if is_opened(path)]
        for path in plain(groups[kind]):
            budget -= min(path.stat().st_size, 4 * skipped.longest)
            pieces = read_pieces(path, skipped, lambda where, *_: undecoded.append(where), str(path))
            text, _ = next(pieces, (None, True)) if budget > 0 else ("", True)
            key = key_in(text) if text else None
            why = looks_generated(text, ending(path)) if text and not alone else None
            if key:
                skipped.add("holding what looks like a key or a password", f"{path}, {key}")
            elif why:
                skipped.add(why, path)
            elif text is not None:
                kept.append(path)
        groups[kind] = sorted(kept)
    return undecoded


def _over(skipped: Skipped, place: str) -> str:
    """What was passed over, the most first, each with a name; not what nobody would have wanted to be taken."""
    reasons = [reason for reason in skipped.reasons if reason not in ("tools' folders", "runs and caches")]
    parts = []
    for reason in sorted(reasons, key=lambda reason: (reason not in NAMED, -skipped.reasons[reason])):
        most = ALL_NAMES if reason in NAMED else 1
        names = [_inside(name, place) for name in skipped.names[reason][:most]]
        more = ", …" if skipped.reasons[reason] > len(names) else ""
        parts.append(f"{skipped.counted(reason)} ({', '.join(names)}{more})")
    return ", ".join(parts)


def _inside(name: str, place: str) -> str:
    """A file's name from the place that was asked for."""
    return Path(name).relative_to(place).as_posix() if Path(name).is_relative_to(place) and name != place else name


def _kind(path: Place, alone: bool = False) -> str:
    end = ending(path)
    if end in IMAGES:
        return "images"
    if end in RECORDINGS:
        return "recordings"
    if end in READERS and end != ".ipynb" and (end != ".json" or alone):  # which is settings, more often than not
        return "table"
    if end in LANGUAGE_OF or end == ".ipynb":
        return "code"
    return "prose" if end in (*PROSE, *PAGED) or alone else ""


def _most(groups: dict[str, list[Path]], table: bool) -> str | None:
    """What a folder is about: of text what has the most bytes, and images where they are most of the files."""
    if table and groups["table"]:
        return "table"
    text = len(groups["table"]) + len(groups["code"]) + len(groups["prose"])
    for kind in ("images", "recordings"):
        if len(groups[kind]) > text:
            return kind
    sizes = {kind: sum(path.stat().st_size for path in groups[kind]) for kind in ("table", "code", "prose")}
    if len(groups["code"]) > 10 * len(groups["table"]):  # data that a program brings for its tests
        sizes["table"] = 0
    best = max(sizes, key=lambda kind: sizes[kind])
    return best if sizes[best] else None


def _texts(paths: Sequence[Path], markup: bool = False) -> list[tuple[Path, str]]:
    """Some texts of the files, from all of them alike; with `markup` pages as they stand."""
    some, small = evenly(plain(paths), SAMPLE), Skipped().longest
    pairs = [(path, read_text(path, Skipped()) if path.stat().st_size < small else beginning(path)) for path in some]
    texts = [(path, text if markup else _plain(path, text)) for path, text in pairs if text is not None]
    return texts + evenly(texts_of(_opened(paths))[0], SAMPLE)


def _opened(paths: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(path for path in paths if is_opened(path))


def _endings(paths: Sequence[Path], kinds: Sequence[str]) -> Counter[str]:
    """How many files of some kinds have each ending, those in archives too, of which each has one itself."""
    endings = Counter(ended(path) for path in paths)
    endings.update(end for path in paths if is_archive(path) for kind, end, _ in files_in(path, _kind) if kind in kinds)
    return endings


def _with_endings(paths: Sequence[Path]) -> list[Path]:
    """The files with an ending, by which a recipe names them; all where none has one."""
    return [path for path in paths if ended(path)] or list(paths)


def _code(seen: Look, groups: dict[str, list[Path]]) -> Look:
    """Code by its languages, with the prose beside it."""
    files = _with_endings(groups["code"] + groups["prose"])
    sizes = Counter[str]()
    for kind, end, size in (file for path in groups["code"] for file in files_in(path, _kind)):
        if kind == "code":
            sizes[LANGUAGE_OF.get(ending(Path(f"_{end}")), "Python")] += int(size)
    endings = tuple(end for end, _ in _endings(files, ("code", "prose")).most_common() if end)
    languages = tuple(name for name, _ in sizes.most_common())
    return replace(_shared(seen, files), languages=languages, endings=endings)


def _prose(seen: Look, groups: dict[str, list[Path]]) -> Look:
    """Prose by its languages, with a domain each where each has a folder."""
    seen = replace(seen, files=tuple(_with_endings(seen.files)))
    root, counts = Path(seen.place), Counter[str]()
    by_folder: dict[str, list[Path]] = {}
    for path in seen.files:
        inside = path.relative_to(root).parts if root.is_dir() else ()
        by_folder.setdefault(inside[0] if len(inside) > 1 else "", []).append(path)
    domains: list[tuple[str, str]] = []
    loose: list[tuple[str, str]] = []
    parallel = _parallel(root, by_folder)
    enough = 0.5 if parallel else 0.8  # of translations some pages are not yet translated
    for name, paths in sorted(by_folder.items()):
        languages = Counter(filter(None, (prose_language(text[:20_000]) for _, text in _texts(paths))))
        counts.update({language: count * len(paths) for language, count in languages.items()})
        if not name:  # files beside the folders: a domain by the commonest of their languages
            language = languages.most_common(1)[0][0] if languages else "other"
            loose = [(place, language) for place in _beside(seen.place, paths)]
        elif languages and languages.most_common(1)[0][1] > enough * sum(languages.values()):
            domains.append((f"{seen.place.rstrip('/')}/{name}", languages.most_common(1)[0][0]))
    whole = len(domains) == len(by_folder.keys() - {""}) and len({language for _, language in domains}) > 1
    least = 0.02 * sum(counts.values())
    return replace(
        _shared(seen, seen.files), languages=tuple(name for name, count in counts.most_common() if count > least),
        domains=tuple(domains + loose) if whole else (), parallel=whole and parallel,
        endings=tuple(sorted(_endings(seen.files, ("prose",)).keys() - {""})),
    )  # fmt: skip


def _parallel(root: Path, by_folder: dict[str, list[Path]]) -> bool:
    """Whether folders hold the same pages in several languages: half of all files have the path of another."""
    inside = Counter(
        path.relative_to(root / name).as_posix() for name, paths in by_folder.items() if name for path in paths
    )
    return 2 * sum(count for count in inside.values() if count > 1) > sum(inside.values())


def _beside(place: str, paths: Sequence[Path]) -> list[str]:
    """Files that lie loose in a folder as sources: by their names where they are few, else by their endings."""
    endings = {ended(path) for path in paths}
    if len(paths) <= FEW_LOOSE or "" in endings:
        return [str(path) for path in paths]
    return [f"{place.rstrip('/')}/*{end}" for end in sorted(endings)]


def _shared(seen: Look, files: Sequence[Path]) -> Look:
    """With what can be held out, and how texts begin."""
    markup = seen.kind == "code"
    inside, whole = texts_of(_opened(files))
    read = sum(len(text.encode()) for _, text in inside)
    size = about(plain(files), markup).bytes + read if whole else about(files, markup).bytes
    texts = [(ending(path), text) for path, text in _texts(files, markup)]
    known = len(files) < FEW and size < MUCH and (markup or not any(ending(path) in MARKUP for path in files))
    keys = [*_all(plain(files)), *(text for _, text in inside)] if known and whole else None
    share = _share(sum(len(files_in(path, _kind)) for path in files), keys)
    if not markup and any(ending(path) in MARKUP for path in files):
        texts = [(kind, text) for kind, text in texts if kind not in MARKUP] + _read(files)
    if (cut := cut_of(files, size, share)) is not None:
        some, whole = parts_of(files, cut)
        read = sum(len(text.encode()) for text in some)
        count = len(some) if whole else len(some) * size / max(1, read)
        share = _share(count, list(dict.fromkeys(some)) if whole else None)
        texts = [(ending(files[0]), text) for text in evenly(some, SAMPLE)]
    return replace(seen, files=tuple(files), bytes=size, share=share, prompts=prompts(texts, share), cut=cut)


def _read(files: Sequence[Path]) -> list[tuple[str, str]]:
    """Some pages as the recipe will read them, so that no prompt is of a menu."""
    pages = evenly([path for path in files if ending(path) in MARKUP], PAGES)
    with suppress(PretrainError, OSError):  # told when the recipe runs
        return [(ending(path), row["text"]) for path in pages for row in Files(str(path)).documents(Skipped())]
    return []


def _all(files: Sequence[Path]) -> list[str]:
    return list(dict.fromkeys(filter(None, (read_text(path, Skipped()) for path in files))))


def _share(count: float, keys: Sequence[str] | None, held: int = HELD) -> float:
    """The share to hold out for each of two splits: of `held` documents if that is no large one; 0: too few for any.

    Documents are put on a side by a hash: of a few, whose `keys` are known, it is known which go where; of others each
    split is to have some all but surely.
    """
    likely = [share for share in SHARES if share * count >= LIKELY] or ([SHARES[-1]] if count >= UNKNOWN else [])
    fitting = likely if keys is None else [share for share in SHARES if _fits(keys, share)]
    plenty = [share for share in fitting if share * count >= held]
    modest = [share for share in fitting if share >= MODEST]
    chosen = (*plenty[:1], *modest[:1], *fitting[-1:])
    return min(chosen[0], modest[0]) if plenty and modest else next(iter(chosen), 0.0)


def _fits(keys: Sequence[str], share: float) -> bool:
    sides = Counter(side(key, share, share) for key in keys)
    return bool(sides["validation"] and sides["test"]) and sides["train"] > len(keys) / 3


def _table(seen: Look, text: str | None, label: str | None, pair: str | None) -> Look:
    """A table, of several the largest."""
    largest = max(seen.files, key=lambda path: path.stat().st_size)
    table = read_table(largest, str(largest), text=text, label=label, pair=pair)
    source = Files(str(largest), text=table.text, header=table.header)
    size = source.extent()
    rows = table.rows if table.whole else size.documents
    share = _share(rows, table.keys if table.whole else None, ROWS_HELD)
    others = tuple(path.name for path in seen.files if path != largest and ending(path) == ending(largest))
    return replace(
        seen, files=(largest,), bytes=float(largest.stat().st_size), text=size.bytes, table=table, share=share,
        prompts=prompts((('', text) for text in evenly(table.texts, SAMPLE)), share), others=others,
    )  # fmt: skip


def _images(seen: Look, groups: dict[str, list[Path]]) -> Look:
    """Images, by the folders they lie in."""
    folders = Counter(path.parent.name for path in seen.files)
    classes = tuple(sorted(name for name, count in folders.items() if count > 1))
    labelled = len(classes) > 1 and all(path.parent != Path(seen.place) for path in seen.files)
    sides = sorted(_sides(evenly(seen.files, SAMPLE)))
    if not sides:
        raise PretrainError(f"{seen.place}: none of its images can be opened; accepted: PNG, JPEG, WEBP, …")
    share = 0.2 if len(seen.files) >= 30 else 0.0
    return replace(seen, classes=classes if labelled else (), side=sides[len(sides) // 2], share=share)


def _sides(paths: Sequence[Path]) -> list[int]:
    """The shorter sides of the images that can be opened."""
    from PIL import Image

    sides = []
    for path in paths:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, SyntaxError):
            continue
    return sides
