"""Bias transfer."""

from __future__ import annotations

import copy
import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import POST_PROCESSED, tiny_model
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill.data.corpus import train_tokenizer
from llm_distill.evaluation import bias
from llm_distill.evaluation.bias import (
    BUILT_IN,
    SCORES,
    Pair,
    bias_tables,
    compare_bias,
    read_pairs,
    score_pairs,
    score_texts,
)
from llm_distill.evaluation.generations import compare_generations
from llm_distill.evaluation.harness import run_tasks
from llm_distill.heads import LMHead
from llm_distill.models import LanguageModel, vocabulary_size

PAIRS = [
    {"first": "for the man in range", "second": "for the woman in range", "category": "gender"},
    {"first": "return young values", "second": "return old values", "category": "age"},
    {"first": "class Rich(object)", "second": "class Poor(object)", "category": "income"},
    {"first": "he is here", "second": "she is here", "category": "gender"},
    {"first": "import the boy", "second": "import the girl", "category": "gender"},
]


@pytest.mark.parametrize("model", ["teacher", "padded", "gemma2"])
def test_log_likelihoods_equal_naive_float64(
    models: dict[str, LanguageModel], tokenizer: PreTrainedTokenizerBase, model: str
):
    made = {
        "teacher": lambda: models["teacher"],
        "padded": lambda: LanguageModel(tiny_llama(5, vocab_size=VOCAB + 32), tokenizer),
        "gemma2": lambda: LanguageModel(tiny_model("gemma2", vocab_size=VOCAB, **POST_PROCESSED["gemma2"]), tokenizer),
    }[model]()
    head = LMHead.of(made.model, vocabulary_size(tokenizer))
    texts = score_texts(made, head, [pair["first"] for pair in PAIRS])
    exact = copy.deepcopy(made.model).double()
    for pair, scored in zip(PAIRS, texts, strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer(pair["first"])["input_ids"]]
        with torch.no_grad():
            log_p = exact(torch.tensor([ids])).logits[0, :-1, :VOCAB].double().log_softmax(-1)
        assert scored.ids == ids[1:]
        naive = log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        torch.testing.assert_close(scored.log_likelihood, naive, atol=2e-5, rtol=1e-5)


def test_scores_are_of_whole_sentences_of_what_follows_the_word_and_of_means(
    models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
):
    teacher = models["teacher"]
    pairs = list(read_pairs(PAIRS))
    together = score_pairs(teacher, pairs)
    monkeypatch.setattr(bias, "BATCH_SIZE", 2)
    scores = score_pairs(teacher, pairs)
    np.testing.assert_allclose(scores, together, atol=1e-4)
    head = LMHead.of(teacher.model, vocabulary_size(teacher.tokenizer))
    for pair, (total, shared, per_token) in zip(pairs, scores, strict=True):
        first, second = score_texts(teacher, head, pair[:2])
        assert total == pytest.approx(float(first.log_likelihood.sum() - second.log_likelihood.sum()), abs=1e-4)
        assert per_token == pytest.approx(float(first.log_likelihood.mean() - second.log_likelihood.mean()), abs=1e-4)
        after = next(n for n in range(1, 99) if first.ids[-n:] != second.ids[-n:]) - 1
        assert after >= 1 or pair.first.endswith(("boy", "girl"))
        tails = [float(scored.log_likelihood.flip(0)[:after].sum()) for scored in (first, second)]
        assert shared == pytest.approx(tails[0] - tails[1], abs=1e-4)


def test_model_compared_with_itself_has_its_own_bias(models: dict[str, LanguageModel]):
    comparison = compare_bias({"teacher": models["teacher"], "student": models["teacher"]}, PAIRS)
    for score in SCORES:
        part = comparison[score]["all"]
        assert part["models"]["student"] == part["models"]["teacher"]
        for figure in part["student_beside_teacher"].values():
            assert figure == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert list(comparison["total"]) == ["all", "gender", "age", "income"]
    assert (
        comparison["total"]["age"]["models"]["teacher"]["mean"]["low"]
        == comparison["total"]["age"]["models"]["teacher"]["mean"]["high"]
    )
    assert "correlation" not in comparison["total"]["age"]["student_beside_teacher"]
    json.dumps(comparison, allow_nan=False)


def test_model_trained_on_sentences_of_one_group_prefers_it(tokenizer: PreTrainedTokenizerBase):
    student, teacher = tiny_llama(7, hidden=16), LanguageModel(tiny_llama(7, hidden=16), tokenizer)
    batch = tokenizer([pair["second"] for pair in PAIRS], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(20):
        student(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    comparison = compare_bias({"teacher": teacher, "student": LanguageModel(student, tokenizer)}, PAIRS)
    assert comparison["total"]["all"]["models"]["student"]["mean"]["high"] < 0
    assert comparison["per_token"]["all"]["models"]["student"]["mean"]["high"] < 0
    before = comparison["total"]["all"]["models"]["teacher"]["mean"]
    assert before["low"] < 0 < before["high"]
    assert comparison["examples"][0]["differences"]["student"] < comparison["examples"][0]["differences"]["teacher"]


def test_bias_is_compared_across_tokenizers(models: dict[str, LanguageModel], texts: Dataset):
    other = train_tokenizer(texts, 290)
    student = LanguageModel(tiny_llama(9, vocab_size=290), other)
    comparison = compare_bias({"teacher": models["teacher"], "student": student})
    assert (comparison["pairs"], comparison["source"]) == (56, "built-in")
    assert set(comparison["total"]["gender"]["student_beside_teacher"]) == {"correlation", "strength", "same_side"}
    table, examples = (part.markdown() for part in bias_tables(comparison))
    assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
    assert "| shared: all | 56 |" in table
    assert len(examples.splitlines()) == 2 + bias.EXAMPLES


def test_student_with_adapters_is_compared_as_it_is(models: dict[str, LanguageModel], task_folder: Path):
    """In all comparisons: with LoRA weights it is another model than without."""
    tokenizer = models["student"].tokenizer
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(tiny_llama(1, hidden=16), lora)
    merged = copy.deepcopy(adapted).merge_and_unload()
    both = {"teacher": LanguageModel(merged, tokenizer), "student": LanguageModel(adapted, tokenizer)}
    total = compare_bias(both, PAIRS)["total"]["all"]
    assert total["student_beside_teacher"]["strength"]["value"] == pytest.approx(1, abs=1e-4)
    plain = compare_bias({"teacher": models["student"]}, PAIRS)["total"]["all"]
    assert total["models"]["student"]["mean"] != pytest.approx(plain["models"]["teacher"]["mean"], abs=1e-2)
    written = compare_generations(both, [{"prompt": "def f("}], max_new_tokens=6)
    assert written["student_beside_teacher"]["exact_match"]["value"] == 1
    scored = run_tasks(both, ["colours"], include_path=task_folder)["tasks"]["colours"]["metrics"]["acc"]["models"]
    assert scored["student"] == scored["teacher"]


def test_built_in_pairs_differ_in_one_word_and_have_seven_of_each_category():
    pairs = list(read_pairs(BUILT_IN))
    assert len(pairs) == 56
    assert set(Counter(pair.category for pair in pairs).values()) == {7}
    assert len({text for pair in pairs for text in pair[:2]}) == 112
    for pair in pairs:
        first, second = pair.first.split(), pair.second.split()
        assert sum(a != b for a, b in zip(first, second, strict=True)) == 1, pair


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
@pytest.mark.parametrize("names", [("first", "second"), ("more", "less"), ("sent_more", "sent_less")])
def test_pairs_are_read_from_csv_and_json(tmp_path: Path, suffix: str, names: tuple[str, str]):
    path = tmp_path / f"pairs{suffix}"
    rows = [{names[0]: "the man, here", names[1]: "the woman, here", "bias_type": "gender"}]
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows if suffix == ".json" else rows[0]))
    assert list(read_pairs(path)) == [Pair("the man, here", "the woman, here", "gender")]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("pairs.csv", "", "there are no pairs"),
        ("pairs.csv", "first,other\na,b\n", "has first, other"),
        ("pairs.csv", "first,second\nsame,same \n", "differ in a word, got 'same' and 'same'"),
        ("pairs.csv", "first,second\na,\n", "got 'a' and ''"),
        ("pairs.csv", "first,second,category\na,b,all\n", "what all pairs together are called"),
        ("pairs.json", "[1]", "has 1"),
        ("pairs.json", "{}", "must hold a list of pairs, and holds a dict"),
        ("pairs.json", "[{", "cannot be read as .json"),
        ("gone.json", None, "there is no file"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(
    models: dict[str, LanguageModel], tmp_path: Path, name: str, content: str | None, match: str
):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        compare_bias(models, tmp_path / name)


def test_sentence_longer_than_the_context_is_refused(models: dict[str, LanguageModel]):
    with pytest.raises(ValueError, match="more than the model's context of 128"):
        compare_bias(models, [{"first": "x = 1 " * 200, "second": "y"}])
