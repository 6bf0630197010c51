"""The Triton kernels of the fused head loss: one program a row (the last one: a block of a row).

`triton_backend.py` calls them. Logits come as raw products, float32, and gradients may be written over them.
"""

import triton
import triton.language as tl

EXCLUDED = tl.constexpr(-1e29)
NOTHING = tl.constexpr(-1e30)


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, 0.0).to(x.dtype) - tl.where(x < 0, 1.0, 0.0).to(x.dtype)


@triton.jit
def expm1(x):
    near = 1.0 + x / 10
    for i in tl.static_range(8):
        near = 1.0 + x / (9 - i) * near
    return tl.where(tl.abs(x) < 0.3, x * near, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    w = 1.0 + x
    exact = w == 1
    return tl.where(exact, x, tl.log(w) * x / tl.where(exact, 1.0, w - 1).to(x.dtype))


@triton.jit
def _tanh(x):
    t = expm1(-2 * tl.abs(x))
    return -sign(x) * t / (2 + t)


@triton.jit
def _slope_of_tanh(tanh):
    tanh = tl.maximum(tanh, -1.0)  # less where the logit is NOTHING: there it is 0
    return 1 - tanh * tanh


@triton.jit
def _logits(
    RAW,
    BIAS,
    columns,
    V,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_CAP: tl.constexpr,
    REAL: tl.constexpr,
):
    """A block of a row, post-processed; NOTHING where it is past the vocabulary or excluded."""
    inside = columns < V
    raw = tl.load(RAW + columns, mask=inside, other=NOTHING).to(REAL)
    z = raw
    if HAS_BIAS:
        z += tl.load(BIAS + columns, mask=inside, other=0.0).to(REAL)
    if not PLAIN:
        z = z * scale
        if HAS_CAP:
            z = cap * _tanh(z / cap)
    return tl.where((raw < EXCLUDED) | (z < EXCLUDED), NOTHING, z).to(REAL)


@triton.jit
def statistics_kernel(
    RAW, BIAS, MAXIMUM, LOG_TOTAL, TEMPERED_LOG_TOTAL, MEAN, V, stride, scale, cap, inverse_T,
    HAS_BIAS: tl.constexpr, PLAIN: tl.constexpr, HAS_CAP: tl.constexpr, TEMPERED: tl.constexpr,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    RAW += row * stride
    # Each place in the block has a running maximum and sums relative to it: nothing is exchanged before the end.
    maximum = tl.full((BLOCK,), 2 * NOTHING, REAL)
    total, total_T, weighted = tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL)
    for start in range(0, V, BLOCK):
        z = _logits(RAW, BIAS, start + tl.arange(0, BLOCK), V, scale, cap, HAS_BIAS, PLAIN, HAS_CAP, REAL)
        to_maximum = z - maximum
        is_higher = to_maximum > 0
        e = tl.exp(-tl.abs(to_maximum))
        weighted = tl.where(is_higher, (weighted - total * to_maximum) * e, weighted + e * to_maximum)
        total = tl.where(is_higher, total * e + 1, total + e)
        if TEMPERED:
            e_T = tl.exp(-tl.abs(to_maximum) * inverse_T)
            total_T = tl.where(is_higher, total_T * e_T + 1, total_T + e_T)
        maximum = tl.maximum(maximum, z)
    highest = tl.max(maximum, 0)
    to_highest = maximum - highest
    e = tl.exp(to_highest)
    mean = tl.sum((weighted + total * to_highest) * e, 0)
    sum_of_totals = tl.sum(total * e, 0)
    tempered_sum = tl.sum(total_T * tl.exp(to_highest * inverse_T), 0) if TEMPERED else sum_of_totals
    tl.store(MAXIMUM + row, highest)
    tl.store(LOG_TOTAL + row, tl.log(sum_of_totals))
    tl.store(TEMPERED_LOG_TOTAL + row, tl.log(tempered_sum))
    tl.store(MEAN + row, mean / sum_of_totals)


@triton.jit
def dense_kernel(
    Z, Y, Z_BIAS, Y_BIAS, GRADIENT, TARGETS, OUTSIDE_SLOPE, Z_MAX, LOG_Z, LOG_Z_T, Y_MAX, LOG_Y, LOG_Y_T,
    KD, KL, ACCEPTANCE, AGREEMENT,
    V, z_stride, z_scale, z_cap, y_stride, y_scale, y_cap, inverse_T, kd_slope, ce_weight, slope_sum,
    Z_HAS_BIAS: tl.constexpr, Z_PLAIN: tl.constexpr, Z_HAS_CAP: tl.constexpr,
    Y_HAS_BIAS: tl.constexpr, Y_PLAIN: tl.constexpr, Y_HAS_CAP: tl.constexpr,
    FORMULA: tl.constexpr, WANTS_GRADIENT: tl.constexpr, WITH_CE: tl.constexpr, WITH_OUTSIDE: tl.constexpr,
    SLOPE_SUM_KNOWN: tl.constexpr, TEMPERED: tl.constexpr,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_stride
    Y += row * y_stride
    if WANTS_GRADIENT:
        GRADIENT += row * z_stride
    log_z, log_z_T, z_max = tl.load(LOG_Z + row), tl.load(LOG_Z_T + row), tl.load(Z_MAX + row)
    log_y, log_y_T, y_max = tl.load(LOG_Y + row), tl.load(LOG_Y_T + row), tl.load(Y_MAX + row)
    target = tl.load(TARGETS + row) if WITH_CE else 0
    outside_slope = tl.load(OUTSIDE_SLOPE + row) if WITH_OUTSIDE else 0.0
    value, slopes, kl = tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL), tl.zeros((BLOCK,), REAL)
    both, nearest = tl.zeros((BLOCK,), REAL), tl.full((BLOCK,), 2 * NOTHING, REAL)
    sum_of_slopes = tl.zeros((), REAL) + slope_sum
    # Passes over the row: the values, with the gradient where Σψ is known before; otherwise the gradient after them.
    PASSES: tl.constexpr = 2 if WANTS_GRADIENT and not SLOPE_SUM_KNOWN else 1
    for number in tl.static_range(PASSES):
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < V
            z = _logits(Z, Z_BIAS, columns, V, z_scale, z_cap, Z_HAS_BIAS, Z_PLAIN, Z_HAS_CAP, REAL)
            y = _logits(Y, Y_BIAS, columns, V, y_scale, y_cap, Y_HAS_BIAS, Y_PLAIN, Y_HAS_CAP, REAL)
            to_z, to_y = z - z_max, y - y_max
            log_q, log_p = to_z * inverse_T - log_z_T, to_y * inverse_T - log_y_T
            q, p = tl.exp(log_q), tl.exp(log_p)
            log_q_1, log_p_1, q_1, p_1 = log_q, log_p, q, p  # at temperature 1
            if TEMPERED:
                log_q_1, log_p_1 = to_z - log_z, to_y - log_y
                q_1, p_1 = tl.exp(log_q_1), tl.exp(log_p_1)
            phi, psi = FORMULA(p, q, log_p, log_q)
            if number == 0:
                value += tl.where(inside, phi, 0.0).to(REAL)
                slopes += tl.where(inside, psi, 0.0).to(REAL)
                kl += p_1 * (log_p_1 - log_q_1)  # past the vocabulary both are 0
                both += tl.minimum(p_1, q_1)
                nearest = tl.maximum(nearest, to_z + to_y)
            if WANTS_GRADIENT and number == PASSES - 1:
                d = kd_slope * (psi - q * sum_of_slopes)
                if WITH_CE:
                    d += ce_weight * (q_1 - tl.where(columns == target, 1.0, 0.0).to(REAL))
                if WITH_OUTSIDE:
                    d -= outside_slope * q_1
                if not Z_PLAIN:
                    d *= z_scale
                    if Z_HAS_CAP:
                        d *= _slope_of_tanh(z / z_cap)
                tl.store(GRADIENT + columns, d, mask=inside)
        if number == 0 and not SLOPE_SUM_KNOWN:
            sum_of_slopes = tl.sum(slopes, 0)
    tl.store(KD + row, tl.sum(value, 0))
    tl.store(KL + row, tl.sum(kl, 0))
    tl.store(ACCEPTANCE + row, tl.sum(both, 0))
    tl.store(AGREEMENT + row, tl.where(tl.max(nearest, 0) == 0, 1.0, 0.0))


@triton.jit
def softmax_gradient_kernel(
    RAW, BIAS, GRADIENT, MAXIMUM, LOG_TOTAL, TEMPERED_LOG_TOTAL, SLOPE, SLOPE_T, V, stride, scale, cap, inverse_T,
    HAS_BIAS: tl.constexpr, PLAIN: tl.constexpr, HAS_CAP: tl.constexpr, TEMPERED: tl.constexpr,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = _logits(RAW + row * stride, BIAS, columns, V, scale, cap, HAS_BIAS, PLAIN, HAS_CAP, REAL)
    to_z = z - tl.load(MAXIMUM + row)
    d = tl.load(SLOPE + row) * tl.exp(to_z - tl.load(LOG_TOTAL + row))
    if TEMPERED:
        d += tl.load(SLOPE_T + row) * tl.exp(to_z * inverse_T - tl.load(TEMPERED_LOG_TOTAL + row))
    if not PLAIN:
        d *= scale
        if HAS_CAP:
            d *= _slope_of_tanh(z / cap)
    tl.store(GRADIENT + row * stride + columns, d, mask=columns < V)
