"""`llm-distill prune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.data.load import HELD_OUT, load_split

if TYPE_CHECKING:
    from llm_distill.models import LanguageModel
    from llm_distill.students.options import PruneConfig


@errors_in_one_line
def prune(argv: Sequence[str]) -> None:
    """Makes a student from its teacher: `llm-distill prune`, and `recipes/prune.py`."""
    (config,) = parse("prune", argv)
    from llm_distill.publish.folder import require_output_folder, require_unused

    require_output_folder(config.output_dir, {"the model": config.model, "the calibration": config.calibration})
    require_unused(Path(config.output_dir))
    dataset = load_split(config.calibration, preferred=("train", *HELD_OUT))
    teacher = _load(config)

    from llm_distill.data.calibration import calibration_blocks
    from llm_distill.models import millions
    from llm_distill.students.choose import Choice, choose_layers, mean_loss, require_count
    from llm_distill.students.cut import cut_layers, require_layers_once
    from llm_distill.students.smaller import save_smaller
    from llm_distill.tables import Table

    total = teacher.model.config.get_text_config().num_hidden_layers
    if len(config.layers) > 1:
        require_layers_once(config.layers, total)
    else:
        require_count(config.layers[0], total)
    blocks = calibration_blocks(
        dataset, teacher.require_tokenizer("model"), config.calibration_texts, config.calibration_length
    )
    if len(config.layers) > 1:
        choice = Choice(config.layers, {})
    else:
        choice = choose_layers(teacher.model, config.layers[0], config.method, blocks)
    student = cut_layers(teacher.model, choice.keep)
    losses = [mean_loss(model, blocks) for model in (teacher.model, student)]
    record = {
        "model": teacher.describe(),
        "layers": choice.keep,
        "method": config.method if len(config.layers) == 1 else "list",
        **choice.figures,
        "calibration": {"name": config.calibration, "tokens": sum(ids.numel() for ids in blocks)},
        "loss": dict(zip(("model", "student"), losses, strict=True)),
        "parameters": student.num_parameters(),
    }
    save_smaller(student, teacher.require_tokenizer("model"), config.output_dir, record)
    rows = [
        [name, len_layers, millions(model.num_parameters()), f"{loss:.3f}"]
        for name, len_layers, model, loss in zip(
            ("model", "student"), (total, len(choice.keep)), (teacher.model, student), losses, strict=True
        )
    ]
    print(f"\n{Table(['', 'layers', 'parameters', 'loss before training'], rows).markdown()}\n")
    print(f"Kept: {' '.join(map(str, choice.keep))}")
    print(
        f"The student is in {config.output_dir}. Have it taught: llm-distill train --model_name_or_path "
        f"{config.output_dir} --teacher_model_name_or_path {config.model} --dataset_name …"
    )


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
