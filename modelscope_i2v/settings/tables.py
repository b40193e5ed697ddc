"""The README's tables of settings and keywords, made from the declarations.

``python -m modelscope_i2v.settings.tables README.md`` writes them between the README's markers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Iterable, Sequence

from .stages import IMAGE_TO_VIDEO, SETTINGS_OF_STAGE, VIDEO_TO_VIDEO, Setting, call_settings

_STAGE_WORDS = {IMAGE_TO_VIDEO: "stage one", VIDEO_TO_VIDEO: "stage two"}


def settings_table() -> str:
    """Return the table of what ``configuration.json`` may hold, architectures left out."""
    defaults = {stage: settings() for stage, settings in SETTINGS_OF_STAGE.items()}
    declared = {name: each for values in defaults.values() for name, each in values.declared().items()}
    rows = []
    for name, each in declared.items():
        key = f"`{name}` (or `Seed`)" if name == "seed" else f"`{name}`"
        shown = {
            s: _default(getattr(values, name)) for s, values in defaults.items() if name in values.names()
        }
        if len(shown) == 1:
            [(stage, default)] = shown.items()
            shown = {stage: f"{_STAGE_WORDS[stage]}: {default}"}
        rows.append((key, "; ".join(dict.fromkeys(shown.values())), f"{each.help} ({each.rule.allowed})"))
    return _table(("key", "default (stage one; stage two)", "meaning, and what is allowed"), rows)


def keywords_table() -> str:
    """Return the table of what a call may give, and its flags on the command line."""
    stages: dict[str, list[str]] = {}
    declared: dict[str, Setting] = {}
    for stage in SETTINGS_OF_STAGE:
        for each in call_settings(stage).values():
            stages.setdefault(each.keyword, []).append(_STAGE_WORDS[stage])
            declared[each.keyword] = each
    rows = []
    for keyword, each in declared.items():
        of_stage = "both" if len(stages[keyword]) > 1 else stages[keyword][0]
        flag = "" if each.rule.kind in ("function", "generator") else f"`--{each.flag}`"
        rows.append((f"`{keyword}`", of_stage, flag, each.help))
    return _table(("keyword", "stage", "flag", "meaning"), rows)


TABLES = {"settings": settings_table, "keywords": keywords_table}


def with_tables(text: str) -> str:
    """Return a document with the tables between its markers, ``<!-- settings:begin -->`` and the like."""
    for name, table in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name}:begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        text = f"{before}{begin}{table()}{end}{after}" if end else text
    return text


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and len(value) > 60:
        return "the published one"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
