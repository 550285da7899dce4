"""What is measured of each domain stands with its interval, its documents and its bytes; little text scales no chart."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from page_cases import example, put

from pretrain.evaluation._intervals import LEAST, bounds, bounds_by_domain, bounds_of_means, resampled_sums
from pretrain.evaluation.likelihood.held_out import measured
from pretrain.records import FEW_BYTES
from pretrain.report.charts import bits_chart
from pretrain.report.data import collect
from pretrain.report.held_out import MAX_DOMAINS, bars
from pretrain.report.page import write
from pretrain.stages.evaluate import Evaluate, summary


def documents(**counts: int) -> list[dict]:
    """So many documents of each domain, each with its own nats a byte."""
    random = np.random.default_rng(0)
    return [
        {"domain": domain, "nll": float(random.uniform(500, 1500)), "targets": 200.0, "bytes": 900.0}
        for domain, count in counts.items()
        for _ in range(count)
    ]


def test_a_domain_has_the_interval_that_its_documents_alone_would_have():
    rows = documents(py=30, md=12)
    whole = measured(rows)
    for domain in ("py", "md"):
        alone = measured([row for row in rows if row["domain"] == domain])
        assert whole.domain_intervals[domain] == alone.intervals
        low, high = whole.domain_intervals[domain]["bits_per_byte"]
        assert low < whole.domains[domain]["bits_per_byte"] < high


def test_a_line_says_the_largest_domains_and_how_many_more_there_are():
    said = []
    domains = {f"d{number}": {"bits_per_byte": 1.0 + number / 10} for number in range(8)}
    sizes = {name: {"documents": 1, "bytes": 10 * number} for number, name in enumerate(domains)}
    result = {"metrics": {"bits_per_byte": 1.2}, "compressors": {}, "domains": domains, "sizes": sizes}
    job, stage = SimpleNamespace(say=said.append), Evaluate(checkpoint="c", corpus="d")
    stage._say(job, result)
    assert said[1:] == ["by domain: d7 1.700, d6 1.600, d5 1.500, d4 1.400, d3 1.300, d2 1.200, 2 more"]
    said.clear()
    stage._say(job, result | {"domains": {"d0": domains["d0"]}})
    assert len(said) == 1


def test_a_domain_of_few_documents_has_no_interval_and_the_others_keep_theirs():
    found = measured(documents(py=LEAST, md=LEAST - 1))
    assert set(found.domain_intervals) == {"py"} and set(found.domains) == {"py", "md"}


def test_a_mean_by_domain_is_resampled_as_the_mean_of_all_is():
    values, names = np.arange(40.0), ["a"] * 20 + ["b"] * 20
    found = bounds_of_means("score", values, names, 200, 0)
    assert found["b"]["score"] == pytest.approx(bounds(resampled_sums(values[20:, None], 200, 0)[:, 0] / 20))
    assert bounds_by_domain(values[:, None], names, lambda sums_RK: {}, 200, 0) == {"a": {}, "b": {}}


def test_the_summary_counts_each_domains_documents_and_bytes():
    texts = [
        {"text": "é" * 10, "domain": "a"},
        {"text": "b", "domain": "a"},
        {"text": "cc"},
        {"image": 1, "domain": "i"},
    ]
    made = summary({"held_out": measured(documents(a=LEAST, b=1))}, texts, compressors=False)
    assert made["sizes"] == {
        "a": {"documents": 2, "bytes": 21}, "i": {"documents": 1, "bytes": 0}, "text": {"documents": 1, "bytes": 2},
    }  # fmt: skip
    assert set(made["domain_intervals"]) == {"a"} and len(made["domain_intervals"]["a"]["loss"]) == 2
    json.dumps(made)


def evaluation(sizes: dict[str, int], bits: dict[str, float], **more) -> dict:
    return {
        "name": "test", "of": "model", "documents": 9, "metrics": {"bits_per_byte": 2.0},
        "domains": {domain: {"bits_per_byte": value} for domain, value in bits.items()},
        "sizes": {domain: {"documents": 3, "bytes": size} for domain, size in sizes.items()},
    } | more  # fmt: skip


def test_a_domain_of_little_text_scales_no_bars_and_is_named():
    given = evaluation({"py": 90_000, "css": FEW_BYTES, "md": 59}, {"py": 1.0, "css": 4.0, "md": 16.0})
    (chart,) = bars([given])
    assert chart["domains"] == ["py", "css"] and chart["few"] == ["md"]
    text = str(bits_chart(0, chart))
    assert "Too little text to be drawn: md (3 documents, 59 B)." in text and "16.00" not in text
    assert "width:25.00%" in text and "width:100.00%" in text  # of css, and not of md


def test_the_largest_domains_are_drawn_and_the_rest_counted():
    names = {f"d{n:02}": 10_000 + n for n in range(MAX_DOMAINS + 3)}
    (chart,) = bars([evaluation(names, dict.fromkeys(names, 1.0))])
    assert chart["domains"] == sorted(names, reverse=True)[:MAX_DOMAINS] and chart["more"] == 3


def test_a_domains_interval_is_drawn_on_its_bar_and_one_without_says_why():
    given = evaluation(
        {"py": 9000, "md": 8000}, {"py": 2.0, "md": 1.0}, domain_intervals={"py": {"bits_per_byte": [1.0, 4.0]}}
    )
    text = str(bits_chart(0, bars([given])[0]))
    assert 'title="95% interval 1.00 to 4.00"' in text and "left:25.00%;width:75.00%" in text
    assert "py (3 documents, 9 kB)" in text and "md (3 documents, 8 kB: too few for an interval)" in text


def test_the_page_has_a_row_for_each_domain_with_its_documents_text_and_interval(tmp_path):
    folder = example(tmp_path / "r")
    given = json.loads((folder / "test" / "evaluation.json").read_text())
    sizes = {"a": {"documents": 1234, "bytes": 5000}, "all": {"documents": 2, "bytes": 70}}
    apart = {"a": {"bits_per_byte": [1.3, 1.5]}}
    put(folder / "test" / "evaluation.json", given | {"sizes": sizes, "domain_intervals": apart})
    cell = '<td data-label="{}">{}</td>'.format
    row = [cell("domain", "a"), cell("documents", "1,234"), cell("text", "5 kB"), cell("metric", "bits_per_byte")]
    page = write(folder).read_text().replace(' class="number"', "")
    assert "".join([*row, cell("value", "1.4"), cell("95% interval", "1.3 to 1.5")]) in page


def test_an_evaluation_of_before_is_counted_by_its_documents(tmp_path):
    folder = example(tmp_path / "r")
    rows = [{"domain": "a", "nll": 1.0, "targets": 2, "bytes": 30.0}] * 2 + [{"domain": "all", "bytes": 5.0}, "odd"]
    put(folder / "test" / "documents.json", {"held_out": rows})
    sizes = next(e["sizes"] for e in collect(folder)["evaluations"] if e["name"] == "test")
    assert sizes == {"a": {"documents": 2, "bytes": 60}, "all": {"documents": 1, "bytes": 5}}
