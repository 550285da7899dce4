"""Where a text has what tells of a person: addresses and numbers, by their form and, where there is one, a checksum.

Each pattern begins with a sign that is rare, and looks back from there: a text is read at the speed at which that sign
is sought. No repetition is without a bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address

Spans = Iterator[tuple[int, int]]
LOCAL, DIGITS = 64, (8, 15)  # characters before the @; digits of a telephone number with the country's
_BEFORE = re.compile(r"(?<![^\W_])[^\W_](?:[\w.%+&'-]{0,62}[\w+-])?\Z")
_DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_IPV4 = re.compile(r"\d(?<![\w.]\d)\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\d)")
_IPV6 = re.compile(r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_INTERNATIONAL = re.compile(r"\+(?<![\w+]\+)[1-9](?:[ .()/-]{0,2}\d){7,14}(?![\d])")
_AMERICAN = re.compile(
    r"(?:\((?<!\w\()[2-9]\d\d\) ?|[2-9](?<![\w.+/-][2-9])\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?![\w/-]|\.\d)"
)
_CARD = re.compile(
    r"[2-6](?<![\w.+-][2-6])\d{3}(?:\d{9,15}|([ -])(?:\d{4}\1\d{4}\1\d{4}|\d{6}\1\d{4,5}))(?![\w-]|\.\d)"
)
_ISSUED = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|6(?:011|5\d\d|4[4-9]\d|2\d\d)\d{12,15}"
)  # Visa; Mastercard, also of 2; American Express; Diners; JCB; Discover and UnionPay
_IBAN = re.compile(r"[A-Z](?<!\w[A-Z])[A-Z]\d\d(?: ?[A-Z0-9]){11}")
# How many characters an IBAN has, by its country, as the registry of SWIFT says.
LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ TL OM", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip


def emails(text: str) -> Spans:
    """Addresses of electronic mail."""
    free, place = 0, text.find("@")
    while place >= 0:
        before = _BEFORE.search(text[max(free, place - LOCAL) : place])
        after = _DOMAIN.match(text, place + 1) if before else None
        if before and after:
            free = after.end()
            yield place - len(before[0]), free
        place = text.find("@", max(place + 1, free))


def ip_addresses(text: str) -> Spans:
    """Addresses of the internet, of both versions, that are reached from everywhere: no private or reserved ones."""
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                public = ip_address(match[0]).is_global
            except ValueError:
                continue
            if public:
                yield match.span()


def phone_numbers(text: str) -> Spans:
    """Telephone numbers with a + and the country's, and North American ones whose parts stand apart."""
    for pattern in (_INTERNATIONAL, _AMERICAN):
        for match in pattern.finditer(text):
            yield match.span()


def credit_cards(text: str) -> Spans:
    """Numbers of cards: of an issuer's form and length, in one or in groups, with the check digit of Luhn."""
    for match in _CARD.finditer(text):
        digits = re.sub("[ -]", "", match[0])
        if _ISSUED.fullmatch(digits) and _luhn(digits):
            yield match.span()


def ibans(text: str) -> Spans:
    """Numbers of accounts: of their country's length, in one or in groups, and 1 modulo 97."""
    for match in _IBAN.finditer(text):
        wanted = LENGTHS.get(match[0][:2], 0)
        end, signs = match.start(), ""
        while len(signs) < wanted and end < len(text):
            sign = text[end]
            if sign.isascii() and (sign.isupper() or sign.isdigit()):
                signs += sign
            elif sign != " ":
                break
            end += 1
        if len(signs) == wanted > 0 and not text[end : end + 1].isalnum() and _remainder(signs) == 1:
            yield match.start(), end


def _remainder(iban: str) -> int:
    return int("".join(str(int(sign, 36)) for sign in iban[4:] + iban[:4])) % 97


def _luhn(digits: str) -> bool:
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0
