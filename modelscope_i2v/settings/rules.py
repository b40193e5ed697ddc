"""Rules for values that users give: what is allowed, as data, in words and as a check."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from typing import Any, Callable, Iterable

from ..errors import describe


class _NotAllowed(ValueError):
    """A value that a rule does not allow; its text, if any, says more than the rule's words do."""


@dataclass(frozen=True)
class Rule:
    """What a value may be. It is data, so that a form or a flag can be made of it.

    Attributes:
        kind: ``integer``, ``number``, ``text``, ``choice``, ``boolean``, ``size`` ([width, height]),
            ``interval`` ([first, last], in order), ``list``, ``object``, ``function`` or ``generator``.
        low, high: bounds of a number, and of each of a size, an interval or a list.
        choices: the texts that a choice allows, and a boolean beside true and false.
        optional: whether None is allowed, too.
        non_empty: whether a text must have something in it.
        item: the rule of each entry of a list.
    """

    kind: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    optional: bool = False
    non_empty: bool = False
    item: Rule | None = None

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        whole = f"a whole number from {self.low} to {self.high}"
        words = {
            "integer": whole,
            "number": f"a number from {self.low} to {self.high}",
            "text": "a text that is not empty" if self.non_empty else "a text",
            "choice": f"one of {', '.join(self.choices)}",
            "boolean": "true or false" if not self.choices else f"true, false or {', '.join(self.choices)}",
            "size": f"[width, height], each {whole}",
            "interval": f"[first, last], each {whole}, in order",
            "list": f"a list, each entry {self.item.allowed if self.item else ''}",
            "object": "an object",
            "function": "a function",
            "generator": "a torch.Generator",
        }[self.kind]
        return f"{words}, or none" if self.optional else words

    def convert(self, value: Any) -> Any:
        """Return the value in its proper type.

        Raises:
            Exception: any, from the value's own methods, or ours, if it is not allowed.
        """
        if value is None and self.optional:
            return None
        return _CONVERSIONS[self.kind](self, value)

    def check(self, name: str, value: Any, error_type: type[Exception]) -> Any:
        """Return the converted value, or raise an ``error_type`` that names it and what is allowed."""
        try:
            return self.convert(value)
        except Exception as error:  # a value of a foreign type may raise whatever it likes
            reason = f" ({error})" if isinstance(error, _NotAllowed) and error.args else ""
        raise error_type(f"{name}: got {describe(value)}, allowed is {self.allowed}{reason}")


def _require(condition: bool, *reason: str) -> None:
    if not condition:
        raise _NotAllowed(*reason)


def _integer(rule: Rule, value: Any) -> int:
    _require(isinstance(value, numbers.Integral) and not isinstance(value, bool))
    _require(rule.low <= value <= rule.high)
    return int(value)


def _number(rule: Rule, value: Any) -> float:
    _require(isinstance(value, numbers.Real) and not isinstance(value, bool))
    _require(bool(rule.low <= value <= rule.high))  # which NaN is not
    return float(value)


def _text(rule: Rule, value: Any) -> str:
    _require(isinstance(value, str) and (bool(value.strip()) or not rule.non_empty))
    # No file could be named so, and no video's metadata hold it: refused now, not after minutes of work.
    clean = "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
    _require(clean, "without null characters and halves of surrogate pairs")
    return value


def _choice(rule: Rule, value: Any) -> str:
    _require(isinstance(value, str) and value in rule.choices)
    return value


def _boolean(rule: Rule, value: Any) -> bool | str:
    _require(isinstance(value, bool) or (isinstance(value, str) and value in rule.choices))
    return value


def _pair(rule: Rule, value: Any) -> tuple[int, int]:
    _require(isinstance(value, (list, tuple)) and len(value) == 2)
    return _integer(rule, value[0]), _integer(rule, value[1])


def _interval(rule: Rule, value: Any) -> tuple[int, int]:
    first, last = _pair(rule, value)
    _require(first <= last)
    return first, last


def _list(rule: Rule, value: Any) -> tuple:
    _require(isinstance(value, (list, tuple)) and len(value) > 0)
    return tuple(rule.item.convert(entry) for entry in value) if rule.item else tuple(value)


def _object(rule: Rule, value: Any) -> dict:
    _require(isinstance(value, dict))
    return value


def _function(rule: Rule, value: Any) -> Callable:
    _require(callable(value))
    return value


def _generator(rule: Rule, value: Any) -> Any:
    import torch  # there already, if the value is one

    _require(isinstance(value, torch.Generator))
    return value


_CONVERSIONS: dict[str, Callable[[Rule, Any], Any]] = {
    "integer": _integer,
    "number": _number,
    "text": _text,
    "choice": _choice,
    "boolean": _boolean,
    "size": _pair,
    "interval": _interval,
    "list": _list,
    "object": _object,
    "function": _function,
    "generator": _generator,
}


def integer(low: int, high: int) -> Rule:
    return Rule("integer", low, high)


def number(low: float, high: float) -> Rule:
    return Rule("number", low, high)


def text(non_empty: bool = False) -> Rule:
    return Rule("text", non_empty=non_empty)


def choice(*names: str) -> Rule:
    return Rule("choice", choices=names)


def boolean(*other: str) -> Rule:
    """True or false, or one of the other names."""
    return Rule("boolean", choices=other)


def size(low: int, high: int) -> Rule:
    return Rule("size", low, high)


def interval(low: int, high: int) -> Rule:
    return Rule("interval", low, high)


def list_of(item: Rule) -> Rule:
    return Rule("list", item=item)


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
