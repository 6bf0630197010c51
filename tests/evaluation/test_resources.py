"""What models take: in processes of their own where memory is measured, in this one where counts and reasons are."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MOE, tiny_model
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_distill.evaluation import inference
from llm_distill.evaluation.measure import available_memory
from llm_distill.evaluation.resources import TIMED, measure_resources, resources_table

MIB = 2**20
TOO_MANY = 100_000_000
NOT_BY_GRADIENT = {
    "deepseek_v4": "routes by a table of tokens, which is all zeros before it is trained: the same expert twice",
    "jetmoe": "its attention is a mixture too, whose queries get no gradient from a single token",
    "longcat_flash": "has experts without weights: the count is the most that a token can reach",
}
SMALL = {"prompt_tokens": 16, "new_tokens": 4, "repeats": 2, "rounds": 1}


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


@pytest.fixture(scope="module")
def found(folders: dict[str, Path]) -> dict[str, Any]:
    models = {name: str(folders[name]) for name in ("teacher", "student", "broken")} | {
        "missing": str(folders["teacher"] / "no" / "x")
    }
    return measure_resources(
        models, variants=("4bit",), batch_sizes=(2, 1, TOO_MANY), energy=False, device="cpu", **SMALL
    )


def figures(found: dict[str, Any], name: str) -> dict[str, Any]:
    return found["models"][name]["figures"]


def task(name: Path | str, **options: Any) -> dict[str, Any]:
    """What a process is told."""
    defaults = {"revision": None, "bits": None, "libraries": [], "device": "cpu", "threads": 1, "dtype": "auto"}
    return {
        **defaults,
        "trust_remote_code": False,
        "batch_sizes": [1],
        "energy": False,
        **SMALL,
        "name": str(name),
        **options,
    }


def weights_of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_parameters_and_bytes_are_those_of_the_files(
    found: dict[str, Any], folders: dict[str, Path], name: str
) -> None:
    parameters = sum(weight.numel() for weight in weights_of(folders[name]).parameters())
    assert figures(found, name)["parameters"] == figures(found, name)["active_parameters"] == parameters
    assert figures(found, name)["bytes_on_disk"] == (folders[name] / "model.safetensors").stat().st_size
    assert figures(found, name)["weight_bytes"] == 4 * parameters


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_peak_memory_is_the_weights_and_little_more(found: dict[str, Any], name: str) -> None:
    """The prompts are short: what is above the weights is a few activations, and up to 16 MiB of the libraries'."""
    for peak in figures(found, name)["peak_memory_bytes"].values():
        assert figures(found, name)["weight_bytes"] <= peak <= figures(found, name)["weight_bytes"] + 16 * MIB


def test_twice_the_width_takes_more_memory(found: dict[str, Any]) -> None:
    for size in ("1", "2"):
        student, teacher = (figures(found, name)["peak_memory_bytes"][size] for name in ("student", "teacher"))
        assert student < teacher / 2


def test_times_are_there_for_every_batch_that_fits(found: dict[str, Any]) -> None:
    for name in ("teacher", "student", "student, 4-bit"):
        for figure in TIMED:
            assert list(figures(found, name)[figure]) == ["1", "2"]
            for value in figures(found, name)[figure].values():
                assert 0 < value["low"] <= value["median"] <= value["high"]


def test_a_batch_that_does_not_fit_is_named_with_what_it_would_take(found: dict[str, Any]) -> None:
    for name in ("teacher", "student", "student, 4-bit"):
        reason = found["models"][name]["skipped"][f"batch {TOO_MANY}"]
        assert reason.startswith("does not fit into memory: it would take ")
    assert available_memory("cpu") < 4 * 1024 * TOO_MANY, "or the batch would be too small for this test"


def test_a_batch_that_is_tried_and_does_not_fit_is_a_reason_too(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "available_memory", lambda device: 2**80)
    found = inference.measure(task(saved / "student", batch_sizes=[1, 10**13]))
    assert "can't allocate memory" in found["skipped"]["batch 10000000000000"]
    assert list(found["figures"]["peak_memory_bytes"]) == ["1"]


def test_the_4_bit_variant_has_smaller_weights_and_says_what_saving_would_write(
    found: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    packed, student = found["models"]["student, 4-bit"], figures(found, "student")
    assert packed["bits"] == 4
    assert packed["figures"]["parameters"] == student["parameters"]
    assert packed["figures"]["weight_bytes"] < student["weight_bytes"] / 2
    inference.load(str(folders["student"]), task(folders["student"], bits=4)).save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert packed["figures"]["bytes_on_disk"] == pytest.approx(written, rel=0.01)


def test_the_8_bit_variant_is_measured_or_says_why_not(folders: dict[str, Path]) -> None:
    measured = inference.measure(task(folders["student"], bits=8))["figures"]
    assert measured["weight_bytes"] < 4 * measured["parameters"] / 2
    assert all(rate > 0 for rate in measured["decode_tokens_per_second"]["1"])


def test_ratios_are_to_the_teacher(found: dict[str, Any]) -> None:
    student, teacher = figures(found, "student"), figures(found, "teacher")
    ratios = found["models"]["student"]["ratio_to_teacher"]
    assert set(ratios) == set(student)
    assert ratios["parameters"] == student["parameters"] / teacher["parameters"]
    name = "decode_tokens_per_second"
    assert ratios[name]["2"] == student[name]["2"]["median"] / teacher[name]["2"]["median"]
    assert found["models"]["teacher"]["ratio_to_teacher"]["peak_memory_bytes"] == {"1": 1, "2": 1}


def test_a_model_that_does_not_load_is_a_reason_and_the_others_are_measured(found: dict[str, Any]) -> None:
    assert "safetensor" in found["models"]["broken"]["error"].lower()
    assert "'x' cannot be loaded" in found["models"]["missing"]["error"]
    assert "figures" in found["models"]["student"]


def test_what_is_found_is_json_without_local_paths(found: dict[str, Any], folders: dict[str, Path]) -> None:
    text = json.dumps(found)
    assert json.loads(text) == found
    assert str(folders["teacher"].parent) not in text
    assert found["models"]["teacher"]["model"] == "teacher"


def test_the_table_shows_every_figure_and_what_is_missing(found: dict[str, Any]) -> None:
    table = resources_table(found)
    assert table.startswith("| | teacher | student | student, 4-bit |\n|---|---:|---:|---:|\n")
    parameters = figures(found, "student")["parameters"] / 1e6
    assert f" | {parameters:,.2f} (0.27 ×) | " in table
    for name in ("broken", "missing", f"student, batch {TOO_MANY}"):
        assert f"Not measured: {name}: " in table


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each process would be told, in order. None starts; the n-th decodes n tokens a second."""
    told: list[dict[str, Any]] = []

    def note(program: list[str], task: dict[str, Any]) -> dict[str, Any]:
        told.append(task)
        decoded = {"weight_bytes": 1, "decode_tokens_per_second": {"1": [len(told)]}}
        return {"architecture": "Llama", "dtype": "float32", "figures": decoded, "skipped": {}}

    monkeypatch.setattr("llm_distill.evaluation.resources.in_fresh_process", note)
    return told


def test_rounds_go_there_and_back_and_are_taken_together(folders: dict[str, Path], told: list[dict[str, Any]]) -> None:
    models = {name: str(folders[name]) for name in ("teacher", "student")}
    found = measure_resources(models, variants=("8bit",), rounds=2, revisions={"student": "v1"})
    names = [(Path(task["name"]).name, task["bits"], task["revision"]) for task in told]
    there = [("teacher", None, None), ("student", None, "v1"), ("student", 8, "v1")]
    assert names == there + there[::-1]
    assert [task["energy"] for task in told] == [True] * 3 + [False] * 3
    assert figures(found, "teacher")["decode_tokens_per_second"] == {"1": {"median": 3.5, "low": 1, "high": 6}}


def test_adapters_count_with_the_model_they_are_for(folders: dict[str, Path], told: list[dict[str, Any]]) -> None:
    found = measure_resources({"student": str(folders["adapters"])}, variants=())
    files = folders["adapters"] / "adapter_model.safetensors", folders["student"] / "model.safetensors"
    assert figures(found, "student")["bytes_on_disk"] == sum(path.stat().st_size for path in files)
    measured = inference.measure(told[0] | SMALL | {"batch_sizes": [1], "energy": False})["figures"]
    layers, rank, width = 2, 4, 512
    q_proj_and_v_proj = 2 * rank * (width + width)
    assert measured["parameters"] == weights_of(folders["student"]).num_parameters() + layers * q_proj_and_v_proj
    assert measured["weight_bytes"] == 4 * measured["parameters"]


def test_prompts_are_cut_to_the_shortest_context(folders: dict[str, Path], told: list[dict[str, Any]]) -> None:
    models = {name: str(folders[name]) for name in ("teacher", "student")}
    found = measure_resources(models, variants=(), prompt_tokens=1000, new_tokens=32)
    assert {task["prompt_tokens"] for task in told} == {128 - 32} == {found["settings"]["prompt_tokens"]}
    with pytest.raises(ValueError, match="no room for a prompt in a context of 128"):
        measure_resources(models, variants=(), new_tokens=128)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variants": ("2bit",)}, "unknown variants.*2bit"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"new_tokens": 1}, "new_tokens"),
        ({"revisions": {"techer": "main"}}, "techer"),
        ({"quantized": {"student": "4bit"}}, "variants=()"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure_resources({"student": "nowhere"}, **options)


@pytest.mark.parametrize("family", [family for family in MOE if family not in NOT_BY_GRADIENT])
def test_active_parameters_are_those_that_one_token_reaches(family: str) -> None:
    """An expert that the router leaves out gets no gradient, and all else is counted whole."""
    model = tiny_model(family)
    model(torch.tensor([[5]])).logits.sum().backward()
    idle = 0
    for name, weight in model.named_parameters():
        if ".experts." in name and weight.grad is not None:
            idle += sum(not part.any() for part in weight.grad.view(4, -1)) * weight.numel() // 4
    assert idle > 0
    assert inference.active_parameters(model) == model.num_parameters() - idle


def test_active_parameters_of_a_mixture_by_hand() -> None:
    width, inner, layers, experts, picked = 32, 64, 2, 4, 2
    model = tiny_model("mixtral")
    expert = 3 * width * inner
    assert inference.active_parameters(model) == model.num_parameters() - layers * (experts - picked) * expert


def test_energy_is_measured_without_network_and_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(inference, "ENERGY_SECONDS", 1.5)
    monkeypatch.chdir(tmp_path)
    found = inference.measure(task(saved / "student", energy=True))
    assert found["skipped"] == {}
    assert found["figures"]["joules_per_token"]["1"] > 0
    assert found["figures"]["co2_grams_per_token"]["1"] > 0
    assert list(tmp_path.iterdir()) == []


def test_without_codecarbon_the_energy_is_skipped_with_the_way_out(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    found = inference.measure(task(saved / "student", energy=True))
    assert "pip install 'llm-distill[evaluation]'" in found["skipped"]["energy"]
    assert "joules_per_token" not in found["figures"]


def test_a_checkpoint_that_samples_and_stops_is_measured_as_any_other(saved: Path, tmp_path: Path) -> None:
    model = weights_of(saved / "student")
    model.generation_config.update(do_sample=True, top_k=5, eos_token_id=list(range(300)), max_new_tokens=2)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = inference.load(str(tmp_path), task(tmp_path))
        inference.generate(loaded, inference.prompts(loaded, 2, 16), 8, "cpu")  # asserts that all 8 are there


def test_prompts_have_no_token_with_a_meaning(saved: Path) -> None:
    model = weights_of(saved / "student")
    model.config.image_token_id, model.config.eos_token_id = 7, [2, 9]
    ids = inference.prompts(model, 8, 100)
    assert set(range(model.config.vocab_size)) - set(ids.flatten().tolist()) >= {2, 7, 9}
