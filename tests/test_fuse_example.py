"""torchconv.fuse and fuse_training of networks whose Python asks for sizes, by an example."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchconv
from conftest import relative_error


def unit(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


@dataclass
class Output(OrderedDict):
    """As transformers has them: a dict with attributes."""

    logits: Any = None
    features: Any = None


class Checked(nn.Module):
    """A branch that a size decides, defaults, and a result with attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = unit(3, 8), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor, labels: Tensor | None = None, features: Any = None) -> Any:
        if images.shape[1] != 3:
            raise ValueError("expected 3 channels")
        found = self.body(images)
        logits = self.head(found)
        if labels is not None:
            return F.cross_entropy(logits, labels)
        return Output(logits=logits, features=found if features is not None else None)


class Chunks(nn.Module):
    """Loops over chunks, as YOLO's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = unit(3, 8), unit(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        parts = list(self.first(images).chunk(2, 1))
        parts.append(parts[-1] + self.second(parts[-1]))
        return torch.cat(parts, 1)


class Ints(nn.Module):
    """Sizes that become ints of Python, and ranges of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = unit(3, 8), unit(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        size = int(math.ceil(images.shape[-1] / 4) * 4)
        x = self.first(F.interpolate(images, size=(size, size)))
        for _ in range(len(x.shape) - 2):
            x = self.second(x)
        return x


class Halves(nn.Conv2d):
    """A layer with a result that may be None."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


class MaybeNone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.halves, self.body = Halves(3, 4, 3), unit(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        high, low = self.halves(images)
        return self.body(high) if low is None else self.body(high + low)


def result_of(model: Callable[..., Any], *inputs: Any) -> Tensor:
    out = model(*inputs)
    tensor: Tensor = out if isinstance(out, Tensor) else out.logits
    return tensor


@pytest.mark.parametrize("kind", [Checked, Chunks, Ints, MaybeNone])
def test_inference(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    images = torch.randn(2, 3, 13, 13)
    before = copy.deepcopy(model.state_dict())
    fused = torchconv.fuse(model, images)
    assert not [layer for layer in fused.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for batch in (images, images[:1], torch.randn(5, 3, 13, 13)):
            for _ in range(3):  # the chain's plan too
                assert relative_error(result_of(fused, batch), result_of(model, batch)) < 1e-6
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(result_of(other, images), result_of(fused, images))


@pytest.mark.parametrize("kind", [Checked, Chunks, Ints, MaybeNone])
def test_training(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().double().train()
    images = torch.randn(2, 3, 13, 13, dtype=torch.double)
    expected_model = copy.deepcopy(model)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    fused = torchconv.fuse_training(model, images)
    # The statistics, which it shares, have not moved.
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    expected, got = result_of(expected_model, images), result_of(fused, images)
    assert relative_error(got, expected) < 1e-12
    expected.square().sum().backward()
    got.square().sum().backward()
    gradients = dict(fused.named_parameters())
    for name, parameter in expected_model.named_parameters():
        assert parameter.grad is not None
        found = gradients[name].grad
        assert found is not None
        assert torch.allclose(found, parameter.grad, rtol=1e-9, atol=1e-10), name
    for name, value in expected_model.named_buffers():
        assert torch.allclose(dict(fused.named_buffers())[name], value)


def test_other_way_raises() -> None:
    checked = torchconv.fuse(Checked().eval(), torch.randn(1, 3, 8, 8))
    with torch.no_grad(), pytest.raises(RuntimeError, match="recorded where"):
        checked(torch.randn(1, 4, 8, 8))
    sizes = torchconv.fuse(Ints().eval(), torch.randn(1, 3, 8, 8))
    with torch.no_grad(), pytest.raises(RuntimeError, match="gave 8, which now gives 12"):
        sizes(torch.randn(1, 3, 9, 9))


def test_result_with_attributes() -> None:
    model, images = Checked().eval(), torch.randn(1, 3, 8, 8)
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    plain = torchconv.fuse(model, images)
    with_features = torchconv.fuse(model, images, None, True)
    with_loss = torchconv.fuse(model, images, labels)
    with torch.no_grad():
        assert isinstance(plain(images), Output)
        assert plain(images).features is None
        found = with_features(images, None, True)
        assert relative_error(found.features, model(images, features=True).features) < 1e-6
        assert relative_error(with_loss(images, labels), model(images, labels)) < 1e-6
    with torch.no_grad(), pytest.raises(TypeError):
        plain(images, labels)


def test_errors() -> None:
    images = torch.randn(1, 3, 8, 8)
    for model in (Checked(), Chunks(), Ints()):
        with pytest.raises((TypeError, torch.fx.proxy.TraceError), match="example of the inputs"):
            torchconv.fuse(model.eval())
    with pytest.raises(TypeError, match="too many positional arguments"):
        torchconv.fuse(Chunks().eval(), images, images)

    class Data(Chunks):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images if images.sum() > 0 else -images)

    with pytest.raises(torch.fx.proxy.TraceError, match="from the example's sizes alone"):
        torchconv.fuse(Data().eval(), images)

    class Squeezed(Chunks):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.mean((2, 3), keepdim=True))

    with pytest.raises(torch.fx.proxy.TraceError, match="Expected more than 1 value per channel"):
        torchconv.fuse_training(Squeezed().train(), images)  # no statistics of one value
    with pytest.raises(ValueError, match="expected 3 channels"):
        torchconv.fuse(Checked().eval(), torch.randn(1, 5, 8, 8))


class Made(nn.Module):
    """Overwrites a tensor that it makes, and returns another one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = unit(3, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(1, 4, 1, 1)
        total += self.body(images).mean((0, 2, 3), keepdim=True)
        return total, torch.ones(2)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("by_example", [False, True])
def test_each_call_makes_its_own_tensors(train: bool, by_example: bool) -> None:
    model = Made().train(train)
    images = torch.randn(2, 3, 6, 6)
    fuse = torchconv.fuse_training if train else torchconv.fuse
    fused = fuse(copy.deepcopy(model), *((images,) if by_example else ()))
    assert not [name for name in fused.state_dict() if "constant" in name]
    first, ones = fused(images)
    kept = first.detach().clone()
    ones.zero_()
    for batch in (images, torch.randn(2, 3, 6, 6), images):
        got, expected = fused(batch), model(batch)
        assert relative_error(got[0], expected[0]) < 1e-5
        assert torch.equal(got[1], expected[1])
        got[0].sum().backward()  # of this call alone
    assert torch.equal(first, kept)


class Changed(Made):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros(()))
        self.plain = torch.zeros(1)


def _moving(self: Changed, images: Tensor) -> Tensor:
    self.mean.mul_(0.9).add_(self.body(images).detach().mean((0, 2, 3)))
    return self.mean


def _counting(self: Changed, images: Tensor) -> Tensor:
    self.calls += 1
    return self.body(images) * self.calls


def _view(self: Changed, images: Tensor) -> Tensor:
    self.plain[0] = 2
    return self.body(images) * self.plain


def _changed_between(self: Changed, images: Tensor) -> Tensor:
    steps = torch.arange(6.0)
    found = self.body(images) + steps
    steps.mul_(2)
    return found * steps


def _by_view(self: Changed, images: Tensor) -> Tensor:
    total = torch.zeros(2, 4)
    total[0].add_(self.body(images).mean((0, 2, 3)))
    return self.body(images) + total.sum(0).reshape(1, 4, 1, 1) + total[0].reshape(1, 4, 1, 1)


def _by_view_kept(self: Changed, images: Tensor) -> Tensor:
    total = torch.zeros(2, 4)
    first = total[0]
    first += self.body(images).mean((0, 2, 3))
    return self.body(images).mean((2, 3)) + total


def _read_after(self: Changed, images: Tensor) -> Tensor:
    total = torch.zeros(4)
    total.add_(self.body(images).mean((0, 2, 3)))
    return self.body(images) * total.sum()


def _read_after_part(self: Changed, images: Tensor) -> Tensor:
    total = torch.zeros(4)
    total[1:3] = self.body(images).mean((0, 2, 3))[1:3]
    return self.body(images) * (2 * total).reshape(1, 4, 1, 1)


def _by_view_of_held(self: Changed, images: Tensor) -> Tensor:
    self.mean[:2].copy_(self.body(images).detach().mean((0, 2, 3))[:2])
    return self.body(images)


def _noise(self: Changed, images: Tensor) -> Tensor:
    return self.body(images) * torch.rand(1)


def _order(self: Changed, images: Tensor) -> Tensor:
    return self.body(images)[:, torch.randperm(4)]


def _replaced(self: Changed, images: Tensor) -> Tensor:
    self.plain = self.plain + self.body(images).detach().mean()
    return self.body(images) * self.plain


@pytest.mark.parametrize(
    "forward",
    [
        _moving,
        _replaced,
        _counting,
        _view,
        _changed_between,
        _by_view,
        _by_view_kept,
        _by_view_of_held,
        _read_after,
        _read_after_part,
        _noise,
        _order,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("fuse", [torchconv.fuse, torchconv.fuse_training])
def test_what_each_call_would_do_again(
    forward: Callable[..., Tensor], fuse: Callable[..., nn.Module]
) -> None:
    model = type("Model", (Changed,), {"forward": forward})()
    model.train(fuse is torchconv.fuse_training)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 6, 6)
    for example in ((), (images,)):
        with pytest.raises(torch.fx.proxy.TraceError, match="each call would"):
            fuse(model, *example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_gradients_in_a_part() -> None:
    class Part(Made):
        def forward(self, images: Tensor) -> Any:
            found = self.body(images)
            with torch.no_grad():
                weight = found.mean()
            return found * weight

    images = torch.randn(2, 3, 6, 6)
    with pytest.raises(torch.fx.proxy.TraceError, match="gradients"):
        torchconv.fuse_training(Part().train(), images)
    model = Part().eval()
    assert relative_error(torchconv.fuse(model, images)(images), model(images)) < 1e-6


def test_none_of_any_kind_and_writing() -> None:
    class Asks(Made):
        def forward(self, images: Tensor, more: Any) -> Any:
            found = self.body(images)
            if more.get("mask") is not None:
                found = found * 2
            if images.grad is None:
                found = found * 3
            return found + more["scale"] if str(images.dtype) == "torch.float32" else found

    model, images = Asks().eval(), torch.randn(2, 3, 6, 6)
    more = {"scale": torch.ones(1), "mask": None}
    fused = torchconv.fuse(model, images, more)
    with torch.no_grad():
        assert relative_error(fused(images, more), model(images, more)) < 1e-6
        for other in ({**more, "mask": torch.ones(1)}, {**more, "mask": 1}):
            with pytest.raises(RuntimeError, match="recorded where"):
                fused(images, other)


class Holds(Made):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("saved", torch.ones(1, 8, 1, 1))
        self.register_buffer("unsaved", torch.ones(1, 4, 1, 1), persistent=False)
        self.plain, self.several = torch.ones(1), [torch.ones(1), torch.ones(1)]

    def forward(self, images: Tensor) -> Any:
        held = self.plain + self.several[0] * self.unsaved
        first = (self.body(images) + self.saved[:, :4]) * self.unsaved
        return first + self.plain * held + (images.mean() * self.saved).mean() * self.several[1]


@pytest.mark.parametrize("by_example", [False, True])
def test_checkpoint_is_the_models(by_example: bool) -> None:
    images = torch.randn(2, 3, 6, 6)
    model = Holds().train()
    fused = torchconv.fuse_training(model, *((images,) if by_example else ()))
    assert fused.state_dict().keys() == model.state_dict().keys()
    other = Holds().train()
    nn.init.normal_(other.saved)
    fused.load_state_dict(other.state_dict())
    assert relative_error(fused(images), other(images)) < 1e-5


def test_buffers_that_calls_change_are_the_models() -> None:
    class Adds(Changed):
        def forward(self, images: Tensor) -> Tensor:
            found = self.body(images)
            self.mean.add_(found.detach().mean((0, 2, 3)))
            return found

    images = torch.randn(2, 3, 6, 6)
    model = Adds().train()
    other = copy.deepcopy(model)
    fused = torchconv.fuse_training(model, images)
    for _ in range(2):
        assert relative_error(fused(images), other(images)) < 1e-5
        assert relative_error(model.mean, other.mean) < 1e-5


def test_sizes_in_sets_and_dicts() -> None:
    class Looks(Made):
        def forward(self, images: Tensor) -> Tensor:
            found = self.body(images)
            if found.shape[1] in {4, 8}:
                found = found * 2
            if found.shape[-1] in {6: 1.0} and images.dtype in {torch.float32}:
                found = found * {6: 3.0}[found.shape[-1]]
            found = found * round(found.shape[2] / 4) * round(found.shape[3] / 4, 1)
            return found + {"06": 5.0}[f"{found.shape[2]:02d}"]

    model, images = Looks().eval(), torch.randn(2, 3, 6, 6)
    fused = torchconv.fuse(model, images)
    with torch.no_grad():
        assert relative_error(fused(images), model(images)) < 1e-6
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(other(images), fused(images))
        with pytest.raises(RuntimeError, match="recorded where"):
            fused(torch.randn(2, 3, 6, 7))


TENSORS_OF_SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.zeros(x.shape[0], 4, 1, 1),
    "ones of a tuple": lambda x: torch.ones((x.size(0), 4, 1, 1), dtype=x.dtype),
    "empty": lambda x: torch.empty(x.size(0), 1, 1, 1).fill_(2),
    "full": lambda x: torch.full([x.size(0), 1, 1, 1], 3.0),
    "arange": lambda x: torch.arange(0, x.size(-1)) / 2,
    "linspace": lambda x: torch.linspace(-1, 1, steps=x.size(-1)),
    "eye": lambda x: torch.eye(x.size(-2), x.size(-1)),
    "tensor": lambda x: torch.tensor([x.size(0), 1.0]).sum(),
    "as_tensor": lambda x: torch.as_tensor(x.size(0) * 2),
    "rand": lambda x: torch.rand(x.size(0), 4, 1, 1) * 0,
    "expand": lambda x: torch.ones(1, 4, 1, 1).expand(x.shape[0], -1, -1, -1),
    "new_tensor": lambda x: torch.ones(1).new_tensor([x.size(0), 1.0]).sum(),
    "divmod": lambda x: torch.full([1], divmod(x.shape[0], 2)[0]) + divmod(7, x.shape[0])[1],
}


@pytest.mark.parametrize("kind", TENSORS_OF_SIZES)
@pytest.mark.parametrize("by_example", [False, True])
def test_tensors_of_sizes(kind: str, by_example: bool) -> None:
    class Adds(Made):
        def forward(self, images: Tensor) -> Any:
            return self.body(images) + TENSORS_OF_SIZES[kind](images)

    factory = torch.zeros
    model, images = Adds().eval(), torch.randn(2, 3, 6, 7)
    fused = torchconv.fuse(model, *((images,) if by_example else ()))
    assert torch.zeros is factory
    assert not {"expand", "new_tensor"} & vars(torch.Tensor).keys()
    with torch.no_grad():
        for batch in (images, torch.randn(3, 3, 6, 7), torch.randn(3, 3, 9, 8)):
            assert relative_error(fused(batch), model(batch)) < 1e-6


def test_methods_of_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.Tensor.expand

    def expand(tensor: Tensor, *size: Any) -> Tensor:
        return own(tensor, *size)

    monkeypatch.setattr(torch.Tensor, "expand", expand)
    torchconv.fuse(Made().eval())
    assert torch.Tensor.expand is expand


def test_recorded_by_several_threads() -> None:
    """What is recorded with stands in the place of PyTorch's own meanwhile."""

    class Adds(Made):
        def forward(self, images: Tensor) -> Any:
            return self.body(images) + torch.zeros(images.shape[-1])

    own = (torch.zeros, nn.Module.__call__, nn.Module.__getattr__)
    models, images = [Adds().eval() for _ in range(16)], torch.randn(2, 3, 6, 7)
    with ThreadPoolExecutor(4) as pool:
        fused = list(pool.map(torchconv.fuse, models))
    assert own == (torch.zeros, nn.Module.__call__, nn.Module.__getattr__)
    for made, model in zip(fused, models, strict=True):
        assert relative_error(made(images), model(images)) < 1e-6


@pytest.mark.parametrize("by_example", [False, True])
def test_types_that_python_asks_for(by_example: bool) -> None:
    class Asks(Made):
        def forward(self, images: Tensor) -> Any:
            found = self.body(images)
            if isinstance(found, (tuple, list)) or isinstance(found, nn.Parameter):
                found = found[0]
            if isinstance(images.shape[0] * 2, int) and isinstance(images.size(), torch.Size):
                found = found * 2
            if isinstance(images.size(2), int) and isinstance(images.shape[1:], tuple):
                found = found * 3
            if isinstance(images.ndim + 1, Tensor) or isinstance(images.shape[3], float):
                found = found * 5
            if isinstance(images.shape[2] / 2, float) and isinstance(images.dtype, torch.dtype):
                found = found * 7
            shape = images.shape
            if isinstance(shape + (1,), int) or isinstance(shape[:2] * 2, int):
                found = found * 11
            if isinstance(shape[0] * 0.5, int) or not isinstance(shape[0] == 2, bool):
                found = found * 13
            return found

    model, images = Asks().eval(), torch.randn(2, 3, 6, 6)
    fused = torchconv.fuse(model, *((images,) if by_example else ()))
    with torch.no_grad():
        assert relative_error(fused(images), model(images)) < 1e-6


def test_types_of_what_the_example_holds() -> None:
    class Several(Made):
        def forward(self, images: Any) -> Any:
            if isinstance(images, dict):
                images = images["images"]
            if isinstance(images, (tuple, list)):
                images = torch.cat(list(images))
            return self.body(images)

    model, images = Several().eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for given in (images, [images, images], {"images": (images, images)}):
            fused = torchconv.fuse(model, given)
            assert relative_error(fused(given), model(given)) < 1e-6
            if given is not images:
                with pytest.raises(RuntimeError, match="recorded where"):
                    fused(images)


def test_sizes_in_sets_need_an_example() -> None:
    class Looks(Made):
        def forward(self, images: Tensor) -> Any:
            return self.body(images) if images.shape[1] in {3} else images

    with pytest.raises(TypeError, match="an example of the inputs may tell it"):
        torchconv.fuse(Looks().eval())


@pytest.mark.parametrize("asked", [lambda x: f"{x.shape[1]}", lambda x: str(x.size(1))])
def test_sizes_in_texts_need_an_example(asked: Callable[[Tensor], str]) -> None:
    class Looks(Made):
        def forward(self, images: Tensor) -> Any:
            return self.body(images) * (2.0 if asked(images) == "3" else 1.0)

    model, images = Looks().eval(), torch.randn(2, 3, 6, 6)
    with pytest.raises(TypeError, match="an example of the inputs may tell it"):
        torchconv.fuse(model)
    with torch.no_grad():
        assert relative_error(torchconv.fuse(model, images)(images), model(images)) < 1e-6


def test_gradients_of_an_input_need_an_example() -> None:
    class Looks(Made):
        def forward(self, images: Tensor) -> Any:
            return self.body(images) * (2.0 if images.grad is None else 1.0)

    model, images = Looks().eval(), torch.randn(2, 3, 6, 6)
    with pytest.raises(torch.fx.proxy.TraceError, match="an example of the inputs may tell it"):
        torchconv.fuse(model)
    with torch.no_grad():
        assert relative_error(torchconv.fuse(model, images)(images), model(images)) < 1e-6


@pytest.mark.parametrize("by_example", [False, True])
def test_tensor_kept_for_the_next_call(by_example: bool) -> None:
    class Grid(Made):
        """As detection heads keep the places of their cells."""

        def __init__(self) -> None:
            super().__init__()
            self.cells = torch.zeros(1)

        def forward(self, images: Tensor) -> Any:
            found = self.body(images)
            self.cells = torch.arange(found.shape[-1], dtype=found.dtype)
            return found + self.cells

    model, images = Grid().eval(), torch.randn(2, 3, 6, 6)
    fused = torchconv.fuse(model, *((images,) if by_example else ()))
    with torch.no_grad():
        for batch in (images, torch.randn(1, 3, 5, 9)):
            assert relative_error(fused(batch), model(batch)) < 1e-6


class Written(nn.Module):
    """Writes into a part of what layers return, and of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = unit(3, 4), nn.Conv2d(4, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.head(self.body(images))
        cells = torch.zeros(found.shape[0], 4, 3, 3)
        cells[:, :, 1] = found[:, :, 0, :3]
        cells[..., 0] *= 2
        found[:, 1:3] = found[:, 0:1].sigmoid()
        found[0, 0, 0, 0] = 7
        return F.relu(found), cells


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_written_parts(by_example: bool, train: bool) -> None:
    torch.manual_seed(0)
    model, images = Written().train(train), torch.randn(2, 3, 6, 6)
    fuse = torchconv.fuse_training if train else torchconv.fuse
    fused = fuse(copy.deepcopy(model), *((images,) if by_example else ()))
    for batch in (images, torch.randn(3, 3, 7, 5), images):
        got, expected = fused(batch), model(batch)
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < 1e-6
        sum(part.square().sum() for part in got).backward()
        sum(part.square().sum() for part in expected).backward()
    if train:
        assert relative_error(fused.head.weight.grad, model.head.weight.grad) < 1e-5
    with torch.no_grad():
        for _ in range(3):
            for one, other in zip(fused(images), model(images), strict=True):
                assert relative_error(one, other) < 1e-6
