"""Runs tests with kernels that are built for AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [arguments of pytest]

Whatever reads or writes outside its memory, or does what C++ leaves undefined, ends the run with a
report. The library has a cache of its own (build/sanitize), so no other build is touched. Without
arguments it is the tests of the kernels and of the memory pool.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "test_pool2d.py", "test_pool2d_special.py", "test_adaptive_pool2d.py", "test_memory_pool.py",
    "test_conv2d.py", "test_conv2d_16bit.py", "test_conv2d_activation.py", "test_errors.py",
    "test_properties.py", "test_batch_norm.py",
    "test_winograd.py", "test_winograd_float64.py", "test_winograd_strided.py",
    "test_winograd_wgrad.py",
    "test_direct_wgrad.py", "test_gemm.py", "test_gemm_nchw.py", "test_grouped.py",
    "test_depthwise.py", "test_conv2d_residual.py", "test_few_channels.py", "test_shared_vector.py",
    "test_tap_runs.py", "test_plane_taps.py", "test_sample_patches.py",
)  # fmt: skip
# Leaks are not looked for: Python leaves memory behind at exit.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def runtimes(compiler: list[str]) -> list[str]:
    """What must be in the process before Python: the sanitizers, and the C++ library they watch."""
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()
        for name in libraries
    ]
    missing = [path for path in found if not os.path.isabs(path)]
    if missing:
        raise SystemExit(f"{compiler[0]} has no {', '.join(missing)}: install its sanitizers")
    return found


def main(arguments: list[str]) -> int:
    os.environ["TORCHCONV_SANITIZE"] = "1"
    os.environ["TORCHCONV_CACHE_DIR"] = str(ROOT / "build" / "sanitize")
    sys.path.insert(0, str(ROOT))
    from torchconv import _load, _toolchain

    print(f"built {_load.prepare().relative_to(ROOT)}", flush=True)
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(runtimes(_toolchain.compiler()))}
    selected = arguments or [str(ROOT / "tests" / name) for name in TESTS]
    # What a sanitizer says would be lost with a captured stderr, and it ends the process: for good.
    options = ["--capture=sys", "-p", "no:cacheprovider", "-n", "auto", "--maxprocesses", "8"]
    options += ["--dist", "worksteal", "--max-worker-restart", "0"]
    command = [sys.executable, "-m", "pytest", *options, *selected]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
