"""Whether Python's objects and tensors are as they were, asked in C++ (csrc/bound/watch.cpp)."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchconv import _load

__all__ = ["Attribute", "Instance", "Table", "Watch", "WatchedTensor", "can_watch"]


class Instance(NamedTuple):
    """An object is of this class and has its attributes in this dict."""

    object: Any
    kind: type
    attributes: dict[str, Any]


class Table(NamedTuple):
    """A dict is of this size and has these values."""

    values: dict[str, Any]
    size: int = -1  # any
    same: Sequence[tuple[str, Any]] = ()  # the very objects
    # Values of the same types; lists' elements, too, if these are others than there.
    equal: Sequence[tuple[str, Any]] = ()
    absent: Sequence[str] = ()  # keys that are not there


class Attribute(NamedTuple):
    """getattr(object, name) is this value."""

    object: Any
    name: str
    value: Any


class WatchedTensor(NamedTuple):
    """Of a tensor on the CPU all but what its elements are. Somebody is to hold on to its storage,
    whose place may be another's later."""

    object: Tensor
    address: int
    version: int = -1  # any


# Of an object, before what is its class's own. PyTorch has a tensor's at::Tensor there.
_HEAD = object.__basicsize__
# Of a dict, where CPython up to 3.13 has a number that each change of it changes (PEP 509).
_VERSION = _HEAD + ctypes.sizeof(ctypes.c_ssize_t)


def can_watch(tensors: Iterable[Tensor]) -> bool:
    """Whether the library is there, and these can be watched."""
    _load.load()
    return _load.watching is not None and all(map(_is_known, tensors))


def _is_known(tensor: Tensor) -> bool:
    held = ctypes.c_void_p.from_address(id(tensor) + _HEAD).value
    return held == tensor._cdata and _keys_of(tensor) == _plain_keys() and tensor.dim() <= 4


@functools.cache
def _plain_keys() -> int:
    return _keys_of(torch.empty(0, device="cpu"))


def _keys_of(tensor: Tensor) -> int:
    """What decides how operators read its memory: the device, the layout, and whether they are to
    negate it (`z.conj().imag`) or to take it for zeros."""
    return torch._C._dispatch_keys(tensor).raw_repr()


@functools.cache
def _have_versions() -> bool:
    """Whether this Python's dicts are known to have versions, and each kind of change is seen."""
    if sys.implementation.name != "cpython" or sys.version_info >= (3, 14):
        return False
    thing = _Thing()
    tables: Sequence[dict[str, Any]] = ({}, OrderedDict(), vars(thing))
    changes = [
        change
        for table in tables
        for change in (
            functools.partial(table.__setitem__, "a", 1),
            functools.partial(table.__setitem__, "a", 2),
            functools.partial(table.update, a=3),
            functools.partial(table.pop, "a"),
            functools.partial(table.setdefault, "b", 4),
            table.clear,
        )
    ]
    changes += [functools.partial(setattr, thing, "a", value) for value in (5, 6)]
    changes += [thing.change, functools.partial(delattr, thing, "a")]
    for change in changes:
        before = _versions_of(tables)
        if before != _versions_of(tables):
            return False
        change()
        if before == _versions_of(tables):
            return False
    return True


class _Thing:
    a: int

    def change(self) -> None:
        self.a = 7


def _versions_of(tables: Sequence[dict[str, Any]]) -> list[int]:
    return [ctypes.c_uint64.from_address(id(table) + _VERSION).value for table in tables]


@functools.cache
def _library() -> ctypes.PyDLL:
    library = ctypes.PyDLL(str(_load.watching))  # calls keep Python's lock
    library.torchconv_watch.argtypes = (ctypes.py_object, *(ctypes.c_int64,) * 2)
    library.torchconv_watch.restype = ctypes.c_void_p
    library.torchconv_watch_holds.argtypes = (ctypes.c_void_p,)
    library.torchconv_watch_holds.restype = ctypes.c_bool
    library.torchconv_end_watch.argtypes = (ctypes.c_void_p,)
    library.torchconv_end_watch.restype = None
    return library


class Watch:
    """`holds()` says whether all of these are so."""

    def __init__(
        self,
        instances: Iterable[Instance],
        tables: Iterable[Table],
        attributes: Iterable[Attribute],
        tensors: Iterable[WatchedTensor],
    ) -> None:
        # Whose objects the library does not hold on to.
        self._watched = (tuple(instances), tuple(tables), tuple(attributes), tuple(tensors))
        version = _VERSION if _have_versions() else -1
        self._watch = _library().torchconv_watch(self._watched, _HEAD, version)
        self.holds: Callable[[], bool] = functools.partial(
            _library().torchconv_watch_holds, self._watch
        )

    def __del__(self) -> None:
        if hasattr(self, "_watch") and _library is not None:
            _library().torchconv_end_watch(self._watch)
