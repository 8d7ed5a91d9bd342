"""The fewest steps that show a finding, on a server that is made up: it shows it when certain steps are among those."""

from collections.abc import Callable, Sequence

from ucm_middleware.certify.coverage import Coverage
from ucm_middleware.certify.shortening import Shortening, Shortest
from ucm_middleware.certify.sightings import Place, Sighting
from ucm_middleware.certify.steps import Ask, Step, Together, asks_of
from ucm_middleware.certify.trial import Finding, Trial

PLACE = Place("body", "GET /page")


def ask(number: int, user: str, route: str = "GET /other", line: str | None = None, **more: object) -> Ask:
    return Ask(number, user, route, 0, line or f"{user}.0", **more)  # type: ignore[arg-type]


class Server:
    """Shows the finding when ``shows`` says so of the requests it is sent, in their order."""

    def __init__(self, shows: Callable[[Sequence[Ask]], bool]) -> None:
        self.attempts = 0
        self._shows = shows

    async def replay(self, steps: Sequence[Step]) -> Trial:
        self.attempts += 1
        trial = Trial(Coverage({}))
        if self._shows([each for step in steps for each in asks_of(step)]):
            trial.findings[PLACE] = Finding(Sighting(PLACE, "bob", "alice", 0, None), 0)
        return trial


async def shortest(
    history: Sequence[Step], server: Server, *, number: int, source: int | None, is_over: Callable[[], bool] = bool
) -> Shortest:
    sighting = Sighting(PLACE, "bob", "alice", number, source)
    shortening = Shortening(Finding(sighting, len(history) - 1), history, server.replay, is_over, None)
    return await shortening.shortest()


def both(first: int, last: int) -> Callable[[Sequence[Ask]], bool]:
    def shows(asks: Sequence[Ask]) -> bool:
        numbers = [each.number for each in asks]
        return first in numbers and last in numbers and numbers.index(first) < numbers.index(last)

    return shows


async def test_the_two_of_five_hundred_are_found_by_what_was_brought_in() -> None:
    history = [*(ask(at, ("alice", "bob")[at % 2]) for at in range(499)), ask(499, "bob", "GET /page")]
    found = await shortest(history, server := Server(both(18, 499)), number=499, source=18)
    assert found.reproduced
    assert [step.number for step in found.steps if isinstance(step, Ask)] == [18, 499]
    assert found.attempts == server.attempts < 10


async def test_one_alone_is_enough_where_it_is() -> None:
    history = [*(ask(at, "alice") for at in range(50)), ask(50, "bob", "GET /page")]
    found = await shortest(history, Server(lambda asks: 50 in [each.number for each in asks]), number=50, source=None)
    assert [each for step in found.steps for each in asks_of(step)] == [ask(50, "bob", "GET /page")]


async def test_what_is_special_is_left_out_where_it_does_nothing() -> None:
    upload = ask(1, "alice", "POST /up", "proxy-1", padding=4_000_000)
    page = ask(2, "bob", "GET /page", "proxy-1", manner="slow")
    found = await shortest([upload, page], Server(both(1, 2)), number=2, source=None)
    assert found.steps == (ask(1, "alice", "POST /up"), ask(2, "bob", "GET /page"))


async def test_what_is_special_is_kept_where_it_matters() -> None:
    def on_one_line(asks: Sequence[Ask]) -> bool:
        return both(1, 2)(asks) and len({each.line for each in asks if each.number in (1, 2)}) == 1

    steps = [ask(1, "alice", "POST /up", "proxy-1"), ask(2, "bob", "GET /page", "proxy-1")]
    assert (await shortest(steps, Server(on_one_line), number=2, source=None)).steps == tuple(steps)


async def test_requests_at_the_same_time_are_taken_apart() -> None:
    together = Together(tuple(ask(at, ("alice", "bob")[at % 2], "GET /page") for at in range(6)))

    def at_once(asks: Sequence[Ask]) -> bool:
        return both(2, 5)(asks)

    found = await shortest([ask(9, "alice"), together], Server(at_once), number=5, source=2)
    assert sorted(each.number for step in found.steps for each in asks_of(step)) == [2, 5]


async def test_it_is_not_said_to_be_shown_when_nothing_shows_it() -> None:
    history = [ask(at, "alice") for at in range(500)]
    found = await shortest(history, server := Server(lambda _: False), number=499, source=None)
    assert not found.reproduced
    assert found.steps == tuple(history[-8:])
    assert server.attempts == found.attempts <= 60


async def test_no_attempt_begins_when_the_time_is_over() -> None:
    server = Server(lambda _: True)
    found = await shortest([ask(0, "bob", "GET /page")], server, number=0, source=None, is_over=lambda: True)
    assert (found.reproduced, found.attempts, server.attempts) == (False, 0, 0)


async def test_the_best_so_far_is_kept_when_the_time_is_over_in_the_middle() -> None:
    server = Server(both(1, 2))
    steps = [ask(1, "alice", line="x"), ask(2, "bob", "GET /page", "x")]
    found = await shortest(steps, server, number=2, source=1, is_over=lambda: server.attempts >= 2)
    assert found.reproduced
    assert [each.number for step in found.steps for each in asks_of(step)] == [1, 2]
