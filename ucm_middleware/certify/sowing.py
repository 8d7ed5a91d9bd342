"""Placeholders for free text and ids in an OpenAPI document.

A canary or a common word is put in for them when a request is sent. So the generator decides what JSON looks like, and
this package what stands in its texts.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ucm_middleware.certify.cast import METHODS
from ucm_middleware.certify.plain import is_list, is_object

WORD: Final = "ucm0word"
"""Stands for free text."""

ID: Final = "ucm0id"
"""Stands for the id of something of a user's; followed by the kind to fall back to."""

FALLBACKS: Final[Mapping[str, str]] = {
    "int": "1",
    "uuid": "00000000-0000-4000-8000-000000000001",
    "text": WORD,
}

Document = dict[str, Any]

_CANARY_LENGTH: Final = 24
_ID_NAME: Final = re.compile(r"(?:^|_)(?:id|uuid|pk)$|[a-z]Id$")
_TEXT_FORMATS: Final = {
    "email": f"{WORD}@example.com",
    "password": WORD,
    "uri": f"https://example.com/{WORD}",
    "hostname": f"{WORD}.example.com",
}
# Of numbers without bounds few are tried, and small ones: what they name is there more often.
_NUMBERS: Final[Mapping[str, list[Any]]] = {"integer": [1, 2, 3], "number": [1, 2.5]}


def sow(document: Document) -> None:
    """Put the placeholders into all of it."""
    # Parts of which a whole is made must let in what the other parts name.
    closed = '"allOf"' not in json.dumps(document)
    for item in document["paths"].values():
        _sow_parameters(item.get("parameters", ()), closed=closed)
        for operation in (each for name, each in item.items() if name.upper() in METHODS):
            _sow_parameters(operation.get("parameters", ()), closed=closed)
            _sow_body(operation.get("requestBody", {}), closed=closed)
    components = document.get("components", {})
    _sow_parameters(components.get("parameters", {}).values(), closed=closed)
    for body in components.get("requestBodies", {}).values():
        _sow_body(body, closed=closed)
    for name, schema in components.get("schemas", {}).items():
        components["schemas"][name] = sown(schema, closed=closed)


def _sow_body(body: Document, *, closed: bool) -> None:
    for media, content in body.get("content", {}).items():
        if "schema" in content and (media.endswith("json") or "form" in media):
            content["schema"] = sown(content["schema"], closed=closed)
        content.pop("example", None)
        content.pop("examples", None)


def _sow_parameters(parameters: Iterable[Document], *, closed: bool) -> None:
    for parameter in parameters:
        if "schema" not in parameter:
            continue
        schema = parameter["schema"]
        if parameter.get("in") == "path" and is_id(parameter["name"]):
            parameter["schema"] = {"enum": [f"{ID}{_kind_of(schema)}"]}
        else:
            parameter["schema"] = sown(schema, closed=closed)
        parameter.pop("example", None)
        parameter.pop("examples", None)


def is_id(name: str) -> bool:
    """Whether what is called so is an id: "id", "order_id", "orderId", "uuid"."""
    return _ID_NAME.search(name) is not None


def _kind_of(schema: Any) -> str:
    if not is_object(schema):
        return "text"  # a schema may be true, and says nothing then
    if schema.get("type") in ("integer", "number"):
        return "int"
    return "uuid" if schema.get("format") == "uuid" else "text"


def sown(schema: Any, *, closed: bool = True) -> Any:
    """The same schema with the placeholder for free text, and few numbers; with ``closed`` objects have nothing that
    it does not name.
    """
    if is_list(schema):
        return [sown(one, closed=closed) for one in schema]
    if not is_object(schema) or "enum" in schema or "const" in schema:
        return schema
    kind = schema.get("type")
    if is_list(kind):
        return {"anyOf": [sown({**schema, "type": one}, closed=closed) for one in kind]}
    if kind == "string":
        return _text(schema)
    if isinstance(kind, str) and kind in _NUMBERS and not _BOUNDS & schema.keys():
        return {"enum": _NUMBERS[kind]}
    # What is under the name of a property may be called like a keyword.
    made: dict[str, Any] = {
        name: {each: sown(one, closed=closed) for each, one in value.items()}
        if name in ("properties", "$defs", "definitions") and is_object(value)
        else sown(value, closed=closed)
        if name in _WITH_SCHEMAS
        else value
        for name, value in schema.items()
        if name not in ("example", "examples", "default")
    }
    if "properties" in made and closed:
        made.setdefault("additionalProperties", False)
    if made.get("type") == "array":
        made.setdefault("maxItems", max(2, int(schema.get("minItems", 0))))
    return made


_BOUNDS: Final = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}
_WITH_SCHEMAS: Final = {"items", "anyOf", "oneOf", "allOf", "additionalProperties", "prefixItems"}


def _text(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = schema.get("format")
    if "pattern" in schema or (kind is not None and kind not in _TEXT_FORMATS):
        return schema
    text = _TEXT_FORMATS.get(kind or "", WORD)
    if schema.get("maxLength", _CANARY_LENGTH) < _CANARY_LENGTH + len(text) - len(WORD):
        return schema
    # A canary is longer than the shortest text that is asked for anywhere but in jest; else the generator makes it.
    return schema if schema.get("minLength", 0) > len("today") else {"enum": [text]}
