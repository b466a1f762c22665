"""Which layers a chain may call, and in which form: what an operator takes beside tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from torchconv import nn
from torchconv._dispatch import operator
from torchconv._fuse_layers import ConvAdd2d
from torchconv.functional import average_values, select_values

__all__ = ["FORWARDS", "HOOKS", "OPERATOR_OF", "attributes_of", "settings_of"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

OPERATOR_OF: dict[type, str] = {
    nn.Conv2d: "conv2d",
    ConvAdd2d: "conv2d",
    nn.MaxPool2d: "max_pool2d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
}
# As they were: whoever has put another in its place wants that to be called.
FORWARDS: dict[type, Any] = {kind: kind.forward for kind in OPERATOR_OF}  # type: ignore[attr-defined]

# What the layers' own attributes say of the operator's arguments.
_CONV = ("stride", "padding", "dilation", "groups", "padding_mode", "activation", "flip_kernel")
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("count_include_pad", "divisor_override", "output_size")
_READ = {*_CONV, *_POOL, *_AVERAGE, "other_first", "_packed_weights"}

_Reader = Callable[[dict[str, Any]], tuple[Any, ...]]


def attributes_of(layer: Any) -> _Reader:
    """What reads, from the layer's own attributes, those that matter to a chain."""
    return _reader(tuple(name for name in vars(layer) if name in _READ))


@functools.cache
def _reader(names: tuple[str, ...]) -> _Reader:
    return itemgetter(*names)


def settings_of(layer: Any, calls: int) -> list[int] | None:
    """What a step of a program takes for this layer, called on so many tensors, beside these; None
    where the layer may be more than one call of its operator, or has not been called yet."""
    kind = type(layer)
    if (
        FORWARDS.get(kind) is not kind.forward
        or not vars(layer).keys().isdisjoint(("forward", "_conv_forward"))
        or any(getattr(layer, name) for name in HOOKS)
    ):
        return None
    if OPERATOR_OF[kind] == "conv2d":
        return _of_convolution(layer, calls == 2)
    return None if calls == 2 else _of_pooling(layer)


def _of_convolution(layer: Any, adds: bool) -> list[int] | None:
    packed = layer._packed_weights
    if packed is None or layer._parameters.keys() != {"weight", "bias"}:
        return None
    weight = layer.weight
    values = packed.remembered(layer._settings(), weight, layer.bias)
    if values is None or (adds and not isinstance(layer, ConvAdd2d)):
        return None
    settings = (*values, packed.owner_of(weight), weight._version)
    numbers = operator("conv2d").settings_once(settings).tolist()
    return [adds and layer.other_first, *numbers]


def _of_pooling(layer: Any) -> list[int] | None:
    values: tuple[Any, ...]
    try:
        if isinstance(layer, nn.MaxPool2d):
            if layer.return_indices:
                return None
            window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            values = select_values("max_pool2d", *window, layer.ceil_mode)
        elif isinstance(layer, nn.AvgPool2d):
            window = (layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
            values = average_values(*window, layer.count_include_pad, layer.divisor_override)
        else:
            size = layer.output_size
            size = (size, size) if isinstance(size, int) else size
            if type(size) is not tuple or [type(n) for n in size] != [int, int]:
                return None  # it may depend on the input, or be none
            values = (size,)
    except (RuntimeError, TypeError):
        return None  # it is not of the kind that the operator takes: the layer says so
    numbers: list[int] = operator(OPERATOR_OF[type(layer)]).settings_once(values).tolist()
    return numbers
