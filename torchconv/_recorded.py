"""What autograd records of plain calls: the Functions of torchconv.autograd, made lean.

On small images Python's part of a recorded call takes longer than the kernel. Nothing transforms,
traces or watches a plain call (torchconv/_dispatch.py), so its Function needs no tangents and no
arguments one by one: it takes the short way at once, and returns y alone, without what only
backward needs. Backward, which may be watched or differentiated, is that of the operator's
Function.

On CPUs most of them are in C++ (csrc/bound/recorded.cpp), if the library for this very PyTorch is
there. The Functions here are for the rest: activations whose derivative needs the pre-activation,
residuals, GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchconv import _load
from torchconv._activations import NEEDS_PREACTIVATION
from torchconv._derivatives import DERIVATIVES
from torchconv._dispatch import Operator, operator, unrecorded
from torchconv._fake import is_channels_last
from torchconv._schemas import LIBRARY, overload
from torchconv._single_level import SingleLevelFunction
from torchconv._wanted import wanted_gradients
from torchconv.autograd import conv2d_gradients, saved_for_derivative

__all__ = ["RECORDED"]

_conv2d = operator("conv2d")
_conv2d_with_preactivation = operator("conv2d_with_preactivation")
_batch_norm_training = operator("batch_norm_training")


def _in_cpp(schema: str) -> Any:
    """What calls the operator of this schema, which csrc/bound/recorded.cpp implements."""
    return overload(LIBRARY.define(schema))._op


_record_conv2d = _in_cpp(
    "record_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor settings) -> Tensor"
)
_record_pool2d = _in_cpp("record_pool2d(Tensor input, Tensor settings, int which) -> Tensor")
_record_batch_norm = _in_cpp(
    "record_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor settings) -> Tensor"
)
# By operator, in the order of record_pool2d there: the name of its Function, what to call forward
# and backward, and how many of its arguments backward takes.
_POOLINGS = {
    "max_pool2d": ("MaxPool2d", "max_pool2d_with_offsets", "select_pool2d_backward", 4),
    "min_pool2d": ("MinPool2d", "min_pool2d_with_offsets", "select_pool2d_backward", 4),
    "avg_pool2d": ("AvgPool2d", "avg_pool2d", "avg_pool2d_backward", 6),
    "adaptive_avg_pool2d": (
        "AdaptiveAvgPool2d", "adaptive_avg_pool2d", "adaptive_avg_pool2d_backward", 0,
    ),
    "adaptive_max_pool2d_values": (
        "AdaptiveMaxPool2d", "adaptive_max_pool2d", "adaptive_max_pool2d_backward", 0,
    ),
}  # fmt: skip


class _Conv2d(SingleLevelFunction):
    """``conv2d``, with the settings of the call last."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        values: tuple[Any, ...],
    ) -> Tensor:
        activation = values[4]
        z = None
        if activation in NEEDS_PREACTIVATION:
            op = _conv2d_with_preactivation
            y, z = op.call(input, weight, bias, residual, op.settings(values))
        else:
            y = _conv2d.call(input, weight, bias, residual, _conv2d.settings(values))
            bias = residual = None  # which only computing z again would need
        ctx.set_materialize_grads(False)
        ctx.values = values
        ctx.save_for_backward(input, weight, saved_for_derivative(activation, y, z), bias, residual)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        *mask, of_residual, _ = wanted_gradients(ctx)
        return (
            *conv2d_gradients(ctx.saved_tensors, ctx.values, grad, tuple(mask), of_residual),
            None,
        )


class _Pool2d(SingleLevelFunction):
    """A pooling of the input by `op`, whose second result, where it has one, is what it selected.

    Of the arguments of the pooling, backward_op takes the first `taken`.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, op: Operator, backward_op: Operator, taken: int, values: Any
    ) -> Tensor:
        y = op.call(input, op.settings(values))
        ctx.set_materialize_grads(False)
        ctx.op = backward_op
        ctx.values = (input.shape, *values[:taken], is_channels_last(input))
        if type(y) is tuple:
            y, selected = y
            ctx.save_for_backward(selected)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        dx = None
        if grad is not None:
            dx = unrecorded(ctx.op, (grad, *ctx.saved_tensors), ctx.values)
        return dx, None, None, None, None


def _pool2d(
    which: int, name: str, op_name: str, backward_name: str, taken: int
) -> Callable[..., Tensor]:
    op, backward_op = operator(op_name), operator(backward_name)
    named: Any = type(f"{name}Function", (_Pool2d,), {})
    in_python = named.apply

    def apply(input: Tensor, values: tuple[Any, ...]) -> Tensor:
        if _load.records and input.is_cpu:
            y: Tensor = _record_pool2d(input, op.settings(values), which)
        else:
            y = in_python(input, op, backward_op, taken, values)
        return y

    return apply


def _conv2d_applier() -> Callable[..., Tensor]:
    """Named as the Functions of the operators are, for who looks at grad_fn."""
    plain: Any = type("Conv2dFunction", (_Conv2d,), {})
    activated: Any = type("Conv2dWithPreactivationFunction", (_Conv2d,), {})

    def apply(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        values: tuple[Any, ...],
    ) -> Tensor:
        needs_preactivation = values[4] in NEEDS_PREACTIVATION
        if (
            _load.records
            and residual is None
            and not needs_preactivation
            and _are_on_cpu(input, weight, bias)
        ):
            y: Tensor = _record_conv2d(input, weight, bias, _conv2d.settings(values))
        else:
            function = activated if needs_preactivation else plain
            y = function.apply(input, weight, bias, residual, values)
        return y

    return apply


def _are_on_cpu(input: Tensor, *others: Tensor | None) -> bool:
    return input.is_cpu and all(other is None or other.is_cpu for other in others)


def _batch_norm(*arguments: Any) -> Tensor:
    """batch_norm_training of its tensors, on a CPU, and the tuple of what is none."""
    *tensors, values = arguments
    y: Tensor
    if _load.records:
        y = _record_batch_norm(*tensors, _batch_norm_training.settings(values))
    else:
        y = DERIVATIVES["batch_norm_training"](*tensors, *values)[0]
    return y


# By operator: its tensors and the tuple of what is none give y.
RECORDED: dict[str, Callable[..., Tensor]] = {
    "conv2d": _conv2d_applier(),
    "batch_norm_training": _batch_norm,
    **{name: _pool2d(which, *row) for which, (name, row) in enumerate(_POOLINGS.items())},
}
