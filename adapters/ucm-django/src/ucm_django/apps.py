"""The app, for ``INSTALLED_APPS``: system checks, and the refusal of connections that nothing ties to users."""

from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core import checks
from django.db.backends.signals import connection_created

from ucm_django.checks import BIND_USER, check_settings, refuse_untied


class UcmDjangoConfig(AppConfig):
    """``INSTALLED_APPS += ["ucm_django"]``."""

    name = "ucm_django"
    verbose_name = "User contexts"

    def ready(self) -> None:
        checks.register(check_settings, checks.Tags.security)
        if BIND_USER in settings.MIDDLEWARE:
            _bind_at_login()
        created: Any = connection_created
        created.connect(_connected, dispatch_uid="ucm_django.refuse_untied")


def _bind_at_login() -> None:
    # Not before the apps are there: the signal is in a module of django.contrib.auth's.
    from django.contrib.auth.signals import user_logged_in

    from ucm_django.middleware import bind_logged_in

    logged_in: Any = user_logged_in
    logged_in.connect(bind_logged_in, dispatch_uid="ucm_django.bind_logged_in")


def _connected(*, connection: Any, **_: object) -> None:
    refuse_untied(connection)
