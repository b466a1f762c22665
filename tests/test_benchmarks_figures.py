"""What calls are timed, and the figures that README.md takes from the committed results."""

from __future__ import annotations

import pytest
import torch

from benchmarks import calls, headline, timing


def test_readme_has_the_committed_figures() -> None:
    text = headline.README.read_text("utf-8")
    assert text == headline.updated(text, headline.RESULTS), "run python -m benchmarks.headline"
    assert "| grouped" in text and "| inference" in text


def test_headline_cells() -> None:
    rows = [{"ratio": ratio} for ratio in (1.0, None, 4.0)]
    assert headline.mean_cell(rows) == "2.00 (1.00)"
    assert headline.mean_cell(rows[1:]) == "4.00"
    assert headline.mean_cell(rows[1:2]) == ""


def test_headline_needs_its_marks() -> None:
    with pytest.raises(ValueError, match="has no lines"):
        headline.updated("# torchconv\n", headline.RESULTS)


def test_headline_refuses_several_machines() -> None:
    machine = {"cpu": "one", "threads": "2", "isa": "AVX2", "torch": "2.13.0"}
    same = [{"machine": machine}, {"machine": {**machine, "commit": "another"}}]
    assert headline.the_machine(same) == "one, 2 threads, AVX2, PyTorch 2.13.0"
    with pytest.raises(ValueError, match="several machines"):
        headline.the_machine([*same, {"machine": {**machine, "threads": "1"}}])


def test_calls_are_the_same_of_both_libraries() -> None:
    """A row of benchmarks.calls compares like with like: each call of torch's gives the same."""
    seen = set()
    for what, pass_name, recorded, both in calls.cases(2, 3, 3):
        seen.add((what, pass_name))
        with torch.set_grad_enabled(recorded):
            ours, peer = (call() for call in both)
        torch.testing.assert_close(ours, peer)
    assert {w for w, p in seen if p == "forward"} == {w for w, _ in seen}
    assert calls.of_one(timing.Timing(2.0, 1.0, 3.0, 5)).median == 2.0 / calls.CALLS
