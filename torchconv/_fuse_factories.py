"""Tensors that a network makes of sizes, while `torchconv.fuse` records it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Proxy
from torch.utils import _pytree as pytree

__all__ = ["recorded_factories"]

# What makes tensors of sizes and numbers. As they are, they refuse stand-ins for some of these, and
# of others would ask for the values.
_FACTORIES = (
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros"),
)
# The same of tensors that the network holds.
_METHODS = ("expand", "new_tensor")


def _recorded(function: Callable[..., Any], kind: str, target: Any) -> Callable[..., Any]:
    """`function`, of which a call with stand-ins is recorded as a node of this kind and target."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for part in pytree.tree_leaves((args, kwargs)):
            if isinstance(part, Proxy):
                return part.tracer.create_proxy(kind, target, args, kwargs)
        return function(*args, **kwargs)

    return call


@contextmanager
def recorded_factories() -> Iterator[None]:
    """In it torch's own names, and methods, record calls with stand-ins, whatever the arguments."""
    own = {name: getattr(torch, name) for name in _FACTORIES}
    own_methods = {name: vars(torch.Tensor).get(name) for name in _METHODS}  # None: a base's
    try:
        for name, function in own.items():
            setattr(torch, name, _recorded(function, "call_function", function))
        for name in _METHODS:
            method = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, _recorded(method, "call_method", name))
        yield
    finally:
        for name, function in own_methods.items():
            if function is not None:
                setattr(torch.Tensor, name, function)
            elif name in vars(torch.Tensor):
                delattr(torch.Tensor, name)
        for name, function in own.items():
            setattr(torch, name, function)
