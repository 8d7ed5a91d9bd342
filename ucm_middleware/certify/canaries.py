"""Canaries: values that belong to one user, and the search for them in what another is sent."""

import base64
import binascii
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, quote_plus

from ucm_middleware.certify.cast import Cast

_DIGITS: Final = 6
_LOOKED_AT: Final = 4 * 1024 * 1024
"""Bytes of one answer in which is looked."""

MADE: Final = re.compile(r"qzx[0-9a-f]{8}(?:u[0-9a-f]{0,2}n?[0-9a-f]{0,6})?", re.IGNORECASE)
"""Any canary that is made in any run, or the beginning of one."""

_BASE64: Final = re.compile(rb"[A-Za-z0-9+/_-]{10,}")


@dataclass(frozen=True, slots=True)
class Canary:
    """One that was found: whose it is, and the number of the request that brought it in, or None for what the
    application had from the start. Never the value.
    """

    owner: str
    number: int | None


class Canaries:
    """Those of a run. ``seed`` decides what they look like. Each run, and each attempt to repeat a part of one, should
    have others: what an earlier one left in a database proves nothing about this one.
    """

    __slots__ = ("_encoded", "_made", "_mark", "_secrets", "_users", "mark")

    def __init__(self, cast: Cast, seed: int) -> None:
        self._users = cast.names
        # Lower case letters and digits: no encoding of URLs, JSON or HTML changes it. It begins with letters that no
        # word has, so that few places must be looked at twice.
        self.mark: Final = f"qzx{hashlib.sha256(repr((seed, cast.names)).encode()).hexdigest()[:8]}"
        self._mark = self.mark.encode()
        self._made = re.compile(self._mark + rb"u([0-9a-f]{2})n([0-9a-f]{%d})" % _DIGITS)
        secrets = [(user.name, secret) for user in cast.users for secret in user.secrets]
        self._secrets = [(owner, form) for owner, secret in secrets for form in sorted(_forms(secret))]
        # What stands in base64 of any of them: two owners' may be alike there, so this says only where to decode.
        plain = [self._mark, *(form for _, form in self._secrets)]
        self._encoded = sorted({form for each in plain for form in _in_base64(each)})

    @property
    def users(self) -> tuple[str, ...]:
        """Their names."""
        return self._users

    def make(self, user: str, number: int) -> str:
        """The canary that a user's request of this number brings in: 21 lower case letters and digits."""
        return f"{self.mark}u{self._users.index(user):02x}n{number:0{_DIGITS}x}"

    def of_others(self, data: bytes, user: str) -> Iterable[Canary]:
        """Those in ``data`` that are not this user's: of each owner one made and one there before."""
        found: dict[tuple[str, bool], Canary] = {}
        for canary in self.all_in(data):
            if canary.owner != user:
                found.setdefault((canary.owner, canary.number is None), canary)
        return found.values()

    def all_in(self, data: bytes) -> Iterator[Canary]:
        """Those in ``data``: as they are, in any case of letters, and in base64; an application's secret also escaped
        or quoted.
        """
        looked_at = data[:_LOOKED_AT]
        yield from self._plain_in(looked_at)
        if any(form in looked_at for form in self._encoded):
            for found in _BASE64.finditer(looked_at):
                for decoded in _decoded(found[0]):
                    yield from self._plain_in(decoded)

    def _plain_in(self, data: bytes) -> Iterator[Canary]:
        lowered = data.lower()
        if self._mark in lowered:
            for found in self._made.finditer(lowered):
                index = int(found[1], 16)
                if index < len(self._users):
                    yield Canary(self._users[index], int(found[2], 16))
        for owner, form in self._secrets:
            if form in data:
                yield Canary(owner, None)

    def patterns(self) -> tuple[str, ...]:
        """What stands in any text that has a canary in it, for a first look in the application's process."""
        forms = [*(form for _, form in self._secrets), *self._encoded]
        return (self.mark, *(form.decode(errors="replace") for form in forms))


def forms_of_secrets(cast: Cast) -> tuple[str, ...]:
    """Every form in which a secret of these users is looked for, base64 included."""
    forms = {form for user in cast.users for secret in user.secrets for form in _forms(secret)}
    encoded = {form for each in forms for form in _in_base64(each)}
    return tuple(sorted(form.decode(errors="replace") for form in forms | encoded))


def _forms(secret: str) -> set[bytes]:
    """As it is, in a URL, in JSON, in HTML by the standard library and by MarkupSafe, and as Python shows a text."""
    marked_up = html.escape(secret)
    forms = {
        *(secret, quote(secret, safe=""), quote(secret), quote_plus(secret)),
        *(json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]),
        *(html.escape(secret, quote=False), marked_up),
        marked_up.replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
        *(secret.encode("unicode_escape").decode(), repr(secret)[1:-1]),
    }
    encoded = {form.encode() for form in forms}
    with suppress(UnicodeEncodeError):
        encoded.add(secret.encode("latin-1"))  # as headers are
    return encoded


def _decoded(run: bytes) -> Iterator[bytes]:
    """What base64 text may say that stands in other letters, begun at each of the places where it can begin."""
    plain = run.replace(b"-", b"+").replace(b"_", b"/")
    for begin in range(4):
        part = plain[begin:]
        part = part[: len(part) - (len(part) % 4 == 1)]
        try:
            yield base64.b64decode(part + b"=" * (-len(part) % 4))
        except binascii.Error:
            continue


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
