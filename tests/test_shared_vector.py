"""1x1 convolutions of channels_last images whose last panel of 32 filters is not full: if vectors
have 16 lanes, two pixels share the last one where it has 1 to 8, and a run of pixels takes a panel
of one vector along with the one before it (csrc/cpu/microkernels/direct_run.cpp)."""

import pytest
import torch
import torch.nn.functional as F

import torchconv.functional as ours

LAST = torch.channels_last
FILTERS = [17, 20, 23, 24, 33, 36, 40, 41, 48, 56, 72]


def expected(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    stride: int = 1,
) -> torch.Tensor:
    """In float64."""
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), stride)
    if residual is not None:
        y = y + residual.double()
    return y if activation is None else getattr(F, activation)(y)


def close(y: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(y.double(), reference, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("channels", [3, 64, 1100])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
@pytest.mark.parametrize("adds", [False, True])
def test_equals_torch(filters: int, channels: int, activation: str | None, adds: bool) -> None:
    x = torch.randn(2, channels, 13, 12).to(memory_format=LAST)
    weight, bias = torch.randn(filters, channels, 1, 1), torch.randn(filters)
    residual = torch.randn(2, filters, 13, 12).to(memory_format=LAST) if adds else None
    y = ours.conv2d(x, weight, bias, activation=activation, residual=residual)
    close(y, expected(x, weight, bias, activation, residual))
    one = ours.conv2d(
        x[1:],
        weight,
        bias,
        activation=activation,
        residual=None if residual is None else residual[1:],
    )
    torch.testing.assert_close(one, y[1:], rtol=0, atol=0)


@pytest.mark.parametrize("filters", [40, 44, 72, 80, 88, 104, 136])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(("size", "stride"), [((28, 28), 1), ((29, 31), 1), ((57, 56), 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_images_of_several_blocks(
    filters: int, layout: torch.memory_format, size: tuple[int, int], stride: int, biased: bool
) -> None:
    x = torch.randn(1, 24, *size).to(memory_format=layout)
    weight = torch.randn(filters, 24, 1, 1).to(memory_format=layout)
    bias = torch.randn(filters) if biased else None
    y = ours.conv2d(x, weight, bias, stride=stride, activation="relu")
    close(y, expected(x, weight, bias, "relu", stride=stride))


@pytest.mark.parametrize("filters", [4, 7, 8, 16, 24, 40, 64, 80])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 14])
def test_samples_behind_each_other(filters: int, size: int) -> None:
    x = torch.randn(9, 30, size, size).to(memory_format=LAST)
    weight, bias = torch.randn(filters, 30, 1, 1), torch.randn(filters)
    y = ours.conv2d(x, weight, bias)
    close(y, expected(x, weight, bias))
    for n in range(len(x)):
        one = ours.conv2d(x[n : n + 1], weight, bias)
        torch.testing.assert_close(one, y[n : n + 1], rtol=0, atol=0)


@pytest.mark.parametrize("filters", [40, 72])
def test_filters_do_not_depend_on_their_panel(filters: int) -> None:
    """Each sum adds its terms in the same order, whichever kernel has the filter."""
    x = torch.randn(1, 40, 28, 28).to(memory_format=LAST)
    weight, bias = torch.randn(filters, 40, 1, 1), torch.randn(filters)
    y = ours.conv2d(x, weight, bias)
    part = ours.conv2d(x, weight[-24:], bias[-24:])
    torch.testing.assert_close(part, y[:, -24:], rtol=0, atol=0)


@pytest.mark.parametrize("filters", [24, 40])
def test_nan_stays_with_its_pixel(filters: int) -> None:
    x = torch.randn(1, 32, 6, 8).to(memory_format=LAST)
    x[0, 5, 2, 3] = float("nan")
    y = ours.conv2d(x, torch.randn(filters, 32, 1, 1), activation="relu")
    where = torch.zeros(6, 8, dtype=torch.bool)
    where[2, 3] = True
    assert torch.equal(y[0].isnan(), where.expand(filters, 6, 8))
