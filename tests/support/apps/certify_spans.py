"""An application with a provider of spans of its own, made as it is imported and set nowhere."""

from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider

TRACER = TracerProvider().get_tracer("shop")
LAST: dict[str, str] = {}

app = FastAPI()


@app.post("/say")
async def say(text: str) -> dict[str, str]:
    """What was said before, by whoever, goes into the span."""
    with TRACER.start_as_current_span("saying", attributes={"before": LAST.get("text", "")}):
        LAST["text"] = text
    return {"said": text}
