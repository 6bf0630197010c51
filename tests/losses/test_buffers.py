"""The memory of the fused head loss: chunks of rows in buffers that are used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import (
    ROWS,
    STUDENT,
    VOCAB,
    hidden_states,
    make_head,
    make_signal,
)
from torch import Tensor, nn

from llm_distill.divergences import make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss, products
from llm_distill.signals import HiddenSignal

pytestmark = pytest.mark.usefixtures("several_chunks")


def test_a_buffer_kept_from_inference_serves_training() -> None:
    signal, _ = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5)
    products._spare_memory.clear()
    with torch.inference_mode():
        fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))
    fused_head_loss(hidden.requires_grad_(), head, signal, make_divergence("forward_kl"))[0].backward()
    assert hidden.grad.isfinite().all()


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
    results = []
    for size in (None, buffer_mib):
        x = hidden.clone().requires_grad_()
        loss, _ = fused_head_loss(x, head, HiddenSignal(teacher, head), make_divergence("jsd"), buffer_mib=size)
        results.append([loss, *torch.autograd.grad(loss, [x, head.module.weight])])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


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
