"""What the numbers were measured on: the machine's description, and its measured floor.

The floor is what this machine can do with no overhead at all, measured once in every process on the
same threads: the bandwidth of copying and of reading a tensor far larger than the caches, with
PyTorch's own operations, and the rate of multiply-adds in registers in each dtype (_peak.py).
A problem's floor time is max(operations / peak, bytes / bandwidth), its fraction floor / measured.
Above 1 means that the tensors stayed in cache, or that Winograd did fewer operations.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.problems import DTYPES
from torchconv import _peak

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Floor:
    """GB/s and GFLOP/s (10^9 a second)."""

    copy_bandwidth: float  # bytes read and bytes written both count
    read_bandwidth: float
    peak: dict[str, float]

    def seconds(self, operations: float, moved: float, dtype: str) -> float:
        """No run of a problem with these counts can be faster, tensors coming from memory."""
        bandwidth = max(self.copy_bandwidth, self.read_bandwidth)
        return max(operations / self.peak[dtype], moved / bandwidth) / 1e9


def _best(call: Callable[[], object], repeats: int = 7) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _bandwidths(megabytes: int) -> tuple[float, float]:
    source = torch.ones(megabytes << 18)
    target = torch.zeros_like(source)
    moved = source.nbytes / 1e9
    copy = _best(lambda: target.copy_(source))
    read = _best(lambda: source.sum())
    return 2 * moved / copy, moved / read


def measure_floor(dtypes: Sequence[str], megabytes: int = 256) -> Floor:
    """Measure the floor with the current number of threads, in less than a second."""
    threads = torch.get_num_threads()
    names = dict.fromkeys(("float32", *dtypes))
    peaks = {name: _peak.peak(getattr(torch, name), threads) for name in names}
    return Floor(*_bandwidths(megabytes), peaks)


def describe() -> dict[str, str]:
    """What a reader needs to judge the numbers, and nothing that identifies the machine's owner."""
    info = {
        "cpu": _cpu_model(),
        "cores": f"{os.cpu_count()}",
        "threads": f"{torch.get_num_threads()}",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
    }
    try:
        info["torchconv"] = importlib.metadata.version("torchconv")
    except importlib.metadata.PackageNotFoundError:
        import torchconv

        info["torchconv"] = getattr(torchconv, "__version__", "not installed")
    info["commit"] = _commit()
    return info


def warn_if_busy() -> str:
    """The load average, with a warning when other processes will spoil the times."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return "unknown"
    if load > 0.5 * (os.cpu_count() or 1):
        print(f"The machine is busy (load {load:.1f}): times will be too long.", file=sys.stderr)
    return f"{load:.1f}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in reversed(lines))  # reversed: the first core counts
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    name = fields.get("model name") or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def _caches() -> str:
    """For example `L1d 48K, L2 1024K, L3 32768K`, as core 0 sees them; empty where not readable."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text(encoding="utf-8").strip()
                for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    # Result files of an earlier run do not change what is measured.
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return commit + (" + uncommitted changes" if changes else "")


def known_dtypes(names: Sequence[str]) -> list[str]:
    """The names, checked against those that the benchmarks know."""
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"unknown dtype {name!r}, expected some of: {', '.join(DTYPES)}")
    return list(names)
