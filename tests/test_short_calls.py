"""The overloads for short calls: the operators' results, and only where nobody watches a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import torchconv.functional as F
from conftest import in_layout
from dispatch_log import DispatchLog
from operator_samples import FORMATS, OPERATORS, OPS, samples
from test_batch_norm import OPERATORS as NORM, samples as norm_samples
from torchconv import _dispatch, _load, nn
from torchconv._settings import OVERLOADED, Signature, settings_of


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def arguments_of(name: str, layout: str) -> Iterator[tuple[Any, ...]]:
    if name in OPERATORS:
        for arguments in samples(name, layout, torch.float32):
            yield tuple(detached(a) for a in arguments)
        return
    if name in NORM:
        for arguments in norm_samples(name, layout, torch.float32):
            yield tuple(detached(a) for a in arguments)
        return
    x = in_layout(torch.randn(2, 3, 7, 6), layout)
    y, indices = OPS.adaptive_max_pool2d(x, [3, 2])
    channels_last = layout == "channels_last"
    yield {
        "adaptive_avg_pool2d": (x, [3, 2]),
        "adaptive_avg_pool2d_backward": (y, [2, 3, 7, 6], channels_last),
        "adaptive_max_pool2d": (x, [3, 2]),
        "adaptive_max_pool2d_values": (x, [3, 2]),
        "adaptive_max_pool2d_backward": (y, indices, [2, 3, 7, 6], channels_last),
    }[name]


def tuples(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", OVERLOADED)
def test_overload(name: str, layout: str) -> None:
    """It computes what the operator does; where it has no kernel, it passes the call on."""
    op, short = getattr(OPS, name).default, getattr(OPS, name).settings
    signature = Signature(name)
    count = sum("Tensor" in str(a.type) for a in op._schema.arguments)
    for arguments in arguments_of(name, layout):
        n, m = signature.leading, len(signature.types)
        tensors = [*arguments[:n], *arguments[n + m :]]
        tensors += [None] * (count - len(tensors))
        settings = settings_of(signature.types, arguments[n : n + m])
        for got, expected in zip(
            tuples(short(*tensors, settings)), tuples(op(*arguments)), strict=True
        ):
            assert torch.equal(got.nan_to_num(), expected.nan_to_num())
            assert got.stride() == expected.stride()
            assert got.dtype is expected.dtype
        elsewhere = [t if t is None else t.to("meta") for t in tensors]
        for got, expected in zip(
            tuples(short(*elsewhere, settings)), tuples(op(*arguments)), strict=True
        ):
            assert got.is_meta
            assert got.shape == expected.shape
            assert got.stride() == expected.stride()


def test_settings_that_are_none() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    settings = settings_of(
        Signature("conv2d").types, ((1, 1), (0, 0, 0, 0), (1, 1), 1, "relu", False)
    )
    for wrong in (settings[:-1], settings[:1], settings[:0], settings.int(), settings[None]):
        with pytest.raises(RuntimeError, match="settings"):
            OPS.conv2d.settings(x, w, None, None, wrong)
    huge = settings.clone()
    huge[0] = 2**62
    with pytest.raises(RuntimeError, match="settings end too early"):
        OPS.conv2d.settings(x, w, None, None, huge)
    for values in (((1.0, 1),), (1,), ((1, None),)):
        with pytest.raises(TypeError):
            settings_of(("List[int]",), values)


def calls() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    x, w, b = torch.randn(2, 4, 8, 9), torch.randn(6, 4, 3, 3), torch.randn(6)
    residual = torch.randn(2, 6, 8, 9)
    layer = nn.Conv2d(4, 6, 3, padding=1).eval().requires_grad_(False)
    with torch.no_grad():
        layer(x)
    return {
        "conv2d": (lambda x, w, b: F.conv2d(x, w, b, (2, 1), "same", 2), [x, w, b]),
        "residual": (
            lambda x, w, r: F.conv2d(x, w, None, 1, 1, activation="relu", residual=r),
            [x, w, residual],
        ),
        "layer": (layer, [x]),
        "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), [x]),
        "min_pool2d": (lambda x: F.min_pool2d(x, 2, return_indices=True)[0], [x]),
        "avg_pool2d": (lambda x: F.avg_pool2d(x, (2, 3), divisor_override=5), [x]),
        "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 3), [x]),
        "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (3, None)), [x]),
    }


NAMES = tuple(calls())


class Subclass(Tensor):
    """A tensor that only says which functions it met."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def ours(log: DispatchLog) -> list[str]:
    """The project's operators that were called; an overload has a dot in its name."""
    return [name for name in log.names if name.startswith("torchconv::")]


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings with which Python called an overload."""
    met: list[Any] = []
    cls = _dispatch.Operator
    made = cls.settings

    class Watched:
        """In the place of the slot `settings`, which every short call but a layer's reads."""

        def __get__(self, op: Any, _: Any = None) -> Any:
            def settings(values: Any) -> Tensor:
                met.append(values)
                return made.__get__(op)(values)

            return settings

    monkeypatch.setattr(cls, "settings", Watched())
    return met


@pytest.mark.parametrize("name", NAMES)
def test_only_a_plain_call_is_short(name: str, short_calls: list[Any]) -> None:
    call, tensors = calls()[name]
    layer = name == "layer"  # it keeps its settings
    short_calls.clear()
    with torch.no_grad():
        expected = call(*tensors)
    assert len(short_calls) == 1 - layer
    short_calls.clear()

    def alike(got: Any) -> None:
        assert torch.equal(torch.as_tensor(got), expected)
        assert got.stride() == expected.stride()
        assert not short_calls

    with torch.no_grad():
        with DispatchLog() as log:
            alike(call(*tensors))
        assert [name.count(".") for name in ours(log)] == [0]
        with Functions() as functions:
            alike(call(*tensors))
        seen = [f for f in functions.seen if f.startswith("torchconv.")]
        assert len(seen) == 1
        assert "settings" not in seen[0]
        Subclass.seen.clear()
        alike(call(tensors[0].as_subclass(Subclass), *tensors[1:]).as_subclass(Tensor))
        assert not any("settings" in f for f in Subclass.seen)
        assert any(f.startswith("torchconv.") for f in Subclass.seen)
        alike(torch.func.vmap(call)(*(t[None] for t in tensors))[0])
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        alike(compiled(*tensors))
        if not layer:
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = call(*(torch.empty(t.shape) for t in tensors))
            assert fake.shape == expected.shape
            assert not short_calls
            on_meta = call(*(t.to("meta") for t in tensors))
            assert on_meta.is_meta
            assert on_meta.stride() == expected.stride()


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_call_is_short(
    name: str, short_calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, in Python; the gradients are those of the operators, watched."""
    monkeypatch.setattr(_load, "records", False)
    call, tensors = calls()[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    dy = torch.randn_like(y)
    short_calls.clear()
    got = torch.autograd.grad(y, leaves, dy)
    assert len(short_calls) == 1
    short_calls.clear()
    with DispatchLog() as log:
        expected = torch.autograd.grad(call(*leaves), leaves, dy)
    assert [name.count(".") for name in ours(log)] == [0, 0]
    assert not short_calls
    for short, whole in zip(got, expected, strict=True):
        assert torch.equal(short, whole)
        assert short.stride() == whole.stride()
    tangents = tuple(torch.randn_like(t) for t in tensors)
    _, tangent = torch.func.jvp(call, tuple(tensors), tangents)
    _, pulled = torch.func.vjp(call, *tensors)
    product = sum((g * t).sum() for g, t in zip(pulled(dy), tangents, strict=True))
    torch.testing.assert_close((tangent * dy).sum(), product, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_profiler_names_the_operator(name: str) -> None:
    call, tensors = calls()[name]
    with torch.no_grad(), torch.profiler.profile() as profile:
        call(*tensors)
    names = [event.key for event in profile.key_averages()]
    operator = name if "pool" in name else "conv2d"
    assert any(n.startswith(f"torchconv::{operator}") for n in names), names


def test_autocast() -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d(x, w).dtype is torch.bfloat16
        assert F.max_pool2d(x, 2).dtype is torch.float32


@pytest.mark.parametrize("grad", [False, True])
def test_errors_are_the_operators(grad: bool) -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    cases: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: F.conv2d(x, w, stride=0), lambda: OPS.conv2d(x, w, None, [0, 0])),
        (lambda: F.conv2d(x, w.double()), lambda: OPS.conv2d(x, w.double())),
        (lambda: F.conv2d(x, w.to_sparse()), lambda: OPS.conv2d(x, w.to_sparse())),
        (lambda: F.max_pool2d(x, 9), lambda: OPS.max_pool2d(x, [9, 9], [9, 9])),
        (lambda: F.avg_pool2d(x, 0), lambda: OPS.avg_pool2d(x, [0, 0], [0, 0])),
    ]
    with torch.set_grad_enabled(grad):
        for function, operator in cases:
            with pytest.raises(RuntimeError) as expected:
                operator()
            with pytest.raises(RuntimeError) as got:
                function()
            assert type(got.value) is type(expected.value)
            assert str(got.value).splitlines()[0] == str(expected.value).splitlines()[0]
    # What a cache of settings must tell apart although it is equal.
    assert F.max_pool2d(x, (1, 1)).shape == x.shape
    with pytest.raises(TypeError):
        F.max_pool2d(x, (True, 1))
    with pytest.raises(TypeError):
        F.conv2d(x, w, stride=(1.0, 1))


def test_pooling_without_a_gradient() -> None:
    """Where what follows has none to give, pooling's backward gives none, as PyTorch's."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> None:
            return None

    for pool in (F.max_pool2d, F.adaptive_max_pool2d, torch.nn.functional.max_pool2d):
        x = torch.randn(1, 2, 4, 4, requires_grad=True)
        Stop.apply(pool(x, 2)).sum().backward()
        assert x.grad is None
