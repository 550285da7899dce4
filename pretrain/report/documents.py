"""The documents of a corpus, for the report: how long they are, and some to look at, kept ones and dropped ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pretrain.core.quick.quantities import counted, figure, short
from pretrain.records import CorpusInfo
from pretrain.report.markup import Html, join, tag

MOST_BYTES = 120_000  # of the documents of a corpus that are shown
UNITS = ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "B"))
FEWEST = 2  # lengths that are worth a drawing
Shown = tuple[str, str, str]  # the group, what stands above the text, the text


def documents(corpus: CorpusInfo) -> Html:
    """All of it; nothing of a corpus of before, of which neither is noted."""
    return join([_lengths(corpus), _browser(corpus)])


def _lengths(corpus: CorpusInfo) -> Html:
    """A bar for each doubling of bytes: the training documents that are so long, and below them those dropped."""
    kept = _counter(corpus.get("lengths", {}).get("train"))
    dropped = sum((_counter(passage.get("lengths")) for passage in corpus.get("funnel") or []), Counter[int]())
    edges = sorted({*kept, *dropped})
    if len(edges) < FEWEST:
        return join([])
    top = max([*kept.values(), *dropped.values()])
    every = [1 << power for power in range(edges[0].bit_length() - 1, edges[-1].bit_length())]
    rows = [_row(edge, kept[edge], dropped[edge], top, bool(dropped)) for edge in every]
    also = "; below each bar those that operations dropped" if dropped else ""
    note = tag("p", f"Training documents by their bytes{also}.", class_="note")
    return join([tag("h3", "Lengths"), note, tag("div", *rows, class_="group lengths")])


def _counter(lengths: dict[str, int] | None) -> Counter[int]:
    return Counter({int(edge): count for edge, count in (lengths or {}).items() if edge.isdecimal()})


def _row(edge: int, kept: int, dropped: int, top: int, both: bool) -> Html:
    name = _span(edge)
    title = f"{name}: {counted(kept, 'document')}" + (f", {dropped:,} dropped" if both else "")
    tracks = [_track(kept, top, "track"), *([_track(dropped, top, "track dropped")] if both else [])]
    counts = tag("b", f"{kept:,}", *([tag("br"), f"{dropped:,}"] if both else []))
    return tag("div", tag("em", name), tag("span", *tracks), counts, class_="bar", title=title)


def _span(edge: int) -> str:
    """The bytes below a power of two and from half of it on: `512 to 1,024 B`, `1 to 2 KiB`."""
    if edge <= 1:
        return "empty"
    least = edge // 2
    power, unit = next((power, unit) for power, unit in UNITS if least >> power or not power)
    return f"{least >> power:,} to {edge >> power:,} {unit}"


def _track(count: int, top: int, name: str) -> Html:
    return tag("span", tag("i", style=f"width:{100 * count / top:.2f}%"), class_=name)


def _browser(corpus: CorpusInfo) -> Html:
    """Some documents, one at a time: of the training split, and of each reason of each operation."""
    shown = _bounded(corpus)
    if not shown:
        return join([])
    groups = Counter(group for group, _, _ in shown)
    options = [tag("option", f"{group} ({count})", value=group) for group, count in groups.items()]
    steps = (("-1", "‹", "the one before"), ("1", "›", "the next one"))
    buttons = [tag("button", sign, value=step, type="button", aria_label=label) for step, sign, label in steps]
    chooser = tag("select", *options, aria_label="which documents")
    head = tag("p", chooser, *buttons, tag("output", aria_live="polite"), class_="axes")
    articles = [
        tag("article", tag("p", above, class_="note"), tag("pre", text), data_group=group)
        for group, above, text in shown
    ]
    note = tag("p", "Drawn at random; of each the beginning.", class_="note")
    return join([tag("h3", "Documents"), note, tag("div", head, *articles, class_="browse")])


def _bounded(corpus: CorpusInfo) -> list[Shown]:
    """The documents that are shown: `MOST_BYTES` of them, a first one of each group before a second of any."""
    numbers, ranked = Counter[str](), list[tuple[int, int, Shown]]()
    for place, each in enumerate(_all(corpus)):
        ranked.append((numbers[each[0]], place, each))
        numbers[each[0]] += 1
    left, chosen = MOST_BYTES, list[tuple[int, Shown]]()
    for _, place, each in sorted(ranked, key=lambda row: row[:2]):
        left -= sum(len(part.encode(errors="replace")) for part in each)
        if left < 0:
            break
        chosen.append((place, each))
    return [each for _, each in sorted(chosen, key=lambda row: row[0])]


def _all(corpus: CorpusInfo) -> Iterator[Shown]:
    for document in corpus.get("kept") or []:
        yield "kept", f"{document['domain']} · {document['id']} · {short(document['bytes'], 'B')}", document["text"]
    for passage in corpus.get("funnel") or []:
        for each in passage["examples"]:
            measured = "" if each["measured"] is None else f" · {each['reason']}: {figure(each['measured'])}"
            group = f"dropped · {passage['operation']} · {each['reason']}"
            yield group, f"{each['domain']} · {each['id']}{measured}", each["text"]
