"""The kinds of server that the promises are proved on: the public helper's, and uvicorn with each of its parts."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ucm_middleware.testing.server import HOST, Server, ServerKind
from ucm_middleware.testing.server import start_server as start_public_server

__all__ = ["HOST", "SERVER_KINDS", "Server", "start_server"]

_KINDS: dict[str, tuple[ServerKind, tuple[str, ...]]] = {
    "uvicorn-h11": ("uvicorn", ("--http", "h11", "--loop", "asyncio")),
    "uvicorn-httptools": ("uvicorn", ("--http", "httptools", "--loop", "asyncio")),
    "uvicorn-uvloop": ("uvicorn", ("--http", "httptools", "--loop", "uvloop")),
    "hypercorn": ("hypercorn", ()),
    "granian": ("granian", ()),
}

SERVER_KINDS = tuple(_KINDS)


@contextmanager
def start_server(
    kind: str,
    app: str,
    *,
    app_dir: Path,
    env: Mapping[str, str | None] | None = None,
    options: Sequence[str] = (),
) -> Generator[Server]:
    """Run `app` on a server of one of `SERVER_KINDS`, which it then goes by."""
    public_kind, parts = _KINDS[kind]
    with start_public_server(app, app_dir=app_dir, kind=public_kind, env=env, options=(*parts, *options)) as server:
        server.kind = kind
        yield server
