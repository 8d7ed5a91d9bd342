"""The guide to the websockets library is what it says: its servers are run as they stand there."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

from support.library import sync_client, sync_ending_of, sync_refusal_of
from support.servers import HOST
from support.waiting import PATIENCE, wait_until

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "serve-websockets-library.md"

ALICE = {"Authorization": "Bearer token-of-alice", "X-Api-Key": "key-of-alice"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = dict(re.findall(r'```python title="([^"]+)"\n(.*?)```', GUIDE.read_text(), re.DOTALL))
    assert set(files) == {"chat.py", "threads.py", "rooms.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@contextmanager
def running(folder: Path, name: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        port = holder.getsockname()[1]
        environment = {**os.environ, "PORT": str(port)}
        with subprocess.Popen([sys.executable, "-W", "error", name], cwd=folder, env=environment) as process:
            try:
                wait_until(lambda: _accepts(port), f"{name} accepts connections")
                yield f"ws://{HOST}:{port}", process
            finally:
                process.kill()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@pytest.mark.parametrize("name", ["chat.py", "threads.py"])
def test_the_chat_tells_each_user_what_that_user_said_and_ends_when_it_is_told(folder: Path, name: str) -> None:
    with running(folder, name) as (url, process):
        assert sync_refusal_of(url)[0] == 401
        with sync_client(url, headers=ALICE) as connection:
            connection.send("hello")
            event = json.loads(connection.recv(PATIENCE))
            assert (event["type"], event["user_id"], event["data"]) == ("said", "alice", "hello")
        with sync_client(url, headers=ALICE) as connection:
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: _refuses(url), "it drains")
            connection.close()  # in time
        assert process.wait(PATIENCE) == 0


def _refuses(url: str) -> bool:
    try:
        with sync_client(url, headers=ALICE):
            return False
    except InvalidStatus as refused:
        return refused.response.status_code == 503


def test_the_rooms_are_found(folder: Path) -> None:
    with running(folder, "rooms.py") as (url, _):
        with sync_client(f"{url}/rooms/7", headers=ALICE) as connection:
            assert connection.recv(PATIENCE) == "alice in room 7"
            assert sync_ending_of(connection)[0] == 1000
        assert sync_refusal_of(f"{url}/attic", headers=ALICE)[0] == 404


def test_the_package_imports_without_the_library() -> None:
    code = (
        "import sys; sys.modules['websockets'] = None\n"
        "import ucm_middleware, ucm_middleware.middleware, ucm_middleware.websocket.asgi\n"
        "try: import ucm_middleware.websocket.websockets\n"
        "except ImportError: pass\n"
        "else: raise AssertionError('the library was found')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
