"""TLS: the server must prove who it is. The wheel's Valkey has none, so a proxy with a certificate stands before it."""

import asyncio
import contextlib
import datetime
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from support.processes import HOST
from support.valkey import ADMIN, LibraryName, ValkeyServer
from support.valkey_cluster import Heard, order, serving, session_at, slot, user
from support.waiting import PATIENCE
from ucm_middleware.cluster.store import Granted, Keep
from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError


@dataclass(frozen=True, slots=True)
class Files:
    """A certificate that its own key has signed."""

    certificate: Path
    key: Path


def certificate(folder: Path, name: str) -> Files:
    """One for a host."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = Files(folder / f"{name}.crt", folder / f"{name}.key")
    files.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@contextlib.asynccontextmanager
async def tls_before(port: int, files: Files, *, clients: Files | None = None) -> AsyncIterator[int]:
    """A port that speaks TLS, and passes on what is said. With ``clients``, they must prove who they are too."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.certificate, files.key)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients.certificate)

    async def pump(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                to.write(data)
                await to.drain()
        to.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(HOST, port)
        await asyncio.gather(pump(reader, server_writer), pump(server_reader, writer))

    server = await asyncio.start_server(serve, HOST, 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
def localhost(tmp_path: Path) -> Files:
    return certificate(tmp_path, "localhost")


async def inspect(url: str, *, timeout: float = PATIENCE) -> None:
    session = session_at(url, timeout=timeout)
    try:
        await session.inspect()
    finally:
        await session.aclose()


async def test_all_is_said_over_tls(valkey_server: ValkeyServer, library: LibraryName, localhost: Files) -> None:
    async with tls_before(valkey_server.port, localhost) as port:
        url = f"{tls_scheme(library)}://:{ADMIN}@localhost:{port}?ssl_ca_certs={localhost.certificate}"
        await inspect(url)
        session, heard = session_at(url), Heard()
        await serving(session)
        assert await session.acquire(order(slot(user(1), 1))) == Granted("", None)
        await session.listen(heard)
        await session.subscribe(user(1))
        await session.publish(user(1), b"x" * 300_000, Keep(1, 1_000_000, 60))
        assert (await heard.next())[3] == b"x" * 300_000
        await session.aclose()


def tls_scheme(library: LibraryName) -> str:
    return f"{library}s" if library == "valkey" else "rediss"


async def test_a_server_that_does_not_prove_who_it_is(
    valkey_server: ValkeyServer, library: LibraryName, localhost: Files, tmp_path: Path
) -> None:
    async with tls_before(valkey_server.port, localhost) as port:
        scheme = tls_scheme(library)
        other = certificate(tmp_path, "elsewhere")
        for url in (
            f"{scheme}://:{ADMIN}@localhost:{port}",
            f"{scheme}://:{ADMIN}@localhost:{port}?ssl_ca_certs={other.certificate}",
            f"{scheme}://:{ADMIN}@{HOST}:{port}?ssl_ca_certs={localhost.certificate}",
        ):
            with pytest.raises(ConfigurationError, match="certificate") as caught:
                await inspect(url)
            assert ADMIN not in str(caught.value)


async def test_a_server_without_tls_and_one_that_wants_it(
    valkey_server: ValkeyServer, library: LibraryName, localhost: Files
) -> None:
    files = f"?ssl_ca_certs={localhost.certificate}"
    with pytest.raises(ClusterUnavailableError, match="speaks no TLS"):
        await inspect(f"{tls_scheme(library)}://:{ADMIN}@localhost:{valkey_server.port}{files}", timeout=0.5)
    async with tls_before(valkey_server.port, localhost) as port:
        # It hangs up, or answers with what is no RESP: which of both, the server decides.
        with pytest.raises((ConfigurationError, ClusterUnavailableError)):
            await inspect(f"{library}://:{ADMIN}@localhost:{port}")


async def test_a_client_proves_who_it_is(
    valkey_server: ValkeyServer, library: LibraryName, localhost: Files, tmp_path: Path
) -> None:
    worker = certificate(tmp_path, "worker")
    async with tls_before(valkey_server.port, localhost, clients=worker) as port:
        url = f"{tls_scheme(library)}://:{ADMIN}@localhost:{port}?ssl_ca_certs={localhost.certificate}"
        await inspect(f"{url}&ssl_certfile={worker.certificate}&ssl_keyfile={worker.key}")
        with pytest.raises((ConfigurationError, ClusterUnavailableError)):
            await inspect(url)
