"""The head of an HTTP request, as far as the metrics endpoint needs it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from gradstream.core.errors import ProtocolError

MAX_HEAD_BYTES = 16 << 10
MAX_HEADERS = 100


@dataclass(frozen=True)
class Request:
    """A request without a body. `path` is without query."""

    method: str
    path: str
    accept: str = ""
    authorization: str = ""


def parse_head(head: bytes) -> Request:
    """Parse a request's head, up to and with its empty line. Raises ProtocolError."""
    try:
        first, *lines = head.decode("ascii").removesuffix("\r\n\r\n").split("\r\n")
        method, target, version = first.split(" ")
    except ValueError:
        raise _malformed() from None
    if version not in ("HTTP/1.0", "HTTP/1.1") or not target.startswith("/") or len(lines) > MAX_HEADERS:
        raise _malformed()
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _malformed()
        # Of a name that comes twice the first one counts.
        headers.setdefault(name.lower(), value.strip())
    path = target.partition("?")[0]
    return Request(method, path, headers.get("accept", ""), headers.get("authorization", ""))


def _malformed() -> ProtocolError:
    return ProtocolError("this is no request of HTTP/1.1; ask with curl, or have Prometheus scrape this address")


def response(status: HTTPStatus, content_type: str, body: bytes, with_body: bool = True) -> bytes:
    """Write a response, after which the connection closes. The answer to HEAD has no body."""
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + (body if with_body else b"")
