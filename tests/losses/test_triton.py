"""The Triton kernels, interpreted on the CPU: against float64, against the torch back end; and compiled for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from head_cases import (
    PADDED,
    POST,
    ROWS,
    STUDENT,
    VOCAB,
    Squared,
    check_banned_token,
    compare,
    hidden_states,
    make_head,
    make_signal,
)
from textbook import CASES

pytest.importorskip("triton")

from llm_distill.divergences import make_divergence
from llm_distill.losses.fused import fused_head_loss, head_loss, triton_backend
from llm_distill.signals import HiddenSignal


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1", "conftest.py sets it before Triton is imported"
    monkeypatch.setattr(head_loss, "choose_backend", lambda _: triton_backend)
    monkeypatch.setattr(head_loss, "chunk_rows", lambda *_: 6)
    for module in ("head_cases", __name__):
        monkeypatch.setattr(f"{module}.ROWS", 9)  # in chunks of 6 and 3: each row is interpreted by itself
    monkeypatch.setattr(triton_backend, "BLOCK", 16)  # 29 tokens in blocks of 16 and 13


@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradients_equal_autograd(name: str, parameters: dict[str, float], temperature: float) -> None:
    compare(name, parameters, "hidden", make_head(STUDENT, 0), temperature=temperature)


@pytest.mark.parametrize(("scale", "soft_cap"), POST)
@pytest.mark.parametrize("kind", ["hidden", "top 5", "all", "sampled", "none"])
def test_scale_soft_cap_bias_and_sparse_signals(kind: str, scale: float, soft_cap: float | None) -> None:
    compare("forward_kl", {}, kind, make_head(STUDENT, 0, scale, soft_cap), temperature=1.5, ce_weight=0.3)


@pytest.mark.parametrize("rows", [VOCAB, PADDED])
@pytest.mark.parametrize("weights", [{"ce_weight": 0.0}, {"kd_weight": 0.0}])
def test_each_weight_may_be_zero(rows: int, weights: dict[str, float]) -> None:
    compare("forward_kl", {}, "hidden", make_head(STUDENT, 0, bias=False, rows=rows), temperature=1.5, **weights)


@pytest.mark.parametrize("name", ["reverse_kl", "alpha_beta"])
def test_sparse_signals_of_other_divergences(name: str) -> None:
    parameters = {"alpha": 0.2, "beta": 0.7} if name == "alpha_beta" else {}
    compare(name, parameters, "top 5", make_head(STUDENT, 0, bias=False))


@pytest.mark.parametrize("kind", ["hidden", "top 5", "sampled", "none"])
def test_metrics_are_those_of_the_torch_back_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signal, _ = make_signal(kind)
    options: dict[str, Any] = {"targets": torch.arange(ROWS) % VOCAB}
    results = []
    for backend in (triton_backend, head_loss.torch_backend):
        monkeypatch.setattr(head_loss, "choose_backend", lambda _, backend=backend: backend)
        results.append(
            fused_head_loss(
                hidden_states(STUDENT, 5), make_head(STUDENT, 0), signal, make_divergence("forward_kl"), **options
            )[1]
        )
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_identical_models_give_zero(name: str, parameters: dict[str, float]) -> None:
    head = make_head(STUDENT, 0, rows=VOCAB)
    head.module.float()
    hidden = hidden_states(STUDENT, 5).float().requires_grad_()
    divergence = make_divergence(name, **parameters)
    loss, metrics = fused_head_loss(hidden, head, HiddenSignal(hidden.detach(), head), divergence)
    assert abs(loss.item()) < 1e-6
    assert metrics["kl"].abs().max() < 1e-6
    assert metrics["top1_agreement"].min() == 1


def test_large_logits_stay_finite() -> None:
    head, hidden = make_head(STUDENT, 0), (1e4 * hidden_states(STUDENT, 5)).float().requires_grad_()
    head.module.float()
    loss, _ = fused_head_loss(hidden, head, make_signal("hidden")[0], make_divergence("jsd"))
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "parameter"), [("hidden", "weight"), ("hidden", "bias"), ("none", "bias")])
def test_a_logit_of_minus_infinity_is_a_token_without_mass(kind: str, parameter: str) -> None:
    check_banned_token(kind, 2.0, None, parameter)


def test_a_gradient_of_another_type_than_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: float32 logits of bfloat16 products, a bfloat16 gradient beside them."""
    monkeypatch.setattr(head_loss, "logits_dtype", lambda compute, device: torch.float32)
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).bfloat16().requires_grad_()
    head.module.bfloat16()
    signal, _ = make_signal("hidden")
    options = {"targets": torch.arange(ROWS) % VOCAB, "ce_weight": 0.5}
    results = []
    for backend in (triton_backend, head_loss.torch_backend):
        monkeypatch.setattr(head_loss, "choose_backend", lambda _, backend=backend: backend)
        loss, _ = fused_head_loss(hidden, head, signal, make_divergence("jsd"), **options)
        results.append([loss, *torch.autograd.grad(loss, [hidden, head.module.weight])])
    for first, second in zip(*results, strict=True):
        assert first.dtype == second.dtype
        assert torch.nn.functional.cosine_similarity(first.float().flatten(), second.float().flatten(), 0) > 0.9999


def test_a_formula_that_triton_does_not_have_is_known_before() -> None:
    assert triton_backend.can_run(make_divergence("alpha_beta"), torch.device("cpu"))
    assert not triton_backend.can_run(Squared(), torch.device("cpu"))


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llm_distill.divergences import make_divergence
from llm_distill.losses.fused import triton_backend, triton_kernels as kernels

def build(kernel, **constants):
    integers = dict.fromkeys(("V", "stride", "z_stride", "y_stride"), "i32")
    types = {**integers, "GRADIENT": "*bf16", "TARGETS": "*i64"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.isupper() else "fp32")
        for name in kernel.arg_names
    }
    triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})

common = {"REAL": tl.float32, "BLOCK": triton_backend.BLOCK}
one = {"HAS_BIAS": True, "PLAIN": False, "HAS_CAP": True}
both = {f"{side}_{name}": value for side in "ZY" for name, value in one.items()}
for name in ("forward_kl", "alpha_beta", "jsd"):
    divergence = make_divergence(name)
    known = divergence.slope_sum is not None
    build(kernels.dense_kernel, FORMULA=triton_backend.formula(divergence), WANTS_GRADIENT=True, WITH_CE=True,
          WITH_OUTSIDE=True, SLOPE_SUM_KNOWN=known, TEMPERED=True, **both, **common)
nothing = {"Z_BIAS": None, "Y_BIAS": None, "GRADIENT": None, "TARGETS": None, "OUTSIDE_SLOPE": None}
plain = {name: name.endswith("PLAIN") for name in both}
build(kernels.dense_kernel, FORMULA=triton_backend.formula(divergence), WANTS_GRADIENT=False, WITH_CE=False,
      WITH_OUTSIDE=False, SLOPE_SUM_KNOWN=known, TEMPERED=False, **nothing, **plain, **common)
build(kernels.statistics_kernel, TEMPERED=True, **one, **common)
build(kernels.softmax_gradient_kernel, TEMPERED=True, **one, **common)
build(kernels.softmax_gradient_kernel, BIAS=None, SLOPE_T=None, TEMPERED=False, HAS_BIAS=False, PLAIN=True,
      HAS_CAP=False, **common)
print("compiled")
"""


def test_the_kernels_compile_for_hopper_without_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]
