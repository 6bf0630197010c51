"""What models answer to the same prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_distill.evaluation import generations
from llm_distill.evaluation.generations import (
    _rouge_scorer,
    compare_generations,
    generations_parts,
    read_cases,
    same_prefix,
    score_likeness,
    split_words,
)
from llm_distill.models import LanguageModel

CHAT = [{"role": "user", "content": "a"}]


def test_model_compared_with_itself_answers_like_itself(models: dict[str, LanguageModel], texts: Dataset):
    rows = [{"prompt": text[:20], "completion": text[20:60]} for text in texts["text"][:9]]
    comparison = compare_generations(
        {"teacher": models["teacher"], "student": models["teacher"]}, rows, max_new_tokens=12
    )
    assert comparison["prompts"] == comparison["references"] == 9
    assert comparison["models"]["student"] == comparison["models"]["teacher"]
    for figure in comparison["student_beside_teacher"].values():
        assert figure == {"value": 1.0, "low": 1.0, "high": 1.0}
    json.dumps(comparison, allow_nan=False)


def test_answers_are_those_of_generate_and_figures_are_their_means(
    models: dict[str, LanguageModel], texts: Dataset, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generations, "BATCH_SIZE", 3)
    monkeypatch.setattr(generations, "EXAMPLES", 7)
    rows = [{"prompt": text[: 10 + n], "completion": text[10 + n : 60]} for n, text in enumerate(texts["text"][:7])]
    comparison = compare_generations(models, rows, max_new_tokens=10)
    assert len(comparison["examples"]) == 7
    for name, model in models.items():
        lengths, prefixes = [], []
        for example in comparison["examples"]:
            inputs = model.tokenizer(example["prompt"], return_tensors="pt")
            written = model.model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=[0, 2])
            ids = written[0, inputs["input_ids"].shape[1] :]
            assert model.tokenizer.decode(ids, skip_special_tokens=True).startswith(example["answers"][name])
            lengths.append(len(split_words(example["answers"][name])))
            prefixes.append(same_prefix(example["answers"]["teacher"], example["answers"][name]))
        assert comparison["models"][name]["words"]["value"] == pytest.approx(np.mean(lengths))
        if name != "teacher":
            assert comparison[f"{name}_beside_teacher"]["same_prefix"]["value"] == pytest.approx(np.mean(prefixes))
            assert comparison[f"{name}_beside_teacher"]["same_prefix"]["value"] < 1
    likeness = [
        score_likeness(example["answers"]["teacher"], example["answers"]["student"])["rougeL"]
        for example in comparison["examples"]
    ]
    assert likeness == sorted(likeness)


def test_rouge_is_that_of_the_paper_by_hand():
    """Lin (2004): "police killed the gunman" beside "police kill the gunman": 3 of 4 words, 1 of 3 pairs, LCS 3."""
    scores = score_likeness("police killed the gunman", "Police  kill the gunman!")
    assert scores == pytest.approx({"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 3 / 4, "exact_match": 0.0})
    precision, recall = 2 / 3, 2 / 4
    scores = score_likeness("a b c d", "a d b")
    assert scores["rougeL"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores["rouge2"] == 0
    assert score_likeness("x  = 1\n", " x = 1") == {"rouge1": 1, "rouge2": 1, "rougeL": 1, "exact_match": 1}
    assert score_likeness("größe", "GRÖSSE größe")["rouge1"] == pytest.approx(2 / 3)
    assert split_words("東京 is_big, 2nd") == ["東", "京", "is", "big", "2nd"]


@pytest.mark.parametrize(
    ("first", "second", "share"), [("abcd", "abxy", 0.5), ("", "a", 0), ("", "", 1), ("ab", "abcd", 0.5)]
)
def test_same_prefix_is_a_share_of_the_longer_text(first: str, second: str, share: float):
    assert same_prefix(first, second) == share


def test_references_come_from_completion_conversation_or_the_rest_of_the_text(
    tokenizer: PreTrainedTokenizerBase, texts: Dataset, monkeypatch: pytest.MonkeyPatch
):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    answer = [{"role": "assistant", "content": "yes"}]
    for row, reference in (
        ({"prompt": "p", "completion": "c"}, "c"),
        ({"prompt": chat[:1], "completion": answer}, "yes"),
        ({"messages": [*chat, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]}, "a2"),
        ({"messages": chat[:1]}, None),
        ({"question": "q"}, None),
    ):
        assert [case.reference for case in read_cases([row], tokenizer)] == [reference]
    text = max(texts["text"], key=len)
    ids = tokenizer(text)["input_ids"]
    (case,) = read_cases([{"text": text}], tokenizer)
    assert case.prompt.content == tokenizer.decode(ids[:32])
    monkeypatch.setattr(generations, "PROMPT_TOKENS", 8)
    (case,) = read_cases([{"text": text}], tokenizer, max_new_tokens=5)
    assert (case.prompt.content, case.reference) == (tokenizer.decode(ids[:8]), tokenizer.decode(ids[8:13]))


def test_conversations_are_asked_through_the_chat_template_of_each_model(saved: Path):
    models = {name: LanguageModel.load(str(saved / name)) for name in ("teacher", "student")}
    models["teacher"].tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
    models["student"].tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "(x): pass"}]}]
    (shown,) = compare_generations(models, rows, max_new_tokens=6)["examples"]
    assert (shown["prompt"], shown["reference"]) == ("user: def f", "(x): pass")
    for name, prompt in (("teacher", "<user>def f<a>"), ("student", "def f")):
        (alone,) = compare_generations({name: models[name]}, [{"prompt": prompt}], max_new_tokens=6)["examples"]
        assert shown["answers"][name] == alone["answers"][name]


def test_prompts_that_one_model_cannot_read_are_left_out_for_all(models: dict[str, LanguageModel], texts: Dataset):
    long = "\n".join(texts["text"][:20])
    comparison = compare_generations(models, [{"prompt": "import os"}, {"prompt": long}], max_new_tokens=4)
    assert (comparison["prompts"], comparison["left_out"], comparison["references"]) == (1, 1, 0)
    assert "rouge1" not in comparison["models"]["teacher"]
    assert any("1 prompts were left out" in part for part in generations_parts(comparison) if isinstance(part, str))
    with pytest.raises(ValueError, match="every prompt is longer"):
        compare_generations(models, [{"prompt": long}], max_new_tokens=4)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "dataset is empty"),
        ([{"text": "x"}], "shorter than prompt_tokens=32"),
        ([{"input_ids": [1, 2]}], "no column"),
        ([{"prompt": CHAT}], "tokenizer of the teacher and the student has no chat template"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(
    models: dict[str, LanguageModel], rows: list[dict[str, Any]], match: str
):
    with pytest.raises(ValueError, match=match):
        compare_generations(models, rows)


def test_table_of_generations_names_every_figure_and_keeps_its_columns(models: dict[str, LanguageModel]):
    rows = [{"prompt": "def f(a | b):\n    return", "completion": "x"}, {"prompt": "import", "completion": "os"}]
    figures, examples = (
        part.markdown() for part in generations_parts(compare_generations(models, rows, max_new_tokens=4))
    )
    for name in ("ROUGE-L", "exact match", "finished", "repetition", "beside the teacher's: same prefix"):
        assert f"| {name} |" in figures
    assert {line.count("|") for line in figures.splitlines()} == {4}
    assert {line.replace("\\|", "").count("|") for line in examples.splitlines()} == {5}


def test_generations_without_rouge_score_say_how_to_install_it(
    models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    _rouge_scorer.cache_clear()
    with pytest.raises(ValueError, match="takes rouge_score: pip install"):
        compare_generations(models, [{"prompt": "a"}])
