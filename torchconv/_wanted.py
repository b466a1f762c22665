"""Which of a Function's gradients the running backward will use.

`ctx.needs_input_grad` says whose gradient could be asked for. Where parameters require gradients,
`torch.autograd.grad(loss, images)` nonetheless uses those of activations alone; PyTorch's own nodes
ask the engine, and compute no others.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["wanted_gradients"]

_will_execute: Any = getattr(torch._C, "_will_engine_execute_node", None)
_is_compiling = torch.compiler.is_dynamo_compiling


def wanted_gradients(ctx: Any) -> tuple[bool, ...]:
    """ctx.needs_input_grad, False where backward's result would be dropped."""
    needs: tuple[bool, ...] = ctx.needs_input_grad
    if _is_compiling() or _will_execute is None or sum(needs) < 2:
        return needs
    # An edge for each tensor, to a node where it requires a gradient.
    nodes = [node for node, _ in getattr(ctx, "next_functions", ()) if node is not None]
    if len(nodes) != sum(needs):
        return needs
    used = map(_is_used, nodes)
    return tuple(need and next(used) for need in needs)


def _is_used(node: Any) -> bool:
    try:
        return bool(_will_execute(node))
    except RuntimeError:
        # A leaf whose gradient autograd.grad returns, which the engine does not execute but does
        # use; or no engine runs this backward.
        return True
