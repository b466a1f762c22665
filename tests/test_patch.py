"""`with torchconv.patch():` what runs through torchconv inside, and what goes on to PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import torchconv
from dispatch_log import DispatchLog


def x() -> Tensor:
    return torch.linspace(-2, 3, 2 * 4 * 7 * 8).sin().reshape(2, 4, 7, 8)


def w() -> Tensor:
    return torch.linspace(-3, 2, 6 * 2 * 9).cos().reshape(6, 2, 3, 3)


def b() -> Tensor:
    return torch.arange(6.0)


def run(call: Callable[[], Any]) -> tuple[Any, DispatchLog]:
    """call's result inside the patch, and the operators that it reached."""
    with torchconv.patch(), DispatchLog() as log:
        return call(), log


def assert_equal(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected)


CONVOLUTIONS: dict[str, Callable[[], Any]] = {
    "F": lambda: F.conv2d(x(), w(), groups=2),
    "torch": lambda: torch.conv2d(x(), w(), None, 1, 0, 1, 2),
    "positional": lambda: F.conv2d(x(), w(), b(), (2, 1), (1, 2), 1, 2),
    "keywords": lambda: F.conv2d(
        weight=w(), input=x(), groups=2, bias=b(), dilation=[2, 1], padding=[1], stride=2
    ),
    "same": lambda: F.conv2d(x(), w(), None, 1, "same", 2, 2),
    "same keyword": lambda: torch.conv2d(x(), w(), padding="same", groups=2),
    "valid": lambda: F.conv2d(x(), w(), b(), 2, "valid", groups=2),
    "unbatched": lambda: F.conv2d(x()[0], w(), groups=2),
    "size": lambda: F.conv2d(x(), w(), stride=torch.Size([2, 1]), groups=2),
    "parameter": lambda: F.conv2d(x(), nn.Parameter(w()), nn.Parameter(b()), groups=2),
    "double": lambda: F.conv2d(x().double(), w().double(), b().double(), groups=2),
    "module": lambda: _seeded(nn.Conv2d, 4, 6, 3, padding=1)(x()),
    "module, circular": lambda: _seeded(nn.Conv2d, 4, 6, 3, padding_mode="circular")(x()),
    "subclass": lambda: _seeded(Scaled, 4, 6, 3)(x()),
}  # fmt: skip

MAX_POOLINGS: dict[str, Callable[[], Any]] = {
    "F": lambda: F.max_pool2d(x(), 2),
    "positional": lambda: F.max_pool2d(x(), 3, 2, 1, 1, True),
    "positional indices": lambda: F.max_pool2d(x(), 3, 2, 1, 1, True, True),
    "keywords": lambda: F.max_pool2d(kernel_size=(3, 2), input=x(), dilation=2, padding=(1, 0)),
    "keyword indices": lambda: F.max_pool2d(x(), 2, return_indices=True),
    "no indices": lambda: F.max_pool2d(x(), 2, return_indices=False),
    "with_indices": lambda: F.max_pool2d_with_indices(x(), 2, 1),
    "with_indices, flag": lambda: F.max_pool2d_with_indices(x(), 2, return_indices=False),
    "torch": lambda: torch.max_pool2d(x(), 2),
    "torch, empty stride": lambda: torch.max_pool2d(x(), [3], stride=[], padding=1),
    "torch, keywords": lambda: torch.max_pool2d(input=x(), kernel_size=[2, 3], ceil_mode=True),
    "C": lambda: torch._C._nn.max_pool2d_with_indices(x(), 2, ceil_mode=True),
    "unbatched": lambda: F.max_pool2d(x()[0], 2),
    "integers": lambda: F.max_pool2d((9 * x()).int(), 2),
    "module": lambda: nn.MaxPool2d(3, 2, 1)(x()),
    "module, indices": lambda: nn.MaxPool2d(3, 2, 1, return_indices=True)(x()),
}

AVERAGE_POOLINGS: dict[str, Callable[[], Any]] = {
    "F": lambda: F.avg_pool2d(x(), 2),
    "positional": lambda: F.avg_pool2d(x(), 3, 2, 1, True, False, 5),
    "keywords": lambda: F.avg_pool2d(kernel_size=3, input=x(), count_include_pad=False, padding=1),
    "empty stride": lambda: F.avg_pool2d(x(), (3,), []),
    "no stride": lambda: F.avg_pool2d(x(), 3, None, divisor_override=2),
    "no out": lambda: F.avg_pool2d(x(), 3, out=None),
    "C": lambda: torch._C._nn.avg_pool2d(x(), 2),
    "unbatched": lambda: F.avg_pool2d(x()[0], 2),
    "module": lambda: nn.AvgPool2d(3, 2, 1)(x()),
}  # fmt: skip


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, 2 * self.weight, self.bias)


def _seeded(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(3)
    module: nn.Module = cls(*args, **kwargs)
    return module.requires_grad_(False)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("operator", "call"),
    [
        pytest.param(operator, call, id=f"{operator}, {name}")
        for operator, table in (
            ("conv2d", CONVOLUTIONS),
            ("max_pool2d", MAX_POOLINGS),
            ("avg_pool2d", AVERAGE_POOLINGS),
        )
        for name, call in table.items()
    ],
)
def test_every_spelling(operator: str, call: Callable[[], Any]) -> None:
    result, log = run(call)
    assert log.count(operator) == 1
    assert not log.from_torch()
    assert_equal(result, call())


class Other(torch.Tensor):
    pass


def _statistics() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 4), torch.linspace(1, 2, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.batch_norm(x, *_statistics()),
        lambda x: F.batch_norm(x, None, None, *_statistics(), True, 0.3, 0.1),
        lambda x: F.batch_norm(running_mean=None, running_var=None, input=x, training=True),
        lambda x: torch.batch_norm(x, *_statistics(), None, None, True, 0.1, 1e-5, False),
        lambda x: nn.BatchNorm2d(4)(x),
    ],
)
def test_batch_norm(call: Callable[[Tensor], Tensor]) -> None:
    input = x().requires_grad_()
    with torchconv.patch():
        result = call(input)
    assert "BatchNorm2d" in result.grad_fn.name()
    assert_equal(result, call(input))


def test_batch_norm_of_the_rest_is_pytorchs() -> None:
    for input in (x()[0], x().as_subclass(Other)):
        with torchconv.patch():
            result = F.batch_norm(input.requires_grad_(), None, None, training=True)
        assert type(result) is type(input)
        assert "BatchNorm2d" not in result.grad_fn.name()
    for call in (
        lambda: F.batch_norm(x(), None, None),
        lambda: F.batch_norm(None, None, None, training=True),  # type: ignore[arg-type]
        lambda: F.batch_norm(x(), None, None, training=True, activation="relu"),  # type: ignore[call-arg]
        lambda: F.batch_norm(x()[:1, :, :1, :1], None, None, training=True),
    ):
        with pytest.raises(Exception) as expected:
            call()
        with torchconv.patch(), pytest.raises(expected.type):
            call()


@pytest.mark.parametrize("size, eps", [((1, 4, 1, 1), 1e-5), ((1, 4), 1e-5), ((3, 4, 2, 2), 0.0)])
def test_what_only_the_function_of_nn_refuses(size: tuple[int, ...], eps: float) -> None:
    def call() -> Tensor:
        return torch.batch_norm(torch.ones(size), None, None, None, None, True, 0.1, eps, False)

    expected = call()
    with torchconv.patch():
        torch.testing.assert_close(call(), expected, equal_nan=True)


def _out_average() -> Tensor:
    out = torch.empty(2, 4, 3, 4)
    assert F.avg_pool2d(x(), 2, out=out) is out
    return out


def _out_maximum() -> Tensor:
    out, indices = torch.empty(2, 4, 3, 4), torch.empty(2, 4, 3, 4, dtype=torch.int64)
    torch._C._nn.max_pool2d_with_indices(x(), 2, out=(out, indices))
    return out + indices


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "call",
    [
        lambda: F.conv2d(x().cfloat(), w().cfloat(), groups=2),
        lambda: F.conv2d(x().long(), w().long(), groups=2),
        lambda: F.conv2d(x().as_subclass(Other), w(), groups=2),
        lambda: F.conv2d(x(), w().as_subclass(Other), groups=2),
        lambda: F.max_pool2d(x().as_subclass(Other), 2),
        lambda: F.max_pool2d(x().as_subclass(Other), 2, return_indices=True),
        lambda: F.avg_pool2d(x().as_subclass(Other), 2),
        lambda: F.avg_pool2d(x().long(), 2),
        lambda: F.max_pool2d(torch.quantize_per_tensor(x(), 0.1, 3, torch.quint8), 2),
        lambda: F.avg_pool2d(torch.quantize_per_tensor(x(), 0.1, 3, torch.quint8), 2),
        lambda: F.conv2d(x().to_mkldnn(), w().to_mkldnn(), groups=2).to_dense(),
        lambda: F.max_pool2d(x().to_mkldnn(), 2).to_dense(),
        lambda: F.lp_pool2d(x(), 2.0, 2),
        lambda: F.conv1d(x()[0], torch.ones(2, 7, 3)),
        lambda: F.conv_transpose2d(x(), torch.ones(4, 2, 3, 3)),
        lambda: F.adaptive_avg_pool2d(x().as_subclass(Other), 2),
        lambda: F.adaptive_max_pool2d(x().as_subclass(Other), 2),
        lambda: F.adaptive_avg_pool2d(x()[0, 0], 1),
        lambda: F.adaptive_avg_pool3d(x(), 2),
        lambda: F.linear(x(), torch.ones(2, 8)),
        lambda: torch.ops.aten.conv2d(x(), w(), groups=2),
        _out_average,
        _out_maximum,
    ],
)
def test_the_rest_is_pytorchs(call: Callable[[], Any]) -> None:
    result, log = run(call)
    assert not [n for n in log.names if n.startswith("torchconv")]
    expected = call()
    assert type(result) is type(expected)
    for a, e in zip(
        *((r if isinstance(r, tuple) else (r,)) for r in (result, expected)), strict=True
    ):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.conv2d(x()),  # type: ignore[call-arg]
        lambda: F.conv2d(x(), w(), groups=2, kernel=3),  # type: ignore[call-arg]
        lambda: F.conv2d(x(), w(), activation="relu"),  # type: ignore[call-arg]
        lambda: F.conv2d(x(), None),  # type: ignore[arg-type]
        lambda: F.conv2d(x(), w()),
        lambda: F.conv2d(x(), w().double(), groups=2),
        lambda: F.conv2d(x(), w(), stride=0, groups=2),
        lambda: F.conv2d(x(), w(), stride=1.5, groups=2),  # type: ignore[arg-type]
        lambda: F.conv2d(x(), w(), padding="full", groups=2),
        lambda: F.conv2d(x().tolist(), w(), groups=2),
        lambda: F.conv2d(x().to_sparse(), w(), groups=2),
        lambda: F.max_pool2d(x()),  # type: ignore[call-arg]
        lambda: F.max_pool2d(x(), 0),
        lambda: F.max_pool2d(x(), 2, padding=2),
        lambda: F.max_pool2d(x().cfloat(), 2),
        lambda: F.max_pool2d(None, 2),
        lambda: torch.max_pool2d(x(), 2, return_indices=True),  # type: ignore[call-arg]
        lambda: F.avg_pool2d(x(), 2, divisor_override=0),
        lambda: F.avg_pool2d(x(), 2, stride="1"),  # type: ignore[arg-type]
        lambda: F.avg_pool2d(x()[0, 0], 2),
    ],
)
def test_refuses_what_pytorch_refuses(call: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as expected:
        call()
    with torchconv.patch(), pytest.raises(expected.type):
        call()


# --- the mode ------------------------------------------------------------------------------------


def test_ends_with_the_block_even_by_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), torchconv.patch():
        _ = 1 / 0
    with DispatchLog() as log:
        F.conv2d(x(), w(), groups=2)
    assert not log.count("conv2d")


def test_nests_and_reenters() -> None:
    patch = torchconv.patch()
    with DispatchLog() as log, patch as entered:
        assert entered is patch
        F.max_pool2d(x(), 2)
        with torchconv.patch(), patch:
            F.max_pool2d(x(), 2)
            F.conv2d(x().long(), w().long(), groups=2)
        F.max_pool2d(x(), 2)
    with patch, log:
        F.max_pool2d(x(), 2)
    assert log.count("max_pool2d") == 4
    assert log.names.count("aten::conv2d") + log.names.count("aten::convolution") == 1


def test_works_with_other_modes() -> None:
    class Seen(TorchFunctionMode):
        functions: list[Any] = []

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.functions.append(func)
            return func(*args, **(kwargs or {}))

    with torchconv.patch(), Seen(), DispatchLog() as log:
        F.conv2d(x(), w(), groups=2)
    assert torch.conv2d in Seen.functions and log.count("conv2d") == 1
    with torch.device("meta"), torchconv.patch():
        assert F.conv2d(torch.empty(2, 4, 7, 8), torch.empty(6, 2, 3, 3), groups=2).shape == (
            2,
            6,
            5,
            6,
        )


def test_holds_for_one_thread() -> None:
    logs: list[DispatchLog] = []

    def elsewhere() -> None:
        with DispatchLog() as log:
            F.avg_pool2d(x(), 2)
        logs.append(log)

    with torchconv.patch():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert not logs[0].count("avg_pool2d")


def test_direct_calls_are_not_disturbed() -> None:
    plain = torchconv.functional.conv2d(x(), w(), groups=2, activation="gelu", padding="same")
    with torchconv.patch(), torchconv.patch():
        assert torch.equal(
            torchconv.functional.conv2d(x(), w(), groups=2, activation="gelu", padding="same"),
            plain,
        )


class Functional(nn.Module):
    """A model without a single layer that `convert` could swap."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(8))
        self.second = Scaled(8, 4, 3)

    def forward(self, input: Tensor) -> Tensor:
        y = F.relu(F.conv2d(input, self.first, self.bias, stride=2, padding=1))
        y, indices = F.max_pool2d(y, 2, return_indices=True)
        y = F.max_unpool2d(y, indices, 2)
        return F.avg_pool2d(F.max_pool2d(self.second(y), kernel_size=3, stride=2), 2)


def step(
    model: nn.Module, image: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """The output and the parameters' gradients, with the model called by `forward`."""
    model.zero_grad()
    y = (forward or model)(image)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_functional_model_trains() -> None:
    model, image = Functional().double(), torch.randn(2, 3, 32, 32, dtype=torch.double)
    expected = step(model, image)
    with torchconv.patch(), DispatchLog() as log:
        actual = step(model, image)
    assert [log.count(n) for n in ("conv2d", "max_pool2d", "avg_pool2d")] == [2, 2, 1]
    assert not log.from_torch()
    assert len(actual) == len(expected) == 5
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_backward_outside_the_block() -> None:
    image = x().requires_grad_()
    with torchconv.patch():
        y = F.conv2d(image, w(), groups=2)
    with DispatchLog() as log:
        y.sum().backward()
    assert "torchconv::conv2d_backward" in log.names and not log.from_torch()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_code(use_reentrant: bool) -> None:
    """The recomputation sees the patch if that is part of what is checkpointed."""
    model, image = Functional().double(), torch.randn(2, 3, 32, 32, dtype=torch.double)

    def block(image: Tensor) -> Tensor:
        with torchconv.patch():
            y: Tensor = model(image)
        return y

    expected = step(model, image)
    image.requires_grad_()
    with DispatchLog() as log:
        actual = step(model, image, lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert log.count("conv2d") == 4 and not log.from_torch()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("inside", [True, False])
def test_compiles_in_one_graph(inside: bool) -> None:
    """The block within the compiled function, and the compiled function within the block."""
    model, image = Functional(), torch.randn(2, 3, 32, 32)
    expected = step(model, image)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def patched(image: Tensor) -> Tensor:
        with torchconv.patch():
            y: Tensor = model(image)
        return y

    torch._dynamo.reset()
    compiled = torch.compile(patched if inside else model, fullgraph=True, backend=backend)
    model.zero_grad()
    if inside:
        y = compiled(image)
    else:
        with torchconv.patch():
            y = compiled(image)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    for a, e in zip([y.detach(), *gradients], expected, strict=True):
        torch.testing.assert_close(a, e)
    (graph,) = graphs
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert sum("torchconv.conv2d" in c for c in called) == 2
    assert not any("pool2d" in c and "torchconv" not in c and "unpool" not in c for c in called)

    if not inside:  # outside the block the same compiled model is PyTorch's again
        compiled(image)
        assert len(graphs) == 2
        assert not any("torchconv" in str(n.target) for n in graphs[1].graph.nodes)


def test_vmap() -> None:
    kernels = torch.stack([w(), -w(), 2 * w()])

    def convolve(kernel: Tensor) -> Tensor:
        return F.conv2d(x(), kernel, groups=2)

    with torchconv.patch():
        actual = torch.func.vmap(convolve)(kernels)
    torch.testing.assert_close(actual, torch.func.vmap(convolve)(kernels))
