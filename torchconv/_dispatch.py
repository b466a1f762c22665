"""How a derivative's forward calls its operator: past autograd, but not past functorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad as fwAD

__all__ = ["below_autograd"]


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """op inside a Function's forward: this level's derivative is the Function's own business."""
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return op(*args)
        # Function.forward runs without gradients, but functorch's outer levels want theirs.
        with torch.enable_grad(), fwAD._set_fwd_grad_enabled(True):
            return op(*args)
