"""What servers run: the application, watched, and where that is asked for in ``UserContextMiddleware``."""

from contextvars import ContextVar
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp

from ucm_middleware.certify.witness.asked import Asked, Marker
from ucm_middleware.certify.witness.loading import load, routes_of
from ucm_middleware.certify.witness.reporter import Reporter
from ucm_middleware.certify.witness.spans import provide, watch_spans
from ucm_middleware.certify.witness.watching import Watch, watch_logs
from ucm_middleware.certify.witness.wire import USER, Order, Told
from ucm_middleware.manager import UserContextManager
from ucm_middleware.middleware import UserContextMiddleware


def subject() -> ASGIApp:
    """A factory for servers. It does what the runner's order says."""
    reporter = Reporter()
    variable: ContextVar[Asked | None] = ContextVar("ucm_certify", default=None)
    watch = Watch(reporter, variable)
    order = reporter.order
    # Before the application is loaded: it may make a provider then that nobody else knows.
    if (why := watch_spans(watch.number, watch.look_at_span)) is not None:
        reporter.tell(Told("unavailable", where="span", text=why))
    app: Any = load(order.app, factory=order.factory)
    reporter.tell(Told("routes", routes=tuple(routes_of(app))))
    watch_logs(watch.look_at_log)
    return Marker(_with_the_package(app, order, variable), variable, provide)


def _with_the_package(app: ASGIApp, order: Order, variable: ContextVar[Asked | None]) -> ASGIApp:
    if order.users is None:
        return app
    users = order.users

    def identify(connection: HTTPConnection) -> str | None:
        place = connection.headers.get(USER)
        return None if place is None else users[int(place)]

    # As much of each user as the run asks for: limits are not what is compared.
    manager = UserContextManager(
        max_contexts_per_user=1_000_000, max_contexts=10_000_000, max_anonymous_contexts=1_000_000
    )
    return UserContextMiddleware(app, manager=manager, identify=identify, keep=(variable,))
