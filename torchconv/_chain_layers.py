"""What a chain may call, and in which form: what an operator takes beside tensors."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from torchconv import nn
from torchconv._dispatch import is_plain, operator as operator_named
from torchconv._fuse_layers import ConvAdd2d
from torchconv.functional import average_values, select_values

__all__ = ["FORWARDS", "Call", "attributes_of", "call_of", "settings_of"]

_OPERATOR_OF: dict[type, str] = {
    nn.Conv2d: "conv2d",
    ConvAdd2d: "conv2d",
    nn.MaxPool2d: "max_pool2d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
}
# As they were: whoever has put another in its place wants that to be called.
FORWARDS: dict[type, Any] = {kind: kind.forward for kind in _OPERATOR_OF}  # type: ignore[attr-defined]

# What the layers' own attributes say of the operator's arguments.
_CONV = ("stride", "padding", "dilation", "groups", "padding_mode", "activation", "flip_kernel")
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("count_include_pad", "divisor_override", "output_size")
_READ = {*_CONV, *_POOL, *_AVERAGE, "other_first", "_parameters"}

_PRODUCTS = (operator.mul, torch.mul)


class Call(NamedTuple):
    """A node of a recorded network that a chain may run."""

    operator: str
    target: str | None  # the layer's name; None: a function of PyTorch's
    tensors: Sequence[Any]  # nodes; a chain puts their positions there
    settings: Sequence[int] = ()  # of a function: cat's dimension


def call_of(network: GraphModule, node: Node) -> Call | None:
    """`node` as a call; None where a chain may not run it."""
    if node.op == "call_module" and not node.kwargs and len(node.args) in (1, 2):
        name = str(node.target)
        layer: Any = network.get_submodule(name)
        kind = type(layer)
        # Padding that depends on the input is none of an operator's settings.
        by_input = isinstance(getattr(layer, "padding", None), str)
        if kind in _OPERATOR_OF and _are_nodes(node.args) and not by_input:
            return Call(_OPERATOR_OF[kind], name, node.args)
    if node.op == "call_function" and node.target is torch.cat:
        return _concatenation(node)
    if node.op == "call_function" and all(map(_is_image, node.args)):
        if node.target in _PRODUCTS and len(node.args) == 2 and not node.kwargs:
            return Call("mul", None, node.args)
        in_place = node.kwargs.get("inplace", False)
        if node.target is F.hardsigmoid and len(node.args) == 1 and not in_place:
            return Call("hardsigmoid", None, node.args)
    return None


def _concatenation(node: Node) -> Call | None:
    """torch.cat of images along a dimension that is a number."""
    given: dict[str, Any] = dict(zip(("tensors", "dim"), node.args, strict=False), **node.kwargs)
    parts, dim = given.pop("tensors", None), given.pop("dim", 0)
    if given or type(dim) is not int or not isinstance(parts, (tuple, list)) or not parts:
        return None
    return Call("cat", None, tuple(parts), (dim,)) if _are_nodes(parts) else None


def _are_nodes(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Node) for value in values)


def _is_image(value: Any) -> bool:
    """Whether an operand is a tensor and no number: networks also calculate with sizes."""
    return isinstance(value, Node) and (
        value.op == "call_module" or value.target in (*_PRODUCTS, F.hardsigmoid, torch.cat)
    )


_Reader = Callable[[dict[str, Any]], tuple[Any, ...]]


def attributes_of(layer: Any) -> _Reader:
    """What reads, from the layer's own attributes, those that matter to a chain."""
    return _reader(tuple(name for name in vars(layer) if name in _READ))


@functools.cache
def _reader(names: tuple[str, ...]) -> _Reader:
    return itemgetter(*names)


def settings_of(layer: Any, calls: int) -> list[int] | None:
    """What a step of a program takes for this layer, called on so many tensors, beside these; None
    where that is not known: its class is another one, say, or it has not been called yet. Raises
    what the operator's own checks of its arguments do."""
    kind = type(layer)
    if kind not in _OPERATOR_OF:
        return None
    if _OPERATOR_OF[kind] == "conv2d":
        return _of_convolution(layer, calls == 2)
    return None if calls == 2 else _of_pooling(layer)


def _of_convolution(layer: Any, adds: bool) -> list[int] | None:
    packed = layer._packed_weights
    if packed is None or layer._parameters.keys() != {"weight", "bias"}:
        return None
    weight, bias = layer.weight, layer.bias
    if not is_plain(weight, bias):
        return None
    values = packed.remembered(layer._settings(), weight, bias)
    if values is None or (adds and not isinstance(layer, ConvAdd2d)):
        return None
    settings = (*values, packed.owner_of(weight), weight._version)
    numbers = operator_named("conv2d").settings_once(settings).tolist()
    return [adds and layer.other_first, *numbers]


def _of_pooling(layer: Any) -> list[int] | None:
    values: tuple[Any, ...]
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
    name = _OPERATOR_OF[type(layer)]
    numbers: list[int] = operator_named(name).settings_once(values).tolist()
    return numbers
