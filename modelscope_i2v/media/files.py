"""Files that appear under their name only when they are complete.

The content is written beside the target, under a temporary name of our own pattern, flushed to disk and
moved into place. Whoever opens the target sees the old file or the new one, never a part. When a process
is killed in the middle, the next write into that folder removes what it left.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import stat
import zlib
from contextlib import contextmanager, suppress
from typing import Any, Iterator

from ..errors import OutputError
from .sources import source_name, url_scheme

logger = logging.getLogger(__name__)

# Short, ASCII and without the target's name: a name of 255 bytes leaves no room for an ending.
_TEMPORARY = re.compile(r"\.i2v-([0-9a-f]{8})-([0-9]{1,10})-[0-9a-f]{16}\.part")


def local_path(path: Any) -> str:
    """``path`` (str, bytes or os.PathLike) as a str, ``~`` expanded. Raises OutputError if it is no path."""
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise OutputError(f"cannot write to a {type(path).__name__}: give a path") from error
    if not text:
        raise OutputError("cannot write to the path '': it is empty")
    if url_scheme(text) is not None:
        # As a path it would do, and then its credentials and its signature were a folder's name.
        raise OutputError(f"cannot write to {source_name(text)}: it is a URL: give a path")
    return os.path.expanduser(text)


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
    with temporary_file(folder, shown) as temporary:
        yield temporary
        with _os_errors(shown):
            _commit(temporary, target)


@contextmanager
def temporary_file(folder: str, shown: str | None = None) -> Iterator[str]:
    """A new empty file in ``folder``, removed at the end unless it was moved away.

    Removes what killed processes left in ``folder`` first. Raises OutputError, naming ``shown`` or else the
    folder, if the file cannot be created.
    """
    _remove_leftovers(folder)
    path = os.path.join(folder, f".i2v-{_host()}-{os.getpid()}-{secrets.token_hex(8)}.part")
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
    try:
        with _os_errors(shown or folder):
            # 0o666 less the umask, as any new file; tempfile's 0o600 would stay on the finished file.
            os.close(os.open(path, flags, 0o666))
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
    with temporary_file(folder, shown):
        pass


@contextmanager
def _os_errors(shown: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise OutputError(f"cannot write {shown!r}: {getattr(error, 'strerror', None) or error}") from error


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


def _host() -> str:
    # Process numbers mean nothing on another machine that shares the folder.
    return f"{zlib.crc32(socket.gethostname().encode('utf-8', 'surrogateescape')):08x}"


def _remove_leftovers(folder: str) -> None:
    """Remove the temporary files of processes of this machine that no longer run."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry, match) for entry in entries if (match := _TEMPORARY.fullmatch(entry.name))]
    except OSError:  # no such folder, or it may not be listed: creating the file will tell
        return
    for entry, match in found:
        if match[1] != _host() or _is_running(int(match[2])):
            continue
        with suppress(OSError):  # another process may remove it at the same time
            if entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)
                logger.info("removed %r, left by a process that was killed", entry.path)


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # there, os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it runs as somebody else
        return True
    return True
