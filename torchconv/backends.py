"""Switches between algorithms, in the manner of ``torch.backends``.

A switch holds for the whole process, all its threads, and for the calls that follow it. A graph
that torch.compile made obeys `allow_winograd` when it runs; inside a compiled function that switch
breaks the graph.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from abc import ABC, abstractmethod
from types import ModuleType, TracebackType
from typing import Any

from torchconv import _load

__all__ = ["allow_winograd", "keep_packed_weights", "packed_weights_kept", "winograd_allowed"]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_load.load()))
    library.torchconv_allow_winograd.argtypes = (ctypes.c_bool,)
    library.torchconv_allow_winograd.restype = None
    library.torchconv_winograd_allowed.restype = ctypes.c_bool
    return library


class _Switch(ABC):
    """Sets a switch at once; as a context manager it restores what was set before."""

    def __init__(self, enabled: bool = True) -> None:
        self._before = self._get()
        self._set(enabled)

    @staticmethod
    @abstractmethod
    def _get() -> bool:
        """What is set."""

    @staticmethod
    @abstractmethod
    def _set(enabled: bool) -> None:
        """From now on."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._set(self._before)


def winograd_allowed() -> bool:
    """Whether convolutions may use Winograd's algorithm."""
    return bool(_library().torchconv_winograd_allowed())


class allow_winograd(_Switch):
    """Allows or forbids Winograd's algorithm: 3x3 convolutions, 5x5 of stride 1, and stems of
    stride 2.

    It computes in float32, also what is bfloat16 or float16, and in float64 what is float64, there
    with strides in the weight gradient only. It needs a quarter to two thirds of the
    multiplications and is less accurate than the direct product (the tables in benchmarks/results
    give the errors). It mixes the values of a neighbourhood of 6x6 pixels, with a stride of 2 of up
    to 12x12: the error of an output follows the largest of them, also where they cancel. A sample
    with an infinite or NaN output is computed again without it, so both stay where they belong; so
    is a weight gradient.

    On a GPU of compute capability 8.0 or later it is used for 3x3 convolutions in float32 of one
    group, stride and dilation 1, where TF32 is not allowed, with 32 channels or more on both sides
    and 16 outputs or more. What a CUDA graph has captured stays as it was.

    Args:
        enabled: allowed (the default of the process) or not.

    Takes effect at once; as a context manager it restores what was set before::

        torchconv.backends.allow_winograd(False)

        with torchconv.backends.allow_winograd(False):
            y = model(x)
    """

    @staticmethod
    def _get() -> bool:
        return winograd_allowed()

    @staticmethod
    def _set(enabled: bool) -> None:
        _library().torchconv_allow_winograd(enabled)


_keep_packed_weights = True


def packed_weights_kept() -> bool:
    """Whether layers in eval mode keep packed weights."""
    return _keep_packed_weights


class keep_packed_weights(_Switch):
    """Lets layers in eval mode keep their weights as the algorithm reads them, or not.

    A call then need not pack them again. What is kept takes up to four times the weights' memory
    (Winograd's form), for each of the last two forms; `torchconv.drop_packed_weights` gives it
    back.

    Args:
        enabled: kept (the default of the process) or not.

    Takes effect at once; as a context manager it restores what was set before.
    """

    @staticmethod
    def _get() -> bool:
        return _keep_packed_weights

    @staticmethod
    def _set(enabled: bool) -> None:
        global _keep_packed_weights
        _keep_packed_weights = enabled


class _Backends(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # torch.backends has flags, and who sets one of these would switch nothing.
        if name in __all__:
            raise AttributeError(f"torchconv.backends.{name} is called, not set: {name}({value!r})")
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Backends
