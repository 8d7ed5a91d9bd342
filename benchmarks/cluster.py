"""What sharing users between workers costs a worker: commands for each open, for requests and messages, and to renew
what it holds; and how long an open takes beside a bare round trip.

The server is the one of the tests; run it with ``PYTHONPATH=tests``, as tox does. All is on the loopback interface,
where a round trip takes a tenth of what it takes between machines: what the store and this package do weighs most here.
"""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from starlette.requests import HTTPConnection

from benchmarks.drive import Conversation, requests, websocket_scope
from benchmarks.report import finish, parser, show
from benchmarks.rows import raw_app
from benchmarks.timing import percentile
from ucm_middleware import ClusterPolicy, UserContextManager, UserContextMiddleware
from ucm_middleware.types import ASGIApp, Message, Receive, Scope, Send

MOST_COMMANDS: Final = 1.0
"""Of the store, that an open waits for."""

MOST_RENEWALS: Final = 20.0
"""Commands a second, at 1,000 live contexts of 1,000 users."""

MOST_RATIO: Final = 1.3
"""What an open may take, in what a bare round trip does."""

NETWORK: Final = 0.0005
"""Seconds that each direction takes there, at least: a loop's timer adds to it."""

PING: Final = "PING"
SAME: Final = "bare script"
"""The script of an acquire, by the library's own client."""

BY_MANAGER: Final = "an open, by the manager"
WITHOUT, WITH = "until its handler, without a cluster", "until its handler"
BY_MIDDLEWARE: Final = "an open, by the middleware: what lies between"

SECRET: Final = "r7Kq2vN9xW4mZ8bT1cY6pL3sD5fG0hJa"
LIVE: Final = 1000
MESSAGES: Final = 50
SETTLED: Final = 0.5
"""Seconds until a connection has subscribed to its user's events."""

OF_ADMIN: Final = ("auth", "client", "echo", "info")
"""What the watching itself asks for."""

Step = Callable[[], Awaitable[object]]


@contextmanager
def stores(nodes: int) -> Generator[tuple[str, Sequence[Any]]]:
    """One server, or a cluster of some: its URL, and the servers."""
    from support.restarts import url_at
    from support.valkey import start_valkey
    from support.valkey_cluster import start_cluster

    with ExitStack() as stack:
        if nodes == 1:
            server = stack.enter_context(start_valkey())
            yield url_at(server.port), [server]
        else:
            servers = stack.enter_context(start_cluster(nodes=nodes))
            yield url_at(servers[0].port) + "?cluster=true", servers


@asynccontextmanager
async def member_of(url: str, lease: float) -> AsyncGenerator[UserContextManager]:
    """A manager whose store has recovered: it is new, so that takes a lease, of which the first is a short one."""
    for seconds in (1.0, lease):
        manager = UserContextManager(
            cluster=ClusterPolicy(url=url, lease=seconds, timeout=seconds / 3),
            secret=SECRET,
            max_contexts=2 * LIVE,
            telemetry=False,
        )
        assert manager.cluster is not None
        await manager.cluster.ready()
        if seconds == lease:
            yield manager
        await manager.cluster.stop()


@dataclass(slots=True)
class _Limits:
    per_user: int = 10
    connections: int = 10


class Users:
    """A resolver that answers with one user after another."""

    def __init__(self, users: int) -> None:
        self._users = users
        self._numbers = count()

    def __call__(self, connection: HTTPConnection) -> str:
        return f"user{next(self._numbers) % self._users}"


def served(manager: UserContextManager) -> ASGIApp:
    return UserContextMiddleware(raw_app, manager=manager, identify=Users(500))


def entered(manager: UserContextManager) -> tuple[ASGIApp, list[int]]:
    """The same, and when its handler was come to."""
    entries: list[int] = []

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        entries.append(time.perf_counter_ns())
        await raw_app(scope, receive, send)

    return UserContextMiddleware(handler, manager=manager, identify=Users(500)), entries


class Watch:
    """The commands that clients send to some servers meanwhile, without those of scripts."""

    def __init__(self, servers: Sequence[Any]) -> None:
        self._servers = servers
        self.lines: list[Any] = []

    async def __aenter__(self) -> "Watch":
        from support.monitor import Recording

        self._recordings = [await asyncio.to_thread(Recording, server) for server in self._servers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for recording in self._recordings:
            found = await asyncio.to_thread(recording.lines)
            self.lines += [line for line in found if line.script is None and line.command not in OF_ADMIN]
            recording.close()

    def of(self, sha: str) -> int:
        """How many times a script was called."""
        return sum(line.words[1:2] == (sha,) for line in self.lines)

    @property
    def passing(self) -> int:
        """Commands that come with time, and not with what is done."""
        from ucm_valkey.cluster import scripts

        return self.of(scripts.RENEW.sha) + self.of(scripts.ENROLL.sha)


class Talk(Conversation):
    """A connection that says nothing until it is told to, then all its texts, and stays until it is told to go."""

    __slots__ = ("begin", "end", "heard", "listens")

    def __init__(self, texts: int) -> None:
        super().__init__(texts)
        self.listens, self.begin, self.heard, self.end = (asyncio.Event() for _ in range(4))

    async def receive(self) -> Message:
        if self.opened and not self.begin.is_set():
            self.listens.set()
            await self.begin.wait()
        if self.opened and not self.left:
            self.heard.set()
            await self.end.wait()
        return await super().receive()


async def commands(opens: int) -> dict[str, float]:
    """Commands for each open, for a connection, and for messages under a lease."""
    from ucm_valkey.cluster import scripts

    talk = Talk(MESSAGES)
    with stores(1) as (url, servers):
        async with member_of(url, 15.0) as manager:
            app = served(manager)
            await requests(app, 50)
            async with Watch(servers) as watch:
                await requests(app, opens)
            talking = asyncio.ensure_future(app({**websocket_scope(), "state": {}}, talk.receive, talk.send))
            await talk.listens.wait()
            await asyncio.sleep(SETTLED)
            async with Watch(servers) as messages:
                talk.begin.set()
                await talk.heard.wait()
            talk.end.set()
            await talking
    taken, released = watch.of(scripts.ACQUIRE.sha), watch.of(scripts.RELEASE.sha)
    assert talk.echoes == MESSAGES
    return {
        "commands_an_open_waits_for": taken / opens,
        "releases_an_open": released / opens,
        "other_commands_an_open": (len(watch.lines) - taken - released - watch.passing) / opens,
        "commands_a_message": (len(messages.lines) - messages.passing) / MESSAGES,
    }


async def renewals(nodes: int, seconds: float) -> dict[str, float]:
    """Commands a second of a worker with 1,000 contexts of as many users, that does nothing else."""
    with stores(nodes) as (url, servers):
        async with member_of(url, 15.0) as manager:
            open_one = manager.create_isolated_context

            def fill() -> list[object]:
                return [open_one(f"user{number}") for number in range(LIVE)]

            kept = await asyncio.to_thread(fill)
            async with Watch(servers) as watch:
                began = time.monotonic()
                await asyncio.sleep(seconds)
                took = time.monotonic() - began
            figures = {"renewal_commands_a_second": len(watch.lines) / took, "live": len(kept)}
            await asyncio.to_thread(manager.cleanup_all_contexts)
            return figures


async def times(rounds: int, delay: float) -> dict[str, list[float]]:
    """Microseconds of each step, in turn with the others. With a delay it is a network."""
    import valkey.asyncio

    from support.processes import HOST
    from support.restarts import url_at
    from support.tcp_proxy import start_tcp_proxy
    from support.valkey import ADMIN
    from ucm_valkey.cluster import scripts

    taken: dict[str, list[float]] = {}
    with stores(1) as (_, servers), ExitStack() as stack:
        port = servers[0].port
        if delay:
            proxy = stack.enter_context(start_tcp_proxy(HOST, port))
            proxy.delay("requests", delay)
            proxy.delay("replies", delay)
            port = proxy.port
        async with member_of(url_at(port), 15.0) as manager:
            client: Any = valkey.asyncio.Valkey(port=port, password=ADMIN, single_connection_client=True)
            await client.initialize()
            nothing = await client.script_load("return 1")
            run = (await client.info("server"))["run_id"]
            numbers = count(1)

            await client.script_load(scripts.ACQUIRE.text)

            async def same_script(lease: int = 15000) -> None:
                key, number = "ucm:bare:{0}:", next(numbers)
                await client.evalsha(
                    scripts.ACQUIRE.sha, 4, key + "engine", key + "t:w-1", f"{key}u:{number}", key + "f:w-1",
                    run, lease, "w-1", number, f"l:w-1.{number}", "r", 10, 10, 1, 3600000,
                )  # fmt: skip

            await same_script(1)  # the bucket is new, and recovers for a millisecond
            await asyncio.sleep(0.01)
            alone = UserContextManager(secret=SECRET, telemetry=False)
            alone_app, alone_entries = entered(alone)
            app, entries = entered(manager)
            member, limits, users = manager.cluster, _Limits(), count()
            assert member is not None
            own: list[float] = []

            async def open_by_manager() -> None:
                began = time.perf_counter_ns()
                lease = await member.acquire(f"user{next(users) % 500}", is_connection=False, limits=limits)
                own.append((time.perf_counter_ns() - began) / 1e3)
                member.release(lease)

            steps: dict[str, Step] = {
                PING: client.ping,
                "a script that does nothing": lambda: client.evalsha(nothing, 0),
                SAME: same_script,
                BY_MANAGER: open_by_manager,
                "a request without a cluster": lambda: requests(alone_app, 1),
                "a request": lambda: requests(app, 1),
            }
            taken = {name: [] for name in (*steps, WITHOUT, WITH)}
            for _ in range(rounds):
                for name, step in steps.items():
                    began = time.perf_counter_ns()
                    await step()
                    taken[name].append((time.perf_counter_ns() - began) / 1e3)
                    if name.startswith("a request"):
                        at = (entries if name == "a request" else alone_entries).pop()
                        taken[WITH if name == "a request" else WITHOUT].append((at - began) / 1e3)
            taken[BY_MANAGER] = own
            await client.aclose()
    return taken


def p50_of(rounds: int, delay: float) -> dict[str, float]:
    """Medians, in microseconds."""
    taken = asyncio.run(times(rounds, delay))
    p50 = {name: percentile(values, 50) for name, values in taken.items()}
    return {**p50, BY_MIDDLEWARE: p50[WITH] - p50[WITHOUT]}


def measure(rounds: int, opens: int, seconds: float) -> dict[str, Any]:
    return {
        "p50_us": p50_of(rounds, 0.0),
        "p50_us_network": p50_of(max(20, rounds // 15), NETWORK),
        **asyncio.run(commands(opens)),
        "renewals": {str(nodes): asyncio.run(renewals(nodes, seconds)) for nodes in (1, 3)},
    }


def _show(figures: dict[str, Any]) -> None:
    show(
        "Commands to the store",
        ["", "commands"],
        [
            ["an open waits for", f"{figures['commands_an_open_waits_for']:.3f}"],
            ["releases, gathered, for each open", f"{figures['releases_an_open']:.3f}"],
            ["anything else for each open", f"{figures['other_commands_an_open']:.3f}"],
            ["a message on a connection", f"{figures['commands_a_message']:.3f}"],
            *(
                [
                    f"a second, with {found['live']:,} live contexts, servers: {nodes}",
                    f"{found['renewal_commands_a_second']:.2f}",
                ]
                for nodes, found in figures["renewals"].items()
            ),
        ],
    )
    for where, name in (("the loopback interface", "p50_us"), ("a network of half a millisecond", "p50_us_network")):
        p50 = figures[name]
        show(
            f"Median times, in turn, on one connection over {where}",
            ["", "us", f"in {PING}s", f"in {SAME}s"],
            [[each, f"{us:.0f}", f"{us / p50[PING]:.2f}", f"{us / p50[SAME]:.2f}"] for each, us in p50.items()],
        )


def _missed(figures: dict[str, Any]) -> list[str]:
    missed: list[str] = []
    if figures["commands_an_open_waits_for"] > MOST_COMMANDS:
        missed.append(f"an open waits for {figures['commands_an_open_waits_for']:.2f} commands, and may for one")
    if figures["commands_a_message"] > 0:
        missed.append(f"a message takes {figures['commands_a_message']:.3f} commands, and may take none")
    for nodes, found in figures["renewals"].items():
        if found["renewal_commands_a_second"] > MOST_RENEWALS:
            missed.append(f"{found['renewal_commands_a_second']:.1f} commands a second to renew, on {nodes} nodes")
    for name in (BY_MANAGER, BY_MIDDLEWARE):
        for times_of in ("p50_us", "p50_us_network"):
            ratio = figures[times_of][name] / figures[times_of][PING]
            if ratio > MOST_RATIO:
                missed.append(f"{times_of}: {name} takes {ratio:.2f} of a {PING}, and may take {MOST_RATIO}")
    return missed


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--rounds", type=int, default=3000)
    options_parser.add_argument("--opens", type=int, default=2000)
    options_parser.add_argument("--seconds", type=float, default=20.0, help="for how long renewals are counted")
    options = options_parser.parse_args()
    try:
        figures = measure(options.rounds, options.opens, options.seconds)
    except ImportError as error:
        print(
            f"{error}: install adapters/ucm-valkey[valkey] and the dependency group databases; set PYTHONPATH=tests",
            file=sys.stderr,
        )
        sys.exit(2)
    _show(figures)
    finish(options, figures, _missed(figures))


if __name__ == "__main__":
    main()
