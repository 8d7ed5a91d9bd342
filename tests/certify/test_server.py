"""The server that is run: nothing of it is left, and what its witness says is heard, whatever happens to either."""

import asyncio
import gc
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from support.certifying import ROOT
from ucm_middleware.certify.server import Subject, start
from ucm_middleware.certify.witness.wire import Order, Told

DETACHING = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], start_new_session=True)
from tests.certify.apps.bad_apps import hangs as app
"""


def subject(app: str, app_dir: Path = ROOT, **env: str) -> Subject:
    return Subject(Order(app, False, ("canary",)), "uvicorn", app_dir, env)


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def unheard(_: object) -> None:
    """Nothing."""


async def test_a_process_that_the_application_detached_does_not_keep_it_open(tmp_path: Path) -> None:
    (tmp_path / "detaching.py").write_text(DETACHING)
    async with asyncio.timeout(25), start(subject("detaching:app", tmp_path), unheard):
        pass


async def test_no_server_is_left_when_it_is_cancelled() -> None:
    is_up, pids = asyncio.Event(), list[int]()

    async def run() -> None:
        async with start(subject("tests.certify.apps.bad_apps:hangs"), unheard) as process:
            pids.append(process._process.pid)
            is_up.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    await is_up.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not is_alive(pids[0])


async def test_half_a_line_of_a_witness_that_was_killed_is_let_be(caplog: pytest.LogCaptureFixture) -> None:
    from ucm_middleware.certify import server

    heard: list[Told] = []
    has_heard = asyncio.Event()

    def hear(told: Told) -> None:
        heard.append(told)
        has_heard.set()

    listening: Callable[..., object] = server._listening
    async with listening(Order("app", False, ()), hear) as where:  # type: ignore[attr-defined]
        reader, writer = await asyncio.open_unix_connection(where)
        await reader.readline()
        writer.write(json.dumps(Told("log", 1, "text", "shop").to_json()).encode() + b'\n{"kind": "lo')
        await has_heard.wait()
        writer.close()
        assert await reader.read() == b""
    gc.collect()  # a task that failed is told of when it goes
    assert [told.number for told in heard] == [1]
    assert caplog.records == []
