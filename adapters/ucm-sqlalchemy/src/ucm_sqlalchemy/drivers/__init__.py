"""What each driver does to tie a transaction of SQLAlchemy's to its user, and to reset a connection."""
