"""Kernels that are chosen by whether a processor does a vector of AVX-512 at once or half after
half (csrc/cpu/processor.h): their tests for either kind, on whichever is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchconv import _load


@pytest.mark.cpu_only
@pytest.mark.skipif(_load.isa() != "avx512", reason="only AVX-512 has such vectors")
@pytest.mark.parametrize("tests", ["test_depthwise.py", "test_shared_vector.py"])
@pytest.mark.parametrize("halves", ["0", "1"])
def test_either_kind(halves: str, tests: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if tests == "test_depthwise.py":
        command += ["-k", "minimal_filtering or explained"]
    done = subprocess.run(
        [*command, tests],
        cwd=Path(__file__).parent,
        env={**os.environ, "TORCHCONV_HALF_VECTORS": halves},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
