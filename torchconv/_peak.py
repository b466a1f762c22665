"""The arithmetic peak of the CPU's cores, by multiply-adds that read and write nothing."""

from __future__ import annotations

import ctypes
import functools
import time

import torch

from torchconv import _load

_ROUNDS = 1 << 19  # of 12 multiply-adds of vectors in each thread: a millisecond or two
_RUNS = 12


@functools.cache
def peak(dtype: torch.dtype, threads: int) -> float:
    """GFLOP/s, a multiply-add being two, of ``threads`` threads with the instructions of the
    library that is loaded. 16-bit types compute in float32, bfloat16 by products of pairs where the
    processor has them."""
    if dtype is torch.float64:
        return _rate("float64", threads)
    single = _rate("float32", threads)
    return max(single, _rate("pairs", threads)) if dtype is torch.bfloat16 else single


@functools.cache
def _rate(kind: str, threads: int) -> float:
    library = ctypes.CDLL(str(_load.load()))
    multiply_adds = getattr(library, f"torchconv_multiply_adds_{kind}")
    multiply_adds.argtypes = (ctypes.c_int64, ctypes.c_int64)
    multiply_adds.restype = ctypes.c_int64
    rates = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        done = multiply_adds(threads, _ROUNDS)
        rates.append(2 * done / (time.perf_counter() - start) / 1e9)
    return max(rates)
