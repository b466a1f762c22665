"""The same problems in float64, one sample at a time, to judge a result before it is timed.

A convolution is summed tap by tap, each tap one matrix product (lecture form: a window times the
kernel), so it shares no code with the convolutions under test and needs no im2col buffer; a large
image is taken some rows at a time, which the caches then keep from tap to tap. Pooling and batch
normalisation use PyTorch in float64, the latter on the batch as a whole. Errors are
||got - expected|| / ||expected|| over a whole tensor.

A sum of L rounded terms errs like sqrt(L) units of roundoff (Higham and Mary, 2019, "A new approach
to probabilistic rounding error analysis"); Winograd adds a constant. 16-bit types accumulate in
float32 and round the result once. `tolerance` follows that, with a factor of two in hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.counts import FORWARD_RESIDUAL
from benchmarks.problems import Problem

# Elements of a window that is taken at once.
BAND_ELEMENTS = 1 << 18
# Elements that are compared at once, where one index of the first axis has no more.
COMPARED_ELEMENTS = 1 << 18

# Some of output, forward_residual (with dz for the residual), grad_input, grad_weight, grad_bias.
Results = Mapping[str, Tensor]


def _windows(problem: Problem) -> Iterator[tuple[slice, int, int, tuple[slice, slice]]]:
    """Bands of output rows; for each kernel element, the padded input's rows and columns."""
    p, q = problem.output_shape[2:]
    (stride_h, stride_w), (dilation_h, dilation_w) = problem.stride, problem.dilation
    band = max(1, BAND_ELEMENTS // (problem.c * max(q, 1)))
    for begin in range(0, p, band):
        end = min(begin + band, p)
        for r in range(problem.kernel[0]):
            top = r * dilation_h
            rows = slice(top + begin * stride_h, top + (end - 1) * stride_h + 1, stride_h)
            for s in range(problem.kernel[1]):
                left = s * dilation_w
                columns = slice(left, left + (q - 1) * stride_w + 1, stride_w)
                yield slice(begin, end), r, s, (rows, columns)


def _conv2d(
    problem: Problem, x: Tensor, w: Tensor, b: Tensor | None, dz: Tensor | None
) -> dict[str, Tensor]:
    """One sample: x [C,H,W], w [K,C/g,R,S], b [K], dz [K,P,Q], everything float64."""
    g, c, k = problem.groups, problem.c, problem.k
    p, q = problem.output_shape[2:]
    top, left = problem.padding
    padded = F.pad(x, (left, left, top, top))
    weights = w.view(g, k // g, c // g, *problem.kernel)
    z = x.new_zeros(g, k // g, p, q)
    d_padded, dw = torch.zeros_like(padded), torch.zeros_like(weights)
    for band, r, s, (rows, columns) in _windows(problem):
        window = padded[:, rows, columns].reshape(g, c // g, -1)
        tap = weights[..., r, s]
        z[:, :, band] += (tap @ window).view(g, k // g, -1, q)
        if dz is not None:
            d_outputs = dz[:, band].reshape(g, k // g, -1)
            dw[..., r, s] += d_outputs @ window.mT
            d_window = d_padded[:, rows, columns]
            if g == 1 and band.stop - band.start == 1:  # rows of a large image, added in place
                d_window.squeeze(1).addmm_(tap[0].mT, d_outputs[0])
            else:
                d_window += (tap.mT @ d_outputs).view(c, -1, q)
    z = z.view(k, p, q)
    results = {"output": z if b is None else z + b.view(-1, 1, 1)}
    if dz is not None:
        results[FORWARD_RESIDUAL] = (results["output"] + dz).relu_()
        bottom, right = top + problem.h, left + problem.w
        results["grad_input"] = d_padded[:, top:bottom, left:right]
        results["grad_weight"] = dw.view_as(w)
        results["grad_bias"] = dz.sum((1, 2))
    return results


def torch_pooling(problem: Problem, x: Tensor) -> Tensor:
    """The problem through torch.nn.functional, which has no min pooling of its own."""
    kernel, stride, padding = problem.kernel, problem.stride, problem.padding
    if problem.adaptive:
        pooled: Tensor = getattr(F, problem.operator)(x, kernel)
        return pooled
    if problem.operator == "avg_pool2d":
        return F.avg_pool2d(x, kernel, stride, padding, problem.ceil_mode)
    if problem.operator == "max_pool2d":
        return F.max_pool2d(x, kernel, stride, padding, problem.dilation, problem.ceil_mode)
    return -F.max_pool2d(-x, kernel, stride, padding, problem.dilation, problem.ceil_mode)


def _pool2d(problem: Problem, x: Tensor, dz: Tensor | None) -> dict[str, Tensor]:
    # PyTorch pools float64 images faster in channels_last.
    x = x.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(dz is not None)
    z = torch_pooling(problem, x)
    results = {"output": z.detach()[0]}
    if dz is not None:
        results["grad_input"] = torch.autograd.grad(z, x, dz.unsqueeze(0))[0][0]
    return results


def torch_norm(
    problem: Problem, x: Tensor, w: Tensor | None, b: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Batch normalisation and what follows it, in place as networks have it, by torch.nn."""
    z = F.batch_norm(x, None, None, w, b, training=True)
    if residual is not None:
        z = z.add_(residual)
    if problem.activation is None:
        return z
    return F.relu_(z) if problem.activation == "relu" else F.relu6(z, inplace=True)


def _norm2d(
    problem: Problem, x: Tensor, w: Tensor, b: Tensor, dz: Tensor | None
) -> dict[str, Tensor]:
    """The whole batch, everything float64. The gradient serves as residual too."""
    x, w, b = (t.requires_grad_(dz is not None) for t in (x, w, b))
    z = torch_norm(problem, x, w, b, dz if problem.residual else None)
    results = {"output": z.detach()}
    if dz is not None:
        grads = torch.autograd.grad(z, (x, w, b), dz)
        results |= zip(("grad_input", "grad_weight", "grad_bias"), grads, strict=True)
    return results


def relative_errors(
    problem: Problem,
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    dz: Tensor | None,
    candidates: Mapping[str, Results],
) -> dict[str, dict[str, float]]:
    """||got - expected|| / ||expected|| of every tensor in `candidates`: {candidate: {tensor: e}}.

    Without dz only the outputs are judged. A NaN in a result gives a NaN error.
    """
    squares: dict[tuple[str, str], float] = {}
    totals: dict[str, float] = {}
    over_batch: dict[str, Tensor] = {}  # grad_weight and grad_bias, summed over the samples

    def compare(name: str, expected: Tensor, index: int | None) -> None:
        rows = max(1, COMPARED_ELEMENTS * len(expected) // max(expected.numel(), 1))
        expected_parts = expected.split(rows)
        squared = sum(float(part.square().sum()) for part in expected_parts)
        totals[name] = totals.get(name, 0.0) + squared
        for candidate, results in candidates.items():
            if name in results:
                got = results[name].detach()
                got_parts = (got if index is None else got[index]).split(rows)
                error = sum(
                    float((part.double() - wanted).square_().sum())
                    for part, wanted in zip(got_parts, expected_parts, strict=True)
                )
                squares[candidate, name] = squares.get((candidate, name), 0.0) + error

    w64 = None if w is None else w.detach().double().contiguous()
    b64 = None if b is None else b.detach().double()
    if problem.norm:
        assert w64 is not None and b64 is not None
        d64 = None if dz is None else dz.double()
        over_batch = _norm2d(problem, x.detach().double(), w64, b64, d64)
    for index in range(0 if problem.norm else problem.n):
        x64 = x[index].detach().double().contiguous()
        dz64 = None if dz is None else dz[index].double().contiguous()
        if w64 is None:
            expected = _pool2d(problem, x64, dz64)
        else:
            expected = _conv2d(problem, x64, w64, b64, dz64)
        for name, value in expected.items():
            if name in ("output", FORWARD_RESIDUAL, "grad_input"):
                compare(name, value, index)
            else:
                over_batch[name] = value if index == 0 else over_batch[name].add_(value)
    for name, value in over_batch.items():
        compare(name, value, None)
    errors: dict[str, dict[str, float]] = {candidate: {} for candidate in candidates}
    for (candidate, name), square in squares.items():
        errors[candidate][name] = sqrt(square / totals[name]) if totals[name] else sqrt(square)
    return errors


def tolerance(problem: Problem, name: str, dtype: torch.dtype) -> float:
    """The largest relative error of a right result in this dtype."""
    if name in ("output", FORWARD_RESIDUAL):
        terms = (problem.c // problem.groups) * prod(problem.kernel)
    elif name == "grad_input":
        terms = (problem.k // problem.groups) * prod(problem.kernel)
    else:
        terms = problem.n * prod(problem.output_shape[2:])
    if problem.memory_bound and not (problem.norm and name in ("grad_weight", "grad_bias")):
        terms = prod(problem.kernel)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    bound = (16 + sqrt(terms)) * torch.finfo(accumulated).eps
    if dtype != accumulated:
        bound += torch.finfo(dtype).eps
    if problem.activation and name != "output":
        # Where rounding takes an element to the other side of zero, its gradient comes or goes: a
        # share of them, or one or two of a few.
        bound += 4 * sqrt(torch.finfo(accumulated).eps + 1 / prod(problem.input_shape))
    return bound
