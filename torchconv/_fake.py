"""Fake kernels: shape, dtype and strides of every operator's outputs, for torch.compile and export.

The memory format follows PyTorch: a convolution is channels_last as soon as its input or weight is,
a pooling as its input is. Sizes may be symbolic. Only what would otherwise give a wrong shape is
checked here; the kernels check everything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from torchconv._schemas import LIBRARY


def offset_dtype(kernel_size: Sequence[int]) -> torch.dtype:
    """The narrowest type for a position in the window, as csrc/core/pool_problem.h has it."""
    positions = kernel_size[0] * kernel_size[1]
    if positions <= 255:
        return torch.uint8
    return torch.uint16 if positions <= 65535 else torch.int32


def is_channels_last(tensor: Tensor) -> bool:
    """Whether PyTorch would give the result of an operator on this tensor channels_last strides."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided
    if plain and not torch.compiler.is_compiling():
        return _strides_are_channels_last(tensor.shape, tensor.stride())
    return suggest_memory_format(tensor) is torch.channels_last


@functools.lru_cache(maxsize=1024)
def _strides_are_channels_last(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    # Kept, because PyTorch's rule in Python takes longer than a small pooling.
    like: Any = SimpleNamespace(
        layout=torch.strided, shape=shape, ndim=len(shape), stride=lambda: strides
    )
    return suggest_memory_format(like) is torch.channels_last


def _common_device(*tensors: Tensor | None) -> torch.device:
    """The one device of all tensors; meta as soon as one is, as PyTorch's own operators do."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        torch._check(
            any(d.type == "meta" for d in devices),
            lambda: f"Expected all tensors to be on the same device, but got {devices}",
        )
        return torch.device("meta")
    return devices.pop()


def _empty(
    like: Tensor, size: Sequence[int], channels_last: bool, *others: Tensor | None
) -> Tensor:
    """Of like's dtype; like and others are every tensor that takes part."""
    return torch.empty(
        size,
        dtype=like.dtype,
        device=_common_device(like, *others),
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _conv_size(size: int, before: int, after: int, dilation: int, kernel: int, stride: int) -> int:
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _conv_output_size(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    torch._check(
        input.dim() == 4 and weight.dim() == 4,
        lambda: (
            f"Expected 4D input and weight, but got sizes {list(input.shape)} and "
            f"{list(weight.shape)}"
        ),
    )
    torch._check(
        min(stride) > 0, lambda: f"non-positive stride is not supported, but got stride={stride}"
    )
    torch._check(
        min(dilation) > 0, lambda: f"dilation should be greater than zero, but got {dilation}"
    )
    torch._check(
        groups > 0, lambda: f"non-positive groups is not supported, but got groups={groups}"
    )
    torch._check(
        input.dtype == weight.dtype,
        lambda: f"Input type ({input.dtype}) and weight type ({weight.dtype}) should be the same",
    )
    n, c, h, w = input.shape
    k, c_per_group, r, s = weight.shape
    torch._check(
        c == c_per_group * groups and k % groups == 0,
        lambda: (
            f"Given groups={groups}, weight of size {list(weight.shape)}, expected input"
            f"{list(input.shape)} to have {c_per_group * groups} channels, but got {c} channels "
            "instead"
        ),
    )
    p = _conv_size(h, padding[2], padding[3], dilation[0], r, stride[0])
    q = _conv_size(w, padding[0], padding[1], dilation[1], s, stride[1])
    torch._check(
        p > 0 and q > 0,
        lambda: (
            f"Kernel size can't be greater than actual input size: kernel ({r} x {s}), input "
            f"({h} x {w}), padding {padding}"
        ),
    )
    return n, k, p, q


def conv_channels_last(input: Tensor, weight: Tensor) -> bool:
    images = input.shape[0]
    if isinstance(images, int) and images == 0:
        return False  # PyTorch's own rule for an empty batch
    return is_channels_last(weight) or is_channels_last(input)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    flip_kernel: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    size = _conv_output_size(input, weight, stride, padding, dilation, groups)
    torch._check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == weight.shape[0]),
        lambda: (
            f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional "
            f"with {weight.shape[0]} elements, but got bias of size "
            f"{None if bias is None else list(bias.shape)} instead"
        ),
    )
    if residual is not None:
        _check_residual(residual, size, input.dtype)
    return _empty(input, size, conv_channels_last(input, weight), weight, bias, residual)


def _check_residual(residual: Tensor, size: Sequence[int], dtype: torch.dtype) -> None:
    torch._check(
        residual.dtype == dtype,
        lambda: f"Input type ({dtype}) and residual type ({residual.dtype}) should be the same",
    )

    def message() -> str:
        return f"expected residual of size {list(size)}, but got {list(residual.shape)}"

    torch._check(residual.dim() == 4, message)
    for actual, expected in zip(residual.shape, size, strict=True):
        torch._check(actual == expected, message)


def _conv2d_with_preactivation(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _conv2d(*args, **kwargs), _conv2d(*args, **kwargs)


def _conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    flip_kernel: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    def empty(wanted: bool, size: Sequence[int], channels_last: bool) -> Tensor:
        others = (grad_output, weight, saved)
        return _empty(input, size if wanted else (0,), wanted and channels_last, *others)

    return (
        empty(output_mask[0], input.shape, conv_channels_last(input, weight)),
        empty(output_mask[1], weight.shape, is_channels_last(weight)),
        empty(output_mask[2], weight.shape[:1], False),
    )


def _pool_size(
    size: int, kernel: int, pad: int, stride: int, dilation: int, ceil_mode: bool
) -> int:
    free = size + 2 * pad - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return free // stride + 1
    out = (free + stride - 1) // stride + 1
    # a last window that would start in the padding after the image is dropped
    return out - 1 if (out - 1) * stride >= size + pad else out


def _pool_output_size(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, int, int, int]:
    torch._check(
        input.dim() == 4, lambda: f"Expected 4D input, but got input of size {list(input.shape)}"
    )
    torch._check(
        min(kernel_size) > 0,
        lambda: f"kernel size should be greater than zero, but got {kernel_size}",
    )
    torch._check(min(stride) > 0, lambda: f"stride should be greater than zero, but got {stride}")
    torch._check(
        min(dilation) > 0, lambda: f"dilation should be greater than zero, but got {dilation}"
    )
    for i in range(2):
        torch._check(
            0 <= padding[i] <= (dilation[i] * (kernel_size[i] - 1) + 1) // 2,
            lambda: (
                "pad should be non-negative and at most half of effective kernel size, but "
                f"got pad={padding}, kernel_size={kernel_size} and dilation={dilation}"
            ),
        )
    n, c, h, w = input.shape
    torch._check(
        c > 0 and h > 0 and w > 0,
        lambda: (
            "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got:{list(input.shape)}"
        ),
    )
    p = _pool_size(h, kernel_size[0], padding[0], stride[0], dilation[0], ceil_mode)
    q = _pool_size(w, kernel_size[1], padding[1], stride[1], dilation[1], ceil_mode)
    torch._check(
        p > 0 and q > 0,
        lambda: (
            f"Given input size: ({c}x{h}x{w}). Calculated output size: ({c}x{p}x{q}). "
            "Output size is too small"
        ),
    )
    return n, c, p, q


def _select_pool2d(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    size = _pool_output_size(input, kernel_size, stride, padding, dilation, ceil_mode)
    return _empty(input, size, is_channels_last(input))


def _select_pool2d_with_offsets(
    input: Tensor, kernel_size: Sequence[int], *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    output = _select_pool2d(input, kernel_size, *args, **kwargs)
    return output, torch.empty_like(output, dtype=offset_dtype(kernel_size))


def _select_pool2d_with_indices(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    output = _select_pool2d(*args, **kwargs)
    return output, torch.empty_like(output, dtype=torch.int64)


def _select_pool2d_backward(
    grad_output: Tensor,
    selected: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
) -> Tensor:
    return _empty(grad_output, input_size, channels_last, selected)


def _select_pool2d_gather(
    input: Tensor,
    selected: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return _empty(input, selected.shape, is_channels_last(input), selected)


def _avg_pool2d(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    torch._check(divisor_override != 0, lambda: "divisor must be not zero")
    size = _pool_output_size(input, kernel_size, stride, padding, (1, 1), ceil_mode)
    return _empty(input, size, is_channels_last(input))


def _avg_pool2d_backward(
    grad_output: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    channels_last: bool,
) -> Tensor:
    return _empty(grad_output, input_size, channels_last)


def _adaptive_pool2d(input: Tensor, output_size: Sequence[int]) -> Tensor:
    torch._check(
        input.dim() == 4, lambda: f"Expected 4D input, but got input of size {list(input.shape)}"
    )
    n, c, h, w = input.shape
    torch._check(
        h > 0 and w > 0,
        lambda: (
            "Expected input to have non-zero size for non-batch dimensions, but input has sizes "
            f"{list(input.shape)}"
        ),
    )
    torch._check(
        min(output_size) >= 0,
        lambda: (
            "elements of output_size must be greater than or equal to 0 but received "
            f"{list(output_size)}"
        ),
    )
    return _empty(input, (n, c, *output_size), is_channels_last(input))


def _adaptive_avg_pool2d_backward(
    grad_output: Tensor, input_size: Sequence[int], channels_last: bool
) -> Tensor:
    return _empty(grad_output, input_size, channels_last)


def _adaptive_max_pool2d_values(input: Tensor, output_size: Sequence[int]) -> Tensor:
    torch._check(
        input.dim() != 4 or input.shape[1] > 0,
        lambda: f"Expected input to have channels, but input has sizes {list(input.shape)}",
    )
    return _adaptive_pool2d(input, output_size)


def _adaptive_max_pool2d(input: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    output = _adaptive_max_pool2d_values(input, output_size)
    # empty_like would give an output without elements other strides than empty does.
    channels_last = is_channels_last(input)
    indices = torch.empty(
        output.shape,
        dtype=torch.int64,
        device=output.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    return output, indices


def _adaptive_max_pool2d_backward(
    grad_output: Tensor, indices: Tensor, input_size: Sequence[int], channels_last: bool
) -> Tensor:
    return _empty(grad_output, input_size, channels_last, indices)


def _adaptive_max_pool2d_gather(input: Tensor, indices: Tensor) -> Tensor:
    return _empty(input, indices.shape, is_channels_last(input), indices)


def _batch_norm_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = (weight, bias, running_mean, running_var)
    output = _batch_norm(input, residual, *parameters)
    mean = torch.empty(input.shape[1:2], dtype=torch.float64, device=output.device)
    return output, mean, torch.empty_like(mean)


def _batch_norm_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
) -> Tensor:
    return _batch_norm(input, residual, weight, bias, running_mean, running_var)


def _batch_norm(input: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> Tensor:
    torch._check(
        input.dim() == 4, lambda: f"expected 4D input (got input of size {list(input.shape)})"
    )
    for parameter in parameters:
        if parameter is not None:
            torch._check(
                parameter.dim() == 1 and parameter.shape[0] == input.shape[1],
                lambda: f"expected {input.shape[1]} channels of parameters",
            )
    return _empty(input, input.shape, _norm_channels_last(input), residual, *parameters)


def _norm_channels_last(input: Tensor) -> bool:
    """What is dense in both layouts, of one channel or one pixel, gives contiguous results here."""
    return is_channels_last(input) and not input.is_contiguous()


def _batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    others = (grad_output, output, weight, bias, mean, invstd)

    def like_input(wanted: bool) -> Tensor:
        size = input.shape if wanted else (0,)
        return _empty(input, size, wanted and _norm_channels_last(input), *others)

    def like_parameter(parameter: Tensor | None, wanted: bool) -> Tensor:
        like = input if parameter is None else parameter
        return _empty(like, mean.shape if wanted else (0,), False, input, *others)

    return (
        like_input(output_mask[0]),
        like_input(output_mask[1]),
        like_parameter(weight, output_mask[2]),
        like_parameter(bias, output_mask[3]),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "conv2d": _conv2d,
    "conv2d_with_preactivation": _conv2d_with_preactivation,
    "conv2d_backward": _conv2d_backward,
    "max_pool2d": _select_pool2d,
    "min_pool2d": _select_pool2d,
    "max_pool2d_with_offsets": _select_pool2d_with_offsets,
    "min_pool2d_with_offsets": _select_pool2d_with_offsets,
    "max_pool2d_with_indices": _select_pool2d_with_indices,
    "min_pool2d_with_indices": _select_pool2d_with_indices,
    "select_pool2d_backward": _select_pool2d_backward,
    "select_pool2d_gather": _select_pool2d_gather,
    "avg_pool2d": _avg_pool2d,
    "avg_pool2d_backward": _avg_pool2d_backward,
    "adaptive_avg_pool2d": _adaptive_pool2d,
    "adaptive_avg_pool2d_backward": _adaptive_avg_pool2d_backward,
    "adaptive_max_pool2d": _adaptive_max_pool2d,
    "adaptive_max_pool2d_values": _adaptive_max_pool2d_values,
    "adaptive_max_pool2d_backward": _adaptive_max_pool2d_backward,
    "adaptive_max_pool2d_gather": _adaptive_max_pool2d_gather,
    "batch_norm_training": _batch_norm_training,
    "batch_norm_inference": _batch_norm_inference,
    "batch_norm_backward": _batch_norm_backward,
}

for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"torchconv::{_name}", _fake, lib=LIBRARY)
