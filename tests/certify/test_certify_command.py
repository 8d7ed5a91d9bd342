"""``ucm certify`` as it is typed: its exit status, its files, and what it says when it is given something wrong."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from examples.gallery.common import TOKENS, USERS, api_key_of
from support.certifying import ROOT
from support.waiting import wait_until
from ucm_middleware.cli.app import make_app

CACHE = "examples.gallery.global_cache"
GALLERY = ("--factory", "--users", "examples.gallery.certify:cast", "--app-dir", str(ROOT))
SECRETS = [*TOKENS, *map(api_key_of, USERS)]


@pytest.fixture(autouse=True)
def same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command lets functions of the application be imported, for good: it ends with its process."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def certify(*arguments: str) -> Result:
    """The command, in this process."""
    result = CliRunner().invoke(make_app(), ["certify", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_finding_is_told_written_and_known_from_then_on(tmp_path: Path) -> None:
    json_file, junit, html, baseline = (tmp_path / name for name in ("r.json", "r.xml", "r.html", "known.json"))
    files = ("--json", str(json_file), "--junit", str(junit), "--html", str(html))
    quick = (*GALLERY, "--seconds", "2", "--first", "--seed", "3", f"{CACHE}:planted")

    first = certify(*quick, *files, "--shorten", "20")
    assert first.exit_code == 1
    assert "was sent a secret of" in first.stdout
    (finding,) = json.loads(json_file.read_text())["plain"]["findings"]
    assert finding["reproduced"]
    assert len(finding["steps"]) == 2
    assert ElementTree.parse(junit).findall(".//failure")
    assert "<svg" in html.read_text()
    written = [first.output, json_file.read_text(), junit.read_text(), html.read_text()]
    assert not [secret for secret in SECRETS for text in written if secret in text]

    known = ("--baseline", str(baseline), "--shorten", "0")
    assert certify(*quick, *known, "--update-baseline").exit_code == 0
    again = certify(*quick, *known)
    assert again.exit_code == 0
    assert "known" in again.stdout


def test_no_finding_is_never_called_proof() -> None:
    result = certify(*GALLERY, "--seconds", "2", f"{CACHE}:clean")
    assert result.exit_code == 0
    assert "That is no proof" in result.stdout
    assert "Not covered:" in result.stdout
    assert "HTTP/2: the server speaks HTTP/1.1 alone" in result.stdout


def test_an_application_that_answers_nobody_could_not_be_tried() -> None:
    result = certify("tests.certify.apps.bad_apps:fails", "--seconds", "1", "--app-dir", str(ROOT))
    assert result.exit_code == 2
    assert "0 of 2 routes covered" in result.stdout


def test_what_an_application_says_before_it_ends_has_no_credential_in_it(tmp_path: Path) -> None:
    (tmp_path / "telling.py").write_text('print("token-of-alice"); raise SystemExit("it was token-of-alice")\n')
    users = tmp_path / "users.toml"
    users.write_text(
        '[[users]]\nname = "alice"\nheaders = { Authorization = "Bearer token-of-alice" }\n[[users]]\nname = "bob"\n'
    )
    result = certify("telling:app", "--app-dir", str(tmp_path), "--users", str(users))
    assert result.exit_code == 2
    assert "it was (secret)" in result.stderr
    assert "token-of-alice" not in result.output


EXITS = """
import os
from fastapi import Body, FastAPI, Header, Response

app = FastAPI()

@app.post("/login")
async def login(response: Response, password: str = Body(embed=True)) -> dict[str, str]:
    print("login", password, flush=True)
    response.set_cookie("sid", f"session-behind-{password[-3:]}")
    return {"token": f"token-behind-{password[-3:]}"}

@app.get("/x")
async def x(authorization: str = Header(), cookie: str = Header()) -> None:
    print("asked with", authorization, cookie, flush=True)
    os._exit(3)
"""


def test_what_an_application_writes_before_it_exits_has_nothing_in_it_that_it_gave_its_users(tmp_path: Path) -> None:
    (tmp_path / "exiting.py").write_text(EXITS)
    users = tmp_path / "users.toml"
    sign_in = 'sign_in = {{ path = "/login", body = {{ password = "hunter2-{}" }}, token = "token" }}'
    users.write_text("\n".join(f'[[users]]\nname = "{name}"\n{sign_in.format(name)}' for name in ("ann", "bob")))
    result = certify("exiting:app", "--app-dir", str(tmp_path), "--users", str(users), "--seconds", "90")
    assert result.exit_code == 2
    assert "asked with Bearer (secret) sid=(secret)" in result.stderr
    assert "login (secret)" in result.stderr
    assert not [text for text in ("hunter2", "-behind-") if text in result.output]


def test_the_command_that_is_told_finds_the_application_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "r.json"
    certify(*GALLERY, "--seconds", "1", "--shorten", "0", "--json", str(report), f"{CACHE}:clean")
    words = shlex.split(json.loads(report.read_text())["options"]["replay"])
    assert words[words.index("--app-dir") + 1] == str(ROOT)


@pytest.mark.parametrize("option", ["--json", "--junit", "--html", "--baseline"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_run(option: str, tmp_path: Path) -> None:
    where = tmp_path / "nowhere" / "file"
    more = ["--update-baseline"] if option == "--baseline" else []
    result = certify("not_there_at_all:app", option, str(where), *more)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {where} cannot be written: there is no folder {where.parent}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("shop",), "APP must be module:name"),
        (("shop.py:app",), "APP must be module:name"),
        (("shop:app", "--server", "gunicorn"), "--server must be one of uvicorn, hypercorn, granian, not 'gunicorn'"),
        (("shop:app", "--users", "nobody.toml"), "nobody.toml cannot be read"),
        (("shop:app", "--users", "nobody:cast"), "nobody:cast cannot be called"),
        (("shop:app", "--update-baseline"), "--update-baseline needs --baseline FILE"),
        (("shop:app", "--baseline", "nowhere.json"), "nowhere.json cannot be read"),
        (("not_there_at_all:app",), "No module named 'not_there_at_all'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_no_traceback_of_ours(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = certify(*arguments)
    assert result.exit_code == 2
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert said in last


HANGS = """
import asyncio, os, pathlib

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        pathlib.Path("pid").write_text(str(os.getpid()))
        await receive()
        await asyncio.Event().wait()  # it does not end when it is told to
"""


def hears_signals() -> None:
    """What is started in the background of a shell, or under nohup, ignores some, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextmanager
def hanging(folder: Path) -> Generator[tuple[subprocess.Popen[bytes], int]]:
    """The command, as it tries an application that does not end when it is told to; and the process of that."""
    (folder / "hanging.py").write_text(HANGS)
    (folder / "schema.json").write_text('{"openapi": "3.1.0", "paths": {"/": {"get": {"responses": {}}}}}')
    command = [str(Path(sys.executable).with_name("ucm")), "certify", "hanging:app", "--schema", "schema.json"]
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=hears_signals,
    ) as process:
        pid = folder / "pid"
        wait_until(lambda: pid.is_file() and bool(pid.read_text()), "its server is up", timeout=60)
        yield process, int(pid.read_text())


def wait_until_gone(server: int) -> None:
    wait_until(lambda: not Path(f"/proc/{server}").exists(), "its server is gone")


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_breaks_it_off_leaves_nothing(number: signal.Signals, times: int, tmp_path: Path) -> None:
    with hanging(tmp_path) as (process, server):
        for _ in range(times):
            process.send_signal(number)
        said = process.communicate(timeout=30)[0].decode()
    assert process.returncode == 128 + number
    wait_until_gone(server)
    if times == 1:  # the second may come in the middle of anything
        assert "Traceback" not in said
        assert not [*tmp_path.glob("ucm-certify-*")]


def test_what_kills_it_leaves_no_server(tmp_path: Path) -> None:
    with hanging(tmp_path) as (process, server):
        process.kill()
    wait_until_gone(server)


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As under nohup."""
    script = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "from ucm_middleware.cli.certify.signals import ended_by_signals\n"
        "import asyncio\n"
        "async def main():\n"
        "    signal.raise_signal(signal.SIGHUP)\n"
        "    await asyncio.sleep(0)\n"
        "    return 'done'\n"
        "print(ended_by_signals(main()))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"done\n"
