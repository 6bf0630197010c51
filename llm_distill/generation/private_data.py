"""Personal data and secrets in a text, found by well-kept libraries and, where a checksum tells, by that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llm_distill.leaks import key_patterns

E_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
CARD = re.compile(r"\b\d(?:[ -]?\d){12,18}\b")


class PrivateData:
    """Finds e-mail addresses, telephone numbers, IBANs, card numbers and keys."""

    def __init__(self, region: str | None = None) -> None:
        """`region`, such as US, is that of telephone numbers without a country code; without it they are not looked
        for.

        Raises:
            ImportError: the libraries are not installed.
        """
        import phonenumbers
        import stdnum.iban
        import stdnum.luhn

        self._region = region
        self._phones: Any = phonenumbers.PhoneNumberMatcher
        self._iban, self._luhn = stdnum.iban, stdnum.luhn
        self._keys = key_patterns()

    def mask(self, text: str) -> str:
        """The text with [EMAIL], [KEY], … in place of what is private; itself if nothing is."""
        parts, place = [], 0
        for start, end, kind in sorted(self._spans(text), key=lambda span: (span[0], -span[1])):
            if start >= place:
                parts += [text[place:start], f"[{kind}]"]
            place = max(place, end)  # of two that overlap, the first names both
        return "".join([*parts, text[place:]])

    def _spans(self, text: str) -> Iterator[tuple[int, int, str]]:
        for match in E_MAIL.finditer(text):
            yield *match.span(), "EMAIL"
        for match in IBAN.finditer(text):
            if self._iban.is_valid(match[0]):
                yield *match.span(), "IBAN"
        for match in CARD.finditer(text):
            if self._luhn.is_valid(re.sub(r"[ -]", "", match[0])):
                yield *match.span(), "CARD"
        for phone in self._phones(text, self._region):
            yield phone.start, phone.end, "PHONE"
        for pattern in self._keys:
            for match in pattern.finditer(text):
                yield *match.span(), "KEY"
