"""ConvNeXt-T, which pytorchcv 0.0.67 does not have.

Liu et al., "A ConvNet for the 2020s" (2022), section 2 and table 9, as the paper's code,
torchvision and transformers build it: the two layers of a block's MLP are Linear over the last
dimension, so only the stem, three 2x2 layers and the depthwise 7x7 layers are convolutions.
"""

from __future__ import annotations

from torch import Tensor, full, nn

WIDTHS, DEPTHS = (96, 192, 384, 768), (3, 3, 9, 3)


class ChannelNorm(nn.LayerNorm):
    """Over the channels of N x C x H x W."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7x7, norm, 4x wider MLP with GELU, scale by channel, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        self.scale = nn.Parameter(full((width,), 1e-6))

    def forward(self, input: Tensor) -> Tensor:
        pixels = self.depthwise(input).permute(0, 2, 3, 1)
        return input + (self.scale * self.mlp(pixels)).permute(0, 3, 1, 2)


def convnext_tiny(classes: int = 1000) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 4, stride=4), ChannelNorm(96, eps=1e-6)]
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        if stage > 0:
            before = WIDTHS[stage - 1]
            layers += [ChannelNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2)]
        layers += [Block(width) for _ in range(depth)]
    head = (nn.AdaptiveAvgPool2d(1), ChannelNorm(WIDTHS[-1], eps=1e-6), nn.Flatten())
    return nn.Sequential(*layers, *head, nn.Linear(WIDTHS[-1], classes))
