"""The operator ``torch.ops.torchconv.chain``: several operators in one call.

A program that is to run more often is kept by the library, which then remembers what a call on
inputs of these sizes comes to (csrc/ops/cpu/chain_program.cpp).

It takes tensors and a program, a list of integers in the memory of a tensor, which
csrc/ops/chain.cpp runs. As the overloads for short calls (_settings.py) it passes autograd by, and
whoever calls it must know that nothing records, transforms, traces, casts or watches the call. What
lands here, on another device or before the library is loaded, is passed on to the operators.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchconv import _load
from torchconv._fake import conv_channels_last, is_channels_last
from torchconv._schemas import LIBRARY, overload
from torchconv._settings import Signature, read_values

__all__ = ["KeptProgram", "Step", "call_pytorch", "program_of"]

# In the order of csrc/ops/chain.cpp; the last ones are PyTorch's.
_OF_PYTORCH = ("mul", "hardsigmoid", "cat")
_OF_OURS = ("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
# conv2d again, as a part of a concatenation.
_OPERATORS = (*_OF_OURS, *_OF_PYTORCH, "part")


class Step(NamedTuple):
    """One operator of a program. Positions count the call's tensors and, after them, the results of
    the steps."""

    operator: str
    tensors: Sequence[int]  # positions; -1: none
    # Of the operator's short overload, or cat's dimension. Before conv2d's comes whether the
    # residual's layout has to be the output's, and after them the owner and version of packed
    # weights.
    settings: Sequence[int]
    done: Sequence[int]  # positions that no later step reads
    # Of conv2d, where the result is only read by a concatenation of channels: that one's position,
    # the first of its channels that are the result's, and all of its channels.
    part: Sequence[int] = ()


def program_of(steps: Sequence[Step], outputs: Sequence[int]) -> Tensor:
    """The steps, and the positions of what is returned, as the operator takes them."""
    numbers = [len(steps)]
    for name, tensors, settings, done, part in steps:
        numbers += (_OPERATORS.index("part" if part else name), len(tensors), *tensors)
        numbers += (*part, *settings, len(done), *done)
    return torch.tensor([*numbers, len(outputs), *outputs], dtype=torch.int64, device="cpu")


def call_pytorch(name: str, tensors: Sequence[Any], settings: Sequence[int]) -> Tensor:
    """The result of a step that is an operator of PyTorch's."""
    if name == "cat":
        return torch.cat(list(tensors), *settings)
    if name == "hardsigmoid":
        return F.hardsigmoid(tensors[0])
    return torch.mul(tensors[0], tensors[1])


def _at(known: Sequence[Any], position: int) -> Any:
    if not 0 <= position < len(known) or known[position] is None:
        raise RuntimeError(f"a chain reads tensor {position}, which is not there")
    return known[position]


def _run_step(known: Sequence[Any], numbers: Iterator[int]) -> Tensor:
    number = next(numbers)
    if not 0 <= number < len(_OPERATORS):
        raise RuntimeError(f"a chain has no operator {number}")
    name = _OPERATORS[number]
    positions = [next(numbers) for _ in range(next(numbers))]
    tensors: list[Any] = [None if i == -1 else _at(known, i) for i in positions]
    if name in _OF_PYTORCH:
        return call_pytorch(name, tensors, [next(numbers)] if name == "cat" else ())
    if name == "part":
        _position, _first, _channels = next(numbers), next(numbers), next(numbers)
        name = "conv2d"
    in_same_layout = name == "conv2d" and next(numbers)
    signature = Signature(name)
    values = tuple(read_values(signature.types, numbers))
    if name == "conv2d":
        _owner, _version = next(numbers), next(numbers)
        input, weight, _bias, residual = tensors
        if in_same_layout and is_channels_last(residual) != conv_channels_last(input, weight):
            raise RuntimeError("the residual is in another layout than the output")
    result: Tensor = overload(name)(*signature.joined(tensors, values))
    return result


def _run_apart(tensors: Sequence[Tensor], program: Tensor) -> list[Tensor]:
    known: list[Any] = list(tensors)
    numbers = iter(program.tolist())
    for _ in range(next(numbers)):
        known.append(_run_step(known, numbers))
        for _ in range(next(numbers)):
            known[next(numbers)] = None
    return [_at(known, next(numbers)) for _ in range(next(numbers))]


LIBRARY.define("chain(Tensor[] tensors, Tensor program) -> Tensor[]")
LIBRARY.impl("chain", _run_apart, "CompositeExplicitAutograd")
LIBRARY.impl("chain", torch.library.fallthrough_kernel, "Autograd")
LIBRARY.define("keep_chain(Tensor program) -> int")
LIBRARY.define("run_kept_chain(Tensor[] tensors, int number) -> Tensor[]")
for name in ("keep_chain", "run_kept_chain"):
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_load.load()))
    library.torchconv_forget_chain.argtypes = (ctypes.c_int64,)
    library.torchconv_forget_chain.restype = None
    library.torchconv_chain_plans.argtypes = (ctypes.c_int64,)
    library.torchconv_chain_plans.restype = ctypes.c_int64
    return library


class KeptProgram:
    """A program that the library keeps; a call runs it on tensors of the CPU."""

    def __init__(self, program: Tensor) -> None:
        _library()  # whose operators these are
        self._number: int = overload("keep_chain")(program)
        self._run = overload("run_kept_chain")._op

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = self._run(tensors, self._number)
        return outputs

    def plans(self) -> int:
        """For how many kinds of tensors the library knows what to do."""
        known: int = _library().torchconv_chain_plans(self._number)
        return known

    def __del__(self) -> None:
        if hasattr(self, "_number") and _library is not None:
            _library().torchconv_forget_chain(self._number)
