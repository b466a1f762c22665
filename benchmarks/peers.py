"""The libraries that torchconv is measured against, and torchconv itself, behind one interface.

A peer turns a problem into a function of (input, weight, bias) and, for whole networks, a module
into a function of one batch. A peer that cannot differentiate (an inference engine) says so, and
only its forward passes are timed, in the layouts that it takes. To add one, write a class and enter
it in PEERS (options.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Protocol, cast

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fold_norms

from benchmarks.problems import Problem
from benchmarks.reference import torch_norm, torch_pooling

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

Operator = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


class Peer(Protocol):
    """What a library must offer to be timed."""

    name: str
    differentiable: bool
    layouts: Sequence[str]  # of LAYOUTS

    def operator(self, problem: Problem) -> Operator:
        """A function that solves this problem; compiling happens at its first call."""

    def with_residual(self, problem: Problem, residual: Tensor) -> Operator:
        """The same for a convolution, with a residual added to its result and then ReLU; for a
        normalisation, with what its problem has behind it."""

    def model(self, model: nn.Module) -> nn.Module:
        """A copy of the network that runs through this library, with equal parameters."""

    def fused(self, model: nn.Module, frozen: bool = False) -> nn.Module:
        """The same for inference, with what follows a convolution taken into it. frozen: nobody
        will write to its weights."""

    def fused_training(self, model: nn.Module) -> nn.Module:
        """The same for training, with what follows a layer taken into it, where it has that."""


class TorchConv:
    """torchconv.functional, and networks after torchconv.convert, fuse or fuse_training."""

    name = "torchconv"
    differentiable = True
    layouts: Sequence[str] = tuple(LAYOUTS)

    def operator(self, problem: Problem) -> Operator:
        functional = _torchconv().functional
        if problem.norm:
            return self._norm(problem, None)
        if not problem.pooling:
            arguments = (problem.stride, problem.padding, problem.dilation, problem.groups)
            return lambda x, w, b: functional.conv2d(x, w, b, *arguments)
        pool = getattr(functional, problem.operator)
        if problem.adaptive:
            return lambda x, w, b: pool(x, problem.kernel)
        window = (problem.kernel, problem.stride, problem.padding)
        if problem.operator == "avg_pool2d":
            return lambda x, w, b: pool(x, *window, problem.ceil_mode)
        return lambda x, w, b: pool(x, *window, problem.dilation, problem.ceil_mode)

    def with_residual(self, problem: Problem, residual: Tensor) -> Operator:
        if problem.norm:
            return self._norm(problem, residual)
        conv2d = _torchconv().functional.conv2d
        arguments = (problem.stride, problem.padding, problem.dilation, problem.groups)
        return lambda x, w, b: conv2d(*(x, w, b, *arguments), activation="relu", residual=residual)

    def _norm(self, problem: Problem, residual: Tensor | None) -> Operator:
        norm = _torchconv().functional.batch_norm
        behind = {"activation": problem.activation, "residual": residual}
        return lambda x, w, b: norm(x, None, None, w, b, training=True, **behind)

    def model(self, model: nn.Module) -> nn.Module:
        converted: nn.Module = _torchconv().convert(copy.deepcopy(model))
        return converted

    def fused(self, model: nn.Module, frozen: bool = False) -> nn.Module:
        made: nn.Module = _torchconv().fuse(model, freeze=frozen)
        return made

    def fused_training(self, model: nn.Module) -> nn.Module:
        made: nn.Module = _torchconv().fuse_training(model)
        return made


def _torchconv() -> ModuleType:
    """Imported late, so that listing shapes or reading a report needs no build of torchconv."""
    import torchconv
    import torchconv.functional

    return torchconv


class Eager:
    """PyTorch as it is: torch.nn.functional."""

    name = "torch"
    differentiable = True
    layouts: Sequence[str] = tuple(LAYOUTS)

    def operator(self, problem: Problem) -> Operator:
        if problem.norm:
            return lambda x, w, b: torch_norm(problem, x, w, b, None)
        if problem.pooling:
            return lambda x, w, b: torch_pooling(problem, x)
        arguments = (problem.stride, problem.padding, problem.dilation, problem.groups)

        def conv2d(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
            assert w is not None
            return F.conv2d(x, w, b, *arguments)

        return conv2d

    def with_residual(self, problem: Problem, residual: Tensor) -> Operator:
        if problem.norm:
            return lambda x, w, b: torch_norm(problem, x, w, b, residual)
        conv2d = Eager.operator(self, problem)
        return lambda x, w, b: conv2d(x, w, b).add_(residual).relu_()

    def model(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model)

    def fused(self, model: nn.Module, frozen: bool = False) -> nn.Module:
        return fold_norms(model)  # which copies it

    def fused_training(self, model: nn.Module) -> nn.Module:
        return self.model(model)


class Compiled(Eager):
    """torch.compile of the same functions and networks, shapes fixed."""

    name = "compile"

    def __init__(self) -> None:
        # Timing a backward alone calls it repeatedly, so its buffers must outlive a call.
        torch._functorch.config.donated_buffer = False

    def operator(self, problem: Problem) -> Operator:
        torch.compiler.reset()  # or a long list of shapes runs into the recompilation limit
        compiled: Operator = torch.compile(super().operator(problem), dynamic=False)
        return compiled

    def with_residual(self, problem: Problem, residual: Tensor) -> Operator:
        torch.compiler.reset()
        compiled: Operator = torch.compile(super().with_residual(problem, residual), dynamic=False)
        return compiled

    def model(self, model: nn.Module) -> nn.Module:
        torch.compiler.reset()
        return cast(nn.Module, torch.compile(super().model(model), dynamic=False))

    def fused(self, model: nn.Module, frozen: bool = False) -> nn.Module:
        torch.compiler.reset()
        return cast(nn.Module, torch.compile(super().fused(model), dynamic=False))
