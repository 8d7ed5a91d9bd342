"""What two users share whose views are at work at once: nothing, unless somebody gives them the same."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
from django.contrib.sessions.backends.cache import SessionStore
from django.db import connection, connections, transaction
from django.test import RequestFactory
from django.urls import resolve

from django_notebook import Note, write
from django_project import on_database
from support.postgres import Database
from support.sharing import report_of_two_threads, shown
from ucm_middleware import UserContextManager, UserExecutionContext


@pytest.fixture
def manager() -> UserContextManager:
    return UserContextManager(plugins=["django"])


@contextmanager
def at_work(context: UserExecutionContext) -> Generator[dict[str, Any]]:
    """In a transaction, with what a view may keep."""
    keep = context.agent_context
    try:
        with transaction.atomic():
            write(f"of {context.user_id}")
            keep["objects"] = list(Note.objects.order_by("id"))
            keep["query"] = Note.objects.filter(body__contains="of", user_id=context.user_id).order_by("id")
            notes: Any
            keep["iterator"] = notes = Note.objects.order_by("id").iterator()
            assert next(notes).user_id == context.user_id
            keep["cursor"] = cursor = connection.cursor()
            cursor.execute("SELECT body FROM notes")
            keep["connection"] = connection
            keep["request"] = request = RequestFactory().get("/listing")
            request.session = SessionStore()
            request.resolver_match = resolve("/listing")
            yield keep
            notes.close()
    finally:
        connections.close_all()


@pytest.mark.parametrize("options", [{}, {"pool": {"min_size": 2, "max_size": 2}}])
def test_objects_queries_and_requests_share_nothing(
    database: Database, manager: UserContextManager, options: dict[str, Any]
) -> None:
    with on_database(database.app, OPTIONS=options):
        assert shown(report_of_two_threads(manager, at_work)) == []


@pytest.mark.parametrize(
    ("what", "expected"), [("query", "QuerySet"), ("request", "WSGIRequest"), ("objects", "list"), ("cursor", "Cursor")]
)
def test_what_both_have_is_found(notebook: Database, manager: UserContextManager, what: str, expected: str) -> None:
    first: list[Any] = []

    @contextmanager
    def work(context: UserExecutionContext) -> Generator[None]:
        with at_work(context) as keep:
            first.append(keep[what])
            keep["given"] = first[0]
            yield

    found = shown(report_of_two_threads(manager, work))
    assert any(expected in one.rpartition(" ")[2] for one in found), found


def test_a_loaded_object_that_both_have_is_found(notebook: Database, manager: UserContextManager) -> None:
    first: list[Any] = []

    @contextmanager
    def work(context: UserExecutionContext) -> Generator[None]:
        with at_work(context) as keep:
            first.append(keep["objects"][0])
            keep["given"] = first[0]
            yield

    assert any("(Note)" in one for one in shown(report_of_two_threads(manager, work)))
