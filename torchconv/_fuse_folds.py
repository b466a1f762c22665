"""What `torchconv.fuse` folds into weights and bias: a normalisation, and a scale by channel."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchconv._fuse_graph import PRODUCTS, PRODUCTS_IN_PLACE, only_reader


def folds_norm(layer: torch.nn.Conv2d, norm: Any) -> bool:
    """Folds a normalisation into weights and bias, if it can be."""
    if norm is None or norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double()
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return _takes_parameters(layer, layer.weight.double() * factor.reshape(-1, 1, 1, 1), shift)


def folds_norm_by_parts(layers: Sequence[torch.nn.Conv2d], norm: Any) -> bool:
    """Folds a normalisation of these layers' results, one after another along the channels, into
    weights and biases of all, if it can be."""
    sizes = [layer.out_channels for layer in layers]
    if norm.num_features != sum(sizes) or len({layer.weight.dtype for layer in layers}) > 1:
        return False
    names = ("running_mean", "running_var", "weight", "bias")
    whole = {name: getattr(norm, name) for name in names}
    were = [(layer.weight, layer.bias) for layer in layers]
    start = 0
    for layer, size in zip(layers, sizes, strict=True):
        own = {n: None if t is None else t[start : start + size] for n, t in whole.items()}
        if not folds_norm(layer, SimpleNamespace(training=norm.training, eps=norm.eps, **own)):
            for changed, (weight, bias) in zip(layers, were, strict=True):
                changed.weight, changed.bias = weight, bias
            return False
        start += size
    return True


def folds_scale(
    recorded: GraphModule, layer: torch.nn.Linear, node: Node, size: tuple[int, ...]
) -> bool:
    """Folds a number for each output channel, with which what alone reads `node` multiplies it,
    into weights and bias, if it can be, and drops that step.

    size: the numbers', but for leading ones, with -1 for the channels.
    """
    reader = only_reader(node)
    if reader is None or reader.kwargs or len(reader.args) != 2:
        return False
    first, second = reader.args
    if reader.target not in (*PRODUCTS, *(PRODUCTS_IN_PLACE if first is node else ())):
        return False
    factor = second if first is node else first
    scale = _constant(recorded, factor)
    if scale is None or scale.dtype != layer.weight.dtype or scale.device != layer.weight.device:
        return False
    wanted = tuple(layer.out_features if n == -1 else n for n in size)
    # Of which only the images' number of dimensions is known.
    most = 1 if len(wanted) == 1 else 4
    if scale.dim() > most or tuple(scale.shape) != (1,) * (scale.dim() - len(wanted)) + wanted:
        return False
    factors = scale.detach().double().flatten()
    bias = None if layer.bias is None else layer.bias.double() * factors
    if not _takes_parameters(layer, layer.weight.double() * factors.unsqueeze(1), bias):
        return False
    reader.replace_all_uses_with(node)
    recorded.graph.erase_node(reader)
    while isinstance(factor, Node) and not factor.users:
        source = factor.args[0] if factor.args else None
        recorded.graph.erase_node(factor)
        factor = source
    return True


def _only_multiplies(node: Node, held: Node) -> bool:
    """Whether `node` does no more with `held`, or a view of it, than to multiply by it."""
    if node.op == "call_method" and node.target in ("reshape", "view"):
        return all(_only_multiplies(user, node) for user in node.users)
    return node.target in PRODUCTS or (
        node.target in PRODUCTS_IN_PLACE and node.args[0] is not held
    )


def _constant(recorded: GraphModule, node: Any) -> Tensor | None:
    """A tensor that the network holds, or that with sizes of one about it, where all that the
    network does with it is to multiply by it."""
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        uses = [n for n in recorded.graph.nodes if n.op == "get_attr" and n.target == node.target]
        if not all(_only_multiplies(user, use) for use in uses for user in use.users):
            return None
        owner, _, name = str(node.target).rpartition(".")
        held = getattr(recorded.get_submodule(owner), name)
        return held if isinstance(held, Tensor) and not held.is_meta else None
    if node.op != "call_method" or node.target not in ("reshape", "view") or node.kwargs:
        return None
    held = _constant(recorded, node.args[0])
    sizes: Any = node.args[1:]
    if held is None or held.dim() != 1 or any(isinstance(size, Node) for size in sizes):
        return None
    return held.reshape(*sizes)


def _takes_parameters(layer: Any, weight: Tensor, bias: Tensor | None) -> bool:
    """Gives a layer weights and bias that come in float64, if its own type can hold them: if none
    overflows, and none is so small that it loses digits that count."""
    dtype, needs_grad = layer.weight.dtype, layer.weight.requires_grad
    for exact in (weight,) if bias is None else (weight, bias):
        narrow = exact.to(dtype).double()
        if not narrow.isfinite().all():
            return False
        if (narrow - exact).norm() > torch.finfo(dtype).eps * exact.norm():
            return False
    layer.weight = torch.nn.Parameter(weight.to(dtype).detach(), needs_grad)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.to(dtype).detach(), needs_grad)
    return True
