"""What a problem costs at least: arithmetic operations and bytes of memory traffic, for each pass.

Operations count the direct algorithm, two for each multiply-add, padding included: the convention
of DeepBench and of the Winograd papers, so an algorithm that multiplies less can pass the peak.
Bytes count every tensor that a pass must read or write, once; of the input, only the elements that
some window reads (a 1x1 kernel with stride 2 needs a quarter of it). Max and min pooling add the
one byte an output that tells backward which element of its window was selected.
"""

from __future__ import annotations

from math import prod

from benchmarks.problems import Problem

FORWARD = "forward"
FORWARD_EVAL = "forward_eval"  # of a layer in eval mode, which may keep its weights packed
# conv, residual and ReLU: one call of torchconv, conv2d, add_ and relu_ of a peer
FORWARD_RESIDUAL = "forward_residual"
FORWARD_BACKWARD = "forward_backward"
FORWARD_WGRAD = "forward_wgrad"  # training without an input gradient, as in a first layer
DGRAD = "dgrad"
WGRAD = "wgrad"
INFERENCE = (FORWARD, FORWARD_EVAL, FORWARD_RESIDUAL)
PASSES = (*INFERENCE, FORWARD_BACKWARD, FORWARD_WGRAD, DGRAD, WGRAD)


def touched(size: int, kernel: int, stride: int, padding: int, dilation: int, outputs: int) -> int:
    """How many of `size` positions of one axis are read by at least one window."""
    positions = {
        output * stride - padding + tap * dilation
        for output in range(outputs)
        for tap in range(kernel)
    }
    return sum(0 <= position < size for position in positions)


def operations(problem: Problem, pass_name: str) -> int:
    """Operations of a convolution pass; for pooling, one for each element of each window; for
    normalisation, one for each element."""
    outputs = prod(problem.output_shape)
    if problem.adaptive or problem.norm:  # windows share few elements
        return prod(problem.input_shape) * (2 if pass_name == FORWARD_BACKWARD else 1)
    if problem.pooling:
        return outputs * prod(problem.kernel) * (2 if pass_name == FORWARD_BACKWARD else 1)
    once = 2 * outputs * (problem.c // problem.groups) * prod(problem.kernel)
    return once * {FORWARD_BACKWARD: 3, FORWARD_WGRAD: 2}.get(pass_name, 1)


def minimal_bytes(problem: Problem, pass_name: str, itemsize: int) -> int:
    """Bytes that a pass must move between memory and the processor, each tensor once."""
    if problem.norm:
        # x, residual and y; then x (or y, where a residual is in it, too), dy and dx
        forward, backward = 2 + problem.residual, 3 + problem.residual
        arrays = forward if pass_name == FORWARD else forward + backward
        return arrays * prod(problem.input_shape) * itemsize
    n, c, h, w = problem.input_shape
    p, q = problem.output_shape[2:]
    rows, columns = (
        touched(size, kernel, stride, padding, dilation, outputs)
        for size, kernel, stride, padding, dilation, outputs in zip(
            (h, w),
            problem.kernel,
            problem.stride,
            problem.padding,
            problem.dilation,
            (p, q),
            strict=True,
        )
    )
    whole = prod(problem.input_shape)  # a gradient is written everywhere, zeros too
    read = whole if problem.adaptive else n * c * rows * columns
    outputs = prod(problem.output_shape)
    if problem.pooling:
        forward = (read + outputs) * itemsize
        if pass_name == FORWARD:
            return forward
        backward = (outputs + whole) * itemsize
        selected = 0 if "avg" in problem.operator else outputs
        if pass_name == DGRAD:
            return backward + selected
        return forward + backward + 2 * selected
    weights = prod(problem.weight_shape) + (problem.k if problem.bias else 0)
    traffic = {
        FORWARD: read + weights + outputs,
        FORWARD_EVAL: read + weights + outputs,
        FORWARD_RESIDUAL: read + weights + 2 * outputs,
        DGRAD: outputs + prod(problem.weight_shape) + whole,
        WGRAD: outputs + read + weights,
    }
    traffic[FORWARD_WGRAD] = traffic[FORWARD] + traffic[WGRAD]
    # One read of dz serves both gradients.
    traffic[FORWARD_BACKWARD] = traffic[FORWARD] + traffic[DGRAD] + traffic[WGRAD] - outputs
    return traffic[pass_name] * itemsize
