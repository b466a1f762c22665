"""Activations that a recorded network spells out, as models do that are older than PyTorch's own:
x * sigmoid(x) is SiLU (Elfwing et al. 2017, arXiv:1702.03118), relu6(x + 3) / 6 the hard sigmoid,
and x times that the hard swish (Howard et al. 2019, arXiv:1905.02244). Each becomes one node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.fx.subgraph_rewriter import replace_pattern_with_filters
from torch.nn import functional as F

from torchconv._fuse_graph import overwrites

__all__ = ["join_written_activations"]

_Unary = Callable[[Tensor], Tensor]

_SIGMOIDS: tuple[_Unary, ...] = (torch.sigmoid, F.sigmoid, lambda x: x.sigmoid())
_PRODUCTS: tuple[Callable[[Any, Any], Any], ...] = (
    lambda a, b: a * b,
    lambda a, b: b * a,
    torch.mul,
    lambda a, b: a.mul(b),
)


def _silu(times: Callable[[Any, Any], Any], gate: _Unary) -> _Unary:
    return lambda x: times(x, gate(x))


def _clamped(x: Tensor) -> Tensor:
    return F.relu6(x + 3.0)


def _hardsigmoid(x: Tensor) -> Tensor:
    return _clamped(x) / 6.0


def _hardswish_from_the_left(times: Callable[[Any, Any], Any]) -> _Unary:
    return lambda x: times(x, _clamped(x)) / 6.0


def _spellings(training: bool) -> Iterator[tuple[_Unary, _Unary]]:
    """A function and a way to write it; the hard swish before the hard sigmoid, its part."""
    for times, sigmoid in product(_PRODUCTS, _SIGMOIDS):
        yield lambda x: F.silu(x), _silu(times, sigmoid)
    for times in _PRODUCTS:
        yield lambda x: F.hardswish(x), _hardswish_from_the_left(times)
        yield lambda x: F.hardswish(x), _silu(times, _hardsigmoid)
    if not training:  # PyTorch's derivative of it has a factor of float32 precision
        yield lambda x: F.hardsigmoid(x), _hardsigmoid


def _is_whole(match: Any, _graph: Graph, pattern: Graph) -> bool:
    """torch.fx takes 16 * sigmoid(x) for x * sigmoid(x), with 16 for x and without the sigmoid."""
    return all(isinstance(match.nodes_map.get(n), Node) for n in pattern.nodes if n.op != "output")


def _numbers_agree(match: Any, _graph: Graph, _pattern: Graph) -> bool:
    """Whether 3 is 3 or 3.0; whether relu6 works in place does not matter."""
    return all(
        ours == theirs
        for node, found in match.nodes_map.items()
        for ours, theirs in zip(node.args, found.args, strict=False)
        if isinstance(ours, float)
    )


def join_written_activations(recorded: GraphModule) -> None:
    """Puts SiLU, hard swish and, in eval mode, the hard sigmoid in the place of what they are made
    of."""

    def nothing_is_overwritten(match: Any, graph: Graph, _pattern: Graph) -> bool:
        steps = set(match.nodes_map.values())
        nodes = list(graph.nodes)
        at = [nodes.index(node) for node in steps]
        between = nodes[min(at) : max(at)]
        return not any(overwrites(recorded, node) for node in between if node not in steps)

    there = {node.target for node in recorded.graph.nodes}
    for function, spelling in _spellings(recorded.training):
        steps = [n.target for n in symbolic_trace(spelling).graph.nodes if n.op.startswith("call")]
        if there.issuperset(steps):
            conditions: list[Any] = [_is_whole, _numbers_agree, nothing_is_overwritten]
            replace_pattern_with_filters(recorded, spelling, function, conditions, True)
