"""The app, for ``INSTALLED_APPS``: system checks, and the refusal of connections that nothing ties to users."""

from typing import Any

from django.apps import AppConfig
from django.core import checks
from django.db.backends.signals import connection_created

from ucm_django.checks import check_settings, refuse_untied


class UcmDjangoConfig(AppConfig):
    """``INSTALLED_APPS += ["ucm_django"]``."""

    name = "ucm_django"
    verbose_name = "User contexts"

    def ready(self) -> None:
        checks.register(check_settings, checks.Tags.database, checks.Tags.security)
        checks.register(check_settings, checks.Tags.security)
        created: Any = connection_created
        created.connect(_connected, dispatch_uid="ucm_django.refuse_untied")


def _connected(*, connection: Any, **_: object) -> None:
    refuse_untied(connection)
