"""OpenTelemetry: spans that carry the same records as the ledger, and metrics. No other package imports it."""

from ucm_middleware.telemetry.switch import Telemetry

__all__ = ["Telemetry"]
