"""Times torchconv's operators against PyTorch (cuDNN, ATen) on a GPU.

    python -m benchmarks.gpu

The problems are those of benchmarks/shapes/gpu. For each, both libraries are called once and
compared with PyTorch in a wider type; only right results are timed, as CUDA graphs (gpu_timing.py),
with cuDNN searching for its best algorithm. Writes a table (.md) and every number (.json) to
benchmarks/results, named after the GPU, and prints a summary. --device cpu tries out the script on
small sizes and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks import gpu_cases, gpu_machine, gpu_timing, report, timing
from benchmarks.gpu_cases import BACKWARD, LIBRARIES, PASSES, Call, Wanted
from benchmarks.machine import Floor

RESULTS = Path(__file__).parent / "results"
# A peer with more than this many times the tolerated error is wrong, not just less accurate.
PEER_SLACK = 16
PEER_IS_WRONG = "torch is wrong"  # which a row says, and which is not our failure


class DeviceLost(Exception):
    """A kernel broke this process's CUDA context. Carries the row that did it."""

    def __init__(self, row: report.Result) -> None:
        super().__init__(row.failure)
        self.row = row


def call_once(
    library: str, wanted: Wanted, inputs: gpu_cases.Inputs, pass_name: str, like: list[Tensor]
) -> dict[str, Tensor]:
    """One call's results, by name. like: tensors whose memory it may get, filled with NaN."""
    call = gpu_cases.make_call(library, wanted.problem, inputs, pass_name)
    for t in like:
        t.fill_(float("nan"))
    like.clear()
    results = call()
    return dict(zip(gpu_cases.names(wanted.problem, pass_name), results, strict=True))


def verdict(library: str, errors: dict[str, float], wanted: Wanted, slack: float = 1.0) -> str:
    """Why a result must not be timed; empty for a right one."""
    for name, error in errors.items() or [("all", float("nan"))]:
        allowed = slack * gpu_cases.tolerance(wanted, name)
        if not error <= allowed:  # a NaN too
            found = f"{name} has a relative error of {error:.1e}, above {allowed:.1e}"
            return f"{library} is wrong: {found}"
    return ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


def _check_device(device: str, row: report.Result) -> None:
    """After an error: whether the process can go on."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=device).item()
        except RuntimeError as error:
            raise DeviceLost(replace(row, failure=f"{row.failure}; {_first_line(error)}")) from None


def _time(calls: Sequence[Sequence[Call]], device: str, budget: float) -> list[timing.Timing]:
    if device == "cuda":
        return gpu_timing.interleave(calls, budget)
    return timing.interleave([sets[0] for sets in calls], budget, 1, 3)


def measure(wanted: Wanted, device: str, floor: Floor, budget: float) -> list[report.Result]:
    """A row for each pass: checked, then timed."""
    problem = wanted.problem
    row = report.Result(
        problem.group, str(problem), problem.kind, wanted.dtype, wanted.layout, "",
        note=problem.note,
    )  # fmt: skip
    tf32 = wanted.dtype == gpu_machine.TF32
    # The search would try every algorithm at a size where one takes seconds.
    search = problem.group != "huge"
    with gpu_cases.cudnn(search=search, tf32=tf32), torch.no_grad():
        cache = gpu_machine.cache_bytes() if device == "cuda" else 0
        sets = gpu_cases.make_inputs(wanted, device, cache)
        candidates: dict[str, dict[str, Tensor]] = {}
        refused: dict[str, str] = {}
        for pass_name in wanted.passes:
            poisoned: list[Tensor] = []
            for library in reversed(LIBRARIES):  # the peer's outputs are like ours
                try:
                    results = call_once(library, wanted, sets[0], pass_name, poisoned)
                except Exception as error:
                    refused[pass_name] = f"{library} failed: {_first_line(error)}"
                    _check_device(
                        device, replace(row, pass_name=pass_name, failure=refused[pass_name])
                    )
                    continue
                candidates[f"{library} {pass_name}"] = results
                poisoned = [torch.empty_like(t) for t in results.values()]
        errors = gpu_cases.relative_errors(wanted, sets[0], candidates)
        candidates.clear()
        rows = []
        for pass_name in wanted.passes:
            now = replace(row, pass_name=pass_name, failure=refused.get(pass_name, ""))
            if not now.failure:
                ours, theirs = (errors[f"{library} {pass_name}"] for library in LIBRARIES)
                failure = verdict("torchconv", ours, wanted) or verdict(
                    "torch", theirs, wanted, PEER_SLACK
                )
                now = replace(
                    now, error=max(ours.values()), peer_error=max(theirs.values()), failure=failure
                )
            if not now.failure:
                try:
                    calls = [
                        [
                            gpu_cases.make_call(library, problem, inputs, pass_name)
                            for inputs in sets
                        ]
                        for library in LIBRARIES
                    ]
                    now = timed(now, wanted, _time(calls, device, budget), floor)
                    del calls
                except Exception as error:
                    now = replace(now, failure=f"timing failed: {_first_line(error)}")
                    _check_device(device, now)
            rows.append(now)
    return rows


def timed(
    row: report.Result, wanted: Wanted, timings: Sequence[timing.Timing], floor: Floor
) -> report.Result:
    problem, pass_name = wanted.problem, row.pass_name
    operations = gpu_cases.operations(problem, pass_name)
    itemsize = gpu_machine.torch_dtype(wanted.dtype).itemsize
    moved = gpu_cases.minimal_bytes(problem, pass_name, itemsize)
    least, seconds = floor.seconds(operations, moved, wanted.dtype), timings[0].median
    by_bytes = problem.pooling or problem.groups > 1
    return replace(
        row,
        ours=timings[0],
        peer=timings[1],
        rate=(moved if by_bytes else operations) / seconds / 1e9,
        unit="GB/s" if by_bytes else "GFLOP/s",
        floor_fraction=least / seconds,
        extra={"operations": operations, "bytes": moved, "floor_ms": 1e3 * least},
    )


def summary(results: Sequence[report.Result]) -> str:
    """A line for each group, dtype, layout and pass: mean ratio and mean fraction of the floor."""
    cells: dict[tuple[str, ...], list[report.Result]] = {}
    for row in results:
        cells.setdefault((row.group, row.dtype, row.layout, row.pass_name), []).append(row)
    table = []
    for key, rows in cells.items():
        good = [row for row in rows if row.ratio is not None and row.floor_fraction]
        line: list[str] = [*key, f"{len(good)}/{len(rows)}"]
        if good:
            ratios = [row.ratio for row in good if row.ratio is not None]
            floors = [row.floor_fraction for row in good if row.floor_fraction is not None]
            line += [f"{report.geometric_mean(ratios):.2f}", f"{min(ratios):.2f}"]
            line += [f"{report.geometric_mean(floors):.2f}", f"{min(floors):.2f}"]
        table.append(line)
    headers = ["group", "dtype", "layout", "pass", "right", "ratio", "min", "of floor", "min"]
    return tabulate(table, headers, disable_numparse=True)


def slowest(results: Sequence[report.Result], count: int = 15) -> str:
    """The rows where the peer is furthest ahead."""
    behind = [(row.ratio, row) for row in results if row.ratio is not None and row.ratio < 1]
    behind.sort(key=lambda pair: pair[0])
    table = [
        [row.problem, row.dtype, row.layout, row.pass_name, f"{row.ours.median * 1e3:.4f}",
         f"{ratio:.2f}", f"{row.floor_fraction or 0:.2f}"]
        for ratio, row in behind[:count]
        if row.ours is not None
    ]  # fmt: skip
    headers = ["behind PyTorch", "dtype", "layout", "pass", "ms", "ratio", "of floor"]
    return tabulate(table, headers, disable_numparse=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Time torchconv against PyTorch on a GPU, after checking both for equality.",
    )
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: try out, on small sizes")
    add("--filter", help="only cases whose printed form, as in the progress, contains this text")
    add("--passes", default=",".join(PASSES), help="comma-separated (default: %(default)s)")
    add("--budget", type=float, default=0.05, help="seconds for one row (default: %(default)s)")
    add("--seconds", type=float, default=600, help="begin no case later (default: %(default)s)")
    add(
        "--quick",
        action="store_true",
        help="the first two problems of each kind, a fifth of the budget",
    )
    add(
        "--output",
        type=Path,
        help="where to write, without suffix (default: in benchmarks/results)",
    )
    add("--resume", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.passes = tuple(options.passes.split(","))
    for name in options.passes:
        if name not in PASSES:
            parser.error(f"unknown pass {name!r}, expected some of: {', '.join(PASSES)}")
    return options


def small(wanted: Wanted) -> Wanted:
    """The same on a size that a CPU does in milliseconds."""
    problem = wanted.problem
    window = max(problem.kernel) * max(problem.dilation)
    side = min(problem.h, max(9, window) + problem.stride[0])
    groups = min(problem.groups, 4)
    channels = problem.c // problem.groups * groups if problem.groups > 1 else min(problem.c, 8)
    channels = min(channels, 4 * groups)
    k = channels if problem.pooling or problem.groups > 1 else min(problem.k, 8)
    return replace(
        wanted, problem=replace(problem, n=2, c=channels, h=side, w=side, k=k, groups=groups)
    )


def select(options: argparse.Namespace) -> list[Wanted]:
    cases = []
    seen: dict[tuple[str, str, str], int] = {}
    for wanted in gpu_cases.planned():
        passes = tuple(name for name in wanted.passes if name in options.passes)
        key = (wanted.problem.group, wanted.dtype, wanted.layout)
        seen[key] = seen.get(key, 0) + 1
        if not passes or (options.filter and options.filter not in str(wanted)):
            continue
        if options.quick and seen[key] > 2:
            continue
        wanted = replace(wanted, passes=passes)
        cases.append(small(wanted) if options.device == "cpu" else wanted)
    return cases


def load_rows(path: Path) -> list[report.Result]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        for name in ("ours", "peer"):
            if fields[name] is not None:
                fields[name] = timing.Timing(**fields[name])
        rows.append(report.Result(**fields))
    return rows


def start_again(rows: Sequence[report.Result], base: Path, seconds: float) -> None:
    """In a fresh process, after the rows that there are: the CUDA context of this one is gone."""
    kept = base.with_name(base.name + ".rows")
    kept.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    arguments = sys.argv[1:]
    for name in ("--resume", "--seconds"):
        while name in arguments:
            at = arguments.index(name)
            del arguments[at : at + 2]
    arguments += ["--resume", str(kept), "--seconds", f"{max(seconds, 0):.0f}"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *arguments])


def write(summary_of: report.Report, base: Path) -> None:
    base.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", report.as_json), (".md", report.as_markdown)):
        path = base.with_name(base.name + suffix)
        path.write_text(text(summary_of), encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    begun = time.monotonic()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here (--device cpu tries out the script).", file=sys.stderr)
        return 1
    rows = load_rows(options.resume) if options.resume else []
    done = {(row.group, row.problem, row.dtype, row.layout) for row in rows}
    cases = [
        case
        for case in select(options)
        if (case.problem.group, str(case.problem), case.dtype, case.layout) not in done
    ]
    dtypes = sorted({case.dtype for case in cases})
    default = f"{gpu_machine.slug()}-quick" if options.quick else gpu_machine.slug()
    base = options.output or RESULTS / default
    torch.manual_seed(0)
    # Captures need a stream of their own, and a backward runs on its forward's.
    stream = (
        torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    )
    left_out = 0
    budget = options.budget / 5 if options.quick else options.budget
    with stream:
        if device == "cuda":
            floor = gpu_machine.measure_floor(dtypes)
        else:
            floor = Floor(10.0, 0.0, dict.fromkeys(dtypes, 100.0))
        for index, wanted in enumerate(cases):
            if time.monotonic() - begun > options.seconds:
                left_out = len(cases) - index
                break
            try:
                rows += measure(wanted, device, floor, budget)
            except DeviceLost as lost:
                rows.append(lost.row)
                print(f"{wanted}: the device is lost: {lost.row.failure}", file=sys.stderr)
                start_again(rows, base, options.seconds - (time.monotonic() - begun))
            except Exception as error:
                failure = f"not measured: {_first_line(error)}"
                row = report.Result(
                    wanted.problem.group, str(wanted.problem), wanted.problem.kind, wanted.dtype,
                    wanted.layout, BACKWARD, failure=failure,
                )  # fmt: skip
                traceback.print_exc()
                rows.append(row)
            print(f"{time.monotonic() - begun:6.1f} s  {wanted}", file=sys.stderr)
    peaks = ", ".join(f"{name} {rate / 1e3:.0f} TFLOP/s" for name, rate in floor.peak.items())
    measured = report.Report(
        title=f"torchconv against PyTorch on {gpu_machine.describe().get('gpu', 'the CPU, small')}",
        peer="torch",
        machine={
            **gpu_machine.describe(),
            "measured floor": f"copy {floor.copy_bandwidth:.0f} GB/s, {peaks}",
        },
        results=rows,
        floor=asdict(floor),
    )
    if device == "cuda" and rows:
        write(measured, base)
    parts = [summary(rows), slowest(rows)]
    if measured.failures:
        lines = report.failures_list(measured).splitlines()
        more = [f"... and {len(lines) - 12} more"] if len(lines) > 12 else []
        parts.append("\n".join(["Not timed:", *lines[:12], *more]))
    parts.append(measured.machine["measured floor"])
    if left_out:
        parts.append(f"No time was left for {left_out} of {len(cases)} cases.")
    print("\n\n".join(parts))
    own = [each for each in measured.failures if not each.failure.startswith(PEER_IS_WRONG)]
    return 1 if own or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
