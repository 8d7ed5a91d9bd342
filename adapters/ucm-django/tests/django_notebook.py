"""A Django project of one file: a user's notes, in a table with row policies. Its paths do what they are called.

What it runs with is in the environment: ``NOTEBOOK_DATABASES``, ``NOTEBOOK_SETTINGS`` (more settings) and
``NOTEBOOK_OPTIONS`` (of the middleware), each JSON. With ``NOTEBOOK_IS_BELOW`` one of Starlette's stands above it.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Generator
from typing import Any

import django
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import DatabaseError, connection, models, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

from ucm_middleware import UserContextManager, UserContextMiddleware, current_context

_NOWHERE = {"default": {"ENGINE": "ucm_django.postgresql", "NAME": "nowhere"}}
_SETTINGS: dict[str, Any] = {
    "SECRET_KEY": "of no use to anybody",
    "ALLOWED_HOSTS": ["*"],
    "DATABASES": json.loads(os.environ.get("NOTEBOOK_DATABASES", "null")) or _NOWHERE,
    "INSTALLED_APPS": [
        *("django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions", "ucm_django"),
    ],
    "MIDDLEWARE": [],
    "ROOT_URLCONF": __name__,
    "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
    "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
    "UCM_MANAGER": f"{__name__}.manager",
    "USE_TZ": True,
    "TIME_ZONE": "Asia/Tokyo",
    **json.loads(os.environ.get("NOTEBOOK_SETTINGS", "{}")),
}

settings.configure(**_SETTINGS)
django.setup()

from django.contrib.auth import aauthenticate, alogin, authenticate, login  # noqa: E402 - needs the settings

from ucm_django.asgi import get_asgi_application  # noqa: E402

manager = UserContextManager()
order: list[str] = []
"""What has happened so far to views that were cut off."""


class Note(models.Model):
    """The table that ``support.postgres`` makes."""

    user_id: "models.TextField[str, str]" = models.TextField()
    body: "models.TextField[str, str]" = models.TextField()

    class Meta:
        app_label = "notebook"
        db_table = "notes"
        managed = False


def bodies() -> list[str]:
    """All notes there are, as far as can be seen."""
    return [note.body for note in Note.objects.order_by("id")]


def owners() -> list[str]:
    """Whose notes can be seen."""
    return sorted(set(Note.objects.values_list("user_id", flat=True)))


def write(body: str) -> None:
    """A note of the running user."""
    Note.objects.create(user_id=current_context().user_id, body=body)


def listing(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"user": current_context().user_id, "notes": bodies()})


async def alisting(request: HttpRequest) -> HttpResponse:
    notes = [note.body async for note in Note.objects.order_by("id")]
    in_thread = await sync_to_async(bodies)()
    user = await sync_to_async(lambda: current_context().user_id)()
    assert user == current_context().user_id
    return JsonResponse({"user": user, "notes": notes, "in_thread": in_thread})


def set_for_session(request: HttpRequest) -> HttpResponse:
    """Tell the session its user, as careless code does, and leave more behind there."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('app.user_id', %s, false)", [current_context().user_id])
        cursor.execute("CREATE TEMPORARY TABLE left_behind AS SELECT 1 AS one")
    return JsonResponse({"notes": bodies()})


def left_behind(request: HttpRequest) -> HttpResponse:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('app.user_id', true), to_regclass('pg_temp.left_behind')::text, "
            "current_setting('TimeZone'), pg_backend_pid()"
        )
        setting, table, zone, pid = cursor.fetchone()
    return JsonResponse({"setting": setting, "table": table, "zone": zone, "pid": pid, "owners": owners()})


async def set_in_shared_thread(request: HttpRequest) -> HttpResponse:
    """The same in a thread of the event loop's, which requests share with its connections."""
    return await sync_to_async(set_for_session, thread_sensitive=False)(request)


async def left_in_shared_thread(request: HttpRequest) -> HttpResponse:
    return await sync_to_async(left_behind, thread_sensitive=False)(request)


def everything(request: HttpRequest) -> HttpResponse:
    """All ways to reach rows, each of which is asked for everybody's."""
    return JsonResponse(try_everything())


async def aeverything(request: HttpRequest) -> HttpResponse:
    return JsonResponse(await sync_to_async(try_everything)())


def try_everything() -> dict[str, Any]:
    user = current_context().user_id
    seen: dict[str, Any] = {}
    write(f"of {user}")
    with transaction.atomic():
        write(f"atomic of {user}")
        seen["orm"] = owners()
        try:
            with transaction.atomic():
                Note.objects.create(user_id="victim", body=f"forged by {user}")
        except DatabaseError as error:
            seen["forged"] = type(error).__name__
        seen["after a savepoint"] = owners()
        seen["updated"] = Note.objects.exclude(user_id=user).update(body="overwritten")
        seen["locked"] = sorted({note.user_id for note in Note.objects.select_for_update()})
    with connection.cursor() as cursor:
        cursor.execute("SELECT DISTINCT user_id FROM notes")
        seen["raw"] = [row[0] for row in cursor.fetchall()]
        cursor.execute("SELECT 1; SELECT DISTINCT user_id FROM notes")
        cursor.nextset()
        seen["two statements"] = [row[0] for row in cursor.fetchall()]
        cursor.executemany("INSERT INTO notes (user_id, body) VALUES (%s, %s)", [(user, "a"), (user, "b")])
        cursor.execute("DELETE FROM notes WHERE user_id <> %s", [user])
        seen["deleted"] = cursor.rowcount
    seen["iterator"] = sorted({note.user_id for note in Note.objects.iterator(chunk_size=1)})
    with transaction.atomic():
        seen["iterator in atomic"] = sorted({note.user_id for note in Note.objects.iterator(chunk_size=1)})
        with connection.cursor() as cursor, cursor.copy("COPY (SELECT user_id FROM notes) TO STDOUT") as copy:
            seen["copy"] = sorted({row[0] for row in copy.rows()})
    for attempt in range(2):  # a transaction that is tried again
        try:
            with transaction.atomic():
                write(f"attempt {attempt}")
                seen["retry"] = owners()
                if attempt == 0:
                    raise ValueError("as if it could not be serialized")
        except ValueError:
            continue
    hooks: list[str] = []
    with transaction.atomic(durable=True):
        write("durable")
        transaction.on_commit(lambda: hooks.extend(owners()))
    seen["on_commit"] = hooks
    seen["context"] = current_context().user_id
    return seen


def streaming(request: HttpRequest) -> StreamingHttpResponse:
    def rows() -> Generator[str]:
        for note in Note.objects.order_by("id").iterator(chunk_size=1):
            yield f"{current_context().user_id}:{note.user_id}\n"

    return StreamingHttpResponse(rows())


async def astreaming(request: HttpRequest) -> StreamingHttpResponse:
    async def rows() -> AsyncGenerator[str]:
        async for note in Note.objects.order_by("id").aiterator(chunk_size=1):
            yield f"{current_context().user_id}:{note.user_id}\n"

    return StreamingHttpResponse(rows())


def slow(request: HttpRequest) -> HttpResponse:
    """Write, wait in the database for a lock, and write again, in one transaction."""
    with transaction.atomic():
        write("before")
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(42)")
        write("after")
    return HttpResponse()


async def waiting(request: HttpRequest) -> HttpResponse:
    """Wait until it is cut off, and tell ``order``."""
    current_context().callback(order.append, "released")
    try:
        return HttpResponse(await asyncio.get_running_loop().create_future())
    finally:
        await asyncio.sleep(0.01)  # as for the answer to a rollback
        order.append("ended")


async def ticking(request: HttpRequest) -> StreamingHttpResponse:
    """A stream without an end, which tells ``order`` when it is cut off."""

    async def ticks() -> AsyncGenerator[str]:
        try:
            while True:
                yield "tick\n"
                await asyncio.sleep(0.01)
        finally:
            await asyncio.sleep(0.01)  # as for the answer to a rollback
            order.append("ended")

    current_context().callback(order.append, "released")
    return StreamingHttpResponse(ticks())


async def ordered(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"order": order})


def failing(request: HttpRequest) -> HttpResponse:
    write("not kept where a request is one transaction")
    owners()
    raise LookupError


def sign_in(request: HttpRequest) -> HttpResponse:
    user = authenticate(request, username=request.GET["name"], password="secret")
    assert user is not None
    login(request, user)
    return listing(request)


async def asign_in(request: HttpRequest) -> HttpResponse:
    user = await aauthenticate(request, username=request.GET["name"], password="secret")
    assert user is not None
    await alogin(request, user)
    return await alisting(request)


urlpatterns = [
    path("sign_in", sign_in),
    path("asign_in", asign_in),
    path("listing", listing),
    path("alisting", alisting),
    path("set", set_for_session),
    path("left", left_behind),
    path("set_in_shared_thread", set_in_shared_thread),
    path("left_in_shared_thread", left_in_shared_thread),
    path("everything", everything),
    path("aeverything", aeverything),
    path("streaming", streaming),
    path("astreaming", astreaming),
    path("slow", slow),
    path("waiting", waiting),
    path("ticking", ticking),
    path("ordered", ordered),
    path("failing", failing),
]


class _PassingOn(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


_django = get_asgi_application()
app = UserContextMiddleware(
    _PassingOn(_django) if "NOTEBOOK_IS_BELOW" in os.environ else _django,
    manager=manager,
    identify=lambda asked: asked.headers.get("user"),
    **json.loads(os.environ.get("NOTEBOOK_OPTIONS", "{}")),
)
