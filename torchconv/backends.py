"""Switches between algorithms, in the manner of ``torch.backends``.

A switch holds for the whole process and for the calls that follow it.
"""

from __future__ import annotations

import ctypes
import functools
from types import TracebackType

from torchconv import _load

__all__ = ["allow_winograd", "winograd_allowed"]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_load.load()))
    library.torchconv_allow_winograd.argtypes = (ctypes.c_bool,)
    library.torchconv_allow_winograd.restype = None
    library.torchconv_winograd_allowed.restype = ctypes.c_bool
    return library


def winograd_allowed() -> bool:
    """Whether float32 convolutions may use Winograd's algorithm."""
    return bool(_library().torchconv_winograd_allowed())


class allow_winograd:
    """Allows or forbids Winograd's algorithm for float32 convolutions with a 3x3 kernel.

    It needs a quarter of the multiplications and is less accurate than the direct product (the
    tables in benchmarks/results give the errors). It mixes the values of a neighbourhood of 6x6
    pixels: the error of an output follows the largest of them, also where they cancel. A sample
    with an infinite or NaN output is computed again without it, so both stay where they belong;
    so is a weight gradient.

    Args:
        enabled: allowed (the default of the process) or not.

    Takes effect at once; as a context manager it restores what was set before::

        torchconv.backends.allow_winograd(False)

        with torchconv.backends.allow_winograd(False):
            y = model(x)
    """

    def __init__(self, enabled: bool = True) -> None:
        self._before = winograd_allowed()
        _library().torchconv_allow_winograd(enabled)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _library().torchconv_allow_winograd(self._before)
