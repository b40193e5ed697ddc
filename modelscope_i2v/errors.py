"""The exceptions that this package raises for its user's or the world's faults, and values in their words.

Each is also the matching built-in exception, so that ``except ValueError`` and the like in existing
code go on working. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import re
from typing import Any

# One slash will do: ``Path("https://host")`` is "https:/host". Two letters at least: "C:/" is a drive.
_URL = re.compile(r"([a-z][a-z0-9+.\-]{1,30}:[/\\]+)(.*)", re.IGNORECASE | re.DOTALL)
_DATA_URL = re.compile(r"(data:)[a-z]+/.*", re.IGNORECASE | re.DOTALL)


class I2VError(Exception):
    """Base of all exceptions of this package."""


class InvalidInputError(I2VError, ValueError):
    """An image, a video, a prompt or a call keyword that cannot be used."""


class ConfigurationError(I2VError, ValueError):
    """A setting, in a ``configuration.json`` or given as a keyword, that is missing or not allowed."""


class MissingFileError(I2VError, FileNotFoundError):
    """A file or folder that should be there and is not."""


class CheckpointError(I2VError, RuntimeError):
    """A weights file that cannot be read safely, or does not fit the network."""


class OutputError(I2VError, RuntimeError):
    """A video that could not be encoded or written."""


class MissingPackageError(I2VError, ImportError):
    """An optional package that a setting asks for and that is not installed or does not work."""


class NotEnoughMemoryError(I2VError, MemoryError):
    """A generation that does not fit into memory, however little is computed at a time."""


class NumericalError(I2VError, ArithmeticError):
    """A computation whose numbers left what its type can hold."""


class Interrupted(I2VError, RuntimeError):
    """A generation that its caller cancelled."""


def redact(text: str) -> str:
    """Return ``text`` without the credentials, the query and the fragment of a URL in it.

    A URL may be anywhere in the text, mangled by ``pathlib`` too, and ends only where the text ends: a
    password may hold blanks, quotes and slashes. In doubt more is hidden than need be.
    """
    return _URL.sub(_without_secrets, _DATA_URL.sub(r"\1...", text))


def _without_secrets(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    shown = re.split("[?#]", rest, maxsplit=1)[0]
    if "@" in rest[len(shown) :]:  # of a query, or of a password with a question mark
        return scheme + "..."
    credentials, _, shown = shown.rpartition("@")
    return scheme + ("...@" if "/" in credentials else "") + shown


def describe(value: Any, length: int = 100) -> str:
    """Return a value's ``repr`` for a message: redacted, at most ``length`` characters, never an error."""
    try:
        shown = repr(redact(value)) if isinstance(value, str) else redact(repr(value))
    except Exception:  # whatever a foreign __repr__ raises; of an int, more digits than Python converts
        return f"a value of type {type(value).__name__}"
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on whichever device."""
    # The CPU's allocator, CUDA's and CUDA's libraries raise RuntimeErrors.
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    is_worded_so = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    is_torchs = type(error).__name__ == "OutOfMemoryError"  # which is not imported here
    return isinstance(error, MemoryError) or is_torchs or is_worded_so
