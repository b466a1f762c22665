"""The layers as the five lectures define them, one window at a time, in NumPy float64.

Slow and obvious on purpose: nothing here is shared with the product or with PyTorch. Letters: x
input (N, C, H, W), w kernels (K, C, R, S), z output (N, K, P, Q), dz the gradient of the loss by z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pair = tuple[int, int]
Sides = tuple[int, int, int, int]  # left, right, top, bottom


def output_size(n: int, f: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Row 6: positions where the kernel does not fit are dropped."""
    return (n + before + after - dilation * (f - 1) - 1) // stride + 1


def same_padding(n: int, f: int, stride: int, dilation: int) -> Pair:
    """Row 7: what keeps ceil(n / stride) outputs, the odd one at the end."""
    out = math.ceil(n / stride)
    total = max((out - 1) * stride + dilation * (f - 1) + 1 - n, 0)
    return total // 2, total - total // 2


def zero_pad(x: Array, padding: Sides, value: float = 0.0) -> Array:
    left, right, top, bottom = padding
    n, c, h, w = x.shape
    out = np.full((n, c, h + top + bottom, w + left + right), value)
    out[:, :, top : top + h, left : left + w] = x
    return out


def positions(p_size: int, q_size: int) -> Iterator[Pair]:
    for p in range(p_size):
        for q in range(q_size):
            yield p, q


def window(
    x: Array, p: int, q: int, size: Pair, stride: Pair, dilation: Pair
) -> tuple[slice, slice]:
    """Rows 1 and 14: where in the padded x the input of output (p, q) lies."""
    top, left = p * stride[0], q * stride[1]
    rows = slice(top, top + dilation[0] * (size[0] - 1) + 1, dilation[0])
    columns = slice(left, left + dilation[1] * (size[1] - 1) + 1, dilation[1])
    return rows, columns


def conv2d(
    x: Array,
    w: Array,
    b: Array | None = None,
    stride: Pair = (1, 1),
    padding: Sides = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    flip: bool = False,
) -> Array:
    """Rows 2 to 9: each output is the dot product of a window with a kernel, plus the bias."""
    if flip:
        w = w[:, :, ::-1, ::-1]
    padded = zero_pad(x, padding)
    k_size, c_size, *size = w.shape
    p_size = output_size(x.shape[2], size[0], stride[0], padding[2], padding[3], dilation[0])
    q_size = output_size(x.shape[3], size[1], stride[1], padding[0], padding[1], dilation[1])
    z = np.zeros((x.shape[0], k_size, p_size, q_size))
    for n in range(x.shape[0]):
        for k in range(k_size):
            first = k // (k_size // groups) * c_size
            for p, q in positions(p_size, q_size):
                rows, columns = window(padded, p, q, (size[0], size[1]), stride, dilation)
                patch = padded[n, first : first + c_size, rows, columns]
                z[n, k, p, q] = np.sum(patch * w[k]) + (0.0 if b is None else b[k])
    return z


def conv2d_backward(
    dz: Array,
    x: Array,
    w: Array,
    stride: Pair = (1, 1),
    padding: Sides = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> tuple[Array, Array, Array]:
    """Rows 13 to 15: dx, dw and db, added up output by output."""
    padded = zero_pad(x, padding)
    dpadded, dw, db = np.zeros_like(padded), np.zeros_like(w), np.zeros(w.shape[0])
    k_size, c_size, *size = w.shape
    for n in range(x.shape[0]):
        for k in range(k_size):
            first = k // (k_size // groups) * c_size
            for p, q in positions(dz.shape[2], dz.shape[3]):
                rows, columns = window(padded, p, q, (size[0], size[1]), stride, dilation)
                d = dz[n, k, p, q]
                db[k] += d
                dw[k] += d * padded[n, first : first + c_size, rows, columns]
                dpadded[n, first : first + c_size, rows, columns] += d * w[k]
    left, _, top, _ = padding
    dx = dpadded[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return dx, dw, db


def locally_connected2d(x: Array, w: Array, b: Array | None, stride: Pair) -> Array:
    """Row 12: a kernel of its own for every output position, w[p, q, k, c, r, s]."""
    p_size, q_size, k_size, _, *size = w.shape
    h = np.zeros((x.shape[0], k_size, p_size, q_size))
    for n in range(x.shape[0]):
        for k in range(k_size):
            for p, q in positions(p_size, q_size):
                rows, columns = window(x, p, q, (size[0], size[1]), stride, (1, 1))
                h[n, k, p, q] = np.sum(x[n, :, rows, columns] * w[p, q, k])
                h[n, k, p, q] += 0.0 if b is None else b[k, p, q]
    return h


def pool_output_size(n: int, f: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> int:
    """As row 6; ceil_mode keeps a last window that sticks out, unless it starts in the padding."""
    span = n + 2 * pad - dilation * (f - 1) - 1
    out = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (out - 1) * stride >= n + pad:
        out -= 1
    return out


def select_pool2d(
    x: NDArray[np.generic],
    size: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    ceil_mode: bool = False,
    minimum: bool = False,
) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """Row 11: the largest or smallest element of each window and its place h * W + w.

    The first of equals wins, a NaN beats every number (the last of several is named), and a window
    with no element inside the image gives the worst value of the dtype and -1.
    """
    n_size, c_size, h, w = x.shape
    p_size = pool_output_size(h, size[0], stride[0], padding[0], dilation[0], ceil_mode)
    q_size = pool_output_size(w, size[1], stride[1], padding[1], dilation[1], ceil_mode)
    worst = _worst(x.dtype, minimum)
    y = np.full((n_size, c_size, p_size, q_size), worst, dtype=x.dtype)
    at = np.full(y.shape, -1, dtype=np.int64)
    for n in range(n_size):
        for c in range(c_size):
            for p, q in positions(p_size, q_size):
                for r, s in positions(*size):
                    i = p * stride[0] - padding[0] + r * dilation[0]
                    j = q * stride[1] - padding[1] + s * dilation[1]
                    if not (0 <= i < h and 0 <= j < w):
                        continue
                    value, best = x[n, c, i, j], y[n, c, p, q]
                    better = value < best if minimum else value > best
                    if at[n, c, p, q] < 0 or better or value != value:
                        y[n, c, p, q], at[n, c, p, q] = value, i * w + j
    return y, at


def _worst(dtype: np.dtype[np.generic], minimum: bool) -> float | int | bool:
    if dtype == np.bool_:
        return minimum
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(str(dtype))
        return int(info.max if minimum else info.min)
    return math.inf if minimum else -math.inf


def select_pool2d_backward(dy: Array, at: NDArray[np.int64], h: int, w: int) -> Array:
    """Row 18: every dy goes to the one element that its window selected."""
    dx = np.zeros((dy.shape[0], dy.shape[1], h * w))
    for n, c, p, q in np.ndindex(*dy.shape):
        if at[n, c, p, q] >= 0:
            dx[n, c, at[n, c, p, q]] += dy[n, c, p, q]
    return dx.reshape(dy.shape[0], dy.shape[1], h, w)


def avg_pool2d(
    x: Array,
    size: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """Row 11: the mean of each window. Padding counts as elements, what ceil_mode adds does not."""
    n_size, c_size, h, w = x.shape
    p_size = pool_output_size(h, size[0], stride[0], padding[0], 1, ceil_mode)
    q_size = pool_output_size(w, size[1], stride[1], padding[1], 1, ceil_mode)
    y = np.zeros((n_size, c_size, p_size, q_size))
    for p, q in positions(p_size, q_size):
        top, left = p * stride[0] - padding[0], q * stride[1] - padding[1]
        bottom = min(top + size[0], h + padding[0])
        right = min(left + size[1], w + padding[1])
        with_padding = (bottom - top) * (right - left)
        top, left, bottom, right = max(top, 0), max(left, 0), min(bottom, h), min(right, w)
        inside = (bottom - top) * (right - left)
        divisor = divisor_override or (with_padding if count_include_pad else inside)
        y[:, :, p, q] = x[:, :, top:bottom, left:right].sum(axis=(2, 3)) / divisor
    return y


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda z: max(z, 0.0),
    "relu6": lambda z: min(max(z, 0.0), 6.0),
    "sigmoid": lambda z: 1.0 / (1.0 + math.exp(-z)),
    "tanh": math.tanh,
    "silu": lambda z: z / (1.0 + math.exp(-z)),
    "hardswish": lambda z: z * min(max(z + 3.0, 0.0), 6.0) / 6.0,
    "gelu": lambda z: 0.5 * z * (1.0 + math.erf(z / math.sqrt(2.0))),
}

DERIVATIVES: dict[str, Callable[[float], float]] = {
    "relu": lambda z: 1.0 if z > 0 else 0.0,
    "relu6": lambda z: 1.0 if 0 < z < 6 else 0.0,
    "sigmoid": lambda z: ACTIVATIONS["sigmoid"](z) * (1.0 - ACTIVATIONS["sigmoid"](z)),
    "tanh": lambda z: 1.0 - math.tanh(z) ** 2,
    "silu": lambda z: (s := ACTIVATIONS["sigmoid"](z)) * (1.0 + z * (1.0 - s)),
    "hardswish": lambda z: 0.0 if z <= -3 else 1.0 if z >= 3 else z / 3.0 + 0.5,
    "gelu": lambda z: (
        0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))
        + z * math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    ),
}
