"""What messages show of a user's values: no secret, and something for every value."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelscope_i2v.errors import ConfigurationError, MissingFileError, describe, redact
from modelscope_i2v.settings.keywords import keywords_of
from modelscope_i2v.settings.stages import SETTINGS_OF_STAGE
from modelscope_i2v.weights import find_checkpoint

URL = "https://us3r:passw0rd@host:8/a/b.png"


@pytest.mark.parametrize(
    "value, shown",
    [
        ("https://u:p@host:8/a/b.png?k=v#f", "https://host:8/a/b.png"),
        ("http://host/a", "http://host/a"),
        ("data:image/png;base64,AAAA", "data:..."),
        ("https://u:p/p@host/a", "https://...@host/a"),
        ("https://u:p?p@host/a", "https://..."),
        ("https://host/a?mail=m@x&sig=s", "https://..."),
        ("https://u:p\n p@host/a", "https://host/a"),
        (f" \n'{URL}'", " \n'https://host:8/a/b.png'"),
        (str(Path(URL)), "https:/host:8/a/b.png"),
        (str(Path(URL).absolute()), f"{Path.cwd()}/https:/host:8/a/b.png"),
        (f"https://first/x, then {URL}", "https://...@host:8/a/b.png"),
        ("C:/a?b@c.png", "C:/a?b@c.png"),
        ("concat:a|b@c", "concat:a|b@c"),
    ],
)
def test_redact(value, shown):
    assert redact(value) == shown


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value, shown",
    [
        (URL, "'https://host:8/a/b.png'"),
        ({"a": Path(URL)}, "{'a': PosixPath('https:/host:8/a/b.png')}"),
        ("x" * 200, "'" + "x" * 96 + "..."),
        ("x" * 1_000_000 + "://u:p@h", "'" + "x" * 96 + "..."),
        (10**5000, "a value of type int"),
        ([Unshowable()], "a value of type list"),
    ],
    ids=lambda value: "value",
)
def test_describe(value, shown):
    # An int's digits are limited since Python 3.11 (and its security releases before).
    assert describe(value) in (shown, "1" + "0" * 96 + "...")


class Hostile(int):
    def __le__(self, other):
        raise RuntimeError("no")

    __ge__ = __lt__ = __gt__ = __repr__ = __le__


RULES = {name: each.rule for stage in SETTINGS_OF_STAGE for name, each in keywords_of(stage).items()}


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize(
    "value", [10**5000, Hostile(3), [Unshowable()], URL.encode()], ids=lambda value: type(value).__name__
)
def test_a_rule_refuses_any_value_in_words(rule, value):
    with pytest.raises(ConfigurationError, match="^steps: got .*, allowed is ") as caught:
        rule.check("steps", value, ConfigurationError)
    assert "passw0rd" not in str(caught.value)


def test_a_url_for_a_weights_file_shows_no_secret(tmp_path):
    with pytest.raises(MissingFileError, match="no weights file 'b.png' in '.*/https:/host:8/a'") as caught:
        find_checkpoint(tmp_path, f"{URL}?sig=s3cret")
    assert "s3cret" not in str(caught.value)
