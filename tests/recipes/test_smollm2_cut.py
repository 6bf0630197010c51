"""The whole road of `recipes/smollm2-135m-cut`, each command with its YAML, on a tiny model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import smollm2
import smollm2_texts
from datasets import Dataset
from kinds_of_data import CHAT_TEMPLATE
from runs import save
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from llm_distill.cli.capture import capture
from llm_distill.cli.evaluate import evaluate
from llm_distill.cli.generate import generate
from llm_distill.cli.prune import prune
from llm_distill.cli.train import train

ROAD = Path(__file__).parents[2] / "recipes" / "smollm2-135m-cut"
CUT = Path("runs", "smollm2-cut")


def options(name: str, **smaller: object) -> list[str]:
    """The YAML of a command, with smaller sizes beside it."""
    flags = [word for option, value in smaller.items() for word in (f"--{option}", str(value))]
    return ["--config", str(ROAD / f"{name}.yaml"), *flags]


@pytest.mark.slow
def test_from_the_model_to_its_student(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    for name, value in {"MOST_CODE": 4, "HELD_OUT": 3}.items():
        monkeypatch.setattr(smollm2_texts, name, value)
    save(tiny_llama(2, num_hidden_layers=30, max_position_embeddings=1024), Path("runs", "smollm2"), tokenizer)
    asked = [{"prompt": [{"role": "user", "content": question}]} for question in smollm2.questions()]
    Dataset.from_list(asked).to_json("runs/questions/train.jsonl")

    generate(options("generate", max_new_tokens=4, max_prompts=60, filters="{}"))
    smollm2_texts.main()
    texts = {path.stem: path.read_text().splitlines() for path in (CUT / "texts").glob("*.jsonl")}
    assert sorted(texts) == ["answers", "code", "documentation", "test", "train"]
    assert not {*texts["train"]} & {*texts["test"]}
    prune(options("prune", calibration_texts=4))
    capture(options("cached", dataset_test_split="test[:4]", dataset_train_split="train[:16]", max_length=64))
    train(
        options("cached", dataset_test_split="test[:4]", dataset_train_split="train[:16]", max_length=64, max_steps=2)
    )
    train(options("on_policy", max_completion_length=4, max_steps=2))
    evaluate(options("evaluate", max_length=32, generations=2, max_new_tokens=4, resources="false", bias="none"))
    report = json.loads((CUT / "24" / "report" / "report.json").read_text())
    assert set(report["domains"]) == {"answers", "documentation", "code"}
    student = AutoModelForCausalLM.from_pretrained(CUT / "24" / "student")
    assert student.config.num_hidden_layers == 24
