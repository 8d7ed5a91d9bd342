"""The backend for ``DATABASES``: ``"ENGINE": "ucm_django.postgresql"``."""
