"""Packed weights that a convolution layer keeps while it is only asked for outputs.

An algorithm reads weights in a form of its own: in panels as wide as its registers, or transformed
(Winograd). Making that form is work of every call, and on small batches a good part of it. A layer
in eval mode keeps it, outside of its state: for the last two forms that its inputs needed, as long
as its weights stay what they are.

What the weights are is known by their object, the tensor in it, their address, PyTorch's count of
in-place changes and, for what PyTorch does not count (changes of `weight.data`), a checksum.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from torchconv import _load
from torchconv._dispatch import is_plain, operator, records

__all__ = ["PackedWeights", "drop_packed_weights", "only_infers"]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_load.load()))
    library.torchconv_packed_weights_create.restype = ctypes.c_int64
    library.torchconv_packed_weights_bytes.restype = ctypes.c_int64
    for name in ("clear", "destroy", "bytes"):
        function = getattr(library, f"torchconv_packed_weights_{name}")
        function.argtypes = (ctypes.c_int64,)
    return library


_autocasts = torch._C._is_any_autocast_enabled
_conv2d = operator("conv2d")


def only_infers(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> bool:
    """Whether a convolution of these is a plain call whose result is all that anybody asks for:
    nothing records, transforms, casts or watches it."""
    return (
        is_plain(input, weight, bias, residual)
        and not records(input, weight, bias, residual)
        and not _autocasts()
        and not weight.is_inference()  # whose changes are not counted
    )


class PackedWeights:
    """What one layer keeps. A copy, or what a pickle of it gives, keeps nothing yet."""

    __slots__ = (
        "__weakref__",
        "_bias",
        "_keepable",
        "_kernel",
        "_layer",
        "_memory",
        "_values",
        "_weight",
        "_what",
        "_written",
        "frozen",
        "owner",
    )

    def __init__(self, frozen: bool = False) -> None:
        self.owner: int = _library().torchconv_packed_weights_create()
        self.frozen = frozen
        self._weight: Tensor | None = None
        # What is kept holds on to the weights' memory, so that its address cannot come to be that
        # of others.
        self._memory: Tensor | None = None
        self._what = (0, 0)  # the tensor in that object, and its address
        self._keepable = False
        self._layer: tuple[Any, ...] = ()
        self._bias: Tensor | None = None
        self._values: tuple[Any, ...] | None = None
        self._written: tuple[Any, Any] = ((), None)
        self._kernel: tuple[Tensor, Any, Tensor] | None = None

    def kernel_of(self, matrix: Tensor) -> Tensor:
        """K x C as the weights K x C x 1 x 1 of a convolution: the same tensor for the same
        matrix, whose in-place changes it counts. Without a tie to the matrix, which may be swapped
        (torch.utils.swap_tensors)."""
        # Another tensor in the same object counts for itself, even in the same memory.
        what = (matrix._cdata, matrix.data_ptr(), matrix.shape, matrix.stride())
        kept = self._kernel
        if kept is None or kept[0] is not matrix or kept[1] != what:
            kernel = matrix.detach()
            # Of what it holds on to, also where another thread sets `matrix.data`.
            what = (what[0], kernel.data_ptr(), kernel.shape, kernel.stride())
            self._kernel = kept = (matrix, what, kernel[:, :, None, None])
        return kept[2]

    def remember(
        self, layer: tuple[Any, ...], bias: Tensor | None, values: tuple[Any, ...]
    ) -> None:
        """The operator's arguments that these settings of the layer come to, for any batch."""
        # A list may come to others, and be the same object.
        known = None if any(isinstance(setting, list) for setting in layer) else values
        self._layer, self._bias, self._values = layer, bias, known

    def values_of(
        self, layer: tuple[Any, ...], input: Any, weight: Any, bias: Any
    ) -> tuple[Any, ...] | None:
        """What was remembered, where the call differs from the one before in its batch alone."""
        if (
            type(input) is Tensor
            and weight is not None
            and input.dtype is weight.dtype
            and input.dim() == 4
            and input.is_cpu
        ):
            return self.remembered(layer, weight, bias)
        return None

    def remembered(
        self, layer: tuple[Any, ...], weight: Tensor, bias: Tensor | None
    ) -> tuple[Any, ...] | None:
        """What was remembered for this layer, unless it has changed."""
        if weight is self._weight and bias is self._bias and layer == self._layer:
            return self._values
        return None

    def convolve(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        values: tuple[Any, ...],
    ) -> Tensor:
        """conv2d where it `only_infers`, by the weights that are kept."""
        if input.dim() == 3:
            added = None if residual is None else residual.unsqueeze(0)
            return self.convolve(input.unsqueeze(0), weight, bias, added, values).squeeze(0)
        # Another thread may set `data` of both while this one is in a kernel. What frozen layers
        # keep must come of the weights that `wanted` tells of: nothing would notice it later.
        _held = weight.untyped_storage(), None if bias is None else bias.untyped_storage()
        read = weight.detach() if self.frozen else weight
        wanted = (values, *self.owner_of(weight))
        # Both at once, for layers that several threads call.
        known, settings = self._written
        if wanted != known:
            settings = _conv2d.settings_once((*values, *wanted[1:]))
            self._written = (wanted, settings)
        return _conv2d.call(input, read, bias, residual, settings)

    def owner_of(self, weight: Tensor) -> tuple[int, int, bool]:
        """The operator's last arguments: the owner of these weights, 0 where theirs must not be
        kept, their version, and whether nothing else need tell of changes."""
        # Another tensor in the same object (torch.utils.swap_tensors) counts for itself.
        what = (weight._cdata, weight.data_ptr())
        if weight is not self._weight or what != self._what:
            _library().torchconv_packed_weights_clear(self.owner)
            memory = weight.detach()  # one answer, also where another thread sets `weight.data`
            address = memory.data_ptr()
            # Other processes write to shared memory, and count no changes here.
            self._keepable = address != 0 and (self.frozen or not memory.is_shared())
            self._weight, self._what = weight, (what[0], address)
            self._memory = memory if self._keepable else None
        return (self.owner if self._keepable else 0), weight._version, self.frozen

    def bytes(self) -> int:
        """Of the packed weights that are kept."""
        kept: int = _library().torchconv_packed_weights_bytes(self.owner)
        return kept

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeights, (self.frozen,)

    def __del__(self) -> None:
        if hasattr(self, "owner") and _library is not None:
            _library().torchconv_packed_weights_destroy(self.owner)


def drop_packed_weights(model: torch.nn.Module) -> None:
    """Forgets the packed weights that the layers of `model` keep, and gives their memory back.

    Changed weights need no such call: layers notice them by themselves, frozen ones those changes
    that PyTorch counts (`torchconv.fuse`).
    """
    for module in model.modules():
        vars(module).pop("_packed_weights", None)
