"""tools/: what is read out of CUDA's reports, and what is made of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import cuda_check, gpu_check, resources
from tools.resources import Kernel

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9torchconv4cuda5scaleIfLi4EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN9torchconv4cuda5scaleIfLi4EEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 13 registers, used 1 barriers, 128 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 9.809 ms
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers
"""
DISASSEMBLY = """\
	code for sm_90a
		Function : plain
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x017a02 */
                                                                       /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]  /* 0x04981 */
        /*0020*/         @P1       HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ; /* 0x04981 */
        /*0030*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64]  /* 0x04981 */
"""


def test_reports_are_read() -> None:
    first, second = resources.parse_report(REPORT)
    assert (first.arch, first.registers, first.shared, first.stack, first.spills) == (
        "sm_80", 13, 128, 0, 0,
    )  # fmt: skip
    assert (second.symbol, second.registers, second.shared) == ("plain", 255, 0)
    assert (second.stack, second.spills) == (16, 20)


def test_complaints_are_found() -> None:
    assert resources.complaints(REPORT) == []
    text = (
        'a.cu(5): warning #177-D: variable "b" was declared but never referenced\n'
        'Remark: The warnings can be suppressed with "-diag-suppress <warning-number>"\n'
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async is serialized\n"
        "a.cpp:3:5: warning: unused variable\n"
    )
    assert len(resources.complaints(text)) == 3


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void torchconv::cuda::(anonymous namespace)::k<float, 4>(float const*, int)",
            "k<float, 4>",
        ),
        ("k(int)", "k"),
        ("void k<(mode)3, f<(int)2>>(g<int>)", "k<(mode)3, f<(int)2>>"),
        ("plain", "plain"),
    ],
)
def test_names_are_shortened(name: str, short: str) -> None:
    assert resources.shorten(name) == short
    assert Kernel("", "", name=short).base == short.partition("<")[0]


def test_instructions_are_counted() -> None:
    found = resources.parse_disassembly(DISASSEMBLY)
    assert found == {
        ("plain", "sm_90a"): {"LDC": 1, "LDG.E.128.CONSTANT": 2, "HGMMA.64x128x16.F32": 1}
    }
    kernel = Kernel("plain", "sm_90a", instructions=found["plain", "sm_90a"])
    assert kernel.holds(cuda_check.WIDE) and kernel.holds(r"HGMMA\..*")
    assert not kernel.holds(r"[HI]MMA\..*")


def test_spills_above_the_budget_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Kernel("a", "sm_90a", name="a<int>", spills=8), Kernel("b", "sm_90a", name="b")]
    assert "a<int> (sm_90a) spills 8 bytes, above 0" in cuda_check.spill_faults(kernels)[0]
    monkeypatch.setattr(cuda_check, "SPILL_BUDGET", {("a", "sm_90a"): 8})
    assert cuda_check.spill_faults(kernels) == []


def test_rules() -> None:
    wide = {"LDG.E.128": 3}
    kernels = [
        Kernel("", "sm_90a", "avg_pool2d.cu", "pool<1>"),
        Kernel("", "sm_90a", "avg_pool2d.cu", "pool<8>", instructions=wide),
        Kernel("", "sm_90a", "avg_pool2d.cu", "other<8>"),
        Kernel("", "sm_80", "avg_pool2d.cu", "third"),
        Kernel("", "sm_90a", "cutlass_sm90_fprop.cu", "cutlass::device_kernel<1>"),
        Kernel("", "sm_90a", "mma_half.cu", "mma_gather", instructions={"HMMA.16816.F32": 1}),
    ]
    assert cuda_check.rule_faults(kernels) == [
        "cutlass_sm90_fprop.cu: cutlass::device_kernel<1> (sm_90a) has no wgmma",
        "avg_pool2d.cu: no instance of other (sm_90a) has 16-byte accesses",
    ]


def test_table_and_list() -> None:
    kernels = [
        Kernel("", "sm_90a", "pool.cu", "pool<1>", registers=30, shared=0),
        Kernel("", "sm_90a", "pool.cu", "pool<8>", registers=62, shared=128),
    ]
    [line] = [line for line in cuda_check.table(kernels).splitlines() if "pool.cu" in line]
    assert line.split() == ["pool.cu", "pool", "sm_90a", "2", "30-62", "0-128", "0", "0"]
    assert "pool.cu: pool<8>" in cuda_check.every_instance(kernels)


# gpu_check


def step(code: str, seconds: float = 60, name: str = "step") -> gpu_check.Step:
    command = [sys.executable, "-c", code]
    return gpu_check.Step(name, seconds, command, {"WHERE": "here"}, gpu_check.last_lines(2))


def test_a_step_that_passes(tmp_path: Path) -> None:
    outcome = gpu_check.run(step("import os; print(1); print(os.environ['WHERE'])"), 60, tmp_path)
    assert (outcome.status, outcome.digest) == ("passed", "1\nhere")
    assert (tmp_path / "step.log").read_text() == "1\nhere\n"


def test_a_step_that_fails(tmp_path: Path) -> None:
    outcome = gpu_check.run(step("print(7); raise SystemExit(3)"), 60, tmp_path)
    assert (outcome.status, outcome.digest) == ("failed (3)", "7")
    assert not outcome.passed


def test_a_step_that_hangs_is_cut_off_with_its_children(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; print('begun', flush=True);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    )
    outcome = gpu_check.run(step(code), 5, tmp_path)
    assert outcome.status == "cut off after 5 s" and outcome.digest == "begun"


def test_a_step_without_time_or_program(tmp_path: Path) -> None:
    assert gpu_check.run(step("pass"), 2, tmp_path).status == "no time left"
    absent = gpu_check.Step("x", 9, ["no-such-program"], {}, str)
    assert gpu_check.run(absent, 60, tmp_path).status == "not there"


def test_steps_are_chosen() -> None:
    assert [s.name for s in gpu_check.chosen("build,sanitizer", [])] == [
        "device", "build", "memcheck", "racecheck",
    ]  # fmt: skip
    [tests] = gpu_check.chosen("tests", ["tests/test_pool2d.py"])
    assert tests.command[-1] == "tests/test_pool2d.py"
    with pytest.raises(SystemExit, match="unknown steps: nothing"):
        gpu_check.chosen("tests,nothing", [])


def test_digests() -> None:
    text = (
        "..F\nFAILED tests/a.py::t[1] - AssertionError\nFAILED tests/a.py::t[2] - AssertionError\n"
        "2 failed, 1 passed in 3.00s\n"
    )
    assert gpu_check.test_digest(text).splitlines() == [
        "FAILED tests/a.py::t[1] - AssertionError",
        "FAILED tests/a.py::t[2] - AssertionError",
        "2 x FAILED tests/a.py::t",
        "2 failed, 1 passed in 3.00s",
    ]
    text = "========= COMPUTE-SANITIZER\n126 calls\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_check.sanitizer_digest(text) == "126 calls\n========= ERROR SUMMARY: 0 errors"


def test_what_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs, results, out = (tmp_path / name for name in ("logs", "results", "out"))
    for folder in (logs, results):
        folder.mkdir()
    (logs / "build.log").write_text("built\n")
    (results / "h100.md").write_text("table")
    monkeypatch.delenv("OUT", raising=False)
    gpu_check.copy_out(logs, results, 0)
    assert not out.exists()
    monkeypatch.setenv("OUT", str(out))
    gpu_check.copy_out(logs, results, 0)
    assert sorted(path.name for path in out.iterdir()) == ["gpu-check.log", "h100.md"]
    assert "===== build.log\nbuilt" in (out / "gpu-check.log").read_text()


def test_main_reports_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    monkeypatch.setattr(
        gpu_check, "steps", lambda: [step("exit(1)", name="one"), step("pass", name="two")]
    )
    assert gpu_check.main(["--steps", "one,two"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "===== one: failed (1), two: passed"
    assert gpu_check.main(["--steps", "two"]) == 0
