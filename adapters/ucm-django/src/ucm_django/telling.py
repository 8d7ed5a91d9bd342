"""Telling: what the server is told when a transaction begins, and when a connection changes hands."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Protocol

import psycopg

from ucm_django import conf
from ucm_django.identity import Hands, Runner
from ucm_django.reset import reset_connection
from ucm_django.together import together
from ucm_postgres import RESET, Binding

Told = Sequence[tuple[str, str]]
"""Names and values for ``set_config``."""


class Wrapper(Protocol):
    """What is needed of Django's DatabaseWrapper for PostgreSQL."""

    alias: str
    connection: Any
    atomic_blocks: list[Any]
    in_atomic_block: bool
    settings_dict: dict[str, Any]

    @property
    def wrap_database_errors(self) -> Any: ...

    @property
    def timezone_name(self) -> Any: ...

    def configure(self, connection: Any) -> object:
        """Set on the driver's connection what Django wants there."""
        ...

    def rollback(self) -> None: ...


class Telling:
    """Of one DatabaseWrapper, with the binding and the way of resetting that the project has chosen.

    Those are read at the first connection: Django's system checks make wrappers too, and have to get as far as to name
    what is wrong with a setting.
    """

    def __init__(self, wrapper: Wrapper) -> None:
        self._wrapper = wrapper
        self._hands: Hands | None = None

    @cached_property
    def binding(self) -> Binding:
        """How the server is told. Raises ConfigurationError for a wrong setting."""
        return conf.binding()

    @cached_property
    def _resets_at_begin(self) -> bool:
        return conf.reset() == "begin"

    def connected(self) -> None:
        """The driver's connection is to be made, or to be taken from the pool.

        Raises ConfigurationError, as ``binding`` does, for a wrong setting.
        """
        _ = self.binding, self._resets_at_begin
        self._hands = None

    def told(self, runner: Runner) -> Told:
        """What a transaction is told of who it is for. Raises as ``Binding.settings`` does."""
        told = runner.settings(self.binding)
        if not self._resets_at_begin:
            return told
        # What the reset takes away, and Django has set when it connected.
        role = self._wrapper.settings_dict["OPTIONS"].get("assume_role")
        kept = (("TimeZone", self._wrapper.timezone_name),)
        return (*kept, *told) if role is None else (*kept, ("role", role), *told)

    def send(self, told: Told) -> "psycopg.Cursor[Any] | None":
        """Send it, on the transaction that is under way or begins by that. Returns what it was sent with."""
        if not told:
            return None
        # Not Django's own cursors: they would make the values part of the SQL, which others can see.
        cursor = psycopg.Cursor(self._wrapper.connection)
        if self._resets_at_begin:
            for statement in RESET:
                cursor.execute(statement.encode(), prepare=False)
        calls = ", ".join(["pg_catalog.set_config(%s, %s, true)"] * len(told))
        cursor.execute(f"SELECT {calls}".encode(), [text for pair in told for text in pair], prepare=False)
        return cursor

    def together(self, told: Told, *, with_statement: bool) -> AbstractContextManager[object]:
        """Around what is to be sent in one round trip."""
        if not told or not (with_statement or self._resets_at_begin):
            return nullcontext()
        return together(self._wrapper.connection)

    def is_in_hands(self, runner: Runner) -> bool:
        """Whether nobody else has used the connection last."""
        return self._hands is None or self._hands.are(runner.hands)

    def change_hands(self, runner: Runner) -> None:
        """Bring the connection, which is in no transaction, back to a clean state where somebody else has used it."""
        last, self._hands = self._hands, runner.hands
        if last is not None and not last.are(self._hands) and not self._resets_at_begin:
            with self._wrapper.wrap_database_errors:
                reset_connection(self._wrapper.connection, self._wrapper.configure)
