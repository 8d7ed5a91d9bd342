"""Who a connection comes from: principals, and the resolvers for the usual ways to say it."""

import base64
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    AuthenticationError,
    BaseUser,
    SimpleUser,
    UnauthenticatedUser,
)
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from support.asgi import http_scope
from ucm_middleware import (
    ConfigurationError,
    InvalidContextError,
    Principal,
    UnauthenticatedError,
    UserContextMiddleware,
    authenticated_user,
    bearer_token,
    current_context,
    session_user,
)
from ucm_middleware.refusal import refusal_for


def connection(*headers: tuple[str, str], **scope: Any) -> HTTPConnection:
    return HTTPConnection(http_scope(headers=headers, **scope))


async def whoami(request: Request) -> PlainTextResponse:
    context = current_context()
    return PlainTextResponse("nobody" if context.is_anonymous else context.user_id)


class TestPrincipal:
    def test_its_id_is_checked(self) -> None:
        assert Principal("alice").user_id == "alice"
        with pytest.raises(InvalidContextError, match="user_id"):
            Principal(" alice")

    def test_an_end_without_a_time_zone_is_refused(self) -> None:
        with pytest.raises(InvalidContextError, match="expires_at"):
            Principal("alice", datetime(2100, 1, 1))  # noqa: DTZ001 - that is what is refused

    def test_an_end_that_is_no_datetime_is_the_applications_mistake(self) -> None:
        claims: dict[str, Any] = {"exp": 1767225600}
        with pytest.raises(InvalidContextError) as raised:
            Principal("alice", expires_at=claims["exp"])
        assert str(raised.value) == (
            "expires_at: is not a datetime but int; give an aware datetime, such as datetime.fromtimestamp(exp, UTC)"
        )
        assert refusal_for(raised.value) is None

    def test_time_left(self) -> None:
        assert Principal("alice").seconds_left() is None
        left = Principal("alice", datetime.now(UTC) + timedelta(hours=1)).seconds_left()
        assert left is not None
        assert 0 < left <= 3600

    def test_time_without_end_is_a_year(self) -> None:
        assert Principal("alice", datetime.max.replace(tzinfo=UTC)).seconds_left() == 365 * 24 * 3600

    def test_no_time_left(self) -> None:
        with pytest.raises(UnauthenticatedError):
            Principal("alice", datetime.now(UTC)).seconds_left()

    def test_it_does_not_change(self) -> None:
        with pytest.raises(AttributeError):
            Principal("alice").user_id = "bob"  # type: ignore[misc]


class Account(BaseUser):
    """A user of Starlette's own kind, whose name is not its id."""

    def __init__(self, number: str) -> None:
        self.number = number

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def display_name(self) -> str:
        return "Alice Liddell"

    @property
    def identity(self) -> str:
        return self.number


class Basic(AuthenticationBackend):
    """Starlette's own example, shortened."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        if "authorization" not in conn.headers:
            return None
        name, _, password = (
            base64.b64decode(conn.headers["authorization"].removeprefix("Basic ")).decode().partition(":")
        )
        if password != "right":
            raise AuthenticationError("wrong password")
        return AuthCredentials(["authenticated"]), SimpleUser(name)


class TestAuthenticatedUser:
    @pytest.mark.parametrize(
        ("user", "user_id"), [(SimpleUser("alice"), "alice"), (Account("4711"), "4711"), (UnauthenticatedUser(), None)]
    )
    def test_it_is_the_identity_or_else_the_name(self, user: BaseUser, user_id: str | None) -> None:
        assert authenticated_user(connection(user=user)) == user_id

    def test_a_name_is_no_identity(self) -> None:
        class Named(SimpleUser):
            @property
            def identity(self) -> str:
                raise NotImplementedError  # as Starlette's BaseUser does

        with pytest.raises(ConfigurationError, match="identity"):
            authenticated_user(connection(user=Named("John Smith")))

    def test_behind_starlettes_middleware(self) -> None:
        app = Starlette(
            routes=[Route("/", whoami)],
            middleware=[
                Middleware(AuthenticationMiddleware, backend=Basic()),
                Middleware(UserContextMiddleware, identify=authenticated_user),
            ],
        )
        client = TestClient(app)
        assert client.get("/").text == "nobody"
        assert client.get("/", auth=("alice", "right")).text == "alice"
        assert client.get("/", auth=("alice", "wrong")).status_code == 400

    def test_the_wrong_order_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match="AuthenticationMiddleware outside"):
            authenticated_user(connection())


class TestSessionUser:
    @pytest.mark.parametrize(
        ("session", "user_id"),
        [({"user_id": "alice"}, "alice"), ({"user_id": 4711}, "4711"), ({}, None), ({"user_id": None}, None)],
    )
    def test_it_is_what_the_session_says(self, session: dict[str, Any], user_id: str | None) -> None:
        assert session_user()(connection(session=session)) == user_id

    def test_the_key_is_a_choice(self) -> None:
        assert session_user("uid")(connection(session={"uid": "alice", "user_id": "bob"})) == "alice"

    def test_behind_starlettes_middleware(self) -> None:
        async def login(request: Request) -> PlainTextResponse:
            request.session["user_id"] = request.query_params["as"]
            return await whoami(request)

        app = Starlette(
            routes=[Route("/", whoami), Route("/login", login)],
            middleware=[
                Middleware(SessionMiddleware, secret_key="of the test"),
                Middleware(UserContextMiddleware, identify=session_user()),
            ],
        )
        client = TestClient(app)
        assert client.get("/").text == "nobody"
        assert client.get("/login?as=alice").text == "nobody"
        assert client.get("/").text == "alice"
        assert TestClient(app).get("/").text == "nobody"

    def test_the_wrong_order_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match="SessionMiddleware outside"):
            session_user()(connection())


def verify(token: str) -> str | None:
    return {"t-alice": "alice", "t spaced": "spaced"}.get(token)


async def verify_in_a_loop(token: str) -> Principal | None:
    user_id = verify(token)
    return None if user_id is None else Principal(user_id)


class TestBearerToken:
    @pytest.mark.parametrize("how", [verify, verify_in_a_loop])
    async def test_it_is_whom_the_token_was_given_to(self, how: Callable[[str], Any]) -> None:
        found = await bearer_token(how)(connection(("Authorization", "Bearer t-alice")))
        assert (found if isinstance(found, str) else found and found.user_id) == "alice"

    @pytest.mark.parametrize("value", ["bearer t-alice", "BEARER   t-alice  "])
    async def test_the_scheme_is_written_in_any_case(self, value: str) -> None:
        assert await bearer_token(verify)(connection(("Authorization", value))) == "alice"

    async def test_no_header_is_nobody(self) -> None:
        def must_not_be_asked(token: str) -> str:
            raise AssertionError(token)

        assert await bearer_token(must_not_be_asked)(connection(("X-User-Id", "alice"))) is None

    @pytest.mark.parametrize(
        "values",
        [
            ["Bearer unknown"],
            ["Bearer"],
            ["Bearer "],
            [""],
            ["t-alice"],
            ["Basic dC1hbGljZTo="],
            ["BearerX t-alice"],
            ["Bearer t-alice", "Bearer t-alice"],
            ["Bearer t-alice", "Bearer t-bob"],
            ["Bearer t-alice, Bearer t-bob"],
            ["Basic dC1hbGljZTo=", "Bearer t-alice"],
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("how", [verify, verify_in_a_loop])
    async def test_broken_credentials_are_not_the_absence_of_any(
        self, values: list[str], how: Callable[[str], Any]
    ) -> None:
        with pytest.raises(UnauthenticatedError) as caught:
            await bearer_token(how)(connection(*(("Authorization", value) for value in values)))
        assert "alice" not in str(caught.value)

    async def test_what_the_check_raises_is_the_applications(self) -> None:
        def broken(token: str) -> Awaitable[str]:
            raise LookupError("no key server")

        with pytest.raises(LookupError, match="no key server"):
            await bearer_token(broken)(connection(("Authorization", "Bearer t-alice")))
