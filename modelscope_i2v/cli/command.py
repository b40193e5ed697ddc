"""The type of a command, and what it prints with."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from typing import Any, Callable

PROGRAM = "modelscope-i2v"

# At once, also into a pipe: minutes may pass between two lines.
echo = functools.partial(print, flush=True)


@dataclass(frozen=True)
class Command:
    """One of the program's commands: its name, its help, its arguments and what it does."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def without_none(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}
