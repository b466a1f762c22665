"""The derivatives: autograd Functions, registered on the operators and usable with ``.apply``.

Every backward is itself an operator with a derivative, so all of them differentiate twice and more;
each also has a forward-mode formula. Convolution is bilinear in input and weight, and pooling is
linear once the selected elements are known (lectures B and C), which is all the formulas use.

``Conv2dFunction.apply(input, weight, bias, stride, padding, dilation, groups, activation,
flip_kernel, residual)`` and the others take what the operator of the same name takes, in the
operator's normal form (pairs, and padding as (left, right, top, bottom)): see
``torchconv._schemas``. ``torchconv._derivatives`` registers them on the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchconv._activations import (
    DERIVATIVE_FROM_OUTPUT,
    NEEDS_PREACTIVATION,
    activation_gradient,
)
from torchconv._autograd_adaptive import AdaptiveAvgPool2dFunction, AdaptiveMaxPool2dFunction
from torchconv._autograd_norm import BatchNorm2dFunction, BatchNorm2dInferenceFunction
from torchconv._dispatch import (
    Operator,
    below_autograd,
    forward,
    may_have_tangents,
    operator,
    unrecorded,
)
from torchconv._fake import is_channels_last
from torchconv._wanted import wanted_gradients

__all__ = [
    "AdaptiveAvgPool2dFunction",
    "AdaptiveMaxPool2dFunction",
    "AvgPool2dFunction",
    "BatchNorm2dFunction",
    "BatchNorm2dInferenceFunction",
    "Conv2dFunction",
    "MaxPool2dFunction",
    "MinPool2dFunction",
]

_ops = torch.ops.torchconv
_conv2d = operator("conv2d")
_conv2d_backward = operator("conv2d_backward")
_select_pool2d_backward = operator("select_pool2d_backward")
_avg_pool2d = operator("avg_pool2d")
_avg_pool2d_backward = operator("avg_pool2d_backward")

# The same in one pass by PyTorch's kernels, which round once, where nothing differentiates it. For
# silu and gelu, and at a NaN for relu6 and hardswish, their bits depend on the number of threads.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "sigmoid": torch.ops.aten.sigmoid_backward,
    "tanh": torch.ops.aten.tanh_backward,
}


def _activation_backward(activation: str, grad: Tensor, saved: Tensor) -> Tensor:
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return activation_gradient(activation, grad, saved)
    if activation in _BACKWARD:
        return _BACKWARD[activation](grad, saved)
    if grad.numel() == 0:
        return torch.zeros_like(saved)
    # The input gradient of a convolution that changes nothing: every channel times one.
    channels = grad.shape[1]
    one = grad.new_ones(channels, 1, 1, 1)
    geometry = ([1, 1], [0, 0, 0, 0], [1, 1], channels)
    mask = [True, False, False]
    return _ops.conv2d_backward(grad, saved, one, saved, *geometry, activation, False, mask)[0]


def saved_for_derivative(activation: str, y: Tensor, z: Tensor | None) -> Tensor | None:
    """Which of y and z the activation's derivative needs, as ``conv2d_backward`` takes it."""
    if activation == "none":
        return None
    return y if activation in DERIVATIVE_FROM_OUTPUT else z


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _conv_tangent(
    inputs: tuple[Tensor, Tensor], tangents: Sequence[Tensor | None], *geometry: Any
) -> Tensor | None:
    """dz for tangents of input, weight and bias: z is linear in each of them."""
    (input, weight), (d_input, d_weight, d_bias) = inputs, tangents
    dz = _sum(
        (
            None if d_input is None else _ops.conv2d(d_input, weight, None, *geometry),
            None if d_weight is None else _ops.conv2d(input, d_weight, None, *geometry),
        )
    )
    if d_bias is None:
        return dz
    d_bias = d_bias[:, None, None]
    if dz is None:
        dz = torch.zeros_like(_ops.conv2d(input, weight, None, *geometry))
    return dz + d_bias


def _preactivation(tensors: Sequence[Tensor | None], values: Sequence[Any]) -> Tensor:
    """z from input, weight, what the derivative needs, bias and residual, by an operator."""
    input, weight, _, bias, residual = tensors
    *geometry, _, flip = values
    return _ops.conv2d(input, weight, bias, *geometry, "none", flip, residual)


def conv2d_gradients(
    tensors: Sequence[Tensor | None],
    values: tuple[Any, ...],
    grad: Tensor | None,
    mask: tuple[bool, ...],
    of_residual: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias, where the mask says so, and of the residual.

    tensors: what a Function of conv2d saves, input, weight, what the activation's derivative needs,
    y, z or None, and what z is computed again from, bias and residual: None where it is not.
    values: conv2d's arguments that are no tensors.
    """
    if grad is None or not (any(mask) or of_residual):
        return (None,) * 4
    input, weight, saved, _, _ = tensors
    *geometry, activation, flip = values
    if activation in NEEDS_PREACTIVATION and (saved is None or torch.is_grad_enabled()):
        # y's own backward did not keep z, or it must be differentiable in input and weight.
        saved = _preactivation(tensors, values)
    if of_residual and activation != "none":
        # The residual's gradient is dz: computed once, for all of them.
        assert saved is not None
        grad, saved, activation = _activation_backward(activation, grad, saved), None, "none"
    dx = dw = db = None
    if any(mask):
        dx, dw, db = unrecorded(
            _conv2d_backward, (grad, input, weight, saved), (*geometry, activation, flip, mask)
        )
    wanted = (dx if mask[0] else None, dw if mask[1] else None, db if mask[2] else None)
    return (*wanted, grad if of_residual else None)


class _ConvFunction(Function):
    """What conv2d and conv2d_with_preactivation share; for ``ctx.saved_tensors`` see
    ``conv2d_gradients``."""

    @staticmethod
    def _save(ctx: Any, inputs: tuple[Any, ...], saved: Tensor | None) -> None:
        input, weight, bias, stride, padding, dilation, groups, activation, flip, *rest = inputs
        residual = rest[0] if rest else None
        ctx.values = (stride, padding, dilation, groups, activation, flip)
        if activation == "none":
            bias = residual = None
        if may_have_tangents():
            ctx.save_for_forward(input, weight, saved, bias, residual)
        if activation not in NEEDS_PREACTIVATION:
            residual = None  # which may be large
        ctx.save_for_backward(input, weight, saved, bias, residual)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        wanted = wanted_gradients(ctx)
        mask, of_residual = wanted[:3], any(wanted[9:])
        *of_others, of_added = conv2d_gradients(
            ctx.saved_tensors, ctx.values, grad, mask, of_residual
        )
        return (*of_others, *(None,) * 6, of_added)

    @staticmethod
    def _jvp(ctx: Any, tangents: tuple[Any, ...]) -> Tensor | None:
        input, weight, _, _, _ = ctx.saved_tensors
        *geometry, activation, flip = ctx.values
        dz = _conv_tangent((input, weight), tangents[:3], *geometry, "none", flip)
        for d_residual in tangents[9:]:
            if d_residual is not None:
                dz = d_residual.clone() if dz is None else dz + d_residual
        if dz is None or activation == "none":
            return dz
        # Computed again from the inputs, because a saved y or z has no tangent of its own for an
        # outer forward-mode level.
        z = _preactivation(ctx.saved_tensors, ctx.values)
        of_z = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(activation)
        return activation_gradient(activation, dz, z if of_z is None else of_z(z))


class Conv2dFunction(_ConvFunction):
    """conv2d, lecture rows 13 to 16. Returns y, N x K x P x Q.

    Called directly with an activation whose derivative needs the pre-activation (silu, hardswish,
    gelu), backward computes it again; the operator keeps it instead.
    """

    @staticmethod
    def forward(
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
        values = (stride, padding, dilation, groups, activation, flip_kernel)
        return forward(_conv2d, (input, weight, bias, residual), values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        _ConvFunction._save(ctx, inputs, saved_for_derivative(inputs[7], output, None))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return _ConvFunction._backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        return _ConvFunction._jvp(ctx, tangents)


class Conv2dWithPreactivationFunction(_ConvFunction):
    """conv2d_with_preactivation: returns y and z; z is for backward and not differentiable."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return below_autograd(_ops.conv2d_with_preactivation, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        y, z = output
        ctx.mark_non_differentiable(z)
        _ConvFunction._save(ctx, inputs, saved_for_derivative(inputs[7], y, z))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        return _ConvFunction._backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, None]:
        return _ConvFunction._jvp(ctx, tangents), None


class Conv2dBackwardFunction(Function):
    """conv2d_backward without an activation: bilinear in dz, input and weight."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return below_autograd(_ops.conv2d_backward, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, input, weight, _, stride, padding, dilation, groups, _, flip, mask = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, m in zip(output, mask, strict=True) if not m))
        ctx.geometry = (stride, padding, dilation, groups, "none", flip)
        ctx.mask = mask
        ctx.save_for_backward(grad, input, weight)
        ctx.save_for_forward(grad, input, weight)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        grad, input, weight = ctx.saved_tensors
        g_input, g_weight, g_bias = (
            g if m else None for g, m in zip(cotangents, ctx.mask, strict=True)
        )
        need_grad, need_input, need_weight = wanted_gradients(ctx)[:3]
        d_grad = d_input = d_weight = None
        if need_grad:
            d_grad = _conv_tangent((input, weight), (g_input, g_weight, g_bias), *ctx.geometry)
        if need_input and g_weight is not None:
            d_input = _gradients(ctx, grad, input, g_weight, [True, False, False])[0]
        if need_weight and g_input is not None:
            d_weight = _gradients(ctx, grad, g_input, weight, [False, True, False])[1]
        return (d_grad, d_input, d_weight, *(None,) * 8)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        grad, input, weight = ctx.saved_tensors
        t_grad, t_input, t_weight = tangents[:3]
        dx, dw, db = ctx.mask
        of_grad: Sequence[Tensor | None] = (None, None, None)
        of_weight = of_input = None
        if t_grad is not None:
            of_grad = _gradients(ctx, t_grad, input, weight, ctx.mask)
        if t_weight is not None and dx:
            of_weight = _gradients(ctx, grad, input, t_weight, [True, False, False])[0]
        if t_input is not None and dw:
            of_input = _gradients(ctx, grad, t_input, weight, [False, True, False])[1]
        # An output that was asked for needs a tangent, be it zero.
        return (
            _sum((of_grad[0], of_weight, torch.zeros_like(input))) if dx else None,
            _sum((of_grad[1], of_input, torch.zeros_like(weight))) if dw else None,
            _sum((of_grad[2], grad.new_zeros(weight.shape[0]))) if db else None,
        )


def _gradients(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.conv2d_backward(grad, input, weight, None, *ctx.geometry, mask)


class SelectPool2dBackwardFunction(Function):
    """select_pool2d_backward: linear, with select_pool2d_gather as its adjoint."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return below_autograd(_ops.select_pool2d_backward, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[2:]
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (selected,) = ctx.saved_tensors
        dy = _ops.select_pool2d_gather(grad, selected, *ctx.arguments[1:5])
        return (dy, *(None,) * 7)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (selected,) = ctx.saved_tensors
        return _ops.select_pool2d_backward(tangents[0], selected, *ctx.arguments)


class SelectPool2dGatherFunction(Function):
    """select_pool2d_gather: linear, with select_pool2d_backward as its adjoint."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return below_autograd(_ops.select_pool2d_gather, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, selected, *ctx.window = inputs
        ctx.input_size, ctx.channels_last = input.shape, is_channels_last(input)
        ctx.save_for_backward(selected)
        ctx.save_for_forward(selected)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (selected,) = ctx.saved_tensors
        dx = _ops.select_pool2d_backward(
            grad, selected, ctx.input_size, *ctx.window, ctx.channels_last
        )
        return (dx, *(None,) * 5)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (selected,) = ctx.saved_tensors
        return _ops.select_pool2d_gather(tangents[0], selected, *ctx.window)


class _SelectPool2dFunction(Function):
    """Max or min pooling that remembers what it selected. Lecture row 18: a 0/1 mask.

    ``_op`` returns y and the selected elements, as offsets or as indices; the second output is not
    differentiable. Only it is kept for backward: neither input nor output is.
    """

    _op: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, kernel_size, stride, padding, dilation, _ = inputs
        ctx.window = (kernel_size, stride, padding, dilation)
        ctx.input_size, ctx.channels_last = input.shape, is_channels_last(input)
        ctx.set_materialize_grads(False)  # which would fill zeros for the selected elements
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        if may_have_tangents():
            ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        (selected,) = ctx.saved_tensors
        values = (ctx.input_size, *ctx.window, ctx.channels_last)
        dx = unrecorded(_select_pool2d_backward, (grad, selected), values)
        return (dx, *(None,) * 5)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        (selected,) = ctx.saved_tensors
        return _ops.select_pool2d_gather(tangents[0], selected, *ctx.window), None


def _select_function(name: str, op: Operator, doc: str) -> type[_SelectPool2dFunction]:
    def of_window(
        input: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        ceil_mode: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return forward(op, (input,), (kernel_size, stride, padding, dilation, ceil_mode))

    members = {"forward": staticmethod(of_window), "__doc__": doc, "__module__": __name__}
    return type(name, (_SelectPool2dFunction,), members)


_RETURNS = "Returns y, N x C x P x Q, and the selected elements' offsets in their windows."
MaxPool2dFunction = _select_function(
    "MaxPool2dFunction", operator("max_pool2d_with_offsets"), f"Max pooling. {_RETURNS}"
)
MinPool2dFunction = _select_function(
    "MinPool2dFunction", operator("min_pool2d_with_offsets"), f"Min pooling. {_RETURNS}"
)
MaxPool2dWithIndicesFunction = _select_function(
    "MaxPool2dWithIndicesFunction",
    operator("max_pool2d_with_indices"),
    "Max pooling. Returns y and int64 indices h*W + w.",
)
MinPool2dWithIndicesFunction = _select_function(
    "MinPool2dWithIndicesFunction",
    operator("min_pool2d_with_indices"),
    "Min pooling. Returns y and int64 indices h*W + w.",
)


class AvgPool2dFunction(Function):
    """Average pooling, lecture row 17: linear, with avg_pool2d_backward as its adjoint."""

    @staticmethod
    def forward(
        input: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int] = (0, 0),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        window = (kernel_size, stride, padding)
        values = (*window, ceil_mode, count_include_pad, divisor_override)
        return forward(_avg_pool2d, (input,), values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, *ctx.arguments = inputs
        ctx.input_size, ctx.channels_last = input.shape, is_channels_last(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values = (ctx.input_size, *ctx.arguments, ctx.channels_last)
        dx = unrecorded(_avg_pool2d_backward, (grad,), values)
        return (dx, *(None,) * 6)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _ops.avg_pool2d(tangents[0], *ctx.arguments)


class AvgPool2dBackwardFunction(Function):
    """avg_pool2d_backward: linear, with avg_pool2d as its adjoint."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return below_autograd(_ops.avg_pool2d_backward, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (_ops.avg_pool2d(grad, *ctx.arguments[1:7]), *(None,) * 8)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _ops.avg_pool2d_backward(tangents[0], *ctx.arguments)
