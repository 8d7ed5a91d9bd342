"""An application with a schema of its own, of every kind of request, that does nothing."""

import enum
from typing import Annotated, Any
from uuid import UUID

from fastapi import FastAPI, Header, Query
from pydantic import BaseModel

app = FastAPI()


class Size(enum.Enum):
    small = "small"
    large = "large"


class Part(BaseModel):
    note: str | None = None
    parts: "list[Part]" = []


class Order(Part):
    text: str
    size: Size
    count: int
    price: float | None


@app.get("/orders/{order_id}")
async def by_number(order_id: int, q: Annotated[str, Query(max_length=80)]) -> None:
    """By its number."""


@app.get("/things/{uuid}/{name}")
async def by_uuid(uuid: UUID, name: str, x_note: Annotated[str, Header()]) -> None:
    """By a UUID."""


@app.post("/orders")
async def add(order: Order) -> None:
    """Nested and recursive JSON."""


def document() -> dict[str, Any]:
    """Its schema, and as FastAPI would write it a form and an upload, for which it needs another package."""
    text, number = {"type": "string", "title": "Text"}, {"type": "integer"}
    form = {"type": "object", "properties": {"text": text, "many": {"type": "array", "items": number}}}
    file = {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}, "note": text}}
    bodies = {"/form": ("application/x-www-form-urlencoded", form), "/upload": ("multipart/form-data", file)}
    made = app.openapi()
    for path, (media, schema) in bodies.items():
        content = {media: {"schema": {**schema, "required": [*schema["properties"]]}}}
        made["paths"][path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": {}}}
    return made
