"""The benchmarks' own parts: shape files, counts, the float64 reference, timing and reports.

Nothing here measures speed. What is checked is that a benchmark would measure the right problem,
count it right, refuse to time a wrong result, and write what it found.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import (
    build,
    counts,
    engines,
    machine,
    models,
    problems,
    reference,
    report,
    run,
    timing,
)
from benchmarks.engines import Engine, Run
from benchmarks.peers import Eager, TorchConv
from benchmarks.problems import Problem, load_group, parse_line
from torchconv._packed_weights import PackedWeights

GROUPS = problems.available_groups()
PNG = b"\x89PNG\r\n\x1a\n"


def parse(line: str) -> Problem:
    problem = parse_line(line)
    assert problem is not None
    return problem


# Shape files.


def test_parse_convolution() -> None:
    problem = parse("conv2d 8x6x17x19->12 3x5 s2x1 p1x2 d2 g3 bias bfloat16 # where from")
    assert problem.input_shape == (8, 6, 17, 19)
    assert problem.weight_shape == (12, 2, 3, 5)
    assert (problem.stride, problem.padding, problem.dilation) == ((2, 1), (1, 2), (2, 2))
    assert (problem.groups, problem.bias, problem.dtype) == (3, True, "bfloat16")
    assert problem.note == "where from"
    assert str(problem) == "8x6x17x19->12 3x5 s2x1 p1x2 d2 g3 bias"


def test_parse_pooling() -> None:
    problem = parse("max_pool2d 4x8x10x10 3x3 s2 ceil")
    assert problem.output_shape == (4, 8, 5, 5)
    assert problem.pooling and problem.kind == "max_pool2d"
    assert str(problem) == "max_pool 4x8x10x10 3x3 s2 ceil"


def test_parse_batch_norm() -> None:
    problem = parse("batch_norm2d 4x8x10x12 residual relu")
    assert problem.norm and problem.residual and problem.activation == "relu"
    assert problem.output_shape == problem.input_shape and problem.weight_shape == (8,)
    assert str(problem) == "batch_norm 4x8x10x12 residual relu"
    assert problem.kind == "batch_norm2d residual relu"
    array = 4 * 8 * 10 * 12 * 2
    assert counts.minimal_bytes(problem, counts.FORWARD, 2) == 3 * array
    assert counts.minimal_bytes(problem, counts.FORWARD_BACKWARD, 2) == 7 * array
    passes = [name for name in counts.PASSES if run.applicable(problem, name, Eager())]
    assert passes == [counts.FORWARD, counts.FORWARD_BACKWARD]


def test_parse_adaptive_pooling() -> None:
    problem = parse("adaptive_avg_pool2d 4x8x10x12 3x5")
    assert problem.output_shape == (4, 8, 3, 5)
    assert str(problem) == "adaptive_avg_pool 4x8x10x12 -> 3x5"
    moved = counts.minimal_bytes(problem, counts.FORWARD, 4)
    assert moved == 4 * (4 * 8 * 10 * 12 + 4 * 8 * 3 * 5)


def test_blank_lines_and_comments_hold_no_problem() -> None:
    assert parse_line("") is None
    assert parse_line("   # conv2d 1x1x1x1 -> 1 1x1") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("conv3d 1x1x4x4 -> 1 3x3", "conv3d"),
        ("adaptive_avg_pool2d 1x1x4x4 2x2 s2", "s2"),
        ("conv2d 1x1x4 -> 1 3x3", "NxCxHxW"),
        ("conv2d 1x1x4x4 3x3", "-> K"),
        ("conv2d 1x1x4x4 -> 1 3", "RxS"),
        ("conv2d 1x1x4x4 -> 1 3x3 q7", "q7"),
        ("conv2d 1x1x4x4 -> 1 3x3 ceil", "ceil"),
        ("conv2d 1x3x4x4 -> 4 3x3 g2", "groups=2"),
        ("conv2d 1x1x4x4 -> 1 5x5", "output"),
        ("max_pool2d 1x1x4x4 2x2 bias", "bias"),
    ],
)
def test_bad_lines_are_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_line(line)


@pytest.mark.parametrize("group", GROUPS)
def test_every_listed_shape_is_what_pytorch_computes(group: str) -> None:
    listed = load_group(group)
    assert listed
    for problem in listed:
        x = torch.empty(problem.input_shape, device="meta")
        if problem.pooling:
            got = reference.torch_pooling(problem, x)
        elif problem.norm:
            got = reference.torch_norm(problem, x, None, None, None)
        else:
            w = torch.empty(problem.weight_shape, device="meta")
            arguments = (problem.stride, problem.padding, problem.dilation, problem.groups)
            got = F.conv2d(x, w, None, *arguments)
        assert tuple(got.shape) == problem.output_shape, problem
        assert problem.group == group


def test_deepbench_axes() -> None:
    # (W, H, C, N, K, S, R, padding, stride) = (700, 161, 1, 4, 32, 20, 5, 0, 2)
    first = load_group("deepbench")[0]
    assert first.input_shape == (4, 1, 161, 700)
    assert first.weight_shape == (32, 1, 5, 20)
    assert first.output_shape == (4, 32, 79, 341)


def test_unknown_group_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="resnet"):
        load_group("alexnet")


def test_kinds() -> None:
    kinds = {problem.kind for group in GROUPS for problem in load_group(group)}
    wanted = {"3x3 s1", "3x3 s2", "7x7 s2", "1x1 s1", "1x1 s2", "depthwise 5x5", "grouped 3x3"}
    assert wanted | {"3x3 s1 dilated", "max_pool2d", "avg_pool2d", "min_pool2d"} <= kinds


# Counts.


def test_convolution_counts() -> None:
    problem = parse("conv2d 64x1x28x28 -> 6 5x5 p2 bias")
    once = 2 * 64 * 6 * 28 * 28 * 25
    x, w, z = 64 * 28 * 28, 6 * 25 + 6, 64 * 6 * 28 * 28
    assert counts.operations(problem, counts.FORWARD) == once
    assert counts.operations(problem, counts.DGRAD) == once
    assert counts.operations(problem, counts.FORWARD_WGRAD) == 2 * once
    assert counts.operations(problem, counts.FORWARD_BACKWARD) == 3 * once
    assert counts.minimal_bytes(problem, counts.FORWARD, 4) == 4 * (x + w + z)
    assert counts.minimal_bytes(problem, counts.DGRAD, 4) == 4 * (z + 6 * 25 + x)
    assert counts.minimal_bytes(problem, counts.WGRAD, 4) == 4 * (z + x + w)
    # Forward reads x and w and writes z; backward reads dz, x and w and writes dx, dw and db.
    everything = (x + w + z) + (z + x + 6 * 25) + (x + w)
    assert counts.minimal_bytes(problem, counts.FORWARD_BACKWARD, 4) == 4 * everything


def test_grouped_operations() -> None:
    problem = parse("conv2d 8x128x56x56 -> 128 3x3 p1 g32")
    assert counts.operations(problem, counts.FORWARD) == 2 * 8 * 128 * 56 * 56 * 4 * 9


def test_touched() -> None:
    assert counts.touched(size=56, kernel=1, stride=2, padding=0, dilation=1, outputs=28) == 28
    assert counts.touched(size=7, kernel=3, stride=1, padding=1, dilation=1, outputs=7) == 7
    assert counts.touched(size=10, kernel=2, stride=3, padding=0, dilation=1, outputs=3) == 6
    # Dilated by more than the image, only the middle tap meets it.
    assert counts.touched(size=4, kernel=3, stride=1, padding=9, dilation=9, outputs=4) == 4


def test_strided_1x1_reads_a_quarter_of_its_input() -> None:
    problem = parse("conv2d 8x256x56x56 -> 512 1x1 s2")
    expected = 8 * 256 * 28 * 28 + 256 * 512 + 8 * 512 * 28 * 28
    assert counts.minimal_bytes(problem, counts.FORWARD, 4) == 4 * expected


def test_pooling_bytes() -> None:
    x, z = 8 * 64 * 224 * 224, 8 * 64 * 112 * 112
    for operator, selected in (("max_pool2d", z), ("avg_pool2d", 0)):
        problem = parse(f"{operator} 8x64x224x224 2x2 s2")
        assert counts.minimal_bytes(problem, counts.FORWARD, 2) == 2 * (x + z)
        both = 2 * (x + z) + 2 * (z + x) + 2 * selected
        assert counts.minimal_bytes(problem, counts.FORWARD_BACKWARD, 2) == both


def test_floor_takes_the_slower_of_arithmetic_and_memory() -> None:
    floor = machine.Floor(copy_bandwidth=20, read_bandwidth=40, peak={"float32": 100})
    assert floor.seconds(1e9, 1e6, "float32") == pytest.approx(0.01)
    assert floor.seconds(1e3, 4e9, "float32") == pytest.approx(0.1)


# The float64 reference.


@pytest.mark.parametrize("layout", run.LAYOUTS)
@pytest.mark.parametrize(
    "line",
    [
        "conv2d 2x3x9x8 -> 4 3x3 p1 bias",
        "conv2d 2x4x11x9 -> 6 3x2 s2x3 p2x1 d2x1 g2 bias",
        "conv2d 3x6x7x7 -> 6 5x5 p2 g6",
        "conv2d 1x4x8x8 -> 8 1x1 s2",
        "max_pool2d 2x3x9x9 3x3 s2 p1",
        "min_pool2d 2x3x9x9 2x3 s2x1 ceil",
        "avg_pool2d 2x3x9x9 3x3 s2 p1 ceil",
        "batch_norm2d 2x3x9x9",
        "batch_norm2d 2x3x9x9 relu6",
    ],
)
def test_reference_agrees_with_pytorch(line: str, layout: str) -> None:
    problem = parse(line)
    case = run.Case.make(problem, "float64", layout)
    results = run_once(case, counts.FORWARD_BACKWARD)
    errors = reference.relative_errors(problem, case.x, case.w, case.b, case.dz, {"F": results})
    expected = {"output", "grad_input"}
    if not problem.pooling:
        expected |= {"grad_weight"} | ({"grad_bias"} if problem.bias else set())
    assert set(errors["F"]) == expected
    assert max(errors["F"].values()) < 1e-14


def run_once(case: run.Case, pass_name: str) -> dict[str, torch.Tensor]:
    call, names = case.call(Eager().operator(case.problem), pass_name)
    return dict(zip(names, call(), strict=True))


def test_reference_sees_one_wrong_element_and_nan() -> None:
    problem = parse("conv2d 2x3x9x8 -> 4 3x3 p1 bias")
    case = run.Case.make(problem, "float32", "nchw")
    right = run_once(case, counts.FORWARD_BACKWARD)
    for name, value in right.items():
        wrong = {**right, name: value.detach().clone()}
        wrong[name].view(-1)[-1] += 1.0
        nan = {**right, name: value.detach().clone()}
        nan[name].view(-1)[0] = float("nan")
        candidates = {"right": right, "wrong": wrong, "nan": nan}
        errors = reference.relative_errors(problem, case.x, case.w, case.b, case.dz, candidates)
        allowed = reference.tolerance(problem, name, torch.float32)
        assert errors["right"][name] < allowed < errors["wrong"][name]
        assert not errors["nan"][name] <= allowed


def test_tolerance_is_tight_for_every_listed_problem() -> None:
    for problem in (problem for group in GROUPS for problem in load_group(group)):
        for name in ("output", "grad_input", "grad_weight"):
            if problem.activation and name != "output":
                assert reference.tolerance(problem, name, torch.float32) < 1e-2
                continue
            assert reference.tolerance(problem, name, torch.float32) < 3e-4
            assert reference.tolerance(problem, name, torch.float64) < 1e-12
            assert reference.tolerance(problem, name, torch.bfloat16) < 2e-2


# Which gradients a pass computes.


@pytest.mark.parametrize(
    ("pass_name", "names"),
    [
        (counts.FORWARD, ("output",)),
        (counts.FORWARD_EVAL, ("output",)),
        (counts.FORWARD_BACKWARD, ("output", "grad_input", "grad_weight", "grad_bias")),
        (counts.FORWARD_WGRAD, ("output", "grad_weight", "grad_bias")),
        (counts.DGRAD, ("grad_input",)),
        (counts.WGRAD, ("grad_weight", "grad_bias")),
    ],
)
def test_passes_mask_gradients(pass_name: str, names: tuple[str, ...]) -> None:
    case = run.Case.make(parse("conv2d 2x3x9x8 -> 4 3x3 p1 bias"), "float32", "nhwc")
    whole = run_once(case, counts.FORWARD_BACKWARD)
    call, found = case.call(Eager().operator(case.problem), pass_name)
    assert found == names
    for _ in range(2):  # a call can be repeated
        for name, value in zip(found, call(), strict=True):
            torch.testing.assert_close(value, whole[name])


def test_a_layer_keeps_its_weights_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What forward_eval times, in either library, with the case's own weights."""
    created: list[PackedWeights] = []

    class Recorded(PackedWeights):
        def __init__(self, frozen: bool) -> None:
            super().__init__(frozen)
            created.append(self)

    monkeypatch.setattr("torchconv.nn.PackedWeights", Recorded)
    case = run.Case.make(parse("conv2d 2x32x9x8 -> 32 3x3 s2 p1 d2 bias"), "float32", "nhwc")
    expected = Eager().operator(case.problem)(case.x, case.w, case.b)
    with torch.no_grad():
        for library in (TorchConv(), Eager()):
            layer = case.layer(library)
            for _ in range(2):
                torch.testing.assert_close(layer(case.x, None, None), expected)
            assert [packed.bytes() > 0 for packed in created] == [True]


def test_pooling_has_no_weight_passes() -> None:
    pool = parse("avg_pool2d 2x3x9x9 3x3")
    passes = [name for name in counts.PASSES if run.applicable(pool, name, Eager())]
    assert passes == [counts.FORWARD, counts.FORWARD_BACKWARD, counts.DGRAD]


# Timing.


class FakeClock:
    """A clock that moves only when something says that it worked."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order = ""

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, seconds: float):  # type: ignore[no-untyped-def]
        def work() -> None:
            self.now += seconds
            self.order += name

        return work


def test_interleave_alternates_and_takes_medians() -> None:
    clock = FakeClock()
    calls = [clock.worker("a", 1.0), clock.worker("b", 3.0)]
    a, b = timing.interleave(calls, budget=30, min_rounds=3, clock=clock)
    assert clock.order == "abab" + "abba" * 4  # two rounds untimed, then eight of four seconds
    assert (a.median, b.median, a.rounds, b.rounds) == (1.0, 3.0, 8, 8)
    assert (a.first_quartile, a.third_quartile) == (1.0, 1.0)


def test_interleave_leaves_the_first_call_of_a_turn_out() -> None:
    clock = FakeClock()

    def cold_after_another() -> None:
        clock.worker("a", 9.0 if clock.order[-1:] != "a" else 1.0)()

    calls = [cold_after_another, clock.worker("b", 2.0)]
    a, b = timing.interleave(calls, budget=1, min_rounds=2, clock=clock, turn=3)
    assert clock.order == "aaabbb" + "aaabbbbbbaaa"  # one round untimed, then two
    assert (a.third_quartile, a.rounds, b.median, b.rounds) == (1.0, 4, 2.0, 4)


def test_interleave_keeps_to_its_limits() -> None:
    clock = FakeClock()
    (fast,) = timing.interleave([clock.worker("a", 1.0)], 100, max_rounds=9, clock=clock)
    assert fast.rounds == 9
    (slow,) = timing.interleave([clock.worker("a", 1.0)], 0.5, min_rounds=2, clock=clock)
    assert slow.rounds == 2
    (slower,) = timing.interleave([clock.worker("a", 10.0)], 1, min_rounds=7, clock=clock)
    assert slower.rounds == 3 and slower.spread == 0
    # Calls made before: (seconds, order that is called, rounds that count).
    for seconds, calls, rounds in ((0.125, 9, 8), (0.2, 8, 7), (0.5, 5, 4), (1.5, 3, 3), (3, 1, 1)):
        clock = FakeClock()
        (checked,) = timing.interleave(
            [clock.worker("a", seconds)], 1, min_rounds=7, clock=clock, called_before=True
        )
        assert (len(clock.order), checked.rounds) == (calls, rounds)
        assert checked.median == pytest.approx(seconds)
    (slowest,) = timing.interleave([clock.worker("a", 10.0)], 1, min_rounds=1, clock=clock)
    assert slowest == timing.Timing(10.0, 10.0, 10.0, 1) and slowest.spread is None


# Measuring and reporting.

FLOOR = machine.Floor(20.0, 30.0, {"float32": 100.0})


class Off(Eager):
    """A library whose convolutions are wrong by one part in a hundred."""

    name = "torchconv"

    def operator(self, problem: Problem):  # type: ignore[no-untyped-def]
        right = super().operator(problem)
        return lambda x, w, b: right(x, w, b) * 1.01


class Refuses(Eager):
    """A library that has no kernel for anything."""

    name = "torchconv"

    def operator(self, problem: Problem):  # type: ignore[no-untyped-def]
        def refuse(x: object, w: object, b: object) -> torch.Tensor:
            raise NotImplementedError("no kernel for this\nand more lines")

        return refuse


class Same(Eager):
    name = "torchconv"


def measure(ours: Eager, line: str = "conv2d 2x3x9x8 -> 4 3x3 p1") -> list[report.Result]:
    case = run.Case.make(parse(line), "float32", "nchw")
    passes = [counts.FORWARD, counts.FORWARD_BACKWARD]
    return list(run.measure(case, passes, ours, Eager(), FLOOR, budget=1e-4, min_rounds=1))


def test_right_results_are_timed() -> None:
    lines = ("max_pool2d 2x3x9x8 3x3 s2", "batch_norm2d 2x3x9x8 residual relu")
    for result in measure(Same()) + [each for line in lines for each in measure(Same(), line)]:
        assert not result.failure
        assert result.ours is not None and result.peer is not None and result.ratio is not None
        assert result.ratio == pytest.approx(result.peer.median / result.ours.median)
        assert result.error == result.peer_error
        assert result.floor_fraction is not None and result.floor_fraction > 0


def test_wrong_results_are_not_timed() -> None:
    for result in measure(Off()):
        assert "torchconv is wrong: output" in result.failure and "1.0e-02" in result.failure
        assert result.ours is None and result.peer is None and result.ratio is None


def test_a_refusal_is_reported() -> None:
    for result in measure(Refuses()):
        assert result.failure == "torchconv refused: no kernel for this"
        assert result.ratio is None


def example_report() -> report.Report:
    def result(problem: str, layout: str, ratio: float, group: str = "lenet") -> report.Result:
        ours, peer = (timing.Timing(t, t, t, 5) for t in (1e-3, ratio * 1e-3))
        return report.Result(
            group, problem, "5x5 s1", "float32", layout, "forward", ours, peer, 123.4, "GFLOP/s",
            0.5, 1e-7, 1e-7,
        )  # fmt: skip

    wrong = dataclasses.replace(
        result("c", "nhwc", 9.0), ours=None, peer=None, failure="torchconv is wrong: output"
    )
    rows = [
        result("a", "nchw", 2.0), result("b", "nchw", 8.0), result("a", "nhwc", 0.5),
        result("d", "nhwc", 0.5, "vgg"), wrong,
    ]  # fmt: skip
    return report.Report("title", "torch", {"cpu": "some", "threads": "2"}, rows)


def test_tables() -> None:
    example = example_report()
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    means = report.means_table(example)
    assert "4.00 (min 2.00, 0.50 of floor)" in means
    assert "0.50 (min 0.50, 0.50 of floor)" in means
    rows = report.rows_table(example).splitlines()
    assert len(rows) == 2 + 5
    assert "2.00" in rows[2] and "123 GFLOP/s" in rows[2] and "failed" in rows[-1]
    text = report.as_text(example)
    assert "torchconv is wrong: output" in text and "cpu: some" in text


def test_markdown_table_has_equal_columns() -> None:
    lines = report.as_markdown(example_report()).splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("| problem"))
    table = lines[header : header + 2 + 5]
    assert len({line.count("|") for line in table}) == 1


def test_files(tmp_path: Path) -> None:
    base = tmp_path / "new" / "lenet-torch-float32"
    paths = report.write(example_report(), base)
    assert [path.name for path in paths] == [base.name + end for end in (".json", ".md", ".png")]
    content = json.loads(paths[0].read_text())
    assert content["machine"]["threads"] == "2"
    assert [row["ratio"] for row in content["rows"]] == [2.0, 8.0, 0.5, 0.5, None]
    assert content["rows"][0]["ours"]["rounds"] == 5
    assert paths[2].read_bytes().startswith(PNG)


def test_no_chart_without_ratios(tmp_path: Path) -> None:
    rows = [row for row in example_report().results if row.failure]
    empty = dataclasses.replace(example_report(), results=rows)
    assert [path.suffix for path in report.write(empty, tmp_path / "x")] == [".json", ".md"]
    assert "No row was timed." in report.as_text(empty)


# The commands.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "alexnet"],
        ["--dtype", "int8"],
        ["--passes", "sideways"],
        ["--filter", "no such problem"],
        ["--threads", "0"],
        ["--budget", "0"],
        ["--peer", "nobody"],
    ],
)
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run.parse_arguments(arguments)
    assert exit_.value.code == 2
    with pytest.raises(SystemExit, match="2"):
        models.parse_arguments(["--passes", "fused,sideways"])


def test_output_names_tell_runs_apart() -> None:
    def name(*arguments: str) -> str:
        return run.output_base(run.parse_arguments(arguments)).name

    assert name("--shapes", "resnet,vgg") == "resnet+vgg-torch-float32"
    assert name("--shapes", "all", "--dtype", "float32,bfloat16") == "all-torch-float32+bfloat16"
    assert name("--shapes", "lenet", "--layout", "nchw", "--quick").endswith("-nchw-quick")
    assert name("--shapes", "lenet", "--passes", "dgrad,wgrad").endswith("-dgrad+wgrad")
    assert models.output_base(models.parse_arguments([])).name == "models-torch"
    both = models.parse_arguments(["--passes", "fused,frozen"])
    assert models.output_base(both).name == "models-torch-fused+frozen"


def test_run_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "measure_floor", lambda dtypes: FLOOR)
    output = tmp_path / "lenet"
    status = run.main(
        ["--shapes", "lenet", "--filter", "64x6", "--budget", "0.01", "--quick"]
        + ["--output", str(output)]
    )
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "64x6x14x14->16 5x5 bias" in printed and "forward_backward" in printed
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert {(row["layout"], row["pass_name"]) for row in rows} == {
        (layout, name)
        for layout in ("nchw", "nhwc")
        for name in (counts.FORWARD, counts.FORWARD_BACKWARD)
    }


def test_models_measure_a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 7, stride=4),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Dropout(),
            torch.nn.Linear(4 * 27 * 27, 1000),
        )

    monkeypatch.setattr(models, "load_model", small)
    for name in models.PASSES:
        result = models.measure(name, name, Same(), Eager(), batch=2, budget=1e-3, min_rounds=1)
        assert not result.failure and result.ratio is not None
        timed = ["torchconv", "torch", *(["fused torch"] if name in ("fused", "frozen") else [])]
        assert set(result.extra) == {f"{each} {layout}" for each in timed for layout in run.LAYOUTS}


class Stub(Engine):
    """An engine that runs what it is given by PyTorch."""

    name = "stub"

    def build(self, model: bytes) -> Run:
        network = EXPORTED[int(model)]
        return lambda batch: network(torch.from_numpy(batch)).numpy()


EXPORTED: list[torch.nn.Module] = []


def test_engines_run_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes in contiguous layout; a graph for each shape."""

    def export(network: torch.nn.Module, batch: torch.Tensor) -> bytes:
        EXPORTED.append(network.eval())
        return str(len(EXPORTED) - 1).encode()

    monkeypatch.setattr(engines, "as_onnx", export)
    monkeypatch.setattr(models, "load_model", lambda name: torch.nn.Conv2d(3, 4, 7, stride=4))
    engine = Stub()
    for name in ("inference", "fused", "frozen"):
        result = models.measure(name, name, Same(), engine, batch=4, budget=1e-3, min_rounds=1)
        assert not result.failure and result.ratio is not None
        assert set(result.extra) == {"torchconv nchw", "torchconv nhwc", "stub nchw"}
    assert len(EXPORTED) == 6  # two for the check on two images

    case = run.Case.make(parse("conv2d 2x3x9x8 -> 4 3x3 p1 bias"), "float32", "nchw")
    passes = [each for each in counts.PASSES if run.applicable(case.problem, each, engine)]
    assert passes == [counts.FORWARD, counts.FORWARD_EVAL, counts.FORWARD_RESIDUAL]
    for result in run.measure(case, passes, Same(), engine, FLOOR, budget=1e-4, min_rounds=1):
        assert not result.failure and result.peer_error == result.error


def test_engines_refuse_other_types() -> None:
    with pytest.raises(TypeError, match="float64"):
        engines.as_onnx(torch.nn.ReLU(), torch.zeros(1, dtype=torch.float64))


def test_machine_description_names_what_matters() -> None:
    info = machine.describe()
    assert {"cpu", "cores", "threads", "isa", "caches", "torch", "torchconv", "commit"} <= set(info)
    assert info["torch"] == torch.__version__


# Builds.


def test_build_reads_ninjas_log(tmp_path: Path) -> None:
    log = "# ninja log v7\n10\t1510\t77\tavx2/cpu/a.o\tabc\n0\t3000\t78\tavx2/cpu/b.o\tdef\n"
    (tmp_path / ".ninja_log").write_text(log)
    assert list(build.file_seconds(tmp_path).items()) == [
        ("avx2/cpu/b.o", 3.0),
        ("avx2/cpu/a.o", 1.5),
    ]


def test_build_leaves_ccache_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCACHE_DISABLE", "0")
    monkeypatch.setenv("CXX", "ccache c++ -pipe")
    monkeypatch.setattr(build._toolchain, "compiler", lambda: ["ccache", "c++", "-pipe"])
    build.without_ccache()
    assert os.environ["CXX"] == "c++ -pipe" and os.environ["CCACHE_DISABLE"] == "1"


def test_build_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each build, with nothing compiled."""

    def compile_libraries(isas: list[str], root: Path, folder: Path, progress: object) -> None:
        (folder / ".ninja_log").write_text("# ninja log v7\n0\t2000\t1\ta.o\tabc\n")

    for name in ("CCACHE_DISABLE", "CXX"):
        monkeypatch.setenv(name, "")  # what the run sets is undone
    monkeypatch.setattr(build._build, "compile_libraries", compile_libraries)
    assert build.main(["--output", str(tmp_path / "build")]) == 0
    rows = json.loads((tmp_path / "build.json").read_text())["rows"]
    assert [row["peer"]["median"] for row in rows] == list(build.LIMITS.values())
    assert all(row["extra"] == {"files": 1, "sum of files s": 2.0} for row in rows)
    assert "a.o 2.0 s" in (tmp_path / "build.md").read_text()


def test_convnext_is_the_papers() -> None:
    model = models.load_model("convnext_tiny").eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 28_589_128
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
