"""The memory that torchconv keeps: outputs and scratch of a megabyte and more.

A large block costs more to page in than most layers take to fill it, and the C library returns it
to the system as soon as it is freed. torchconv keeps such blocks instead, in huge pages, and gives
them out again, as PyTorch does with CUDA memory. It holds at most ``limit`` bytes that nobody uses,
by default an eighth of the machine's memory (or of what its container may have), but at least 1 GiB
where that is not more than half of it; results are the same bits with it or without.

``TORCHCONV_MEMORY_POOL=0`` in the environment turns it off, ``TORCHCONV_MEMORY_POOL_LIMIT`` sets
the limit in bytes. It serves outputs with PyTorch 2.11 and later, scratch with every version.

An output that grows in place, by ``resize_`` to more elements say, moves to memory of PyTorch's
own, and its block comes back to the pool. That takes a small library, compiled with the others,
that only the PyTorch it was compiled with can open. With another one growing raises RuntimeError,
as it does for a tensor made by ``torch.from_numpy``.
"""

from __future__ import annotations

import ctypes
import functools

from torchconv import _load

__all__ = ["empty_cache", "memory_stats", "set_memory_pool"]

_FIELDS = ("enabled", "limit", "allocated", "cached", "peak", "reused", "fresh", "returned")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_load.load()))
    library.torchconv_memory_configure.argtypes = (ctypes.c_bool, ctypes.c_int64)
    return library


def memory_stats() -> dict[str, int]:
    """What the pool holds.

    Returns:
        enabled: 1 or 0; limit: the most bytes kept unused; allocated: bytes in use now; cached:
        bytes kept unused; peak: most bytes in use at once; reused, fresh: requests served by a kept
        block, and by the system; returned: blocks given back to the system.
    """
    fields = (ctypes.c_int64 * len(_FIELDS))()
    _library().torchconv_memory_stats(fields)
    return dict(zip(_FIELDS, fields, strict=True))


def empty_cache() -> None:
    """Gives every block that nobody uses back to the system. Tensors keep theirs, and so does each
    thread its copy of the largest depthwise weights that it has multiplied by."""
    _library().torchconv_empty_cache()


def set_memory_pool(enabled: bool = True, *, limit: int | None = None) -> None:
    """Turns the pool on or off, and bounds it.

    Args:
        enabled: False keeps nothing from now on, and gives back at once what is kept.
        limit: the most bytes kept while nobody uses them; None leaves the limit as it is.

    Raises:
        ValueError: for a negative limit.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit must not be negative, got {limit}")
    bound = memory_stats()["limit"] if limit is None else limit
    _library().torchconv_memory_configure(enabled, bound)
