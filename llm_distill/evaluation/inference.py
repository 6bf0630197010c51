"""What one model takes to answer, measured in a process of its own: `python -m llm_distill.evaluation.inference`.

It imports little, because `llm_distill.evaluation.resources` starts it for each model.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Int
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel
from transformers.generation import BaseStreamer

from llm_distill.heads import base_of
from llm_distill.loading import bits_and_bytes
from llm_distill.machine import duration, free_memory, is_cuda, peak_memory, reset_peak_memory, seconds, used_memory

GIB = 2**30
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
"""What families call these in their configurations."""
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""What weights are called. Of several kinds in a folder, transformers and PEFT load the first."""


def measure_model(task: dict[str, Any]) -> dict[str, Any]:
    """`{"architecture", "dtype", "figures", "skipped"}` of the model that `task` names, or `{"error"}`.

    A figure is a number, or for each batch size a number (bytes, joules, grams) or `{"median", "low", "high"}` of all
    its measurements (seconds, tokens per second). `resources.measure_resources` says what a task holds.
    """
    device, prompt_tokens, new_tokens = task["device"], task["prompt_tokens"], task["new_tokens"]
    stored, free = stored_bytes(task["folders"]), free_memory(device)
    if stored > free and not task["bits"] and not is_cuda(device):
        return {"error": f"does not fit into memory: {stored / GIB:,.1f} GiB, and {free / GIB:,.1f} are free"}
    rehearse(task)
    libraries = used_memory(device)
    reset_peak_memory(device)
    model = load_model(task["name"], task)
    read_weights(model)
    figures: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
        "bytes_on_disk": weight_bytes(model) if task["bits"] else stored_bytes(task["folders"]),  # now they are here
        "weight_bytes": weight_bytes(model),
        "loading_memory_bytes": max(0, peak_memory(device) - libraries),
    }
    figures = {name: value for name, value in figures.items() if value}
    skipped: dict[str, str] = {}
    sizes, end, seconds_a_text = sorted(task["batch_sizes"]), time.perf_counter() + task["seconds"], 0.0
    for number, size in enumerate(sizes):
        left, needed = max(0.0, end - time.perf_counter()), 2 * seconds_a_text * size
        if reason := reason_not_to_fit(size, model, task, figures):
            skipped[f"batch {size}"] = reason
            continue
        if needed > 2 * left:
            skipped[f"batch {size}"] = f"would take about {duration(needed)}, more than resource_seconds allow"
            continue
        reset_peak_memory(device)
        try:
            prompts = random_prompts(model, size, prompt_tokens)
            share = left / (len(sizes) - number)
            measured: dict[str, Any] = time_batch(model, prompts, new_tokens, task["repeats"], share, device)
            seconds_a_text = _round_seconds(measured, prompts.numel(), size * (new_tokens - 1)) / size
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            skipped[f"batch {size}"] = " ".join(str(error).split())[:200]
            break
        measured["peak_memory_bytes"] = max(0, peak_memory(device) - libraries)
        for name, value in measured.items():
            figures.setdefault(name, {})[str(size)] = value
    if task["energy_seconds"] and "peak_memory_bytes" in figures:
        size = min(map(int, figures["peak_memory_bytes"]))
        prompts = random_prompts(model, size, prompt_tokens)
        try:
            of_a_batch = measure_energy(lambda: generate(model, prompts, new_tokens), task["energy_seconds"])
            figures |= {name: {str(size): value / (size * new_tokens)} for name, value in of_a_batch.items()}
        except Exception as error:  # whatever codecarbon makes of a machine: the other figures stand
            skipped["energy"] = " ".join(str(error).split())
    dtype = str(model.dtype).removeprefix("torch.")
    return {"architecture": type(model).__name__, "dtype": dtype, "figures": figures, "skipped": skipped}


def stored_bytes(folders: Sequence[str]) -> int:
    """Of the weights in all of these folders; 0 where one of them has none, such as before a download."""
    sizes = []
    for folder in map(Path, folders):
        names = ADAPTER_FILES if (folder / "adapter_config.json").is_file() else WEIGHT_FILES
        files = next((files for name in names if (files := list(folder.glob(name)))), [])
        sizes.append(sum(path.stat().st_size for path in files))
    return sum(sizes) if all(sizes) else 0


def load_model(name_or_path: str, task: dict[str, Any]) -> PreTrainedModel:
    """A model from the Hub or a folder, with its adapters (which are not merged) if it is the name of those."""
    adapters = len(task["folders"]) > 1
    load: Any = AutoPeftModelForCausalLM if adapters else AutoModelForCausalLM  # a `revision` is of the adapters alone
    model = load.from_pretrained(
        name_or_path,
        revision=task["revision"],
        trust_remote_code=task["trust_remote_code"],
        dtype=task["dtype"],
        device_map={"": task["device"]},
        **({"quantization_config": bits_and_bytes(task["bits"])} if task["bits"] else {}),
    )
    model.generation_config = GenerationConfig()  # the checkpoint's own would sample, or stop early
    return model.eval()


def read_weights(model: PreTrainedModel) -> None:
    """Weights mapped from a file take no memory until they are used, and those of rare tokens are used late."""
    for weight in model.parameters():
        weight.data.flatten().view(torch.uint8)[::4096].sum()


def rehearse(task: dict[str, Any]) -> None:
    """All steps once with a model of no size, so that what they import and start up counts as libraries."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        model = load_model(folder, {**task, "revision": None, "folders": [folder]})
        generate(model, random_prompts(model, 1, 8), 2)


def active_parameters(model: PreTrainedModel) -> int | None:
    """Those that one token goes through: of a mixture's routed experts as many as the router picks, and all else; None
    for a mixture whose configuration does not say how many those are.
    """
    config = model.config.get_text_config()
    configs = [config, getattr(config, "ffn_config", None)]
    experts, picked = (
        next((value for c in configs for name in names if isinstance(value := getattr(c, name, None), int)), None)
        for names in (NUM_EXPERTS, EXPERTS_PER_TOKEN)
    )
    routed = sum(
        math.prod(getattr(getattr(weight, "quant_state", None), "shape", weight.shape))
        for name, weight in model.named_parameters()
        if _is_of_an_expert(name, weight, experts)
    )
    if not routed:
        return model.num_parameters()
    if not experts or not picked:
        return None
    return model.num_parameters() - routed * (experts - min(picked, experts)) // experts


def _is_of_an_expert(name: str, weight: Tensor, experts: int | None) -> bool:
    path = name.split(".")
    if "router" in path or any("shared" in part for part in path):
        return False
    stacked = experts is not None and experts > 1 and weight.ndim == 3 and len(weight) == experts
    return stacked or ("experts" in path and (weight.ndim > 1 or path[path.index("experts") + 1].isdigit()))


def weight_bytes(model: PreTrainedModel) -> int:
    """Of all tensors that saving would write, tied ones once: packed weights with their scales."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    return sum({(value.data_ptr(), value.shape): value.nbytes for value in tensors}.values())


def random_prompts(model: PreTrainedModel, size: int, length: int) -> Int[Tensor, "size length"]:
    """The same each time, without the tokens that the configuration gives a meaning (end, image, …)."""
    text = model.config.get_text_config()
    settings = {**model.config.to_dict(), **text.to_dict()}
    named = (value for name, value in settings.items() if name.endswith(("_token_id", "_token_index")))
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    drawn = torch.randint(len(ordinary), (size, length), generator=torch.Generator().manual_seed(0))
    return ordinary[drawn].to(model.device)


def reason_not_to_fit(size: int, model: PreTrainedModel, task: dict[str, Any], figures: dict[str, Any]) -> str | None:
    """Why a batch would not fit into main memory, by what each sequence of the batch before took, and by what it takes
    at least. An operating system grants what it has not and then kills who uses it; CUDA says no, so there it is tried.
    """
    if is_cuda(task["device"]):
        return None
    config = model.config.get_text_config()
    of_a_sequence = 4 * config.vocab_size
    of_a_sequence += model.dtype.itemsize * getattr(config, "hidden_size", 0) * task["prompt_tokens"]
    before = max(map(int, figures.get("peak_memory_bytes", {})), default=0)
    if before:
        taken = figures["peak_memory_bytes"][str(before)] - figures["weight_bytes"]
        of_a_sequence = max(of_a_sequence, taken / before)
    needed, free = of_a_sequence * (size - before), free_memory(task["device"])
    if needed <= free:
        return None
    return f"does not fit into memory: it would take {needed / GIB:,.1f} GiB more, and {free / GIB:,.1f} are free"


class StepClock(BaseStreamer):
    """Notes when the prompts are read in, and when each new token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:  # what is on the CPU, so the device has finished it
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


def generate(model: PreTrainedModel, prompts: Int[Tensor, "batch time"], new_tokens: int) -> tuple[float, float]:
    """Greedy. The seconds to the first token, and from there to the last."""
    clock = StepClock()
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config, streamer=clock
        )
    _, first, *_, last = clock.times
    assert len(clock.times) == 1 + new_tokens, "nothing ends it early"
    return first - start, last - first


def prefill(model: PreTrainedModel, prompts: Int[Tensor, "batch time"]) -> None:
    """The forward that reads prompts: it fills the cache, and makes logits of the last position only (where the family
    can).
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base_of(model).forward).parameters else {}
    with torch.inference_mode():
        model(input_ids=prompts, attention_mask=torch.ones_like(prompts), use_cache=True, **last)


def time_batch(
    model: PreTrainedModel,
    prompts: Int[Tensor, "batch time"],
    new_tokens: int,
    repeats: int,
    most_seconds: float,
    device: str,
) -> dict[str, dict[str, float]]:
    """Each figure's median, least and most over at most `repeats` runs, after one that does not count. The time is
    looked at after each, so that there is one at least.
    """
    end = time.perf_counter() + most_seconds
    generate(model, prompts, new_tokens)
    prefill(model, prompts)
    first_token, prefilled, decoded = [], [], []
    for _ in range(repeats):
        prefilled.append(prompts.numel() / seconds(lambda: prefill(model, prompts), device))
        first, rest = generate(model, prompts, new_tokens)
        first_token.append(first)
        decoded.append(len(prompts) * (new_tokens - 1) / rest)
        if time.perf_counter() > end:
            break
    figures = {
        "time_to_first_token_seconds": first_token,
        "prefill_tokens_per_second": prefilled,
        "decode_tokens_per_second": decoded,
    }
    return {name: {"median": median(runs), "low": min(runs), "high": max(runs)} for name, runs in figures.items()}


def _round_seconds(measured: dict[str, Any], prompt_tokens: int, new_tokens: int) -> float:
    """How long a run takes: the prompts read, then read and answered."""
    median_of = {name: value["median"] for name, value in measured.items()}
    reading = prompt_tokens / median_of["prefill_tokens_per_second"]
    return reading + median_of["time_to_first_token_seconds"] + new_tokens / median_of["decode_tokens_per_second"]


def measure_energy(run: Callable[[], object], least_seconds: float) -> dict[str, float]:
    """What a `run` takes of this machine: joules, and grams of CO2 by the power of the country that codecarbon's own
    settings name (CODECARBON_COUNTRY_ISO_CODE), or else of the world. Where the machine has no counter that can be
    read, codecarbon estimates CPU and memory.

    Raises:
        ImportError: codecarbon is not installed.
        ValueError: it finds nothing to go by.
    """
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError as error:
        raise ImportError("codecarbon is not installed: pip install 'llm-distill[evaluation]'") from error
    tracker = OfflineEmissionsTracker(
        output_methods=[],
        emissions_endpoint="",  # None would be what a file in the home folder says
        electricitymaps_api_token="",
        allow_multiple_runs=True,
        tracking_mode="process",
        measure_power_secs=1,
        log_level="critical",
    )
    tracker.start()
    runs, start = 0, time.perf_counter()
    while time.perf_counter() - start < least_seconds:
        run()
        runs += 1
    tracker.stop()
    emissions = tracker.final_emissions_data
    if not emissions.energy_consumed:
        raise ValueError("codecarbon finds neither a counter nor a processor that it knows")
    return {
        "joules_per_token": emissions.energy_consumed * 3.6e6 / runs,
        "co2_grams_per_token": emissions.emissions * 1000 / runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, help="What to measure, as JSON of `llm_distill.evaluation.resources`.")
    task = json.loads(parser.parse_args().task)
    logging.disable(logging.WARNING)  # bitsandbytes warns at every product: that would be timed
    warnings.simplefilter("ignore")
    torch.set_num_threads(task["threads"])
    try:
        result = measure_model(task)
    except Exception as error:  # whatever a model's own code raises: the others go on
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
