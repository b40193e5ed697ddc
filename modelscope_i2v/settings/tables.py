"""The documents' tables of settings and keywords, made from the declarations.

``python -m modelscope_i2v.settings.tables README.md`` writes them between the document's markers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Iterable, Sequence

from .stages import SETTINGS_OF_STAGE, Setting, call_settings
from .training import TrainingSettings


def settings_table() -> str:
    """Return the table of what ``configuration.json`` may hold, architectures left out."""
    one, two = (settings() for settings in SETTINGS_OF_STAGE.values())
    rows = []
    for name, each in {**one.declared(), **two.declared()}.items():
        defaults = [_default(getattr(values, name)) for values in (one, two) if name in values.declared()]
        stage = _stage(name, one.declared(), two.declared())
        shown = "; ".join(dict.fromkeys(defaults)) if stage == "both" else f"{stage}: {defaults[0]}"
        key = f"`{name}` (or `Seed`)" if name == "seed" else f"`{name}`"
        rows.append((key, shown, f"{each.help} ({each.rule.allowed})"))
    return _table(("key", "default (stage one; stage two)", "meaning, and what is allowed"), rows)


def keywords_table() -> str:
    """Return the table of what a call may give, and its flags on the command line."""
    one, two = (call_settings(stage) for stage in SETTINGS_OF_STAGE)
    rows = []
    for name, each in {**one, **two}.items():
        flag = "" if each.rule.kind in ("function", "generator") else f"`--{each.flag}`"
        rows.append((f"`{each.keyword}`", _stage(name, one, two), flag, each.help))
    return _table(("keyword", "stage", "flag", "meaning"), rows)


def training_table() -> str:
    """Return the table of the settings of training, which are keywords and flags."""
    defaults = TrainingSettings()
    rows = [
        (f"`{name}`", f"`--{each.flag}`", _default(getattr(defaults, name)), each.help)
        for name, each in TrainingSettings.declared().items()
    ]
    return _table(("setting", "flag", "default", "meaning"), rows)


TABLES = {"settings": settings_table, "keywords": keywords_table, "training": training_table}


def with_tables(text: str) -> str:
    """Return a document with the tables between its markers, ``<!-- settings:begin -->`` and the like."""
    for name, table in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name}:begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        text = f"{before}{begin}{table()}{end}{after}" if end else text
    return text


def _stage(name: str, one: dict[str, Setting], two: dict[str, Setting]) -> str:
    """Return in words which stages have a setting."""
    return "both" if name in one and name in two else f"stage {'one' if name in one else 'two'}"


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
