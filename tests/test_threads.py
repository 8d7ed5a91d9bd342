"""What looks for the Contexts of other threads leaves these threads as they are."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from support.waiting import PATIENCE
from ucm_middleware.threads import entered_below, frames_of_others

MODULE = """
begun.set()
assert gate.wait(patience)
"""
CLASS = """
class Defined:
    before = 1
    begun.set()
    assert gate.wait(patience)
    after = before
"""


def look() -> None:
    for top in frames_of_others().values():
        entered_below(top)


@pytest.mark.parametrize("code", [MODULE, CLASS], ids=["module", "class"])
def test_a_module_that_another_thread_imports_stays_whole(code: str) -> None:
    begun, gate = threading.Event(), threading.Event()
    names: dict[str, Any] = {"__name__": "asgiref.sync", "begun": begun, "gate": gate, "patience": PATIENCE}
    with ThreadPoolExecutor(1) as pool:
        importing = pool.submit(exec, code, names)
        assert begun.wait(PATIENCE)
        look()
        gate.set()
        importing.result(PATIENCE)
    assert names["gate"] is gate


@contextmanager
def traced(trace: Any) -> Iterator[None]:
    """Threads that are started in here are traced."""
    before = threading.gettrace()
    threading.settrace(trace)
    try:
        yield
    finally:
        threading.settrace(before)


@pytest.mark.parametrize("event", ["call", "line"])
def test_a_thread_that_is_traced_keeps_its_variables(event: str) -> None:
    """Before Python 3.13 they are written back behind a trace function from what the frame shows."""
    begun, gate = threading.Event(), threading.Event()

    def trace(frame: FrameType, what: str, argument: object) -> Any:
        if frame.f_code.co_qualname == "_WorkItem.run" and what == event and not begun.is_set():
            begun.set()
            assert gate.wait(PATIENCE)
        return trace

    with traced(trace), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(int, "42")
        assert begun.wait(PATIENCE)
        look()
        gate.set()
        assert answer.result(PATIENCE) == 42
