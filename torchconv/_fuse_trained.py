"""The network that `torchconv.fuse_training` makes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Trained"]

# Functions and methods, without the _ of those that work in place.
_RANDOM = ("bernoulli", "normal", "rand", "rand_like", "randn", "randn_like", "uniform")


class Trained(GraphModule):
    """A network recorded in training mode: what its Python did then it does in eval mode too."""

    def train(self, mode: bool = True) -> Self:
        if self.training and not mode and any(_draws(node) for node in self.graph.nodes):
            warnings.warn(
                "this network was recorded in training mode: what its forward drops or draws at "
                "random there stays in eval mode. Evaluate with the model that it was made of, or "
                "with torchconv.fuse(model.eval())",
                stacklevel=2,
            )
        return super().train(mode)


def _draws(node: Node) -> bool:
    """Whether a node draws random numbers by itself, and not as a layer that has the mode."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target)).rstrip("_")
    if name == "scaled_dot_product_attention":
        return bool(_argument(node, 4, "dropout_p", 0.0))
    if "dropout" in name:
        return bool(_argument(node, 1, "p", 0.5) and _argument(node, 2, "training", True))
    return name in _RANDOM


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    given = node.args[position] if position < len(node.args) else default
    return node.kwargs.get(name, given)
