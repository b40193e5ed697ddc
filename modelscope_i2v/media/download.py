"""Files over HTTP, within bounds of time and size that hold whatever the server does.

requests fetches, and three things that no HTTP client for Python bounds are bounded here:

- *redirects*: requests reads the whole body of each, even with ``allow_redirects=False``, to reuse the
  connection. `_Session` hides them from it; they are followed one by one, their bodies unread;
- *time*: timeouts of clients are for one wait on the socket, and a byte in time starts the next. Every read
  of the socket passes `_BoundedSocket`, be it for headers, interim answers, chunk sizes or trailers, and has
  only what is left until one deadline;
- *size*: clients decode a compressed body, and keep the line of a chunk's size, in one piece of any length.
  No compression is asked for, none is accepted, and what passes `_BoundedSocket` is counted.

Not bounded by the deadline are the look-up of a name, which is the system's, and a host's many addresses that
nobody answers at: each has CONNECT_TIMEOUT.
"""

from __future__ import annotations

import io
import logging
import socket
import time
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ProtocolError

from ..errors import InvalidInputError, redact

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte
DOWNLOAD_TIMEOUT = 900.0  # seconds in all
MAX_REDIRECTS = 10

_CHUNK = 1 << 18
_REDIRECTS = (301, 302, 303, 307, 308)


class _Refused(Exception):
    """What is wrong with a download. No ValueError or OSError: http.client would take it for its own."""


def download(url: str, kind: str, max_bytes: int) -> bytes:
    """Return the body of an ``http`` or ``https`` URL, 1 to ``max_bytes`` bytes, after at most MAX_REDIRECTS.

    Raises InvalidInputError, which shows the URL without credentials and query, and has no cause that would.
    """
    bounds = _Bounds(max_bytes)
    try:
        with _Session(bounds) as session:
            data = _fetch(session, url, bounds)
    except _Refused as error:
        failure = str(error)
    except Exception as error:  # requests lets some of urllib3's and of the codecs' through
        failure = _network_reason(error)
    else:
        logger.debug("fetched the %s %s: %d bytes", kind, redact(url), len(data))
        return data
    # Raised out here so that no traceback shows requests' own message, which has the whole URL.
    raise InvalidInputError(f"cannot fetch the {kind} {redact(url)}: {failure}")


class _Bounds:
    """The end of a download, and the bytes that its socket may give: the body, headers and what frames it."""

    def __init__(self, max_bytes: int):
        self.deadline = time.monotonic() + DOWNLOAD_TIMEOUT
        self.max_bytes = max_bytes
        self.max_received = max_bytes + max_bytes // 8 + (1 << 20)

    def seconds_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise _Refused(f"not complete after {DOWNLOAD_TIMEOUT:g} s")
        return left

    def too_large(self) -> _Refused:
        return _Refused(f"it is larger than the {self.max_bytes:,} bytes allowed")


def _fetch(session: requests.Session, url: str, bounds: _Bounds) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        timeout = (min(CONNECT_TIMEOUT, bounds.seconds_left()), READ_TIMEOUT)
        with session.get(url, stream=True, timeout=timeout) as response:
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or location is None:
                return _receive(response, bounds)
        url = urljoin(url, location)
        if urlsplit(url).scheme not in ("http", "https"):
            raise _Refused(f"it redirects to {redact(url)!r}: allowed are http and https")
    raise _Refused(f"more than {MAX_REDIRECTS} redirects")


def _receive(response: requests.Response, bounds: _Bounds) -> bytes:
    if response.status_code != 200:
        raise _Refused(f"the server answered {response.status_code} {response.reason or ''}".rstrip())
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise _Refused(f"the server sent it compressed ({encoding[:40]}), which was not asked for")
    declared = response.headers.get("Content-Length", "")
    length = int(declared) if declared.isdigit() and len(declared) < 20 else None
    if length is not None and length > bounds.max_bytes:
        raise bounds.too_large()
    data = bytearray()
    # `read` leaves chunks to http.client, whose lines are bounded; `stream` has urllib3's, which are not.
    while part := response.raw.read(_CHUNK, decode_content=False):
        data += part
        if len(data) > bounds.max_bytes:
            raise bounds.too_large()
    if length is not None and len(data) < length:
        raise _Refused(f"the connection ended after {len(data)} of {length} bytes")
    if not data:
        raise _Refused("the server sent 0 bytes")
    return bytes(data)


class _Session(requests.Session):
    """A session whose sockets keep to ``bounds``, and which takes no answer for a redirect."""

    def __init__(self, bounds: _Bounds):
        super().__init__()
        self.headers["Accept-Encoding"] = "identity"
        for scheme in ("http://", "https://"):
            self.mount(scheme, _BoundedAdapter(bounds))

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class _BoundedAdapter(HTTPAdapter):
    def __init__(self, bounds: _Bounds):
        self._bounds = bounds
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self._bind(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **options)
        if not known:
            self._bind(manager)
        return manager

    def _bind(self, manager: Any) -> None:
        """Make all connections of a pool manager read through a `_BoundedSocket`."""
        bounds = self._bounds

        class Response(HTTPResponse):
            def __init__(self, sock: Any, *args: Any, **options: Any):
                super().__init__(sock, *args, **options)
                self.fp = io.BufferedReader(_BoundedSocket(sock, self.fp.detach(), bounds))

        def bound(pool: Any) -> type:
            connection = type("Connection", (pool.ConnectionCls,), {"response_class": Response})
            return type("Pool", (pool,), {"ConnectionCls": connection})

        manager.pool_classes_by_scheme = {
            scheme: bound(pool) for scheme, pool in manager.pool_classes_by_scheme.items()
        }


class _BoundedSocket(io.RawIOBase):
    """What a socket receives for one answer, until the bounds are met."""

    def __init__(self, sock: Any, raw: io.RawIOBase, bounds: _Bounds):
        self._sock, self._raw, self._bounds, self._received = sock, raw, bounds, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._received >= self._bounds.max_received:
            raise self._bounds.too_large()
        self._sock.settimeout(min(READ_TIMEOUT, self._bounds.seconds_left()))
        try:
            count = self._raw.readinto(buffer)
        except socket.timeout:
            self._bounds.seconds_left()  # raises, if that was all there was
            raise
        self._received += count or 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _network_reason(error: BaseException) -> str:
    """The system's words at the root of a network failure: they hold no URL, unlike those of requests."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        if isinstance(current, OSError) and current.strerror and "://" not in str(current.strerror):
            return f"{current.strerror} ({type(error).__name__})"
        reason = getattr(current, "reason", None)
        nested = [a for a in (*current.args, reason) if isinstance(a, BaseException) and a not in seen]
        current = nested[0] if nested else (current.__cause__ or current.__context__)
    if isinstance(error, (requests.ConnectionError, ProtocolError)):
        return f"the answer is cut short or not valid HTTP ({type(error).__name__})"
    return type(error).__name__
