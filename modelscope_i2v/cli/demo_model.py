"""What the demo needs: a picture that ships with the package, and a small model made once and kept."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Callable

from .. import __version__
from ..errors import OutputError
from ..weights import small_model

EXAMPLE_IMAGE = Path(__file__).parents[1] / "assets" / "example.jpg"


def cache_folder() -> Path:
    """Return where this platform keeps what a program can make again."""
    base: str | Path
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
    """Return the folders of the demo's stage one and stage two, made if they are not there.

    Args:
        cache: the folder to keep them in, instead of ``cache_folder()``.
        announce: called with the folder before a model is made, which takes some seconds.

    Raises:
        OutputError: if the model cannot be written.
    """
    cache = cache_folder() if cache is None else Path(cache).expanduser()
    folder = cache / f"small-model-{__version__}"
    try:
        if not folder.is_dir():
            if announce is not None:
                announce(folder)
            _make(folder)
    except (OSError, RuntimeError) as error:  # what torch.save raises where the disk is full
        words = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot make the demo's model in {str(folder)!r}: {words}") from error
    return folder / small_model.IMAGE_TO_VIDEO_ID, folder / small_model.VIDEO_TO_VIDEO_ID


def _make(folder: Path) -> None:
    """Make the model beside ``folder`` and move it there: nobody ever sees a part of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        small_model.make_small_model(new)
        try:
            os.replace(new, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same model
                raise
