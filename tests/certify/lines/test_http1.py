"""Each answer belongs to the request it answers, whatever the server does; and what is no answer belongs to nobody."""

import asyncio
import gzip

from support.misbehaving import saying, serving
from ucm_middleware.certify.lines.answer import LARGEST, Answer
from ucm_middleware.certify.lines.http1 import Line
from ucm_middleware.certify.lines.request import Request


def ok(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers, b"", body])


GET = Request("GET", "/", ())


async def asked(answers: tuple[bytes, ...], number: int, patience: float = 5.0) -> list[tuple[str, int, bytes]]:
    """Send so many requests at once, and return the endings, statuses and bodies."""
    async with serving(saying(*answers)) as port:
        line = await Line.open(port)
        waiters = [line.send(GET) for _ in range(number)]
        found = await asyncio.gather(*(line.answer(waiter, patience) for waiter in waiters))
        line.close()
    return [(answer.ending, answer.status, answer.body) for answer in found]


async def test_pipelined_answers_are_told_apart() -> None:
    answers = (ok(b"one") + ok(b"two"), b"", ok(b""), ok(b"four"))
    assert await asked(answers, 4) == [("complete", 200, each) for each in (b"one", b"two", b"", b"four")]


async def test_what_comes_before_an_answer_is_not_taken_for_it() -> None:
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 199 Odd\r\n\r\n"
    assert await asked((early + ok(b"one"), ok(b"two")), 2) == [("complete", 200, b"one"), ("complete", 200, b"two")]


async def test_answers_without_a_body_do_not_take_the_next_one() -> None:
    bare = (b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", ok(b"three"))
    assert await asked(bare, 3) == [("complete", 204, b""), ("complete", 304, b""), ("complete", 200, b"three")]


async def test_chunks_are_put_together() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nfoo\r\n3\r\nbar\r\n0\r\n\r\n"
    assert await asked((chunked,), 1) == [("complete", 200, b"foobar")]


async def test_one_that_ends_with_the_connection_is_whole_and_those_behind_it_are_dropped() -> None:
    assert await asked((b"HTTP/1.1 200 OK\r\n\r\nall of it",), 2) == [
        ("complete", 200, b"all of it"),
        ("dropped", 0, b""),
    ]


async def test_one_that_breaks_off_is_the_first_s_alone() -> None:
    assert await asked((ok(b"one"), b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nA: b\r\n\r\nhalf"), 3) == [
        ("complete", 200, b"one"),
        ("dropped", 200, b"half"),
        ("dropped", 0, b""),
    ]


async def test_one_that_breaks_off_in_its_headers_is_not_whole() -> None:
    assert await asked((b"HTTP/1.1 200 OK\r\nA: b\r\n",), 1) == [("dropped", 200, b"")]


async def test_what_is_no_http_drops_the_connection() -> None:
    assert await asked((b"SSH-2.0-OpenSSH\r\n",), 2) == [("dropped", 0, b""), ("dropped", 0, b"")]


async def test_an_answer_that_nobody_asked_for_is_nobody_s() -> None:
    asked_again = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        # Half of one too many: what follows would be taken for the next user's.
        writer.write(ok(b"alice's") + b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=alice\r\nContent-Length: 5\r\n")
        await asked_again.wait()
        writer.write(b"\r\nalice" + ok(b"bob's"))
        await writer.drain()

    async with serving(script) as port:
        line = await Line.open(port)
        assert (await line.answer(line.send(GET))).body == b"alice's"
        assert line.is_over
        assert await line.answer(line.send(GET)) == Answer("refused")
        asked_again.set()


async def test_one_that_is_late_ends_the_connection() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ntick\r\n")
        await reader.read()

    async with serving(script) as port:
        line = await Line.open(port)
        answer = await line.answer(line.send(GET), 0.05)
        assert (answer.ending, answer.body, answer.is_success, answer.is_answered) == ("late", b"tick", False, True)
        assert line.is_over


async def test_one_without_end_is_cut_off() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with serving(script) as port:
        line = await Line.open(port)
        answer = await line.answer(line.send(GET))
    assert answer.ending == "endless"
    assert LARGEST < len(answer.body) < LARGEST + 1_000_000


async def test_headers_without_end_are_cut_off() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"A: " + b"x" * 8192 + b"\r\n")
            await writer.drain()

    async with serving(script) as port:
        line = await Line.open(port)
        assert (await line.answer(line.send(GET))).ending in ("endless", "dropped")


async def test_what_is_dropped_by_plan_is_called_so() -> None:
    for manner in ("half sent", "not waited for", "cut off"):
        async with serving(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")) as port:
            line = await Line.open(port)
            answer = await line.answer(line.send(Request("GET", "/", (), manner=manner)))
            assert answer.ending in ("dropped by us", "dropped"), manner
            assert line.is_over


async def test_one_without_a_listener_is_refused() -> None:
    async with serving(saying()) as port:
        pass
    try:
        await Line.open(port)
    except OSError:
        return
    raise AssertionError("nobody listens there")


def test_a_host_that_a_user_gives_is_sent_in_place_of_ours() -> None:
    sent = Request("GET", "/", (("host", "alice.example"),)).as_http1("127.0.0.1:1")
    assert sent == b"GET / HTTP/1.1\r\nhost: alice.example\r\n\r\n"
    assert b"Host: 127.0.0.1:1\r\n" in GET.as_http1("127.0.0.1:1")


def test_what_is_compressed_though_nobody_asked_for_it_is_read() -> None:
    packed = gzip.compress(b"the key of alice")
    headers = ((b"Content-Encoding", b"gzip"),)
    assert Answer("complete", 200, headers, packed).plain == b"the key of alice"
    assert Answer("dropped", 200, headers, packed[:-9]).plain.startswith(b"the key")
    assert Answer("complete", 200, headers, b"not so").plain == b"not so"
