"""Times that can be compared: of this thread's CPU, one cell after another in turn, as ratios within a round."""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import thread_time_ns
from typing import Final

Cell = Callable[[int], int]
"""Runs so many operations and says how many nanoseconds they took."""

Samples = dict[str, list[float]]
"""Nanoseconds per operation of each cell, one figure a round."""

ROUND_NS: Final = 8_000_000
"""How long a cell runs in a round, about: long enough for the clock, short enough that its neighbours run beside it."""

MOST: Final = 200_000


def timed(step: Callable[[], object]) -> Cell:
    """A cell that only repeats a call."""

    def cell(count: int) -> int:
        start = thread_time_ns()
        for _ in range(count):
            step()
        return thread_time_ns() - start

    return cell


def take_turns(cells: Mapping[str, Cell], rounds: int) -> Samples:
    """Run every cell once a round. The heap as it is now is left out of the garbage collections meanwhile."""
    counts = {name: _calibrated(cell) for name, cell in cells.items()}
    samples: Samples = {name: [] for name in cells}
    gc.collect()
    gc.freeze()
    try:
        for at in range(rounds):
            for name in sorted(cells, reverse=at % 2 == 1):  # so that nobody is always first
                samples[name].append(cells[name](counts[name]) / counts[name])
    finally:
        gc.unfreeze()
    return samples


def ratio(samples: Samples, name: str, base: str) -> float:
    """The median over the rounds of one cell's time in another's."""
    return statistics.median(own / theirs for own, theirs in zip(samples[name], samples[base], strict=True))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of the values do not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]


def _calibrated(cell: Cell) -> int:
    """How many operations take about a round's time."""
    cell(1)  # what is done once only
    count = 1
    while (took := cell(count)) < ROUND_NS / 4 and count < MOST:
        count *= 4
    return max(1, min(MOST, int(count * ROUND_NS / max(took, 1))))
