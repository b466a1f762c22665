"""What `torchconv.fuse` asks of a recorded network: which node calls which layer, reads or
overwrites what, and applies which activation."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from torchconv import nn

_LAYERS: dict[type, str] = {
    torch.nn.ReLU: "relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh",
    torch.nn.SiLU: "silu",
    torch.nn.Hardswish: "hardswish",
    torch.nn.GELU: "gelu",
}

_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
    F.tanh: "tanh",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
}

# The first of each.
FUNCTION_OF = {name: function for function, name in reversed(_FUNCTIONS.items())}

# Of a tensor.
_METHODS = {name + end: name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")}

SUMS = (operator.add, torch.add, "add")
PRODUCTS = (operator.mul, torch.mul, "mul")
PRODUCTS_IN_PLACE = (operator.imul, "mul_")  # into the first factor
SUMS_IN_PLACE = (operator.iadd, "add_")  # into the first term

# A layer with one of these is more than its forward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# In eval mode these hand their input on.
_IDENTITIES = (torch.nn.Identity, torch.nn.Dropout, torch.nn.Dropout2d)

LEAVES = (
    torch.nn.Conv2d,
    torch.nn.Linear,
    torch.nn.BatchNorm2d,
    torch.nn.MaxPool2d,
    torch.nn.AvgPool2d,
    torch.nn.AdaptiveMaxPool2d,
    torch.nn.AdaptiveAvgPool2d,
    nn.MinPool2d,
    nn.LocallyConnected2d,
)


def called_layer(
    recorded: GraphModule, node: Node, *classes: type, most: int = 1
) -> torch.nn.Module | None:
    """The layer of one of just these classes that `node` calls on one tensor, or on at most `most`;
    None if otherwise."""
    if node.op != "call_module" or not 1 <= len(node.args) <= most or node.kwargs:
        return None
    layer = recorded.get_submodule(str(node.target))
    hooked = any(getattr(layer, name, None) for name in _HOOKS)
    return None if hooked or "forward" in vars(layer) or type(layer) not in classes else layer


def drop_identities(recorded: GraphModule) -> None:
    for node in recorded.graph.nodes:
        layer = called_layer(recorded, node, *_IDENTITIES)
        if layer is not None and not layer.training:
            node.replace_all_uses_with(node.args[0])
            recorded.graph.erase_node(node)


def layer_uses(recorded: GraphModule) -> Counter[Any]:
    """How often a layer is used: once for each call, and for each use of its parameters."""
    return Counter(
        node.target if node.op == "call_module" else str(node.target).rpartition(".")[0]
        for node in recorded.graph.nodes
        if node.op in ("call_module", "get_attr")
    )


def only_reader(node: Node) -> Node | None:
    """The one node that reads `node`."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def sources_of(node: Node) -> set[Node]:
    """`node`, and whatever its result is made of."""
    found = {node}
    waiting = [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def overwrites(recorded: torch.nn.Module, node: Node) -> bool:
    """Whether a node may change a tensor in place."""
    if node.op == "call_module":
        return bool(getattr(recorded.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = getattr(node.target, "__name__", str(node.target))
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name.startswith("__i")
        or name in ("setitem", "__setitem__")
        or (getattr(operator, name, None) is node.target and name.startswith("i"))
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
    )


def is_overwritten(recorded: GraphModule, node: Node, by_caller: bool = False) -> bool:
    """Whether the network, or who calls it, may change the result of `node` in place, as it is or
    by a view of it."""
    same = {node}
    for reader in node.graph.nodes:
        if same.isdisjoint(reader.all_input_nodes):
            continue
        if overwrites(recorded, reader) or (by_caller and reader.op == "output"):
            return True
        if not _makes_another(recorded, reader):
            same.add(reader)
    return False


def may_be_viewed(recorded: GraphModule, node: Node) -> set[Node]:
    """`node`, and what its result may be a view of."""
    found = {node}
    waiting = [node]
    while waiting:
        last = waiting.pop()
        if not _makes_another(recorded, last):
            new = set(last.all_input_nodes) - found
            found |= new
            waiting += new
    return found


def _makes_another(recorded: GraphModule, node: Node) -> bool:
    """Whether a node that changes nothing in place surely returns no view of what it reads."""
    if node.op == "call_module":
        return isinstance(recorded.get_submodule(str(node.target)), (*LEAVES, *_LAYERS))
    return node.target in (*SUMS, *PRODUCTS, *_FUNCTIONS, torch.cat)


def activation_of(recorded: GraphModule, node: Node, previous: Node) -> str | None:
    """The name of the activation that `node` applies to `previous`; None for anything else."""
    layer: Any = called_layer(recorded, node, *_LAYERS, torch.nn.Hardtanh)
    if type(layer) is torch.nn.Hardtanh:
        return "relu6" if (layer.min_val, layer.max_val) == (0, 6) else None
    if layer is not None:
        return None if getattr(layer, "approximate", "none") != "none" else _LAYERS[type(layer)]
    if node.args != (previous,) or node.kwargs.get("approximate", "none") != "none":
        return None
    if not node.kwargs.keys() <= {"inplace", "approximate"}:
        return None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None
