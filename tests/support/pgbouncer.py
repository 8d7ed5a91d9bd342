"""PgBouncer in front of a PostgreSQL, in transaction mode: whoever begins a transaction is given a server connection.

    with start_pgbouncer(database) as pgbouncer:
        with psycopg.connect(pgbouncer.login(database.app).dsn, prepare_threshold=None) as connection: ...

It is the system's (Debian: apt-get install pgbouncer). A test is skipped where there is none, and says so.
"""

import os
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .postgres import Database, Login
from .processes import HOST, held_port, start_program, unprivileged_folder


class PgBouncer:
    """One that runs; `start_pgbouncer` makes it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def login(self, login: Login) -> Login:
        """The same login through it."""
        return login.at(self.port)


@contextmanager
def start_pgbouncer(database: Database, *, pool_size: int = 1, mode: str = "transaction") -> Generator[PgBouncer]:
    """Run it for the logins `app` and `owner` of a database, with at most `pool_size` server connections each."""
    binary = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
    if binary is None:
        pytest.skip("PgBouncer is not installed: apt-get install pgbouncer")
    server = database.superuser
    with unprivileged_folder("ucm-pgbouncer-") as folder, held_port() as port:
        users = folder / "users"
        users.write_text("".join(f'"{login.user}" "{login.password}"\n' for login in (database.app, database.owner)))
        settings = {
            "listen_addr": HOST,
            "listen_port": port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": users,
            "pool_mode": mode,
            "default_pool_size": pool_size,
            "query_wait_timeout": 10,  # seconds for a server connection to be free
            "ignore_startup_parameters": "extra_float_digits",
        }
        lines = ["[databases]", f"{database.name} = host={server.host} port={server.port}", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        configuration = folder / "pgbouncer.ini"
        configuration.write_text("\n".join(lines) + "\n")
        # By SIGINT it would wait for its clients to be done.
        command: list[str | Path] = [binary, configuration]
        with start_program("PgBouncer", port, command, folder, stop_by=signal.SIGTERM):
            yield PgBouncer(port)
