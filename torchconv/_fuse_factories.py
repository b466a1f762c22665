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


def _factory(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which a call with stand-ins is recorded."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for part in pytree.tree_leaves((args, kwargs)):
            if isinstance(part, Proxy):
                return part.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


@contextmanager
def recorded_factories() -> Iterator[None]:
    """In it torch's own names record calls with stand-ins, whatever their arguments."""
    own = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, function in own.items():
            setattr(torch, name, _factory(function))
        yield
    finally:
        for name, function in own.items():
            setattr(torch, name, function)
