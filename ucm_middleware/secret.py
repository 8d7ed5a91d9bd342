"""The one secret of an application, from which each keyed hash gets a subkey of its own.

HKDF (RFC 5869, with SHA-256 and no salt) separates the purposes: what one subkey gives away says nothing about another,
nor about the secret. HKDF is no password hash, so the secret must be random and not something a person thought up.
"""

import logging
import secrets
from base64 import b32encode
from collections.abc import Iterator, Sequence
from hmac import compare_digest
from itertools import pairwise
from typing import Final, NoReturn, Self, cast

from ucm_middleware.environment import PREVIOUS_SECRETS_VARIABLE, SECRET_VARIABLE, IsolatedEnvironment
from ucm_middleware.errors import ConfigurationError

logger = logging.getLogger(__name__)

MIN_BYTES: Final = 32
"""The fewest bytes of a secret: a shorter one is weaker than the hash (RFC 2104, section 3)."""

MIN_VARIETY: Final = 8
"""The fewest different bytes in a secret, and in the steps from each to the next; 32 random hex digits have some 14."""

PLACEHOLDERS: Final = (
    "changeme", "changethis", "donotuse", "example", "insecure", "mysecret", "password", "placeholder", "replaceme",
    "replacethis", "secretkey", "supersecret", "yoursecret",
)  # fmt: skip
"""What templates and tutorials write in place of a secret, whatever stands around or between. Each has seven letters or
more: a random secret has none in it, but for one in a billion."""

HOW_TO_MAKE_ONE: Final = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'

_INFO: Final = b"ucm-middleware 1 "  # the version of the scheme: with another one, every hash is another


class Secret:
    """One secret, shown nowhere. ``subkey`` and ``fingerprint`` are all that comes out of it."""

    __slots__ = ("_subkeys", "_value")

    def __init__(self, value: bytes) -> None:
        self._value = value
        self._subkeys: dict[str, bytes] = {}

    def subkey(self, purpose: str) -> bytes:
        """32 bytes for one purpose, the same in every process that has the secret."""
        try:
            return self._subkeys[purpose]
        except KeyError:
            return self._subkeys.setdefault(purpose, _hkdf(self._value, purpose))

    @property
    def fingerprint(self) -> str:
        """Eight characters of ``a-z2-7`` that tell this secret from others, and may be public."""
        return lower_base32(self.subkey("fingerprint")[:5])

    def is_same(self, other: "Secret") -> bool:
        """Whether the two are one secret, found out in a time that does not tell where they differ."""
        return compare_digest(self._value, other._value)

    def __reduce__(self) -> NoReturn:
        # Also what copy and deepcopy ask.
        raise TypeError(f"a secret is not copied or pickled; give the other process {SECRET_VARIABLE}")

    def __repr__(self) -> str:
        return "<Secret>"


class SecretRing:
    """The current secret, and the previous ones that stored hashes may still be made under.

    Where none is given, one is made for this process and for the children that it forks from then on.
    """

    __slots__ = ("_is_made", "_is_production", "_warned", "all")

    def __init__(self, given: Sequence[Secret], *, is_production: bool) -> None:
        self._is_made = not given
        self._is_production = is_production
        self._warned = False
        self.all = tuple(given) or (Secret(secrets.token_bytes(MIN_BYTES)),)
        """The secrets; the first is the current one."""

    @classmethod
    def from_settings(
        cls, secret: str | bytes | None, previous_secrets: Sequence[str | bytes] | None, settings: IsolatedEnvironment
    ) -> Self:
        """A ring of what is given, and of ``UCM_SECRET`` and ``UCM_SECRET_PREVIOUS`` (separated by commas) for what is
        not.

        Raises ConfigurationError, which names the one at fault and the rule and never shows a secret, when one is
        neither text nor bytes, blank, shorter than 32 bytes, of low variety or a placeholder, when one is there twice,
        and when there are previous ones without a current one.
        """
        current = [*_current(secret, settings)]
        previous = [*_previous(previous_secrets, settings)]
        if previous and not current:
            raise ConfigurationError(
                f"{previous[0][0]} is given and {SECRET_VARIABLE} is not set: previous secrets only read what is "
                f"stored; set the current one too, or {HOW_TO_MAKE_ONE}"
            )
        ring: list[Secret] = []
        for field, one in (*current, *previous):
            if any(map(one.is_same, ring)):
                raise ConfigurationError(
                    f"{field} is the same as a secret before it: a rotation puts a new one in place of the current, "
                    f"which goes behind it; {HOW_TO_MAKE_ONE}"
                )
            ring.append(one)
        return cls(ring, is_production=settings.is_production)

    def require(self, feature: str) -> None:
        """For a feature whose hashes outlive the process: raise ConfigurationError in production when no secret was
        given; elsewhere say once, in the log, what does not survive."""
        if not self._is_made:
            return
        if self._is_production:
            raise ConfigurationError(
                f"{SECRET_VARIABLE} is not set, and {feature} must have it in production, since what is made with it "
                f"outlives the process; {HOW_TO_MAKE_ONE} and give the same one to every process, as "
                f"{SECRET_VARIABLE} or UserContextManager(secret=...)"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s is not set: %s go by a secret that was made for this process. They will not survive a restart, and "
                "no other worker has the same; %s",
                SECRET_VARIABLE,
                feature,
                HOW_TO_MAKE_ONE,
            )


def lower_base32(value: bytes) -> str:
    """Eight characters of ``a-z2-7`` for each five bytes, of which there must be a multiple."""
    return b32encode(value).decode().lower()


def _hkdf(secret: bytes, purpose: str) -> bytes:
    # Imported here: it takes 7 ms and 8 MB, and an application without stored hashes needs none of it.
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=32, salt=None, info=_INFO + purpose.encode()).derive(secret)


# Text and bytes that may be a secret go by that name in every frame that can raise: reporters of errors that show local
# variables leave out what is called so.

Named = Iterator[tuple[str, Secret]]


def _current(secret: object, settings: IsolatedEnvironment) -> Named:
    if secret is not None:
        yield "secret", _checked(secret, "secret")
        return
    secret = settings.get(SECRET_VARIABLE)
    if secret is not None:
        if "," in secret:
            raise ConfigurationError(
                f"{SECRET_VARIABLE} has a comma in it, which separates the secrets of {PREVIOUS_SECRETS_VARIABLE}, "
                f"where it must stand one day; {HOW_TO_MAKE_ONE}"
            )
        yield SECRET_VARIABLE, _checked(secret, SECRET_VARIABLE)


def _previous(previous_secrets: object, settings: IsolatedEnvironment) -> Named:
    field = "previous_secrets"
    if previous_secrets is None:
        field = PREVIOUS_SECRETS_VARIABLE
        previous_secrets = _split(settings.get(field, ""))
    if isinstance(previous_secrets, str | bytes) or not isinstance(previous_secrets, Sequence):
        raise ConfigurationError(
            f"{field} is {type(previous_secrets).__name__}, which is no list of secrets; give one, newest first"
        )
    for number, secret in enumerate(cast("Sequence[object]", previous_secrets), 1):
        numbered = f"{field} (number {number})"
        yield numbered, _checked(secret, numbered)


def _split(secret: str) -> list[str]:
    return [part.strip() for part in secret.split(",")] if secret else []


def _checked(secret: object, field: str) -> Secret:
    if problem := _problem_with(secret):
        raise ConfigurationError(f"{field} {problem}; {HOW_TO_MAKE_ONE}")
    return Secret(secret if isinstance(secret, bytes) else cast(str, secret).encode())


def _problem_with(secret: object) -> str | None:
    if isinstance(secret, str):
        if not secret.strip():
            return "is blank"
        if secret != secret.strip():
            return "has blanks around it, which not every process may be given with it"
        if any("\ud800" <= character <= "\udfff" for character in secret):
            return "is not valid Unicode text; give bytes"
        value = secret.encode()
    elif isinstance(secret, bytes):
        value = secret
    else:
        return f"is {type(secret).__name__}, which is neither text nor bytes"
    if len(value) < MIN_BYTES:
        return f"has {len(value)} bytes, which is fewer than {MIN_BYTES}"
    if _variety(value) < MIN_VARIETY or _repeats_itself(value):
        return "repeats itself or counts up, so that it can be guessed"
    letters = "".join(filter(str.isalnum, value.decode("latin-1"))).casefold()
    if any(word in letters for word in PLACEHOLDERS):
        return "is a placeholder, or made from one"
    return None


def _variety(value: bytes) -> int:
    steps = {(after - before) % 256 for before, after in pairwise(value)}
    return min(len(set(value)), len(steps))


def _repeats_itself(value: bytes) -> bool:
    return any(value.startswith(value[period:]) for period in range(1, len(value) // 2 + 1))
