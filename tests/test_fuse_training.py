"""fuse_training: outputs, gradients and statistics are the model's own, which shares its state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchconv
from conftest import Network

Forward = Callable[[Any, Tensor], Tensor]


def block(forward: Forward) -> Network:
    return Network(
        forward,
        conv=nn.Conv2d(4, 4, 3, padding=1),
        bn=nn.BatchNorm2d(4),
        other=nn.Conv2d(4, 4, 1),
        other_bn=nn.BatchNorm2d(4),
        act=nn.ReLU(inplace=True),
        act6=nn.ReLU6(inplace=True),
        silu=nn.SiLU(),
        gelu=nn.GELU(),
        linear=nn.Linear(5, 7),
        drop=nn.Dropout(0.5),
    )


def image(*size: int) -> Tensor:
    return torch.randn(size or (3, 4, 6, 5), dtype=torch.float64)


def state_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a step makes: the output, every gradient and every buffer."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    out = model(x * 1)  # a network may overwrite its input, which a leaf forbids
    out.square().sum().backward()
    made = {"output": out.detach().clone(), "input": x.grad}
    made |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    made |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {name: value for name, value in made.items() if value is not None}


def fused(model: nn.Module, *inputs: Tensor) -> torch.fx.GraphModule:
    """The second form, after a check that a step of it does the same (default: to one image)."""
    model = model.double().train()
    for x in inputs or (image(),):
        expected = state_of(copy.deepcopy(model), x)
        made = torchconv.fuse_training(copy.deepcopy(model))
        got = state_of(made, x)
        # Layers that the network does not use are not in the second form.
        kept = {"output", "input", *made.state_dict()}
        assert set(got) == set(expected) & kept
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10)
            assert value.stride() == expected[name].stride()
    return torchconv.fuse_training(model)


def kinds(model: nn.Module) -> list[str]:
    return sorted(type(m).__name__ for m in model.modules() if not list(m.children()))


# --- what goes in --------------------------------------------------------------------------------

JOINED: dict[str, tuple[Forward, list[str]]] = {
    "relu": (lambda m, x: m.act(m.bn(m.conv(x))), ["BatchNorm2d", "Conv2d"]),
    "relu6": (lambda m, x: m.act6(m.bn(m.conv(x))), ["BatchNorm2d", "Conv2d"]),
    "silu": (lambda m, x: m.silu(m.bn(m.conv(x))), ["BatchNorm2d", "Conv2d"]),
    "hardswish": (lambda m, x: F.hardswish(m.bn(m.conv(x))), ["BatchNorm2d", "Conv2d"]),
    "function": (lambda m, x: F.relu(m.bn(m.conv(x))), ["BatchNorm2d", "Conv2d"]),
    "sum": (lambda m, x: m.bn(m.conv(x)) + x, ["BatchNormAdd2d", "Conv2d"]),
    "sum and silu": (
        lambda m, x: m.silu(x + m.bn(m.conv(x))),
        ["BatchNormAdd2d", "Conv2d", "SiLU"],
    ),
    "sum and relu": (lambda m, x: m.act(x + m.bn(m.conv(x))), ["BatchNormAdd2d", "Conv2d"]),
    "in place": (
        lambda m, x: m.act(m.bn(m.conv(x)).add_(m.other(x))),
        ["BatchNormAdd2d", "Conv2d", "Conv2d"],
    ),
    "two branches": (
        lambda m, x: m.act(m.bn(m.conv(x)) + m.other_bn(m.other(x))),
        ["BatchNorm2d", "BatchNormAdd2d", "Conv2d", "Conv2d"],
    ),
}


JOINED |= {
    "convolution and relu": (lambda m, x: m.bn(m.act(m.conv(x))), ["BatchNorm2d", "Conv2d"]),
    "convolution and silu": (lambda m, x: m.other(m.silu(m.conv(x))), ["Conv2d", "Conv2d"]),
    "linear and gelu": (lambda m, x: m.gelu(m.linear(m.conv(x))), ["Conv2d", "Linear"]),
}


@pytest.mark.parametrize("forward, layers", JOINED.values(), ids=JOINED.keys())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_joins(forward: Forward, layers: list[str], layout: torch.memory_format) -> None:
    made = fused(block(forward), image().contiguous(memory_format=layout))
    assert kinds(made) == layers
    assert not [node for node in made.graph.nodes if node.op in ("call_function", "call_method")]


@pytest.mark.parametrize("size", [(1, 4, 1, 1), (4, 1, 1), (1,)])
def test_sum_of_other_sizes_broadcasts(size: tuple[int, ...]) -> None:
    model = block(lambda m, x: m.act(m.bn(m.conv(x)) + m.addend))
    model.addend = nn.Parameter(torch.randn(size))
    assert kinds(fused(model)) == ["BatchNormAdd2d", "Conv2d"]


# --- what stays ----------------------------------------------------------------------------------

STAYS: dict[str, Forward] = {
    "read twice": lambda m, x: m.act(y := m.bn(m.conv(x)) * 1) + y,
    "called twice": lambda m, x: F.relu(m.bn(F.relu(m.bn(m.conv(x)) * 1)) * 1),
    "called twice in a row": lambda m, x: F.relu(m.bn(F.relu(m.bn(x)))),
    "convolution read twice": lambda m, x: m.bn(F.relu(y := m.conv(x)) + y),
    "another activation": lambda m, x: m.gelu(m.bn(m.conv(x))),
    "convolution": lambda m, x: m.bn(m.act(m.conv(x) + x)),
}
# PyTorch's backward of ReLU6 needs what went in alone.
STAYS |= {
    "relu6 overwritten": lambda m, x: m.bn(m.act6(m.conv(x)).add_(1)),
    "relu6 overwritten by a view": lambda m, x: (
        m.bn((y := F.relu6(m.conv(x))) * 2) + y.flatten(1)[:, :1].mul_(2).sum()
    ).flatten(1),
}


@pytest.mark.parametrize("forward", STAYS.values(), ids=STAYS.keys())
def test_stays(forward: Forward) -> None:
    made = fused(block(forward))
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(getattr(norm, "activation", None) is None for norm in norms)
    assert "BatchNormAdd2d" not in kinds(made)


def test_relu6_behind_a_sum_overwritten() -> None:
    made = fused(block(lambda m, x: F.relu6(m.bn(m.conv(x)) + x).mul_(2)))
    assert kinds(made) == ["BatchNormAdd2d", "Conv2d"]
    assert made.bn.activation is None


def test_hooks_keep_a_layer_what_it_is() -> None:
    model = block(lambda m, x: m.act(m.bn(m.conv(x))))
    seen: list[Tensor] = []
    model.bn.register_forward_hook(lambda module, args, out: seen.append(out))
    made = fused(model)
    assert kinds(made) == ["BatchNorm2d", "Conv2d", "ReLU"]


# --- a step, and another -------------------------------------------------------------------------


def test_shares_what_it_learns() -> None:
    model = block(lambda m, x: m.act(m.bn(m.conv(x)) + x)).train()
    made = torchconv.fuse_training(model)
    mine, its = dict(model.named_parameters()), dict(made.named_parameters())
    assert its and all(its[name] is mine[name] for name in its)
    buffers = dict(model.named_buffers())
    assert all(buffer is buffers[name] for name, buffer in made.named_buffers())
    assert type(model.bn) is nn.BatchNorm2d and type(model.conv) is nn.Conv2d
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = image().float()
    before = model.conv.weight.detach().clone()
    made(x).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.conv.weight)
    assert model.bn.num_batches_tracked == 1
    model.eval(), made.eval()
    torch.testing.assert_close(made(x), model(x))
    quick = torchconv.fuse(model)
    torch.testing.assert_close(quick(x), model(x))


def test_parameters_keep_their_order() -> None:
    """By which optimizers number them, in their checkpoints too."""
    model = block(lambda m, x: m.act(m.other_bn(m.other(x)) + m.bn(m.conv(x)) * m.scale)).train()
    model.scale = nn.Parameter(torch.ones(1))
    for made in (torchconv.fuse_training(model), torchconv.fuse_training(nn.Sequential(model))):
        its = [name.removeprefix("0.") for name, _ in made.named_parameters()]
        assert its == [name for name, _ in model.named_parameters() if name in its]
        assert len(its) == 9


def test_dropout_draws_as_the_model_does() -> None:
    fused(block(lambda m, x: m.drop(m.act(m.bn(m.conv(x))))))


BACK: dict[str, tuple[Forward, list[str]]] = {
    "activation": (lambda m, x: m.act6(m.bn(m.conv(x))), ["Conv2d"]),
    "sum": (lambda m, x: m.act(m.bn(m.conv(x)).add_(x)), ["ConvAdd2d"]),
    "sum behind": (lambda m, x: x + m.bn(m.conv(x)), ["ConvAdd2d"]),
}


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: F.dropout(x, 0.5, True),
        lambda x: F.dropout2d(x, training=True),
        lambda x: x * torch.rand_like(x),
        lambda x: x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    ],
)
def test_eval_warns_where_dropout_stays(drop: Any) -> None:
    model = Network(lambda m, x: drop(m.conv(x)), conv=nn.Conv2d(3, 4, 3)).train()
    made = torchconv.fuse_training(model)
    for second in (made, copy.deepcopy(made)):
        with pytest.warns(UserWarning, match="stays in eval mode"):
            second.eval()
        assert not second.training


@pytest.mark.parametrize(
    "drop", [lambda x: F.dropout(x, 0.0, True), lambda x: F.dropout(x, 0.5, False)]
)
@pytest.mark.filterwarnings("error")
def test_eval_of_layers_does_not_warn(drop: Any) -> None:
    layers = {"conv": nn.Conv2d(3, 4, 3), "drop": nn.Dropout(0.5)}
    model = Network(lambda m, x: drop(m.drop(m.conv(x))), **layers)
    made = torchconv.fuse_training(model.train()).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(made(x), model.eval()(x))


@pytest.mark.parametrize("forward, layers", BACK.values(), ids=BACK.keys())
def test_of_a_converted_model_and_back_to_inference(forward: Forward, layers: list[str]) -> None:
    model = torchconv.convert(block(forward).double().train())
    made = torchconv.fuse_training(model)
    assert kinds(made)[0].startswith("BatchNorm")
    made(image())
    x = image()
    quick = torchconv.fuse(made.eval())
    assert kinds(quick) == layers
    with torch.no_grad():
        torch.testing.assert_close(quick(x), model.eval()(x))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics(frozen: bool) -> None:
    model = block(lambda m, x: m.act(m.bn(m.conv(x)))).double().train()
    model.bn.running_mean.normal_()  # type: ignore[union-attr]
    model.bn.train(not frozen)
    for parameter in model.bn.parameters():
        parameter.requires_grad_(not frozen)
    x = image()
    expected = state_of(copy.deepcopy(model), x)
    got = state_of(torchconv.fuse_training(copy.deepcopy(model)), x)
    assert {"output", "input", "bn.running_mean"} <= got.keys() <= expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10)


def test_copies_and_pickles() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().train()
    made = torchconv.fuse_training(model)
    x = image()
    expected = state_of(copy.deepcopy(model), x)
    for each in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        got = state_of(each, x)
        torch.testing.assert_close(got["output"], expected["output"])
    assert made.state_dict().keys() == model.state_dict().keys()


def test_symbolic_trace_of_the_second_form() -> None:
    """Each normalisation stays one node."""
    model = block(lambda m, x: m.act(m.bn(m.conv(x)) + x)).double().train()
    made = torchconv.fuse_training(copy.deepcopy(model))
    traced = torch.fx.symbolic_trace(made)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"][-1] == "bn"
    x = image()
    expected = state_of(model, x)
    for name, value in state_of(traced, x).items():
        torch.testing.assert_close(value, expected[name])


def test_refuses() -> None:
    with pytest.raises(RuntimeError, match="eval mode"):
        torchconv.fuse_training(nn.Conv2d(1, 1, 1).eval())
    with pytest.raises(TypeError, match="int"):
        torchconv.fuse_training(3)  # type: ignore[arg-type]
