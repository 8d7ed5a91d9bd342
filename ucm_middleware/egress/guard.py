"""The egress guard of a manager: whose values are protected, and whether a text that goes to a user has another's."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import logging
import re
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, cast

from ucm_middleware.audit.redaction import text_for_record
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient_context
from ucm_middleware.egress.exchange import Exchange, Known, forget_oldest
from ucm_middleware.egress.fields import Fields
from ucm_middleware.egress.policy import EgressPolicy
from ucm_middleware.egress.table import ProtectedValues
from ucm_middleware.egress.tokens import as_bytes, token_of
from ucm_middleware.errors import InvalidContextError
from ucm_middleware.ids import is_anonymous_id
from ucm_middleware.types import Scope

logger = logging.getLogger(__name__)

MOST_HITS: Final = 20
"""How many hits in one text are told apart."""

MOST_ANONYMOUS: Final = 10_000
MOST_UNBOUND: Final = 100
_DEEPEST: Final = 16


class Hit(NamedTuple):
    """A protected value where it must not be: by which way, where, and whose it is. Never the value."""

    channel: str
    route: str
    field: str
    owners: frozenset[str]


class EgressGuard:
    """Thread-safe. ``clock`` is monotonic; ``plan`` sees to it that ``sweep`` is called at a reading of it."""

    __slots__ = (
        "_clock",
        "_fields",
        "_known",
        "_names",
        "_plan",
        "_told_encoded",
        "_told_full",
        "_told_share",
        "_trail",
        "_unbound",
        "policy",
        "table",
    )

    def __init__(
        self,
        policy: EgressPolicy,
        trail: AuditTrail,
        clock: Callable[[], float],
        plan: Callable[[float], None],
    ) -> None:
        self.policy = policy
        self.table = ProtectedValues(policy.max_values, policy.keep_seconds, clock)
        self._clock = clock
        self._known = Known()
        self._trail = trail
        self._plan = plan
        self._unbound: dict[str, dict[int, None]] = {}  # what anonymous users protected, who may learn their names yet
        self._told_full = self._told_share = self._told_encoded = False
        names = [re.escape(name.encode()) for name in policy.fields]
        self._names = frozenset(policy.fields)
        self._fields = (
            re.compile(rb'"(?:' + b"|".join(names) + rb')"\s*:\s*"((?:[A-Za-z0-9._~+=:-]|\\?/)+)"') if names else None
        )

    # Whose values are protected.

    def protect(self, context: UserExecutionContext, value: str | bytes) -> None:
        """Protect a value for a context's user. Raises InvalidContextError, without the value, for what is no token."""
        token = token_of(value, self.policy.min_entropy)
        user_id = context.user_id
        self.table.add(token, user_id)
        if context.is_anonymous:
            keys = self._unbound.setdefault(user_id, {})
            keys[hash(token.run)] = None
            forget_oldest(keys, MOST_UNBOUND)
            forget_oldest(self._unbound, MOST_ANONYMOUS)
        if context.user_id != user_id:  # bound in this very moment
            self.table.move(hash(token.run), user_id, context.user_id)
        self._added()

    def _added(self) -> None:
        """See to it that what is protected is forgotten in time, and say once where it is forgotten before."""
        self._plan(self._clock() + self.policy.keep_seconds)  # those before it are planned already
        if self.table.forgotten and not self._told_full:
            self._told_full = True
            logger.warning(
                "more than %d values are protected (EgressPolicy.max_values): the oldest are forgotten",
                self.policy.max_values,
            )
        if self.table.refused and not self._told_share:
            self._told_share = True
            logger.warning("a user protects more values than one has room for: what comes on top is not protected")

    def bound(self, context: UserExecutionContext, anonymous_id: str, user_id: str) -> None:
        """An anonymous context learned its user: what it protected is the user's, and what its client sent is known."""
        exchange = getattr(context._root, "_exchange", None)
        if exchange is not None:
            exchange.is_of(user_id)
        for key in self._unbound.pop(anonymous_id, ()):
            self.table.move(key, anonymous_id, user_id)

    def learn(self, user_id: str, exchange: Exchange | None, data: bytes) -> None:
        """Protect what stands under the policy's fields in JSON that was sent to a user. Not what the user's client
        sent itself in the same exchange: it may be anything, also what everybody is shown.
        """
        if self._fields is not None and not is_anonymous_id(user_id):
            for value in self._fields.findall(data):
                self._learn_for(user_id, value.replace(b"\\/", b"/"), exchange)

    def learn_data(self, context: UserExecutionContext) -> None:
        """The same of the data that a context is opened with."""
        if self._names and not context.is_anonymous and context._agent_context:
            for value in _under(self._names, context._agent_context, 0):
                self._learn_for(context.user_id, value)

    def _learn_for(self, user_id: str, value: object, exchange: Exchange | None = None) -> None:
        try:
            token = token_of(value, self.policy.min_entropy)
        except InvalidContextError:
            logger.debug("a field named in EgressPolicy.fields has no token in it")
            return
        if exchange is None or not exchange.has_sent(hash(token.run)):
            self.table.add(token, user_id, is_first=True)
            self._added()

    # Whether a text has one.

    def exchange(self, context: UserExecutionContext, scope: Scope) -> Exchange:
        """Begin to note what a client sends in a request or on a connection, which is the context's."""
        made = Exchange(context.user_id, scope, self.table, self._known)
        context._exchange = made
        return made

    def hits(
        self, data: bytes, receiver_id: str, exchange: Exchange | None, channel: str, field: str | None = None
    ) -> list[Hit]:
        """The protected values in a text that goes to a user, whose they are not and who did not send them. A
        ``field`` names where the text stands; without one it is looked for.
        """
        if not self.table.may_hold(data):
            return []
        fields: Fields | None = None
        found: dict[Hit, None] = {}
        route = route_of(None if exchange is None else exchange.scope)
        for place in self.table.find(data):
            if receiver_id in place.owners or (receiver_id, place.key) in self._known:
                continue
            if exchange is not None and exchange.has_sent(place.key):
                continue
            if field is None:
                fields = Fields(data) if fields is None else fields
                where = fields.at(place.start, place.end)
            else:
                where = text_for_record(field)
            if self.table.may_hold(as_bytes(where)):  # a name may be a value itself
                where = "<name>"
            found[Hit(channel, route, where, place.owners)] = None
            if len(found) >= MOST_HITS:
                break
        return list(found)

    def hits_here(
        self, text: str | bytes, channel: str, field: str | None = None, receiver_id: str | None = None
    ) -> list[Hit]:
        """The same of a text for a user, by default the one whose context this code runs in; nothing outside of one."""
        context = ambient_context()
        if receiver_id is None:
            if context is None:
                return []
            receiver_id = context.user_id
        return self.hits(as_bytes(text), receiver_id, exchange_here(receiver_id), channel, field)

    # Events; see the hub.

    def holds_back(self, user_id: str, text: str) -> bool:
        """Whether an event with this data must not be sent to a user, which is on record then."""
        return self.policy.block and self._found_in_event(user_id, text)

    def look_at(self, user_id: str, text: str) -> None:
        """An event was put in line for a user: tell what is found in it, and protect what its fields say."""
        if not self.policy.block:
            self._found_in_event(user_id, text)
        if self._fields is not None:
            self.learn(user_id, exchange_here(user_id), as_bytes(text))

    def keeps_out(self, user_id: str, text: str) -> bool:
        """Whether an event from another worker must not be put in line here. What is found is on record in any case;
        what its fields say is not protected: whether the user's own client has sent it, is known there.
        """
        return self._found_in_event(user_id, text) and self.policy.block

    def _found_in_event(self, user_id: str, text: str) -> bool:
        hits = self.hits_here(text, "event", receiver_id=user_id)
        self.report(user_id, hits, is_blocked=self.policy.block)
        return bool(hits)

    # What is told of it.

    def report(self, receiver_id: str, hits: Iterable[Hit], *, is_blocked: bool) -> None:
        """Put hits on record, and a warning in the log that names neither users nor values."""
        for hit in hits:
            logger.warning(
                "a protected value of another user was %s: %s, route %s, field %s",
                "held back" if is_blocked else "sent",
                hit.channel,
                hit.route,
                hit.field,
            )
            data = ("channel", hit.channel), ("route", hit.route), ("field", hit.field)
            try:
                self._trail.egress(receiver_id, sorted(hit.owners), data, is_blocked=is_blocked)
            except Exception:  # what was sent is sent, and what was held back stays so
                logger.exception("what the egress guard found could not be recorded")

    def encoded(self) -> None:
        """An answer is compressed, so that nothing can be seen in it."""
        if not self._told_encoded:
            self._told_encoded = True
            logger.warning(
                "answers with a content-encoding cannot be looked at by the egress guard; add GZipMiddleware and the "
                "like outside of UserContextMiddleware"
            )


def exchange_here(user_id: str) -> Exchange | None:
    """The exchange that this code runs in, where it is this user's."""
    context = ambient_context()
    if context is None or context.user_id != user_id:
        return None
    return getattr(context._root, "_exchange", None)


def route_of(scope: Scope | None) -> str:
    """The template of the route that was taken, or the endpoint's name; not the path: it may have a value in it."""
    if scope is None:
        return "-"
    template: object = getattr(scope.get("route"), "path", None)
    if isinstance(template, str):
        return text_for_record(template)
    name: object = getattr(scope.get("endpoint"), "__qualname__", None)
    return text_for_record(name) if isinstance(name, str) else "-"


def _under(names: frozenset[str], data: object, depth: int) -> Iterable[str]:
    """The texts under these names in plain data."""
    if depth > _DEEPEST:
        return
    if type(data) is dict:
        for name, value in list(cast("dict[object, object]", data).items()):
            if type(name) is str and name in names and type(value) is str:
                yield value
            else:
                yield from _under(names, value, depth + 1)
    elif type(data) is list:
        for value in list(cast("list[object]", data)):
            yield from _under(names, value, depth + 1)
