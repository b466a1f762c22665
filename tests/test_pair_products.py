"""bfloat16 with AVX-512 on a processor without avx512_bf16: each family of kernels, in a process of
its own, because the choice is made once. float64 is the judge."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as torch_F

import torchconv.functional as F
from conftest import assert_accurate, in_layout
from torchconv import _load, explain


class Problem(NamedTuple):
    channels: int
    filters: int
    kernel: tuple[int, int]
    size: tuple[int, int] = (13, 18)
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    batch: int = 2

    @property
    def padding(self) -> tuple[int, int]:
        r, s = self.kernel
        return self.dilation * (r - 1) // 2, self.dilation * (s - 1) // 2


DENSE = (
    *(Problem(c, k, (3, 3), stride=s) for c, k in ((32, 32), (3, 16), (17, 5)) for s in (1, 2)),
    *(Problem(c, k, (1, 1), stride=s) for c, k in ((64, 48), (5, 70), (33, 1)) for s in (1, 2)),
    Problem(16, 32, (3, 3), dilation=2),
    Problem(3, 8, (7, 7), (31, 40), stride=2),
    Problem(3, 32, (4, 4), (32, 32), stride=4),
    Problem(24, 24, (5, 5)),
    Problem(24, 24, (1, 7)),
    Problem(20, 3, (9, 9)),
    Problem(64, 64, (3, 3), (1, 1), batch=1),
    Problem(96, 40, (3, 3), (4, 4), stride=3),
    Problem(512, 4, (2, 2), (2, 2), batch=1),
)
GROUPED = (
    *(Problem(32, 32, (3, 3), groups=g, stride=s) for g in (2, 4, 8, 16) for s in (1, 2)),
    *(Problem(64, 32, (1, 1), groups=g) for g in (2, 8)),
    Problem(96, 96, (3, 3), groups=2),
    Problem(48, 24, (5, 3), groups=3, dilation=2),
    Problem(16, 48, (3, 3), groups=8),
)
DEPTHWISE = (
    *(Problem(64, 64, (r, r), groups=64, stride=s) for r in (3, 5, 7) for s in (1, 2)),
    *(Problem(37, 37, (r, r), groups=37, stride=s) for r in (3, 5, 7) for s in (1, 2)),
    *(Problem(64, 64, k, groups=64) for k in ((1, 1), (2, 2), (1, 5), (11, 1), (4, 4), (9, 9))),
    Problem(24, 48, (3, 3), groups=24),
    Problem(64, 64, (3, 3), groups=64, dilation=2),
    Problem(64, 64, (3, 3), groups=64, stride=3),
    Problem(1, 1, (5, 5)),
)
FAMILIES = {"dense": DENSE, "grouped": GROUPED, "depthwise": DEPTHWISE}
LAYOUTS = ("contiguous", "channels_last")


def check(problem: Problem, layout: str) -> None:
    shape = (problem.batch, problem.channels, *problem.size)
    x = in_layout(torch.randn(shape).bfloat16(), layout)
    w = torch.randn(problem.filters, problem.channels // problem.groups, *problem.kernel).bfloat16()
    b = torch.randn(problem.filters).bfloat16()
    arguments = (problem.stride, problem.padding, problem.dilation, problem.groups)
    assert "pairs" not in str(explain(x, w, None, *arguments))
    given = [t.detach().requires_grad_() for t in (x, w, b)]
    z = F.conv2d(*given, *arguments)
    truths = [t.detach().double().contiguous().requires_grad_() for t in given]
    truth = torch_F.conv2d(*truths, *arguments)
    assert_accurate(z.detach(), truth.detach())
    dz = in_layout(torch.randn_like(truth).bfloat16(), layout)
    found = torch.autograd.grad(z, given, dz)
    wanted = torch.autograd.grad(truth, truths, dz.double().contiguous())
    for out, right in zip(found, wanted, strict=True):
        assert_accurate(out, right, usual=dz.numel() ** 0.5)


def check_family(name: str) -> None:
    torch.manual_seed(0)
    for problem, layout in itertools.product(FAMILIES[name], LAYOUTS):
        try:
            check(problem, layout)
        except AssertionError as error:
            raise AssertionError(f"{problem}, {layout}") from error


@pytest.mark.cpu_only
@pytest.mark.skipif(_load.isa() != "avx512", reason="only AVX-512 has products of pairs")
@pytest.mark.parametrize("name", FAMILIES)
def test_without_them(name: str) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    script = "import sys, test_pair_products as tests; tests.check_family(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, name],
        env={**os.environ, "PYTHONPATH": path, "TORCHCONV_PAIR_PRODUCTS": "0"},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
