"""``ucm certify``: an application is run on a real server, and its users are set on it to be mixed up."""

from ucm_middleware.certify.cast import Call, Cast, Given, User

__all__ = ["Call", "Cast", "Given", "User"]
