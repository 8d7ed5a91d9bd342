"""The OpenAPI document of what is tried: the application's own, with what is given and what its router has."""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, Literal

from ucm_middleware.certify.cast import METHODS, Given
from ucm_middleware.certify.plain import is_object
from ucm_middleware.certify.sowing import WORD, Document, is_id, sow

Source = Literal["schema", "given", "router"]

_PARAMETER: Final = re.compile(r"\{([^{}:]+)(?::(\w+))?\}")
_CONVERTERS: Final[Mapping[str, Mapping[str, str]]] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "uuid": {"type": "string", "format": "uuid"},
}


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
        return any(is_id(name) for name, _ in _PARAMETER.findall(self.path))


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
    whole: Document = {"openapi": "3.1.0", "info": {"title": "", "version": ""}, **deepcopy(dict(document or {}))}
    if "swagger" in whole:
        raise ValueError("it is of Swagger 2, and what is read is OpenAPI 3")
    whole["paths"] = {path: _readable(item) for path, item in whole.get("paths", {}).items() if path.isprintable()}
    routes = {route.key: route for route in _of_schema(whole)}
    for one in given:
        routes[one.key] = _add(whole, one, "given")
    known = {(route.method, _shape(route.path)) for route in routes.values()}
    for one in (one for each in found for one in each.given()):
        if ("WS" if one.websocket else one.method, _shape(one.path)) not in known:
            routes[one.key] = _add(whole, one, "router")
    sow(whole)
    return whole, sorted(routes.values(), key=lambda route: (route.path, route.method))


def _readable(item: Any) -> Document:
    """The operations of a path that are objects, with what goes for all of them."""
    kept = item if is_object(item) else {}
    return {name: each for name, each in kept.items() if name.upper() not in METHODS or is_object(each)}


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
