"""The derivatives of batch normalisation, as ``torchconv.autograd`` has those of everything else.

With g, the gradient times the activation's derivative, and x^ = (x - mean) * invstd: the bias
has sum(g), the weight sum(g * x^), and the input weight * invstd * (g - mean(g) - x^ * mean(g *
x^)) in training, where the statistics too depend on it, or else weight * invstd * g (Ioffe and
Szegedy 2015, arXiv:1502.03167, section 3). The residual has g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchconv._activations import NEEDS_PREACTIVATION, activation_gradient
from torchconv._dispatch import forward, operator, unrecorded

__all__ = [
    "BatchNorm2dFunction",
    "BatchNorm2dInferenceFunction",
    "batch_norm_backward_derivative",
]

_batch_norm_training = operator("batch_norm_training")
_batch_norm_inference = operator("batch_norm_inference")
_batch_norm_backward = operator("batch_norm_backward")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor, *statistics: Tensor) -> None:
    """statistics: mean and invstd, of a batch or as they ran when it was normalised."""
    input, weight, bias, residual, *_, eps, activation = inputs
    ctx.eps, ctx.activation = eps, activation
    # What decides where the activation is constant: x, or where something was added to it, y.
    of_output = output if residual is not None and activation != "none" else None
    # Of a bias that makes no such x only the type counts, which is that of the weight: like
    # PyTorch's, it may then change before backward.
    if bias is not None and weight is not None and (activation == "none" or residual is not None):
        bias = weight
    ctx.save_for_backward(input, of_output, weight, bias, *statistics)


def _backward(
    ctx: Any, grad: Tensor, saved: tuple[Tensor, ...], training: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias and residual."""
    dx, dw, db, of_residual = ctx.needs_input_grad[:4]
    activated = ctx.activation != "none"
    mask = (dx, of_residual and activated, dw, db)
    if any(mask):
        grads = unrecorded(_batch_norm_backward, (grad, *saved), (training, ctx.activation, mask))
    else:
        grads = (None,) * 4
    d_input, d_residual, d_weight, d_bias = (
        g if wanted else None for g, wanted in zip(grads, mask, strict=True)
    )
    if of_residual and not activated:
        d_residual = grad
    return d_input, d_weight, d_bias, d_residual


class BatchNorm2dFunction(Function):
    """batch_norm_training: returns y, and mean and invstd, which are for backward and not
    differentiable."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output: tuple[Tensor, Tensor, Tensor] = forward(
            _batch_norm_training, inputs[:6], inputs[6:]
        )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        y, mean, invstd = output
        ctx.mark_non_differentiable(mean, invstd)
        _save(ctx, inputs, y, mean, invstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 9
        return (*_backward(ctx, grad, ctx.saved_tensors, True), *(None,) * 5)


class BatchNorm2dInferenceFunction(Function):
    """batch_norm_inference: the running statistics are constants. Returns y, and copies of them for
    backward, as mean and invstd: a step in training mode changes the layer's own in place."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output: Tensor = forward(_batch_norm_inference, inputs[:6], inputs[6:])
        mean, var, eps = inputs[4], inputs[5], inputs[6]
        return output, mean.to(torch.float64, copy=True), torch.rsqrt(var.double() + eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        y, mean, invstd = output
        ctx.mark_non_differentiable(mean, invstd)
        _save(ctx, inputs, y, mean, invstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        return (*_backward(ctx, grad, ctx.saved_tensors, False), *(None,) * 4)


def batch_norm_backward_derivative(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    mask: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """batch_norm_backward by PyTorch's differentiable operators. Their results are those of the
    input's own mean and invstd, on whose way to it the derivative also goes."""
    if grad.shape != input.shape:  # which PyTorch's kernel would read past its end
        raise RuntimeError(
            f"expected grad_output of size {list(input.shape)}, but got {list(grad.shape)}"
        )
    if activation != "none":
        z = output
        if z is None:
            statistics = mean, invstd
            if training and activation in NEEDS_PREACTIVATION:
                statistics = _own_statistics(input, mean, invstd)
            z = _by_channel(input, *statistics, weight, bias)
        grad = activation_gradient(activation, grad, z)
    if weight is None and bias is not None:  # PyTorch's own derivative would leave the bias out
        weight = torch.ones_like(bias)
    dtype = input.dtype if weight is None else weight.dtype
    mean, invstd = mean.detach().to(dtype), invstd.detach().to(dtype)
    given = (None, None, mean, invstd) if training else (mean, invstd**-2, None, None)
    dx, dw, db = torch.ops.aten.native_batch_norm_backward(
        grad, input, weight, *given, training, 0.0, [mask[0], mask[2], mask[3]]
    )
    absent = input.new_empty(0)
    return (
        dx if mask[0] else absent,
        (grad.clone() if activation == "none" else grad) if mask[1] else absent.clone(),
        dw if mask[2] else absent.clone(),
        db if mask[3] else absent.clone(),
    )


def _own_statistics(input: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """mean and invstd as functions of the input, whose batch they are of."""
    var, own_mean = torch.var_mean(input.to(mean.dtype), (0, 2, 3), correction=0)
    eps = invstd.detach() ** -2 - var.detach()
    return own_mean, (var + eps) ** -0.5


def _by_channel(
    input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The output before the activation, in the input's type."""
    scale = invstd if weight is None else invstd * weight
    z = (input - mean[:, None, None]) * scale[:, None, None]
    return (z if bias is None else z + bias[:, None, None]).to(input.dtype)
