"""Memory of Python's objects, on its way into the caches before it is read.

What looks at hundreds of objects that a network's data have driven out of the caches waits for
each in turn, most of the time that it takes. Asked for all at once, they arrive together. Where an
object lies is CPython's to say, and where it is wrong, nothing but time is lost: a processor that
cannot fetch an address ahead lets it be.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import sysconfig
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from torchconv import _load

__all__ = ["Fetch"]

_LINE = 64
# Before an object lies what the garbage collector and its attributes' table need.
_BEFORE = 24
# Of a dict, where the address of its table is: in CPython with its global lock.
_TABLE = 4 * ctypes.sizeof(ctypes.c_void_p)
_HAS_TABLE = sys.implementation.name == "cpython" and not sysconfig.get_config_var(
    "Py_GIL_DISABLED"
)
_HEADER = dict.__basicsize__
_IMPL = 3 * _LINE  # of a tensor, as far as anybody reads it for its address or version


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_load.load()))
    library.torchconv_fetch.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    library.torchconv_fetch.restype = None
    return library


class Fetch:
    """A call asks for the memory of these objects."""

    def __init__(self, objects: Iterable[Any]) -> None:
        pieces = (piece for o in objects for piece in _pieces(o))
        lines = {
            line
            for start, size in pieces
            for line in range(start // _LINE * _LINE, start + size, _LINE)
        }
        self.lines = array("Q", sorted(lines))
        self._call = functools.partial(_library().torchconv_fetch, *self.lines.buffer_info())

    def __call__(self) -> None:
        self._call()


def _pieces(o: Any) -> Iterator[tuple[int, int]]:
    """Where it lies, and how many bytes."""
    yield id(o) - _BEFORE, _BEFORE + (_HEADER if isinstance(o, dict) else sys.getsizeof(o))
    if isinstance(o, dict) and _HAS_TABLE:
        table = ctypes.c_void_p.from_address(id(o) + _TABLE).value
        yield table or id(o), dict.__sizeof__(o) - _HEADER
    if isinstance(o, Tensor):
        yield o._cdata, _IMPL
        yield o.untyped_storage()._cdata, _LINE
