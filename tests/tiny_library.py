"""A tiny source tree in the place of csrc (its two files have one name, as csrc/ops and csrc/cpu
do), which compiles in a fraction of a second, and what the tests of building and loading do to it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchconv import _build, _load

ROOT = Path(__file__).resolve().parent.parent
NOWHERE = Path("/nonexistent")
VARIABLES = (
    "CXX", "MAX_JOBS", "TORCHCONV_BUILD_TIMEOUT", "TORCHCONV_CACHE_DIR", "TORCHCONV_QUIET",
    "TORCHCONV_SANITIZE", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME",
)  # fmt: skip


def make_sources(root: Path, answer: int = 42) -> Path:
    files = {
        "core/answer.h": f"#pragma once\nconstexpr int kAnswer = {answer};\n",
        "cpu/same.cpp": '#include "core/answer.h"\nint answer() { return kAnswer; }\n',
        "ops/same.cpp": (
            "int answer();\n"
            'extern "C" __attribute__((visibility("default"))) int torchconv_answer() '
            "{ return answer(); }\n"
        ),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def answer_of(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).torchconv_answer())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_sources(tmp_path / "csrc")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHCONV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def get(root: Path, prebuilt: Path = NOWHERE) -> Path:
    """What load() does in a process that has loaded nothing yet."""
    return _load._open("default", root, prebuilt)


def compiled(cache: Path) -> list[str]:
    """The libraries' folders, and whatever else is not a lock."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def write_compiler(path: Path, body: str) -> str:
    """A C++ compiler that does something first."""
    path.write_text(f'#!/bin/sh\nif [ "$1" != --version ]; then\n{body}\nfi\nexec c++ "$@"\n')
    path.chmod(0o755)
    return str(path)


# An interrupt must arrive even where the tests were started with it ignored, as by nohup.
SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from torchconv import _load
path = _load.load(Path(sys.argv[1]), Path("/nonexistent"))
print(path)
"""


def start(root: Path, script: str = SCRIPT, **environment: str) -> subprocess.Popen[str]:
    """A new process that loads the library; in a group of its own, to be ended as a whole."""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(root)], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default", **environment},
    )  # fmt: skip


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit, f"{path} never came"
        time.sleep(0.02)


def make_foreign(library: Path) -> None:
    """A library whose record is right but which this system cannot open."""
    library.write_bytes(b"\x7fELF of another machine")
    record = json.loads(library.with_suffix(".json").read_text())
    record["sha256"] = _build._sha256(library)
    library.with_suffix(".json").write_text(json.dumps(record))
