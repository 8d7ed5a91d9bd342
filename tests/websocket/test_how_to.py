"""The guide to WebSockets is what it says: its program is run as it stands there."""

import json
import re
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from ucm_middleware.testing import start_server

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "serve-websockets.md"


def token(user: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {user}"}


def say(socket: ClientConnection, text: str) -> str:
    socket.send(json.dumps({"type": "message", "text": text}))
    heard = json.loads(socket.recv())
    assert heard["type"] == "message"
    return f"{heard['user_id']}: {heard['data']['text']}"


def test_the_program_of_the_guide_does_as_it_says(tmp_path: Path) -> None:
    [program] = re.findall(r'```python title="chat.py"\n(.*?)```', GUIDE.read_text(), re.DOTALL)
    (tmp_path / "chat.py").write_text(program)
    with start_server("chat:app", app_dir=tmp_path) as server:
        url = f"{server.ws_url}/chat"
        with (
            connect(url, additional_headers=token("alice")) as alice,
            connect(url, additional_headers=token("bob")) as bob,
        ):
            assert say(alice, "hello") == "alice: hello"
            alice.send(json.dumps({"type": "renew", "token": "alice"}))
            assert say(alice, "again") == "alice: again"
            assert say(bob, "hello") == "bob: hello"

            assert httpx.post(f"{server.url}/sign-out", headers=token("alice")).json() == {"closed": 2}
            with pytest.raises(ConnectionClosed) as ended:
                alice.recv()
            assert ended.value.rcvd is not None
            assert ended.value.rcvd.code == 1008
            assert say(bob, "still here") == "bob: still here"

            bob.send(json.dumps({"type": "message", "text": "x" * 65 * 1024}))
            with pytest.raises(ConnectionClosed) as too_big:
                bob.recv()
            assert too_big.value.rcvd is not None
            assert too_big.value.rcvd.code == 1009

        cookie = {**token("carol"), "Cookie": "session=1"}
        with connect(url, additional_headers=cookie, origin=Origin("https://app.example.com")) as carol:
            assert say(carol, "hello") == "carol: hello"
        with (
            pytest.raises(InvalidStatus) as refused,
            connect(url, additional_headers=cookie, origin=Origin("https://evil.example")),
        ):
            pass
        assert refused.value.response.status_code == 403
