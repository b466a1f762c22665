"""Python's many spellings of convolution's and pooling's arguments as the operators' one form.

Wrong types and dtypes are refused here, with the exception class PyTorch raises; sizes and values
are checked by the operators.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchconv._activations import ACTIVATIONS
from torchconv._coverage import FLOATS, INTEGERS

FLOATING = frozenset(FLOATS)
SELECT_DTYPES = FLOATING | {*INTEGERS, torch.uint16}
CONV_DTYPES = SELECT_DTYPES - {torch.bool, torch.uint16}


def integer(value: Any, op: str, name: str) -> Any:
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{op}(): argument '{name}' does not fit in 64 bits: {value}")
        return value
    if not isinstance(value, (bool, float)):
        try:
            return integer(operator.index(value), op, name)
        except TypeError:
            pass
    raise TypeError(
        f"{op}(): argument '{name}' must be int or tuple of ints, not {type(value).__name__}"
    )


def boolean(value: Any, op: str, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}(): argument '{name}' must be bool, not {type(value).__name__}")
    return value


def integers(value: Any, op: str, name: str) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [integer(v, op, name) for v in values]


def pair(value: Any, op: str, name: str) -> tuple[Any, ...]:
    # The two usual spellings first: on small images this is a good part of a call.
    if type(value) is int and -(2**31) <= value < 2**31:
        return value, value
    if type(value) is tuple and len(value) == 2:
        h, w = value
        if type(h) is type(w) is int and -(2**31) <= h < 2**31 and -(2**31) <= w < 2**31:
            return value
    values = integers(value, op, name)
    if len(values) == 1:
        return tuple(values * 2)
    if len(values) != 2:
        raise RuntimeError(
            f"{op}: {name} must either be a single int, or a tuple of two ints, but got "
            f"{name}={values}"
        )
    return tuple(values)


def check_tensor(value: Any, op: str, name: str, dtypes: frozenset[torch.dtype]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")
    if value.dtype not in dtypes:
        raise NotImplementedError(f'torchconv "{op}" not implemented for {value.dtype}')


def same_padding(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Any, ...]:
    """SAME (lectures C, E) as (left, right, top, bottom): ceil(size / stride) outputs, an odd extra
    zero at the end. Every argument is (h, w)."""
    padding: list[Any] = []
    for axis in (1, 0):
        shape = (size[axis], kernel[axis], stride[axis], dilation[axis])
        # jit.trace has sizes as tensors, which the operators do not take
        n, f, s, d = (int(v) if isinstance(v, Tensor) else v for v in shape)
        # (ceil(n/s) - 1) * s + d*(f-1) + 1 - n; no maximum where it cannot be negative, because a
        # symbolic n would carry it into every later size.
        total = d * (f - 1) - (n - 1) % s
        if d * (f - 1) < s - 1:
            total = max(total, 0)
        padding += [total // 2, total - total // 2]
    return tuple(padding)


def conv_padding(
    padding: Any,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Any, ...]:
    """Any spelling of ``padding`` as (left, right, top, bottom).

    Args:
        padding: int, (h, w), 'valid', 'same' or (left, right, top, bottom).
        input, weight: whose last two sizes are the image's and the kernel's.
        stride, dilation: (h, w) each.

    Raises:
        RuntimeError: for an unknown word, a wrong number of values, or a negative int or pair
            (four values may be negative: they crop, as ``F.pad`` does).
        TypeError: for anything else.
    """
    # The usual spellings first, as in pair.
    if type(padding) is int and 0 <= padding < 2**31:
        return (padding,) * 4
    if type(padding) is tuple and len(padding) == 2:
        h, w = padding
        if type(h) is type(w) is int and 0 <= h < 2**31 and 0 <= w < 2**31:
            return w, w, h, h
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding == "same":
            return same_padding(input.shape[-2:], weight.shape[-2:], stride, dilation)
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    values = integers(padding, "conv2d", "padding")
    if len(values) == 4:
        return tuple(values)
    if len(values) == 1:
        values *= 2
    if len(values) != 2:
        raise RuntimeError(
            "expected padding to be a single integer value, a list of 2 values (h, w) or of 4 "
            f"values (left, right, top, bottom), but got padding={values}"
        )
    if min(values) < 0:
        raise RuntimeError(f"negative padding is not supported, but got padding={values}")
    h, w = values
    return w, w, h, h


def activation_name(activation: str | None) -> str:
    """The operators' name of an activation. Raises ValueError for one that does not exist."""
    if activation is None:
        return "none"
    if activation not in ACTIVATIONS[1:]:
        raise ValueError(f"activation must be None or one of {ACTIVATIONS[1:]}, got {activation!r}")
    return activation


def conv_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: str | None,
    flip_kernel: bool,
    residual: Tensor | None = None,
) -> tuple[Any, ...]:
    """conv2d's arguments checked, and those that are no tensors in the operators' form."""
    dtype = getattr(input, "dtype", None)
    if not (
        dtype in CONV_DTYPES
        and isinstance(input, Tensor)
        and isinstance(weight, Tensor)
        and weight.dtype is dtype
        and (bias is None or (isinstance(bias, Tensor) and bias.dtype is dtype))
    ):
        check_tensor(input, "conv2d", "input", CONV_DTYPES)
        check_tensor(weight, "conv2d", "weight", CONV_DTYPES)
        if bias is not None:
            check_tensor(bias, "conv2d", "bias", CONV_DTYPES)
    dim = input.dim()
    if dim != 4 and dim != 3:
        raise RuntimeError(
            "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: "
            f"{list(input.shape)}"
        )
    if weight.dim() != 4:
        raise RuntimeError(
            f"Expected 4D weight for conv2d, but got weight of size: {list(weight.shape)}"
        )
    if residual is not None:
        check_tensor(residual, "conv2d", "residual", CONV_DTYPES)
        if residual.dim() != dim or residual.device != input.device:
            raise RuntimeError(
                f"Expected {dim}D residual on {input.device} for conv2d, as input is, but got "
                f"residual of size {list(residual.shape)} on {residual.device}"
            )
    name = "none" if activation is None else activation_name(activation)
    strides = pair(stride, "conv2d", "stride")
    dilations = pair(dilation, "conv2d", "dilation")
    if isinstance(padding, str) and min(strides) <= 0:
        raise RuntimeError(f"non-positive stride is not supported, but got stride={list(strides)}")
    pads = conv_padding(padding, input, weight, strides, dilations)
    count = integer(groups, "conv2d", "groups")
    flip = boolean(flip_kernel, "conv2d", "flip_kernel")
    return strides, pads, dilations, count, name, flip
