"""Which texts are kept, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_distill.generation.engines.base import Completion
from llm_distill.generation.filters import FILTERS, Candidate, make_filters
from llm_distill.generation.private_data import PrivateData
from llm_distill.generation.prompts import make_prompt
from llm_distill.generation.run import apply_filters

PROSE = "The quick brown fox jumps over the lazy dog while the band plays a slow song in the old town hall"


def candidate(text: str, **fields: Any) -> Candidate:
    defaults = {"prompt": "p", "row": {}, "finished": True, "tokens": 5, "mean_log_prob": None}
    return Candidate(text=text, **(defaults | fields))


def keeps(name: str, candidates: list[Candidate], **parameters: Any) -> list[bool]:
    (keep,) = make_filters({name: parameters}).values()
    return [candidate is not None for candidate in keep(candidates)]


def test_finished_drops_what_was_cut_off() -> None:
    assert keeps("finished", [candidate("a"), candidate("b", finished=False)]) == [True, False]


def test_length_counts_tokens_and_characters() -> None:
    candidates = [
        candidate("a", tokens=1),
        candidate("a b", tokens=2),
        candidate("c d e", tokens=9),
        candidate(" \n", tokens=2),
    ]
    assert keeps("length", candidates, min_tokens=2, max_tokens=8) == [False, True, False, False]


def test_repetition_is_a_share_of_runs_of_words() -> None:
    assert keeps("repetition", [candidate(PROSE), candidate("and so on " * 20), candidate("ok")]) == [True, False, True]


def test_log_prob_needs_it() -> None:
    assert keeps("log_prob", [candidate("a", mean_log_prob=-2.9), candidate("b", mean_log_prob=-3.1)]) == [True, False]
    with pytest.raises(ValueError, match="needs the teacher's log-probabilities"):
        keeps("log_prob", [candidate("a")])


def test_a_verifier_is_the_users_function(tmp_path: Path) -> None:
    script = tmp_path / "checks.py"
    script.write_text("def right(prompt, completion, row):\n    return completion == row['answer']\n")
    candidates = [candidate("4", row={"answer": "4"}), candidate("5", row={"answer": "4"})]
    assert keeps("verifier", candidates, check=f"{script}:right") == [True, False]
    with pytest.raises(ValueError, match="no function"):
        make_filters({"verifier": {"check": f"{script}:wrong"}})


def test_exact_duplicates_are_of_one_prompt() -> None:
    candidates = [candidate("4"), candidate("4 "), candidate("4", prompt="q"), candidate("5")]
    assert keeps("exact_duplicates", candidates) == [True, False, True, True]


def test_near_duplicates_share_most_of_their_words() -> None:
    other = "A completely different sentence about compilers, parsers, linkers, loaders, debuggers and the people there"
    candidates = [
        candidate(PROSE),
        candidate(f"{PROSE}!", prompt="q"),
        candidate(other),
        candidate("yes"),
        candidate("yes"),
    ]
    assert keeps("near_duplicates", candidates) == [True, False, True, True, True]


def test_near_duplicates_are_found_across_prompts_and_calls() -> None:
    (keep,) = make_filters({"near_duplicates": {"threshold": 0.6}}).values()
    assert keep([candidate(PROSE)])[0] is not None
    assert keep([candidate(PROSE.replace("slow", "fast"), prompt="q")]) == [None]


def test_majority_keeps_the_commonest_answer() -> None:
    texts = ["so it is 4", "I say 5, no: 4", "5", "4"]
    assert keeps("majority", [candidate(text) for text in texts], answer=r"\d+") == [True, True, False, True]
    assert keeps("majority", [candidate(text) for text in "abcd"]) == [False] * 4
    assert keeps("majority", [candidate("x=1"), candidate("x=1"), candidate("none")], answer=r"x=(\d)") == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+x@mail.example.org today", "write to [EMAIL] today"),
        ("call +44 20 7946 0958 now", "call [PHONE] now"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN [IBAN]."),
        ("card 4111 1111 1111 1111 expires", "card [CARD] expires"),
        ("key AKIAIOSFODNN7EXAMPLE leaked", "key [KEY] leaked"),
        ("token ghp_" + "a1B2" * 9 + " too", "token [KEY] too"),
        ("two: a@b.co and c@d.co", "two: [EMAIL] and [EMAIL]"),
    ],
)
def test_private_data_is_dropped_or_masked(text: str, masked: str) -> None:
    assert keeps("private_data", [candidate(text)]) == [False]
    (mask,) = make_filters({"private_data": {"action": "mask"}}).values()
    assert [clean.text for clean in mask([candidate(text)])] == [masked]


def test_what_a_message_has_besides_its_text_is_judged_too() -> None:
    calls = [candidate("", extra={"tool_calls": [{"function": {"name": name}}]}) for name in ("a", "b", "a")]
    assert keeps("length", [*calls, candidate("")]) == [True, True, True, False]
    assert keeps("exact_duplicates", calls) == [True, True, False]
    thinks = candidate("ok", extra={"reasoning_content": "he is jane.doe@example.org"})
    assert keeps("private_data", [thinks]) == [False]
    (mask,) = make_filters({"private_data": {"action": "mask"}}).values()
    assert [clean.extra for clean in mask([thinks])] == [{"reasoning_content": "he is [EMAIL]"}]


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "DE89 3704 0044 0532 0130 02 has another checksum",
        "4111 1111 1111 1112 is no card",
        "x = data[1234567890:] # 2026-11-25 10:15",
        "def f(user, host): return f'{user}@{host}'",
    ],
)
def test_what_only_looks_private_stays(text: str) -> None:
    assert PrivateData().mask(text) == text


def test_numbers_without_a_country_need_a_region() -> None:
    assert PrivateData().mask("(650) 253-0000") == "(650) 253-0000"
    assert PrivateData("US").mask("(650) 253-0000") == "[PHONE]"


def test_filters_go_in_order_and_each_counts_what_it_rejects() -> None:
    completions = [Completion("ok", True, 1), Completion("ok", True, 1), Completion("", True, 0)]
    verdicts = apply_filters(make_prompt("p", {}), completions, make_filters({"length": {}, "exact_duplicates": {}}))
    assert [reason for _, reason in verdicts] == [None, "exact_duplicates", "length"]
    assert [candidate.text for candidate, _ in verdicts] == ["ok", "ok", ""]


def test_every_filter_says_what_it_keeps() -> None:
    assert all(make.__doc__ for make in FILTERS.values())
