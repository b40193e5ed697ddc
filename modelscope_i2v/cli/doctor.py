"""``modelscope-i2v doctor``: what is installed, what would be chosen, and whether a model is complete."""

from __future__ import annotations

import argparse
import os

from .command import Command, echo


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="DIR", help="a model folder to look through, too")


def _doctor(arguments: argparse.Namespace) -> None:
    from ..errors import I2VError
    from .diagnosis import diagnose

    folder = None if arguments.folder is None else os.path.expanduser(arguments.folder)
    findings = diagnose(folder)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        echo(f"{'!' if finding.is_problem else ' '} {finding.subject:<{width}}  {finding.state}")
        if finding.is_problem:
            echo(f"  {'':<{width}}  -> {finding.advice}")
    problems = sum(finding.is_problem for finding in findings)
    if problems:
        raise I2VError(f"{problems} problem{'s' if problems > 1 else ''} found")


DOCTOR = Command(
    "doctor",
    "say what is installed, which device, precision and attention would be chosen, and what is wrong",
    _add_doctor_arguments,
    _doctor,
)
