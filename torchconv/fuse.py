"""Fold what follows a convolution into it: `fuse` for inference, `fuse_training` for training.

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
import threading
from collections import Counter
from itertools import count
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.proxy import TraceError

from torchconv import nn
from torchconv._activations import NORM_CLAMPS, NORM_CURVES
from torchconv._chain import Fused
from torchconv._coverage import FLOATS
from torchconv._fuse_folds import folds_norm, folds_norm_by_parts, folds_scale
from torchconv._fuse_graph import (
    FUNCTION_OF,
    SUMS,
    SUMS_IN_PLACE,
    activation_of,
    called_layer,
    drop_identities,
    is_overwritten,
    layer_uses,
    only_reader,
    overwrites,
)
from torchconv._fuse_layers import BatchNormAdd2d, ConvAdd2d, LinearAdd
from torchconv._fuse_pads import fold_pads
from torchconv._fuse_pools import name_pools
from torchconv._fuse_record import Tracer
from torchconv._fuse_trained import Trained
from torchconv._fuse_written import join_written_activations
from torchconv.convert import convert, plain_class

__all__ = ["fuse", "fuse_training"]

# torch.fx puts functions of its own in the place of PyTorch's while it records, and then back what
# was there.
_ONE_AT_A_TIME = threading.RLock()

_CONVOLUTIONS = (torch.nn.Conv2d, nn.Conv2d)
_LINEAR = (torch.nn.Linear, nn.Linear)
_NORMS = (torch.nn.BatchNorm2d, nn.BatchNorm2d)
# What a layer becomes with an activation, and with a sum and maybe an activation.
_JOINED: dict[type, tuple[type, type]] = {
    torch.nn.Conv2d: (nn.Conv2d, ConvAdd2d),
    torch.nn.Linear: (nn.Linear, LinearAdd),
    torch.nn.BatchNorm2d: (nn.BatchNorm2d, BatchNormAdd2d),
}


def fuse(model: torch.nn.Module, *example: Any, freeze: bool = False) -> GraphModule:
    """A copy of `model` for inference, in which convolutions take along what follows them.

    Into a torch.nn.Conv2d or torchconv.nn.Conv2d go, in this order, where they follow and nothing
    else reads what lies between: a BatchNorm2d, into weights and bias; a sum with another tensor;
    and an activation that torchconv.nn.Conv2d has, be it a layer, a function or a method.
    BatchNorm2d and activation may also follow a torch.cat of several convolutions. Into a Linear,
    which over images with channels last is a convolution, go a multiplication of each channel by a
    parameter, into weights and bias, and sum and activation, the sum also behind a permutation to N
    x K x H x W. A normalisation that no convolution can take keeps its statistics and has in its
    own pass what `fuse_training` gives it. The results are those of `model` but for rounding. All
    other layers are swapped as by `convert`.

    The copy is a torch.fx.GraphModule: what `model.forward` does in Python is recorded, once, with
    its branches as they went then. Where they depend on sizes, as in many models of transformers,
    `example` tells which way they went; a call that would go another way raises. (While it is
    recorded, isinstance(x, torch.Tensor) and x.dtype is torch.float32 are false; == can be asked.
    torch.fx records by replacing the call of torch.nn.Module, of the whole process: no other thread
    should call a model meanwhile.) The copy has weights of its own, so a later change of `model`
    does not reach it. Layers with hooks, parametrizations or a forward of somebody's own stay as
    they are, and so does a normalisation or scale that would carry weights past their type's range.
    Under autocast what is folded no longer promotes a result to its own type.

    SiLU, hard swish and hard sigmoid are known also where a model spells them out, x * sigmoid(x);
    poolings that are called as functions, and the mean over rows and columns, become layers. Zeros
    put around images (ZeroPad2d, F.pad) become padding of the convolutions that read them.
    Calls that nothing records, traces or watches go through runs of convolutions, poolings, what
    lies between them and linear layers behind them in one operator (_chain.py), with the same bits.

    Args:
        model: in eval mode, of any type and on any device. It is not changed.
        example: the positional arguments of one call, which are then those of the copy; all others
            keep their defaults. Only their shapes and types are looked at, nothing is computed.
        freeze: whoever writes to the weights of the copy does it in ways that PyTorch counts: by
            operations in place (so do load_state_dict and optimizers, but those with fused=True),
            or by another tensor as the parameter or as its `data`. Layers then keep what they make
            of their weights without a look at these in each call, and all of it, also what takes
            about as long to make as that look. What is written through `weight.data` or a tensor
            that was set as it, a NumPy array, shared memory or a fused optimizer is not noticed
            until `torchconv.drop_packed_weights(copy)` is called. Copies and pickles of the copy
            are frozen as it is; a state_dict knows nothing of it.

    Raises:
        RuntimeError: `model` is in training mode, where no normalisation is fixed.
        TypeError: `model` is no module.
        Whatever torch.fx raises for a model that it cannot record, and its TraceError where control
            flow depends on the values of tensors, or where calls would draw random numbers or
            change what the model holds beside its layers: use `convert` there.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")
    if model.training:
        raise RuntimeError(
            "fuse makes a copy for inference, but the model is in training mode: call eval() first"
        )
    recorded = _record(copy.deepcopy(model), model, example, Fused)
    drop_identities(recorded)
    fold_pads(recorded)
    _part_norms(recorded)
    uses = layer_uses(recorded)
    for node in list(recorded.graph.nodes):
        _fold_into_parts(recorded, node, uses)
    # From the end: of two convolutions that are summed up, the later one finds its other term.
    # Normalisations last: what no convolution takes has an activation of its own.
    for takes in (_takes_along, _is_norm):
        for node in reversed(list(recorded.graph.nodes)):
            if takes(recorded, node):
                _fuse_chain(recorded, node, shared=uses[node.target] > 1)
    name_pools(recorded)
    made = _finish(recorded)
    nn.freeze_weights(made, freeze)
    return made


def fuse_training(model: torch.nn.Module, *example: Any) -> GraphModule:
    """A second form of `model` for training, in which layers take along what follows them.

    Into a BatchNorm2d of torch.nn or torchconv.nn go, where nothing else reads what lies between,
    a sum with another tensor and a ReLU or ReLU6 behind it, or SiLU or Hardswish alone; into a
    Conv2d or Linear an activation that torchconv.nn.Conv2d has, and into a Conv2d zeros put around
    its images: these are then read and written once instead of once a step, in both directions.
    The results and gradients are those of `model` but for rounding. All other layers are swapped
    as by `convert`.

    What is returned is a torch.fx.GraphModule, recorded as by `fuse`. Its parameters and buffers
    are those of `model`, the same tensors under the same names: whatever one learns the other
    knows, an optimizer or a checkpoint of either serves both, and `model` itself, or
    ``fuse(model.eval())``, is what to evaluate with: ``eval()`` of the second form reaches layers,
    but not what is recorded outside them, and warns where that draws random numbers, as F.dropout.
    (Moving one of the two to another device or type parts them.) What `forward` computes of buffers
    alone it computes once, while it is recorded, and what torch.utils.checkpoint would run again in
    backward is kept. Layers with hooks, parametrizations or a forward of somebody's own, and layers
    that are called twice, stay as they are; so does a ReLU6 whose result is overwritten, where
    backward would need it.

    Args:
        model: in training mode, of any type and on any device. It is not changed.
        example: as for `fuse`.

    Raises:
        RuntimeError: `model` is in eval mode.
        TypeError: `model` is no module.
        Whatever torch.fx raises for a model that it cannot record, as for `fuse`, and its
            TraceError where a part of the model switches gradients off.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")
    if not model.training:
        raise RuntimeError(
            "fuse_training is for training, but the model is in eval mode: call train() first, "
            "or fuse for inference"
        )
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    recorded = _record(copy.deepcopy(model, shared), model, example, Trained)
    fold_pads(recorded)
    uses = layer_uses(recorded)
    for node in reversed(list(recorded.graph.nodes)):
        if uses[node.target] != 1:
            continue
        if _is_norm(recorded, node):
            _fuse_chain(recorded, node)
        elif _takes_along(recorded, node):
            _fuse_activation(recorded, node)
    return _finish(recorded)


def _record(
    root: torch.nn.Module,
    model: torch.nn.Module,
    example: tuple[Any, ...],
    kind: type[GraphModule],
) -> GraphModule:
    with _ONE_AT_A_TIME:
        tracer = Tracer(example)
        graph = tracer.trace(root)
        for module in root.modules():  # not before: a model may ask for a layer's class
            plain = plain_class(type(module))
            if plain is not type(module):
                module.__class__ = plain
        for node in graph.nodes:
            if isinstance(node.type, str):
                node.type = None  # an annotation that was not evaluated, which cannot be pickled
        recorded = kind(root, graph, type(model).__name__)
        _refuse_overwritten_views(recorded, tracer.views)
        _make_anew(recorded, tracer.made)
        _save_like(recorded, model)
        join_written_activations(recorded)
        _order_like(recorded, model)
        return recorded


def _refuse_overwritten_views(recorded: GraphModule, names: set[str]) -> None:
    """Raises where calls would change a tensor by a view of it, which a copy would part from it."""
    for node in recorded.graph.nodes:
        if node.op == "get_attr" and node.target in names and is_overwritten(recorded, node):
            raise TraceError(
                "each call would change a tensor by a view of it that is made of no input, which "
                "the recording does not see"
            )


def _save_like(made: torch.nn.Module, model: torch.nn.Module) -> None:
    """Leaves out of checkpoints what the model's do not have: torch.fx makes buffers of all tensors
    but parameters, which are saved."""
    theirs = dict(model.named_modules(remove_duplicate=False))
    for name, own in made.named_modules(remove_duplicate=False):
        layer = theirs[name]
        saved = layer._buffers.keys() - layer._non_persistent_buffers_set
        own._non_persistent_buffers_set = own._buffers.keys() - saved


def _make_anew(recorded: GraphModule, names: set[str]) -> None:
    """Gives each call tensors of its own, where it may change them, in the place of those that
    `forward` made while it was recorded."""
    for node in list(recorded.graph.nodes):
        if node.op == "get_attr" and node.target in names:
            if is_overwritten(recorded, node, by_caller=True):
                with recorded.graph.inserting_after(node):
                    own = recorded.graph.call_method("clone", (node,))
                node.replace_all_uses_with(own, lambda user, own=own: user is not own)


def _order_like(made: torch.nn.Module, model: torch.nn.Module) -> None:
    """Puts layers and parameters into the model's order. torch.fx has those of the calls, and
    optimizers number parameters as they come."""
    for own, theirs in (
        (made._modules, model._modules),
        (made._parameters, model._parameters),
        (made._buffers, model._buffers),
    ):
        entries: dict[str, Any] = dict(own)
        own.clear()
        names = [name for name in theirs if name in entries]
        own.update({name: entries[name] for name in dict.fromkeys((*names, *entries))})
    for name, child in made.named_children():
        if name in model._modules:
            _order_like(child, model.get_submodule(name))


def _finish(recorded: GraphModule) -> GraphModule:
    recorded.delete_all_unused_submodules()
    recorded.graph.lint()
    recorded.recompile()
    return convert(recorded)


def _is_norm(recorded: GraphModule, node: Node) -> bool:
    """Whether `node` is a normalisation into which something may go."""
    layer: Any = called_layer(recorded, node, *_NORMS)
    return layer is not None and getattr(layer, "activation", None) is None


def _part_norms(recorded: GraphModule) -> None:
    """Makes steps of their own of the sum and the activation that normalisations have taken, so
    that the convolution before one can take all three."""
    joined = []
    for node in recorded.graph.nodes:
        layer: Any = called_layer(recorded, node, nn.BatchNorm2d, BatchNormAdd2d, most=2)
        if layer is not None and (layer.activation is not None or len(node.args) == 2):
            joined.append((node, layer, layer.activation))
    for node, layer, activation in joined:
        layer.__class__ = nn.BatchNorm2d
        layer.activation = None
        with recorded.graph.inserting_before(node):
            end = recorded.graph.call_module(node.target, node.args[:1])
            for other in node.args[1:]:
                terms = (other, end) if getattr(layer, "other_first", False) else (end, other)
                in_place = getattr(layer, "adds_in_place", False)
                end = recorded.graph.call_function(
                    operator.iadd if in_place else operator.add, terms
                )
            if activation is not None:
                end = recorded.graph.call_function(FUNCTION_OF[activation], (end,))
        node.replace_all_uses_with(end)
        recorded.graph.erase_node(node)


def _takes_along(recorded: GraphModule, node: Node) -> bool:
    """Whether `node` is a convolution or a linear layer into which something may go."""
    layer: Any = called_layer(recorded, node, *_CONVOLUTIONS, *_LINEAR)
    return (
        layer is not None
        and getattr(layer, "activation", None) is None
        and "_conv_forward" not in vars(layer)
        and layer.weight.dtype in FLOATS
        and not layer.weight.is_meta
    )


def _fold_into_parts(recorded: GraphModule, node: Node, uses: Counter[Any]) -> None:
    """Moves normalisation and activation behind `node` to before it, if it concatenates the
    channels of convolutions that serve for nothing else."""
    if node.target not in (torch.cat, torch.concat, torch.concatenate) or len(node.args) > 2:
        return
    settings = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    parts: Any = settings.get("tensors")
    if settings.get("dim") not in (1, -3) or settings.keys() - {"tensors", "dim"}:
        return
    if not isinstance(parts, (list, tuple)):
        return
    for part in parts:
        if not isinstance(part, Node) or only_reader(part) is not node or uses[part.target] != 1:
            return
        if not _takes_along(recorded, part) or called_layer(recorded, part, *_LINEAR) is not None:
            return
    norm = only_reader(node)
    if len(set(parts)) != len(parts) or norm is None or not _is_norm(recorded, norm):
        return
    end = only_reader(norm)
    if end is not None and _other_term(recorded, [norm], end) is not None:
        return  # the normalisation takes the sum along
    layers: Any = [recorded.get_submodule(str(part.target)) for part in parts]
    if not folds_norm_by_parts(layers, recorded.get_submodule(str(norm.target))):
        return
    norm.replace_all_uses_with(node)
    recorded.graph.erase_node(norm)
    reader = only_reader(node)
    activation = None if reader is None else activation_of(recorded, reader, node)
    if reader is None or activation is None:
        return
    for part in parts:
        with recorded.graph.inserting_after(part):
            active = recorded.graph.call_function(FUNCTION_OF[activation], (part,))
        node.replace_input_with(part, active)
    reader.replace_all_uses_with(node)
    recorded.graph.erase_node(reader)


def _fuse_chain(recorded: GraphModule, node: Node, shared: bool = False) -> None:
    """Replaces `node`, which calls a layer, and what can go into it by one layer.

    shared: whether the layer serves elsewhere too, so that a copy has to take its place here.
    """
    layer: Any = recorded.get_submodule(str(node.target))
    layer = copy.deepcopy(layer) if shared else layer
    kind = next(kind for kind in _JOINED if isinstance(layer, kind))
    chain = [node]
    folded = False
    other = total = activation = turn = None
    if kind is torch.nn.Linear:
        folded = folds_scale(recorded, layer, node, (-1,))
        turn = _turn_to_images(node)
        if turn is not None:
            folded = folds_scale(recorded, layer, turn, (-1, 1, 1)) or folded
            chain.append(turn)
    elif kind is torch.nn.Conv2d:
        norm = only_reader(node)
        if norm is not None and _is_norm(recorded, norm):
            if folds_norm(layer, recorded.get_submodule(str(norm.target))):
                chain.append(norm)
    reader = only_reader(chain[-1])
    if reader is not None and getattr(layer, "padding_mode", "zeros") == "zeros":
        other = _other_term(recorded, chain, reader)
        if other is not None:
            total = reader
            chain.append(reader)
            reader = only_reader(reader)
    if turn is not None and total is None:
        chain, reader, turn = [node], None, None
    if reader is not None:
        activation = activation_of(recorded, reader, chain[-1])
        if kind is torch.nn.BatchNorm2d:
            keeps_result = total is not None
            known = NORM_CLAMPS if keeps_result else (*NORM_CLAMPS, *NORM_CURVES)
            if activation is not None and (
                activation not in known or (keeps_result and _loses(recorded, reader, activation))
            ):
                activation = None
        if activation is not None:
            chain.append(reader)
    if len(chain) == 1 and not folded:
        return
    _become(layer, _JOINED[kind][total is not None], activation)
    if total is not None:
        layer.adds_in_place = total.target in SUMS_IN_PLACE
        layer.other_first = total.args[0] is other
        if kind is torch.nn.Linear:
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


def _become(layer: Any, kind: type, activation: str | None) -> None:
    layer.__class__ = kind
    vars(layer).pop("_converted", None)  # nothing but torchconv knows the activation
    layer.activation = activation


def _fuse_activation(recorded: GraphModule, node: Node) -> None:
    """Puts the activation behind the convolution or linear layer that `node` calls into it."""
    reader = only_reader(node)
    activation = None if reader is None else activation_of(recorded, reader, node)
    if reader is None or activation is None or _loses(recorded, reader, activation):
        return
    layer = recorded.get_submodule(str(node.target))
    kind = next(kind for kind in _JOINED if isinstance(layer, kind))
    _become(layer, _JOINED[kind][0], activation)
    reader.replace_all_uses_with(node)
    recorded.graph.erase_node(reader)


def _loses(recorded: GraphModule, node: Node, activation: str) -> bool:
    """Whether the network overwrites the activation's result, which `node` returns, where backward
    would need it but not PyTorch's: its ReLU6, unlike others, keeps what went in."""
    return activation == "relu6" and is_overwritten(recorded, node)


def _turn_to_images(node: Node) -> Node | None:
    """What alone reads `node`, N x H x W x K, and makes N x K x H x W of it."""
    reader = only_reader(node)
    if reader is None or reader.kwargs or reader.target not in (torch.permute, "permute"):
        return None
    order = reader.args[1:]
    order = tuple(order[0]) if len(order) == 1 and isinstance(order[0], (tuple, list)) else order
    return reader if reader.args[0] is node and order in ((0, 3, 1, 2), (0, -1, 1, 2)) else None


def _other_term(recorded: GraphModule, chain: list[Node], reader: Node) -> Node | None:
    """What `reader` adds to the end of `chain`; None if it does something else."""
    if reader.op not in ("call_function", "call_method") or len(reader.args) != 2 or reader.kwargs:
        return None
    first, second = reader.args
    other = second if first is chain[-1] else first
    if reader.target not in (*SUMS, *(SUMS_IN_PLACE if first is chain[-1] else ())):
        return None
    if not isinstance(other, Node) or other is chain[-1]:
        return None
    # The convolution moves to where the sum is: nothing on the way may overwrite its input.
    between = chain[0].next
    while between is not reader:
        if between not in chain and overwrites(recorded, between):
            return None
        between = between.next
    return other
