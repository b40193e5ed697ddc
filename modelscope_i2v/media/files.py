"""Files that appear under their name only when they are complete.

The content is written beside the target, under a temporary name, flushed to disk and moved into place.
Whoever opens the target sees the old file or the new one, never a part. An exception, KeyboardInterrupt
included, removes the temporary file. A process that is killed outright leaves it, ``.i2v-*.part``: nobody
else could know whether its writer still runs, perhaps on another machine that shares the folder.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from contextlib import contextmanager, suppress
from typing import Any, Iterator

from ..errors import OutputError, redact
from .sources import reason, source_name, url_scheme

logger = logging.getLogger(__name__)


def local_path(path: Any) -> str:
    """``path`` (str, bytes or os.PathLike) as a str, ``~`` expanded. Raises OutputError if it is no path."""
    try:
        text = os.path.expanduser(os.fsdecode(path))
    except TypeError as error:
        raise OutputError(f"cannot write to a {type(path).__name__}: give a path") from error
    except Exception as error:  # a faulty __fspath__, a null character behind "~"
        raise OutputError(f"cannot write {source_name(path)}: {reason(error)}") from error
    if not text:
        raise OutputError("cannot write to the path '': it is empty")
    # As a path it would do, and then its credentials and its signature were a folder's name. pathlib leaves
    # one slash of two, and makes an absolute path of it.
    start = text.lstrip(" \t\r\n'\"").replace(":/", "://", 1)
    if url_scheme(start) is not None or redact(text) != text:
        raise OutputError(f"cannot write to {source_name(text)}: it is a URL: give a path")
    return text


def absolute_path(path: Any) -> str:
    """Return `local_path` made absolute, for what is written when the working folder may have changed."""
    shown = local_path(path)
    with _os_errors(shown):
        return os.path.join(os.getcwd(), shown)  # not abspath, which takes "link/.." for nothing


@contextmanager
def atomic_file(path: Any) -> Iterator[str]:
    """Write a file all or nothing: ``with atomic_file(path) as temporary: ...write to temporary...``

    ``temporary`` names an empty file in the folder of ``path`` (created if missing), to be opened by that
    name. When the block ends, the file is moved to ``path``, through symbolic links, keeping the old file's
    permissions. When it ends by an exception, KeyboardInterrupt included, the file is removed and ``path``
    is as it was. Raises OutputError, naming ``path``, for what goes wrong outside the block.
    """
    shown = local_path(path)
    target = _target(shown)
    folder = os.path.dirname(target)
    with _os_errors(shown):
        os.makedirs(folder, exist_ok=True)
    with _temporary_file(folder, shown) as temporary:
        yield temporary
        with _os_errors(shown):
            _commit(temporary, target)


@contextmanager
def _temporary_file(folder: str, shown: str) -> Iterator[str]:
    """A new empty file in ``folder``, removed at the end unless it was moved away."""
    # Short and without the target's name: a name of 255 bytes leaves no room for an ending.
    path = os.path.join(folder, f".i2v-{secrets.token_hex(8)}.part")
    try:
        with _os_errors(shown):
            # 0o666 less the umask, as any new file; tempfile's 0o600 would stay on the finished file.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        yield path
    finally:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("cannot remove the temporary file %r: %s", path, error)


def check_replaceable(path: Any) -> None:
    """Raise now the OutputError that `atomic_file` would raise later, as far as it can be known.

    Creates no folder and leaves no file; a file that is there stays as it is.
    """
    shown = local_path(path)
    folder = os.path.dirname(_target(shown))
    while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)  # the nearest one there is: the rest would be created in it
    with _temporary_file(folder, shown):
        pass


@contextmanager
def _os_errors(shown: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise OutputError(f"cannot write {shown!r}: {reason(error)}") from error


def _target(shown: str) -> str:
    """The absolute path behind ``shown``, if a regular file is or can be there."""
    if shown.endswith(("/", os.sep)) or os.path.basename(shown) in (".", ".."):
        raise OutputError(f"cannot write {shown!r}: it names a folder, not a file")
    with _os_errors(shown):
        target = os.path.realpath(shown)
        try:
            mode = os.stat(target).st_mode
        except FileNotFoundError:
            return target
    if stat.S_ISDIR(mode):
        raise OutputError(f"cannot write {shown!r}: it is a folder")
    if not stat.S_ISREG(mode):  # moving a file onto /dev/null would replace the device
        raise OutputError(f"cannot write {shown!r}: it is not a regular file")
    # Moving a file onto a write-protected one would work, but its owner said no.
    if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise OutputError(f"cannot write {shown!r}: the file is write-protected")
    return target


def _commit(temporary: str, target: str) -> None:
    _flush(temporary, os.O_RDWR)
    with suppress(OSError):  # no old file, or a file system without permissions
        os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
    os.replace(temporary, target)
    if os.name == "posix":
        with suppress(OSError):  # the name is in place; some file systems cannot flush a folder
            _flush(os.path.dirname(target), os.O_RDONLY)


def _flush(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
