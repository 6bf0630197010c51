"""The compiled back end of the CPU: when it runs, in which threads, and that it is vectorised."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from head_cases import (
    ROWS,
    STUDENT,
    VOCAB,
    Squared,
    compare,
    hidden_states,
    make_head,
    make_signal,
)
from torch import nn

from llm_distill.divergences import make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import cpp_backend, fused_head_loss
from llm_distill.losses.fused.head_loss import opened_projection
from llm_distill.losses.fused.task import Chunk, HeadLossTask

pytestmark = pytest.mark.usefixtures("several_chunks")


def test_a_formula_that_cannot_be_translated_runs_in_torch(caplog: pytest.LogCaptureFixture) -> None:
    signal, p = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0, rows=VOCAB), hidden_states(STUDENT, 5).requires_grad_()
    loss, _ = fused_head_loss(hidden, head, signal, Squared())
    expected = (p - head(hidden).softmax(-1)).square().sum() / ROWS
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden)[0] for value in (loss, expected)))
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
        task = HeadLossTask(side, None, [side], make_divergence("forward_kl"), 1.0, 1.0, 1.0, ce_weight, targets)
        task.metrics["kd"] = torch.empty(rows)
        kernels = cpp_backend.kernels_of(task)
        assert kernels is not None
        chunk = Chunk(slice(0, rows), raw, [teacher_raw], torch.empty_like(raw), None)
        times = []
        for _ in range(7):
            began = time.perf_counter()
            kernels.dense(task, chunk)
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
