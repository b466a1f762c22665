"""Convolution and pooling for PyTorch: the same numbers as torch.nn, faster."""

from torchconv import _derivatives, _fake, _transforms, autograd, functional, nn
from torchconv._patch import patch
from torchconv.convert import convert, restore

__version__ = "0.1.0"

__all__ = ["autograd", "convert", "functional", "nn", "patch", "restore"]

del _derivatives, _fake, _transforms
