"""Checkpoints: what is signed is what the format says; what is read is only what was signed."""

import stat
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.ledgers import Facts, facts, files_in, note
from ucm_middleware.audit.checkpoints import append_checkpoint, generate_key, read_private_key, sign_checkpoint
from ucm_middleware.audit.verification import Checkpoint, read_checkpoints, read_public_key
from ucm_middleware.errors import LedgerFileError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
SEVEN, TWELVE = facts(7), facts(12)
BOTH = note(SEVEN, KEY) + b"\n" + note(TWELVE, KEY)


def signed(ledger: Facts) -> str:
    return sign_checkpoint(ledger.stream, len(ledger.entries), ledger.root, KEY)


def as_read(ledger: Facts) -> Checkpoint:
    return Checkpoint(ledger.stream, len(ledger.entries), ledger.root)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two checkpoints."""
    path = tmp_path / "checkpoints"
    path.write_bytes(BOTH)
    return path


# Making


@pytest.mark.parametrize("size", [0, 1, 7, 12])
def test_a_checkpoint_is_the_note_of_the_format(size: int) -> None:
    assert signed(facts(size)).encode() == note(facts(size), KEY)


def test_a_checkpoint_to_the_letter() -> None:
    """Ed25519 gives one signature for a key and a text; openssl and sha256sum, by hand, gave this one."""
    made = sign_checkpoint("stream_" + "0" * 32, 3, bytes(range(100, 132)), KEY)
    assert made == (
        "stream_00000000000000000000000000000000\n"
        "3\n"
        "ZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXp7fH1+f4CBgoM=\n"
        "\n"
        "— stream_00000000000000000000000000000000 "
        "P0cPah5AGnAHH9iFe4FDVHdBrbCnT8PQeVUHqqcQ7nlsMLWNiBb4YdWxrIPzqybtiSSSFxmUnjU2vTdBbyhPCg1AgQE=\n"
    )


def test_checkpoints_are_appended_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    append_checkpoint(path, signed(SEVEN))
    append_checkpoint(path, signed(TWELVE))
    assert path.read_bytes() == BOTH
    assert read_checkpoints(path, KEY.public_key()) == (as_read(SEVEN), as_read(TWELVE))


def test_where_a_checkpoint_cannot_be_written_is_said(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path, "is a directory"),
        (tmp_path / "missing" / "file", "cannot be written to"),
        (Path("/dev/full"), "not a regular file"),
        (tmp_path / "a\0b", "cannot be written to"),
        (tmp_path / ("a" * 5000), "cannot be written to"),
    ):
        with pytest.raises(LedgerFileError, match=words):
            append_checkpoint(path, signed(SEVEN))
    assert files_in(tmp_path) == {}


# Reading

CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a size": (lambda text: text.replace(b"\n7\n", b"\n8\n"), "checkpoint 1 is not what was signed"),
    "a root": (
        lambda text: text.replace(b64encode(TWELVE.root), b64encode(bytes(32))),
        "checkpoint 2 is not what was signed",
    ),
    "the stream": (
        lambda text: text.replace(TWELVE.stream.encode(), b"stream_" + b"f" * 32),
        "checkpoint 1 was not signed with this key",  # which goes by the stream's name
    ),
    "a stream once": (lambda text: b"stream_" + b"f" * 32 + text[39:], "line 1"),
    "nothing left": (lambda _: b"", "has no checkpoints"),
    "no blank line": (lambda text: text.replace(b"=\n\nstream", b"=\nstream"), "line 6"),
    "two blank lines": (lambda text: text.replace(b"=\n\nstream", b"=\n\n\nstream"), "line 7"),
    "a blank line at the end": (lambda text: text + b"\n", "line 13"),
    "a blank line at the start": (lambda text: b"\n" + text, "line 1"),
    "cut in the middle": (lambda text: text[:-20], "line 7"),
    "no newline at the end": (lambda text: text[:-1], "line 7"),
    "carriage returns": (lambda text: text.replace(b"\n", b"\r\n"), "line 1"),
    "a hyphen for the dash": (lambda text: text.replace("—".encode(), b"-"), "line 1"),
    "a zero before the size": (lambda text: text.replace(b"\n12\n", b"\n012\n"), "line 7"),
    "a size with a sign": (lambda text: text.replace(b"\n12\n", b"\n+12\n"), "line 7"),
    "a size beyond any": (lambda text: text.replace(b"\n12\n", b"\n" + b"9" * 5000 + b"\n"), "line 7"),
    "a line more": (lambda text: text.replace(b"\n12\n", b"\n12\nmore\n"), "line 7"),
    "garbage": (lambda _: bytes(range(256)), "line 1"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_is_refused(path: Path, what: str) -> None:
    change, words = CHANGES[what]
    path.write_bytes(change(BOTH))
    assert path.read_bytes() != BOTH
    with pytest.raises(LedgerFileError) as refused:
        read_checkpoints(path, KEY.public_key())
    assert words in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")


def test_base64_has_one_spelling(path: Path) -> None:
    # The last character before the padding has bits that decoding drops: a second text with the same signature.
    text = note(SEVEN, KEY).decode()
    at = len(text) - 3
    assert text[at + 1 :] == "=\n"
    for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/":
        other = f"{text[:at]}{character}=\n"
        if other != text:
            path.write_text(other)
            with pytest.raises(LedgerFileError, match=r"line 1|not what was signed"):
                read_checkpoints(path, KEY.public_key())


def test_another_key_is_told_from_a_forgery(path: Path) -> None:
    with pytest.raises(LedgerFileError, match="checkpoint 1 was not signed with this key"):
        read_checkpoints(path, OTHER_KEY.public_key())
    signature = note(SEVEN, OTHER_KEY).split()[-1]
    key_id = b64decode(note(SEVEN, KEY).split()[-1])[:4]
    posing = b64encode(key_id + b64decode(signature)[4:])
    path.write_bytes(note(SEVEN, OTHER_KEY).replace(signature, posing))
    with pytest.raises(LedgerFileError, match="checkpoint 1 is not what was signed"):
        read_checkpoints(path, KEY.public_key())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(BOTH) - 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_no_changed_byte_is_read(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    path, content = tmp_path / "checkpoints", bytearray(BOTH)
    for position, pattern in changes:
        content[position] ^= pattern
    path.write_bytes(content)
    if content == BOTH:
        assert len(read_checkpoints(path, KEY.public_key())) == 2
    else:
        with pytest.raises(LedgerFileError):
            read_checkpoints(path, KEY.public_key())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.text().map(str.encode))
def test_garbage_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(content)
    for read in (lambda: read_checkpoints(path, KEY.public_key()), lambda: read_public_key(path)):
        with pytest.raises(LedgerFileError):
            read()
    with pytest.raises(LedgerFileError):
        read_private_key(path)


def test_a_file_that_is_too_long_is_not_read(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(65 * 1024 * 1024)
    with pytest.raises(LedgerFileError, match="has more than 67,108,864 bytes"):
        read_checkpoints(path, KEY.public_key())


# Keys


def test_keys_are_made_and_read(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert generate_key(path) == tmp_path / "key.pub"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = load_pem_private_key(path.read_bytes(), None)
    public = load_pem_public_key((tmp_path / "key.pub").read_bytes())
    assert isinstance(key, Ed25519PrivateKey)
    assert key.public_key() == public
    assert read_private_key(path).private_bytes_raw() == key.private_bytes_raw()
    assert read_public_key(tmp_path / "key.pub") == public
    assert b"PRIVATE" not in (tmp_path / "key.pub").read_bytes()


@pytest.mark.parametrize("taken", ["key", "key.pub"])
def test_no_key_is_overwritten(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("dear to somebody")
    with pytest.raises(LedgerFileError, match=f"{taken}: is there already"):
        generate_key(tmp_path / "key")
    assert files_in(tmp_path) == {taken: b"dear to somebody"}


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LedgerFileError, match="is there already"):
        generate_key(tmp_path / "key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(LedgerFileError, match="cannot be written"):
        generate_key(tmp_path / "missing" / "key")


CURVE_KEY = generate_private_key(SECP256R1())
PUBLIC_PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
PRIVATE_PEM = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (PUBLIC_PEM, "is not a private key"),
        (KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"p")), "under a passphrase"),
        (CURVE_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "not one of Ed25519"),
        (PRIVATE_PEM[:60], "is not a private key"),
        (b"", "is not a private key"),
        (b"x" * 100_000, "has more than 65,536 bytes"),
    ],
)
def test_a_wrong_private_key_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(LedgerFileError, match=words) as refused:
        read_private_key(tmp_path / "key")
    assert "BEGIN" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (PRIVATE_PEM, "is not a public key"),
        (CURVE_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "not one of Ed25519"),
        (PUBLIC_PEM[:60], "is not a public key"),
        (b"", "is not a public key"),
    ],
)
def test_a_wrong_public_key_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(LedgerFileError, match=words) as refused:
        read_public_key(tmp_path / "key")
    assert "BEGIN" not in str(refused.value)
    with pytest.raises(LedgerFileError, match="does not exist"):
        read_public_key(tmp_path / "nothing")
    with pytest.raises(LedgerFileError, match="is a directory"):
        read_private_key(tmp_path)
