"""What a chain may call, and in which form: what an operator takes beside tensors."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from torchconv import nn
from torchconv._arguments import activation_name
from torchconv._coverage import MOST_ROWS, covers_matrix
from torchconv._dispatch import is_plain, operator as operator_named
from torchconv._fuse_layers import ConvAdd2d
from torchconv.functional import average_values, select_values

__all__ = [
    "METHODS",
    "Call",
    "Flatten",
    "attribute_names",
    "attributes_of",
    "call_of",
    "flattens_to_rows",
    "settings_of",
]

_OPERATOR_OF: dict[type, str] = {
    nn.Conv2d: "conv2d",
    ConvAdd2d: "conv2d",
    nn.MaxPool2d: "max_pool2d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.Linear: "linear",
    torch.nn.Flatten: "flatten",
}
# As they were, of each class: whoever has put another in its place wants that to be called.
METHODS: dict[type, dict[str, Any]] = {
    kind: {name: getattr(kind, name) for name in ("__call__", "_call_impl", "forward")}
    for kind in _OPERATOR_OF
}

# What the layers' own attributes say of the operator's arguments.
_CONV = ("stride", "padding", "dilation", "groups", "padding_mode", "activation", "flip_kernel")
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("count_include_pad", "divisor_override", "output_size")
_FLATTEN = ("start_dim", "end_dim")
_READ = {*_CONV, *_POOL, *_AVERAGE, *_FLATTEN, "other_first", "_parameters", "_weights_frozen"}

_POOLINGS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
_PRODUCTS = (operator.mul, torch.mul)


class Flatten(NamedTuple):
    """What makes N x C of N x C x 1 x 1 in a recorded network."""

    target: str | None  # the layer's name; None: a function or method
    function: Callable[[Tensor], Tensor] | None  # if it is no layer
    nodes: Sequence[Node]  # of the graph, in order


class Call(NamedTuple):
    """A node of a recorded network that a chain may run."""

    operator: str
    target: str | None  # the layer's name; None: a function of PyTorch's
    tensors: Sequence[Any]  # nodes; a chain puts their positions there
    settings: Sequence[int] = ()  # of a function: cat's dimension
    # Of a linear layer: what makes rows of the images of one pixel that it reads.
    flatten: Flatten | None = None

    @property
    def targets(self) -> Sequence[str]:
        """The names of the layers that it calls, in order."""
        first = None if self.flatten is None else self.flatten.target
        return [name for name in (first, self.target) if name is not None]


def call_of(network: GraphModule, node: Node) -> Call | None:
    """`node` as a call; None where a chain may not run it."""
    if node.op == "call_module" and not node.kwargs and len(node.args) in (1, 2):
        name = str(node.target)
        layer: Any = network.get_submodule(name)
        if type(layer) is nn.Linear:
            return _head(network, node, layer)
        # Padding or a size that depends on the input is none of an operator's settings.
        size = getattr(layer, "output_size", None)
        by_input = isinstance(getattr(layer, "padding", None), str) or (
            isinstance(size, (tuple, list)) and None in size
        )
        operator_name = _OPERATOR_OF.get(type(layer))
        if operator_name in ("conv2d", *_POOLINGS) and _are_nodes(node.args) and not by_input:
            return Call(operator_name, name, node.args)
    if node.op == "call_function" and node.target is torch.cat:
        return _concatenation(node)
    if node.op == "call_function" and all(map(_is_image, node.args)):
        if node.target in _PRODUCTS and len(node.args) == 2 and not node.kwargs:
            return Call("mul", None, node.args)
        in_place = node.kwargs.get("inplace", False)
        if node.target is F.hardsigmoid and len(node.args) == 1 and not in_place:
            return Call("hardsigmoid", None, node.args)
    return None


def _head(network: GraphModule, node: Node, layer: Any) -> Call | None:
    """A linear layer of many weights over rows, which are images of one pixel or another such
    layer's result."""
    (source,) = node.args if len(node.args) == 1 else (None,)
    if not isinstance(source, Node) or not covers_matrix(layer.weight, layer.bias):
        return None
    if _is_head(network, source):
        return Call("linear", str(node.target), (source,))
    flatten = _flatten_of(network, source)
    if flatten is None:
        return None
    image: Any = source.args[0]
    # Then it has one pixel, or does not fit.
    if _channels_of(network, image) != layer.in_features:
        return None
    return Call("linear", str(node.target), (image,), flatten=flatten)


def _is_head(network: GraphModule, node: Node) -> bool:
    call = call_of(network, node) if node.op == "call_module" else None
    return call is not None and call.operator == "linear"


def _flatten_of(network: GraphModule, node: Node) -> Flatten | None:
    """`node`, where it does no more than to flatten a tensor for one reader."""
    if len(node.users) != 1 or not node.args or not isinstance(node.args[0], Node):
        return None
    image: Any = node.args[0]
    given = node.args[1:]
    if node.op == "call_module":
        name = str(node.target)
        layer: Any = network.get_submodule(name)
        if type(layer) is not torch.nn.Flatten or given or node.kwargs:
            return None
        return Flatten(name, None, (node,)) if flattens_to_rows(layer) else None
    if node.target in (torch.flatten, "flatten"):
        named: Any = dict(zip(("start_dim", "end_dim"), given, strict=False), **node.kwargs)
        dims: Any = (named.pop("start_dim", 0), named.pop("end_dim", -1))
        if named or len(given) > 2 or dims not in ((1, -1), (1, 3)):
            return None
        return Flatten(None, lambda t: t.flatten(*dims), (node,))
    if node.op == "call_method" and node.target in ("view", "reshape") and not node.kwargs:
        sizes: Any = given[0] if len(given) == 1 else given
        if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or sizes[1] != -1:
            return None
        asked, method = _batch_of(image, sizes[0]), str(node.target)
        if any(len(asking.users) != 1 for asking in asked) or not asked:
            return None
        return Flatten(None, lambda t: getattr(t, method)(t.size(0), -1), (*asked, node))
    return None


def flattens_to_rows(layer: torch.nn.Flatten) -> bool:
    return (layer.start_dim, layer.end_dim) == (1, -1)


def _batch_of(image: Node, size: Any) -> Sequence[Node]:
    """The nodes that ask for the first size of `image`, the last of which is `size`; none if that
    is something else."""
    if not isinstance(size, Node) or size.kwargs:
        return ()
    if (size.op, size.target) == ("call_method", "size"):
        return (size,) if size.args == (image, 0) else ()
    if size.target is not operator.getitem or size.args[1] != 0:
        return ()
    shape: Any = size.args[0]
    return (shape, size) if shape.target is getattr and shape.args == (image, "shape") else ()


def _channels_of(network: GraphModule, node: Node) -> int | None:
    """Of images that a convolution or normalisation makes, and poolings behind it."""
    while node.op == "call_module":
        layer: Any = network.get_submodule(str(node.target))
        if isinstance(layer, torch.nn.Conv2d):
            return layer.out_channels
        if isinstance(layer, torch.nn.BatchNorm2d):
            return layer.num_features
        if _OPERATOR_OF.get(type(layer)) not in _POOLINGS or len(node.args) != 1:
            return None
        source: Any = node.args[0]
        node = source
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


def attribute_names(layer: Any) -> tuple[str, ...]:
    """Of the layer's own attributes those that matter to a chain."""
    return tuple(name for name in vars(layer) if name in _READ)


def attributes_of(layer: Any) -> _Reader:
    """What reads them."""
    return _reader(attribute_names(layer))


@functools.cache
def _reader(names: tuple[str, ...]) -> _Reader:
    read = itemgetter(*names)
    return read if len(names) > 1 else lambda values: (read(values),)


def settings_of(name: str, layer: Any, calls: int) -> list[int] | None:
    """What a step of a program, of the operator of this name, takes for this layer, called on so
    many tensors, beside these; None where that is not known: its class is another one, say, or it
    has not been called yet. Raises what the operator's own checks of its arguments do."""
    if _OPERATOR_OF.get(type(layer)) != name:
        return None
    if name == "conv2d":
        return _of_convolution(layer, calls == 2)
    if name == "linear":
        return _of_linear(layer)
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
    settings = (*values, *packed.owner_of(weight))
    numbers = operator_named("conv2d").settings_once(settings).tolist()
    return [adds and layer.other_first, *numbers]


def _of_linear(layer: Any) -> list[int] | None:
    if layer._parameters.keys() != {"weight", "bias"}:
        return None
    weight, bias = layer.weight, layer.bias
    if not is_plain(weight, bias):
        return None
    rows = MOST_ROWS if covers_matrix(weight, bias) else 0
    activation = activation_name(layer.activation)
    # Its kernel reads the weights where they are: there is nothing to keep.
    settings = ((1, 1), (0, 0, 0, 0), (1, 1), 1, activation, False, 0, 0, False)
    return [rows, False, *operator_named("conv2d").settings_once(settings).tolist()]


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
