"""The stage of a recipe that makes the corpus, and the sources that it names."""

from __future__ import annotations

from pathlib import Path

from pretrain.corpus.sources.opened.archives import is_archive
from pretrain.new import stages
from pretrain.new.faults import Fault
from pretrain.new.look import Look
from pretrain.new.stages import written
from pretrain.new.start import Start
from pretrain.new.tables import Table
from pretrain.new.texts.languages import MARKUP
from pretrain.new.texts.opened import is_opened
from pretrain.new.words import COLUMNS, commented, quoted


def corpus(look: Look, task: str, init: Start | None, name: str = "corpus", labelled: bool = True) -> str:
    """The corpus; of a table that is read for its texts alone (`labelled` False) with the rows without a label."""
    table, held = look.table, stages.NOT_HELD
    if init is not None and init.held and table is None:
        # The same documents as there, since a hash of each decides.
        validation, test = (f"{share:g}" for share in init.held)
        held = written(stages.HELD_AS, validation=validation, test=test, run=init.name)
    elif look.share:
        held = written(stages.HELD, validation=f"{look.share:g}", test=f"{look.share:g}")
    copies = table is None and look.kind != "images" and task != "compress"
    return written(
        stages.CORPUS,
        name=name,
        why="" if labelled else stages.UNLABELLED,
        sources="\n".join(_sources(look, init, labelled)),
        operations=stages.COPIES if copies else "",
        held=held,
    )


def _sources(look: Look, init: Start | None, labelled: bool = True) -> list[str]:
    table = look.table
    if table is not None:
        whole = table.talk and init is not None and init.kind == "causal"
        return [f"      {line}" for line in _rows(table, str(look.files[0]), labelled, whole).splitlines()]
    opened = any(map(is_opened, look.files)) and look.kind in ("code", "prose")
    skip = ", on_error: skip" if look.undecoded or opened else ""
    cut, reason = _cut(look)
    skip += cut
    why = f", not UTF-8: {len(look.undecoded)}" if look.undecoded else ""
    why += "; what cannot be read is left out, and counted" if opened else ""
    why += f"; {reason}" if reason else ""
    if look.domains:
        group = ", group: path" if look.parallel and look.cut is None else ""
        each = [
            f"      - {{files: {quoted(folder)}, domain: {quoted(name)}{group}{skip}}}" for folder, name in look.domains
        ]
        return ["      # a domain each, so that each is measured alone", *_together(look), *each]
    if look.kind == "images":
        return [f"      - {{images: {quoted(look.place)}{', label: parent' if look.classes else ''}}}"]
    if not (Path(look.place).is_dir() or is_archive(Path(look.place))) or not look.endings:
        return [f"      - {{files: {quoted(look.place)}{skip}}}{f'  # {why[2:]}' if why else ''}"]
    endings = ", ".join(map(quoted, look.endings))
    if look.kind == "code" and not set(look.endings).isdisjoint(MARKUP):
        skip += ", pages: markup"
        why += "; pages: markup reads HTML as it stands, tags and all, as code; pages: text its text alone"
    elif not set(look.endings).isdisjoint(MARKUP):
        why += "; of pages their text (pages: markup reads them as they stand, tags and all)"
    return [f"      - {{files: {quoted(look.place)}, suffixes: [{endings}]{skip}}}  # no hidden files, no secrets{why}"]


def _cut(look: Look) -> tuple[str, str]:
    """The field by which a text is many documents, and why."""
    if look.cut is None:
        return "", ""
    if look.cut.separator is not None:
        return f", separator: {quoted(look.cut.separator)}", "a document ends at each separator"
    return (
        f", pieces: {look.cut.pieces}",
        "so few texts come in pieces, of which some are held out",
    )


def _together(look: Look) -> list[str]:
    """What is said of folders that hold the same files in several languages."""
    return (
        ["      # group: a page and its translations lie on one side of the split"]
        if look.parallel and look.cut is None
        else []
    )


def lacking(table: Table) -> list[Fault]:
    """The rows without a label, or without a second text."""
    return [fault for fault in table.faults if fault.field.startswith("required")]


def _rows(table: Table, name: str, labelled: bool = True, whole: bool = False) -> str:
    """A table as a source: with its rows that are left out a field a line, and why."""
    fields = [f"files: {quoted(name)}"] + ([f"text: {quoted(table.text)}"] if table.text != "text" else [])
    fields += ["conversations: whole"] if whole else []
    more = ["header: false  # columns are numbered; true: the first row names them"] if table.header is False else []
    if labelled and (required := lacking(table)):
        names = ", ".join(quoted(fault.field.removeprefix("required: ")) for fault in required)
        more.append(f"required: [{names}]  # {commented('; '.join(map(str, required)))}: passed over")
    kinds = ("on_error", "numbers") if labelled else ("on_error",)
    skipped = [fault for fault in table.left_out if fault.field.startswith(kinds)]
    if labelled and table.kind == "regress":
        more.append(f"numbers: [{quoted(str(table.label))}]  # what is none there is a row that cannot be read")
    if skipped:
        more.append(f"on_error: skip  # {commented('; '.join(map(str, skipped)))}: left out, and counted")
    elif not table.whole:
        more.append("# on_error: skip  # if a row further down cannot be read")
    if table.unread or table.beside:
        more.append(f"# not read: {commented(', '.join((*table.unread, *table.beside)[:COLUMNS]))}")
    if not more:
        return f"- {{{', '.join(fields)}}}"
    return "- " + "\n  ".join([*fields, *more])
