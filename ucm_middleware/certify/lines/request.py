"""A request as it goes over a line."""

from dataclasses import dataclass

from ucm_middleware.certify.steps import Manner


@dataclass(frozen=True, slots=True)
class Request:
    """``headers`` are complete but for those of the connection and the length. Without a ``body`` none is sent."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | None = None
    manner: Manner = "whole"

    def as_http1(self, host: str) -> bytes:
        """Its bytes. Raises UnicodeEncodeError for headers that HTTP cannot have."""
        lines = [f"{self.method} {self.target} HTTP/1.1"]
        if all(name.lower() != "host" for name, _ in self.headers):
            lines.append(f"Host: {host}")
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.body is not None or self.method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(self.body or b'')}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (self.body or b"")
