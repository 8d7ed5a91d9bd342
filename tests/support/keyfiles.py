"""The key file of a ledger: read by its documentation alone, scanned byte by byte, and used by other processes."""

import hmac
import json
import sqlite3
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import ucm_middleware
from ucm_middleware.secret import Secret, SecretRing

STREAM = "stream_" + "0123456789abcdef" * 2
SECRET = b"q7Vd0mXo3RkT9yLw2ZsB5uHc8PfJ1nGa4EeIx6"
OTHER = b"N4tKj8Wc1YbQ6rMz0DpS3vUh7FgLx2Ao5iTe9C"


def ring(*secrets: bytes) -> SecretRing:
    return SecretRing([Secret(secret) for secret in secrets or (SECRET,)], is_production=True)


def hkdf(secret: bytes, purpose: str) -> bytes:
    """RFC 5869 for 32 bytes, without salt."""
    info = b"ucm-middleware 1 " + purpose.encode()
    return hmac.digest(hmac.digest(bytes(32), secret, "sha256"), info + b"\x01", "sha256")


class Row:
    """What the key file has of one user, and how to find its traces."""

    def __init__(self, lookup: bytes, token: bytes, sealed: bytes, key: bytes, user_id: str, bound_to: bytes | None):
        self.lookup, self.token, self.sealed, self.key = lookup, token, sealed, key
        self.user_id, self.bound_to = user_id, bound_to

    def traces_in(self, content: bytes) -> set[str]:
        """What of this row is in there, if only a part of it. The token may be: the ledger has it too."""
        parts = {"user id": [self.user_id.encode()]}
        for name, value in ("lookup", self.lookup), ("sealed", self.sealed), ("key", self.key):
            parts[name] = [value[start : start + 16] for start in range(0, len(value) - 15, 8)]
        return {name for name, pieces in parts.items() if any(piece in content for piece in pieces)}


def rows_of(path: Path, secret: bytes = SECRET) -> dict[str, Row]:
    """All users of a key file, by docs/reference/ledger-format.md and with no code of the product."""
    with closing(sqlite3.connect(path)) as connection:
        [(sealed,)] = connection.execute("SELECT master FROM vault")
        rows = connection.execute("SELECT lookup, subject, sealed, bound_to FROM subjects").fetchall()
    master = AESGCM(hkdf(secret, "audit vault")).decrypt(sealed[:12], sealed[12:], None)
    cipher = AESGCM(hkdf(master, "subjects"))
    found: dict[str, Row] = {}
    for lookup, token, sealed, bound_to in rows:
        opened = cipher.decrypt(sealed[:12], sealed[12:], token)
        key, user_id = opened[:32], opened[32:].decode()
        assert lookup == hmac.digest(hkdf(master, "lookup"), user_id.encode(), "sha256")
        found[user_id] = Row(lookup, token, sealed, key, user_id, bound_to)
    return found


def content_of(path: Path) -> bytes:
    """Every byte of the file and of what SQLite keeps beside it.

    Another process reads them: closing a file here would take away the locks that this process has on it.
    """
    files = sorted(str(file) for file in path.parent.iterdir() if file.name.startswith(path.name))
    return subprocess.run(["cat", *files], check=True, capture_output=True, timeout=60).stdout


_WORKER = """
import json, sys
from pathlib import Path
from support.keyfiles import ring
from ucm_middleware.audit.subjects import Vault

print("imported", flush=True)
vault = None
for line in sys.stdin:
    name, *given = json.loads(line)
    if name == "open":
        path, stream, *secrets = given
        vault = Vault.open(Path(path), stream, ring(*map(str.encode, secrets)))
        answer = None
    elif name == "of":
        answer = {user: subject.token.hex() for user, subject in vault.of(given).items()}
    elif name == "seal":
        user, text = given
        answer = vault.of([user])[user].seal(text.encode()).hex()
    else:
        answer = [token.hex() for token in getattr(vault, name)(*given)]
    print(json.dumps(answer), flush=True)
"""


class Worker:
    """Another process with a vault."""

    def __init__(self) -> None:
        folders = [str(Path(__file__).parents[1]), str(Path(ucm_middleware.__file__).parents[1])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}\n{_WORKER}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._imported = False

    def ask(self, *request: str) -> None:
        """Let it begin."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        if not self._imported:
            assert self.process.stdout.readline() == "imported\n"
            self._imported = True
        return json.loads(self.process.stdout.readline())

    def do(self, *request: str) -> Any:
        self.ask(*request)
        return self.answer()

    def wait_until_imported(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "imported\n"
        self._imported = True


@contextmanager
def workers(number: int) -> Generator[list[Worker]]:
    """So many processes, which have nothing left to do but what they are asked."""
    all_of_them = [Worker() for _ in range(number)]
    try:
        for worker in all_of_them:
            worker.wait_until_imported()
        yield all_of_them
    finally:
        for worker in all_of_them:
            worker.process.kill()
            worker.process.communicate(timeout=60)


def in_all(some: list[Worker], *requests: tuple[str, ...]) -> Iterator[Any]:
    """The answers of all to one request each, which they work on at the same time."""
    for worker, request in zip(some, requests, strict=True):
        worker.ask(*request)
    return iter([worker.answer() for worker in some])
