"""The file or the function that says who takes part: ``users.toml``, or ``module:function`` that returns a ``Cast``."""

import importlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ucm_middleware.certify.cast import Call, Cast, Given, User
from ucm_middleware.certify.plain import is_object
from ucm_middleware.errors import ConfigurationError

_CALL: Final = {"path": str, "method": str, "body": object, "form": dict, "token": str}
_USER: Final = {"name": str, "headers": dict, "query": dict, "secrets": list, "sign_in": dict, "sign_out": dict}
_ROUTE: Final = {
    "path": str,
    "method": str,
    "websocket": bool,
    "body": dict,
    "media": str,
    "parameters": dict,
    "messages": list,
}
_FILE: Final = {"users": list, "routes": list, "public": list}


def read_cast(where: str) -> Cast:
    """Read a TOML file, or call the function that "module:function" names.

    Raises ConfigurationError where there is none, or it says something else than it may; it names the field.
    """
    module, colon, function = where.partition(":")
    if colon and not where.endswith(".toml"):
        return _called(module, function)
    try:
        text = Path(where).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"users: {where} cannot be read ({error}); give a TOML file or module:function"
        ) from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"users: {where} is no TOML: {error}") from None
    return _cast(table)


def _called(module: str, function: str) -> Cast:
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"users: {module}:{function} cannot be called: {error}") from error
    if not isinstance(made, Cast):
        raise ConfigurationError(
            f"users: {module}:{function} must return a ucm_middleware.certify.Cast, not a {type(made).__name__}"
        )
    return made


def _cast(table: Mapping[str, Any]) -> Cast:
    _check("the file", table, _FILE, needed=("users",))
    return Cast(
        users=tuple(_user(f"users[{at}]", one) for at, one in enumerate(table["users"])),
        routes=tuple(_route(f"routes[{at}]", one) for at, one in enumerate(table.get("routes", ()))),
        public=_texts("public", table.get("public", ())),
    )


def _user(where: str, table: Any) -> User:
    _check(where, table, _USER, needed=("name",))
    return User(
        name=table["name"],
        headers=_mapping(f"{where}.headers", table.get("headers", {})),
        query=_mapping(f"{where}.query", table.get("query", {})),
        secrets=_texts(f"{where}.secrets", table.get("secrets", ())),
        sign_in=_call(f"{where}.sign_in", table.get("sign_in")),
        sign_out=_call(f"{where}.sign_out", table.get("sign_out")),
    )


def _call(where: str, table: Any) -> Call | None:
    if table is None:
        return None
    _check(where, table, _CALL, needed=("path",))
    form = table.get("form")
    return Call(
        path=table["path"],
        method=table.get("method", "POST"),
        body=table.get("body"),
        form=None if form is None else _mapping(f"{where}.form", form),
        token=table.get("token"),
    )


def _route(where: str, table: Any) -> Given:
    _check(where, table, _ROUTE, needed=("path",))
    return Given(
        path=table["path"],
        method=table.get("method", "GET"),
        websocket=table.get("websocket", False),
        body=table.get("body"),
        media=table.get("media"),
        parameters=_tables(f"{where}.parameters", table.get("parameters", {})),
        messages=_texts(f"{where}.messages", table.get("messages", ())),
    )


def _check(where: str, table: Any, fields: Mapping[str, type], *, needed: tuple[str, ...]) -> None:
    if not is_object(table):
        raise ConfigurationError(f"users: {where} must be a table, not a {type(table).__name__}")
    known = ", ".join(fields)
    for name, value in table.items():
        if name not in fields:
            raise ConfigurationError(f"users: {where} has {name!r}, and there are {known}")
        if not isinstance(value, fields[name]):
            kind = type(value).__name__  # never the value: it may be a credential
            raise ConfigurationError(f"users: {where}.{name} must be a {fields[name].__name__}, not a {kind}")
    if missing := [name for name in needed if name not in table]:
        raise ConfigurationError(f"users: {where} lacks {missing[0]!r}")


def _texts(where: str, value: Any) -> tuple[str, ...]:
    if not all(isinstance(one, str) for one in value):
        raise ConfigurationError(f"users: {where} must be a list of texts")
    return tuple(value)


def _tables(where: str, value: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    for name, one in value.items():
        if not is_object(one):
            raise ConfigurationError(
                f"users: {where}.{name} must be a JSON schema, a table, not a {type(one).__name__}"
            )
    return value


def _mapping(where: str, value: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(one, str) for one in value.values()):
        raise ConfigurationError(f"users: the values of {where} must be texts")
    return dict(value)
