"""What the commands are made of."""

from __future__ import annotations

import argparse
import functools
import re
from dataclasses import dataclass
from typing import Any, Callable

PROGRAM = "modelscope-i2v"

# At once, also into a pipe: minutes may pass between two lines.
say = functools.partial(print, flush=True)


@dataclass(frozen=True)
class Command:
    """One of the program's commands: its name, its help, its arguments and what it does."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def given(**values: Any) -> dict[str, Any]:
    """Those that were spelled out."""
    return {name: value for name, value in values.items() if value is not None}


def add_run_arguments(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """What all commands take that run the stages."""
    if seed:
        parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same video")
    parser.add_argument("--device", metavar="D", help="cpu, gpu or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--progress", action="store_true", help="show progress bars, not only on a terminal")


def size_argument(text: str) -> list[int]:
    """[width, height] of a text such as 448x256."""
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is WIDTHxHEIGHT in pixels, as 448x256")
    return [int(side) for side in match.groups()]
