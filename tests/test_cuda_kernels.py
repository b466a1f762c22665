"""Every kernel of csrc/cuda, on the emulated GPU (emulated.py), over many shapes.

What tiles get wrong is at their edges, so the shapes leave every residue: they are drawn at random,
the same ones each time. Maxima and minima must be those of the CPU's operators, bit for bit; sums
those of float64. Every call runs with its threads in three orders and on GPUs of three sizes, and
must give the same bits: otherwise a barrier is missing, or a sum's order depends on the GPU. No
test here needs a GPU or its compiler. TORCHCONV_EMULATED_SANITIZE=1 has the address and undefined
behaviour sanitizers watch the emulated kernels, and TORCHCONV_EMULATED_SEEDS=20 draws ten times as
many shapes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
import torchconv  # noqa: F401  registers the operators
from conftest import FLOATS, NORM_BOUND, assert_accurate, assert_same, in_layout

OPS = torch.ops.torchconv
RUNS = (
    {"TORCHCONV_EMULATED_ORDER": "forward", "TORCHCONV_EMULATED_MULTIPROCESSORS": "4"},
    {"TORCHCONV_EMULATED_ORDER": "reverse", "TORCHCONV_EMULATED_MULTIPROCESSORS": "132"},
    {"TORCHCONV_EMULATED_ORDER": "shuffle", "TORCHCONV_EMULATED_MULTIPROCESSORS": "1"},
)
# The emulated library for the sanitizers: their report ends its process.
SANITIZE = os.environ.get("TORCHCONV_EMULATED_SANITIZE", "") not in ("", "0")
# How many times as many shapes.
SEEDS = int(os.environ.get("TORCHCONV_EMULATED_SEEDS", "2"))
on_seeds = pytest.mark.parametrize("seed", range(SEEDS))
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    return emulated.build(SANITIZE)


@pytest.fixture(scope="session")
def _gpus(emulated_library: Path) -> Iterator[list[emulated.Gpu]]:
    gpus: list[emulated.Gpu] = []
    yield gpus
    for gpu in gpus:
        gpu.close()


class Caller:
    def __init__(self, gpu: emulated.Gpu) -> None:
        self._gpu = gpu

    def __call__(
        self,
        name: str,
        *arguments: Any,
        capability: int = 90,
        tf32: bool = False,
        winograd: bool = True,
        runs: Sequence[dict[str, str]] = RUNS,
    ) -> Any:
        """The operator's result, which every run must give."""
        device = {
            "TORCHCONV_EMULATED_CAPABILITY": str(capability),
            "TORCHCONV_EMULATED_TF32": str(int(tf32)),
            "TORCHCONV_EMULATED_WINOGRAD": str(int(winograd)),
        }
        results = self._gpu(name, arguments, [{**run, **device} for run in runs])
        for run, result in zip(runs[1:], results[1:], strict=True):
            for one, other in zip(_list(results[0]), _list(result), strict=True):
                if isinstance(one, Tensor):
                    differ = int((_bits(one) != _bits(other)).sum())
                    order = run["TORCHCONV_EMULATED_ORDER"]
                    assert differ == 0, f"{name}: {differ} elements differ in order {order}"
        return results[0]


@pytest.fixture
def gpu(emulated_library: Path, _gpus: list[emulated.Gpu]) -> Caller:
    if not _gpus or not _gpus[-1].alive:  # the first test, or one has crashed it
        _gpus.append(emulated.Gpu(emulated_library, SANITIZE))
    return Caller(_gpus[-1])


def _list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _bits(t: Tensor) -> Tensor:
    t = t.contiguous()
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


def wide(arguments: Any) -> list[Any]:
    """The same arguments in float64."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


# --- convolution ---------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "channels_last", "offset")
ACTIVATIONS = ("relu", "relu6", "sigmoid", "tanh", "silu", "hardswish", "gelu")


def conv_problem(rng: random.Random, family: str) -> dict[str, Any]:
    """Sizes and arguments of one convolution."""
    if family == "depthwise":
        groups = rng.choice([2, 3, 8, 16, 31, 32, 33, 40, 64, 70])
        channels, filters = groups, groups * rng.choice([1, 1, 1, 2, 3])
    elif family == "grouped":
        groups = rng.choice([2, 3, 4, 5])
        channels = groups * rng.choice([2, 3, 4, 8, 9, 16, 17, 33])
        filters = groups * rng.choice([1, 2, 3, 4, 8, 9, 16, 17, 33])
    else:
        groups = 1
        channels = rng.choice([1, 2, 3, 4, 8, 15, 16, 17, 24, 32, 33, 64, 72, 136, 264])
        filters = rng.choice([1, 2, 3, 4, 8, 15, 16, 17, 24, 32, 33, 64, 65, 72, 130, 136])
    kernel = rng.choice([(1, 1), (1, 1), (3, 3), (3, 3), (2, 3), (5, 1), (1, 4), (5, 5), (7, 7)])
    stride = rng.choice([(1, 1), (1, 1), (1, 1), (2, 2), (2, 2), (2, 1), (1, 3), (4, 6)])
    dilation = rng.choice([(1, 1), (1, 1), (1, 1), (1, 1), (2, 2), (1, 3), (6, 2)])
    sides = rng.choice(
        [
            [kernel[1] // 2, kernel[1] // 2, kernel[0] // 2, kernel[0] // 2],
            [0, 0, 0, 0],
            [rng.randint(-1, 4) for _ in range(4)],
        ]
    )
    least = [
        max(dilation[i] * (kernel[i] - 1) + 1 - sides[2 - 2 * i] - sides[3 - 2 * i], 1)
        for i in range(2)
    ]
    size = [least[0] + rng.randint(0, 9), least[1] + rng.randint(0, 14)]
    size[rng.randint(0, 1)] += rng.choice([0, 0, 0, 0, 20, 55])
    return {
        "x": (rng.choice([1, 2, 2, 3, 7]), channels, *size),
        "w": (filters, channels // groups, *kernel),
        "arguments": [list(stride), sides, list(dilation), groups],
        "flip": rng.random() < 0.25,
        "layouts": [rng.choice(LAYOUTS) for _ in range(3)],
        "bias": rng.random() < 0.75,
    }


def conv_tensors(p: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    x, w = torch.randn(p["x"]), torch.randn(p["w"])
    w /= max(w.shape[1] * w.shape[2] * w.shape[3], 1) ** 0.5
    b = torch.randn(p["w"][0]).to(dtype) if p["bias"] else None
    return in_layout(x.to(dtype), p["layouts"][0]), in_layout(w.to(dtype), p["layouts"][1]), b


# Family of shapes, the number of them, and what chooses the kernels. Without tensor cores (70), by
# mma.sync (80) and on Hopper (90), where TMA and wgmma are not emulated and mma.sync stands in.
CONVOLUTIONS = [
    *[("dense", dtype, 70, False) for dtype in FLOATS],
    *[("dense", dtype, 80, False) for dtype in (torch.float16, torch.bfloat16)],
    ("dense", torch.float16, 90, False),
    ("dense", torch.float32, 80, True),
    *[("grouped", dtype, 90, False) for dtype in FLOATS],
    *[("depthwise", dtype, 90, False) for dtype in FLOATS],
]
on_convolutions = pytest.mark.parametrize(
    "family, dtype, capability, tf32", CONVOLUTIONS,
    ids=[f"{f}-{str(d)[6:]}-{c}{'-tf32' * t}" for f, d, c, t in CONVOLUTIONS],
)  # fmt: skip
SHAPES = 8  # of each seed


def assert_product(out: Tensor, truth: Tensor, tf32: bool) -> None:
    if tf32:  # each factor has 10 bits of fraction, so that a term is within 2^-10
        error = torch.linalg.vector_norm(out.double() - truth)
        assert error <= 2e-3 * torch.linalg.vector_norm(truth) + 1e-30
    else:
        assert_accurate(out, truth)


@on_seeds
@on_convolutions
def test_conv2d(
    gpu: Caller, family: str, dtype: torch.dtype, capability: int, tf32: bool, seed: int
) -> None:
    rng = random.Random(f"{family} {seed}")
    for _ in range(SHAPES):
        p = conv_problem(rng, family)
        x, w, b = conv_tensors(p, dtype)
        activation = rng.choice(["none", "none", "relu", *ACTIVATIONS])
        arguments = [*p["arguments"], activation, p["flip"]]
        on: dict[str, Any] = {"capability": capability, "tf32": tf32}
        y = gpu("conv2d", x, w, b, *arguments, **on)
        truth = OPS.conv2d(*wide([x, w, b]), *arguments)
        assert_product(y, truth, tf32)
        assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
        on["runs"] = RUNS[:1]
        same, z = gpu("conv2d_with_preactivation", x, w, b, *arguments, **on)
        assert_same(same, y)
        arguments[-2] = "none"
        assert_product(z, OPS.conv2d(*wide([x, w, b]), *arguments), tf32)
        one = gpu("conv2d", x[-1:], w, b, *p["arguments"], activation, p["flip"], **on)
        assert torch.equal(one, y[-1:]), "a sample's result depends on its batch"


@on_seeds
@on_convolutions
def test_conv2d_with_residual(
    gpu: Caller, family: str, dtype: torch.dtype, capability: int, tf32: bool, seed: int
) -> None:
    rng = random.Random(f"residual {family} {seed}")
    for _ in range(SHAPES):
        p = conv_problem(rng, family)
        x, w, b = conv_tensors(p, dtype)
        activation = rng.choice(["none", "relu", *ACTIVATIONS])
        arguments = [*p["arguments"], activation, p["flip"]]
        on: dict[str, Any] = {"capability": capability, "tf32": tf32}
        z = OPS.conv2d(*wide([x, w, b]), *p["arguments"], "none", p["flip"])
        residual = in_layout(torch.randn_like(z).to(dtype), p["layouts"][2])
        truth = OPS.conv2d(*wide([x, w, b]), *arguments, residual.double())
        y = gpu("conv2d", x, w, b, *arguments, residual, **on)
        assert_product(y, truth, tf32)
        on["runs"] = RUNS[:1]
        same, kept = gpu("conv2d_with_preactivation", x, w, b, *arguments, residual, **on)
        assert_same(same, y)
        assert_product(kept, z + residual.double(), tf32)


@on_seeds
@on_convolutions
def test_conv2d_backward(
    gpu: Caller, family: str, dtype: torch.dtype, capability: int, tf32: bool, seed: int
) -> None:
    rng = random.Random(f"backward {family} {seed}")
    for _ in range(SHAPES):
        p = conv_problem(rng, family)
        x, w, _ = conv_tensors(p, dtype)
        z = OPS.conv2d(x.double(), w.double(), None, *p["arguments"], "none", p["flip"])
        dz = in_layout(torch.randn_like(z).to(dtype), p["layouts"][2])
        arguments = [dz, x, w, None, *p["arguments"], "none", p["flip"], [True] * 3]
        on: dict[str, Any] = {"capability": capability, "tf32": tf32}
        gradients = gpu("conv2d_backward", *arguments, **on)
        on["runs"] = RUNS[1:2]
        truths = OPS.conv2d_backward(*wide(arguments))
        for i, (gradient, truth) in enumerate(zip(gradients, truths, strict=True)):
            assert_product(gradient, truth, tf32)
            arguments[-1] = [i == j for j in range(3)]
            alone = gpu("conv2d_backward", *arguments, **on)[i]
            assert_same(alone, gradient)
        dx = gpu(
            "conv2d_backward", dz[-1:], x[-1:], w, *arguments[3:-1], [True, False, False], **on
        )
        assert torch.equal(dx[0], gradients[0][-1:]), "a sample's gradient depends on its batch"


# Of Winograd's algorithm, which the CPU has too.
WINOGRAD_BOUND = 2e-6


def winograd_problem(rng: random.Random) -> dict[str, Any]:
    """3x3 of step 1: tiles of four and three outputs, and images of more tiles than a piece has."""
    wide = rng.random() < 0.2
    size = [rng.randint(5, 19), rng.randint(5, 24)]
    if wide:
        size[rng.randint(0, 1)] += rng.choice([40, 90])
    sides = rng.choice([[1] * 4, [1] * 4, [0] * 4, [rng.randint(-1, 4) for _ in range(4)]])
    sides[0] = max(sides[0], 6 - size[1] - sides[1])
    sides[2] = max(sides[2], 6 - size[0] - sides[3])
    return {
        "x": (rng.choice([1, 2, 3, 5]), rng.choice([32, 33, 36, 47, 64, 72]), *size),
        "w": (rng.choice([32, 34, 36, 63, 64, 65, 136]), 0, 3, 3),
        "arguments": [[1, 1], sides, [1, 1], 1],
        "flip": rng.random() < 0.25,
        "layouts": [rng.choice(LAYOUTS) for _ in range(3)],
        "bias": rng.random() < 0.75,
    }


def assert_winograd(out: Tensor, truth: Tensor) -> None:
    error = torch.linalg.vector_norm(out.double() - truth) / torch.linalg.vector_norm(truth)
    assert error <= WINOGRAD_BOUND, f"relative error {error:.2e}"


@pytest.mark.parametrize("seed", range(2 * SEEDS))
def test_winograd(gpu: Caller, seed: int) -> None:
    rng = random.Random(f"winograd {seed}")
    for _ in range(3):
        p = winograd_problem(rng)
        p["w"] = (p["w"][0], p["x"][1], 3, 3)
        x, w, b = conv_tensors(p, torch.float32)
        activation = rng.choice(["none", "relu", *ACTIVATIONS])
        arguments = [*p["arguments"], activation, p["flip"]]
        assert "Winograd" in gpu("explain_conv2d", x, w, *p["arguments"], p["flip"], runs=RUNS[:1])
        z = OPS.conv2d(*wide([x, w, b]), *p["arguments"], "none", p["flip"])
        residual = None
        if rng.random() < 0.3:
            residual = in_layout(torch.randn_like(z).float(), p["layouts"][2])
        y = gpu("conv2d", x, w, b, *arguments, residual)
        assert_winograd(y, OPS.conv2d(*wide([x, w, b]), *arguments, *wide([residual])))
        on: dict[str, Any] = {"runs": RUNS[:1]}
        same, kept = gpu("conv2d_with_preactivation", x, w, b, *arguments, residual, **on)
        assert_same(same, y)
        assert_winograd(kept, z if residual is None else z + residual.double())
        last = None if residual is None else residual[-1:]
        assert torch.equal(gpu("conv2d", x[-1:], w, b, *arguments, last, **on), y[-1:])

        dz = in_layout(torch.randn_like(z).float(), p["layouts"][2])
        backward = [dz, x, w, None, *p["arguments"], "none", p["flip"], [True] * 3]
        gradients = gpu("conv2d_backward", *backward)
        for gradient, truth in zip(gradients, OPS.conv2d_backward(*wide(backward)), strict=True):
            assert_winograd(gradient, truth)
        one = [dz[-1:], x[-1:], *backward[2:-1], [True, False, False]]
        assert torch.equal(gpu("conv2d_backward", *one, **on)[0], gradients[0][-1:])


def test_winograd_is_not_used_where_it_is_forbidden(gpu: Caller) -> None:
    x, w = torch.randn(2, 32, 9, 9), torch.randn(32, 32, 3, 3)
    arguments = [x, w, [1, 1], [1] * 4, [1, 1], 1, False]
    text = gpu("explain_conv2d", *arguments, winograd=False, runs=RUNS[:1])
    assert "implicit matrix product" in text and "Winograd" not in text


def test_winograd_in_little_shared_memory(gpu: Caller) -> None:
    """Its largest tile needs more than a block has on some devices, and changes no bit."""
    x, w = torch.randn(8, 160, 15, 16), torch.randn(128, 160, 3, 3)
    arguments = [w, None, [1, 1], [1] * 4, [1, 1], 1, "none", False]
    on: dict[str, Any] = {"runs": RUNS[:1]}
    y = gpu("conv2d", x, *arguments, capability=86, **on)
    assert_same(y, gpu("conv2d", x, *arguments, capability=80, **on))
    backward = [y, x, *arguments, [True, True, False]]
    few = gpu("conv2d_backward", *backward, capability=86, **on)
    many = gpu("conv2d_backward", *backward, capability=80, **on)
    for one, other in zip(few[:2], many[:2], strict=True):
        assert_same(one, other)


def assert_specials(out: Tensor, truth: Tensor) -> None:
    """NaN and each infinity in the same places, and the numbers accurate."""
    truth = truth.float()
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isposinf(), truth.isposinf())
    assert torch.equal(out.isneginf(), truth.isneginf())
    numbers = truth.isfinite()
    assert_winograd(out[numbers], truth[numbers].double())


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_winograd_spreads_no_special_value(gpu: Caller, layout: str, special: float) -> None:
    """A sample with one is computed in another way, as a weight gradient is; the others are not."""
    scale = 1.0 if special != 3e38 else 1e-3
    x, w = torch.randn(3, 33, 9, 11), torch.randn(36, 33, 3, 3) * scale
    usual = gpu("conv2d", in_layout(x, layout), w, None, [1, 1], [1] * 4, [1, 1], 1, "relu", False)
    x[1, 5, 3, 4] = special
    x = in_layout(x, layout)
    arguments = [w, None, [1, 1], [1] * 4, [1, 1], 1, "none", False]
    y = gpu("conv2d", x, *arguments)
    direct = gpu("conv2d", x, *arguments, capability=75, runs=RUNS[:1])
    truth = OPS.conv2d(*wide([x, *arguments]))
    assert_specials(y, truth)
    assert_same(y[1], direct[1])
    for n in (0, 2):
        assert_same(y[n].relu(), usual[n])
    # With all that an epilogue does, which then happens twice to a sample.
    b, residual = torch.randn(36) * scale, in_layout(torch.randn_like(y) * scale, layout)
    fused = [x, w, b, *arguments[2:-2], "relu", False, residual]
    out, kept = gpu("conv2d_with_preactivation", *fused)
    for result, truth in zip((out, kept), OPS.conv2d_with_preactivation(*wide(fused)), strict=True):
        assert_specials(result, truth)
    dz = in_layout(torch.randn_like(y), layout)
    dz[1, 7, 2, 2] = special
    backward = [dz, x, w, None, [1, 1], [1] * 4, [1, 1], 1, "none", False, [True, True, False]]
    dx, dw, _ = gpu("conv2d_backward", *backward)
    direct_dx, direct_dw, _ = gpu("conv2d_backward", *backward, capability=75, runs=RUNS[:1])
    assert_specials(dx, OPS.conv2d_backward(*wide(backward))[0])
    assert_same(dx[1], direct_dx[1])
    assert_same(dw, direct_dw)


@on_seeds
def test_gradient_of_few_channels(gpu: Caller, seed: int) -> None:
    """Of an image, in exact float32, with strides of 1 and 2."""
    rng = random.Random(f"few channels {seed}")
    for _ in range(SHAPES):
        kernel = rng.choice([(3, 3), (7, 7), (5, 5), (1, 1), (2, 2), (4, 2), (11, 11)])
        stride = rng.choice([1, 2])
        sides = [rng.randint(0, kernel[1] // 2 + 1) for _ in range(2)]
        sides += [rng.randint(0, kernel[0] // 2 + 1) for _ in range(2)]
        size = [rng.randint(kernel[0], 26), rng.randint(kernel[1], 30)]
        layout = rng.choice(LAYOUTS)
        x = in_layout(torch.randn(rng.choice([1, 3]), rng.choice([1, 2, 3, 3, 4]), *size), layout)
        w = torch.randn(rng.choice([1, 8, 33, 64]), x.shape[1], *kernel)
        w = in_layout(w, rng.choice(LAYOUTS))
        arguments = [[stride] * 2, sides, [1, 1], 1, "none", rng.random() < 0.25]
        z = OPS.conv2d(*wide([x, w]), None, *arguments)
        dz = in_layout(torch.randn_like(z).float(), layout)
        backward = [dz, x, w, None, *arguments, [True, False, False]]
        dx = gpu("conv2d_backward", *backward)[0]
        assert_accurate(dx, OPS.conv2d_backward(*wide(backward))[0])
        one = gpu("conv2d_backward", dz[-1:], x[-1:], *backward[2:], runs=RUNS[:1])[0]
        assert torch.equal(one, dx[-1:])
        dz[0, 0, 0, 0] = float("inf")
        special = gpu("conv2d_backward", *backward, runs=RUNS[:1])[0]
        assert torch.equal(special.isfinite(), OPS.conv2d_backward(*wide(backward))[0].isfinite())


@on_seeds
def test_planes_in_exact_float32(gpu: Caller, seed: int) -> None:
    """Tiles of simt_planes.cu, whole and cut, which blocks take several of; and the gather's, which
    small batches go through, with the same bits."""
    rng = random.Random(f"planes {seed}")
    for _ in range(SHAPES):
        stride, groups = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 1, 2])
        kernel = rng.choice([(1, 1), (1, 1), (3, 3), (2, 5)])
        channels = rng.choice([5, 40, 70, 300, 530] if kernel == (1, 1) else [16, 48, 80])
        filters = rng.choice([33, 64, 65, 130, 200])
        size = rng.choice([(12, 14), (7, 7), (9, 16), (8, 33), (1, 60)])
        sides = rng.choice([[0] * 4, [0] * 4, [1, 0, 2, 1], [0, -1, 0, 0]])
        if kernel != (1, 1):
            sides = rng.choice([[3, 3, 2, 2], [2, 3, 1, 3]])
        dilation = [rng.choice([1, 1, 2]), 1]
        x = in_layout(torch.randn(rng.choice([2, 3, 5]), groups * channels, *size),
                      rng.choice(["contiguous", "contiguous", "offset"]))  # fmt: skip
        w = in_layout(torch.randn(groups * filters, channels, *kernel), rng.choice(LAYOUTS))
        b = torch.randn(groups * filters) if rng.random() < 0.5 else None
        arguments = [[stride] * 2, sides, dilation, groups]
        flip = rng.random() < 0.25
        z = OPS.conv2d(*wide([x, w, b]), *arguments, "none", flip)
        residual = torch.randn_like(z).float() if rng.random() < 0.5 else None
        fused = [rng.choice(["none", "relu", "silu"]), flip, residual]
        y = gpu("conv2d", x, w, b, *arguments, *fused, winograd=False)
        assert_accurate(y, OPS.conv2d(*wide([x, w, b]), *arguments, *wide(fused)))
        on: dict[str, Any] = {"runs": RUNS[1:2], "winograd": False}
        same, kept = gpu("conv2d_with_preactivation", x, w, b, *arguments, *fused, **on)
        assert_same(same, y)
        assert_accurate(kept, z if residual is None else z + residual.double())
        assert_same(gpu("conv2d", x, w, b, *arguments, *fused, capability=75, **on), y)
        fused[-1] = None if residual is None else residual[-1:]
        assert torch.equal(gpu("conv2d", x[-1:], w, b, *arguments, *fused, **on), y[-1:])

        dz = in_layout(torch.randn_like(z).float(), rng.choice(["contiguous", "offset"]))
        backward = [dz, x, w, None, *arguments, "none", flip, [True, False, False]]
        dx = gpu("conv2d_backward", *backward, winograd=False)[0]
        assert_accurate(dx, OPS.conv2d_backward(*wide(backward))[0])
        assert_same(gpu("conv2d_backward", *backward, capability=75, **on)[0], dx)


@pytest.mark.parametrize("channels", [32, 48, 80])
def test_exact_float32_of_single_pixels(gpu: Caller, channels: int) -> None:
    """Planes of one pixel have neighbouring channels, whose terms come in another order."""
    on: dict[str, Any] = {"winograd": False}
    x, w = torch.randn(70, channels, 1, 1), torch.randn(64, channels, 3, 3)
    arguments = [[1, 1], [2] * 4, [1, 1], 1, "none", False]
    y = gpu("conv2d", x, w, None, *arguments, **on)
    assert_accurate(y, OPS.conv2d(*wide([x, w]), None, *arguments))
    dz, x, w = x, torch.randn(70, 64, 3, 3), w.transpose(0, 1).contiguous()
    arguments[1] = [0] * 4
    backward = [dz, x, w, None, *arguments, [True, False, False]]
    dx = gpu("conv2d_backward", *backward, **on)[0]
    assert_accurate(dx, OPS.conv2d_backward(*wide(backward))[0])


@pytest.mark.parametrize(
    "size, filters", [((2, 3, 13, 32), 64), ((3, 1, 20, 23), 17), ((2, 2, 7, 8), 5)]
)
@pytest.mark.parametrize("flip", [False, True])
def test_gradients_of_stems(gpu: Caller, size: tuple[int, ...], filters: int, flip: bool) -> None:
    """Of 7x7 taps and a stride of 2: from rows of whole quads, and from those that are none."""
    x, w = torch.randn(size), torch.randn(filters, size[1], 7, 7)
    arguments = [[2, 2], [3] * 4, [1, 1], 1, "none", flip]
    dz = torch.randn_like(OPS.conv2d(x, w, None, *arguments))
    backward = [dz, x, w, None, *arguments, [True, True, False]]
    gradients = gpu("conv2d_backward", *backward)
    for gradient, truth in zip(gradients[:2], OPS.conv2d_backward(*wide(backward)), strict=False):
        assert_accurate(gradient, truth)
    backward[-1] = [True, False, False]
    same = gpu("conv2d_backward", in_layout(dz, "offset"), *backward[1:], runs=RUNS[:1])[0]
    assert_same(same, gradients[0])
    dz[0, 0, 1, 2] = float("inf")
    special = gpu("conv2d_backward", *backward, runs=RUNS[:1])[0]
    assert torch.equal(special.isfinite(), OPS.conv2d_backward(*wide(backward))[0].isfinite())


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("size", [(3, 70, 10, 16), (2, 130, 12, 20), (5, 64, 9, 16), (2, 64, 8, 6)])
def test_gradient_of_1x1_with_a_stride(gpu: Caller, size: tuple[int, ...], padding: int) -> None:
    """Over planes it stores the zeros between the pixels that have a tap along with them."""
    x, w = torch.randn(size), torch.randn(40, size[1], 1, 1)
    arguments = [[2, 2], [padding] * 4, [1, 1], 1, "none", False]
    dz = torch.randn_like(OPS.conv2d(x, w, None, *arguments))
    backward = [dz, x, w, None, *arguments, [True, False, False]]
    dx = gpu("conv2d_backward", *backward)[0]
    assert_accurate(dx, OPS.conv2d_backward(*wide(backward))[0])
    on: dict[str, Any] = {"runs": RUNS[:1]}
    assert_same(gpu("conv2d_backward", *backward, capability=75, **on)[0], dx)
    one = gpu("conv2d_backward", dz[-1:], x[-1:], *backward[2:], **on)[0]
    assert torch.equal(one, dx[-1:])


@pytest.mark.parametrize(
    "size, groups, dtype, capability, tf32, algorithm",
    [
        ((2, 32, 9, 9), 1, torch.float16, 90, False, "on tensor cores"),
        ((2, 32, 9, 9), 1, torch.bfloat16, 80, False, "on tensor cores"),
        ((2, 32, 9, 9), 1, torch.float32, 80, True, "on tensor cores"),
        ((2, 32, 9, 9), 1, torch.float32, 90, False, "Winograd"),
        ((2, 16, 9, 9), 1, torch.float32, 90, False, "implicit matrix product"),
        ((2, 32, 9, 9), 1, torch.float16, 70, False, "implicit matrix product"),
        ((2, 32, 9, 9), 32, torch.float16, 90, False, "depthwise"),
        ((2, 32, 9, 9), 4, torch.float32, 90, False, "groups"),
        ((2, 32, 9, 9), 4, torch.float16, 90, False, "groups"),
        ((2, 64, 9, 9), 16, torch.float16, 80, False, "groups on tensor cores"),
        ((2, 64, 9, 9), 16, torch.float16, 70, False, "groups"),
    ],
)
def test_choice_of_algorithm(
    gpu: Caller, size: tuple[int, ...], groups: int, dtype: torch.dtype, capability: int,
    tf32: bool, algorithm: str,
) -> None:  # fmt: skip
    """That the tests here run the kernels that they are meant for."""
    x, w = torch.randn(size).to(dtype), torch.randn(64, size[1] // groups, 3, 3).to(dtype)
    arguments = [x, w, [1, 1], [1] * 4, [1, 1], groups, False]
    text = gpu("explain_conv2d", *arguments, capability=capability, tf32=tf32, runs=RUNS[:1])
    assert algorithm in text
    assert ("tensor cores" in text) == ("tensor cores" in algorithm)


def test_layout_of_groups(gpu: Caller) -> None:
    """Wide groups of contiguous images are computed in channels_last."""
    for channels, passes in ((2, 0), (4, 2), (16, 3)):
        x, w = torch.randn(1, 2 * channels, 6, 7), torch.randn(2 * channels, channels, 3, 3)
        arguments = [x, w, [1, 1], [1] * 4, [1, 1], 2, False]
        text = gpu("explain_conv2d", *arguments, runs=RUNS[:1])
        assert text.count("groups") == 3 and text.count("NHWC copies") == passes


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_groups_that_fill_a_tile(gpu: Caller, layout: str) -> None:
    """Their forward pass in float32 is a matrix product."""
    x, w = in_layout(torch.randn(2, 128, 9, 8), layout), torch.randn(128, 64, 3, 3)
    arguments = [[2, 2], [1] * 4, [1, 1], 2]
    text = gpu("explain_conv2d", x, w, *arguments, False, runs=RUNS[:1])
    assert text.splitlines()[0].startswith("fprop\timplicit matrix product\t")
    y = gpu("conv2d", x, w, None, *arguments, "relu", False)
    assert_accurate(y, OPS.conv2d(*wide([x, w]), None, *arguments, "relu", False))


def test_tiles_of_turing(gpu: Caller) -> None:
    """Blocks have 64 KB of shared memory there, less than the largest tile of float32 takes."""
    x, w, dz = torch.randn(1, 14, 4, 4), torch.randn(128, 14, 3, 3), torch.randn(1, 128, 4, 4)
    arguments = [dz, x, w, None, [1, 1], [1] * 4, [1, 1], 1, "none", False, [True] * 3]
    gradients = gpu("conv2d_backward", *arguments, capability=75, runs=RUNS[:1])
    for gradient, truth in zip(gradients, OPS.conv2d_backward(*wide(arguments)), strict=True):
        assert_accurate(gradient, truth)


on_half_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@on_half_types
@pytest.mark.parametrize("stride, width", [(1, 13), (1, 16), (2, 37), (2, 32)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stem_over_planes(
    gpu: Caller, layout: str, stride: int, width: int, dtype: torch.dtype
) -> None:
    """Patches of few channels, of rows of outputs in whole units of 16 bytes and others."""
    channels, filters = (3, 72) if width % 2 else (4, 41)
    x = in_layout(torch.randn(2, channels, 19, width).to(dtype), layout)
    w = (torch.randn(filters, channels, 3, 5) / 6).to(dtype)
    b = torch.randn(filters).to(dtype)
    common = [[stride] * 2, [2, 2, 1, 1], [1, 1], 1]
    for activation in ("none", "relu", "silu"):
        arguments = [x, in_layout(w, layout), b, *common, activation, False]
        y, z = gpu("conv2d_with_preactivation", *arguments, capability=80)
        assert_same(gpu("conv2d", *arguments, capability=80, runs=RUNS[:1]), y)
        for result, truth in zip(
            (y, z), OPS.conv2d_with_preactivation(*wide(arguments)), strict=True
        ):
            assert_accurate(result, truth)


@on_half_types
@pytest.mark.parametrize(
    "size, filters",
    [
        ((3, 24, 8, 13), 136),
        ((3, 200, 6, 12), 40),
        ((2, 8, 57, 56), 72),  # several chains of sums of a part
        ((2, 64, 4, 10), 64),
        ((5, 40, 2, 4), 256),
    ],
)
def test_gradients_over_planes(
    gpu: Caller, size: tuple[int, ...], filters: int, dtype: torch.dtype
) -> None:
    """1x1 kernels with filters in shared memory, and both gradients at once."""
    x, w = torch.randn(size).to(dtype), torch.randn(filters, size[1], 1, 1) * size[1] ** -0.5
    dz = torch.randn(size[0], filters, *size[2:]).to(dtype)
    common: list[Any] = [[1, 1], [0] * 4, [1, 1], 1]
    backward = [dz, x, w.to(dtype), None, *common, "none", False, [True, True, False]]
    both = gpu("conv2d_backward", *backward)
    for result, truth in zip(both[:2], OPS.conv2d_backward(*wide(backward))[:2], strict=True):
        assert_accurate(result, truth)
    for i in range(2):
        alone = gpu("conv2d_backward", *backward[:-1], [i == 0, i == 1, False], runs=RUNS[1:2])
        assert_same(alone[i], both[i])
    one = gpu("conv2d_backward", dz[-1:], x[-1:], *backward[2:], runs=RUNS[:1])
    assert torch.equal(one[0], both[0][-1:])
    offset = [in_layout(t, "offset") for t in backward[:3]]
    for i, result in enumerate(gpu("conv2d_backward", *offset, *backward[3:], runs=RUNS[:1])[:2]):
        assert_same(result, both[i])

    # Infinity and NaN stay in their pixel of dx, and in dw with their channels.
    dz[0, 3, 1, 2], x[-1, 5, 0, -1] = float("inf"), float("nan")
    special = gpu("conv2d_backward", *backward)
    for result, truth in zip(special[:2], OPS.conv2d_backward(*wide(backward))[:2], strict=True):
        assert torch.equal(result.isfinite(), truth.isfinite())


@on_half_types
@pytest.mark.parametrize("size, filters", [((3, 24, 8, 13), 136), ((2, 40, 6, 20), 35)])
def test_filters_in_shared_memory(
    gpu: Caller, size: tuple[int, ...], filters: int, dtype: torch.dtype
) -> None:
    x, w = torch.randn(size).to(dtype), torch.randn(filters, size[1], 1, 1) * size[1] ** -0.5
    b, residual = torch.randn(filters).to(dtype), torch.randn(size[0], filters, *size[2:])
    arguments = [x, w.to(dtype), b, [1, 1], [0] * 4, [1, 1], 1]
    for activation in ("none", "relu", "gelu"):
        for added in (None, residual.to(dtype)):
            fused = [*arguments, activation, False, added]
            y, z = gpu("conv2d_with_preactivation", *fused, capability=80)
            assert_same(gpu("conv2d", *fused, capability=80, runs=RUNS[:1]), y)
            truths = OPS.conv2d_with_preactivation(*wide(fused))
            for result, truth in zip((y, z), truths, strict=True):
                assert_accurate(result, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [8, 24, 40])
def test_odd_planes_in_another_layout(gpu: Caller, channels: int, dtype: torch.dtype) -> None:
    """Transpositions of planes that no 16 bytes fit, short and long, and of filters with a flip."""
    for side in (3, 5, 9, 35):
        x = torch.randn(3 if side < 35 else 1, channels, side, side).to(dtype)
        w = torch.randn(8, channels, 1, 1).to(dtype)
        if side < 9:
            w = torch.randn(9, channels, 3, 3).to(dtype)
        pad = w.shape[2] // 2
        common = [[1, 1], [pad] * 4, [1, 1], 1, "none", True]
        on: dict[str, Any] = {"capability": 80, "tf32": True}
        y = gpu("conv2d", x, w, None, *common, **on)
        assert_product(y, OPS.conv2d(*wide([x, w]), None, *common), dtype == torch.float32)
        backward = [torch.randn_like(y), x, w, None, *common, [True, True, False]]
        truths = OPS.conv2d_backward(*wide(backward))
        gradients = gpu("conv2d_backward", *backward, **on)
        for result, truth in zip(gradients[:2], truths[:2], strict=True):
            assert_product(result, truth, dtype == torch.float32)


def assert_accurate_with_specials(out: Tensor, truth: Tensor) -> None:
    """NaN and each infinity in the same places, and the numbers accurate."""
    numbers = truth.isfinite()
    assert torch.equal(out.isfinite(), numbers)
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.isposinf(), truth.isposinf())
    assert_accurate(out.where(numbers, 0), truth.where(numbers, 0))


@on_half_types
@pytest.mark.parametrize(
    "kernel, stride, size",
    [
        (3, 1, (11, 10)), (3, 1, (11, 21)), (3, 2, (21, 20)), (5, 1, (9, 13)), (5, 2, (13, 35)),
        (7, 1, (7, 7)), (7, 1, (11, 18)),
    ],
)  # fmt: skip
def test_depthwise_on_tensor_cores(
    gpu: Caller, kernel: int, stride: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Also where zero factors meet infinity and NaN, which only their own windows may see."""
    channels, pad = 24, kernel // 2
    x = in_layout(torch.randn(3, channels, *size).to(dtype), "channels_last")
    w, b = torch.randn(channels, 1, kernel, kernel).to(dtype), torch.randn(channels).to(dtype)
    common = [[stride] * 2, [pad] * 4, [1, 1], channels]
    for special in (False, True):
        if special:
            x[1, 5, 4, 3] = float("inf")
            x[2, 17, -1, -1] = float("nan")
        fprop = [x, w, b, *common, "relu6", False]
        y, y_truth = gpu("conv2d", *fprop), OPS.conv2d(*wide(fprop))
        assert_accurate_with_specials(y, y_truth)
        dz = in_layout(torch.randn_like(y), "channels_last")
        if special:
            dz[1, 5, 2, 3] = -float("inf")
            dz[2, 10, -1, -1] = float("nan")
        backward = [dz, x, w, None, *common, "none", False, [True, True, False]]
        truths = OPS.conv2d_backward(*wide(backward))
        for gradient, truth in zip(gpu("conv2d_backward", *backward)[:2], truths[:2], strict=True):
            assert_accurate_with_specials(gradient, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kernel, size, sides",
    [
        (3, (3, 34, 7, 7), [1] * 4), (3, (2, 80, 14, 16), [1] * 4),
        (3, (1, 6, 35, 9), [0, 2, 1, 1]), (3, (2, 8, 3, 1), [1] * 4),
        (3, (5, 130, 1, 6), [4, 3, 2, 3]), (3, (2, 8, 6, 9), [0] * 4),
        (5, (2, 34, 9, 8), [2] * 4), (5, (3, 7, 6, 5), [4, 1, 0, 3]), (5, (9, 66, 5, 3), [2] * 4),
    ],
)  # fmt: skip
def test_depthwise_gradients_at_once(
    gpu: Caller, kernel: int, size: tuple[int, ...], sides: list[int], dtype: torch.dtype
) -> None:
    """Strips inside and over each edge, and numbers that are not finite, which no padding may meet;
    either gradient alone has the same bits."""
    channels = size[1]
    x = in_layout(torch.randn(size).to(dtype), "channels_last")
    w = torch.randn(channels, 1, kernel, kernel).to(dtype)
    common = [[1, 1], sides, [1, 1], channels]
    dz = torch.randn_like(OPS.conv2d(x, w, None, *common, "none", False))
    dz = in_layout(dz, "channels_last")
    for special in (False, True):
        if special:
            x[0, 1, 0, 0] = float("inf")
            x[-1, 3, -1, -1] = float("nan")
            dz[0, 2, -1, 0] = -float("inf")
            dz[-1, 5, 0, -1] = float("nan")
        arguments = [dz, x, w, None, *common, "none", special, [True, True, False]]
        gradients = gpu("conv2d_backward", *arguments)[:2]
        truths = OPS.conv2d_backward(*wide(arguments))[:2]
        for i, (gradient, truth) in enumerate(zip(gradients, truths, strict=True)):
            assert_accurate_with_specials(gradient, truth)
            arguments[-1] = [i == 0, i == 1, False]
            assert_same(gpu("conv2d_backward", *arguments, runs=RUNS[1:2])[i], gradient)


@pytest.mark.parametrize(
    "kernel, stride, size",
    [
        (3, 1, (2, 1064, 27, 5)), (3, 2, (5, 1064, 23, 19)), (5, 1, (9, 1064, 5, 5)),
        (7, 1, (5, 1064, 11, 3)),
    ],
)  # fmt: skip
def test_depthwise_weight_gradient_of_many_channels(
    gpu: Caller, kernel: int, stride: int, size: tuple[int, ...]
) -> None:
    """Warps that share a block have several strips of images each, and several steps."""
    x = in_layout(torch.randn(size).half(), "channels_last")
    w = torch.randn(size[1], 1, kernel, kernel).half()
    common = [[stride] * 2, [kernel // 2] * 4, [1, 1], size[1], "none", False]
    dz = in_layout(torch.randn_like(OPS.conv2d(x, w, None, *common)), "channels_last")
    backward = [dz, x, w, None, *common, [False, True, False]]
    truth = OPS.conv2d_backward(*wide(backward))[1]
    for capability in (80, 120):
        assert_accurate(gpu("conv2d_backward", *backward, capability=capability)[1], truth)


@pytest.mark.parametrize("kernel, size", [(3, (2, 8, 1, 8)), (7, (8, 8, 1, 3)), (5, (3, 8, 1, 2))])
def test_depthwise_of_images_smaller_than_their_padding(
    gpu: Caller, kernel: int, size: tuple[int, ...]
) -> None:
    """A warp's first column may lie past the image, after what the next image begins with."""
    x, w = in_layout(torch.randn(size).half(), "channels_last"), torch.randn(8, 1, kernel, kernel)
    sides = [2 * kernel, 2 * kernel, kernel // 2, kernel // 2]
    arguments = [w.half(), None, [1, 1], sides, [1, 1], 8, "none", False]
    assert_accurate(gpu("conv2d", x, *arguments), OPS.conv2d(*wide([x, *arguments])))


@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize("stride", [1, 2])
def test_wide_groups_of_samples(gpu: Caller, stride: int, capability: int) -> None:
    """How many samples share a tile depends on the device, and a sample's bits on none of it."""
    x = in_layout(torch.randn(3, 128, 3 * stride, 14).half(), "channels_last")
    w = torch.randn(128, 64, 3, 3).half()
    arguments = [w, None, [stride] * 2, [1] * 4, [1, 1], 2, "none", False]
    on: dict[str, Any] = {"capability": capability}
    y = gpu("conv2d", x, *arguments, **on)
    assert_accurate(y, OPS.conv2d(*wide([x, *arguments])))
    assert torch.equal(gpu("conv2d", x[-1:], *arguments, runs=RUNS[:1], **on), y[-1:])


def test_many_filters_of_a_channel(gpu: Caller) -> None:
    """The input gradient's sums of 18432 terms each."""
    x, w, dz = torch.randn(1, 2, 4, 4), torch.rand(4096, 1, 3, 3), torch.rand(1, 4096, 4, 4)
    arguments = [dz, x, w, None, [1, 1], [1] * 4, [1, 1], 2, "none", False, [True, False, False]]
    gradient = gpu("conv2d_backward", *arguments, runs=RUNS[:1])[0]
    assert_accurate(gradient, OPS.conv2d_backward(*wide(arguments))[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_derivative_of_activation(gpu: Caller, activation: str, dtype: torch.dtype) -> None:
    """Through a 1x1 depthwise convolution, whose gradient has one term, and the bias's gradient."""
    rng = random.Random(f"{activation} {dtype}")
    for _ in range(4):
        channels = rng.choice([1, 3, 8, 33, 64])
        size = (rng.randint(1, 3), channels, rng.randint(1, 20), rng.randint(1, 20))
        layout = rng.choice(LAYOUTS)
        saved, dy = [in_layout(torch.randn(size).to(dtype), layout) for _ in range(2)]
        x, w = torch.randn(size).to(dtype), torch.ones(channels, 1, 1, 1, dtype=dtype)
        arguments = [dy, x, w, saved, [1, 1], [0] * 4, [1, 1], channels, activation, False]
        dz, _, db = gpu("conv2d_backward", *arguments, [True] * 3)
        truth, _, db_truth = OPS.conv2d_backward(*wide(arguments), [True] * 3)
        if dtype in NORM_BOUND:
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(dz.double(), truth, rtol=32 * eps, atol=32 * eps)
            assert_accurate(db, db_truth)
        else:
            assert_accurate(dz, truth)
            assert_accurate(db, db_truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("x, filters", [((0, 8, 5, 5), 8), ((2, 0, 5, 5), 8)])
def test_empty(
    gpu: Caller, x: tuple[int, ...], filters: int, layout: str, groups: int, dtype: torch.dtype
) -> None:
    if groups > 1 and x[1] == 0:
        return
    p = {"x": x, "w": (filters, x[1] // groups, 3, 3), "layouts": [layout] * 3, "bias": True}
    image, w, b = conv_tensors(p, dtype)
    arguments = [[1, 1], [1, 1, 1, 1], [1, 1], groups, "relu", False]
    y = gpu("conv2d", image, w, b, *arguments)
    assert_same(y, OPS.conv2d(image, w, b, *arguments))
    backward = [torch.ones_like(y), image, w, y, *arguments, [True] * 3]
    for gradient, truth in zip(
        gpu("conv2d_backward", *backward), OPS.conv2d_backward(*backward), strict=True
    ):
        assert_same(gradient, truth)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_conv2d(gpu: Caller, dtype: torch.dtype) -> None:
    rng = random.Random(str(dtype))
    info = torch.iinfo(dtype)
    for family in ("dense", "grouped", "depthwise"):
        p = conv_problem(rng, family)
        x, w = [
            in_layout(torch.randint(info.min, info.max, size).to(dtype), layout)
            for size, layout in zip((p["x"], p["w"]), p["layouts"], strict=False)
        ]
        arguments = [x, w, None, *p["arguments"], "none", p["flip"]]
        assert_same(gpu("conv2d", *arguments), OPS.conv2d(*arguments))


# --- pooling -------------------------------------------------------------------------------------


def pool_problem(rng: random.Random) -> tuple[tuple[int, ...], list[Any]]:
    """An input's size; kernel, stride, padding, dilation and ceil_mode."""
    kernel = rng.choice([(2, 2), (3, 3), (1, 1), (3, 2), (1, 5), (7, 4), (9, 9), (20, 17)])
    dilation = rng.choice([(1, 1), (1, 1), (1, 1), (2, 1), (2, 3)])
    stride = rng.choice([kernel, (1, 1), (2, 2), (2, 1), (3, 5)])
    span = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    padding = [rng.randint(0, span[i] // 2) for i in range(2)]
    size = [max(span[i] - 2 * padding[i], 1) + rng.choice([0, 1, 5, 13]) for i in range(2)]
    size[1] += rng.choice([0, 0, 31, 64])
    channels = rng.choice([1, 2, 3, 4, 7, 8, 16, 33, 64])
    arguments = [list(kernel), list(stride), padding, list(dilation), rng.random() < 0.5]
    return (rng.randint(1, 2), channels, *size), arguments


def pool_input(rng: random.Random, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values with ties, zeros of both signs and, of floating-point types, NaN and infinities."""
    layout = rng.choice(LAYOUTS)
    if not dtype.is_floating_point:
        low, high = (0, 2) if dtype == torch.bool else (0 if dtype == torch.uint8 else -9, 9)
        return in_layout(torch.randint(low, high, size).to(dtype), layout)
    x = torch.randint(-9, 9, size).double() / 2 * torch.tensor([1.0, -1.0])[torch.randint(2, size)]
    special = rng.choice([[], [float("nan")], [float("inf"), float("-inf")], [float("nan")] * 9])
    for value in special:
        x[torch.rand(size) < 0.05] = value
    return in_layout(x.to(dtype), layout)


@on_seeds
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_max_and_min_pool2d(gpu: Caller, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(f"{dtype} {seed}")
    for _ in range(SHAPES):
        size, arguments = pool_problem(rng)
        x = pool_input(rng, size, dtype)
        which = rng.choice(["max", "min"])
        y = getattr(OPS, f"{which}_pool2d")(x, *arguments)
        assert_same(gpu(f"{which}_pool2d", x, *arguments), y)
        for name in ("offsets", "indices"):
            full = f"{which}_pool2d_with_{name}"
            expected = getattr(OPS, full)(x, *arguments)
            for one, other in zip(gpu(full, x, *arguments), expected, strict=True):
                assert_same(one, other)
            selected = in_layout(expected[1], rng.choice(["contiguous", "channels_last"]))
            window = arguments[:-1]
            assert_same(
                gpu("select_pool2d_gather", x, selected, *window),
                OPS.select_pool2d_gather(x, selected, *window),
            )
            if not dtype.is_floating_point:
                continue
            dy = in_layout(torch.randn(expected[0].shape).to(dtype), rng.choice(LAYOUTS))
            backward = [dy, selected, list(size), *window, rng.random() < 0.5]
            dx = gpu("select_pool2d_backward", *backward)
            assert_accurate(dx, OPS.select_pool2d_backward(*wide(backward)))


@on_seeds
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_avg_pool2d(gpu: Caller, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(f"{dtype} {seed}")
    for _ in range(2 * SHAPES):
        size, (kernel, stride, _, _, ceil_mode) = pool_problem(rng)
        padding = [rng.randint(0, k // 2) for k in kernel]
        size = (*size[:2], *[max(s, k) for s, k in zip(size[2:], kernel, strict=True)])
        x = in_layout(torch.randn(size).to(dtype), rng.choice(LAYOUTS))
        rest = [ceil_mode, rng.random() < 0.5, rng.choice([None, None, 3, -7])]
        y = gpu("avg_pool2d", x, kernel, stride, padding, *rest)
        truth = OPS.avg_pool2d(x.double(), kernel, stride, padding, *rest)
        assert_accurate(y, truth)
        dy = in_layout(torch.randn_like(truth).to(dtype), rng.choice(LAYOUTS))
        backward = [dy, list(size), kernel, stride, padding, *rest, rng.random() < 0.5]
        assert_accurate(
            gpu("avg_pool2d_backward", *backward), OPS.avg_pool2d_backward(*wide(backward))
        )


@on_seeds
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adaptive_pool2d(gpu: Caller, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(f"adaptive {dtype} {seed}")
    for _ in range(SHAPES):
        sizes = [1, 2, 3, 5, 7, 8, 14, 31, 40]
        channels = rng.choice([1, 2, 3, 8, 33, 64])
        size = (rng.randint(1, 2), channels, rng.choice(sizes), rng.choice(sizes))
        output = [rng.choice([1, 1, 2, 3, 4, 7, 9]) for _ in range(2)]
        last = rng.random() < 0.5

        x = in_layout(torch.randn(size).to(dtype), rng.choice(LAYOUTS))
        truth = OPS.adaptive_avg_pool2d(x.double(), output)
        assert_accurate(gpu("adaptive_avg_pool2d", x, output), truth)
        dy = in_layout(torch.randn_like(truth).to(dtype), rng.choice(LAYOUTS))
        backward = [dy, list(size), last]
        assert_accurate(
            gpu("adaptive_avg_pool2d_backward", *backward),
            OPS.adaptive_avg_pool2d_backward(*wide(backward)),
        )

        x = pool_input(rng, size, dtype)
        y, indices = OPS.adaptive_max_pool2d(x, output)
        for one, other in zip(gpu("adaptive_max_pool2d", x, output), (y, indices), strict=True):
            assert_same(one, other)
        assert_same(gpu("adaptive_max_pool2d_values", x, output), y)
        assert_same(
            gpu("adaptive_max_pool2d_gather", x, indices),
            OPS.adaptive_max_pool2d_gather(x, indices),
        )
        backward = [dy, indices, list(size), last]
        assert_accurate(
            gpu("adaptive_max_pool2d_backward", *backward),
            OPS.adaptive_max_pool2d_backward(*wide(backward)),
        )


# Layouts, sizes and ceil_mode: rows are whole vectors, halves of vectors or neither, or strips, of
# planes that go through shared memory and that do not.
NETWORK_POOLS = (
    ("channels_last", (2, 16, 9, 13), False),
    ("channels_last", (1, 64, 6, 8), True),
    ("contiguous", (3, 1, 6, 16), False),
    ("contiguous", (2, 3, 9, 32), True),
    ("contiguous", (3, 1, 8, 14), False),
    ("contiguous", (1, 2, 7, 28), False),
    ("contiguous", (1, 1, 6, 56), True),
    ("contiguous", (1, 1, 58, 72), False),
    ("contiguous", (1, 1, 66, 68), False),
    ("contiguous", (1, 1, 67, 65), True),
)


def special_image(size: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """Ties, zeros of both signs, NaN and infinities; a corner of one infinity and one of NaN."""
    x = torch.randint(-9, 9, size).double() / 2 * torch.tensor([1.0, -1.0])[torch.randint(2, size)]
    for special in (float("inf"), -float("inf"), float("nan")):
        x[torch.rand(size) < 0.02] = special
    x[..., :7, :7] = -float("inf")
    x[0, 0, -2:, -5:] = float("nan")
    return in_layout(x.to(dtype), layout)


def assert_accurate_numbers(out: Tensor, truth: Tensor) -> None:
    """NaN and each infinity in the same places, and the numbers accurate."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(out), kind(truth))
    numbers = truth.isfinite()
    assert_accurate(out.where(numbers, 0), truth.where(numbers, 0))


def gradient(size: Sequence[int], layout: str, dtype: torch.dtype) -> Tensor:
    dy = torch.randn(size)
    dy[torch.rand(dy.shape) < 0.01] = float("inf")
    dy[torch.rand(dy.shape) < 0.01] = float("nan")
    return in_layout(dy.to(dtype), layout)


def assert_selects(
    gpu: Callable[..., Any], x: Tensor, window: list[Any], ceil_mode: bool, layout: str
) -> None:
    """Maxima and minima with and without their places, and the gradient by both kinds of places."""
    for which in ("max", "min"):
        y = gpu(f"{which}_pool2d", x, *window, ceil_mode)
        assert_same(y, getattr(OPS, f"{which}_pool2d")(x, *window, ceil_mode))
        for name in ("offsets", "indices"):
            full = f"{which}_pool2d_with_{name}"
            expected = getattr(OPS, full)(x, *window, ceil_mode)
            for one, other in zip(gpu(full, x, *window, ceil_mode), expected, strict=True):
                assert_same(one, other)
            if which == "min":
                continue
            dy = gradient(y.shape, layout, x.dtype)
            backward = [dy, expected[1], list(x.shape), *window, layout == "channels_last"]
            dx = gpu("select_pool2d_backward", *backward)
            assert_accurate_numbers(dx, OPS.select_pool2d_backward(*wide(backward)))


def assert_averages(gpu: Callable[..., Any], x: Tensor, arguments: list[Any], layout: str) -> None:
    y, truth = gpu("avg_pool2d", x, *arguments), OPS.avg_pool2d(x.double(), *arguments)
    assert_accurate_numbers(y, truth)
    dy = gradient(y.shape, layout, x.dtype)
    backward = [dy, list(x.shape), *arguments, layout == "channels_last"]
    dx = gpu("avg_pool2d_backward", *backward)
    assert_accurate_numbers(dx, OPS.avg_pool2d_backward(*wide(backward)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 2), (3, 1)])
def test_pools_of_networks(gpu: Caller, kernel: int, stride: int, dtype: torch.dtype) -> None:
    """Windows that kernels know when they are compiled: bands, patches and quads."""
    for layout, size, ceil_mode in NETWORK_POOLS:
        x = special_image(size, layout, dtype)
        # That of planes in vectors, or in NHWC any.
        pad = kernel // 2 if layout == "channels_last" else (kernel - 1) // 2
        window = [[kernel] * 2, [stride] * 2, [pad] * 2, [1, 1]]
        assert_selects(gpu, x, window, ceil_mode, layout)
        rest = [ceil_mode, size[0] == 2, None if size[1] == 1 else 3]
        assert_averages(gpu, x, [*window[:3], *rest], layout)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_averages_of_pairs(gpu: Caller, dtype: torch.dtype) -> None:
    """Disjoint 2x2 windows over rows that are no whole vectors, of more than a block and of few."""
    for size in ((2, 3, 2, 6), (1, 1, 6, 14), (4, 25, 4, 10), (1, 3, 14, 14), (1, 6, 22, 18)):
        x = special_image(size, "contiguous", dtype)
        for divisor in (None, -7):
            arguments = [[2, 2], [2, 2], [0, 0], False, True, divisor]
            assert_averages(gpu, x, arguments, "contiguous")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_windows(gpu: Caller, dtype: torch.dtype) -> None:
    """Many elements for each of few outputs, whose gradient is zero almost everywhere."""
    for layout, size, window, ceil_mode in (
        ("contiguous", (3, 5, 17, 19), [[7, 6], [5, 6], [3, 2], [1, 1]], True),
        ("contiguous", (1, 37, 9, 11), [[5, 7], [4, 4], [0, 3], [1, 1]], False),
        ("contiguous", (1, 2, 25, 23), [[4, 3], [6, 5], [1, 1], [3, 2]], False),
        ("channels_last", (2, 64, 13, 17), [[7, 6], [5, 6], [3, 2], [1, 1]], True),
        ("channels_last", (1, 40, 15, 14), [[9, 4], [4, 4], [4, 2], [1, 2]], False),
        ("channels_last", (1, 128, 8, 9), [[5, 5], [4, 4], [0, 1], [1, 1]], False),
        ("channels_last", (1, 16, 18, 19), [[17, 16], [3, 3], [8, 0], [1, 1]], True),
        ("channels_last", (1, 5, 18, 19), [[17, 16], [3, 3], [8, 0], [1, 1]], False),
    ):
        x = special_image(size, layout, dtype)
        assert_selects(gpu, x, window, ceil_mode, layout)
        if window[3] == [1, 1]:
            assert_averages(gpu, x, [*window[:3], ceil_mode, True, None], layout)
    for layout, channels, output in (
        ("contiguous", 3, [3, 4]),
        ("contiguous", 17, [1, 2]),
        ("channels_last", 64, [3, 4]),
    ):
        x = special_image((2, channels, 17, 14), layout, dtype)
        y, indices = OPS.adaptive_max_pool2d(x, output)
        for one, other in zip(gpu("adaptive_max_pool2d", x, output), (y, indices), strict=True):
            assert_same(one, other)
        dy = gradient(y.shape, layout, dtype)
        backward = [dy, indices, list(x.shape), layout == "channels_last"]
        dx = gpu("adaptive_max_pool2d_backward", *backward)
        assert_accurate_numbers(dx, OPS.adaptive_max_pool2d_backward(*wide(backward)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "size, output",
    [
        ((1, 2, 61, 48), [2, 3]), ((1, 3, 50, 33), [5, 4]), ((1, 1, 200, 7), [12, 1]),
        ((4, 40, 28, 28), [3, 3]), ((3, 41, 9, 7), [1, 2]), ((2, 35, 20, 30), [6, 5]),
    ],
)  # fmt: skip
def test_gradient_of_large_windows(
    gpu: Caller, size: tuple[int, ...], output: list[int], dtype: torch.dtype
) -> None:
    """Bands of few planes, and many planes in a block, as many as the device has work for."""
    for layout in ("contiguous", "channels_last"):
        x = in_layout(torch.randn(size).to(dtype), layout)
        y, indices = OPS.adaptive_max_pool2d(x, output)
        backward = [torch.randn_like(y), indices, list(size), layout == "channels_last"]
        dx = gpu("adaptive_max_pool2d_backward", *backward)
        assert_accurate_numbers(dx, OPS.adaptive_max_pool2d_backward(*wide(backward)))


@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pools_of_whole_images(gpu: Caller, dtype: torch.dtype, capability: int) -> None:
    """With asynchronous copies and without, of areas of no whole vectors, in blocks partly full."""
    run = partial(gpu, capability=capability)
    for layout, size in (
        ("contiguous", (3, 5, 7, 7)),
        ("contiguous", (1, 130, 5, 3)),
        ("contiguous", (1, 9, 13, 14)),
        ("contiguous", (2, 2, 31, 32)),
        ("channels_last", (2, 64, 7, 7)),
        ("channels_last", (1, 24, 9, 11)),
    ):
        x = special_image(size, layout, dtype)
        window = [list(size[2:]), list(size[2:]), [0, 0], [1, 1]]
        assert_selects(run, x, window, False, layout)
        assert_averages(run, x, [*window[:3], False, True, None], layout)
