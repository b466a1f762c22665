"""1x1 convolutions of channels_last images with 17 to 24 filters: where a vector has 16 lanes, two
pixels share the second one (csrc/cpu/microkernels/direct_run.cpp)."""

import pytest
import torch
import torch.nn.functional as F

import torchconv.functional as ours


@pytest.mark.parametrize("filters", [17, 20, 23, 24, 56])
@pytest.mark.parametrize("channels", [3, 64, 1100])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
@pytest.mark.parametrize("adds", [False, True])
def test_equals_torch(filters: int, channels: int, activation: str | None, adds: bool) -> None:
    last = torch.channels_last
    x = torch.randn(2, channels, 13, 12).to(memory_format=last)
    weight, bias = torch.randn(filters, channels, 1, 1), torch.randn(filters)
    residual = torch.randn(2, filters, 13, 12).to(memory_format=last) if adds else None
    y = ours.conv2d(x, weight, bias, activation=activation, residual=residual)
    expected = F.conv2d(x.double(), weight.double(), bias.double())
    if residual is not None:
        expected = expected + residual.double()
    if activation is not None:
        expected = getattr(F, activation)(expected)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=2e-4)
    one = ours.conv2d(
        x[1:],
        weight,
        bias,
        activation=activation,
        residual=None if residual is None else residual[1:],
    )
    torch.testing.assert_close(one, y[1:], rtol=0, atol=0)


def test_nan_stays_with_its_pixel() -> None:
    x = torch.randn(1, 32, 6, 8).to(memory_format=torch.channels_last)
    x[0, 5, 2, 3] = float("nan")
    y = ours.conv2d(x, torch.randn(24, 32, 1, 1), activation="relu")
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[2, 3] = True
    assert torch.equal(y[0].isnan(), expected.expand(24, 6, 8))
