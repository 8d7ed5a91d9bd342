"""What a text of SQL says about settings: which it sets, and whether it does anything else."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_TOKENS: Final = re.compile(
    rb"""--[^\n]*|/\*.*?\*/                                 # comments
    |[eE]'(?:[^'\\]|\\.|'')*+'|'(?:[^']|'')*+'|"(?:[^"]|"")*+"   # literals and names
    |\$(\w*)\$.*?\$\1\$                                       # dollar-quoted
    |;""",
    re.VERBOSE | re.DOTALL,
)
_NAME: Final = rb'"?([A-Za-z_][\w$]*(?:"?\."?[A-Za-z_][\w$]*)*)"?'
_SET: Final = re.compile(rb"set\s+(?:(?:session|local)\s+)?" + _NAME + rb"\s*(?:=|\bto\b)", re.IGNORECASE)
_SET_SPECIAL: Final = re.compile(
    rb"set\s+(?:(?:session|local)\s+)?(role|session\s+authorization|time\s+zone|names|schema)\b", re.IGNORECASE
)
_SET_INSIDE: Final = re.compile(
    rb"(?:[;$]|\b(?:begin|then|else|loop))\s*set\s+(?:(?:session|local)\s+)?" + _NAME + rb"\s*(?:=|\bto\b)",
    re.IGNORECASE,
)
_RESET: Final = re.compile(rb"reset\s+" + _NAME + rb"\s*$", re.IGNORECASE)
_CONFIG: Final = re.compile(rb"\bset_config\s*\(\s*(?:[eE]?'([^']*)'|\$(\d+))", re.IGNORECASE)
_CONFIG_CALL: Final = re.compile(
    rb"(?:pg_catalog\s*\.\s*)?set_config\s*\((?:'[^']*+'|[^'()])*+\)(?:\s*::\s*\w+)?(?:\s+as\s+\w+)?",
    re.IGNORECASE,
)
_PREPARING: Final = re.compile(
    rb"(?:begin|start|commit|end|rollback|abort|savepoint|release|set|reset|discard|close|deallocate|listen|unlisten"
    rb"|show)\b|(?:select\s+(?:1|pg_advisory_unlock_all\(\)))?\s*$",
    re.IGNORECASE,
)
_VALID: Final = re.compile(rb"[A-Za-z_][\w.$]*")
_SPECIAL: Final = {
    b"session authorization": "session_authorization",
    b"time zone": "timezone",
    b"names": "client_encoding",
    b"schema": "search_path",
}
_LOOKED_AT: Final = 64 * 1024
"""Bytes of a text that are taken apart."""


@dataclass(frozen=True, slots=True)
class Part:
    """One statement. It sets ``names``, and those that stand in its parameters of these numbers, from 1. ``resets`` are
    those it takes back, of which "all" is all but the role; ``resets_all`` the role too. ``is_preparing`` is whether it
    does nothing with what is in the database.
    """

    names: frozenset[str] = frozenset()
    positions: frozenset[int] = frozenset()
    resets: frozenset[str] = frozenset()
    resets_all: bool = False
    is_preparing: bool = False


def parts_of(text: bytes) -> Iterator[Part]:
    """The statements of a text, in order."""
    for statement in _split(text[:_LOOKED_AT]):
        yield _part(statement.strip())


def name_of(value: bytes | None) -> str | None:
    """The name of a setting, as it is asked for; None for what is none."""
    if value is None or len(value) > 100 or not _VALID.fullmatch(value):
        return None
    return value.decode("ascii").lower()


def _split(text: bytes) -> Iterator[bytes]:
    """At the semicolons that stand between statements; comments are left out."""
    kept: list[bytes] = []
    begin = 0
    for token in _TOKENS.finditer(text):
        kept.append(text[begin : token.start()])
        begin = token.end()
        if token[0] == b";":
            yield b"".join(kept)
            kept.clear()
        elif token[0].startswith((b"--", b"/*")):
            kept.append(b" ")
        else:
            kept.append(token[0])
    yield b"".join([*kept, text[begin:]])


def _part(statement: bytes) -> Part:
    names: set[bytes] = set()
    positions: set[int] = set()
    if special := _SET_SPECIAL.match(statement):
        word = b" ".join(special[1].lower().split())
        names.add(_SPECIAL.get(word, "role").encode())
    elif plain := _SET.match(statement):
        names.add(plain[1])
    lowered = statement.lower()
    if b"set_config" in lowered:
        for name, position in _CONFIG.findall(statement):
            if position:
                positions.add(int(position))
            else:
                names.add(name)
    if lowered.startswith((b"do", b"create")):
        names.update(_SET_INSIDE.findall(statement))
    is_reset = _RESET.match(statement)
    return Part(
        frozenset(name for each in names if (name := name_of(each.replace(b'"', b""))) is not None),
        frozenset(positions),
        _resets(is_reset[1]) if is_reset else frozenset(),
        lowered.startswith(b"discard") and lowered.endswith(b"all"),
        _PREPARING.match(statement) is not None or _only_configures(statement),
    )


def _resets(name: bytes) -> frozenset[str]:
    found = name_of(name.replace(b'"', b""))
    return frozenset() if found is None else frozenset({found})


def _only_configures(statement: bytes) -> bool:
    """Whether it is a SELECT of calls of set_config, and of nothing else."""
    if statement[:6].lower() != b"select":
        return False
    left, calls = _CONFIG_CALL.subn(b"", statement[6:])
    return calls > 0 and not left.strip(b" \t\r\n,")
