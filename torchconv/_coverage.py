"""Which tensors torchconv's kernels cover.

Asked where a call may still go to PyTorch instead: by `torchconv.patch`, and by the layers that
`torchconv.convert` put into somebody's model. `torchconv.functional` does not ask: it states what
is wrong with an input that it cannot take. Everything here is plain attribute access, so Dynamo
follows it without a graph break.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from torchconv import _load

# Other subclasses give an operator a meaning of their own (sharded, nested, unit-carrying tensors)
# and know PyTorch's operators, not ours. These stand in for a plain tensor during tracing.
_TRANSPARENT = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)

_DEVICES = ("cpu", "meta", "cuda") if _load.serves_cuda() else ("cpu", "meta")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def _covered(tensor: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    return (
        type(tensor) in _TRANSPARENT
        and tensor.device.type in _DEVICES
        and tensor.layout is torch.strided
        and tensor.dtype in dtypes
    )


def covers_conv(input: Any, weight: Any, bias: Any = None) -> bool:
    """Whether convolution of these runs in torchconv. PyTorch convolves integers and complex
    numbers too, slowly; those are left to it."""
    return (
        _covered(input, FLOATS)
        and _covered(weight, FLOATS)
        and (bias is None or _covered(bias, FLOATS))
    )


def covers_linear(input: Any, weight: Any, bias: Any, residual: Any = None) -> bool:
    """Whether a linear layer of these runs in torchconv, as the 1x1 convolution of images with
    channels last. In bfloat16, and on a GPU, PyTorch's own is as fast or faster. residual: of the
    output's size, to be part of the convolution's pass."""
    return (
        isinstance(input, torch.Tensor)
        and input.dim() == 4
        and covers_conv(input, weight, bias)
        and input.device.type == "cpu"
        and input.dtype != torch.bfloat16
        and input.dtype == weight.dtype
        and weight.dim() == 2
        and weight.shape[1] == input.shape[3]
        and input.numel() > 0
        and weight.shape[0] > 0
        and (bias is None or (bias.dtype == input.dtype and bias.shape == weight.shape[:1]))
        and (
            residual is None
            or (
                _covered(residual, FLOATS)
                and residual.dtype == input.dtype
                and residual.shape == (*input.shape[:3], weight.shape[0])
            )
        )
        and not torch.is_autocast_enabled("cpu")
    )


# PyTorch multiplies few rows by one thread, whatever the matrix; a small one it multiplies faster.
MOST_ROWS = 32
_FEWEST_WEIGHTS = 1 << 18


def covers_few_rows(input: Any, weight: Any, bias: Any) -> bool:
    """Whether a linear layer of N x C, of which nobody asks for a gradient, runs in torchconv: as
    the 1x1 convolution of images of one pixel. Networks for images end in such layers."""
    return (
        isinstance(input, torch.Tensor)
        and input.dim() == 2
        and _covered(input, FLOATS)
        and input.device.type == "cpu"
        and 0 < input.shape[0] <= MOST_ROWS
        and covers_matrix(weight, bias)
        and weight.dtype == input.dtype
        and weight.shape[1] == input.shape[1]
    )


def covers_matrix(weight: Any, bias: Any) -> bool:
    """Whether these are such as `covers_few_rows` asks for."""
    return (
        covers_conv(weight, weight, bias)
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and weight.dim() == 2
        and weight.is_contiguous()
        and weight.numel() >= _FEWEST_WEIGHTS
        and (bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1]))
    )


def covers_batch_norm(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> bool:
    """Whether batch normalisation of these, plain tensors, runs in torchconv: images on a CPU, with
    parameters of their type or, for smaller types, of float32. The rest is PyTorch's: what does not
    fit, and statistics that are there by halves or that somebody wants a gradient of."""
    dtype, strided = input.dtype, torch.strided
    if not (
        dtype in FLOATS
        and input.is_cpu
        and input.layout is strided
        and input.dim() == 4
        and input.numel() > 0
        and (running_mean is None) == (running_var is None)
    ):
        return False
    if residual is not None and not (
        residual.dtype is dtype
        and residual.is_cpu
        and residual.layout is strided
        and residual.shape == input.shape
    ):
        return False
    channels, kind = input.size(1), None
    for parameter in (running_mean, running_var, weight, bias):
        if parameter is None:
            continue
        if kind is None:
            kind = parameter.dtype
            if kind is not dtype and not (kind is torch.float32 and dtype in HALVES):
                return False
        if not (
            parameter.dtype is kind
            and parameter.is_cpu
            and parameter.layout is strided
            and parameter.dim() == 1
            and parameter.numel() == channels
            and parameter.is_contiguous()
        ):
            return False
    return (
        running_mean is None
        or running_var is None
        or not (running_mean.requires_grad or running_var.requires_grad)
    )


def covers_select_pool(input: Any) -> bool:
    """Whether max or min pooling of this runs in torchconv."""
    return _covered(input, FLOATS + INTEGERS)


def covers_avg_pool(input: Any) -> bool:
    """Whether average pooling of this runs in torchconv."""
    return _covered(input, FLOATS)


def covers_adaptive_pool(input: Any) -> bool:
    """Whether adaptive pooling of this runs in torchconv. PyTorch's global average also takes
    images of no pixels, and numbers of dimensions that its other pooling refuses."""
    return _covered(input, FLOATS) and input.dim() in (3, 4) and 0 not in input.shape[-2:]
