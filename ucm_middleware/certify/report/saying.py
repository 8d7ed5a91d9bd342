"""What may be said in a report: no canary, no secret and no credential, and nothing that a terminal or a page obeys.

Names of routes, headers, loggers and users come from the application that is tried, which may be hostile.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

from ucm_middleware.certify.canaries import MADE, forms_of_secrets
from ucm_middleware.certify.cast import SHORTEST_SECRET, Cast
from ucm_middleware.certify.plain import is_list, is_object
from ucm_middleware.certify.sightings import Place
from ucm_middleware.certify.steps import Ask, Connect, HangUp, Restart, Say, SignIn, SignOut, Step, Together

CANARY: Final = "(canary)"
SECRET: Final = "(secret)"

_LONGEST: Final = 2000
"""Characters of one text."""

_CREDENTIAL: Final = re.compile("auth|cookie|token|key|secret|password|session", re.IGNORECASE)


class Saying:
    """Knows what may not be said of these users; ``given`` are credentials that the application gave them."""

    __slots__ = ("_names", "_secrets")

    def __init__(self, cast: Cast, given: Iterable[str]) -> None:
        credentials = {*_credentials(cast), *_signing(cast), *given}
        long_ones = {text for text in credentials if len(text) >= SHORTEST_SECRET}
        hidden = {*forms_of_secrets(cast), *_secrets(cast), *long_ones} - set(cast.names)
        self._secrets = _any_of(hidden)
        self._names = re.compile(rf"(?<!\w)(?:{_any_of(cast.names).pattern})(?!\w)")

    def text(self, text: str) -> str:
        """The text without what may not be said, on one line, and with escapes for what cannot be seen."""
        masked = MADE.sub(CANARY, self._secrets.sub(SECRET, text))
        return visible(masked if len(masked) <= _LONGEST else f"{masked[:_LONGEST]}…")

    def place(self, place: Place) -> Place:
        """The same place, said so."""
        return Place(place.channel, self.text(place.route), self.text(place.detail))

    def step(self, step: Step) -> Step:
        """The same step, said so."""
        match step:
            case Together():
                return replace(step, asks=tuple(self._ask(ask) for ask in step.asks))
            case Ask():
                return self._ask(step)
            case Connect() | Say():
                return replace(step, route=self.text(step.route), socket=self.text(step.socket))
            case HangUp():
                return replace(step, socket=self.text(step.socket))
            case SignIn() | SignOut():
                return replace(step, route=self.text(step.route))
            case Restart():
                return replace(step, sign_ins=tuple(replace(one, route=self.text(one.route)) for one in step.sign_ins))

    def _ask(self, ask: Ask) -> Ask:
        return replace(ask, route=self.text(ask.route))

    def lasting(self, place: Place) -> Place:
        """The place as it is called in every run: whoever takes part, nobody's name is in it.

        A path into JSON may have names of users for keys. What loggers, spans, headers and settings are called are the
        application's own words, and two of them stay two where users are called so.
        """
        said = self.place(place)
        is_path = place.channel in ("body", "event")
        return replace(said, detail=self._names.sub("*", said.detail)) if is_path else said


def visible(text: str) -> str:
    """Printable characters as they are, others escaped: among them line ends, control characters, what turns the
    direction of writing around, and lone surrogates, which no encoding has.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of them, the longest first; no text matches nothing."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _secrets(cast: Cast) -> set[str]:
    return {secret for user in cast.users for secret in user.secrets}


def _credentials(cast: Cast) -> set[str]:
    """Values of headers and of the query that look like credentials, with and without the word before, such as
    Bearer.
    """
    given = [one for user in cast.users for one in (*user.headers.items(), *user.query.items())]
    values = {value for name, value in given if _CREDENTIAL.search(name)}
    return values | {value.partition(" ")[2] for value in values}


def _signing(cast: Cast) -> Iterator[str]:
    """What users sign in and out with, but for what is a field's name too: OAuth's "password" is a kind of grant."""
    for call in (call for user in cast.users for call in (user.sign_in, user.sign_out) if call is not None):
        sent = call.body if call.form is None else dict(call.form)
        yield from {*_texts_in(sent)} - {*(sent if is_object(sent) else ())}


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif is_list(value) or is_object(value):
        for one in value.values() if is_object(value) else value:
            yield from _texts_in(one)
