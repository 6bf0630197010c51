"""The losses between other tokens: their gradient, and whom they leave where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_distill.divergences import ForwardKL, ReverseKL, make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses import cross_tokenizer
from llm_distill.losses.cross_tokenizer import METHODS, TAU, aligned_head_loss
from llm_distill.losses.fused import fused_head_loss
from llm_distill.signals import AlignedSignal, HiddenSignal, MixtureSignal, SharedTokens, Vocabulary

VOCAB = 11


def head_of(vocab: int, width: int, seed: int, **options: Any) -> LMHead:
    torch.manual_seed(seed)
    return LMHead(
        nn.Linear(width, options.pop("rows", vocab), bias=options.pop("bias", False)).double(), vocab, **options
    )


def identity(vocab: int) -> SharedTokens:
    same = torch.arange(vocab)
    side = Vocabulary(same, same, same + 1)
    return SharedTokens(side, side, vocab + 1, same[:, None], torch.ones(vocab, 1))


def some_signal(seed: int = 0) -> tuple[Tensor, AlignedSignal]:
    """Random targets of the student, and what a teacher of a few more tokens says of four groups."""
    torch.manual_seed(seed)
    student = Vocabulary(
        torch.arange(VOCAB) // 2, torch.arange(VOCAB), torch.arange(VOCAB) + 1 + (torch.arange(VOCAB) % 2 == 0)
    )
    student = student._replace(end=student.end.clamp(max=VOCAB))
    teacher = Vocabulary(torch.arange(VOCAB + 3) // 3, torch.arange(VOCAB + 3), torch.arange(VOCAB + 3) + 1)
    pieces = torch.randint(VOCAB + 3, (VOCAB, 2))
    shared = SharedTokens(student, teacher, 7, pieces, torch.tensor([[2 / 3, 1 / 3]]).expand(VOCAB, 2))
    groups = torch.tensor([0, 0, 1, 2, 2, 2, 2, 3])
    signal = HiddenSignal(torch.randn(len(groups), 5, dtype=torch.float64), head_of(VOCAB + 3, 5, seed + 1))
    targets = torch.randint(VOCAB + 3, groups.shape)
    return torch.randint(VOCAB, (9,)), AlignedSignal(
        signal, targets, groups, torch.tensor([-1, 0, 1, 1, -1, 2, 2, 3, -1]), shared
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "capped", "padded", "biased"])
def test_the_gradient_is_that_of_finite_differences_in_float64(method: str, kind: str) -> None:
    options = {"capped": {"soft_cap": 2.0, "scale": 1.5}, "padded": {"rows": VOCAB + 4}, "biased": {"bias": True}}
    targets, signal = some_signal()
    head = head_of(VOCAB, 4, 7, **options.get(kind, {}))
    hidden = torch.randn(len(targets), 4, dtype=torch.float64, requires_grad=True)

    weight = head.module.weight

    def loss() -> Tensor:
        return aligned_head_loss(
            hidden, head, signal, method, ForwardKL(), targets=targets, kd_weight=0.7, ce_weight=0.3, num_rows=5
        )[0]

    loss().backward()
    for tensor in (hidden, weight):
        expected, flat = torch.zeros_like(tensor), tensor.detach().view(-1)
        with torch.no_grad():
            for place in range(tensor.numel()):
                flat[place] += 1e-6
                above = loss()
                flat[place] -= 2e-6
                expected.view(-1)[place] = (above - loss()) / 2e-6
                flat[place] += 1e-6
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_equal_tokens_give_the_loss_without_alignment(divergence: str) -> None:
    torch.manual_seed(0)
    hidden, teachers = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    student, signal = head_of(VOCAB, 4, 1), HiddenSignal(teachers, head_of(VOCAB, 5, 2))
    targets, rows = torch.randint(VOCAB, (6,)), torch.arange(6)
    aligned = AlignedSignal(signal, targets, rows, rows, identity(VOCAB))
    results = []
    for loss in (
        lambda x, y: fused_head_loss(x, student, signal, y, ce_weight=0.1, targets=targets),
        lambda x, y: aligned_head_loss(x, student, aligned, "prefix", y, ce_weight=0.1, targets=targets),
    ):
        student.module.weight.grad, own = None, hidden.clone().requires_grad_()
        value, metrics = loss(own, make_divergence(divergence))
        value.backward()
        results.append(
            (
                value,
                own.grad,
                student.module.weight.grad.clone(),
                *(metrics[n] for n in ("kd", "ce", "entropy", "correct", "teacher_ce")),
            )
        )
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def numerals() -> tuple[SharedTokens, Tensor, Tensor]:
    """A student of the tokens 1, 2, 12, 122 and a letter, as Llama, and a teacher of 1, 2 and that letter, as Qwen;
    what the teacher says at 1, 2, 2, and the student's probabilities that say the same.
    """
    student = Vocabulary(torch.tensor([0, 1, 0, 0, 2]), torch.tensor([0, 3, 1, 2, 4]), torch.tensor([3, 4, 3, 3, 5]))
    teacher = Vocabulary(torch.arange(3), torch.arange(3), torch.arange(3) + 1)
    pieces = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1], [2, 0, 0]])
    weights = torch.tensor([[1, 0, 0], [1, 0, 0], [2 / 3, 1 / 3, 0], [4 / 7, 2 / 7, 1 / 7], [1, 0, 0]])
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
    first, second, third = p[0], p[1], p[2]
    twelve = first[0] * second[1]
    q = [first[0] - twelve, first[1], twelve * (1 - third[1]), twelve * third[1], first[2]]
    return SharedTokens(student, teacher, 4, pieces, weights), p, torch.stack(q)


@pytest.mark.parametrize("method", ["prefix", "alm"])
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()])
def test_a_student_that_says_the_same_in_other_tokens_stays_where_it_is(method: str, divergence: Any) -> None:
    """GOLD and its like push such a student's numerals down, for want of a counterpart."""
    shared, p, q = numerals()
    signal = HiddenSignal(torch.eye(3, dtype=torch.float64), LMHead(nn.Linear(3, 3, bias=False).double(), 3))
    with torch.no_grad():
        signal.head.module.weight.copy_(p.log().T)
    head = LMHead(nn.Linear(1, 5, bias=False).double(), 5)
    with torch.no_grad():
        head.module.weight.copy_(q.log()[:, None])
    group = torch.zeros(1, dtype=torch.long)
    aligned = AlignedSignal(signal, torch.tensor([0, 1, 1]), group.expand(3), group, shared)
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    loss, _ = aligned_head_loss(hidden, head, aligned, method, divergence, targets=torch.tensor([3]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert head.module.weight.grad.abs().max() < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_chunks_change_nothing_and_no_text_sees_another(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, signal = some_signal()
    head, hidden = head_of(VOCAB, 4, 7), torch.randn(len(targets), 4, dtype=torch.float64)
    whole, metrics = aligned_head_loss(hidden, head, signal, method, ForwardKL(), targets=targets, ce_weight=0.1)
    monkeypatch.setattr(cross_tokenizer, "chunk_rows", lambda *_: 2)
    parts, others = aligned_head_loss(hidden, head, signal, method, ForwardKL(), targets=targets, ce_weight=0.1)
    torch.testing.assert_close(whole, parts)
    for name, values in metrics.items():
        torch.testing.assert_close(values, others[name], equal_nan=True)
    texts = torch.tensor([True] * 5 + [False] * 4), torch.tensor([False] * 5 + [True] * 4)
    by_text = [
        aligned_head_loss(
            hidden[rows],
            head,
            signal.select(rows),
            method,
            ForwardKL(),
            targets=targets[rows],
            ce_weight=0.1,
            num_rows=9,
        )[0]
        for rows in texts
    ]
    torch.testing.assert_close(sum(by_text), whole)


def test_values_are_those_of_the_formulas() -> None:
    targets, signal = some_signal()
    head, hidden = head_of(VOCAB, 4, 7), torch.randn(len(targets), 4, dtype=torch.float64)
    log_q = (hidden @ head.module.weight.T).log_softmax(-1)
    log_p = signal.signal.head(signal.signal.hidden).log_softmax(-1)
    rows = [([1], [0, 1]), ([2, 3], [2]), ([5, 6], [3, 4, 5, 6]), ([7], [7])]
    for method in ("xtoken", "uld", "alm"):
        _, metrics = aligned_head_loss(hidden, head, signal, method, ForwardKL(), targets=targets)
        for ours, theirs in rows:
            p, q = log_p[theirs].exp(), log_q[ours].exp()
            if method == "uld":
                first = torch.cat([q[0].sort(descending=True).values, torch.zeros(3, dtype=torch.float64)])
                value = (p[0].sort(descending=True).values - first).abs().sum()
            elif method == "xtoken":
                projected = torch.zeros(VOCAB + 3, dtype=torch.float64)
                for token in range(VOCAB):
                    for piece, weight in zip(signal.shared.pieces[token], signal.shared.weights[token], strict=True):
                        projected[piece] += weight * q.mean(0)[token]
                reached = projected > 0
                value = (p.mean(0) * (p.mean(0) / projected).log())[reached].sum()
            else:
                likely = []
                for log_probs, places, side, of in (
                    (log_p, theirs, signal.shared.teacher, signal.targets),
                    (log_q, ours, signal.shared.student, targets),
                ):
                    last = side.begins_with(of[places[-1:]])[0]
                    log = log_probs[places[-1]][: len(last)][last].logsumexp(0)
                    likely.append((log + sum(log_probs[place, of[place]] for place in places[:-1])) / TAU)
                a, b = likely[0].exp(), likely[1].exp()
                value = TAU * (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())
            assert metrics["kd"][ours[0]].item() == pytest.approx(value.item(), rel=1e-6)
            for other in ours[1:]:
                assert metrics["kd"][other] == 0
            own = sum(log_p[place, signal.targets[place]] for place in theirs)
            assert metrics["teacher_ce"][ours].sum().item() == pytest.approx(-own.item())
        assert metrics["teacher_ce"][[0, 4, 8]].isnan().all()


def test_a_mixture_of_one_is_that_one() -> None:
    targets, signal = some_signal()
    head, hidden = head_of(VOCAB, 4, 7), torch.randn(len(targets), 4, dtype=torch.float64)
    mixture = AlignedSignal(
        MixtureSignal((signal.signal, signal.signal), (0.25, 0.75)),
        *(getattr(signal, n) for n in ("targets", "groups", "student_groups", "shared")),
    )
    one, many = (
        aligned_head_loss(hidden, head, s, "prefix", ForwardKL(), targets=targets)[0] for s in (signal, mixture)
    )
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-9)
