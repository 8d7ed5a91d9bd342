"""What an engine, and the adapter's settings, must be: each error names what is wrong."""

from collections.abc import Callable
from typing import Any, cast

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from ucm_middleware import ConfigurationError, PluginError, UserContextManager
from ucm_postgres import Binding
from ucm_sqlalchemy import SQLAlchemy

URL = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"  # nothing connects to it

MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "no engine": (lambda: SQLAlchemy(cast("Any", "postgresql://")), "engine is a str"),
    "one connection for all": (lambda: SQLAlchemy(create_engine(URL, poolclass=StaticPool)), "StaticPool"),
    "one connection for all of a thread": (
        lambda: SQLAlchemy(create_engine(URL, poolclass=SingletonThreadPool)),
        "SingletonThreadPool",
    ),
    "derived": (lambda: SQLAlchemy(create_async_engine(URL).execution_options(tag=1)), "would stay unbound"),
    "reset": (lambda: SQLAlchemy(create_engine(URL), reset=cast("Any", "never")), "reset is 'never'"),
    "binding of SQLite": (lambda: SQLAlchemy(create_engine("sqlite://"), binding=Binding()), "SQLitePerUser"),
    "sync class": (lambda: SQLAlchemy(create_async_engine(URL), session_class=Session), "AsyncSession"),
    "async class": (lambda: SQLAlchemy(create_engine(URL), session_class=AsyncSession), "subclass of Session"),
    "bind": (lambda: SQLAlchemy(create_engine(URL), session_options={"bind": None}), "session_options"),
    "name": (lambda: SQLAlchemy(create_engine(URL), name="a\nb"), "name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str) -> None:
    make, named = MISTAKES[mistake]
    with pytest.raises(ConfigurationError, match=named):
        make()


def test_an_engine_is_bound_once() -> None:
    engine = create_engine(URL)
    SQLAlchemy(engine, name="orders")
    for taken in (engine, engine.execution_options(isolation_level="SERIALIZABLE")):
        with pytest.raises(ConfigurationError, match="'orders'"):
            SQLAlchemy(taken)


def test_it_is_a_plugin() -> None:
    manager = UserContextManager(plugins=[SQLAlchemy(create_engine(URL))])
    assert manager.is_healthy()
    with pytest.raises(PluginError):
        UserContextManager(plugins=["sqlalchemy"])  # it needs an engine, so nothing can load it by name
