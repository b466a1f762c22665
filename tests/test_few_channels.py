"""Dense convolutions with few channels or few filters, against float64.

Inner products along channels (csrc/cpu/inner_gather.cpp) take few filters in channels_last,
Winograd along the rows (csrc/cpu/winograd_rows.cpp) few channels and kernels of several columns,
and direct products of few terms read several taps where they lie (csrc/cpu/direct_gemm_blocks.h),
those of one vector of filters with fewer pointers than pixels (microkernels/direct_even_impl.h).
Kernels of one row or column share what they read among their taps (csrc/cpu/shared_taps.cpp).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchconv
import torchconv.functional as F
from conftest import assert_accurate, cpu_only, everywhere, in_layout, relative_error
from oracle import torch_F
from test_determinism import threads

pytestmark = everywhere

# name: input size, weight size, further arguments of conv2d
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    f"few_filters_{k}": ((2, 37, 9, 21), (k, 37, 3, 3), {"padding": 1}) for k in range(1, 9)
}
CASES |= {
    "few_filters_s2": ((2, 64, 15, 22), (3, 64, 3, 3), {"stride": 2, "padding": 1}),
    "few_filters_dilated": ((2, 48, 19, 13), (5, 48, 3, 3), {"padding": 3, "dilation": 3}),
    "few_filters_padded_beyond": ((1, 32, 5, 4), (2, 32, 5, 5), {"padding": 6}),
    "few_filters_one_pixel": ((3, 40, 1, 1), (4, 40, 3, 3), {"padding": 1}),
    "few_filters_tall": ((1, 16, 40, 3), (3, 16, 3, 3), {"padding": 1}),
    "few_filters_wide": ((1, 64, 5, 701), (3, 64, 3, 3), {"padding": 1}),
    "few_filters_wide_s2": ((1, 96, 6, 901), (5, 96, 3, 3), {"stride": 2, "padding": 1}),
    "few_filters_1x1": ((2, 70, 7, 7), (1, 70, 1, 1), {}),
    "few_filters_long_reduction": ((1, 2100, 3, 5), (3, 2100, 1, 3), {"padding": (0, 1)}),
    "few_channels": ((2, 3, 17, 37), (64, 3, 3, 3), {"padding": 1}),
    "few_channels_ragged_filters": ((2, 5, 9, 50), (41, 5, 3, 3), {"padding": (0, 2)}),
    "few_channels_rows": ((1, 15, 40, 16), (32, 15, 7, 3), {"padding": (3, 1)}),
    "few_channels_s2x1": ((2, 4, 21, 30), (48, 4, 3, 3), {"stride": (2, 1), "padding": 1}),
    "few_channels_dilated_rows": (
        (2, 3, 21, 30),
        (48, 3, 3, 3),
        {"padding": 2, "dilation": (2, 1)},
    ),
    "few_channels_wide_padding": ((1, 3, 6, 14), (32, 3, 3, 3), {"padding": 7}),
    "few_channels_s2": ((2, 3, 21, 43), (64, 3, 3, 3), {"stride": 2, "padding": 1}),
    "few_channels_s2_wide": ((2, 3, 21, 107), (40, 3, 3, 3), {"stride": 2, "padding": 1}),
    "few_channels_s2_full": ((1, 3, 13, 127), (40, 3, 3, 3), {"stride": 2, "padding": 1}),
    "few_channels_s2_beyond": ((1, 2, 6, 64), (33, 2, 3, 4), {"stride": 2, "padding": (1, 9)}),
    "few_channels_s3": ((2, 5, 19, 115), (24, 5, 3, 7), {"stride": 3, "padding": 2}),
    "few_channels_s4": ((1, 3, 35, 130), (50, 3, 11, 11), {"stride": 4, "padding": 2}),
    "few_channels_long_rows": ((2, 1, 15, 90), (32, 1, 5, 20), {"stride": 2}),
    "few_channels_2_columns": ((2, 9, 11, 39), (54, 9, 3, 2), {"padding": 1}),
    "few_channels_4_columns": ((2, 4, 11, 46), (32, 4, 2, 4), {"padding": 2}),
    "few_channels_5x5": ((2, 3, 12, 33), (16, 3, 5, 5), {"padding": 2}),
    "few_channels_7x7": ((1, 15, 10, 27), (17, 15, 7, 7), {"padding": 3}),
    "more_channels_long_rows": ((2, 32, 15, 70), (32, 32, 5, 10), {"stride": 2}),
    "more_channels_wide": ((1, 24, 13, 131), (70, 24, 3, 5), {"padding": 2}),
    "more_channels_one_vector": ((2, 24, 12, 141), (17, 24, 5, 5), {"stride": 2, "padding": 2}),
    "more_channels_blocks_of_padding": (
        (1, 24, 4, 20),
        (17, 24, 3, 9),
        {"padding": (1, 200)},
    ),
    "more_channels_one_row": ((2, 32, 4, 60), (37, 32, 1, 9), {"padding": (0, 4)}),
    "one_vector_1x1": ((2, 18, 13, 29), (16, 18, 1, 1), {}),
    "one_vector_1x1_first_layer": ((2, 3, 13, 29), (16, 3, 1, 1), {}),
    "one_vector_3x1": ((2, 16, 9, 31), (16, 16, 3, 1), {"padding": (1, 0)}),
    "one_vector_1x3": ((2, 16, 9, 45), (16, 16, 1, 3), {"padding": (0, 1)}),
    "one_vector_ragged": ((2, 22, 9, 37), (12, 22, 2, 1), {}),
    "one_vector_s2": ((2, 16, 9, 64), (16, 16, 1, 1), {"stride": 2}),
    "one_vector_long_reduction": ((1, 260, 6, 33), (16, 260, 3, 3), {"padding": 1}),
    "few_channels_one_row": ((2, 16, 9, 40), (18, 16, 1, 3), {"padding": (0, 1)}),
    "few_channels_few_filters": ((2, 9, 11, 45), (17, 9, 2, 2), {"padding": 1}),
    "in_place_row": ((2, 16, 9, 40), (13, 16, 1, 3), {"padding": (0, 1)}),
    "in_place_column": ((2, 13, 17, 33), (16, 13, 3, 1), {"padding": (1, 0)}),
    "in_place_dilated": ((2, 12, 5, 64), (11, 12, 1, 3), {"padding": (0, 9), "dilation": (1, 9)}),
    "in_place_square": ((2, 20, 11, 45), (15, 20, 2, 2), {"padding": 1}),
    "shared_column": ((2, 16, 15, 35), (16, 16, 3, 1), {"padding": (1, 0)}),
    "shared_column_of_5": ((2, 14, 16, 23), (16, 14, 5, 1), {"padding": (2, 0)}),
    "shared_column_s1x2": ((2, 40, 12, 39), (13, 40, 3, 1), {"stride": (1, 2), "padding": (1, 0)}),
    "shared_column_beyond": ((1, 18, 12, 16), (16, 18, 3, 1), {"padding": (7, 2)}),
    "shared_row": ((2, 16, 9, 47), (16, 16, 1, 3), {"padding": (0, 1)}),
    "shared_row_of_5": ((2, 22, 5, 32), (14, 22, 1, 5), {"padding": (1, 2)}),
    "shared_row_s2x1": ((2, 50, 9, 33), (16, 50, 1, 3), {"stride": (2, 1)}),
    "shared_row_beyond": ((1, 16, 4, 64), (16, 16, 1, 3), {"padding": (0, 17)}),
    "shared_deep": ((1, 64, 4, 48), (16, 64, 1, 3), {"padding": (0, 1)}),
}
# But for rows that are too short for a stride.
WINOGRAD_ROWS = [name for name in CASES if "_channels" in name and name != "few_channels_s2"]

on_cases = pytest.mark.parametrize("case", CASES)
on_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def make(case: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    x_size, w_size, kwargs = CASES[case]
    scale = (w_size[1] * w_size[2] * w_size[3]) ** -0.5
    w = torch.randn(w_size) * scale
    return [t.to(dtype) for t in (torch.randn(x_size), w, torch.randn(w_size[0]))], kwargs


@on_cases
@on_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_forward_and_input_gradient(case: str, layout: str, dtype: torch.dtype) -> None:
    (x, w, b), kwargs = make(case, dtype)
    x = in_layout(x, layout).requires_grad_()
    z = F.conv2d(x, w, b, **kwargs)
    dz = torch.randn_like(z)
    (dx,) = torch.autograd.grad(z, x, dz)
    exact_x = x.detach().double().requires_grad_()
    truth = torch_F.conv2d(exact_x, w.double(), b.double(), **kwargs)
    assert_accurate(z, truth)
    assert_accurate(dx, torch.autograd.grad(truth, exact_x, dz.double())[0])


@on_cases
@on_layouts
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_epilogue(case: str, layout: str, activation: str, dtype: torch.dtype) -> None:
    (x, w, b), kwargs = make(case, dtype)
    x = in_layout(x, layout)
    truth = getattr(torch_F, activation)(
        torch_F.conv2d(x.double(), w.double(), b.double(), **kwargs)
    )
    assert_accurate(F.conv2d(x, w, b, **kwargs, activation=activation), truth)


@on_cases
@on_layouts
def test_bits_of_a_sample(case: str, layout: str) -> None:
    """The same alone and in its batch, and for every number of threads."""
    (x, w, b), kwargs = make(case)
    x = in_layout(torch.cat([x, x.flip(0), x.flip(3)]), layout).requires_grad_()
    z = F.conv2d(x, w, b, **kwargs)
    dz = torch.randn_like(z)
    (dx,) = torch.autograd.grad(z, x, dz, retain_graph=True)
    with threads(1 if torch.get_num_threads() > 1 else 2):
        assert torch.equal(F.conv2d(x, w, b, **kwargs), z)
        assert torch.equal(torch.autograd.grad(z, x, dz)[0], dx)
    alone = in_layout(x.detach()[1:2], layout).requires_grad_()
    z_alone = F.conv2d(alone, w, b, **kwargs)
    assert torch.equal(z_alone[0], z[1])
    assert torch.equal(torch.autograd.grad(z_alone, alone, dz[1:2])[0][0], dx[1])


@on_layouts
@pytest.mark.parametrize("case", WINOGRAD_ROWS)
def test_activated_where_they_lie(case: str, layout: str) -> None:
    """Rows of outputs, of a sample that is computed again too: alone, in its batch and for every
    number of threads."""
    (x, w, b), kwargs = make(case)
    x = in_layout(torch.cat([x, x.flip(0), x.flip(3)]), layout)
    x[0, 0, 0, 0] = float("nan")
    y = F.conv2d(x, w, b, **kwargs, activation="hardswish")
    z = F.conv2d(x, w, b, **kwargs)
    assert_accurate(y[1:], torch_F.hardswish(z[1:].double()))
    assert torch.equal(y[0].isnan(), torch_F.hardswish(z[0]).isnan())
    with threads(1 if torch.get_num_threads() > 1 else 2):
        again = F.conv2d(x, w, b, **kwargs, activation="hardswish")
    assert torch.equal(again.nan_to_num(), y.nan_to_num())
    alone = F.conv2d(in_layout(x[1:2], layout), w, b, **kwargs, activation="hardswish")
    assert torch.equal(alone[0], y[1])


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3e38])
@on_cases
@on_layouts
def test_special_values(case: str, layout: str, value: float) -> None:
    """A NaN or an infinity reaches the outputs whose windows hold it, and no others."""
    (x, w, b), kwargs = make(case)
    x[0, x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2] = value
    x[-1, 0, 0, 0] = value
    w = w / 16
    z = F.conv2d(in_layout(x, layout), w, b, **kwargs)
    truth = torch_F.conv2d(x.double(), w.double(), b.double(), **kwargs)
    assert torch.equal(z.isfinite(), truth.isfinite())
    assert torch.equal(z.isnan(), truth.isnan())


@cpu_only
@on_layouts
@pytest.mark.parametrize("case", WINOGRAD_ROWS)
def test_winograd_rows_obey_the_switch(case: str, layout: str) -> None:
    (x, w, b), kwargs = make(case)
    x = in_layout(x, layout)
    z = F.conv2d(x, w, b, **kwargs)
    with torchconv.backends.allow_winograd(False):
        direct = F.conv2d(x, w, b, **kwargs)
    fprop = torchconv.explain(x, w, b, **kwargs, peak=100.0, bandwidth=10.0)["fprop"]
    by_rows = fprop.algorithm.startswith("Winograd")
    assert by_rows or (layout == "channels_last" and kwargs["stride"] == 2)
    assert torch.equal(z, direct) != by_rows
    assert (
        relative_error(direct, torch_F.conv2d(x.double(), w.double(), b.double(), **kwargs)) < 1e-6
    )


@cpu_only
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("shared_")])
def test_shared_taps_explained(case: str) -> None:
    (x, w, b), kwargs = make(case)
    x = in_layout(x, "channels_last")
    # A vector of filters is half as long elsewhere.
    shared = torch.backends.cpu.get_cpu_capability() == "AVX512"
    fprop = torchconv.explain(x, w, b, **kwargs, peak=100.0, bandwidth=10.0)["fprop"]
    assert fprop.algorithm.startswith("taps that share") == shared


def test_shared_taps_of_pairs_out_of_line() -> None:
    """Pairs of channels that begin in the middle of 32 bits, and ReLU in registers."""
    n, c, h, w = 2, 16, 8, 32
    x = torch.randn(n * c * h * w + 1).bfloat16()[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    weight = torch.randn(16, c, 1, 3).bfloat16()
    truth = torch_F.conv2d(x.double(), weight.double(), padding=(0, 1)).relu()
    assert_accurate(F.conv2d(x, weight, padding=(0, 1), activation="relu"), truth)


@on_layouts
@pytest.mark.parametrize("size", [(64, 3, 3, 3), (64, 12, 5, 5)], ids=str)
def test_streamed_outputs(layout: str, size: tuple[int, ...]) -> None:
    k, c, r, _ = size
    x, w, b = in_layout(torch.randn(1, c, 200, 208), layout), torch.randn(size), torch.randn(k)
    args: dict[str, Any] = {"padding": r // 2}
    assert_accurate(
        F.conv2d(x, w, b, **args), torch_F.conv2d(x.double(), w.double(), b.double(), **args)
    )


def test_streamed_phases() -> None:
    """Of a stride's input gradient, whose samples are no whole number of vectors apart."""
    x = in_layout(torch.randn(2, 24, 421, 421), "channels_last").requires_grad_()
    w = torch.randn(4, 24, 3, 3)
    z = F.conv2d(x, w, stride=2, padding=1)
    dz = torch.randn_like(z)
    (dx,) = torch.autograd.grad(z, x, dz)
    truth = torch.nn.grad.conv2d_input(x.shape, w.double(), dz.double(), stride=2, padding=1)
    assert_accurate(dx, truth)
