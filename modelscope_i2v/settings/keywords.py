"""The keywords of a call, of one stage or of both: checked, sorted by stage, and unknown ones decided on."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Mapping

from ..errors import InvalidInputError, describe
from .rules import did_you_mean, nearest, optional
from .stages import IMAGE_TO_VIDEO, SETTINGS_OF_STAGE, VIDEO_TO_VIDEO, Setting, call_settings

logger = logging.getLogger(__name__)

#: Before the name of a keyword that is meant for stage two, in a call for both stages.
REFINE_PREFIX = "refine_"

#: Keywords of the pipelines themselves, beside the settings.
_PIPELINES_OWN = {
    IMAGE_TO_VIDEO: ("output_video", "batch_size", "refine", "keep_first"),
    VIDEO_TO_VIDEO: ("output_video", "batch_size"),
}


def keywords_of(stage: str) -> dict[str, Setting]:
    """Return what a call of a stage may give, by keyword; a setting's own name is a keyword, too."""
    settings = call_settings(stage).values()
    return {name: each for each in settings for name in sorted({each.keyword, each.name})}


def check_keywords(stage: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call of one stage gives, by the settings' names, each in its proper type.

    None counts as not given. An unknown keyword that resembles none is ignored with a warning.

    Raises:
        InvalidInputError: for one that resembles a known one, or a value that is not allowed.
    """
    known = keywords_of(stage)
    checked: dict[str, Any] = {}
    for keyword, value in keywords.items():
        if keyword in known:
            checked.update(_checked(keyword, value, known[keyword]))
        else:
            _decide_on_unknown(keyword, [stage])
    return checked


def split_keywords(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a call of both stages gives to stage one and to stage two, checked like one stage's.

    What both stages know goes to stage one, unless ``refine_`` stands before it; what is declared as
    for both (``seed``, ``fps``, ...) goes to both.
    """
    known_first, known_second = (keywords_of(stage) for stage in (IMAGE_TO_VIDEO, VIDEO_TO_VIDEO))
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    prefixed: dict[str, Any] = {}  # goes before what is for both, whichever comes first in the call
    for keyword, value in keywords.items():
        name = keyword.removeprefix(REFINE_PREFIX)
        if keyword in known_first:
            checked = _checked(keyword, value, known_first[keyword])
            first.update(checked)
            second.update(checked if known_first[keyword].both else {})
        elif keyword in known_second:
            second.update(_checked(keyword, value, known_second[keyword]))
        elif name in known_second:
            prefixed.update(_checked(keyword, value, known_second[name]))
        else:
            _decide_on_unknown(keyword, [IMAGE_TO_VIDEO, VIDEO_TO_VIDEO])
    return first, {**second, **prefixed}


def _checked(keyword: str, value: Any, setting: Setting) -> dict[str, Any]:
    value = optional(setting.rule).check(keyword, value, InvalidInputError)
    return {} if value is None else {setting.name: value}


def _decide_on_unknown(keyword: str, stages: list[str]) -> None:
    """Refuse a keyword that is known elsewhere or resembles a known one; warn of any other."""
    known = [(stage, [*_PIPELINES_OWN[stage], *keywords_of(stage)]) for stage in stages]
    name = keyword.removeprefix(REFINE_PREFIX)
    if name != keyword and nearest(name, keywords_of(VIDEO_TO_VIDEO)) and len(stages) > 1:
        known = [(VIDEO_TO_VIDEO, [REFINE_PREFIX + each for each in keywords_of(VIDEO_TO_VIDEO)])]
    elsewhere = _where_known(keyword, stages)
    if elsewhere:
        stage, names = known[0]
        hint = f": {elsewhere}; known are {', '.join(sorted(names))}"
        raise InvalidInputError(f"{stage} has no keyword {keyword!r}{hint}")
    near = nearest(keyword, [each for _, names in known for each in names])
    for stage, names in known:
        if near in names:
            hint = did_you_mean(keyword, names)
            raise InvalidInputError(f"{stage} has no keyword {describe(keyword)}{hint}")
    _warn_of_ignored(" and ".join(stages), keyword[:100])


def _where_known(keyword: str, stages: list[str]) -> str:
    """Return what else a name is that is no keyword of this call; empty if it is nothing."""
    for stage, settings in SETTINGS_OF_STAGE.items():
        if keyword in keywords_of(stage):
            return f"{stage} has it"
        if keyword in settings.names():
            return "it is a keyword of pipeline() and a key of configuration.json"
    name = keyword.removeprefix(REFINE_PREFIX)
    if stages == [IMAGE_TO_VIDEO] and name != keyword and nearest(name, keywords_of(VIDEO_TO_VIDEO)):
        return "it is stage two's, in calls of stage one with refine=True"
    return ""


@lru_cache(maxsize=256)  # once for each, not at every call
def _warn_of_ignored(stage: str, keyword: str) -> None:
    logger.warning("%s: the keyword %r is unknown, and ignored", stage, keyword)
