"""Layers that keep packed weights, and whether what they compute from these is right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv.functional as F
from torchconv import nn

SIZE = (2, 32, 10, 11)


def layer(channels: int = 32, filters: int = 32, kernel: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, padding=kernel // 2, **kwargs).eval()


def kept(module: nn.Conv2d) -> int:
    """Bytes of packed weights."""
    return 0 if module._packed_weights is None else module._packed_weights.bytes()


def unpacked(module: nn.Conv2d, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.conv2d(
            *(x, module.weight, module.bias, module.stride, module.padding, module.dilation),
            module.groups,
            activation=module.activation,
            flip_kernel=module.flip_kernel,
        )


def assert_fresh(module: nn.Conv2d, x: Tensor | None = None) -> None:
    """The layer computes what its weights say, to the bit, also from what it keeps."""
    if x is None:
        x = torch.randn(SIZE, dtype=module.weight.dtype)
    expected = unpacked(module, x)
    with torch.no_grad():
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x), expected)


def assert_fresh_in_threads(
    module: torch.nn.Module, x: Tensor, change: Callable[[], Tensor], rounds: int = 6
) -> None:
    """Four threads call `module`, whose weights `change` changes from one barrier to the next. It
    returns what is expected then."""
    barrier = threading.Barrier(4, timeout=60)
    expected: list[Tensor] = []
    wrong: list[Any] = []

    def run(index: int) -> None:
        try:
            for round in range(rounds):
                if index == 0:
                    expected.append(change())
                barrier.wait()
                with torch.no_grad():
                    for _ in range(5):
                        if not torch.equal(module(x), expected[-1]):
                            wrong.append(round)
                barrier.wait()
        except BaseException as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(barrier.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def packed() -> Iterator[nn.Conv2d]:
    """A layer that keeps weights."""
    module = layer()
    assert_fresh(module)
    assert kept(module) > 0
    yield module
