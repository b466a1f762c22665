"""Packed weights are never stale: whatever changes a layer or its call, outputs follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import parametrizations

import torchconv
import torchconv.functional as F
from packed_layers import SIZE, assert_fresh, kept, layer, packed as packed
from torchconv import nn


def by_optimizer(module: nn.Conv2d) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(torch.randn(SIZE)).square().sum().backward()
    optimizer.step()


def by_load_state_dict(module: nn.Conv2d) -> None:
    module.load_state_dict(layer().state_dict())


def by_assigning_a_state_dict(module: nn.Conv2d) -> None:
    module.load_state_dict(layer().state_dict(), assign=True)


def by_new_parameter(module: nn.Conv2d) -> None:
    module.weight = Parameter(torch.randn_like(module.weight))


def by_parameter_of_the_same_memory(module: nn.Conv2d) -> None:
    """Its count of changes is another one."""
    other = Parameter(module.weight.data)
    with torch.no_grad():
        while other._version < module.weight._version:
            other[0, 0, 0, 0] += 1
        other[0, 0, 0, 0] += 1
        module.weight[0, 0, 0, 1] += 1
    module.weight = other


def by_assigning_data(module: nn.Conv2d) -> None:
    module.weight.data = torch.randn_like(module.weight)


def by_assigning_data_twice(module: nn.Conv2d) -> None:
    """The second may come to lie where the first weights were."""
    for _ in range(2):
        module.weight.data = torch.zeros_like(module.weight)
    module.weight.data = torch.randn_like(module.weight)


def by_writing_data(module: nn.Conv2d) -> None:
    """As averages of weights (EMA) and target networks do."""
    module.weight.data.mul_(0.5).add_(1)


def by_negating_data(module: nn.Conv2d) -> None:
    """Flips one bit of many words, an even number of them in each lane of a checksum."""
    module.weight.data.view(-1)[:4096].neg_()


def by_writing_one_element_of_data(module: nn.Conv2d) -> None:
    module.weight.data[-1, 3, 2, 1] += 5


def by_clipping_data(module: nn.Conv2d) -> None:
    most = float(module.weight.abs().max()) * 0.999
    module.weight.data.clamp_(-most, most)


def by_a_vector_of_all_parameters(module: nn.Conv2d) -> None:
    vector = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    torch.nn.utils.vector_to_parameters(vector, module.parameters())
    assert_fresh(module)
    vector[1001] += 5


def by_reset_parameters(module: nn.Conv2d) -> None:
    module.reset_parameters()


def by_one_element(module: nn.Conv2d) -> None:
    with torch.no_grad():
        module.weight[7, 5, 1, 2] += 1


def by_memory_format(module: nn.Conv2d) -> None:
    module.to(memory_format=torch.channels_last)


def by_dtype(module: nn.Conv2d) -> None:
    module.double()


def by_dtype_and_back(module: nn.Conv2d) -> None:
    module.bfloat16().float()


def by_geometry(module: nn.Conv2d) -> None:
    module.stride, module.flip_kernel = (2, 1), True


CHANGES = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_is_noticed(change: Callable[[nn.Conv2d], None]) -> None:
    for _ in range(3):  # memory that was freed is used again
        module = layer()
        assert_fresh(module)
        before = kept(module)
        assert before > 0
        change(module)
        assert_fresh(module)
        # Two forms of the same weights, or elements of twice the size.
        most = 2 if change in (by_geometry, by_dtype) else 1
        assert kept(module) <= most * before  # nothing stale


def by_activation(module: nn.Conv2d) -> None:
    module.activation = "relu"


def by_padding(module: nn.Conv2d) -> None:
    module.padding = (0, 2)


def by_padding_in_a_list(module: nn.Conv2d) -> None:
    padding: Any = [0, 1]
    module.padding = padding
    with torch.no_grad():
        module(torch.randn(SIZE))
    padding[0] = 2


def by_padding_mode(module: nn.Conv2d) -> None:
    module.padding_mode = "reflect"


def by_new_bias(module: nn.Conv2d) -> None:
    module.bias = Parameter(torch.randn_like(module.bias))


def by_no_bias(module: nn.Conv2d) -> None:
    module.bias = None


def by_writing_bias(module: nn.Conv2d) -> None:
    module.bias.data.add_(1)


def by_parametrizing_bias(module: nn.Conv2d) -> None:
    torch.nn.utils.parametrize.register_parametrization(module, "bias", torch.nn.Softplus())


@pytest.mark.parametrize(
    "change",
    [
        *(by_activation, by_padding, by_padding_in_a_list, by_padding_mode, by_new_bias),
        *(by_no_bias, by_writing_bias, by_parametrizing_bias),
    ],
    ids=lambda f: f.__name__,
)
def test_arguments_are_not_stale(packed: nn.Conv2d, change: Callable[[nn.Conv2d], None]) -> None:
    """The layer remembers the operator's arguments, too."""
    change(packed)
    x = torch.randn(SIZE)
    images, padding = x, packed.padding
    if packed.padding_mode == "reflect":
        images, padding = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), 0
    for _ in range(2):
        with torch.no_grad():
            actual = packed(x)
            expected = F.conv2d(
                *(images, packed.weight, packed.bias, packed.stride, padding),
                activation=packed.activation,
            )
        assert torch.equal(actual, expected)


def test_other_images(packed: nn.Conv2d) -> None:
    """Sizes and gradients after a call that was remembered; and what is refused still is."""
    for size in ((1, 32, 7, 9), (3, 32, 20, 4), (32, 8, 8), (0, 32, 8, 8)):
        assert_fresh(packed, torch.randn(size))
    assert packed(torch.randn(SIZE)).requires_grad
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="should be the same"):
            packed(torch.randn(SIZE).double())
        with pytest.raises(RuntimeError, match="32 channels"):
            packed(torch.randn(2, 31, 8, 8))
        with pytest.raises(TypeError):
            packed([1.0])


def test_steps_of_a_subclass() -> None:
    class Doubling(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(2 * input, weight, bias)

    x = torch.randn(SIZE)
    module = Doubling(32, 32, 3, padding=1).eval()
    plain = layer()
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected = plain(2 * x)
        for _ in range(3):
            assert torch.equal(module(x), expected)
    own: Any = plain
    own._conv_forward = lambda input, weight, bias: input
    with torch.no_grad():
        assert own(x) is x


def test_winograd_switch(packed: nn.Conv2d) -> None:
    with torchconv.backends.allow_winograd(False):
        assert_fresh(packed)
    assert_fresh(packed)


def test_change_between_two_calls_of_one_graph() -> None:
    """A layer that is called twice with its weights changed in between."""
    module, x = layer(), torch.randn(SIZE)
    with torch.no_grad():
        first = module(x)
        module.weight.neg_()
        bias = module.bias.view(-1, 1, 1)
        torch.testing.assert_close(module(x) - bias, bias - first, atol=1e-4, rtol=1e-4)


def test_bias_is_not_packed(packed: nn.Conv2d) -> None:
    with torch.no_grad():
        packed.bias.data.add_(1)
    assert_fresh(packed)


def test_computed_weights_are_not_kept() -> None:
    """weight_norm and the like make new weights in every call."""
    module = parametrizations.weight_norm(layer())
    for _ in range(3):
        assert_fresh(module)
        with torch.no_grad():
            module.parametrizations.weight.original0.add_(1)
    assert kept(module) == 0


def test_functional_call(packed: nn.Conv2d) -> None:
    x = torch.randn(SIZE)
    for _ in range(3):
        other = {"weight": torch.randn_like(packed.weight), "bias": torch.zeros(32)}
        with torch.no_grad():
            y = torch.func.functional_call(packed, other, (x,))
            assert torch.equal(y, F.conv2d(x, other["weight"], other["bias"], padding=1))
    assert_fresh(packed)
