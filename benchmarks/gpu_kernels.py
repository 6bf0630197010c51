"""The Triton kernels against float64 at the sizes that they are made for: part `kernels_*` of `gpu.py`.

Inputs are random, their logits have a standard deviation of about 2. The reference takes the same inputs in float64 and
the divergences as the papers write them, and lets autograd find the gradients. "Value" is the relative distance of the
loss, "gradients" the largest one of the norms of the gradients on hidden states, weight and bias, and "largest" the
largest distance of an element, over the largest element.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from textbook import CASES, from_the_paper

from llm_distill.divergences import make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss, head_loss, triton_backend
from llm_distill.signals import HiddenSignal, MixtureSignal, Signal, SparseSignal

Check = Callable[[], tuple[dict[str, Any], dict[str, tuple[float, float]]]]

LIMITS = {
    torch.float32: {"value": 1e-5, "gradients": 1e-4, "largest": 1e-4},
    torch.bfloat16: {"value": 1e-4, "gradients": 1e-2, "largest": 2e-2},
    torch.float16: {"value": 1e-4, "gradients": 3e-3, "largest": 5e-3},
}
"""The gradient on the logits has the dtype of the products, and so each element 8 bits in bfloat16, 11 in float16."""
NARROW_LIMITS = {"value": 1e-2, "gradients": 3e-2, "largest": 6e-2}
"""Of logits with 8 bits."""


@dataclass(frozen=True)
class Case:
    """One call of the loss."""

    divergence: str = "forward_kl"
    parameters: dict[str, float] = field(default_factory=dict)
    signal: str | None = "hidden"
    """Or "top-k", "samples", "mixture"; None for the cross-entropy alone."""
    temperature: float = 1.0
    ce_weight: float = 0.0
    scale: float = 1.0
    soft_cap: float | None = None
    bias: bool = False
    vocab: int = 128_256
    dtype: torch.dtype = torch.float32
    narrow_logits: bool = False
    """As in a torch whose products of 16-bit matrices give no float32."""
    chunks: int = 1
    wants_gradients: bool = True

    def __str__(self) -> str:
        parameters = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        parts = [
            self.divergence + (f" ({parameters})" if parameters else ""),
            *([self.signal or "no teacher"] if self.signal != "hidden" else []),
            *([f"T = {self.temperature}"] if self.temperature != 1 else []),
            *([f"CE {self.ce_weight}"] if self.ce_weight else []),
            *([f"scale {self.scale}"] if self.scale != 1 else []),
            *([f"soft cap {self.soft_cap}"] if self.soft_cap else []),
            *(["bias"] if self.bias else []),
            *(["logits in 16 bits"] if self.narrow_logits else []),
            *([f"{self.chunks} chunks"] if self.chunks > 1 else []),
            *([] if self.wants_gradients else ["no_grad"]),
        ]
        return f"{', '.join(parts)}; V = {self.vocab:,}, {str(self.dtype).removeprefix('torch.')}"


def float32_checks(device: str, short: bool) -> dict[str, Check]:
    return checks(torch.float32, device, short)


def bfloat16_checks(device: str, short: bool) -> dict[str, Check]:
    return checks(torch.bfloat16, device, short)


def checks(dtype: torch.dtype, device: str, short: bool) -> dict[str, Check]:
    cases = [replace(case, dtype=dtype) for case in all_cases()]
    if dtype == torch.bfloat16:
        cases.append(Case(dtype=torch.float16))
        cases += [Case(name, dtype=dtype, narrow_logits=True) for name in ("forward_kl", "jsd")]
    if short:  # the interpreter takes a second for a few rows
        cases = [replace(case, vocab=200) for case in cases]
        cases = cases[::9] if dtype == torch.float32 else cases[-3:]
    found: dict[str, Check] = {str(case): functools.partial(compare, case, device) for case in cases}
    if dtype == torch.float32 or not short:
        found["all metrics of forward_kl"] = functools.partial(compare_metrics, dtype, device, short)
        found["identical models"] = functools.partial(identical_models, dtype, device, short)
        found["very large logits"] = functools.partial(large_logits, dtype, device, short)
    return found


def all_cases() -> Iterator[Case]:
    """Every kernel, and everything that is compiled into one, once at least."""
    for name, parameters in CASES:
        yield Case(name, parameters)
        yield Case(name, parameters, temperature=2.5, ce_weight=0.5, vocab=151_936)
    yield Case(ce_weight=0.5)
    yield Case("jsd", ce_weight=0.5, chunks=5, vocab=151_936)
    yield Case(wants_gradients=False)
    yield Case(signal=None, ce_weight=1.0, vocab=151_936)
    yield Case(signal="mixture")
    for scale, soft_cap in ((0.3, None), (1.0, 30.0), (1.7, 5.0)):
        post = {"scale": scale, "soft_cap": soft_cap, "bias": True}
        yield Case(**post, temperature=1.5, ce_weight=0.3)
        yield Case("reverse_kl", **post)
        yield Case(signal="top-k", **post, temperature=1.5, ce_weight=0.3)
        yield Case(signal="samples", **post, vocab=151_936)
    for name in ("forward_kl", "reverse_kl", "alpha_beta"):
        yield Case(name, signal="top-k", vocab=151_936)
        yield Case(name, signal="top-k", temperature=2.0, chunks=3)
    yield Case(signal="samples", temperature=2.0, ce_weight=0.5)


class Problem:
    """Inputs of a case, and what they should give."""

    def __init__(self, case: Case, device: str) -> None:
        small = case.vocab < 1000
        self.case, self.device, self.rows, self.k = case, device, 5 if small else 333, 8 if small else 64
        torch.manual_seed(0)
        self.hidden, self.head = self._side(24 if small else 896, case.scale, case.soft_cap, case.bias)
        self.teachers = [self._side(32 if small else 1024, 1.0, 40.0, False) for _ in range(2)]
        for parameter in (self.hidden, *self.head.module.parameters()):
            parameter.requires_grad_(case.wants_gradients)
        self.targets = torch.randint(0, case.vocab, (self.rows,), device=device)
        self.signal, self.p = self._signal()

    def _side(self, width: int, scale: float, soft_cap: float | None, bias: bool) -> tuple[Tensor, LMHead]:
        options = {"device": self.device, "dtype": self.case.dtype}
        module = nn.Linear(width, self.case.vocab, bias=bias, **options).requires_grad_(False)
        module.weight.normal_(std=2 / scale / math.sqrt(width))
        return torch.randn(self.rows, width, **options), LMHead(module, self.case.vocab, scale, soft_cap)

    def _signal(self) -> tuple[Signal | None, Tensor]:
        """A signal, and the teacher's distribution as far as it tells it."""
        case, vocab = self.case, self.case.vocab
        members = [HiddenSignal(hidden, head) for hidden, head in self.teachers]
        parts = [(exact_logits(m.hidden.double(), m.head) / case.temperature).softmax(-1) for m in members]
        if case.signal == "mixture":
            return MixtureSignal(tuple(members), (0.3, 0.7)), 0.3 * parts[0] + 0.7 * parts[1]
        p = parts[0]
        if case.signal == "samples":
            ids = torch.multinomial(p, self.k, replacement=True)
            weights = torch.full(ids.shape, -math.log(self.k), device=self.device)
            counts = torch.zeros_like(p).scatter_add(-1, ids, weights.double().exp())
            return SparseSignal(ids, weights, None, vocab, case.temperature), counts
        if case.signal == "top-k":
            top, ids = p.topk(self.k)
            tail = (1 - top.sum(-1)).log()
            return SparseSignal(ids, top.log().float(), tail.float(), vocab, case.temperature), p
        return (None if case.signal is None else members[0]), p

    def fused(self) -> tuple[Tensor, dict[str, Tensor]]:
        case = self.case
        with back_end(case, self.device):
            return fused_head_loss(
                self.hidden,
                self.head,
                self.signal,
                make_divergence(case.divergence, **case.parameters),
                temperature=case.temperature,
                ce_weight=case.ce_weight,
                targets=self.targets,
            )

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients, in float64."""
        case = self.case
        hidden, *parameters = leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves()]
        logits = exact_logits(hidden, self.head, *parameters)
        log_q = (logits / case.temperature).log_softmax(-1)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if case.signal is not None:
            loss = loss + case.temperature**2 * self._divergence(log_q).mean()
        if case.ce_weight:
            loss = loss + case.ce_weight * nn.functional.cross_entropy(logits, self.targets)
        return loss.detach(), list(torch.autograd.grad(loss, leaves)) if case.wants_gradients else []

    def _divergence(self, log_q: Tensor) -> Tensor:
        case, p, q = self.case, self.p, log_q.exp()
        if case.signal == "samples":
            return -(p * log_q).sum(-1)
        if case.signal == "top-k":
            assert isinstance(self.signal, SparseSignal)
            named = [x.gather(-1, self.signal.ids) for x in (p, q)]
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in named)
        return from_the_paper(case.divergence, p, q, **(case.parameters or defaults(case.divergence)))

    def leaves(self) -> list[Tensor]:
        return [self.hidden, *self.head.module.parameters()]


def exact_logits(hidden: Tensor, head: LMHead, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    weight = head.module.weight.double() if weight is None else weight
    logits = head.scale * (hidden @ weight.T + (0 if bias is None else bias))
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


def defaults(divergence: str) -> dict[str, float]:
    return {name: value for name, value in vars(make_divergence(divergence)).items() if isinstance(value, float)}


@contextmanager
def back_end(case: Case, device: str) -> Iterator[None]:
    """Only what the case is meant for may run, in so many chunks; on a CPU, Triton's interpreter."""
    small = case.vocab < 1000
    wanted = head_loss.torch_backend if case.signal == "mixture" else triton_backend
    original = head_loss.choose_backend

    def choose_backend(job: Any) -> ModuleType:
        chosen = original(job) if device == "cuda" else wanted
        if chosen is not wanted:
            raise RuntimeError(f"the loss ran in {chosen.__name__} and not in {wanted.__name__}")
        return chosen

    rows = -(-(5 if small else 333) // case.chunks)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(head_loss, "choose_backend", choose_backend))
        patches.enter_context(mock.patch.object(head_loss, "chunk_rows", return_value=rows))
        if small:
            patches.enter_context(mock.patch.object(triton_backend, "BLOCK", 128))
        if case.narrow_logits:
            patches.enter_context(mock.patch.object(head_loss, "logits_dtype", lambda compute, device: compute))
        yield


def compare(case: Case, device: str) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    problem = Problem(case, device)
    loss, _ = problem.fused()
    gradients = list(torch.autograd.grad(loss, problem.leaves())) if case.wants_gradients else []
    exact, exact_gradients = problem.exact()
    errors = {"value": float((loss.detach() - exact).abs() / exact.abs())}
    if gradients:
        differences = [(g.double() - e, e) for g, e in zip(gradients, exact_gradients, strict=True)]
        errors["gradients"] = max(float(d.norm() / e.norm()) for d, e in differences)
        errors["largest"] = max(float(d.abs().max() / e.abs().max()) for d, e in differences)
    limits = NARROW_LIMITS if case.narrow_logits else LIMITS[case.dtype]
    return errors, {name: (0.0, limits[name]) for name in errors}


def compare_metrics(dtype: torch.dtype, device: str, short: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The largest distance of a row, in nats or as a share."""
    problem = Problem(Case(dtype=dtype, vocab=200 if short else 151_936, wants_gradients=False), device)
    with torch.no_grad():
        _, metrics = problem.fused()
    log_q, log_p = exact_logits(problem.hidden.double(), problem.head).log_softmax(-1), problem.p.log()
    q, p, at = log_q.exp(), problem.p, problem.targets[:, None]
    expected = {
        "kl": (p * (log_p - log_q)).sum(-1),
        "entropy": -(q * log_q).sum(-1),
        "acceptance": torch.minimum(p, q).sum(-1),
        "top1_agreement": p.argmax(-1) == q.argmax(-1),
        "confidence": q.amax(-1),
        "teacher_confidence": p.amax(-1),
        "ce": -log_q.gather(-1, at)[:, 0],
        "teacher_ce": -log_p.gather(-1, at)[:, 0],
        "correct": q.argmax(-1) == problem.targets,
    }
    errors = {name: float((metrics[name].double() - value.double()).abs().max()) for name, value in expected.items()}
    return errors, dict.fromkeys(errors, (0.0, 1e-4))


def identical_models(dtype: torch.dtype, device: str, short: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every divergence of a model from itself: 0, and so is the gradient."""
    figures = {}
    for name, parameters in CASES[:: 4 if short else 1]:
        case = Case(name, parameters, dtype=dtype, vocab=200 if short else 128_256)
        problem = Problem(case, device)
        problem.signal = HiddenSignal(problem.hidden.detach(), problem.head)
        loss, _ = problem.fused()
        (gradient,) = torch.autograd.grad(loss, [problem.hidden])
        largest = max(abs(float(loss)), float(gradient.abs().max()))
        figures[name] = max(figures.get(name, 0.0), largest)
    return figures, dict.fromkeys(figures, (0.0, 1e-6))


def large_logits(dtype: torch.dtype, device: str, short: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of tens of thousands: the values and gradients that are finite, in all cases."""
    figures = {}
    for name in ("forward_kl", "reverse_kl", "jsd"):
        problem = Problem(Case(name, dtype=dtype, vocab=200 if short else 128_256), device)
        with torch.no_grad():
            problem.hidden.mul_(1e4)
        loss, _ = problem.fused()
        gradients = torch.autograd.grad(loss, problem.leaves())
        figures[name] = all(bool(x.isfinite().all()) for x in (loss, *gradients))
    return figures, dict.fromkeys(figures, (True, True))
