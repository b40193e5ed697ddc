"""Command-line flags made from the declarations of the settings."""

from __future__ import annotations

import argparse
import re
from typing import Any, Callable, Iterable

from ..settings.keywords import REFINE_PREFIX
from ..settings.stages import (
    CALL_ONLY,
    IMAGE_TO_VIDEO,
    VIDEO_TO_VIDEO,
    Setting,
    StageSettings,
    call_settings,
    loading_settings,
)
from .command import without_none


def _pair(separator: str, allowed: str) -> Callable[[str], list[int]]:
    """Return a type for argparse: two whole numbers with a separator between them."""

    def pair(text: str) -> list[int]:
        match = re.fullmatch(f"([0-9]{{1,9}}){separator}([0-9]{{1,9}})", text.lower())
        if match is None:
            raise argparse.ArgumentTypeError(f"got {text!r}, allowed is {allowed}")
        return [int(each) for each in match.groups()]

    return pair


def integer_or_name(text: str) -> int | str:
    """Return the number of a text, or the text."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


#: What argparse needs to know of a flag, by the kind of its rule. Bounds and choices are checked later, with
#: the words that every other way in has.
FLAG_KINDS: dict[str, dict[str, Any]] = {
    "integer": {"type": int, "metavar": "N"},
    "number": {"type": float, "metavar": "X"},
    "text": {"metavar": "TEXT"},
    "name": {"metavar": "NAME"},
    "choice": {},
    "boolean": {"action": argparse.BooleanOptionalAction},
    "size": {"type": _pair("x", "WIDTHxHEIGHT in pixels, as 448x256"), "metavar": "WxH"},
    "interval": {"type": _pair("-", "FIRST-LAST, as 200-800"), "metavar": "FIRST-LAST"},
    "paths": {"action": "append", "metavar": "PATH"},
    "numbers": {"action": "append", "type": float, "metavar": "X"},
}


def first_stage_flags() -> list[Setting]:
    """Return the declarations of what a command line may give to stage one, or to both."""
    return [each for each in call_settings(IMAGE_TO_VIDEO).values() if each.rule.kind in FLAG_KINDS]


def second_stage_flags() -> tuple[list[Setting], list[Setting]]:
    """Return the declarations of what only stage two has, and of what each stage has for itself."""
    in_first = call_settings(IMAGE_TO_VIDEO)
    flags = [each for each in call_settings(VIDEO_TO_VIDEO).values() if each.rule.kind in FLAG_KINDS]
    only = [each for each in flags if each.name not in in_first]
    return only, [each for each in flags if each.name in in_first and not each.both]


def add_flags(parser: Any, settings: Iterable[Setting], prefix: str = "") -> None:
    """Add a flag for each setting to a parser or a group; its value is found by ``values_of``."""
    for each in settings:
        options = dict(FLAG_KINDS[each.rule.kind])
        if each.rule.kind == "choice":
            options["metavar"] = f"{{{','.join(each.rule.choices)}}}"
        elif each.rule.kind == "integer" and each.rule.choices:
            options.update(type=integer_or_name, metavar=f"N|{'|'.join(each.rule.choices)}")
        repeated = "; for several, the flag several times" * (options.get("action") == "append")
        parser.add_argument(
            flag_of(each, prefix),
            dest=prefix + (each.keyword or each.name),
            default=None,
            help=each.help.replace("%", "%%") + repeated,
            **options,
        )


def flag_of(setting: Setting, prefix: str = "") -> str:
    """Return a setting's flag with its dashes."""
    return f"--{prefix.replace('_', '-')}{setting.flag}"


def values_of(arguments: argparse.Namespace, settings: Iterable[Setting], prefix: str = "") -> dict[str, Any]:
    """Return the values of the flags that were given, by keyword."""
    keywords = [prefix + (each.keyword or each.name) for each in settings]
    return without_none(**{keyword: getattr(arguments, keyword) for keyword in keywords})


def add_second_stage_flags(group: Any) -> None:
    """Add the flags of stage two beside stage one's: what both have for themselves with ``--refine-``."""
    only, own = second_stage_flags()
    add_flags(group, only)
    add_flags(group, own, REFINE_PREFIX)


def second_stage_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags that ``add_second_stage_flags`` added."""
    only, own = second_stage_flags()
    return {**values_of(arguments, only), **values_of(arguments, own, REFINE_PREFIX)}


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what concerns how a stage is loaded, and on which device."""
    parser.add_argument("--device", metavar="D", help="cpu, gpu or cuda:N (default: a GPU if there is one)")
    add_flags(parser, loading_settings().values())


def loading_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags that ``add_loading_flags`` added."""
    return without_none(device=arguments.device, **values_of(arguments, loading_settings().values()))


SEED = StageSettings.declared()["seed"]
PROGRESS = CALL_ONLY["progress"]
