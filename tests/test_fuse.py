"""fuse: the results are the model's own, what goes into a convolution, and what does not."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchconv
from conftest import Network
from torchconv.fuse import ConvAdd2d, LinearAdd

Forward = Callable[[Any, Tensor], Tensor]


def norm(channels: int, **options: Any) -> nn.BatchNorm2d:
    """With statistics and parameters that change every channel."""
    layer = nn.BatchNorm2d(channels, **options)
    if layer.running_mean is not None and layer.running_var is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


def block(forward: Forward) -> Network:
    return Network(
        forward,
        conv=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        bn=norm(4),
        shortcut=nn.Conv2d(4, 4, 1),
        shortcut_bn=norm(4),
        act=nn.ReLU(inplace=True),
        add=nn.CosineSimilarity(),
    )


def image(*size: int) -> Tensor:
    return torch.randn(size or (2, 4, 9, 8), dtype=torch.float64)


def fused(model: nn.Module, *inputs: Tensor) -> torch.fx.GraphModule:
    """The fused copy, after a check that it computes the same on each input (default: one)."""
    model = model.double().eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    made = torchconv.fuse(model)
    with torch.no_grad():
        for x in inputs or (image(),):
            expected = model(x.clone())
            for _ in range(2):  # the second one with kept weights
                got = made(x.clone())
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
                assert got.stride() == expected.stride()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return made


def kinds(model: nn.Module) -> list[str]:
    return sorted(type(m).__name__ for m in model.modules() if not list(m.children()))


# --- what goes in --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_norm(bias: bool, affine: bool, padding_mode: Any) -> None:
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=bias, padding_mode=padding_mode)
    made = fused(nn.Sequential(conv, norm(6, affine=affine)))
    assert kinds(made) == ["Conv2d"]


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 6), nn.Sigmoid(), nn.Tanh(), nn.SiLU(),
        nn.Hardswish(), nn.GELU(), torch.relu, F.relu, F.relu6, torch.sigmoid, torch.tanh, F.silu,
        F.hardswish, F.gelu, torch.relu_, lambda x: F.relu(x, inplace=True), lambda x: x.relu(),
        lambda x: x.tanh_(), lambda x: x.sigmoid(),
    ],
)  # fmt: skip
def test_activation(activation: Callable[[Tensor], Tensor]) -> None:
    model = Network(lambda m, x: m.act(m.bn(m.conv(x))), conv=nn.Conv2d(4, 3, 3), bn=norm(3))
    if isinstance(activation, nn.Module):
        model.add_module("act", activation)
    else:
        vars(model)["act"] = activation
    made = fused(model)
    assert kinds(made) == ["Conv2d"]
    assert not [node for node in made.graph.nodes if node.op.startswith("call_f")]


WRITTEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "x * sigmoid(x)": (lambda x: x * torch.sigmoid(x), "silu"),
    "sigmoid(x) * x": (lambda x: F.sigmoid(x) * x, "silu"),
    "methods": (lambda x: x.mul(x.sigmoid()), "silu"),
    "torch.mul": (lambda x: torch.mul(x, torch.sigmoid(x)), "silu"),
    "x * relu6(x + 3) / 6": (lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
    "in place": (lambda x: x * F.relu6(x + 3.0, inplace=True) / 6.0, "hardswish"),
    "x * (relu6(x + 3) / 6)": (lambda x: x * (F.relu6(x + 3) / 6), "hardswish"),
    "from the right": (lambda x: F.relu6(x + 3) / 6 * x, "hardswish"),
}


@pytest.mark.parametrize("spelling", WRITTEN)
def test_activations_that_are_written_out(spelling: str) -> None:
    written, name = WRITTEN[spelling]
    made = fused(block(lambda m, x: written(m.bn(m.conv(x)))))
    assert kinds(made) == ["Conv2d"]
    assert made.get_submodule("conv").activation == name
    trained = torchconv.fuse_training(block(lambda m, x: written(m.conv(x))).double().train())
    assert trained.get_submodule("conv").activation == name


def test_hard_sigmoid_that_is_written_out() -> None:
    made = fused(block(lambda m, x: F.relu6(m.conv(x) + 3.0) / 6.0))
    assert [n.target for n in made.graph.nodes if n.op == "call_function"] == [F.hardsigmoid]
    other = torchconv.fuse_training(block(lambda m, x: F.relu6(m.conv(x) + 3.0) / 6.0).train())
    assert F.hardsigmoid not in {n.target for n in other.graph.nodes}


def overwritten(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    gate = torch.sigmoid(y)
    y += 1
    return y * gate


NOT_WRITTEN: dict[str, Forward] = {
    "another factor": lambda m, x: x * torch.sigmoid(m.conv(x)),
    "a number for a factor": lambda m, x: 16 * torch.sigmoid(m.conv(x)),
    "overwritten between": overwritten,
    "another number": lambda m, x: F.relu6(m.conv(x) + 2.0) / 6.0,
    "read elsewhere": lambda m, x: (lambda y, s: y * s + s)(x, torch.sigmoid(x)),
}


@pytest.mark.parametrize("forward", NOT_WRITTEN.values(), ids=NOT_WRITTEN.keys())
def test_steps_that_are_no_activation(forward: Forward) -> None:
    made = fused(block(forward))
    assert not {F.silu, F.hardswish, F.hardsigmoid} & {n.target for n in made.graph.nodes}
    assert all(getattr(m, "activation", None) in (None, "sigmoid") for m in made.modules())


SUMS: dict[str, Forward] = {
    "operator": lambda m, x: m.act(m.bn(m.conv(x)) + x),
    "swapped": lambda m, x: m.act(x + m.bn(m.conv(x))),
    "in place": lambda m, x: m.act(m.bn(m.conv(x)).add_(x)),
    "function": lambda m, x: torch.add(m.shortcut(x), x),
    "both convolutions": lambda m, x: m.act(m.bn(m.conv(x)) + m.shortcut_bn(m.shortcut(x))),
    "shortcut first": lambda m, x: m.act(m.shortcut_bn(m.shortcut(x)) + m.bn(m.conv(x))),
}


@pytest.mark.parametrize("forward", SUMS.values(), ids=SUMS.keys())
def test_sum(forward: Forward) -> None:
    made = fused(block(forward))
    assert kinds(made).count("ConvAdd2d") == 1
    assert not [node for node in made.graph.nodes if node.op in ("call_function", "call_method")]


@pytest.mark.parametrize("size", [(1, 4, 1, 1), (4, 1, 1), (3, 4, 9, 8), (1,), ()])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Identity()])
def test_sum_of_other_sizes_broadcasts(size: tuple[int, ...], activation: nn.Module) -> None:
    """A sum may also spread: sizes are known when it runs."""
    model = Network(
        lambda m, x: m.act(m.conv(x) + m.other), conv=nn.Conv2d(4, 4, 1), act=activation
    )
    model.register_buffer("other", torch.randn(size))
    made = fused(model, image(1, 4, 9, 8))
    assert kinds(made) == ["ConvAdd2d"]


def test_sum_promotes() -> None:
    model = Network(lambda m, x: F.relu(m.conv(x) + m.other), conv=nn.Conv2d(4, 4, 1)).eval()
    model.register_buffer("other", torch.randn(2, 4, 9, 8, dtype=torch.float64))
    x = image().float()
    with torch.no_grad():
        got, expected = torchconv.fuse(model)(x), model(x)
    assert got.dtype is expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # of float32 sums


@pytest.mark.parametrize("padding", ["same", "valid", (1, 2), 3])
def test_sum_knows_the_size_of_the_result(padding: Any) -> None:
    conv = torchconv.nn.Conv2d(4, 4, (3, 2), padding=padding, dilation=2)
    model = Network(lambda m, x: m.conv(x).relu() * 0 + (m.conv2(x) + m.conv3(x)).relu())
    for name in ("conv", "conv2", "conv3"):
        model.add_module(name, copy.deepcopy(conv))
    made = fused(model, image(), image(4, 12, 10))
    assert kinds(made) == ["Conv2d", "Conv2d", "ConvAdd2d"]


# --- linear layers over images -------------------------------------------------------------------


class ConvNext(nn.Module):
    """A block of ConvNeXt, whose end a test puts together."""

    def __init__(self, end: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)
        self.wide, self.act, self.narrow = nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.image_scale = nn.Parameter(torch.randn(6, 1, 1))
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return self.end(self, x, self.narrow(self.act(self.wide(pixels))))


CONVNEXT_ENDS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "the paper's": lambda m, x, y: x + (m.scale * y).permute(0, 3, 1, 2),
    "images scaled": lambda m, x, y: m.image_scale * y.permute((0, 3, 1, 2)) + x,
    "reshaped scale": lambda m, x, y: (
        y.permute(0, 3, 1, 2).mul(m.scale.reshape(1, -1, 1, 1)).add_(x)
    ),
    "both scales": lambda m, x, y: x.add(
        torch.permute(y.mul_(m.scale), [0, -1, 1, 2]) * m.image_scale
    ),
    "activation behind": lambda m, x, y: F.relu(x + (y * m.scale).permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("end", CONVNEXT_ENDS.values(), ids=CONVNEXT_ENDS.keys())
def test_convnext(end: Any, layout: torch.memory_format) -> None:
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64).contiguous(memory_format=layout)
    made = fused(ConvNext(end), x)
    assert kinds(made) == ["Conv2d", "LayerNorm", "Linear", "LinearAdd"]
    assert [node.target for node in made.graph.nodes if node.op.startswith("call_f")] == []


@pytest.mark.parametrize("end", CONVNEXT_ENDS.values(), ids=CONVNEXT_ENDS.keys())
def test_convnext_runs_in_convolutions(end: Any) -> None:
    """With channels last the sum and both linear layers are of three calls of conv2d."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    made: list[str] = []
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    model = torchconv.fuse(ConvNext(end).eval())
    with torch.no_grad(), Calls():
        model(x)
    assert made.count("conv2d") == 3
    assert not {"add", "add_", "addmm", "linear", "matmul"} & set(made)


def test_linear_layers_without_images() -> None:
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 6)}
    model = Network(lambda m, x: x + m.c(m.b(F.gelu(m.a(x)))).relu(), **layers)
    sizes = ((6,), (3, 6), (2, 3, 6), (2, 3, 4, 6), (2, 3, 4, 5, 6))
    made = fused(model, *(image(*size) for size in sizes))
    assert kinds(made) == ["Linear", "Linear", "Linear"]
    model = Network(lambda m, x: (x + m.b(m.a(x))).tanh(), **layers)
    made = fused(model, *(image(*size) for size in sizes))
    assert kinds(made) == ["Linear", "LinearAdd"]
    other = image(2, 3, 4, 6)
    vars(model)["steps"] = lambda m, x: m.c(x) + other.transpose(1, 2)
    fused(model, image(2, 4, 3, 6), image(6), image(1, 1, 1, 6))


LINEAR_STAYS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "scale of another kind": lambda m, x, y: x + (y * m.image_scale[:4]).permute(0, 3, 1, 2),
    "scale of all": lambda m, x, y: x + (y * m.scale.sum()).permute(0, 3, 1, 2),
    "scale that is read twice": lambda m, x, y: x + (y * y).permute(0, 3, 1, 2),
    "turned otherwise": lambda m, x, y: x + (m.scale * y).permute(0, 3, 2, 1),
    "the parameter itself": lambda m, x, y: m.scale.mul(y).permute(0, 3, 1, 2) * x,
}


@pytest.mark.parametrize("end", LINEAR_STAYS.values(), ids=LINEAR_STAYS.keys())
def test_linear_sum_stays(end: Any) -> None:
    made = fused(ConvNext(end), image(2, 6, 4, 4))
    assert "LinearAdd" not in kinds(made)


def test_scales_that_are_not_what_they_seem() -> None:
    def network(forward: Forward, size: tuple[int, ...] = (6,)) -> Network:
        model = Network(forward, a=nn.Linear(6, 6))
        model.scale = nn.Parameter(torch.rand(size), requires_grad=False)
        return model

    many = network(lambda m, x: m.a(x) * m.scale, (1, 1, 6))
    assert kinds(fused(many, image(6), image(2, 6), image(2, 3, 4, 6))) == ["Linear"]
    seen = network(lambda m, x: m.a(x) * m.scale.view(1, -1))
    fused(seen, image(6), image(2, 6))
    for forward in (
        lambda m, x: (m.scale.add_(1), m.a(x) * m.scale)[1],
        lambda m, x: (m.a(x) * m.scale, m.scale.view(-1, 1).mul_(2))[0],
    ):
        model = network(forward).double().eval()
        made = torchconv.fuse(model)
        x = image(2, 3, 4, 6)
        for _ in range(2):
            torch.testing.assert_close(made(x), model(x))


@pytest.mark.parametrize("scale", [1e-6, 1e-3])
def test_scales_keep_the_digits(scale: float) -> None:
    """ConvNeXt's first 1e-6 makes float16 weights that have few digits."""
    model = Network(lambda m, x: m.a(x) * m.scale, a=nn.Linear(384, 384))
    model.register_buffer("scale", torch.full((384,), scale))
    model.half().eval()
    x = torch.randn(1, 3, 3, 384).half()
    exact = copy.deepcopy(model).double()(x.double())
    error = [(m(x).double() - exact).norm() for m in (model, torchconv.fuse(model))]
    assert error[1] <= 3 * error[0]


def test_scales_that_serve_elsewhere_stay_what_they_are() -> None:
    model = ConvNext(lambda m, x, y: x + (m.scale * y).permute(0, 3, 1, 2) * m.scale[0])
    made = fused(model, image(2, 6, 4, 4))
    assert torch.equal(made.scale, model.scale)  # type: ignore[arg-type]
    twice = Network(
        lambda m, x: m.a(m.a(x) * m.scale) + x, a=nn.Linear(6, 6), scale_of=nn.Linear(1, 6)
    )
    twice.register_parameter("scale", nn.Parameter(torch.randn(6)))
    assert kinds(fused(twice, image(2, 3, 4, 6))).count("LinearAdd") == 1


def test_linear_sum_layer_alone() -> None:
    layer = LinearAdd(4, 5, dtype=torch.float64)
    x = image(2, 3, 3, 4)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x, 2), F.linear(x, layer.weight, layer.bias) + 2)


def test_a_norm_that_no_convolution_takes_has_the_activation() -> None:
    """As in DenseNet, where it comes first."""
    model = nn.Sequential(norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.SiLU(), norm(4), nn.Sigmoid())
    made = fused(model)
    assert kinds(made) == ["BatchNorm2d", "BatchNorm2d", "Conv2d", "Sigmoid"]


def test_layers_that_hand_on_are_passed_by() -> None:
    layers = (nn.Conv2d(4, 4, 3), nn.Identity(), norm(4), nn.Dropout(0.5), nn.SiLU())
    assert kinds(fused(nn.Sequential(*layers))) == ["Conv2d"]


def test_a_layer_called_twice_is_fused_in_each_place() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = Network(
        lambda m, x: m.conv_1(m.other(m.conv(m.bn(m.conv(x)).relu()))), conv=conv,
        bn=norm(4), other=norm(4), conv_1=copy.deepcopy(conv),
    )  # fmt: skip
    made = fused(model)
    assert kinds(made) == ["Conv2d"] * 3


def test_converted_models_and_other_layers() -> None:
    layers = (nn.Conv2d(4, 8, 3), norm(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 2, 1))
    model = torchconv.convert(nn.Sequential(*layers))
    made = fused(model)
    assert kinds(made) == ["Conv2d", "Conv2d", "MaxPool2d"]
    for layer in made.modules():
        if not list(layer.children()):
            assert type(layer).__module__ == "torchconv.nn"


# --- what stays ----------------------------------------------------------------------------------


class Joined(nn.Module):
    """A normalisation and an activation behind convolutions that stand side by side."""

    def __init__(self, forward: Forward, **options: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Conv2d(2, size, n, padding=n // 2, bias=n != 3)
            for size, n in ((2, 3), (4, 5), (1, 1))
        )
        self.bn = norm(7, **options)
        self.body = forward

    def made(self, x: Tensor) -> list[Tensor]:
        return [part(x[:, :2]) for part in self.parts]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


JOINED: dict[str, tuple[Forward, str | None]] = {
    "norm": (lambda m, x: m.bn(torch.cat(m.made(x), 1)), None),
    "relu": (lambda m, x: F.relu(m.bn(torch.cat(m.made(x), dim=1)), inplace=True), "relu"),
    "silu": (lambda m, x: F.silu(m.bn(torch.concat(tuple(m.made(x)), dim=-3))), "silu"),
    "another activation": (lambda m, x: F.elu(m.bn(torch.cat(m.made(x), 1))), None),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", JOINED)
def test_norm_behind_a_concatenation(case: str, affine: bool) -> None:
    forward, activation = JOINED[case]
    made = fused(
        Joined(forward, affine=affine),
        image(),
        image(1, 4, 9, 8).contiguous(memory_format=torch.channels_last),
    )
    assert kinds(made) == ["Conv2d"] * 3
    assert {m.activation for m in made.modules() if isinstance(m, nn.Conv2d)} == {activation}


JOINED_STAYS: dict[str, Forward] = {
    "read elsewhere": lambda m, x: m.bn(y := torch.cat(m.made(x), 1)) + 2 * y,
    "a part read elsewhere": lambda m, x: m.bn(torch.cat(p := m.made(x), 1)) * p[2],
    "another part": lambda m, x: m.bn(torch.cat([*m.made(x)[:2], x[:, :1]], 1)),
    "a part twice": lambda m, x: m.bn(torch.cat([(p := m.parts[0](x[:, :2])), p, p, x[:, :1]], 1)),
    "a layer twice": lambda m, x: m.bn(torch.cat([m.parts[2](x[:, :2]) for _ in range(7)], 1)),
    "rows": lambda m, x: m.bn(
        torch.cat([m.parts[1](x[:, :2])] + [x] * 2, 2).repeat(1, 2, 1, 1)[:, :7]
    ),
    "a sum behind": lambda m, x: F.relu(m.bn(torch.cat(m.made(x), 1)) + x[:, :1]),
}


@pytest.mark.parametrize("forward", JOINED_STAYS.values(), ids=JOINED_STAYS.keys())
def test_norm_behind_a_concatenation_stays(forward: Forward) -> None:
    assert any(isinstance(m, nn.BatchNorm2d) for m in fused(Joined(forward)).modules())


def test_norm_behind_a_concatenation_that_one_part_cannot_take() -> None:
    model = Joined(lambda m, x: m.bn(torch.cat(m.made(x), 1))).eval()
    model.bn.running_var[-1] = 1e-45  # the last one's weights would be too large
    model.bn.eps = 1e-45
    with torch.no_grad():
        model.parts[-1].weight.fill_(3e38)
    made = torchconv.fuse(model)
    assert any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    for part, own in zip(model.parts, made.get_submodule("parts").children(), strict=True):
        assert torch.equal(own.weight, part.weight)


NORM_STAYS: dict[str, Forward] = {
    "read twice": lambda m, x: m.bn(y := m.conv(x)) + 2 * y,
    "norm before": lambda m, x: m.conv(m.bn(x)),
    "function between": lambda m, x: m.bn(torch.exp(m.conv(x))),
}

SUM_OR_ACTIVATION_STAYS: dict[str, Forward] = {
    "added to itself": lambda m, x: (y := m.conv(x)) + y,
    "input overwritten": lambda m, x: (y := m.conv(x), x.mul_(2), y + x)[-1],
    "input overwritten by name": lambda m, x: (t := x * 1, y := m.conv(t), t.__iadd__(1), y + t)[
        -1
    ],
    "scaled sum": lambda m, x: torch.add(m.conv(x), x, alpha=2),
    "a number": lambda m, x: m.conv(x) + 1,
    "no sum": lambda m, x: m.add(m.conv(x), x),
    "tanh form of gelu": lambda m, x: F.gelu(m.conv(x), approximate="tanh"),
    "into the other term": lambda m, x: (t := x * 2, t.add_(m.conv(x)), t)[-1],
    "into the input": lambda m, x: (t := x * 2, u := t, operator.iadd(u, m.conv(x)), t * u)[-1],
}


@pytest.mark.parametrize("forward", NORM_STAYS.values(), ids=NORM_STAYS.keys())
def test_norm_stays(forward: Forward) -> None:
    assert kinds(fused(block(forward))) in (
        ["BatchNorm2d", "Conv2d"],
        ["BatchNormAdd2d", "Conv2d"],
    )


@pytest.mark.parametrize(
    "forward", SUM_OR_ACTIVATION_STAYS.values(), ids=SUM_OR_ACTIVATION_STAYS.keys()
)
def test_sum_or_activation_stays(forward: Forward) -> None:
    (layer,) = (m for m in fused(block(forward)).modules() if isinstance(m, nn.Conv2d))
    assert type(layer) is torchconv.nn.Conv2d and layer.activation is None


def test_what_is_overwritten_after_the_sum() -> None:
    """A sum is taken where it stood, wherever its activation comes."""
    for overwritten in (lambda x, t: t.mul_(0), lambda x, t: x.view(-1).fill_(3)):

        def forward(m: Any, x: Tensor, overwritten: Any = overwritten) -> Tensor:
            t = x * 2
            r = m.conv(x) + t
            overwritten(x, t)
            return F.relu(r)

        assert kinds(fused(block(forward))) == ["ConvAdd2d"]


TIED: dict[str, Forward] = {
    "weight": lambda m, x: F.conv_transpose2d(m.bn(m.conv(x)).relu(), m.conv.weight),
    "bias": lambda m, x: m.shortcut_bn(m.shortcut(x)) + m.shortcut.bias.mean(),
}


@pytest.mark.parametrize("forward", TIED.values(), ids=TIED.keys())
def test_parameters_that_serve_elsewhere_stay(forward: Forward) -> None:
    assert "BatchNorm2d" not in kinds(fused(block(forward)))


def test_sums_that_are_not_of_like_tensors() -> None:
    """Sizes from the image, types that are promoted or kept, and autocast."""
    fused(block(lambda m, x: m.conv(x) + x.size(0)))
    flipped = torchconv.nn.Conv2d(4, 4, 3, padding=1, flip_kernel=True)
    fused(Network(lambda m, x: (m.conv(x) + x.mean((2, 3), True)).relu(), conv=flipped))
    x = image().float()
    for forward in (
        lambda m, x: m.shortcut(x) + x.double(),
        lambda m, x: operator.iadd(m.shortcut(x), x.double()),
    ):
        model = block(forward).eval()
        with torch.no_grad():
            got, expected = torchconv.fuse(model)(x), model(x)
        assert got.dtype is expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    model = block(lambda m, x: m.shortcut(x) + x).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = torchconv.fuse(model)(x), model(x)
    assert got.dtype is expected.dtype is torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_layers_that_are_more_than_their_forward_stay() -> None:
    class Mine(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    calls: list[Any] = []
    hooked = nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda *args: calls.append(args))
    for conv in (Mine(4, 4, 1), hooked, nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))):
        assert "BatchNorm2d" in kinds(fused(nn.Sequential(conv, norm(4))))
    assert calls
    bn = norm(4)
    bn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert "BatchNorm2d" in kinds(fused(nn.Sequential(nn.Conv2d(4, 4, 1), bn)))
    batch_statistics = norm(4, track_running_stats=False)
    assert "BatchNorm2d" in kinds(fused(nn.Sequential(nn.Conv2d(4, 4, 1), batch_statistics)))


def test_weights_stay_in_their_range() -> None:
    bn = norm(4)
    with torch.no_grad():
        bn.weight.fill_(6e4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), bn).half().eval()
    with torch.no_grad():
        next(model.parameters()).fill_(2)  # of the convolution
    made = torchconv.fuse(model)
    assert "BatchNorm2d" in kinds(made)
    assert all(p.isfinite().all() for p in made.parameters())


# --- the copy ------------------------------------------------------------------------------------


def residual_network() -> Network:
    return block(SUMS["both convolutions"])


def test_float32_in_both_layouts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), norm(16), nn.ReLU6(), residual(16))
    double = copy.deepcopy(model).double().eval()
    for layout in (torch.contiguous_format, torch.channels_last):
        made = torchconv.fuse(copy.deepcopy(model).eval().to(memory_format=layout))  # type: ignore[call-overload]
        x = torch.randn(2, 3, 30, 31).contiguous(memory_format=layout)
        with torch.no_grad():
            got, expected = made(x), double(x.double())
        assert float((got - expected).norm() / expected.norm()) < 1e-6
        assert got.is_contiguous(memory_format=layout)


def residual(channels: int) -> Network:
    return Network(
        lambda m, x: F.relu(m.bn(m.conv(x)) + x),
        conv=nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        bn=norm(channels),
    )


def test_copies_and_pickles() -> None:
    made, x = fused(residual(4)), image()
    with torch.no_grad():
        expected = made(x)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(other(x), expected)
            assert kinds(other) == ["ConvAdd2d"]
        made.load_state_dict({name: value * 0 for name, value in made.state_dict().items()})
        assert torch.equal(made(x), x.relu())


def test_gradients_go_through() -> None:
    model, x = residual_network().double().eval(), image().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    made = torchconv.fuse(model)
    (got,) = torch.autograd.grad(made(x).square().sum(), x)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(made, (x,))


def test_compiles_and_exports() -> None:
    made, x = fused(residual_network()), image()
    with torch.no_grad():
        expected = made(x)
        torch.testing.assert_close(torch.compile(made, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(made, (x,)).module()(x), expected)


def test_of_a_convolution_alone() -> None:
    fused(nn.Conv2d(4, 3, 3))


def test_refuses() -> None:
    with pytest.raises(RuntimeError, match="training mode"):
        torchconv.fuse(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(TypeError, match="expected a torch.nn.Module, but got int"):
        torchconv.fuse(1)  # type: ignore[arg-type]
    branching = Network(lambda m, x: m.conv(x) if x.sum() > 0 else x, conv=nn.Conv2d(1, 1, 1))
    with pytest.raises(torch.fx.proxy.TraceError):
        torchconv.fuse(branching.eval())


def test_sum_layer_is_a_convolution() -> None:
    layer, x = ConvAdd2d(4, 4, 1), image().float()
    assert torch.equal(layer(x), torchconv.functional.conv2d(x, layer.weight, layer.bias))
