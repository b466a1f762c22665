"""Ten real networks: converted, compared with PyTorch forward and backward, compiled, restored.

The truth is PyTorch's run in float64, which torchconv must meet to a few units of float64's last
place, in the output and in every gradient. In float32 the output has a tight bound but gradients do
not: an activation within rounding of zero may fall on the other side of a ReLU, which moves them by
up to a few per cent. (PyTorch's own float32 gradients of these networks are up to 2% off for that
reason.) Errors are relative to a tensor's norm, because a deep network of random weights scales its
signal by orders of magnitude.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pytorchcv.model_provider import get_model
from torch import Tensor, nn

import torchconv
from conftest import relative_error
from dispatch_log import DispatchLog

# Name and smallest input that the network, or its last fixed-size pooling, takes.
NETWORKS = {
    "resnet18": 224,
    "squeezenet_v1_1": 224,  # ceil_mode
    "mobilenetv2_wd4": 224,  # depthwise
    "shufflenetv2_wd2": 224,
    "resnext14_32x4d": 224,  # 32 groups
    "bninception": 224,  # average and max pooling with stride 1 beside convolutions
    "efficientnet_b0": 64,  # 5x5 depthwise, convolutions of 1x1 images
    "unet_cityscapes": 64,  # upsampling
    "densenet40_k12_bc_cifar10": 32,
    "nin_cifar10": 32,
}
SWAPPED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)

DOUBLE_BOUND = 1e-12
FLOAT_OUTPUT_BOUND = 1e-5
FLOAT_GRADIENT_BOUND = 0.1


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    model: nn.Module = get_model(name, pretrained=False)
    size = NETWORKS[name]
    return model.eval().double(), torch.randn(1, 3, size, size, dtype=torch.double)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.double).sin().to(y.dtype)
    loss = (y.flatten() * weights).sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]


def assert_within(
    actual: list[Tensor], truth: list[Tensor], output: float, gradient: float
) -> None:
    errors = [relative_error(a, t) for a, t in zip(actual, truth, strict=True)]
    assert errors[0] <= output, f"output: {errors[0]:.1e}"
    assert max(errors[1:]) <= gradient, f"gradients: {max(errors[1:]):.1e}"


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    model, x = build(name)
    expected = Counter(type(m).__name__ for m in model.modules() if type(m) in SWAPPED)
    layers = [m for m in model.modules() if isinstance(m, SWAPPED)]
    before = [(type(m), list(vars(m))) for m in layers]
    parameters = list(model.parameters())
    truth = step(model, x)

    torchconv.convert(model)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    with DispatchLog() as log, torch.no_grad():
        model(x)
    assert log.count("conv2d") == expected["Conv2d"]
    assert log.count("max_pool2d") == expected["MaxPool2d"]
    assert log.count("avg_pool2d") == expected["AvgPool2d"]
    assert not log.from_torch()
    assert_within(step(model, x), truth, DOUBLE_BOUND, DOUBLE_BOUND)

    model.to(memory_format=torch.channels_last)
    image = x.contiguous(memory_format=torch.channels_last)
    assert_within(step(model, image), truth, DOUBLE_BOUND, DOUBLE_BOUND)
    model.to(memory_format=torch.contiguous_format)

    model, x = model.float(), x.float()
    single = step(model, x)
    assert_within(single, truth, FLOAT_OUTPUT_BOUND, FLOAT_GRADIENT_BOUND)

    torch._dynamo.reset()
    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert_within(compiled, truth, FLOAT_OUTPUT_BOUND, FLOAT_GRADIENT_BOUND)

    torchconv.restore(model)
    assert [m for m in model.modules() if isinstance(m, SWAPPED)] == layers
    assert [(type(m), list(vars(m))) for m in layers] == before
    with DispatchLog() as log, torch.no_grad():
        model(x)
    assert not [n for n in log.names if n.startswith("torchconv")]


def test_patched_network() -> None:
    """The same through the functions that the layers call, without touching the model."""
    model, x = build("squeezenet_v1_1")
    truth = step(model, x)
    with torchconv.patch():
        assert_within(step(model, x), truth, DOUBLE_BOUND, DOUBLE_BOUND)
        with DispatchLog() as log, torch.no_grad():
            model(x)
    assert not log.from_torch()


def test_network_under_inductor() -> None:
    model, x = build("nin_cifar10")
    truth = step(model, x)
    torchconv.convert(model).float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    assert_within(step(compiled, x.float()), truth, FLOAT_OUTPUT_BOUND, FLOAT_GRADIENT_BOUND)
