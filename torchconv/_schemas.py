"""The operators ``torch.ops.torchconv.*``: schemas, and a fallback that loads the kernels.

Defining them in Python lets ``import torchconv`` register everything that torch.compile, autograd,
vmap and autocast need without compiling or loading a library. The first real call finds no CPU
kernel, lands in the fallback, which loads (or JIT-builds) the library, and is made again; from then
on the CPU kernels take precedence over the fallback at no cost.

Every tensor is 4D, N x C x H x W in any memory format. Convolution's padding is
(left, right, top, bottom), as in ``torch.nn.functional.pad``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from torchconv import _load

LIBRARY = torch.library.Library("torchconv", "DEF")

_CONV = (
    "SymInt[2] stride=1, SymInt[4] padding=0, SymInt[2] dilation=1, SymInt groups=1, "
    'str activation="none", bool flip_kernel=False'
)
_RESIDUAL = "Tensor? residual=None"  # as the output, and added before the activation
_CONV_INPUTS = f"Tensor input, Tensor weight, Tensor? bias=None, {_CONV}, {_RESIDUAL}"
_CONV_BACKWARD = (
    "Tensor grad_output, Tensor input, Tensor weight, Tensor? saved, SymInt[2] stride, "
    "SymInt[4] padding, SymInt[2] dilation, SymInt groups, str activation, bool flip_kernel, "
    "bool[3] output_mask"
)
_SELECT = (
    "Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding=0, "
    "SymInt[2] dilation=1, bool ceil_mode=False"
)
_WINDOW = "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
_AVERAGE = "bool ceil_mode, bool count_include_pad, SymInt? divisor_override"
_NORM = "Tensor input, Tensor? weight, Tensor? bias, Tensor? residual"
_NORM_END = "float eps, str activation"

SCHEMAS = (
    f"conv2d({_CONV_INPUTS}) -> Tensor",
    # Lines of text about what conv2d and its backward will run (torchconv/_explain.py)
    "explain_conv2d(Tensor input, Tensor weight, int[2] stride, int[4] padding, int[2] dilation, "
    "int groups, bool flip_kernel) -> str",
    # y and the pre-activation z, for activations whose derivative needs z
    f"conv2d_with_preactivation({_CONV_INPUTS}) -> (Tensor, Tensor)",
    # dx, dw, db; one that output_mask leaves out has no elements
    f"conv2d_backward({_CONV_BACKWARD}) -> (Tensor, Tensor, Tensor)",
    f"max_pool2d({_SELECT}) -> Tensor",
    f"min_pool2d({_SELECT}) -> Tensor",
    # the selected element's position r*S + s in its window: uint8, uint16 or int32
    f"max_pool2d_with_offsets({_SELECT}) -> (Tensor, Tensor)",
    f"min_pool2d_with_offsets({_SELECT}) -> (Tensor, Tensor)",
    # its int64 index h*W + w in the image, -1 where a window has no valid element
    f"max_pool2d_with_indices({_SELECT}) -> (Tensor, Tensor)",
    f"min_pool2d_with_indices({_SELECT}) -> (Tensor, Tensor)",
    # selected: offsets or indices, as one of the four above returned them
    f"select_pool2d_backward(Tensor grad_output, Tensor selected, SymInt[] input_size, {_WINDOW}, "
    "bool channels_last) -> Tensor",
    f"select_pool2d_gather(Tensor input, Tensor selected, {_WINDOW}) -> Tensor",
    "avg_pool2d(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding=0, "
    "bool ceil_mode=False, bool count_include_pad=True, SymInt? divisor_override=None) -> Tensor",
    "avg_pool2d_backward(Tensor grad_output, SymInt[] input_size, SymInt[2] kernel_size, "
    f"SymInt[2] stride, SymInt[2] padding, {_AVERAGE}, bool channels_last) -> Tensor",
    "adaptive_avg_pool2d(Tensor input, SymInt[2] output_size) -> Tensor",
    "adaptive_avg_pool2d_backward(Tensor grad_output, SymInt[] input_size, bool channels_last) "
    "-> Tensor",
    # y and its int64 indices h*W + w in the image
    "adaptive_max_pool2d(Tensor input, SymInt[2] output_size) -> (Tensor, Tensor)",
    "adaptive_max_pool2d_values(Tensor input, SymInt[2] output_size) -> Tensor",
    "adaptive_max_pool2d_backward(Tensor grad_output, Tensor indices, SymInt[] input_size, "
    "bool channels_last) -> Tensor",
    "adaptive_max_pool2d_gather(Tensor input, Tensor indices) -> Tensor",
    # act(norm(input) + residual), and float64 mean and (var + eps)^-1/2 of each channel; activation
    # is none, relu or relu6, or without a residual silu or hardswish. On CPUs only
    f"batch_norm_training({_NORM}, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    f"float momentum, {_NORM_END}) -> (Tensor, Tensor, Tensor)",
    f"batch_norm_inference({_NORM}, Tensor running_mean, Tensor running_var, {_NORM_END}) "
    "-> Tensor",
    # gradients of input, residual, weight and bias; one that output_mask leaves out has no
    # elements. output: of the forward pass, if that had a residual
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor invstd, bool training, str activation, "
    "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
)
# What has no kernel in the GPU's library.
CPU_ONLY = frozenset(("batch_norm_training", "batch_norm_inference", "batch_norm_backward"))


def overload(name: str) -> OpOverload:
    """torch.ops.torchconv.<name>, whose only overload spares a call the choice of one."""
    op: OpOverload = getattr(torch.ops.torchconv, name).default
    return op


def defaults(name: str) -> list[Any]:
    """Default values by position: the dispatcher drops trailing arguments that equal theirs."""
    arguments = overload(name)._schema.arguments
    return [a.default_value if a.has_default_value() else None for a in arguments]


def _load_for(name: str, tensors: Sequence[Tensor]) -> None:
    """Opens the library that has the operator's kernel for these tensors."""
    devices = {t.device.type for t in tensors}
    for tensor in tensors:
        plain = tensor.layout is torch.strided and not tensor.is_quantized
        served = ("cpu",) if name in CPU_ONLY else ("cpu", "cuda")
        if not plain or tensor.device.type not in served:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout)
            raise NotImplementedError(
                f"torchconv::{name} has no kernel for a {kind} tensor of dtype "
                f"{tensor.dtype} on device {tensor.device}"
            )
    if "cuda" in devices:
        _load.load_cuda()
    else:
        _load.load()


def _fallback(name: str) -> Callable[..., Any]:
    def load_and_call(*args: Any, **kwargs: Any) -> Any:
        _load_for(name, [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
        return getattr(torch.ops.torchconv, name)(*args, **kwargs)

    return load_and_call


for _schema in SCHEMAS:
    _name = LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _fallback(_name), "CompositeExplicitAutograd")
