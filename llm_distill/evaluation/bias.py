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
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from llm_distill.evaluation.compare import TEACHER
from llm_distill.evaluation.statistics import correlation, format_interval, interval
from llm_distill.heads import LMHead
from llm_distill.losses.likelihoods import token_log_likelihoods
from llm_distill.models import LanguageModel, vocabulary_size
from llm_distill.ranks import map_over_ranks, ranks
from llm_distill.tables import Table

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
BATCH_SIZE = 32
"""Pairs at a time."""
EXAMPLES = 5
"""How many pairs are shown, those on which student and teacher differ most."""


class Pair(NamedTuple):
    first: str
    second: str
    category: str | None = None


def compare_bias(
    models: Mapping[str, LanguageModel], pairs: str | Path | Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The differences in log-likelihood of each of `models`. Pairs are split over the ranks of accelerate, each of
    which has all models whole; all get the same result.

    Args:
        models: by name, on their devices, with any tokenizers; all others are put beside the one called `teacher`.
        pairs: a CSV, JSON or JSONL file, or rows, with `first` and `second` (or `more` and `less`) and perhaps
            `category`; BUILT_IN by default.

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

    def score(share: Sequence[Pair]) -> Sequence[list[list[float]]]:
        of_models = [score_pairs(model, share, name) for name, model in models.items()]
        return np.stack(of_models, axis=1).tolist()

    scores = np.array(map_over_ranks(score, read))  # [pairs, models, scores]
    differences = {name: scores[:, number] for number, name in enumerate(models)}
    places: dict[str, list[int]] = {"all": list(range(len(read)))}
    for place, pair in enumerate(read):
        if pair.category is not None:
            places.setdefault(pair.category, []).append(place)
    figures = {
        score: {
            category: _category_figures({name: of_model[chosen, column] for name, of_model in differences.items()})
            for category, chosen in places.items()
        }
        for column, score in enumerate(SCORES)
    }
    examples = _choose_examples(read, {name: of_model[:, 0] for name, of_model in differences.items()})
    return {"pairs": len(read), "source": "built-in" if pairs is None else "given", **figures, "examples": examples}


def read_pairs(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[Pair]:
    """From a file or rows; see `compare_bias`.

    Raises:
        ValueError: no such file, no pairs in it, columns that are missing, two equal sentences.
    """
    rows = _read_rows(Path(source)) if isinstance(source, str | Path) else list(source)
    if not rows:
        raise ValueError("there are no pairs of sentences to compare: the file or the dataset is empty.")
    for number, row in enumerate(rows):
        names = next((pair for pair in COLUMNS if isinstance(row, Mapping) and set(pair) <= set(row)), None)
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


def score_pairs(model: LanguageModel, pairs: Sequence[Pair], name: str = "model") -> Float[NDArray, "pairs scores"]:
    """What `first` is likelier by in each pair in nats, by each of SCORES."""
    head = LMHead.of(model.model, vocabulary_size(model.require_tokenizer(name)))
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place].first))  # of a length: little padding
    differences = np.zeros((len(pairs), len(SCORES)))
    with tqdm(total=len(pairs), desc=f"Pairs of the {name}", unit=" pairs", disable=not ranks().is_main_process) as bar:
        for start in range(0, len(order), BATCH_SIZE):
            places = order[start : start + BATCH_SIZE]
            firsts = score_texts(model, head, [pairs[place].first for place in places])
            seconds = score_texts(model, head, [pairs[place].second for place in places])
            for place, first, second in zip(places, firsts, seconds, strict=True):
                differences[place] = _difference(first, second)
            bar.update(len(places))
    return differences


class ScoredText(NamedTuple):
    """The tokens of a text, each with its log-likelihood given those before it, in nats."""

    ids: list[int]
    log_likelihood: Float[Tensor, " tokens"]


def score_texts(model: LanguageModel, head: LMHead, texts: Sequence[str]) -> list[ScoredText]:
    """Each text as a document of its own, all in one forward. A tokenizer that begins no text with a token of its own
    gets one (beginning or end of text): otherwise nothing would say how likely the first word is.

    Raises:
        ValueError: a text longer than the model's context.
    """
    tokenizer = model.require_tokenizer("model")
    starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    documents = [tokenizer(text)["input_ids"] for text in texts]
    documents = [ids if ids[:1] == starts[:1] else starts[:1] + ids for ids in documents]
    longest = max(map(len, documents))
    if model.max_length is not None and longest > model.max_length:
        raise ValueError(f"a sentence has {longest:,} tokens, more than the model's context of {model.max_length:,}.")
    scores = token_log_likelihoods(model.model, head, documents)
    return [ScoredText(ids[1:], values) for ids, values in zip(documents, scores, strict=True)]


def bias_tables(bias: Mapping[str, Any]) -> list[Table]:
    """What came of `compare_bias`, by category but for `per_token`, and its examples."""
    names = list(bias["total"]["all"]["models"])
    beside = [name for name in names if f"{name}_beside_teacher" in bias["total"]["all"]]
    figures = ("correlation", "strength", "same_side")
    header = [f"{name}: {mean}" for mean in ("mean |Δ|", "mean Δ") for name in names]
    header += [f"{name}: {figure.replace('_', ' ')}" for name in beside for figure in figures]
    rows = []
    parts = [(score, category) for score in ("total", "shared") for category in bias[score]] + [("per_token", "all")]
    for score, category in parts:
        part = bias[score][category]
        cells = [part["models"][name][mean] for mean in ("mean_absolute", "mean") for name in names]
        cells += [part[f"{name}_beside_teacher"].get(figure) for name in beside for figure in figures]
        label = f"{score.replace('_', ' ')}: {category}"
        rows.append([label, f"{part['pairs']:,}", *(format_interval(cell, ".2f") for cell in cells)])
    examples = [
        [pair["category"] or "", pair["first"], pair["second"], *(f"{pair['differences'][n]:+.2f}" for n in names)]
        for pair in bias["examples"]
    ]
    return [
        Table(["Δ log-likelihood, nats", "pairs", *header], rows),
        Table(["Δ", "first", "second", *names], examples),
    ]


def _difference(first: ScoredText, second: ScoredText) -> tuple[float, float, float]:
    pairs = zip(reversed(first.ids), reversed(second.ids), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    a, b = first.log_likelihood, second.log_likelihood
    after = a[len(a) - shared :].sum() - b[len(b) - shared :].sum()
    return float(a.sum() - b.sum()), float(after), float(a.mean() - b.mean())


def _category_figures(differences: Mapping[str, NDArray]) -> dict[str, Any]:
    """Of one score over the pairs of one category, by model."""
    n = len(next(iter(differences.values())))
    ones, teacher = np.ones(n), differences.get(TEACHER)
    figures: dict[str, Any] = {
        "pairs": n,
        "models": {
            name: {"mean_absolute": interval(np.abs(values), ones), "mean": interval(values, ones)}
            for name, values in differences.items()
        },
    }
    for name, values in differences.items():
        if teacher is not None and name != TEACHER:
            beside = {
                "correlation": correlation(values, teacher),
                "strength": interval(np.abs(values), np.abs(teacher)),
                "same_side": interval(np.sign(values) == np.sign(teacher), ones),
            }
            known = {metric: figure for metric, figure in beside.items() if not isnan(figure["value"])}
            figures[f"{name}_beside_teacher"] = known
    return figures


def _choose_examples(pairs: Sequence[Pair], totals: Mapping[str, NDArray]) -> list[dict[str, Any]]:
    values = next(iter(totals.values()))
    if {"student", TEACHER} <= set(totals):
        values = totals["student"] - totals[TEACHER]
    return [
        {**pairs[place]._asdict(), "differences": {name: float(total[place]) for name, total in totals.items()}}
        for place in np.argsort(-np.abs(values), kind="stable")[:EXAMPLES]
    ]


def _read_rows(path: Path) -> list[Any]:
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
