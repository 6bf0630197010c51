"""Which texts are kept, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_distill.generation.filters import FILTERS, Sample, make_filters
from llm_distill.generation.private_data import PrivateData

PROSE = "The quick brown fox jumps over the lazy dog while the band plays a slow song in the old town hall"


def sample(text: str, **fields: Any) -> Sample:
    defaults = {"prompt": "p", "row": {}, "finished": True, "tokens": 5, "mean_log_prob": None}
    return Sample(text=text, **(defaults | fields))


def kept(name: str, samples: list[Sample], **parameters: Any) -> list[bool]:
    (keep,) = make_filters({name: parameters}).values()
    return [each is not None for each in keep(samples)]


def test_finished_drops_what_was_cut_off() -> None:
    assert kept("finished", [sample("a"), sample("b", finished=False)]) == [True, False]


def test_length_counts_tokens_and_characters() -> None:
    samples = [sample("a", tokens=1), sample("a b", tokens=2), sample("c d e", tokens=9), sample(" \n", tokens=2)]
    assert kept("length", samples, min_tokens=2, max_tokens=8) == [False, True, False, False]


def test_repetition_is_a_share_of_runs_of_words() -> None:
    assert kept("repetition", [sample(PROSE), sample("and so on " * 20), sample("ok")]) == [True, False, True]


def test_log_prob_needs_it() -> None:
    assert kept("log_prob", [sample("a", mean_log_prob=-2.9), sample("b", mean_log_prob=-3.1)]) == [True, False]
    with pytest.raises(ValueError, match="needs the teacher's log-probabilities"):
        kept("log_prob", [sample("a")])


def test_a_verifier_is_the_users_function(tmp_path: Path) -> None:
    script = tmp_path / "checks.py"
    script.write_text("def right(prompt, completion, row):\n    return completion == row['answer']\n")
    samples = [sample("4", row={"answer": "4"}), sample("5", row={"answer": "4"})]
    assert kept("verifier", samples, check=f"{script}:right") == [True, False]
    with pytest.raises(ValueError, match="no function"):
        make_filters({"verifier": {"check": f"{script}:wrong"}})


def test_exact_duplicates_are_of_one_prompt() -> None:
    samples = [sample("4"), sample("4 "), sample("4", prompt="q"), sample("5")]
    assert kept("exact_duplicates", samples) == [True, False, True, True]


def test_near_duplicates_share_most_of_their_words() -> None:
    other = "A completely different sentence about compilers, parsers, linkers, loaders, debuggers and the people there"
    samples = [sample(PROSE), sample(f"{PROSE}!", prompt="q"), sample(other), sample("yes"), sample("yes")]
    assert kept("near_duplicates", samples) == [True, False, True, True, True]


def test_near_duplicates_are_found_across_prompts_and_calls() -> None:
    (keep,) = make_filters({"near_duplicates": {"threshold": 0.6}}).values()
    assert keep([sample(PROSE)])[0] is not None
    assert keep([sample(PROSE.replace("slow", "fast"), prompt="q")]) == [None]


def test_majority_keeps_the_commonest_answer() -> None:
    texts = ["so it is 4", "I say 5, no: 4", "5", "4"]
    assert kept("majority", [sample(text) for text in texts], answer=r"\d+") == [True, True, False, True]
    assert kept("majority", [sample(text) for text in "abcd"]) == [False] * 4
    assert kept("majority", [sample("x=1"), sample("x=1"), sample("none")], answer=r"x=(\d)") == [True, True, False]


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
    assert kept("private_data", [sample(text)]) == [False]
    (mask,) = make_filters({"private_data": {"action": "mask"}}).values()
    assert [each.text for each in mask([sample(text)])] == [masked]


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
    assert PrivateData().masked(text) == text


def test_numbers_without_a_country_need_a_region() -> None:
    assert PrivateData().masked("(650) 253-0000") == "(650) 253-0000"
    assert PrivateData("US").masked("(650) 253-0000") == "[PHONE]"


def test_filters_go_in_order_and_each_counts_what_it_rejects() -> None:
    from llm_distill.generation.engines import Completion
    from llm_distill.generation.generate import judged

    completions = [Completion("ok", True, 1), Completion("ok", True, 1), Completion("", True, 0)]
    entry = {"prompt": "p", "row": {}}
    verdicts, changed = judged(entry, completions, make_filters({"length": {}, "exact_duplicates": {}}))
    assert [reason for _, reason in verdicts] == [None, "exact_duplicates", "length"]
    assert changed == [False, False, False]


def test_every_filter_says_what_it_keeps() -> None:
    assert all(make.__doc__ for make in FILTERS.values())
