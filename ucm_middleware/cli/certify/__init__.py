"""``ucm certify``: try to make an application mix its users up."""

from ucm_middleware.cli.certify.command import certify

__all__ = ["certify"]
