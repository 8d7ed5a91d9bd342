"""What a user's things are called on the server: everything from derived keys, nothing of the user's id in clear.

A user's keys begin with ``ucm:{<tag>}:``. The tag is a hash of the key that the context derives, in 40 characters of
``a-z`` and ``2-7``: of one length, so that no user's prefix begins another's, and without a character that patterns
know, whatever the user is called and whatever a plugin derives. In braces, all keys of one user share a slot of a
cluster.
"""

import hmac
import re
from base64 import b32encode
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from ucm_middleware import ConfigurationError, InvalidContextError, UserExecutionContext
from ucm_valkey.programs import Login

MAX_NAME: Final = 1024
"""How long a name may be, in bytes of UTF-8."""

_NAMESPACE: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_GLOB: Final = re.compile(rb"[\\*?\[\]^]")


@dataclass(frozen=True, slots=True)
class UserKeys:
    """The keys of one user in one namespace."""

    tag: str

    @property
    def prefix(self) -> bytes:
        """What each key of the user begins with."""
        return b"ucm:{%s}:" % self.tag.encode()

    def key(self, name: str) -> bytes:
        """The key of a name. Raises InvalidContextError for what is none."""
        return self.prefix + _encoded(name)

    def pattern(self, beginning: str) -> bytes:
        """A pattern for the keys whose names begin so."""
        return self.prefix + _GLOB.sub(rb"\\\g<0>", _encoded(beginning, may_be_empty=True)) + b"*"

    def name(self, key: bytes) -> str | None:
        """The name of a key; None for a key of somebody else's."""
        return key[len(self.prefix) :].decode() if key.startswith(self.prefix) else None


def checked_namespace(namespace: object) -> str:
    """Raises ConfigurationError for what is none."""
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        raise ConfigurationError(
            "namespace must be a lowercase identifier of at most 32 characters, which names the cache in the code, "
            "such as 'prices'"
        )
    return namespace


def keys_of(context: UserExecutionContext, namespace: str) -> UserKeys:
    """A user's keys. Raises what ``context.derive_key`` raises."""
    return UserKeys(_tag(context.derive_key("valkey_cache", f"namespace {namespace}")))


def login_of(keys: UserKeys, group: str, secret: bytes) -> Login:
    """The user's login on the server, of a secret for this purpose."""
    name = f"ucm_{group}_{keys.tag}"
    return Login(name, hmac.digest(secret, name.encode(), "sha256").hex())


def group_of(namespace: str, database: object) -> str:
    """What tells the server users of one cache from others': eight characters."""
    return b32encode(sha256(f"{namespace}/{database}".encode()).digest()[:5]).decode().lower()


def _tag(derived: str) -> str:
    return b32encode(sha256(derived.encode()).digest()[:25]).decode().lower()


def _encoded(name: object, *, may_be_empty: bool = False) -> bytes:
    if not isinstance(name, str):
        raise InvalidContextError("name", f"is not text but {type(name).__name__}", "give a str")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise InvalidContextError("name", "is not valid Unicode text", "leave out lone surrogates") from None
    if len(encoded) > MAX_NAME or not (encoded or may_be_empty):
        raise InvalidContextError("name", f"is empty or longer than {MAX_NAME} bytes", "shorten it, or hash it")
    return encoded
