"""The server of a page: its folder for files, and its end."""

from __future__ import annotations

import os
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from ..errors import MissingPackageError, OutputError
from .models import Models

#: The most that one uploaded file may have.
MAX_UPLOAD = "100mb"


@contextmanager
def serving(
    models: Models,
    host: str = "127.0.0.1",
    port: int = 7860,
    places: int = 8,
    auth: tuple[str, str] | None = None,
) -> Iterator[str]:
    """Serve the page of models for a block; all files of uploads and results go with it.

    Args:
        models: what makes the videos.
        host, port: where to listen.
        places: jobs that may wait or run at a time.
        auth: a user's name and password, which visitors are asked for.

    Yields:
        The page's URL.

    Raises:
        MissingPackageError: without Gradio.
        OutputError: if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="i2v-studio-", ignore_cleanup_errors=True) as folder:
        files, cache = Path(folder, "files"), Path(folder, "cache")
        files.mkdir()
        cache.mkdir()
        os.environ.update(GRADIO_TEMP_DIR=str(cache), GRADIO_ANALYTICS_ENABLED="False")
        try:
            import gradio  # noqa: F401 - after its variables are set
        except ImportError as error:
            raise MissingPackageError(
                f"the studio needs Gradio: pip install 'modelscope_i2v[studio]' ({error})"
            ) from error
        from .page import Page

        page = Page(models, places, files)
        options: dict[str, Any] = {"server_name": host, "server_port": port, "auth": auth}
        try:
            _, url, _ = page.blocks.launch(
                **options, **page.launch_options, max_file_size=MAX_UPLOAD, prevent_thread_lock=True
            )
        except OSError as error:
            raise OutputError(f"cannot listen on {host} port {port}: {error}") from error
        try:
            yield url
        finally:
            page.blocks.close()
            page.jobs.close()


def wait_for_signal() -> None:
    """Return when the process is interrupted."""
    try:
        signal.pause() if hasattr(signal, "pause") else input()
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: the end is to be an orderly one
