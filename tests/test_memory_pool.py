"""The memory pool: bounded, reused, harmless to threads, forks and whoever owns the tensors."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchconv
import torchconv.functional as F

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def fresh_pool() -> Iterator[None]:
    before = torchconv.memory_stats()
    torchconv.set_memory_pool(True, limit=256 * MEGABYTE)
    torchconv.empty_cache()
    yield
    torchconv.set_memory_pool(bool(before["enabled"]), limit=before["limit"])


def large(seed: int = 0, channels: int = 16) -> Tensor:
    """An input whose 2x2 pooling has `channels` megabytes / 4 of float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, channels, 512, 512, generator=generator)


def test_a_freed_output_serves_the_next() -> None:
    x = large()
    y = F.max_pool2d(x, 2)
    used = torchconv.memory_stats()
    assert used["allocated"] >= y.nbytes
    address = y.data_ptr()
    del y
    kept = torchconv.memory_stats()
    assert kept["allocated"] == used["allocated"] - (kept["cached"] - used["cached"])
    assert kept["cached"] > used["cached"]
    again = F.max_pool2d(x, 2)
    assert again.data_ptr() == address
    assert torchconv.memory_stats()["reused"] == kept["reused"] + 1


def test_small_outputs_are_not_pooled() -> None:
    before = torchconv.memory_stats()
    y = F.max_pool2d(torch.randn(1, 3, 32, 32), 2)
    after = torchconv.memory_stats()
    assert (after["fresh"], after["reused"]) == (before["fresh"], before["reused"])
    assert y.untyped_storage().resizable()


def test_empty_cache_returns_what_is_kept_and_leaves_what_is_used() -> None:
    x = large()
    y = F.max_pool2d(x, 2)
    expected = y.clone()
    del x
    F.min_pool2d(y, 2)
    torchconv.empty_cache()
    stats = torchconv.memory_stats()
    assert stats["cached"] == 0
    assert stats["allocated"] >= y.nbytes
    assert torch.equal(y, expected)


def test_the_bound_holds_under_ever_new_shapes() -> None:
    torchconv.set_memory_pool(limit=24 * MEGABYTE)
    alive = []
    for i in range(40):
        y = F.avg_pool2d(torch.ones(1, 3 + i % 7, 600 + 16 * i, 640), 2)
        alive = [*alive[-2:], y]
        stats = torchconv.memory_stats()
        assert stats["cached"] <= 24 * MEGABYTE
        assert torch.all(y == 1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_bits_with_and_without(memory_format: torch.memory_format) -> None:
    weight = torch.randn(24, 16, 3, 3)

    def run() -> list[Tensor]:
        x = large().contiguous(memory_format=memory_format).requires_grad_()
        y = F.max_pool2d(F.conv2d(x, weight, padding=1, activation="silu"), 3, 2, 1)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return [y.detach(), dx]

    pooled = [run() for _ in range(3)]
    torchconv.set_memory_pool(False)
    assert torchconv.memory_stats()["cached"] == 0
    plain = run()
    for result in pooled:
        for a, b in zip(result, plain, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()


def test_turned_off_it_gives_nothing() -> None:
    held = F.max_pool2d(large(), 2)
    torchconv.set_memory_pool(False)
    before = torchconv.memory_stats()
    y = F.max_pool2d(large(), 2)
    assert torchconv.memory_stats()["fresh"] == before["fresh"]
    assert y.untyped_storage().resizable()
    del held
    assert torchconv.memory_stats()["cached"] == 0


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        torchconv.set_memory_pool(limit=-1)


def test_outputs_are_ordinary_tensors() -> None:
    y = F.max_pool2d(large(), 2)
    expected = y.clone()
    assert torch.equal(pickle.loads(pickle.dumps(y)), expected)
    assert torch.equal(copy.deepcopy(y), expected)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    assert torch.equal(torch.from_numpy(y.numpy()), expected)
    y.add_(1)
    assert torch.equal(y, expected + 1)
    assert y.resize_(4, 4).shape == (4, 4)


def test_a_shared_output_is_not_given_out_again() -> None:
    y = F.max_pool2d(large(), 2)
    expected = y.clone()
    y.share_memory_()
    assert y.is_shared()
    other = F.max_pool2d(large(1), 2)
    assert other.data_ptr() != y.data_ptr()
    assert torch.equal(y, expected)


def assert_starts_with(y: Tensor, expected: Tensor) -> None:
    assert y.numel() > expected.numel()
    assert torch.equal(y.flatten()[: expected.numel()], expected.flatten())


def test_an_output_that_grows_keeps_its_elements_and_returns_its_block() -> None:
    x = large()
    y, other = F.max_pool2d(x, 2), F.min_pool2d(x, 2)
    expected, other_expected = y.clone(), other.clone()
    address, before = y.data_ptr(), torchconv.memory_stats()
    assert y.untyped_storage().resizable()
    assert y.resize_(2, 16, 512, 256) is y and y.shape == (2, 16, 512, 256)
    assert_starts_with(y, expected)
    after = torchconv.memory_stats()
    moved = before["allocated"] - after["allocated"]
    assert moved >= expected.nbytes and after["cached"] == before["cached"] + moved
    again = F.max_pool2d(large(1), 2)
    assert again.data_ptr() == address
    y.zero_()
    assert torch.equal(again, torch.nn.functional.max_pool2d(large(1), 2))
    assert torch.equal(other, other_expected)
    del y
    assert torchconv.memory_stats()["cached"] == before["cached"]  # PyTorch's memory is not ours


def test_views_of_an_output_that_grows_move_with_it() -> None:
    y = F.max_pool2d(large(), 2)
    view, expected = y[:, 3:5], y.clone()
    y.resize_(2 * y.numel())
    assert view.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert torch.equal(view, expected[:, 3:5])
    view.fill_(7)
    assert torch.all(y[3 * 256 * 256 : 5 * 256 * 256] == 7)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_out_of_an_operator_that_needs_more_room(memory_format: torch.memory_format) -> None:
    x = large().contiguous(memory_format=memory_format)
    y, before = F.max_pool2d(x, 2), torchconv.memory_stats()["allocated"]
    with pytest.warns(UserWarning, match="resized"):
        torch.add(x, 1, out=y)
    assert torch.equal(y, x + 1)
    assert torchconv.memory_stats()["allocated"] < before


def test_storage_of_an_output_resizes() -> None:
    y = F.max_pool2d(large(), 2)
    expected, allocated = y.clone(), torchconv.memory_stats()["allocated"]
    y.untyped_storage().resize_(3 * y.nbytes)
    assert y.untyped_storage().nbytes() == 3 * expected.nbytes and torch.equal(y, expected)
    assert torchconv.memory_stats()["allocated"] < allocated
    y.untyped_storage().resize_(0)
    y.untyped_storage().resize_(expected.nbytes)
    y.copy_(expected)
    assert torch.equal(y, expected)


def test_growing_after_the_pool_was_turned_off() -> None:
    y = F.max_pool2d(large(), 2)
    expected, before = y.clone(), torchconv.memory_stats()
    torchconv.set_memory_pool(False)
    assert_starts_with(y.resize_(2 * y.numel()), expected)
    after = torchconv.memory_stats()
    assert after["allocated"] < before["allocated"] and after["cached"] == 0


def test_numpy_arrays_forbid_growing_as_for_every_tensor() -> None:
    y = F.max_pool2d(large(), 2)
    array, expected = y.numpy(), y.clone()
    with pytest.raises(RuntimeError, match="resiz"):
        y.resize_(2 * y.numel())
    assert (array == expected.numpy()).all()


def test_views_and_numpy_arrays_keep_the_memory() -> None:
    y = F.max_pool2d(large(), 2)
    view, array = y[:, 3:5], y.numpy()
    expected = view.clone(), array.copy()
    del y
    gc.collect()
    others = [F.max_pool2d(large(seed), 2) for seed in range(1, 4)]
    assert torch.equal(view, expected[0]) and (array == expected[1]).all()
    assert all(other.data_ptr() != array.ctypes.data for other in others)


def test_threads() -> None:
    inputs = [large(seed, channels=8) for seed in range(4)]
    expected = [F.max_pool2d(x, 2).clone() for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(12):
            y = F.max_pool2d(inputs[i], 2)
            if not torch.equal(y, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORK = """
import os, torch, torchconv
import torchconv.functional as F
torch.set_num_threads(1)
x = torch.randn(1, 16, 512, 512)
y = F.max_pool2d(x, 2)
del y
pid = os.fork()
y = F.max_pool2d(x, 2)
ok = torch.equal(y, torch.nn.functional.max_pool2d(x, 2))
if pid == 0:
    os._exit(0 if ok else 1)
assert ok and os.waitpid(pid, 0)[1] == 0
print("both right")
"""

GROW = """
import os, torch, torchconv
import torchconv.functional as F
torch.set_num_threads(1)
x = torch.randn(1, 16, 512, 512)
y = F.max_pool2d(x, 2)
expected = y.clone()
pid = os.fork()
allocated = torchconv.memory_stats()["allocated"]
y.resize_(2 * y.numel())
ok = torch.equal(y[: expected.numel()], expected.flatten())
ok = ok and torchconv.memory_stats()["allocated"] < allocated
if pid == 0:
    os._exit(0 if ok else 1)
assert ok and os.waitpid(pid, 0)[1] == 0
print("both right")
"""

CANNOT_GROW = """
import torch, torchconv
from torchconv import _build
_build.bound_fault = lambda library: "was built for another PyTorch"
import torchconv.functional as F
x = torch.randn(1, 16, 512, 512)
y = F.max_pool2d(x, 2)
view, expected, stats = y[:], y.clone(), torchconv.memory_stats()
assert stats["fresh"] > 0 and not y.untyped_storage().resizable()
try:
    y.resize_(2 * y.numel())
except RuntimeError as error:
    print(error)
assert torch.equal(view, expected)
assert torchconv.memory_stats() == stats
"""

ENVIRONMENT = """
import torch, torchconv
import torchconv.functional as F
F.max_pool2d(torch.randn(1, 16, 512, 512), 2)
stats = torchconv.memory_stats()
print(stats["enabled"], stats["limit"], stats["fresh"])
"""


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_fork() -> None:
    assert run_python(FORK, TORCHCONV_MEMORY_POOL="1") == "both right"


def test_growing_after_a_fork() -> None:
    assert run_python(GROW, TORCHCONV_MEMORY_POOL="1") == "both right"


def test_without_the_growth_library_growing_is_an_error_and_moves_nothing() -> None:
    message = run_python(CANNOT_GROW, TORCHCONV_MEMORY_POOL="1")
    assert "storage that is not resizable" in message


def test_environment() -> None:
    enabled, limit, fresh = run_python(ENVIRONMENT, TORCHCONV_MEMORY_POOL="0").split()
    assert (enabled, fresh) == ("0", "0")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path) and (text := Path(path).read_text().strip()).isdigit():
            memory = min(memory, int(text))
    assert int(limit) == max(memory // 8, min(1 << 30, memory // 2))
    _, limit, fresh = run_python(
        ENVIRONMENT, TORCHCONV_MEMORY_POOL="1", TORCHCONV_MEMORY_POOL_LIMIT="5000000"
    ).split()
    assert limit == "5000000" and int(fresh) >= 1
