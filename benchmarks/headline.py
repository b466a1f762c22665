"""Writes README.md's figures from the committed results.

    python -m benchmarks.headline

A cell is the geometric mean of PyTorch's time over torchconv's, over the rows of one kind of layer,
dtype, layout and pass, and the smallest of them; or an inference engine's for a network. Run it
after a benchmark whose results are kept; a test compares README.md with what this would write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.report import geometric_mean
from benchmarks.run import RESULTS

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks.headline: begin -->\n", "<!-- benchmarks.headline: end -->\n"

Row = dict[str, Any]  # as benchmarks.report writes it

# What each file's groups of shapes are called here.
LAYERS = {
    "resnet": "dense",
    "vgg": "dense",
    "segmentation": "dense",
    "deepbench": "dense",
    "depthwise": "depthwise",
    "grouped": "grouped",
    "lenet": "few channels",
    "awkward": "awkward",
    "pooling": "pooling",
    "norm": "batch norm",
}
NETWORKS = "models"
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
CPU_GROUPS = {*LAYERS, NETWORKS}
CPU_PASSES = ("forward", "forward_backward")
GPU_PASSES = ("forward", "backward")
LAYOUTS = ("nchw", "nhwc")


def mean_cell(rows: Sequence[Row]) -> str:
    """The ratios' mean and the smallest; empty for no ratio."""
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    if not ratios:
        return ""
    mean = f"{geometric_mean(ratios):.2f}"
    return f"{mean} ({min(ratios):.2f})" if len(ratios) > 1 else mean


def layers_table(rows: Sequence[Row], passes: Sequence[str], name: Callable[[Row], str]) -> str:
    """A line for each layer and dtype, a column for each layout and pass."""
    columns = [(layout, each) for layout in LAYOUTS for each in passes]
    lines: dict[tuple[str, str], list[str]] = {}
    names = list(dict.fromkeys(map(name, rows)))
    keys = dict.fromkeys((name(row), row["dtype"]) for row in rows)
    for key in sorted(keys, key=lambda key: names.index(key[0])):
        chosen = [row for row in rows if (name(row), row["dtype"]) == key]
        lines[key] = [
            mean_cell([row for row in chosen if (row["layout"], row["pass_name"]) == column])
            for column in columns
        ]
    headers = ["", "", *(f"{layout.upper()} {each.replace('_', '+')}" for layout, each in columns)]
    cells = [[*key, *line] for key, line in lines.items()]
    return tabulate(cells, headers, "github", disable_numparse=True)


def networks_table(rows: Sequence[Row], name: Callable[[Row], str]) -> str:
    """A column for each network, a line for each name."""
    networks = list(dict.fromkeys(row["problem"] for row in rows))
    lines = []
    for each in dict.fromkeys(map(name, rows)):
        ratios = {row["problem"]: mean_cell([row]) for row in rows if name(row) == each}
        lines.append([each, *(ratios.get(network, "") for network in networks)])
    return tabulate(lines, ["", *networks], "github", disable_numparse=True)


def load(results: Path, peers: Collection[str]) -> list[dict[str, Any]]:
    """Every report of the folder against one of these, in the order of the names."""
    reports = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json"))]
    return [each for each in reports if each["peer"].lower() in peers]


def the_machine(reports: Sequence[dict[str, Any]]) -> str:
    """What all were measured on, in words. Raises ValueError where they differ."""
    machines = [each["machine"] for each in reports]
    words = {
        f"{each['cpu']}, {each['threads']} threads, {each['isa']}, PyTorch {each['torch']}"
        for each in machines
    }
    if len(words) != 1:
        raise ValueError(f"results of several machines in one table: {'; '.join(sorted(words))}")
    return words.pop()


def figures(results: Path) -> str:
    """The part of README.md between the two marks."""
    reports = load(results, ("torch", "pytorch"))  # in eager mode
    engines = load(results, ENGINES)
    gpus = [each for each in reports if "gpu" in each["machine"]]
    rest = [each for each in reports if each not in gpus]
    cpus = [each for each in rest if {row["group"] for row in each["rows"]} <= CPU_GROUPS]
    cpu_rows = [row for each in cpus for row in each["rows"]]
    layers = [row for row in cpu_rows if row["group"] in LAYERS and row["pass_name"] in CPU_PASSES]
    order = list(dict.fromkeys(LAYERS.values()))
    layers.sort(key=lambda row: order.index(LAYERS[row["group"]]))
    networks = [row for row in cpu_rows if row["group"] == NETWORKS]
    engine_rows = [
        {**row, "pass_name": f"{ENGINES[each['peer']]}, {row['pass_name']}"}
        for each in engines
        for row in each["rows"]
    ]
    parts = [
        "PyTorch's time over torchconv's in the same layout: the geometric mean and, in brackets, "
        f"the smallest of the measured rows. {the_machine(cpus + engines)}:",
        layers_table(layers, CPU_PASSES, lambda row: LAYERS[row["group"]]),
        "Whole networks with their layers swapped (fused: by `torchconv.fuse` and "
        "`torchconv.fuse_training`; frozen: by `torchconv.fuse(..., freeze=True)`), in the better "
        "of each library's two layouts:",
        networks_table(networks, lambda row: row["pass_name"]),
        "Inference engines' time over torchconv's, for one image of a network in float32; their "
        "weights are constants:",
        networks_table(engine_rows, lambda row: row["pass_name"]),
    ]
    for each in gpus:
        machine = each["machine"]
        parts += [
            f"{machine['gpu']}, PyTorch {machine['torch']}:",
            layers_table(each["rows"], GPU_PASSES, lambda row: row["group"]),
        ]
    return "\n\n".join(parts) + "\n"


def updated(text: str, results: Path) -> str:
    """A README with its figures replaced. Raises ValueError where the marks are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{figures(results)}\n{end}{after}"


def main() -> int:
    README.write_text(updated(README.read_text("utf-8"), RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
