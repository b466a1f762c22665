"""vmap and autocast rules of the operators.

vmap: pooling and a convolution with one weight see the mapped dimension as more images; a
convolution whose weight is mapped too sees it as more groups, which no loop is needed for.
autocast: convolution runs in the autocast type, as ``F.conv2d`` does; pooling runs in its input's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchconv._schemas import LIBRARY, defaults

_ops = torch.ops.torchconv


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension in front; a tensor without one is repeated (as a view)."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _into_images(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(B, N, C, H, W) -> (B*N, C, H, W)"""
    return _mapped_first(tensor, dim, size).flatten(0, 1)


def _into_channels(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(B, N, C, H, W) -> (N, B*C, H, W)"""
    return _mapped_first(tensor, dim, size).movedim(0, 1).flatten(1, 2)


def _conv2d_rule(op: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        input, weight, bias, stride, padding, dilation, groups, *rest, residual = args
        size = info.batch_size
        if residual is not None:
            whole = in_dims[1] is None and in_dims[2] is None
            residual = (_into_images if whole else _into_channels)(residual, in_dims[-1], size)
        rest.append(residual)
        if in_dims[1] is None and in_dims[2] is None:
            images = _into_images(input, in_dims[0], size)
            out = op(images, weight, bias, stride, padding, dilation, groups, *rest)
            return _map(out, lambda t: t.unflatten(0, (size, -1)), 0)
        channels = _into_channels(input, in_dims[0], size)
        weights = _into_images(weight, in_dims[1], size)
        if bias is not None:
            bias = _mapped_first(bias, in_dims[2], size).flatten(0, 1)
        out = op(channels, weights, bias, stride, padding, dilation, groups * size, *rest)
        return _map(out, lambda t: t.unflatten(1, (size, -1)), 1)

    return rule


def _map(out: Any, split: Callable[[Tensor], Tensor], dim: int) -> tuple[Any, Any]:
    if isinstance(out, tuple):
        return tuple(split(t) for t in out), (dim,) * len(out)
    return split(out), dim


def _conv2d_backward_rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    grad, input, weight, saved, stride, padding, dilation, groups, *rest = args
    size = info.batch_size
    dx, dw, db = _ops.conv2d_backward(
        _into_channels(grad, in_dims[0], size),
        _into_channels(input, in_dims[1], size),
        _into_images(weight, in_dims[2], size),
        None if saved is None else _into_channels(saved, in_dims[3], size),
        *(stride, padding, dilation, groups * size, *rest),
    )
    has_dx, has_dw, has_db = rest[-1]
    return (
        dx.unflatten(1, (size, -1)) if has_dx else dx,
        dw.unflatten(0, (size, -1)) if has_dw else dw,
        db.unflatten(0, (size, -1)) if has_db else db,
    ), (1 if has_dx else None, 0 if has_dw else None, 0 if has_db else None)


def _pool_rule(op: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        folded = [
            _into_images(a, d, info.batch_size) if isinstance(a, Tensor) else a
            for a, d in zip(args, in_dims, strict=True)
        ]
        return _map(op(*folded), lambda t: t.unflatten(0, (info.batch_size, -1)), 0)

    return rule


def _pool_backward_rule(op: Callable[..., Any], sizes_at: int) -> Callable[..., Any]:
    """As _pool_rule, for an operator whose argument sizes_at is the input's size."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        n, *rest = args[sizes_at]
        args = (*args[:sizes_at], [n * info.batch_size, *rest], *args[sizes_at + 1 :])
        in_dims = (*in_dims[:sizes_at], None, *in_dims[sizes_at + 1 :])
        return _pool_rule(op)(info, in_dims, *args)

    return rule


_RULES: dict[str, Callable[..., Any]] = {
    "conv2d": _conv2d_rule(_ops.conv2d),
    "conv2d_with_preactivation": _conv2d_rule(_ops.conv2d_with_preactivation),
    "conv2d_backward": _conv2d_backward_rule,
    "select_pool2d_backward": _pool_backward_rule(_ops.select_pool2d_backward, 2),
    "avg_pool2d_backward": _pool_backward_rule(_ops.avg_pool2d_backward, 1),
    "adaptive_avg_pool2d_backward": _pool_backward_rule(_ops.adaptive_avg_pool2d_backward, 1),
    "adaptive_max_pool2d_backward": _pool_backward_rule(_ops.adaptive_max_pool2d_backward, 2),
    **{
        name: _pool_rule(getattr(_ops, name))
        for name in (
            "max_pool2d",
            "min_pool2d",
            "max_pool2d_with_offsets",
            "min_pool2d_with_offsets",
            "max_pool2d_with_indices",
            "min_pool2d_with_indices",
            "select_pool2d_gather",
            "avg_pool2d",
            "adaptive_avg_pool2d",
            "adaptive_max_pool2d",
            "adaptive_max_pool2d_values",
            "adaptive_max_pool2d_gather",
        )
    },
}


def _register_vmap(name: str, rule: Callable[..., Any]) -> None:
    trailing = defaults(name)

    def complete(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        missing = trailing[len(args) :]
        return rule(info, (*in_dims, *(None,) * len(missing)), *args, *missing)

    torch.library.register_vmap(f"torchconv::{name}", complete, lib=LIBRARY)


for _name, _rule in _RULES.items():
    _register_vmap(_name, _rule)


def _autocast(name: str, device_type: str, key: str, op: Callable[..., Any]) -> None:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(value: Any) -> Any:
            eligible = (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.dtype != torch.float64
                and value.device.type == device_type
            )
            return value.to(dtype) if eligible else value

        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*map(cast, args))

    LIBRARY.impl(name, kernel, key)


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _name in ("conv2d", "conv2d_with_preactivation"):
        _autocast(_name, _device_type, _key, getattr(_ops, _name))
