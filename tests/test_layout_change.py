"""Images in the one layout for operators in the other one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchconv.functional as ours
from conftest import FLOATS, threads

CHANNELS = [1, 2, 3, 4, 5, 17, 64]
SIZES = [(1, 1), (2, 15), (3, 16), (7, 9), (40, 131)]


def special(x: Tensor) -> Tensor:
    """With numbers in it that arithmetic would change."""
    some = x.view(-1)[:: max(x.numel() // 7, 1)]
    numbers = torch.tensor([-0.0, float("inf"), float("nan"), 1e-42], dtype=x.dtype)
    some.copy_(numbers[torch.arange(len(some)) % len(numbers)])
    return x


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_copy_is_exact(channels: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    """A depthwise 1x1 of ones hands its input on."""
    torch.manual_seed(0)
    x = special(torch.randn(3, channels, *size, dtype=dtype))
    ones = torch.ones(channels, 1, 1, 1, dtype=dtype)
    last = ones.to(memory_format=torch.channels_last)
    for image in (x, x.to(memory_format=torch.channels_last)):
        for weight in (ones, last):
            got = ours.conv2d(image, weight, groups=channels)
            assert torch.equal(got.nan_to_num(), (x * 1).nan_to_num())
            assert torch.equal(got.isnan(), x.isnan())


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dtype", FLOATS)
def test_same_as_in_its_own_layout(
    channels: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size, dtype=dtype)
    weight = torch.randn(6, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    expected = ours.conv2d(last, weight, padding=1)
    for number in (1, 2):
        with threads(number):
            got = ours.conv2d(x, weight, padding=1)
            assert got.stride() == F.conv2d(x, weight, padding=1).stride()
            assert torch.equal(got, expected)
            residual = torch.randn_like(expected)
            for other in (residual, residual.contiguous()):
                sums = ours.conv2d(x, weight, padding=1, residual=other)
                assert torch.equal(sums, ours.conv2d(last, weight, padding=1, residual=residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_in_the_other_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for channels in (3, 8):
        x = torch.randn(2, channels, 9, 10, dtype=dtype, requires_grad=True)
        weight = torch.randn(4, channels, 3, 3, dtype=dtype, requires_grad=True)
        last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        y, y_last = ours.conv2d(x, weight), ours.conv2d(last, weight)
        dy = torch.randn_like(y)
        for out, image in ((y, x), (y_last, last)):
            given = torch.autograd.grad(
                out, (image, weight), dy.to(memory_format=torch.channels_last), retain_graph=True
            )
            plain = torch.autograd.grad(out, (image, weight), dy.contiguous())
            for a, b in zip(given, plain, strict=True):
                torch.testing.assert_close(a, b)
