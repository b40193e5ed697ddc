"""Rules for values that users give: what is allowed, as data, in words and as a check."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Iterable

from ..errors import describe


@dataclass(frozen=True)
class Rule:
    """What a value may be. It is data, so that a form or a flag can be made of it.

    Attributes:
        kind: a key of ``KINDS``, which has its words and its conversion.
        low, high: bounds of a number, and of each of a size or an interval.
        choices: the texts that a choice allows, and a boolean or an integer beside its own values.
        optional: whether None is allowed, too.
    """

    kind: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        words = KINDS[self.kind][0].format(self.low, self.high, ", ".join(self.choices))
        if self.kind == "boolean" and self.choices:
            words = f"true, false or {', '.join(self.choices)}"
        elif self.kind == "integer":
            words = " or ".join([words, *self.choices])
        return f"{words}, or none" if self.optional else words

    def check(self, name: str, value: Any, error_type: type[Exception]) -> Any:
        """Return the value in its proper type, or raise an ``error_type`` that says what is allowed."""
        if value is None and self.optional:
            return None
        try:
            return KINDS[self.kind][1](self, value)
        except Exception as error:  # a value of a foreign type may raise whatever it likes
            reason = f" ({error})" if isinstance(error, _NotAllowed) and error.args else ""
        raise error_type(f"{name}: got {describe(value)}, allowed is {self.allowed}{reason}")


class _NotAllowed(ValueError):
    """A value that a rule does not allow; its text, if any, says more than the rule's words do."""


def _require(condition: bool, *reason: str) -> None:
    if not condition:
        raise _NotAllowed(*reason)


def _number(rule: Rule, value: Any, kind: type = numbers.Real, proper: type = float) -> Any:
    _require(isinstance(value, kind) and not isinstance(value, bool))
    _require(bool(rule.low <= value <= rule.high))  # which NaN is not
    return proper(value)


def _integer(rule: Rule, value: Any) -> Any:
    if isinstance(value, str) and value in rule.choices:
        return value
    return _number(rule, value, numbers.Integral, int)


def _text(rule: Rule, value: Any) -> str:
    _require(isinstance(value, str))
    # No file could be named so, and no video's metadata hold it: refused now, not after minutes of work.
    clean = "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
    _require(clean, "without null characters and halves of surrogate pairs")
    return value


def _name(rule: Rule, value: Any) -> str:
    _require(bool(_text(rule, value).strip()))
    return value


def _choice(rule: Rule, value: Any) -> str | bool:
    is_flag = rule.kind == "boolean" and isinstance(value, bool)
    _require(is_flag or (isinstance(value, str) and value in rule.choices))
    return value


def _pair(rule: Rule, value: Any) -> tuple[int, int]:
    _require(isinstance(value, (list, tuple)) and len(value) == 2)
    first, last = (_integer(rule, each) for each in value)
    _require(first <= last or rule.kind != "interval")
    return first, last


def _paths(rule: Rule, value: Any) -> str | tuple[str, ...]:
    several = isinstance(value, (list, tuple))
    return tuple(_name(rule, os.fspath(each)) for each in value) if several else _name(rule, os.fspath(value))


def _numbers(rule: Rule, value: Any) -> float | tuple[float, ...]:
    several = isinstance(value, (list, tuple))
    return tuple(_number(rule, each) for each in value) if several else _number(rule, value)


def _function(rule: Rule, value: Any) -> Callable:
    _require(callable(value))
    return value


def _generator(rule: Rule, value: Any) -> Any:
    import torch  # there already, if the value is one

    _require(isinstance(value, torch.Generator))
    return value


#: By kind: what is allowed in words, of the bounds and the choices, and the conversion to the proper type.
KINDS: dict[str, tuple[str, Callable[[Rule, Any], Any]]] = {
    "integer": ("a whole number from {0} to {1}", _integer),
    "number": ("a number from {0} to {1}", _number),
    "text": ("a text", _text),
    "name": ("a text that is not empty", _name),
    "choice": ("one of {2}", _choice),
    "boolean": ("true or false", _choice),
    "size": ("[width, height], each a whole number from {0} to {1}", _pair),
    "interval": ("[first, last], each a whole number from {0} to {1}, in order", _pair),
    "paths": ("a path, or a list of paths", _paths),
    "numbers": ("a number from {0} to {1}, or a list of such", _numbers),
    "function": ("a function", _function),
    "generator": ("a torch.Generator", _generator),
}

number = partial(Rule, "number")
size = partial(Rule, "size")
interval = partial(Rule, "interval")


def integer(low: int, high: int, *other: str) -> Rule:
    """A whole number, or one of the other names."""
    return Rule("integer", low, high, other)


def choice(*names: str) -> Rule:
    """One of the names."""
    return Rule("choice", choices=names)


def boolean(*other: str) -> Rule:
    """True or false, or one of the other names."""
    return Rule("boolean", choices=other)


def text(non_empty: bool = False) -> Rule:
    """A text, or one with something in it."""
    return Rule("name" if non_empty else "text")


def optional(rule: Rule) -> Rule:
    """The same, or None."""
    return replace(rule, optional=True)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of its entries, for ``json.loads``; a key that it has twice is a ValueError."""
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the key {describe(key)} stands twice in one object")
        entries[key] = value
    return entries


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """Return the known name that an unknown one resembles, if it does."""
    import difflib  # which takes a while, and is for slips only

    by_lower_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(str(name)[:100].lower(), by_lower_case, n=1, cutoff=0.7)
    return by_lower_case[near[0]] if near else None


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return a hint at the known name nearest to an unknown one, and all of them."""
    known = sorted(known)
    near, names = nearest(name, known), ", ".join(known)
    return f"; known are {names}" if near is None else f"; did you mean {near!r}? Known are {names}"
