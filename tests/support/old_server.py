"""A server that says it is an old one, and takes whatever it is told: a real one cannot be had where the tests run."""

import socketserver
import threading
from collections.abc import Generator
from contextlib import contextmanager

from .processes import HOST

INFO = "# Server\r\nredis_version:{version}\r\nredis_mode:standalone\r\nrun_id:0123456789abcdef\r\n"


@contextmanager
def start_old_server(version: str) -> Generator[int]:
    """Its port. To INFO it answers with the version, to anything else with OK."""
    info = INFO.format(version=version).encode()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while head := self.rfile.readline():
                words = []
                for _ in range(int(head[1:])):
                    length = int(self.rfile.readline()[1:])
                    words.append(self.rfile.read(length + 2)[:-2])
                self.wfile.write(b"$%d\r\n%s\r\n" % (len(info), info) if words[0].upper() == b"INFO" else b"+OK\r\n")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="old server", daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
