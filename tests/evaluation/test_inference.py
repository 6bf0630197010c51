"""What one model takes: in this process, where counts and reasons are measured, and no memory."""

from __future__ import annotations

import math
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MOE, tiny_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from llm_distill.evaluation import inference
from llm_distill.evaluation.inference import active_parameters, generate, load_model, measure_model, random_prompts

NOT_BY_GRADIENT = {
    "deepseek_v4": "routes by a table of tokens, which is all zeros before it is trained: the same expert twice",
    "jetmoe": "its attention is a mixture too, whose queries get no gradient from a single token",
    "longcat_flash": "has experts without weights: the count is the most that a token can reach",
}


def task(folder: Path, **options: Any) -> dict[str, Any]:
    """What a process is told."""
    sizes = {"batch_sizes": [1], "prompt_tokens": 16, "new_tokens": 4, "repeats": 2, "seconds": 60, "energy_seconds": 0}
    model = {"name": str(folder), "folders": [str(folder)], "revision": None, "bits": None}
    return {"device": "cpu", "dtype": "auto", "trust_remote_code": False, **sizes, **model, **options}


def test_a_batch_that_is_tried_and_does_not_fit_is_a_reason_too(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "free_memory", lambda device: 2**80)
    result = measure_model(task(saved / "student", batch_sizes=[1, 10**13], seconds=math.inf))
    assert "can't allocate memory" in result["skipped"]["batch 10000000000000"]
    assert list(result["figures"]["peak_memory_bytes"]) == ["1"]


def test_a_model_is_measured_for_the_time_that_it_has(saved: Path) -> None:
    """The smallest batch once at least; a larger one that would take longer is left out, with the reason."""
    result = measure_model(task(saved / "student", batch_sizes=[1, 64], repeats=1000, seconds=0))
    assert list(result["figures"]["decode_tokens_per_second"]) == ["1"]
    assert "more than resource_seconds allow" in result["skipped"]["batch 64"]


def test_the_8_bit_variant_is_measured(tmp_path: Path) -> None:
    tiny_llama(0, 256).save_pretrained(tmp_path)
    measured = measure_model(task(tmp_path, bits=8))["figures"]
    assert measured["weight_bytes"] < 4 * measured["parameters"] / 2
    assert measured["decode_tokens_per_second"]["1"]["low"] > 0


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
    assert active_parameters(model) == model.num_parameters() - idle


def test_active_parameters_of_a_mixture_by_hand() -> None:
    width, inner, layers, experts, picked = 32, 64, 2, 4, 2
    model = tiny_model("mixtral")
    expert = 3 * width * inner
    assert active_parameters(model) == model.num_parameters() - layers * (experts - picked) * expert


def test_energy_is_measured_without_network_and_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    result = measure_model(task(saved / "student", energy_seconds=1.5))
    assert result["skipped"] == {}
    assert result["figures"]["joules_per_token"]["1"] > 0
    assert result["figures"]["co2_grams_per_token"]["1"] > 0
    assert list(tmp_path.iterdir()) == []


def test_without_codecarbon_the_energy_is_skipped_with_the_way_out(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    result = measure_model(task(saved / "student", energy_seconds=1.5))
    assert "pip install 'llm-distill[evaluation]'" in result["skipped"]["energy"]
    assert "joules_per_token" not in result["figures"]


def test_a_checkpoint_that_samples_and_stops_is_measured_as_any_other(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "student")
    model.generation_config.update(do_sample=True, top_k=5, eos_token_id=list(range(300)), max_new_tokens=2)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = load_model(str(tmp_path), task(tmp_path))
        generate(loaded, random_prompts(loaded, 2, 16), 8)  # asserts that all 8 are there


def test_prompts_have_no_token_with_a_meaning(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "student")
    model.config.image_token_id, model.config.eos_token_id = 7, [2, 9]
    ids = random_prompts(model, 8, 100)
    assert set(range(model.config.vocab_size)) - set(ids.flatten().tolist()) >= {2, 7, 9}


def test_a_model_that_does_not_fit_is_not_loaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "free_memory", lambda device: 100)
    assert measure_model(task(saved / "student"))["error"].startswith("does not fit into memory: 0.0 GiB, and 0.0 are")
