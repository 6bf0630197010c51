"""The gap report's page, which needs nothing beside it: tables, plots, and passages as coloured text."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llm_distill.tables import Table, escape_markdown

STYLE = """
.gap-report { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; color: #1c1917; background: #fff }
.gap-report h1 { font-size: 1.6rem } .gap-report h2 { font-size: 1.15rem; margin-top: 2rem }
.gap-report .headline { font-size: 1.1rem; border-left: 4px solid #c2410c; padding-left: .8rem }
.gap-report table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.gap-report th, .gap-report td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e7e5e4; text-align: left;
  vertical-align: top }
.gap-report th { font-weight: 600 } .gap-report .number { text-align: right }
.gap-report svg { max-width: 100%; height: auto }
.gap-report pre.passage { white-space: pre-wrap; font: 13px/1.7 ui-monospace, monospace; background: #fafaf9;
  padding: .8rem; border-radius: 4px }
.gap-report .before, .gap-report .made { color: #78716c }
.gap-report .passage span[title] { cursor: help; border-radius: 2px }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Nothing on the page runs or is fetched, whatever is written in it."""
DARKEST = 3.0
"""Nats of KL at which a token's colour is full."""


class Section(NamedTuple):
    """A part of the report, in Markdown and on the page."""

    title: str
    parts: Sequence[Table | str] = ()
    """Tables, and paragraphs of text."""
    plot: str | None = None
    """The name of the one that belongs here. It and what follows are on the page alone."""
    folded: Mapping[str, Sequence[Table]] = {}
    """Tables that one must ask for, by their title."""
    passages: Sequence[Mapping[str, Any]] = ()
    """Text, token by token, with what both models expected."""

    def markdown(self) -> str:
        texts = [part.markdown() if isinstance(part, Table) else escape_markdown(part) for part in self.parts]
        return "\n\n".join([f"## {escape_markdown(self.title)}", *filter(None, texts)])

    def html(self, plots: Mapping[str, str]) -> str:
        """As a part of the page, with its plot of `plots`."""
        body = [f"<h2>{html.escape(self.title)}</h2>"]
        body += [part.html() if isinstance(part, Table) else f"<p>{html.escape(part)}</p>" for part in self.parts]
        body += [*map(_passage, self.passages), plots.get(self.plot or "", "")]
        for title, folded in self.folded.items():
            tables = "".join(table.html() for table in folded)
            body.append(f"<details><summary>{html.escape(title)}</summary>{tables}</details>")
        return "\n".join(filter(None, body))


def as_page(fragment: str) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Gap report</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head>\n'
        f"<body>\n{fragment}\n</body></html>\n"
    )


def as_fragment(
    headline: str, subjects: Table, sections: Iterable[Section], plots: Mapping[str, Any], made: str, command: str
) -> str:
    """What goes into a page, or a notebook."""
    pictures = {name: _svg(figure) for name, figure in plots.items()}
    body = [
        f"<style>{STYLE}</style>",
        f'<h1>Gap report</h1>\n<p class="headline">{html.escape(headline)}</p>',
        subjects.html(),
        *(section.html(pictures) for section in sections),
        "" if plots else "<p>There are no plots: pip install 'llm-distill[plots]' for matplotlib.</p>",
        f'<p class="made">{html.escape(made)} <code>{html.escape(command)}</code></p>',
    ]
    return '<div class="gap-report">\n' + "\n".join(filter(None, body)) + "\n</div>"


def _passage(passage: Mapping[str, Any]) -> str:
    tokens = "".join(map(_coloured_token, passage["tokens"]))
    return (
        f'<pre class="passage"><span class="before">{html.escape(passage["before"])}</span>{tokens}</pre>'
        f'<p class="made">Text {passage["text"]:d}, mean KL {passage["kl"]:.2f} nats.</p>'
    )


def _coloured_token(token: Mapping[str, Any]) -> str:
    """It says more under the pointer."""
    lines = [f"KL {token['kl']:.2f} · teacher {token['teacher']:.1%} · student {token['student']:.1%}"]
    for name in ("teacher", "student"):
        expected = ", ".join(f"{text!r} {p:.0%}" for text, p in token[f"{name}_top"])
        lines.append(f"{name} expects {expected}")
    share = min(token["kl"] / DARKEST, 1.0)
    title = html.escape("\n".join(lines), quote=True)
    return f'<span style="background:rgba(194,65,12,{share:.2f})" title="{title}">{html.escape(token["token"])}</span>'


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gap report"}):  # text as text; the same file every time
        figure.savefig(file, format="svg", metadata={"Date": None})
    return " ".join(file.getvalue()[file.getvalue().index("<svg") :].split())  # a tenth of it is indentation
