"""Bad input: what PyTorch refuses is refused with the same exception class and the actual values.

Every call of the first part runs through torch.nn.functional and through torchconv.functional. The
rest is what PyTorch has no counterpart for, what it gets wrong, and what must never crash.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_F

import torchconv.functional as F

X, W, B = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3), torch.randn(6)
HUGE = 2**62

# name: arguments of conv2d, keyword arguments, what the message must say
CONV_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "stride 0": ((X, W), {"stride": 0}, ("stride", "0")),
    "stride -1": ((X, W), {"stride": -1}, ("stride", "-1")),
    "stride (1, 0)": ((X, W), {"stride": (1, 0)}, ("stride", "[1, 0]")),
    "stride (-3, 1)": ((X, W), {"stride": (-3, 1)}, ("stride", "[-3, 1]")),
    "stride 0, same": ((X, W), {"stride": 0, "padding": "same"}, ("stride", "0")),
    "dilation 0": ((X, W), {"dilation": 0}, ("dilation", "0")),
    "dilation (1, -2)": ((X, W), {"dilation": (1, -2)}, ("dilation", "[1, -2]")),
    "dilation 0, same": ((X, W), {"dilation": 0, "padding": "same"}, ("dilation", "0")),
    "padding -1": ((X, W), {"padding": -1}, ("negative padding", "-1")),
    "padding (0, -1)": ((X, W), {"padding": (0, -1)}, ("negative padding", "[0, -1]")),
    "groups 0": ((X, W), {"groups": 0}, ("groups", "0")),
    "groups -1": ((X, W), {"groups": -1}, ("groups", "-1")),
    "groups 0, same": ((X, W), {"groups": 0, "padding": "same"}, ("groups", "0")),
    "groups do not divide K": (
        (X, torch.randn(5, 2, 3, 3)),
        {"groups": 2},
        ("groups=2", "[5, 2, 3, 3]", "divisible by 2"),
    ),
    "more groups than filters": (
        (X, torch.randn(2, 1, 3, 3)),
        {"groups": 4},
        ("groups=4", "[2, 1, 3, 3]", "at least 4"),
    ),
    "channels": (
        (X, torch.randn(6, 3, 3, 3)),
        {},
        ("groups=1", "[6, 3, 3, 3]", "[2, 4, 8, 8]", "3 channels", "4 channels"),
    ),
    "channels with groups": ((X, W), {"groups": 3}, ("groups=3", "12 channels", "4 channels")),
    "channels of an empty batch": ((torch.randn(0, 3, 8, 8), W), {}, ("4 channels", "3 channels")),
    "channels unbatched": ((torch.randn(3, 8, 8), W), {}, ("4 channels", "3 channels")),
    "bias size": ((X, W, torch.randn(5)), {}, ("[6, 4, 3, 3]", "6 elements", "[5]")),
    "bias 2d": ((X, W, torch.randn(6, 1)), {}, ("1-dimensional", "[6, 1]")),
    "bias scalar": ((X, W, torch.tensor(1.0)), {}, ("1-dimensional", "[]")),
    "kernel too large": ((X, torch.randn(6, 4, 9, 9)), {}, ("(8 x 8)", "(9 x 9)")),
    "kernel too large with padding": (
        (X, torch.randn(6, 4, 11, 3)),
        {"padding": 1},
        ("(10 x 10)", "(11 x 3)"),
    ),
    "kernel too large by dilation": ((X, W), {"dilation": 4}, ("(8 x 8)", "(9 x 9)")),
    "kernel too large, empty batch": ((torch.randn(0, 4, 2, 8), W), {}, ("(2 x 8)", "(3 x 3)")),
    "kernel too large by 2**40": ((X, W), {"dilation": 2**40}, ("(8 x 8)", str(2**41 + 1))),
    "no filters": ((X, torch.randn(0, 4, 3, 3)), {}, ("[0, 4, 3, 3]",)),
    "empty kernel": ((X, torch.randn(6, 4, 0, 3)), {}, ("[6, 4, 0, 3]",)),
    "empty image": ((torch.randn(2, 4, 0, 8), W), {"padding": 2}, ("[2, 4, 0, 8]",)),
    "float32 and float64": ((X, W.double()), {}, ("float", "double")),
    "float32 and bfloat16": ((X, W.bfloat16()), {}, ("float", "bfloat16")),
    "float64 bias": ((X, W, B.double()), {}, ("float", "double", "bias")),
    "int64 and float32": ((X.long(), W), {}, ("long", "float")),
    "bool": ((X.bool(), W.bool()), {}, ("bool",)),
    "float8": ((X.to(torch.float8_e4m3fn), W.to(torch.float8_e4m3fn)), {}, ("float8_e4m3fn",)),
    "rank 0": ((torch.tensor(1.0), W), {}, ("conv2d", "[]")),
    "rank 1": ((torch.randn(4), W), {}, ("conv2d", "[4]")),
    "rank 2": ((torch.randn(4, 5), W), {}, ("conv2d", "[4, 5]")),
    "rank 5": ((torch.randn(1, 2, 4, 8, 8), W), {}, ("conv2d", "[1, 2, 4, 8, 8]")),
    "weight of rank 2": ((X, torch.randn(6, 4)), {}, ("weight", "[6, 4]")),
    "weight of rank 3": ((X, torch.randn(6, 4, 3)), {}, ("weight", "[6, 4, 3]")),
    "weight of rank 5": ((X, torch.randn(6, 4, 3, 3, 3)), {}, ("weight", "[6, 4, 3, 3, 3]")),
    "1D": ((torch.randn(1, 4, 8), torch.randn(6, 4, 3)), {}, ("weight", "[6, 4, 3]")),
    "stride of 3": ((X, W), {"stride": (1, 1, 1)}, ("stride", "[1, 1, 1]")),
    "stride of none": ((X, W), {"stride": ()}, ("stride", "[]")),
    "padding of 3": ((X, W), {"padding": (1, 2, 1)}, ("padding", "[1, 2, 1]")),
    "padding of none": ((X, W), {"padding": ()}, ("padding", "[]")),
    "dilation of 3": ((X, W), {"dilation": (1, 2, 3)}, ("dilation", "[1, 2, 3]")),
    "padding word": ((X, W), {"padding": "full"}, ("Invalid padding string", "full")),
    "padding SAME": ((X, W), {"padding": "SAME"}, ("Invalid padding string", "SAME")),
    "list input": ((X.tolist(), W), {}, ("list",)),
    "None input": ((None, W), {}, ("None",)),
    "None weight": ((X, None), {}, ("None",)),
    "list bias": ((X, W, [1.0] * 6), {}, ("list",)),
    "str stride": ((X, W), {"stride": "2"}, ("stride", "str")),
    "float stride": ((X, W), {"stride": 2.0}, ("stride", "float")),
    "float in stride": ((X, W), {"stride": (1, 2.0)}, ("stride", "float")),
    "None stride": ((X, W), {"stride": None}, ("stride", "None")),
    "bool stride": ((X, W), {"stride": True}, ("stride", "bool")),
    "float padding": ((X, W), {"padding": 1.5}, ("padding", "float")),
    "None padding": ((X, W), {"padding": None}, ("padding", "None")),
    "str dilation": ((X, W), {"dilation": "1"}, ("dilation", "str")),
    "float groups": ((X, W), {"groups": 1.0}, ("groups", "float")),
    "str groups": ((X, W), {"groups": "a"}, ("groups", "str")),
    "bool groups": ((X, W), {"groups": True}, ("groups", "bool")),
    "unknown keyword": ((X, W), {"foo": 1}, ("foo",)),
    "too many arguments": ((X, W, None, 1, 0, 1, 1, 1), {}, ()),
    "too few arguments": ((X,), {}, ("weight",)),
    "stride beyond 64 bits": ((X, W), {"stride": 2**63}, ()),
    "dilation beyond 64 bits": ((X, W), {"dilation": -(2**70)}, ()),
    "sparse input": ((X.to_sparse(), W), {}, ("parse",)),
    "sparse weight": ((X, W.to_sparse()), {}, ("parse",)),
}

SELECT_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "kernel 0": ((X, 0), {}, ("0",)),
    "kernel -1": ((X, -1), {}, ("kernel size", "-1")),
    "kernel (2, 0)": ((X, (2, 0)), {"stride": 1}, ("kernel size", "0")),
    "stride 0": ((X, 2, 0), {}, ("stride", "0")),
    "stride -1": ((X, 2, -1), {}, ("stride", "-1")),
    "dilation 0": ((X, 2), {"dilation": 0}, ("dilation", "0")),
    "dilation -3": ((X, 2), {"dilation": (1, -3)}, ("dilation", "-3")),
    "padding -1": ((X, 2), {"padding": -1}, ("pad", "-1")),
    "padding beyond half": ((X, 2), {"padding": 2}, ("at most half", "pad=2", "kernel_size=2")),
    "padding beyond half of one side": (
        (X, (3, 2)),
        {"padding": (1, 2)},
        ("at most half", "pad=2", "kernel_size=2"),
    ),
    "padding beyond half of the effective kernel": (
        (X, 3),
        {"padding": 3, "dilation": 2},
        ("at most half", "pad=3", "kernel_size=3", "dilation=2"),
    ),
    "kernel too large": ((X, 9), {}, ("(4x8x8)", "too small")),
    "kernel too large by dilation": ((X, 5), {"dilation": 2}, ("(4x8x8)", "too small")),
    "rank 0": ((torch.tensor(1.0), 2), {}, ("[]",)),
    "rank 1": ((X[0, 0, 0], 2), {}, ("[8]",)),
    "rank 2": ((X[0, 0], 2), {}, ("[8, 8]",)),
    "rank 5": ((X[None], 2), {}, ("[1, 2, 4, 8, 8]",)),
    "complex": ((X.to(torch.complex64), 2), {}, ("complex64",)),
    "float8": ((X.to(torch.float8_e4m3fn), 2), {}, ("float8_e4m3fn",)),
    "sparse": ((X.to_sparse(), 2), {}, ("parse",)),
    "list": (([1.0], 2), {}, ("list",)),
    "None": ((None, 2), {}, ("None",)),
    "str kernel": ((X, "2"), {}, ("kernel_size", "str")),
    "float kernel": ((X, 2.0), {}, ("kernel_size", "float")),
    "bool kernel": ((X, True), {}, ("kernel_size", "bool")),
    "None kernel": ((X, None), {}, ("kernel_size", "None")),
    "no kernel": ((X,), {}, ("kernel_size",)),
    "kernel of 3": ((X, (2, 2, 2)), {}, ("kernel_size", "[2, 2, 2]")),
    "kernel of none": ((X, ()), {}, ("kernel_size", "[]")),
    "stride of 3": ((X, 2, (1, 2, 1)), {}, ("stride", "[1, 2, 1]")),
    "padding of 3": ((X, 2), {"padding": (1, 1, 1)}, ("padding", "[1, 1, 1]")),
    "padding of 4": ((X, 3), {"padding": (1, 1, 1, 1)}, ("padding", "[1, 1, 1, 1]")),
    "dilation of 3": ((X, 2), {"dilation": (1, 2, 1)}, ("dilation", "[1, 2, 1]")),
    "str padding": ((X, 2), {"padding": "same"}, ("padding", "str")),
    "str ceil_mode": ((X, 2), {"ceil_mode": "a"}, ("ceil_mode", "str")),
    "int ceil_mode": ((X, 2), {"ceil_mode": 1}, ("ceil_mode", "int")),
    "unknown keyword": ((X, 2), {"foo": 1}, ("foo",)),
    "no channels": ((torch.randn(2, 0, 8, 8), 2), {}, ("[2, 0, 8, 8]",)),
    "no rows": ((torch.randn(2, 4, 0, 8), 2), {}, ("[2, 4, 0, 8]",)),
    "no rows, no images": ((torch.randn(0, 4, 0, 8), 2), {}, ("[0, 4, 0, 8]",)),
    "no columns unbatched": ((torch.randn(4, 8, 0), 1), {}, ("4, 8, 0]",)),
    "kernel 2**40": ((X, 2**40), {}, (str(2**40),)),
    "stride 2**62": ((X, 2, HUGE), {}, (str(HUGE),)),
    "dilation 2**40": ((X, 2), {"dilation": 2**40}, (str(2**40),)),
    "kernel 2**62, padding 2**61": ((X, HUGE), {"padding": HUGE // 2}, (str(HUGE),)),
    "kernel beyond 64 bits": ((X, 2**63), {}, ()),
}

AVERAGE_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    **{
        name: call
        for name, call in SELECT_CALLS.items()
        if "dilation" not in call[1] and name not in ("rank 0", "rank 5", "bool kernel")
    },
    "rank 5": ((X[None], 2), {}, ("[1, 2, 4, 8, 8]",)),
    "bool": ((X.bool(), 2), {}, ("bool",)),
    "int32": ((X.int(), 2), {}, ("int32",)),
    "divisor 0": ((X, 2), {"divisor_override": 0}, ("divisor", "0")),
    "float divisor": ((X, 2), {"divisor_override": 2.5}, ("divisor_override", "float")),
    "str divisor": ((X, 2), {"divisor_override": "a"}, ("divisor_override", "str")),
    "divisor beyond 64 bits": ((X, 2), {"divisor_override": 2**64}, ()),
    "int count_include_pad": ((X, 2), {"count_include_pad": 1}, ("count_include_pad", "int")),
    "a dilation": ((X, 2), {"dilation": 1}, ("dilation",)),
}


def refusal(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> BaseException:
    """The exception a call ends with; failing if it ends well."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    pytest.fail(f"{function.__module__}.{function.__name__} accepts it")


def check_refused_alike(
    name: str, theirs: Callable[..., Any], args: Any, kwargs: dict[str, Any], says: tuple[str, ...]
) -> None:
    expected = refusal(theirs, args, kwargs)
    error = refusal(getattr(F, name), args, kwargs)
    assert isinstance(error, type(expected)), f"{error!r} where PyTorch raises {expected!r}"
    message = str(error).lower()
    for word in says:
        assert word.lower() in message, f"{word!r} is missing in: {error}"


@pytest.mark.parametrize("call", CONV_CALLS)
def test_conv2d_refuses_what_pytorch_refuses(call: str) -> None:
    check_refused_alike("conv2d", torch_F.conv2d, *CONV_CALLS[call])


@pytest.mark.parametrize("call", SELECT_CALLS)
@pytest.mark.parametrize("op", ["max_pool2d", "min_pool2d"])
def test_select_pool2d_refuses_what_pytorch_refuses(op: str, call: str) -> None:
    args, kwargs, says = SELECT_CALLS[call]
    check_refused_alike(op, torch_F.max_pool2d, args, kwargs, says)
    if "unknown" not in call:
        with_indices = {**kwargs, "return_indices": True}
        check_refused_alike(op, torch_F.max_pool2d, args, with_indices, says)


@pytest.mark.parametrize("call", AVERAGE_CALLS)
def test_avg_pool2d_refuses_what_pytorch_refuses(call: str) -> None:
    check_refused_alike("avg_pool2d", torch_F.avg_pool2d, *AVERAGE_CALLS[call])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("call", ["stride 0", "channels", "bias size", "kernel too large"])
def test_conv2d_refuses_in_every_mode(call: str, requires_grad: bool) -> None:
    """Under autograd and under torch.compile's fake tensors too."""
    args, kwargs, _ = CONV_CALLS[call]
    leaves = [t.detach().clone().requires_grad_(requires_grad) for t in args]
    with pytest.raises(RuntimeError):
        F.conv2d(*leaves, **kwargs, activation="relu")
    with pytest.raises(RuntimeError):
        F.conv2d(*(t.detach().to("meta") for t in args), **kwargs)


@pytest.mark.parametrize(
    "call", ["kernel -1", "stride 0", "padding beyond half", "kernel too large"]
)
@pytest.mark.parametrize("op", [F.max_pool2d, F.min_pool2d, F.avg_pool2d])
def test_pooling_refuses_in_every_mode(op: Callable[..., Any], call: str) -> None:
    args, kwargs, _ = SELECT_CALLS[call]
    with pytest.raises(RuntimeError):
        op(args[0].clone().requires_grad_(), *args[1:], **kwargs)
    with pytest.raises(RuntimeError):
        op(args[0].to("meta"), *args[1:], **kwargs)


@pytest.mark.parametrize("call", ["kernel too large by 2**40", "channels", "stride 0"])
def test_compile_reports_the_error(call: str) -> None:
    torch._dynamo.reset()
    args, kwargs, _ = CONV_CALLS[call]
    with pytest.raises((RuntimeError, torch._dynamo.exc.TorchDynamoException)):
        torch.compile(lambda *a: F.conv2d(*a, **kwargs), backend="aot_eager", fullgraph=True)(*args)


# --- what PyTorch has no counterpart for ---------------------------------------------------------


@pytest.mark.parametrize("activation", ["swish", "ReLU", "", "none", 3, b"relu", ["relu"]])
def test_unknown_activation(activation: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="activation") as caught:
        F.conv2d(X, W, activation=activation)
    if isinstance(activation, str):
        assert caught.type is ValueError
        assert repr(activation) in str(caught.value) and "hardswish" in str(caught.value)


def test_activation_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        F.conv2d(X, W, None, 1, 0, 1, 1, "relu")  # type: ignore[misc]


@pytest.mark.parametrize(
    "padding",
    [(-4, -4, 0, 0), (0, 0, -6, 0), (-9, 9, 0, 0), (0, 0, 12, -9), (-(2**62), 0, 0, 0)],
    ids=str,
)
def test_cropped_to_nothing(padding: tuple[int, int, int, int]) -> None:
    """Refused as by F.pad followed by F.conv2d, with the amounts."""
    with pytest.raises(RuntimeError):
        torch_F.conv2d(torch_F.pad(X, padding), W)
    with pytest.raises(RuntimeError, match=r"\d"):
        F.conv2d(X, W, padding=padding)


def test_locally_connected_refuses() -> None:
    weight = torch.randn(6, 6, 5, 4, 3, 3)
    assert F.locally_connected2d(X, weight).shape == (2, 5, 6, 6)
    for bad in (weight[:5], weight[:, :, :, :3], weight[0]):
        with pytest.raises(RuntimeError, match=str(list(bad.shape)).replace("[", r"\[")):
            F.locally_connected2d(X, bad)
    with pytest.raises(RuntimeError):
        F.locally_connected2d(X, weight, stride=0)
    with pytest.raises(RuntimeError):
        F.locally_connected2d(X, weight.double())
    with pytest.raises(TypeError):
        F.locally_connected2d(X, None)  # type: ignore[arg-type]


# --- sizes that overflow -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": HUGE},
        {"padding": 2**63 - 1},
        {"padding": (0, HUGE)},
        {"padding": (HUGE, HUGE, 0, 0)},
        {"padding": (2**63 - 1, 2**63 - 1, 1, 1)},
        {"padding": 2**40},
        {"padding": 2**31},
        {"padding": (HUGE, 0, 0, 0), "stride": (1, 3)},
        {"dilation": HUGE},
        {"dilation": 2**63 - 1},
        {"dilation": HUGE, "padding": HUGE},
        {"dilation": HUGE, "padding": "same"},
        {"dilation": 2**63 - 1, "padding": "same", "stride": 2},
        {"stride": HUGE, "padding": 2**63 - 1},
        {"groups": HUGE},
        {"groups": 2**63 - 1},
    ],
    ids=str,
)
def test_conv2d_sizes_that_overflow(kwargs: dict[str, Any]) -> None:
    """Products and sums past 2^63, and outputs that no memory holds."""
    with pytest.raises(RuntimeError):
        F.conv2d(X, W, **kwargs)
    with pytest.raises(RuntimeError):
        F.conv2d(X.clone().requires_grad_(), W, **kwargs)


def test_conv2d_huge_but_right() -> None:
    """Sizes near 2^62 whose output is small: one window, in the padding before the image."""
    out = F.conv2d(X, W, B, stride=HUGE, padding=(2**61, 0, 0, 0))
    assert torch.equal(out[:, :, 0, 0], B.expand(2, 6))
    last = F.conv2d(X, W, B, stride=HUGE, padding=(HUGE, 0, HUGE, 0))
    expected = torch_F.conv2d(X.double(), W.double(), B.double())[:, :, 0, 0]
    torch.testing.assert_close(last[:, :, 1, 1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 20])
@pytest.mark.parametrize("dilated", [False, True])
def test_conv2d_strides_too_large_to_multiply(
    dilated: bool, groups: int, memory_format: torch.memory_format
) -> None:
    """3x3 outputs. Undilated, the middle one sees the image from one pixel outside its corner on;
    dilated by the stride, each sees the pixel in that corner through another tap."""
    x = torch.randn(2, 20, 5, 6).contiguous(memory_format=memory_format).requires_grad_()
    w = torch.randn(20, 20 // groups, 3, 3, requires_grad=True)
    stride, dilation = 2**60 + 1, 2**60 + 1 if dilated else 1
    sides = (2 * stride, 2 * stride) * 2 if dilated else (stride + 1, stride) * 2
    y = F.conv2d(x, w, stride=stride, padding=sides, dilation=dilation, groups=groups)
    if dilated:
        expected = torch_F.conv2d(x[:, :, :1, :1], w, padding=2, groups=groups)
    else:
        window = torch_F.pad(x[:, :, :2, :2], (1, 0, 1, 0))
        expected = torch_F.pad(torch_F.conv2d(window, w, groups=groups), (1, 1, 1, 1))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, w), dy)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, (x, w), dy), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("op", [F.max_pool2d, F.min_pool2d])
@pytest.mark.parametrize("size", [2**31, 2**61, HUGE, 2**63 - 1])
def test_pooling_sizes_that_overflow(op: Callable[..., Any], size: int) -> None:
    for kwargs in (
        {"kernel_size": size},
        {"kernel_size": size, "padding": size // 2},
        {"kernel_size": 2, "stride": size},
        {"kernel_size": 2, "padding": size},
        {"kernel_size": 2, "dilation": size, "padding": 1},
        {"kernel_size": (1, size), "stride": size, "ceil_mode": True},
    ):
        with pytest.raises(RuntimeError):
            op(X, **kwargs)


# --- tensors of other kinds ----------------------------------------------------------------------


def quantized(t: Tensor) -> Tensor:
    with warnings.catch_warnings():  # deprecated, and still a tensor that somebody may pass
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)


UNUSUAL: dict[str, Callable[[Tensor], Any]] = {
    "sparse_coo": Tensor.to_sparse,
    "sparse_csr": lambda t: t.flatten(1).to_sparse_csr(),
    "mkldnn": Tensor.to_mkldnn,
    "quantized": quantized,
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "float8": lambda t: t.to(torch.float8_e5m2),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[1]]),
    "numpy": Tensor.numpy,
    "string": lambda t: "tensor",
    "scalar": lambda t: 3.0,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_other_kinds_of_tensors(kind: str) -> None:
    """An error that says so, from every operator and in every place. Never a crash."""
    refused = (RuntimeError, TypeError, IndexError)
    odd = UNUSUAL[kind](X)
    with pytest.raises(refused):
        F.conv2d(odd, W)
    with pytest.raises(refused):
        F.conv2d(X, UNUSUAL[kind](torch.randn(6, 4, 3, 3)))
    with pytest.raises(refused):
        F.conv2d(X, W, UNUSUAL[kind](torch.randn(6, 4)[:, :]))
    for op in (F.max_pool2d, F.min_pool2d, F.avg_pool2d):
        with pytest.raises(refused):
            op(odd, 2)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_device_mixes(place: int) -> None:
    """meta beside cpu: an error, or the meta result that PyTorch gives."""
    tensors = [X, W, B]
    tensors[place] = tensors[place].to("meta")
    try:
        out = F.conv2d(*tensors)
    except RuntimeError as error:
        assert "meta" in str(error)
    else:
        assert out.is_meta and out.shape == torch_F.conv2d(X, W, B).shape


def test_uint16_and_wider_unsigned_types() -> None:
    """Either right or refused by name."""
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        x = torch.arange(36).view(1, 1, 6, 6).to(dtype)
        try:
            y = F.max_pool2d(x, 2)
        except NotImplementedError as error:
            assert str(dtype) in str(error)
        else:
            assert y.dtype == dtype and torch.equal(y.long(), F.max_pool2d(x.long(), 2))


def test_operators_refuse_unsigned_16_bit_convolution() -> None:
    """functional refuses it before; the operator itself must not return what it did not compute."""
    x, w = (torch.ones(1, 1, n, n, dtype=torch.uint16) for n in (8, 1))
    with pytest.raises(RuntimeError, match="UInt16"):
        torch.ops.torchconv.conv2d(x, w)


def test_a_kernel_as_tall_as_memory_on_no_channels_costs_nothing() -> None:
    rows = 1 << 40
    x, w = (torch.empty(1, 0, rows, 1) for _ in range(2))
    assert torch.equal(F.conv2d(x, w), torch.zeros(1, 1, 1, 1))
