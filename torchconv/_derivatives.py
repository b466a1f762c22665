"""Registers the Functions of ``torchconv.autograd`` as the operators' derivatives.

Each operator gets a kernel for the Autograd dispatch key: where no derivative can be asked for it
passes the call on, else it applies the operator's Function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad as fwAD
from torch.autograd.graph import increment_version

from torchconv._activations import NEEDS_PREACTIVATION, activation_gradient
from torchconv._autograd_adaptive import (
    AdaptiveAvgPool2dBackwardFunction,
    AdaptiveAvgPool2dFunction,
    AdaptiveMaxPool2dBackwardFunction,
    AdaptiveMaxPool2dFunction,
    AdaptiveMaxPool2dGatherFunction,
)
from torchconv._autograd_norm import (
    BatchNorm2dFunction,
    BatchNorm2dInferenceFunction,
    batch_norm_backward_derivative,
)
from torchconv._schemas import LIBRARY, defaults
from torchconv._single_level import SingleLevelFunction
from torchconv.autograd import (
    AvgPool2dBackwardFunction,
    AvgPool2dFunction,
    Conv2dBackwardFunction,
    Conv2dFunction,
    Conv2dWithPreactivationFunction,
    MaxPool2dFunction,
    MaxPool2dWithIndicesFunction,
    MinPool2dFunction,
    MinPool2dWithIndicesFunction,
    SelectPool2dBackwardFunction,
    SelectPool2dGatherFunction,
)


def _differentiates(args: Sequence[Any]) -> bool:
    """Whether a derivative of this call may be asked for, backward or forward."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return fwAD._current_level >= 0 and any(
        fwAD.unpack_dual(t).tangent is not None for t in tensors
    )


class _OuterLevels:
    """A Function's context in jvp, its saved tensors without their tangents of this level."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = tuple(
            None if t is None else fwAD.unpack_dual(t).primal for t in ctx.saved_tensors
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _applier(function: type[Function]) -> Callable[..., Any]:
    """function.apply for use inside a dispatcher kernel.

    There functorch has already done its part: the kernel sees tensors of one level, and Function's
    own apply, which would hand the call back to functorch, must not.
    """

    def jvp(ctx: Any, *tangents: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return function.jvp(ctx, *tangents)
        # PyTorch turns forward mode off in here, but functorch's outer levels want their tangents.
        with fwAD._set_fwd_grad_enabled(True):
            return function.jvp(_OuterLevels(ctx), *tangents)

    names = ("forward", "setup_context", "backward")
    members = {n: staticmethod(getattr(function, n)) for n in names}
    members["jvp"] = staticmethod(jvp)
    single_level: Any = type(function.__name__, (SingleLevelFunction,), members)

    applied = single_level.apply

    def apply(*args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return applied(*args)
        with enable_single_level_autograd_function():
            return applied(*args)

    return apply


def _first(apply: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *args: apply(*args)[0]


_apply_conv2d = _applier(Conv2dFunction)
_apply_conv2d_with_preactivation = _applier(Conv2dWithPreactivationFunction)
_apply_conv2d_backward = _applier(Conv2dBackwardFunction)
_apply_max_pool2d = _applier(MaxPool2dFunction)
_apply_min_pool2d = _applier(MinPool2dFunction)
_apply_adaptive_max_pool2d = _applier(AdaptiveMaxPool2dFunction)


def _conv2d_derivative(*args: Any) -> Tensor:
    if args[7] in NEEDS_PREACTIVATION:
        return _apply_conv2d_with_preactivation(*args)[0]
    return _apply_conv2d(*args)


def _conv2d_backward_derivative(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, input, weight, saved, *geometry, activation, flip, mask = args
    if activation != "none":
        # Differentiated once more, the activation's own derivative takes part: left to PyTorch.
        grad, saved = activation_gradient(activation, grad, saved), None
    return _apply_conv2d_backward(grad, input, weight, saved, *geometry, "none", flip, mask)


DERIVATIVES: dict[str, Callable[..., Any]] = {
    "conv2d": _conv2d_derivative,
    "conv2d_with_preactivation": _apply_conv2d_with_preactivation,
    "conv2d_backward": _conv2d_backward_derivative,
    "max_pool2d": _first(_apply_max_pool2d),
    "min_pool2d": _first(_apply_min_pool2d),
    "max_pool2d_with_offsets": _apply_max_pool2d,
    "min_pool2d_with_offsets": _apply_min_pool2d,
    "max_pool2d_with_indices": _applier(MaxPool2dWithIndicesFunction),
    "min_pool2d_with_indices": _applier(MinPool2dWithIndicesFunction),
    "select_pool2d_backward": _applier(SelectPool2dBackwardFunction),
    "select_pool2d_gather": _applier(SelectPool2dGatherFunction),
    "avg_pool2d": _applier(AvgPool2dFunction),
    "avg_pool2d_backward": _applier(AvgPool2dBackwardFunction),
    "adaptive_avg_pool2d": _applier(AdaptiveAvgPool2dFunction),
    "adaptive_avg_pool2d_backward": _applier(AdaptiveAvgPool2dBackwardFunction),
    "adaptive_max_pool2d": _apply_adaptive_max_pool2d,
    "adaptive_max_pool2d_values": _first(_apply_adaptive_max_pool2d),
    "adaptive_max_pool2d_backward": _applier(AdaptiveMaxPool2dBackwardFunction),
    "adaptive_max_pool2d_gather": _applier(AdaptiveMaxPool2dGatherFunction),
    "batch_norm_training": _applier(BatchNorm2dFunction),
    "batch_norm_inference": _first(_applier(BatchNorm2dInferenceFunction)),
    "batch_norm_backward": batch_norm_backward_derivative,
}


def _register(name: str, derivative: Callable[..., Any]) -> None:
    op = getattr(torch.ops.torchconv, name).default
    trailing = defaults(name)

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        args = (*args, *trailing[len(args) :])
        if _differentiates(args):
            return derivative(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


for _name, _derivative_of_op in DERIVATIVES.items():
    _register(_name, _derivative_of_op)


def _batch_norm_training_in_place(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    """Lets autograd know that running statistics have changed, as for an operator of its own."""
    op = torch.ops.torchconv.batch_norm_training.default
    with torch._C._AutoDispatchBelowADInplaceOrView():
        result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
    increment_version(t for t in args[4:6] if t is not None and not t.is_inference())
    return result


LIBRARY.impl(
    "batch_norm_training", _batch_norm_training_in_place, "ADInplaceOrView", with_keyset=True
)
