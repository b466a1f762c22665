"""The checks of a recorded network (_fuse_record.py) that calls with images of known kinds can go
without.

They compare what Python asked for, sizes as a rule, with what it was when the network was recorded.
All of it follows from the kinds of what the network is called with: where these have passed, they
pass again. And between two convolutions a check ends what one operator may run.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from torchconv._fuse_graph import is_overwritten, overwrites, sources_of
from torchconv._fuse_record import KINDS_TELL, holds, length, truth, type_name

__all__ = ["calls_known_code", "drop_checks", "kinds_of"]

# Functions and methods that ask a tensor for what its kind does not tell.
_ASK_MORE = {
    *("data_ptr", "is_conj", "is_inference", "is_neg", "is_pinned", "is_set_to", "is_shared"),
    *("storage", "storage_offset", "untyped_storage"),
}

_OF_ANSWERS = {getattr, length, truth, type_name}

# Whose functions call no code of the network's owner, unlike operators that he has registered.
_KNOWN_MODULES = {"_operator", "builtins", "math", "torch", "torchconv"}
_OPERATORS = "torch._ops."
_KNOWN_OPERATORS = {f"{_OPERATORS}{library}" for library in ("aten", "prims", "torchconv")}


def calls_known_code(node: Node) -> bool:
    """Whether a node is no function of the network's owner, which may change layers, or answer
    otherwise in the next call."""
    if node.op != "call_function":
        return True
    module = str(getattr(node.target, "__module__", ""))
    if module.startswith(_OPERATORS):
        return module in _KNOWN_OPERATORS
    return module.partition(".")[0] in _KNOWN_MODULES


def kinds_of(arguments: Sequence[Any]) -> tuple[Any, ...] | None:
    """What tells whether the checks were passed before; None where that may take more."""
    if not all(type(t) is torch.Tensor and t.layout is torch.strided for t in arguments):
        return None
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in arguments)
    return (torch.get_default_dtype(), *kinds)  # of the tensors that a network makes of sizes


def drop_checks(network: GraphModule, graph: Graph, kept: Set[int]) -> dict[int, set[str]]:
    """Takes out of `graph` what the kinds of the network's arguments decide, and what only that
    reads. There is none to take where a call that overwrites its arguments could not be made once
    more with them.

    kept: the numbers of checks that stay.

    Returns, by the numbers of those that were taken, what of the network decides beside the kinds:
    the names of layers and tensors.
    """
    given = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    if any(is_overwritten(network, node) for node in given):
        return {}
    checks = [node for node in graph.nodes if node.target is holds]
    taken = {
        number: {
            str(node.target) for node in sources_of(check) if node.op in ("call_module", "get_attr")
        }
        for number, check in enumerate(checks)
        if number not in kept and _follows_from_kinds(check)
    }
    for number in taken:
        unread = [checks[number]]
        while unread:
            node = unread.pop()
            sources = node.all_input_nodes
            graph.erase_node(node)
            unread += [n for n in sources if not n.users and _is_of_answers(network, n)]
    return taken


def _follows_from_kinds(check: Node) -> bool:
    for node in sources_of(check):
        if not calls_known_code(node):
            return False
        if node.target is getattr and node.args[1] not in KINDS_TELL:
            return False
        name = str(getattr(node.target, "__name__", node.target))
        if name in _ASK_MORE:
            return False
    return True


def _is_of_answers(network: GraphModule, node: Node) -> bool:
    if node.op == "call_method":
        return node.target in KINDS_TELL
    if node.op != "call_function" or overwrites(network, node):
        return False
    return node.target in _OF_ANSWERS or node.target in vars(operator).values()
