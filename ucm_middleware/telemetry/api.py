"""What spans and metrics ask of OpenTelemetry's API alike."""

from typing import Final

SCOPE: Final = "ucm_middleware"
"""The instrumentation scope of all spans and metrics."""


def is_of_the_api(found: object) -> bool:
    """Whether a provider, tracer or meter is one of the API's own, which do nothing."""
    return type(found).__module__.startswith(("opentelemetry.trace", "opentelemetry.metrics"))
