"""Builds, tests and times the GPU's kernels on a machine that has one, in about five minutes.

    python -m tools.gpu_check [--steps build,tests,sanitizer,benchmark] [--seconds 285]

Runs with the PyTorch of the Python that is called, offline; CUTLASS's headers are those of
$TORCHCONV_CUTLASS_DIR, or of the package nvidia-cutlass. Every step is a process with a time limit
of its own, and the next ones run whatever became of it: the build at the first call, on all cores;
the tests that have a device, on CUDA alone; compute-sanitizer on one call of every operator; the
benchmark, which writes benchmarks/results/<gpu>. Logs go to build/gpu-check, and with the results
to $OUT, if that is set. The summary comes last.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float  # at most
    command: list[str]
    environment: dict[str, str]
    digest: Callable[[str], str]  # what the summary shows of the output


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str
    seconds: float
    digest: str

    @property
    def passed(self) -> bool:
        return self.status in ("passed", "not there")


def last_lines(count: int) -> Callable[[str], str]:
    return lambda text: "\n".join(text.strip().splitlines()[-count:])


def test_digest(text: str) -> str:
    """pytest's last line, the failures before it, and where the time went."""
    lines = text.strip().splitlines()
    failures = [line[:160] for line in lines if line.startswith(("FAILED", "ERROR"))]
    kinds: dict[str, int] = {}
    for line in failures:
        name = re.sub(r"\[.*", "", line.partition(" - ")[0])
        kinds[name] = kinds.get(name, 0) + 1
    counted = [f"{count} x {name}" for name, count in kinds.items()]
    return "\n".join([*failures[:15], *counted[:20], *lines[-1:]])


def sanitizer_digest(text: str) -> str:
    wanted = ("ERROR SUMMARY", "RACECHECK SUMMARY", "Invalid", "Race reported", "Error:", "calls")
    lines = [line for line in text.splitlines() if any(word in line for word in wanted)]
    return "\n".join(lines[:8] + lines[8:][-2:])


# The library for the CPU, which some tests compare with, is compiled beside it: the longest of the
# CUDA sources leaves most cores idle.
BUILD = """
import subprocess, sys, time
start = time.monotonic()
command = "from torchconv import _load; print(_load.prepare())"
cpu = subprocess.Popen([sys.executable, "-c", command])
from torchconv import _build, _load, _toolchain
print("CUTLASS:", *(_toolchain.cutlass_includes() or ["is not there"]))
print(_load.load_cuda(), f"{time.monotonic() - start:.1f} s", flush=True)
code = cpu.wait()
print(f"both {time.monotonic() - start:.1f} s")
sys.exit(code)
"""
DEVICE = """
import sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
assert torch.cuda.is_available(), "PyTorch finds no GPU"
print(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory >> 20, "MiB")
print(torch.cuda.mem_get_info(0)[0] >> 20, "MiB are free;",
      (torch.ones(3, device="cuda") * 2).sum().item(), "= 6")
"""


def workers() -> list[str]:
    """pytest-xdist's, where it is there: the tests are bound by Python, not by the GPU."""
    from importlib.util import find_spec

    count = min(8, (os.cpu_count() or 1) // 2)
    if find_spec("xdist") is None or count < 2:
        return []
    return ["-n", str(count), "--dist", "worksteal", "--max-worker-restart", "12"]


def steps(python: str = sys.executable) -> list[Step]:
    """In the order of running."""
    cache = os.environ.get("TORCHCONV_CACHE_DIR") or str(LOGS / "cache")
    quiet = {"TORCHCONV_QUIET": "1", "PYTHONUNBUFFERED": "1", "TORCHCONV_CACHE_DIR": cache}
    pytest = [python, "-m", "pytest", "-q", "--device", "cuda", "--within", "110", *workers()]
    pytest += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "-W", "ignore"]
    pytest += ["--tb", "short", "--durations", "8"]
    sanitizer = ["compute-sanitizer", "--print-limit", "20", "--error-exitcode", "9"]
    calls = [python, "-m", "tools.sanitizer_calls"]
    no_cache = {**quiet, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("device", 60, [python, "-c", DEVICE], quiet, last_lines(4)),
        Step("build", 200, [python, "-c", BUILD], quiet, last_lines(4)),
        Step("tests", 140, pytest, quiet, test_digest),
        Step("benchmark", 170, [python, "-m", "benchmarks.gpu"], quiet, last_lines(85)),
        Step(
            "memcheck", 60, [*sanitizer, "--tool", "memcheck", *calls], no_cache, sanitizer_digest
        ),
        Step("racecheck", 60, [*sanitizer, "--tool", "racecheck", *calls], quiet, sanitizer_digest),
    ]


GROUPS = {"sanitizer": ("memcheck", "racecheck"), "build": ("device", "build")}


def chosen(names: str, arguments: Sequence[str]) -> list[Step]:
    wanted = [each for name in names.split(",") for each in GROUPS.get(name, (name,))]
    found = [step for step in steps() if step.name in wanted]
    unknown = set(wanted) - {step.name for step in found}
    if unknown:
        raise SystemExit(f"unknown steps: {', '.join(sorted(unknown))}")
    return [
        replace(step, command=[*step.command, *arguments])
        if step.name in names.split(",")
        else step
        for step in found
    ]


def run(step: Step, limit: float, logs: Path) -> Outcome:
    """One step, in a process group of its own, so that nothing of it is left."""
    if shutil.which(step.command[0]) is None:
        return Outcome(step.name, "not there", 0, f"{step.command[0]} is not on PATH")
    if limit < 5:
        return Outcome(step.name, "no time left", 0, "")
    start = time.monotonic()
    log = logs / f"{step.name}.log"
    command = list(step.command)
    if step.name == "benchmark":  # it ends by itself in time to report
        command += ["--seconds", f"{max(limit - 20, 5):.0f}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **step.environment}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit)
            status = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = f"cut off after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    return Outcome(step.name, status, time.monotonic() - start, step.digest(text))


def copy_out(logs: Path, results: Path, since: float) -> None:
    """Eight files at most, without folders: logs in one, and the results that are new."""
    target = os.environ.get("OUT")
    if not target:
        return
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    whole = "".join(
        f"===== {log.name}\n{log.read_text(errors='replace')[-2_000_000:]}\n"
        for log in sorted(logs.glob("*.log"))
    )
    (folder / "gpu-check.log").write_text(whole)
    fresh = [path for path in results.glob("*") if path.suffix in (".json", ".md")]
    for path in sorted(path for path in fresh if path.stat().st_mtime >= since)[:6]:
        shutil.copy2(path, folder)


def summary(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for outcome in outcomes:
        lines.append(f"===== {outcome.name}: {outcome.status}, {outcome.seconds:.1f} s")
        lines += [f"  {line}" for line in outcome.digest.splitlines()]
    lines.append("===== " + ", ".join(f"{each.name}: {each.status}" for each in outcomes))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description="Build, test and time on a GPU."
    )
    add = parser.add_argument
    add("--steps", default="build,tests,benchmark,sanitizer", help="(default: %(default)s)")
    add("--seconds", type=float, default=285, help="for all together (default: %(default)s)")
    add("more", nargs="*", help="after --: arguments for the steps named in --steps, as in "
        "`--steps tests -- tests/test_pool2d.py`")  # fmt: skip
    options = parser.parse_args(arguments)
    begun, started = time.monotonic(), time.time()
    LOGS.mkdir(parents=True, exist_ok=True)
    for left in LOGS.glob("*.log"):
        left.unlink()
    outcomes = []
    for step in chosen(options.steps, options.more):
        left = options.seconds - (time.monotonic() - begun)
        outcomes.append(run(step, min(step.seconds, left), LOGS))
        print(f"{step.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.1f} s", flush=True)
        if step.name == "device" and not outcomes[-1].passed:
            break
    text = summary(outcomes)
    (LOGS / "summary.log").write_text(text + "\n")
    copy_out(LOGS, RESULTS, started)
    print(text)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
