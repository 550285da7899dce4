"""Personal data is found by its form and its checksum, what only looks like it stays, and each kind is counted."""

from __future__ import annotations

import time

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.data import _mapped
from pretrain.data._dropped import Ledger
from pretrain.data._work import working
from pretrain.data.rewriting import _pii
from pretrain.data.rewriting.mask_pii import KINDS, MaskPii

FOUND = {
    "emails": [
        "ada@example.com", "a.b-c+tag@mail.example.co.uk", "x_1@sub.example.museum", "zoë@österreich.at",
        "o'neil@example.org", "first%last@example.info",
    ],
    "ip_addresses": ["8.8.8.8", "22.214.171.124", "2001:4860:4860::8888", "2606:4700:4700:0:0:0:0:1111"],
    "phone_numbers": [
        "+43 1 58858-0", "+1 (212) 555-0123", "+442079460958", "(212) 555-0123", "212-555-0123", "415.555.2671", "+49 30/1234567",
    ],
    "credit_cards": [
        "4111111111111111", "4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "3782 822463 10005",
        "6011111111111117", "30569309025904", "2223003122003222",
    ],
    "ibans": [
        "GB82WEST12345698765432", "DE89 3704 0044 0532 0130 00", "NO9386011117947", "FR14 2004 1010 0505 0001 3M02 606",
        "MT84MALT011000012345MTLCAST001S", "AT61 1904 3002 3457 3201",
    ],
}  # fmt: skip
STAYS = [
    "@staticmethod", "a @ b.com", "user@localhost", "foo@bar", "@", "@@@ a@b. c@.d", "x = a@b", "1.2.3", "1.2.3.4.5", "999.1.1.1",
    "192.168.0.1", "127.0.0.1", "10.0.0.1", "v8.8.8.8", "::1", "2001:db8::1", "12:30:45", "fe80::1", "std::2000::x", "a::b",
    "2021-05-12 10:00", "1234567890", "555-0123", "+1", "x+12345678901", "212-555-01234", "3.14159265358979", "1-800-555",
    "4111111111111112", "4111 1111 1111 1112", "1111111111111117", "41111111111111111111", "4111-1111 1111-1111", "0.4111111111111111",
    "GB82WEST12345698765433", "DE89 3704 0044 0532 0130", "XX82WEST12345698765432", "GB82WEST1234569876543299", "AAGB82WEST12345698765432",
]  # fmt: skip
VALUES = [(kind, value) for kind, values in FOUND.items() for value in values]


@pytest.mark.parametrize("kind, value", VALUES)
def test_what_has_the_form_is_masked_with_what_stands_around_it_as_it_was(kind, value):
    marks = {kind: getattr(MaskPii(), kind) for kind in KINDS}
    for before, after in (("", ""), ("Write: ", ", or not."), ("(", ")"), ("«", "»\n"), ("a\n", "\nb"), ("\t<", ">;")):
        masked, counts = MaskPii().masked(f"{before}{value}{after}")
        assert (masked, dict(counts)) == (f"{before}{marks[kind]}{after}", {kind: 1})
    alone = MaskPii(**dict.fromkeys(KINDS, None) | {kind: "<>"})
    assert alone.masked(value)[0] == "<>" and marks[kind] not in MaskPii(**{kind: None}).masked(value)[0]


@pytest.mark.parametrize("text", STAYS)
def test_what_only_looks_like_it_stays(text):
    for around in ("{}", "so {} is it", "({})"):
        assert MaskPii().masked(around.format(text)) == (around.format(text), {})


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from([*VALUES, *((None, text) for text in STAYS), (None, "words"), (None, "\n")]), max_size=8)
)
def test_of_several_in_a_text_all_are_counted_and_a_second_time_nothing_is_found(parts):
    text = " , ".join(value for _, value in parts)
    masked, counts = MaskPii().masked(text)
    assert masked == " , ".join(getattr(MaskPii(), kind) if kind else value for kind, value in parts)
    assert counts.total() == sum(kind is not None for kind, _ in parts)
    assert MaskPii().masked(masked) == (masked, {})


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("a1@.:+-() 4GB8"), max_size=60))
def test_spans_lie_in_the_text_one_after_another(text):
    for find in KINDS.values():
        assert all(0 <= start < end <= len(text) for start, end in find(text))


@settings(deadline=None, max_examples=60)
@given(st.integers(10**13, 10**14 - 1), st.integers(0, 8))
def test_a_checksum_tells_of_each_single_digit_that_is_wrong(number, off):
    digits = next(f"4{number}{last}" for last in range(10) if _pii._luhn(f"4{number}{last}"))
    assert list(_pii.credit_cards(digits)) == [(0, 16)]
    wrong = digits[:5] + str((int(digits[5]) + off + 1) % 10) + digits[6:]
    assert list(_pii.credit_cards(wrong)) == [] or off == 9
    iban = next(f"DE{check:02}{number:018}" for check in range(2, 99) if int(f"{number:018}1314{check:02}") % 97 == 1)
    assert (
        list(_pii.ibans(iban)) == [(0, 22)] and list(_pii.ibans(iban[:-1] + str((int(iban[-1]) + off + 1) % 10))) == []
    )


def test_long_runs_take_a_time_that_grows_with_them_alone():
    def seconds(count):
        begun = time.process_time()
        for run in ("a.", "a@", "1.", "1 ", "+1", "GB82 ", "2001:", "(212) ", "4111 ", "a@b."):
            MaskPii().masked(run * count)
        return time.process_time() - begun

    short, long = min(seconds(1000) for _ in range(3)), min(seconds(8000) for _ in range(3))
    assert long < 20 * short


def test_documents_with_many_are_dropped_and_the_report_counts_by_kind(tmp_path, monkeypatch):
    rows = ["ada@example.com, 8.8.8.8", None, "nothing", "a@example.com b@example.com c@example.com", "+43 1 58858-0"]
    corpus, ledger = Dataset.from_dict({"text": rows}), Ledger(tmp_path)
    monkeypatch.setattr(_mapped, "SHARD", 2)
    with working(tmp_path, ledger) as desk:
        after = MaskPii(most=2, phone_numbers=None)(corpus)
        ledger.settle("mask_pii", corpus, after)
    ledger.close()
    assert after["text"][:] == ["|||EMAIL_ADDRESS|||, |||IP_ADDRESS|||", None, "nothing", "+43 1 58858-0"]
    assert desk.reports[0]["masked"] == {"emails": 4, "ibans": 0, "credit_cards": 0, "ip_addresses": 1}
    assert desk.reports[0]["changed"] == 2 and desk.reports[0]["documents"] == {"all": {"before": 5, "after": 4}}
    (dropped,) = ledger.funnel[0]["examples"]
    assert (dropped["reason"], dropped["measured"]) == ("personal data", 3)
    with pytest.raises(PretrainError, match="accepted: one with text"):
        MaskPii()(Dataset.from_dict({"image": [1]}))
