"""Results as a table on the terminal, a Markdown file, a JSON file and a PNG bar chart.

A ratio is the peer's time over ours: above 1, torchconv is faster. Means of ratios are geometric,
so that a ratio and its inverse cancel. Rows without a ratio (a wrong result, or a library that
refused the problem) are listed with their reason and enter no mean.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import exp, log
from pathlib import Path

from tabulate import tabulate

from benchmarks.timing import Timing


@dataclass(frozen=True)
class Result:
    """One row: a problem (or a network) in one dtype, layout and pass."""

    group: str
    problem: str
    kind: str
    dtype: str
    layout: str
    pass_name: str
    ours: Timing | None = None
    peer: Timing | None = None
    rate: float | None = None
    unit: str = ""
    floor_fraction: float | None = None
    error: float | None = None  # the largest relative error of ours, over the pass's tensors
    peer_error: float | None = None
    failure: str = ""
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        if self.ours is None or self.peer is None or self.failure:
            return None
        return self.peer.median / self.ours.median


@dataclass(frozen=True)
class Report:
    """All the rows of a run, with what they were measured on."""

    title: str
    peer: str
    machine: dict[str, str]
    results: Sequence[Result]
    floor: dict[str, object] = field(default_factory=dict)
    columns: Sequence[str] = ()  # names in Result.extra that the table shows

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if result.failure]


def geometric_mean(ratios: Sequence[float]) -> float:
    return exp(sum(map(log, ratios)) / len(ratios))


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 10**digits else f"{value:.{digits}g}"


def rows_table(report: Report, style: str = "simple") -> str:
    """Every row, in the order of measuring; columns that say nothing are left out."""
    varying = len({(result.group, result.dtype) for result in report.results}) > 1
    columns: dict[str, list[str]] = {}
    for result in report.results:
        cells = {"problem": result.problem}
        if varying:
            cells |= {"group": result.group, "dtype": result.dtype}
        cells |= {"layout": result.layout, "pass": result.pass_name}
        for library, timing in (("torchconv", result.ours), (report.peer, result.peer)):
            cells[f"{library} ms"] = "" if timing is None else _number(timing.median * 1e3, 4)
        ratio = result.ratio
        cells["ratio"] = "failed" if ratio is None else f"{ratio:.2f}"
        timings = [timing for timing in (result.ours, result.peer) if timing is not None]
        spreads = [timing.spread for timing in timings if timing.spread is not None]
        cells["spread"] = f"{max(spreads):.0%}" if spreads else ""
        cells |= {name: _number(result.extra.get(name), 4) for name in report.columns}
        cells["rate"] = f"{_number(result.rate)} {result.unit}" if result.rate else ""
        fraction = result.floor_fraction
        cells["of floor"] = "" if fraction is None else f"{fraction:.2f}"
        cells["error"] = "" if result.error is None else f"{result.error:.1e}"
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    text = ("problem", "group", "dtype", "layout", "pass")
    alignment = ["left" if name in text else "right" for name in columns]
    rows = list(zip(*columns.values(), strict=True))
    return tabulate(rows, list(columns), style, colalign=alignment, disable_numparse=True)


def means_table(report: Report, style: str = "simple") -> str:
    """Geometric means of the ratios: a line for each group and kind, a column for pass and layout.

    A cell holds the mean, then the smallest ratio when there are several, and the mean fraction of
    the floor.
    """
    timed = [result for result in report.results if result.ratio is not None]
    if not timed:
        return "No row was timed."
    columns = dict.fromkeys((result.pass_name, result.layout) for result in timed)
    dtypes = list(dict.fromkeys(result.dtype for result in timed))
    selections = [("group", group) for group in dict.fromkeys(result.group for result in timed)]
    several_groups = len(selections) > 1
    kinds = list(dict.fromkeys(result.kind for result in timed))
    selections += [("kind", kind) for kind in kinds] if len(kinds) > 1 else []
    selections += [("all", "")] if several_groups else []
    rows = []
    for what, name in selections:
        for dtype in dtypes:
            chosen = [
                result
                for result in timed
                if result.dtype == dtype and (what == "all" or getattr(result, what) == name)
            ]
            if chosen:
                row = [what, name] + [dtype] * (len(dtypes) > 1)
                rows.append(row + [_mean_cell(chosen, *column) for column in columns])
    headers = ["", ""] + ["dtype"] * (len(dtypes) > 1) + [" ".join(column) for column in columns]
    return tabulate(rows, headers, style, disable_numparse=True)


def _mean_cell(results: Sequence[Result], pass_name: str, layout: str) -> str:
    chosen = [each for each in results if (each.pass_name, each.layout) == (pass_name, layout)]
    ratios = [each.ratio for each in chosen if each.ratio is not None]
    if not ratios:
        return ""
    notes = [f"min {min(ratios):.2f}"] if len(ratios) > 1 else []
    fractions = [each.floor_fraction for each in chosen if each.floor_fraction]
    if fractions:
        notes.append(f"{geometric_mean(fractions):.2f} of floor")
    return f"{geometric_mean(ratios):.2f}" + (f" ({', '.join(notes)})" if notes else "")


def failures_list(report: Report) -> str:
    return "\n".join(
        f"- {result.problem}, {result.dtype}, {result.layout}, {result.pass_name}: {result.failure}"
        for result in report.failures
    )


def as_text(report: Report) -> str:
    """What is printed at the end of a run."""
    meaning = (
        f"Ratio: {report.peer} time / torchconv time, above 1 torchconv is faster. "
        "Spread: distance of the quartiles over the median, the larger of the two."
    )
    parts = [rows_table(report), f"{meaning}\nGeometric means of the ratios:", means_table(report)]
    if report.failures:
        parts.append("Not timed:\n" + failures_list(report))
    parts.append("\n".join(f"{key}: {value}" for key, value in report.machine.items()))
    return "\n\n".join(parts)


def as_markdown(report: Report) -> str:
    machine = tabulate(list(report.machine.items()), ["", ""], tablefmt="github")
    parts = [
        f"# {report.title}",
        f"Ratio is {report.peer}'s time over torchconv's: above 1, torchconv is faster. "
        "`of floor` is the machine's measured floor over our time, `spread` the distance of the "
        "quartiles over the median, the larger of the two libraries'. How it is measured: "
        "[README](../README.md).",
        "## Geometric means of the ratios",
        means_table(report, "github"),
        "## Rows",
        rows_table(report, "github"),
    ]
    if report.failures:
        parts += ["## Not timed", failures_list(report)]
    parts += ["## Machine", machine]
    return "\n\n".join(parts) + "\n"


def as_json(report: Report) -> str:
    rows = [{**asdict(result), "ratio": result.ratio} for result in report.results]
    content: dict[str, object] = {
        "title": report.title,
        "peer": report.peer,
        "machine": report.machine,
    }
    content |= {"floor": report.floor, "rows": rows}
    return json.dumps(content, indent=1) + "\n"


def write(report: Report, base: Path) -> list[Path]:
    """Write <base>.json, <base>.md and <base>.png; the paths that were written."""
    from benchmarks.chart import draw  # needs matplotlib, the tables do not

    base.parent.mkdir(parents=True, exist_ok=True)
    paths = [base.parent / (base.name + suffix) for suffix in (".json", ".md", ".png")]
    paths[0].write_text(as_json(report), encoding="utf-8")
    paths[1].write_text(as_markdown(report), encoding="utf-8")
    draw(report, paths[2])
    return [path for path in paths if path.is_file()]


def publish(report: Report, base: Path) -> None:
    """Print the tables, write the files, and say on stderr which."""
    print(as_text(report))
    for path in write(report, base):
        print(f"wrote {path}", file=sys.stderr)
