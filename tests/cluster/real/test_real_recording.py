"""A recording of a store's history is whole, or says that it is not."""

import pytest

from support.monitor import recording
from support.monitor_lines import GapError
from support.valkey import start_valkey
from support.waiting import wait_until

KEY = "ucm:app:{7}:u:alice"


def test_a_recording_is_whole_or_says_so() -> None:
    with start_valkey() as server:
        with recording(server) as whole:
            script = server.admin.register_script("return redis.call('hset', KEYS[1], 'l:a.1', 'r')")
            script(keys=[KEY])
            lines = whole.lines()
        inner = next(line for line in lines if line.command == "hset")
        assert inner.script == script.sha
        with recording(server) as cut:
            server.admin.client_kill_filter(_type="normal", skipme=True)
            with pytest.raises(GapError, match="ended the MONITOR"):
                cut.lines()
        with recording(server) as missing:
            server.admin.hset("key", "field", "value")
            wait_until(lambda: any(b"field" in chunk for chunk in missing._chunks), "the server has shown it")
            missing._chunks.clear()  # as a server would that drops what it cannot get rid of
            server.admin.hset("key", "field", "value")
            with pytest.raises(GapError, match=r"missed commands|ended the MONITOR"):
                missing.lines()
