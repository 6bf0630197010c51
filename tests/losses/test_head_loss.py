"""The fused head loss against autograd on the naive formula over full logits, in float64."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from head_cases import (
    POST,
    ROWS,
    STUDENT,
    TEACHER,
    VOCAB,
    Squared,
    compare,
    hidden_states,
    make_head,
    make_signal,
)
from textbook import CASES, from_the_paper
from torch import Tensor, nn

from llm_distill.divergences import make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import cpp_backend, fused_head_loss, head_loss, logits, products, torch_backend
from llm_distill.losses.fused.head_loss import opened_projection
from llm_distill.losses.fused.job import Choice, Few, Job, Projection
from llm_distill.losses.fused.logits import logits_in_chunks
from llm_distill.signals import HiddenSignal, MixtureSignal, SparseSignal

BACKENDS = {"compiled": cpp_backend, "torch": torch_backend}
both_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "chunk_rows", lambda *_: 16)  # 37 rows in chunks of 16, 16 and 5
    monkeypatch.setattr(torch_backend, "BLOCK_ELEMENTS", {"cpu": 5 * VOCAB})  # and those in blocks of 5


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test in one back end; the compiled one must be there, and not be left for the other unawares."""

    def choose(job: Job) -> Any:
        if request.param == "compiled" and len(job.teachers) <= 1:
            assert cpp_backend.kernels_of(job), "no kernels: is g++ installed?"
            return cpp_backend
        return torch_backend

    monkeypatch.setattr(head_loss, "choose_backend", choose)
    return request.param


@both_backends
@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize("kind", ["hidden", "mixture", "top 5", "top 1", "all"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradients_equal_autograd(
    backend: str, name: str, parameters: dict[str, float], kind: str, temperature: float
) -> None:
    compare(name, parameters, kind, make_head(STUDENT, 0), temperature=temperature)


@both_backends
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sampled_tokens_give_the_gradient_of_their_cross_entropy(backend: str, temperature: float) -> None:
    compare("forward_kl", {}, "sampled", make_head(STUDENT, 0), temperature=temperature)


@both_backends
@pytest.mark.parametrize(("scale", "soft_cap"), POST)
@pytest.mark.parametrize("bias", [True, False])
def test_scale_soft_cap_and_bias_are_in_the_gradient(
    backend: str, scale: float, soft_cap: float | None, bias: bool
) -> None:
    for kind in ("hidden", "top 5", "sampled"):
        compare("forward_kl", {}, kind, make_head(STUDENT, 0, scale, soft_cap, bias), temperature=1.5)


@both_backends
def test_a_sparse_row_with_fewer_tokens_is_padded_with_minus_infinity(backend: str) -> None:
    signal, _ = make_signal("top 5")
    short = SparseSignal(signal.ids[:, :3], signal.log_probs[:, :3], log_tail_of(signal, 3), VOCAB)
    padding = torch.zeros(ROWS, 2, dtype=torch.long)
    padded = SparseSignal(
        torch.cat([short.ids, padding], -1),
        torch.cat([short.log_probs, torch.full((ROWS, 2), -torch.inf)], -1),
        short.log_tail,
        VOCAB,
    )
    results = []
    for each in (short, padded):
        hidden = hidden_states(STUDENT, 5).requires_grad_()
        loss, _ = fused_head_loss(hidden, make_head(STUDENT, 0), each, make_divergence("reverse_kl"))
        results.append((loss, torch.autograd.grad(loss, hidden)[0]))
    torch.testing.assert_close(results[0], results[1])


def log_tail_of(signal: SparseSignal, k: int) -> Tensor:
    return (1 - signal.log_probs[:, :k].exp().sum(-1)).log()


def test_sampling_is_unbiased_over_many_draws() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05] + [0.0] * (VOCAB - 4)], dtype=torch.float64)
    hidden, head = hidden_states(STUDENT, 5)[:1].requires_grad_(), make_head(STUDENT, 0)
    ids = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    signal = SparseSignal(ids, torch.full(ids.shape, -torch.tensor(20_000.0).log().item()).double(), None, VOCAB)
    loss, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))
    (gradient,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(-(p * head(hidden).log_softmax(-1)).sum(), hidden)
    assert torch.nn.functional.cosine_similarity(gradient, expected).item() > 0.999


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_identical_models_give_zero(backend: str, name: str, parameters: dict[str, float], dtype: torch.dtype) -> None:
    head = make_head(STUDENT, 0)
    head.module.to(dtype)
    hidden = hidden_states(STUDENT, 5).to(dtype).requires_grad_()
    signal = HiddenSignal(hidden.detach(), head)
    loss, metrics = fused_head_loss(hidden, head, signal, make_divergence(name, **parameters), temperature=2.0)
    assert abs(loss.item()) < 1e-6
    assert metrics["kl"].abs().max() < 1e-6
    assert metrics["top1_agreement"].min() == 1
    torch.testing.assert_close(metrics["acceptance"], torch.ones(ROWS), rtol=0, atol=1e-5)


@both_backends
@pytest.mark.parametrize("kind", ["hidden", "top 5", "sampled"])
@pytest.mark.parametrize("sure", [0.9, 0.999])
def test_in_bfloat16_the_targets_own_gradient_is_right(backend: str, kind: str, sure: float) -> None:
    """−ce_weight must be added before the rounding, or a token that is nearly learned would be pushed down."""
    head, hidden = make_head(STUDENT, 0, bias=False), hidden_states(STUDENT, 5)
    with torch.no_grad():  # the student is this sure of the target
        head.module.weight.zero_()
        others = torch.tensor((1 - sure) / (VOCAB - 1) / sure).log()
        head.module.weight[1:VOCAB, 0], hidden[:, 0] = others, 1.0
    head.module.bfloat16()
    x = hidden.bfloat16()
    signal, _ = make_signal(kind)
    if kind == "sampled":  # many repetitions of the target
        ids = torch.zeros(ROWS, 50, dtype=torch.long)
        signal = SparseSignal(ids, torch.full(ids.shape, -torch.tensor(50.0).log().item()), None, VOCAB)
    targets = torch.zeros(ROWS, dtype=torch.long)
    weights = {"kd_weight": 1.0, "ce_weight": 0.0} if kind == "sampled" else {"kd_weight": 0.0, "ce_weight": 1.0}
    loss, _ = fused_head_loss(x, head, signal, make_divergence("forward_kl"), targets=targets, **weights)
    (gradient,) = torch.autograd.grad(loss, head.module.weight)
    q = head(x[:1]).float().softmax(-1)[0, 0]
    torch.testing.assert_close(gradient[0, 0].float(), q - 1, rtol=2e-2, atol=0)


def test_an_empty_tail_leaves_reverse_kl_finite() -> None:
    signal, _ = make_signal("top 5")
    empty = SparseSignal(signal.ids, signal.log_probs, torch.full((ROWS,), -torch.inf).double(), VOCAB)
    hidden = hidden_states(STUDENT, 5).requires_grad_()
    loss, _ = fused_head_loss(hidden, make_head(STUDENT, 0), empty, make_divergence("reverse_kl"))
    loss.backward()
    assert 0 < loss < 100
    assert hidden.grad.abs().max() < 1000


@both_backends
@pytest.mark.parametrize("kind", ["hidden", "top 5"])
def test_at_a_low_temperature_the_gradient_still_sums_to_zero(backend: str, kind: str) -> None:
    head, hidden = make_head(STUDENT, 0), (20 * hidden_states(STUDENT, 5)).float().requires_grad_()
    head.module.float()
    signal, _ = make_signal(kind, temperature=1e-2)
    loss, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), temperature=1e-2)
    (gradient,) = torch.autograd.grad(loss, head.module.bias)
    assert gradient.sum().abs() < 1e-4 * gradient.abs().sum()


def test_a_buffer_kept_from_inference_serves_training() -> None:
    signal, _ = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5)
    products._kept.clear()
    with torch.inference_mode():
        fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))
    fused_head_loss(hidden.requires_grad_(), head, signal, make_divergence("forward_kl"))[0].backward()
    assert hidden.grad.isfinite().all()


def test_a_second_backward_is_refused() -> None:
    signal, _ = make_signal("hidden")
    hidden = hidden_states(STUDENT, 5).requires_grad_()
    loss, _ = fused_head_loss(hidden, make_head(STUDENT, 0), signal, make_divergence("forward_kl"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given the gradients away"):
        loss.backward()


@both_backends
@pytest.mark.parametrize("kind", ["hidden", "top 5", "sampled"])
def test_large_logits_stay_finite(backend: str, kind: str) -> None:
    head, hidden = make_head(STUDENT, 0), (1e4 * hidden_states(STUDENT, 5)).float().requires_grad_()
    head.module.float()
    signal, _ = make_signal(kind)
    targets = torch.arange(ROWS) % VOCAB
    loss, metrics = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), targets=targets, ce_weight=0.5)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert head.module.weight.grad.isfinite().all()
    assert all(values.isfinite().all() for values in metrics.values())


@both_backends
def test_a_logit_that_is_not_a_number_is_seen_in_the_loss(backend: str) -> None:
    signal, _ = make_signal("hidden")
    hidden = hidden_states(STUDENT, 5)
    hidden[3, 0] = torch.nan
    loss, metrics = fused_head_loss(hidden, make_head(STUDENT, 0), signal, make_divergence("forward_kl"))
    assert loss.isnan()
    assert metrics["kd"].isnan().sum() == 1


@pytest.mark.parametrize("kind", ["hidden", "top 5", "sampled"])
def test_the_same_call_gives_the_same_bits(kind: str) -> None:
    signal, _ = make_signal(kind)
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).float().requires_grad_()
    head.module.float()
    runs = []
    for _ in range(2):
        loss, metrics = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))
        runs.append([loss, *torch.autograd.grad(loss, [hidden, head.module.weight]), *metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("buffer_mib", [1, 2])
def test_the_size_of_the_buffers_changes_nothing(buffer_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real number of rows a chunk
    torch.manual_seed(0)
    head = LMHead(nn.Linear(STUDENT, 1500), 1500)
    hidden, teacher = torch.randn(2, 300, STUDENT)
    found = []
    for size in (None, buffer_mib):
        x = hidden.clone().requires_grad_()
        loss, _ = fused_head_loss(x, head, HiddenSignal(teacher, head), make_divergence("jsd"), buffer_mib=size)
        found.append([loss, *torch.autograd.grad(loss, [x, head.module.weight])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_formula_that_cannot_be_translated_runs_in_torch(caplog: pytest.LogCaptureFixture) -> None:
    signal, p = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
    loss, _ = fused_head_loss(hidden, head, signal, Squared())
    expected = (p - head(hidden).softmax(-1)).square().sum() / ROWS
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, hidden)[0] for each in (loss, expected)))
    assert "torch.square cannot be translated" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted there")
def test_rows_are_shared_out_over_the_threads_of_the_products() -> None:
    """Which wait for work in a loop: any other thread would have to share their cores."""
    code = """if 1:
        import os, torch
        from torch import nn
        from llm_distill.divergences import make_divergence
        from llm_distill.losses.fused import fused_head_loss
        from llm_distill.heads import LMHead
        torch.set_num_threads(3)
        head, hidden = nn.Linear(64, 512), torch.randn(512, 64, requires_grad=True)
        torch.autograd.grad(head(hidden).exp().sum(), [hidden, head.weight])
        threads = len(os.listdir("/proc/self/task"))
        loss, _ = fused_head_loss(hidden, LMHead(head, 512), None, make_divergence("forward_kl"),
                                  targets=torch.arange(512), ce_weight=1.0)
        torch.autograd.grad(loss, [hidden, head.weight])
        print(threads, len(os.listdir("/proc/self/task")))
    """
    before, after = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert after == before


def test_every_pass_over_rows_is_vectorised() -> None:
    """One number after the other would take ten times as long, which a flag or a branch can bring on."""
    rows, vocab = 16, 50_000
    raw, teacher_raw = torch.randn(2, rows, vocab)

    def fastest(cap: float | None = None, bias: bool = False, ce_weight: float = 0.0) -> float:
        head = LMHead(nn.Linear(STUDENT, vocab, bias=bias), vocab, 1.0, cap)
        side = opened_projection(head, torch.zeros(rows, STUDENT), head.module.weight, head.module.bias)
        targets = torch.arange(rows)
        job = Job(side, None, [side], make_divergence("forward_kl"), 1.0, 1.0, 1.0, ce_weight, targets)
        job.metrics["kd"] = torch.empty(rows)
        times = []
        for _ in range(7):
            began = time.perf_counter()
            cpp_backend.dense(job, slice(0, rows), raw, [teacher_raw], torch.empty_like(raw))
            times.append(time.perf_counter() - began)
        return min(times)

    usual = fastest()
    for options in ({"ce_weight": 0.5}, {"bias": True}, {"cap": 30.0}):
        assert fastest(**options) < 5 * usual, options


def test_without_a_compiler_it_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpp_backend.compiled.cache_clear()
    try:
        assert cpp_backend.compiled(make_divergence("jsd"), torch.float32, torch.float32, True) is None
        compare("jsd", {"beta": 0.5}, "hidden", make_head(STUDENT, 0))
    finally:
        cpp_backend.compiled.cache_clear()


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_16_bit_products_are_summed_in_float32(
    weight: torch.dtype, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one tensor of float32, or in two of which the one becomes the gradient."""
    monkeypatch.setattr(products, "VOCAB_TILE", {"cpu": 7})  # 29 rows in tiles of 7 and 1
    if not is_compiled:
        monkeypatch.setattr(cpp_backend, "kernels_of", lambda _: None)
    d_logits, x = torch.randn(5, 64, VOCAB).bfloat16(), torch.randn(5, 64, STUDENT).bfloat16()
    head = torch.zeros(VOCAB, STUDENT, dtype=weight)
    student = Projection(LMHead(nn.Linear(STUDENT, VOCAB), VOCAB), x[0], head.bfloat16(), None)
    job = Job(student, None, [], make_divergence("forward_kl"), 1.0, 0.0, 1.0, 0.0, None)
    gradient = products.WeightGradient(head, job, len(x))
    for d, h in zip(d_logits, x, strict=True):
        gradient.add(d, h)
    expected = sum((d.T @ h).float() for d, h in zip(d_logits, x, strict=True))
    in_halves = is_compiled and weight == torch.bfloat16
    assert (gradient.rest is not None) == in_halves
    assert torch.equal(gradient.total, expected.bfloat16() if in_halves else expected)


@pytest.mark.parametrize("rows", [128, 64, 16])
def test_a_weight_gradient_in_bfloat16_is_as_near_as_float32_would_be(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many products it is the sum of: one, two (both straight into bfloat16) or eight."""
    monkeypatch.setattr(head_loss, "chunk_rows", lambda *_: rows)
    torch.manual_seed(0)
    head = LMHead(nn.Linear(STUDENT, VOCAB).bfloat16(), VOCAB)
    x = torch.randn(128, STUDENT).bfloat16()
    chunks = (torch.randn(128, VOCAB).bfloat16() + 1).split(rows)  # all of one sign, so that the sum only grows
    parts = [(slice(i * rows, (i + 1) * rows), chunk) for i, chunk in enumerate(chunks)]
    monkeypatch.setattr(head_loss, "_chunks", lambda *_: parts)
    loss, _ = fused_head_loss(x, head, None, make_divergence("forward_kl"))
    (gradient,) = torch.autograd.grad(loss, head.module.weight)
    exact = torch.cat(chunks).double().T @ x.double() / 128
    assert (gradient.double() - exact).norm() < 3e-3 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 7, VOCAB, 100])
@pytest.mark.parametrize(("temperature", "scale", "soft_cap"), [(1.0, 1.0, None), (2.0, 1.7, 3.0)])
def test_the_likeliest_tokens_come_with_the_statistics(
    k: int, temperature: float, scale: float, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "chunk_rows", lambda *_: 16)
    head, hidden = make_head(STUDENT, 1, scale, soft_cap), hidden_states(STUDENT, 1)
    log_p = (head(hidden) / temperature).log_softmax(-1)
    for found in logits_in_chunks(hidden, head, temperature, Choice(k)):
        assert isinstance(found.scores, Few)
        expected = log_p[found.rows].topk(min(k, VOCAB))
        assert torch.allclose(found.scores.values - found.log_total[:, None], expected.values)
        assert torch.equal(found.scores.ids, expected.indices)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.3, 0.02, 1e-3])
@pytest.mark.parametrize("vocab", [3, 64, 1000])
@pytest.mark.parametrize(("temperature", "soft_cap"), [(1.0, None), (2.0, 6.0)])
def test_fair_draws_come_with_the_statistics(
    vocab: int, threshold: float, temperature: float, soft_cap: float | None
) -> None:
    torch.manual_seed(0)
    head, draws = LMHead(nn.Linear(STUDENT, vocab), vocab, soft_cap=soft_cap), 2000
    hidden, choice = torch.randn(1, STUDENT) * 5, Choice(int(1 / threshold) + 2, threshold)
    log_p = (head(hidden)[0] / temperature).log_softmax(-1)
    expected = (log_p.exp() / threshold).clamp(max=1)
    kept = []
    for found in logits_in_chunks(hidden.expand(draws, -1), head, temperature, choice, torch.rand(draws)):
        assert isinstance(found.scores, Few)
        drawn = found.scores.ids >= 0
        assert (found.scores.ids.diff() > 0)[drawn[:, 1:]].all()  # each once
        values = (found.scores.values - found.log_total[:, None])[drawn]
        assert torch.allclose(values, log_p[found.scores.ids[drawn]], atol=1e-5)
        assert ((drawn.sum(-1) - expected.sum()).abs() < 1 + 1e-3).all()
        kept.append(found.scores.ids[drawn])
    share = torch.bincount(torch.cat(kept), minlength=vocab) / draws
    assert (share[expected >= 1] == 1).all()
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 2 / draws).all()


@pytest.mark.parametrize("vocab", [3, 300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_tied_tokens_the_first_are_the_likeliest(vocab: int, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 9, (5, vocab)).to(dtype)
    raw[4, 1:] = -torch.inf
    head = LMHead(nn.Linear(1, vocab, bias=False), vocab)
    student = opened_projection(head, torch.zeros(5, 1, dtype=dtype), torch.zeros(vocab, 1, dtype=dtype), None)
    k = min(70, vocab)
    job = Job(student, None, [], make_divergence("forward_kl"), 1.0, 0.0, 1.0, 0.0, None)
    top = cpp_backend.statistics_and_few(job, raw, Choice(k))[1]
    expected = raw.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top.values[:4], expected.values[:4, :k])
    assert torch.equal(top.ids[:4], expected.indices[:4, :k])
    assert top.ids[4].tolist() == [0] + [-1] * (k - 1)
    assert (top.values[4, 1:] < -1e29).all()


@both_backends
def test_rows_past_the_vocabulary_get_no_mass_and_no_gradient(backend: str) -> None:
    head = make_head(STUDENT, 0)
    with torch.no_grad():
        head.module.weight[VOCAB:] = 1e3  # would take all the mass
    signal, _ = make_signal("hidden")
    loss, _ = fused_head_loss(hidden_states(STUDENT, 5), head, signal, make_divergence("forward_kl"))
    loss.backward()
    assert loss.isfinite()
    assert head.module.weight.grad[:VOCAB].abs().min() > 0
    assert head.module.weight.grad[VOCAB:].abs().max() == 0
    assert head.module.bias.grad[VOCAB:].abs().max() == 0


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    signal, _ = make_signal("hidden")
    gradients = []
    for frozen in (False, True):
        head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
        head.module.requires_grad_(not frozen)
        loss, _ = fused_head_loss(hidden, head, signal, make_divergence("jsd"))
        loss.backward()
        gradients.append(hidden.grad)
        assert (head.module.weight.grad is None) == frozen
    assert torch.equal(*gradients)


@both_backends
def test_no_grad_gives_the_value_alone(backend: str) -> None:
    signal, _ = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
    with torch.no_grad():
        value, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))
    assert not value.requires_grad
    assert torch.equal(value, fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))[0].detach())


@both_backends
def test_no_rows_give_a_differentiable_zero(backend: str) -> None:
    head, hidden = make_head(STUDENT, 0), torch.zeros(0, STUDENT, dtype=torch.float64, requires_grad=True)
    signal = HiddenSignal(torch.zeros(0, TEACHER, dtype=torch.float64), make_head(TEACHER, 1))
    loss, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), num_rows=7)
    loss.backward()
    assert loss.item() == 0
    assert head.module.weight.grad.abs().max() == 0


def test_no_tensor_of_rows_by_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():  # the memory of a chunk is bytes
                    self.elements = max(self.elements, tensor.numel())
            return result

    signal, _ = make_signal("hidden")
    with Largest() as largest:
        loss, _ = fused_head_loss(
            hidden_states(STUDENT, 5).requires_grad_(), make_head(STUDENT, 0), signal, make_divergence("jsd")
        )
        loss.backward()
    assert 13 * VOCAB <= largest.elements < ROWS * VOCAB


@both_backends
def test_metrics_are_what_they_say(backend: str) -> None:
    signal, p = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5)
    targets = torch.where(torch.arange(ROWS) % 3 == 0, p.argmax(-1), head(hidden).argmax(-1))
    targets = torch.where(torch.arange(ROWS) % 3 == 1, torch.arange(ROWS) % VOCAB, targets)
    options = {"temperature": 2.0, "targets": targets, "ce_weight": 0.5}
    _, metrics = fused_head_loss(hidden, head, signal, make_divergence("reverse_kl"), **options)
    q = head(hidden).softmax(-1).detach()
    p_T, q_T = ((head_(x) / 2).softmax(-1).detach() for head_, x in ((signal.head, signal.hidden), (head, hidden)))
    expected = {
        "kd": 4 * from_the_paper("reverse_kl", p_T, q_T),
        "ce": -q.log().gather(-1, targets[:, None])[:, 0],
        "teacher_ce": -p.log().gather(-1, targets[:, None])[:, 0],
        "kl": from_the_paper("forward_kl", p, q),
        "entropy": -(q * q.log()).sum(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "acceptance": torch.minimum(p, q).sum(-1),
        "confidence": q.amax(-1),
        "teacher_confidence": p.amax(-1),
        "correct": (q.argmax(-1) == targets).double(),
        "teacher_correct": (p.argmax(-1) == targets).double(),
    }
    assert 0 < metrics["correct"].mean() < 1
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_float16_gradients_survive_many_rows_under_a_loss_scale() -> None:
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5)
    head.module.half()
    signal, _ = make_signal("hidden")
    hidden16 = hidden.half().requires_grad_()
    loss, _ = fused_head_loss(hidden16, head, signal, make_divergence("forward_kl"), num_rows=10**7)
    (loss * 2.0**20).backward()
    exact = make_head(STUDENT, 0)
    loss, _ = fused_head_loss(hidden.requires_grad_(), exact, signal, make_divergence("forward_kl"), num_rows=10**7)
    (loss * 2.0**20).backward()
    for ours, theirs in ((hidden16.grad, hidden.grad), (head.module.weight.grad, exact.module.weight.grad)):
        assert torch.nn.functional.cosine_similarity(ours.double().flatten(), theirs.flatten(), 0) > 0.999


@both_backends
def test_under_autocast_products_run_in_its_precision_and_gradients_in_the_parameters(backend: str) -> None:
    signal, _ = make_signal("hidden")
    found = []
    for enabled in (False, True):
        head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).float().requires_grad_()
        head.module.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))[0].backward()
        assert head.module.weight.grad.dtype == hidden.grad.dtype == torch.float32
        found.append(head.module.weight.grad.flatten())
    assert not torch.equal(*found)
    assert torch.nn.functional.cosine_similarity(*found, 0) > 0.999


@both_backends
def test_gradients_in_bfloat16_are_near_those_in_float64(backend: str) -> None:
    signal, _ = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
    fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))[0].backward()
    exact = head.module.weight.grad.clone(), hidden.grad.clone()
    low = make_head(STUDENT, 0)
    low.module.bfloat16()
    signal_low = HiddenSignal(signal.hidden.bfloat16(), make_head(TEACHER, 1, 0.5, 4.0))
    signal_low.head.module.bfloat16()
    hidden_low = hidden.detach().bfloat16().requires_grad_()
    fused_head_loss(hidden_low, low, signal_low, make_divergence("forward_kl"))[0].backward()
    for ours, theirs in zip((low.module.weight.grad, hidden_low.grad), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(ours.double().flatten(), theirs.flatten(), 0) > 0.999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"signal": "short"}, r"\(37, 8\) and a signal of 3 rows"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"\(37, 8\) and targets \(3,\)"),
        ({"ce_weight": 1.0}, "needs the targets"),
        ({"targets": torch.full((ROWS,), -100)}, "from -100 to -100, outside the student's 29"),
        ({"targets": torch.full((ROWS,), VOCAB)}, "to 29, outside"),
        ({"targets": torch.zeros(ROWS, dtype=torch.int32)}, "int64, got torch.int32"),
        ({"signal": "vocabulary"}, "29 tokens and the signal 20"),
        ({"signal": "device"}, r"student_hidden is on cpu, the signal on \['meta'\]"),
        ({"signal": "sampled", "divergence": "reverse_kl"}, "forward_kl only"),
        ({"signal": "sampled", "temperature": 2.0}, "those at temperature 1.0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shapes(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = dict(change)
    signal, _ = make_signal("sampled" if change.get("signal") == "sampled" else "hidden")
    if change.get("signal") == "short":
        signal = HiddenSignal(signal.hidden[:3], signal.head)
    if change.get("signal") == "vocabulary":
        signal = HiddenSignal(signal.hidden, LMHead(signal.head.module, 20))
    if change.get("signal") == "device":
        signal = HiddenSignal(signal.hidden.to("meta"), signal.head)
    change.pop("signal", None)
    divergence = make_divergence(change.pop("divergence", "forward_kl"))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user sees, without the tests' own checks
    with pytest.raises(ValueError, match=message):
        fused_head_loss(hidden_states(STUDENT, 5), make_head(STUDENT, 0), signal, divergence, **change)


@pytest.mark.parametrize(
    ("ids", "log_probs", "log_tail", "message"),
    [
        (torch.tensor([[0, VOCAB]]), torch.zeros(1, 2), torch.zeros(1), "outside the vocabulary"),
        (torch.tensor([[0, -1]]), torch.zeros(1, 2), torch.zeros(1), "from -1"),
        (torch.zeros(1, VOCAB + 1, dtype=torch.long), torch.zeros(1, VOCAB + 1), torch.zeros(1), "larger than the voc"),
        (torch.tensor([[0, 1]]), torch.zeros(1, 3), torch.zeros(1), "shapes differ"),
        (torch.tensor([[0, 1]]), torch.zeros(1, 2), torch.zeros(2), "shapes differ"),
    ],
)
def test_a_sparse_signal_checks_itself(ids: Tensor, log_probs: Tensor, log_tail: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseSignal(ids, log_probs, log_tail, VOCAB)


def test_a_mixture_checks_itself() -> None:
    signal, _ = make_signal("hidden")
    with pytest.raises(ValueError, match="sum to 1"):
        MixtureSignal((signal, signal), (0.5, 0.6))
    with pytest.raises(ValueError, match="share rows"):
        MixtureSignal((signal, HiddenSignal(signal.hidden[:3], signal.head)), (0.5, 0.5))
