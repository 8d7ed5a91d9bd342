"""What a worker that goes on still has of a user who was erased: nothing that the garbage collector can reach."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.ledger import SECRET

pytestmark = pytest.mark.security

# In a process of its own, where no test holds the id. It is put together when it is needed, so that no constant is it.
WORKER = """
import asyncio, gc, os, sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from ucm_middleware import CrossUserAccessError, UserContextManager, UserContextMiddleware, current_context
from ucm_middleware.audit import SQLiteLedger
from ucm_middleware.testing import FakeClock

folder, secret, first, last = Path(sys.argv[1]), *sys.argv[2:]
clock = FakeClock()
ledger = SQLiteLedger(folder / "audit.db", keys=folder / "keys.db")
manager = UserContextManager(ledger=ledger, secret=secret, audit="strict", clock=clock, guard="open", ttl=60)

def found():
    holders = []
    for holder in gc.get_objects():
        if isinstance(holder, ModuleType):
            continue  # its __dict__ has its turn; _asyncio shows freed memory besides, before CPython 3.12.6
        for held in gc.get_referents(holder):
            if type(held) is str and held.startswith(first) and held.endswith(last):
                holders.append(type(holder).__name__)
    return holders

async def app(scope, receive, send):
    context = current_context()
    context.agent_context["name"] = context.user_id
    context.audit_metadata["name"] = context.user_id
    context.callback(int)
    with suppress(CrossUserAccessError):
        manager.get_context("bob-7")
    print(bool(found()))  # while the user is there, the search finds them
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})

async def request():
    async def receive():
        return {"type": "http.request"}
    async def send(message):
        pass
    middleware = UserContextMiddleware(app, manager=manager, identify=lambda connection: first + last)
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    await middleware(scope, receive, send)
    return middleware

middleware = asyncio.run(request())
assert ledger.erase(first + last, reason="a request") == 1
clock.advance(61)  # denials are counted for a minute
manager.sweep()
gc.collect()
print(found())
ledger.close()
"""


def run(folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder), SECRET, "alice-", "liddell"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_nothing_reachable_has_the_id(tmp_path: Path) -> None:
    assert run(tmp_path) == ["True", "[]"]
