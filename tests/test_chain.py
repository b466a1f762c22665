"""Chains of a fused network's layers: the layers' own results, to the bit, whatever has happened to
the layers since the call before."""

from __future__ import annotations

import gc
import pickle
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations

import torchconv
from conftest import FLOATS, Network, in_layout
from torchconv import _chain, _load, _watch
from torchconv._fetch import Fetch
from torchconv._programs import KeptProgram, Step, program_of
from torchconv._schemas import overload
from torchconv._settings import Signature, settings_of

LAYOUTS = ("contiguous", "channels_last")
STEPS = [12, 2]  # of the chains of the network below


def block(channels: int = 8, filters: int = 8, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, filters, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters), nn.ReLU6())


def forward(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = m.first(x)
    x = m.project(m.depthwise(m.expand(x))) + x
    gate = F.hardsigmoid(m.gate(m.squeeze(x)))
    x = torch.cat((m.left(x), m.right(x)), dim=-3) * gate
    x = x.abs()  # which no chain runs
    return m.head(m.pool(x))


def model() -> Network:
    return Network(
        forward,
        stem=block(3, 8, 2),
        first=nn.MaxPool2d(3, 2, 1),
        expand=block(8, 24),
        depthwise=block(24, 24, groups=24),
        project=nn.Conv2d(24, 8, 1),
        left=nn.Conv2d(8, 8, 1),
        right=nn.Conv2d(8, 8, 3, padding=1, bias=False),
        squeeze=nn.AdaptiveAvgPool2d(1),
        gate=nn.Conv2d(8, 16, 1),
        pool=nn.AdaptiveAvgPool2d((2, 1)),
        head=nn.Conv2d(16, 5, 1),
    )


def images(*size: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    return in_layout(torch.randn(size or (2, 3, 17, 22)).to(dtype), layout)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of steps of each program that has been run since."""
    seen: list[int] = []
    steps: dict[int, int] = {}
    keep, run = KeptProgram.__init__, KeptProgram.__call__

    def kept(self: KeptProgram, program: Tensor, *args: Any, **kwargs: Any) -> None:
        keep(self, program, *args, **kwargs)
        steps[self._number] = int(program[0])

    def watched(self: KeptProgram, tensors: Any) -> Any:
        outputs = run(self, tensors)
        seen.append(steps[self._number])
        return outputs

    monkeypatch.setattr(KeptProgram, "__init__", kept)
    monkeypatch.setattr(KeptProgram, "__call__", watched)
    return seen


@pytest.fixture(params=["in C++", "in C++ without versions", "in Python"])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a chain looks for changes: as it does where all libraries are there, or some are not."""
    _load.load()
    if request.param == "in C++ without versions":
        monkeypatch.setattr(_watch, "_have_versions", lambda: False)
    if request.param == "in Python":
        monkeypatch.setattr(_load, "watching", None)


def by_layers(made: GraphModule, x: Tensor) -> Tensor:
    out: Tensor = GraphModule(made, made.graph)(x)
    return out


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.stride() == expected.stride()
    assert got.dtype == expected.dtype and torch.equal(got, expected)


def fused(layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> GraphModule:
    kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torchconv.fuse(model().eval().to(dtype).to(memory_format=kind))  # type: ignore[call-overload]


pytestmark = pytest.mark.usefixtures("no_grad")


# --- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images_layout", LAYOUTS)
@pytest.mark.usefixtures("looks")
def test_network(layout: str, images_layout: str, dtype: torch.dtype, runs: list[int]) -> None:
    made = fused(layout, dtype)
    for size in ((2, 3, 17, 22), (1, 3, 9, 9), (3, 3, 17, 22)):
        x = images(*size, layout=images_layout, dtype=dtype)
        expected = by_layers(made, x)
        del runs[:]
        for _ in range(2):
            assert_same(made(x), expected)
        assert runs[-2:] == STEPS
    assert len(runs) == 4


def test_results_that_are_read_twice(runs: list[int]) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        first = m.a(x)
        second = m.b(first)
        return first, m.c(first), second, first - second

    layers = {name: nn.Conv2d(4, 4, 1) for name in "abc"}
    made = torchconv.fuse(Network(forward, **layers).eval())  # type: ignore[arg-type]
    x = images(2, 4, 5, 6)
    expected = GraphModule(made, made.graph)(x)
    for _ in range(2):
        for got, wanted in zip(made(x), expected, strict=True):
            assert_same(got, wanted)
    assert runs == [3]


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "other layout": lambda x: x.contiguous(memory_format=torch.channels_last),
    "broadcasts": lambda x: x.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_sums_that_only_layers_can(other: str, first: bool, runs: list[int]) -> None:
    """Then nothing is tried twice: the chain gives up."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = OTHERS[other](x), m.b(m.a(x))
        return (y + z if first else z + y).relu()

    layers = {name: nn.Conv2d(4, 4, 1) for name in "ab"}
    made = torchconv.fuse(Network(forward, **layers).eval())
    x = images(2, 4, 5, 6)
    expected = by_layers(made, x)
    for _ in range(3):
        assert_same(made(x), expected)
    assert len(runs) == (2 if other == "other layout" and not first else 0)


def concatenated(read: int) -> Network:
    """Convolutions of all kinds, `read` of which are concatenated."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        branches = [m.point(x), m.square(x), m.few(x), m.strided(x), m.grouped(x)]
        return m.last(torch.cat(branches[:read], 1))

    widths = (24, 40, 3, 16, 32)
    return Network(
        forward,
        stem=nn.Conv2d(3, 32, 1),
        point=nn.Sequential(nn.Conv2d(32, 24, 1), nn.ReLU()),
        square=nn.Conv2d(32, 40, 3, padding=1),
        few=nn.Conv2d(32, 3, 3, padding=1),
        strided=nn.Conv2d(32, 16, 1),
        grouped=nn.Conv2d(32, 32, 3, padding=1, groups=8),
        last=nn.Conv2d(sum(widths[:read]), 7, 1),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("read", [2, 5])
def test_concatenations(read: int, layout: str, dtype: torch.dtype, runs: list[int]) -> None:
    kind = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    made = torchconv.fuse(concatenated(read).eval().to(dtype).to(memory_format=kind))  # type: ignore[call-overload]
    for size in ((1, 3, 14, 15), (3, 3, 9, 8), (2, 3, 1, 6), (1, 3, 1, 1)):
        x = images(*size, layout=layout, dtype=dtype)
        for value in (0.0, float("inf"), float("nan")):
            x[0, 0, 0, 0] = value
            expected = by_layers(made, x)
            for _ in range(2):
                got = made(x)
                assert got.stride() == expected.stride()
                assert torch.equal(got.isnan(), expected.isnan())
                assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert len(runs) >= 20


def test_parts_past_the_caches(runs: list[int]) -> None:
    """So large that stores are streamed, which must be aligned."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return torch.cat([m.a(x), m.b(x), m.c(x), m.d(x)], 1)

    layers = {
        "stem": nn.Conv2d(3, 16, 1),
        "a": nn.Conv2d(16, 64, 3, padding=1),
        "b": nn.Conv2d(16, 24, 3, padding=1),
        "c": nn.Conv2d(16, 64, 1),
        "d": nn.Conv2d(16, 40, 1),
    }
    made = torchconv.fuse(Network(forward, **layers).eval())
    x = images(1, 3, 256, 260, layout="channels_last")
    expected = by_layers(made, x)
    for _ in range(2):
        assert_same(made(x), expected)
    assert runs == [6]


def test_parts_that_are_read_elsewhere(runs: list[int]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.left(x), m.right(x)
        c = torch.cat((m.first(a), b), 1)
        d = torch.cat((b, m.last(c)), -3)
        return torch.cat((d, d), 2).abs() + a.sum()

    made = torchconv.fuse(
        Network(
            forward,
            left=nn.Conv2d(16, 32, 1),
            right=nn.Conv2d(16, 16, 1),
            first=nn.Conv2d(32, 16, 1),
            last=nn.Conv2d(32, 16, 1),
        ).eval()
    )
    x = images(2, 16, 7, 9, layout="channels_last")
    expected = by_layers(made, x)
    for _ in range(3):
        assert_same(made(x), expected)
    assert runs


def test_intermediate_results_are_given_back(runs: list[int]) -> None:
    made = torchconv.fuse(nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(6))).eval())
    x = images(1, 8, 512, 512)
    made(x)
    torchconv.memory.empty_cache()
    before = torchconv.memory.memory_stats()["fresh"]
    made(x)
    # Where the third layer's output is was the first one's, and so on.
    assert torchconv.memory.memory_stats()["fresh"] - before <= 3
    assert runs == [6]


@pytest.mark.usefixtures("looks")
def test_dropped_weights_are_given_back(runs: list[int]) -> None:
    made, x = fused(), images()
    for _ in range(2):
        made(x)
    weight = weakref.ref(layer(made).weight)
    torchconv.drop_packed_weights(made)
    layer(made).weight = None
    assert weight() is None
    network = weakref.ref(made)
    del made
    gc.collect()
    assert network() is None


@pytest.mark.usefixtures("looks")
def test_threads() -> None:
    """Some call while another one changes a layer: each result is that of one or the other."""
    made, x = fused(), images()
    head = layer(made, "head")
    both = []
    for kind in (None, "tanh"):
        head.activation = kind
        both.append(by_layers(made, x))
    results: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(made(x) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for i in range(60):
        head.activation = (None, "tanh")[i % 2]
        made(x)
    for worker in workers:
        worker.join()
    assert len(results) == 60
    assert all(any(torch.equal(got, one) for one in both) for got in results)
    assert_same(made(x), both[1])


# --- what changes between two calls --------------------------------------------------------------


def layer(made: GraphModule, name: str = "depthwise.0") -> Any:
    return made.get_submodule(name)


def add_one(*args: Any) -> Any:
    return args[-1] + 1 if isinstance(args[-1], Tensor) else (args[-1][0] + 1,)


def by_hook(made: GraphModule) -> None:
    layer(made).register_forward_hook(add_one)


def by_pre_hook(made: GraphModule) -> None:
    layer(made, "first").register_forward_pre_hook(add_one)


def by_hook_after_new_tables(made: GraphModule) -> None:
    layer(made)._forward_hooks = OrderedDict()
    layer(made).register_forward_hook(add_one)


def by_hook_of_ones_own(made: GraphModule) -> None:
    layer(made)._forward_hooks[0] = add_one


def by_hook_with_keywords(made: GraphModule) -> None:
    layer(made).register_forward_hook(lambda m, a, k, out: out + 1, with_kwargs=True)


def by_hook_of_a_container(made: GraphModule) -> None:
    """Which the recorded network does not call either."""
    layer(made, "stem").register_forward_hook(add_one)


def by_own_forward(made: GraphModule) -> None:
    layer(made).forward = lambda x: x * 2


def by_own_forward_for_another_attribute(made: GraphModule) -> None:
    layer(made, "right").tag = 0
    for _ in range(3):
        made(images())
    del layer(made, "right").tag
    layer(made, "right").forward = lambda x: x.repeat(1, 1, 1, 1)


def by_own_call(made: GraphModule) -> None:
    layer(made)._call_impl = lambda x: x * 2


def by_compiled_layer(made: GraphModule) -> None:
    layer(made)._compiled_call_impl = lambda x: x * 2


def by_own_convolution(made: GraphModule) -> None:
    layer(made)._conv_forward = lambda x, w, b: x * 2


def by_new_weight(made: GraphModule) -> None:
    layer(made).weight = nn.Parameter(torch.randn(24, 1, 3, 3))


def by_new_bias(made: GraphModule) -> None:
    layer(made).bias = nn.Parameter(torch.randn(24))


def by_weight_before_the_parameter(made: GraphModule) -> None:
    vars(layer(made))["weight"] = torch.randn(24, 1, 3, 3)


def by_bias_before_the_parameter(made: GraphModule) -> None:
    vars(layer(made, "project"))["bias"] = torch.randn(8)


def by_layer_before_the_child(made: GraphModule) -> None:
    vars(made)["first"] = nn.MaxPool2d(5, 2, 2)


def by_no_bias(made: GraphModule) -> None:
    layer(made).bias = None


def by_writing_weight(made: GraphModule) -> None:
    layer(made).weight.mul_(2)


def by_writing_data(made: GraphModule) -> None:
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(2)


def by_new_data(made: GraphModule) -> None:
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = torch.randn_like(module.weight)


def by_writing_bias(made: GraphModule) -> None:
    layer(made).bias.data.add_(1)


class Halved(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result / 2 if isinstance(result, Tensor) and result.dim() == 4 else result


def by_weight_of_another_class(made: GraphModule) -> None:
    layer(made, "expand.0").weight.__class__ = Halved


def by_bias_of_another_class(made: GraphModule) -> None:
    layer(made, "expand.0").bias.__class__ = Halved


def by_negated_weight(made: GraphModule) -> None:
    layer(made, "expand.0").weight.data = torch._neg_view(layer(made, "expand.0").weight.data)


def by_negated_bias(made: GraphModule) -> None:
    layer(made, "project").bias = nn.Parameter(torch.randn(8, dtype=torch.cfloat).conj().imag)


def by_zeros_without_memory(made: GraphModule) -> None:
    layer(made, "project").bias.data = torch._efficientzerotensor(8)


def by_state(made: GraphModule) -> None:
    made.load_state_dict({name: value / 2 for name, value in made.state_dict().items()})


def by_assigned_state(made: GraphModule) -> None:
    state = {name: value / 2 for name, value in made.state_dict().items()}
    made.load_state_dict(state, assign=True)


def by_new_tables(made: GraphModule) -> None:
    layer(made)._parameters = {"weight": nn.Parameter(torch.randn(24, 1, 3, 3)), "bias": None}
    made._modules = {**made._modules, "left": nn.Conv2d(8, 8, 1)}


def by_weight_in_an_equal_table(made: GraphModule) -> None:
    """Where nothing but the table was another one in the call before."""
    layer(made)._parameters = dict(layer(made)._parameters)
    for _ in range(2):
        made(images())
    layer(made).weight = nn.Parameter(torch.randn(24, 1, 3, 3))


def by_hook_in_a_new_table(made: GraphModule) -> None:
    layer(made)._forward_hooks = OrderedDict()
    for _ in range(2):
        made(images())
    layer(made)._forward_hooks[0] = add_one


def by_scripted_layer(made: GraphModule) -> None:
    made.first = torch.jit.script(nn.MaxPool2d(2))


def by_weight_of_inference_mode(made: GraphModule) -> None:
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(24, 8, 1, 1), requires_grad=False)
    layer(made, "gate").weight = nn.Parameter(torch.randn(16, 8, 1, 1))
    made.add_module("left", nn.Conv2d(8, 8, 1))
    torch.utils.swap_tensors(layer(made, "project").weight, weight.view(8, 24, 1, 1))


def by_swapped_weight(made: GraphModule) -> None:
    torch.utils.swap_tensors(layer(made, "expand.0").weight, nn.Parameter(torch.randn(24, 8, 3, 3)))


def by_parametrization(made: GraphModule) -> None:
    parametrizations.weight_norm(layer(made))


def by_padding(made: GraphModule) -> None:
    layer(made, "right").padding = (1, 2)
    layer(made, "left").padding = (0, 1)


def by_padding_mode(made: GraphModule) -> None:
    layer(made).padding_mode = "circular"


def by_stride(made: GraphModule) -> None:
    layer(made, "stem.0").stride = (1, 3)


def by_activation(made: GraphModule) -> None:
    layer(made, "project").activation = "tanh"


def by_window(made: GraphModule) -> None:
    layer(made, "first").kernel_size = 2


def by_window_in_a_list(made: GraphModule) -> None:
    layer(made, "first").kernel_size = [2, 2]
    for _ in range(4):
        made(images())
    layer(made, "first").kernel_size[0] = 3


def by_stride_in_a_list(made: GraphModule) -> None:
    layer(made, "stem.0").stride = [1, 2]
    for _ in range(4):
        made(images())
    layer(made, "stem.0").stride[1] = 3


def by_output_size(made: GraphModule) -> None:
    layer(made, "pool").output_size = (None, 2)


def by_another_layer(made: GraphModule) -> None:
    setattr(layer(made, "stem"), "0", nn.Conv2d(3, 8, 1, 2))


def by_another_container(made: GraphModule) -> None:
    made.expand = nn.Sequential(nn.Conv2d(8, 24, 1))


def by_another_class(made: GraphModule) -> None:
    class Doubled(torchconv.nn.Conv2d):
        def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
            return super().forward(input, residual) * 2

    layer(made).__class__ = Doubled


def by_dropping_packed_weights(made: GraphModule) -> None:
    torchconv.nn.drop_packed_weights(made)


def by_training_mode(made: GraphModule) -> None:
    made.train()


def by_dtype_and_back(made: GraphModule) -> None:
    made.bfloat16().float()


def by_a_new_graph(made: GraphModule) -> None:
    for node in made.graph.nodes:
        if node.target == "left":
            node.replace_all_uses_with(node.args[0])
            made.graph.erase_node(node)
            break
    made.recompile()


CHANGES = [value for name, value in list(globals().items()) if name.startswith("by_")]
CHANGES.remove(by_layers)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_is_noticed(change: Callable[[GraphModule], None], runs: list[int]) -> None:
    made, x = fused(), images()
    for _ in range(2):
        made(x)
    assert runs == STEPS
    change(made)
    for y in (x, images()):
        for _ in range(4):
            assert_same(made(y), by_layers(made, y))


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize(
    ("name", "value"),
    [("ceil_mode", 0), ("kernel_size", 3.0), ("stride", (2.0, 2)), ("padding", [1.0])],
)
def test_equal_values_of_types_that_layers_refuse(name: str, value: Any) -> None:
    made, x = fused(), images()
    for _ in range(2):
        made(x)
    setattr(layer(made, "first"), name, value)
    for _ in range(2):
        with pytest.raises(TypeError, match=name):
            made(x)


@pytest.mark.usefixtures("looks")
def test_registered_hooks_are_called(runs: list[int]) -> None:
    made, x = fused(), images()
    for _ in range(2):
        plain = made(x)
    handle = layer(made, "pool").register_forward_hook(add_one)
    del runs[:]
    for _ in range(2):
        assert not torch.equal(made(x), plain)
    assert runs == [12, 12]
    handle.remove()
    for _ in range(2):
        assert_same(made(x), plain)
    assert runs == [12, 12, 12, 12, 2]


def test_change_during_the_call_that_compiles() -> None:
    made, x = fused(), images()
    first = layer(made, "stem.0")

    def replace(*_: Any) -> None:
        made.left = nn.Conv2d(8, 8, 1)
        handle.remove()

    handle = first.register_forward_pre_hook(replace)
    for _ in range(3):
        assert_same(made(x), by_layers(made, x))


def test_attempts_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer is more than its operator, the others need not be looked at in every call."""
    attempts: list[Any] = []
    compile_program = _chain.compile_program

    def watched(*args: Any) -> Any:
        attempts.append(args)
        return compile_program(*args)

    monkeypatch.setattr(_chain, "compile_program", watched)
    made = torchconv.fuse(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)).eval())
    handle = layer(made, "1").register_forward_hook(lambda *_: None)
    for _ in range(100):
        made(images())
    assert len(attempts) < 10
    handle.remove()
    for _ in range(64):
        made(images())
    assert len(attempts) < 12


def test_functional_call(runs: list[int]) -> None:
    made, x = fused(), images()
    for _ in range(2):
        made(x)
    other = {name: value * 2 for name, value in made.state_dict().items()}
    got = torch.func.functional_call(made, other, x)
    made.load_state_dict(other)
    assert_same(got, by_layers(made, x))
    assert runs == STEPS


def test_fetch_of_what_is_gone() -> None:
    """Nothing is read at an address that is fetched ahead, so it may be one of nothing."""
    table, image = {str(i): i for i in range(100)}, torch.randn(1 << 22)
    kept: list[Any] = [table, image, OrderedDict(a=1), (1, 2), int]
    fetch = Fetch(kept)
    for address in (*map(id, kept), image._cdata):
        assert address // 64 * 64 in fetch.lines
    assert len(fetch.lines) > sys.getsizeof(table) // 64
    del table, image
    fetch()
    del kept[:]
    gc.collect()
    fetch()
    Fetch([])()


# --- calls that somebody watches -----------------------------------------------------------------


def test_a_profile_shows_the_layers() -> None:
    made, x = fused(), images()
    for _ in range(2):
        made(x)
    with torch.profiler.profile() as profile:
        made(x)
    names = [event.key for event in profile.key_averages()]
    assert any("conv2d" in name for name in names)
    assert "torchconv::chain" not in names


def test_global_hooks_see_the_layers() -> None:
    made, x = fused(), images()
    for _ in range(2):
        made(x)
    seen: list[str] = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, a, out: seen.append(type(m).__name__)
    )
    try:
        made(x)
    finally:
        hook.remove()
    assert seen.count("Conv2d") == 7 and "MaxPool2d" in seen


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("method", ["forward", "__call__", "_call_impl"])
def test_class_that_somebody_changed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = fused(), images()
    for _ in range(2):
        plain = made(x)
    original = getattr(torchconv.nn.MaxPool2d, method)
    monkeypatch.setattr(torchconv.nn.MaxPool2d, method, lambda m, x: original(m, x) + 1)
    for _ in range(4):
        assert not torch.equal(made(x), plain)


def test_a_pickle_keeps_what_the_network_has() -> None:
    made, x = fused(), images()
    vars(made)["labels"] = ["cat"]
    expected = made(x)
    other = pickle.loads(pickle.dumps(made))
    assert other.labels == ["cat"] and type(other).__mro__[1] is _chain.Fused
    assert_same(other(x), expected)


def test_without_kept_weights(runs: list[int]) -> None:
    made, x = fused(), images()
    expected = made(x)
    with torchconv.backends.keep_packed_weights(False):
        assert_same(made(x), expected)
    assert not runs


@pytest.mark.usefixtures("looks")
def test_gradients_autocast_and_transforms(runs: list[int]) -> None:
    made, x = fused(), images()
    for _ in range(2):
        expected = made(x)
    del runs[:]
    with torch.enable_grad():
        out = made(x.requires_grad_())
        assert_same(out.detach(), expected)
        (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.shape == x.shape
    x = x.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    got = torch.func.vmap(made)(x.unsqueeze(1))
    torch.testing.assert_close(got.squeeze(1), expected)
    tangent = torch.func.jvp(made, (x,), (torch.ones_like(x),))[1]
    assert tangent.shape == expected.shape
    traced = torch.jit.trace(made, x, check_trace=False)
    torch.testing.assert_close(traced(x), expected)
    nested = torch.fx.symbolic_trace(nn.Sequential(made))
    torch.testing.assert_close(nested(x), expected)
    assert not runs
    with torch.inference_mode():
        assert_same(made(x), expected)
    assert runs == STEPS


# --- errors --------------------------------------------------------------------------------------


def test_errors_are_the_layers_own(runs: list[int]) -> None:
    made, x = fused(), images()
    for _ in range(2):
        expected = made(x)
    wrong: list[Any] = [images(2, 4, 17, 22), x.double(), x.to(torch.int32), x[0, 0]]
    for bad in wrong:
        with pytest.raises(RuntimeError) as error:
            by_layers(made, bad)
        with pytest.raises(type(error.value)) as again:
            made(bad)
        assert str(again.value) == str(error.value)
    del runs[:]
    assert_same(made(x), expected)  # and the chains are what they were
    assert runs == STEPS
    assert_same(made(x[0]), expected[0])


# --- the operator --------------------------------------------------------------------------------


def step(name: str, tensors: list[int], values: tuple[Any, ...], done: list[int]) -> Step:
    if name in ("mul", "hardsigmoid", "cat"):
        return Step(name, tensors, values, done)
    extra = (0, 0, False) if name == "conv2d" else ()
    settings = settings_of(Signature(name).types, (*values, *extra)).tolist()
    return Step(name, tensors, [0, *settings] if name == "conv2d" else settings, done)


def run_program(
    tensors: list[Tensor], program: Tensor, planned: bool | None = None
) -> list[Tensor]:
    """The results of the call that makes a plan, which are those by the plan, if there is one."""
    kept = KeptProgram(program)
    results = kept(tensors)
    for _ in range(2):
        again = kept(tensors)
        assert len(again) == len(results)
        for got, wanted in zip(again, results, strict=True):
            assert_same(got, wanted)
        assert planned is None or kept.plans() == planned
    return results


CONV = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "none", False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator(layout: str) -> None:
    x, w, b = images(2, 4, 9, 8, layout=layout), torch.randn(4, 4, 1, 1), torch.randn(4)
    window = ((2, 3), (2, 1), (1, 1))
    program = program_of(
        [
            step("conv2d", [0, 1, 2, 0], CONV, [0]),
            step("max_pool2d", [3], (*window, (1, 1), True), []),
            step("avg_pool2d", [3], (*window, False, True, 3), [3]),
            step("adaptive_avg_pool2d", [5], ((3, 2),), [5]),
            step("hardsigmoid", [6], (), []),
            step("mul", [7, 6], (), [6]),
            step("cat", [8, 7, 8], (1,), [7, 8]),
        ],
        [9, 4],
    )
    y = overload("conv2d")(x, w, b, *CONV, x)
    mean = overload("avg_pool2d")(y, *window, False, True, 3)
    mean = overload("adaptive_avg_pool2d")(mean, (3, 2))
    gate = F.hardsigmoid(mean)
    expected = (
        torch.cat((gate * mean, gate, gate * mean), 1),
        overload("max_pool2d")(y, *window, (1, 1), True),
    )
    for got, wanted in zip(run_program([x, w, b], program, False), expected, strict=True):
        assert_same(got, wanted)


def test_parts_need_no_copy() -> None:
    x = images(2, 16, 6, 5, layout="channels_last")
    w, v = torch.randn(16, 16, 1, 1), torch.randn(24, 16, 1, 1)
    parts = [step("conv2d", [0, at, -1, -1], CONV, []) for at in (1, 2)]
    both = step("cat", [3, 4], (1,), [])

    def chain(first: int, second: int, channels: int = 40) -> list[Tensor]:
        steps = [
            parts[0]._replace(part=(5, first, channels)),
            parts[1]._replace(part=(5, second, channels)),
            both,
        ]
        program = program_of(steps, [5, 3, 4])
        run_program(
            [x, w, v], program_of(steps, [5]), planned=(first, second, channels) == (0, 16, 40)
        )
        return run_program([x, w, v], program, planned=False)  # parts are no results of their own

    expected = torch.cat((F.conv2d(x, w), F.conv2d(x, v)), 1)
    whole, left, right = chain(0, 16)
    torch.testing.assert_close(whole, expected)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert left.data_ptr() == whole.data_ptr() and right.data_ptr() == whole[:, 16:].data_ptr()
    # Places in another order, with room between, and none.
    for first, second, channels in ((24, 0, 40), (0, 16, 64), (-1, 30, 40), (9, 16, 20)):
        whole, _, _ = chain(first, second, channels)
        torch.testing.assert_close(whole, expected)
        assert whole.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_beside_others(layout: str, last: bool) -> None:
    """What no convolution writes to its place is copied there, and the rest stays where it is; a
    part in another layout decides on the whole's."""
    x = images(2, 16, 6, 5, layout="channels_last")
    z = images(2, 8, 6, 5, layout=layout)
    w, v = torch.randn(16, 16, 1, 1), torch.randn(24, 1, 3, 3)
    grouped = ((1, 1), (1, 1, 1, 1), (1, 1), 8, "none", False)
    steps = [step("conv2d", [0, 2, -1, -1], CONV, []), step("conv2d", [1, 3, -1, -1], grouped, [])]
    expected = [F.conv2d(x, w), F.conv2d(z, v, padding=1, groups=8)]
    if last:
        steps.reverse()
        expected.reverse()
    parts = [
        steps[0]._replace(part=(6, 0, 40)),
        steps[1]._replace(part=(6, 24 if last else 16, 40)),
        step("cat", [4, 5], (1,), []),
    ]
    whole, *found = run_program([x, z, w, v], program_of(parts, [6, 4, 5]), planned=False)
    torch.testing.assert_close(whole, torch.cat(expected, 1))
    assert whole.stride() == torch.cat(expected, 1).stride()
    if layout == "channels_last":
        written = whole[:, 24:] if last else whole
        assert found[last].data_ptr() == written.data_ptr()


@pytest.mark.parametrize("dies", [True, False])
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "size",
    [(1, 19, 5, 7), (3, 32, 4, 4), (2, 70, 65, 81), (2, 1, 3, 3), (1, 5, 1, 4), (2, 5, 1, 1)],
)
def test_gates(
    size: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    gate_first: bool,
    dies: bool,
) -> None:
    """The bits and strides of torch.mul; it writes to the image only if nobody else has that."""
    x = images(*size, layout=layout, dtype=dtype)
    gates = [torch.randn(size[0], size[1], 1, 1), torch.randn(1, size[1], 1, 1), torch.randn(size)]
    pool = ((1, 1), (1, 1), (0, 0), (1, 1), False)
    pooled = overload("max_pool2d")(x, *pool)
    for gate in (gate.to(dtype) for gate in gates):
        # 0, 1: the call's own; 2: the image that a step makes.
        order = [[1, i] if gate_first else [i, 1] for i in (0, 2)]
        steps = [
            step("max_pool2d", [0], pool, []),
            step("mul", order[0], (), [0]),
            step("mul", order[1], (), [2] if dies else []),
        ]
        before = x.clone()
        program = program_of(steps, [3, 4] if dies else [3, 4, 2])
        got = run_program([x, gate], program)
        for image, result in zip((x, pooled), got, strict=False):
            assert_same(result, gate * image if gate_first else image * gate)
        assert torch.equal(x, before)
        assert dies or torch.equal(got[2], pooled)


def test_programs_that_are_none() -> None:
    x, w = torch.randn(1, 4, 3, 3), torch.randn(4, 4, 1, 1)
    good = program_of([step("conv2d", [0, 1, -1, -1], CONV, [0])], [2])

    def changed(at: int, number: int) -> Tensor:
        program = good.clone()
        program[at] = number
        return program

    # One step: its operator, four positions, its settings; one position that is done; one output.
    for program, message in (
        (good[:-1], "settings end too early"),
        (good[:0], "settings end too early"),
        (good.int(), "settings must be a list of integers"),
        (changed(0, 2), "a chain has no operator 1|settings end"),
        (changed(1, 9), "a chain has no operator 9"),
        (changed(1, -1), "a chain has no operator -1"),
        (changed(2, 2**60), "settings end too early"),
        (changed(2, -1), "settings end too early"),
        (changed(2, 0), "a chain reads tensor -1, which is not there"),
        (changed(2, 1), "a chain reads tensor -1, which is not there"),
        (changed(3, 7), "a chain reads tensor 7, which is not there"),
        (changed(5, 2), "a chain reads tensor 2, which is not there"),
        (changed(-1, 0), "a chain reads tensor 0, which is not there"),
        (changed(7, 1), "the residual is in another layout"),
    ):
        with pytest.raises(RuntimeError, match=message):
            KeptProgram(program)([x, w])
