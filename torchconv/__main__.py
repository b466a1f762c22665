"""`python -m torchconv` prints what a bug report needs; with --build it compiles what is missing.

Printing never compiles. --build is for an image or a cluster whose nodes have no compiler: run it
where there is one, and ship the cache folder.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import torch

import torchconv

from . import _build, _load, _toolchain

ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY", "CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS", "OMP_NUM_THREADS",
    "TORCHCONV_BUILD_TIMEOUT", "TORCHCONV_CACHE_DIR", "TORCHCONV_CUTLASS_DIR", "TORCHCONV_ISAS",
    "TORCHCONV_QUIET", "TORCHCONV_SANITIZE", "TORCHCONV_SOURCES_ONLY", "TORCH_CUDA_ARCH_LIST",
    "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME",
)  # fmt: skip


def _or_fault(what: object) -> str:
    """What a function returns, or the first line of why it cannot."""
    try:
        return str(what() if callable(what) else what)
    except _toolchain.BuildError as error:
        return f"none: {str(error).splitlines()[0].rpartition('library: ')[2]}"


# What is lost without each of the libraries that are bound to one PyTorch.
_BOUND = {
    _build.GROWTH_LIBRARY: "large outputs cannot grow in place",
    _build.RECORDED_LIBRARY: "small layers train more slowly",
    _build.WATCH_LIBRARY: "calls of fused networks take longer",
}


def _libraries() -> list[tuple[str, str]]:
    """Each library ahead of time, and the one that this CPU runs."""
    root, rows = _build.source_root(), []
    for isa in _build.isas():
        path = _load.prebuilt_dir() / _build.library_name(isa)
        if not path.exists():
            state = "none"
        elif root.is_dir() and (fault := _build.fault(path, _build.source_hash(isa, root))):
            state = f"{path} ({fault}: will not be used)"
        else:
            state = str(path)
        rows.append((f"prebuilt {isa}", state))
    library = _load.library_path()
    rows.append(("library for this CPU", str(library or "none yet (JIT)")))
    if library is not None:
        for name, loss in _BOUND.items():
            bound = library.parent / name
            fault = _build.bound_fault(bound)
            refused = f" ({fault}: {loss})" if fault else ""
            rows.append(("bound to PyTorch", f"{bound}{refused}"))
    record = _build.read_record(library or Path())
    if record is not None:
        rows.append(("built with", f"torch {record.torch}, {record.compiler}"))
        rows.append(("built as", record.build_hash))
    return rows


def _cuda() -> list[tuple[str, str]]:
    rows = [("CUDA of PyTorch", str(torch.version.cuda or "none (CPU build)"))]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            rows.append((f"CUDA device {index}", f"{name}, sm_{major}{minor}"))
    elif torch.version.cuda:
        rows.append(("CUDA device", "none"))
    else:
        return rows
    rows.append(("CUDA compiler", _or_fault(_toolchain.nvcc_version)))
    rows.append(("CUTLASS", ", ".join(map(str, _toolchain.cutlass_includes())) or "none"))
    library = _load.library_path(_build.CUDA)
    rows.append(("CUDA library", str(library or "none yet (JIT)")))
    return rows


def report() -> list[tuple[str, str]]:
    """The rows of the report, as (what, value)."""
    return [
        ("torchconv", f"{torchconv.__version__} in {Path(torchconv.__file__).parent}"),
        ("torch", f"{torch.__version__} in {Path(torch.__file__).parent}"),
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("system", f"{platform.platform()}, {platform.machine()}"),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("instruction set", _load.isa()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()}"),
        ("sources", str(_build.source_root())),
        ("build hash", _or_fault(_load.build_hash)),
        *_libraries(),
        ("cache folders", ", ".join(map(str, _load.cache_dirs()))),
        ("compiler", _or_fault(_toolchain.compiler_version)),
        ("ninja", _or_fault(_toolchain.find_ninja)),
        *_cuda(),
        *((name, os.environ[name]) for name in ENVIRONMENT if name in os.environ),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torchconv", description=__doc__.split(";")[0])
    parser.add_argument(
        "--build",
        action="store_true",
        help="compile the libraries for this CPU and, with nvcc and a PyTorch for CUDA, for GPUs",
    )
    if parser.parse_args(arguments).build:
        try:
            _load.load()
            if _load.serves_cuda():
                _load.prepare(_build.CUDA)
        except _load.BuildError as error:
            print(error, file=sys.stderr)
            return 1
    rows = report()
    width = max(len(what) for what, _ in rows)
    for what, value in rows:
        print(f"{what:{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
