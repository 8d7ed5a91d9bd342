"""The kinds of server that the promises are proved on: the public helper's, and uvicorn with each of its parts."""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ucm_middleware.testing.server import HOST, Server, ServerKind, run_server
from ucm_middleware.testing.server import start_server as start_public_server

__all__ = [
    "ALL_SERVER_KINDS",
    "HOST",
    "SERVER_KINDS",
    "WEBSOCKET_SERVER_KINDS",
    "Server",
    "chosen_kinds",
    "start_crowd_server",
    "start_server",
]

_KINDS: dict[str, tuple[ServerKind, tuple[str, ...]]] = {
    "uvicorn-h11": ("uvicorn", ("--http", "h11", "--loop", "asyncio")),
    "uvicorn-httptools": ("uvicorn", ("--http", "httptools", "--loop", "asyncio")),
    "uvicorn-uvloop": ("uvicorn", ("--http", "httptools", "--loop", "uvloop")),
    "hypercorn": ("hypercorn", ()),
    "granian": ("granian", ()),
}

ALL_SERVER_KINDS = tuple(_KINDS)


def chosen_kinds(names: str | None) -> tuple[str, ...]:
    """The kinds that a list with blanks between names, all of them without one. Raises ValueError for a wrong name."""
    if names is None:
        return ALL_SERVER_KINDS
    chosen = names.split()
    if not chosen or not set(chosen) <= set(ALL_SERVER_KINDS):
        raise ValueError(f"UCM_TEST_SERVERS must name some of {', '.join(ALL_SERVER_KINDS)}, not {names!r}")
    return tuple(kind for kind in ALL_SERVER_KINDS if kind in chosen)


SERVER_KINDS = chosen_kinds(os.environ.get("UCM_TEST_SERVERS"))
"""What each test of all kinds of server runs on: `tox.ini` sets the variable where some are to do."""

_WEBSOCKET_KINDS: dict[str, tuple[ServerKind, tuple[str, ...]]] = {
    **{f"uvicorn-{name}": ("uvicorn", ("--ws", name)) for name in ("websockets", "websockets-sansio", "wsproto")},
    "hypercorn": ("hypercorn", ()),
    "granian": ("granian", ()),
}

WEBSOCKET_SERVER_KINDS = tuple(
    kind for kind, (server, _) in _WEBSOCKET_KINDS.items() if server in {_KINDS[chosen][0] for chosen in SERVER_KINDS}
)
"""The same servers by what differs in WebSockets: uvicorn has three implementations of them."""


@contextmanager
def start_server(
    kind: str,
    app: str,
    *,
    app_dir: Path,
    env: Mapping[str, str | None] | None = None,
    options: Sequence[str] = (),
) -> Generator[Server]:
    """Run `app` on a server of one of `SERVER_KINDS` or `WEBSOCKET_SERVER_KINDS`, which it then goes by."""
    public_kind, parts = {**_KINDS, **_WEBSOCKET_KINDS}[kind]
    with start_public_server(app, app_dir=app_dir, kind=public_kind, env=env, options=(*parts, *options)) as server:
        server.kind = kind
        yield server


@contextmanager
def start_crowd_server(kind: str, app_dir: Path, env: Mapping[str, str]) -> Generator[Server]:
    """Run `promise_crowd` on "uvicorn", or on the server of the "websockets" library, which is a program of its own."""
    if kind == "uvicorn":
        with start_public_server("promise_crowd:app", app_dir=app_dir, kind="uvicorn", env=env) as server:
            yield server
        return
    with run_server(kind, lambda port: ["promise_crowd_library", str(port)], app_dir=app_dir, env=env) as server:
        yield server
