"""What each model gives to every token of some texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import VOCAB, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerBase

from llm_distill import LiveTeacher
from llm_distill.evaluation.compare import Scores
from llm_distill.evaluation.figures import domain_figures
from llm_distill.rows import IGNORED

COLUMNS = {"ce", "confidence", "correct", "kl", "reverse_kl", "top1_agreement", "acceptance"}


def naive(model: torch.nn.Module, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """log-probabilities [counted, vocab] in float64 and the tokens that came, of one text alone."""
    ids, counts = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != IGNORED
    with torch.no_grad():
        log_q = model(ids).logits[0, :-1].double().log_softmax(-1)
    return log_q[counts], ids[0, 1:][counts]


def test_scores_are_those_of_full_logits_in_float64(
    measure_scores: Callable[..., dict[str, Scores]], rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    scores = measure_scores(batch_size=3)
    student, teacher = tiny_llama(1, hidden=16).eval(), tiny_llama(2).eval()
    expected: dict[str, list[Tensor]] = {name: [] for name in (*COLUMNS, "teacher_ce")}
    for row in rows:
        (log_q, targets), (log_p, _) = naive(student, row), naive(teacher, row)
        p, q = log_p.exp(), log_q.exp()
        of_row = {
            "ce": -log_q.gather(-1, targets[:, None])[:, 0],
            "teacher_ce": -log_p.gather(-1, targets[:, None])[:, 0],
            "confidence": q.amax(-1),
            "correct": q.argmax(-1) == targets,
            "kl": (p * (log_p - log_q)).sum(-1),
            "reverse_kl": (q * (log_q - log_p)).sum(-1),
            "top1_agreement": p.argmax(-1) == q.argmax(-1),
            "acceptance": torch.minimum(p, q).sum(-1),
        }
        for name, values in of_row.items():
            expected[name].append(values.double())
    assert scores["student"].columns.keys() == COLUMNS
    for name, values in expected.items():
        of_model = scores["teacher" if name == "teacher_ce" else "student"]
        ours = of_model.columns[name.removeprefix("teacher_")]
        np.testing.assert_allclose(ours, torch.cat(values).numpy(), atol=1e-5, rtol=1e-4, err_msg=name)
    text = tokenizer.decode(rows[0]["input_ids"][1:])
    assert scores["student"].num_bytes[0] == len(text.encode())
    assert scores["student"].per_text()[3] == sum(label != IGNORED for label in rows[3]["labels"][1:])


def test_scores_do_not_depend_on_batches_or_on_who_else_is_measured(
    measure_scores: Callable[..., dict[str, Scores]],
) -> None:
    together, alone = measure_scores(batch_size=4), measure_scores({"student": tiny_llama(1, hidden=16)}, batch_size=1)
    assert set(together) == {"student", "teacher", "baseline"}
    for name, values in alone["student"].columns.items():
        np.testing.assert_allclose(values, together["student"].columns[name], atol=1e-5, rtol=1e-4)
    np.testing.assert_array_equal(alone["student"].token, together["student"].token)


def test_a_student_that_is_its_teacher_is_exactly_like_it(
    measure_scores: Callable[..., dict[str, Scores]], tokenizer: PreTrainedTokenizerBase
) -> None:
    figures = domain_figures(measure_scores({"student": tiny_llama(2)}), comparable=True)
    assert figures["likeness"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert figures["likeness"]["top1_agreement"]["value"] == 1
    assert figures["likeness"]["acceptance"]["value"] == pytest.approx(1, abs=1e-5)
    assert figures["models"]["student"]["loss"] == pytest.approx(figures["models"]["teacher"]["loss"], rel=1e-6)


def test_the_memory_does_not_hold_logits_of_all_rows(measure_scores: Callable[..., dict[str, Scores]]) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.elements = max(self.elements, tensor.numel())
            return result

    teacher = LiveTeacher(tiny_llama(2))
    teacher.language_model.head = teacher.head.__class__(teacher.head.module, VOCAB)
    with pytest.MonkeyPatch.context() as patch, Largest() as largest:
        patch.setattr("llm_distill.losses.fused.head_loss.BUFFER_MIB", {"cpu": 0})
        patch.setattr("llm_distill.losses.fused.head_loss.MIN_CHUNK_ROWS", 16)
        scores = measure_scores(teacher=teacher, batch_size=11)["student"]
    assert len(scores.token) > 2 * 16
    assert largest.elements < len(scores.token) * VOCAB
