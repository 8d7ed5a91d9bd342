"""The users as clients of the server that runs: takes steps, and hands on what came back."""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ucm_middleware.certify.canaries import Canaries
from ucm_middleware.certify.cast import Cast
from ucm_middleware.certify.credentials import Credentials, Given
from ucm_middleware.certify.ids import Ids
from ucm_middleware.certify.lines.answer import Answer
from ucm_middleware.certify.lines.http1 import PATIENCE, Line
from ucm_middleware.certify.lines.http2 import MultiplexedLine
from ucm_middleware.certify.lines.request import Request
from ucm_middleware.certify.lines.sockets import Sockets
from ucm_middleware.certify.material import SHARED, Material
from ucm_middleware.certify.schema import Route
from ucm_middleware.certify.steps import (
    Ask,
    Asked,
    Connect,
    HangUp,
    Restart,
    Say,
    SignIn,
    SignOut,
    Step,
    Together,
    Word,
    asks_of,
)
from ucm_middleware.certify.witness.wire import NUMBER, USER

_PENDING: Final = (202, 404)
"""How what is still being made in the background is answered."""

_BACKGROUND: Final = 0.6
"""Seconds that is waited for it."""

_AGAIN: Final = 0.02

_IN_VAIN: Final = 3
"""Times that a route is waited for without getting anything."""

_LESS_PATIENCE: Final = 0.3

_GIVEN: Final = 1000
"""Credentials, the newest that were given: an application may give another cookie with each answer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request, and of a sign-in what is ``wrong`` with it, for a person."""

    request: Asked
    answer: Answer
    wrong: str | None = None


Heard = Callable[[Connect, bytes], None]
"""Told of each message of a WebSocket, with the step that opened it."""

Closed = Callable[[Connect, str], None]
"""Told of the reason with which the server closes one."""


class Stage:
    """Not thread-safe. Ends with ``aclose``. Who signs in takes part while they are signed in: what is asked for
    without is asked for by a guest, and says nothing of the user. ``given`` are the credentials that answers gave
    them; ``restart`` brings a new server up and returns its port.
    """

    def __init__(
        self,
        cast: Cast,
        material: Material,
        canaries: Canaries,
        port: int,
        heard: Heard,
        closed: Closed,
        restart: Callable[[], Awaitable[int]],
    ) -> None:
        self._cast = cast
        self._material = material
        self._canaries = canaries
        self._restart = restart
        self._routes = {route.key: route for route in material.routes}
        self.given: Final[Given] = deque(maxlen=_GIVEN)
        self._credentials = {user.name: Credentials(user, self.given) for user in cast.users if user.sign_in is None}
        self._locked_out: set[str] = set()
        self._ids = Ids(material.routes, canaries)
        self._port = port
        self._lines: dict[str, Line] = {}
        self._multiplexed: MultiplexedLine | None = None
        self._sockets = Sockets(heard, closed)
        self._in_vain: Counter[str] = Counter()
        self._late: Counter[str] = Counter()

    async def aclose(self) -> None:
        """Hang up."""
        for line in self._lines.values():
            line.close()
        self._lines.clear()
        if self._multiplexed is not None:
            self._multiplexed.close()
            self._multiplexed = None
        await self._sockets.aclose()

    @property
    def was_told_ids(self) -> bool:
        """Whether any answer had an id that a path takes and others can ask by. Without, ids are guessed."""
        return not self._ids.is_empty

    @property
    def is_deserted(self) -> bool:
        """Whether all are signed out, and could not sign in when they tried last."""
        return len(self._locked_out) == len(self._cast.users)

    def takes_part(self, user: str) -> bool:
        """Whether a user is signed in, or need not be."""
        return user in self._credentials

    async def take(self, step: Step) -> Sequence[Outcome]:
        """Take one, and return what came of its requests; of those by users who take no part nothing.

        Raises SubjectError.
        """
        match step:
            case Ask() | Together():
                asks = [ask for ask in asks_of(step) if self.takes_part(ask.user)]
                if isinstance(step, Ask):
                    return [await self._ask(ask) for ask in asks]
                return await (self._multiplex(asks) if step.http2 else self._at_once(asks))
            case Connect():
                return [await self._connect(step)] if self.takes_part(step.user) else []
            case Say():
                await self._sockets.say(step.socket, self._said(step))
            case HangUp():
                await self._sockets.hang_up(step.socket, abruptly=step.abruptly)
            case SignIn():
                return [await self._sign_in(step)]
            case SignOut():
                return [await self._sign_out(step)] if self.takes_part(step.user) else []
            case Restart():
                await self.aclose()
                self._port = await self._restart()
                for one in step.sign_ins:  # what the server knew of them may be gone with it
                    self._credentials.pop(one.user, None)
                return [await self._sign_in(one) for one in step.sign_ins]
        return []

    async def _sign_in(self, step: SignIn) -> Outcome:
        """With nothing that an earlier one brought. Where it fails, that is still what the user goes on with."""
        made = Credentials(self._cast[step.user], self.given)
        call = made.user.sign_in
        assert call is not None
        answer = await self._exchange(step.line, made.call(call, self._headers((), made, step.number, call.path)))
        if (wrong := made.signed_in(call, answer)) is not None:
            if not self.takes_part(step.user):
                self._locked_out.add(step.user)
            return Outcome(step, answer, f"the sign-in of {step.user} ({step.route}) {wrong}")
        self._credentials[step.user] = made
        self._locked_out.discard(step.user)
        return Outcome(step, answer)

    async def _sign_out(self, step: SignOut) -> Outcome:
        left = self._credentials.pop(step.user)
        call = left.user.sign_out
        assert call is not None
        request = left.call(call, self._headers((), left, step.number, call.path))
        return Outcome(step, await self._exchange(step.line, request))

    # Requests.

    async def _ask(self, ask: Ask) -> Outcome:
        clock = asyncio.get_running_loop().time
        until = clock() + (_BACKGROUND if ask.patient and self._in_vain[ask.route] < _IN_VAIN else 0.0)
        while True:
            outcome = self._noted(ask, await self._exchange(ask.line, self._request(ask), self._patience(ask)))
            if outcome.answer.status not in _PENDING or clock() >= until:
                self._in_vain[ask.route] += ask.patient and outcome.answer.status in _PENDING
                return outcome
            await asyncio.sleep(_AGAIN)

    async def _at_once(self, asks: Sequence[Ask]) -> Sequence[Outcome]:
        """Send all, then read what comes; what is slow last."""
        names = dict.fromkeys(ask.line for ask in asks)
        lines = dict(zip(names, await asyncio.gather(*(self._line(name) for name in names)), strict=True))
        waiting = [(ask, line, line.send(self._request(ask))) for ask in asks if (line := lines[ask.line]) is not None]
        answers: dict[int, Answer] = {}
        for is_slow in (False, True):
            part = [each for each in waiting if (each[0].manner == "slow") is is_slow]
            for _, line, _ in part:
                line.read_on()
            patience = max((self._patience(ask) for ask, _, _ in part), default=PATIENCE)
            found = await asyncio.gather(*(line.answer(waiter, patience) for _, line, waiter in part))
            answers.update((ask.number, answer) for (ask, _, _), answer in zip(part, found, strict=True))
        return [self._noted(ask, answers.get(ask.number, Answer("refused"))) for ask in asks]

    async def _multiplex(self, asks: Sequence[Ask]) -> Sequence[Outcome]:
        if self._multiplexed is None or self._multiplexed.is_over:
            try:
                self._multiplexed = await MultiplexedLine.open(self._port)
            except OSError:
                return [Outcome(ask, Answer("refused")) for ask in asks]
        line = self._multiplexed
        requests = [(ask, self._request(ask)) for ask in asks]
        waiting = [(ask, line.send(request)) for ask, request in requests if line.takes(request)]
        answers = await asyncio.gather(*(line.answer(waiter, self._patience(ask)) for ask, waiter in waiting))
        return [self._noted(ask, answer) for (ask, _), answer in zip(waiting, answers, strict=True)]

    async def _exchange(self, name: str, request: Request, patience: float = PATIENCE) -> Answer:
        line = await self._line(name)
        if line is None:
            return Answer("refused")
        waiter = line.send(request)
        line.read_on()
        return await line.answer(waiter, patience)

    def _patience(self, ask: Ask) -> float:
        """Seconds. A route that was late twice, or streams for ever, is not waited for so long again."""
        return PATIENCE if self._late[ask.route] < 2 else _LESS_PATIENCE

    async def _line(self, name: str) -> Line | None:
        line = self._lines.get(name)
        if line is None or line.is_over:
            try:
                line = self._lines[name] = await Line.open(self._port)
            except OSError:
                return None
        return line

    def _request(self, ask: Ask) -> Request:
        route = self._routes[ask.route]
        case = self._material.cases[ask.route][ask.case].filled(
            self._word(ask.user, ask.word, ask.number, ask.case),
            self._ids.of(ask.ids_of or ask.user, route, ask.case, ask.user),
        )
        body = case.body
        if ask.padding and body is not None:
            body += b" " * ask.padding
        headers = self._headers(case.headers, self._credentials[ask.user], ask.number, case.target)
        return Request(route.method, self._credentials[ask.user].target(case.target), headers, body, ask.manner)

    def _headers(
        self, made: Iterable[tuple[str, str]], credentials: Credentials, number: int, target: str
    ) -> tuple[tuple[str, str], ...]:
        """A user's own go before those that the schema has: a made-up credential would make one user of all."""
        user, own = credentials.user, credentials.headers(target)
        names = {name.lower() for name, _ in own}
        others = (each for each in made if each[0].lower() not in names)
        who = [(USER, str(self._cast.names.index(user.name)))] if own or user.query else []
        return (*others, *own, (NUMBER, str(number)), *who)

    def _word(self, user: str, word: Word, number: int, choice: int) -> str:
        return self._canaries.make(user, number) if word == "own" else SHARED[choice % len(SHARED)]

    def _noted(self, ask: Ask, answer: Answer) -> Outcome:
        self._credentials[ask.user].keep(answer.headers)
        self._late[ask.route] += answer.ending == "late"
        if answer.is_success:
            self._ids.keep(ask.user, self._routes[ask.route], answer.plain)
        return Outcome(ask, answer)

    # WebSockets.

    async def _connect(self, step: Connect) -> Outcome:
        route: Route = self._routes[step.route]
        word = self._word(step.user, step.word, step.number, step.case)
        found_id = self._ids.of(step.user, route, step.case, step.user)
        case = self._material.cases[step.route][step.case].filled(word, found_id)
        credentials = self._credentials[step.user]
        headers = self._headers(case.headers, credentials, step.number, case.target)
        target = credentials.target(case.target)
        answer = await self._sockets.connect(step, f"ws://127.0.0.1:{self._port}{target}", headers)
        credentials.keep(answer.headers)
        return Outcome(step, answer)

    def _said(self, step: Say) -> str:
        messages = self._routes[step.route].messages
        if messages:
            return messages[step.message % len(messages)]
        return self._word(step.user, step.word, step.number, step.message)
