"""What teacher, student and its 4-bit and 8-bit variants take on the machine at hand: memory, time, energy.

Each model is loaded in a process of its own (`inference`), so that its peak memory is its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig
from transformers.utils import extract_commit_hash

from llm_distill.evaluation.compare import TEACHER
from llm_distill.loading import find_adapters, find_config
from llm_distill.machine import describe_machine, run_in_fresh_process
from llm_distill.models import public_name
from llm_distill.tables import Table

VARIANTS = (4, 8)
"""Bits in which the student is measured too."""
PROMPT_TOKENS, NEW_TOKENS = 128, 32
"""What each sequence is made of, where the context of all models allows it."""
REPEATS = 5
"""Timed runs at most, after one that is not."""
SECONDS = 20
"""For how long a model's runs go on."""
ENERGY_SECONDS = 3
"""For how long at least a model generates while its energy is measured: a sample a second."""
TIMED = ("time_to_first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")
"""Figures of which there are several measurements."""
LABELS: dict[str, tuple[str, float, str]] = {
    "parameters": ("parameters, M", 1e-6, ",.2f"),
    "active_parameters": ("parameters a token goes through, M", 1e-6, ",.2f"),
    "bytes_on_disk": ("on disk, MiB", 2**-20, ",.1f"),
    "weight_bytes": ("weights in memory, MiB", 2**-20, ",.1f"),
    "loading_memory_bytes": ("peak memory, MiB, loading", 2**-20, ",.1f"),
    "peak_memory_bytes": ("peak memory, MiB", 2**-20, ",.1f"),
    "time_to_first_token_seconds": ("time to first token, ms", 1e3, ",.1f"),
    "prefill_tokens_per_second": ("prefill, tokens a second", 1, ",.0f"),
    "decode_tokens_per_second": ("decode, tokens a second", 1, ",.0f"),
    "joules_per_token": ("energy, joules a new token", 1, ".3g"),
    "co2_grams_per_token": ("CO₂, grams a million new tokens", 1e6, ".3g"),
}
"""How a table shows each figure: in which words, times what, in which format."""


class Checkpoint(NamedTuple):
    """A model before it is loaded."""

    name: str
    revision: str | None
    bits: int | None
    folders: list[str]
    """Where its configuration is, and its weights will be; of adapters first their own folder, then their model's."""
    context: int | None


def measure_resources(
    models: Mapping[str, str],
    *,
    variants: Sequence[int] = VARIANTS,
    batch_sizes: Sequence[int] = (1, 4, 16),
    dtype: str = "auto",
    revisions: Mapping[str, str] | None = None,
    teacher_bits: int | None = None,
    seconds: float = SECONDS,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Figures of each of `models` (`{"teacher": a folder or a Hub id, "student": …}`), as JSON.

    Args:
        models: by name, folders (of a model or of adapters) or Hub ids. Ratios are to the one named `teacher`.
        variants: the bits in which `student` is measured too, packed by bitsandbytes.
        batch_sizes: sequences at a time.
        dtype: of the weights; `auto` is as they are stored.
        revisions: of the models by name.
        teacher_bits: loads the teacher in 4 or 8 bits.
        seconds: for how long each model is timed, once it is loaded.
        trust_remote_code: run the code that comes with a model.

    Returns:
        `machine`, `settings` and `models`: of each name, and of `student, 4-bit` and `student, 8-bit`, `model`,
        `revision`, `architecture`, `dtype`, `bits`, `figures`, `skipped` (why something is not there) and
        `ratio_to_teacher`; or `model` and `error`. A figure is a number, or for each batch size a number or
        `{"median", "low", "high"}`: `parameters`, `active_parameters`, `bytes_on_disk` (of a variant: what saving would
        write), `weight_bytes`, `loading_memory_bytes`, `peak_memory_bytes`, those of TIMED, `joules_per_token`,
        `co2_grams_per_token`. What is not known is left out. `ratio_to_teacher` has the same shape, without the spread.

    Raises:
        ValueError: a model's context has no room for a prompt.
    """
    results: dict[str, dict[str, Any]] = {}
    checkpoints: dict[str, Checkpoint] = {}
    for name, path in models.items():
        try:
            checkpoint = find_checkpoint(path, (revisions or {}).get(name), trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            results[name] = {"model": public_name(path), "error": _in_one_line(error, path)}
            continue
        checkpoints[name] = checkpoint._replace(bits=teacher_bits if name == TEACHER else None)
        if name == "student":
            checkpoints |= {f"student, {bits}-bit": checkpoint._replace(bits=bits) for bits in variants}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt_tokens = _prompt_tokens([checkpoint.context for checkpoint in checkpoints.values()])
    settings = {"prompt_tokens": prompt_tokens, "new_tokens": NEW_TOKENS, "batch_sizes": list(batch_sizes)}
    settings |= {"repeats": REPEATS, "seconds": seconds, "dtype": dtype}
    task = {**settings, "device": device, "threads": torch.get_num_threads()}
    task |= {"energy_seconds": ENERGY_SECONDS, "trust_remote_code": trust_remote_code}
    for name, checkpoint in tqdm(checkpoints.items(), desc="Resources", unit=" models", leave=False):
        results[name] = _measure(checkpoint, task)
    teacher = _flatten(results.get(TEACHER, {}).get("figures", {}))
    for result in results.values():
        if teacher and "figures" in result:
            result["ratio_to_teacher"] = _ratios(result["figures"], teacher)
    return {"machine": describe_machine(device), "settings": settings | {"rounds": 1}, "models": results}


def find_checkpoint(name_or_path: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    """A model or adapters, in a folder or on the Hub, from where no weights are fetched.

    Raises:
        ValueError, OSError, KeyError, ImportError: there is none, or none that transformers knows.
    """
    adapters = find_adapters(name_or_path, revision=revision)
    if adapters is not None:
        settings = json.loads(Path(adapters).read_text())
        base = find_checkpoint(settings["base_model_name_or_path"], settings.get("revision"), trust_remote_code)
        folders = [str(Path(adapters).parent), *base.folders]
        return Checkpoint(name_or_path, revision, None, folders, base.context)
    folder = Path(find_config(name_or_path, revision=revision)).parent
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    return Checkpoint(name_or_path, revision, None, [str(folder)], context if isinstance(context, int) else None)


def resources_parts(resources: Mapping[str, Any]) -> list[Table | str]:
    """What `measure_resources` returned: a table of each figure with its ratio to the teacher's, and in words how it
    was measured and what is missing.
    """
    models = {name: model for name, model in resources["models"].items() if "figures" in model}
    figures = {name: _flatten(model["figures"]) for name, model in models.items()}
    ratios = {name: _flatten(model.get("ratio_to_teacher", {})) for name, model in models.items()}
    rows = []
    for key, (label, factor, style) in LABELS.items():
        for size in dict.fromkeys(size for flat in figures.values() for name, size in flat if name == key):
            row = [label + (f", batch {size}" if size else "")]
            for name, flat in figures.items():
                value, ratio = flat.get((key, size)), ratios[name].get((key, size))
                beside = f" ({ratio:.2f} ×)" if ratio is not None and name != TEACHER else ""
                row.append("" if value is None else f"{value * factor:{style}}{beside}")
            rows.append(row)
    machine, settings = resources["machine"], resources["settings"]
    spreads = [
        (value["high"] - value["low"]) / value["median"]
        for model in models.values()
        for key in TIMED
        for value in model["figures"].get(key, {}).values()
    ]
    notes = [
        f"{machine['date']}, {machine['device']}, threads: {machine['threads']}. Prompts of "
        f"{settings['prompt_tokens']} tokens, {settings['new_tokens']} new ones, greedy. Medians of "
        f"{settings['repeats']} runs, fewer where the time was up"
        + (f"; the most that highest and lowest are apart is {max(spreads):.0%} of the median." if spreads else ".")
    ]
    for name, model in resources["models"].items():
        skipped = {"": model["error"]} if "error" in model else model["skipped"]
        notes += [f"Not measured: {name}{where and f', {where}'}: {why}." for where, why in skipped.items()]
    return [Table(["", *models], rows), *notes]


def _prompt_tokens(contexts: Sequence[int | None]) -> int:
    """How long a prompt is, the same for all models."""
    shortest = min((length for length in contexts if length), default=PROMPT_TOKENS + NEW_TOKENS)
    if shortest <= NEW_TOKENS:
        raise ValueError(
            f"{NEW_TOKENS} new tokens leave no room for a prompt in a context of {shortest}: measure no resources "
            "(--resources false)."
        )
    return min(PROMPT_TOKENS, shortest - NEW_TOKENS)


def _measure(checkpoint: Checkpoint, task: dict[str, Any]) -> dict[str, Any]:
    """One model, in its own process."""
    result = run_in_fresh_process(["-m", "llm_distill.evaluation.inference"], {**task, **checkpoint._asdict()})
    if "error" in result:
        result = {"error": _in_one_line(result["error"], checkpoint.name, *checkpoint.folders)}
    commit = extract_commit_hash(str(Path(checkpoint.folders[0], "config.json")), None)
    return {"model": public_name(checkpoint.name), "revision": commit, "bits": checkpoint.bits, **result}


def _flatten(figures: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """By name and batch size, which is `""` where a figure does not depend on it; of several runs the median."""
    return {
        (name, size): value["median"] if isinstance(value, dict) else value
        for name, by_size in figures.items()
        for size, value in (by_size if isinstance(by_size, dict) else {"": by_size}).items()
    }


def _ratios(figures: Mapping[str, Any], teacher: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Figure by figure, where both have it and the teacher's is not 0."""
    ratios: dict[str, Any] = {}
    for (name, size), value in _flatten(figures).items():
        if not (reference := teacher.get((name, size))):
            continue
        if size:
            ratios.setdefault(name, {})[size] = value / reference
        else:
            ratios[name] = value / reference
    return ratios


def _in_one_line(error: object, *paths: str) -> str:
    """Without the folders that a person gave."""
    text = " ".join(str(error).split())
    for path in paths:
        text = text.replace(path, public_name(path) or path)
    return text[:300].rstrip(".")
