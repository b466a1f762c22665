"""Timing several callables in one process, in turn.

The clock speed, the page cache and the neighbours of a shared machine drift over seconds, so two
things timed one after the other differ by more than what is measured. Here every round calls each
candidate once, in an order that rotates, and each median is taken over the same rounds. What a call
allocates it also frees inside its own time, with PyTorch's allocator as it is.

A whole network finds its weights in the cache when it runs again and again, as in use, but not
after another library's copy of it ran; nor are that library's threads asleep yet, and those of an
inference engine spin beside the next library's work. So a turn may be several calls after a pause,
the first of which is not timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median, quantiles


@dataclass(frozen=True)
class Timing:
    """Seconds for one call."""

    median: float
    first_quartile: float
    third_quartile: float
    rounds: int

    @property
    def spread(self) -> float | None:
        """Distance of the quartiles over the median: above a fifth, the machine was not quiet."""
        if self.rounds < 3:
            return None
        return (self.third_quartile - self.first_quartile) / self.median

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        first, _, third = quantiles(samples, n=4, method="inclusive")
        return cls(median(samples), first, third, len(samples))


def interleave(
    calls: Sequence[Callable[[], object]],
    budget: float,
    min_rounds: int = 7,
    max_rounds: int = 2000,
    clock: Callable[[], float] = time.perf_counter,
    called_before: bool = False,
    turn: int = 1,
    pause: float = 0.0,
) -> list[Timing]:
    """Time each of `calls` for about `budget` seconds in all.

    At least `min_rounds` rounds are taken; where they would need more than five times the budget,
    three (or `min_rounds`, if that is fewer). Two untimed rounds come first (one, if it alone
    exceeds the budget).

    Calls that were made before have had one of these. A round of theirs that exceeds the budget
    counts at once, three rounds are enough where more would need twice the budget, and one where
    it alone does: what is left to warm is nothing against such a time.

    A round calls each `turn` times in a row, after `pause` seconds, and leaves out the first of
    several.
    """
    order = list(range(len(calls)))

    def once() -> list[list[float]]:
        seconds: list[list[float]] = [[] for _ in calls]
        for index in order:
            time.sleep(pause)
            for _ in range(turn):
                before = clock()
                calls[index]()
                seconds[index].append(clock() - before)
        return [each[min(1, turn - 1) :] for each in seconds]

    limit = (2 if called_before else 5) * budget
    few, rounds = min(3, min_rounds), []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for _ in range(1 if called_before else 2):
            first = once()
            if (spent := clock() - start) > budget:
                break
        if called_before and spent > budget:
            rounds = [first]
            order = order[1:] + order[:1]
            few = 1 if spent > limit else few
        else:
            start = clock()
        while len(rounds) < max_rounds:
            spent = clock() - start
            least = min_rounds if spent < limit else few
            if spent >= budget and len(rounds) >= least:
                break
            rounds.append(once())
            order = order[1:] + order[:1]
    finally:
        if collecting:
            gc.enable()
    return [Timing.of(list(chain(*samples))) for samples in zip(*rounds, strict=True)]
