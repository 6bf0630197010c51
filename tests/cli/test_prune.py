"""`llm-distill prune`: a student that training begins from, and what cannot be pruned in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import as_flags, refused, write_rows
from peft import LoraConfig, get_peft_model
from runs import save
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from llm_distill.cli import prune as prune_module
from llm_distill.cli.prune import prune
from llm_distill.cli.train import train
from llm_distill.students.smaller import kept_layers
from llm_distill.students.speed import Latency


@pytest.fixture
def options(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """To keep two of a tiny teacher's four layers."""
    teacher = tiny_llama(1, num_hidden_layers=4)
    teacher.generation_config = GenerationConfig(max_new_tokens=7)
    return {
        "model": str(save(teacher, tmp_path / "teacher", tokenizer)),
        "layers": "2",
        "output_dir": str(tmp_path / "cut"),
        "calibration": write_rows(tmp_path / "texts.jsonl", "text"),
        "calibration_length": "16",
    }


@pytest.mark.parametrize("method", ["influence", "greedy", "even"])
def test_a_student_is_made_and_taught(tmp_path: Path, options: dict[str, str], method: str) -> None:
    prune(as_flags(options | {"method": method}))
    kept = kept_layers(tmp_path / "cut")
    assert len(kept) == 2
    teacher, student = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("teacher", "cut"))
    for ours, number in zip(student.model.layers, kept, strict=True):
        theirs = teacher.model.layers[number - 1].state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.state_dict().items())
    assert student.generation_config.max_new_tokens == 7
    record = json.loads((tmp_path / "cut" / "pruning.json").read_text())
    assert record["method"] == method
    assert record["model"]["architecture"] == "LlamaForCausalLM"
    assert str(tmp_path) not in json.dumps(record["model"])
    if method == "even":
        run = {
            "model_name_or_path": tmp_path / "cut",
            "teacher_model_name_or_path": tmp_path / "teacher",
            "dataset_name": options["calibration"],
            "output_dir": tmp_path / "taught",
            "max_steps": 1,
            "max_length": 16,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
        }
        train(as_flags(run))
        assert (tmp_path / "taught" / "model.safetensors").is_file()


def test_named_layers_are_kept(tmp_path: Path, options: dict[str, str]) -> None:
    del options["layers"]
    prune([*as_flags(options), "--layers", "1", "3", "4"])
    assert kept_layers(tmp_path / "cut") == [1, 3, 4]


def test_widths_are_pruned_beside_layers(tmp_path: Path, options: dict[str, str]) -> None:
    sizes = {"intermediate_size": 40, "hidden_size": 24, "num_attention_heads": 2}
    prune(as_flags(options | sizes))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert [getattr(student.config, name) for name in sizes] == list(sizes.values())
    record = json.loads((tmp_path / "cut" / "pruning.json").read_text())
    assert record["widths"] == sizes
    assert len(record["activity"]["intermediate_size"]) == len(record["layers"]) == 2


@pytest.mark.parametrize("goal", [{"target": "0.7x"}, {"params": "40K"}, {"bytes": "160KB"}])
def test_a_shape_is_chosen_for_a_size(
    tmp_path: Path, options: dict[str, str], goal: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    del options["layers"]
    prune(as_flags(options | goal))
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in ("fewer layers", "narrower", "both"))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert student.num_parameters() <= 0.7 * AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").num_parameters()
    record = json.loads((tmp_path / "cut" / "pruning.json").read_text())
    assert round(record["loss"]["student"], 3) == min(float(row[-1]) for row in table_of(shown)[1:])


def table_of(shown: str) -> list[list[str]]:
    """The rows of the last table, without its header."""
    rows = [line for line in shown.split("\n\n")[-2].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_a_search_teaches_shapes_of_equal_size_keeps_the_best_and_goes_on_after_a_kill(
    tmp_path: Path, options: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del options["layers"]
    search = options | {"target": "0.7x", "search": "4", "search_steps": "2", "calibration_length": "8"}
    tried = prune_module._try

    def killed(shape: Any, *rest: Any) -> Any:
        if shape.name == "shape 4":
            raise KeyboardInterrupt
        return tried(shape, *rest)

    monkeypatch.setattr(prune_module, "_try", killed)
    with pytest.raises(SystemExit):
        prune(as_flags(search))
    log = json.loads((tmp_path / "cut" / "search.json").read_text())
    assert [row["name"] for row in log["rows"]] == ["fewer layers", "narrower", "both"]
    monkeypatch.undo()
    assert "search_steps: search.json has 2, asked for is 3" in refused(
        capsys, prune, as_flags(search | {"search_steps": "3"})
    )
    prune(as_flags(search))
    model, *rows = table_of(capsys.readouterr().out)
    log = json.loads((tmp_path / "cut" / "search.json").read_text())
    assert [row["name"] for row in log["rows"]] == ["fewer layers", "narrower", "both", "shape 4"]
    assert [row[-1] for row in rows] == [f"{row['taught']:.3f}" for row in log["rows"]]
    assert log["rows"][0]["taught"] < log["rows"][0]["loss"]
    whole, *sizes = (float(row[5].removesuffix(" M")) for row in (model, *rows))
    assert all(size <= 0.71 * whole for size in sizes)
    assert all(size >= 0.6 * whole for size in sizes[3:])
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[7:10])
    best = min(log["rows"], key=lambda row: row["taught"])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    shape = [getattr(student.config, name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    assert shape == [best[name] for name in ("layers", "hidden_size", "intermediate_size")]
    record = json.loads((tmp_path / "cut" / "pruning.json").read_text())
    assert record["loss"]["student"] == best["loss"]  # what is kept has not been taught


def test_a_shape_is_chosen_for_a_latency_that_is_measured(
    tmp_path: Path, options: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del options["layers"]
    monkeypatch.setattr(Latency, "__call__", lambda self, model, layers, sizes: 3.0 * layers + len(sizes))
    prune(as_flags(options | {"latency": "7ms"}))
    assert len(kept_layers(tmp_path / "cut")) == 2
    assert "a target of 1 ms a token is below the floor" in refused(
        capsys, prune, as_flags(options | {"latency": "1ms", "output_dir": str(tmp_path / "other")})
    )


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"layers": "5"}, ["5 layers", "has 4"]),
        ({"layers": "1 2 2"}, ["layer 2", "twice"]),
        ({"layers": "1 9"}, ["no layer 9", "1 to 4"]),
        ({"layers": "0"}, ["0 layers cannot be kept"]),
        ({"layers": "4"}, ["keeps all layers of the model"]),
        ({"layers": None, "intermediate_size": "64"}, ["intermediate_size=64 is no smaller", "64"]),
        ({"layers": None, "num_attention_heads": "3"}, ["num_attention_heads=3", "multiple of 2"]),
        ({"layers": None, "num_experts": "2"}, ["LlamaForCausalLM", "num_experts"]),
        ({"layers": None, "target": "half"}, ["target", "0.5x", "'half'"]),
        ({"layers": None, "target": "1.5x"}, ["no smaller"]),
        ({"layers": None, "params": "10K"}, ["below the floor", "embeddings alone", "0.01 M"]),
        ({"layers": None, "params": "10K", "bytes": "1MB"}, ["without effect", "bytes"]),
        ({"layers": None, "latency": "fast"}, ["latency", "20ms", "'fast'"]),
        ({"search": "5"}, ["without effect", "search", "--target"]),
        ({"layers": None, "target": "0.7x", "search_steps": "3"}, ["search_steps"]),
        ({"layers": None, "target": "0.7x", "search": "3", "calibration_length": "512"}, ["compares on others"]),
        ({"layers": "2", "target": "0.5x"}, ["without effect", "layers", "target"]),
        ({"layers": None, "hidden_size": "24", "method": "even"}, ["without effect", "no layer goes"]),
        ({"layers": "1 2", "method": "even"}, ["without effect", "method"]),
        ({"layers": None}, ["--layers is missing"]),
        ({"model": None}, ["--model is missing"]),
        ({"model": "nowhere"}, ["'nowhere'", "cannot be loaded"]),
        ({"output_dir": None}, ["--output_dir is missing"]),
        ({"method": "best"}, ["method", "influence"]),
        ({"layres": "2"}, ["unknown option", "'layers'"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path,
    options: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, str | None],
    parts: list[str],
) -> None:
    given = {name: value for name, value in (options | changed).items() if value is not None}
    layers = ["--layers", *given.pop("layers").split()] if "layers" in given else []
    line = refused(capsys, prune, [*as_flags(given), *layers])
    assert all(part in line for part in parts), line
    assert not (tmp_path / "cut").exists()


def test_adapters_packed_weights_and_folders_in_use_are_refused(
    tmp_path: Path, options: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = get_peft_model(
        AutoModelForCausalLM.from_pretrained(options["model"]), LoraConfig(target_modules=["q_proj"])
    )
    adapters.save_pretrained(tmp_path / "adapters")
    assert "merge them" in refused(capsys, prune, as_flags(options | {"model": str(tmp_path / "adapters")}))
    assert "is also the model" in refused(capsys, prune, as_flags(options | {"output_dir": options["model"]}))
    config = tmp_path / "teacher" / "config.json"
    packed = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps(json.loads(config.read_text()) | packed))
    assert "quantised" in refused(capsys, prune, as_flags(options))


@pytest.mark.parametrize("rows", ['{"text": ""}', ""])
def test_texts_with_nothing_in_them_are_refused(
    tmp_path: Path, options: dict[str, str], capsys: pytest.CaptureFixture[str], rows: str
) -> None:
    (tmp_path / "texts.jsonl").write_text(rows)
    line = refused(capsys, prune, as_flags(options))
    assert "text" in line
    assert not (tmp_path / "cut").exists()
