"""The oracle: every public function in slow, obvious NumPy. Tests compare with it bit for bit.

Nothing here shares code or method with the package: percentiles come from a full sort, codes from one
division each, integer sums from int64.
"""

import math

import numpy as np

F32 = np.float32


def floats(x):
    """`x` rounded to float32, as the package takes any float input."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(np.asarray(x)).reshape(np.shape(x)).astype(F32)


def rank(p, n):
    product = F32(p) * F32(n) if n <= 2**24 else np.float64(p) * n
    return min(max(int(np.ceil(product)) - 1, 0), n - 1)


def scale(x, clip, p=None):
    """float32 scale of all of `x`; `p` None is the largest magnitude."""
    magnitudes = np.sort(np.abs(floats(x)).ravel())
    if magnitudes.size == 0:
        return F32(0)
    amax = magnitudes[-1 if p is None else rank(p, magnitudes.size)]
    with np.errstate(under="ignore"):
        return amax / F32(clip)


def codes(x, scale, clip):
    """int8 codes by true division; `scale` broadcasts against `x`. Halves go away from zero."""
    x, scale = floats(x), np.asarray(scale, F32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        ratio = np.clip((x / scale).astype(np.float64), -clip, clip)
    # A float32 ratio plus a half is exact in float64 wherever the floor depends on it.
    rounded = np.copysign(np.floor(np.abs(ratio) + 0.5), ratio)
    return np.where(scale == 0, 0, rounded).astype(np.int8)


def quantize(x, clip=127, p=None, per_row=False):
    """(codes, scales) of `x`: int8 of its shape, and float32 (1,) or one a row."""
    x = floats(x)
    if not per_row:
        scales = np.array([scale(x, clip, p)], F32)
        return codes(x, scales[0], clip), scales
    rows = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    scales = np.array([scale(row, clip, p) for row in rows], F32).reshape(x.shape[:-1])
    return codes(x, scales[..., None], clip), scales


def pack(codes, per_row=False):
    """Two codes a byte, the even element low; an odd run ends in a byte of its own."""
    nibbles = (codes if per_row else codes.ravel()).astype(np.int64) & 15
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
    return (nibbles[..., ::2] + 16 * nibbles[..., 1::2]).astype(np.uint8)


def dequantize(codes, scales, per_row=False):
    with np.errstate(over="ignore", under="ignore"):
        return codes.astype(F32) * (scales[..., None] if per_row else scales[0])


def groups(x, size):
    """Views of `size` elements along the last axis; the last one may be shorter."""
    return [x[..., start : start + size] for start in range(0, x.shape[-1], size)]


def quantize_groups(x, clip, size, p=None):
    """(codes, scales) of `x`; the last axis of the scales runs over the groups."""
    x = floats(x)
    parts = [quantize(part, clip, p, per_row=True) for part in groups(x, size)]
    if not parts:
        return np.zeros(x.shape, np.int8), np.zeros(x.shape, F32)
    codes, scales = zip(*parts, strict=True)
    return np.concatenate(codes, axis=-1), np.stack(scales, axis=-1)


def dequantize_groups(codes, scales, size, zero_points=None):
    """code * scale, or (code - zero_point) * scale; one scale for each group."""
    values = np.empty(codes.shape, F32)
    for g, (part, value) in enumerate(zip(groups(codes, size), groups(values, size), strict=True)):
        part = part.astype(np.int64) - (0 if zero_points is None else zero_points[..., g, None])
        with np.errstate(over="ignore", under="ignore"):
            value[...] = part.astype(F32) * scales[..., g, None]
    return values


def weight_range(x, clip, symmetric, share=1.0):
    """(scale, zero_point) for codes of `share` of the range of `x`; the zero point is 0 if symmetric."""
    low, high = (F32(bound) * F32(share) for bound in (min(0, x.min()), max(0, x.max())))
    with np.errstate(over="ignore", under="ignore"):
        if symmetric:
            return max(high, -low) / F32(clip), 0
        scale = (high - low) / F32(15)
        if scale == 0:
            return scale, 0
        return scale, min(math.floor(float(-low / scale) + 0.5), 15)


def weight_codes(x, scale, zero_point, clip, symmetric):
    """int8 codes of one group, with the zero point in them."""
    if symmetric or scale == 0:
        return codes(x, scale, clip)
    ratio = (x / scale).astype(np.float64)
    return np.clip(np.copysign(np.floor(np.abs(ratio) + 0.5), ratio) + zero_point, 0, 15).astype(np.int8)


def square_error(x, codes, scale, zero_point):
    with np.errstate(over="ignore", under="ignore"):
        values = (codes.astype(F32) - F32(zero_point)) * scale
    return math.fsum((x.astype(np.float64) - values.astype(np.float64)) ** 2)


def quantize_weights(w, bits=4, size=None, symmetric=False, search=False):
    """codes (N, K), scales (N, groups), zero_points (N, groups), all 0 if symmetric.

    The search tries the shares 1, 31/32, ..., 10/32 of each range, and takes the first of the best.
    """
    w = floats(w)
    clip = 127 if bits == 8 else 7
    rows = []
    for row in w:
        fitted = []
        for x in groups(row, size or w.shape[1]):
            ranges = [
                weight_range(x, clip, symmetric, i / 32) for i in (range(32, 9, -1) if search else [32])
            ]
            coded = [(weight_codes(x, *fit, clip, symmetric), *fit) for fit in ranges]
            fitted.append(min(coded, key=lambda c, x=x: square_error(x, *c)) if search else coded[0])
        code, scale, zero = zip(*fitted, strict=True)
        rows.append((np.concatenate(code), np.array(scale, F32), np.array(zero, np.uint8)))
    return tuple(np.stack(arrays) for arrays in zip(*rows, strict=True))


def mae(x, values):
    x = floats(x)
    if x.size == 0:
        return 0.0
    return float(np.abs(x.astype(np.float64) - values.astype(np.float64)).mean())


def smooth_factors(activations, weights, alpha=0.5, epsilon=1e-5, p=None):
    """The powers in float64, each rounded once; the sums, the quotient and the maximum in float32.

    With `p` None, the largest magnitude of each channel, as the equation of the paper has it.
    """
    epsilon = F32(epsilon)
    magnitudes = np.sort(np.abs(floats(activations)), axis=0)
    amax = magnitudes[-1]
    if p is not None:
        ranked = magnitudes[rank(p, len(magnitudes))]
        amax = np.where(ranked == 0, amax, ranked)
    act_amax = (amax + epsilon).astype(np.float64)
    weight_amax = (np.abs(floats(weights)).max(axis=0) + epsilon).astype(np.float64)
    numerator = np.power(act_amax, alpha).astype(F32)
    denominator = np.power(weight_amax, 1.0 - alpha).astype(F32)
    factors = np.maximum(numerator / denominator, epsilon)
    return factors if p is None else np.where(amax == 0, F32(1), factors)


def smooth_activations(activations, factors):
    with np.errstate(over="ignore", under="ignore"):
        return floats(activations) / floats(factors)


def smooth_weights(weights, factors):
    with np.errstate(over="ignore", under="ignore"):
        return floats(weights) * floats(factors)


def signs(k):
    """The fixed signs of the channels of a layer that rotates: an odd number of pairs of ones gives -1."""
    return np.array([(-1) ** sum((j >> i & 3) == 3 for i in (0, 2, 3, 4)) for j in range(k)], F32)


def rotate(x, span):
    """x, rotated in spans of that many channels; matrix products, not bit for bit."""
    h = np.ones((1, 1))
    while len(h) < span:
        h = np.block([[h, h], [h, -h]])
    x = floats(x)
    return (x.reshape(-1, span) @ (h / math.sqrt(span))).reshape(x.shape)


def w8a8_matvec(weight, weight_scales, activation):
    a, a_scale = quantize(activation)
    sums = np.array([int(np.dot(row.astype(np.int64), a.astype(np.int64))) for row in weight], np.int64)
    with np.errstate(over="ignore", under="ignore"):
        return sums.astype(F32) * floats(weight_scales) * a_scale[0]


def w8a8_matmul(weight, weight_scales, x, bias=None):
    """`weight` (N, K) of codes; `x` (M, K), quantized row by row."""
    a, a_scales = quantize(x, per_row=True)
    # Products of integers added up in float64 are exact below 2**53, and BLAS adds them fast.
    sums = a.astype(np.float64) @ weight.T.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        y = sums.astype(F32) * floats(weight_scales) * a_scales[:, None]
    return y if bias is None else y + floats(bias)


def w4a8_matmul(codes, scales, offsets, size, x, bias=None):
    """`codes` (N, K); `x` (M, K), quantized row by row.

    `offsets` (N, groups) are integer zero points, or float32 minimums, or None.
    """
    minimums = None if offsets is None or offsets.dtype != F32 else offsets
    zero_points = offsets if minimums is None else None
    a, a_scales = quantize(x, per_row=True)
    total = np.zeros((len(x), len(codes)), F32)
    for g, (w, part) in enumerate(zip(groups(codes, size), groups(a, size), strict=True)):
        w = w.astype(np.float64) - (0 if zero_points is None else zero_points[:, g, None])
        # Products of integers added up in float64 are exact below 2**53.
        sums = part.astype(np.float64) @ w.T
        with np.errstate(over="ignore", under="ignore"):
            part_total = sums.astype(F32) * scales[:, g]
            if minimums is not None:
                part_total = (
                    part_total + minimums[:, g] * part.sum(axis=1, dtype=np.int64).astype(F32)[:, None]
                )
            total = total + part_total
    with np.errstate(over="ignore", under="ignore"):
        y = total * a_scales[:, None]
    return y if bias is None else y + floats(bias)


def quantize_asymmetric(x):
    """uint8 codes (m, k) of the rows of x, scales (m,) and zero points (m,)."""
    x = floats(x)
    low, high = (np.minimum(x.min(axis=1), F32(0)), np.maximum(x.max(axis=1), F32(0)))
    with np.errstate(all="ignore"):
        scales = (high - low) / F32(255)
        zero_points = np.minimum(np.floor((-low / scales).astype(np.float64) + 0.5), 255)
        zero_points = np.where(scales == 0, 0, zero_points)
        ratio = (x / scales[:, None]).astype(np.float64)
        rounded = np.copysign(np.floor(np.abs(ratio) + 0.5), ratio) + zero_points[:, None]
    codes = np.where(scales[:, None] == 0, 0, np.clip(rounded, 0, 255))
    return codes.astype(np.uint8), scales, zero_points.astype(np.uint8)


def w8a8_asymmetric(weight, scales, size, x, bias=None):
    """`weight` (N, K) of int8 codes with `scales` (N, groups); `x` (M, K) quantized with zero points."""
    a, a_scales, zero_points = quantize_asymmetric(x)
    centered = a.astype(np.float64) - zero_points[:, None]
    total = np.zeros((len(x), len(weight)), F32)
    for g, (w, part) in enumerate(zip(groups(weight, size), groups(centered, size), strict=True)):
        with np.errstate(over="ignore", under="ignore"):
            total = total + (part @ w.T.astype(np.float64)).astype(F32) * scales[:, g]
    with np.errstate(over="ignore", under="ignore"):
        y = total * a_scales[:, None]
    return y if bias is None else y + floats(bias)


def calib_stats(batches):
    """min, max, mean, std_dev, p99, suggested_scale."""
    x = np.concatenate([floats(batch).ravel() for batch in batches])
    wide = x.astype(np.float64)
    magnitudes = np.sort(np.abs(x))
    p99 = magnitudes[rank(0.99, x.size)]
    amax = next(m for m in (p99, magnitudes[-1], F32(1)) if m > 0)
    with np.errstate(under="ignore"):
        suggested = amax / F32(127)
    return float(x.min()), float(x.max()), wide.mean(), wide.std(), float(p99), float(suggested)
