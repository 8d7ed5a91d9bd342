"""Canaries: values that belong to one user, and the search for them in what another is sent."""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from ucm_middleware.certify.cast import Cast

_DIGITS: Final = 6
_LOOKED_AT: Final = 4 * 1024 * 1024
"""Bytes of one answer in which is looked."""


@dataclass(frozen=True, slots=True)
class Canary:
    """One that was found: whose it is, and the number of the request that brought it in, or None for what the
    application had from the start. Never the value.
    """

    owner: str
    number: int | None


class Canaries:
    """Those of a run. ``seed`` decides what they look like, so that a run can be repeated; each ``attempt`` to repeat a
    part of it has others, for what an earlier one left in a database proves nothing about this one.
    """

    __slots__ = ("_made", "_mark", "_secrets", "_users", "mark")

    def __init__(self, cast: Cast, seed: int, attempt: int = 0) -> None:
        self._users = cast.names
        # Lower case letters and digits: no encoding of URLs, JSON or HTML changes it. It begins with letters that no
        # word has, so that few places must be looked at twice.
        self.mark: Final = f"qzx{hashlib.sha256(repr((seed, attempt, cast.names)).encode()).hexdigest()[:8]}"
        self._mark = self.mark.encode()
        self._made = re.compile(self._mark + rb"u([0-9a-f]{2})n([0-9a-f]{%d})" % _DIGITS)
        self._secrets = [
            (user.name, form) for user in cast.users for secret in user.secrets for form in sorted(_forms(secret))
        ]

    @property
    def users(self) -> tuple[str, ...]:
        """Their names."""
        return self._users

    def make(self, user: str, number: int) -> str:
        """The canary that a user's request of this number brings in: 23 lower case letters and digits."""
        return f"{self.mark}u{self._users.index(user):02x}n{number:0{_DIGITS}x}"

    def of_others(self, data: bytes, user: str) -> Iterable[Canary]:
        """Those in ``data`` that are not this user's: of each owner one made and one there before."""
        found: dict[tuple[str, bool], Canary] = {}
        for canary in self.all_in(data):
            if canary.owner != user:
                found.setdefault((canary.owner, canary.number is None), canary)
        return found.values()

    def all_in(self, data: bytes) -> Iterator[Canary]:
        """Those in ``data``, in any case of letters; an application's secret also in base64, escaped or quoted."""
        looked_at = data[:_LOOKED_AT]
        lowered = looked_at.lower()
        if self._mark in lowered:
            for found in self._made.finditer(lowered):
                index = int(found[1], 16)
                if index < len(self._users):
                    yield Canary(self._users[index], int(found[2], 16))
        for owner, form in self._secrets:
            if form in looked_at:
                yield Canary(owner, None)

    def patterns(self) -> tuple[str, ...]:
        """What stands in any text that has a canary in it, for a first look in the application's process."""
        return (self.mark, *(form.decode("latin-1") for _, form in self._secrets))


def _forms(secret: str) -> set[bytes]:
    raw = secret.encode()
    escaped = secret.encode("unicode_escape")
    return {raw, quote(secret, safe="").encode(), escaped, *_in_base64(raw)}


def _in_base64(raw: bytes) -> Iterator[bytes]:
    """What stands in base64 text wherever it stands in the encoded bytes, as in a cookie of a session or a token."""
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + raw)
        # The first characters depend on what stands before, the last ones on what stands behind.
        begin = (0, 2, 3)[offset]
        end = (offset + len(raw)) * 8 // 6
        inner = encoded[begin:end]
        yield inner
        yield inner.replace(b"+", b"-").replace(b"/", b"_")
