"""The emulated CUDA device (tests/emulator) itself: what it computes and what it complains of."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchconv import _build, _toolchain

HERE = Path(__file__).resolve().parent
ORDERS = ("forward", "reverse", "shuffle")


def compile_selftest(folder: Path, *flags: str) -> ctypes.CDLL:
    library = folder / "selftest.so"
    command = [
        *_toolchain.compiler(), "-shared", "-fPIC", "-std=c++17", "-O1", "-fvisibility=hidden",
        "-Wall", "-Wextra", "-Werror", "-DTORCHCONV_EMULATE_CUDA", *flags,
        "-I", str(_build.source_root()), "-I", str(HERE / "emulator"), "-x", "c++",
        str(HERE / "emulator" / "selftest.cu"), str(HERE / "emulator" / "emulator.cpp"),
        "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


# The second switches coroutines by swapcontext, as processors without assembly do.
@pytest.fixture(scope="session", params=[(), ("-DTORCHCONV_EMULATOR_UCONTEXT",)], ids=["", "u"])
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    return compile_selftest(tmp_path_factory.mktemp("emulator"), *request.param)


@pytest.fixture
def call(library: ctypes.CDLL) -> Callable[..., None]:
    """call(name, arguments): runs a kernel; RuntimeError with the emulator's message."""

    def run(name: str, *arguments: Tensor | int) -> None:
        function = getattr(library, f"run_{name}")
        function.restype = ctypes.c_char_p
        message = function(
            *[ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        )
        if message is not None:
            raise RuntimeError(message.decode())

    return run


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TORCHCONV_EMULATED_ORDER", request.param)
    return str(request.param)


def test_barriers_and_shared_memory(call: Callable[..., None], order: str) -> None:
    x = torch.randn(1000)
    y = torch.full((4,), float("nan"))
    call("block_sums", x, y, 1000)
    expected = torch.stack([part.double().sum() for part in x.split(256)])
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 33, 1024])
def test_dynamic_shared_memory(call: Callable[..., None], order: str, threads: int) -> None:
    x = torch.randn(3, threads)
    y = torch.full_like(x, float("nan"))
    call("reverse_block", x, y, 3, threads, 1)
    assert torch.equal(y, x.flip(1))


def test_a_missing_barrier_shows(
    call: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 64)
    results = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("TORCHCONV_EMULATED_ORDER", order)
        results.append(torch.zeros_like(x))
        call("reverse_block", x, results[-1], 2, 64, 0)
    assert results[0][:, :32].isnan().all() and results[1][:, 32:].isnan().all()


def test_shared_memory_is_clean(call: Callable[..., None], order: str) -> None:
    x, y = torch.randn(3, 8), torch.zeros(3, 8)
    call("first_of_block", x, y, 0b101)
    assert torch.equal(y[0], x[0, :1].expand(8)) and torch.equal(y[2], x[2, :1].expand(8))
    assert y[1].isnan().all()


def test_shuffles_and_votes(call: Callable[..., None], order: str) -> None:
    y = torch.zeros(7, 64, dtype=torch.int32)
    call("shuffles", y, 64)
    t = torch.arange(64)
    assert torch.equal(y[0], (t // 32 * 32 + 5).int())
    assert torch.equal(y[1], (t // 8 * 8 + (t + 1) % 8).int())
    assert torch.equal(y[2], (t ^ 16).int())
    assert torch.equal(y[3], torch.where(t % 16 + 3 < 16, t + 3, t).int())
    assert torch.equal(y[4], torch.where(t % 16 >= 3, t - 3, t).int())
    for warp in range(2):
        ballot = sum(1 << i for i in range(32) if (warp * 32 + i) % 3 == 0)
        assert {v & 0xFFFFFFFF for v in y[5, warp * 32 : warp * 32 + 32].tolist()} == {ballot}
    block = 4 * 7 + 256
    assert y[6, :32].unique().tolist() == [2 + block]
    assert y[6, 32:].unique().tolist() == [1 + block]


@pytest.mark.parametrize("threads", [64, 40])
def test_threads_that_return_are_not_waited_for(
    call: Callable[..., None], order: str, threads: int
) -> None:
    y = torch.zeros(threads, dtype=torch.int32)
    call("early_exit", y, threads)
    t = torch.arange(threads)
    assert torch.equal(y, torch.where(t % 2 == 0, t ^ 2, -1).int())


def test_warp_exchange(call: Callable[..., None], order: str) -> None:
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    c = torch.full((32, 32), float("nan"))
    call("warp_product", a, b, c)
    torch.testing.assert_close(c, a @ b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid, block", [((3, 2, 4), (2, 3, 5)), ((7, 1, 1), (33, 1, 1))])
def test_every_thread_runs_once(
    call: Callable[..., None], order: str, grid: tuple[int, ...], block: tuple[int, ...]
) -> None:
    count = int(torch.tensor([*grid, *block]).prod())
    y = torch.zeros(count, dtype=torch.int32)
    sizes = ctypes.c_uint * 3
    call("coordinates", y, sizes(*grid), sizes(*block))
    assert torch.equal(y, torch.ones_like(y))
    call("coordinates", y, sizes(0, 1, 1), sizes(*block))  # an empty grid is no launch
    assert torch.equal(y, torch.ones_like(y))


def test_deadlocks(call: Callable[..., None], order: str) -> None:
    with pytest.raises(RuntimeError, match="wait for one another") as error:
        call("split_warp", torch.zeros(32))
    assert "16 in __shfl_xor_sync at " in str(error.value)
    assert "16 in __syncthreads at " in str(error.value)
    assert "selftest.cu:" in str(error.value)
    test_barriers_and_shared_memory(call, order)  # the device is as good as new


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("outside_mask", [torch.zeros(2, dtype=torch.int32)], "not in the mask of its own __shfl"),
        ("overrun", [100], "wrote behind its dynamic shared memory"),
        ("trap", [], r"block \(0, 2, 0\): thread \(3, 0, 0\): a thread called __trap"),
        ("overrun", [228 << 10], "less shared memory"),
        ("shuffles", [torch.zeros(1), 1025], "no such block"),
    ],
)
def test_errors(
    call: Callable[..., None], name: str, arguments: list[Tensor | int], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(name, *arguments)


def test_shared_memory_of_the_capability(
    call: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    call("overrun", 227 << 10)
    monkeypatch.setenv("TORCHCONV_EMULATED_CAPABILITY", "80")
    call("overrun", 163 << 10)
    with pytest.raises(RuntimeError, match="less shared memory"):
        call("overrun", 164 << 10)


@pytest.mark.parametrize("name, dtype", [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_types(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    def convert(way: str, x: Tensor, to: torch.dtype) -> Tensor:
        y = torch.empty_like(x, dtype=to)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y)]
        getattr(library, f"{way}_{name}")(*pointers, ctypes.c_int64(x.numel()))
        return y

    def same(out: Tensor, expected: Tensor) -> None:
        assert torch.equal(out.isnan(), expected.isnan())
        as_bits = torch.int32 if out.dtype == torch.float32 else torch.int16
        numbers = ~out.isnan()
        assert torch.equal(out.view(as_bits)[numbers], expected.view(as_bits)[numbers])

    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    wide = convert("from", every, torch.float32)
    same(wide, every.float())
    # Every value, the middle between it and the next, both neighbours of that, and any bits.
    bits = wide[~wide.isnan()].view(torch.int32).long()
    unit = 1 << (13 if dtype == torch.float16 else 16)
    near = [bits + offset for offset in (-1, 0, 1, unit // 2 - 1, unit // 2, unit // 2 + 1)]
    any_bits = torch.randint(-(2**31), 2**31, (200_000,))
    floats = torch.cat([*near, any_bits]).to(torch.int32).view(torch.float32)
    # Between the subnormal numbers of float16 the middle is elsewhere.
    tiny = torch.arange(-4200, 4200).float() * 2.0**-25
    floats = torch.cat([floats, tiny, torch.nextafter(tiny, torch.tensor(1.0))])
    same(convert("to", floats, dtype), floats.to(dtype))


def test_divisor(library: ctypes.CDLL) -> None:
    """csrc/cuda/divmod.h, for dividends and divisors up to 2^31: at every multiple's neighbours."""
    library.divisor_errors.restype = ctypes.c_int64
    most = 2**31 - 1
    powers = [2**i + d for i in range(31) for d in (-1, 0, 1)]
    drawn = (2.0 ** (torch.rand(500) * 31)).long().tolist()
    for divisor in [*range(1, 300), *powers, *drawn, most]:
        if not 1 <= divisor <= most:
            continue
        multiples = torch.randint(0, most // divisor + 1, (300,)) * divisor
        near = torch.cat([multiples - 1, multiples, multiples + 1, torch.tensor([0, 1, most])])
        near = near[(near >= 0) & (near <= most)].contiguous()
        count = ctypes.c_int64(near.numel())
        pointer = ctypes.c_void_p(near.data_ptr())
        assert library.divisor_errors(ctypes.c_int64(divisor), pointer, count) == 0, divisor
