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

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from llm_distill.evaluation.compare import TEACHER
from llm_distill.evaluation.statistics import Interval, format_interval, interval
from llm_distill.generation.engines.base import Completion, Sampling
from llm_distill.generation.engines.transformers import TransformersEngine
from llm_distill.generation.filters import repeated_share
from llm_distill.generation.prompts import COLUMNS, Content, Prompt, prompts_of
from llm_distill.models import LanguageModel
from llm_distill.ranks import map_over_ranks, ranks
from llm_distill.tables import Table

ROUGE = ("rouge1", "rouge2", "rougeL")
LABELS = {"exact_match": "exact match", "same_prefix": "same prefix"} | {name: f"ROUGE-{name[5:]}" for name in ROUGE}
PROMPT_TOKENS = 32
"""Of a whole text."""
BATCH_SIZE = 16
"""Prompts at a time."""
EXAMPLES, SHOWN_CHARACTERS = 4, 160
"""How many prompts are shown with their answers, and how much of each text."""
UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Kana and Han: written without spaces."""


class Case(NamedTuple):
    """A prompt, and what the data answer to it, if they do."""

    prompt: Prompt
    reference: str | None


def compare_generations(
    models: Mapping[str, LanguageModel],
    dataset: Iterable[Mapping[str, Any]],
    *,
    limit: int | None = 200,
    max_new_tokens: int = 128,
) -> dict[str, Any]:
    """Has each of `models` answer the prompts of `dataset` greedily. Prompts are split over the ranks of accelerate,
    each of which has all models whole; all get the same result.

    Args:
        models: by name, on their devices; all others are put beside the one called `teacher`, if there is one.
        dataset: rows with prompts, conversations or whole texts (whose first tokens are the prompt), as `prompts_of`
            reads them. The reference is the `completion`, what follows the last turn of the user, or how the text goes
            on (as far as an answer may).
        limit: how many prompts at most.
        max_new_tokens: the longest answer; a longer reference counts against all models alike.

    Returns:
        As JSON, each figure an `Interval` over prompts: `models` by name with `rouge1`, `rouge2`, `rougeL` (F, by words
        in lower case without stemming), `exact_match` (but for blanks), where there are `references`; `words` and
        `tokens` (its own), `finished` (the share that it ended itself), `repetition` (share of runs of four words that
        have come before). `NAME_beside_teacher`: `rougeL`, `exact_match`, `same_prefix` (of the longer answer, the
        share of its characters up to the first difference). `examples`, from the answer least like the teacher's to the
        one most like it, and how many `prompts` there were and how many were `left_out` as too long for one of the
        models.

    Raises:
        ValueError: no rouge_score, no prompts, conversations for a model without a chat template, every prompt too
            long.
    """
    _rouge_scorer()  # before anything runs
    tokenizers = {name: model.require_tokenizer(name) for name, model in models.items()}
    cases = read_cases(dataset, next(iter(tokenizers.values())), max_new_tokens=max_new_tokens, limit=limit)
    is_chat = any(not isinstance(case.prompt.content, str) for case in cases)
    if is_chat and (unable := [name for name, tokenizer in tokenizers.items() if tokenizer.chat_template is None]):
        raise ValueError(
            f"the prompts are conversations, and the tokenizer of the {' and the '.join(unable)} has no chat template. "
            "Give one (tokenizer.chat_template), or prompts as text."
        )

    def compare_share(share: Sequence[Case]) -> list[dict[str, Any] | None]:
        prompts = [case.prompt for case in share]
        completions = {name: _write_answers(name, model, prompts, max_new_tokens) for name, model in models.items()}
        return [
            _compare_answers(case, {name: of_model.get(case.prompt.id) for name, of_model in completions.items()})
            for case in share
        ]

    compared = [comparison for comparison in map_over_ranks(compare_share, cases) if comparison is not None]
    if not compared:
        raise ValueError(
            f"with {max_new_tokens:,} new tokens every prompt is longer than the context of one of the models: take "
            "shorter prompts, or a smaller max_new_tokens."
        )
    return {
        "prompts": len(compared),
        "references": sum(comparison["reference"] is not None for comparison in compared),
        "left_out": len(cases) - len(compared),
        "max_new_tokens": max_new_tokens,
        "models": {name: _means([comparison["models"][name] for comparison in compared]) for name in models},
        **{
            f"{name}_beside_teacher": _means([comparison["beside"][name] for comparison in compared])
            for name in compared[0]["beside"]
        },
        "examples": _choose_examples(compared),
    }


def read_cases(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 128,
    limit: int | None = None,
) -> list[Case]:
    """The prompts of a dataset with their references.

    Raises:
        ValueError: there are none, or `prompts_of` finds no column.
    """
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise ValueError("there are no prompts: the dataset is empty.")
    column = next((name for name in COLUMNS if name in first), None)
    prompt_tokens = PROMPT_TOKENS if column == "text" else None

    def add_references() -> Iterable[dict[str, Any]]:
        for row in itertools.chain([first], rows):
            if column == "text":
                yield {**row, "completion": _continuation(row["text"], tokenizer, max_new_tokens)}
            else:
                yield {**row, "completion": _answer_in_data(row, column)}

    prompts = prompts_of(add_references(), column=column, prompt_tokens=prompt_tokens, tokenizer=tokenizer, limit=limit)
    cases = [Case(prompt, _assistant_text(prompt.row["reference"])) for prompt in prompts]
    if not cases:
        raise ValueError(f"there are no prompts: every text is shorter than prompt_tokens={prompt_tokens}.")
    return cases


def generations_parts(generations: Mapping[str, Any]) -> list[Table | str]:
    """What came of `compare_generations`: the figures, and the examples."""
    names = list(generations["models"])
    beside = {name: generations.get(f"{name}_beside_teacher", {}) for name in names}
    rows = []
    for heading, figures in (("", generations["models"]), ("beside the teacher's: ", beside)):
        for metric in dict.fromkeys(metric for name in names for metric in figures[name]):
            form = ".1f" if metric in ("words", "tokens") else ".3f"
            cells = [format_interval(figures[name].get(metric), form) for name in names]
            rows.append([heading + LABELS.get(metric, metric), *cells])
    parts: list[Table | str] = [Table([f"answers to {generations['prompts']:,} prompts", *names], rows)]
    if generations["left_out"]:
        parts.append(f"{generations['left_out']:,} prompts were left out: too long for one of the models.")
    examples = [
        [example["prompt"][-SHOWN_CHARACTERS:], example["reference"] or "", *map(example["answers"].get, names)]
        for example in generations["examples"]
    ]
    shortened = [[_shorten(text) for text in example] for example in examples]
    return [*parts, Table(["prompt", "reference", *names], shortened)]


def _write_answers(
    name: str, model: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, Completion]:
    """By the prompt's id; without those that are too long."""
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    engine = TransformersEngine(model, sampling, batch_size=BATCH_SIZE)
    answers = tqdm(
        engine.write(prompts),
        total=len(prompts),
        desc=f"Answers of the {name}",
        unit=" prompts",
        disable=not ranks().is_main_process,
    )
    return {answer.prompt.id: answer.completions[0] for answer in answers if answer.completions}


def _compare_answers(case: Case, completions: Mapping[str, Completion | None]) -> dict[str, Any] | None:
    """The figures of one prompt; None where not all could answer."""
    answers = {name: completion for name, completion in completions.items() if completion is not None}
    if len(answers) < len(completions):
        return None
    figures: dict[str, dict[str, float]] = {}
    beside: dict[str, dict[str, float]] = {}
    for name, answer in answers.items():
        figures[name] = {} if case.reference is None else score_likeness(case.reference, answer.text)
        figures[name] |= {
            "words": len(split_words(answer.text)),
            "tokens": answer.tokens,
            "finished": float(answer.finished),
            "repetition": repeated_share(answer.text),
        }
        if TEACHER in answers and name != TEACHER:
            teacher = answers[TEACHER].text
            likeness = score_likeness(teacher, answer.text)
            beside[name] = {metric: likeness[metric] for metric in ("rougeL", "exact_match")}
            beside[name]["same_prefix"] = same_prefix(teacher, answer.text)
    return {
        "prompt": _as_text(case.prompt.content),
        "reference": case.reference,
        "answers": {name: answer.text for name, answer in answers.items()},
        "models": figures,
        "beside": beside,
    }


def score_likeness(reference: str, text: str) -> dict[str, float]:
    """ROUGE's F and whether the two are the same but for blanks. Two texts without a word are alike if they are the
    same.
    """
    is_same = reference.split() == text.split()
    scores = _rouge_scorer().score(reference, text)
    return {name: 1.0 if is_same else scores[name].fmeasure for name in ROUGE} | {"exact_match": float(is_same)}


def same_prefix(first: str, second: str) -> float:
    """Of the longer text, the share of its characters up to the first difference."""
    if first == second:
        return 1.0
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) / max(len(first), len(second))


def split_words(text: str) -> list[str]:
    """As rouge_score's own tokenizer without stemming, which knows no letters besides a to z; of scripts without spaces
    each sign is a word.
    """
    return re.findall(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\W_])+", text.lower())


class _WordTokenizer:
    """What rouge_score takes as a tokenizer."""

    tokenize = staticmethod(split_words)


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("to compare generations takes rouge_score: pip install 'llm-distill[evaluation]'.") from error
    return RougeScorer(ROUGE, tokenizer=_WordTokenizer())


def _means(figures: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    """Of each metric over the prompts that have it."""
    values: dict[str, list[float]] = {}
    for of_prompt in figures:
        for metric, value in of_prompt.items():
            values.setdefault(metric, []).append(value)
    return {metric: interval(of_metric, [1.0] * len(of_metric)) for metric, of_metric in values.items()}


def _choose_examples(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Evenly from the student least like the teacher to the one most like it."""
    if "student" in compared[0]["beside"]:
        compared = sorted(compared, key=lambda comparison: comparison["beside"]["student"]["rougeL"])
    n = min(EXAMPLES, len(compared))
    places = sorted({round(i * (len(compared) - 1) / max(n - 1, 1)) for i in range(n)})
    return [{name: compared[place][name] for name in ("prompt", "reference", "answers")} for place in places]


def _continuation(text: Any, tokenizer: PreTrainedTokenizerBase, length: int) -> str | None:
    """How a text goes on after the prompt."""
    if not isinstance(text, str):
        return None  # prompts_of refuses it
    ids = tokenizer(text[: 64 * (PROMPT_TOKENS + length)], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids[PROMPT_TOKENS : PROMPT_TOKENS + length])


def _answer_in_data(row: Mapping[str, Any], column: str | None) -> Any:
    """What the data answer: a text, messages, or None."""
    prompt = row.get(column) if column else None
    if "completion" in row or not isinstance(prompt, list):
        return row.get("completion")
    is_user = [isinstance(message, dict) and message.get("role") == "user" for message in prompt]
    last = max((place for place, asks in enumerate(is_user) if asks), default=len(prompt))  # prompts_of refuses none
    return prompt[last + 1 :]


def _assistant_text(answer: Any) -> str | None:
    """Of messages, what the assistant says; None if there is nothing."""
    if isinstance(answer, list):
        contents = [message.get("content") for message in answer if message.get("role") == "assistant"]
        answer = "\n".join(text for text in contents if isinstance(text, str))
    return answer if isinstance(answer, str) and answer.strip() else None


def _as_text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message.get('content')}" for message in content)


def _shorten(text: str) -> str:
    return text[:SHOWN_CHARACTERS] + ("…" if len(text) > SHOWN_CHARACTERS else "")
