"""What the GPU's numbers were measured on: its description, and its measured floor (machine.py)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from statistics import median

import torch

from benchmarks import machine

# float32 products rounded to TF32, as torch.backends.cudnn.allow_tf32 allows; float32 is exact.
TF32 = "tf32"


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = torch.float32 if name == TF32 else getattr(torch, name)
    return dtype


def _seconds(call: Callable[[], object], repeats: int = 9) -> float:
    call()
    times = []
    for _ in range(repeats):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return median(times)


def _copy_bandwidth(megabytes: int) -> float:
    source = torch.randn(megabytes << 18, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e9 / _seconds(lambda: target.copy_(source))


def _matmul_rate(dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / 1e9 / _seconds(lambda: torch.matmul(a, b, out=out))


def measure_floor(dtypes: Sequence[str], megabytes: int = 1024, size: int = 8192) -> machine.Floor:
    """Copy bandwidth, and the rate of a large matrix product of random values in each dtype."""
    copy = _copy_bandwidth(megabytes)
    peak = {}
    allowed = torch.backends.cuda.matmul.allow_tf32
    for name in dtypes:
        torch.backends.cuda.matmul.allow_tf32 = name == TF32
        exact = name in ("float32", "float64")
        peak[name] = _matmul_rate(torch_dtype(name), size // 2 if exact else size)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    # What kernels are held to is the copy: reading alone is no faster on a GPU.
    return machine.Floor(copy, 0.0, peak)


def cache_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def slug() -> str:
    """The GPU's name for a file: nvidia-h100-80gb-hbm3."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no-gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe() -> dict[str, str]:
    if not torch.cuda.is_available():
        return machine.describe()
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "compute capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": f"{gpu.multi_processor_count}",
        "memory": f"{gpu.total_memory / 2**30:.0f} GiB, L2 {cache_bytes() / 2**20:.0f} MiB",
        "driver": _driver(),
        "cuda": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        **machine.describe(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]
