"""Every row of the five lectures' common content, and every number they work out, exactly.

lecture_examples.json holds the numbers. They are small integers (or quarters), which every order of
summation gives exactly, so results are compared with torch.equal. The formulas are written as loops
in reference.py. The backward rows are in test_lectures_backward.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
import torchconv
import torchconv.functional as F
from conftest import assert_accurate, everywhere, from_numpy, in_layout, to_numpy

pytestmark = everywhere

EXAMPLES = json.loads((Path(__file__).parent / "lecture_examples.json").read_text())
DTYPES = (torch.float32, torch.float64)
FORMATS = ("contiguous", "channels_last")

on_dtypes = pytest.mark.parametrize("dtype", DTYPES)
on_formats = pytest.mark.parametrize("layout", FORMATS)


def integers(
    *shape: int, dtype: torch.dtype = torch.float64, low: int = -4, high: int = 5
) -> Tensor:
    return torch.randint(low, high, shape).to(dtype)


def image(rows: list[list[float]], dtype: torch.dtype, channels: int = 1) -> Tensor:
    """(2, channels, H, W): the lecture's matrix twice and in every channel, so layouts differ."""
    return torch.tensor(rows, dtype=dtype).expand(2, channels, -1, -1).contiguous()


# --- the worked numbers --------------------------------------------------------------------------


@on_formats
@on_dtypes
@pytest.mark.parametrize("name", [n for n, e in EXAMPLES.items() if e["op"] == "conv2d"])
def test_worked_convolution(name: str, dtype: torch.dtype, layout: str) -> None:
    example = EXAMPLES[name]
    x = in_layout(image(example["input"], dtype), layout)
    kernel = torch.tensor(example["weight"], dtype=dtype)
    w = in_layout(kernel.expand(1, 1, -1, -1), layout)
    b = torch.tensor([example["bias"]], dtype=dtype)
    out = F.conv2d(x, w, b, stride=example["stride"])
    assert torch.equal(out, image(example["output"], dtype))


@on_formats
@on_dtypes
@pytest.mark.parametrize("name", [n for n, e in EXAMPLES.items() if e["op"] == "conv2d"])
def test_worked_convolution_over_channels(name: str, dtype: torch.dtype, layout: str) -> None:
    """Three channels that each hold the picture, two filters k and -k: 3 * z and -3 * z (row 4)."""
    example = EXAMPLES[name]
    x = in_layout(image(example["input"], dtype, channels=3), layout)
    kernel = torch.tensor(example["weight"], dtype=dtype).expand(1, 3, -1, -1)
    w = in_layout(torch.cat([kernel, -kernel]), layout)
    out = F.conv2d(x, w, stride=example["stride"])
    z = image(example["output"], dtype) - example["bias"]
    assert torch.equal(out, torch.cat([3 * z, -3 * z], dim=1))


@on_formats
@on_dtypes
@pytest.mark.parametrize("name", [n for n, e in EXAMPLES.items() if "pool" in e["op"]])
def test_worked_pooling(name: str, dtype: torch.dtype, layout: str) -> None:
    example = EXAMPLES[name]
    x = in_layout(image(example["input"], dtype, channels=3), layout)
    out = getattr(F, example["op"])(x, example["kernel_size"], example["stride"])
    assert torch.equal(out, image(example["output"], dtype, channels=3))


@on_dtypes
def test_image_is_a_matrix_of_intensities(dtype: torch.dtype) -> None:
    """Lecture E's picture corner, and a colour image as one such matrix per channel."""
    rows = EXAMPLES["image_corner"]["rows"]
    assert len(rows) == 2 and all(len(row) == 12 for row in rows)
    x = torch.tensor(rows, dtype=dtype)
    assert torch.equal(F.conv2d(x[None], torch.ones(1, 1, 1, 1, dtype=dtype))[0], x)
    colour = torch.stack([x, x + 1, x + 2])
    total = F.conv2d(colour, torch.ones(1, 3, 1, 1, dtype=dtype))
    assert torch.equal(total[0], 3 * x + 3)
    assert F.max_pool2d(colour, 2)[:, 0, 0].tolist() == [182, 183, 184]


# --- forward -------------------------------------------------------------------------------------


def test_row_1_window() -> None:
    """A one-hot kernel reads one element of W[i,j] = x[i*s : i*s+R, j*s : j*s+S], in 2D and 1D."""
    x = integers(1, 1, 7, 8)
    size, stride = (3, 2), (2, 3)
    one_hot = torch.eye(6, dtype=x.dtype).view(6, 1, 3, 2)
    z = F.conv2d(x, one_hot, stride=stride)
    for i in range(z.shape[2]):
        for j in range(z.shape[3]):
            top, left = i * stride[0], j * stride[1]
            expected = x[0, 0, top : top + size[0], left : left + size[1]]
            assert torch.equal(z[0, :, i, j].view(3, 2), expected)
    line = F.conv2d(x[:, :, :1], torch.eye(3, dtype=x.dtype).view(3, 1, 1, 3), stride=2)
    for j in range(line.shape[3]):
        assert torch.equal(line[0, :, 0, j], x[0, 0, 0, 2 * j : 2 * j + 3])


@on_dtypes
def test_row_2_correlation_is_a_dot_product(dtype: torch.dtype) -> None:
    x, k, b = integers(1, 1, 5, 6, dtype=dtype), integers(1, 1, 3, 2, dtype=dtype), 2.0
    z = F.conv2d(x, k, torch.tensor([b], dtype=dtype))
    for i in range(3):
        for j in range(5):
            patch = x[0, 0, i : i + 3, j : j + 2].flatten()
            assert z[0, 0, i, j] == torch.dot(patch, k.flatten()) + b


@on_dtypes
def test_row_2_convolution_is_a_matrix_product(dtype: torch.dtype) -> None:
    x, w = integers(2, 3, 6, 7, dtype=dtype), integers(4, 3, 3, 2, dtype=dtype)
    columns = nn.functional.unfold(x, (3, 2), padding=(1, 0), stride=(2, 1))  # N, C*R*S, P*Q
    product = (w.flatten(1) @ columns).view(2, 4, 3, 6)
    assert torch.equal(F.conv2d(x, w, stride=(2, 1), padding=(1, 0)), product)


@on_formats
@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
def test_row_3_layer_with_activation(name: str, layout: str) -> None:
    """A = Conv2D(X; K, b; g) is g of Z = Conv2D(X; K, b), element by element."""
    x = in_layout(torch.randn(2, 3, 5, 6, dtype=torch.float64), layout)
    w, b = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    z = reference.conv2d(to_numpy(x), to_numpy(w), to_numpy(b))
    assert_accurate(F.conv2d(x, w, b), from_numpy(z))
    g = reference.ACTIVATIONS[name]
    expected = torch.tensor([g(v) for v in z.flatten()], dtype=torch.float64).view(z.shape)
    assert_accurate(F.conv2d(x, w, b, activation=name), expected)


@on_formats
def test_row_4_channels_and_filters(layout: str) -> None:
    """Channel c of a filter meets channel c of the input; one output map per filter."""
    x, w, b = integers(2, 3, 6, 5), integers(4, 3, 3, 3), integers(4)
    z = F.conv2d(in_layout(x, layout), in_layout(w, layout), b)
    maps = []
    for k in range(4):
        per_channel = [F.conv2d(x[:, c : c + 1], w[k : k + 1, c : c + 1]) for c in range(3)]
        maps.append(sum(per_channel) + b[k])
    assert torch.equal(z, torch.cat(maps, dim=1))
    assert torch.equal(z, from_numpy(reference.conv2d(to_numpy(x), to_numpy(w), to_numpy(b))))


def test_row_5_minibatch() -> None:
    x, w, b = integers(5, 2, 6, 6), integers(3, 2, 3, 3), integers(3)
    whole = F.conv2d(x, w, b)
    assert torch.equal(whole, torch.cat([F.conv2d(x[n : n + 1], w, b) for n in range(5)]))
    assert torch.equal(whole[2], F.conv2d(x[2], w, b))


def test_row_5_cascade() -> None:
    """n[l] = n[l-1] - f[l] + 1 through a stack of layers."""
    x = torch.randn(1, 1, 28, 26)
    height, width = 28, 26
    for channels, (r, s) in enumerate([(5, 3), (3, 3), (2, 4), (7, 1)], start=2):
        layer = torchconv.nn.Conv2d(x.shape[1], channels, (r, s))
        x = layer(x)
        height, width = height - r + 1, width - s + 1
        assert x.shape == (1, channels, height, width)


@pytest.mark.parametrize("n", [5, 6, 7, 11])
@pytest.mark.parametrize("f", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_row_6_output_size(n: int, f: int, stride: int, dilation: int) -> None:
    """Positions where the kernel does not fit are dropped, with p_before and p_after apart."""
    for before, after in [(0, 0), (1, 0), (0, 2), (2, 3)]:
        size = reference.output_size(n, f, stride, before, after, dilation)
        if size < 1:
            continue
        fits = [i for i in range(n + before + after) if i + dilation * (f - 1) < n + before + after]
        assert size == len(fits[::stride])
        out = F.conv2d(
            torch.randn(1, 1, n, n),
            torch.randn(1, 1, f, f),
            stride=stride,
            padding=(before, after, after, before),
            dilation=dilation,
        )
        other = reference.output_size(n, f, stride, after, before, dilation)
        assert out.shape == (1, 1, other, size)


def test_row_6_dropped_positions_do_not_count() -> None:
    """7 columns, kernel 3, stride 3: the last column is read by nobody."""
    x, w = integers(1, 1, 7, 7), integers(1, 1, 3, 3)
    changed = x.clone()
    changed[..., 6] = 99
    changed[..., 6, :] = 99
    assert torch.equal(F.conv2d(x, w, stride=3, padding=0), F.conv2d(changed, w, stride=3))


@on_formats
def test_row_7_valid_is_no_padding(layout: str) -> None:
    x, w = in_layout(integers(2, 2, 6, 5), layout), integers(3, 2, 3, 2)
    assert torch.equal(F.conv2d(x, w, padding="valid"), F.conv2d(x, w, padding=0))


@on_formats
@pytest.mark.parametrize("f", [1, 2, 3, 4, 5, 6])
def test_row_7_same_keeps_the_size(f: int, layout: str) -> None:
    """p = (f - 1) / 2 for odd f; for even f one more at the end."""
    x, w = in_layout(integers(2, 2, 7, 6), layout), integers(3, 2, f, f)
    out = F.conv2d(x, w, padding="same")
    assert out.shape == (2, 3, 7, 6)
    before, after = (f - 1) // 2, f - 1 - (f - 1) // 2
    assert after == before + (f % 2 == 0)
    padded = nn.functional.pad(x, (before, after, before, after))
    assert torch.equal(out, F.conv2d(padded, w))


@pytest.mark.parametrize("f", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 3)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_row_7_same_with_stride(f: int, stride: int | tuple[int, int], dilation: int) -> None:
    """ceil(n / stride) outputs, which PyTorch refuses to compute."""
    x, w = integers(1, 2, 8, 11), integers(3, 2, f, f)
    sh, sw = (stride, stride) if isinstance(stride, int) else stride
    top, bottom = reference.same_padding(8, f, sh, dilation)
    left, right = reference.same_padding(11, f, sw, dilation)
    out = F.conv2d(x, w, stride=stride, padding="same", dilation=dilation)
    assert out.shape == (1, 3, math.ceil(8 / sh), math.ceil(11 / sw))
    expected = reference.conv2d(
        to_numpy(x), to_numpy(w), None, (sh, sw), (left, right, top, bottom), (dilation, dilation)
    )
    assert torch.equal(out, from_numpy(expected))


@on_formats
def test_row_7_any_amount_on_each_side(layout: str) -> None:
    """Left, right, top and bottom separately, in the order of F.pad."""
    x, w = integers(2, 2, 5, 6), integers(3, 2, 3, 3)
    for sides in [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (3, 1, 0, 2)]:
        out = F.conv2d(in_layout(x, layout), w, padding=sides)
        expected = reference.conv2d(to_numpy(x), to_numpy(w), None, (1, 1), sides)
        assert torch.equal(out, from_numpy(expected))


@on_formats
@pytest.mark.parametrize("stride", [2, 3, (1, 2), (3, 1)])
def test_row_8_stride_drops_intermediates(stride: int | tuple[int, int], layout: str) -> None:
    x, w, b = in_layout(integers(2, 3, 9, 10), layout), integers(4, 3, 3, 2), integers(4)
    sh, sw = (stride, stride) if isinstance(stride, int) else stride
    every = F.conv2d(x, w, b, padding=1)
    assert torch.equal(F.conv2d(x, w, b, stride=stride, padding=1), every[:, :, ::sh, ::sw])


@on_formats
@on_dtypes
def test_row_9_true_convolution(dtype: torch.dtype, layout: str) -> None:
    """conv(x, k) = corr(x, rot180(k)), and as the textbook sum over x[i - r, j - q] * k[r, q]."""
    x, w = in_layout(integers(2, 2, 5, 6, dtype=dtype), layout), integers(3, 2, 3, 2, dtype=dtype)
    true = F.conv2d(x, w, flip_kernel=True)
    assert torch.equal(true, F.conv2d(x, torch.rot90(w, 2, (2, 3))))
    for i in range(3):
        for j in range(5):
            total = sum(
                x[:, None, :, i + 2 - r, j + 1 - q] * w[None, :, :, r, q]
                for r in range(3)
                for q in range(2)
            )
            assert torch.equal(true[:, :, i, j], total.sum(dim=2))


def test_row_9_true_convolution_commutes() -> None:
    """x * k = k * x holds for convolution and not for correlation."""
    x, k = integers(1, 1, 4, 5), integers(1, 1, 3, 2)
    full = (1, 1, 2, 2)  # every position where kernel and image overlap at all
    one = F.conv2d(x, k, padding=full, flip_kernel=True)
    other = F.conv2d(k, x, padding=(4, 4, 3, 3), flip_kernel=True)
    assert torch.equal(one, other)
    assert not torch.equal(F.conv2d(x, k, padding=full), F.conv2d(k, x, padding=(4, 4, 3, 3)))


def test_row_10_edge_filters() -> None:
    """A step between two columns answers the vertical detector only, and the other way round."""
    vertical = torch.tensor(EXAMPLES["edge_vertical"]["weight"], dtype=torch.float32)
    horizontal = torch.tensor(EXAMPLES["edge_horizontal"]["weight"], dtype=torch.float32)
    assert torch.equal(vertical.T, horizontal)
    w = torch.stack([vertical, horizontal])[:, None]
    step = torch.zeros(1, 6, 6)
    step[..., :3] = 10
    on_vertical, on_horizontal = F.conv2d(step, w)
    assert on_vertical.tolist() == [[0, 30, 30, 0]] * 4
    assert torch.count_nonzero(on_horizontal) == 0
    on_vertical, on_horizontal = F.conv2d(step.transpose(1, 2), w)
    assert on_horizontal.T.tolist() == [[0, 30, 30, 0]] * 4
    assert torch.count_nonzero(on_vertical) == 0


@on_formats
@pytest.mark.parametrize("stride", [2, 1, (3, 1)], ids=["apart", "overlapping", "mixed"])
@pytest.mark.parametrize("op", ["max_pool2d", "min_pool2d", "avg_pool2d"])
def test_row_11_pooling(op: str, stride: int | tuple[int, int], layout: str) -> None:
    """Per channel, no parameters, channel count preserved."""
    x = integers(2, 3, 7, 6)
    out = getattr(F, op)(in_layout(x, layout), 2, stride)
    pair = (stride, stride) if isinstance(stride, int) else stride
    if op == "avg_pool2d":
        expected = reference.avg_pool2d(to_numpy(x), (2, 2), pair)
    else:
        expected, _ = reference.select_pool2d(to_numpy(x), (2, 2), pair, minimum=op[:3] == "min")
    assert torch.equal(out, from_numpy(expected))
    assert out.shape[:2] == x.shape[:2]
    for c in range(3):
        alone = getattr(F, op)(x[:, c : c + 1], 2, stride)
        assert torch.equal(out[:, c : c + 1], alone)


@pytest.mark.parametrize("kind", ["MaxPool2d", "MinPool2d", "AvgPool2d"])
def test_row_11_pooling_has_no_parameters(kind: str) -> None:
    layer = getattr(torchconv.nn, kind)(2)
    assert list(layer.parameters()) == [] and layer.stride == layer.kernel_size


@on_formats
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_row_12_locally_connected(stride: tuple[int, int], layout: str) -> None:
    """h[i,j] = sum V[i,j,a,b] * x[i+a,j+b]: a kernel for every position."""
    x = integers(2, 3, 6, 5)
    p, q = (6 - 3) // stride[0] + 1, (5 - 2) // stride[1] + 1
    v, b = integers(p, q, 4, 3, 3, 2), integers(4, p, q)
    out = F.locally_connected2d(in_layout(x, layout), v, None, stride)
    expected = reference.locally_connected2d(to_numpy(x), to_numpy(v), None, stride)
    assert torch.equal(out, from_numpy(expected))
    biased = F.locally_connected2d(x, v, b, stride)
    expected = reference.locally_connected2d(to_numpy(x), to_numpy(v), to_numpy(b), stride)
    assert torch.equal(biased, from_numpy(expected))


def test_row_12_weight_sharing_makes_it_a_convolution() -> None:
    x, w = integers(2, 3, 6, 5), integers(4, 3, 3, 2)
    kwargs: dict[str, Any] = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)}
    z = F.conv2d(x, w, **kwargs)
    v = w.expand(z.shape[2], z.shape[3], *w.shape)
    assert torch.equal(F.locally_connected2d(x, v, **kwargs), z)


def test_row_12_module() -> None:
    layer = torchconv.nn.LocallyConnected2d(3, 4, (6, 5), (3, 2), stride=(2, 1), padding=1)
    x = torch.randn(2, 3, 6, 5)
    out = layer(x)
    assert layer.weight.shape == (*out.shape[2:], 4, 3, 3, 2)
    direct = F.locally_connected2d(x, layer.weight, layer.bias, (2, 1), 1)
    assert torch.equal(out, direct)
    out.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.shape == layer.weight.shape
