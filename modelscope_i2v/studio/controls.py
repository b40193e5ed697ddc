"""The page's controls, made from the declarations of the settings."""

from __future__ import annotations

import re
from typing import Any, Iterable, Sequence

from ..errors import InvalidInputError
from ..settings.keywords import check_keywords
from ..settings.stages import VIDEO_TO_VIDEO, Setting, StageSettings, call_settings

#: Not on a page: names of the server's files, and formats that a browser does not play.
_NOT_ON_A_PAGE = {"lora", "lora_scale", "codec", "pix_fmt"}
_KINDS = {"integer", "number", "text", "choice", "boolean", "size", "interval"}
#: Seeds have a place of their own, and progress is what the page is for.
_ELSEWHERE = {"seed", "progress"}
#: Of stage two, not folded away.
MAIN = ("text", "total_noise_levels", "scale", "resolution")


def page_settings(stage: str) -> list[Setting]:
    """Return the declarations of what a page may give to a stage: stage two's main ones first."""
    shown = [
        each
        for each in call_settings(stage).values()
        if each.rule.kind in _KINDS and each.name not in _NOT_ON_A_PAGE | _ELSEWHERE
    ]
    main = MAIN if stage == VIDEO_TO_VIDEO else ()
    return [*(each for name in main for each in shown if each.name == name),
            *(each for each in shown if each.name not in main)]  # fmt: skip


def component(setting: Setting, default: Any, i18n: Any) -> Any:
    """Return the Gradio component of a setting; an empty one leaves the setting at its default."""
    import gradio as gr

    rule = setting.rule
    shown: dict[str, Any] = {"label": i18n(f"{setting.name}_label"), "info": i18n(f"{setting.name}_help")}
    if rule.kind == "choice":
        return gr.Dropdown(list(rule.choices), value=default, **shown)
    if rule.kind == "boolean":
        return gr.Checkbox(value=bool(default), **shown)
    # Gradio's numbers cannot be empty: what may be is a text.
    if rule.kind in ("integer", "number") and not rule.choices and default is not None:
        precision = 0 if rule.kind == "integer" else None
        return gr.Number(default, precision=precision, minimum=rule.low, maximum=rule.high, **shown)
    value = default if isinstance(default, (str, int)) else None
    return gr.Textbox(None if value is None else str(value), max_length=2000, **shown)


def default_of(setting: Setting, settings: StageSettings) -> Any:
    """Return what a control shows at first: the model's own value."""
    return getattr(settings, setting.name, None)


def keywords_of_page(stage: str, settings: Iterable[Setting], values: Sequence[Any]) -> dict[str, Any]:
    """Return the keywords that the controls' values make, checked.

    Raises:
        InvalidInputError: for a value that is not allowed.
    """
    given = {each.keyword: _parsed(each, value) for each, value in zip(settings, values)}
    return check_keywords(stage, {key: value for key, value in given.items() if value is not None})


def _parsed(setting: Setting, value: Any) -> Any:
    """Return a control's value as a call would give it; None for an empty one."""
    kind = setting.rule.kind
    if isinstance(value, str) and not value.strip() and kind != "text":
        return None
    if kind in ("size", "interval") and isinstance(value, str):
        numbers = re.fullmatch(r"\s*([0-9]{1,9})\s*[x×,\- ]\s*([0-9]{1,9})\s*", value)
        if numbers is None:
            example = "448x256" if kind == "size" else "200-800"
            raise InvalidInputError(f"{setting.keyword}: got {value[:50]!r}, allowed is as {example}")
        return [int(each) for each in numbers.groups()]
    if kind in ("integer", "number") and isinstance(value, str):
        return number_of(value)
    return value


def number_of(text: str) -> int | float | str:
    """Return the number that a text holds; else the text, for the rule to refuse."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()
