"""The short ways of a call to its kernel.

Autograd's part of an operator is a kernel in Python, and on small images the dispatcher's way there
takes several times as long as the convolution. Where nobody can ask for a derivative a call goes
past it, by the operator's overload for short calls; where a plain call records one, straight to the
operator's Function. While something traces, transforms, casts or watches the call, it must see the
whole operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad as fwAD
from torch.nn import Parameter

from torchconv._schemas import overload
from torchconv._settings import Signature, settings_of

__all__ = [
    "PLAIN",
    "Operator",
    "below_autograd",
    "forward",
    "is_plain",
    "may_have_tangents",
    "operator",
    "records",
    "unrecorded",
]

# Looked up once, as the few attributes on the way to each are a good part of a small call.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_dynamo_compiling  # other compilers are dispatch modes
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack

# Others have a meaning of their own. None is an optional tensor that is not there.
PLAIN = frozenset((Tensor, Parameter, type(None)))


class Operator:
    """An operator, and what calls it without a detour: `call(*tensors, settings(values))`, where
    the call `is_plain`, with its tensors and the tuple of what is none.

    derivative: applies its Function to all of its arguments, where functional.py has set it.
    recorded: `recorded(*tensors, values)`, the same for plain calls, where there is one.
    """

    __slots__ = ("_signature", "_whole", "call", "derivative", "recorded", "settings")

    def __init__(self, name: str) -> None:
        self.derivative: Any = None
        self.recorded: Any = None
        self._signature = Signature(name)
        self._whole: OpOverload = overload(name)
        self.call = getattr(torch.ops.torchconv, name).settings._op
        # TypeError for values that are not in the normal form: tuples of integers.
        self.settings = functools.lru_cache(maxsize=1024)(self.settings_once)

    def settings_once(self, values: tuple[Any, ...]) -> Tensor:
        """As settings, for values that hardly come again."""
        return settings_of(self._signature.types, values)

    def __call__(self, tensors: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
        """The whole operator, for everybody to see."""
        return self._whole(*self._signature.joined(tensors, values))


# The operator of this name, the same one for everybody: it remembers settings.
operator = functools.cache(Operator)


def is_plain(*tensors: Any) -> bool:
    """Whether nothing transforms, traces or watches a call with these; autograd may record it."""
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return False
    return not (
        fwAD._current_level >= 0
        or _dispatch_modes()
        or _function_modes()
        or _transforms_active()
        or _tracing_state() is not None
    )


def records(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> bool:
    """Whether autograd records a call with these."""
    return _grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
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


def forward(op: Operator, tensors: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    """As below_autograd, the short way where there is one."""
    settings = _short(op, tensors, values)
    if settings is None:
        return below_autograd(op, tensors, values)
    return op.call(*tensors, settings)


def unrecorded(op: Operator, tensors: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    """op inside a Function's backward, which most often is not itself differentiated."""
    settings = None if _grad_enabled() else _short(op, tensors, values)
    return op(tensors, values) if settings is None else op.call(*tensors, settings)


def _short(op: Operator, tensors: tuple[Any, ...], values: tuple[Any, ...]) -> Tensor | None:
    """The settings for the short way, inside a Function; None where there is none."""
    if _is_compiling() or not is_plain(*tensors):
        return None
    try:
        return op.settings(values)
    except (TypeError, OverflowError):  # lists, say, of who called the operator itself
        return None
