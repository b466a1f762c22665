"""Poolings that a recorded network calls as functions, the mean over rows and columns among them.
Each becomes a layer, which chains (_chain.py) can take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from torchconv._fuse_graph import PRODUCTS

__all__ = ["name_pools"]

_POOLS = (torch.nn.MaxPool2d, torch.nn.AvgPool2d, torch.nn.AdaptiveAvgPool2d)
_WINDOW = ("kernel_size", "stride", "padding")
_AVERAGE = (*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override")
# The layer, and the function's arguments behind the input, which are the layer's.
_FUNCTIONS: dict[Any, tuple[type, Sequence[str]]] = {
    F.adaptive_avg_pool2d: (torch.nn.AdaptiveAvgPool2d, ("output_size",)),
    F.avg_pool2d: (torch.nn.AvgPool2d, _AVERAGE),
    F.max_pool2d: (
        torch.nn.MaxPool2d,
        (*_WINDOW, "dilation", "ceil_mode", "return_indices"),
    ),
}
_OF_IMAGES = (torch.nn.Conv2d, torch.nn.BatchNorm2d, *_POOLS)


def name_pools(recorded: GraphModule) -> None:
    """Puts layers in the place of functions that pool images."""
    for node in list(recorded.graph.nodes):
        if node.target in _FUNCTIONS:
            kind, names = _FUNCTIONS[node.target]
            given = _arguments(node, ("input", *names))
            image: Any = given.pop("input", None)
            if node.all_input_nodes == [image] and not given.get("return_indices"):
                _call_layer(recorded, node, image, _layer(kind, given))
        elif node.target in (torch.mean, "mean") and node.args:
            given = _arguments(node, ("input", "dim", "keepdim"))
            flat: bool = not given.pop("keepdim", False)
            image = given.get("input")
            if given.keys() != {"input", "dim"} or node.all_input_nodes != [image]:
                continue
            if _are_rows_and_columns(given["dim"]) and _is_image(recorded, image):
                _call_layer(recorded, node, image, torch.nn.AdaptiveAvgPool2d(1), flat)


def _arguments(node: Node, names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False), **node.kwargs)


def _layer(kind: Any, given: dict[str, Any]) -> torch.nn.Module:
    values = {k: tuple(v) if isinstance(v, (tuple, list)) else v for k, v in given.items()}
    if values.get("stride") == ():
        del values["stride"]  # the window's size
    layer: torch.nn.Module = kind(**values)
    return layer


def _are_rows_and_columns(dims: Any) -> bool:
    """Counted from the front, which images without a batch do not have."""
    return isinstance(dims, (tuple, list)) and sorted(map(str, dims)) == ["2", "3"]


def _is_image(recorded: GraphModule, node: Any) -> bool:
    """Whether it has four dimensions, if it has more than three."""
    if not isinstance(node, Node):
        return False
    if node.op == "call_module":
        return isinstance(recorded.get_submodule(str(node.target)), _OF_IMAGES)
    return node.target in PRODUCTS and any(
        isinstance(factor, Node) and factor.op == "call_module" and _is_image(recorded, factor)
        for factor in node.args
    )


def _call_layer(
    recorded: GraphModule, node: Node, image: Node, layer: torch.nn.Module, flat: bool = False
) -> None:
    """flat: whether rows and columns go."""
    name = next(name for i in count() if not hasattr(recorded, name := f"pool_{i}"))
    recorded.add_submodule(name, layer)
    with recorded.graph.inserting_before(node):
        made = recorded.graph.call_module(name, (image,))
        if flat:
            # To the fourth dimension, without which there is no mean over it either.
            made = recorded.graph.call_function(torch.flatten, (made, 1, 3))
    node.replace_all_uses_with(made)
    recorded.graph.erase_node(node)
