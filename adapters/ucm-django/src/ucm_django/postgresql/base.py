"""Where Django looks for a backend's DatabaseWrapper."""

from django.db.backends.postgresql import base

from ucm_django.wrapper import BoundToUser


class DatabaseWrapper(BoundToUser, base.DatabaseWrapper):
    """Django's own for PostgreSQL, each transaction tied to the user that the running code works for."""
