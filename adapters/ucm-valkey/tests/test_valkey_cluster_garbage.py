"""A server that answers anything at all: whoever asks is told that the store cannot be asked, and nobody goes deaf."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ucm_middleware import ClusterUnavailableError, ConfigurationError
from ucm_middleware.cluster.store import Keep, Order, Place, Release, Renewal, Session, Slot, UserKey
from ucm_valkey.cluster import open_store

INFO = b"# Server\r\nredis_version:7.2.4\r\nrun_id:" + b"a" * 40 + b"\r\nredis_mode:standalone\r\n"
ANNA = UserKey(3, "a" * 32)
SLOT = Slot(ANNA, "w-1", 1, False)
WORDS = (b"granted", b"refused", b"alive", b"late", b"gone", b"recovering", b"\xff\xfe", b"", b"1-1", b"x", b"12")
ROUNDS = 40

Reply = Callable[[list[bytes]], bytes]


def bulk(word: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word)


def anything(chance: random.Random, depth: int = 0) -> bytes:
    """A reply of any type."""
    kind = chance.randrange(9)
    if kind < 6:
        number = b":%d\r\n" % chance.choice((0, 1, -1, 5, 10**18))
        word = bulk(chance.choice(WORDS))
        return (number, word, b"$-1\r\n", b"+OK\r\n", b"-ERR x\r\n", b"*0\r\n")[kind]
    length = chance.randrange(5) if depth < 3 else 0
    return b"*%d\r\n" % length + b"".join(anything(chance, depth + 1) for _ in range(length))


@asynccontextmanager
async def answering(reply: Reply) -> AsyncIterator[Session]:
    """A session with a server that answers so, once it has said who it is."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            words: list[bytes] = []
            for _ in range(int(head[1:])):
                length = int((await reader.readline())[1:])
                words.append((await reader.readexactly(length + 2))[:-2])
            writer.write(bulk(INFO) if words == [b"INFO", b"server"] else reply(words))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    session = open_store(f"valkey://127.0.0.1:{port}", prefix="ucm:garbage:", seals=["seal"], timeout=0.5).session()
    try:
        yield session
    finally:
        await session.aclose()
        server.close()


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_answered_is_no_other_error(seed: int) -> None:
    chance = random.Random(seed)
    async with answering(lambda _: anything(chance)) as session:
        asked: list[Callable[[], Awaitable[object]]] = [
            lambda: session.acquire(Order(SLOT, True, 2, 2, 15.0)),
            lambda: session.renew([Renewal(3, "w-1", 15.0), Renewal(4, "w-2", 15.0)]),
            lambda: session.enroll(15.0),
            lambda: session.restore(3, "w-1", 15.0, [SLOT]),
            lambda: session.release([Release(SLOT)]),
            lambda: session.publish(ANNA, b"sealed", Keep(5, 100, 5.0)),
            lambda: session.history(ANNA, 0),
            lambda: session.notify(ANNA, b"sealed", forget_events=True),
            lambda: session.notices(ANNA, ""),
            lambda: session.leases_of(ANNA),
            lambda: session.inspect(),
        ]
        for ask in asked * ROUNDS:
            try:
                await ask()
            except (ClusterUnavailableError, ConfigurationError):
                continue


@pytest.mark.parametrize("answer", [b"*1\r\n" + bulk(b"granted"), b"*1\r\n" + bulk(b"gonee"), b"*1\r\n*0\r\n"])
async def test_an_answer_that_is_not_the_scripts_gives_and_takes_nothing(answer: bytes) -> None:
    async with answering(lambda _: answer) as session:
        for asked in (session.acquire(Order(SLOT, True, 2, 2, 15.0)), session.renew([Renewal(3, "w-1", 15.0)])):
            with pytest.raises(ClusterUnavailableError) as unknown:
                await asked
            assert unknown.value.is_unknown


class Hearer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[bytes] = asyncio.Queue()

    def event(self, user: UserKey, place: Place, payload: bytes) -> None:
        self.events.put_nowait(payload)

    def nudged(self, bucket: int, tenancies: object) -> None:
        """Not of interest."""

    def deaf(self) -> None:
        """Not of interest."""


async def test_what_makes_no_sense_on_a_channel_is_passed_over() -> None:
    def confirm(words: list[bytes]) -> bytes:
        if words[0].lower() != b"ssubscribe":
            return b"+OK\r\n"
        confirmed = b"*3\r\n" + bulk(b"ssubscribe") + bulk(words[1]) + b":1\r\n"
        said = [b"*3\r\n" + bulk(b"smessage") + bulk(words[1]) + bulk(text) for text in (b"nonsense", b"e 1 hello")]
        return confirmed + b"".join(said) if b"}:e:" in words[1] else confirmed

    async with answering(confirm) as session:
        hearer = Hearer()
        await session.listen(hearer)
        await session.subscribe(ANNA)

        async with asyncio.timeout(10):
            assert await hearer.events.get() == b"hello"


async def test_one_that_follows_no_protocol_makes_nobody_deaf_for_ever() -> None:
    garbled = [True]

    def reply(words: list[bytes]) -> bytes:
        if words[0].lower() != b"ssubscribe":
            return b"+OK\r\n"
        if garbled and b"}:e:" in words[1]:
            garbled.clear()
            return b"$nothing\r\n"
        return b"*3\r\n" + bulk(b"ssubscribe") + bulk(words[1]) + b":1\r\n"

    async with answering(reply) as session:
        await session.listen(Hearer())
        with pytest.raises(ClusterUnavailableError):
            await session.subscribe(ANNA)
        async with asyncio.timeout(10):
            await session.subscribe(ANNA)
