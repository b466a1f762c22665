"""Linear layers at the end of chains: the layers' own results, to the bit, whatever has happened to
them since the call before."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations

import torchconv
from conftest import FLOATS, Network, threads
from test_chain import (
    LAYOUTS,
    add_one,
    assert_same,
    by_layers,
    images,
    looks as looks,
    run_program,
    runs as runs,
    step,
)
from torchconv._programs import KeptProgram, Step, program_of

C = 512  # so that C x C weights are just many enough


pytestmark = pytest.mark.usefixtures("no_grad")

TORCH = ("relu", "sigmoid", "tanh")
FLATTENS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer": lambda m, x: m.flatten(x),
    "function": lambda m, x: torch.flatten(x, 1),
    "keywords": lambda m, x: torch.flatten(x, start_dim=1),
    "method": lambda m, x: x.flatten(1, -1),
    "view": lambda m, x: x.view(x.size(0), -1),
    "reshape": lambda m, x: x.reshape((x.shape[0], -1)),
}


def network(
    flatten: Callable[[Any, Tensor], Tensor] = FLATTENS["layer"],
    features: int = C,
    filters: int = C,
) -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(flatten(m, m.pool(m.stem(x))))

    return Network(
        forward,
        stem=nn.Conv2d(3, C, 1),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(features, filters),
    )


def fused(
    made: nn.Module | None = None, layout: str = "contiguous", dtype: torch.dtype = torch.float32
) -> GraphModule:
    kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    made = made or network()
    return torchconv.fuse(made.eval().to(dtype).to(memory_format=kind))  # type: ignore[call-overload]


def image(batch: int = 2, **how: Any) -> Tensor:
    return images(batch, 3, 5, 4, **how)


# --- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flatten", FLATTENS)
def test_flattens(flatten: str, layout: str, runs: list[int]) -> None:
    made = fused(network(FLATTENS[flatten]), layout)
    for batch in (1, 2, 32, 33, 2):
        x = image(batch, layout=layout)
        expected = by_layers(made, x)
        for _ in range(3):
            assert_same(made(x), expected)
    assert runs == [3] * 14


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_types(bias: bool, dtype: torch.dtype, runs: list[int]) -> None:
    """Where the layer is PyTorch's, it stays outside."""
    whole = network()
    whole.head = nn.Linear(C, 700, bias=bias)
    made = fused(whole, dtype=dtype)
    x = image(dtype=dtype)
    for _ in range(3):
        assert_same(made(x), by_layers(made, x))
    assert runs == [3 if dtype in (torch.float32, torch.float64) else 2] * 2


@pytest.mark.parametrize(
    "activation", ["relu", "relu6", "sigmoid", "tanh", "silu", "hardswish", "gelu"]
)
def test_several_with_activations(activation: str, runs: list[int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.flatten(m.pool(m.stem(x)), 1)
        return m.last(
            m.dropout(getattr(torch if activation in TORCH else F, activation)(m.first(x)))
        )

    whole = network()
    layers = {"stem": whole.stem, "pool": whole.pool, "dropout": nn.Dropout()}
    made = fused(
        Network(forward, **layers, first=nn.Linear(C, 640), last=nn.Linear(640, C))  # type: ignore[arg-type]
    )
    for batch in (2, 40):
        x = image(batch)
        for _ in range(3):
            assert_same(made(x), by_layers(made, x))
    assert runs == [4] * 5


def test_what_stays_outside(runs: list[int]) -> None:
    """A small matrix; images of several pixels; rows that others read."""
    small = network(filters=C - 1)
    pixels = network(features=2 * C)
    pixels.pool = nn.AdaptiveAvgPool2d((1, 2))

    def flatten(m: Any, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1)
        return x + x.abs()

    for whole in (small, pixels, network(flatten)):
        made, x = fused(whole), image()
        for _ in range(3):
            assert_same(made(x), by_layers(made, x))
    assert runs == [2] * 6


def test_flatten_of_images_and_channels() -> None:
    """As in the network, its rows have one element, which the layer does not take."""
    for flatten in (
        lambda m, x: torch.flatten(x, end_dim=1),
        lambda m, x: x.flatten(end_dim=1),
    ):
        made, x = fused(network(flatten)), image()
        for _ in range(3):
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                made(x)


def test_rows_that_others_read(runs: list[int]) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        pooled = m.pool(m.stem(x))
        left = m.left(torch.flatten(pooled, 1))
        right = m.right(torch.flatten(pooled, 1))
        return pooled, left, torch.cat((left, right), 1) * 2, F.hardsigmoid(right) * left

    whole = network()
    layers = {"stem": whole.stem, "pool": whole.pool}
    made = fused(Network(forward, **layers, left=nn.Linear(C, C), right=nn.Linear(C, C)))  # type: ignore[arg-type]
    x = image()
    expected: Any = by_layers(made, x)
    for _ in range(3):
        for got, wanted in zip(made(x), expected, strict=True):
            assert_same(got, wanted)
    assert runs[:2] == [4, 4]


def test_number_of_threads() -> None:
    made, x = fused(), image()
    expected = made(x)
    for count in (1, 3, 2):
        with threads(count):
            assert_same(made(x), expected)


# --- what changes between two calls --------------------------------------------------------------


def in_place(made: Any) -> None:
    made.head.weight.mul_(2)


def uncounted(made: Any) -> None:
    made.head.weight.data.mul_(2)
    made.head.bias.data.add_(1)


def other_data(made: Any) -> None:
    made.head.weight.data = torch.randn(C, C)


def other_strides(made: Any) -> None:
    made.head.weight.data = made.head.weight.data.T


def other_type(made: Any) -> None:
    made.bfloat16().float()


def other_weight(made: Any) -> None:
    made.head.weight = nn.Parameter(torch.randn(C + 1, C))
    made.head.bias = nn.Parameter(torch.randn(C + 1))


def small_weight(made: Any) -> None:
    made.head.weight = nn.Parameter(torch.randn(3, C))
    made.head.bias = None


def no_bias(made: Any) -> None:
    made.head.bias = None


def short_bias(made: Any) -> None:
    made.head.bias.data = torch.randn(1)


def strided_bias(made: Any) -> None:
    made.head.bias.data = torch.randn(C, 2)[:, 1]


def swapped(made: Any) -> None:
    torch.utils.swap_tensors(made.head.weight, nn.Parameter(torch.randn(C, C)))


def state(made: Any) -> None:
    made.load_state_dict({name: value / 2 for name, value in made.state_dict().items()})


def assigned_state(made: Any) -> None:
    halves = {name: value / 2 for name, value in made.state_dict().items()}
    made.load_state_dict(halves, assign=True)


def activation(made: Any) -> None:
    made.head.activation = "tanh"


def hook(made: Any) -> None:
    made.head.register_forward_hook(add_one)


def pre_hook(made: Any) -> None:
    made.head.register_forward_pre_hook(add_one)


def hook_of_the_flatten(made: Any) -> None:
    made.flatten.register_forward_hook(add_one)


def another_flatten(made: Any) -> None:
    made.flatten = nn.Sequential(nn.Flatten(), nn.ReLU())


def flatten_of_other_dimensions(made: Any) -> None:
    made.flatten.end_dim = 1
    made.head = nn.Conv2d(C, 3, 1)
    made.pool = nn.Identity()


def own_forward(made: Any) -> None:
    made.head.forward = lambda x: x * 2


def pytorchs(made: Any) -> None:
    made.head = nn.Linear(C, C)


def another_layer(made: Any) -> None:
    made.head = nn.Sequential(nn.Linear(C, 4), nn.ReLU())


def more_pixels(made: Any) -> None:
    made.pool.output_size = (1, 2)
    made.head = torchconv.nn.Linear(2 * C, C)


def parametrized(made: Any) -> None:
    parametrizations.weight_norm(made.head)


def dropped(made: Any) -> None:
    torchconv.drop_packed_weights(made)


def training_mode(made: Any) -> None:
    made.train()


CHANGES = (
    *(in_place, uncounted, other_data, other_strides, other_type, other_weight, small_weight),
    *(no_bias, short_bias, strided_bias, swapped, state, assigned_state, activation, hook),
    *(pre_hook, hook_of_the_flatten, another_flatten, flatten_of_other_dimensions, own_forward),
    *(pytorchs, another_layer, more_pixels, parametrized, dropped, training_mode),
)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_is_noticed(change: Callable[[Any], None], runs: list[int]) -> None:
    made, x = fused(), image()
    for _ in range(3):
        made(x)
    assert runs == [3, 3]
    change(made)
    for y in (x, image()):
        for _ in range(3):
            assert_same(made(y), by_layers(made, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_type_after_a_call(dtype: torch.dtype, runs: list[int]) -> None:
    made = fused()
    for kind in (torch.float32, dtype, torch.float32):
        made.to(kind)
        x = image(dtype=kind)
        for _ in range(3):
            assert_same(made(x), by_layers(made, x))
    assert runs == [3] * 6


def test_copies() -> None:
    made, x = fused(), image()
    for _ in range(3):
        expected = made(x)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        for _ in range(3):
            assert_same(other(x), expected)
        in_place(other)
        assert_same(other(x), by_layers(other, x))
        assert not torch.equal(other(x), expected)
    assert_same(made(x), expected)


def test_dropped_weights_are_given_back(runs: list[int]) -> None:
    """Also where no convolution is in the chain."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.flatten(m.pool(m.norm(x)), 1))

    whole = network()
    layers = {"norm": nn.BatchNorm2d(C), "pool": whole.pool, "head": whole.head}
    made, x = fused(Network(forward, **layers)), images(1, C, 3, 4)  # type: ignore[arg-type]
    for _ in range(3):
        made(x)
    assert runs == [2, 2]
    head: Any = made.get_submodule("head")
    weight = weakref.ref(head.weight)
    torchconv.drop_packed_weights(made)
    head.weight = None
    gc.collect()
    assert weight() is None


def test_errors_and_empty_batches(runs: list[int]) -> None:
    for flatten in ("view", "function"):
        made, x = fused(network(FLATTENS[flatten])), image()
        for _ in range(3):
            made(x)
        for bad in (images(2, 4, 5, 4), x.double(), x[:0]):
            try:
                expected = by_layers(made, bad)
            except RuntimeError as error:
                for _ in range(2):
                    with pytest.raises(RuntimeError) as again:
                        made(bad)
                    assert str(again.value) == str(error)
            else:
                for _ in range(2):
                    assert_same(made(bad), expected)
        made.get_submodule("head").weight = nn.Parameter(torch.randn(C, C + 1))
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            made(x)


# --- the operator --------------------------------------------------------------------------------


def linear(tensors: list[int], rows: int = 32, activation: str = "none") -> Step:
    values = ((1, 1), (0, 0, 0, 0), (1, 1), 1, activation, False)
    settings = step("conv2d", tensors, values, []).settings
    return Step("linear", tensors, [rows, *settings], [])


@pytest.mark.parametrize("rows", [0, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_operator(batch: int, rows: int) -> None:
    x, w, b = torch.randn(batch, 40, 1, 1), torch.randn(24, 40), torch.randn(24)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        program = program_of([linear([0, 1, 2], rows, "gelu"), linear([0, 1, -1], rows)], [3, 4])
        first, second = run_program([y, w, b], program, planned=batch <= rows)
        torch.testing.assert_close(first[:, :, 0, 0], F.gelu(F.linear(x.flatten(1), w, b)))
        torch.testing.assert_close(second[:, :, 0, 0], F.linear(x.flatten(1), w))


def test_operator_refuses() -> None:
    x, w = torch.randn(2, 4, 1, 1), torch.randn(3, 4)
    wrong: tuple[tuple[Tensor, Tensor, str], ...] = (
        (x[..., 0], w, "dense images of one pixel"),
        (x.expand(2, 4, 2, 1), w, "dense images of one pixel"),
        (torch.randn(2, 8, 1, 1)[:, ::2], w, "dense images of one pixel"),
        (x[:0], w, "dense images of one pixel"),
        (x, w[:, :3], "takes no rows of 4"),
        (x, w[:, :, None], "takes no rows of 4"),
        (x, w.double(), "should be the same|API call failed"),
    )
    for rows in (0, 32):
        program = program_of([linear([0, 1, -1], rows)], [2])
        for image, weight, message in wrong:
            with pytest.raises(RuntimeError, match=message):
                KeptProgram(program)([image, weight])


# --- averages that are written as functions ------------------------------------------------------

AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1),
    "keyword": lambda x: F.adaptive_avg_pool2d(x, output_size=1).flatten(1),
    "mean": lambda x: x.mean([2, 3]),
    "torch.mean": lambda x: torch.mean(x, dim=(3, 2)),
    "keepdim": lambda x: x.mean((2, 3), keepdim=True).flatten(start_dim=1),
    "third argument": lambda x: torch.mean(x, (2, 3), True).flatten(1),
}


def averaged(average: Callable[[Tensor], Tensor]) -> Network:
    whole = network()

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(average(m.stem(x)))

    return Network(forward, stem=whole.stem, head=whole.head)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("average", AVERAGES)
def test_averages(average: str, layout: str, dtype: torch.dtype, runs: list[int]) -> None:
    whole = averaged(AVERAGES[average]).eval().to(dtype)
    made, x = fused(whole, layout, dtype), image(layout=layout, dtype=dtype)
    expected = by_layers(made, x)
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    torch.testing.assert_close(expected, whole(x), rtol=tolerance, atol=tolerance)
    for _ in range(3):
        assert_same(made(x), expected)
    assert set(runs) == {3 if dtype in (torch.float32, torch.float64) else 2}


def test_averages_that_stay() -> None:
    """Of other dimensions, another type, a size that is known late, and what may be no images."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = m.stem(x)
        return (
            y.mean((1, 3)),
            y.mean((-2, -1)),
            y.mean(),
            y.mean((2, 3), dtype=torch.float64),
            F.max_pool2d(y, 2, return_indices=True)[1],
            F.adaptive_avg_pool2d(y, (y.size(2) // 2, 1)),
            x.abs().mean((2, 3)),
        )

    whole = Network(forward, stem=nn.Conv2d(3, 4, 1))  # type: ignore[arg-type]
    made, x = fused(whole), image()
    assert [type(layer) for layer in made.children()] == [torchconv.nn.Conv2d]
    for got, expected in zip(made(x), whole(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_average_with_or_without_dimensions() -> None:
    """As each call says, and never of an image without a batch, which has no fourth."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)

        def forward(self, images: Tensor, keepdim: bool) -> Tensor:
            return self.stem(images).mean((2, 3), keepdim)

    whole = Kept().eval()
    x, made = image(), torchconv.fuse(whole)
    recorded_once = torchconv.fuse(whole, x, False)
    with torch.no_grad():
        for keepdim in (True, False):
            torch.testing.assert_close(made(x, keepdim), whole(x, keepdim))
        torch.testing.assert_close(recorded_once(x, False), whole(x, False))
        with pytest.raises(IndexError, match="Dimension out of range"):
            recorded_once(x[0], False)
    for average in ("mean", "torch.mean"):
        headed = fused(averaged(AVERAGES[average]).eval())
        for _ in range(3):
            assert_same(headed(x), by_layers(headed, x))
            with pytest.raises(IndexError, match="Dimension out of range"):
                headed(x[0])


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max, all arguments": lambda x: F.max_pool2d(x, (3, 2), 2, (1, 0), 1, ceil_mode=True),
    "average": lambda x: F.avg_pool2d(x, kernel_size=3, stride=1, padding=1),
    "average, all arguments": lambda x: F.avg_pool2d(x, 2, [], 1, True, False, 3),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive, one kept": lambda x: F.adaptive_avg_pool2d(x, (None, 2)),
}


@pytest.mark.parametrize("pool", POOLS)
def test_pools_that_are_functions(pool: str, runs: list[int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(POOLS[pool](m.first(x)))

    whole = Network(forward, first=nn.Conv2d(3, 4, 1), last=nn.Conv2d(4, 5, 1)).eval()
    made, x = fused(whole), image()
    for _ in range(3):
        assert_same(made(x), by_layers(made, x))
        torch.testing.assert_close(made(x), whole(x))
    assert set(runs) == (set() if pool == "adaptive, one kept" else {3})
    for _ in range(2):
        torch.testing.assert_close(made(x[0]), whole(x[0]))
