"""Who may come in: from what a resolver found to a context, and from an error to the answer. Common to all servers."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import logging
from contextvars import Context
from typing import Final

from starlette.exceptions import HTTPException, WebSocketException

from ucm_middleware.cluster.leases import Lease
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import (
    ClusterUnavailableError,
    ConfigurationError,
    ContextLimitError,
    LedgerUnavailableError,
    ManagerDrainingError,
    UnauthenticatedError,
    UserContextError,
)
from ucm_middleware.identity import Identify, check_resolver
from ucm_middleware.ids import validate_id
from ucm_middleware.manager import UserContextManager
from ucm_middleware.principal import Principal
from ucm_middleware.refusal import Refusal, refusal_for, refusal_for_starlette
from ucm_middleware.settings import checked_life

logger = logging.getLogger(__name__)

KNOWN_IDS: Final = 4096
"""How many user ids are remembered as valid, so that the rules are gone through once for each of them."""

Refused = UserContextError | HTTPException | WebSocketException
"""What may be raised before there is a context, and is answered: the package's own errors, and Starlette's."""

_RECORDED: Final = (ClusterUnavailableError, ContextLimitError, ManagerDrainingError)

REFUSED: Final = (UserContextError, HTTPException, WebSocketException)


class Admission:
    """Opens the contexts of requests and connections. The settings are those of ``UserContextMiddleware``.

    Raises ConfigurationError for settings under which nobody could come in.
    """

    __slots__ = ("_identify", "_known_ids", "_manager", "_require_identity", "_ttl")

    def __init__(
        self, manager: UserContextManager, identify: Identify | None, require_identity: bool, ttl: float | None
    ) -> None:
        check_resolver(identify)
        if require_identity and identify is None and not manager.hooks.identify:
            raise ConfigurationError(
                "require_identity needs identify, or a plugin that identifies: without one no request could be served"
            )
        self._manager = manager
        self._identify = identify
        self._require_identity = require_identity
        self._ttl = manager.ttl if ttl is None else checked_life(ttl)
        self._known_ids: set[int] = set()

    async def open_soon(self, found: object, variables: Context | None, websocket: bool) -> UserExecutionContext:
        """The same as ``open_for`` where workers share their users: the lease is waited for."""
        manager = self._manager
        leasing = manager._leasing
        if found is None or leasing is None:
            return self.open_for(found, variables, websocket)
        if isinstance(found, Principal):
            found.seconds_left()  # raises for those that have expired
        user_id = found.user_id if isinstance(found, Principal) else self._checked(found)
        if manager._draining:
            manager._refuse_while_draining(user_id)
        lease = await leasing.take(user_id, is_connection=websocket)
        try:
            return self.open_for(found, variables, websocket, lease)
        except BaseException:
            leasing.member.release(lease)
            raise

    def open_for(
        self, found: object, variables: Context | None, websocket: bool, lease: Lease | None = None
    ) -> UserExecutionContext:
        """Open a context for whom the resolver found. ``variables`` is the Context that its releases run in. Where
        workers share their users, and no lease is given, it is waited for here.
        """
        if found is None:
            if self._require_identity:
                raise UnauthenticatedError("a user is required here")
            return self.open(None, variables, websocket)
        if not isinstance(found, Principal):
            return self.open(self._checked(found), variables, websocket, lease)
        seconds_left = found.seconds_left()
        context = self.open(found.user_id, variables, websocket, lease)
        if seconds_left is not None:
            try:
                self._manager.end_within(context, seconds_left)
            except BaseException:  # no thread could be started to watch it, and nobody else would close it
                context.close("failed")
                raise
        return context

    def settle(self, found: object, context: UserExecutionContext) -> None:
        """Let whom the resolver found in to a context that is open already. Raises what ``bind`` raises, and
        UnauthenticatedError for nobody where a user is required.
        """
        if found is not None:
            context.bind(found if isinstance(found, Principal) else self._checked(found))
        elif self._require_identity and (self._identify is not None or context.is_anonymous):
            raise UnauthenticatedError("a user is required here")

    def open(
        self, user_id: str | None, variables: Context | None, websocket: bool, lease: Lease | None = None
    ) -> UserExecutionContext:
        """Open a context for a user whose id is valid; an anonymous one for None."""
        return self._manager._open_for_connection(user_id, self._ttl, variables, websocket, lease)

    def validated(self, user_id: str) -> str:
        """A user id that is valid, remembered by its hash: no cache keeps anybody's id."""
        known = self._known_ids
        if hash(user_id) not in known:
            validate_id(user_id, "user_id")
            if len(known) >= KNOWN_IDS:
                known.clear()
            known.add(hash(user_id))
        return user_id

    def _checked(self, found: object) -> str:
        if type(found) is str:
            return self.validated(found)
        if isinstance(found, str):  # what hash() says of it is its class's to say
            return validate_id(found, "user_id")
        raise ConfigurationError(
            f"{getattr(self._identify, '__qualname__', self._identify)} answered with a {type(found).__name__}; "
            "a resolver answers with a Principal, a user id as text, or None"
        )

    def refused(self, error: Refused) -> Refusal:
        """What to answer where no context was opened. It is in the log and on record then.

        Raises the error itself where it is the application's own fault.
        """
        if isinstance(error, UserContextError):
            refusal, reason = refusal_for(error), str(error)
            if refusal is None:
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame
        else:  # what people raise in a resolver; here nobody outside would turn it into an answer
            refusal = refusal_for_starlette(error)
            reason = f"identify raised {type(error).__name__} ({refusal.status})"
        logger.info("refused with %d: %s", refusal.status, reason)
        try:
            if not isinstance(error, _RECORDED):  # those are on record already
                self._manager.record_refusal(error, reason)
        except LedgerUnavailableError as unavailable:
            refusal = refusal_for(unavailable) or refusal
        return refusal
