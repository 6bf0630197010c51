"""`llm-distill prune`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.data.load import HELD_OUT, load_split

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llm_distill.models import LanguageModel
    from llm_distill.students.choose import Blocks
    from llm_distill.students.options import PruneConfig
    from llm_distill.students.target import Shape

SEARCH_FILE = "search.json"
"""In the folder of a student whose shape is searched for: what was tried."""
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads")
"""Of the table."""


@errors_in_one_line
def prune(argv: Sequence[str]) -> None:
    """Makes a student from its teacher: `llm-distill prune`, and `recipes/prune.py`."""
    (config,) = parse("prune", argv)
    make_student(config)
    print(
        f"The student is in {config.output_dir}. Have it taught: llm-distill train --model_name_or_path "
        f"{config.output_dir} --teacher_model_name_or_path {config.model} --dataset_name …"
    )


def make_student(config: PruneConfig) -> None:
    """Writes the student that the options describe, and shows what else was tried."""
    from llm_distill.publish.folder import require_output_folder, require_unused

    assert config.output_dir is not None, "PruneConfig has seen it"

    folder = Path(config.output_dir)
    require_output_folder(folder, {"the model": config.model, "the calibration": config.calibration})
    require_unused(folder)
    dataset = load_split(config.calibration, preferred=("train", *HELD_OUT))
    teacher = _load(config)

    from llm_distill.files import write_atomically
    from llm_distill.students.choose import mean_loss
    from llm_distill.students.smaller import save_smaller
    from llm_distill.students.speed import measure_speed
    from llm_distill.students.target import Shape

    path, settings = folder / SEARCH_FILE, _settings(config, teacher)
    log = _read_log(path, settings) if config.search else None
    shapes = [Shape(**shape) for shape in log["shapes"]] if log else _shapes(config, teacher.model)
    tokenizer = teacher.require_tokenizer("model")
    texts = _texts(config, dataset, tokenizer)
    make = _maker(config, teacher.model, shapes, texts.measured)
    rows: list[dict[str, Any]] = log["rows"] if log else []
    whole = {"name": "model", "loss": mean_loss(teacher.model, texts.held_out), **_figures(teacher.model)}
    whole |= measure_speed(teacher.model)._asdict()
    best: tuple[PreTrainedModel, dict[str, Any]] | None = None
    for shape in shapes[len(rows) :]:
        made = make(shape)
        rows.append(_try(shape, made[0], teacher.model, texts))
        if _loss_of(rows[-1]) == min(map(_loss_of, rows)):
            best = made
        if config.search:
            log = {"settings": settings, "shapes": [shape._asdict() for shape in shapes], "rows": rows}
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(log, indent=2) + "\n").encode())
            print(f"\n{_table([whole, *rows])}\n", flush=True)
    kept = min(rows, key=_loss_of)
    student, record = best or make(shapes[rows.index(kept)])
    record |= {
        "model": teacher.describe(),
        "calibration": {"name": config.calibration, "tokens": sum(ids.numel() for ids in texts.measured)},
        "loss": {"model": whole["loss"], "student": kept["loss"]},
    }
    save_smaller(student, tokenizer, folder, record)
    name = f" ({kept['name']})" if len(rows) > 1 else ""
    print(f"\n{_table([whole, *rows])}\n\nKept{name}: layers {_spans(record['layers'])}.")


class Texts(NamedTuple):
    """Calibration texts."""

    measured: Blocks
    """By which layers and widths are chosen."""
    held_out: Blocks
    """By which shapes are compared; those that were measured, where nothing is taught."""
    taught: Blocks
    """A batch for each step of a search."""


def _texts(config: PruneConfig, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Raises ValueError if there are too few."""
    import torch

    from llm_distill.data.calibration import BATCH, calibration_blocks

    count, length = config.calibration_texts, config.calibration_length
    if not config.search:
        blocks = calibration_blocks(dataset, tokenizer, count, length)
        return Texts(blocks, blocks, [])
    needed = BATCH * config.search_steps
    ids = torch.cat(calibration_blocks(dataset, tokenizer, count + max(count, needed), length))
    held_out, others = ids.tensor_split([min(count, len(ids) // 4)])
    if not len(held_out):
        raise ValueError(
            f"a search teaches on some texts and compares on others, and {config.calibration!r} has {len(ids)} "
            f"blocks of {length} tokens: give more texts, or a smaller calibration_length."
        )
    taught = others[torch.arange(needed) % len(others)]
    return Texts(others[:count].split(BATCH), held_out.split(BATCH), taught.split(BATCH))


def _settings(config: PruneConfig, teacher: LanguageModel) -> dict[str, Any]:
    """What must be the same for a search to go on."""
    options = {name: value for name, value in asdict(config).items() if name not in ("output_dir", "model")}
    return {"model": teacher.describe(), **options}


def _read_log(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a killed search has left. Raises ValueError if that was of other options."""
    from llm_distill.files import differences, read_json

    if not path.is_file():
        return None
    log = read_json(path)
    if changes := differences(log["settings"], settings, path.name, ignore_missing=False):
        raise ValueError(f"{'; '.join(changes)}. Go on with the same options, or choose another output_dir.")
    return log


def _try(shape: Shape, student: PreTrainedModel, model: PreTrainedModel, texts: Texts) -> dict[str, Any]:
    """What a student is worth, as a row; itself it stays as it is."""
    from llm_distill.students.choose import mean_loss
    from llm_distill.students.heal import heal
    from llm_distill.students.speed import measure_speed

    row = {"name": shape.name, **_figures(student), "loss": mean_loss(student, texts.held_out)}
    row |= measure_speed(student)._asdict()
    if texts.taught:
        healed = copy.deepcopy(student)
        heal(healed, model, texts.taught)
        row["taught"] = mean_loss(healed, texts.held_out)
    return row


def _loss_of(row: dict[str, Any]) -> float:
    return row.get("taught", row["loss"])


def _load(config: PruneConfig) -> LanguageModel:
    """The model that the student is made from.

    Raises:
        ValueError: it cannot be loaded, comes without a tokenizer, is quantised, or is a folder of adapters.
    """
    from llm_distill.loading import find_adapters, load_config
    from llm_distill.models import LanguageModel
    from llm_distill.students.saving import require_savable
    from llm_distill.students.smaller import require_unquantized

    assert config.model is not None, "PruneConfig has seen it"
    if find_adapters(config.model, revision=config.revision) is not None:
        raise ValueError(
            f"{config.model!r} is a folder of adapters: merge them into their model first "
            "(AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)), and prune that."
        )
    hub = {} if config.revision is None else {"revision": config.revision}
    require_unquantized(load_config(config.model, config.trust_remote_code, **hub), config.model)
    teacher = LanguageModel.load(
        config.model, revision=config.revision, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    require_savable(teacher.model, teacher.require_tokenizer("model"))
    teacher.model.eval()
    return teacher


def _shapes(config: PruneConfig, model: PreTrainedModel) -> list[Shape]:
    """What the options ask for, or may be to reach a size. Raises ValueError for what cannot be."""
    from llm_distill.models import decoder_layers, millions
    from llm_distill.students.choose import require_count
    from llm_distill.students.cut import require_layers_once
    from llm_distill.students.speed import Latency
    from llm_distill.students.target import Shape, count_parameters, parse_amount, propose_shapes, search_shapes

    total = len(decoder_layers(model))
    for name, text in config.goals.items():
        amount, unit = parse_amount(name, text)
        cost, write = (Latency(), "{:.3g} ms a token".format) if name == "latency" else (count_parameters, millions)
        limit = amount * {"x": cost(model, total, {}), "b": 1 / model.dtype.itemsize}.get(unit, 1)
        if config.search:
            return search_shapes(model, limit, config.search, cost, write)
        return propose_shapes(model, limit, cost, write)
    if len(config.layers) > 1:
        require_layers_once(config.layers, total)
    elif config.layers:
        require_count(config.layers[0], total)
    layers = len(config.layers) if len(config.layers) > 1 else next(iter(config.layers), total)
    if layers == total and not config.sizes:
        raise ValueError(f"layers={total} keeps all layers of the model: nothing would be taken.")
    return [Shape("student", layers, config.sizes, 0)]


def _maker(
    config: PruneConfig, model: PreTrainedModel, shapes: Sequence[Shape], blocks: Blocks
) -> Callable[[Shape], tuple[PreTrainedModel, dict[str, Any]]]:
    """What makes a student of a shape, and tells what was taken."""
    from llm_distill.models import decoder_layers
    from llm_distill.students.choose import layers_kept, measure_layers
    from llm_distill.students.cut import cut_layers
    from llm_distill.students.prune import prune_widths

    total, fewest = len(decoder_layers(model)), min(shape.layers for shape in shapes)
    is_chosen = len(config.layers) <= 1 and fewest < total
    measured = measure_layers(model, fewest, config.method, blocks) if is_chosen else {"method": "even"}

    def make(shape: Shape) -> tuple[PreTrainedModel, dict[str, Any]]:
        keep = config.layers if len(config.layers) > 1 else layers_kept(measured, total, shape.layers)
        student = cut_layers(model, keep)
        activity: dict[str, list[float]] = {}
        if shape.sizes:
            student, activity = prune_widths(student, shape.sizes, blocks)
        return student, {
            "layers": keep,
            **(measured if is_chosen else {}),
            "widths": shape.sizes,
            "activity": activity,
        }

    return make


def _figures(model: PreTrainedModel) -> dict[str, Any]:
    """Its shape and size."""
    from llm_distill.models import decoder_layers
    from llm_distill.students.speed import parameters_read

    text = model.config.get_text_config()
    widths = {width: getattr(text, width, "") for width in WIDTHS}
    return {
        "layers": len(decoder_layers(model)),
        **widths,
        "parameters": model.num_parameters(),
        "parameters_read": parameters_read(model),
        "bytes": model.num_parameters() * model.dtype.itemsize,
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """The first row is the model's. Writing is estimated to be as fast as the weights are read."""
    from llm_distill.models import millions
    from llm_distill.tables import Table

    header = ["", "layers", "hidden", "neurons", "heads", "parameters", "size"]
    header += ["reads tokens/s", "writes, estimated", "writes tokens/s", "loss before training"]
    is_taught, lines = any("taught" in row for row in rows), []
    for row in rows:
        estimate = rows[0]["decode"] * rows[0]["parameters_read"] / row["parameters_read"]
        shape = [row["layers"], *(row[width] for width in WIDTHS), millions(row["parameters"])]
        speed = [f"{rate:,.3g}" for rate in (row["prefill"], estimate, row["decode"])]
        taught = [f"{row['taught']:.3f}" if "taught" in row else ""] if is_taught else []
        lines.append([row["name"], *shape, f"{row['bytes'] / 1e6:,.3g} MB", *speed, f"{row['loss']:.3f}", *taught])
    return Table([*header, *(["taught a little"] if is_taught else [])], lines).markdown()


def _spans(numbers: Sequence[int]) -> str:
    """1-5, 7, 9-12."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)
