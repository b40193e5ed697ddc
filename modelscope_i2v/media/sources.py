"""Bytes from "a path, a URL or bytes", and words for what they seem to be.

Every failure names the source and says what is wrong with it. A URL is shown without its credentials,
query and fragment, which often hold a secret.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import time
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

from ..errors import InvalidInputError, MissingFileError, MissingPackageError

logger = logging.getLogger(__name__)

ALLOWED_SCHEMES = ("http", "https", "file")
CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte
DOWNLOAD_TIMEOUT = 900.0  # seconds in all: a server that drips bytes must not hold a service for ever

_CHUNK = 1 << 18
# Two letters at least: "C:" is a Windows drive. "//" is required so that "take:2.png" stays a file name.
_SCHEME = re.compile(r"([a-z][a-z0-9+.\-]+)://|(data):[a-z]+/", re.IGNORECASE)
_SHOWN = 300  # characters of a path in a message: someone may pass a file's contents for its path
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"8BPS", "a Photoshop document"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"\x00\x00\x01\xba", "an MPEG video"),
    (b"\x00\x00\x01\xb3", "an MPEG video"),
    (b"FLV\x01", "a Flash video"),
    (b"0&\xb2u\x8ef\xcf\x11", "a Windows Media file"),
    (b"ID3", "an MP3 recording"),
    (b"fLaC", "a FLAC recording"),
    (b"OggS", "an Ogg file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"#EXTM3U", "a playlist"),
    (b"ffconcat", "a playlist"),
)
_RIFF = {b"WEBP": "a WebP image", b"AVI ": "an AVI video", b"WAVE": "a WAV recording"}


def redact_url(url: str) -> str:
    """``url`` without user name, password, query and fragment, for messages and logs."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    except ValueError:  # not even a URL by its syntax, e.g. an unclosed "[" in the host
        return url.partition(":")[0] + "://..."


def url_scheme(source: str) -> str | None:
    """The lower-case scheme when ``source`` is meant as a URL, else None."""
    match = _SCHEME.match(source)
    return (match.group(1) or match.group(2)).lower() if match else None


def source_name(source: Any) -> str:
    """What follows "the image" or "the video" in a message: the quoted path or redacted URL, or the type."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"({memoryview(source).nbytes} bytes given)"
    try:
        text = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else None
    except Exception:  # a faulty __fspath__
        text = None
    if text is not None:
        scheme = url_scheme(text)
        shown = "data:..." if scheme == "data" else redact_url(text) if scheme else text
        return repr(shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "...")
    return f"(a {type(source).__name__})"


def read_source(source: Any, kind: str, max_bytes: int) -> bytes:
    """The bytes of a path, a URL (http, https, file) or a bytes-like object.

    ``kind`` ("image", "video") is what messages call it. Raises MissingFileError for a file that is not
    there, InvalidInputError for everything else that prevents reading, more than ``max_bytes`` included.
    """
    with open_source(source, kind, max_bytes) as file:
        name = source_name(source)
        try:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size > max_bytes:
                raise _too_large(kind, name, max_bytes)
            return file.read(size or max_bytes)  # so much memory is taken, and given back after
        except OSError as error:
            raise InvalidInputError(f"cannot read the {kind} {name}: {error.strerror or error}") from error


def open_source(source: Any, kind: str, max_bytes: int) -> BinaryIO:
    """A seekable binary file of at least one byte, for the same sources and errors as `read_source`.

    ``max_bytes`` bounds what is held in memory: a download, or bytes; a local file can have any size.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(source, kind, max_bytes)
    if not isinstance(source, (str, os.PathLike)):
        raise InvalidInputError(
            f"cannot read {kind} from {type(source).__name__}: give a path, a URL or bytes"
        )
    text = os.fsdecode(source)
    if not text:
        raise InvalidInputError(f"the {kind}'s path is an empty string")
    scheme = url_scheme(text) if isinstance(source, str) else None
    if scheme in ("http", "https"):
        return io.BytesIO(_download(text, kind, max_bytes))
    if scheme == "file":
        return _open_file(_path_of_file_url(text, kind), kind)
    if scheme is not None:
        raise InvalidInputError(
            f"cannot read the {kind} {source_name(text)}: {scheme}: is not among the schemes allowed, "
            f"{', '.join(ALLOWED_SCHEMES)}"
        )
    return _open_file(os.path.expanduser(text), kind)


def describe_content(head: bytes) -> str:
    """What a file that starts with ``head`` (64 bytes or more, if it has them) seems to be, in words."""
    for signature, words in _SIGNATURES:
        if head.startswith(signature):
            return words
    if head[:4] == b"RIFF" and head[8:12] in _RIFF:
        return _RIFF[head[8:12]]
    if head[4:8] == b"ftyp":
        return {b"avif": "an AVIF image", b"heic": "a HEIC image"}.get(head[8:12], "an MP4 or QuickTime file")
    return _describe_text(head)


def _describe_text(head: bytes) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page"
    if start.startswith(b"<svg"):
        return "an SVG drawing"
    if start.startswith((b"<?xml", b"<")):
        return "an XML document or web page"
    if start.startswith((b"{", b"[")):
        return "a JSON text"
    # A character cut at the end of `head` is no sign of binary data; nor are accents.
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) >= len(head) - 3 and not re.search(r"[\x00-\x08\x0e-\x1a]", text):
        return "a text"
    return "no known kind of file"


def _too_large(kind: str, name: str, max_bytes: int) -> InvalidInputError:
    return InvalidInputError(f"the {kind} {name} is larger than the {max_bytes:,} bytes allowed")


def _open_bytes(data: Any, kind: str, max_bytes: int) -> BinaryIO:
    size = memoryview(data).nbytes
    if not size:
        raise InvalidInputError(f"the {kind} is empty: 0 bytes were given")
    if size > max_bytes:
        raise _too_large(kind, source_name(data), max_bytes)
    return io.BytesIO(bytes(data))


def _path_of_file_url(url: str, kind: str) -> str:
    parts = urlsplit(url.replace("#", "%23").replace("?", "%3F"))  # both are ordinary in file names
    if parts.netloc not in ("", "localhost"):
        raise InvalidInputError(
            f"cannot read the {kind} {source_name(url)}: a file URL names this machine only, as in file:///folder/name"
        )
    return url2pathname(parts.path)


def _open_file(path: str, kind: str) -> BinaryIO:
    name = source_name(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InvalidInputError(f"the {kind} {name} is a folder, not a file")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            raise InvalidInputError(f"the {kind} {name} is not a regular file")
        if not status.st_size:
            raise InvalidInputError(f"the {kind} {name} is an empty file")
        return open(path, "rb")
    except InvalidInputError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"the {kind} {name} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"cannot read the {kind} {name}: {reason}") from error


def _download(url: str, kind: str, max_bytes: int) -> bytes:
    try:
        import requests
    except ImportError as error:
        raise MissingPackageError("reading from a URL needs the package requests") from error
    name = redact_url(url)
    failure = None
    try:
        with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
            if response.status_code != 200:
                raise InvalidInputError(
                    f"cannot fetch the {kind} {name}: the server answered "
                    f"{response.status_code} {response.reason or ''}".rstrip()
                )
            data = _receive(response, kind, name, max_bytes)
    except InvalidInputError:
        raise
    except Exception as error:  # requests lets some of urllib3's and of the codecs' through
        failure = InvalidInputError(f"cannot fetch the {kind} {name}: {_network_reason(error)}")
    if failure is not None:
        # Raised out here so that no traceback shows requests' own message, which has the whole URL.
        raise failure
    logger.debug("fetched the %s %s: %d bytes", kind, name, len(data))
    return data


def _receive(response: Any, kind: str, name: str, max_bytes: int) -> bytes:
    declared = response.headers.get("Content-Length", "")
    length = int(declared) if declared.isdigit() else None
    if length is not None and length > max_bytes:
        raise _too_large(kind, name, max_bytes)
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT
    data = bytearray()
    for chunk in response.iter_content(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise _too_large(kind, name, max_bytes)
        if time.monotonic() > deadline:
            raise InvalidInputError(
                f"cannot fetch the {kind} {name}: not complete after {DOWNLOAD_TIMEOUT:.0f} s"
            )
    if length is not None and "Content-Encoding" not in response.headers and len(data) < length:
        raise InvalidInputError(
            f"cannot fetch the {kind} {name}: the connection ended after {len(data)} of {length} bytes"
        )
    if not data:
        raise InvalidInputError(f"the {kind} {name} is empty: the server sent 0 bytes")
    return bytes(data)


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
    return type(error).__name__
