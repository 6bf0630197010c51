"""A cache of a live teacher's answers to the rows of the golden runs."""

from __future__ import annotations

from pathlib import Path

from tiny import make_config, tiny_llama
from transformers import PreTrainedTokenizerBase
from worker import make_rows

from llm_distill import DistillationTrainer, LiveTeacher, TeacherCache
from llm_distill.cache.methods import make_method
from llm_distill.capture.run import capture

PARAMETERS = {"top_k": {"k": 20}, "hybrid": {}, "hidden": {"dtype": "float32"}}
MASKED = [2, 3, 9]


def filled_cache(folder: Path, tokenizer: PreTrainedTokenizerBase, teacher: LiveTeacher, method: str) -> TeacherCache:
    trainer = DistillationTrainer(
        model=tiny_llama(1, hidden=16).double(),
        teacher=teacher,
        args=make_config(folder / "out", dataset_kwargs={"skip_prepare_dataset": True}, max_length=None),
        train_dataset=make_rows(MASKED),
        eval_dataset=make_rows([]).select(range(5)),
        processing_class=tokenizer,
    )
    return capture(teacher, trainer.data, folder / "cache", make_method(method, **PARAMETERS[method]))
