"""Tables, in Markdown and in HTML."""

from __future__ import annotations

import pytest

from llm_distill.tables import Markdown, Table, as_code, escape_markdown, printable


def test_numbers_stand_on_the_right_and_words_on_the_left() -> None:
    table = Table(["", "loss", "n"], [["student", "1.25 (1.1 to 1.4)", 3], ["teacher", "–", ""]])
    assert table.markdown() == "\n".join(
        ["| | loss | n |", "|---|---:|---:|", "| student | 1.25 (1.1 to 1.4) | 3 |", "| teacher | – | |"]
    )
    assert table.html() == (
        '<table><thead><tr><th></th><th class="number">loss</th><th class="number">n</th></tr></thead><tbody>'
        '<tr><td>student</td><td class="number">1.25 (1.1 to 1.4)</td><td class="number">3</td></tr>'
        '<tr><td>teacher</td><td class="number">–</td><td class="number"></td></tr></tbody></table>'
    )


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a|b", r"a\|b"),
        ("<script>", r"\<script>"),
        ("*x* `y` [z](u) $m$ ~s~ &lt;", r"\*x\* \`y\` \[z](u) \$m\$ \~s\~ \&lt;"),
        ("\\", "\\\\"),
        ("arc_easy _really_", r"arc_easy \_really\_"),
        ("two\n\nlines", "two lines"),
    ],
)
def test_what_a_model_wrote_is_shown_and_not_run(text: str, markdown: str) -> None:
    assert escape_markdown(text) == markdown
    assert f"| {markdown} |" in Table(["answer"], [[text]]).markdown()
    assert "<script>" not in Table(["answer"], [[text]]).html()


def test_a_cell_that_is_markdown_stays_so() -> None:
    assert "| [a](b) |" in Table(["link"], [[Markdown("[a](b)")]]).markdown()


def test_empty_columns_go_if_asked_and_no_rows_are_no_table() -> None:
    table = Table(["a", "b", "c"], [["x", "", 1], ["y", "", ""]])
    assert table.without_empty_columns() == Table(["a", "c"], [["x", 1], ["y", ""]])
    assert Table(["a"], []).markdown() == Table(["a"], []).html() == ""


def test_code_ends_where_it_ends() -> None:
    assert as_code("a `b`") == "`` a `b` ``"
    assert as_code("a\n```\n<img src=x>", "text") == "````text\na\n```\n<img src=x>\n````"


def test_words_of_others_do_not_steer_a_terminal() -> None:
    assert printable("a\x1b[2J\x07\x9b1m\u202eb\n\tc") == "a\ufffd[2J\ufffd\ufffd1m\ufffdb\n\tc"
    assert "\x1b" not in Table(["a"], [["\x1b[31mred"]]).markdown()
