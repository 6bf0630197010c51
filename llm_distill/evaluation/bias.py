"""Bias transfer: how much likelier a model finds a sentence about one group than the same about another, and how much
of that the student has from its teacher.

A causal LM gives each sentence a log-likelihood: that of all its tokens, from an empty text on. A pair's difference,
log P(first) − log P(second) in nats, is taken in three ways:

- `total`: of the whole sentences. It needs no common tokenizer. What a sentence says of a group before it names it
  ("the nurse said that she") is in here alone; so is how common the group word itself is, and in a weak model little
  else: two that share a tokenizer then agree for no better reason than the number of tokens of the word.
- `shared`: of the tokens after the exchanged word, which are the same in both, and so is their number: what the model
  expects of a group, once it is named. It needs no common tokenizer either. CrowS-Pairs (Nangia et al., 2020,
  arXiv:2010.00133) scores the shared tokens too, for masked models: each given all other words. A causal model sees
  only those before, so the tokens before the exchanged word cancel out, and those after it are given it.
- `per_token`: of the means over tokens. A word that a tokenizer cuts into many tokens makes its sentence longer, and so
  less likely in all; where both have the same length it is `total` by a factor.

No figure here says that a model is fair. Zero is not the aim for `total` (more is written about some groups than about
others); what counts is whether the student is further from zero than its teacher, and on the same side.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from llm_distill.divergences import ForwardKL
from llm_distill.evaluation.statistics import Interval, as_text, correlation, interval
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.models import kept_of, vocabulary_size
from llm_distill.ranks import ranks
from llm_distill.rows import IGNORED, View
from llm_distill.teachers.live import LiveTeacher

BUILT_IN = Path(__file__).with_name("pairs.csv")
"""56 plain sentences of everyday life, seven for each of eight categories, with one word for one group exchanged.
`first` has the group that more is written about in English (man, young, Christian, American, white, able, straight,
rich).

It is small and in English, its sentences are mild and few groups are in it. It shows a gross shift between teacher and
student; the interval of a category is wide. It cannot show that there is no bias, nor what a model does in
conversations, nor how it treats people: for that, bring pairs of your own (such as CrowS-Pairs), and people.
"""
COLUMNS = (("first", "second"), ("more", "less"), ("sent_more", "sent_less"))
"""What a file may call the two sentences; CrowS-Pairs' own file has the last."""
CATEGORY = ("category", "bias_type")
SCORES = ("total", "shared", "per_token")


class Pair(NamedTuple):
    first: str
    second: str
    category: str | None = None


def compare_bias(
    models: Mapping[str, LiveTeacher],
    pairs: str | Path | Iterable[Mapping[str, Any]] | None = None,
    *,
    batch_size: int = 32,
    examples: int = 5,
) -> dict[str, Any]:
    """The differences in log-likelihood of each of `models`. Pairs are split over the ranks of accelerate, each of
    which has all models whole; all get the same result.

    Args:
        models: by name, on their devices, with any tokenizers; all others are put beside the one called `teacher`.
        pairs: a CSV, JSON or JSONL file, or rows, with `first` and `second` (or `more` and `less`) and perhaps
            `category`; BUILT_IN by default.
        batch_size: pairs at a time.
        examples: how many pairs to show, those on which student and teacher differ most.

    Returns:
        As JSON, for each of SCORES `all` and each category, with each figure an `Interval` over pairs, in nats:
        `pairs`; `models` by name with `mean_absolute` and `mean` (above 0: the first is likelier).
        `NAME_beside_teacher`: `correlation` (Pearson's over pairs; left out where a model makes no difference),
        `strength` (Σ |differences| relative to the teacher's) and `same_side` (share of pairs in which both prefer the
        same sentence). And `examples`, by `total`; `source` (`built-in` or `given`).

    Raises:
        ValueError: a file or rows without pairs, columns that are missing, a pair of equal sentences, a sentence longer
            than a model's context.
    """
    read = list(read_pairs(BUILT_IN if pairs is None else pairs))
    state = ranks()
    own = range(state.process_index, len(read), state.num_processes)
    scored = {name: differences(model, [read[i] for i in own], batch_size, name) for name, model in models.items()}
    columns = [{name: each[row].tolist() for name, each in scored.items()} for row in range(len(own))]
    by_place = dict(gather_object(list(zip(own, columns, strict=True))))
    found = {name: np.array([by_place[place][name] for place in range(len(read))]) for name in models}
    categories: dict[str, list[int]] = {"all": list(range(len(read)))}
    for place, pair in enumerate(read):
        if pair.category is not None:
            categories.setdefault(pair.category, []).append(place)
    return {
        "pairs": len(read),
        "source": "built-in" if pairs is None else "given",
        **{
            score: {
                category: _figures({name: each[places, column] for name, each in found.items()})
                for category, places in categories.items()
            }
            for column, score in enumerate(SCORES)
        },
        "examples": _examples(read, {name: each[:, 0] for name, each in found.items()}, examples),
    }


def read_pairs(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[Pair]:
    """From a file or rows; see `compare_bias`.

    Raises:
        ValueError: no such file, no pairs in it, columns that are missing, two equal sentences.
    """
    rows = _rows(Path(source)) if isinstance(source, str | Path) else list(source)
    if not rows:
        raise ValueError("there are no pairs of sentences to compare: the file or the dataset is empty.")
    for number, row in enumerate(rows):
        names = next((each for each in COLUMNS if isinstance(row, Mapping) and set(each) <= set(row)), None)
        if names is None:
            there = ", ".join(map(str, row)) if isinstance(row, Mapping) else repr(row)[:80]
            raise ValueError(
                f"pair {number} has no two sentences: it takes columns first and second, or more and less (and "
                f"category, if there are several), and has {there}."
            )
        first, second = (str(row[name] or "").strip() for name in names)
        if not first or not second or first == second:
            raise ValueError(
                f"pair {number} must be two sentences that differ in a word, got {first!r} and {second!r}: take it out."
            )
        category = next((str(row[name]) for name in CATEGORY if row.get(name)), None)
        if category == "all":
            raise ValueError(f"pair {number} has the category 'all', which is what all pairs together are called.")
        yield Pair(first, second, category)


def differences(
    model: LiveTeacher, pairs: Sequence[Pair], batch_size: int = 32, name: str = "model"
) -> Float[NDArray, "pairs scores"]:
    """What `first` is likelier by in each pair in nats, by each of SCORES."""
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place].first))  # of a length: little padding
    found, head = np.zeros((len(pairs), len(SCORES))), head_of(name, model)
    with tqdm(total=len(pairs), desc=f"Pairs of the {name}", unit=" pairs", disable=not ranks().is_main_process) as bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            scored = log_likelihoods(model, head, [text for place in places for text in pairs[place][:2]])
            for number, place in enumerate(places):
                found[place] = _difference(*scored[2 * number : 2 * number + 2])
            bar.update(len(places))
    return found


class Scored(NamedTuple):
    """The tokens of a text, each with its log-likelihood given those before it, in nats."""

    ids: list[int]
    log_likelihood: Float[Tensor, " tokens"]


def head_of(name: str, model: LiveTeacher) -> LMHead:
    """Over the tokens of the tokenizer: what the model's matrix is padded with takes no part.

    Raises:
        ValueError: no tokenizer, or one that is too large for the model.
    """
    if model.tokenizer is None:
        raise ValueError(f"the {name} came without a tokenizer: LiveTeacher(model, tokenizer).")
    return LMHead.of(model.model, vocabulary_size(model.tokenizer))


@torch.no_grad()
def log_likelihoods(model: LiveTeacher, head: LMHead, texts: Sequence[str]) -> list[Scored]:
    """Of each text as a document of its own, all in one forward. A tokenizer that begins no text with a token of its
    own gets one (beginning or end of text): otherwise nothing would say how likely the first word is.

    Raises:
        ValueError: a text longer than the model's context.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None, "head_of has seen to it"
    starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    written = [tokenizer(text)["input_ids"] for text in texts]
    written = [ids if ids[:1] == starts[:1] else starts[:1] + ids for ids in written]
    longest = max(map(len, written))
    if model.max_length is not None and longest > model.max_length:
        raise ValueError(f"a sentence has {longest:,} tokens, more than the model's context of {model.max_length:,}.")
    inputs = torch.zeros(len(written), longest, dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for row, ids in enumerate(written):
        inputs[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    device = model.model.device
    batch = {"input_ids": inputs, "attention_mask": mask, "labels": inputs.masked_fill(mask == 0, IGNORED)}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    rows = View.of(batch).positions
    hidden = kept_of(model.model, head, View.of(batch)).hidden
    _, metrics = fused_head_loss(hidden, head, None, ForwardKL(), kd_weight=0.0, ce_weight=1.0, targets=rows.targets)
    each = (-metrics["ce"]).double().cpu().split([len(ids) - 1 for ids in written])
    return [Scored(ids[1:], values) for ids, values in zip(written, each, strict=True)]


def bias_table(found: Mapping[str, Any]) -> str:
    """Markdown: what came of `compare_bias`, by category but for `per_token`."""
    names = list(found["total"]["all"]["models"])
    beside = [name for name in names if f"{name}_beside_teacher" in found["total"]["all"]]
    figures = ("correlation", "strength", "same_side")
    heads = [f"{name}: mean \\|Δ\\|" for name in names] + [f"{name}: mean Δ" for name in names]
    heads += [f"{name}: {figure.replace('_', ' ')}" for name in beside for figure in figures]
    lines = [f"| Δ log-likelihood, nats | pairs | {' | '.join(heads)} |", "|---|---:" + "|---:" * len(heads) + "|"]
    rows = [(score, category) for score in ("total", "shared") for category in found[score]] + [("per_token", "all")]
    for score, category in rows:
        part = found[score][category]
        cells = [as_text(part["models"][name][each], ".2f") for each in ("mean_absolute", "mean") for name in names]
        cells += [as_text(part[f"{name}_beside_teacher"].get(each), ".2f") for name in beside for each in figures]
        lines.append(f"| {score.replace('_', ' ')}: {category} | {part['pairs']:,} | {' | '.join(cells)} |")
    if found["examples"]:
        lines += ["", f"| Δ | first | second | {' | '.join(names)} |", "|---|---|---" + "|---:" * len(names) + "|"]
    for each in found["examples"]:
        cells = [f"{each['differences'][name]:+.2f}" for name in names]
        texts = [each[side].replace("|", "\\|") for side in ("first", "second")]
        lines.append(f"| {each['category'] or ''} | {' | '.join([*texts, *cells])} |")
    return "\n".join(lines)


def _difference(first: Scored, second: Scored) -> tuple[float, float, float]:
    alike = zip(reversed(first.ids), reversed(second.ids), strict=False)
    shared = sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], alike))
    sides = [
        (each.sum(), each[len(each) - shared :].sum(), each.mean())
        for each in (first.log_likelihood, second.log_likelihood)
    ]
    total, after, per_token = (float(one - other) for one, other in zip(*sides, strict=True))
    return total, after, per_token


def _figures(found: Mapping[str, NDArray]) -> dict[str, Any]:
    """Of one score over the pairs of one category."""
    n = len(next(iter(found.values())))
    ones = np.ones(n)
    teacher = found.get("teacher")
    figures: dict[str, Any] = {
        "pairs": n,
        "models": {
            name: {"mean_absolute": interval(np.abs(each), ones), "mean": interval(each, ones)}
            for name, each in found.items()
        },
    }
    for name, each in found.items():
        if teacher is not None and name != "teacher":
            beside: dict[str, Interval] = {
                "correlation": correlation(each, teacher),
                "strength": interval(np.abs(each), np.abs(teacher)),
                "same_side": interval(np.sign(each) == np.sign(teacher), ones),
            }
            known = {metric: figure for metric, figure in beside.items() if not isnan(figure["value"])}
            figures[f"{name}_beside_teacher"] = known
    return figures


def _examples(pairs: Sequence[Pair], found: Mapping[str, NDArray], n: int) -> list[dict[str, Any]]:
    if {"student", "teacher"} <= set(found):
        order = np.argsort(-np.abs(found["student"] - found["teacher"]), kind="stable")
    else:
        order = np.argsort(-np.abs(next(iter(found.values()))), kind="stable")
    return [
        {**pairs[place]._asdict(), "differences": {name: float(each[place]) for name, each in found.items()}}
        for place in order[:n]
    ]


def _rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} with pairs of sentences: a CSV, JSON or JSONL file.")
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file))
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as {path.suffix or 'JSON'}: {error}.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{str(path)!r} must hold a list of pairs, and holds a {type(rows).__name__}.")
    return rows
