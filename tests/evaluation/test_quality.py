"""Quality of the gap report: intervals, generations, lm-evaluation-harness, bias transfer."""

from __future__ import annotations

import copy
import csv
import json
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from evaluation_worker import write_task
from families import POST_PROCESSED, tiny_model
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill import LiveTeacher
from llm_distill.data.corpus import train_tokenizer
from llm_distill.evaluation import statistics
from llm_distill.evaluation.bias import (
    BUILT_IN,
    SCORES,
    Pair,
    bias_table,
    compare_bias,
    differences,
    head_of,
    log_likelihoods,
    read_pairs,
)
from llm_distill.evaluation.generations import (
    ROUGE,
    _likeness,
    _rouge,
    cases_of,
    compare_generations,
    generations_table,
    same_prefix,
    words,
)
from llm_distill.evaluation.harness import run_tasks, tasks_table
from llm_distill.evaluation.statistics import correlation, interval


@pytest.fixture(scope="module")
def models(saved: Path) -> dict[str, LiveTeacher]:
    return {name: LiveTeacher.load(str(saved / name)) for name in ("teacher", "student")}


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution():
    items = np.random.default_rng(1).normal(3.0, 2.0, size=2_000)
    found = interval(items, np.ones(2_000))
    half = 1.96 * items.std() / np.sqrt(2_000)
    assert found["value"] == pytest.approx(items.mean())
    assert found["low"] == pytest.approx(items.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(items.mean() + half, abs=0.15 * half)


def test_bootstrap_interval_covers_the_true_ratio_of_unequal_items():
    """Nats per token of texts of very unequal length, whose true ratio is 2."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        tokens = random.integers(5, 400, size=80)
        nats = 2.0 * tokens + random.normal(size=80) * tokens**0.5 * 3
        found = interval(nats, tokens, resamples=300)
        covered += found["low"] <= 2.0 <= found["high"]
    assert 0.90 <= covered / 200 <= 0.98


def test_bootstrap_is_deterministic_takes_tensors_and_counts_an_items_weight():
    numerators, denominators = torch.tensor([1.0, 6.0, 2.0]), torch.tensor([1, 3, 0])
    found = interval(numerators, denominators)
    assert found == interval(numerators.numpy(), [1, 3, 0])
    assert found["value"] == 9 / 4
    assert found["low"] <= 9 / 4 <= found["high"]
    many = np.random.default_rng(3).random(50)
    assert interval(many, np.ones(50)) != interval(many, np.ones(50), seed=1)


def test_bootstrap_of_one_item_constant_items_and_none():
    assert interval([6.0], [2.0]) == {"value": 3.0, "low": 3.0, "high": 3.0}
    assert interval([0.1] * 7, [1.0] * 7) == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})
    assert all(np.isnan(value) for value in interval([], []).values())
    assert np.isnan(interval([1.0], [0.0])["value"])
    with pytest.raises(ValueError, match="3 and 2"):
        interval([1, 2, 3], [1, 2])


def test_bootstrap_does_not_depend_on_the_pieces_and_stays_small(monkeypatch: pytest.MonkeyPatch):
    items = np.random.default_rng(2).random(1_000)
    whole = interval(items, np.ones(1_000), resamples=50)
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", 3_000)
    assert interval(items, np.ones(1_000), resamples=50) == whole
    monkeypatch.undo()
    many = np.ones(100_000)
    tracemalloc.start()
    interval(many, many, resamples=60)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_bootstrap_of_a_correlation_is_fishers():
    random = np.random.default_rng(0)
    x = random.normal(size=400)
    y = 0.6 * x + 0.8 * random.normal(size=400)
    found, r = correlation(x, y), np.corrcoef(x, y)[0, 1]
    assert found["value"] == pytest.approx(r)
    for side, sign in (("low", -1), ("high", 1)):
        assert found[side] == pytest.approx(np.tanh(np.arctanh(r) + sign * 1.96 / np.sqrt(397)), abs=0.02)
    assert correlation(x, -3 * x + 1) == pytest.approx({"value": -1.0, "low": -1.0, "high": -1.0})
    assert np.isnan(correlation(x, np.full(400, 0.1))["value"])
    assert np.isnan(correlation([1.0, 2.0], [1.0, 3.0])["value"])


# Generations


def test_model_compared_with_itself_answers_like_itself(models: dict[str, LiveTeacher], texts: Dataset):
    rows = [{"prompt": text[:20], "completion": text[20:60]} for text in texts["text"][:9]]
    found = compare_generations({"teacher": models["teacher"], "student": models["teacher"]}, rows, max_new_tokens=12)
    assert found["prompts"] == found["references"] == 9
    assert found["models"]["student"] == found["models"]["teacher"]
    for figure in found["student_beside_teacher"].values():
        assert figure == {"value": 1.0, "low": 1.0, "high": 1.0}
    json.dumps(found, allow_nan=False)


def test_answers_are_those_of_generate_and_figures_are_their_means(models: dict[str, LiveTeacher], texts: Dataset):
    rows = [{"prompt": text[: 10 + n], "completion": text[10 + n : 60]} for n, text in enumerate(texts["text"][:7])]
    found = compare_generations(models, rows, max_new_tokens=10, batch_size=3, examples=7)
    assert len(found["examples"]) == 7
    for name, model in models.items():
        lengths, prefixes = [], []
        for each in found["examples"]:
            inputs = model.tokenizer(each["prompt"], return_tensors="pt")
            written = model.model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=[0, 2])
            ids = written[0, inputs["input_ids"].shape[1] :]
            assert model.tokenizer.decode(ids, skip_special_tokens=True).startswith(each["answers"][name])
            lengths.append(len(words(each["answers"][name])))
            prefixes.append(same_prefix(each["answers"]["teacher"], each["answers"][name]))
        assert found["models"][name]["words"]["value"] == pytest.approx(np.mean(lengths))
        if name != "teacher":
            assert found[f"{name}_beside_teacher"]["same_prefix"]["value"] == pytest.approx(np.mean(prefixes))
            assert found[f"{name}_beside_teacher"]["same_prefix"]["value"] < 1
    likeness = [same_prefix(each["answers"]["teacher"], each["answers"]["student"]) for each in found["examples"]]
    assert likeness[0] <= likeness[-1]


def test_rouge_is_that_of_the_paper_by_hand():
    """Lin (2004): "police killed the gunman" beside "police kill the gunman": 3 of 4 words, 1 of 3 pairs, LCS 3."""
    found = _likeness("police killed the gunman", "Police  kill the gunman!", ROUGE)
    assert found == pytest.approx({"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 3 / 4, "exact_match": 0.0})
    precision, recall = 2 / 3, 2 / 4
    found = _likeness("a b c d", "a d b", ROUGE)
    assert found["rougeL"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["rouge2"] == 0
    assert _likeness("x  = 1\n", " x = 1", ROUGE) == {"rouge1": 1, "rouge2": 1, "rougeL": 1, "exact_match": 1}
    assert _likeness("größe", "GRÖSSE größe", ROUGE)["rouge1"] == pytest.approx(2 / 3)
    assert words("東京 is_big, 2nd") == ["東", "京", "is", "big", "2nd"]


@pytest.mark.parametrize(
    ("one", "other", "share"), [("abcd", "abxy", 0.5), ("", "a", 0), ("", "", 1), ("ab", "abcd", 0.5)]
)
def test_same_prefix_is_a_share_of_the_longer_text(one: str, other: str, share: float):
    assert same_prefix(one, other) == share


def test_references_come_from_completion_conversation_column_or_the_rest_of_the_text(
    tokenizer: PreTrainedTokenizerBase, texts: Dataset
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
        assert [case.reference for case in cases_of([row], tokenizer)] == [reference]
    (case,) = cases_of([{"question": "q", "answer": "42"}], tokenizer, reference_column="answer")
    assert case.reference == "42"
    text = max(texts["text"], key=len)
    (case,) = cases_of([{"text": text}], tokenizer, prompt_tokens=8, max_new_tokens=5)
    ids = tokenizer(text)["input_ids"]
    assert (case.prompt.content, case.reference) == (tokenizer.decode(ids[:8]), tokenizer.decode(ids[8:13]))
    (case,) = cases_of([{"text": text}], tokenizer)
    assert case.prompt.content == tokenizer.decode(ids[:32])


def test_conversations_are_asked_through_the_chat_template_of_each_model(saved: Path):
    models = {name: LiveTeacher.load(str(saved / name)) for name in ("teacher", "student")}
    models["teacher"].tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
    models["student"].tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "(x): pass"}]}]
    (shown,) = compare_generations(models, rows, max_new_tokens=6)["examples"]
    assert (shown["prompt"], shown["reference"]) == ("user: def f", "(x): pass")
    for name, asked in (("teacher", "<user>def f<a>"), ("student", "def f")):
        (alone,) = compare_generations({name: models[name]}, [{"prompt": asked}], max_new_tokens=6)["examples"]
        assert shown["answers"][name] == alone["answers"][name]


def test_student_with_adapters_is_compared_as_it_is(models: dict[str, LiveTeacher], task_folder: Path):
    """On all three: with LoRA weights it is another model than without."""
    tokenizer = models["student"].tokenizer
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(tiny_llama(1, hidden=16), lora)
    merged = copy.deepcopy(adapted).merge_and_unload()
    both = {"teacher": LiveTeacher(merged, tokenizer), "student": LiveTeacher(adapted, tokenizer)}
    found = compare_bias(both, PAIRS)["total"]["all"]
    assert found["student_beside_teacher"]["strength"]["value"] == pytest.approx(1, abs=1e-4)
    plain = compare_bias({"teacher": models["student"]}, PAIRS)["total"]["all"]
    assert found["models"]["student"]["mean"] != pytest.approx(plain["models"]["teacher"]["mean"], abs=1e-2)
    written = compare_generations(both, [{"prompt": "def f("}], max_new_tokens=6)
    assert written["student_beside_teacher"]["exact_match"]["value"] == 1
    scored = run_tasks(both, "colours", include_path=task_folder)["tasks"]["colours"]["metrics"]["acc"]["models"]
    assert scored["student"] == scored["teacher"]


def test_prompts_that_one_model_cannot_read_are_left_out_for_all(models: dict[str, LiveTeacher], texts: Dataset):
    long = "\n".join(texts["text"][:20])
    found = compare_generations(models, [{"prompt": "import os"}, {"prompt": long}], max_new_tokens=4)
    assert (found["prompts"], found["left_out"], found["references"]) == (1, 1, 0)
    assert "rouge1" not in found["models"]["teacher"]
    assert "1 prompts were left out" in generations_table(found)
    with pytest.raises(ValueError, match="every prompt is longer"):
        compare_generations(models, [{"prompt": long}], max_new_tokens=4)


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        ([], {}, "dataset is empty"),
        ([{"text": "x"}], {}, "shorter than prompt_tokens=32"),
        ([{"input_ids": [1, 2]}], {}, "no column"),
        ([{"prompt": "a"}], {"reference_column": "gold"}, "no column 'gold' with references, only prompt"),
        ([{"prompt": "a"}], {"as_chat": True}, "tokenizer of the teacher and the student has no chat template"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(
    models: dict[str, LiveTeacher], rows: list[dict[str, Any]], options: dict[str, Any], match: str
):
    with pytest.raises(ValueError, match=match):
        compare_generations(models, rows, **options)


def test_table_of_generations_names_every_figure_and_keeps_its_columns(models: dict[str, LiveTeacher]):
    rows = [{"prompt": "def f(a | b):\n    return", "completion": "x"}, {"prompt": "import", "completion": "os"}]
    table = generations_table(compare_generations(models, rows, max_new_tokens=4))
    for name in ("ROUGE-L", "exact match", "finished", "repetition", "beside the teacher's: same prefix"):
        assert f"| {name} |" in table
    figures, examples = table.split("\n\n")
    assert {line.count("|") for line in figures.splitlines()} == {4}
    assert {line.replace("\\|", "").count("|") for line in examples.splitlines()} == {5}


def test_generations_without_rouge_score_say_how_to_install_it(
    models: dict[str, LiveTeacher], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    _rouge.cache_clear()
    with pytest.raises(ValueError, match="takes rouge_score: pip install"):
        compare_generations(models, [{"prompt": "a"}])


# lm-evaluation-harness


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    return write_task(tmp_path)


def test_local_task_of_the_harness_gives_what_the_logits_say(models: dict[str, LiveTeacher], task_folder: Path):
    before = models["student"].tokenizer.pad_token
    found = run_tasks(models, "colours", include_path=task_folder, limit=10, batch_size=4)
    assert found["skipped"] == {}
    assert found["tasks"]["colours"]["n"] == 10
    figures = found["tasks"]["colours"]["metrics"]["acc"]
    assert figures["higher_is_better"] is True
    for name, model in models.items():
        right = []
        for n in range(10):
            scores = []
            for choice in (" a", " for", " import"):
                prompt, text = (model.tokenizer(each, return_tensors="pt")["input_ids"] for each in (f"{n} +", choice))
                with torch.no_grad():
                    log_p = model.model(torch.cat([prompt, text], 1)).logits[0].double().log_softmax(-1)
                at = torch.arange(prompt.shape[1] - 1, prompt.shape[1] + text.shape[1] - 1)
                scores.append(float(log_p[at, text[0]].sum()))
            right.append(int(np.argmax(scores)) == n % 3)
        assert figures["models"][name]["value"] == pytest.approx(np.mean(right))
        assert figures["models"][name]["stderr"] == pytest.approx(np.std(right, ddof=1) / 10**0.5)
    assert models["student"].tokenizer.pad_token == before
    assert "| colours | 10 | acc ↑ |" in tasks_table(found)
    json.dumps(found, allow_nan=False)


def test_task_that_cannot_run_is_skipped_and_the_others_have_figures(
    models: dict[str, LiveTeacher], task_folder: Path, tmp_path: Path
):
    text = (task_folder / "colours.yaml").read_text()
    (task_folder / "gone.yaml").write_text(text.replace("colours", "gone").replace("rows.jsonl", "gone.jsonl"))
    (task_folder / "code.yaml").write_text(text.replace("colours", "code") + "unsafe_code: true\n")
    found = run_tasks(models, ["gone", "colours", "code"], include_path=task_folder, limit=2)
    assert list(found["tasks"]) == ["colours"]
    assert "its data could not be had" in found["skipped"]["gone"]
    assert "confirm_run_unsafe_code" in found["skipped"]["code"]
    assert str(tmp_path) not in json.dumps(found)
    assert "Skipped: gone (its data" in tasks_table(found)


def test_harness_that_is_not_installed_is_skipped_with_the_command(
    models: dict[str, LiveTeacher], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = run_tasks(models, "arc_easy, hellaswag")
    assert found["tasks"] == {}
    assert set(found["skipped"]) == {"arc_easy", "hellaswag"}
    assert tasks_table(found).startswith("Skipped: arc_easy, hellaswag (lm_eval is not installed: pip install")


def test_harness_refuses_tasks_that_are_not_there(models: dict[str, LiveTeacher], task_folder: Path):
    with pytest.raises(ValueError, match=r"no task 'coulours'.*Did you mean colours"):
        run_tasks(models, "coulours", include_path=task_folder)
    with pytest.raises(ValueError, match="no tasks"):
        run_tasks(models, " ,")
    with pytest.raises(ValueError, match="is no folder"):
        run_tasks(models, "colours", include_path="nowhere")
    with pytest.raises(ValueError, match="tokenizer of the teacher and the student has no chat template"):
        run_tasks(models, "colours", include_path=task_folder, apply_chat_template=True)


# Bias transfer


PAIRS = [
    {"first": "for the man in range", "second": "for the woman in range", "category": "gender"},
    {"first": "return young values", "second": "return old values", "category": "age"},
    {"first": "class Rich(object)", "second": "class Poor(object)", "category": "income"},
    {"first": "he is here", "second": "she is here", "category": "gender"},
    {"first": "import the boy", "second": "import the girl", "category": "gender"},
]


@pytest.mark.parametrize("model", ["teacher", "padded", "gemma2"])
def test_log_likelihoods_equal_naive_float64(
    models: dict[str, LiveTeacher], tokenizer: PreTrainedTokenizerBase, model: str
):
    made = {
        "teacher": lambda: models["teacher"],
        "padded": lambda: LiveTeacher(tiny_llama(5, vocab_size=VOCAB + 32), tokenizer),
        "gemma2": lambda: LiveTeacher(tiny_model("gemma2", vocab_size=VOCAB, **POST_PROCESSED["gemma2"]), tokenizer),
    }[model]()
    found = log_likelihoods(made, head_of("model", made), [pair["first"] for pair in PAIRS])
    exact = copy.deepcopy(made.model).double()
    for pair, scored in zip(PAIRS, found, strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer(pair["first"])["input_ids"]]
        with torch.no_grad():
            log_p = exact(torch.tensor([ids])).logits[0, :-1, :VOCAB].double().log_softmax(-1)
        assert scored.ids == ids[1:]
        naive = log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        torch.testing.assert_close(scored.log_likelihood, naive, atol=2e-5, rtol=1e-5)


def test_differences_are_of_whole_sentences_of_what_follows_the_word_and_of_means(models: dict[str, LiveTeacher]):
    teacher = models["teacher"]
    pairs = list(read_pairs(PAIRS))
    found = differences(teacher, pairs, batch_size=2)
    np.testing.assert_allclose(found, differences(teacher, pairs, batch_size=32), atol=1e-4)
    for pair, (total, shared, per_token) in zip(pairs, found, strict=True):
        first, second = log_likelihoods(teacher, head_of("teacher", teacher), pair[:2])
        assert total == pytest.approx(float(first.log_likelihood.sum() - second.log_likelihood.sum()), abs=1e-4)
        assert per_token == pytest.approx(float(first.log_likelihood.mean() - second.log_likelihood.mean()), abs=1e-4)
        after = next(n for n in range(1, 99) if first.ids[-n:] != second.ids[-n:]) - 1
        assert after >= 1 or pair.first.endswith(("boy", "girl"))
        tails = [float(each.log_likelihood.flip(0)[:after].sum()) for each in (first, second)]
        assert shared == pytest.approx(tails[0] - tails[1], abs=1e-4)


def test_model_compared_with_itself_has_its_own_bias(models: dict[str, LiveTeacher]):
    found = compare_bias({"teacher": models["teacher"], "student": models["teacher"]}, PAIRS)
    for score in SCORES:
        part = found[score]["all"]
        assert part["models"]["student"] == part["models"]["teacher"]
        for figure in part["student_beside_teacher"].values():
            assert figure == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert list(found["total"]) == ["all", "gender", "age", "income"]
    assert (
        found["total"]["age"]["models"]["teacher"]["mean"]["low"]
        == found["total"]["age"]["models"]["teacher"]["mean"]["high"]
    )
    assert "correlation" not in found["total"]["age"]["student_beside_teacher"]
    json.dumps(found, allow_nan=False)


def test_model_trained_on_sentences_of_one_group_prefers_it(tokenizer: PreTrainedTokenizerBase):
    student, teacher = tiny_llama(7, hidden=16), LiveTeacher(tiny_llama(7, hidden=16), tokenizer)
    batch = tokenizer([pair["second"] for pair in PAIRS], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(20):
        student(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = compare_bias({"teacher": teacher, "student": LiveTeacher(student, tokenizer)}, PAIRS)
    assert found["total"]["all"]["models"]["student"]["mean"]["high"] < 0
    assert found["per_token"]["all"]["models"]["student"]["mean"]["high"] < 0
    before = found["total"]["all"]["models"]["teacher"]["mean"]
    assert before["low"] < 0 < before["high"]
    assert found["examples"][0]["differences"]["student"] < found["examples"][0]["differences"]["teacher"]


def test_bias_is_compared_across_tokenizers(models: dict[str, LiveTeacher], texts: Dataset):
    other = train_tokenizer(texts, 290)
    student = LiveTeacher(tiny_llama(9, vocab_size=290), other)
    found = compare_bias({"teacher": models["teacher"], "student": student}, batch_size=7)
    assert (found["pairs"], found["source"]) == (56, "built-in")
    assert set(found["total"]["gender"]["student_beside_teacher"]) == {"correlation", "strength", "same_side"}
    table = bias_table(found)
    assert len({line.replace("\\|", "").count("|") for line in table.split("\n\n")[0].splitlines()}) == 1
    assert "| shared: all | 56 |" in table


def test_built_in_pairs_differ_in_one_word_and_have_seven_of_each_category():
    pairs = list(read_pairs(BUILT_IN))
    assert len(pairs) == 56
    assert set(Counter(pair.category for pair in pairs).values()) == {7}
    assert len({text for pair in pairs for text in pair[:2]}) == 112
    for pair in pairs:
        first, second = pair.first.split(), pair.second.split()
        assert sum(one != other for one, other in zip(first, second, strict=True)) == 1, pair


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
    models: dict[str, LiveTeacher], tmp_path: Path, name: str, content: str | None, match: str
):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        compare_bias(models, tmp_path / name)


def test_sentence_longer_than_the_context_is_refused(models: dict[str, LiveTeacher]):
    with pytest.raises(ValueError, match="more than the model's context of 128"):
        compare_bias(models, [{"first": "x = 1 " * 200, "second": "y"}])
