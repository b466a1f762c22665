"""Layers with the constructors, parameters and state_dicts of torch.nn's, run by torchconv.

All but `MinPool2d` and `LocallyConnected2d`, which have no counterpart in torch.nn, subclass the
torch.nn layer of the same name, so `isinstance` checks, checkpoints and initialisation recipes
written for torch.nn hold. `Conv2d` adds a fused activation, a fused residual (`forward(input,
residual)`), the true convolution (`flip_kernel`), padding by side and strided 'same'. Each forward
is one call into `torchconv.functional`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.common_types import _size_2_t
from torch.nn.modules.pooling import _MaxPoolNd
from torch.nn.modules.utils import _pair

from torchconv._arguments import activation_name, conv_arguments, same_padding
from torchconv._coverage import (
    covers_adaptive_pool,
    covers_avg_pool,
    covers_conv,
    covers_linear,
    covers_select_pool,
)
from torchconv._packed_weights import PackedWeights, drop_packed_weights, only_infers
from torchconv.backends import packed_weights_kept
from torchconv.functional import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    batch_norm,
    conv2d,
    images_of,
    linear,
    locally_connected2d,
    max_pool2d,
    min_pool2d,
    rows_of,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "LazyConv2d",
    "Linear",
    "LocallyConnected2d",
    "MaxPool2d",
    "MinPool2d",
]

_is_compiling = torch.compiler.is_compiling

# torch.fx's symbolic tracing takes only classes of torch.nn itself for leaves. It traces through
# these, and would run into the argument checks of torchconv.functional with a Proxy.
for _name in (
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "conv2d",
    "linear",
    "max_pool2d",
    "min_pool2d",
):
    torch.fx.wrap(_name)


class _KeepsPackedWeights(torch.nn.Module):
    """Forgets packed weights where a layer trains, moves, is copied or pickled."""

    # In eval mode, while autograd needs no graph: the weights as the algorithm reads them.
    _packed_weights: PackedWeights | None = None
    # Promised by `torchconv.fuse(..., freeze=True)`; it goes with copies and pickles.
    _weights_frozen: bool = False

    def _keeps_weights(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> bool:
        if _is_compiling() or not packed_weights_kept():
            return False
        if weight is not self._parameters.get("weight"):
            drop_packed_weights(self)  # computed weights, from now on
            return False
        return only_infers(input, weight, bias, residual) and input.is_cpu  # a GPU packs nothing

    def _own_packed_weights(self) -> PackedWeights:
        packed = self._packed_weights
        if packed is None:
            packed = vars(self)["_packed_weights"] = PackedWeights(self._weights_frozen)
        return packed

    def train(self, mode: bool = True) -> Self:
        if mode:
            drop_packed_weights(self)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        drop_packed_weights(self)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: packed weights are not of it."""
        return {name: value for name, value in vars(self).items() if name != "_packed_weights"}


def freeze_weights(model: torch.nn.Module, frozen: bool) -> None:
    """Says of the layers of `model` whether PyTorch counts all changes of their weights."""
    drop_packed_weights(model)
    for layer in model.modules():
        vars(layer).pop("_weights_frozen", None)
        if frozen and isinstance(layer, _KeepsPackedWeights):
            layer._weights_frozen = True


class Conv2d(_KeepsPackedWeights, torch.nn.Conv2d):
    """torch.nn.Conv2d over (N, C, H, W) or (C, H, W), with these additions.

    Args:
        padding: besides torch.nn's forms, four ints (left, right, top, bottom) as in `F.pad`, and
            'same' with any stride: ceil(n / stride) outputs, the odd row or column at the end.
        activation: None, 'relu', 'relu6', 'sigmoid', 'tanh', 'silu', 'hardswish' or 'gelu', applied
            in the same pass over the output.
        flip_kernel: True for the true convolution, which reads the kernel rotated by 180 degrees.
    """

    # Class-wide, so that a layer which `convert` swapped, or an older pickle, has them too.
    activation: str | None = None
    flip_kernel: bool = False
    # True on a layer that `convert` swapped: `restore` may swap it back, and input for which
    # torchconv has no kernel goes to torch.nn's own forward, because the model worked before.
    _converted: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t | tuple[int, int, int, int] = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        flip_kernel: bool = False,
    ) -> None:
        activation_name(activation)
        # torch.nn's constructor refuses 'same' with a stride; how much to pad then depends on the
        # input, so nothing that it prepares for 'same' would serve.
        same = isinstance(padding, str) and padding == "same"
        strided_same = same and any(s != 1 for s in _pair(stride))
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            "valid" if strided_same else padding,  # type: ignore[arg-type]
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        if strided_same:
            self.padding = "same"
        elif not isinstance(self.padding, str) and len(self.padding) == 4:
            # What F.pad gets when padding_mode is not 'zeros'; torch.nn expects (h, w) here.
            self._reversed_padding_repeated_twice = list(self.padding)
        self.activation = activation
        self.flip_kernel = flip_kernel

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation}"
        if self.flip_kernel:
            text += ", flip_kernel=True"
        return text

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: as for `torchconv.functional.conv2d`, added before the activation."""
        # On small images every detour counts, also the one by which Module finds self.weight.
        packed, parameters = self._packed_weights, self._parameters
        weight: Any = parameters["weight"] if "weight" in parameters else self.weight
        bias: Any = parameters["bias"] if "bias" in parameters else self.bias
        if (
            packed is not None
            and not _is_compiling()
            and packed_weights_kept()
            and "_conv_forward" not in self.__dict__  # somebody's own
        ):
            values = packed.values_of(self._settings(), input, weight, bias)
            if (
                values is not None
                and only_infers(input, weight, bias, residual)
                and (
                    residual is None
                    or (
                        residual.dim() == 4
                        and residual.dtype == input.dtype
                        and residual.device == input.device
                    )
                )
            ):
                return packed.convolve(input, weight, bias, residual, values)
        if residual is None:
            return self._conv_forward(input, weight, bias)
        return self._conv_forward(input, weight, bias, residual)

    def _settings(self) -> tuple[Any, ...]:
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return (*settings, self.activation, self.flip_kernel, self.padding_mode)

    def _conv_forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if (
            self._converted
            and residual is None
            and self.activation is None  # which torch.nn's forward does not know
            and not self.flip_kernel
            and not (isinstance(input, Proxy) or covers_conv(input, weight, bias))
        ):
            return super()._conv_forward(input, weight, bias)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._amounts(input), mode=self.padding_mode)
            padding = 0
        if not self.training and self._keeps_weights(input, weight, bias, residual):
            values = conv_arguments(
                *(input, weight, bias, self.stride, padding, self.dilation, self.groups),
                *(self.activation, self.flip_kernel, residual),
            )
            packed = self._own_packed_weights()
            if self.padding_mode == "zeros" and self._is_plain() and not isinstance(padding, str):
                packed.remember(self._settings(), bias, values)
            return packed.convolve(input, weight, bias, residual, values)
        return conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            flip_kernel=self.flip_kernel,
            residual=residual,
        )

    def _is_plain(self) -> bool:
        """Whether nobody has put a step of his own between `forward` and here."""
        return getattr(self._conv_forward, "__func__", None) is Conv2d._conv_forward

    def _amounts(self, input: Tensor) -> list[int]:
        """(left, right, top, bottom) for a padding mode that F.pad has to carry out."""
        if self.padding == "same" and any(s != 1 for s in self.stride):
            size = input.shape[-2:]
            return list(same_padding(size, self.kernel_size, self.stride, self.dilation))
        return self._reversed_padding_repeated_twice


class LazyConv2d(torch.nn.LazyConv2d, Conv2d):  # type: ignore[misc]
    """`Conv2d` that takes in_channels from its first input, as torch.nn.LazyConv2d does."""

    cls_to_become = Conv2d

    def __init__(
        self,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t | tuple[int, int, int, int] = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        flip_kernel: bool = False,
    ) -> None:
        activation_name(activation)
        super().__init__(
            out_channels,
            kernel_size,
            stride,
            padding,  # type: ignore[arg-type]
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.activation = activation
        self.flip_kernel = flip_kernel

    def initialize_parameters(self, input: Tensor, residual: Tensor | None = None) -> None:
        super().initialize_parameters(input)


class Linear(_KeepsPackedWeights, torch.nn.Linear):
    """torch.nn.Linear; over images with channels last, N x H x W x C, it is the 1x1 convolution
    that it is there, and so it is over few rows N x C (see `torchconv.functional.linear`). Other
    input is PyTorch's.

    Args:
        activation: as for `Conv2d`.
    """

    activation: str | None = None
    _converted: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        activation_name(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: as for `torchconv.functional.linear`, added before the activation."""
        weight, bias = self.weight, self.bias
        if (
            not self.training
            and covers_linear(input, weight, bias, residual)
            and self._keeps_weights(input, weight, bias, residual)
        ):
            packed = self._own_packed_weights()
            images, kernel = images_of(input), packed.kernel_of(weight)
            added = None if residual is None else images_of(residual)
            values = conv_arguments(images, kernel, bias, 1, 0, 1, 1, self.activation, False, added)
            return rows_of(packed.convolve(images, kernel, bias, added, values))
        return linear(input, weight, bias, activation=self.activation, residual=residual)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, whose passes take along a sum and an activation behind it.

    Args:
        activation: as for `torchconv.functional.batch_norm`.
    """

    activation: str | None = None
    _converted: bool = False

    def __init__(
        self, num_features: int, *args: Any, activation: str | None = None, **kwargs: Any
    ) -> None:
        activation_name(activation)
        super().__init__(num_features, *args, **kwargs)
        self.activation = activation

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: as for `torchconv.functional.batch_norm`, added before the activation."""
        if isinstance(input, Proxy):  # one node, as torch.nn's is: it also counts batches
            tracer: Any = input.tracer
            arguments = (input,) if residual is None else (input, residual)
            recorded: Tensor = tracer.create_proxy(
                "call_module", tracer.path_of_module(self), arguments, {}
            )
            return recorded
        self._check_input_dim(input)
        # As in Conv2d: every detour by Module.__getattr__ counts.
        buffers, parameters = self._buffers, self._parameters
        running_mean, running_var, batches = (
            buffers[name] if name in buffers else getattr(self, name)
            for name in ("running_mean", "running_var", "num_batches_tracked")
        )
        weight, bias = (
            parameters[name] if name in parameters else getattr(self, name)
            for name in ("weight", "bias")
        )
        training, tracks, momentum = self.training, self.track_running_stats, self.momentum
        by_batch = training or (running_mean is None and running_var is None)
        if training and tracks and batches is not None:
            batches.add_(1)
            if momentum is None:
                momentum = 1.0 / float(batches)
        if training and not tracks:
            running_mean = running_var = None
        return batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            by_batch,
            0.0 if momentum is None else momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
        )


class MaxPool2d(torch.nn.MaxPool2d):
    """torch.nn.MaxPool2d; its backward keeps an offset into the window, not an int64 index."""

    _converted: bool = False

    def forward(self, input: Tensor) -> Any:
        if self._converted and not (isinstance(input, Proxy) or covers_select_pool(input)):
            return super().forward(input)
        return max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


# torch.nn.MaxPool2d itself would be the wrong base: code that finds one expects the maximum.
class MinPool2d(_MaxPoolNd):
    """The minimum of each window, with the arguments of `MaxPool2d`; padding counts as +inf."""

    def forward(self, input: Tensor) -> Any:
        return min_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """torch.nn.AvgPool2d, with all of its arguments."""

    _converted: bool = False

    def forward(self, input: Tensor) -> Tensor:
        if self._converted and not (isinstance(input, Proxy) or covers_avg_pool(input)):
            return super().forward(input)
        return avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d; with output_size=1 global average pooling."""

    _converted: bool = False

    def forward(self, input: Tensor) -> Tensor:
        if self._converted and not (isinstance(input, Proxy) or covers_adaptive_pool(input)):
            return super().forward(input)
        return adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """torch.nn.AdaptiveMaxPool2d; with output_size=1 global max pooling."""

    _converted: bool = False

    def forward(self, input: Tensor) -> Any:
        if self._converted and not (isinstance(input, Proxy) or covers_adaptive_pool(input)):
            return super().forward(input)
        return adaptive_max_pool2d(input, self.output_size, return_indices=self.return_indices)


class LocallyConnected2d(torch.nn.Module):
    """Convolution without weight sharing (lecture D): every output position has its own kernel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: as for `Conv2d`.
        input_size: (H, W) of the images, which fixes the number P x Q of positions.
        bias: whether to add a bias, K x P x Q.

    Attributes:
        weight: P x Q x K x C x R x S.

    Raises:
        RuntimeError: if the kernel does not fit in the padded image.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: _size_2_t,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t | tuple[int, int, int, int] = 0,
        dilation: _size_2_t = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.input_size, self.kernel_size = _pair(input_size), _pair(kernel_size)
        self.stride, self.padding, self.dilation = _pair(stride), padding, _pair(dilation)
        sample = torch.empty(1, in_channels, *self.input_size, device="meta")
        kernel = torch.empty(out_channels, in_channels, *self.kernel_size, device="meta")
        like = conv2d(sample, kernel, None, self.stride, padding, self.dilation)
        self.output_size = tuple(like.shape[2:])
        shape = (*self.output_size, out_channels, in_channels, *self.kernel_size)
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            shape = (out_channels, *self.output_size)
            self.bias = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(C*R*S) of zero, as torch.nn.Conv2d starts each of its kernels."""
        bound = self.weight[0, 0, 0].numel() ** -0.5 if self.weight.numel() else 0.0
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return locally_connected2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, bias={self.bias is not None}"
        )
