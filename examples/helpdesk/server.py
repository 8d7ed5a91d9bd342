"""A real uvicorn in a process of its own, on a free port of the loopback interface."""

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 30.0
STOP_SECONDS = 20.0


class ServerFailedError(Exception):
    """uvicorn did not start, or did not stop; the message ends with what it had printed last."""


def uvicorn(application: str, environment: dict[str, str]) -> AbstractContextManager[tuple[str, int]]:
    """Serve ``application`` ("package.module:app") on a free port; see ``serve``."""
    # The loop is named, not left to what is installed: uvloop leaks under pipelining, asyncio after uploads as well.
    command = [sys.executable, "-m", "uvicorn", application, "--port", "0", "--no-access-log", "--no-use-colors"]
    command += ["--loop", "asyncio", "--http", "httptools", "--timeout-keep-alive", "60"]
    return serve(command, environment)


@contextmanager
def serve(command: Sequence[str], environment: dict[str, str]) -> Generator[tuple[str, int]]:
    """Run a command that starts uvicorn, give the (host, port) that it reports, and stop it at the end.

    Raises ServerFailedError when it ends or hangs before it listens, and when it does not stop.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    printed: deque[str] = deque(maxlen=20)
    address: list[tuple[str, int]] = []
    settled = threading.Event()

    def read() -> None:
        # Reads until the process ends: a server whose pipe is full would stop.
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                printed.append(line)
                if found := re.search(r"running on http://([\d.]+):(\d+)", line):
                    address.append((found[1], int(found[2])))
                    settled.set()
        settled.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        settled.wait(START_SECONDS)
        if not address:
            raise ServerFailedError(f"uvicorn did not start: {' '.join(command)}\n{''.join(printed)}")
        try:
            yield address[0]
        except Exception as error:
            error.add_note(f"the server had printed:\n{''.join(printed)}")
            raise
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            story = f"uvicorn did not stop within {STOP_SECONDS:g} seconds\n{''.join(printed)}"
            raise ServerFailedError(story) from None
        finally:
            reader.join()
