"""Requests that are ready to be sent but for their words: for each route some, made by Schemathesis from its schema."""

import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast
from urllib.parse import urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from ucm_middleware.certify.schema import Route
from ucm_middleware.certify.sowing import FALLBACKS, ID, WORD, Document

CASES: Final = 4
"""How many are made for each route."""

SHARED: Final = ("today", "tea")
"""The common words: few, so that users come to use the same."""

_ELSEWHERE: Final = "http://certify.invalid"


@dataclass(frozen=True, slots=True)
class Case:
    """One request of a route. ``target`` is path and query; there and in ``body`` stand placeholders."""

    target: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None

    @property
    def is_json(self) -> bool:
        return any(name.lower() == "content-type" and "json" in value for name, value in self.headers)

    @property
    def takes_padding(self) -> bool:
        """Whether the body can be made longer without changing what it says: JSON by spaces, bytes by more of them."""
        if self.body is None:
            return False
        kind = next((value for name, value in self.headers if name.lower() == "content-type"), "")
        return "json" in kind or kind in ("application/octet-stream", "text/plain")

    def filled(self, word: str, found_id: str | None) -> "Case":
        """The same with a word for free text, and an id."""
        target = self.target
        for kind, fallback in FALLBACKS.items():
            target = target.replace(f"{ID}{kind}", fallback if found_id is None else found_id)
        body = None if self.body is None else self.body.replace(WORD.encode(), word.encode())
        headers = tuple((name, value.replace(WORD, word)) for name, value in self.headers)
        return Case(target.replace(WORD, word), headers, body)


@dataclass(slots=True)
class Material:
    """What there is to try: routes, the cases of each, and why there are none of some."""

    routes: tuple[Route, ...] = ()
    cases: dict[str, tuple[Case, ...]] = field(default_factory=dict[str, tuple[Case, ...]])
    not_made: dict[str, str] = field(default_factory=dict[str, str])

    def tried(self) -> tuple[Route, ...]:
        """The routes of which there are cases."""
        return tuple(route for route in self.routes if self.cases.get(route.key))


def make_material(
    document: Document, routes: Iterable[Route], seed: int, is_over: Callable[[], bool] = lambda: False
) -> Material:
    """Make the cases. The same seed makes the same ones; ``is_over`` says when no more are to be made."""
    made = Material(tuple(routes))
    operations = _operations(document, made)
    for route in made.routes:
        operation = operations.get(("get" if route.websocket else route.method.lower(), _path_of(route)))
        if operation is None:
            made.not_made.setdefault(route.key, "the schema says nothing of it that can be read")
            continue
        if is_over():
            made.not_made[route.key] = "the time was over before requests were made for it"
            continue
        try:
            made.cases[route.key] = tuple(_cases(operation, seed))
        except Exception as error:  # noqa: BLE001 - what a schema can be wrong by is without end
            made.not_made[route.key] = f"no request can be made by its schema: {_first_line(error)}"
    return made


def _path_of(route: Route) -> str:
    return f"{route.path}#ws" if route.websocket else route.path


def _operations(document: Document, made: Material) -> Mapping[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    whole: Any = schemathesis.openapi.from_dict(document)  # its types are generic in what is not used here
    for result in whole.get_all_operations():
        if isinstance(result, Ok):
            operation = cast("Any", result).ok()
            found[operation.method.lower(), operation.path] = operation
        else:
            error = result.err()
            key = f"{str(error.method or '').upper()} {error.path}"
            made.not_made[key] = f"its schema cannot be read: {_first_line(error)}"
    return found


def _cases(operation: Any, seed: int) -> list[Case]:
    found: dict[Case, None] = {}

    @seeded(seed)
    @settings(
        max_examples=3 * CASES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def collect(case: Any) -> None:
        if len(found) < CASES:
            found[_prepared(case)] = None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hypothesis's, of examples that are made outside of a test
        collect()
    return list(found)


def _prepared(case: Any) -> Case:
    arguments = case.as_transport_kwargs(base_url=_ELSEWHERE)
    # Of what requests' types allow it makes texts and bytes of these.
    request: Any = requests.Request(
        **{name: arguments[name] for name in _TAKEN if arguments.get(name) is not None}
    ).prepare()
    url = urlsplit(str(request.url))
    target = (url.path or "/").removesuffix("%23ws") + (f"?{url.query}" if url.query else "")
    sent: Mapping[str, str] = request.headers
    headers = tuple((name, value) for name, value in sent.items() if name.lower() not in _OURS)
    body: bytes | None = request.body.encode() if isinstance(request.body, str) else request.body
    if body is not None and (drawn := _BOUNDARY.search(sent.get("content-type", ""))) is not None:
        # It is drawn at random, and not by the seed.
        body = body.replace(drawn[1].encode(), _OURS_BETWEEN.encode())
        headers = tuple((name, value.replace(drawn[1], _OURS_BETWEEN)) for name, value in headers)
    if body is None and any(name.lower() == "content-type" for name, _ in headers):
        body = b""
    return Case(target, headers, body)


_BOUNDARY: Final = re.compile(r"^multipart/form-data;\s*boundary=(\w+)$")
_OURS_BETWEEN: Final = "ucm0between0parts"
_TAKEN: Final = ("method", "url", "headers", "params", "data", "json", "files", "cookies")
_OURS: Final = {
    *("host", "connection", "content-length", "transfer-encoding", "accept", "accept-encoding", "user-agent"),
    *("x-schemathesis-testcaseid", "authorization", "cookie"),
}


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text or type(error).__name__


def generator() -> str:
    """The generator and its version, for the report."""
    return f"Schemathesis {importlib.metadata.version('schemathesis')}"
