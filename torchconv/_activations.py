"""The activations by name, and their derivatives by PyTorch's differentiable operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Derivatives that follow from the output y, where y is not constant; the others need the
# pre-activation z.
DERIVATIVE_FROM_OUTPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.ones_like,
    "relu6": torch.ones_like,
    "sigmoid": lambda y: y * (1 - y),
    "tanh": lambda y: 1 - y * y,
}


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _hardswish_derivative(z: Tensor) -> Tensor:
    return torch.where(z < 3, z / 3 + 0.5, torch.ones_like(z))


def _gelu_derivative(z: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return cdf + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


NEEDS_PREACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu_derivative,
    "hardswish": _hardswish_derivative,
    "gelu": _gelu_derivative,
}
ACTIVATIONS = ("none", *DERIVATIVE_FROM_OUTPUT, *NEEDS_PREACTIVATION)

# Those that batch normalisation's kernels have, and those that they have where nothing is added.
NORM_CLAMPS = ("relu", "relu6")
NORM_CURVES = ("silu", "hardswish")


# Where an activation is constant. There the gradient is zero by choice, not by a product: it stays
# zero for an incoming gradient that is infinite or NaN, as in PyTorch.
_CONSTANT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: y <= 0,
    "relu6": lambda y: (y <= 0) | (y >= 6),
    "hardswish": lambda z: z <= -3,
}


def activation_gradient(activation: str, grad: Tensor, saved: Tensor) -> Tensor:
    """g'(z) * grad by differentiable operators, from y or z as ``conv2d_backward`` takes it."""
    formula = DERIVATIVE_FROM_OUTPUT.get(activation) or NEEDS_PREACTIVATION[activation]
    product = grad * formula(saved)
    constant = _CONSTANT.get(activation)
    if constant is None:
        return product
    return torch.where(constant(saved), torch.zeros_like(product), product)
