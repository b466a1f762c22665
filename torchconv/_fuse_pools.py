"""Averages that a recorded network takes by a function: `F.adaptive_avg_pool2d`, and the mean over
rows and columns. Each becomes a layer, which chains (_chain.py) can take."""

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
_OF_IMAGES = (torch.nn.Conv2d, torch.nn.BatchNorm2d, *_POOLS)


def name_pools(recorded: GraphModule) -> None:
    """Puts layers in the place of functions that average images."""
    for node in list(recorded.graph.nodes):
        if node.target is F.adaptive_avg_pool2d:
            size = _arguments(node, ("input", "output_size")).get("output_size")
            if _is_size(size):
                _call_layer(recorded, node, size, flat=False)
        elif node.target in (torch.mean, "mean") and node.args:
            given = _arguments(node, ("input", "dim", "keepdim"))
            flat = not given.pop("keepdim", False)
            if given.keys() == {"input", "dim"} and _are_rows_and_columns(given["dim"]):
                if _is_image(recorded, given["input"]):
                    _call_layer(recorded, node, 1, flat)


def _arguments(node: Node, names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False), **node.kwargs)


def _is_size(size: Any) -> bool:
    pair = (size, size) if isinstance(size, int) else size
    return isinstance(pair, (tuple, list)) and [type(n) for n in pair] == [int, int]


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


def _call_layer(recorded: GraphModule, node: Node, size: Any, flat: bool) -> None:
    """flat: whether rows and columns go."""
    name = next(name for i in count() if not hasattr(recorded, name := f"average_{i}"))
    recorded.add_submodule(name, torch.nn.AdaptiveAvgPool2d(size))
    image = _arguments(node, ("input",))["input"]
    with recorded.graph.inserting_before(node):
        made = recorded.graph.call_module(name, (image,))
        if flat:
            made = recorded.graph.call_function(torch.flatten, (made, 1))
    node.replace_all_uses_with(made)
    recorded.graph.erase_node(node)
