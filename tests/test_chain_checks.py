"""Chains of networks whose Python asks for sizes: checked once for each kind of images."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchconv
from conftest import Network
from test_chain import assert_same, by_layers, images, runs as runs

pytestmark = pytest.mark.usefixtures("no_grad")


def forward(m: Any, x: Tensor) -> Tensor:
    """Asks between layers; the rows decide about padding, the type about a factor."""
    x = F.relu(m.first(x))
    if x.shape[-2] % 2 == 0:
        x = F.pad(x, (0, 0, 0, 1))
    x = F.relu(m.second(x))
    for _ in range(2 if x.dtype in (torch.float32,) else 1):
        x = F.relu(m.third(x))
    return m.pool(x).flatten(1) + x.shape[0]


def network() -> Network:
    torch.manual_seed(0)
    return Network(
        forward,
        first=nn.Conv2d(3, 8, 3, 2, 1),
        second=nn.Conv2d(8, 8, 3, padding=1),
        third=nn.Conv2d(8, 8, 1),
        pool=nn.AdaptiveAvgPool2d(2),
    ).eval()


def test_one_chain_for_kinds_that_have_passed(runs: list[int]) -> None:
    x = images(2, 3, 16, 18)
    made = torchconv.fuse(network(), x)
    for batch in (x, images(1, 3, 16, 12), images(2, 3, 20, 18, layout="channels_last")):
        runs.clear()
        for _ in range(4):
            assert_same(made(batch), by_layers(made, batch))
        assert runs and set(runs) == {5}
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        for _ in range(4):
            assert_same(other(x), by_layers(made, x))
    assert runs[-1] == 5


def test_other_kinds_are_checked(runs: list[int]) -> None:
    x = images(2, 3, 16, 18)
    made = torchconv.fuse(network(), x)
    for _ in range(4):
        made(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="recorded where"):
            made(images(2, 3, 18, 18))
        assert_same(made(x), by_layers(made, x))
    made.double()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="recorded where"):
            made(x.double())
    made.float()
    with pytest.raises(RuntimeError, match="recorded where"), torch.autocast("cpu"):
        made(x)


def test_changed_layers_are_checked_again() -> None:
    x = images(2, 3, 16, 18)
    made: Any = torchconv.fuse(network(), x)
    for _ in range(4):
        made(x)
    made.first.padding = (2, 1)  # an odd number of rows
    for _ in range(2):
        with pytest.raises(RuntimeError, match="recorded where"):
            made(x)
    made.first.padding = (3, 2)
    for _ in range(4):
        assert_same(made(x), by_layers(made, x))


@pytest.mark.parametrize("kind", ["in no chain", "before a chain", "image alone"])
@pytest.mark.parametrize("calls", range(4))
def test_layers_whose_change_no_chain_notices(kind: str, calls: int) -> None:
    def alone(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        if x.shape[-2] % 2 == 0:
            x = F.pad(x, (0, 0, 0, 1), value=1.0)
        return m.second(x)

    def before(m: Any, x: Tensor) -> Tensor:
        return forward(m, m.turned(x))

    model: Any = network()
    model.turned = nn.ConvTranspose2d(3, 3, 1)
    model.steps = {"in no chain": alone, "before a chain": before}.get(kind, forward)
    x = images(3, 16, 18) if kind == "image alone" else images(2, 3, 16, 18)
    made: Any = torchconv.fuse(model, x)
    for _ in range(calls):
        made(x)
    if kind == "before a chain":
        made.turned.stride = (3, 1)  # 46 rows, of which the next layer makes 23
    else:
        made.first.padding = (2, 1)
    for _ in range(6):
        with pytest.raises(RuntimeError, match="recorded where"):
            made(x)


def test_convolutions_by_themselves_are_watched(runs: list[int]) -> None:
    def alone(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        if x.shape[-2] % 2 == 0:
            x = F.pad(x, (0, 0, 0, 1), value=1.0)
        return m.second(x)

    model, x = network(), images(2, 3, 16, 18)
    model.steps = alone
    made: Any = torchconv.fuse(model, x)
    for _ in range(4):
        assert_same(made(x), by_layers(made, x))
    assert runs[-2:] == [1, 1]


def test_single_images_are_not_computed_twice() -> None:
    x, seen = images(3, 16, 18), []
    made: Any = torchconv.fuse(network(), x)
    made.second.register_forward_hook(lambda *_: seen.append(0))
    for _ in range(12):
        made(x)
    assert len(seen) == 12


@pytest.mark.parametrize("name", ["first", "second", "pool"])
def test_each_call_calls_hooks_once(name: str) -> None:
    def steps(m: Any, x: Tensor) -> Tensor:
        x = m.between(m.first(x))
        if x.shape[-2] % 2 == 0:
            x = F.pad(x, (0, 0, 0, 1))
        return m.pool(m.third(m.second(x))).flatten(1) + x.shape[0]

    model: Any = network()
    model.between = nn.ConvTranspose2d(8, 8, 1)  # in no chain
    model.steps = steps
    x = images(2, 3, 16, 18)
    made: Any = torchconv.fuse(model, x)
    expected = by_layers(made, x)
    seen: list[str] = []
    made.between.register_forward_hook(lambda *_: seen.append("between"))
    for _ in range(4):
        assert_same(made(x), expected)
    assert seen == ["between"] * 4
    handle = getattr(made, name).register_forward_hook(lambda *_: seen.append(name))
    for _ in range(8):
        seen.clear()
        assert_same(made(x), expected)
        assert sorted(seen) == sorted(["between", name])
    handle.remove()
    for _ in range(3):
        seen.clear()
        assert_same(made(x), expected)
        assert seen == ["between"]


@pytest.mark.parametrize("changes", ["weights", "another layer"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("every", range(1, 6))
def test_hooks_that_change_layers_are_called_once(every: int, inside: bool, changes: str) -> None:
    """Hooks of a layer in no chain, or of a layer inside of it."""

    def steps(m: Any, x: Tensor) -> Tensor:
        y = m.between(m.first(x).flatten(2).transpose(1, 2))
        y = y.transpose(1, 2).unflatten(2, (8, 9))
        if x.shape[-2] % 2 == 0:
            y = F.pad(y, (0, 0, 0, 1))
        return m.pool(m.third(m.second(y))).flatten(1)

    model: Any = network()
    model.between = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True).eval()
    model.steps = steps
    x = images(2, 3, 16, 18)
    made: Any = torchconv.fuse(model, x)
    seen: list[None] = []

    def hook(*_: Any) -> None:
        seen.append(None)
        if len(seen) % every == 0 and changes == "weights":
            made.second.weight.mul_(1.5)
        elif len(seen) % every == 0:
            made.second = copy.deepcopy(made.second)

    for _ in range(3):
        made(x)
    owner = made.between.linear1 if inside else made.between
    for count in range(1, 13):
        handle = owner.register_forward_pre_hook(hook)
        got = made(x)
        handle.remove()
        assert len(seen) == count
        assert_same(got, by_layers(made, x))


FOREIGN: dict[str, Any] = {}


@torch.fx.wrap
def foreign(x: Tensor) -> Any:
    """A function that is none of PyTorch's."""
    return FOREIGN["does"](x)


@torch.library.custom_op("torchconv_test_checks::foreign", mutates_args=())
def foreign_operator(x: Tensor) -> Tensor:
    return foreign(x.clone())


@foreign_operator.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("function", [foreign, foreign_operator])
def test_functions_that_change_layers(function: Any) -> None:
    def steps(m: Any, x: Tensor) -> Tensor:
        y = function(m.first(x))
        if x.shape[-2] % 2 == 0:
            y = F.pad(y, (0, 0, 0, 1))
        return m.pool(m.third(m.second(y)))

    def changes(x: Tensor) -> Tensor:
        made.second.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        return x

    model, x = network(), images(2, 3, 16, 18)
    model.steps = steps
    FOREIGN["does"] = lambda x: x
    made: Any = torchconv.fuse(model, x)
    for _ in range(5):
        for _ in range(3):
            made(x)
        FOREIGN["does"] = changes
        got = made(x)
        FOREIGN["does"] = lambda x: x
        assert_same(got, by_layers(made, x))


def test_answers_of_functions_are_checked_in_every_call() -> None:
    def steps(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.first(x))
        if foreign(y):
            y = m.third(y)
        return m.pool(y).flatten(1)

    model, x = network(), images(2, 3, 16, 18)
    model.steps = steps
    FOREIGN["does"] = lambda x: True
    made = torchconv.fuse(model, x)
    for _ in range(4):
        assert_same(made(x), by_layers(made, x))
    FOREIGN["does"] = lambda x: False
    for _ in range(2):
        with pytest.raises(RuntimeError, match="recorded where"):
            made(x)


def test_default_type_is_asked_for() -> None:
    def steps(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.first(x))
        if torch.ones(x.shape[0]).dtype == torch.float32:
            y = m.third(y)
        return m.pool(y).flatten(1)

    model, x = network(), images(2, 3, 16, 18)
    model.steps = steps
    made = torchconv.fuse(model, x)
    for _ in range(4):
        assert_same(made(x), by_layers(made, x))
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(RuntimeError, match="recorded where"):
            made(x)
    finally:
        torch.set_default_dtype(torch.float32)


def test_overwritten_arguments() -> None:
    def clears(m: Any, x: Tensor) -> Tensor:
        x += x.shape[0] if x.shape[1] == 3 else 0
        return forward(m, x)

    model = network()
    model.steps = clears
    x = images(2, 3, 16, 18)
    made = torchconv.fuse(model, x)
    for _ in range(4):
        expected = by_layers(made, x.clone())
        own = x.clone()
        assert_same(made(own), expected)
        assert torch.equal(own, x + 2)
        made.first.weight.mul_(2)
        made.second.weight.mul_(2)


@pytest.mark.parametrize("kind", ["keyword", "list", "subclass"])
def test_arguments_of_other_kinds(kind: str, runs: list[int]) -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, given: Any) -> Tensor:
            x: Tensor = given[0] if isinstance(given, list) else given
            result: Tensor = self.body(x)
            return result

    x: Any = images(2, 3, 16, 18)
    x = {"list": [x], "subclass": nn.Parameter(x, requires_grad=False)}.get(kind, x)
    model = Given().eval()
    made: Any = torchconv.fuse(model, x)
    for _ in range(4):
        got = made(given=x) if kind == "keyword" else made(x)
        torch.testing.assert_close(got, model(x))
    other = [images(2, 3, 18, 18)] if kind == "list" else images(2, 3, 18, 18)
    with pytest.raises(RuntimeError, match="recorded where"):
        made(given=other) if kind == "keyword" else made(other)


def test_what_kinds_do_not_tell_is_asked_in_every_call() -> None:
    def asks(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.first(x))
        if x.grad is None:
            y = y + m.second(y)
        return y + x.shape[0]

    x = images(2, 8, 6, 6)
    made = torchconv.fuse(
        Network(asks, first=nn.Conv2d(8, 8, 1), second=nn.Conv2d(8, 8, 1)).eval(), x
    )
    for _ in range(4):
        assert_same(made(x), by_layers(made, x))
    x.grad = torch.ones_like(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="recorded where"):
            made(x)


def test_parts_of_a_tensor() -> None:
    def asks(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.first(x))
        if x.storage_offset() == 0:
            y = y + m.second(y)
        return y + x.shape[0]

    x = images(4, 8, 6, 6)
    model = Network(asks, first=nn.Conv2d(8, 8, 1), second=nn.Conv2d(8, 8, 1)).eval()
    made = torchconv.fuse(model, x[:2])
    for _ in range(4):
        assert_same(made(x[:2]), by_layers(made, x[:2]))
    with pytest.raises(RuntimeError, match="recorded where"):
        made(x[2:])


def test_from_several_threads() -> None:
    x = images(2, 3, 16, 18)
    made = torchconv.fuse(network(), x)
    expected, failed = by_layers(made, x), []

    def call() -> None:
        with torch.no_grad():
            for size in (18, 22, 18, 26, 18):
                batch = x if size == 18 else images(1, 3, 16, size)
                if not torch.equal(made(batch), by_layers(made, batch)):
                    failed.append(size)
            if not torch.equal(made(x), expected):
                failed.append(0)

    workers = [threading.Thread(target=call) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed
