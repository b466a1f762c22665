"""benchmarks/gpu.py where there is no GPU: its problems, its truth, its refusals, its report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import counts, gpu, gpu_cases, gpu_timing, report
from benchmarks.gpu_cases import BACKWARD, FORWARD, FORWARD_RELU, PASSES, Wanted
from benchmarks.machine import Floor
from benchmarks.problems import Problem

CASES = [gpu.small(wanted) for wanted in gpu_cases.planned()]
FLOOR = Floor(10.0, 0.0, dict.fromkeys(("float16", "bfloat16", "tf32", "float32"), 100.0))


def case(group: str, dtype: str, layout: str = "nhwc", at: int = 0) -> Wanted:
    chosen = [c for c in CASES if (c.problem.group, c.dtype, c.layout) == (group, dtype, layout)]
    return chosen[at]


def test_every_planned_problem_fits_and_is_one_of_a_kind() -> None:
    planned = list(gpu_cases.planned())
    assert len({(*dataclasses.astuple(w), w.problem.group) for w in planned}) == len(planned)
    huge = [w.problem for w in planned if w.problem.group == "huge"]
    assert huge and all(torch.Size(p.input_shape).numel() > 2**31 for p in huge)
    for wanted in planned:
        assert min(wanted.problem.output_shape) > 0 and set(wanted.passes) <= set(PASSES)


@pytest.mark.parametrize(
    "wanted",
    [
        case("dense", "float16"),
        case("dense", "tf32"),
        case("grouped", "float32", "nchw"),
        case("depthwise", "float16", "nchw"),
        case("pooling", "float16"),
        case("pooling", "float32", at=6),
    ],
    ids=str,
)
def test_small_cases_are_right_and_timed(wanted: Wanted) -> None:
    rows = gpu.measure(wanted, "cpu", FLOOR, 1e-6)
    assert [row.pass_name for row in rows] == list(wanted.passes)
    for row in rows:
        assert not row.failure and row.ratio is not None
        assert row.error is not None and row.floor_fraction is not None


def test_wrong_results_are_found() -> None:
    wanted = case("dense", "float16")
    inputs = gpu_cases.make_inputs(wanted, "cpu", 0)[0]
    right = {}
    with torch.no_grad():
        for name in PASSES:
            right |= gpu.call_once("torch", wanted, inputs, name, [])
    assert set(right) == {FORWARD, FORWARD_RELU, "grad_input", "grad_weight"}
    for name, value in right.items():
        wrong = value.clone()
        wrong[(-1,) * value.dim()] += 0.1 * value.float().norm().item()
        missing = value.clone()
        missing[(0,) * value.dim()] = float("nan")
        candidates = {"right": {name: value}, "wrong": {name: wrong}, "missing": {name: missing}}
        with torch.no_grad():
            errors = gpu_cases.relative_errors(wanted, inputs, candidates)
        assert gpu.verdict("torch", errors["right"], wanted) == ""
        for candidate in ("wrong", "missing"):
            assert "is wrong" in gpu.verdict("torchconv", errors[candidate], wanted)


def test_the_truth_is_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = case("dense", "float32", at=1)
    inputs = gpu_cases.make_inputs(wanted, "cpu", 0)[0]
    candidates = {"torch": {}}
    with torch.no_grad():
        for name in wanted.passes:
            candidates["torch"] |= gpu.call_once("torch", wanted, inputs, name, [])
        whole = gpu_cases.relative_errors(wanted, inputs, candidates)
        monkeypatch.setattr(gpu_cases, "CHUNK", 1)
        chunks = gpu_cases.relative_errors(wanted, inputs, candidates)
        assert chunks["torch"] == pytest.approx(whole["torch"])


def test_inputs_are_larger_than_the_cache() -> None:
    wanted = case("pooling", "float32")
    one = gpu_cases.make_inputs(wanted, "cpu", 0)
    assert len(one) == 1
    cache = 4 * one[0].x.nbytes
    several = gpu_cases.make_inputs(wanted, "cpu", cache)
    assert sum(inputs.x.nbytes for inputs in several) >= 2.5 * cache
    assert len({inputs.x.data_ptr() for inputs in several}) == len(several)


def test_backward_counts() -> None:
    dense = case("dense", "float32").problem
    assert gpu_cases.operations(dense, BACKWARD) == 2 * gpu_cases.operations(dense, FORWARD)
    x, w, z = (torch.Size(s).numel() for s in
               (dense.input_shape, dense.weight_shape, dense.output_shape))  # fmt: skip
    assert gpu_cases.minimal_bytes(dense, BACKWARD, 2) == 2 * (2 * x + 2 * w + z)
    pool: Problem = case("pooling", "float32").problem
    assert gpu_cases.minimal_bytes(pool, BACKWARD, 4) == counts.minimal_bytes(pool, counts.DGRAD, 4)


def test_a_refusal_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("no kernel\nat all")

    monkeypatch.setattr(gpu_cases.TorchConv, "operator", lambda *_: refuse)
    rows = gpu.measure(case("pooling", "float32"), "cpu", FLOOR, 1e-6)
    assert [row.failure for row in rows] == ["torchconv failed: NotImplementedError: no kernel"] * 2
    assert "0/1" in gpu.summary(rows)


def test_rows_survive_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gpu.measure(case("pooling", "float32"), "cpu", FLOOR, 1e-6)
    commands: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, command: commands.append(command))
    monkeypatch.setattr("sys.argv", ["gpu", "--seconds", "9", "--quick"])
    gpu.start_again(rows, tmp_path / "h100", 3.4)
    [command] = commands
    kept = tmp_path / "h100.rows"
    assert command[1:4] == ["-m", "benchmarks.gpu", "--quick"]
    assert command[4:] == ["--resume", str(kept), "--seconds", "3"]
    assert gpu.load_rows(kept) == rows


def test_run_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--filter", "pooling max_pool", "--quick"]
    assert gpu.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "pooling  float16  nhwc      forward" in printed and "of floor" in printed
    assert gpu.main([*arguments, "--seconds", "-1"]) == 1
    assert "No time was left for 8 of 8 cases." in capsys.readouterr().out
    rows = gpu.measure(case("pooling", "float32"), "cpu", FLOOR, 1e-6)
    gpu.write(report.Report("title", "torch", {"gpu": "none"}, rows), tmp_path / "results" / "h100")
    content = json.loads((tmp_path / "results" / "h100.json").read_text())
    assert len(content["rows"]) == len(rows)
    assert (tmp_path / "results" / "h100.md").read_text().startswith("# title")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "There is no GPU here" in capsys.readouterr().err


class FakeEvent:
    """Time passes by calls alone: a second each."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.at - self.at)


class FakeGraph:
    """Replays by calling again what was captured, told by the calls themselves."""

    capturing: list[float] | None = None

    def capture_begin(self) -> None:
        FakeGraph.capturing = self.captured = []

    def capture_end(self) -> None:
        FakeGraph.capturing = None

    def replay(self) -> None:
        FakeEvent.now += sum(self.captured)


def test_graphs_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []

    def call(library: str, at: int, seconds: float) -> None:
        order.append((library, at))
        if FakeGraph.capturing is None:
            FakeEvent.now += seconds
        else:
            FakeGraph.capturing.append(seconds)

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    libraries = [
        [lambda i=i: call("ours", i, 1e-4) for i in range(3)],
        [lambda i=i: call("theirs", i, 2e-3) for i in range(3)],
    ]
    ours, theirs = gpu_timing.interleave(libraries, 0.05)
    assert (ours.median, theirs.median) == (pytest.approx(1e-4), pytest.approx(2e-3))
    # A replay of 12 calls takes 1.2 ms, one of 3 calls 6 ms: seven rounds in 50 ms.
    assert ours.rounds == theirs.rounds == 7
    assert [at for library, at in order if library == "ours"][-12:] == [0, 1, 2] * 4
    slow = [[lambda: call("slow", 0, 1.0)]]
    assert gpu_timing.interleave(slow, 0.05)[0].rounds == 1
