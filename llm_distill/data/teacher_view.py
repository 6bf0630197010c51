"""The teacher reads more than the student: another prompt, and after it the same tokens to speak about.

With a document, a worked solution or other instructions before it, a text is easier to predict. What the teacher says
of the completion there is what the student learns to say without them: context distillation (Snell et al., 2022,
arXiv:2209.15189), self-distillation from demonstrations (SDFT, arXiv:2601.19897) or from the answer in view (OPSD,
arXiv:2601.18734), a teacher with retrieval. Columns say it for each row, options for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_distill.config import DistillationConfig
from llm_distill.data.policy import Row
from llm_distill.data.problems import problem_of_text, problem_of_turns
from llm_distill.generation.prompts import SYSTEM_ROLES
from llm_distill.models import ATTENTION, Needs
from llm_distill.rows import IGNORED, TEACHER

PROMPT, MESSAGES = "teacher_prompt", "teacher_messages"
"""Columns that a person gives: of a row without a value the teacher reads what the student reads."""
IDS, LABELS, NUMBER = "teacher_input_ids", "teacher_labels", "teacher_row"
"""Columns that are made of them. NUMBER is that of the row in what the person gave."""
MADE = (IDS, LABELS, NUMBER)
OPTIONS = ("teacher_system_prompt", "teacher_chat_template")
WAY_OUT = "Give rows of prompt and completion, or conversations with assistant_only_loss."


def has_teacher_text(*datasets: Any) -> bool:
    """Whether the teacher reads something else of one of the datasets than the student."""
    return any(IDS in next(iter(dataset), {}) for dataset in datasets if dataset is not None)


def refuse_unread(args: DistillationConfig, is_read: bool, teacher_needs: Needs) -> None:
    """Raises ValueError for options about a text that no teacher reads, and for terms that need one text for both.

    Args:
        is_read: whether there is a teacher, and something else that it reads.
        teacher_needs: what the objective needs of it.
    """
    if is_read and (needed := sorted({*teacher_needs} & {*ATTENTION})):
        raise ValueError(
            f"losses compares the {', '.join(needed)} of all tokens of a text, and the teacher reads another text than "
            "the student: leave that term out. Those on hidden states compare the tokens that are learned alone."
        )
    chosen = [option for option in (*OPTIONS, "teacher_max_length") if getattr(args, option) is not None]
    if chosen and not is_read:
        raise ValueError(
            f"without effect here, so refused: {', '.join(chosen)} (there is no teacher, or no dataset in which it "
            "reads something else than the student)."
        )


def has_conversations(first: Mapping[str, Any]) -> bool:
    """Whether a dataset with such a first row is to be read in a chat template."""
    turns = "messages" in first or "conversations" in first or isinstance(first.get("prompt"), list)
    return turns and "input_ids" not in first


def rows_of_teacher(dataset: Any, args: DistillationConfig, name: str, in_other_tokens: bool = False) -> Any:
    """The rows of a dataset with what the teacher reads in place of the student's text, and their NUMBER; None if it
    reads the same.

    Args:
        in_other_tokens: whether it has a tokenizer, and so a chat template, of its own.

    Raises:
        ValueError: there is no place for it.
    """
    first: Mapping[str, Any] = next(iter(dataset), {})
    given = [column for column in (PROMPT, MESSAGES, IDS) if column in first]
    chosen = [option for option in OPTIONS if getattr(args, option)]
    own_template = ["conversations in its own chat template"] if in_other_tokens and has_conversations(first) else []
    if NUMBER in first or not (given or chosen or own_template):
        return None
    reason = f"the {name} dataset: the teacher shall read something else ({', '.join(given + chosen + own_template)})"
    if args.packing or args.padding_free:
        raise ValueError(f"{reason}, and rows are packed: set packing and padding_free to False.")
    if "input_ids" in first:
        if chosen or given != [IDS] or LABELS not in first:
            raise ValueError(f"{reason}, and the rows are tokens already: give `{IDS}` and `{LABELS}` of each.")
        return dataset.map(_tokens_of_teacher, with_indices=True, remove_columns=list(first))
    if not {"completion", "messages"} & {*first}:
        raise ValueError(f"{reason}, and whole texts have no part that both could read. {WAY_OUT}")
    is_pair = "completion" in first
    counts_all = args.completion_only_loss is False if is_pair else not args.assistant_only_loss
    if counts_all and not (is_pair and args.assistant_only_loss):
        raise ValueError(f"{reason}, and the prompt is to be learned too, which is not the same for both. {WAY_OUT}")
    if chosen and is_pair and isinstance(first["prompt"], str):
        raise ValueError(f"{reason}, and prompts are texts without turns: make messages of them.")
    make_row = partial(_text_of_teacher, args.teacher_system_prompt, name)
    return dataset.map(make_row, with_indices=True, remove_columns=given)


def options_of_teacher(args: DistillationConfig, in_other_tokens: bool = False) -> DistillationConfig:
    """How the rows of the teacher are prepared: as the student's, and never cut, left out or moved."""
    args = copy.copy(args)
    if in_other_tokens:
        args.chat_template_path = args.eos_token = args.pad_token = None  # of the student's
    args.max_length, args.shuffle_dataset, args.eval_strategy = None, False, "no"
    args.teacher_system_prompt = args.teacher_chat_template = None
    return args


def tokenizer_of_teacher(tokenizer: PreTrainedTokenizerBase, args: DistillationConfig) -> PreTrainedTokenizerBase:
    """A tokenizer, the student's or the teacher's own, with the teacher's chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    if args.teacher_chat_template is not None:
        tokenizer.chat_template = args.teacher_chat_template
    return tokenizer


class MisfitError(ValueError):
    """What the teacher reads of a row does not go with what the student reads."""


@dataclass(frozen=True)
class TwoViews:
    """A collator that lays what the teacher reads beside what the student reads."""

    collate: Callable[[Sequence[Any]], Any]
    max_length: int | None
    """Of the teacher's texts, in tokens."""

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Raises MisfitError for rows that the teacher cannot read, or that have other tokens to learn."""
        batch: dict[str, Any] = self.collate(rows)
        if any(IDS in row for row in rows):
            batch[TEACHER] = self.collate([self.read(row) for row in rows])
        return batch

    def read(self, row: Mapping[str, Any]) -> Row:
        """What the teacher reads of a row, as far as the student reads it: `max_length` may have cut its completion."""
        where = f"row {row[NUMBER]}: " if row.get(NUMBER) is not None else ""
        if row.get(IDS) is None:
            ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
        else:
            ids, labels = _cut_as_student(row[IDS], row[LABELS], row["labels"], where)
        self.require_fitting(len(ids), where)
        return {"input_ids": ids, "labels": labels}

    def require_fitting(self, length: int, where: str) -> None:
        """Raises MisfitError for a text that is longer than the teacher may read."""
        if self.max_length is not None and length > self.max_length:
            raise MisfitError(
                f"{where}the teacher would read {length:,} tokens, and {self.max_length:,} at most. Nothing is cut for "
                "it: shorten what it reads more, leave such rows out, or raise teacher_max_length as far as the "
                "teacher can read."
            )


def _cut_as_student(ids: list[int], labels: list[int], students: list[int], where: str) -> tuple[list[int], list[int]]:
    """The teacher's tokens and labels with the tokens that the student learns, and no others."""
    learned = [label for label in students[1:] if label != IGNORED]
    places = [place for place, label in enumerate(labels) if place and label != IGNORED]
    teachers = [labels[place] for place in places]
    if teachers == learned:
        return ids, labels
    for start in (0, len(teachers) - len(learned)):  # max_length keeps the start of a text, or its end
        if start >= 0 and learned and teachers[start : start + len(learned)] == learned:
            kept = places[start : start + len(learned)]
            masked = [IGNORED] * (kept[-1] + 1)
            for place in kept:
                masked[place] = labels[place]
            return ids[: len(masked)], masked
    raise MisfitError(
        f"{where}the teacher would speak about other tokens ({len(teachers)}, which begin {teachers[:4]}) than the "
        f"student learns ({len(learned)}, which begin {learned[:4]}). The answers must be the same in both, and a chat "
        "template must not change them."
    )


def require_teachers_rows(dataset: Any, name: str, read: TwoViews, max_new_tokens: int | None) -> None:
    """Raises ValueError naming the first row of a prepared dataset that the teacher cannot read, and how many others
    are like it. Streams are not read.

    Args:
        max_new_tokens: what the student writes in place of the completions, if it writes.
    """
    if not isinstance(dataset, Dataset) or IDS not in dataset.column_names:
        return
    problems = []
    for row in dataset:
        try:
            read.read(row)
            if max_new_tokens is not None:
                prompt = next((place for place, label in enumerate(row[LABELS]) if label != IGNORED), 0)
                read.require_fitting(prompt + max_new_tokens, f"row {row[NUMBER]}: with max_completion_length ")
        except MisfitError as error:
            problems.append(str(error))
    if problems:
        others = f" So it is of {len(problems):,} of its {len(dataset):,} rows." if len(problems) > 1 else ""
        raise ValueError(f"the {name} dataset, {problems[0]}{others}")


def _tokens_of_teacher(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    if row[IDS] is None:
        return {"input_ids": row["input_ids"], "labels": row.get("labels") or row["input_ids"], NUMBER: number}
    return {"input_ids": row[IDS], "labels": row[LABELS], NUMBER: number}


def _text_of_teacher(system_prompt: str | None, name: str, row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A row in which the teacher's prompt or conversation stands in place of the student's."""
    own, whole = row.get(PROMPT), row.get(MESSAGES)
    is_text = isinstance(row.get("prompt"), str)
    problem = None
    if own is not None:
        problem = (problem_of_text if is_text else problem_of_turns)(own, PROMPT)
    if whole is not None:
        problem = problem or problem_of_turns(whole, MESSAGES)
        if is_text or own is not None:
            other = PROMPT if own is not None else "a prompt that is a text"
            problem = f"it has `{MESSAGES}` and {other}: give one of them"
    if problem is not None:
        raise ValueError(f"the {name} dataset, row {number}: {problem}. Mend such rows, or leave them out.")
    if "completion" in row:
        prompt, completion = row["prompt"] if own is None else own, row["completion"]
        if whole is not None:
            prompt, completion = whole[: -len(completion)], whole[-len(completion) :]
        return {"prompt": _with_system(prompt, system_prompt), "completion": completion, NUMBER: number}
    messages = row["messages"]
    if whole is not None:
        messages = whole
    elif own is not None:
        answer = next((place for place, turn in enumerate(messages) if turn["role"] == "assistant"), len(messages))
        messages = [*own, *messages[answer:]]
    return {"messages": _with_system(messages, system_prompt), NUMBER: number}


def _with_system(messages: Any, system_prompt: str | None) -> Any:
    if system_prompt is None:
        return messages
    rest = messages[1:] if messages and messages[0]["role"] in SYSTEM_ROLES else messages
    return [{"role": "system", "content": system_prompt}, *rest]
