"""What a model is made of, and what it computes, for tests that say what must not change."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dispatch_log import DispatchLog


def classes(model: nn.Module) -> list[type]:
    """Of the model and everything in it, outside in."""
    return [type(m) for m in model.modules()]


def snapshot(model: nn.Module) -> list[tuple[nn.Module, type, dict[str, Any]]]:
    """Every module with its class and its own attributes, containers copied one level deep."""
    return [
        (
            m,
            type(m),
            {k: copy.copy(v) if isinstance(v, (dict, set)) else v for k, v in vars(m).items()},
        )
        for m in model.modules()
    ]


def assert_untouched(
    model: nn.Module, before: list[tuple[nn.Module, type, dict[str, Any]]]
) -> None:
    """The very same objects, classes and attributes, and no more of them."""
    after = snapshot(model)
    assert len(after) == len(before)
    for (m, cls, attributes), (m0, cls0, attributes0) in zip(after, before, strict=True):
        assert m is m0 and cls is cls0
        assert list(attributes) == list(attributes0)
        for name, value in attributes.items():
            expected = attributes0[name]
            if isinstance(value, dict):
                assert list(value) == list(expected)
                assert all(value[k] is expected[k] for k in value)
            else:
                assert value is expected or value == expected


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output and all gradients of one training step's loss."""
    x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return (y.detach(), *torch.autograd.grad((y * weights).sum(), wanted))


def assert_same_step(model: nn.Module, x: Tensor, expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(step(model, x), expected, strict=True):
        torch.testing.assert_close(a, e)


def calls(model: nn.Module, x: Tensor) -> DispatchLog:
    """The operators of one forward pass."""
    with DispatchLog() as log, torch.no_grad():
        model(x)
    return log
