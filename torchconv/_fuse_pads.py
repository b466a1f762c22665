"""Padding with zeros before a convolution, as networks ported from TensorFlow have it for their
strides. It moves into the convolution, which pads each side by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from torchconv import nn
from torchconv._coverage import FLOATS
from torchconv._fuse_graph import (
    called_layer,
    is_overwritten,
    layer_uses,
    may_be_viewed,
    overwrites,
)

__all__ = ["fold_pads"]

_PADS = (torch.nn.ZeroPad2d, torch.nn.ConstantPad2d)


def fold_pads(recorded: GraphModule) -> None:
    """Moves padding that only convolutions read into them."""
    uses = layer_uses(recorded)
    for node in list(recorded.graph.nodes):
        sides = _zeros_of(recorded, node)
        if (
            sides is None
            or not node.users
            or any(uses[reader.target] != 1 for reader in node.users)
        ):
            continue
        kinds = (torch.nn.Conv2d, nn.Conv2d)
        layers = [called_layer(recorded, reader, *kinds) for reader in node.users]
        image: Any = node.args[0] if node.args else node.kwargs["input"]
        if not all(map(_pads_sides, layers)) or not _stays(recorded, image, node):
            continue
        for layer in layers:
            _pad_also(layer, sides)
        node.replace_all_uses_with(image)
        recorded.graph.erase_node(node)


def _zeros_of(recorded: GraphModule, node: Node) -> tuple[int, int, int, int] | None:
    """How many zeros `node` puts to the left, right, top and bottom of an image, if it does."""
    layer: Any = called_layer(recorded, node, *_PADS)
    if layer is not None:
        given = {"input": node.args[0], "pad": layer.padding, "value": layer.value}
    elif node.target is F.pad:
        given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False))
        given.update(node.kwargs)
    else:
        return None
    pad: Any = given.get("pad")
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
        return None
    if not isinstance(pad, (list, tuple)) or len(pad) not in (2, 4):
        return None
    if any(type(side) is not int or side < 0 for side in pad):
        return None
    left, right, top, bottom = (*pad, 0, 0)[:4]
    return left, right, top, bottom


def _pads_sides(layer: Any) -> bool:
    return (
        layer is not None
        and layer.padding_mode == "zeros"
        and type(layer.padding) is tuple
        and len(layer.padding) in (2, 4)
        and "_conv_forward" not in vars(layer)
        and layer.weight.dtype in FLOATS
    )


def _stays(recorded: GraphModule, image: Node, node: Node) -> bool:
    """Whether the readers of `node`, which pads `image`, find that as `node` did, and backward
    too."""
    if recorded.training:
        if any(is_overwritten(recorded, same) for same in may_be_viewed(recorded, image)):
            return False
    waiting = set(node.users)
    while waiting:
        if overwrites(recorded, node):
            return False
        node = node.next
        waiting.discard(node)
    return True


def _pad_also(layer: Any, sides: tuple[int, int, int, int]) -> None:
    own = layer.padding
    h, w = own if len(own) == 2 else (0, 0)
    own = own if len(own) == 4 else (w, w, h, h)
    left, right, top, bottom = (a + b for a, b in zip(own, sides, strict=True))
    layer._reversed_padding_repeated_twice = [left, right, top, bottom]
    if left == right and top == bottom:
        layer.padding = (top, left)
        return
    if type(layer) is torch.nn.Conv2d:
        layer.__class__ = nn.Conv2d  # torch.nn's pads both sides alike
    vars(layer).pop("_converted", None)
    layer.padding = (left, right, top, bottom)
