"""Options that the benchmarks of operators and of networks share: peer, time, threads, where to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.engines import OnnxRuntime, OpenVino
from benchmarks.peers import Compiled, Eager, Peer

PEERS: dict[str, Callable[[], Peer]] = {
    "torch": Eager,
    "compile": Compiled,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}


def add_peer_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        default="torch",
        choices=sorted(PEERS),
        help="torch: eager; compile: torch.compile; engines: forward, contiguous, float32",
    )


def add_timing_options(parser: argparse.ArgumentParser, budget: float) -> None:
    add = parser.add_argument
    add("--threads", type=int, help="threads for both libraries (default: PyTorch's)")
    add(
        "--budget",
        type=float,
        default=budget,
        help="seconds to spend timing one row (default: %(default)g)",
    )
    add(
        "--output",
        type=Path,
        help="where to write, without suffix (default: in benchmarks/results)",
    )
    add("--quick", action="store_true", help="a twentieth of the budget: to try things out")


def check_timing_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, *, positive: tuple[str, ...] = ()
) -> None:
    """Refuse counts below one, of threads and of the options named in positive, and no time."""
    for name in ("threads", *positive):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not options.budget > 0:
        parser.error(f"--budget must be positive, got {options.budget}")


def rounds(options: argparse.Namespace) -> tuple[float, int]:
    """Seconds for one row, and the rounds that it takes at least."""
    return (options.budget / 20, 1) if options.quick else (options.budget, 7)
