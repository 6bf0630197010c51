"""What a person can choose of a gap report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

BUILT_IN, NONE = "built-in", "none"


@dataclass
class EvaluateConfig:
    """Options of `llm-distill evaluate`.

    Raises:
        ValueError: something is missing, out of range or without effect beside the others.
    """

    student: str | None = field(default=None, metadata={"help": "The student: a Hub id or a folder, adapters too."})
    teacher: str | None = field(default=None, metadata={"help": "Its teacher: a Hub id or a folder."})
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "A model to hold the student against, such as the same one trained on the text alone, or before "
            "training: then the share of the gap to the teacher is given that the student closes."
        },
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Held-out datasets, each a domain: NAME=SOURCE, or SOURCE alone. A source is a Hub id, a folder, a "
            "file, or `stdlib`; text, prompt/completion and chat, as for training. SOURCE:SPLIT names the split "
            "(by default test, validation or train, whichever comes first)."
        },
    )
    output_dir: str = field(
        default="gap_report", metadata={"help": "Where report.json, report.md, report.html and the plots go."}
    )
    max_texts: int = field(
        default=1000, metadata={"help": "How many texts of each domain are drawn, from all over it; 0 takes all."}
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "How many tokens are read at a time; fewer where the context of a model is shorter."},
    )
    batch_size: int = field(default=8, metadata={"help": "How many texts are in a forward."})
    dtype: str = field(
        default="auto",
        metadata={"help": "The models run in float32, bfloat16, float16 or, with auto, as they are stored."},
    )
    student_revision: str | None = field(default=None, metadata={"help": "The student's branch, tag or commit."})
    teacher_revision: str | None = field(default=None, metadata={"help": "The teacher's branch, tag or commit."})
    baseline_revision: str | None = field(default=None, metadata={"help": "The baseline's branch, tag or commit."})
    teacher_load_in_4bit: bool = field(default=False, metadata={"help": "Load the teacher in 4 bits (bitsandbytes)."})
    teacher_load_in_8bit: bool = field(default=False, metadata={"help": "Load the teacher in 8 bits (bitsandbytes)."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that lies in the models' repositories. Read it first."}
    )
    assistant_only_loss: bool = field(
        default=False,
        metadata={"help": "Score the assistant's turns of a chat alone, which the chat template must mark."},
    )
    generations: int = field(
        default=64,
        metadata={"help": "How many prompts of each domain the models answer, greedily, beside each other."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "How many tokens an answer may have."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Run these tasks of lm-evaluation-harness, such as `arc_easy gsm8k`."},
    )
    task_limit: int | None = field(
        default=None, metadata={"help": "How many examples of each task are run, by default all."}
    )
    task_path: str | None = field(default=None, metadata={"help": "This folder has tasks of your own, as YAML."})
    bias: str = field(
        default=BUILT_IN,
        metadata={
            "help": "Compare how likely sentences are that differ in one group word: `built-in` pairs, those of a CSV "
            "or JSON file with the columns first, second and category, or `none`."
        },
    )
    resources: bool = field(
        default=True, metadata={"help": "Measure memory, speed and energy of the models on this machine."}
    )
    resource_batch_sizes: list[int] = field(
        default_factory=lambda: [1, 4, 16],
        metadata={"help": "How many texts at once the models read in those measurements."},
    )
    quantized: bool = field(
        default=True, metadata={"help": "Measure the student in 4 and in 8 bits too, where bitsandbytes can."}
    )
    seed: int = field(default=0, metadata={"help": "The same seed draws the same texts."})

    def __post_init__(self) -> None:
        for name in ("student", "teacher"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: a Hub id or a folder.")
        if not self.data:
            raise ValueError("--data is missing: one or more datasets, such as `--data stdlib code=my.jsonl`.")
        for name in ("max_length", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("max_texts", "generations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not self.resource_batch_sizes or min(self.resource_batch_sizes) < 1:
            raise ValueError(f"resource_batch_sizes must be at least 1 each, got {self.resource_batch_sizes}.")
        without_effect = {
            "baseline_revision (there is no baseline)": self.baseline_revision is not None and self.baseline is None,
            "teacher_load_in_8bit (teacher_load_in_4bit is chosen)": self.teacher_load_in_4bit
            and self.teacher_load_in_8bit,
            "task_limit, task_path (there are no tasks)": (self.task_limit or self.task_path) and not self.tasks,
            "max_new_tokens (generations is 0)": self.max_new_tokens != 128 and not self.generations,
            "quantized, resource_batch_sizes (resources is off)": not self.resources
            and (not self.quantized or self.resource_batch_sizes != [1, 4, 16]),
        }
        if refused := [name for name, is_set in without_effect.items() if is_set]:
            raise ValueError(f"without effect here, so refused: {'; '.join(refused)}.")
        if len(set(self.domains())) < len(self.data):
            raise ValueError(f"each domain needs a name of its own: NAME=SOURCE, got {' '.join(self.data)}.")

    def domains(self) -> dict[str, str]:
        """Name and source of each dataset."""
        pairs = (entry.split("=", 1) if "=" in entry else (entry, entry) for entry in self.data)
        return {Path(name).name if Path(name).exists() else name: source for name, source in pairs}
