"""Times torchconv's operators against a peer on the problems of benchmarks/shapes.

    python -m benchmarks.run --shapes resnet,vgg --peer torch

For each problem, dtype, layout and pass: both libraries solve it once and are compared with a
float64 reference; only right results are timed, both libraries call by call in turn (timing.py).
Prints a table, and writes it with a JSON file and a chart to benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import counts, machine, reference, report, timing
from benchmarks.counts import (
    DGRAD,
    FORWARD,
    FORWARD_BACKWARD,
    FORWARD_EVAL,
    FORWARD_RESIDUAL,
    FORWARD_WGRAD,
    INFERENCE,
    PASSES,
    WGRAD,
)
from benchmarks.options import (
    PEERS,
    add_peer_option,
    add_timing_options,
    check_timing_options,
    rounds,
)
from benchmarks.peers import LAYOUTS, Operator, Peer, TorchConv
from benchmarks.problems import DTYPES, Problem, available_groups, load_group

RESULTS = Path(__file__).parent / "results"
# A peer with more than this many times the tolerated error is wrong, not just less accurate.
PEER_SLACK = 16

Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One problem in one dtype and layout, with its tensors: input, weight, bias, gradient."""

    problem: Problem
    dtype: str
    layout: str
    x: Tensor
    w: Tensor | None
    b: Tensor | None
    dz: Tensor

    @classmethod
    def make(cls, problem: Problem, dtype: str, layout: str) -> Case:
        generator = torch.Generator().manual_seed(0)
        memory_format = LAYOUTS[layout]

        def randn(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator).mul_(scale)
            values = values.to(getattr(torch, dtype))
            return values.contiguous(memory_format=memory_format) if len(shape) == 4 else values

        x, dz = randn(problem.input_shape), randn(problem.output_shape)
        if problem.pooling:
            return cls(problem, dtype, layout, x, None, None, dz)
        if problem.norm:
            return cls(problem, dtype, layout, x, randn((problem.c,)), randn((problem.c,)), dz)
        # Weights of the usual initialisation, so that float16 neither overflows nor vanishes.
        fan_in = problem.c // problem.groups * problem.kernel[0] * problem.kernel[1]
        w = randn(problem.weight_shape, fan_in**-0.5)
        b = randn((problem.k,)) if problem.bias else None
        return cls(problem, dtype, layout, x, w, b, dz)

    def layer(self, library: Peer) -> Operator:
        """The convolution as a layer of this library, in eval mode."""
        problem = self.problem
        assert self.w is not None
        geometry = (problem.kernel, problem.stride, problem.padding, problem.dilation)
        layer = nn.Conv2d(problem.c, problem.k, *geometry, problem.groups, bias=False)
        layer.weight = nn.Parameter(self.w)
        layer.bias = None if self.b is None else nn.Parameter(self.b)
        ready = library.model(layer.eval())
        return lambda x, w, b: ready(x)

    def call(self, operator: Operator, pass_name: str) -> tuple[Call, tuple[str, ...]]:
        """What is timed, and the names of the tensors that it returns."""
        if pass_name in INFERENCE:
            name = FORWARD_RESIDUAL if pass_name == FORWARD_RESIDUAL else "output"
            return (lambda: (operator(self.x, self.w, self.b),)), (name,)
        leaves = {"grad_input": self.x, "grad_weight": self.w, "grad_bias": self.b}
        if pass_name in (FORWARD_WGRAD, WGRAD):
            wanted = {"grad_weight", "grad_bias"}
        else:
            wanted = {"grad_input"} if pass_name == DGRAD else set(leaves)
        arguments: dict[str, Tensor | None] = {
            name: None if leaf is None else leaf.detach().requires_grad_(name in wanted)
            for name, leaf in leaves.items()
        }
        x = arguments["grad_input"]
        assert x is not None
        w, b, dz = arguments["grad_weight"], arguments["grad_bias"], self.dz
        inputs = {n: t for n, t in arguments.items() if t is not None and t.requires_grad}
        targets = tuple(inputs.values())
        if pass_name in (DGRAD, WGRAD):
            z = operator(x, w, b)
            return lambda: torch.autograd.grad(z, targets, dz, retain_graph=True), tuple(inputs)

        def forward_backward() -> tuple[Tensor, ...]:
            z = operator(x, w, b)
            return (z, *torch.autograd.grad(z, targets, dz))

        return forward_backward, ("output", *inputs)


def applicable(problem: Problem, pass_name: str, peer: Peer) -> bool:
    """Pooling has no weights, normalisation is timed as a step in training has it, and an inference
    engine has no backward."""
    if problem.norm and pass_name not in (FORWARD, FORWARD_BACKWARD):
        return False
    if problem.pooling and pass_name in (FORWARD_EVAL, FORWARD_RESIDUAL, FORWARD_WGRAD, WGRAD):
        return False
    return pass_name in INFERENCE or peer.differentiable


def verdict(library: str, errors: dict[str, float], case: Case, slack: float = 1.0) -> str:
    """Why a result must not be timed; empty for a right one."""
    for name, error in errors.items():
        allowed = slack * reference.tolerance(case.problem, name, getattr(torch, case.dtype))
        if not error <= allowed:  # a NaN too
            return (
                f"{library} is wrong: {name} has a relative error of {error:.1e}, "
                f"above {allowed:.1e}"
            )
    return ""


def measure(
    case: Case,
    passes: Sequence[str],
    ours: Peer,
    peer: Peer,
    floor: machine.Floor,
    budget: float,
    min_rounds: int,
) -> Iterator[report.Result]:
    """Check every pass of one case against the reference, then time those that are right."""
    problem = case.problem
    row = report.Result(
        problem.group, str(problem), problem.kind, case.dtype, case.layout, "", note=problem.note
    )
    calls: dict[tuple[str, str], Call] = {}
    candidates: dict[str, dict[str, Tensor]] = {}
    refusals: dict[str, str] = {}
    for library in (ours, peer):
        function = library.operator(problem)
        if problem.residual:
            function = library.with_residual(problem, case.dz)
        for pass_name in passes:
            operator = function
            if pass_name == FORWARD_EVAL:
                operator = case.layer(library)
            elif pass_name == FORWARD_RESIDUAL:
                operator = library.with_residual(problem, case.dz)
            try:
                with torch.set_grad_enabled(pass_name not in INFERENCE):
                    call, names = case.call(operator, pass_name)
                    candidates[f"{library.name} {pass_name}"] = dict(
                        zip(names, call(), strict=True)
                    )
            except (RuntimeError, TypeError, ValueError) as error:
                refusals[pass_name] = f"{library.name} refused: {str(error).splitlines()[0]}"
                continue
            calls[library.name, pass_name] = call
    needs_dz = problem.residual or not set(passes) <= {FORWARD, FORWARD_EVAL}
    dz = case.dz if needs_dz else None
    errors = reference.relative_errors(problem, case.x, case.w, case.b, dz, candidates)
    candidates.clear()
    for pass_name in passes:
        row = replace(row, pass_name=pass_name)
        if pass_name in refusals:
            yield replace(row, failure=refusals[pass_name])
            continue
        found = [errors[f"{library.name} {pass_name}"] for library in (ours, peer)]
        failure = verdict(ours.name, found[0], case) or verdict(
            peer.name, found[1], case, PEER_SLACK
        )
        worst, peers_worst = (max(each.values()) for each in found)
        checked = replace(row, error=worst, peer_error=peers_worst, failure=failure)
        if failure:
            yield checked
            continue
        with torch.set_grad_enabled(pass_name not in INFERENCE):
            pair = [calls[ours.name, pass_name], calls[peer.name, pass_name]]
            times = timing.interleave(pair, budget, min_rounds, called_before=True)
        seconds = times[0].median
        operations = counts.operations(problem, pass_name)
        moved = counts.minimal_bytes(problem, pass_name, case.x.element_size())
        # Comparisons and additions of pooling are no floor: running maxima need far fewer.
        least = floor.seconds(0 if problem.memory_bound else operations, moved, case.dtype)
        yield replace(
            checked,
            ours=times[0],
            peer=times[1],
            rate=(moved if problem.memory_bound else operations) / seconds / 1e9,
            unit="GB/s" if problem.memory_bound else "GFLOP/s",
            floor_fraction=least / seconds,
            extra={"operations": operations, "bytes": moved, "floor_ms": 1e3 * least},
        )


def output_base(options: argparse.Namespace) -> Path:
    """benchmarks/results/<shapes>-<peer>-<dtypes>, plus whatever narrows the run down."""
    parts = ["+".join(options.shapes), options.peer, "+".join(options.dtype)]
    if len(options.layouts) == 1:
        parts += options.layouts
    if options.passes != [FORWARD, FORWARD_BACKWARD]:
        parts.append("+".join(options.passes))
    if options.threads:
        parts.append(f"{options.threads}threads")
    if options.filter:
        parts.append("filtered")
    if options.quick:
        parts.append("quick")
    return RESULTS / "-".join(parts)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time torchconv's operators against a peer, after checking both for equality.",
    )
    groups = ", ".join(available_groups())
    add = parser.add_argument
    add("--shapes", default="resnet", help=f"groups of problems, comma-separated, or all: {groups}")
    add_peer_option(parser)
    add("--dtype", default="float32", help=f"comma-separated: {', '.join(DTYPES)}")
    add(
        "--layout",
        default="both",
        choices=["nchw", "nhwc", "both"],
        help="contiguous, channels_last",
    )
    add(
        "--passes",
        default="both",
        help=f"comma-separated: {', '.join(PASSES)}; both is {FORWARD},{FORWARD_BACKWARD}; "
        f"{FORWARD_WGRAD} leaves the input gradient out",
    )
    add("--filter", help="only problems whose printed form contains this text")
    add_timing_options(parser, budget=1)
    options = parser.parse_args(arguments)
    check_timing_options(parser, options)
    try:
        options.shapes = options.shapes.split(",")
        names = available_groups() if options.shapes == ["all"] else options.shapes
        options.problems = [problem for name in names for problem in load_group(name)]
        options.dtype = machine.known_dtypes(options.dtype.split(","))
    except ValueError as error:
        parser.error(str(error))
    if options.filter:
        options.problems = [p for p in options.problems if options.filter in str(p)]
        if not options.problems:
            parser.error(f"--filter {options.filter!r} leaves no problem")
    both = options.passes == "both"
    options.passes = [FORWARD, FORWARD_BACKWARD] if both else options.passes.split(",")
    for name in options.passes:
        if name not in PASSES:
            parser.error(f"unknown pass {name!r}, expected both or some of: {', '.join(PASSES)}")
    options.layouts = list(LAYOUTS) if options.layout == "both" else [options.layout]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    ours, peer = TorchConv(), PEERS[options.peer]()
    budget, min_rounds = rounds(options)
    pinned = {problem.dtype for problem in options.problems if problem.dtype}
    load = machine.warn_if_busy()
    print("Measuring the machine's floor.", file=sys.stderr)
    floor = machine.measure_floor(sorted({*options.dtype, *pinned}))
    cases = [
        (problem, dtype, layout)
        for problem in options.problems
        for dtype in ([problem.dtype] if problem.dtype else options.dtype)
        for layout in options.layouts
        if layout in peer.layouts
    ]
    results: list[report.Result] = []
    interrupted = False
    try:
        with tqdm(cases, unit="case", file=sys.stderr) as progress:
            for problem, dtype, layout in progress:
                progress.set_description(f"{problem} {dtype} {layout}")
                passes = [name for name in options.passes if applicable(problem, name, peer)]
                case = Case.make(problem, dtype, layout)
                results += measure(case, passes, ours, peer, floor, budget, min_rounds)
    except KeyboardInterrupt:
        interrupted = True
        print("Interrupted: reporting what was measured.", file=sys.stderr)
    if not results:
        print("Nothing was measured.", file=sys.stderr)
        return 130 if interrupted else 1
    bandwidth = f"copy {floor.copy_bandwidth:.1f} GB/s, read {floor.read_bandwidth:.1f} GB/s"
    peaks = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in floor.peak.items())
    summary = report.Report(
        title=f"{', '.join(options.shapes)} against {peer.name}, {', '.join(options.dtype)}",
        peer=peer.name,
        machine={
            **machine.describe(),
            "load before": load,
            "measured floor": f"{bandwidth}, {peaks}",
        },
        results=results,
        floor=asdict(floor),
    )
    if interrupted and not options.output:
        print(report.as_text(summary))
    else:
        report.publish(summary, options.output or output_base(options))
    if interrupted:
        return 130
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
