"""The witness's end of the socket to the runner."""

import json
import os
import signal
import socket
import threading

from ucm_middleware.certify.witness.wire import SOCKET, Order, Told
from ucm_middleware.errors import ConfigurationError


class Reporter:
    """Thread-safe. Begins with the runner's order. What cannot be told, since the runner has gone, is not."""

    __slots__ = ("_lock", "_socket", "order")

    def __init__(self) -> None:
        where = os.environ.get(SOCKET)
        if where is None:
            raise ConfigurationError("ucm_middleware.certify.witness is loaded by `ucm certify` alone")
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(where)
        with self._socket.makefile("rb") as lines:
            self.order = Order.of_json(json.loads(lines.readline()))
        threading.Thread(target=self._end_with_the_runner, name="ucm certify", daemon=True).start()

    def _end_with_the_runner(self) -> None:
        """Nobody is left to end a server whose runner was killed, which closes the socket later than it ends that.

        The server leads a process group of its own; what it started is in it.
        """
        while self._socket.recv(1024):
            pass
        os.killpg(0, signal.SIGKILL)

    def tell(self, told: Told) -> None:
        """Never raises: the application must not notice."""
        line = json.dumps(told.to_json()).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(line)
        except OSError:
            return
