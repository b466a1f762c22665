"""torchconv.nn against torch.nn: constructors, numbers, representation, serialisation."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import assert_accurate
from dispatch_log import DispatchLog
from torchconv import nn
from torchconv.functional import conv2d

PAIRS = [
    (nn.Conv2d, torch.nn.Conv2d),
    (nn.LazyConv2d, torch.nn.LazyConv2d),
    (nn.MaxPool2d, torch.nn.MaxPool2d),
    (nn.AvgPool2d, torch.nn.AvgPool2d),
    (nn.MinPool2d, torch.nn.MaxPool2d),
]
MODES = ("zeros", "reflect", "replicate", "circular")
ACTIVATIONS = ("relu", "relu6", "sigmoid", "tanh", "silu", "hardswish", "gelu")


def pair_of_convs(*args: Any, **kwargs: Any) -> tuple[nn.Conv2d, torch.nn.Conv2d]:
    """The same layer of both, from the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        ours = nn.Conv2d(*args, **kwargs)
        torch.manual_seed(5)
        theirs = torch.nn.Conv2d(*args, **kwargs)
    return ours, theirs


def gradients(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of a loss that weighs every output differently."""
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return (y.detach(), *torch.autograd.grad((y * weights).sum(), (x, *layer.parameters())))


def assert_layers_agree(ours: torch.nn.Module, theirs: torch.nn.Module, x: Tensor) -> None:
    for i, (a, e) in enumerate(zip(gradients(ours, x), gradients(theirs, x), strict=True)):
        assert_accurate(a, e)
        if i < 2:  # a parameter's gradient takes the parameter's strides when it is accumulated
            assert a.stride() == e.stride()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_constructor_takes_what_torch_nn_takes(ours: type, theirs: type) -> None:
    expected = list(inspect.signature(theirs).parameters.values())
    actual = list(inspect.signature(ours).parameters.values())
    for a, e in zip(actual, expected, strict=False):
        assert (a.name, a.default, a.kind) == (e.name, e.default, e.kind)
    added = {p.name: p.default for p in actual[len(expected) :]}
    is_conv = issubclass(ours, torch.nn.Conv2d)
    assert added == ({"activation": None, "flip_kernel": False} if is_conv else {})


def test_isinstance() -> None:
    conv, lazy = nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3)
    assert isinstance(conv, torch.nn.Conv2d)
    assert isinstance(lazy, torch.nn.LazyConv2d) and isinstance(lazy, nn.Conv2d)
    assert isinstance(nn.MaxPool2d(2), torch.nn.MaxPool2d)
    assert isinstance(nn.AvgPool2d(2), torch.nn.AvgPool2d)
    assert isinstance(nn.MinPool2d(2), torch.nn.Module)
    assert not isinstance(nn.MinPool2d(2), torch.nn.MaxPool2d)


# --- convolution ---------------------------------------------------------------------------------


def test_same_seed_gives_the_same_parameters() -> None:
    ours, theirs = pair_of_convs(4, 6, (3, 5), groups=2)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.bias is not None and theirs.bias is not None
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "valid", "same"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_conv_equals_torch_nn(mode: str, padding: Any, channels_last: bool) -> None:
    for stride, dilation, groups, bias in itertools.product(
        (1, (2, 1)), (1, (1, 2)), (1, 2), (0, 1)
    ):
        if padding == "same" and stride != 1:
            continue
        ours, theirs = pair_of_convs(
            4, 6, (2, 3), stride, padding, dilation, groups, bool(bias), mode, dtype=torch.double
        )
        x = torch.randn(2, 4, 9, 8, dtype=torch.double)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        assert_layers_agree(ours, theirs, x)
        if not channels_last:
            assert_layers_agree(ours, theirs, x[0])  # unbatched


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [(1, 2, 3, 0), [0, 1, 0, 2], (0, 0, 0, 0)])
@torch.no_grad()
def test_padding_by_side(mode: str, padding: Any) -> None:
    layer = nn.Conv2d(3, 5, 3, stride=(1, 2), padding=padding, padding_mode=mode).double()
    assert layer.padding == tuple(padding)
    x = torch.randn(2, 3, 8, 9, dtype=torch.double)
    padded = F.pad(x, list(padding), mode="constant" if mode == "zeros" else mode)
    expected = F.conv2d(padded, layer.weight, layer.bias, (1, 2))
    assert_accurate(layer(x), expected)
    assert_accurate(layer(x[0]), expected[0])


@torch.no_grad()
def test_negative_padding_by_side_crops() -> None:
    layer = nn.Conv2d(3, 5, 3, padding=(-1, 2, 0, -2)).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.double)
    expected = F.conv2d(F.pad(x, [-1, 2, 0, -2]), layer.weight, layer.bias)
    assert_accurate(layer(x), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(9, 8), (7, 12)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [(3, 2, 1), ((2, 5), (3, 2), 1), (3, (1, 2), 2), (1, 3, 1), ((3, 2), 3, (1, 2))],
)
@torch.no_grad()
def test_strided_same(mode: str, size: Any, kernel: Any, stride: Any, dilation: Any) -> None:
    layer = nn.Conv2d(3, 4, kernel, stride, "same", dilation, padding_mode=mode).double()
    assert layer.padding == "same"
    x = torch.randn(2, 3, *size, dtype=torch.double)
    amounts: list[int] = []
    for i in (1, 0):
        n, f, s, d = size[i], layer.kernel_size[i], layer.stride[i], layer.dilation[i]
        total = max((-(-n // s) - 1) * s + d * (f - 1) + 1 - n, 0)
        amounts += [total // 2, total - total // 2]
    padded = F.pad(x, amounts, mode="constant" if mode == "zeros" else mode)
    expected = F.conv2d(padded, layer.weight, layer.bias, layer.stride, 0, layer.dilation)
    assert expected.shape[2:] == tuple(-(-n // s) for n, s in zip(size, layer.stride, strict=True))
    assert_accurate(layer(x), expected)
    assert_accurate(layer(x[0]), expected[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_activation(activation: str, mode: str) -> None:
    ours, theirs = pair_of_convs(3, 5, 3, padding=1, padding_mode=mode, dtype=torch.double)
    ours.activation = activation
    followed = torch.nn.Sequential(theirs, _activation_module(activation))
    x = 4 * torch.randn(2, 3, 7, 6, dtype=torch.double)
    assert_layers_agree(ours, followed, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_residual(activation: str | None, layout: torch.memory_format) -> None:
    """As a second input: in training, and in eval mode, where the second call is a shorter one."""
    layer = nn.Conv2d(24, 40, 3, padding=1, activation=activation)
    x = torch.randn(2, 24, 9, 8).contiguous(memory_format=layout)
    residual = torch.randn(2, 40, 9, 8)
    arguments = (layer.weight, layer.bias, 1, 1)
    expected = conv2d(x, *arguments, activation=activation, residual=residual)
    plain = layer(x)
    assert torch.equal(layer(x, residual), expected)
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(x, residual), expected)
            assert torch.equal(layer(x, residual=residual), expected)
            assert torch.equal(layer(x), plain)
            torch.testing.assert_close(layer(x[0], residual[0]), expected[0])
        with pytest.raises(RuntimeError, match="residual"):
            layer(x, residual[:1])
        with pytest.raises(TypeError, match="residual"):
            layer(x, 3)  # type: ignore[arg-type]
    assert layer(x, residual.requires_grad_()).requires_grad


def test_residual_with_a_padding_mode() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular").eval()
    x, residual = torch.randn(2, 3, 6, 5), torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(layer(x, residual), layer(x) + residual)


def test_residual_of_a_lazy_layer() -> None:
    layer = nn.LazyConv2d(4, 3, padding=1)
    x, residual = torch.randn(2, 3, 6, 5), torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(layer(x, residual), layer(x) + residual)
    assert layer.in_channels == 3


def _activation_module(name: str) -> torch.nn.Module:
    module: torch.nn.Module = {
        "relu": torch.nn.ReLU,
        "relu6": torch.nn.ReLU6,
        "sigmoid": torch.nn.Sigmoid,
        "tanh": torch.nn.Tanh,
        "silu": torch.nn.SiLU,
        "hardswish": torch.nn.Hardswish,
        "gelu": torch.nn.GELU,
    }[name]()
    return module


@pytest.mark.parametrize("padding", [1, "same", (0, 1, 2, 0)])
@torch.no_grad()
def test_flipped_kernel_is_the_true_convolution(padding: Any) -> None:
    true = nn.Conv2d(3, 5, (2, 3), padding=padding, flip_kernel=True, dtype=torch.double)
    plain = nn.Conv2d(3, 5, (2, 3), padding=padding, dtype=torch.double)
    with torch.no_grad():
        plain.weight.copy_(true.weight.flip(2, 3))
        plain.bias.copy_(true.bias)  # type: ignore[union-attr, arg-type]
    x = torch.randn(2, 3, 6, 7, dtype=torch.double)
    assert_accurate(true(x), plain(x))


def test_padding_prepared_by_somebody_else_is_used() -> None:
    """Code that makes images tile changes padding_mode, and what F.pad gets, on built layers."""
    ours, theirs = pair_of_convs(3, 4, 3, padding=1, dtype=torch.double)
    for layer in (ours, theirs):
        layer.padding_mode = "circular"
        layer._reversed_padding_repeated_twice = [1, 1, 0, 0]
    x = torch.randn(1, 3, 6, 6, dtype=torch.double)
    assert_layers_agree(ours, theirs, x)


@pytest.mark.parametrize(
    "arguments",
    [
        {"groups": 0},
        {"groups": -1},
        {"groups": 3},
        {"out_channels": 5, "groups": 2},
        {"padding": "full"},
        {"padding_mode": "mirror"},
        {"kernel_size": "3"},
        {"in_channels": "4"},
        {"out_channels": -1},
        {"kernel_size": -3},
        {"dtype": torch.int64},
        {"device": "nowhere"},
        {"unknown": 1},
        {"padding": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", ["Conv2d", "LazyConv2d"])
def test_refuses_at_construction_what_torch_nn_refuses(cls: str, arguments: Any) -> None:
    given = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **arguments}
    if cls == "LazyConv2d":
        del given["in_channels"]
    try:
        getattr(torch.nn, cls)(**given)
    except Exception as error:
        with pytest.raises(type(error)) as info:
            getattr(nn, cls)(**given)
        assert str(info.value) == str(error)
    else:
        getattr(nn, cls)(**given)


@pytest.mark.parametrize(
    "arguments",
    [{"stride": 0}, {"stride": -1}, {"dilation": 0}, {"padding": -1}, {"padding": (1, 2, 3)},
     {"stride": (1, 1, 1)}, {"kernel_size": 12}, {"in_channels": 3}],
    ids=str,
)  # fmt: skip
def test_refuses_at_the_call_what_torch_nn_refuses(arguments: Any) -> None:
    ours, theirs = pair_of_convs(
        **{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | arguments
    )
    x = torch.randn(1, 4, 9, 9)
    with pytest.raises(Exception) as expected:
        theirs(x)
    with pytest.raises(expected.type):
        ours(x)


def test_unknown_activation_is_refused_at_construction() -> None:
    for name in ("swish", "none", "ReLU", torch.nn.ReLU(), 1):
        with pytest.raises(ValueError, match="activation must be None or one of"):
            nn.Conv2d(3, 4, 3, activation=name)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="activation must be None or one of"):
            nn.LazyConv2d(4, 3, activation=name)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        nn.Conv2d(3, 4, 3, 1, 0, 1, 1, True, "zeros", None, None, "relu")  # type: ignore[misc]


def test_extra_repr() -> None:
    assert repr(nn.Conv2d(3, 4, 3)) == repr(torch.nn.Conv2d(3, 4, 3))
    layer = nn.Conv2d(3, 4, 3, 2, "same", bias=False, activation="relu", flip_kernel=True)
    assert layer.extra_repr() == (
        "3, 4, kernel_size=(3, 3), stride=(2, 2), padding=same, bias=False, activation=relu, "
        "flip_kernel=True"
    )
    assert "padding=(1, 2, 3, 4)" in repr(nn.Conv2d(3, 4, 3, padding=(1, 2, 3, 4)))
    assert repr(nn.MaxPool2d(3, 2, 1)) == repr(torch.nn.MaxPool2d(3, 2, 1))
    assert repr(nn.MinPool2d(3, 2, 1)) == repr(torch.nn.MaxPool2d(3, 2, 1)).replace("Max", "Min")
    assert repr(nn.AvgPool2d(3, 2, 1)) == repr(torch.nn.AvgPool2d(3, 2, 1))


# --- pooling -------------------------------------------------------------------------------------

POOLS = [
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": (1, 0), "ceil_mode": True},
]


@pytest.mark.parametrize("arguments", [*POOLS, {"kernel_size": 2, "dilation": (2, 3)}], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_max_and_min_pooling(arguments: Any, channels_last: bool) -> None:
    x = torch.randn(2, 3, 9, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    theirs = torch.nn.MaxPool2d(**arguments)
    for y in (x, x[0]):
        ours = gradients(nn.MaxPool2d(**arguments), y)
        for a, e in zip(ours, gradients(theirs, y), strict=True):
            assert torch.equal(a, e)
        assert torch.equal(nn.MinPool2d(**arguments)(y), -theirs(-y))

    with_indices = torch.nn.MaxPool2d(**arguments, return_indices=True)
    for a, e in zip(
        nn.MaxPool2d(**arguments, return_indices=True)(x), with_indices(x), strict=True
    ):
        assert torch.equal(a, e)
    values, indices = nn.MinPool2d(**arguments, return_indices=True)(x)
    assert torch.equal(values, -with_indices(-x)[0])
    assert torch.equal(indices, with_indices(-x)[1])


@pytest.mark.parametrize(
    "arguments",
    [*POOLS, {"kernel_size": 3, "padding": 1, "count_include_pad": False},
     {"kernel_size": 2, "divisor_override": 3}],
    ids=str,
)  # fmt: skip
def test_average_pooling(arguments: Any) -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.double)
    for y in (x, x[0], x.to(memory_format=torch.channels_last)):
        assert_layers_agree(nn.AvgPool2d(**arguments), torch.nn.AvgPool2d(**arguments), y)


# --- lazy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [1, "same", (0, 1, 2, 0)])
def test_lazy_conv_becomes_ours(padding: Any) -> None:
    lazy = nn.LazyConv2d(6, 3, 2, padding, groups=2, activation="gelu", flip_kernel=True)
    assert lazy.has_uninitialized_params()
    x = torch.randn(2, 4, 8, 8)
    y = lazy(x)
    assert type(lazy) is nn.Conv2d
    eager = nn.Conv2d(4, 6, 3, 2, padding, groups=2, activation="gelu", flip_kernel=True)
    eager.load_state_dict(lazy.state_dict())
    assert torch.equal(y, eager(x))
    assert repr(lazy) == repr(eager)


# --- serialisation -------------------------------------------------------------------------------

LAYERS = [
    lambda: nn.Conv2d(3, 4, 3, 2, "same", activation="silu", flip_kernel=True),
    lambda: nn.Conv2d(3, 4, 3, padding=(1, 0, 2, 1), padding_mode="reflect", bias=False),
    lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    lambda: nn.MinPool2d(2),
    lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False, divisor_override=2),
]


@pytest.mark.parametrize("make", LAYERS)
def test_copies_and_files(make: Any) -> None:
    layer = make()
    x = torch.randn(1, 3, 9, 9)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(layer)
        assert vars(other).keys() == vars(layer).keys()
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), layer(x))


@torch.no_grad()
def test_pickle_from_before_an_attribute_existed() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(1, 3, 5, 5, dtype=torch.double)
    for name in ("activation", "flip_kernel", "padding_mode"):
        del vars(layer)[name]
    old = pickle.loads(pickle.dumps(layer))
    assert (old.activation, old.flip_kernel, old.padding_mode) == (None, False, "zeros")
    assert_accurate(old(x), F.conv2d(x, layer.weight, layer.bias, padding=1))


def test_state_dict_goes_both_ways() -> None:
    ours = nn.Conv2d(4, 6, 3, padding=(1, 2, 0, 1), groups=2, activation="relu")
    theirs = torch.nn.Conv2d(4, 6, 3, groups=2)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(theirs.weight, ours.weight)
    ours.load_state_dict(torch.nn.Conv2d(4, 6, 3, groups=2).state_dict(), strict=True)
    for pool in (nn.MaxPool2d(2), nn.MinPool2d(2), nn.AvgPool2d(2)):
        assert not pool.state_dict()


# --- what surrounds a layer ----------------------------------------------------------------------


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, "same", activation="relu"),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(8, 8, 3, padding=(1, 1, 0, 2), padding_mode="circular", activation="gelu"),
        nn.Conv2d(8, 4, 3, 2, "same", padding_mode="reflect"),
        nn.MinPool2d(2, 1),
        nn.AvgPool2d(2, padding=1, count_include_pad=False),
    )


def test_runs_on_torchconv_alone() -> None:
    with DispatchLog() as log:
        network()(torch.randn(2, 3, 17, 19, requires_grad=True)).sum().backward()
    assert [log.count(n) for n in ("conv2d", "max_pool2d", "min_pool2d", "avg_pool2d")] == [
        3,
        1,
        1,
        1,
    ]
    assert not log.from_torch()


def test_compiles_in_one_graph() -> None:
    net, x = network(), torch.randn(2, 3, 17, 19)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for a, e in zip(gradients(compiled, x), gradients(net, x), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_compiles_once_for_every_size() -> None:
    """How much 'same' pads is then an expression in the size of the input."""
    net = torch.nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, "same", padding_mode="reflect"), nn.MinPool2d(2, ceil_mode=True)
    )
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((17, 19), (24, 31), (33, 16)):
        x = torch.randn(2, 3, *size)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    net, x = network().eval(), torch.randn(2, 3, 17, 19)
    program = torch.export.export(net, (x,), strict=strict)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "torchconv.conv2d.default" in targets
    assert torch.equal(program.module()(x), net(x))


def test_traces_symbolically() -> None:
    net = network()
    del net[3]  # 'same' with a stride and F.pad: how much to pad depends on the size of the input
    x = torch.randn(2, 3, 17, 19)
    traced = torch.fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), net(x))


def test_meta_device_tells_the_shape() -> None:
    with torch.device("meta"):
        y = network()(torch.empty(2, 3, 17, 19))
    assert y.device.type == "meta"
    assert y.shape == network()(torch.randn(2, 3, 17, 19)).shape
