"""The overloads ``torch.ops.torchconv.<name>.settings``, for short calls.

PyTorch takes a list argument apart in Python, in the dispatcher and at the stable ABI: on small
images that is more than the rest of a call. These overloads take an operator's tensors and, in the
memory of one more tensor, a list of integers with all of its other arguments. `settings_of` writes
it and csrc/ops/settings.h reads it.

They have a CPU and a GPU kernel and pass autograd by: whoever calls one must know that nothing
records, transforms, traces, casts or watches the call (torchconv/_dispatch.py). What lands here on
another device or layout, or before the library is loaded, is passed on to the operator itself.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchconv._schemas import LIBRARY, overload

__all__ = ["OVERLOADED", "Signature", "read_values", "settings_of"]

OVERLOADED = (
    "conv2d",
    "conv2d_with_preactivation",
    "conv2d_backward",
    "max_pool2d",
    "min_pool2d",
    "max_pool2d_with_offsets",
    "min_pool2d_with_offsets",
    "max_pool2d_with_indices",
    "min_pool2d_with_indices",
    "select_pool2d_backward",
    "avg_pool2d",
    "avg_pool2d_backward",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_values",
    "adaptive_max_pool2d_backward",
    "batch_norm_training",
    "batch_norm_inference",
    "batch_norm_backward",
)


class Signature:
    """An operator's arguments: how many tensors come first, and the types of what is no tensor."""

    __slots__ = ("leading", "types")

    def __init__(self, name: str) -> None:
        types = [str(argument.type) for argument in overload(name)._schema.arguments]
        self.types = [kind for kind in types if "Tensor" not in kind]
        self.leading = types.index(self.types[0])

    def joined(self, tensors: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
        """The operator's arguments from its overload's."""
        return (
            *tensors[: self.leading],
            *values[: len(self.types)],
            *tensors[self.leading :],
        )


def settings_of(types: Sequence[str], values: Sequence[Any]) -> Tensor:
    """The list of integers for values of these types, and of integers after them; a float is the
    bits of a double.

    Raises TypeError for a value that is none of its type.
    """
    numbers: list[Any] = []
    for i, value in enumerate(values):
        kind = types[i] if i < len(types) else "int"
        if kind == "Optional[int]":
            numbers += [value is not None, value or 0]
        elif kind == "str":
            text = value.encode()
            numbers += [len(text), *text]
        elif kind.startswith("List"):
            numbers += [len(value), *value]
        elif kind == "float":
            numbers += struct.unpack("q", struct.pack("d", value))
        else:
            numbers.append(value)
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def read_values(types: Sequence[str], numbers: Iterator[Any]) -> Iterator[Any]:
    """What settings_of was given, but for integers after the last type, from what it wrote."""
    for kind in types:
        number = next(numbers)
        if kind == "Optional[int]":
            value = next(numbers)
            yield value if number else None
        elif kind == "str":
            yield bytes(next(numbers) for _ in range(number)).decode()
        elif kind.startswith("List"):
            of = bool if "bool" in kind else int
            yield [of(next(numbers)) for _ in range(number)]
        elif kind == "float":
            yield struct.unpack("d", struct.pack("q", number))[0]
        else:
            yield bool(number) if kind == "bool" else number


def _declared(argument: Any) -> str:
    written = argument.alias_info
    alias = f"({min(written.before_set)}!)" if written is not None and written.is_write else ""
    optional = "" if str(argument.type) == "Tensor" else "?"
    return f"Tensor{alias}{optional} {argument.name}"


def _define(name: str) -> None:
    op, signature = overload(name), Signature(name)

    def pass_on(*args: Any) -> Any:
        *tensors, settings = args
        return op(
            *signature.joined(tensors, tuple(read_values(signature.types, iter(settings.tolist()))))
        )

    tensors = [a for a in op._schema.arguments if "Tensor" in str(a.type)]
    declared = [_declared(a) for a in tensors]
    results = ", ".join("Tensor" for _ in op._schema.returns)
    short = f"{name}.settings"
    LIBRARY.define(f"{short}({', '.join(declared)}, Tensor settings) -> ({results})")
    LIBRARY.impl(short, pass_on, "CompositeExplicitAutograd")
    LIBRARY.impl(short, torch.library.fallthrough_kernel, "Autograd")


for _name in OVERLOADED:
    _define(_name)
