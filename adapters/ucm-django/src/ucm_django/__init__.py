"""Django's database connections, tied to one user: an adapter of ucm-middleware."""
