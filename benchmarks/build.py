"""Times cold builds of the libraries against their limits.

    python -m benchmarks.build

A JIT build compiles this machine's instruction set at the first call, and someone waits for it; an
ahead-of-time build compiles all of them. Each runs in a fresh folder and without ccache, with as
many compilers at once as setup.py would start (MAX_JOBS). The limits are for two quiet cores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import machine, report
from benchmarks.run import RESULTS
from benchmarks.timing import Timing
from torchconv import _build, _load, _toolchain

LIMITS = {"JIT": 60.0, "ahead of time": 240.0}  # seconds
SLOWEST = 8  # files that the report names


def without_ccache() -> None:
    """For the builds of this process."""
    os.environ["CCACHE_DISABLE"] = "1"
    command = _toolchain.compiler()
    if Path(command[0]).name == "ccache" and len(command) > 1:
        os.environ["CXX"] = shlex.join(command[1:])


def file_seconds(build_dir: Path) -> dict[str, float]:
    """How long each object or library took, by ninja's log, the longest first."""
    seconds: dict[str, float] = {}
    for line in (build_dir / ".ninja_log").read_text().splitlines():
        if not line.startswith("#"):
            begin, end, _, name, _ = line.split("\t")
            seconds[name] = (int(end) - int(begin)) / 1e3
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def measure(what: str, isas: Sequence[str]) -> tuple[report.Result, dict[str, float]]:
    """One cold build, and the seconds of its files."""
    with (
        tempfile.TemporaryDirectory(prefix="torchconv-build-") as name,
        tqdm(desc=what, unit="file", file=sys.stderr) as bar,
    ):

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        begin = time.perf_counter()
        _build.compile_libraries(isas, _build.source_root(), Path(name), progress)
        taken = time.perf_counter() - begin
        files = file_seconds(Path(name))
    limit = LIMITS[what]
    row = report.Result(
        group="build",
        problem=f"{what}: {', '.join(isas)}",
        kind=what,
        dtype="",
        layout="cold",
        pass_name="build",
        ours=Timing.of([taken]),
        peer=Timing.of([limit]),
        extra={"files": len(files), "sum of files s": sum(files.values())},
    )
    return row, files


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.build", description="Time cold builds against their limits."
    )
    parser.add_argument("--builds", default=",".join(LIMITS), help=f"of {', '.join(LIMITS)}")
    parser.add_argument(
        "--output",
        type=Path,
        help="where to write, without suffix (default: in benchmarks/results)",
    )
    options = parser.parse_args(arguments)
    wanted = options.builds.split(",")
    if unknown := set(wanted) - set(LIMITS):
        parser.error(f"--builds: {', '.join(sorted(unknown))}: not of {', '.join(LIMITS)}")
    load = machine.warn_if_busy()
    without_ccache()
    own = _load.isa()
    results: list[report.Result] = []
    slowest: dict[str, float] = {}
    for what in wanted:
        row, files = measure(what, [own] if what == "JIT" else _build.isas())
        results.append(row)
        if not slowest:
            slowest = dict(list(files.items())[:SLOWEST])
    named = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in slowest.items())
    compiling = {
        "compiler": _toolchain.compiler_version(),
        "jobs": str(_toolchain.jobs()),
        "slowest files": named,
    }
    summary = report.Report(
        title="Cold builds against their limits",
        peer="limit",
        machine={**machine.describe(), "load before": load, **compiling},
        results=results,
        columns=["files", "sum of files s"],
    )
    report.publish(summary, options.output or RESULTS / "build")
    return 0


if __name__ == "__main__":
    sys.exit(main())
