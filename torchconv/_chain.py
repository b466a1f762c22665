"""Runs of layers in a network that `torchconv.fuse` made, each in one call into the library.

On one small image a layer's way from Python to its kernel, through modules, checks and the
dispatcher, takes up to a third of the layer's time: the layers before have left little of Python in
the caches. Where neighbours in the recorded network are convolutions, poolings and what often lies
between them, and nobody can ask for their results, a network therefore calls
`torch.ops.torchconv.chain` once for all.

What a layer is may change between two calls: somebody registers a hook, sets an attribute, swaps a
module or loads weights. Each call of a chain looks for that, and then calls the layers one by one,
as the recorded network does. Whatever a chain cannot do the layers do as well.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle

from torchconv._chain_layers import FORWARDS, HOOKS, Call, attributes_of, call_of, settings_of
from torchconv._coverage import FLOATS
from torchconv._dispatch import is_plain
from torchconv._programs import Step, program_of
from torchconv.backends import packed_weights_kept

__all__ = ["Fused"]

_GLOBAL_HOOKS = tuple(getattr(modules, f"_global{name}") for name in HOOKS)
_autocasts = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled


class Fused(GraphModule):
    """A recorded network for inference, whose runs of convolutions and poolings are chains."""

    def recompile(self) -> Any:
        code = super().recompile()
        kind: Any = type(self)  # GraphModule makes one for each network
        kind.forward = _with_chains(kind.forward)
        return code

    def __reduce__(self) -> tuple[Any, ...]:
        load, arguments = super().__reduce__()
        return _load_fused, (load, arguments, type(self).__name__)


def _load_fused(load: Callable[..., GraphModule], arguments: Any, name: str) -> Fused:
    loaded = load(*arguments)
    return Fused(loaded, loaded.graph, name)


def _with_chains(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a Fused, by chains where nothing records, traces or watches the call."""
    chained: Callable[..., Any] | None = None

    @functools.wraps(forward)
    def run(self: Fused, *args: Any, **kwargs: Any) -> Any:
        nonlocal chained
        if (
            _is_compiling()
            or _grad_enabled()
            or profiler._is_profiler_enabled  # a profile is to show the layers
            or any(_GLOBAL_HOOKS)
            or not (is_plain() and packed_weights_kept())
        ):
            return forward(self, *args, **kwargs)
        if chained is None:
            chained = _chained(self)
        return chained(self, *args, **kwargs)

    return run


def _chained(network: Fused) -> Callable[..., Any]:
    """The network's forward with calls of chains in it."""
    graph = Graph(tracer_cls=network.graph._tracer_cls)
    graph.output(graph.graph_copy(network.graph, {}))
    graph.set_codegen(network.graph._codegen)
    run: list[tuple[Node, Call]] = []
    for node in list(graph.nodes):
        call = call_of(network, node)
        if call is not None:
            run.append((node, call))
            continue
        if len(run) > 1:
            _call_chain(network, graph, run)
        run = []
    kind: Any = type(GraphModule(network, graph))
    forward: Callable[..., Any] = kind.forward
    return forward


def _call_chain(network: Fused, graph: Graph, run: Sequence[tuple[Node, Call]]) -> None:
    """Puts one call in the place of those of `run`."""
    nodes = [node for node, _ in run]
    inside = set(nodes)
    read = dict.fromkeys(arg for _, call in run for arg in call.tensors)
    inputs = [arg for arg in read if arg not in inside]
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    chain = _Chain(network, run, inputs, outputs)
    with graph.inserting_before(nodes[0]):
        results = graph.call_function(chain, tuple(inputs))
        for i, node in enumerate(outputs):
            result = graph.call_function(getitem, (results, i))
            node.replace_all_uses_with(result, lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)


class _Chain:
    """Layers one after another: takes the tensors that come from elsewhere, and gives those that
    are read elsewhere."""

    __module__ = "torchconv"
    __name__ = __qualname__ = "chain"  # in the code that torch.fx writes

    def __init__(
        self,
        network: Fused,
        run: Sequence[tuple[Node, Call]],
        inputs: Sequence[Node],
        outputs: Sequence[Node],
    ) -> None:
        self._network = weakref.ref(network)
        self._inputs = len(inputs)
        position = {node: i for i, node in enumerate((*inputs, *(node for node, _ in run)))}
        # Each on which of the inputs and, after them, the steps' results.
        self._calls = [
            call._replace(tensors=tuple(position[arg] for arg in call.tensors)) for _, call in run
        ]
        self._outputs = [position[node] for node in outputs]
        # What each step is the last to read.
        last = {arg: i for i, call in enumerate(self._calls) for arg in call.tensors}
        self._done: list[list[int]] = [[] for _ in run]
        for arg, i in last.items():
            if arg not in self._outputs:
                self._done[i].append(arg)
        self._program: _Program | None = None
        # Whether the layers can what their chain cannot: a sum that broadcasts, for example.
        self._refused = False

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self._refused or not _only_infers(inputs):
            return self._by_layers(self._layers(), inputs)
        program = self._program
        if program is None or not program.holds():
            layers = self._layers()
            outputs = self._by_layers(layers, inputs)
            self._program = self._compile(layers)
            return outputs
        try:
            return program.run(inputs)
        except RuntimeError:
            outputs = self._by_layers(self._layers(), inputs)  # which say what is wrong
            self._refused = True
            return outputs

    def _layers(self) -> list[Any]:
        """None where a step is a function of PyTorch's."""
        network = self._network()
        assert network is not None
        return [
            None if call.target is None else network.get_submodule(call.target)
            for call in self._calls
        ]

    def _by_layers(self, layers: Sequence[Any], inputs: Sequence[Any]) -> Sequence[Any]:
        known = list(inputs)
        for layer, call, done in zip(layers, self._calls, self._done, strict=True):
            tensors = [known[arg] for arg in call.tensors]
            known.append(call.function(tensors) if layer is None else layer(*tensors))
            for arg in done:
                known[arg] = None
        return [known[output] for output in self._outputs]

    def _compile(self, calls: Sequence[Any]) -> _Program | None:
        """The program of the layers as they are; None where one is more than its operator."""
        network: Any = self._network()
        layers = [layer for layer in calls if layer is not None]
        parameters = [p for layer in layers for p in layer._parameters.values() if p is not None]
        # Among a program's tensors the parameters come between the inputs and the results.
        first = self._inputs + len(parameters)
        positions = [*range(self._inputs), *range(first, first + len(calls))]
        steps, parameter = [], self._inputs
        for layer, call, done in zip(calls, self._calls, self._done, strict=True):
            tensors = [positions[arg] for arg in call.tensors]
            settings = call.settings if layer is None else settings_of(layer, len(tensors))
            if settings is None:
                return None
            if layer is not None and layer._parameters:
                own = (parameter, parameter + 1 if layer.bias is not None else -1)
                tensors = [tensors[0], *own, tensors[1] if len(tensors) == 2 else -1]
                parameter += 1 + (layer.bias is not None)
            done = [positions[arg] for arg in done]
            steps.append(Step(call.operator, tensors, settings, done))
        outputs = [positions[output] for output in self._outputs]
        return _Program(network, layers, parameters, program_of(steps, outputs))


class _Program:
    """A chain's layers as they were, in the form of the operator's arguments."""

    def __init__(
        self,
        network: Fused,
        layers: Sequence[Any],
        parameters: Sequence[Tensor],
        program: Tensor,
    ) -> None:
        self._parameters = parameters
        self._program = program
        self._containers: list[Any] = [
            (module._modules, dict(module._modules))
            for module in network.modules()
            if module._modules
        ]
        self._layers: list[Any] = []
        self._weights: list[Any] = []
        for layer in layers:
            values, read = vars(layer), attributes_of(layer)
            self._layers.append((layer, type(layer), values, len(values), read, read(values)))
            own = layer._parameters
            if own:
                weight = layer.weight
                what = (weight, layer.bias, weight._version, weight.data_ptr())
                self._weights.append((own, *what))
        self._kinds = list({type(layer) for layer in layers})
        self._hooks = [getattr(layer, name) for layer in layers for name in HOOKS]
        self._handles = RemovableHandle.next_id

    def holds(self) -> bool:
        """Whether everything is as it was. Of the weights, the library looks at the values."""
        for children, were in self._containers:
            if children != were:
                return False
        try:
            for layer, kind, values, size, read, known in self._layers:
                if layer.__class__ is not kind or len(values) != size or read(values) != known:
                    return False
            for parameters, weight, bias, version, address in self._weights:
                if (
                    parameters["weight"] is not weight
                    or parameters["bias"] is not bias
                    or weight._version != version
                    or weight.data_ptr() != address
                ):
                    return False
        except KeyError:
            return False
        for kind in self._kinds:
            if kind.forward is not FORWARDS[kind]:
                return False
        # Who registers a hook, wherever it be, takes a number.
        handles = RemovableHandle.next_id
        if handles != self._handles:
            if any(self._hooks):
                return False
            self._handles = handles
        return True

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        tensors = [*inputs, *self._parameters]
        outputs: list[Tensor] = torch.ops.torchconv.chain(tensors, self._program)
        return outputs


def _only_infers(inputs: Sequence[Any]) -> bool:
    if _grad_enabled() or _autocasts() or not is_plain(*inputs):
        return False
    for t in inputs:
        if not (isinstance(t, Tensor) and t.is_cpu and t.dim() == 4 and t.dtype in FLOATS):
            return False
    return True
