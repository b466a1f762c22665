"""Fold what follows a convolution into it, for inference: `fuse`.

torch.fx records the network. Where the result of a convolution goes to a batch normalisation and
nowhere else, the normalisation, which in eval mode multiplies each channel by one number and adds
another, moves into weights and bias (Jacob et al. 2018, arXiv:1712.05877, section 3.2); a sum with
another tensor and an activation that follow then move into the convolution's one pass over its
output. Each of these steps alone reads and writes the whole output once. A linear layer over the
channels of images, as ConvNeXt and Swin have it, is a 1x1 convolution and takes the same along;
what scales its channels (ConvNeXt's layer scale) goes into its weights.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from torchconv import nn
from torchconv._arguments import conv_padding
from torchconv._coverage import FLOATS, covers_linear
from torchconv.convert import convert
from torchconv.functional import activate, conv2d

__all__ = ["fuse"]

_CONVOLUTIONS = (torch.nn.Conv2d, nn.Conv2d)
_LINEAR = (torch.nn.Linear, nn.Linear)

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

# Of a tensor.
_METHODS = {name + end: name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")}

_SUMS = (operator.add, torch.add, "add")
_PRODUCTS = (operator.mul, torch.mul, "mul")
_PRODUCTS_IN_PLACE = (operator.imul, "mul_")  # into the first factor
_SUMS_IN_PLACE = (operator.iadd, "add_")  # into the first term

# A layer with one of these is more than its forward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# In eval mode these hand their input on.
_IDENTITIES = (torch.nn.Identity, torch.nn.Dropout, torch.nn.Dropout2d)

_LEAVES = (
    torch.nn.Conv2d,
    torch.nn.Linear,
    torch.nn.MaxPool2d,
    torch.nn.AvgPool2d,
    torch.nn.AdaptiveMaxPool2d,
    torch.nn.AdaptiveAvgPool2d,
    nn.MinPool2d,
    nn.LocallyConnected2d,
)


class ConvAdd2d(nn.Conv2d):
    """activation(conv(input) + other), with other of whatever kind may be added to the result.

    It is what `fuse` makes of a convolution and the sum behind it. Sizes are known when it runs:
    if both terms are alike, the sum is part of the convolution's pass, or else a step of its own.
    """

    # Whether the sum was one into the convolution's result, whose size and type then stay.
    adds_in_place: bool = False

    def forward(self, input: Tensor, other: Any = None) -> Tensor:
        if other is None or self._is_output_like(input, other):
            return super().forward(input, other)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        out = conv2d(input, self.weight, self.bias, *settings, flip_kernel=self.flip_kernel)
        out = out.add_(other) if self.adds_in_place else out + other
        return activate(self.activation, out)

    def _is_output_like(self, input: Tensor, other: Any) -> bool:
        if not isinstance(other, Tensor) or other.dtype != input.dtype:
            return False
        if other.device != input.device or torch.is_autocast_enabled(input.device.type):
            return False
        left, right, top, bottom = conv_padding(
            self.padding, input, self.weight, self.stride, self.dilation
        )
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        padded = (input.shape[-2] + top + bottom, input.shape[-1] + left + right)
        output = [
            (n - span) // s + 1 for n, span, s in zip(padded, spans, self.stride, strict=True)
        ]
        return other.shape == (*input.shape[:-3], self.out_channels, *output)


class LinearAdd(nn.Linear):
    """activation(linear(input) + other), as ConvAdd2d for a linear layer over images.

    With `image_order`, other and the result are N x K x H x W where the layer's own output is
    N x H x W x K.
    """

    adds_in_place: bool = False
    other_first: bool = False  # whose strides the sum then takes
    image_order: bool = False

    def forward(self, input: Tensor, other: Any = None) -> Tensor:
        if other is None:
            return super().forward(input)
        residual = self._residual(input, other)
        if residual is None:
            out = F.linear(input, self.weight, self.bias)
            out = out.permute(0, 3, 1, 2) if self.image_order else out
            if self.other_first:
                return activate(self.activation, other + out)
            return activate(self.activation, out.add_(other) if self.adds_in_place else out + other)
        out = super().forward(input, residual)
        return out.permute(0, 3, 1, 2) if self.image_order else out

    def _residual(self, input: Tensor, other: Any) -> Tensor | None:
        """other in the order of the layer's own output, if the layer can add it in its pass."""
        if not isinstance(other, Tensor):
            return None
        if self.image_order:
            if other.dim() != 4:
                return None
            other = other.permute(0, 2, 3, 1)
        # The result then has other's strides, too.
        covered = covers_linear(input, self.weight, self.bias, other)
        return other if covered and other.is_contiguous() else None


def fuse(model: torch.nn.Module) -> GraphModule:
    """A copy of `model` for inference, in which convolutions take along what follows them.

    Into a torch.nn.Conv2d or torchconv.nn.Conv2d go, in this order, where they follow and nothing
    else reads what lies between: a BatchNorm2d, into weights and bias; a sum with another tensor;
    and an activation that torchconv.nn.Conv2d has, be it a layer, a function or a method. Into a
    Linear, which over images with channels last is a convolution, go a multiplication of each
    channel by a parameter, into weights and bias, and sum and activation, the sum also behind a
    permutation to N x K x H x W. The results are those of `model` but for rounding. All other
    layers are swapped as by `convert`.

    The copy is a torch.fx.GraphModule: what `model.forward` does in Python is recorded, once, with
    its branches as they went then. It has weights of its own, so a later change of `model` does not
    reach it. Layers with hooks, parametrizations or a class of somebody's own stay as they are,
    and so does a normalisation or scale that would carry weights past their type's range. Under
    autocast what is folded no longer promotes a result to its own type.

    Args:
        model: in eval mode, of any type and on any device. It is not changed.

    Raises:
        RuntimeError: `model` is in training mode, where no normalisation is fixed.
        TypeError: `model` is no module.
        Whatever torch.fx raises for a model that it cannot record, where control flow depends on
        the values of tensors, for example: use `convert` there.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")
    if model.training:
        raise RuntimeError(
            "fuse makes a copy for inference, but the model is in training mode: call eval() first"
        )
    root = copy.deepcopy(model)
    graph = _Tracer().trace(root)
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = None  # an annotation that was not evaluated, which cannot be pickled
    recorded = GraphModule(root, graph, type(model).__name__)
    _drop_identities(recorded)
    # A layer counts once for each call, and for each use of its parameters.
    uses = Counter(
        node.target if node.op == "call_module" else str(node.target).rpartition(".")[0]
        for node in recorded.graph.nodes
        if node.op in ("call_module", "get_attr")
    )
    # From the end: of two convolutions that are summed up, the later one finds its other term.
    for node in reversed(list(recorded.graph.nodes)):
        if _takes_along(recorded, node):
            _fuse_chain(recorded, node, shared=uses[node.target] > 1)
    recorded.delete_all_unused_submodules()
    recorded.graph.lint()
    recorded.recompile()
    return convert(recorded)


class _Proxy(torch.fx.Proxy):
    """torch.fx would record `x += y` as x + y, which leaves what else refers to x as it was."""


def _record_in_place(name: str) -> None:
    target = getattr(operator, name)

    def record(self: torch.fx.Proxy, other: Any) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    setattr(_Proxy, f"__{name}__", record)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    _record_in_place(f"i{_name}")


class _Tracer(torch.fx.Tracer):
    """Records each layer that may be fused or swapped as one node."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> torch.fx.Proxy:
        return _Proxy(node, self)


def _layer(recorded: GraphModule, node: Node, *classes: type) -> torch.nn.Module | None:
    """The layer of one of just these classes that `node` calls on one tensor; None if otherwise."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    layer = recorded.get_submodule(str(node.target))
    hooked = any(getattr(layer, name, None) for name in _HOOKS)
    return None if hooked or "forward" in vars(layer) or type(layer) not in classes else layer


def _drop_identities(recorded: GraphModule) -> None:
    for node in recorded.graph.nodes:
        layer = _layer(recorded, node, *_IDENTITIES)
        if layer is not None and not layer.training:
            node.replace_all_uses_with(node.args[0])
            recorded.graph.erase_node(node)


def _takes_along(recorded: GraphModule, node: Node) -> bool:
    """Whether `node` is a convolution or a linear layer into which something may go."""
    layer: Any = _layer(recorded, node, *_CONVOLUTIONS, *_LINEAR)
    return (
        layer is not None
        and getattr(layer, "activation", None) is None
        and "_conv_forward" not in vars(layer)
        and layer.weight.dtype in FLOATS
        and not layer.weight.is_meta
    )


def _reader(node: Node) -> Node | None:
    """The one node that reads `node`."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _fuse_chain(recorded: GraphModule, node: Node, shared: bool) -> None:
    """Replaces `node`, a convolution or a linear layer, and what can go into it by one layer.

    shared: whether the layer serves elsewhere too, so that a copy has to take its place here.
    """
    layer: Any = recorded.get_submodule(str(node.target))
    layer = copy.deepcopy(layer) if shared else layer
    is_linear = isinstance(layer, torch.nn.Linear)
    chain = [node]
    scaled = False
    other = total = activation = turn = None
    if is_linear:
        scaled = _folds_scale(recorded, layer, node, (-1,))
        turn = _turn_to_images(node)
        if turn is not None:
            scaled = _folds_scale(recorded, layer, turn, (-1, 1, 1)) or scaled
            chain.append(turn)
    else:
        norm = _reader(node)
        if norm is not None and _folds(layer, _layer(recorded, norm, torch.nn.BatchNorm2d)):
            chain.append(norm)
    reader = _reader(chain[-1])
    if reader is not None and getattr(layer, "padding_mode", "zeros") == "zeros":
        other = _other_term(recorded, chain, reader)
        if other is not None:
            total = reader
            chain.append(reader)
            reader = _reader(reader)
    if turn is not None and total is None:
        chain, reader, turn = [node], None, None
    if reader is not None:
        activation = _activation(recorded, reader, chain[-1])
        if activation is not None:
            chain.append(reader)
    if len(chain) == 1 and not scaled:
        return
    if is_linear:
        layer.__class__ = nn.Linear if total is None else LinearAdd
    else:
        layer.__class__ = nn.Conv2d if total is None else ConvAdd2d
    vars(layer).pop("_converted", None)  # nothing but torchconv knows the activation
    layer.activation = activation
    if total is not None:
        layer.adds_in_place = total.target in _SUMS_IN_PLACE
    if total is not None and is_linear:
        layer.other_first = total.args[0] is other
        layer.image_order = turn is not None
    target = str(node.target)
    if shared:
        names = dict(recorded.named_modules())
        target = next(name for i in count(1) if (name := f"{target}_{i}") not in names)
        recorded.add_submodule(target, layer)
    # A sum needs both terms; without one the layer stays where its input is what it was.
    with recorded.graph.inserting_before(total or node):
        inputs = node.args if total is None else (*node.args, other)
        fused = recorded.graph.call_module(target, inputs)
    chain[-1].replace_all_uses_with(fused)
    for done in reversed(chain):
        recorded.graph.erase_node(done)


def _turn_to_images(node: Node) -> Node | None:
    """What alone reads `node`, N x H x W x K, and makes N x K x H x W of it."""
    reader = _reader(node)
    if reader is None or reader.kwargs or reader.target not in (torch.permute, "permute"):
        return None
    order = reader.args[1:]
    order = tuple(order[0]) if len(order) == 1 and isinstance(order[0], (tuple, list)) else order
    return reader if reader.args[0] is node and order in ((0, 3, 1, 2), (0, -1, 1, 2)) else None


def _folds_scale(
    recorded: GraphModule, layer: torch.nn.Linear, node: Node, size: tuple[int, ...]
) -> bool:
    """Folds a number for each output channel, with which what alone reads `node` multiplies it,
    into weights and bias, if it can be, and drops that step.

    size: the numbers', but for leading ones, with -1 for the channels.
    """
    reader = _reader(node)
    if reader is None or reader.kwargs or len(reader.args) != 2:
        return False
    first, second = reader.args
    if reader.target not in (*_PRODUCTS, *(_PRODUCTS_IN_PLACE if first is node else ())):
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
    return node.target in _PRODUCTS or (
        node.target in _PRODUCTS_IN_PLACE and node.args[0] is not held
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


def _folds(layer: torch.nn.Conv2d, norm: Any) -> bool:
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


def _other_term(recorded: GraphModule, chain: list[Node], reader: Node) -> Node | None:
    """What `reader` adds to the end of `chain`; None if it does something else."""
    if reader.op not in ("call_function", "call_method") or len(reader.args) != 2 or reader.kwargs:
        return None
    first, second = reader.args
    other = second if first is chain[-1] else first
    if reader.target not in (*_SUMS, *(_SUMS_IN_PLACE if first is chain[-1] else ())):
        return None
    if not isinstance(other, Node) or other is chain[-1]:
        return None
    # The convolution moves to where the sum is: nothing on the way may overwrite its input.
    between = chain[0].next
    while between is not reader:
        if between not in chain and _overwrites(recorded, between):
            return None
        between = between.next
    return other


def _overwrites(recorded: GraphModule, node: Node) -> bool:
    """Whether a node may change a tensor in place."""
    if node.op == "call_module":
        return bool(getattr(recorded.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = getattr(node.target, "__name__", str(node.target))
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name.startswith("__i")
        or name == "setitem"
        or (getattr(operator, name, None) is node.target and name.startswith("i"))
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
    )


def _activation(recorded: GraphModule, node: Node, previous: Node) -> str | None:
    """The name of the activation that `node` applies to `previous`; None for anything else."""
    layer: Any = _layer(recorded, node, *_LAYERS, torch.nn.Hardtanh)
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
