"""The layers that `torchconv.fuse` makes of a layer and the sum behind it.

Sizes are known when they run: if both terms are alike, the sum is part of the layer's own pass, or
else a step of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchconv import nn
from torchconv._arguments import conv_padding
from torchconv._coverage import covers_linear
from torchconv.functional import activate, conv2d


class ConvAdd2d(nn.Conv2d):
    """activation(conv(input) + other), with other of whatever kind may be added to the result.

    It is what `fuse` makes of a convolution and the sum behind it. Sizes are known when it runs:
    if both terms are alike, the sum is part of the convolution's pass, or else a step of its own.
    """

    # Whether the sum was one into the convolution's result, whose size and type then stay.
    adds_in_place: bool = False

    def forward(self, input: Tensor, other: Any = None) -> Tensor:
        if other is None or self._is_output_like(input, other):
            return super().forward(input, other)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        out = conv2d(input, self.weight, self.bias, *settings, flip_kernel=self.flip_kernel)
        out = out.add_(other) if self.adds_in_place else out + other
        return activate(self.activation, out)

    def _is_output_like(self, input: Tensor, other: Any) -> bool:
        if not isinstance(other, Tensor) or other.dtype != input.dtype:
            return False
        if other.device != input.device or torch.is_autocast_enabled(input.device.type):
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


class LinearAdd(nn.Linear):
    """activation(linear(input) + other), as ConvAdd2d for a linear layer over images.

    With `image_order`, other and the result are N x K x H x W where the layer's own output is
    N x H x W x K.
    """

    adds_in_place: bool = False
    other_first: bool = False  # whose strides the sum then takes
    image_order: bool = False

    def forward(self, input: Tensor, other: Any = None) -> Tensor:
        if other is None:
            return super().forward(input)
        residual = self._residual(input, other)
        if residual is None:
            out = F.linear(input, self.weight, self.bias)
            out = out.permute(0, 3, 1, 2) if self.image_order else out
            if self.other_first:
                return activate(self.activation, other + out)
            return activate(self.activation, out.add_(other) if self.adds_in_place else out + other)
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
