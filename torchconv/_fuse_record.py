"""How `torchconv.fuse` records a network.

torch.fx calls the model with stand-ins for tensors, which know nothing of sizes: Python that asks
for one, to branch, to loop or to compute an int, ends the recording. Given the arguments of one
call, each stand-in also carries what it would be in that call, as a fake tensor that has a shape
and no data, and such Python gets its answer. Each answer is recorded too, with a check that a later
call gives the same one. (transformers.utils.fx does the first half of this with meta tensors.)

What `forward` does without stand-ins it does once, while it is recorded. Where each call would have
to do it again, the recording ends: at random numbers, and at changes of what the network holds.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node, Proxy
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchconv._fuse_factories import recorded_factories
from torchconv._fuse_graph import LEAVES, overwrites, sources_of

__all__ = ["KINDS_TELL", "Tracer", "holds", "length", "truth", "type_name"]


def _recordable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes one node of a call of `function` where a recorded network is recorded once more, as
    in unpickling it."""

    @functools.wraps(function)
    def call(found: Any, *others: Any) -> Any:
        if isinstance(found, Proxy):
            return found.tracer.create_proxy("call_function", call, (found, *others), {})
        return function(found, *others)

    return call


@_recordable
def holds(found: Any, recorded: Any) -> None:
    """What a recorded network calls where Python asked for a value."""
    if found != recorded:
        raise RuntimeError(
            f"this network was recorded where a size or branch gave {recorded!r}, which now gives "
            f"{found!r}: record it again, with an example of these inputs"
        )


@_recordable
def length(found: Any) -> int:
    return len(found)


@_recordable
def type_name(found: Any) -> str:
    return type(found).__name__


@_recordable
def truth(found: Any) -> bool:
    return bool(found)


def _storage(tensor: torch.Tensor) -> int:
    """What tells which tensors share their memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, or not made yet
        return id(tensor)


class _Unknown:
    """Of a value that only the data tells."""


# What Python may look up or compare in writing.
_WRITTEN = (bool, int, float, str, torch.dtype, torch.device, torch.Size)

# Attributes of tensors that Python compares with None, which no stand-in does.
_OFTEN_NONE = ("grad", "grad_fn")

_COMPARISONS = {getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}

# What each tensor tells of its kind, and of which type that is.
KINDS_TELL: dict[Any, type] = {
    **{"shape": torch.Size, "ndim": int, "dtype": torch.dtype, "device": torch.device},
    **{"size": torch.Size, "dim": int, "ndimension": int, "numel": int, "nelement": int},
}


class _Proxy(torch.fx.Proxy):
    """torch.fx would record `x += y` as x + y, which leaves what else refers to x as it was."""

    tracer: Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What isinstance asks beside the type that this is. Never a tensor, whose memory PyTorch
        would then read in what is none."""
        return self.tracer.type_of(self)

    def __getattr__(self, k: str) -> Any:
        attribute = _Attribute(self, k)
        value = self.tracer.value_of(self)
        if value is _Unknown and k in _OFTEN_NONE:
            raise TraceError(f"`{k}` of a value that is not known{self.tracer.advice}")
        if not isinstance(value, torch.Tensor) or k in _OFTEN_NONE:
            if getattr(value, k, _Unknown) is None:
                return self.tracer.settle(None, attribute)  # no stand-in answers `is None`
        return attribute

    def __str__(self) -> str:
        return str(self.tracer.settle(None, self)) if self._written("text") else repr(self)

    def __hash__(self) -> int:
        # Dicts and sets ask for it before they compare.
        if self._written("a set or dict"):
            return hash(self.tracer.settle(None, self))
        return super().__hash__()

    def __format__(self, spec: str) -> str:
        if self._written("text"):
            return format(self.tracer.settle(None, self), spec)
        return super().__format__(spec)

    def _written(self, what: str) -> bool:
        """Whether this is a value that `what` can be made of; raises where it is not known."""
        if isinstance(self.tracer.value_of(self), _WRITTEN):
            return True
        if self.__class__ in _WRITTEN:
            raise TypeError(f"{what} of a value that is not known{self.tracer.advice}")
        return False

    def __len__(self) -> int:
        if self.tracer.value_of(self) is _Unknown:
            raise TypeError(f"len() of a value that is not known{self.tracer.advice}")
        found: int = self.tracer.settle(length, self)
        return found

    def __index__(self) -> int:
        return self._number(int)

    def __int__(self) -> int:
        return self._number(int)

    def __float__(self) -> float:
        return self._number(float)

    def __setitem__(self, k: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, k, value), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._number(lambda value: value), digits)

    def _number(self, kind: Any) -> Any:
        value = self.tracer.value_of(self)
        if not isinstance(value, (int, float)):
            raise TypeError(f"a number is asked of a value that is not known{self.tracer.advice}")
        return kind(self.tracer.settle(None, self))


class _Attribute(torch.fx.proxy.Attribute, _Proxy):
    """Of a stand-in; becomes a node when it is used."""


def _record_in_place(name: str) -> None:
    target = getattr(operator, name)

    def record(self: torch.fx.Proxy, other: Any) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    setattr(_Proxy, f"__{name}__", record)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    _record_in_place(f"i{_name}")


class _Watch(TorchDispatchMode):
    """Sees what is computed while a network is recorded, and would not be in its calls."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._tracer.evaluates:
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise TraceError(
                    f"each call would draw random numbers ({func}), which the recording does not "
                    "see: let their size come from an input"
                )
            self._tracer.check_read(func, (args, kwargs))
            for i, declared in enumerate(func._schema.arguments):
                if declared.is_write:
                    value = args[i] if i < len(args) else kwargs.get(declared.name)
                    self._tracer.check_unrecorded(func, value)
        return func(*args, **kwargs)


class Tracer(torch.fx.Tracer):
    """Records each layer that may be fused or swapped as one node.

    example: the arguments of one call; empty if none is known.
    """

    def __init__(self, example: Sequence[Any] = ()) -> None:
        super().__init__()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True) if example else None
        self._example = list(example)
        self._values: dict[Node, Any] = {}
        self._types: dict[Node, type] = {}
        self._settled: set[tuple[Any, Node]] = set()
        self.evaluates = False
        self._failure: Exception | None = None  # the first
        self._grad_enabled = torch.is_grad_enabled()
        # Tensors that the network made without stand-ins; all that it holds.
        self._made: dict[int, tuple[torch.Tensor, Node]] = {}
        self._held: set[int] = set()
        # The names of those that share their memory with one of either.
        self.views: set[str] = set()
        self._overwritten: set[int] = set()

    @property
    def advice(self) -> str:
        """What an error adds."""
        if self._fakes is not None:
            return f" from the example's sizes alone ({self._failure})"
        return ": an example of the inputs may tell it, as in torchconv.fuse(model, images)"

    @property
    def made(self) -> set[str]:
        """The names of tensors that `forward` made while it was recorded."""
        return {str(node.target) for _, node in self._made.values()}

    def trace(self, root: Any, concrete_args: Any = None) -> torch.fx.Graph:
        own = pytree.tree_leaves([vars(module) for module in root.modules()])
        self._held = {_storage(part) for part in own if isinstance(part, torch.Tensor)}
        with _Watch(self), recorded_factories():
            graph = super().trace(root, concrete_args)
        self._check_kept(root)
        return graph

    def _check_kept(self, root: torch.nn.Module) -> None:
        """Raises where calls would replace a tensor that the network holds by what they make of
        it. (torch.nn.Module refuses stand-ins for parameters and buffers.)"""
        for path, module in root.named_modules():
            for name, value in vars(module).items():
                own = f"{path}.{name}" if path else name
                if isinstance(value, Proxy) and any(
                    source.op == "get_attr" and source.target == own
                    for source in sources_of(value.node)
                ):
                    raise TraceError(
                        f"each call would replace {own!r}, which the network holds and the "
                        "recording does not see"
                    )

    def check_unrecorded(self, function: Any, changed: Any) -> None:
        """Raises where `function` is to overwrite what calls would have to overwrite too."""
        for part in pytree.tree_leaves(changed):
            if isinstance(part, torch.Tensor) and _storage(part) in self._held:
                raise TraceError(
                    f"each call would change a tensor that the network holds ({function}), "
                    "which the recording does not see"
                )

    def check_read(self, function: Any, read: Any) -> None:
        """Raises where `function` is to read what only calls have written."""
        for part in pytree.tree_leaves(read) if self._overwritten else ():
            if isinstance(part, torch.Tensor) and _storage(part) in self._overwritten:
                raise TraceError(
                    f"each call would change a tensor that {function} reads, which the recording "
                    "does not see: let `forward` go on with the result of the change"
                )

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        if type(m).__call__ is not torch.nn.Module.__call__:
            return False  # of which a part is recorded already, and would be done twice
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """With an example, the network takes as many arguments; those without tensors are
        settled, and so are the defaults of all others."""
        if self._fakes is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        bound = inspect.signature(self.root.forward).bind(*self._example)
        names: list[str] = []
        for name, value in bound.arguments.items():
            several = bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            names += [f"{name}_{i}" for i in range(len(value))] if several else [name]
        arguments = [self.create_proxy("placeholder", name, (), {}) for name in names]
        for i, value in enumerate(self._example):
            if not any(isinstance(part, torch.Tensor) for part in pytree.tree_leaves(value)):
                arguments[i] = self.settle(None, arguments[i])
        return root_fn, [self.root, *arguments]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            return a.node
        # A result that is a dict with attributes, of which torch.fx would keep the dict.
        if isinstance(a, dict) and is_dataclass(a):
            values = {f.name: self.create_arg(getattr(a, f.name)) for f in fields(a)}
            return self.create_node("call_function", type(a), (), values)
        if not isinstance(a, torch.Tensor) or isinstance(a, torch.nn.Parameter):
            return super().create_arg(a)
        if id(a) in self._made:
            return self._made[id(a)][1]  # one node, so that all see what is done to it
        held = (*self.root.buffers(), *self.tensor_attrs)
        named = any(a is own for own in held)
        node = super().create_arg(a)
        if not named and isinstance(node, Node):
            if _storage(a) in self._held:  # a view, as a rule
                made = [n for t, n in self._made.values() if _storage(t) == _storage(a)]
                self.views |= {str(same.target) for same in (node, *made)}
            else:
                self._made[id(a)] = a, node
                self._held.add(_storage(a))
        return node

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        # Python asks by `is None`, which no stand-in answers.
        silent = kind == "placeholder" or target in (holds, getattr, operator.setitem)
        if not silent and self.value_of(proxy) is None:
            return self.settle(None, proxy)
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if self.root.training and torch.is_grad_enabled() != self._grad_enabled:
            raise TraceError("a part that switches gradients off or on cannot be recorded")
        node = super().create_node(*args, **kwargs)
        if self._made and overwrites(self.root, node):
            self._overwritten |= {
                _storage(t) for t, made in self._made.values() if made in node.all_input_nodes
            }
        if self._fakes is not None:
            self._values[node] = self._evaluate(node)
        self._types[node] = self._type(node)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if self.evaluates:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.evaluates:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def _evaluate(self, node: Node) -> Any:
        """What a node's result would be for the example."""
        if node.op == "placeholder":
            return self._fake(self._example[len(self._values)])
        inputs = [self._values[source] for source in node.all_input_nodes]
        if node.op == "output" or any(value is _Unknown for value in inputs):
            return _Unknown
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        assert self._fakes is not None
        self.evaluates = True
        try:
            with self._fakes, torch.no_grad():
                return self._result(node, args, kwargs)
        except Exception as error:
            self._failure = self._failure or error
            return _Unknown
        finally:
            self.evaluates = False

    def _result(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            layer = self.root.get_submodule(str(node.target))
            own = (*layer.parameters(), *layer.buffers())
            # With fakes, since it may count batches or move statistics.
            return copy.deepcopy(layer, {id(t): self._fake(t) for t in own})(*args, **kwargs)
        owner, _, name = str(node.target).rpartition(".")
        return self._fake(getattr(self.root.get_submodule(owner), name))

    def _type(self, node: Node) -> type:
        """The type of a node's result, but for tensors. Where no example tells, only sizes and
        numbers that tensors tell, and what is made of those, are something else."""
        value = self._values.get(node, _Unknown)
        if value is not _Unknown:
            return _Proxy if isinstance(value, torch.Tensor) else type(value)
        if node.op == "call_method" and node.target in KINDS_TELL:
            return int if len(node.args) > 1 or node.kwargs else KINDS_TELL[node.target]
        if node.target is getattr:
            return KINDS_TELL.get(node.args[1], _Proxy)
        if getattr(node.target, "__module__", "") == operator.add.__module__:
            return self._type_of_operation(node)
        return _Proxy

    def _type_of_operation(self, node: Node) -> type:
        """Of one of Python's operators, where no example tells."""
        operands = [self._types[a] if isinstance(a, Node) else type(a) for a in node.args]
        if operands[0] is torch.Size and node.target is operator.getitem:
            return {slice: torch.Size, int: int}.get(operands[1], _Proxy)
        if not {*operands} <= {bool, int, float, tuple, torch.Size}:
            return _Proxy
        if node.target in _COMPARISONS:
            return bool
        if not {tuple, torch.Size}.isdisjoint(operands):
            return torch.Size
        return float if float in operands or node.target is operator.truediv else int

    def _fake(self, value: Any) -> Any:
        """`value`, tensors in lists and dicts included, without data."""
        assert self._fakes is not None
        return pytree.tree_map_only(torch.Tensor, self._fakes.from_tensor, value)

    def value_of(self, obj: Proxy) -> Any:
        return self._values.get(obj.node, _Unknown)

    def type_of(self, obj: Proxy) -> type:
        kind = self._types.get(obj.node, _Proxy)
        if kind not in (_Proxy, *_WRITTEN):
            self.settle(type_name, obj)  # a list, for example, where there could be a tensor
        return kind

    def settle(self, function: Any, obj: Proxy) -> Any:
        """What `function` of `obj`, or `obj` itself, is, now and in every later call."""
        value = self.value_of(obj)
        answer = value if function is None else function(value)
        if (function, obj.node) not in self._settled:
            self._settled.add((function, obj.node))
            asked = obj
            if function is not None:
                asked = self.create_proxy("call_function", function, (obj,), {})
            self.create_proxy("call_function", holds, (asked, answer), {})
        return answer

    def to_bool(self, obj: Proxy) -> bool:
        value = self.value_of(obj)
        if value is _Unknown or isinstance(value, torch.Tensor):
            raise TraceError(f"a branch depends on a value that is not known{self.advice}")
        if isinstance(value, (bool, int, float)):
            return bool(self.settle(None, obj))
        return bool(self.settle(truth, obj))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        value = self.value_of(obj)
        if value is _Unknown or not hasattr(value, "__len__"):
            raise TraceError(f"a loop goes over a value that is not known{self.advice}")
        if isinstance(value, dict):
            raise TraceError("a recorded dict cannot be iterated")
        return iter([obj[i] for i in range(len(obj))])  # type: ignore[index]
