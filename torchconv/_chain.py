"""Runs of layers in a network that `torchconv.fuse` made, each in one call into the library.

On one small image a layer's way from Python to its kernel, through modules, checks and the
dispatcher, takes a good part of the layer's time: the layers before have left little of Python in
the caches. Where neighbours in the recorded network are convolutions, poolings, what often lies
between them and the linear layers at the end, and nobody can ask for their results, a network
therefore calls `torch.ops.torchconv.run_kept_chain` once for all.

What a layer is may change between two calls: somebody registers a hook, sets an attribute, swaps a
module or loads weights. Each call of a chain looks for that, and then calls the layers one by one,
as the recorded network does. Whatever a chain cannot do the layers do as well.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules import module as modules

from torchconv._chain_checks import calls_known_code, drop_checks, kinds_of
from torchconv._chain_layers import Call, call_of
from torchconv._chain_program import Program, compile_program
from torchconv._coverage import FLOATS
from torchconv._dispatch import is_plain
from torchconv._programs import call_pytorch
from torchconv.backends import packed_weights_kept

__all__ = ["Fused"]

# Those for gradients have no part in a call that records none.
_GLOBAL_HOOKS = (modules._global_forward_hooks, modules._global_forward_pre_hooks)
_MODULE_CALL = torch.nn.Module.__call__
_autocasts = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
# Of arguments, that a network remembers.
_MOST_KINDS = 256
# Calls one after another that are made with checks because a layer may have changed.
_MOST_DOUBTS = 4


class Fused(GraphModule):
    """A recorded network for inference, whose runs of convolutions and poolings are chains."""

    def recompile(self) -> Any:
        code = super().recompile()
        kind: Any = type(self)  # GraphModule makes one for each network
        kind.forward = _with_chains(kind.forward, _copy_of(self.graph))
        return code

    def __reduce__(self) -> tuple[Any, ...]:
        load, arguments = super().__reduce__()
        return _load_fused, (load, arguments, type(self).__name__)


def _load_fused(load: Callable[..., GraphModule], arguments: Any, name: str) -> Fused:
    loaded = load(*arguments)
    made = Fused(loaded, loaded.graph, name)
    vars(made).update({k: v for k, v in vars(loaded).items() if k not in vars(made)})
    return made


def _copy_of(graph: Graph) -> Graph:
    copy = Graph(tracer_cls=graph._tracer_cls)
    copy.output(copy.graph_copy(graph, {}))
    copy.set_codegen(graph._codegen)
    return copy


def _with_chains(forward: Callable[..., Any], graph: Graph) -> Callable[..., Any]:
    """`forward` of a Fused with this graph, by chains where nothing records, traces or watches the
    call."""
    chains = _Chains(forward, graph)

    @functools.wraps(forward)
    def run(self: Fused, *args: Any, **kwargs: Any) -> Any:
        if (
            _is_compiling()
            or _grad_enabled()
            or profiler._is_profiler_enabled  # a profile is to show the layers
            or any(_GLOBAL_HOOKS)
            or torch.nn.Module.__call__ is not _MODULE_CALL  # torch.fx's tracing, for example
            or not (is_plain() and packed_weights_kept())
        ):
            return forward(self, *args, **kwargs)
        return chains(self, args, kwargs)

    return run


class _Chains:
    """Calls a Fused with this graph by chains: without the checks in it that arguments of these
    kinds have passed, while the layers in chains are what they were."""

    def __init__(self, forward: Callable[..., Any], graph: Graph) -> None:
        self._forward = forward
        self._graph = graph
        self._with_checks: Callable[..., Any] | None = None
        self._unchecked: _Unchecked | None = None
        self._has_checks = True  # until they were looked for
        self._passed: set[Any] = set()
        self._doubts: Counter[Any] = Counter()

    def __call__(self, network: Fused, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self._has_checks and self._unchecked is None:
            self._unchecked = _unchecked(network, self._graph, self._passed.clear)
            self._has_checks = self._unchecked is not None
        unchecked = self._unchecked
        if (
            self._has_checks
            and unchecked is not None
            and not kwargs
            and not _autocasts()
            and not _have_hooks(network, unchecked.others)
        ):
            kinds = kinds_of(args)
            if kinds is not None and self._doubts[kinds] < _MOST_DOUBTS:
                return self._call_known(network, args, kinds)
        if self._with_checks is None:
            self._with_checks = _chained(network, _copy_of(self._graph))
        return self._with_checks(network, *args, **kwargs)

    def _call_known(self, network: Fused, args: Sequence[Any], kinds: Any) -> Any:
        """The call without checks if these kinds have passed them, or else with them."""
        unchecked = self._unchecked
        if kinds in self._passed and unchecked is not None:
            changed = [chain for chain in unchecked.chains if not chain.is_as_it_was()]
            if not changed:
                result = unchecked.forward(network, *args)
                if kinds in self._passed:
                    self._doubts.pop(kinds, None)
                    return result
            # Layers may be no more what they were: what their checks say comes first. A call is
            # made once more only where that happened in the midst of it, by another thread or a
            # function of the network's owner.
            self._passed.clear()
            self._doubts[kinds] += 1
        result = self._forward(network, *args)
        if len(self._passed) >= _MOST_KINDS:
            self._passed.clear()
            self._doubts.clear()
        self._passed.add(kinds)
        return result


class _Unchecked(NamedTuple):
    """A forward without checks, for calls before which all of its chains were what they were."""

    forward: Callable[..., Any]
    chains: Sequence[_Chain]
    # The names of layers outside of chains, by parts. Their hooks may change others, and a call
    # that is made once more would call them twice.
    others: Sequence[Sequence[str]]


def _have_hooks(network: Any, names: Sequence[Sequence[str]]) -> bool:
    """Whether one of the layers of these names has, or there is none of a name."""
    for parts in names:
        layer = network
        for part in parts:
            layer = layer._modules.get(part)
            if layer is None:
                return True
        # Hardly any has layers of its own, and a call of modules() takes longer than all else.
        for own in layer.modules() if layer._modules else (layer,):
            if own._forward_hooks or own._forward_pre_hooks:
                return True
    return False


def _unchecked(network: Fused, graph: Graph, changed: Callable[[], None]) -> _Unchecked | None:
    """The network's forward with calls of chains in it and without what the kinds of arguments
    decide, unless layers decide it that are in no chain: nothing would notice their change. None
    where that leaves all as it is."""
    kept: set[int] = set()
    while True:
        own = _copy_of(graph)  # of each thread
        taken = drop_checks(network, own, kept)
        if not taken:
            return None
        forward = _chained(network, own, changed)
        chains = [node.target for node in own.nodes if isinstance(node.target, _Chain)]
        watched = {name for chain in chains for name in chain.layers}
        unsure = {number for number, names in taken.items() if not names <= watched}
        if not unsure:
            for chain in _before_others(own):
                chain.looks = False
            others = [str(node.target).split(".") for node in own.nodes if node.op == "call_module"]
            return _Unchecked(forward, chains, others)
        kept |= unsure


def _before_others(graph: Graph) -> Iterator[_Chain]:
    """The chains before which a call runs nothing that could change a layer."""
    for node in graph.nodes:
        if isinstance(node.target, _Chain):
            yield node.target
        elif node.op == "call_module" or not calls_known_code(node):
            return


def _chained(
    network: Fused, graph: Graph, changed: Callable[[], None] | None = None
) -> Callable[..., Any]:
    """The network's forward with calls of chains in it, which are put into the graph.

    changed: to be called where layers in it may be no more what they were. For that a convolution
        is a chain by itself, too.
    """
    run: list[tuple[Node, Call]] = []
    passed = _nodes_in_calls(network, graph)
    for node in list(graph.nodes):
        if node in passed:
            continue
        call = call_of(network, node)
        if call is not None and not _reads_rows(call, run):
            run.append((node, call))
            continue
        watched = changed is not None and [known.operator for _, known in run] == ["conv2d"]
        if len(run) > 1 or watched:
            _call_chain(network, graph, run, changed or (lambda: None))
        run = [] if call is None else [(node, call)]
    kind: Any = type(GraphModule(network, graph))
    forward: Callable[..., Any] = kind.forward
    return forward


def _nodes_in_calls(network: Fused, graph: Graph) -> set[Node]:
    """Those that are a part of another one's call."""
    calls = (call_of(network, node) for node in graph.nodes)
    flattens = (call.flatten for call in calls if call is not None)
    return {node for flatten in flattens if flatten is not None for node in flatten.nodes}


def _reads_rows(call: Call, run: Sequence[tuple[Node, Call]]) -> bool:
    """Whether it is no linear layer, but reads the result of one of this run."""
    rows = {node for node, known in run if known.operator == "linear"}
    return call.operator != "linear" and not rows.isdisjoint(call.tensors)


def _call_chain(
    network: Fused,
    graph: Graph,
    run: Sequence[tuple[Node, Call]],
    changed: Callable[[], None],
) -> None:
    """Puts one call in the place of those of `run`."""
    nodes = [node for node, _ in run]
    parts = [part for _, call in run if call.flatten is not None for part in call.flatten.nodes]
    inside = {*nodes, *parts}
    read = dict.fromkeys(arg for _, call in run for arg in call.tensors)
    inputs = [arg for arg in read if arg not in inside]
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    chain = _Chain(network, run, inputs, outputs, changed)
    with graph.inserting_before(nodes[0]):
        results = graph.call_function(chain, tuple(inputs))
        for i, node in enumerate(outputs):
            result = graph.call_function(getitem, (results, i))
            node.replace_all_uses_with(result, lambda user: user not in inside)
    for node in reversed(list(graph.nodes)):
        if node in inside:
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
        changed: Callable[[], None],
    ) -> None:
        self._changed = changed
        self.layers = [name for _, call in run for name in call.targets]
        self._network = weakref.ref(network)
        self._inputs = len(inputs)
        position = {node: i for i, node in enumerate((*inputs, *(node for node, _ in run)))}
        # Each on which of the inputs and, after them, the steps' results.
        self._calls = [
            call._replace(tensors=tuple(position[arg] for arg in call.tensors)) for _, call in run
        ]
        self._outputs = [position[node] for node in outputs]
        # Of the outputs, those that are rows; in a program they are images of one pixel.
        linear = {node for node, call in run if call.operator == "linear"}
        self._rows = [i for i, node in enumerate(outputs) if node in linear]
        # What each step is the last to read.
        last = {arg: i for i, call in enumerate(self._calls) for arg in call.tensors}
        self._done: list[list[int]] = [[] for _ in run]
        for arg, i in last.items():
            if arg not in self._outputs:
                self._done[i].append(arg)
        self._program: Program | None = None
        # How many calls go by without an attempt at a program, and from how many on the next ones.
        self._rest = self._pause = 0
        # Inputs for which the layers can what the operator cannot: a sum that broadcasts, say.
        self._refused: set[Any] = set()
        # Whether a call asks if the layers are what they were; else who calls has just done so.
        self.looks = True

    def is_as_it_was(self) -> bool:
        """Whether the next call runs what the layers were; if not, those after it may."""
        program = self._program
        if program is not None and program.holds():
            return True
        self._renew(program)
        return False

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        infers = _only_infers(inputs)
        program = self._program
        if program is None or (self.looks and not program.holds()):
            self._changed()
            outputs = self._by_layers(inputs)
            if infers:
                self._renew(program)
            return outputs
        if not infers or (self._refused and _kinds_of(inputs) in self._refused):
            return self._by_layers(inputs)
        try:
            outputs = program.run(inputs)
        except RuntimeError:
            outputs = self._by_layers(inputs)  # which say what is wrong
            self._refuse(inputs)
            return outputs
        for i in self._rows:
            outputs[i] = outputs[i].flatten(1)
        return outputs

    def _by_layers(self, inputs: Sequence[Any]) -> Sequence[Any]:
        network = self._network()

        def layer_of(name: Any) -> Any:
            return functools.reduce(getattr, name.split("."), network)

        known = list(inputs)
        for call, done in zip(self._calls, self._done, strict=True):
            tensors = [known[arg] for arg in call.tensors]
            if call.target is None:
                known.append(call_pytorch(call.operator, tensors, call.settings))
            else:
                if call.flatten is not None:
                    flatten = call.flatten.function or layer_of(call.flatten.target)
                    tensors = [flatten(*tensors)]
                known.append(layer_of(call.target)(*tensors))
            for arg in done:
                known[arg] = None
        return [known[output] for output in self._outputs]

    def _renew(self, program: Program | None) -> None:
        """Compiles the layers as they are now. Where that was in vain, because they are more than
        operators or change from call to call, the next attempts come more and more rarely."""
        if self._rest > 0:
            self._rest -= 1
            return
        network: Any = self._network()
        itself = weakref.ref(self)

        def forget(_: Any) -> None:
            chain = itself()
            if chain is not None:
                chain._program = None
                chain._changed()

        made = compile_program(
            network, self._calls, self._done, self._inputs, self._outputs, forget
        )
        wasted = made is None or (program is not None and not program.used)
        self._pause = min(2 * self._pause + 1, 63) if wasted else 0
        self._rest = self._pause if made is None else 0
        self._program = made
        if made is not None and not made.keeps_packed_weights():
            self._program = None

    def _refuse(self, inputs: Sequence[Tensor]) -> None:
        if len(self._refused) >= 64:
            self._refused.clear()
        self._refused.add(_kinds_of(inputs))


def _kinds_of(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((t.shape, t.stride(), t.dtype) for t in inputs)


def _only_infers(inputs: Sequence[Any]) -> bool:
    if _grad_enabled() or _autocasts() or not is_plain(*inputs):
        return False
    for t in inputs:
        if t is None or not (t.is_cpu and t.dim() == 4 and t.dtype in FLOATS):
            return False
    return True
