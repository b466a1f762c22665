"""The bar chart of a report: how many times faster than the peer, a bar for each problem.

The axis is logarithmic and bars start at 1, so that twice as fast and twice as slow are bars of
equal length, to the right in green and to the left in red.
"""

from __future__ import annotations

from pathlib import Path

# A Figure without pyplot writes files and needs no display.
from matplotlib.figure import Figure

from benchmarks.report import Report

GREEN, RED = "#2a7f62", "#c8553d"
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(report: Report, path: Path) -> None:
    """A row of panels for each dtype, in it one for each pass and layout, a bar for a problem."""
    timed = [result for result in report.results if result.ratio is not None]
    if not timed:
        return
    labels = list(dict.fromkeys((result.group, result.problem) for result in timed))
    dtypes = list(dict.fromkeys(result.dtype for result in timed))
    columns = list(dict.fromkeys((result.pass_name, result.layout) for result in timed))
    ratios = {
        (result.dtype, result.pass_name, result.layout, result.group, result.problem): result.ratio
        for result in timed
        if result.ratio is not None
    }
    left, right = min(0.8, min(ratios.values()) / 1.2), 1.6 * max(2.0, *ratios.values())
    height = 0.4 + 0.24 * len(labels)
    figure = Figure(
        figsize=(3.5 + 2.8 * len(columns), 1.4 + height * len(dtypes)), layout="constrained"
    )
    axes = figure.subplots(len(dtypes), len(columns), sharex=True, sharey=True, squeeze=False)
    groups = len({group for group, _ in labels}) > 1
    names = [f"{problem}  ({group})" if groups else problem for group, problem in labels]
    for axis, panel in zip(
        axes.flat, ((d, *column) for d in dtypes for column in columns), strict=True
    ):
        for position, label in enumerate(labels):
            ratio = ratios.get((*panel, *label))
            if ratio is None:
                continue
            axis.barh(position, ratio - 1, left=1, color=GREEN if ratio >= 1 else RED)
            axis.annotate(
                f"{ratio:.2f}",
                (max(ratio, 1), position),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(" ".join(panel if len(dtypes) > 1 else panel[1:]), fontsize=9)
        axis.set_xscale("log")
        axis.set_xlim(left, right)
        axis.set_xticks([tick for tick in TICKS if left < tick < right])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_yticks(range(len(labels)), names)
        axis.set_ylim(len(labels) - 0.4, -0.6)  # the first problem at the top
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    machine = report.machine
    figure.suptitle(report.title, fontsize=11)
    figure.supxlabel(
        f"{report.peer} time / torchconv time, above 1 torchconv is faster\n"
        f"{machine.get('cpu', '')}, {machine.get('threads', '?')} threads, "
        f"{machine.get('isa', '')}, torch {machine.get('torch', '?')}",
        fontsize=8,
    )
    figure.savefig(path, dpi=150)
