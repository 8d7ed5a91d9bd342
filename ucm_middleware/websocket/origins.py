"""Which sites' pages may open a WebSocket with a user's cookies.

A browser sends cookies with a handshake whichever site the page is of that asks for it, and no CORS rule applies. It
also sends the page's ``Origin``, which no script can forge: RFC 6455, section 10.2.
"""

from collections.abc import Collection, Sequence
from typing import Final
from urllib.parse import urlsplit

from ucm_middleware.errors import ConfigurationError, OriginError

Headers = Collection[tuple[bytes, bytes]]

_PORTS: Final = {"http": 80, "https": 443}


class Origins:
    """Allows a handshake without cookies, one without an Origin, as programs send it, one from the site that is asked
    itself, and one from an origin of the list, such as "https://app.example.com".

    Raises ConfigurationError for what is no origin.
    """

    __slots__ = ("_allowed",)

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        if isinstance(allowed, str):
            raise ConfigurationError("allowed_origins must be a list of origins, not one text")
        self._allowed = frozenset(_checked(origin) for origin in allowed)

    def require(self, headers: Headers, *, is_secure: bool = False) -> None:
        """Raises OriginError for a handshake that may not bring cookies with it. Names of headers are in lower case.

        Where it came over TLS, a page that did not is of no site that is known.
        """
        for name, _ in headers:
            if name == b"cookie":
                break
        else:
            return
        given = [(name, value.decode("latin-1")) for name, value in headers if name in (b"origin", b"host")]
        origins = [value for name, value in given if name == b"origin"]
        if not origins:
            return
        origin = _origin(origins[0]) if len(origins) == 1 else None
        if origin is not None and (origin in self._allowed or _is_of(_host(given), origin, is_secure)):
            return
        raise OriginError(
            "a page of another origin opened a WebSocket with the user's cookies; if it is one of yours, name its "
            f"origin in allowed_origins. It gave {origins[0][:200]!r}"
        )


def _checked(allowed: object) -> tuple[str, str, int]:
    origin = _origin(allowed) if isinstance(allowed, str) else None
    if origin is None:
        raise ConfigurationError(
            f"{allowed!r} in allowed_origins is no origin; give scheme and host, such as 'https://app.example.com'"
        )
    return origin


def _origin(text: str) -> tuple[str, str, int] | None:
    """Scheme, host and port, 0 where the scheme has none. None for no origin, such as the "null" of sandboxed pages."""
    try:
        parts = urlsplit(text)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        return None
    rest = parts.path or parts.query or parts.fragment or parts.username is not None
    return None if rest or not parts.scheme or not parts.hostname else (parts.scheme, parts.hostname, port)


def _host(given: list[tuple[bytes, str]]) -> str | None:
    """What the handshake calls the site that it asks. None where it says nothing, or several things."""
    hosts = [value for name, value in given if name == b"host"]
    return hosts[0] if len(hosts) == 1 else None


def _is_of(host: str | None, origin: tuple[str, str, int], is_secure: bool) -> bool:
    """Whether the page is of the very site. Without a port, the host is at the one of the page's scheme; the pages of
    an app or an extension are on none.
    """
    scheme = origin[0]
    if host is None or scheme not in _PORTS or (is_secure and scheme == "http"):
        return False
    return _origin(f"{scheme}://{host}") == origin
