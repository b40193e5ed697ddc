"""``modelscope-i2v info``: how a video was made."""

from __future__ import annotations

import argparse

from .command import Command, echo


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="a path or a URL")


def _info(arguments: argparse.Namespace) -> None:
    from ..errors import InvalidInputError
    from ..media.sources import source_name
    from ..media.video import read_metadata
    from ..settings.record import FIRST_STAGE, from_metadata

    entries = from_metadata(read_metadata(arguments.video))
    if not entries:
        name = source_name(arguments.video)
        raise InvalidInputError(f"{name}: says nothing of how it was made: it is not a file of this package")
    first_stage = entries.pop(FIRST_STAGE, None)
    _show(entries)
    if isinstance(first_stage, dict):
        echo("\nof a video that was made so:")
        _show(first_stage)


def _show(entries: dict) -> None:
    for name, value in sorted(entries.items()):
        echo(f"{name}: {'x'.join(map(str, value)) if isinstance(value, list) else value}")


INFO = Command("info", "say how a video was made: its seed, its steps, its model", _add_info_arguments, _info)
