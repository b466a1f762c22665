"""The short ways of a call to its kernel.

Autograd's part of an operator is a kernel in Python, and on small images the dispatcher's way there
takes several times as long as the convolution. Where nobody can ask for a derivative a call goes
past it; where a plain call records one, straight to the operator's Function. While something
traces, transforms, casts or watches the call, it must see the whole operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad as fwAD
from torch.nn import Parameter

from torchconv._schemas import defaults, overload

__all__ = [
    "Operator",
    "below_autograd",
    "is_plain",
    "may_have_tangents",
    "records",
    "unrecorded",
]

# Looked up once, as the few attributes on the way to each are a good part of a small call.
_strided = torch.strided
_below_autograd = torch._C._AutoDispatchBelowAutograd
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack


class Operator:
    """An operator, and what calls it without a detour.

    leading: how many arguments every call has. usual: default values of those that follow, from the
    first, third and fourth of them on; but not of the `rare` last ones. derivative: applies its
    Function to all of its arguments.
    """

    __slots__ = ("call", "derivative", "overload", "usual")

    def __init__(
        self,
        name: str,
        leading: int = 1,
        rare: int = 0,
        derivative: Callable[..., Any] | None = None,
    ) -> None:
        self.derivative: Any = derivative
        self.overload: OpOverload = overload(name)
        self.call = self.overload._op
        values = defaults(name)
        rest = tuple(values[leading : len(values) - rare])
        self.usual = [(count, rest[count:]) for count in (0, 2, 3)]

    def unusual(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments after the leading ones, without defaults at the end: each costs."""
        for count, tail in self.usual:  # all but so many are usual, most often
            if args[count:] == tail:
                return args[:count]
        return args


def is_plain(input: Tensor, weight: Tensor) -> bool:
    """Whether nothing transforms, traces or watches a call with these; autograd may record it."""
    return not (
        type(input) is not Tensor
        or (type(weight) is not Parameter and type(weight) is not Tensor)
        or weight.layout is not _strided
        or input.layout is not _strided
        or fwAD._current_level >= 0
        or _dispatch_modes() > 0
        or _transforms_active()
        or _tracing_state() is not None
    )


def records(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> bool:
    """Whether autograd records a call with these."""
    return _grad_enabled() and (
        input.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def may_have_tangents() -> bool:
    """Whether forward-mode differentiation may ask a Function's context for what it saved."""
    return fwAD._current_level >= 0 or _transforms_active()


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """op inside a Function's forward: this level's derivative is the Function's own business."""
    with _below_autograd():
        if not _transforms_active():
            return op(*args)
        # Function.forward runs without gradients, but functorch's outer levels want theirs.
        with torch.enable_grad(), fwAD._set_fwd_grad_enabled(True):
            return op(*args)


def unrecorded(op: Operator, *args: Any) -> Any:
    """op inside a Function's backward, which most often is not itself differentiated."""
    if _is_compiling() or _grad_enabled() or may_have_tangents():
        return op.overload(*args)
    with _below_autograd():
        return op.call(*args)
