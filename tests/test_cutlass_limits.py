"""What surrounds the CUTLASS kernels, without a GPU: csrc/cuda/cutlass_sm90_limits.h,
cutlass_sm90_groups.h and cutlass_sm90_groups_wgrad.h on the CPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, strategies as st
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
COMPILER = shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

FPROP, DGRAD, WGRAD = range(3)
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)
NCHW, NHWC = range(2)
RELU, RELU6, SIGMOID = 1, 2, 3
MOST_OF_A_SHARE = 256 * 64


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    library = tmp_path_factory.mktemp("cutlass") / "limits.so"
    assert COMPILER is not None
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{SOURCES}"]
        + ["-o", str(library), str(HERE / "cutlass_limits.cpp")],
        check=True,
    )
    yield ctypes.CDLL(str(library))


def _outputs(size: int, taps: int, stride: int, before: int, after: int, dilation: int) -> int:
    return (size + before + after - dilation * (taps - 1) - 1) // stride + 1


def _problem(
    n: int = 8,
    c: int = 64,
    size: tuple[int, int] = (28, 28),
    k: int = 64,
    taps: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dtype: int = FLOAT16,
    layout: int = NHWC,
    activation: int = 0,
    flip: int = 0,
) -> ctypes.Array[ctypes.c_int64]:
    """A ConvProblem's fields in order; padding is left, right, top, bottom."""
    p = _outputs(size[0], taps[0], stride[0], padding[2], padding[3], dilation[0])
    q = _outputs(size[1], taps[1], stride[1], padding[0], padding[1], dilation[1])
    fields = [n, c, *size, k, *taps, p, q, *stride, padding[2], padding[0], *dilation, groups]
    fields += [dtype, layout, activation, flip]
    return (ctypes.c_int64 * len(fields))(*fields)


def _pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("which", [FPROP, DGRAD, WGRAD])
def test_takes_common_layers(limits: ctypes.CDLL, which: int) -> None:
    def takes(**changes: object) -> bool:
        return bool(limits.takes(_problem(**changes), which, 0, 0, 90))  # type: ignore[arg-type]

    assert takes()
    assert takes(dtype=BFLOAT16)
    assert takes(c=256, k=512, taps=(1, 1), padding=(0, 0, 0, 0))
    assert takes(stride=(2, 2))
    assert takes(padding=(0, 2, 1, 0))
    assert takes(dtype=FLOAT32)
    assert not limits.takes(_problem(), which, 0, 0, 80)
    assert not limits.takes(_problem(), which, 0, 0, 100)


@pytest.mark.parametrize("which", [FPROP, DGRAD, WGRAD])
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": FLOAT64},
        {"layout": NCHW},
        {"flip": 1},
        {"groups": 2},
        {"n": 0},
        {"c": 0},
        {"k": 0},
        {"c": 68},
        {"k": 68},
        {"c": 66, "dtype": FLOAT32},
        {"c": 8},  # seven eighths of the products would be with zeros
        {"k": 8},
        {"padding": (140, 140, 1, 1), "size": (28, 28)},
        {"dilation": (128, 1), "size": (300, 28)},
        {"stride": (9, 9)},
        {"stride": (1 << 32, 1 << 32), "padding": (0, 0, 0, 0)},
        {"n": 1 << 20, "size": (64, 64)},  # 2^32 positions
    ],
)
def test_refuses(limits: ctypes.CDLL, changes: dict[str, object], which: int) -> None:
    assert not limits.takes(_problem(**changes), which, 0, 0, 90)  # type: ignore[arg-type]


def test_refuses_what_only_one_pass_cannot(limits: ctypes.CDLL) -> None:
    assert limits.takes(_problem(activation=RELU), FPROP, 0, 0, 90)
    assert limits.takes(_problem(activation=RELU6), FPROP, 0, 0, 90)
    assert not limits.takes(_problem(activation=RELU), FPROP, 1, 0, 90)
    assert not limits.takes(_problem(activation=SIGMOID), FPROP, 0, 0, 90)
    assert limits.takes(_problem(activation=SIGMOID), DGRAD, 0, 0, 90)
    assert limits.takes(_problem(stride=(3, 3)), FPROP, 0, 0, 90)
    assert not limits.takes(_problem(stride=(3, 3)), DGRAD, 0, 0, 90)


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 9), st.integers(1, 9))
def test_halo_fits_a_box(limits: ctypes.CDLL, height: int, width: int, r: int, s: int) -> None:
    """TMA loads at most 256 pixels along an axis."""
    size = (height + r - 1, width + s - 1)
    v = _problem(size=size, taps=(r, s), padding=(0, 0, 0, 0))
    box = (ctypes.c_int64 * 2)()
    if limits.halo(v, box):
        assert r <= box[0] <= 256 and s <= box[1] <= 256


def test_halo_of_columns(limits: ctypes.CDLL) -> None:
    """Images of one column, as of signals."""
    v = _problem(size=(504, 1), taps=(5, 1), padding=(0, 0, 0, 0))
    box = (ctypes.c_int64 * 2)()
    assert limits.halo(v, box) and list(box) == [256, 1]


def test_fprop_is_chosen_without_the_batch(limits: ctypes.CDLL) -> None:
    for c, k in ((8, 64), (32, 64), (40, 40), (64, 64), (72, 200)):
        taken = {bool(limits.takes(_problem(n=n, c=c, k=k), FPROP, 0, 0, 90)) for n in (1, 2, 300)}
        assert len(taken) == 1


AXIS = st.tuples(
    st.integers(1, 9),  # size
    st.integers(1, 4),  # taps
    st.integers(1, 4),  # stride
    st.integers(-2, 4),  # padding before
    st.integers(-2, 4),  # and after
    st.integers(1, 4),  # dilation
)


@given(AXIS, AXIS)
def test_gathers_are_the_convolution(
    limits: ctypes.CDLL, h: tuple[int, ...], w: tuple[int, ...]
) -> None:
    (
        (size_h, r, stride_h, top, bottom, dilation_h),
        (size_w, s, stride_w, left, right, dilation_w),
    ) = (
        h,
        w,
    )
    if _outputs(size_h, r, stride_h, top, bottom, dilation_h) <= 0 or size_h + top + bottom <= 0:
        return
    if _outputs(size_w, s, stride_w, left, right, dilation_w) <= 0 or size_w + left + right <= 0:
        return
    if size_h + min(top, 0) + min(bottom, 0) <= 0 or size_w + min(left, 0) + min(right, 0) <= 0:
        return
    n, c, k = 2, 3, 2
    v = _problem(
        n=n,
        c=c,
        k=k,
        size=(size_h, size_w),
        taps=(r, s),
        stride=(stride_h, stride_w),
        padding=(left, right, top, bottom),
        dilation=(dilation_h, dilation_w),
    )
    x = torch.randn(n, c, size_h, size_w, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(k, c, r, s, dtype=torch.float64)
    expected = F.conv2d(
        F.pad(x, (left, right, top, bottom)),
        weight,
        stride=(stride_h, stride_w),
        dilation=(dilation_h, dilation_w),
    )
    image = x.detach().permute(0, 2, 3, 1).contiguous()
    filters = weight.permute(0, 2, 3, 1).contiguous()
    y = torch.full((n, *expected.shape[2:], k), torch.nan, dtype=torch.float64)
    assert limits.fprop(v, _pointer(image), _pointer(filters), _pointer(y))
    torch.testing.assert_close(y.permute(0, 3, 1, 2), expected.detach())

    dz = torch.randn_like(expected)
    (expected_dx,) = torch.autograd.grad(expected, x, dz)
    dx = torch.empty_like(image)
    # Every axis has at most four phases here, as the kernel's tables of them do.
    dz_image = dz.permute(0, 2, 3, 1).contiguous()
    assert limits.dgrad(v, _pointer(dz_image), _pointer(filters), _pointer(dx))
    torch.testing.assert_close(dx.permute(0, 3, 1, 2), expected_dx)


def _of_groups(**changes: object) -> ctypes.Array[ctypes.c_int64]:
    """ResNeXt's last layers: 32 groups of 32 channels at 7x7."""
    settings: dict[str, object] = {"c": 1024, "k": 1024, "groups": 32, "size": (7, 7)}
    return _problem(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("which", [FPROP, DGRAD])
def test_takes_wide_groups(limits: ctypes.CDLL, which: int) -> None:
    def takes(**changes: object) -> bool:
        return bool(limits.takes_groups(_of_groups(**changes), which, 0, 0, 90))

    assert takes()
    assert takes(dtype=BFLOAT16)
    assert takes(groups=16)  # of 64 channels
    assert takes(c=96, k=96, groups=3)
    assert takes(size=(14, 14)) and takes(size=(28, 28))
    assert takes(size=(14, 14), stride=(2, 2))
    assert takes(size=(16, 16), stride=(2, 2), padding=(0, 0, 0, 0)) == (which == FPROP)
    assert {takes(n=n) for n in (1, 2, 300)} == {True}
    for refused in (
        {"dtype": FLOAT32},
        {"layout": NCHW},
        {"flip": 1},
        {"groups": 1},
        {"groups": 8},  # of 128 channels
        {"groups": 64},
        {"k": 512},
        {"dilation": (2, 2), "padding": (2, 2, 2, 2)},
        {"stride": (2, 1)},
        {"stride": (3, 3)},
        {"taps": (1, 1), "padding": (0, 0, 0, 0)},
        {"taps": (5, 2)},
        {"size": (3, 3)},  # a unit of 64 would be mostly padding
        {"size": (56, 56)},  # three rows would be loaded for one
        {"size": (9, 90)},
        {"n": 0},
    ):
        assert not takes(**refused), refused
    assert not limits.takes_groups(_of_groups(), which, 0, 0, 80)


def test_what_groups_leave_to_other_kernels(limits: ctypes.CDLL) -> None:
    assert limits.takes_groups(_of_groups(activation=RELU6), FPROP, 0, 0, 90)
    assert not limits.takes_groups(_of_groups(activation=SIGMOID), FPROP, 0, 0, 90)
    assert limits.takes_groups(_of_groups(activation=SIGMOID), DGRAD, 0, 0, 90)
    assert not limits.takes_groups(_of_groups(), FPROP, 1, 0, 90)
    assert not limits.takes_groups(_of_groups(), FPROP, 0, 1, 90)
    assert not limits.takes_groups(_of_groups(), WGRAD, 0, 0, 90)


@given(
    st.tuples(st.integers(2, 30), st.integers(2, 30)),
    st.tuples(*[st.integers(-2, 4)] * 4),
    st.sampled_from([1, 2]),
    st.sampled_from([(64, 1), (32, 3)]),
    st.sampled_from([FPROP, DGRAD]),
)
@example((7, 7), (1, 1, 1, 1), 1, (32, 3), FPROP)
@example((7, 7), (1, 1, 1, 1), 1, (32, 3), DGRAD)
@example((14, 14), (1, 1, 1, 1), 2, (64, 2), FPROP)
@example((27, 25), (1, 1, 1, 1), 2, (64, 1), FPROP)
@example((29, 28), (1, 1, 1, 1), 1, (32, 2), DGRAD)
@example((14, 14), (1, 1, 1, 1), 2, (64, 2), DGRAD)
@example((15, 13), (1, 1, 1, 1), 2, (32, 3), DGRAD)
def test_units_of_groups_are_the_convolution(
    limits: ctypes.CDLL,
    size: tuple[int, int],
    padding: tuple[int, int, int, int],
    stride: int,
    groups: tuple[int, int],
    which: int,
) -> None:
    left, right, top, bottom = padding
    if which == DGRAD and stride > 1:  # which asks for a padding of 1 before the image
        left = top = 1
        padding = (left, right, top, bottom)
    if size[0] + top + bottom < 3 or size[1] + left + right < 3:
        return
    if min(size[0] + min(top, 0) + min(bottom, 0), size[1] + min(left, 0) + min(right, 0)) <= 0:
        return
    of_group, count = groups
    n, c = 2, of_group * count
    v = _problem(n=n, c=c, k=c, size=size, stride=(stride, stride), padding=padding, groups=count)
    inputs = torch.randn(n, c, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(c, of_group, 3, 3, dtype=torch.float64)
    z = F.conv2d(F.pad(inputs, (left, right, top, bottom)), weight, stride=stride, groups=count)
    read = inputs.detach()
    expected = z.detach()
    if which == DGRAD:
        read = torch.randn_like(z)
        (expected,) = torch.autograd.grad(z, inputs, read)
    image = read.permute(0, 2, 3, 1).contiguous()
    filters = weight.permute(0, 2, 3, 1).contiguous()
    found = torch.full((n, *expected.shape[2:], c), torch.nan, dtype=torch.float64)
    stages = limits.groups(v, which, _pointer(image), _pointer(filters), _pointer(found))
    assert stages >= 2
    torch.testing.assert_close(found.permute(0, 3, 1, 2), expected)


def test_takes_wgrad_of_wide_groups(limits: ctypes.CDLL) -> None:
    def takes(**changes: object) -> bool:
        return bool(limits.takes_groups_wgrad(_of_groups(**changes), 90))

    assert takes() and takes(dtype=BFLOAT16) and takes(groups=16) and takes(size=(3, 3))
    assert takes(size=(14, 14)) and takes(size=(28, 28), stride=(2, 2))
    assert not takes(size=(28, 28))  # no room for its lines
    assert not takes(size=(56, 56), stride=(2, 2))
    assert not takes(groups=8) and not takes(k=512) and not takes(dtype=FLOAT32)
    assert not limits.takes_groups_wgrad(_of_groups(), 80)


@given(
    st.sampled_from([1, 3, 16, 37]),
    st.tuples(st.integers(1, 15), st.integers(1, 14)),
    st.tuples(*[st.integers(-2, 4)] * 4),
    st.sampled_from([1, 2]),
    st.sampled_from([64, 512]),
)
@example(64, (7, 7), (1, 1, 1, 1), 1, 1024)
@example(64, (14, 14), (1, 1, 1, 1), 2, 2048)
@example(300, (14, 3), (1, 1, 1, 1), 1, 4224)
@example(600, (2, 2), (1, 1, 1, 1), 1, 8512)
def test_items_of_groups_are_the_gradient(
    limits: ctypes.CDLL,
    n: int,
    size: tuple[int, int],
    padding: tuple[int, int, int, int],
    stride: int,
    channels: int,
) -> None:
    left, right, top, bottom = padding
    if size[0] + top + bottom < 3 or size[1] + left + right < 3:
        return
    if min(size[0] + min(top, 0) + min(bottom, 0), size[1] + min(left, 0) + min(right, 0)) <= 0:
        return
    # How it is cut depends on the channels; few of them are computed.
    c = 4
    v = _problem(n=n, c=c, k=c, size=size, stride=(stride, stride), padding=padding, groups=2)
    p, q = v[7], v[8]
    if q > 14:
        return
    x = torch.randn(n, c, *size, dtype=torch.float64)
    dz = torch.randn(n, c, p, q, dtype=torch.float64)
    weight = torch.zeros(c, c // 2, 3, 3, dtype=torch.float64, requires_grad=True)
    z = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, stride=stride, groups=2)
    (expected,) = torch.autograd.grad(z, weight, dz)
    images = [t.permute(0, 2, 3, 1).contiguous() for t in (dz, x)]
    found = torch.empty(c, 3, 3, c // 2, dtype=torch.float64)
    slabs = ctypes.c_int64(-(-channels // 64))
    assert limits.groups_wgrad(v, slabs, *map(_pointer, images), _pointer(found)) >= 1
    torch.testing.assert_close(found.permute(0, 3, 1, 2), expected)


@given(st.integers(1, 200), st.integers(1, 5000), st.sampled_from([1, 2, 114, 132]))
def test_parts_of_groups(limits: ctypes.CDLL, slabs: int, units: int, multiprocessors: int) -> None:
    count = [ctypes.c_int64(value) for value in (slabs, units, multiprocessors)]
    assert 1 <= limits.group_parts(*count) <= units


def test_parts_of_groups_fill_a_device(limits: ctypes.CDLL) -> None:
    for slabs, units, parts in ((32, 64, 4), (16, 64, 8), (1, 1056, 132)):
        count = [ctypes.c_int64(value) for value in (slabs, units, 132)]
        assert limits.group_parts(*count) == parts


@given(
    st.sampled_from([1, 2, 64, 256, 1000]),
    st.sampled_from([32, 64, 128, 520, 2048]),
    st.sampled_from([32, 64, 128, 520, 2048]),
    st.integers(1, 112),
    st.integers(1, 3),
)
def test_shares_cover_the_sums(
    limits: ctypes.CDLL, n: int, c: int, k: int, size: int, taps: int
) -> None:
    v = _problem(n=n, c=c, k=k, size=(size, size), taps=(taps, taps))
    out = (ctypes.c_int64 * 9)()
    limits.shares(v, out)
    tile_k, tile_c, cluster, results, tiles, whole, splits, steps, shares = out
    p, q = v[7], v[8]
    assert tile_k in (64, 128) and tile_c in (64, 128)
    assert results == -(-k // (tile_k * cluster)) * -(-c // tile_c) * taps * taps
    assert tiles * 64 >= n * p * q > (tiles - 1) * 64
    assert steps <= MOST_OF_A_SHARE
    assert whole == 0 or tiles <= MOST_OF_A_SHARE
    most = max(1, -(-tiles // MOST_OF_A_SHARE))
    assert splits * k * taps * taps * c * 4 <= 256 << 20 or splits <= most
    if shares > 2000:
        return
    done = [0] * results  # tiles of each sum so far, and parts
    parts, told = [0] * results, [0] * results
    room = (ctypes.c_int64 * 5)()
    for share in range(shares):
        limits.share(v, ctypes.c_int64(share), room)
        result, slot, first, count, of_result = room
        assert first == done[result] and slot == parts[result] and count > 0
        done[result] += count
        parts[result] += 1
        told[result] = of_result
    assert done == [tiles] * results
    assert parts == told and max(parts) == splits


@pytest.mark.parametrize(
    ("n", "c", "size", "k", "taps", "tiles"),
    [
        (64, 256, (56, 56), 256, 3, [(128, 256, 2)]),
        (64, 512, (7, 7), 512, 3, [(128, 128, 4)]),
        (64, 512, (14, 14), 512, 3, [(192, 128, 2)]),
        (64, 64, (56, 56), 64, 3, [(128, 64, 2)]),
        (1, 64, (7, 7), 512, 3, [(128, 64, 2)]),
        # The layers of test_cutlass.py that are there for their tiles.
        (13, 64, (31, 33), 248, 3, [(128, 256, 2)]),
        (20, 264, (31, 33), 504, 1, [(128, 256, 2), (128, 128, 2)]),  # whole rounds, and a rest
        (36, 264, (31, 33), 248, 1, [(192, 128, 2)]),
        (4, 136, (31, 33), 504, 1, [(128, 128, 4)]),
        (32, 64, (32, 32), 120, 3, [(128, 128, 2)]),
    ],
)
def test_tiles(
    limits: ctypes.CDLL,
    n: int,
    c: int,
    size: tuple[int, int],
    k: int,
    taps: int,
    tiles: list[tuple[int, int, int]],
) -> None:
    pad = (taps // 2,) * 4
    v = _problem(n=n, c=c, k=k, size=size, taps=(taps, taps), padding=pad)
    assert [tile for tile, _, _ in _parts(limits, v, 132)] == tiles


def _parts(
    limits: ctypes.CDLL, v: ctypes.Array[ctypes.c_int64], multiprocessors: int
) -> list[tuple[tuple[int, int, int], int, int]]:
    """The tile (positions, filters, blocks of a cluster), the first position and how many."""
    out = (ctypes.c_int64 * 10)()
    count = limits.parts(v, ctypes.c_int64(multiprocessors), out)
    parts = [out[5 * i : 5 * i + 5] for i in range(count)]
    return [((part[0], part[1], part[2]), part[3], part[4]) for part in parts]


@given(
    st.integers(1, 300),
    st.sampled_from([64, 512, 2048]),
    st.sampled_from([64, 128, 200, 520, 2048]),
    st.integers(1, 60),
    st.sampled_from([1, 2, 7, 114, 132]),
)
def test_parts_cover_the_positions(
    limits: ctypes.CDLL, n: int, c: int, k: int, size: int, multiprocessors: int
) -> None:
    v = _problem(n=n, c=c, k=k, size=(size, size))
    reached, run = 0, 0
    for (positions, _, _), first, more in _parts(limits, v, multiprocessors):
        assert first == reached and more > 0
        reached, run = reached + more, 2 * positions
    assert n * v[7] * v[8] <= reached < n * v[7] * v[8] + run
