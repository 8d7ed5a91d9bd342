"""The OpenAPI document of what is tried: the application's own, with what is given and what its router tells besides.

Free text in it is replaced by a placeholder, for which a canary or a common word is put in when a request is sent. So
the generator decides what JSON looks like, and this package what stands in its texts.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, Literal

from ucm_middleware.certify.cast import METHODS, Given
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
Source = Literal["schema", "given", "router"]

_CANARY_LENGTH: Final = 24
_ID_NAME: Final = re.compile(r"(?:^|_)(?:id|uuid|pk)$|[a-z]Id$")
_PARAMETER: Final = re.compile(r"\{([^{}:]+)(?::(\w+))?\}")
_CONVERTERS: Final[Mapping[str, Mapping[str, str]]] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "uuid": {"type": "string", "format": "uuid"},
}
_TEXT_FORMATS: Final = {
    "email": f"{WORD}@example.com",
    "password": WORD,
    "uri": f"https://example.com/{WORD}",
    "hostname": f"{WORD}.example.com",
}
# Of numbers without bounds few are tried, and small ones: what they name is there more often.
_NUMBERS: Final[Mapping[str, list[Any]]] = {"integer": [1, 2, 3], "number": [1, 2.5]}


@dataclass(frozen=True, slots=True)
class Route:
    """A route that can be tried. ``key`` is "GET /orders/{order_id}", or "WS /live" for a WebSocket."""

    key: str
    method: str
    path: str
    source: Source
    websocket: bool = False
    messages: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether it is there to change something."""
        return self.method not in ("GET", "WS")

    @property
    def collection(self) -> str:
        """The path up to the first parameter: where ids in its answers are used."""
        return self.path.partition("{")[0].rstrip("/")

    @property
    def takes_id(self) -> bool:
        """Whether an id stands in its path."""
        return any(_is_id(name) for name, _ in _PARAMETER.findall(self.path))


@dataclass(frozen=True, slots=True)
class Found:
    """A route that the application's router has."""

    path: str
    methods: tuple[str, ...]
    websocket: bool

    def given(self) -> Iterable[Given]:
        """The same as if it were given."""
        path = _PARAMETER.sub(r"{\1}", self.path)
        parameters = {name: _CONVERTERS[kind] for name, kind in _PARAMETER.findall(self.path) if kind in _CONVERTERS}
        if self.websocket:
            yield Given(path, websocket=True, parameters=parameters)
        for method in METHODS:
            if method in self.methods:
                yield Given(path, method, parameters=parameters)


def combined(
    document: Mapping[str, Any] | None, given: Iterable[Given], found: Iterable[Found]
) -> tuple[Document, list[Route]]:
    """One document of everything there is, ready for the generator, and its routes in the order of their paths.

    What is given goes before what the schema says, and that before what the router tells.
    """
    whole: Document = {
        "openapi": "3.1.0",
        "info": {"title": "", "version": ""},
        "paths": {},
        **deepcopy(dict(document or {})),
    }
    routes = {route.key: route for route in _of_schema(whole)}
    for one in given:
        routes[one.key] = _add(whole, one, "given")
    known = {(route.method, _shape(route.path)) for route in routes.values()}
    for one in (one for each in found for one in each.given()):
        if ("WS" if one.websocket else one.method, _shape(one.path)) not in known:
            routes[one.key] = _add(whole, one, "router")
    _sow_all(whole)
    return whole, sorted(routes.values(), key=lambda route: (route.path, route.method))


def _shape(path: str) -> str:
    return _PARAMETER.sub("{}", path)


def _of_schema(document: Document) -> Iterable[Route]:
    for path, item in document["paths"].items():
        for name in item:
            if name.upper() in METHODS:
                method = name.upper()
                yield Route(f"{method} {path}", method, path, "schema")


def _add(document: Document, given: Given, source: Source) -> Route:
    """Put a route into the document. A WebSocket stands there as a GET of a path that nothing else has."""
    method = "WS" if given.websocket else given.method
    operation: Document = {
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": given.parameters.get(name, {"type": "string"})}
            for name, _ in _PARAMETER.findall(given.path)
        ]
        + [
            {"name": name, "in": "query", "required": True, "schema": schema}
            for name, schema in given.parameters.items()
            if f"{{{name}}}" not in given.path
        ],
        "responses": {"200": {"description": ""}},
    }
    media = given.media or ("application/json" if given.body is not None else None)
    if media is not None:
        body = given.body if given.body is not None else {"enum": [WORD]}
        operation["requestBody"] = {"required": True, "content": {media: {"schema": body}}}
    path = f"{given.path}#ws" if given.websocket else given.path
    document["paths"].setdefault(path, {})["get" if given.websocket else given.method.lower()] = operation
    return Route(given.key, method, given.path, source, given.websocket, given.messages)


def _sow_all(document: Document) -> None:
    for item in document["paths"].values():
        _sow_parameters(item.get("parameters", ()))
        for operation in (each for name, each in item.items() if name.upper() in METHODS):
            _sow_parameters(operation.get("parameters", ()))
            for media, content in operation.get("requestBody", {}).get("content", {}).items():
                if "schema" in content and (media.endswith("json") or "form" in media):
                    content["schema"] = sown(content["schema"])
                content.pop("example", None)
                content.pop("examples", None)
    components = document.get("components", {})
    _sow_parameters(components.get("parameters", {}).values())
    for name, schema in components.get("schemas", {}).items():
        components["schemas"][name] = sown(schema)


def _sow_parameters(parameters: Iterable[Document]) -> None:
    for parameter in parameters:
        if "schema" not in parameter:
            continue
        schema = parameter["schema"]
        if parameter.get("in") == "path" and _is_id(parameter["name"]):
            parameter["schema"] = {"enum": [f"{ID}{_kind_of(schema)}"]}
        else:
            parameter["schema"] = sown(schema)
        parameter.pop("example", None)
        parameter.pop("examples", None)


def _is_id(name: str) -> bool:
    return _ID_NAME.search(name) is not None


def _kind_of(schema: Mapping[str, Any]) -> str:
    if schema.get("type") in ("integer", "number"):
        return "int"
    return "uuid" if schema.get("format") == "uuid" else "text"


def sown(schema: Any) -> Any:
    """The same schema with the placeholder for free text, few numbers, and nothing in objects that it does not name."""
    if is_list(schema):
        return [sown(one) for one in schema]
    if not is_object(schema):
        return schema
    if "enum" in schema or "const" in schema:
        return schema
    if schema.get("type") == "string":
        return _text(schema)
    if schema.get("type") in _NUMBERS and not _BOUNDS & schema.keys():
        return {"enum": _NUMBERS[schema["type"]]}
    # What is under the name of a property may be called like a keyword.
    made: dict[str, Any] = {
        name: {each: sown(one) for each, one in value.items()}
        if name in ("properties", "$defs", "definitions") and is_object(value)
        else sown(value)
        if name in _WITH_SCHEMAS
        else value
        for name, value in schema.items()
        if name not in ("example", "examples", "default")
    }
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    if made.get("type") == "array":
        made.setdefault("maxItems", max(2, int(schema.get("minItems", 0))))
    return made


_BOUNDS: Final = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}
_WITH_SCHEMAS: Final = {"items", "anyOf", "oneOf", "allOf", "additionalProperties", "prefixItems", "not"}


def _text(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = schema.get("format")
    if "pattern" in schema or (kind is not None and kind not in _TEXT_FORMATS):
        return schema
    text = _TEXT_FORMATS.get(kind or "", WORD)
    if schema.get("maxLength", _CANARY_LENGTH) < _CANARY_LENGTH + len(text) - len(WORD):
        return schema
    # A canary is longer than the shortest text that is asked for anywhere but in jest; else the generator makes it.
    return schema if schema.get("minLength", 0) > len("today") else {"enum": [text]}
