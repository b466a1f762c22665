"""torchconv.fuse(..., freeze=True): the results of a copy that is not frozen, to the bit, whatever
changes of the weights PyTorch counts."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import torchconv
from conftest import in_layout
from packed_layers import assert_fresh_in_threads

LAYOUTS = ("contiguous", "channels_last")
SIZE = (1, 64, 14, 14)


class Images(nn.Module):
    """What torchvision and timm have: layers of all kinds that read weights in a form of their own
    or as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(64, 96, 1, bias=False),
            nn.BatchNorm2d(96),
            nn.ReLU(),
            nn.Conv2d(96, 96, 3, padding=1, groups=96),
            nn.Hardswish(),
            nn.Conv2d(96, 160, 1),
            nn.Conv2d(160, 160, 3, padding=1, groups=20),
            nn.Conv2d(160, 48, 3, 2, 1),
            nn.Conv2d(48, 48, 5, padding=2),
            nn.Conv2d(48, 112, 1),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(112, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.layers(x)).flatten(1))


class Rows(nn.Module):
    """As ConvNeXt has them: linear layers over images with channels last, which no chain runs."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 200), nn.Linear(200, 64)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return x + self.narrow(nn.functional.gelu(self.wide(rows))).permute(0, 3, 1, 2)


def frozen(kind: type[nn.Module] = Images, dtype: torch.dtype = torch.float32) -> GraphModule:
    torch.manual_seed(0)
    return torchconv.fuse(kind().to(dtype).eval(), freeze=True)


def thawed(made: GraphModule) -> GraphModule:
    """The same network with the weights as they are now, and not frozen."""
    return torchconv.fuse(made)


def layers_of(made: nn.Module) -> Iterator[Any]:
    return (layer for layer in made.modules() if hasattr(layer, "_packed_weights"))


def kept(made: nn.Module) -> int:
    """Bytes of packed weights."""
    all_kept = (layer._packed_weights for layer in layers_of(made))
    return sum(packed.bytes() for packed in all_kept if packed is not None)


def assert_fresh(made: GraphModule, x: Tensor | None = None) -> None:
    if x is None:
        x = in_layout(torch.randn(SIZE), "channels_last")
    with torch.no_grad():
        expected = thawed(made)(x)
        for _ in range(3):  # by layers, by a program, by its plan
            assert torch.equal(made(x), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [Images, Rows])
def test_same_bits(kind: type[nn.Module], layout: str, threads: int) -> None:
    made = frozen(kind)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in (SIZE, (3, 64, 9, 7), (1, 64, 28, 28), (1, 64, 1, 1), (2, 64, 14, 14), SIZE):
            assert_fresh(made, in_layout(torch.randn(size), layout))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_of_other_types(dtype: torch.dtype, layout: str) -> None:
    made = frozen(dtype=dtype)
    assert_fresh(made, in_layout(torch.randn(SIZE, dtype=dtype), layout))


@pytest.mark.parametrize("channels", [1, 17, 64, 384, 600])
@pytest.mark.parametrize("filters", [8, 20, 56, 112, 160])
def test_1x1_layers(channels: int, filters: int) -> None:
    """Filters that tasks cut inside of panels and vectors, and terms in several chunks."""
    made = torchconv.fuse(nn.Sequential(nn.Conv2d(channels, filters, 1)).eval(), freeze=True)
    for layout in LAYOUTS:
        for pixels in (1, 7, 14, 21):
            x = in_layout(torch.randn(1, channels, pixels, pixels), layout)
            assert_fresh(made, x)
            x[0, 0, 0, 0] = float("inf")
            x[0, -1, -1, -1] = float("nan")
            with torch.no_grad():
                torch.testing.assert_close(made(x), thawed(made)(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "filters", "groups"),
    [(256, 256, 1), (264, 250, 1), (288, 300, 1), (600, 544, 2), (67, 35, 1)],
)
def test_winograd_layers(channels: int, filters: int, groups: int, dtype: torch.dtype) -> None:
    """Weights of few tiles are kept as they are gathered, those of more transformed."""
    layer = nn.Conv2d(channels, filters, 3, padding=1, groups=groups)
    made = torchconv.fuse(nn.Sequential(layer.to(dtype)).eval(), freeze=True)
    for layout in LAYOUTS:
        for size in ((1, 7, 7), (3, 6, 9), (1, 40, 36)):
            x = in_layout(torch.randn(size[0], channels, *size[1:], dtype=dtype), layout)
            assert_fresh(made, x)
    assert kept(made) > 0
    x[-1, 3, 2, 1] = float("nan")
    with torch.no_grad():
        torch.testing.assert_close(made(x), thawed(made)(x), rtol=0, atol=0, equal_nan=True)


def test_1x1_layers_of_few_pixels_keep_their_weights() -> None:
    layer = nn.Conv2d(64, 96, 1)
    x = in_layout(torch.randn(SIZE), "channels_last")
    for freeze in (False, True):
        made = torchconv.fuse(nn.Sequential(layer).eval(), freeze=freeze)
        assert_fresh(made, x)
        assert kept(made) == (layer.weight.nbytes if freeze else 0)


# --- changes --------------------------------------------------------------------------------------


def weights_of(made: GraphModule) -> list[nn.Parameter]:
    return [p for p in made.parameters() if p.dim() > 1]


def by_copying(made: GraphModule) -> None:
    with torch.no_grad():
        for weight in weights_of(made):
            weight.copy_(torch.randn_like(weight))


def by_one_element(made: GraphModule) -> None:
    with torch.no_grad():
        for weight in weights_of(made):
            weight[1, 0] += 1


def by_load_state_dict(made: GraphModule) -> None:
    made.load_state_dict({name: torch.randn_like(t) for name, t in made.state_dict().items()})


def by_assigning_a_state_dict(made: GraphModule) -> None:
    state = {name: torch.randn_like(t) for name, t in made.state_dict().items()}
    made.load_state_dict(state, assign=True)


def by_assigning_data(made: GraphModule) -> None:
    for weight in weights_of(made):
        weight.data = torch.randn_like(weight)


def by_assigning_data_twice(made: GraphModule) -> None:
    """The second may come to lie where the first weights were."""
    for weight in weights_of(made):
        weight.data = torch.zeros_like(weight)
        weight.data = torch.randn_like(weight)


def by_new_parameters(made: GraphModule) -> None:
    for layer in layers_of(made):
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def by_swapping_tensors(made: GraphModule) -> None:
    for weight in weights_of(made):
        torch.utils.swap_tensors(weight, nn.Parameter(torch.randn_like(weight)))


def by_swapping_in_the_same_memory(made: GraphModule) -> None:
    """Another tensor, with a count of its own."""
    for weight in weights_of(made):
        torch.utils.swap_tensors(weight, nn.Parameter(weight.data))
    by_one_element(made)


def by_memory_format(made: GraphModule) -> None:
    made.to(memory_format=torch.channels_last)


def by_dtype_and_back(made: GraphModule) -> None:
    made.bfloat16().float()


def by_vector_to_parameters(made: GraphModule) -> None:
    vector = nn.utils.parameters_to_vector(made.parameters())
    nn.utils.vector_to_parameters(torch.randn_like(vector), made.parameters())


def optimizer_step(kind: Any, **kwargs: Any) -> Callable[[GraphModule], None]:
    def change(made: GraphModule) -> None:
        optimizer = kind(made.parameters(), lr=0.5, **kwargs)
        made(torch.randn(SIZE)).square().sum().backward()
        optimizer.step()

    change.__name__ = "_".join(("by", kind.__name__, *kwargs))
    return change


CHANGES = [value for name, value in list(globals().items()) if name.startswith("by_")]
CHANGES += [
    optimizer_step(torch.optim.SGD),
    optimizer_step(torch.optim.SGD, foreach=True),
    optimizer_step(torch.optim.Adam),
]


@pytest.mark.parametrize("kind", [Images, Rows])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_is_noticed(change: Callable[[GraphModule], None], kind: type[nn.Module]) -> None:
    made = frozen(kind)
    x = in_layout(torch.randn(SIZE), "channels_last")
    assert_fresh(made, x)
    for _ in range(2):
        change(made)
        assert_fresh(made, x)
    assert all(layer._weights_frozen for layer in layers_of(made))


def by_writing_data(made: GraphModule) -> None:
    for weight in weights_of(made):
        weight.data.mul_(2)


def by_numpy(made: GraphModule) -> None:
    for weight in weights_of(made):
        array = weight.detach().numpy()
        array[:] = 2 * array


# PyTorch's fused optimizers count nothing.
NOT_COUNTED = [by_writing_data, by_numpy, optimizer_step(torch.optim.Adam, fused=True)]


@pytest.mark.parametrize("change", NOT_COUNTED, ids=lambda f: f.__name__)
def test_other_changes_take_a_call(change: Callable[[GraphModule], None]) -> None:
    made = frozen()
    x = in_layout(torch.randn(SIZE), "channels_last")
    assert_fresh(made, x)
    change(made)
    torchconv.drop_packed_weights(made)
    assert kept(made) == 0
    assert_fresh(made, x)
    assert kept(made) > 0


def test_weights_in_shared_memory() -> None:
    made = frozen().share_memory()
    assert_fresh(made)
    assert kept(made) > 0


def test_threads() -> None:
    made = frozen()
    x = in_layout(torch.randn(SIZE), "channels_last")

    def change() -> Tensor:
        by_copying(made)
        with torch.no_grad():
            return thawed(made)(x)

    assert_fresh_in_threads(made, x, change)


# --- the copy itself ------------------------------------------------------------------------------


def test_copies_are_frozen() -> None:
    made = frozen()
    assert_fresh(made)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(buffer, weights_only=False),
    ):
        assert all(layer._weights_frozen for layer in layers_of(other))
        assert kept(other) == 0
        assert_fresh(other)
        assert kept(other) == kept(made)
        by_copying(other)
        assert_fresh(other)
        assert_fresh(made)


def test_only_what_is_asked_for() -> None:
    made = frozen()
    assert not any("_weights_frozen" in vars(layer) for layer in thawed(made).modules())
    assert made.state_dict().keys() == thawed(made).state_dict().keys()
    swapped = torchconv.fuse(nn.Sequential(nn.Conv2d(4, 4, 3)).eval(), freeze=True)
    layer = swapped.get_submodule("0")
    assert "_weights_frozen" in vars(layer)
    torchconv.restore(swapped)
    assert "_weights_frozen" not in vars(layer)


def test_training_and_moving_drop() -> None:
    made = frozen()
    for change in (lambda: made.train().eval(), lambda: made.float().cpu()):
        assert_fresh(made)
        assert kept(made) > 0
        change()
        assert kept(made) == 0
    assert made(torch.randn(SIZE)).requires_grad and kept(made) == 0
    with torch.no_grad(), torchconv.backends.keep_packed_weights(False):
        made(torch.randn(SIZE))
    assert kept(made) == 0


def test_memory() -> None:
    def allocated() -> int:
        gc.collect()
        return torchconv.memory_stats()["allocated"]

    model = nn.Sequential(nn.Conv2d(1024, 512, 1)).eval()
    made = torchconv.fuse(model, freeze=True)
    x = in_layout(torch.randn(1, 1024, 14, 14), "channels_last")
    before = allocated()
    assert_fresh(made, x)
    assert kept(made) == model[0].weight.nbytes
    assert allocated() >= before + kept(made)
    # The last two forms.
    for size in (7, 8, 9, 12, 13, 14):
        assert_fresh(made, in_layout(torch.randn(1, 1024, size, size), "channels_last"))
    assert kept(made) <= 2 * model[0].weight.nbytes
    torchconv.drop_packed_weights(made)
    assert allocated() == before


def test_export() -> None:
    """Graphs hold the plain operator."""
    made = frozen()
    x = torch.randn(SIZE)
    with torch.no_grad():
        program = torch.export.export(made, (x,))
        by_writing_data(made)
        torch.testing.assert_close(program.module()(x), thawed(made)(x))
