"""The public fake clock, under its short name."""

from ucm_middleware.testing import FakeClock as Clock

__all__ = ["Clock"]
