"""What a Function is made of that autograd runs and functorch does not look at."""

from __future__ import annotations

from typing import Any

from torch.autograd.function import _SingleLevelFunction

__all__ = ["SingleLevelFunction"]


class SingleLevelFunction(_SingleLevelFunction):
    """PyTorch's, with what compiled autograd asks of torch.autograd.Function besides."""

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[Any, ...]:
        return (ctx._autograd_function_id,)
