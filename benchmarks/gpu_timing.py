"""Timing on a GPU: CUDA graphs of many calls, replayed in turn, each timed by events.

A graph leaves out what the host does between two launches, so that short kernels are measured and
not Python. Its calls rotate over several sets of inputs, together larger than the GPU's cache: with
one set, a repeated call would read the cache, which a network's layers do not. Graphs of the
libraries are replayed alternately, as in timing.py, and for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.timing import Timing

Call = Callable[[], object]
SLEEP_CYCLES = 300_000  # about 0.2 ms


class Graph:
    """A CUDA graph of `count` calls, rotating over `calls`; made and replayed on this stream."""

    def __init__(self, calls: Sequence[Call], count: int) -> None:
        self.count = count
        self._graph = torch.cuda.CUDAGraph()
        # A host call that a capture forbids fails here, and ends the capture.
        self._graph.capture_begin()
        try:
            for index in range(count):
                calls[index % len(calls)]()
        finally:
            self._graph.capture_end()

    def seconds(self) -> float:
        """For one call, by one replay."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU is busy until everything is queued: else it would wait for the launch, timed.
        torch.cuda._sleep(SLEEP_CYCLES)
        before.record()
        self._graph.replay()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3 / self.count


def _estimate(calls: Sequence[Call]) -> float:
    """Seconds for one call, the host's part included. Every call has run once afterwards."""
    calls[0]()  # libraries search for an algorithm in their first call
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for call in calls:
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / len(calls)


def interleave(libraries: Sequence[Sequence[Call]], budget: float) -> list[Timing]:
    """Time what each library does, in about `budget` seconds of GPU time in all.

    A library is given as the same call on several sets of inputs. The current stream must be one
    that can be captured: not the default stream.
    """
    graphs = []
    for calls in libraries:
        # A replay of a millisecond; whole rotations.
        wanted = min(128, max(1, round(1e-3 / max(_estimate(calls), 1e-6))))
        graphs.append(Graph(calls, -(-wanted // len(calls)) * len(calls)))
    first = [graph.seconds() for graph in graphs]
    round_time = sum(t * graph.count for t, graph in zip(first, graphs, strict=True))
    least = 5 if round_time <= budget else 3 if round_time <= 10 * budget else 1
    rounds = min(50, max(least, round(budget / round_time)))
    samples: list[list[float]] = [[] for _ in graphs]
    order = list(range(len(graphs)))
    for _ in range(rounds):
        for index in order:
            samples[index].append(graphs[index].seconds())
        order = order[1:] + order[:1]
    return [Timing.of(times) for times in samples]
