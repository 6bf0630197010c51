"""The passages in which a student is furthest from its teacher, token by token, for people to look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm_distill.evaluation.compare import TEACHER, HeldOutTexts, Scores
from llm_distill.heads import LMHead
from llm_distill.losses.fused.logits import logits_in_chunks, top_tokens
from llm_distill.losses.fused.task import TokenChoice, TopTokens
from llm_distill.models import kept_of, vocabulary_size
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal
from llm_distill.teachers.base import Teacher

PASSAGES, WINDOW = 3, 64
"""How many are shown, and how many tokens each has."""
TOP = 5
"""How many of what each model expected are shown."""


@torch.no_grad()
def furthest_passages(
    scores: Mapping[str, Scores], model: nn.Module, teacher: Teacher, texts: HeldOutTexts
) -> list[dict[str, Any]]:
    """Of the texts with the worst window, that window: mean KL, and of each token its KL, its probability under both
    models and what each of them thought likeliest.

    In one process only: the models run again on these texts.

    Args:
        scores: of these texts, the `student`'s and the `teacher`'s.
    """
    tokenizer = texts.tokenizer
    head = LMHead.of(model, vocabulary_size(tokenizer))
    student, teacher_loss = scores["student"], scores[TEACHER].columns["ce"]
    passages = []
    for start, stop in itertools.islice(_worst_windows(student), PASSAGES):
        row = int(student.row[start])
        batch = texts.collate([texts.dataset[row]])
        device = next(model.parameters()).device
        view = View.of(batch).to(device)
        positions = view.positions.position
        first = int(np.searchsorted(student.row, row))
        inside = slice(start - first, stop - first)
        signal = teacher.score(View.of_teacher(batch).to(device))
        if not isinstance(signal, HiddenSignal):
            return []  # an ensemble has no one top k
        student_tops = _top_tokens(kept_of(model, head, view).hidden[inside], head, tokenizer)
        teacher_tops = _top_tokens(signal.hidden[inside], signal.head, tokenizer)
        tokens = [
            {
                "token": tokenizer.decode([int(student.token[i])]),
                "kl": float(student.columns["kl"][i]),
                "student": float(np.exp(-student.columns["ce"][i])),
                "teacher": float(np.exp(-teacher_loss[i])),
                "student_top": student_top,
                "teacher_top": teacher_top,
            }
            for i, student_top, teacher_top in zip(range(start, stop), student_tops, teacher_tops, strict=True)
        ]
        passages.append(
            {
                "text": int(student.text[start]),
                "kl": float(student.columns["kl"][start:stop].mean()),
                "before": tokenizer.decode(batch["input_ids"][0, : int(positions[inside][0]) + 1][-WINDOW:]),
                "tokens": tokens,
            }
        )
    return passages


def _worst_windows(student: Scores) -> Iterator[tuple[int, int]]:
    """(start, stop) of each text's window of largest mean KL, the worst text first."""
    total = np.concatenate([[0.0], np.cumsum(student.columns["kl"], dtype=np.float64)])
    edges = np.concatenate([[0], np.cumsum(np.bincount(student.row))])
    windows = []
    for first, last in itertools.pairwise(edges.tolist()):
        length = min(WINDOW, last - first)
        if length < min(WINDOW, 8):
            continue  # a mean of a few tokens is noise
        starts = np.arange(first, last - length + 1)
        means = (total[starts + length] - total[starts]) / length
        best = int(means.argmax())
        windows.append((float(means[best]), first + best, first + best + length))
    seen = set()
    for _, start, stop in sorted(windows, reverse=True):
        if student.text[start] not in seen:
            seen.add(student.text[start])
            yield start, stop


def _top_tokens(hidden: Tensor, head: LMHead, tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[str, float]]]:
    """The likeliest tokens of each row, with their probabilities."""
    rows: list[list[tuple[str, float]]] = []
    for part in logits_in_chunks(hidden, head, 1.0, TokenChoice(TOP)):
        values, ids, _ = part.scores if isinstance(part.scores, TopTokens) else top_tokens(part.scores, TOP)
        probabilities = (values.float() - part.log_total[:, None].float()).exp()
        for row in zip(ids.tolist(), probabilities.tolist(), strict=True):
            rows.append([(tokenizer.decode([i]), p) for i, p in zip(*row, strict=True) if i >= 0])
    return rows
