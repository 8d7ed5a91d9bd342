"""Where the tap of ``ucm certify`` connects to, and the DSN that it gives the application."""

import asyncio
import datetime
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from support.postgres import Database
from support.processes import HOST
from ucm_middleware.certify.postgres import tap
from ucm_middleware.certify.postgres.dsn import Target, read_dsn
from ucm_middleware.errors import ConfigurationError

GIVEN_AND_LEADING = {
    "postgresql://u:p%40@db:6432/shop": "postgresql://u:p%40@127.0.0.1:7/shop",
    "postgres://u@db/shop?application_name=a%20b": "postgres://u@127.0.0.1:7/shop?application_name=a%20b",
    "postgresql:///shop?host=/tmp&port=6432": "postgresql://127.0.0.1:7/shop",
    "postgresql://[::1]:6432/shop": "postgresql://127.0.0.1:7/shop",
    "postgresql://u@db/shop?sslmode=require": "postgresql://u@127.0.0.1:7/shop?sslmode=disable",
    "postgresql+asyncpg://u@db/shop": "postgresql+asyncpg://u@127.0.0.1:7/shop",
    "postgresql+asyncpg://u@db/shop?ssl=require": "postgresql+asyncpg://u@127.0.0.1:7/shop?ssl=disable",
    r"host=db password='it\'s'": r"password='it\'s' host='127.0.0.1' port='7' sslmode='disable'",
}
TARGETS = {
    "postgresql://u@db:6432/shop": Target("db", 6432, None, "prefer", None),
    "postgresql://%2Frun%2Fdb:6432/shop": Target("/run/db", 6432, "/run/db/.s.PGSQL.6432", "prefer", None),
    "postgresql:///shop?host=/tmp&port=6432": Target("/tmp", 6432, "/tmp/.s.PGSQL.6432", "prefer", None),
    "host = '/tmp' port=6432": Target("/tmp", 6432, "/tmp/.s.PGSQL.6432", "prefer", None),
    "host=db sslmode=verify-full sslrootcert=/a/b": Target("db", 5432, None, "verify-full", "/a/b"),
}
REFUSED = {
    "postgresql://u:hidden@db/shop?channel_binding=require": "channel_binding=require cannot be used here",
    "postgresql://u:hidden@db/shop?gssencmode=require": "gssencmode=require cannot be used here",
    "postgresql://u:hidden@db/shop?sslcert=/c&sslkey=/k": "sslcert cannot be used here: a client certificate",
    "postgresql://u:hidden@db/shop?sslmode=yes": "sslmode must be one of disable, allow",
    "postgresql://u:hidden@one,two/shop": "names several hosts",
    "postgresql://u:hidden@db:port/shop": "port must be a number, not 'port'",
    "password=hidden service=shop": "service cannot be used here",
    "sqlite:///hidden": "neither a URL",
    "postgresql://u:hidden@db/shop?sslmode=verify-ca&sslrootcert=/nowhere": "sslrootcert /nowhere cannot be read",
}


@pytest.fixture(autouse=True)
def _no_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGPORT", "PGSSLMODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("given", "leading"), GIVEN_AND_LEADING.items())
def test_the_same_but_for_the_place(given: str, leading: str) -> None:
    assert read_dsn(given).leading_to(7) == leading


@pytest.mark.parametrize(("given", "target"), TARGETS.items())
def test_the_place(given: str, target: Target) -> None:
    assert read_dsn(given).target() == target


@pytest.mark.parametrize(("given", "why"), REFUSED.items())
async def test_what_cannot_be_done_is_refused_without_the_password(given: str, why: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        async with tap(given, lambda _: None):
            pass
    assert why in str(refused.value)
    assert "hidden" not in str(refused.value)


async def test_pairs_lead_to_the_tap_too(database: Database) -> None:
    app = database.app
    pairs = f"host={app.host} port={app.port} dbname={app.dbname} user={app.user} password={app.password}"
    async with tap(pairs, lambda _: None) as made:
        async with await psycopg.AsyncConnection.connect(made.dsn) as connection:
            assert await (await connection.execute("select current_user")).fetchone() == (app.user,)
        assert made.connections == 1


async def test_a_database_that_cannot_be_reached_is_said(database: Database) -> None:
    async with tap("postgresql://u@127.0.0.1:1/shop?sslmode=disable", lambda _: None) as made:
        with pytest.raises(psycopg.OperationalError, match="the tap of ucm certify cannot reach the database"):
            await psycopg.AsyncConnection.connect(made.dsn)
        assert made.connections == 0


@asynccontextmanager
async def relay(database: Database, folder: Path, context: ssl.SSLContext | None) -> AsyncGenerator[tuple[str, int]]:
    """The server behind a Unix socket; with a context at a port, with TLS."""
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if context is not None:
            await reader.readexactly(8)
            writer.write(b"S")
            await writer.start_tls(context)
        other, its_writer = await asyncio.open_connection(database.app.host, database.app.port)
        tasks.add(asyncio.create_task(pump(other, writer)))
        tasks.add(asyncio.create_task(pump(reader, its_writer)))

    if context is None:
        server = await asyncio.start_unix_server(serve, folder / ".s.PGSQL.6432")
    else:
        server = await asyncio.start_server(serve, HOST, 0)
    async with server:
        yield str(folder), 6432 if context is None else server.sockets[0].getsockname()[1]
        await asyncio.gather(*tasks)


async def test_the_server_is_reached_by_its_socket(database: Database, tmp_path: Path) -> None:
    app = database.app
    async with relay(database, tmp_path, None) as (folder, port):
        dsn = f"postgresql://{app.user}:{app.password}@/{app.dbname}?host={folder}&port={port}"
        async with tap(dsn, lambda _: None) as made:
            connection = await asyncpg.connect(made.dsn)
            assert await connection.fetchval("select current_user") == app.user
            await connection.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of "localhost", with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    unencrypted = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, unencrypted)
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.mark.parametrize(
    ("mode", "host", "is_trusted", "refusal"),
    [
        ("require", "127.0.0.1", False, None),
        ("prefer", "127.0.0.1", False, None),
        ("verify-ca", "127.0.0.1", True, None),
        ("verify-full", "localhost", True, None),
        ("verify-full", "127.0.0.1", True, "cannot reach the database: TLS fails"),
    ],
)
async def test_tls_to_the_server(
    database: Database, certificate: Path, mode: str, host: str, is_trusted: bool, refusal: str | None
) -> None:
    app = database.app
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with relay(database, certificate.parent, context) as (_, port):
        trust = f"&sslrootcert={certificate}" if is_trusted else ""
        dsn = f"postgresql://{app.user}:{app.password}@{host}:{port}/{app.dbname}?sslmode={mode}{trust}"
        async with tap(dsn, lambda _: None) as made:
            if refusal is not None:
                with pytest.raises(psycopg.OperationalError, match=refusal):
                    await psycopg.AsyncConnection.connect(made.dsn)
                return
            async with await psycopg.AsyncConnection.connect(made.dsn, autocommit=True) as connection:
                row = await (await connection.execute("select repeat('x', 1000000)")).fetchone()
                assert row is not None
                assert len(row[0]) == 1000000


async def test_a_server_without_tls_is_refused_where_it_is_required(database: Database) -> None:
    async with tap(f"{database.app.dsn}?sslmode=require", lambda _: None) as made:
        with pytest.raises(psycopg.OperationalError, match="sslmode is require, and the server has no TLS"):
            await psycopg.AsyncConnection.connect(made.dsn)
