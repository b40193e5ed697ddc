"""The keywords of a call, of one stage or of both: checked, sorted by stage, and refused where unknown."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Mapping

from ..errors import InvalidInputError
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
    """Return what a call of a stage may give, by keyword; a setting's own name and alias are such, too."""
    settings = call_settings(stage).values()
    return {name: each for each in settings for name in sorted({each.keyword, each.name, each.alias} - {""})}


def check_keywords(stage: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a call of one stage, by the settings' names, each in its proper type.

    None counts as not given. An unknown keyword that resembles none is ignored with a warning.

    Raises:
        InvalidInputError: for one that resembles a known one, or a value that is not allowed.
    """
    return _checked(keywords, {name: (stage, each) for name, each in keywords_of(stage).items()})[stage]


def split_keywords(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keywords of a call of both stages, those for stage one and those for stage two, checked.

    What both stages know goes to stage one, unless ``refine_`` stands before it; what is declared as
    for both (``seed``, ``fps``, ...) goes to both.
    """
    first, second = keywords_of(IMAGE_TO_VIDEO), keywords_of(VIDEO_TO_VIDEO)
    checked = _checked(
        keywords,
        {
            **{REFINE_PREFIX + name: (VIDEO_TO_VIDEO, each) for name, each in second.items()},
            **{name: (VIDEO_TO_VIDEO, each) for name, each in second.items()},
            **{name: (IMAGE_TO_VIDEO, each) for name, each in first.items()},
        },
    )
    for_both = {name: value for name, value in checked[IMAGE_TO_VIDEO].items() if first[name].both}
    return checked[IMAGE_TO_VIDEO], {**for_both, **checked[VIDEO_TO_VIDEO]}


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what both stages' loading gives to stage one and to stage two.

    An adapter fits one stage: ``lora`` and ``lora_scale`` go to stage one, and with ``refine_`` before the
    name to stage two. All else goes to both.
    """
    own = ("lora", "lora_scale")
    refined = {REFINE_PREFIX + name: name for name in own}
    first = {name: value for name, value in settings.items() if name not in refined}
    second = {refined.get(name, name): value for name, value in settings.items() if name not in own}
    return first, second


def _checked(
    keywords: Mapping[str, Any], known: Mapping[str, tuple[str, Setting]]
) -> dict[str, dict[str, Any]]:
    """Return values by stage and setting; ``known`` has the stage and the declaration of each keyword."""
    checked: dict[str, dict[str, Any]] = {stage: {} for stage, _ in known.values()}
    # Those with the prefix go before the same ones without it, whichever come first in the call.
    for keyword in sorted(keywords, key=lambda keyword: keyword.startswith(REFINE_PREFIX)):
        if keyword not in known:
            _decide_on_unknown(keyword, {name: stage for name, (stage, _) in known.items()})
            continue
        stage, setting = known[keyword]
        value = optional(setting.rule).check(keyword, keywords[keyword], InvalidInputError)
        if value is not None:
            checked[stage][setting.name] = value
    return checked


def _decide_on_unknown(keyword: str, known: dict[str, str]) -> None:
    """Refuse a keyword that is known elsewhere or resembles a known one; warn of any other.

    Args:
        keyword: which is not known.
        known: those that are, and the stage that each is for.
    """
    stages = sorted(set(known.values()))
    known = {**known, **{name: stage for stage in reversed(stages) for name in _PIPELINES_OWN[stage]}}
    name, prefix = keyword.removeprefix(REFINE_PREFIX), REFINE_PREFIX * keyword.startswith(REFINE_PREFIX)
    near = nearest(name, [each[len(prefix) :] for each in known if each.startswith(prefix)])
    elsewhere = _where_known(keyword, stages)
    if elsewhere or near is not None:
        stage = stages[0] if elsewhere else known[f"{prefix}{near}"]
        names = sorted(each for each in known if known[each] == stage)
        hint = f": {elsewhere}; known are {', '.join(names)}" if elsewhere else did_you_mean(keyword, names)
        raise InvalidInputError(f"{stage} has no keyword {keyword[:100]!r}{hint}")
    _warn_of_ignored(" and ".join(stages), keyword[:100])


def _where_known(keyword: str, stages: list[str]) -> str:
    """Return in words what else knows a name that is no keyword of this call; empty if nothing does."""
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
