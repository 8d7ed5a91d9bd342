"""The plugin: what a manager is told of Django."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import ClassVar

from ucm_middleware import hookimpl


class Django:
    """``UserContextManager(plugins=["django"])``: ``isolation_report`` knows what users share by design of Django.

    That is what the project has once, and a thread's connection to a database, which everybody uses in turn.
    """

    UCM_HOOK_API: ClassVar[int] = 1

    @hookimpl
    def ucm_shared_types(self) -> Iterable[type]:
        # Not before it is asked: a manager may be made before Django is set up.
        from django.apps import AppConfig
        from django.apps.registry import Apps
        from django.conf import LazySettings, Settings
        from django.core.cache import BaseCache
        from django.core.files.storage import Storage
        from django.db.backends.base.base import BaseDatabaseWrapper
        from django.db.models import Field, ForeignObjectRel
        from django.db.models.expressions import Col
        from django.db.models.manager import BaseManager
        from django.db.models.options import Options
        from django.dispatch import Signal
        from django.template import Engine
        from django.template.backends.base import BaseEngine
        from django.urls import URLPattern, URLResolver
        from django.utils.connection import BaseConnectionHandler, ConnectionProxy

        from ucm_postgres.shared import psycopg_pool_types, psycopg_types

        return (
            *(BaseConnectionHandler, ConnectionProxy, BaseDatabaseWrapper, BaseCache, Storage),
            *(Apps, AppConfig, LazySettings, Settings, Signal, Engine, BaseEngine, URLPattern, URLResolver),
            *(Options, Field, ForeignObjectRel, BaseManager, Col),
            *(psycopg_types() if find_spec("psycopg_pool") is None else psycopg_pool_types()),
        )


plugin = Django()
"""What the entry point ``django`` loads."""
