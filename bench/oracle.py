"""What dynquant must answer, as plainly as NumPy can say it. Nothing here is timed."""

from __future__ import annotations

import math

import numpy as np


def codes(x, scale, clip):
    """A float32 division, then halves away from zero in float64, where adding one half is exact."""
    v = (x / scale).astype(np.float64)
    return np.clip(np.trunc(v + np.copysign(0.5, v)), -clip, clip).astype(np.int8)


def quantized(x, clip, axis=None):
    """(codes, scales) by the largest magnitude of all of `x`, or of each row with ``axis=1``."""
    x = x.astype(np.float32)
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(clip)
    return codes(x, scale, clip), scale.reshape(-1)


def packed(nibbles):
    """Two codes to a byte, the even element in the low nibble."""
    return ((nibbles[..., 0::2] & 0x0F) | (nibbles[..., 1::2] << 4)).view(np.uint8)


def unpacked(nibbles):
    """The codes 0..15 that are packed in the bytes of `nibbles`, along the last axis."""
    pairs = np.stack([nibbles & 0x0F, nibbles >> 4], axis=-1)
    return pairs.reshape(*nibbles.shape[:-1], -1)


def rank(p, n):
    """Index of the nearest-rank percentile among `n` ascending magnitudes."""
    return max(math.ceil(float(np.float32(p) * np.float32(n))) - 1, 0)


def percentile(x, p):
    """The ranked magnitude of each run along the last axis."""
    return np.sort(np.abs(x))[..., rank(p, x.shape[-1])]


def smooth_factors(x, w, alpha=0.5, epsilon=1e-5):
    amax = [np.abs(m).max(0).astype(np.float64) + epsilon for m in (x, w)]
    return np.maximum(amax[0] ** alpha / amax[1] ** (1 - alpha), epsilon)


def mean_abs_error(x, q, scale):
    return np.abs(x.astype(np.float64) - q * scale).mean()


def integer_product(q, w):
    """Rows of `q` times rows of `w`: sums of at most 2**53, so that float64 holds them exactly."""
    return (q.astype(np.float64) @ w.T.astype(np.float64)).astype(np.int64)


def w8a8_matvec(w, w_scales, x):
    q, scale = quantized(x, 127)
    return integer_product(q, w).astype(np.float32) * w_scales * scale


def w8a8_matmul(w, w_scales, x):
    q, scales = quantized(x, 127, axis=1)
    return integer_product(q, w).astype(np.float32) * w_scales * scales[:, None]


def w4a8_matmul(w, zero_points, w_scales, x):
    """Codes 0..15 in equal groups: exact sums, scaled, then added up in float32 in ascending order."""
    q, scales = quantized(x, 127, axis=1)
    width = w.shape[1] // w_scales.shape[1]
    y = np.zeros((len(x), len(w)), np.float32)
    for group, (zero_point, w_scale) in enumerate(zip(zero_points.T, w_scales.T, strict=True)):
        part = slice(group * width, (group + 1) * width)
        centred = w[:, part].astype(np.int8) - zero_point[:, None].astype(np.int8)
        y += integer_product(q[:, part], centred).astype(np.float32) * w_scale
    return y * scales[:, None]


def calibration(batches):
    x = np.concatenate(batches).astype(np.float64)
    p99 = percentile(np.concatenate(batches), 0.99)
    return x.min(), x.max(), x.mean(), x.std(), p99, p99 / np.float32(127)
