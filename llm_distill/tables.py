"""A table, for Markdown (a card, a terminal) and for HTML (a page, a notebook)."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

MARKDOWN_SIGN = re.compile(r"[\\`*|<\[$~&]|(?<!\w)_|_(?!\w)")


class Markdown(str):
    """A cell that is Markdown already, such as a link."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A header, and rows whose cells are shown as text: what a model wrote stays what it is.

    A column of numbers stands on the right. Without rows there is nothing to see.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def without_empty_columns(self) -> Table:
        """Without the columns in which no row has anything."""
        filled = [i for i in range(len(self.header)) if any(str(row[i]) for row in self.rows)]
        return Table([self.header[i] for i in filled], [[row[i] for i in filled] for row in self.rows])

    def markdown(self) -> str:
        """Its lines, in the form that GitHub and the Hub show."""
        if not self.rows:
            return ""
        rule = "".join("---:|" if is_number else "---|" for is_number in self._are_numbers())
        return "\n".join([_markdown_row(self.header), f"|{rule}", *map(_markdown_row, self.rows)])

    def html(self) -> str:
        """A `<table>`, in which the class `number` is for what should stand on the right."""
        if not self.rows:
            return ""
        head, body = self._html_row("th", self.header), "".join(self._html_row("td", row) for row in self.rows)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"

    def _html_row(self, tag: str, cells: Sequence[object]) -> str:
        starts = (f'<{tag} class="number">' if is_number else f"<{tag}>" for is_number in self._are_numbers())
        texts = (html.escape(str(cell)) for cell in cells)
        return f"<tr>{''.join(f'{start}{text}</{tag}>' for start, text in zip(starts, texts, strict=True))}</tr>"

    def _are_numbers(self) -> list[bool]:
        """Of each column, whether all its cells begin as a number does, or say that there is none."""
        columns = zip(*self.rows, strict=True)
        return [all(re.match(r"[-+–∞]?(\d|$)", str(cell)) for cell in column) for column in columns]


def escape_markdown(text: str) -> str:
    """The text in one line, in which no sign means anything to Markdown. Those inside of words mean nothing anyway."""
    return MARKDOWN_SIGN.sub(r"\\\g<0>", printable(" ".join(text.split())))


def as_code(text: str, language: str | None = None) -> str:
    """The text as code in a line or, with a language, as a block: longer fences than any in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    if language is None:
        fence, space = "`" * (longest + 1), " " if longest else ""
        return f"{fence}{space}{printable(' '.join(text.split()))}{space}{fence}"
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text).strip()}\n{fence}"


def printable(text: str) -> str:
    """Words of others for a terminal: without what would steer it, or turn the direction of reading."""
    return "".join("\ufffd" if _steers(sign) else sign for sign in text)


def _steers(sign: str) -> bool:
    """Control characters but for newline and tab; overrides, embeddings and isolates of direction."""
    is_control = unicodedata.category(sign) == "Cc" and sign not in "\n\t"
    return is_control or unicodedata.bidirectional(sign) in (
        "LRE",
        "RLE",
        "LRO",
        "RLO",
        "PDF",
        "LRI",
        "RLI",
        "FSI",
        "PDI",
    )


def _markdown_row(cells: Sequence[object]) -> str:
    texts = (cell if isinstance(cell, Markdown) else escape_markdown(str(cell)) for cell in cells)
    return "|" + "".join(f" {text} |" if text else " |" for text in texts)
