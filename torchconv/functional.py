"""Convolution, pooling and batch normalisation, with the signatures of torch.nn.functional and what
the lectures add.

Arguments come to the operators in the one form that _arguments.py makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from torchconv import _dispatch
from torchconv._activations import NORM_CLAMPS, NORM_CURVES
from torchconv._arguments import (
    FLOATING,
    SELECT_DTYPES,
    activation_name,
    boolean,
    check_tensor,
    conv_arguments,
    conv_padding,
    integer,
    pair,
)
from torchconv._coverage import covers_batch_norm, covers_few_rows, covers_linear
from torchconv._derivatives import DERIVATIVES
from torchconv._dispatch import Operator, is_plain, records
from torchconv._recorded import RECORDED

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "linear",
    "locally_connected2d",
    "max_pool2d",
    "min_pool2d",
]


def _operator(name: str) -> Operator:
    op = _dispatch.operator(name)
    op.derivative = DERIVATIVES[name]
    op.recorded = RECORDED.get(name)
    return op


_conv2d = _operator("conv2d")
_select = {
    (name, indices): _operator(f"{name}_with_indices" if indices else name)
    for name in ("max_pool2d", "min_pool2d")
    for indices in (False, True)
}
_avg_pool2d = _operator("avg_pool2d")
_adaptive_avg_pool2d = _operator("adaptive_avg_pool2d")
_adaptive_max_pool2d = {
    False: _operator("adaptive_max_pool2d_values"),
    True: _operator("adaptive_max_pool2d"),
}
_batch_norm_training = _operator("batch_norm_training")
_batch_norm_inference = _operator("batch_norm_inference")
# Looked up once, as the few attributes on the way to each are a good part of a small call.
_is_compiling = torch.compiler.is_dynamo_compiling  # other compilers are dispatch modes
_autocasts = torch._C._is_any_autocast_enabled


def _call(op: Operator, input: Tensor, values: tuple[Any, ...]) -> Any:
    """op of input and values, the short way where there is one."""
    if not _is_compiling() and is_plain(input):
        if records(input):
            if op.recorded is not None:
                return op.recorded(input, values)
            return op.derivative(input, *values)
        return op.call(input, op.settings(values))
    return op((input,), values)


def _unbatched(op: Operator, input: Tensor, values: tuple[Any, ...]) -> Any:
    """_call of C x H x W, which goes in and comes out as a batch of one."""
    out = _call(op, input.unsqueeze(0), values)
    return tuple(t.squeeze(0) for t in out) if isinstance(out, tuple) else out.squeeze(0)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    flip_kernel: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """2D convolution (cross-correlation) as ``F.conv2d``, lecture rows 1 to 11 and 13 to 16.

    Args:
        input: N x C x H x W or C x H x W.
        weight: K x C/groups x R x S.
        bias: K, or None.
        stride, dilation: int or (h, w).
        padding: int, (h, w), 'valid', 'same' (any stride and dilation: ceil(n/stride) outputs, an
            odd extra zero at the end), or (left, right, top, bottom) as in ``F.pad``.
        groups: input and output channels are split into this many independent groups.
        activation: None, 'relu', 'relu6', 'sigmoid', 'tanh', 'silu', 'hardswish' or 'gelu',
            applied in the same pass over the output; its derivative is fused into backward.
        flip_kernel: rotate the kernel by 180 degrees first: the true convolution of lecture C.
        residual: None, or what is added before the activation, in the same pass and rounding (as by
            cudnnConvolutionBiasActivationForward): of the output's size, dtype and device.

    Returns:
        N x K x P x Q (K x P x Q unbatched), with P = (H + top + bottom - dilation*(R-1) - 1)
        // stride + 1 and Q likewise; channels_last if input or weight is.

    Raises:
        RuntimeError: sizes, strides or dtypes that do not fit, an activation or a residual of
        integers; NotImplementedError: a dtype without kernels (bool, complex, ...); TypeError: an
        argument of the wrong type; ValueError: an unknown activation.
    """
    values = conv_arguments(
        input, weight, bias, stride, padding, dilation, groups, activation, flip_kernel, residual
    )
    if input.dim() == 3:
        batch, added = input.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
        return _convolve(batch, weight, bias, added, values).squeeze(0)
    return _convolve(input, weight, bias, residual, values)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    values: tuple[Any, ...],
) -> Tensor:
    """conv2d of N x C x H x W from what conv_arguments gives, the short way where there is one."""
    if not _is_compiling() and is_plain(input, weight, bias, residual) and not _autocasts():
        if not records(input, weight, bias, residual):
            return _conv2d.call(input, weight, bias, residual, _conv2d.settings(values))
        return _conv2d.recorded(input, weight, bias, residual, values)
    return _conv2d((input, weight, bias, residual), values)


# Of PyTorch, by the operators' names.
_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


def activate(activation: str | None, z: Tensor) -> Tensor:
    """The activation of that name, in a pass of its own, by PyTorch."""
    return _ACTIVATE[activation_name(activation)](z)


def images_of(rows: Tensor) -> Tensor:
    """N x H x W x C as images N x C x H x W, channels_last."""
    return rows.contiguous().permute(0, 3, 1, 2)


def rows_of(images: Tensor) -> Tensor:
    """Images N x K x H x W as N x H x W x K, contiguous. Where sizes are one, images may be both
    contiguous and channels_last, and have come in either."""
    return images.permute(0, 2, 3, 1).contiguous()


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``F.linear``; over images with channels last it is the 1x1 convolution that it is there.

    ConvNeXt (Liu et al. 2022) and Swin write their 1x1 convolutions so.

    Args:
        input: N x H x W x C for the convolution, which takes float32, float64 and float16 on a
            CPU. So does N x C in float32 and float64 where N is at most 32, the weights are many
            and nothing records the call. Anything else is PyTorch's.
        weight: K x C.
        bias: K, or None.
        activation: as for `conv2d`.
        residual: None, or what is added before the activation: of the output's size and dtype.

    Returns:
        N x H x W x K (N x K), contiguous.

    Raises:
        What ``F.linear`` raises, ValueError for an unknown activation.
    """
    if covers_linear(input, weight, bias, residual):
        out = conv2d(
            images_of(input),
            weight[:, :, None, None],
            bias,
            activation=activation,
            residual=None if residual is None else images_of(residual),
        )
        return rows_of(out)
    if (
        residual is None
        and not _is_compiling()
        and is_plain(input, weight, bias)
        and not (records(input, weight, bias) or _autocasts())
        and covers_few_rows(input, weight, bias)
    ):
        pixels, kernel = input[:, :, None, None], weight[:, :, None, None]
        return conv2d(pixels, kernel, bias, activation=activation).flatten(1)
    out = F.linear(input, weight, bias)
    return activate(activation, out if residual is None else out + residual)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``F.batch_norm``, and in the same passes over memory a sum and an activation behind it.

    Args:
        input: N x C x H x W on a CPU, of a floating point type, for torchconv's kernels; anything
            else is PyTorch's, with the sum and the activation in passes of their own.
        running_mean, running_var, weight, bias, training, momentum, eps: as for ``F.batch_norm``.
        activation: as for `conv2d`. ReLU and ReLU6, and without a residual SiLU and Hardswish, cost
            no pass of their own.
        residual: None, or what is added before the activation: of the input's size and dtype.

    Returns:
        activation(norm(input) + residual), in the input's memory format.

    Raises:
        What ``F.batch_norm`` raises, ValueError for an unknown activation.
    """
    name = activation_name(activation)
    given = not training
    if (
        not _is_compiling()
        and is_plain(input, running_mean, running_var, weight, bias, residual)
        and covers_batch_norm(input, residual, running_mean, running_var, weight, bias)
        and isinstance(momentum, (float, int))
        and eps > 0
        and (running_mean is not None if given else input.numel() > input.shape[1])
    ):
        has_kernel = name in NORM_CLAMPS or (residual is None and name in NORM_CURVES)
        inside = name if has_kernel else "none"
        op = _batch_norm_inference if given else _batch_norm_training
        values = (eps, inside) if given else (momentum, eps, inside)
        tensors = (input, weight, bias, residual, running_mean, running_var)
        if not records(input, weight, bias, residual):
            out = op.call(*tensors, op.settings(values))
            out = out if given else out[0]
        elif given:
            out = op.derivative(*tensors, *values)
        else:
            out = op.recorded(*tensors, values)
        if not given and running_mean is not None and not running_mean.is_inference():
            increment_version((running_mean, running_var))  # type: ignore[arg-type]
        return out if inside == name else activate(activation, out)
    out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activate(activation, out if residual is None else out + residual)


def _window(op: str, kernel_size: Any, stride: Any, padding: Any) -> tuple[Any, ...]:
    kernel = pair(kernel_size, op, "kernel_size")
    given = stride is not None and not (isinstance(stride, (tuple, list)) and len(stride) == 0)
    return (
        kernel,
        pair(stride, op, "stride") if given else kernel,
        pair(padding, op, "padding"),
    )


def select_values(
    op: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> tuple[Any, ...]:
    """What max_pool2d's and min_pool2d's operators take beside the input."""
    window = _window(op, kernel_size, stride, padding)
    return (*window, pair(dilation, op, "dilation"), boolean(ceil_mode, op, "ceil_mode"))


def average_values(
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: Any,
    count_include_pad: Any,
    divisor_override: Any,
) -> tuple[Any, ...]:
    """What avg_pool2d's operator takes beside the input."""
    op = "avg_pool2d"
    window = _window(op, kernel_size, stride, padding)
    ceil = boolean(ceil_mode, op, "ceil_mode")
    include = boolean(count_include_pad, op, "count_include_pad")
    divisor = divisor_override
    if divisor is not None:
        divisor = integer(divisor, op, "divisor_override")
    return (*window, ceil, include, divisor)


def _select_pool2d(
    name: str,
    input: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    return_indices: bool,
) -> Any:
    check_tensor(input, name, "input", SELECT_DTYPES)
    dim = input.dim()
    if dim not in (3, 4):
        raise RuntimeError(
            f"{name}: non-empty 3D or 4D (batch mode) tensor expected for input, but got "
            f"{list(input.shape)}"
        )
    values = select_values(name, kernel_size, stride, padding, dilation, ceil_mode)
    op = _select[name, bool(return_indices)]
    return (_call if dim == 4 else _unbatched)(op, input, values)


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maximum over each window as ``F.max_pool2d``, lecture rows 11 and 18.

    The first of equal maxima is the selected one; a NaN in the window gives NaN. Integer and bool
    inputs work. Training keeps one byte per output (the position in the window) for backward; int64
    indices are made only on request.

    Args:
        input: N x C x H x W or C x H x W, of any real dtype.
        kernel_size, stride, padding, dilation: int or (h, w); stride defaults to kernel_size.
        ceil_mode: keep a last, partial window that starts inside the image or left padding.
        return_indices: also return each maximum's int64 index h*W + w in its image; -1 in a dilated
            window that holds no element at all, whose maximum is -inf.

    Returns:
        y, N x C x P x Q in the input's memory format, or (y, indices).

    Raises:
        RuntimeError: sizes that do not fit; NotImplementedError: dtype; TypeError: argument types.
    """
    window = (kernel_size, stride, padding, dilation)
    return _select_pool2d("max_pool2d", input, *window, ceil_mode, return_indices)


def min_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Minimum over each window (lecture E): as :func:`max_pool2d`, with padding as +inf."""
    window = (kernel_size, stride, padding, dilation)
    return _select_pool2d("min_pool2d", input, *window, ceil_mode, return_indices)


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over each window as ``F.avg_pool2d``, lecture rows 11 and 17.

    Args:
        input: N x C x H x W or C x H x W, floating point.
        kernel_size, stride, padding: int or (h, w); stride defaults to kernel_size.
        ceil_mode: keep a last, partial window that starts inside the image or left padding.
        count_include_pad: divide by the window's size within the padded image, else within the
            image.
        divisor_override: divide by this instead; not zero.

    Returns:
        y, N x C x P x Q in the input's memory format.

    Raises:
        RuntimeError: sizes that do not fit; IndexError: fewer than three dimensions, as PyTorch;
        NotImplementedError: dtype; TypeError: argument types.
    """
    check_tensor(input, "avg_pool2d", "input", FLOATING)
    dim = input.dim()
    if dim not in (3, 4):
        error = IndexError if dim < 3 else RuntimeError
        raise error(
            "avg_pool2d: non-empty 3D or 4D (batch mode) tensor expected for input, but got "
            f"{list(input.shape)}"
        )
    values = average_values(
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    return (_call if dim == 4 else _unbatched)(_avg_pool2d, input, values)


def _output_sizes(value: Any, size: Sequence[Any], op: str) -> tuple[Any, ...]:
    """output_size as F.adaptive_*_pool2d reads it: an int, or whatever has a length and items."""
    if isinstance(value, (int, torch.SymInt)):
        return (integer(value, op, "output_size"),) * 2
    if type(value) is tuple and len(value) == 2 < len(size):  # the usual pair, ahead of the general
        h, w = value
        if type(h) is type(w) is int:
            return integer(h, op, "output_size"), integer(w, op, "output_size")
    try:
        count = len(value)
    except TypeError:
        kind = type(value).__name__
        message = f"{op}(): argument 'output_size' must be int or tuple of ints, not {kind}"
        raise TypeError(message) from None
    if len(size) <= count:
        raise ValueError(f"Input dimension should be at least {count + 1}")
    if op == "adaptive_avg_pool2d" and any(
        isinstance(v, Tensor) and v.dtype is torch.bool for v in value
    ):  # as PyTorch, whose maximum takes them
        raise RuntimeError(f"{op}: output_size must be of integers, but got {value}")
    given = zip(value, size[-count:], strict=False)
    return tuple(integer(d if v is None else v, op, "output_size") for v, d in given)


def _adaptive_pool2d(name: str, op: Operator, input: Tensor, output_size: Any) -> Any:
    check_tensor(input, name, "input", FLOATING)
    wanted = _output_sizes(output_size, input.shape, name)
    if input.dim() not in (3, 4):
        raise RuntimeError(f"{name}(): Expected 3D or 4D tensor, but got {list(input.shape)}")
    if len(wanted) != 2:
        raise RuntimeError(f"{name}: output_size must be 2, but got {output_size}")
    if input.dim() == 4:
        return _call(op, input, (wanted,))
    # PyTorch gives an unbatched image no channels_last strides here, whatever its own are.
    image = input.contiguous()
    if image.shape[0] > 0:
        return _unbatched(op, image, (wanted,))
    # One without a channel is no error, as a batch of such images is: an empty batch.
    out = _call(op, image.unsqueeze(1), (wanted,))
    return tuple(t.squeeze(1) for t in out) if isinstance(out, tuple) else out.squeeze(1)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Mean over windows that follow from the output's size, as ``F.adaptive_avg_pool2d``.

    Output (i, j) of P x Q has the window [floor(i*H/P), ceil((i+1)*H/P)) x [floor(j*W/Q),
    ceil((j+1)*W/Q)). ``output_size=1`` is global average pooling.

    Args:
        input: N x C x H x W or C x H x W, floating point.
        output_size: P (for P x P) or two sizes, in a tuple, a tensor, a range, ...; None among them
            is the input's own size.

    Returns:
        y, N x C x P x Q in the input's memory format.

    Raises:
        RuntimeError: sizes that do not fit; ValueError: at least as many sizes as dimensions, as
        PyTorch; NotImplementedError: dtype; TypeError: argument types.
    """
    return _adaptive_pool2d("adaptive_avg_pool2d", _adaptive_avg_pool2d, input, output_size)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Maximum over the windows of :func:`adaptive_avg_pool2d`, as ``F.adaptive_max_pool2d``.

    Args:
        input, output_size: as in :func:`adaptive_avg_pool2d`.
        return_indices: also return each maximum's int64 index h*W + w in its image.

    Returns:
        y, N x C x P x Q in the input's memory format, or (y, indices).

    Raises:
        As :func:`adaptive_avg_pool2d`.
    """
    indices = boolean(return_indices, "adaptive_max_pool2d", "return_indices")
    op = _adaptive_max_pool2d[indices]
    return _adaptive_pool2d("adaptive_max_pool2d", op, input, output_size)


def locally_connected2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolution without weight sharing (lecture D, row 12): every position has its own kernel.

    Args:
        input: N x C x H x W or C x H x W, floating point.
        weight: P x Q x K x C x R x S, one kernel for each of the P x Q output positions.
        bias: K, K x P x Q, or None.
        stride, padding, dilation: as in :func:`conv2d`.

    Returns:
        N x K x P x Q (K x P x Q unbatched).

    Raises:
        RuntimeError: if the weight's P x Q or channels do not fit the input.
    """
    check_tensor(input, "locally_connected2d", "input", FLOATING)
    check_tensor(weight, "locally_connected2d", "weight", FLOATING)
    if input.dim() not in (3, 4) or weight.dim() != 6:
        raise RuntimeError(
            "Expected a 3D or 4D input and a 6D weight for locally_connected2d, but got sizes "
            f"{list(input.shape)} and {list(weight.shape)}"
        )
    strides = pair(stride, "locally_connected2d", "stride")
    dilations = pair(dilation, "locally_connected2d", "dilation")
    kernel = weight.shape[-2:]
    pads = conv_padding(padding, input, weight, strides, dilations)

    def apply(x: Tensor) -> Tensor:
        # (N, C*R*S, P*Q): column pq is the window that output position pq sees.
        windows = F.unfold(F.pad(x, pads), tuple(kernel), tuple(dilations), 0, tuple(strides))
        p, q, k = weight.shape[:3]
        if windows.shape[1:] != (weight[0, 0, 0].numel(), p * q):
            raise RuntimeError(
                f"Given weight of size {list(weight.shape)} and input of size {list(x.shape)}, "
                f"expected weight for {windows.shape[2]} positions and {windows.shape[1]} inputs "
                "each"
            )
        out = torch.einsum("nip,pki->nkp", windows, weight.reshape(p * q, k, -1))
        out = out.unflatten(2, (p, q))
        if bias is None:
            return out
        return out + (bias[:, None, None] if bias.dim() == 1 else bias)

    return apply(input) if input.dim() == 4 else apply(input.unsqueeze(0)).squeeze(0)
