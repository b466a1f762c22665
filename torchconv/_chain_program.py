"""A chain's layers as they were, in the form that the operator takes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Flatten

from torchconv import nn
from torchconv._chain_layers import (
    METHODS,
    Call,
    attribute_names,
    attributes_of,
    flattens_to_rows,
    settings_of,
)
from torchconv._dispatch import PLAIN
from torchconv._fetch import Fetch
from torchconv._programs import KeptProgram, Step, program_of
from torchconv._watch import Attribute, Instance, Table, Watch, WatchedTensor, can_watch

__all__ = ["Program", "compile_program"]

# Of whatever somebody has put in a layer's place.
_ANY_ERROR = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
# Attributes that no layer in a chain has of its own (Python finds them before the class's, and
# before parameters), and hooks that none has registered.
_NOT_OWN = ("forward", "_conv_forward", "_call_impl", "_compiled_call_impl", "weight", "bias")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _are_alike(now: Any, known: Any) -> bool:
    """Whether it is the same value of the same type, as are the elements of tuples and lists."""
    if now is known:
        return True
    if type(now) is not type(known):
        return False
    if isinstance(known, (list, tuple)):
        return len(now) == len(known) and all(map(_are_alike, now, known))
    return bool(now == known)


class _Snapshot:
    """What the layers of these names are, and whether they still are."""

    def __init__(self, network: GraphModule, names: Sequence[str]) -> None:
        self._containers: dict[int, tuple[Any, Any, Any]] = {}
        self.layers = [self._find(network, name) for name in names]
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer._own_packed_weights()  # nothing yet, but who drops it drops the program
        self._kinds = list({type(layer) for layer in self.layers})
        self._attributes: list[Any] = []
        self._weights: list[Any] = []
        for layer in self.layers:
            values, read = vars(layer), attributes_of(layer)
            # Lists may change and stay the same objects.
            known = tuple([*v] if isinstance(v, list) else v for v in read(values))
            self._attributes.append((layer, type(layer), values, len(values), read, known))
            parameters = values["_parameters"]
            if parameters:
                weight, bias = parameters["weight"], parameters["bias"]
                what = (weight, bias, weight._cdata, weight._version, weight.data_ptr())
                self._weights.append((layer, parameters, *what))
        self._fetch = Fetch(self._looked_at())
        self._watch = self._watched() if can_watch(self.parameters()) else None
        # Of parameters that nobody asks for their addresses in each call.
        self._memory = [t.untyped_storage() for t in self.parameters() if self.is_watched]

    def _find(self, network: GraphModule, name: str) -> Any:
        layer: Any = network
        for part in name.split("."):
            children = layer._modules
            _, _, were = self._containers.setdefault(
                id(children), (layer, children, dict(children))
            )
            layer = were[part]
        return layer

    def _looked_at(self) -> Iterator[Any]:
        """What `holds` reads, and then the operator."""
        for known in self._containers.values():
            module, children, were = known
            yield from (known, module, vars(module), children, were)
        for known in self._attributes:
            layer, _, values, _, _, read = known
            yield from (known, layer, values, read, *read)
            yield from (values[hooks] for hooks in _HOOKS)
        for known in self._weights:
            yield known
            yield known[1]
        yield from self.parameters()

    @property
    def is_watched(self) -> bool:
        """Whether `holds` also says that all parameters are in the same memory, with the same
        sizes, strides and types. Otherwise it leaves that to the operator."""
        return self._watch is not None

    def _watched(self) -> Watch:
        """What `holds` looks at, for the library."""
        instances, tables, tensors = [], [], []
        for module, children, were in self._containers.values():
            instances.append(Instance(module, type(module), vars(module)))
            tables.append(Table(vars(module), same=(("_modules", children),), absent=tuple(were)))
            tables.append(Table(children, len(were), same=tuple(were.items())))
        for layer, kind, values, size, _, known in self._attributes:
            instances.append(Instance(layer, kind, values))
            own = tuple((name, values[name]) for name in ("_parameters", *_HOOKS))
            named = zip(attribute_names(layer), known, strict=True)
            equal = tuple((name, value) for name, value in named if name != "_parameters")
            tables.append(Table(values, size, own, equal, _NOT_OWN))
            tables += [Table(values[hooks], 0) for hooks in _HOOKS]
        for _, parameters, weight, bias, _, version, address in self._weights:
            tables.append(Table(parameters, same=(("weight", weight), ("bias", bias))))
            tensors.append(WatchedTensor(weight, address, version))
            if bias is not None:
                tensors.append(WatchedTensor(bias, bias.data_ptr()))
        methods = [
            Attribute(kind, *method) for kind in self._kinds for method in METHODS[kind].items()
        ]
        return Watch(instances, tables, methods, tensors)

    def parameters(self) -> list[Tensor]:
        """Of all layers in order: each one's weights, and its bias if it has one."""
        return [
            t for _, _, weight, bias, *_ in self._weights for t in (weight, bias) if t is not None
        ]

    @property
    def holds(self) -> Callable[[], bool]:
        """Tells whether the layers are what they were. Of the weights, the operator sees the
        values."""
        return self._holds if self._watch is None else self._watch.holds

    def _holds(self) -> bool:
        try:
            return self._are_as_they_were()
        except _ANY_ERROR:
            return False

    def _are_as_they_were(self) -> bool:
        self._fetch()
        for module, children, were in self._containers.values():
            if (
                module._modules is not children
                or children != were
                or not vars(module).keys().isdisjoint(were)
            ):
                return False
        for layer, kind, values, size, read, known in self._attributes:
            if (
                layer.__class__ is not kind
                or layer.__dict__ is not values
                or len(values) != size
                or not values.keys().isdisjoint(_NOT_OWN)
                or values["_forward_hooks"]
                or values["_forward_pre_hooks"]
                or not _are_alike(read(values), known)
            ):
                return False
        for layer, parameters, weight, bias, tensor, version, address in self._weights:
            if (
                layer._parameters is not parameters
                or parameters["weight"] is not weight
                or parameters["bias"] is not bias
                or weight._cdata != tensor
                or weight._version != version
                or weight.data_ptr() != address
                or type(weight) not in PLAIN
                or type(bias) not in PLAIN
            ):
                return False
        return all(
            getattr(kind, name) is method
            for kind in self._kinds
            for name, method in METHODS[kind].items()
        )


class Program:
    """The operator's arguments beside a chain's inputs, for layers as they were.

    What it holds on to, weights among it, is to be given back when a layer drops the packed weights
    that it keeps: `forget` is called then.
    """

    def __init__(self, snapshot: _Snapshot, steps: Tensor, forget: Callable[[Any], None]) -> None:
        self.used = False
        self._snapshot = snapshot
        self.holds = snapshot.holds
        self._kept = KeptProgram(steps, snapshot.parameters(), fixed=snapshot.is_watched)
        packed = [getattr(layer, "_packed_weights", None) for layer in snapshot.layers]
        self._packed = [weakref.ref(kept, forget) for kept in packed if kept is not None]

    def keeps_packed_weights(self) -> bool:
        """Whether no layer has dropped its own."""
        return all(kept() is not None for kept in self._packed)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self.used = True
        return self._kept(inputs)


def compile_program(
    network: GraphModule,
    calls: Sequence[Call],
    done: Sequence[Sequence[int]],
    inputs: int,
    outputs: Sequence[int],
    forget: Callable[[Any], None],
) -> Program | None:
    """The program of the layers as they are; None where one is more than its operator.

    Args:
        calls: in order; their tensors are positions among the chain's inputs and, after these, the
            results of the calls.
        done: for each call the positions that none reads after it.
        inputs: how many the chain has.
        outputs: the positions of what it returns.
    """
    try:
        snapshot = _Snapshot(network, [name for call in calls for name in call.targets])
        steps = _steps_of(snapshot, calls, done, inputs)
    except _ANY_ERROR:
        return None
    if steps is None:
        return None
    first = inputs + len(snapshot.parameters())
    returned = [_in_program(output, inputs, first) for output in outputs]
    program = Program(snapshot, program_of(steps, returned), forget)
    # Other threads, and hooks, may have changed a layer meanwhile.
    return program if program.holds() else None


def _in_program(position: int, inputs: int, first: int) -> int:
    """A chain's position in its program, where parameters come between inputs and results, whose
    first is `first`."""
    return position if position < inputs else position - inputs + first


def _steps_of(
    snapshot: _Snapshot, calls: Sequence[Call], done: Sequence[Sequence[int]], inputs: int
) -> list[Step] | None:
    first = inputs + len(snapshot.parameters())
    layers = iter(snapshot.layers)
    steps, parameter = [], inputs
    for call, last in zip(calls, done, strict=True):
        if call.flatten is not None and call.flatten.target is not None:
            flatten = next(layers)
            if type(flatten) is not Flatten or not flattens_to_rows(flatten):
                return None
        tensors = [_in_program(arg, inputs, first) for arg in call.tensors]
        layer = None if call.target is None else next(layers)
        settings = (
            call.settings if layer is None else settings_of(call.operator, layer, len(tensors))
        )
        if settings is None:
            return None
        if layer is not None and layer._parameters:
            has_bias = layer._parameters["bias"] is not None
            residual = tensors[1] if len(tensors) == 2 else -1
            tensors = [tensors[0], parameter, parameter + 1 if has_bias else -1, residual]
            parameter += 1 + has_bias
        read = [_in_program(arg, inputs, first) for arg in last]
        steps.append(Step(call.operator, tensors, settings, read))
    _find_parts(steps, snapshot.parameters(), inputs)
    return steps


def _find_parts(steps: list[Step], parameters: Sequence[Tensor], inputs: int) -> None:
    """Notes of convolutions that are concatenated, and not read elsewhere, where they belong."""
    first = inputs + len(parameters)
    reads = Counter(position for step in steps for position in step.tensors)
    for at, whole in enumerate(steps):
        if whole.operator != "cat" or whole.settings[0] not in (1, -3):
            continue
        made = [position - first for position in whole.tensors]
        if not all(
            i >= 0 and steps[i].operator == "conv2d" and reads[first + i] == 1 for i in made
        ) or not {*whole.tensors} <= {*whole.done}:
            continue
        filters = [parameters[steps[i].tensors[1] - inputs].shape[0] for i in made]
        for number, i in enumerate(made):
            part = (first + at, sum(filters[:number]), sum(filters))
            steps[i] = steps[i]._replace(part=part)
