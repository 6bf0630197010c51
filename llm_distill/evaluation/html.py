"""The gap report as one page that needs nothing beside it: tables, plots, and the passages as coloured text."""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING, Any

from markdown import Markdown

if TYPE_CHECKING:
    from llm_distill.evaluation.report import GapReport

STYLE = """
.gap-report { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; color: #1c1917; background: #fff }
.gap-report h1 { font-size: 1.6rem } .gap-report h2 { font-size: 1.15rem; margin-top: 2rem }
.gap-report .headline { font-size: 1.1rem; border-left: 4px solid #c2410c; padding-left: .8rem }
.gap-report table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.gap-report th, .gap-report td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e7e5e4; vertical-align: top }
.gap-report th { text-align: left; font-weight: 600 }
.gap-report svg { max-width: 100%; height: auto }
.gap-report pre.passage { white-space: pre-wrap; font: 13px/1.7 ui-monospace, monospace; background: #fafaf9;
  padding: .8rem; border-radius: 4px }
.gap-report .before, .gap-report .made { color: #78716c }
.gap-report .passage span[title] { cursor: help; border-radius: 2px }
"""
DARKEST = 3.0
"""Nats of KL at which a token's colour is full."""


def as_page(report: GapReport) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Gap report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head>\n'
        f"<body>\n{as_fragment(report)}\n</body></html>\n"
    )


def as_fragment(report: GapReport) -> str:
    """What goes into a page, or a notebook."""
    pictures = {name: _svg(figure) for name, figure in report.plots()}
    comparable = report.content["comparable"] is True
    parts = [
        f"<style>{STYLE}</style>",
        "<h1>Gap report</h1>",
        f'<p class="headline">{html.escape(report.headline())}</p>',
        _rendered(report.subjects_table()),
        "<h2>Quality</h2>",
        _rendered(report.quality_table()),
        pictures.get("quality", ""),
        "<h2>Likeness</h2>",
        _rendered(report.likeness_table() if comparable else f"Not comparable: {report.content['comparable']}"),
        pictures.get("furthest", ""),
        *(_where(report, name) for name in report.content["domains"] if comparable),
        *(_passages(name, domain) for name, domain in report.content["domains"].items()),
        "<h2>Calibration</h2>",
        _rendered(report.calibration_table()),
        pictures.get("calibration", ""),
    ]
    for title, body in report.sections():
        parts += [f"<h2>{html.escape(title)}</h2>", _rendered(body)]
    if not pictures:
        parts.append(
            "<p>There are no plots, because matplotlib is not installed: pip install 'llm-distill[plots]'.</p>"
        )
    parts += [pictures.get("resources", ""), f'<div class="made">{_rendered(report.made())}</div>']
    return '<div class="gap-report">\n' + "\n".join(filter(None, parts)) + "\n</div>"


def _where(report: GapReport, domain: str) -> str:
    tables = "".join(_rendered(report.where_table(domain, key)) for key in ("by_position", "by_frequency"))
    return f"<details><summary>By position and frequency: {html.escape(domain)}</summary>{tables}</details>"


def _passages(name: str, domain: dict[str, Any]) -> str:
    """Where the student is furthest off; a token says more under the pointer."""
    shown = []
    for passage in domain.get("passages", []):
        tokens = "".join(_token(each) for each in passage["tokens"])
        shown.append(
            f'<pre class="passage"><span class="before">{html.escape(passage["before"])}</span>{tokens}</pre>'
            f'<p class="made">Text {passage["text"]}, mean KL {passage["kl"]:.2f} nats.</p>'
        )
    if not shown:
        return ""
    intro = (
        "The redder a token, the larger KL(teacher‖student) where it is predicted. Point at one to see what both "
        "expected. In grey, what comes before."
    )
    return f"<h2>Where it is furthest off: {html.escape(name)}</h2><p>{intro}</p>" + "".join(shown) + _tokens(domain)


def _token(found: dict[str, Any]) -> str:
    lines = [f"KL {found['kl']:.2f} · teacher {found['teacher']:.1%} · student {found['student']:.1%}"]
    for who in ("teacher", "student"):
        expected = ", ".join(f"{token!r} {p:.0%}" for token, p in found[f"{who}_top"])
        lines.append(f"{who} expects {expected}")
    share = min(found["kl"] / DARKEST, 1.0)
    title = html.escape("\n".join(lines), quote=True)
    return f'<span style="background:rgba(194,65,12,{share:.2f})" title="{title}">{html.escape(found["token"])}</span>'


def _tokens(domain: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(repr(each['token']))}</code></td><td>{each['count']:,}</td><td>{each['kl']:.2f}</td>"
        f"<td>{each['student_loss']:.2f}</td><td>{each['teacher_loss']:.2f}</td></tr>"
        for each in domain.get("furthest_tokens", [])
    )
    header = "".join(f"<th>{name}</th>" for name in ("token", "times", "mean KL", "student's loss", "teacher's loss"))
    return (
        f"<details><summary>Tokens with the largest mean KL</summary><table><tr>{header}</tr>{rows}</table></details>"
    )


def _rendered(markdown: str) -> str:
    """Markdown to HTML. Tags in it are shown as text: it may hold what a model wrote."""
    converter = Markdown(extensions=["tables", "fenced_code"])
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    return converter.convert(markdown)


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gap report"}):  # text as text; the same file every time
        figure.savefig(file, format="svg", metadata={"Date": None})
    return " ".join(file.getvalue()[file.getvalue().index("<svg") :].split())  # a tenth of it is indentation
