"""The key file of a ledger: who its subjects are, each one's key, and erasure, which destroys them.

The format is that of ``docs/reference/ledger-format.md``. Nothing of a user is kept in memory beyond the result of one
call.
"""

import hmac
import sqlite3
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from os import urandom
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from ucm_middleware.audit import database
from ucm_middleware.audit.database import errors_of, transaction
from ucm_middleware.audit.encoding import SUBJECT_LENGTH
from ucm_middleware.audit.keyfile import RESTORE, open_key_file, start_key_file
from ucm_middleware.audit.sealing import cipher_of, seal, unseal
from ucm_middleware.errors import ErasureIncompleteError, IdentityConflictError, LedgerFileError
from ucm_middleware.forking import leave_to_parent, renewed_after_fork
from ucm_middleware.secret import Secret, SecretRing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32

_OF_USER: Final = "lookup = :lookup OR bound_to = (SELECT subject FROM subjects WHERE lookup = :lookup)"

_BIND: Final = "UPDATE subjects SET bound_to = :user WHERE subject = :anonymous AND ifnull(bound_to, :user) = :user"

_AT_ONCE: Final = 250  # how many users one statement asks for; SQLite may be built with a limit of 999

# Text and bytes that are keys or personal go by the name of secret in every frame that can raise; see secret.py.


class Subject:
    """One user, as the ledger knows them: a random token, and what seals and unseals the fields of their records.

    To be dropped with the batch that it was asked for: what is kept would outlive an erasure.
    """

    __slots__ = ("_cipher", "_path", "token")

    def __init__(self, token: bytes, cipher: "AESGCM", path: Path) -> None:
        self.token = token
        """16 random bytes."""
        self._cipher = cipher
        self._path = path

    def seal(self, secret: bytes, /) -> bytes:
        """Nonce and ciphertext; 28 bytes longer than what is given."""
        return seal(self._cipher, secret, self.token)

    def unseal(self, sealed: bytes, /) -> bytes:
        """What was sealed. Raises LedgerFileError when it was not sealed under this subject's key, or was altered."""
        secret = unseal(self._cipher, sealed, self.token)
        if secret is None:
            raise LedgerFileError(
                str(self._path),
                f"does not open a record of subject {self.token.hex()}: it was altered, or sealed under another key",
                "verify the ledger, and use the key file that belongs to it",
            )
        return secret

    def __repr__(self) -> str:
        return f"<Subject {self.token.hex()}>"


class Vault:
    """The key file, open. For one thread at a time; any number of processes may have the same file open.

    Each method raises LedgerFileError when the file cannot be read or written, is locked for longer than ten seconds,
    or is damaged. A forked child must open a vault of its own; that of its parent is refused there.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, master: Secret) -> None:
        self._path = path
        self._identity = database.identity_of(path)
        self._connection: sqlite3.Connection | None = connection
        self._lookup_key = master.subkey("lookup")
        self._cipher = cipher_of(master.subkey("subjects"))
        renewed_after_fork(self)

    @classmethod
    def open(cls, path: Path, stream: str, secrets: SecretRing, *, must_exist: bool = False) -> Self:
        """The key file of a ledger, for a writer that starts. Made where there is none and it need not exist.

        One that is under a previous secret is put under the current one. Raises LedgerFileError for a file that is not
        the one of this ledger, was made under another secret, or may not be used for any reason of ``open_database``;
        ConfigurationError in production without a secret.
        """
        return cls(path, *start_key_file(path, stream, secrets, must_exist=must_exist))

    @classmethod
    def open_existing(cls, path: Path, stream: str, secrets: SecretRing, *, read_only: bool = False) -> Self:
        """The same for whoever reads or erases: it must be there, and stays under the secret that it is under."""
        return cls(path, *open_key_file(path, stream, secrets, read_only=read_only))

    def of(self, user_ids: Iterable[str]) -> dict[str, Subject]:
        """The subjects of all these users, by user id. Who has none gets one, which is durable on return."""
        wanted = self._lookups(user_ids)
        with self._database() as connection:
            subjects = self._known(connection, wanted)
            if len(subjects) < len(wanted):
                with transaction(connection):
                    subjects = self._known_or_new(connection, wanted)
        return subjects

    def find(self, user_id: str) -> Subject | None:
        """The subject of a user who has one."""
        with self._database() as connection:
            return self._known(connection, self._lookups((user_id,))).get(user_id)

    def name_of(self, token: bytes) -> str | None:
        """The user id of a subject; None for one that was erased, or never was."""
        with self._database() as connection:
            for (sealed,) in connection.execute("SELECT sealed FROM subjects WHERE subject = ?", (token,)).fetchall():
                return self._opened(token, sealed)[1]
        return None

    def behind(self, tokens: Iterable[bytes]) -> dict[bytes, tuple[str, Subject]]:
        """The users behind subjects, and what opens their records. Those that were erased are not among them."""
        found: dict[bytes, tuple[str, Subject]] = {}
        with self._database() as connection:
            for token in dict.fromkeys(tokens):
                rows = connection.execute("SELECT sealed FROM subjects WHERE subject = ?", (token,)).fetchall()
                for (sealed,) in rows:
                    secret, user_id = self._opened(token, sealed)
                    found[token] = user_id, Subject(token, cipher_of(secret), self._path)
        return found

    def bind(self, users: Mapping[str, str]) -> None:
        """Anonymous subjects, by their ids, learned their users: whoever erases a user erases those too.

        Durable on return; the same again changes nothing. Raises IdentityConflictError, and binds none, when one has
        another user.
        """
        wanted = self._lookups((*users, *users.values()))
        with self._database() as connection, transaction(connection):
            subjects = self._known_or_new(connection, wanted)
            for anonymous_id, user_id in users.items():
                token = subjects[anonymous_id].token
                bound = connection.execute(_BIND, {"anonymous": token, "user": subjects[user_id].token})
                if not bound.rowcount:
                    raise IdentityConflictError(f"subject {token.hex()} is bound to another user than this one")

    def subjects_of(self, user_id: str) -> tuple[bytes, ...]:
        """The subjects that ``erase`` would erase."""
        [lookup] = self._lookups((user_id,))
        with self._database() as connection:
            rows = connection.execute(f"SELECT subject FROM subjects WHERE {_OF_USER}", {"lookup": lookup}).fetchall()
        return tuple(token for (token,) in rows)

    def erase(self, user_id: str) -> tuple[bytes, ...]:
        """Destroy the keys of a user, and of the anonymous subjects bound to them; returns their tokens.

        On return no byte of a key, a user id or a lookup of theirs is in the file or beside it. The file is written
        anew for that, in time proportional to its size (a second for 500,000 subjects). Raises ErasureIncompleteError
        when something is in the way; to erase again takes up where it stopped. A user without a subject has no tokens.
        """
        [lookup] = self._lookups((user_id,))
        with self._database() as connection:
            with transaction(connection):
                rows = connection.execute(
                    f"DELETE FROM subjects WHERE {_OF_USER} RETURNING subject", {"lookup": lookup}
                ).fetchall()
            tokens = tuple(token for (token,) in rows)
            try:
                self._clean(connection)
            except LedgerFileError as error:
                raise ErasureIncompleteError(
                    str(self._path),
                    f"the keys of {len(tokens)} subjects are deleted, and traces of them are left: {error.problem}",
                    f"{error.remedy}; then erase the same user again, which removes what is left",
                    tokens,
                ) from error
        return tokens

    def close(self) -> None:
        """Close the file. May be called again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def after_fork(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            leave_to_parent(connection)

    @contextmanager
    def _database(self) -> Generator[sqlite3.Connection]:
        if self._connection is None:
            raise LedgerFileError(str(self._path), "is closed, or open in the parent process alone", "open it anew")
        if database.identity_of(self._path) != self._identity:  # a key written to it now would be lost
            raise LedgerFileError(
                str(self._path),
                "was moved or deleted while it was in use",
                "put it back, together with the file beside it that ends in -wal; writing goes on by itself",
            )
        with errors_of(self._path):
            yield self._connection
            self._connection.execute("PRAGMA shrink_memory")  # its pages are full of sealed keys

    def _lookups(self, user_ids: Iterable[str]) -> dict[bytes, str]:
        key = self._lookup_key
        return {hmac.digest(key, user_id.encode(), "sha256"): user_id for user_id in dict.fromkeys(user_ids)}

    def _known(self, connection: sqlite3.Connection, wanted: Mapping[bytes, str]) -> dict[str, Subject]:
        subjects: dict[str, Subject] = {}
        lookups = list(wanted)
        for start in range(0, len(lookups), _AT_ONCE):
            some = lookups[start : start + _AT_ONCE]
            rows = connection.execute(
                f"SELECT lookup, subject, sealed FROM subjects WHERE lookup IN ({','.join('?' * len(some))})", some
            )
            for lookup, token, sealed in rows.fetchall():
                secret, user_id = self._opened(token, sealed)
                if user_id != wanted[lookup]:
                    raise self._damaged(token)
                subjects[user_id] = Subject(token, cipher_of(secret), self._path)
        return subjects

    def _known_or_new(self, connection: sqlite3.Connection, wanted: Mapping[bytes, str]) -> dict[str, Subject]:
        connection.executemany(
            "INSERT INTO subjects (lookup, subject, sealed) VALUES (?, ?, ?) ON CONFLICT (lookup) DO NOTHING",
            (
                (
                    lookup,
                    token := urandom(SUBJECT_LENGTH),
                    seal(self._cipher, urandom(KEY_BYTES) + user_id.encode(), token),
                )
                for lookup, user_id in wanted.items()
            ),
        )
        return self._known(connection, wanted)

    def _opened(self, token: bytes, sealed: bytes) -> tuple[bytes, str]:
        secret = unseal(self._cipher, sealed, token)
        if secret is None:
            raise self._damaged(token)
        return secret[:KEY_BYTES], secret[KEY_BYTES:].decode()

    def _damaged(self, token: bytes) -> LedgerFileError:
        return LedgerFileError(
            str(self._path),
            f"is damaged: the row of subject {token.hex()} was altered",
            RESTORE,
        )

    def _clean(self, connection: sqlite3.Connection) -> None:
        # secure_delete alone is not enough: where SQLite divides or joins pages, it leaves copies of rows behind, about
        # one for a thousand. VACUUM writes every page anew, from the rows that there are.
        with errors_of(self._path):
            connection.execute("VACUUM")
            deadline = time.monotonic() + database.PATIENCE
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() >= deadline:
                    raise LedgerFileError(
                        str(self._path), "its log is in use by another connection", "end what reads the file"
                    )
                time.sleep(0.01)  # another checkpoint is under way: that is the one thing that SQLite does not wait for
