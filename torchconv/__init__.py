"""Convolution and pooling for PyTorch: the same numbers as torch.nn, faster."""

from torchconv import _derivatives, _fake, _transforms, autograd, backends, functional, nn
from torchconv._explain import explain
from torchconv._packed_weights import drop_packed_weights
from torchconv._patch import patch
from torchconv.convert import convert, restore
from torchconv.fuse import fuse, fuse_training
from torchconv.memory import empty_cache, memory_stats, set_memory_pool

__version__ = "0.1.0"

__all__ = [
    "autograd",
    "backends",
    "convert",
    "drop_packed_weights",
    "empty_cache",
    "explain",
    "functional",
    "fuse",
    "fuse_training",
    "memory_stats",
    "nn",
    "patch",
    "restore",
    "set_memory_pool",
]

del _derivatives, _fake, _transforms
