"""Several operators in one call: ``torch.ops.torchconv.run_kept_chain``.

It takes tensors and the number of a program that the library keeps (``keep_chain``), a list of
integers in the memory of a tensor, which csrc/ops/cpu/chain.cpp runs; what a call on tensors of
these sizes comes to is remembered (chain_program.cpp, beside it). ``run_planned_chain`` takes the
images alone, where the program knows the parameters and remembers such a call. As the overloads for
short calls (_settings.py) they pass autograd by, and whoever calls them must know that the tensors
are on the CPU and that nothing records, transforms, traces, casts or watches the call.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchconv import _load
from torchconv._schemas import LIBRARY, overload

__all__ = ["KeptProgram", "Step", "call_pytorch", "program_of"]

# In the order of csrc/ops/cpu/chain.cpp; the last ones are PyTorch's.
_OF_PYTORCH = ("mul", "hardsigmoid", "cat")
_OF_OURS = ("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
# conv2d again, as a part of a concatenation, and of images of one pixel.
_OPERATORS = (*_OF_OURS, *_OF_PYTORCH, "part", "linear")


class Step(NamedTuple):
    """One operator of a program. Positions count the call's tensors and, after them, the results of
    the steps."""

    operator: str
    tensors: Sequence[int]  # positions; -1: none
    # Of the operator's short overload, or cat's dimension. Before conv2d's comes whether the
    # residual's layout has to be the output's, and after them the owner and version of packed
    # weights and whether these are frozen. linear's: for how many rows at most it is a convolution,
    # and conv2d's.
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


LIBRARY.define("keep_chain(Tensor program) -> int")
LIBRARY.define("run_kept_chain(Tensor[] tensors, int number) -> Tensor[]")
LIBRARY.define("run_planned_chain(Tensor[] inputs, int number) -> Tensor[]")
for name in ("keep_chain", "run_kept_chain", "run_planned_chain"):
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_load.load()))
    library.torchconv_forget_chain.argtypes = (ctypes.c_int64,)
    library.torchconv_forget_chain.restype = None
    library.torchconv_fix_chain_parameters.argtypes = (
        ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
    )  # fmt: skip
    library.torchconv_fix_chain_parameters.restype = None
    library.torchconv_chain_plans.argtypes = (ctypes.c_int64,)
    library.torchconv_chain_plans.restype = ctypes.c_int64
    return library


class KeptProgram:
    """A program that the library keeps; a call runs it on tensors of the CPU.

    Args:
        parameters: come after the tensors of each call.
        fixed: these stay what they are, in the same memory. Who calls sees to it.
    """

    def __init__(
        self, program: Tensor, parameters: Sequence[Tensor] = (), fixed: bool = False
    ) -> None:
        library = _library()  # whose operators these are
        self._parameters = parameters
        self._number: int = overload("keep_chain")(program)
        self._run = overload("run_kept_chain")._op
        self._run_planned = overload("run_planned_chain")._op if fixed else None
        if fixed:
            addresses = array("Q", (t.data_ptr() for t in parameters))
            library.torchconv_fix_chain_parameters(self._number, *addresses.buffer_info())

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = []
        if self._run_planned is not None:
            outputs = self._run_planned(tensors, self._number)
        return outputs or self._run([*tensors, *self._parameters], self._number)

    def plans(self) -> int:
        """For how many kinds of tensors the library knows what to do."""
        known: int = _library().torchconv_chain_plans(self._number)
        return known

    def __del__(self) -> None:
        if hasattr(self, "_number") and _library is not None:
            _library().torchconv_forget_chain(self._number)
