"""Deadlines: what is due comes out, once and never early, whatever the waits, and at a cost that does not grow."""

import random
from collections.abc import Iterator
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from ucm_middleware.expiry import SHORTEST_WAIT, Deadlines, Timed, front

RESOLUTION = SHORTEST_WAIT + 1e-6  # and what adding floats may lose
YEAR = 365 * 24 * 3600.0
MOST_QUEUES = 64 * 36  # 64 steps for each power of two between a millisecond and a year

# In seconds: far below the resolution, round ones, arbitrary ones, and a year.
waits = st.one_of(
    st.sampled_from([0.0, 1e-6, SHORTEST_WAIT, 0.5, 1.0, 60.0, 3600.0, YEAR]),
    st.floats(0.0, 10.0),
    st.floats(0.0, YEAR),
)
ADD, DISCARD, PASS, SLEEP, POP = "add", "discard", "pass", "sleep", "pop"
steps = st.one_of(
    st.tuples(st.just(ADD), waits),
    st.tuples(st.just(DISCARD), st.integers(0)),
    st.tuples(st.just(PASS), waits),
    st.tuples(st.just(SLEEP), st.just(0)),
    st.tuples(st.just(POP), st.integers(1, 5)),
)


class Entry(Timed):
    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.wait = 0.0


def deadline_of(entry: Timed) -> float:
    assert entry.deadline is not None
    return entry.deadline


def drained(deadlines: Deadlines[Timed], now: float, most: int = 100) -> list[Timed]:
    """All that is due, taken out slice by slice."""
    due: list[Timed] = []
    while found := deadlines.pop_due(now, most):
        due += found
    return due


# The second is due before the first, which waits in front of it in the same queue.
@example([(ADD, 10.1), (PASS, 0.05), (ADD, 10.0), (PASS, 10.02)], 0.0)
@given(st.lists(steps, max_size=60), st.sampled_from([0.0, 1e6]))
def test_agrees_with_a_sorted_list(program: list[tuple[str, float]], start: float) -> None:
    deadlines, waiting, now = Deadlines[Timed](), list[Timed](), start

    def compare(due: list[Timed]) -> None:
        """Nothing early, nothing twice, and nothing left longer than the resolution allows."""
        assert all(deadline_of(entry) <= now for entry in due)
        assert len(set(due)) == len(due)
        assert set(due) <= set(waiting)
        waiting[:] = [entry for entry in waiting if entry not in due]

    for step, number in program:
        if step == ADD:
            entry = Entry(now + number)
            waiting.append(entry)
            deadlines.add(entry, entry, now, number)
            assert now < entry.wake <= max(deadline_of(entry), now) + RESOLUTION
        elif step == DISCARD and waiting:
            deadlines.discard(waiting.pop(int(number) % len(waiting)))
        elif step == PASS:
            now += number
        elif step == SLEEP:
            now = max(now, deadlines.next_wake() or now)
        elif step == POP:
            due = deadlines.pop_due(now, int(number))
            assert len(due) <= number
            compare(due)
        earliest = min((deadline_of(entry) for entry in waiting), default=None)
        wake = deadlines.next_wake()
        if earliest is None:
            assert wake is None
        else:
            assert wake is not None
            assert wake <= max(earliest, now) + RESOLUTION
    compare(drained(deadlines, now))
    assert all(deadline_of(entry) > now - RESOLUTION for entry in waiting)
    now += 2 * YEAR
    compare(drained(deadlines, now))
    assert waiting == []
    assert deadlines.next_wake() is None


@given(st.floats(SHORTEST_WAIT, YEAR))
def test_who_sleeps_until_each_next_wake_meets_the_deadline_in_a_few_looks(wait: float) -> None:
    deadlines, entry, now, looks = Deadlines[Timed](), Entry(wait), 0.0, 0
    deadlines.add(entry, entry, now, wait)
    while not deadlines.pop_due(now, 1):
        wake = deadlines.next_wake()
        assert wake is not None
        now, looks = wake, looks + 1
    assert wait <= now <= wait + RESOLUTION
    assert looks <= 8  # each look leaves at most a 64th to wait for


def test_any_number_of_different_waits_needs_a_bounded_number_of_queues() -> None:
    deadlines, draw = Deadlines[None](), random.Random(7)
    for _ in range(20_000):
        wait = 10 ** draw.uniform(-6, 7.5)
        deadlines.add(Entry(wait), None, 0.0, wait)
    assert len(deadlines.queues) <= MOST_QUEUES
    for _ in range(20_000):
        wait = 10 ** draw.uniform(-6, 7.5)
        deadlines.add(Entry(wait), None, 0.0, wait)
    assert len(deadlines.queues) <= MOST_QUEUES


def test_adding_and_taking_out_cost_the_same_among_ten_and_among_ten_thousand() -> None:
    looked_at = 0

    class Counted(Entry):
        def __getattribute__(self, name: str) -> object:
            nonlocal looked_at
            looked_at += 1
            return super().__getattribute__(name)

    costs: list[int] = []
    for others in (10, 10_000):
        deadlines = Deadlines[None]()
        for _ in range(others):
            deadlines.add(Counted(60.0), None, 0.0, 60.0)
        looked_at = 0
        for _ in range(10):
            entry = Counted(60.0)
            deadlines.add(entry, None, 0.0, 60.0)
            deadlines.next_wake()
            deadlines.discard(entry)
            assert deadlines.pop_due(1.0, 5) == []
        costs.append(looked_at)
    assert costs[0] == costs[1] > 0


def test_a_slice_takes_no_more_than_it_may_and_leaves_the_rest() -> None:
    deadlines, entries = Deadlines[Timed](), [Entry(float(second)) for second in range(1, 11)]
    for entry in entries:
        deadlines.add(entry, entry, 0.0, deadline_of(entry))
    taken = [deadlines.pop_due(100.0, 4) for _ in range(4)]
    assert [len(part) for part in taken] == [4, 4, 2, 0]
    assert {entry for part in taken for entry in part} == set(entries)


def test_discarding_what_is_out_already_changes_nothing() -> None:
    deadlines, entry, other = Deadlines[Timed](), Entry(1.0), Entry(1.0)
    deadlines.add(entry, entry, 0.0, 1.0)
    deadlines.add(other, other, 0.0, 1.0)
    deadlines.discard(entry)
    deadlines.discard(entry)
    assert deadlines.pop_due(2.0, 10) == [other]


class Watched(dict[Any, Any]):
    """A queue that does something before it is walked, after the walk has been made, and counts."""

    walks = 0

    def __iter__(self) -> Iterator[Any]:
        self.walks += 1
        walk = super().__iter__()
        self.before_walking()
        return walk

    def before_walking(self) -> None: ...


def test_a_slice_is_taken_in_one_walk() -> None:
    # Each walk begins with the gaps that those taken out before have left: one walk for each would be quadratic.
    deadlines, entries = Deadlines[Timed](), [Entry(1.0) for _ in range(100)]
    for entry in entries:
        deadlines.add(entry, entry, 0.0, 1.0)
    ((wait, queue),) = deadlines.queues.items()
    deadlines.queues[wait] = watched = Watched(queue)
    assert deadlines.pop_due(1.0, 50) == entries[:50]
    assert watched.walks <= 2


def test_a_walk_begins_anew_when_a_finalizer_changes_the_queue_first() -> None:
    class Changed(Watched):
        def before_walking(self) -> None:
            self.pop("a", None)

    assert front(Changed(a=1, b=2, c=3), 2) == ["b", "c"]
