"""What teacher and student answer to the same held-out prompts: beside the references, and beside each other.

All answer greedily, so that a difference is one of the models and not of the dice. Texts are compared, not tokens: the
tokenizers may differ.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from llm_distill.evaluation.statistics import Interval, as_text, interval
from llm_distill.generation.engines.base import Completion, Sampling
from llm_distill.generation.engines.transformers import TransformersEngine
from llm_distill.generation.filters import repeated_share
from llm_distill.generation.prompts import COLUMNS, Content, Prompt, prompts_of
from llm_distill.ranks import ranks
from llm_distill.teachers.live import LiveTeacher

ROUGE = ("rouge1", "rouge2", "rougeL")
PROMPT_TOKENS = 32
"""Of a whole text, where nothing else is asked for."""
UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Kana and Han: written without spaces."""
SHOWN_CHARACTERS = 160
"""Of each text in the table of examples."""


class Case(NamedTuple):
    """A prompt, and what the data answer to it, if they do."""

    prompt: Prompt
    reference: str | None


def compare_generations(
    models: Mapping[str, LiveTeacher],
    dataset: Iterable[Mapping[str, Any]],
    *,
    limit: int | None = 200,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    prompt_column: str | None = None,
    reference_column: str | None = None,
    prompt_tokens: int | None = None,
    as_chat: bool = False,
    system_prompt: str | None = None,
    examples: int = 4,
) -> dict[str, Any]:
    """Has each of `models` answer the prompts of `dataset` greedily. Prompts are split over the ranks of accelerate,
    each of which has all models whole; all get the same result.

    Args:
        models: by name, on their devices; all others are put beside the one called `teacher`, if there is one.
        dataset: rows with prompts, conversations or whole texts, as `prompts_of` reads them. The reference is the
            `completion`, what follows the last turn of the user, or how the text goes on (as far as an answer may).
        limit: how many prompts at most.
        max_new_tokens: the longest answer; a longer reference counts against all models alike.
        batch_size: prompts at a time.
        prompt_column: by default the first of `prompts_of`'s that is there.
        reference_column: where the references are, if they are elsewhere.
        prompt_tokens: cuts texts to their first tokens, by the tokenizer of the first model. Of a column `text` that is
            PROMPT_TOKENS unless said otherwise.
        as_chat: makes each prompt the message of a user.
        system_prompt: put in front of every conversation.
        examples: how many to show, from the answer least like the teacher's to the one most like it.

    Returns:
        As JSON, each figure an `Interval` over prompts: `models` by name with `rouge1`, `rouge2`, `rougeL` (F, by words
        in lower case without stemming), `exact_match` (but for blanks), where there are `references`; `words` and
        `tokens` (its own), `finished` (the share that it ended itself), `repetition` (share of runs of four words that
        have come before). `NAME_beside_teacher`: `rougeL`, `exact_match`, `same_prefix` (of the longer answer, the
        share of its characters up to the first difference). `examples`, and how many `prompts` there were and how
        many were `left_out` as too long for one of the models.

    Raises:
        ValueError: no rouge_score, no prompts, a column that is not there, conversations for a model without a chat
            template, every prompt too long.
    """
    _rouge(ROUGE)  # before anything runs
    if not models:
        raise ValueError("there is no model to answer the prompts.")
    tokenizers = {name: _tokenizer(name, model) for name, model in models.items()}
    cases = cases_of(
        dataset,
        next(iter(tokenizers.values())),
        prompt_column=prompt_column,
        reference_column=reference_column,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        as_chat=as_chat,
        system_prompt=system_prompt,
        limit=limit,
    )
    is_chat = any(not isinstance(case.prompt.content, str) for case in cases)
    if is_chat and (unable := [name for name, each in tokenizers.items() if each.chat_template is None]):
        raise ValueError(
            f"the prompts are conversations, and the tokenizer of the {' and the '.join(unable)} has no chat template. "
            "Give one (tokenizer.chat_template), or prompts as text."
        )
    state = ranks()
    own = range(state.process_index, len(cases), state.num_processes)
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    answers = {
        name: _answers(name, TransformersEngine(model, sampling, batch_size=batch_size), [cases[i].prompt for i in own])
        for name, model in models.items()
    }
    found = [_compared(cases[i], {name: said.get(cases[i].prompt.id) for name, said in answers.items()}) for i in own]
    by_place = dict(gather_object(list(zip(own, found, strict=True))))
    kept = [by_place[place] for place in sorted(by_place) if by_place[place] is not None]
    if not kept:
        raise ValueError(
            f"with {max_new_tokens:,} new tokens every prompt is longer than the context of one of the models: take "
            "shorter prompts, or a smaller max_new_tokens."
        )
    return {
        "prompts": len(kept),
        "references": sum(each["reference"] is not None for each in kept),
        "left_out": len(cases) - len(kept),
        "max_new_tokens": max_new_tokens,
        "models": {name: _means([each["models"][name] for each in kept]) for name in models},
        **{
            f"{name}_beside_teacher": _means([each["beside"][name] for each in kept])
            for name in models
            if "teacher" in models and name != "teacher"
        },
        "examples": _examples(kept, examples),
    }


def cases_of(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_column: str | None = None,
    reference_column: str | None = None,
    prompt_tokens: int | None = None,
    max_new_tokens: int = 128,
    as_chat: bool = False,
    system_prompt: str | None = None,
    limit: int | None = None,
) -> list[Case]:
    """The prompts of a dataset with their references.

    Raises:
        ValueError: there are none, or `prompts_of` or `reference_column` find no column.
    """
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise ValueError("there are no prompts: the dataset is empty.")
    column = prompt_column or next((name for name in COLUMNS if name in first), None)
    if reference_column is not None and reference_column not in first:
        raise ValueError(f"the dataset has no column {reference_column!r} with references, only {', '.join(first)}.")
    if column == "text" and prompt_tokens is None:
        prompt_tokens = PROMPT_TOKENS
    goes_on = prompt_tokens is not None and reference_column is None

    def with_references() -> Iterable[dict[str, Any]]:
        for row in itertools.chain([first], rows):
            whole = row.get(column) if column else None
            yield {**row, "completion": whole if goes_on else _answer_in_data(row, whole, reference_column)}

    prompts = prompts_of(
        with_references(),
        column=column,
        as_chat=as_chat,
        system_prompt=system_prompt,
        prompt_tokens=prompt_tokens,
        tokenizer=tokenizer,
        limit=limit,
    )
    cases = []
    for prompt in prompts:
        reference = _as_text(prompt.row["reference"])
        if prompt_tokens is not None and goes_on and reference is not None:
            reference = _continuation(reference, tokenizer, prompt_tokens, max_new_tokens)
        cases.append(Case(prompt, reference if reference and reference.strip() else None))
    if not cases:
        raise ValueError(f"there are no prompts: every text is shorter than prompt_tokens={prompt_tokens}.")
    return cases


def generations_table(found: Mapping[str, Any]) -> str:
    """Markdown: what came of `compare_generations`, with its examples."""
    names, labels = list(found["models"]), {"exact_match": "exact match", "same_prefix": "same prefix"}
    lines = [f"| answers to {found['prompts']:,} prompts | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    beside = {name: found.get(f"{name}_beside_teacher", {}) for name in names}
    for heading, figures in (("", found["models"]), ("beside the teacher's: ", beside)):
        for metric in dict.fromkeys(metric for name in names for metric in figures[name]):
            cells = [
                as_text(figures[name].get(metric), ".1f" if metric in ("words", "tokens") else ".3f") for name in names
            ]
            lines.append(f"| {heading}{labels.get(metric, metric.replace('rouge', 'ROUGE-'))} | {' | '.join(cells)} |")
    if found["left_out"]:
        lines += ["", f"{found['left_out']:,} prompts were left out: too long for one of the models."]
    if found["examples"]:
        lines += ["", f"| prompt | reference | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for each in found["examples"]:
        texts = [
            each["prompt"][-SHOWN_CHARACTERS:],
            each["reference"] or "",
            *(each["answers"][name] for name in names),
        ]
        lines.append(f"| {' | '.join(map(_cell, texts))} |")
    return "\n".join(lines)


def _answers(name: str, engine: TransformersEngine, prompts: Sequence[Prompt]) -> dict[str, Completion]:
    """By the prompt's id; without those that are too long."""
    show = ranks().is_main_process
    said = tqdm(
        engine.write(prompts), total=len(prompts), desc=f"Answers of the {name}", unit=" prompts", disable=not show
    )
    return {answer.prompt.id: answer.completions[0] for answer in said if answer.completions}


def _compared(case: Case, answers: Mapping[str, Completion | None]) -> dict[str, Any] | None:
    """The figures of one prompt; None where not all could answer."""
    said = {name: answer for name, answer in answers.items() if answer is not None}
    if len(said) < len(answers):
        return None
    teacher = said.get("teacher")
    return {
        "prompt": _shown_prompt(case.prompt.content),
        "reference": case.reference,
        "answers": {name: answer.text for name, answer in said.items()},
        "models": {
            name: {
                **({} if case.reference is None else _likeness(case.reference, answer.text, ROUGE)),
                "words": len(words(answer.text)),
                "tokens": answer.tokens,
                "finished": float(answer.finished),
                "repetition": repeated_share(answer.text),
            }
            for name, answer in said.items()
        },
        "beside": {
            name: {
                **_likeness(teacher.text, answer.text, ("rougeL",)),
                "same_prefix": same_prefix(teacher.text, answer.text),
            }
            for name, answer in said.items()
            if teacher is not None and name != "teacher"
        },
    }


def _likeness(reference: str, text: str, measures: tuple[str, ...]) -> dict[str, float]:
    """ROUGE's F and whether the two are the same but for blanks. Two texts without a word are alike if they are the
    same.
    """
    is_same = reference.split() == text.split()
    scores = _rouge(measures).score(reference, text)
    return {name: 1.0 if is_same else scores[name].fmeasure for name in measures} | {"exact_match": float(is_same)}


def same_prefix(one: str, other: str) -> float:
    """Of the longer text, the share of its characters up to the first difference."""
    if one == other:
        return 1.0
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return same / max(len(one), len(other))


def words(text: str) -> list[str]:
    """As rouge_score's own tokenizer without stemming, which knows no letters besides a to z; of scripts without spaces
    each sign is a word.
    """
    return re.findall(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\W_])+", text.lower())


class _Words:
    """What rouge_score takes as a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@functools.cache
def _rouge(measures: tuple[str, ...]) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("to compare generations takes rouge_score: pip install 'llm-distill[evaluation]'.") from error
    return RougeScorer(measures, tokenizer=_Words())


def _means(items: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    """Of each metric over the prompts that have it."""
    metrics = dict.fromkeys(metric for item in items for metric in item)
    values = {metric: [item[metric] for item in items if metric in item] for metric in metrics}
    return {metric: interval(each, [1.0] * len(each)) for metric, each in values.items()}


def _examples(kept: Sequence[Mapping[str, Any]], n: int) -> list[dict[str, Any]]:
    """Spread evenly from the student least like the teacher to the one most like it."""
    if any("student" in each["beside"] for each in kept):
        kept = sorted(kept, key=lambda each: each["beside"]["student"]["rougeL"])
    n = min(n, len(kept))
    places = sorted({round(i * (len(kept) - 1) / max(n - 1, 1)) for i in range(n)})
    return [{name: kept[place][name] for name in ("prompt", "reference", "answers")} for place in places]


def _tokenizer(name: str, model: LiveTeacher) -> PreTrainedTokenizerBase:
    if model.tokenizer is None:
        raise ValueError(f"the {name} came without a tokenizer: LiveTeacher(model, tokenizer).")
    return model.tokenizer


def _answer_in_data(row: Mapping[str, Any], prompt: Any, reference_column: str | None) -> Any:
    """What the data answer: a text, messages, or None."""
    if reference_column is not None:
        return row.get(reference_column)
    if "completion" in row or not isinstance(prompt, list):
        return row.get("completion")
    asked = (
        place for place, message in enumerate(prompt) if isinstance(message, dict) and message.get("role") == "user"
    )
    last = max(asked, default=len(prompt))  # prompts_of refuses what has none
    return prompt[last + 1 :]


def _as_text(answer: Any) -> str | None:
    """Of messages, what the assistant says."""
    if isinstance(answer, list):
        said = [message.get("content") for message in answer if message.get("role") == "assistant"]
        answer = "\n".join(text for text in said if isinstance(text, str))
    return answer if isinstance(answer, str) else None


def _continuation(text: str, tokenizer: PreTrainedTokenizerBase, start: int, length: int) -> str:
    ids = tokenizer(text[: 64 * (start + length)], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids[start : start + length])


def _shown_prompt(content: Content) -> str:
    return (
        content
        if isinstance(content, str)
        else "\n".join(f"{message['role']}: {message.get('content')}" for message in content)
    )


def _cell(text: str) -> str:
    """A text in a table of Markdown."""
    text = " ".join(text[:SHOWN_CHARACTERS].split()) + ("…" if len(text) > SHOWN_CHARACTERS else "")
    for sign in "\\|`*_<[$":
        text = text.replace(sign, f"\\{sign}")
    return text
