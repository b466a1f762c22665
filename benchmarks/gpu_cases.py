"""What benchmarks/gpu.py runs: problems with their tensors on the GPU, and the truth about them.

Three passes: `forward`; `forward_relu`, with bias and ReLU, which torchconv fuses; `backward`, the
gradients of input and weight (of the input alone for pooling) from a forward made before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counts, reference
from benchmarks.gpu_machine import TF32, torch_dtype
from benchmarks.peers import Eager, TorchConv
from benchmarks.problems import Problem, load_group

FORWARD, FORWARD_RELU, BACKWARD = PASSES = ("forward", "forward_relu", "backward")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
LIBRARIES = ("torchconv", "torch")

Call = Callable[[], Sequence[Tensor]]

# What is measured, most wanted first: a file of shapes/gpu, dtypes, layouts and passes.
PLAN: tuple[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    ("dense", ("float16",), ("nhwc",), PASSES),
    ("pooling", ("float16",), ("nhwc", "nchw"), (FORWARD, BACKWARD)),
    ("depthwise", ("float16",), ("nhwc", "nchw"), (FORWARD, BACKWARD)),
    ("grouped", ("float16",), ("nhwc", "nchw"), (FORWARD, BACKWARD)),
    ("huge", ("bfloat16",), ("nhwc", "nchw"), (FORWARD,)),
    ("dense", ("bfloat16",), ("nhwc",), PASSES),
    ("dense", (TF32,), ("nhwc",), PASSES),
    ("pooling", ("float32",), ("nhwc", "nchw"), (FORWARD, BACKWARD)),
    ("depthwise", ("float32",), ("nhwc", "nchw"), (FORWARD, BACKWARD)),
    ("dense", ("float16",), ("nchw",), PASSES),
    ("dense", ("float32",), ("nchw", "nhwc"), (FORWARD, BACKWARD)),
    ("grouped", ("float32",), ("nhwc", "nchw"), (FORWARD, BACKWARD)),
)


@dataclass(frozen=True)
class Wanted:
    """One problem in one dtype and layout, with the passes to run."""

    problem: Problem
    dtype: str
    layout: str
    passes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.problem.group} {self.problem} {self.dtype} {self.layout}"


def planned() -> Iterator[Wanted]:
    for group, dtypes, layouts, passes in PLAN:
        problems = [replace(p, group=group) for p in load_group(f"gpu/{group}")]
        for dtype in dtypes:
            for layout in layouts:
                for problem in problems:
                    yield Wanted(problem, dtype, layout, passes)


@dataclass
class Inputs:
    """One set of tensors: input, weight, bias, gradient by the output."""

    x: Tensor
    w: Tensor | None
    b: Tensor | None
    dz: Tensor


def make_inputs(wanted: Wanted, device: str, cache: int) -> list[Inputs]:
    """Sets of equal values that together are well larger than a cache of so many bytes.

    Weights are shared: they stay in the cache in a network too.
    """
    problem, layout = wanted.problem, LAYOUTS[wanted.layout]
    dtype = torch_dtype(wanted.dtype)

    def randn(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, device=device, dtype=dtype).mul_(scale)
        return values.contiguous(memory_format=layout) if len(shape) == 4 else values

    x, dz = randn(problem.input_shape), randn(problem.output_shape)
    w = b = None
    if not problem.pooling:
        # Weights of the usual initialisation, so that float16 neither overflows nor vanishes.
        fan_in = problem.c // problem.groups * prod(problem.kernel)
        w, b = randn(problem.weight_shape, fan_in**-0.5), randn((problem.k,))
    count = min(32, max(1, ceil(2.5 * cache / x.nbytes)))
    return [Inputs(x, w, b, dz)] + [Inputs(x.clone(), w, b, dz.clone()) for _ in range(count - 1)]


def make_call(library: str, problem: Problem, inputs: Inputs, pass_name: str) -> Call:
    """What is checked and timed."""
    peer = TorchConv() if library == "torchconv" else Eager()
    operator = peer.operator(problem)
    if pass_name == FORWARD:
        b = inputs.b if problem.bias else None
        return lambda: (operator(inputs.x, inputs.w, b),)
    if pass_name == FORWARD_RELU:
        return _fused(library, problem, inputs, operator)
    x = inputs.x.detach().requires_grad_()
    w = None if inputs.w is None else inputs.w.detach().requires_grad_()
    targets = (x,) if w is None else (x, w)
    with torch.enable_grad():
        z = operator(x, w, None)
    return lambda: torch.autograd.grad(z, targets, inputs.dz, retain_graph=True)


def _fused(
    library: str,
    problem: Problem,
    inputs: Inputs,
    operator: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
) -> Call:
    if library == "torch":
        return lambda: (F.relu(operator(inputs.x, inputs.w, inputs.b), inplace=True),)
    import torchconv.functional

    conv2d, w = torchconv.functional.conv2d, inputs.w
    assert w is not None
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    return lambda: (conv2d(inputs.x, w, inputs.b, *geometry, activation="relu"),)


def names(problem: Problem, pass_name: str) -> tuple[str, ...]:
    """What a call returns."""
    if pass_name == BACKWARD:
        return ("grad_input",) if problem.pooling else ("grad_input", "grad_weight")
    return (pass_name,)


def operations(problem: Problem, pass_name: str) -> int:
    if pass_name != BACKWARD:
        return counts.operations(problem, counts.FORWARD)
    both = counts.operations(problem, counts.FORWARD_BACKWARD)
    return both - counts.operations(problem, counts.FORWARD)


def minimal_bytes(problem: Problem, pass_name: str, itemsize: int) -> int:
    if pass_name == FORWARD_RELU:
        problem = replace(problem, bias=True)
    if pass_name != BACKWARD:
        return counts.minimal_bytes(problem, counts.FORWARD, itemsize)
    if problem.pooling:
        return counts.minimal_bytes(problem, counts.DGRAD, itemsize)
    both = counts.minimal_bytes(problem, counts.FORWARD_BACKWARD, itemsize)
    return both - counts.minimal_bytes(problem, counts.FORWARD, itemsize)


# --- the truth ------------------------------------------------------------------------------------

# Elements of a chunk of samples in the wider type.
CHUNK = 1 << 27


def relative_errors(
    wanted: Wanted, inputs: Inputs, candidates: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """||got - expected|| / ||expected|| of every tensor: {candidate: {tensor: error}}.

    What is expected comes from PyTorch in a wider type, some samples at a time: float64 for
    float32, and exact float32 for types that round more.
    """
    problem = wanted.problem
    wide = torch.float64 if wanted.dtype in ("float32", "float64") else torch.float32
    squares: dict[tuple[str, str], float] = {}
    totals: dict[str, float] = {}

    def compare(name: str, expected: Tensor, samples: slice) -> None:
        totals[name] = totals.get(name, 0.0) + _square(expected)
        for candidate, results in candidates.items():
            if name in results:
                error = _square(results[name][samples].to(expected.dtype) - expected)
                squares[candidate, name] = squares.get((candidate, name), 0.0) + error

    backward = any(name.startswith("grad") for results in candidates.values() for name in results)
    w = None if inputs.w is None else inputs.w.detach().to(wide).contiguous()
    b = None if inputs.b is None else inputs.b.to(wide)
    dw: Tensor | None = None
    largest = max(prod(problem.input_shape), prod(problem.output_shape)) // problem.n
    step = max(1, CHUNK // largest)
    for first in range(0, problem.n, step):
        samples = slice(first, min(first + step, problem.n))
        x = inputs.x[samples].detach().to(wide).contiguous().requires_grad_(backward)
        weight = None if w is None else w.requires_grad_(backward)
        with torch.enable_grad(), cudnn(search=False, tf32=False):
            z = Eager().operator(problem)(x, weight, None)
            if backward:
                dz = inputs.dz[samples].to(wide).contiguous()
                targets = (x,) if weight is None else (x, weight)
                grads = torch.autograd.grad(z, targets, dz)
                compare("grad_input", grads[0], samples)
                if weight is not None:
                    chunk = grads[1].double()
                    dw = chunk if dw is None else dw + chunk
        z = z.detach()
        if b is not None:
            biased = z + b.view(-1, 1, 1)
            compare(FORWARD_RELU, F.relu(biased), samples)
            z = biased if problem.bias else z
        compare(FORWARD, z, samples)
    if dw is not None:
        compare("grad_weight", dw, slice(None))
    errors: dict[str, dict[str, float]] = {candidate: {} for candidate in candidates}
    for (candidate, name), square in squares.items():
        errors[candidate][name] = sqrt(square / totals[name]) if totals[name] else sqrt(square)
    return errors


def _square(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2


def cudnn(*, search: bool, tf32: bool) -> contextlib.AbstractContextManager[None]:
    """Whether cuDNN searches for its fastest algorithm, and whether float32 may round to TF32."""
    manager: contextlib.AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=search, allow_tf32=tf32
    )
    return manager


def tolerance(wanted: Wanted, name: str) -> float:
    kind = name if name.startswith("grad") else "output"
    bound = reference.tolerance(wanted.problem, kind, torch_dtype(wanted.dtype))
    # TF32 keeps 10 bits of both factors.
    return bound + (1e-3 if wanted.dtype == TF32 else 0.0)
