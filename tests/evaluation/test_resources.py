"""What models take, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_distill.evaluation import resources
from llm_distill.evaluation.inference import load_model, measure_model
from llm_distill.evaluation.resources import TIMED, measure_resources, resources_parts
from llm_distill.machine import free_memory

MIB = 2**20
TOO_MANY = 100_000_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher of 88 MiB, a student of half the width, adapters for it, and a model with broken weights."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("teacher", "student", "adapters", "broken")}
    for name, hidden in (("teacher", 1024), ("student", 512)):
        tiny_llama(0, hidden, vocab_size=1024, num_key_value_heads=4).save_pretrained(folders[name])
    student = AutoModelForCausalLM.from_pretrained(folders["student"])
    get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(folders["adapters"])
    tiny_llama(0).save_pretrained(folders["broken"])
    weights = folders["broken"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return folders


@pytest.fixture(scope="module", params=[pytest.param("processes", marks=pytest.mark.slow)])
def measured(folders: dict[str, Path]) -> dict[str, Any]:
    models = {name: str(folders[name]) for name in ("teacher", "student", "broken")}
    models["missing"] = str(folders["teacher"] / "no" / "x")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PROMPT_TOKENS": 16, "NEW_TOKENS": 4, "REPEATS": 2, "ENERGY_SECONDS": 0}.items():
            patch.setattr(resources, name, value)
        return measure_resources(models, variants=(4,), batch_sizes=(2, 1, TOO_MANY))


def figures(measured: dict[str, Any], name: str) -> dict[str, Any]:
    return measured["models"][name]["figures"]


def weights_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_parameters_and_bytes_are_those_of_the_files(
    measured: dict[str, Any], folders: dict[str, Path], name: str
) -> None:
    parameters = sum(weight.numel() for weight in weights_of(folders[name]).parameters())
    assert figures(measured, name)["parameters"] == figures(measured, name)["active_parameters"] == parameters
    assert figures(measured, name)["bytes_on_disk"] == (folders[name] / "model.safetensors").stat().st_size
    assert figures(measured, name)["weight_bytes"] == 4 * parameters


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_peak_memory_is_the_weights_and_little_more(measured: dict[str, Any], name: str) -> None:
    """The prompts are short: what is above the weights is a few activations, and up to 16 MiB of the libraries'."""
    for peak in figures(measured, name)["peak_memory_bytes"].values():
        assert figures(measured, name)["weight_bytes"] <= peak <= figures(measured, name)["weight_bytes"] + 16 * MIB


def test_twice_the_width_takes_more_memory(measured: dict[str, Any]) -> None:
    for size in ("1", "2"):
        student, teacher = (figures(measured, name)["peak_memory_bytes"][size] for name in ("student", "teacher"))
        assert student < teacher / 2


def test_times_are_there_for_every_batch_that_fits(measured: dict[str, Any]) -> None:
    for name in ("teacher", "student", "student, 4-bit"):
        for figure in TIMED:
            assert list(figures(measured, name)[figure]) == ["1", "2"]
            for value in figures(measured, name)[figure].values():
                assert 0 < value["low"] <= value["median"] <= value["high"]


def test_a_batch_that_does_not_fit_is_named_with_what_it_would_take(measured: dict[str, Any]) -> None:
    for name in ("teacher", "student", "student, 4-bit"):
        reason = measured["models"][name]["skipped"][f"batch {TOO_MANY}"]
        assert reason.startswith("does not fit into memory: it would take ")
    assert free_memory("cpu") < 4 * 1024 * TOO_MANY, "or the batch would be too small for this test"


def test_the_4_bit_variant_has_smaller_weights_and_says_what_saving_would_write(
    measured: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    packed, student = measured["models"]["student, 4-bit"], figures(measured, "student")
    assert packed["bits"] == 4
    assert packed["figures"]["parameters"] == student["parameters"]
    assert packed["figures"]["weight_bytes"] < student["weight_bytes"] / 2
    name = str(folders["student"])
    task = {"folders": [name], "revision": None, "trust_remote_code": False, "dtype": "auto", "device": "cpu"}
    load_model(name, {**task, "bits": 4}).save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert packed["figures"]["bytes_on_disk"] == pytest.approx(written, rel=0.01)


def test_ratios_are_to_the_teacher(measured: dict[str, Any]) -> None:
    student, teacher = figures(measured, "student"), figures(measured, "teacher")
    ratios = measured["models"]["student"]["ratio_to_teacher"]
    assert set(ratios) == set(student)
    assert ratios["parameters"] == student["parameters"] / teacher["parameters"]
    name = "decode_tokens_per_second"
    assert ratios[name]["2"] == student[name]["2"]["median"] / teacher[name]["2"]["median"]
    assert measured["models"]["teacher"]["ratio_to_teacher"]["peak_memory_bytes"] == {"1": 1, "2": 1}


def test_a_model_that_does_not_load_is_a_reason_and_the_others_are_measured(measured: dict[str, Any]) -> None:
    assert "safetensor" in measured["models"]["broken"]["error"].lower()
    assert "'x' cannot be loaded" in measured["models"]["missing"]["error"]
    assert "figures" in measured["models"]["student"]


def test_what_is_found_is_json_without_local_paths(measured: dict[str, Any], folders: dict[str, Path]) -> None:
    text = json.dumps(measured)
    assert json.loads(text) == measured
    assert str(folders["teacher"].parent) not in text
    assert measured["models"]["teacher"]["model"] == "teacher"


def test_the_table_shows_every_figure_and_what_is_missing(measured: dict[str, Any]) -> None:
    table, *notes = resources_parts(measured)
    lines = table.markdown()
    assert lines.startswith("| | teacher | student | student, 4-bit |\n|---|---:|---:|---:|\n")
    parameters = figures(measured, "student")["parameters"] / 1e6
    assert f" | {parameters:,.2f} (0.27 ×) | " in lines
    for name in ("broken", "missing", f"student, batch {TOO_MANY}"):
        assert any(note.startswith(f"Not measured: {name}: ") for note in notes)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each process would be told, in order. None starts."""
    told: list[dict[str, Any]] = []

    def note(program: list[str], task: dict[str, Any]) -> dict[str, Any]:
        told.append(task)
        return {"architecture": "Llama", "dtype": "float32", "figures": {"weight_bytes": 1}, "skipped": {}}

    monkeypatch.setattr(resources, "run_in_fresh_process", note)
    return told


def test_adapters_count_with_the_model_they_are_for(folders: dict[str, Path], told: list[dict[str, Any]]) -> None:
    measure_resources({"student": str(folders["adapters"])}, variants=())
    small = {"batch_sizes": [1], "prompt_tokens": 16, "new_tokens": 4, "repeats": 2, "seconds": 60, "energy_seconds": 0}
    measured = measure_model(told[0] | small)["figures"]
    files = folders["adapters"] / "adapter_model.safetensors", folders["student"] / "model.safetensors"
    assert measured["bytes_on_disk"] == sum(path.stat().st_size for path in files)
    layers, rank, width = 2, 4, 512
    q_proj_and_v_proj = 2 * rank * (width + width)
    assert measured["parameters"] == weights_of(folders["student"]).num_parameters() + layers * q_proj_and_v_proj
    assert measured["weight_bytes"] == 4 * measured["parameters"]


def test_each_model_is_measured_as_it_was_asked_for(folders: dict[str, Path], told: list[dict[str, Any]]) -> None:
    models = {name: str(folders[name]) for name in ("teacher", "student")}
    measured = measure_resources(models, variants=(8,), revisions={"student": "v1"}, teacher_bits=4, dtype="float32")
    names = [(Path(task["name"]).name, task["bits"], task["revision"], task["dtype"]) for task in told]
    student = [("student", None, "v1", "float32"), ("student", 8, "v1", "float32")]
    assert names == [("teacher", 4, None, "float32"), *student]
    assert [measured["models"][name]["bits"] for name in ("teacher", "student", "student, 8-bit")] == [4, None, 8]


def test_prompts_are_cut_to_the_shortest_context(
    folders: dict[str, Path], told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: str(folders[name]) for name in ("teacher", "student")}
    measured = measure_resources(models, variants=())
    assert {task["prompt_tokens"] for task in told} == {128 - 32} == {measured["settings"]["prompt_tokens"]}
    monkeypatch.setattr(resources, "NEW_TOKENS", 128)
    with pytest.raises(ValueError, match="no room for a prompt in a context of 128"):
        measure_resources(models, variants=())
