"""The layers that `torchconv.fuse` makes of a layer and the sum behind it.

Sizes are known when they run: if both terms are alike, the sum is part of the layer's own pass, or
else a step of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F

from torchconv import nn
from torchconv._arguments import conv_padding
from torchconv._coverage import covers_linear
from torchconv._fake import conv_channels_last, is_channels_last
from torchconv.functional import activate, conv2d

torch.fx.wrap("conv2d")  # symbolic tracing goes through these layers: see nn.py


class _Sum:
    """What the layers have in common: how their network wrote the sum."""

    activation: str | None
    # Whether the sum was one into the layer's result, whose size and type then stay.
    adds_in_place: bool = False
    # Whether other was the sum's first term, whose strides it then takes.
    other_first: bool = False

    def _add(self, out: Tensor, other: Any) -> Tensor:
        if self.other_first:
            out = other + out
        else:
            out = out.add_(other) if self.adds_in_place else out + other
        return activate(self.activation, out)


class ConvAdd2d(_Sum, nn.Conv2d):
    """activation(conv(input) + other), with other of whatever kind may be added to the result."""

    def forward(self, input: Tensor, other: Any = None) -> Tensor:
        if other is None or self._is_output_like(input, other):
            return super().forward(input, other)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        out = conv2d(input, self.weight, self.bias, *settings, flip_kernel=self.flip_kernel)
        return self._add(out, other)

    def _is_output_like(self, input: Tensor, other: Any) -> bool:
        if not isinstance(other, Tensor) or other.dtype != input.dtype:
            return False
        if other.device != input.device or torch.is_autocast_enabled(input.device.type):
            return False
        if self.other_first and is_channels_last(other) != conv_channels_last(input, self.weight):
            return False
        left, right, top, bottom = conv_padding(
            self.padding, input, self.weight, self.stride, self.dilation
        )
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        padded = (input.shape[-2] + top + bottom, input.shape[-1] + left + right)
        output = [
            (n - span) // s + 1 for n, span, s in zip(padded, spans, self.stride, strict=True)
        ]
        return other.shape == (*input.shape[:-3], self.out_channels, *output)


class LinearAdd(_Sum, nn.Linear):
    """activation(linear(input) + other), as ConvAdd2d for a linear layer over images.

    With `image_order`, other and the result are N x K x H x W where the layer's own output is
    N x H x W x K.
    """

    image_order: bool = False

    def forward(self, input: Tensor, other: Any = None) -> Tensor:
        if other is None:
            return super().forward(input)
        residual = self._residual(input, other)
        if residual is None:
            out = F.linear(input, self.weight, self.bias)
            return self._add(out.permute(0, 3, 1, 2) if self.image_order else out, other)
        out = super().forward(input, residual)
        return out.permute(0, 3, 1, 2) if self.image_order else out

    def _residual(self, input: Tensor, other: Any) -> Tensor | None:
        """other in the order of the layer's own output, if the layer can add it in its pass."""
        if not isinstance(other, Tensor):
            return None
        if self.image_order:
            if other.dim() != 4:
                return None
            other = other.permute(0, 2, 3, 1)
        # The result then has other's strides, too.
        covered = covers_linear(input, self.weight, self.bias, other)
        return other if covered and other.is_contiguous() else None


class BatchNormAdd2d(_Sum, nn.BatchNorm2d):
    """activation(norm(input) + other), as ConvAdd2d for a normalisation."""

    def forward(self, input: Tensor, other: Any = None) -> Tensor:
        # Recorded, it is one node.
        if other is None or isinstance(input, Proxy) or self._is_output_like(input, other):
            return super().forward(input, other)
        return self._add(torch.nn.BatchNorm2d.forward(self, input), other)

    def _is_output_like(self, input: Tensor, other: Any) -> bool:
        return (
            isinstance(other, Tensor)
            and other.dtype == input.dtype
            and other.device == input.device
            and other.shape == input.shape
            and other.stride() == input.stride()
        )
