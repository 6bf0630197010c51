"""`llm-distill prune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.data.load import HELD_OUT, load_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llm_distill.models import LanguageModel
    from llm_distill.students.choose import Blocks
    from llm_distill.students.options import PruneConfig
    from llm_distill.students.target import Shape


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

    require_output_folder(config.output_dir, {"the model": config.model, "the calibration": config.calibration})
    require_unused(Path(config.output_dir))
    dataset = load_split(config.calibration, preferred=("train", *HELD_OUT))
    teacher = _load(config)
    shapes = _shapes(config, teacher.model)

    from llm_distill.data.calibration import calibration_blocks
    from llm_distill.students.choose import mean_loss
    from llm_distill.students.smaller import save_smaller

    tokenizer = teacher.require_tokenizer("model")
    blocks = calibration_blocks(dataset, tokenizer, config.calibration_texts, config.calibration_length)
    loss = mean_loss(teacher.model, blocks)
    made = _make(config, teacher.model, shapes, blocks)
    name, student, record = min(made, key=lambda each: each[2]["loss"]["student"])
    record |= {
        "model": teacher.describe(),
        "calibration": {"name": config.calibration, "tokens": sum(ids.numel() for ids in blocks)},
        "loss": {"model": loss, **record["loss"]},
    }
    save_smaller(student, tokenizer, config.output_dir, record)
    rows = [("model", teacher.model, loss), *((shape, model, told["loss"]["student"]) for shape, model, told in made)]
    print(f"\n{_table(rows)}\n\nKept{f' ({name})' if len(made) > 1 else ''}: layers {_spans(record['layers'])}.")


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
    from llm_distill.models import decoder_layers
    from llm_distill.students.choose import require_count
    from llm_distill.students.cut import require_layers_once
    from llm_distill.students.target import Shape, parse_amount, propose_shapes

    total = len(decoder_layers(model))
    for name, text in config.goals.items():
        unit = {"target": model.num_parameters(), "params": 1, "bytes": 1 / model.dtype.itemsize}[name]
        return propose_shapes(model, int(parse_amount(name, text) * unit))
    if len(config.layers) > 1:
        require_layers_once(config.layers, total)
    elif config.layers:
        require_count(config.layers[0], total)
    layers = len(config.layers) if len(config.layers) > 1 else next(iter(config.layers), total)
    return [Shape("student", layers, config.sizes, 0)]


def _make(
    config: PruneConfig, model: PreTrainedModel, shapes: Sequence[Shape], blocks: Blocks
) -> list[tuple[str, PreTrainedModel, dict[str, Any]]]:
    """A student of each shape, and what was taken."""
    from llm_distill.models import decoder_layers
    from llm_distill.students.choose import layers_kept, mean_loss, measure_layers
    from llm_distill.students.cut import cut_layers
    from llm_distill.students.prune import prune_widths

    total, fewest = len(decoder_layers(model)), min(shape.layers for shape in shapes)
    is_chosen = len(config.layers) <= 1 and fewest < total
    measured = measure_layers(model, fewest, config.method, blocks) if is_chosen else {"method": "even"}
    made = []
    for shape in shapes:
        keep = config.layers if len(config.layers) > 1 else layers_kept(measured, total, shape.layers)
        student = cut_layers(model, keep)
        activity: dict[str, list[float]] = {}
        if shape.sizes:
            student, activity = prune_widths(student, shape.sizes, blocks)
        told = {"layers": keep, **(measured if is_chosen else {}), "widths": shape.sizes, "activity": activity}
        told["loss"] = {"student": mean_loss(student, blocks)}
        made.append((shape.name, student, told))
    return made


def _table(rows: Sequence[tuple[str, PreTrainedModel, float]]) -> str:
    from llm_distill.models import decoder_layers, millions
    from llm_distill.tables import Table

    header = ["", "layers", "hidden", "neurons", "heads", "parameters", "size", "loss before training"]
    lines = []
    for name, model, loss in rows:
        text = model.config.get_text_config()
        widths = [getattr(text, width, "") for width in ("hidden_size", "intermediate_size", "num_attention_heads")]
        size = model.num_parameters() * model.dtype.itemsize / 1e6
        shape = [len(decoder_layers(model)), *widths, millions(model.num_parameters()), f"{size:,.3g} MB"]
        lines.append([name, *shape, f"{loss:.3f}"])
    return Table(header, lines).markdown()


def _spans(numbers: Sequence[int]) -> str:
    """1-5, 7, 9-12."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)
