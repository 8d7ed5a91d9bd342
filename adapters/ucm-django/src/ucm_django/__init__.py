"""Django's database connections, tied to one user: an adapter of ucm-middleware."""

from ucm_django.identity import nobody, unbound

__all__ = ["nobody", "unbound"]
