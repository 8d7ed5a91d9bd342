"""``ucm doctor postgres``: what it says, how it ends, and that it keeps passwords to itself."""

import json
import re
import shlex
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from psycopg_pool import AsyncConnectionPool
from typer.testing import CliRunner, Result

from support.postgres import Database
from ucm_middleware import ConfigurationError
from ucm_middleware.cli.app import make_app
from ucm_postgres import doctor
from ucm_postgres.psycopg import reset

UCM = str(Path(sys.executable).with_name("ucm"))
PASSWORD = "hunter2 is @ secret/%?#:"


def ucm(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """The command, in this process."""
    result = CliRunner().invoke(make_app(), ["doctor", "postgres", *arguments], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def broken(database: Database) -> Database:
    """A database with a serious finding and a warning."""
    database.execute("grant truncate on notes to {app}; alter table notes no force row level security")
    return database


@pytest.fixture
def web_server() -> Iterator[int]:
    """The port of something that answers, and is no PostgreSQL."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(100)
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


class TestExitStatus:
    def test_0_for_a_healthy_database(self, database: Database) -> None:
        result = ucm(database.app.dsn)
        assert result.exit_code == 0
        assert result.stdout == f"healthy: {database.name}, as {database.app.user}\n"
        assert "not looked at: the application's pool" in result.stderr

    def test_0_where_an_info_is_all_there_is(self, database: Database) -> None:
        database.execute("create table tags (note bigint references notes (id)); grant insert on tags to {app}")
        result = ucm(database.app.dsn)
        assert result.exit_code == 0
        assert "info: foreign-key:public.tags.tags_note_fkey" in result.stdout
        assert "(1 info)" in result.stdout

    def test_1_with_each_finding_and_its_sql(self, broken: Database) -> None:
        result = ucm(broken.app.dsn)
        assert result.exit_code == 1
        lines = result.stdout.splitlines()
        assert lines[0] == "serious: truncate:public.notes"
        assert f"    revoke truncate on public.notes from {broken.app.user};" in lines
        assert "warning: not-forced:public.notes" in lines
        assert lines[-1] == f"not healthy: {broken.name}, as {broken.app.user} (1 serious, 1 warning)"

    def test_what_is_accepted_is_not_found(self, broken: Database) -> None:
        accepted = ("--accept", "truncate:public.notes", "--accept", "not-forced:public.notes")
        assert ucm(broken.app.dsn, *accepted).exit_code == 0
        result = ucm(broken.app.dsn, "--accept", "view:public.gone")
        assert result.exit_code == 2
        assert "view:public.gone: accepted, and not found any more" in result.stderr

    def test_json(self, broken: Database) -> None:
        result = ucm(broken.app.dsn, "--json")
        assert result.exit_code == 1
        told = json.loads(result.stdout)
        assert told["database"] == broken.name
        assert told["login"] == broken.app.user
        assert told["not_examined"] == ["pool"]
        first = told["findings"][0]
        assert first == {
            "code": "truncate",
            "severity": "serious",
            "subject": "public.notes",
            "problem": first["problem"],
            "sql": f"revoke truncate on public.notes from {broken.app.user};",
        }

    def test_the_options_are_the_bindings(self, database: Database) -> None:
        database.execute("drop table notes; create table carts (holder int); grant select on carts to {app}")
        assert ucm(database.app.dsn).exit_code == 0
        result = ucm(database.app.dsn, "--user-column", "holder", "--setting", "shop.buyer", "--role", "absent")
        assert "role-missing:absent" in result.stdout
        assert "nullif(current_setting('shop.buyer', true), '')::integer" in result.stdout
        assert "signing-missing" in ucm(database.app.dsn, "--signed").stdout

    def test_installed_and_by_the_environment(self, database: Database) -> None:
        done = subprocess.run(
            [UCM, "doctor", "postgres"],
            env={"UCM_POSTGRES_DSN": database.app.dsn},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, f"healthy: {database.name}, as {database.app.user}\n")


class TestCannotLook:
    def refused(self, dsn: str, *arguments: str) -> str:
        """What is said, which never is the password."""
        result = ucm(dsn, *arguments)
        assert result.exit_code == 2
        for part in re.split(r"[^a-z0-9]+", PASSWORD):
            assert len(part) < 4 or part not in result.output
        return result.output

    def test_nothing_listens(self) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            said = self.refused(f"postgresql://u:hunter2@127.0.0.1:{port}/x")
        assert f"no connection to 127.0.0.1:{port}: " in said
        assert "refused" in said

    def test_a_wrong_password(self, database: Database) -> None:
        said = self.refused(replace(database.app, password=PASSWORD).dsn)
        assert f'password authentication failed for user "{database.app.user}"' in said

    def test_a_password_that_the_server_speaks_of(self, database: Database) -> None:
        said = self.refused(replace(database.app, user=PASSWORD, password=PASSWORD).dsn)
        assert 'password authentication failed for user "***"' in said

    def test_no_such_database(self, database: Database) -> None:
        assert 'database "absent" does not exist' in self.refused(replace(database.app, dbname="absent").dsn)

    def test_what_is_no_postgresql(self, web_server: int) -> None:
        assert "no connection" in self.refused(f"postgresql://u:hunter2@127.0.0.1:{web_server}/x")

    def test_what_never_answers(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            said = self.refused(f"postgresql://u:hunter2@127.0.0.1:{port}/x?connect_timeout=2")
        assert "timeout" in said

    @pytest.mark.parametrize(
        "dsn",
        [
            "postgresql://u:hunter2@secret@127.0.0.1:1/x",
            "postgresql://u:hunter2/secret@127.0.0.1:1/x",
            "postgresql://u:1/hunter2@127.0.0.1:1/x",
            "postgresql://u:hunter2/x",
            "postgresql://u:hunter2 secret@127.0.0.1:1/x",
            "postgresql://u:hunter2%zz@127.0.0.1:1/x",
            "postgresql+asyncpg://u:hunter2@127.0.0.1:1/x",
            "mysql://u:hunter2@127.0.0.1:1/x",
            "host=127.0.0.1 password=hunter2 secret",
            "hunter2",
        ],
    )
    def test_a_dsn_that_cannot_be_read(self, dsn: str) -> None:
        assert "percent-encoded" in self.refused(dsn)

    def test_a_setting_that_is_none(self, database: Database) -> None:
        assert "setting is 'user'" in self.refused(database.app.dsn, "--setting", "user")

    def test_as_json(self) -> None:
        result = ucm("hunter2", "--json")
        assert result.exit_code == 2
        assert "cannot be read" in json.loads(result.stdout)["error"]


def test_names_give_no_orders_to_a_terminal(database: Database) -> None:
    database.execute(
        'create table "a\x1b[2J\nhealthy: shop" (user_id text); grant select on "a\x1b[2J\nhealthy: shop" to {app}'
    )
    result = ucm(database.app.dsn)
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert not [line for line in result.output.splitlines() if line.startswith("healthy")]
    (finding,) = json.loads(ucm(database.app.dsn, "--json").stdout)["findings"]
    assert "\x1b[2J" in finding["sql"]  # as it is


class TestGuide:
    GUIDE = Path(__file__).parents[3] / "docs" / "how-to" / "check-postgres.md"

    async def test_its_check_at_the_start(self, database: Database) -> None:
        (code,) = re.findall(r"```python\n(.*?)```", self.GUIDE.read_text(), re.DOTALL)
        module: dict[str, Any] = {}
        exec(compile(code, self.GUIDE, "exec"), module)
        module["DSN"] = database.app.dsn
        async with AsyncConnectionPool(database.app.dsn, min_size=1, open=False, reset=reset) as pool:
            await module["check"](pool)
        async with AsyncConnectionPool(database.app.dsn, min_size=1, open=False) as pool:
            with pytest.raises(ConfigurationError, match=r"pool:psycopg_pool\.AsyncConnectionPool"):
                await module["check"](pool)

    def test_it_tells_of_every_finding(self) -> None:
        source = Path(doctor.__file__).parent
        codes = {
            code for file in source.glob("*.py") for code in re.findall(r'Finding\(\s*"([a-z-]+)"', file.read_text())
        }
        assert len(codes) > 20
        told = set(re.findall(r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*) \|", self.GUIDE.read_text(), re.MULTILINE))
        assert codes == {code for line in told for code in re.findall(r"[a-z-]+", line)}

    def test_its_commands_work(self, database: Database) -> None:
        commands = re.findall(r"^ucm doctor .*$", self.GUIDE.read_text(), re.MULTILINE)
        assert commands
        for line in commands:
            words = [database.app.dsn if word.startswith("postgresql:") else word for word in shlex.split(line)][3:]
            result = ucm(*words, env={"UCM_POSTGRES_DSN": database.app.dsn})
            # What is accepted there is not to be found here.
            assert result.exit_code == (2 if "--accept" in words else 0), (line, result.output)
