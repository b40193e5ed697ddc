"""``modelscope-i2v studio``: a web page that makes videos."""

from __future__ import annotations

import argparse
import getpass
import os
import signal

from ..errors import InvalidInputError
from .command import Command, echo
from .flags import add_loading_flags, loading_values
from .stages import HUB_ID_IMAGE_TO_VIDEO, HUB_ID_VIDEO_TO_VIDEO, StageRun, let_waiting_threads_sleep


def _add_studio_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="DIR_OR_ID", help="stage one's (default: the small trained one of this package)")
    add("--refine-model", metavar="DIR_OR_ID",
        help="stage two's (default: stage one's if it describes both, else, for an id on the hub, "
        f"{HUB_ID_VIDEO_TO_VIDEO})")  # fmt: skip
    add("--host", default="127.0.0.1", help="to listen on; 0.0.0.0 is every network (default: %(default)s)")
    add("--port", type=int, default=7860, metavar="N", help="(default: %(default)s)")
    add("--queue", type=int, default=8, metavar="N", help="places for jobs (default: %(default)s)")
    add(
        "--auth", metavar="USER[:PASSWORD]", help="ask visitors for it; a password left out is asked for here"
    )
    add_loading_flags(parser)


def _studio(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.port <= 65535:
        raise InvalidInputError(f"--port: got {arguments.port}, allowed is a whole number from 1 to 65535")
    if not 1 <= arguments.queue <= 1000:
        raise InvalidInputError(f"--queue: got {arguments.queue}, allowed is a whole number from 1 to 1000")
    let_waiting_threads_sleep()
    from ..studio.models import SMALL_MODEL, Models
    from ..studio.server import serving, wait_for_signal

    settings = loading_values(arguments)
    first = _downloaded("image-to-video", arguments.model or str(SMALL_MODEL), settings)
    second = arguments.refine_model
    if second is None and arguments.model == HUB_ID_IMAGE_TO_VIDEO:
        second = HUB_ID_VIDEO_TO_VIDEO
    if second is not None:
        second = _downloaded("video-to-video", second, settings)
    models = Models(first, second, **settings)
    auth = _auth(arguments.auth)
    if arguments.host not in ("127.0.0.1", "localhost", "::1") and auth is None:
        echo(f"Whoever reaches {arguments.host} can use this page: --auth asks for a password.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no files are left behind
    with serving(models, arguments.host, arguments.port, arguments.queue, auth) as url:
        echo(f"The studio is at {url} (Ctrl-C ends it)")
        wait_for_signal()


def _downloaded(stage: str, model: str, settings: dict) -> str:
    run = StageRun(stage, os.path.expanduser(model), settings, {})
    run.check()
    return run.downloaded().model


def _auth(given: str | None) -> tuple[str, str] | None:
    if given is None:
        return None
    user, colon, password = given.partition(":")
    password = password if colon else getpass.getpass(f"Password for {user}: ")
    if not user or not password:
        raise InvalidInputError("--auth: a user's name and a password are needed")
    return user, password


STUDIO = Command("studio", "a web page that makes videos", _add_studio_arguments, _studio)
