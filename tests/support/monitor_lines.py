"""The lines of a MONITOR: each command with the server's time, also those that scripts call."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha1
from typing import Final

SCRIPTS: Final = ("evalsha", "eval", "evalsha_ro", "eval_ro", "fcall", "fcall_ro")
"""Commands that run one, which is named first."""

_HEAD = re.compile(rb"^\+?(\d+\.\d+) \[\d+ ([^\]]+)\] (.*)$")
_WORD = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(rb"\\(x[0-9a-f]{2}|.)")
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}


class GapError(AssertionError):
    """The recording is not whole: nothing can be said from it."""


@dataclass(frozen=True, slots=True)
class Line:
    """One command. ``at`` is the server's wall clock in seconds; of what a script called, that of the script's start,
    since a server's time stands still in a script. ``script`` is the hash of which called it, None for a client's own;
    ``call`` is the number of the client's command that it belongs to.
    """

    number: int
    at: float
    client: str
    script: str | None
    call: int
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        return self.words[0].lower()

    def __str__(self) -> str:
        by = self.client if self.script is None else f"script {self.script[:8]}"
        return f"line {self.number}: {self.at:.6f} [{by}] {' '.join(self.words)}"


def read_lines(raw: Iterable[bytes]) -> Iterator[Line]:
    """The lines of a MONITOR. Raises GapError for one that is none, as the last is when the connection broke in it."""
    call, at, script = 0, 0.0, ""
    for number, text in enumerate(raw):
        found = _HEAD.match(text)
        if found is None:
            raise GapError(f"line {number} is not one of MONITOR: {text[:200]!r}")
        client = found[2].decode()
        words = _words(found[3])
        if client == "lua":
            yield Line(number, at, client, script, call, words)
            continue
        call, at = number, float(found[1])
        command = words[0].lower()
        script = words[1] if command in SCRIPTS else ""
        if command.startswith("eval") and "sha" not in command:
            script = sha1(script.encode("latin-1"), usedforsecurity=False).hexdigest()
        yield Line(number, at, client, None, call, words)


def _words(text: bytes) -> tuple[str, ...]:
    if b"\\" not in text:
        return tuple(text.decode("latin-1")[1:-1].split('" "'))
    return tuple(_unescaped(word).decode("latin-1") for word in _WORD.findall(text))


def _unescaped(word: bytes) -> bytes:
    def one(found: re.Match[bytes]) -> bytes:
        what: bytes = found[1]
        return bytes([int(what[1:], 16)]) if len(what) == 3 else _ESCAPED.get(what, what)

    return _ESCAPE.sub(one, word)
