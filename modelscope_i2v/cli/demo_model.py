"""What the demo needs: a picture that ships with the package, and a small model made once and kept."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import sys
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Callable

from .. import __version__
from ..errors import OutputError
from ..weights import small_model

EXAMPLE_IMAGE = Path(__file__).parents[1] / "assets" / "example.jpg"

_MANIFEST = "complete.json"  # sizes and checksums of the files beside it, written last
_BUILDING = ".building-"
_ABANDONED_AFTER = 3600.0  # seconds; building takes some ten


def cache_folder() -> Path:
    """Where this platform keeps what a program can make again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(base):  # which the standard says to ignore
            base = Path.home() / ".cache"
    return Path(base) / "modelscope_i2v"


def demo_model(
    cache: str | os.PathLike | None = None, announce: Callable[[Path], None] | None = None
) -> tuple[Path, Path]:
    """The folders of the demo's stage one and stage two, made if they are not there or not intact.

    Args:
        cache: the folder to keep them in, instead of ``cache_folder()``.
        announce: called with the folder before a model is made, which takes some seconds.

    Raises:
        OutputError: if the model cannot be written.
    """
    cache = cache_folder() if cache is None else Path(cache).expanduser()
    folder = cache / f"small-model-{__version__}-{_fingerprint()}"
    try:
        if not _is_intact(folder):
            if announce is not None:
                announce(folder)
            _make(folder)
    except (OSError, RuntimeError) as error:  # what torch.save raises where the disk is full
        words = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot make the demo's model in {str(folder)!r}: {words}") from error
    return folder / small_model.IMAGE_TO_VIDEO_ID, folder / small_model.VIDEO_TO_VIDEO_ID


def _fingerprint() -> str:
    """Of what makes the small model what it is: the source of its module, and the sizes in force."""
    source = b""
    with suppress(OSError):  # installed without sources: the version tells enough
        source = pkgutil.get_data(small_model.__package__, "small_model.py") or b""
    sizes = json.dumps(small_model.SMALL_SETTINGS, sort_keys=True).encode()
    return f"{zlib.crc32(source + sizes):08x}"


def _make(folder: Path) -> None:
    """Make the model beside ``folder`` and move it there: nobody ever sees a part of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        small_model.make_small_model(new)
        (new / _MANIFEST).write_text(json.dumps(_checksums(new)), encoding="utf-8")
        if os.path.lexists(folder) and not _is_intact(folder):
            os.replace(folder, Path(temporary, "broken"))
        try:
            os.replace(new, folder)
        except OSError:
            if not _is_intact(folder):  # else another process was first, with the same model
                raise


def _remove_abandoned(cache: Path) -> None:
    """Remove what processes left that were killed while they made a model."""
    for path in cache.glob(_BUILDING + "*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(path, ignore_errors=True)


def _is_intact(folder: Path) -> bool:
    try:
        expected = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return expected == _checksums(folder)
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, list[int]]:
    """By name, size and CRC-32 of every file below the folder."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            data = path.read_bytes()
            sums[path.relative_to(folder).as_posix()] = [len(data), zlib.crc32(data)]
    return sums
