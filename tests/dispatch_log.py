"""Which operators a piece of code reaches, whatever Python stands above them."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchLog(TorchDispatchMode):
    """Context manager that notes the name of every operator called inside, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        """Calls of torchconv operators whose name begins with `name`, their backwards apart."""
        return sum(
            n.startswith(f"torchconv::{name}") and not n.endswith("_backward") for n in self.names
        )

    def from_torch(self) -> list[str]:
        """PyTorch's own convolutions and poolings that were called."""
        kinds = ("conv", "_conv", "mkldnn", "max_pool", "avg_pool", "adaptive_", "_adaptive_")
        return [n for n in self.names if n.startswith(tuple(f"aten::{kind}" for kind in kinds))]
