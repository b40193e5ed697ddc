"""Bytes from "a path, a URL or bytes", and words for what they seem to be.

Every failure names the source and says what is wrong with it. A URL is shown without its credentials,
query and fragment, which often hold a secret. Whatever is given, what is raised is an exception of ours:
`input_errors` is the boundary where everything else becomes one.
"""

from __future__ import annotations

import io
import os
import re
import stat
from contextlib import contextmanager
from typing import Any, BinaryIO, Iterator
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..errors import (
    I2VError,
    InvalidInputError,
    MissingFileError,
    MissingPackageError,
    NotEnoughMemoryError,
    redact,
)

ALLOWED_SCHEMES = ("http", "https", "file")
#: Endings of the files that are taken of a folder.
VIDEO_ENDINGS = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .flv .wmv .gif .ogv".split())
IMAGE_ENDINGS = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff .avif .jxl".split())
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
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"\x00\x00\x01\xba", "an MPEG video"),
    (b"ID3", "an MP3 recording"),
    (b"OggS", "an Ogg file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"#EXTM3U", "a playlist"),
)
_RIFF = {b"WEBP": "a WebP image", b"AVI ": "an AVI video", b"WAVE": "a WAV recording"}


def url_scheme(source: str) -> str | None:
    """The lower-case scheme when ``source`` is meant as a URL, else None."""
    match = _SCHEME.match(source)
    return (match.group(1) or match.group(2)).lower() if match else None


def source_name(source: Any) -> str:
    """What follows "the image" or "the video" in a message: the quoted path or redacted URL, or the type."""
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            return f"({memoryview(source).nbytes} bytes given)"
        if isinstance(source, (str, os.PathLike)):
            shown = redact(os.fsdecode(source))
            return repr(shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "...")
    except Exception:  # a faulty __fspath__, a released memoryview
        pass
    return f"(a {type(source).__name__})"


@contextmanager
def input_errors(kind: str, source: Any) -> Iterator[None]:
    """Turn what is raised by whatever reads ``source``, of whatever type, into an exception of ours."""
    try:
        yield
    except I2VError:
        raise
    except MemoryError as error:
        raise NotEnoughMemoryError(
            f"the {kind} {source_name(source)} needs more memory than there is: give a smaller one"
        ) from error
    except FileNotFoundError as error:
        raise MissingFileError(f"the {kind} {source_name(source)} does not exist") from error
    except Exception as error:
        raise InvalidInputError(f"cannot read the {kind} {source_name(source)}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an exception of the system's or of a decoder's says, without numbers and paths."""
    return redact(str(getattr(error, "strerror", None) or error)) or type(error).__name__


def read_source(source: Any, kind: str, max_bytes: int) -> bytes:
    """The bytes of a path, a URL (http, https, file) or a bytes-like object.

    ``kind`` ("image", "video") is what messages call it. Raises MissingFileError for a file that is not
    there, InvalidInputError for everything else that prevents reading, more than ``max_bytes`` included,
    and NotEnoughMemoryError.
    """
    with input_errors(kind, source), open_source(source, kind, max_bytes) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size > max_bytes:
            raise _too_large(kind, source, max_bytes)
        return file.read(size or max_bytes)  # so much memory is taken, and given back after


def open_source(source: Any, kind: str, max_bytes: int) -> BinaryIO:
    """A seekable binary file of at least one byte, for the same sources and errors as `read_source`.

    ``max_bytes`` bounds what is held in memory: a download, or bytes; a local file can have any size.
    """
    with input_errors(kind, source):
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


def _too_large(kind: str, source: Any, max_bytes: int) -> InvalidInputError:
    name = source_name(source)
    return InvalidInputError(f"the {kind} {name} is larger than the {max_bytes:,} bytes allowed")


def _open_bytes(data: Any, kind: str, max_bytes: int) -> BinaryIO:
    size = memoryview(data).nbytes
    if not size:
        raise InvalidInputError(f"the {kind} is empty: 0 bytes were given")
    if size > max_bytes:
        raise _too_large(kind, data, max_bytes)
    return io.BytesIO(bytes(data))


def _download(url: str, kind: str, max_bytes: int) -> bytes:
    try:
        from .download import download
    except ImportError as error:
        raise MissingPackageError("reading from a URL needs the package requests") from error
    return download(url, kind, max_bytes)


def _path_of_file_url(url: str, kind: str) -> str:
    parts = urlsplit(url.replace("#", "%23").replace("?", "%3F"))  # both are ordinary in file names
    if parts.netloc not in ("", "localhost"):
        raise InvalidInputError(
            f"cannot read the {kind} {source_name(url)}: a file URL names this machine only, as in file:///folder/name"
        )
    return url2pathname(parts.path)


def _open_file(path: str, kind: str) -> BinaryIO:
    with input_errors(kind, path):
        status = os.stat(path)
        problem = None
        if stat.S_ISDIR(status.st_mode):
            problem = "a folder, not a file"
        elif not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
            problem = "not a regular file"
        elif not status.st_size:
            problem = "an empty file"
        if problem is not None:
            raise InvalidInputError(f"the {kind} {source_name(path)} is {problem}")
        return open(path, "rb")
