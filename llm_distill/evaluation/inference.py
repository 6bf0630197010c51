"""What one model takes to answer, measured in a process of its own: `python -m llm_distill.evaluation.inference`.

It imports little, because `llm_distill.evaluation.resources` starts it for each model and each round.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import find_adapter_config_file

from llm_distill.evaluation.measure import available_memory, is_cuda, memory, peak, seconds, start_peak, synchronize
from llm_distill.models import bits_and_bytes

ENERGY_SECONDS = 3
"""For how long at least it generates while the energy is measured: a sample a second."""
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
"""What families call these in their configurations."""


class StepClock(StoppingCriteria):
    """Notes when each new token is there, and stops nothing."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(
        self, input_ids: Int[Tensor, "batch time"], scores: Float[Tensor, "batch vocab"], **kwargs: Any
    ) -> Bool[Tensor, " batch"]:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """`{"architecture", "dtype", "figures", "skipped"}` of the model that `task` names (`resources` says with what).

    A figure is a number, or for each batch size a number (bytes, joules, grams) or the list of all its measurements
    (seconds, tokens per second).
    """
    device = task["device"]
    for library in task["libraries"]:
        importlib.import_module(library)
    rehearse(task)
    libraries = memory(device)
    start_peak(device)
    model = load(task["name"], task)
    read_all(model)
    figures: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
        "weight_bytes": weight_bytes(model),
        "loading_memory_bytes": max(0, peak(device) - libraries),
    }
    skipped: dict[str, str] = {}
    for size in sorted(task["batch_sizes"]):
        if reason := too_large(size, model, task, figures):
            skipped[f"batch {size}"] = reason
            continue
        start_peak(device)
        try:
            ids = prompts(model, size, task["prompt_tokens"])
            measured = time_batch(model, ids, task["new_tokens"], task["repeats"], device)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            skipped[f"batch {size}"] = f"does not fit into memory: {str(error).splitlines()[0]}"
            continue
        measured["peak_memory_bytes"] = max(0, peak(device) - libraries)
        for name, value in measured.items():
            figures.setdefault(name, {})[str(size)] = value
    if task["energy"] and "peak_memory_bytes" in figures:
        size = int(min(figures["peak_memory_bytes"], key=int))
        try:
            ids = prompts(model, size, task["prompt_tokens"])
            for name, value in energy(lambda: generate(model, ids, task["new_tokens"], device)).items():
                figures[name] = {str(size): value / (size * task["new_tokens"])}
        except Exception as error:  # whatever codecarbon makes of a machine: the other figures stand
            skipped["energy"] = " ".join(str(error).split())
    dtype = str(model.dtype).removeprefix("torch.")
    return {"architecture": type(model).__name__, "dtype": dtype, "figures": figures, "skipped": skipped}


def load(name_or_path: str, task: dict[str, Any]) -> PreTrainedModel:
    """From the Hub or a folder, of a model or of adapters (which are not merged)."""
    packed = {"quantization_config": bits_and_bytes(task["bits"])} if task["bits"] else {}
    load_model: Any = AutoModelForCausalLM.from_pretrained
    if find_adapter_config_file(name_or_path, revision=task["revision"]):
        from peft import AutoPeftModelForCausalLM

        load_model = AutoPeftModelForCausalLM.from_pretrained  # there, a revision is that of the adapters alone
    model = load_model(
        name_or_path,
        revision=task["revision"],
        trust_remote_code=task["trust_remote_code"],
        dtype=task["dtype"],
        device_map={"": task["device"]},
        **packed,
    )
    model.generation_config = GenerationConfig()  # the checkpoint's own would sample, or stop early
    return model.eval()


def read_all(model: PreTrainedModel) -> None:
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
        model = load(folder, {**task, "revision": None})
        generate(model, prompts(model, 1, 8), 2, task["device"])


def active_parameters(model: PreTrainedModel) -> int | None:
    """Those that one token goes through: of a mixture's routed experts as many as the router picks, and all else.

    None for a mixture whose configuration does not say how many those are.
    """
    config = model.config.get_text_config()
    configs = [config, getattr(config, "ffn_config", None)]
    experts, picked = (
        next((found for c in configs for name in names if isinstance(found := getattr(c, name, None), int)), None)
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


def prompts(model: PreTrainedModel, size: int, length: int) -> Int[Tensor, "size length"]:
    """Random tokens, the same each time, without those that the configuration gives a meaning (end, image, …)."""
    text = model.config.get_text_config()
    settings = {**model.config.to_dict(), **text.to_dict()}
    named = (value for name, value in settings.items() if name.endswith(("_token_id", "_token_index")))
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    drawn = torch.randint(len(ordinary), (size, length), generator=torch.Generator().manual_seed(0))
    return ordinary[drawn].to(model.device)


def too_large(size: int, model: PreTrainedModel, task: dict[str, Any], figures: dict[str, Any]) -> str | None:
    """Why a batch would not fit into main memory, by what each sequence of the batch before took, and by what it takes
    at least. An operating system grants what it has not and then kills who uses it; CUDA says no, so there it is tried.
    """
    if is_cuda(task["device"]):
        return None
    config = model.config.get_text_config()
    each = 4 * config.vocab_size + model.dtype.itemsize * getattr(config, "hidden_size", 0) * task["prompt_tokens"]
    before = max(map(int, figures.get("peak_memory_bytes", {})), default=0)
    if before:
        each = max(each, (figures["peak_memory_bytes"][str(before)] - figures["weight_bytes"]) / before)
    needed, free = each * (size - before), available_memory(task["device"])
    if needed <= free:
        return None
    return f"does not fit into memory: it would take {needed / 2**30:,.1f} GiB more, and {free / 2**30:,.1f} are free"


def generate(
    model: PreTrainedModel, ids: Int[Tensor, "batch time"], new_tokens: int, device: str
) -> tuple[float, float]:
    """Greedy. The seconds to the first token, and from there to the last."""
    clock = StepClock(device)
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    assert output.shape[1] == ids.shape[1] + new_tokens, "nothing ends it early"
    return clock.times[0] - start, clock.times[-1] - clock.times[0]


def prefill(model: PreTrainedModel, ids: Int[Tensor, "batch time"]) -> None:
    """The forward that reads a prompt: it fills the cache, and makes logits of the last position only (where the family
    can).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **last)


def time_batch(
    model: PreTrainedModel, ids: Int[Tensor, "batch time"], new_tokens: int, repeats: int, device: str
) -> dict[str, Any]:
    """Each figure `repeats` times, after one run that does not count."""
    generate(model, ids, new_tokens, device)
    prefill(model, ids)
    firsts, prefills, decodes = [], [], []
    for _ in range(repeats):
        prefills.append(ids.numel() / seconds(lambda: prefill(model, ids), device))
        first, rest = generate(model, ids, new_tokens, device)
        firsts.append(first)
        decodes.append(len(ids) * (new_tokens - 1) / rest)
    return {
        "time_to_first_token_seconds": firsts,
        "prefill_tokens_per_second": prefills,
        "decode_tokens_per_second": decodes,
    }


def energy(run: Callable[[], object]) -> dict[str, float]:
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
    while time.perf_counter() - start < ENERGY_SECONDS:
        run()
        runs += 1
    tracker.stop()
    found = tracker.final_emissions_data
    if not found.energy_consumed:
        raise ValueError("codecarbon finds neither a counter nor a processor that it knows")
    return {
        "joules_per_token": found.energy_consumed * 3.6e6 / runs,
        "co2_grams_per_token": found.emissions * 1000 / runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, help="JSON, as `llm_distill.evaluation.resources` writes it")
    task = json.loads(parser.parse_args().task)
    logging.disable(logging.WARNING)  # bitsandbytes warns at every product: that would be timed
    warnings.simplefilter("ignore")
    torch.set_num_threads(task["threads"])
    try:
        found = measure(task)
    except Exception as error:  # whatever a model's own code raises: the others go on
        found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
