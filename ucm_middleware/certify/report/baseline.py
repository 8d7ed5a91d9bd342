"""A file of findings that are known: those do not fail a run again, and new ones stand out."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from ucm_middleware.certify.plain import is_list, is_object
from ucm_middleware.certify.report.findings import Reported, fingerprint
from ucm_middleware.certify.sightings import Channel, Place
from ucm_middleware.errors import ConfigurationError

VERSION: Final = 1

_ABOUT: Final = "Findings of ucm certify that are known. Say in the note why one is; remove it when it is mended."
_FIELDS: Final = ("fingerprint", "channel", "route", "detail", "note")
_CHANNELS: Final[Mapping[str, Channel]] = {channel: channel for channel in get_args(Channel)}


@dataclass(frozen=True, slots=True)
class Known:
    """A finding that is known, and why it may stay for now."""

    place: Place
    note: str = ""

    @property
    def fingerprint(self) -> str:
        """What it is called in every run."""
        return fingerprint(self.place)


@dataclass(frozen=True, slots=True)
class Split:
    """Findings of a run: ``known`` and ``new``. ``unseen`` are known ones that were not seen: that may be chance."""

    known: tuple[Reported, ...]
    new: tuple[Reported, ...]
    unseen: tuple[Known, ...]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What is known before a run."""

    known: tuple[Known, ...] = ()

    def split(self, findings: Iterable[Reported]) -> Split:
        """What of it is known."""
        found = {finding.fingerprint: finding for finding in findings}
        known = {one.fingerprint for one in self.known}
        return Split(
            known=tuple(finding for name, finding in found.items() if name in known),
            new=tuple(finding for name, finding in found.items() if name not in known),
            unseen=tuple(one for one in self.known if one.fingerprint not in found),
        )

    def note_of(self, finding: Reported) -> str:
        """What is said about it, or nothing."""
        return next((one.note for one in self.known if one.fingerprint == finding.fingerprint), "")

    def with_all(self, findings: Iterable[Reported]) -> "Baseline":
        """This one and what was found. Notes stay, and so does what was not seen: only a person can know it mended."""
        return Baseline((*self.known, *(Known(finding.place) for finding in self.split(findings).new)))


def read_baseline(path: Path) -> Baseline:
    """Read a file. Raises ConfigurationError where there is none, or something else in it; it names the field."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"baseline: {path} cannot be read ({error.strerror}); write one first") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"baseline: {path} is no JSON: {error}") from None
    if not is_object(table):
        raise ConfigurationError(f"baseline: {path} must have a JSON object in it, not a {type(table).__name__}")
    if table.get("version") != VERSION:
        raise ConfigurationError(
            f"baseline: {path}: version must be {VERSION}, not {table.get('version')!r}; write the file again"
        )
    entries = table.get("findings")
    if not is_list(entries):
        raise ConfigurationError(f"baseline: {path}: findings must be a list, not a {type(entries).__name__}")
    known = [_known(f"{path}: findings[{at}]", entry) for at, entry in enumerate(entries)]
    seen: dict[str, int] = {}
    for at, one in enumerate(known):
        if (before := seen.setdefault(one.fingerprint, at)) != at:
            raise ConfigurationError(f"baseline: {path}: findings[{at}] is the same as findings[{before}]; remove one")
    return Baseline(tuple(known))


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a file, sorted by route, so that it is easy to review. Raises ConfigurationError where it cannot be."""
    entries = sorted(baseline.known, key=lambda one: (one.place.route, one.place.channel, one.place.detail))
    table = {"version": VERSION, "about": _ABOUT, "findings": [_entry(one) for one in entries]}
    text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"baseline: {path} cannot be written: {error.strerror}") from None


def _entry(known: Known) -> dict[str, str]:
    place = known.place
    return {
        "fingerprint": known.fingerprint,
        "channel": place.channel,
        "route": place.route,
        "detail": place.detail,
        "note": known.note,
    }


def _known(where: str, entry: Any) -> Known:
    if not is_object(entry):
        raise ConfigurationError(f"baseline: {where} must be an object, not a {type(entry).__name__}")
    for name in entry:
        if name not in _FIELDS:
            raise ConfigurationError(f"baseline: {where} has {name!r}, and there are {', '.join(_FIELDS)}")
    for name in _FIELDS:
        if name not in entry:
            raise ConfigurationError(f"baseline: {where} lacks {name!r}")
        if not isinstance(entry[name], str):
            raise ConfigurationError(f"baseline: {where}.{name} must be a text, not a {type(entry[name]).__name__}")
        if not entry[name].isprintable():
            raise ConfigurationError(f"baseline: {where}.{name} has characters in it that cannot be printed")
    channel = _CHANNELS.get(entry["channel"])
    if channel is None:
        found = entry["channel"]
        raise ConfigurationError(f"baseline: {where}.channel must be one of {', '.join(_CHANNELS)}, not {found!r}")
    known = Known(Place(channel, entry["route"], entry["detail"]), entry["note"])
    if known.fingerprint != entry["fingerprint"]:
        raise ConfigurationError(
            f"baseline: {where}.fingerprint is not that of its channel, route and detail, which is "
            f"{known.fingerprint!r}; change the note alone by hand"
        )
    return known
