"""What a person can choose of a gap report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_distill.evaluation.stages import require_stages
from llm_distill.options import Options, option

BUILT_IN, NONE = "built-in", "none"


@dataclass
class EvaluateConfig(Options):
    """Options of `llm-distill evaluate`.

    Raises:
        ValueError: something is missing, out of range or without effect beside the others.
    """

    heading = "the report"

    student: str | None = option(None, "The student is this model: a Hub id or a folder, adapters too.")
    teacher: str | None = option(None, "Its teacher is this model: a Hub id or a folder.")
    baseline: str | None = option(
        None,
        "The student is held against this model too, such as the same one before training, or trained on the text "
        "alone. The report then says which share of the gap to the teacher the student closes.",
    )
    previous: list[str] = option(
        [],
        "The same student after earlier stages of its training, in their order, each a Hub id or a folder: the report "
        "then has its loss on every domain after every stage, and what was forgotten. The domains are in the order in "
        "which they were learned.",
    )
    data: list[str] = option(
        [],
        "Each held-out dataset is a domain: NAME=SOURCE, or SOURCE alone. A source is a Hub id, a folder, a file, or "
        "`stdlib`, with text, prompt/completion or chat, as for training. SOURCE:SPLIT names the split (by default "
        "test, validation or train, whichever comes first).",
    )
    output_dir: str = option("gap_report", "report.json, report.md, report.html and the plots go to this folder.")
    max_texts: int = option(
        1000, "This many texts of each domain are read, drawn from all over it. 0 reads all.", at_least=0
    )
    max_length: int = option(
        1024, "This many tokens of a text are read, and at most as many as every model can.", at_least=1
    )
    batch_size: int = option(8, "A forward reads this many texts.", at_least=1)
    dtype: str = option("auto", "The models run in auto (as they are stored), float32, bfloat16 or float16.")
    student_revision: str | None = option(None, "The student is of this branch, tag or commit.")
    teacher_revision: str | None = option(None, "The teacher is of this branch, tag or commit.")
    baseline_revision: str | None = option(None, "The baseline is of this branch, tag or commit.", needs="baseline")
    teacher_load_in_4bit: bool = option(False, "The teacher is loaded in 4 bits (bitsandbytes).")
    teacher_load_in_8bit: bool = option(
        False, "The teacher is loaded in 8 bits (bitsandbytes).", needs={"teacher_load_in_4bit": (False,)}
    )
    trust_remote_code: bool = option(False, "Code that lies in the models' repositories is run. Read it first.")
    assistant_only_loss: bool = option(
        False, "Of chats, only the assistant's turns are scored. The chat template must mark them."
    )
    generations: int = option(
        64,
        "The models answer this many prompts of each domain, greedily, beside each other. 0 leaves this out.",
        at_least=0,
    )
    max_new_tokens: int = option(128, "An answer has at most this many tokens.", needs="generations", at_least=1)
    layers: bool = option(
        True, "Each layer of the student is compared with each of the teacher's, by linear CKA on a thousand tokens."
    )
    tasks: list[str] = option(
        [], "The models solve these tasks of lm-evaluation-harness (pip install lm_eval), such as `arc_easy gsm8k`."
    )
    task_limit: int | None = option(None, "Each task has this many examples. By default it has all.", needs="tasks")
    task_path: str | None = option(None, "Tasks of your own lie in this folder, as YAML.", needs="tasks")
    bias: str = option(
        BUILT_IN,
        "Bias is measured on pairs of sentences that differ in one group word: `built-in`, a CSV or JSON file with the "
        "columns first, second and category, or `none`.",
    )
    resources: bool = option(True, "Memory, speed and energy of the models are measured on this machine.")
    resource_batch_sizes: list[int] = option(
        [1, 4, 16], "Those measurements take this many texts at once.", needs="resources", at_least=1
    )
    resource_seconds: int = option(
        20, "Each model is timed for about this many seconds, once it is loaded.", needs="resources", at_least=1
    )
    quantized: bool = option(
        True,
        "Those measurements are taken of the student in 4 and in 8 bits too, where bitsandbytes can.",
        needs="resources",
    )
    seed: int = option(0, "The texts are drawn from this random seed.")

    def __post_init__(self) -> None:
        for name in ("student", "teacher"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: a Hub id or a folder.")
        if not self.data:
            raise ValueError("--data is missing: one or more datasets, such as `--data stdlib code=my.jsonl`.")
        super().__post_init__()
        if len(set(self.domains()) - {""}) < len(self.data) or not all(self.domains().values()):
            raise ValueError(
                f"each domain needs a name of its own and a source: NAME=SOURCE, got {' '.join(self.data)}."
            )

        if self.previous:
            require_stages(len(self.previous) + 1, len(self.data))

    def domains(self) -> dict[str, str]:
        """Name and source of each dataset."""
        pairs = (source.split("=", 1) if "=" in source else (source, source) for source in self.data)
        return {Path(name).name if Path(name).exists() else name: source for name, source in pairs}
