"""On-policy distillation after an off-policy start: every option of `llm-distill train`, on as many ranks as you like.

    accelerate launch recipes/on_policy.py --config run.yaml --on_policy_share 1

What an untrained student writes is not worth its teacher's time. So where no student is named, on the embedded corpus,
the demo's teacher (trained on the first call) first teaches on the corpus's own text, and then on what the student
writes after the beginnings of files. With options it is the second part, of the student that they name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from demo import as_options, use_all_cores
from token_kl import embedded_defaults

from llm_distill.cli.train import train
from llm_distill.data.corpus import load_corpus

FOLDER = Path("runs", "on_policy")
START, TEACHER = FOLDER / "start", Path("runs", "demo", "teacher")
WRITING = {"max_completion_length": 48, "sampling_temperature": 1.0}
LEARNING = {
    "model_name_or_path": START,
    "teacher_model_name_or_path": TEACHER,
    "divergence": "reverse_kl",
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "max_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
}


def start_off_policy() -> Path:
    """A student that has learned from the corpus's own text, in START, if an earlier run has not left it there; and the
    file of prompts that it goes on from.
    """
    if not (START / "model.safetensors").is_file():
        train([*embedded_defaults(), *as_options({"output_dir": START, "max_steps": 80})])
    prompts = FOLDER / "prompts.jsonl"
    if PartialState().is_main_process:
        texts = load_corpus(max_characters=2_000_000)["train"]["text"]
        Dataset.from_dict({"prompt": [text[:60] for text in texts]}).to_json(prompts)
    PartialState().wait_for_everyone()
    return prompts


def embedded() -> list[str]:
    """Options of the second part."""
    data = {"dataset_name": start_off_policy(), "output_dir": FOLDER / "student", "on_policy_share": 1.0}
    return as_options(LEARNING | WRITING | data)


if __name__ == "__main__":
    use_all_cores()
    options = sys.argv[1:]
    named = {option.split("=")[0] for option in options} & {"--config", "--model_name_or_path", "--help", "-h"}
    train(options if named else [*embedded(), *options])
