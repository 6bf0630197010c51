"""The teacher reads more than the student: passages of a library, which BM25 finds for each prompt, for it alone.

    accelerate launch recipes/privileged_context.py --rows rows.jsonl --library library.jsonl --config run.yaml

rows.jsonl has `prompt` and `completion` (texts, or lists of messages), library.jsonl has `text`. Each row gets a
`teacher_prompt`: the passages that are most like its prompt, and then the prompt. All other options are those of
`llm-distill train`, of whose data `dataset_name` is made here. Rows that have a `teacher_prompt` need no library, and
not this recipe.

With no argument it runs on the embedded corpus, as self-distillation: the demo's teacher (trained on the first call)
reads code from other files before a piece of code, and its own copy with LoRA adapters learns what that tells it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bm25s
from accelerate import PartialState
from datasets import Dataset, load_dataset
from demo import use_all_cores
from token_kl import embedded_defaults

from llm_distill.cli.train import train
from llm_distill.data.corpus import load_corpus

FOLDER = Path("runs", "privileged_context")
PASSAGE, PROMPT, COMPLETION = 100, 60, 40
"""Characters of the embedded run, whose teacher reads 128 tokens."""


def add_passages(rows: Dataset, library: Dataset, passages: int) -> Dataset:
    """The rows with a `teacher_prompt`: so many passages of the library, the likeliest first, before the prompt."""
    index = bm25s.BM25(corpus=list(library["text"]))
    index.index(bm25s.tokenize(list(library["text"]), show_progress=False), show_progress=False)
    queries = bm25s.tokenize([question_of(prompt) for prompt in rows["prompt"]], show_progress=False)
    found = index.retrieve(queries, k=passages, return_as="documents", show_progress=False)
    return rows.map(lambda row, number: {"teacher_prompt": put_before("\n\n".join(found[number]), row["prompt"])},
                    with_indices=True, desc="Passages")  # fmt: skip


def question_of(prompt: Any) -> str:
    """A text, or what the last turn of a conversation says."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def put_before(text: str, prompt: Any) -> Any:
    """The prompt with a text before it; of a conversation, before what its last turn says."""
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    return [*prompt[:-1], prompt[-1] | {"content": f"{text}\n\n{prompt[-1]['content']}"}]


def embedded_data() -> tuple[Dataset, Dataset]:
    """Prompts and completions of some files of the corpus, and passages of the others."""
    files = load_corpus(max_characters=400_000)["train"]["text"]

    def pieces(texts: list[str], size: int) -> Iterator[str]:
        for text in texts:
            yield from (text[start : start + size] for start in range(0, len(text) - size, size))

    asked = [{"prompt": part[:PROMPT], "completion": part[PROMPT:]} for part in pieces(files[::2], PROMPT + COMPLETION)]
    return Dataset.from_list(asked[:400]), Dataset.from_dict({"text": list(pieces(files[1::2], PASSAGE))})


def embedded_options() -> list[str]:
    """Options for a small run without downloads."""
    defaults = embedded_defaults()  # makes the teacher
    teacher = defaults[defaults.index("--teacher_model_name_or_path") + 1]
    options = {
        "model_name_or_path": teacher,
        "use_peft": True,
        "teacher_adapters_off": True,
        "output_dir": FOLDER / "student",
        "max_steps": 30,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="a JSON Lines file with `prompt` and `completion`")
    parser.add_argument("--library", help="a JSON Lines file with `text`: a passage a line")
    parser.add_argument("--passages", type=int, default=1, help="for each prompt; default: %(default)s")
    arguments, options = parser.parse_known_args()
    if (arguments.rows is None) != (arguments.library is None):
        parser.error("--rows and --library go together")
    use_all_cores()
    if arguments.rows is None:
        rows, library = embedded_data()
        options = [*embedded_options(), *options]
    else:
        rows, library = (load_dataset("json", data_files=path)["train"] for path in (arguments.rows, arguments.library))
    path = FOLDER / "rows.jsonl"
    if PartialState().is_main_process:
        FOLDER.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in add_passages(rows, library, arguments.passages))
    PartialState().wait_for_everyone()
    train([*options, "--dataset_name", str(path)])


if __name__ == "__main__":
    main()
