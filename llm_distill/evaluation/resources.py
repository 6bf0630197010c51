"""What teacher, student and its 4-bit and 8-bit variants take on the machine at hand: memory, time, energy.

Each model is loaded in a process of its own, so that its peak memory is its own. So teacher and student cannot take
turns run by run; whole processes can, in rounds, there and back, and then the figures are medians over all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from tqdm.auto import tqdm
from transformers import AutoConfig
from transformers.utils import extract_commit_hash, find_adapter_config_file

from llm_distill.evaluation.measure import available_memory, in_fresh_process, is_cuda, machine
from llm_distill.models import find_config, public_name

VARIANTS = {"4bit": 4, "8bit": 8}
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


def measure_resources(
    models: Mapping[str, str],
    *,
    variants: Sequence[str] = ("4bit", "8bit"),
    batch_sizes: Sequence[int] = (1, 4, 16),
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    rounds: int = 1,
    device: str | None = None,
    dtype: str = "auto",
    energy: bool = True,
    revisions: Mapping[str, str] | None = None,
    quantized: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Figures of each of `models` (`{"teacher": a folder or a Hub id, "student": …}`), as JSON.

    Args:
        models: by name, folders (of a model or of adapters) or Hub ids. Ratios are to the one named `teacher`.
        variants: of `student`, packed by bitsandbytes: `4bit` (nf4), `8bit`.
        batch_sizes: sequences at a time.
        prompt_tokens: of each sequence, with `new_tokens` no more than the shortest context of all models.
        new_tokens: that are generated.
        repeats: timed runs in a process, after one that is not.
        rounds: processes for each model, in turn, there and back: with 2, what else the machine does falls on all
            alike. Each takes some seconds to start.
        device: `cuda` or `cpu`; by default the first that is there.
        dtype: of the weights; `auto` is as they are stored.
        energy: measure it, with codecarbon.
        revisions: of the models by name.
        quantized: models that are loaded as one of VARIANTS themselves, by name.
        trust_remote_code: run the code that comes with a model.

    Returns:
        `machine`, `settings` and `models`: of each name, and of `student, 4-bit` and `student, 8-bit`, `model`,
        `revision`, `architecture`, `dtype`, `bits`, `figures`, `skipped` (why something is not there) and
        `ratio_to_teacher`; or `model` and `error`. A figure is a number, or for each batch size a number or
        `{"median", "low", "high"}`: `parameters`, `active_parameters`, `bytes_on_disk` (of a variant: what saving would
        write), `weight_bytes`, `loading_memory_bytes`, `peak_memory_bytes`, those of TIMED, `joules_per_token`,
        `co2_grams_per_token`. What is not known is left out. `ratio_to_teacher` has the same shape, without the spread.

    Raises:
        ValueError: settings that cannot be.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    revisions, quantized = dict(revisions or {}), dict(quantized or {})
    _require_possible(models, variants, batch_sizes, prompt_tokens, new_tokens, repeats, rounds, revisions, quantized)
    checkpoints: dict[str, _Checkpoint | str] = {}
    for name, path in models.items():
        bits = VARIANTS.get(quantized.get(name, ""))
        checkpoints[name] = one = _find_or_reason(path, revisions.get(name), bits, trust_remote_code)
        if name == "student" and isinstance(one, _Checkpoint):
            checkpoints |= {f"student, {VARIANTS[v]}-bit": one._replace(bits=VARIANTS[v]) for v in variants}
    there = {name: one for name, one in checkpoints.items() if isinstance(one, _Checkpoint)}
    settings = {
        "prompt_tokens": _fitting(prompt_tokens, new_tokens, [one.context for one in there.values()]),
        "new_tokens": new_tokens,
        "batch_sizes": list(batch_sizes),
        "repeats": repeats,
        "dtype": dtype,
    }
    common = {"device": device, "threads": torch.get_num_threads(), "trust_remote_code": trust_remote_code, **settings}
    measured = _in_rounds(there, rounds, common, energy)
    found: dict[str, dict[str, Any]] = {
        name: _together(one, measured[name])
        if isinstance(one, _Checkpoint)
        else {"model": public_name(models[name]), "error": one}
        for name, one in checkpoints.items()
    }
    teacher = found.get("teacher", {}).get("figures")
    for each in found.values():
        if teacher and "figures" in each:
            each["ratio_to_teacher"] = _ratios(each["figures"], teacher)
    return {"machine": machine(device), "settings": settings | {"rounds": rounds}, "models": found}


def resources_table(found: dict[str, Any]) -> str:
    """What `measure_resources` returned as a Markdown table, each figure with its ratio to the teacher's, and in words
    what is missing.
    """
    models = {name: each for name, each in found["models"].items() if "figures" in each}
    lines = [f"| | {' | '.join(models)} |", f"|---|{'---:|' * len(models)}"]
    for name, (label, factor, style) in LABELS.items():
        sizes = {size: None for each in models.values() for size in _by_size(each["figures"].get(name, {}))}
        for size in sizes:
            cells = []
            for other, each in models.items():
                value = _by_size(each["figures"].get(name, {})).get(size)
                ratio = _by_size(each.get("ratio_to_teacher", {}).get(name, {})).get(size)
                beside = f" ({ratio:.2f} ×)" if ratio is not None and other != "teacher" else ""
                cells.append("" if value is None else f"{_middle(value) * factor:{style}}{beside}")
            lines.append(f"| {label}{size and f', batch {size}'} | {' | '.join(cells)} |")
    machine, settings = found["machine"], found["settings"]
    spreads = [
        (value["high"] - value["low"]) / value["median"]
        for each in models.values()
        for name in TIMED
        for value in each["figures"].get(name, {}).values()
    ]
    notes = [
        f"{machine['date']}, {machine['device']}, threads: {machine['threads']}. Prompts of "
        f"{settings['prompt_tokens']} tokens, {settings['new_tokens']} new ones, greedy. Medians of "
        f"{settings['repeats'] * settings['rounds']} runs, {settings['repeats']} in a process"
        + (f"; the most that highest and lowest are apart is {max(spreads):.0%} of the median." if spreads else ".")
    ]
    for name, each in found["models"].items():
        skipped = {"": each["error"]} if "error" in each else each["skipped"]
        notes += [f"Not measured: {name}{where and f', {where}'}: {why}." for where, why in skipped.items()]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _require_possible(
    models: Mapping[str, str],
    variants: Sequence[str],
    batch_sizes: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    rounds: int,
    revisions: Mapping[str, str],
    quantized: Mapping[str, str],
) -> None:
    if unknown := sorted({*variants, *quantized.values()} - set(VARIANTS)):
        raise ValueError(f"unknown variants {unknown}; there are {', '.join(VARIANTS)}.")
    if strangers := sorted({*revisions, *quantized} - set(models)):
        raise ValueError(f"revisions or quantized speak of {strangers}, and the models are {', '.join(models)}.")
    if variants and "student" not in models:
        raise ValueError(f"variants are of a model named `student`, and there is {list(models)}: pass variants=().")
    if variants and "student" in quantized:
        raise ValueError("a student that is quantized has no other variants: pass variants=().")
    if not batch_sizes or min(*batch_sizes, prompt_tokens, repeats, rounds) < 1 or new_tokens < 2:
        raise ValueError(
            "there must be at least one batch size, each at least 1, as prompt_tokens, repeats and rounds; new_tokens "
            f"at least 2. Got batch_sizes={list(batch_sizes)}, {prompt_tokens=}, {new_tokens=}, {repeats=}, {rounds=}."
        )


class _Checkpoint(NamedTuple):
    """A model before it is loaded."""

    paths: list[str]
    """As a person gave it; of adapters, then what they are for."""
    folders: list[Path]
    revision: str | None
    context: int | None
    bits: int | None

    def described(self) -> dict[str, Any]:
        commit = extract_commit_hash(str(self.folders[0] / "config.json"), None)
        return {"model": public_name(self.paths[0]), "revision": commit, "bits": self.bits}

    def bytes_on_disk(self) -> int | None:
        """Of the files that transformers reads; None where one of the folders has none (yet)."""
        sizes = [sum(path.stat().st_size for path in _weight_files(folder)) for folder in self.folders]
        return sum(sizes) if all(sizes) else None


def _find(name_or_path: str, revision: str | None, bits: int | None, trust_remote_code: bool) -> _Checkpoint:
    adapters = None
    with suppress(OSError, HFValidationError):  # what is neither a folder nor a repository, find_config says better
        adapters = find_adapter_config_file(name_or_path, revision=revision)
    if adapters is not None:
        said = json.loads(Path(adapters).read_text())
        base = _find(said["base_model_name_or_path"], said.get("revision"), bits, trust_remote_code)
        folders = [Path(adapters).parent, *base.folders]
        return base._replace(paths=[name_or_path, *base.paths], folders=folders, revision=revision)
    folder = Path(find_config(name_or_path, revision=revision)).parent
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    return _Checkpoint([name_or_path], [folder], revision, context, bits)


def _find_or_reason(
    name_or_path: str, revision: str | None, bits: int | None, trust_remote_code: bool
) -> _Checkpoint | str:
    try:
        return _find(name_or_path, revision, bits, trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return _one_line(error, name_or_path)


def _weight_files(folder: Path) -> list[Path]:
    kinds = ("model.safetensors", "pytorch_model.bin")
    if (folder / "adapter_config.json").is_file():
        kinds = ("adapter_model.safetensors", "adapter_model.bin")
    for kind in kinds:
        if (folder / kind).is_file():
            return [folder / kind]
        index = folder / f"{kind}.index.json"
        if index.is_file():
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            return files if all(path.is_file() for path in files) else []
    return []


def _fitting(prompt_tokens: int, new_tokens: int, contexts: Sequence[int | None]) -> int:
    """The prompt's length, the same for all models."""
    shortest = min((length for length in contexts if isinstance(length, int) and length > 0), default=None)
    if shortest is None:
        return prompt_tokens
    if new_tokens >= shortest:
        raise ValueError(f"new_tokens={new_tokens} leaves no room for a prompt in a context of {shortest}.")
    return min(prompt_tokens, shortest - new_tokens)


def _in_rounds(
    checkpoints: dict[str, _Checkpoint], rounds: int, common: dict[str, Any], energy: bool
) -> dict[str, list[dict[str, Any]]]:
    """What each process found, by model. One that has failed is not tried again; energy is measured once."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in checkpoints}
    order = [(turn, name) for turn in range(rounds) for name in list(checkpoints)[:: -1 if turn % 2 else 1]]
    bar = tqdm(order, leave=False)
    for turn, name in bar:
        bar.set_description(f"Resources: {name}")
        if not any("error" in result for result in measured[name]):
            measured[name].append(_measure(checkpoints[name], {**common, "energy": energy and turn == 0}))
    return measured


def _measure(one: _Checkpoint, task: dict[str, Any]) -> dict[str, Any]:
    """One round of one model, in its own process."""
    weights, free = one.bytes_on_disk(), available_memory(task["device"])
    if weights and not one.bits and not is_cuda(task["device"]) and weights > free:
        return {"error": f"does not fit into memory: {weights / 2**30:,.1f} GiB, and {free / 2**30:,.1f} are free"}
    libraries = [*(["peft"] if len(one.paths) > 1 else []), *(["bitsandbytes"] if one.bits else [])]
    own = {"name": one.paths[0], "revision": one.revision, "bits": one.bits, "libraries": libraries}
    return in_fresh_process(["-m", "llm_distill.evaluation.inference"], {**task, **own})


def _together(one: _Checkpoint, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rounds of one model as one."""
    if "error" in measured[-1]:
        return one.described() | {"error": _one_line(measured[-1]["error"], *one.paths)}
    pooled: dict[str, dict[str, list[float]]] = {}
    for result in measured:
        for name, value in result["figures"].items():
            for size, each in _by_size(value).items():
                found = each if isinstance(each, list) else [each]
                pooled.setdefault(name, {}).setdefault(size, []).extend(found)
    figures: dict[str, Any] = {}
    for name, by_size in pooled.items():
        together = {size: _spread(each) if name in TIMED else max(each) for size, each in by_size.items()}
        figures[name] = together.get("", together)
    figures["bytes_on_disk"] = figures["weight_bytes"] if one.bits else one.bytes_on_disk()
    return {
        **one.described(),
        **{name: measured[0][name] for name in ("architecture", "dtype")},
        "figures": {name: figures[name] for name in LABELS if figures.get(name) is not None},
        "skipped": {where: why for result in measured for where, why in result["skipped"].items()},
    }


def _by_size(value: Any) -> dict[str, Any]:
    """A figure by batch size, one that does not depend on it under `""`."""
    return value if isinstance(value, dict) else {} if value is None else {"": value}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def _middle(value: Any) -> float:
    return value["median"] if isinstance(value, dict) else value


def _ratios(figures: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """Figure by figure, where both have it and the teacher's is not 0."""
    ratios: dict[str, Any] = {}
    for name, value in figures.items():
        theirs = _by_size(teacher.get(name))
        ratio = {
            size: _middle(each) / _middle(theirs[size]) for size, each in _by_size(value).items() if theirs.get(size)
        }
        if ratio:
            ratios[name] = ratio.get("", ratio)
    return ratios


def _one_line(error: object, *paths: str) -> str:
    """Without the folders that a person gave."""
    text = " ".join(str(error).split())
    for path in paths:
        text = text.replace(path, public_name(path) or path)
    return text[:300].rstrip(".")
