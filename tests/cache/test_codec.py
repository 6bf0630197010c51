"""Signals as bytes: what is read is what was kept, within the stated bound, and fair draws are fair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_distill.cache.codec import SparseRows, check_widths, decode, decode_hidden, encode, encode_hidden
from llm_distill.cache.methods import Hidden, Hybrid, Sampled, SparseMethod, TopK, make_method
from llm_distill.losses.fused.logits import top_tokens


def stored(method: SparseMethod, log_p: Tensor, seed: int = 0) -> SparseRows:
    """`log_p` after a round trip."""
    uniform = torch.rand(len(log_p), 2, generator=torch.Generator().manual_seed(seed))
    return decode(method, [encode(method, method(log_p, uniform))])


def dense(rows: SparseRows, vocab: int) -> Tensor:
    """Weights of all tokens, [rows, vocab]."""
    return torch.zeros(len(rows.ids), vocab).scatter_add_(1, rows.ids, rows.log_weights.exp())


SHAPES = {
    "random": lambda rows, vocab: torch.randn(rows, vocab) * 3,
    "uniform": lambda rows, vocab: torch.zeros(rows, vocab),
    "one-hot": lambda rows, vocab: torch.full((rows, vocab), -math.inf).scatter_(
        1, torch.randint(vocab, (rows, 1)), 0.0
    ),
    "ties": lambda rows, vocab: torch.randint(0, 3, (rows, vocab)).float(),
    "half impossible": lambda rows, vocab: torch.randn(rows, vocab).masked_fill(
        torch.arange(vocab) % 2 == 1, -math.inf
    ),
    "steep": lambda rows, vocab: -torch.arange(vocab).float().expand(rows, -1) * 2,
}


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=25, deadline=None)
@given(
    vocab=st.integers(1, 700),
    k=st.integers(1, 80),
    log2_step=st.integers(-17, -1),
    mass=st.sampled_from([1.0, 0.9]),
    threshold=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_top_k_is_within_its_bound_of_the_teacher(
    shape: str, vocab: int, k: int, log2_step: int, mass: float, threshold: float
) -> None:
    torch.manual_seed(vocab * 100 + k)
    log_p = SHAPES[shape](6, vocab).log_softmax(-1)
    method = TopK(k=k, mass=mass, threshold=threshold, step=2.0**log2_step)
    rows = stored(method, log_p)
    present = rows.log_weights > -math.inf
    exact = log_p.gather(1, rows.ids).exp().sqrt()
    spread = method.step * math.sqrt(min(k, vocab) + 1) / 2

    def bound(root: Tensor) -> Tensor:
        if spread >= 1:  # so coarse that nothing is promised
            return torch.full_like(root, math.inf)
        return (method.step / 2 + spread * root) / (1 - spread) + 1e-6

    off = ((rows.log_weights / 2).exp() - exact).abs()
    certain = exact >= method.step / 2  # what is less likely is kept only where nothing is likelier, a step up
    assert (off <= bound(exact) + method.step / 2 * ~certain)[present].all()
    total = rows.log_weights.exp().sum(-1) + rows.log_tail.exp()
    assert torch.allclose(total, torch.ones(6), atol=1e-5)
    left_out = 1 - torch.zeros_like(log_p).scatter_add_(1, rows.ids, present.float())
    tail = (log_p.exp() * left_out).sum(-1)
    assert torch.equal(rows.log_tail == -math.inf, left_out.sum(-1) == 0)
    assert (((rows.log_tail / 2).exp() - tail.sqrt()).abs() <= bound(tail.sqrt()) + 1e-3 * (tail < 1e-6)).all()
    for ids, has in zip(rows.ids, present, strict=True):
        assert len(set(ids[has].tolist())) == has.sum() <= k
    p = log_p.double().exp()
    likely = ((p.sqrt() / method.step).round().gt(0) & (p >= threshold)).sum(-1)
    if mass == 1.0:
        assert torch.equal(present.sum(-1), likely.clamp(1, k))
    else:
        full = (present.sum(-1) == k) | (present.sum(-1) >= likely)  # or stopped by the mass
        assert full.logical_or((exact.square() * present).sum(-1) >= mass - 1e-5).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", [1, 2, 3, 50, 300])
@pytest.mark.parametrize("method", [Hybrid(0.05), Hybrid(0.3, step=0.5), Sampled(20)], ids=str)
def test_fair_draws_are_unbiased(method: SparseMethod, vocab: int, shape: str) -> None:
    torch.manual_seed(vocab)
    log_p = SHAPES[shape](1, vocab).log_softmax(-1)
    p, draws = log_p.exp()[0], 4000
    seen = dense(stored(method, log_p.expand(draws, -1)), vocab)
    error = (seen.mean(0) - p).abs()
    weight = method.log_weights(torch.tensor([method.num_levels - 1])).exp()  # of a single draw
    variance = p * weight  # of a draw
    if isinstance(method, Hybrid):  # no more than the distance of two levels, where a token is always kept
        variance = torch.where(p < weight, variance, ((2 * p.sqrt() + method.step) * method.step).square())
    noise = (variance / draws).sqrt() + weight / draws * (p > 0)
    assert (error <= 5 * noise).all()
    assert (seen.mean(0)[p == 0] == 0).all()


def test_hybrid_noise_comes_from_the_tail_alone() -> None:
    torch.manual_seed(0)
    method = Hybrid(0.02, step=2**-8)
    log_p = (torch.randn(1, 2000) * 3).log_softmax(-1)
    p, threshold = log_p.exp()[0], float(method.log_weights(torch.tensor([method.num_levels - 1])).exp())
    seen = dense(stored(method, log_p.expand(3000, -1)), 2000)
    above = p >= threshold
    assert ((seen[:, above].sqrt() - p[above].sqrt()).abs() <= method.step + 1e-5).all()
    assert set((seen[:, ~above] / threshold).round(decimals=3).unique().tolist()) == {0.0, 1.0}
    num_stored = (seen > 0).sum(-1).float()
    assert num_stored.max() - num_stored.min() <= 1  # Σ min(1, p/τ), to the next whole number
    assert num_stored.mean().item() == pytest.approx((p / threshold).clamp(max=1).sum().item(), abs=0.05)


def test_sampling_has_less_noise_than_independent_draws() -> None:
    torch.manual_seed(0)
    log_p = (torch.randn(1, 500) * 2).log_softmax(-1)
    p = log_p.exp()[0]
    systematic = dense(stored(Sampled(50), log_p.expand(2000, -1)), 500)
    independent = torch.distributions.Multinomial(50, p).sample((2000,)) / 50
    assert ((systematic - p) ** 2).sum(-1).mean() < 0.8 * ((independent - p) ** 2).sum(-1).mean()


def test_the_entropy_is_kept() -> None:
    log_p = (torch.randn(40, 300) * torch.linspace(0, 6, 40)[:, None]).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for method in (TopK(4), Hybrid(0.1), Sampled(5)):
        assert (stored(method, log_p).entropy - entropy).abs().max() <= 1 / 32 + 1e-5


def test_sequences_are_decoded_together_as_alone() -> None:
    method = TopK(8, mass=0.9)
    texts = [method((torch.randn(n, 100) * 4).log_softmax(-1), torch.rand(n, 2)) for n in (3, 1, 5)]
    parts = [encode(method, tokens) for tokens in texts]
    together, alone = decode(method, parts), [decode(method, [part]) for part in parts]
    assert torch.allclose(together.log_tail, torch.cat([rows.log_tail for rows in alone]))
    for start, rows in zip((0, 3, 4), alone, strict=True):
        width = rows.ids.shape[1]
        assert torch.equal(together.ids[start : start + len(rows.ids), :width], rows.ids)
        assert torch.allclose(together.log_weights[start : start + len(rows.ids), :width], rows.log_weights)


@pytest.mark.parametrize("vocab", [1, 100, 5003])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_top_tokens_are_those_of_topk(vocab: int, k: int) -> None:
    log_p = torch.randn(9, vocab).log_softmax(-1)
    k = min(k, vocab)
    values, ids, _ = top_tokens(log_p, k)
    assert torch.equal(values, log_p.topk(k).values)
    assert torch.equal(log_p.gather(1, ids), values)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_hidden_states_come_back(dtype: str, bound: float) -> None:
    hidden = torch.randn(12, 48) * torch.logspace(-3, 3, 12)[:, None]
    method = Hidden(dtype)
    parts = [encode_hidden(method, part) for part in hidden.split([5, 7])]
    back = decode_hidden(method, parts, width=48)
    scale = hidden.abs() if dtype == "bfloat16" else hidden.abs().amax(-1, keepdim=True)
    assert ((back.float() - hidden).abs() <= bound * scale * 1.001).all()
    if dtype != "int8":
        exact = hidden.to(getattr(torch, dtype))
        assert torch.equal(decode_hidden(method, [encode_hidden(method, exact)], width=48), exact)


def test_bytes_that_do_not_hold_together_are_refused() -> None:
    method = TopK(4)
    part = encode(method, method(torch.randn(3, 50).log_softmax(-1), torch.rand(3, 2)))
    with pytest.raises(ValueError, match="were stored with"):
        decode(method, [{**part, "levels": part["levels"][:-1]}])
    with pytest.raises(ValueError, match="bytes were stored for"):
        decode(method, [{**part, "ids": bytes([127] * len(part["ids"]))}])


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("top_q", {}, "unknown method 'top_q'. There are top_k, hybrid, sampled, hidden"),
        ("top_k", {"draws": 3}, "top_k does not take these: draws"),
        ("top_k", {"k": 0}, "k must be positive, got 0"),
        ("top_k", {"mass": 1.5}, "mass is a share of 1"),
        ("top_k", {"step": 0.75}, "step at most 1/2"),
        ("hybrid", {"threshold": 1.0}, "threshold is a probability"),
        ("top_k", {"threshold": 1.0}, "threshold a probability below 1"),
        ("hybrid", {"step": 2.0}, "step at most 1"),
        ("hybrid", {"step": math.inf}, "step must be positive"),
        ("hidden", {"dtype": "float16"}, "float32, bfloat16 or int8"),
    ],
)
def test_parameters_that_cannot_be_are_refused(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(name, **parameters)


def test_what_the_format_has_no_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match="a vocabulary of 16,777,217 tokens is past"):
        check_widths(TopK(4), 2**24 + 1)
    with pytest.raises(ValueError, match="levels and the format"):
        check_widths(TopK(4, step=2**-18), 1000)
