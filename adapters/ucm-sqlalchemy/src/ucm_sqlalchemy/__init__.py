"""SQLAlchemy sessions that belong to one user: an adapter of ucm-middleware."""

from ucm_sqlalchemy.criteria import UserOwned
from ucm_sqlalchemy.per_user import SQLitePerUser
from ucm_sqlalchemy.plugin import SQLAlchemy
from ucm_sqlalchemy.units import UnitOfWork

__all__ = ["SQLAlchemy", "SQLitePerUser", "UnitOfWork", "UserOwned"]
