"""The files that a call's videos go to: resolved and checked before any work."""

from __future__ import annotations

import os
from typing import Any, Iterable, NamedTuple

from ..errors import InvalidInputError, describe
from ..media.files import local_path
from ..media.video import check_writable


class Output(NamedTuple):
    """A file to write: its name as the caller has it, and its path, which no change of folder changes."""

    name: str
    path: str


def resolve_outputs(names: Iterable[Any]) -> list[Output | None]:
    """Return the files of a call, None where there is no name, and an ``Output`` as it is.

    Raises:
        OutputError: if one cannot be written.
        InvalidInputError: if two are the same file, be it through a link.
    """
    outputs: list[Output | None] = []
    names_by_target: dict[str, str] = {}
    for name in names:
        if name is None or isinstance(name, Output):
            outputs.append(name)
            continue
        check_writable(name)
        output = Output(local_path(name), os.path.join(os.getcwd(), local_path(name)))
        target = os.path.normcase(os.path.realpath(output.path))
        if target in names_by_target:
            raise InvalidInputError(
                f"output_video: {describe(output.name)} and {describe(names_by_target[target])} are one "
                "file; give each video a file of its own"
            )
        names_by_target[target] = output.name
        outputs.append(output)
    return outputs
