"""No text of a run or of a result becomes markup or a script in a page: injected into every field, seen in Chromium."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from page_cases import browser_page, claim_result, example, put

from pretrain.experiments.page import page as claims_page
from pretrain.experiments.table import markdown
from pretrain.report.page import write as write_report

PAYLOADS = (
    "<img src=x onerror=window.broken=1>",
    "</script><script>window.broken=1</script>",
    "<!--<script>",
    '" onmouseover="window.broken=1" autofocus onfocus="window.broken=1',
    "' onload='window.broken=1",
    "</title></style></textarea><svg onload=window.broken=1>",
    "<!--BODY-->&lt;b&gt;&quot;",
    "javascript:window.broken=1",
    "]]>\u2028\\u003cimg src=x onerror=window.broken=1>${window.broken=1}`",
)
MARK = "§{}§"  # before each payload its own number, so that what is shown can be told from field to field
# What decides which kind of thing it is, or where it lies: poisoned one at a time, since a page shows the rest by it.
STRUCTURE = {"stage", "folder", "status", "kind", "unit", "event", "word", "scale", "finished", "better", "equal"}
FIXED = {"train", "test", "baseline", "method"}  # names of splits and sides, which the code has


class Poison:
    """Puts a payload after each text, and each name that a run may choose, of a value of JSON."""

    def __init__(self, payload: str, only: int | None = None, names: frozenset[str] = frozenset()) -> None:
        self.payload, self.only, self.names, self.count = payload, only, names, 0
        self.structural: dict[tuple[str, str], int] = {}  # the number of the first field of a kind

    def text(self, text: str, key: str, structural: bool) -> str:
        if text.startswith("data:image"):
            return text
        number, self.count = self.count, self.count + 1
        if structural:
            self.structural.setdefault((key, text), number)
        chosen = number == self.only if self.only is not None else not structural
        return f"{text}{MARK.format(number)}{self.payload}" if chosen else text

    def __call__(self, value, key=""):
        if isinstance(value, dict):
            made = {k: self(v, k) for k, v in value.items()}
            if key in self.names:  # besides those that the page knows
                made |= {self.text(k, key, False): v for k, v in made.items() if k not in FIXED}
            return made
        if isinstance(value, list):
            return [self(item, key) for item in value]
        return self.text(value, key, key in STRUCTURE) if isinstance(value, str) else value


# Whose names are the user's, not the code's: domains, tools, metrics, methods, machines.
REPORT_NAMES = frozenset({"domains", "train", "test", "compressors", "methods", "environment", "metrics", "removed", "passed_over", "intervals"})  # fmt: skip
CLAIM_NAMES = frozenset({"also", "runs", "mean", "deviation", "chosen", "scales", "compute_to_reach"})


def report(folder, payload, only=None):
    """The report of a run whose every file holds the payload in every field; and how many fields there are."""
    example(folder)
    poison = Poison(payload, only, REPORT_NAMES)
    for path in sorted(folder.rglob("*.json*")):
        text = path.read_text()
        if path.suffix == ".jsonl":
            lines = [json.dumps(poison(json.loads(line))) for line in text.splitlines() if line.endswith("}")]
            put(path, "\n".join(lines))
        else:
            put(path, poison(json.loads(text)))
    put(folder / "recipe.yaml", (folder / "recipe.yaml").read_text() + f"# {payload}\n")
    return write_report(folder), poison.structural


def poisoned_result(payload, only=None):
    """A result with the payload in every field; and which decide how it is shown."""
    poison = Poison(payload, only, CLAIM_NAMES)
    result = claim_result("conda", "reproduced", "title")
    result["environment"]["gpus"] = ["a card"]
    made = poison(result)
    if only is None:  # also what the page is sorted and filtered by
        scale = f"cpu{MARK.format(9000)}{payload}"
        made |= {
            "name": f"conda{MARK.format(9001)}{payload}",
            "scale": scale,
            "word": f"equal{MARK.format(9002)}{payload}",
        }
        made["claim"] |= {
            name: made["claim"][name] + f"{MARK.format(n)}{payload}" for n, name in enumerate(("better", "equal"), 9003)
        }
        made["claim"]["scales"] = {scale: {"budget": 3e9}}
        made["finished"] += payload
        made["chosen"] = {side: f"{MARK.format(9005)}{payload}" for side in ("baseline", "method")}
    return made, poison.structural


def claims(folder, payload, only=None):
    """The page of one such result."""
    folder.mkdir(parents=True, exist_ok=True)
    made, structural = poisoned_result(payload, only)
    (folder / "claims.html").write_text(claims_page([made]), encoding="utf-8")
    return folder / "claims.html", structural


# All that a reader may see or be read aloud: texts, and attributes of words; what scripts hold is none of it. One call,
# since each takes longer on its way to the browser and back than there; what is seen is what the pointer's way has drawn.
SEEN = """
async () => {
  document.querySelectorAll('details').forEach(e => { e.open = true; });
  await new Promise(done => setTimeout(done, 50));
  const at = {clientX: 200, clientY: 50, bubbles: true, cancelable: true, composed: true};
  document.querySelectorAll('svg').forEach(e => e.dispatchEvent(new PointerEvent('pointermove', at)));
  const walk = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT), shown = [];
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    if (node.nodeType === Node.TEXT_NODE && !['SCRIPT', 'STYLE'].includes(node.parentElement.tagName.toUpperCase())) shown.push(node.data);
    if (node.nodeType === Node.ELEMENT_NODE)
      for (const name of ['title', 'alt', 'aria-label', 'data-label', 'value', 'href']) if (node.hasAttribute(name)) shown.push(node.getAttribute(name));
  }
  const all = [...document.querySelectorAll('*')];
  return {
    shown, broken: window.broken ?? null, tags: all.map(e => e.tagName), curves: document.querySelectorAll('path.curve').length,
    handlers: all.flatMap(e => [...e.attributes]).filter(a => a.name.startsWith('on') || /^javascript:/i.test(a.value)).length,
    strange: document.querySelectorAll('img[src=x]').length, letters: document.body.innerText.length,
  };
}
"""


def check(page, path, payload, at_least):
    """The page is whole, no script of the payload has run, and each field that is shown is shown as it is."""
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(path.as_uri())
    seen = page.evaluate(SEEN)
    assert problems == [] and seen["broken"] is None and seen["handlers"] == 0
    assert seen["curves"] >= 2 and seen["letters"] > 500
    marked = [text for text in seen["shown"] if "§" in text]
    numbers = set()
    for text in marked:
        for found in re.finditer("§([0-9]+)§", text):
            numbers.add(found[1])
            rest = text[found.end() :]
            quoted = payload.replace("'", "'\"'\"'")  # in a command for a shell
            assert rest.startswith((payload, quoted)) or json.dumps(payload, ensure_ascii=False)[1:-1] in rest, text[
                :300
            ]
    assert len(numbers) >= at_least, sorted(numbers, key=int)
    return numbers, seen["tags"]


@pytest.fixture(scope="module")
def browser():
    with browser_page() as page:
        yield page.context


@pytest.fixture
def page(browser):
    page = browser.new_page()
    yield page
    page.close()


@pytest.mark.promise(
    "Pages",
    "The report and the page of claims show the texts of runs, corpora, models, recipes and results as they are. None becomes markup or a script, whichever field it stands in, nor in the attributes and labels of charts.",
)
@pytest.mark.browser
@pytest.mark.parametrize(("make", "at_least"), [(report, 30), (claims, 15)])
def test_no_text_of_any_field_becomes_markup_or_is_changed_in_a_browser(tmp_path, page, make, at_least):
    clean = check(page, make(tmp_path / "clean", "-")[0], "-", at_least)
    for number, payload in enumerate(PAYLOADS):
        path, _ = make(tmp_path / str(number), payload)
        assert check(page, path, payload, at_least) == clean, payload


@pytest.mark.promise("Pages", "The report and the page of claims show")
@pytest.mark.browser
@pytest.mark.parametrize("make", [report, claims])
def test_a_text_that_decides_how_a_thing_is_shown_becomes_no_markup_either(tmp_path, page, make):
    payload = "<!--<script></script><img src=x onerror=window.broken=1>"
    _, structural = make(tmp_path / "all", payload)
    pages = 0
    for number in structural.values():
        try:
            path, _ = make(tmp_path / str(number), payload, only=number)
        except (KeyError, OSError):  # what names a folder or a side leads nowhere now: there is no page
            continue
        page.goto(path.as_uri())
        seen = page.evaluate(SEEN)
        assert seen["broken"] is None and seen["handlers"] == seen["strange"] == 0, number
        assert seen["letters"] > 200, number
        pages += 1
    assert pages >= len(structural) / 2 >= 3


class Shape(HTMLParser):
    """The tags of a page with the names of their attributes, in order."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, tuple(key for key, _ in attributes)))


@pytest.mark.promise("Pages", "The report and the page of claims show")
@pytest.mark.parametrize("make", [report, claims])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_file_of_a_page_has_the_same_tags_whatever_its_texts(tmp_path, make, payload):
    clean = make(tmp_path / "clean", "-")[0].read_text(encoding="utf-8")
    text = make(tmp_path / "poisoned", payload)[0].read_text(encoding="utf-8")
    assert Shape(text).tags == Shape(clean).tags
    data = text[text.index('id="data">') + len('id="data">') :]
    data = data[: data.index("</script>")]
    assert "<" not in data and payload in json.dumps(json.loads(data), ensure_ascii=False).replace(
        "\\\\", "\\"
    ).replace('\\"', '"')


@pytest.mark.promise("Pages", "No text becomes markup in the table of claims.")
def test_no_text_of_a_result_becomes_markup_in_the_table():
    result, _ = poisoned_result("<img src=x onerror=alert(1)>|")
    assert "<" not in markdown([result])
