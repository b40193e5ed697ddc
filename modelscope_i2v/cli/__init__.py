"""The command line, ``modelscope-i2v``: a table of commands, each in a module of its own.

What is slow to import (torch, ModelScope) is imported by the commands that need it, when they run.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from typing import Sequence

from .. import __version__
from ..errors import (
    ConfigurationError,
    I2VError,
    InvalidInputError,
    MissingFileError,
    MissingPackageError,
    is_out_of_memory,
)
from .batch import BATCH
from .command import PROGRAM
from .convert import CONVERT
from .demo import DEMO
from .doctor import DOCTOR
from .enhance import ENHANCE
from .generate import GENERATE
from .info import INFO
from .preview import PREVIEW
from .score import SCORE
from .studio import STUDIO
from .train import TRAIN

COMMANDS = (DEMO, GENERATE, ENHANCE, BATCH, PREVIEW, STUDIO, INFO, SCORE, TRAIN, CONVERT, DOCTOR)

#: The user's to correct, as a wrong argument is; other errors of ours exit with 1.
_EXIT_WITH_2 = (InvalidInputError, ConfigurationError, MissingFileError, MissingPackageError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments, instead of the process's own.

    Returns:
        The exit code: 0; 2 for what the user can correct (usage, input, settings, missing files); 1 for
        other failures; 130 when interrupted; 141 when nobody reads the output any more.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version and argparse's own errors
        return int(stop.code or 0)
    if arguments.debug:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        arguments.run(arguments)
        return 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141
    except Exception as error:
        if not (isinstance(error, I2VError) or is_out_of_memory(error)):
            raise  # a bug: its traceback is what a report needs
        if arguments.debug:
            traceback.print_exc()
        words = " ".join(map(str.strip, str(error).splitlines()))
        if not isinstance(error, I2VError):
            words = f"out of memory; fewer --frames or a smaller --size take less ({words or 'no details'})"
        print(f"{PROGRAM}: error: {words}", file=sys.stderr)
        return 2 if isinstance(error, _EXIT_WITH_2) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="From an image to a video, with I2VGen-XL.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name, help=command.help, description=command.help, allow_abbrev=False
        )
        command.add_arguments(subparser)
        subparser.add_argument(
            "--debug", action="store_true", help="show all logs, and where an error comes from"
        )
        subparser.set_defaults(run=command.run)
    return parser
