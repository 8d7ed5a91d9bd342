"""Promise 10: while a ledger cannot be written, nothing begins that would not be on record, and nothing is dropped.

The kernel refuses the server's writes, by RLIMIT_FSIZE, until there is room again.
"""

import resource
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from support.ledger_check import LedgerCheck, Record, each_once
from support.observer import Observer, observing
from support.servers import Server, start_server
from support.waiting import wait_until

APPS = Path(__file__).parent / "apps"
SECRET = secrets.token_urlsafe(32)


def env(folder: Path, **more: str) -> dict[str, str | None]:
    return {"LEDGER": str(folder / "audit.db"), "KEYS": str(folder / "keys.db"), "UCM_SECRET": SECRET, **more}


@contextmanager
def serving(folder: Path, **more: str) -> Iterator[Observer]:
    with (
        start_server("uvicorn-httptools", "promise_trail:app", app_dir=APPS, env=env(folder, **more)) as server,
        observing(server) as observer,
    ):
        yield observer


@contextmanager
def full(server: Server) -> Iterator[None]:
    """No file of the server's can be written to."""
    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1, before[1]))
    yield
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


def wait_until_healthy(desk: Observer) -> None:
    wait_until(lambda: desk.ask("state") == {"healthy": True, "lag": 0, "problem": None}, "it can be written again")


def records(folder: Path) -> list[Record]:
    found = LedgerCheck(folder / "audit.db", folder / "keys.db", SECRET).read()
    each_once(found)
    return found


def requests(found: list[Record], event: str) -> set[str]:
    return {record["request"] for record in found if record["event"] == event}


def test_strict_refuses_what_it_cannot_record_and_goes_on_by_itself(tmp_path: Path) -> None:
    with serving(tmp_path) as desk:
        served = [desk.request("alice", "/work").json()]
        half = desk.begin("bob", "/hold_half")
        desk.wait_for("held", user="bob")
        with desk.websocket("carol", "/echo") as open_before:
            open_before.send("hello")
            assert open_before.recv() == "hello"
            with full(desk.server):
                for _ in range(3):
                    refused = desk.request("alice", "/work")
                    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                with pytest.raises(InvalidStatus) as denied, desk.websocket("alice", "/echo"):
                    pass
                assert denied.value.response.status_code == 503
                open_before.send("end")
                assert open_before.recv() == "end"
                with pytest.raises(ConnectionClosed) as closed:
                    open_before.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 1013
                desk.open("let go")
                with pytest.raises(httpx.RemoteProtocolError):  # it has begun, and must not look complete
                    half.result()
                state = desk.ask("state")
                assert not state["healthy"]
                assert str(tmp_path) in state["problem"]
        wait_until_healthy(desk)
        served.append(desk.request("alice", "/work").json())
    found = records(tmp_path)
    assert requests(found, "opened") >= set(served)
    assert requests(found, "answered") >= set(served)
    # What was refused is on record too, once that could be written.
    assert requests(found, "opened") == requests(found, "closed")
    assert len([record for record in found if record["event"] == "opened" and record["user"] == "alice"]) == 6


def test_async_keeps_what_happened_and_begins_nothing_more_than_it_can_keep(tmp_path: Path) -> None:
    with serving(tmp_path, AUDIT="async", CAPACITY="64") as desk:
        held = [desk.begin("bob", "/hold") for _ in range(5)]
        wait_until(lambda: len(desk.journal("held")) == 5, "five requests are held")
        with full(desk.server):
            answers = [desk.request("alice", "/work") for _ in range(100)]
            statuses = [answer.status_code for answer in answers]
            served = statuses.index(503)
            assert 8 <= served <= 64
            assert statuses == [200] * served + [503] * (100 - served)
            assert answers[-1].headers["retry-after"] == "1"
            assert desk.ask("state")["lag"] <= 64 + 1
            desk.open("let go")
            assert [answer.result().status_code for answer in held] == [200] * 5  # what has begun may end
            assert not desk.ask("state")["healthy"]
        wait_until_healthy(desk)
        assert desk.request("alice", "/work").status_code == 200
    found = records(tmp_path)
    acknowledged = {answer.json() for answer in answers[:served]} | {answer.result().json() for answer in held}
    assert acknowledged <= requests(found, "opened")
    assert requests(found, "opened") == requests(found, "closed")


def alter_the_last_record(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "audit.db")) as connection:
        connection.execute(
            "UPDATE records SET body = CAST(body || ' ' AS BLOB) WHERE sequence = (SELECT max(sequence) FROM records)"
        )
        connection.commit()


def take_the_key_file_away(folder: Path) -> None:
    folder.joinpath("keys.db").unlink()


def take_another_key_file(folder: Path) -> None:
    folder.joinpath("keys.db").unlink()
    with serving(folder, LEDGER=str(folder / "other.db")):
        pass


def put_a_folder_in_its_place(folder: Path) -> None:
    folder.joinpath("audit.db").unlink()
    folder.joinpath("audit.db").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (alter_the_last_record, r"audit\.db: was changed or damaged: record \d+ is not as it was written"),
        (take_the_key_file_away, r"keys\.db: does not exist, and the ledger has records"),
        (take_another_key_file, r"keys\.db: belongs to the ledger stream_\w+, and not to stream_\w+"),
        (put_a_folder_in_its_place, r"audit\.db: is a directory"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_served(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    with serving(tmp_path) as desk:
        assert desk.request("alice", "/work").status_code == 200
    damage(tmp_path)
    with (
        pytest.raises(AssertionError, match=rf"(?s)ended while starting \(exit status 1\).*{message}"),
        serving(tmp_path),
    ):
        pass
