"""Plans of chains: what a call finds of the ones before it is right for its own tensors, whatever
has changed since. Everywhere the results are the layers' own, to the bit."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import torchconv
from conftest import Network, threads
from test_chain import assert_same, by_layers, images, looks as looks
from torchconv import _chain, _programs
from torchconv._settings import Signature, settings_of

pytestmark = pytest.mark.usefixtures("no_grad")


def forward(m: Any, x: Tensor) -> Tensor:
    x = m.first(m.stem(x))
    x = m.square(m.wide(x)) + x
    gate = F.hardsigmoid(m.excite(m.squeeze(x)))
    return m.head(m.pool(torch.cat((m.left(x * gate), m.right(x)), 1)))


def model() -> Network:
    return Network(
        forward,
        stem=nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU6()),
        first=nn.MaxPool2d(3, 2, 1),
        wide=nn.Conv2d(32, 32, 3, padding=1),
        square=nn.Conv2d(32, 32, 1),
        squeeze=nn.AdaptiveAvgPool2d(1),
        excite=nn.Conv2d(32, 32, 1),
        left=nn.Conv2d(32, 16, 1),
        right=nn.Conv2d(32, 48, 3, padding=1),
        pool=nn.AvgPool2d(2),
        head=nn.Conv2d(64, 5, 1),
    )


def fused() -> GraphModule:
    return torchconv.fuse(model().eval().to(memory_format=torch.channels_last))  # type: ignore[call-overload]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After each run of a program, how many plans it has."""
    seen: list[int] = []
    run = _chain.Program.run

    def watched(self: Any, inputs: Any) -> Any:
        outputs = run(self, inputs)
        seen.append(self._kept.plans())
        return outputs

    monkeypatch.setattr(_chain.Program, "run", watched)
    return seen


def settings_of_conv(values: tuple[Any, ...]) -> list[int]:
    return settings_of(Signature("conv2d").types, (*values, 0, 0, False)).tolist()


def image(*size: int) -> Tensor:
    return images(*(size or (2, 3, 20, 22)), layout="channels_last")


def assert_as_layers(made: GraphModule, x: Tensor) -> None:
    assert_same(made(x), by_layers(made, x))


def test_sizes_and_batches(plans: list[int]) -> None:
    made = fused()
    made(image())
    for _ in range(3):
        for size in ((2, 3, 20, 22), (1, 3, 20, 22), (1, 3, 20, 22), (1, 3, 31, 9)):
            assert_as_layers(made, image(*size))
    assert plans[:4] == [1, 2, 2, 3] and plans[-1] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_in_the_other_layout(dtype: torch.dtype, plans: list[int]) -> None:
    made = fused().to(dtype)
    for _ in range(4):
        for size in ((2, 3, 20, 22), (1, 3, 31, 9)):
            x = images(*size, dtype=dtype)
            assert_as_layers(made, x)
            assert torch.equal(made(x), made(x.to(memory_format=torch.channels_last)))
    assert plans[-1] == (4 if dtype == torch.float32 else 0)


def test_more_sizes_than_plans(plans: list[int]) -> None:
    made = fused()
    inputs = [image(1, 3, 8, width) for width in range(8, 15)]
    expected = [by_layers(made, x) for x in inputs]
    for _ in range(12):
        for x, wanted in zip(inputs, expected, strict=True):
            assert_same(made(x), wanted)
    assert max(plans) == 4
    for _ in range(64):  # until an attempt is made again
        assert_same(made(inputs[0]), expected[0])
    assert plans[-1] == 4


def unaligned(x: Tensor) -> Tensor:
    return (
        torch.cat((torch.zeros(1), x.permute(0, 2, 3, 1).flatten()))[1:]
        .view(x.permute(0, 2, 3, 1).shape)
        .permute(0, 3, 1, 2)
    )


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "unaligned": unaligned,
    "part": lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
    "every other": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str, plans: list[int]) -> None:
    made, x = fused(), image()
    for _ in range(2):
        assert_as_layers(made, x)
    for _ in range(2):
        assert_as_layers(made, VIEWS[view](x))
    assert_as_layers(made, x)


def test_other_type() -> None:
    made = fused()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        made.to(dtype)
        for _ in range(3):
            assert_as_layers(made, image().to(dtype))


def test_empty_batch(plans: list[int]) -> None:
    made = fused()
    made(image())
    for size in (0, 2, 0):
        assert_as_layers(made, image(size, 3, 20, 22))


def test_switch() -> None:
    """Winograd's algorithm has other bits than the direct product."""
    made, x = fused(), image()
    for _ in range(2):
        assert_as_layers(made, x)
    with torchconv.backends.allow_winograd(False):
        for _ in range(2):
            assert_as_layers(made, x)
        exact = made(x)
    assert not torch.equal(made(x), exact)
    assert_as_layers(made, x)


def test_switch_by_another_thread() -> None:
    """What a call chose from both settings is not remembered as if it had met one."""
    made = fused()
    made(image())
    stopped = threading.Event()

    def switch() -> None:
        while not stopped.is_set():
            for allowed in (False, True):
                torchconv.backends.allow_winograd(allowed)

    for width in range(8, 72):
        x = image(1, 3, 20, width)
        stopped.clear()
        worker = threading.Thread(target=switch)
        worker.start()
        for _ in range(4):
            made(x)
        stopped.set()
        worker.join()
        for allowed in (False, True):
            with torchconv.backends.allow_winograd(allowed):
                assert_as_layers(made, x)


def test_number_of_threads() -> None:
    made, x = fused(), image()
    expected = made(x)
    for count in (1, 3, 16, 17, 2):
        with threads(count):
            assert_same(made(x), expected)


def in_place(layer: Any) -> None:
    layer.weight.mul_(-1)
    layer.bias.add_(1)


def uncounted(layer: Any) -> None:
    layer.weight.data.mul_(-1)
    layer.bias.data.add_(1)


def other_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data * 2
    layer.bias.data = layer.bias.data - 1


def other_strides(layer: Any) -> None:
    """At the same address and of the same version."""
    version, address = layer.weight._version, layer.weight.data_ptr()
    layer.weight.data = layer.weight.data.transpose(0, 1)
    assert (layer.weight._version, layer.weight.data_ptr()) == (version, address)


def other_layout(layer: Any) -> None:
    layer.weight.data = layer.weight.data.contiguous()


def strided_bias(layer: Any) -> None:
    layer.bias.data = torch.stack((layer.bias.data, layer.bias.data + 1), 1)[:, 1]


def swapped(layer: Any) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight * 3))


CHANGES = (in_place, uncounted, other_data, other_strides, other_layout, strided_bias, swapped)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_parameters(change: Callable[[Any], None], plans: list[int]) -> None:
    made, x = fused(), image()
    for _ in range(3):
        made(x)
    assert plans == [1, 1]
    change(made.get_submodule("square"))
    for _ in range(3):
        assert_as_layers(made, x)


def test_threads_at_the_same_time() -> None:
    made = fused()
    inputs = [image(), image(1, 3, 9, 31), image(3, 3, 12, 8)]
    expected = [by_layers(made, x) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for i in range(first, first + 60):
                if not torch.equal(made(inputs[i % 3]), expected[i % 3]):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_programs_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    keep = _programs.KeptProgram.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        keep(self, *args, **kwargs)
        numbers.append(self._number)

    monkeypatch.setattr(_programs.KeptProgram, "__init__", watched)
    made, x = fused(), image()
    for _ in range(3):
        made(x)
    known = _programs._library().torchconv_chain_plans
    assert [known(number) for number in numbers] == [1]
    torchconv.drop_packed_weights(made)
    assert [known(number) for number in numbers] == [-1]
    for run in (torch.ops.torchconv.run_kept_chain, torch.ops.torchconv.run_planned_chain):
        with pytest.raises(RuntimeError, match=f"no chain of number {numbers[0]} is kept"):
            run([x], numbers[0])
    made(x)
    assert [known(number) for number in numbers] == [-1, 0]
    del made
    gc.collect()
    assert [known(number) for number in numbers] == [-1, -1]


def test_parameters_that_are_fixed() -> None:
    """From the second call on they are read where they are, and nobody passes them."""
    x, w, b = image(2, 4, 5, 6), torch.randn(8, 4, 1, 1), torch.randn(8)
    values = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "relu", False)
    settings = _programs.Step("conv2d", [0, 1, 2, -1], [0, *settings_of_conv(values)], [0])
    program = _programs.program_of([settings], [3])
    planned = torch.ops.torchconv.run_planned_chain
    kept = _programs.KeptProgram(program, (w, b))
    for _ in range(3):
        kept([x])
        assert planned([x], kept._number) == []
    kept = _programs.KeptProgram(program, (w, b), fixed=True)
    assert planned([x], kept._number) == []
    for _ in range(3):
        w.mul_(-1)
        b.mul_(-1)
        (got,) = kept([x])
        assert_same(got, torch.ops.torchconv.conv2d(x, w, b, *values))
        assert_same(planned([x], kept._number)[0], got)
    for other in ([image(1, 4, 5, 6)], [x.contiguous()], [x.double()], [x, x]):
        assert planned(other, kept._number) == []
    with torchconv.backends.allow_winograd(False):
        assert planned([x], kept._number) == []


@pytest.mark.parametrize("enabled", [True, False])
def test_memory_is_given_back(enabled: bool) -> None:
    made, x = fused(), image(1, 3, 256, 256)
    torchconv.memory.set_memory_pool(enabled)
    try:
        for _ in range(3):
            made(x)
        before = torchconv.memory.memory_stats()["allocated"]
        assert_as_layers(made, x)
        assert torchconv.memory.memory_stats()["allocated"] == before
    finally:
        torchconv.memory.set_memory_pool(True)
