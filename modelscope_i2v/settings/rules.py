"""Rules for values that users give: what is allowed, in words and as a check."""

from __future__ import annotations

import difflib
import numbers
from dataclasses import dataclass
from typing import Any, Callable, Iterable

from ..errors import describe


@dataclass(frozen=True)
class Rule:
    """What a value may be.

    ``convert`` returns the value in its proper type, or raises TypeError or ValueError if it is not allowed.
    """

    allowed: str
    convert: Callable[[Any], Any]

    def check(self, name: str, value: Any, error_type: type[Exception]) -> Any:
        """The converted value, or an ``error_type`` that names it, and says what is allowed."""
        try:
            return self.convert(value)
        except Exception as error:  # a foreign value's methods raise whatever they like
            reason = f" ({error})" if type(error) in (TypeError, ValueError) and str(error) else ""
            raise error_type(f"{name}: got {describe(value)}, allowed is {self.allowed}{reason}") from None


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def integer(low: int, high: int) -> Rule:
    def convert(value: Any) -> int:
        _require(isinstance(value, numbers.Integral) and not isinstance(value, bool))
        _require(low <= value <= high)
        return int(value)

    return Rule(f"a whole number from {low} to {high}", convert)


def number(low: float, high: float) -> Rule:
    def convert(value: Any) -> float:
        _require(isinstance(value, numbers.Real) and not isinstance(value, bool))
        _require(low <= value <= high)  # which NaN is not
        return float(value)

    return Rule(f"a number from {low} to {high}", convert)


def choice(*names: str) -> Rule:
    def convert(value: Any) -> str:
        _require(isinstance(value, str) and value in names)
        return value

    return Rule("one of " + ", ".join(names), convert)


def text(non_empty: bool = False) -> Rule:
    def convert(value: Any) -> str:
        _require(isinstance(value, str) and (bool(value.strip()) or not non_empty))
        # No file could be named so, and no video's metadata hold it: said now, not after minutes of work.
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("without null characters and halves of surrogate pairs")
        return value

    return Rule("a text that is not empty" if non_empty else "a text", convert)


def boolean() -> Rule:
    def convert(value: Any) -> bool:
        _require(isinstance(value, bool))
        return value

    return Rule("true or false", convert)


def boolean_or(name: str) -> Rule:
    def convert(value: Any) -> bool | str:
        _require(isinstance(value, bool) or (isinstance(value, str) and value == name))
        return value

    return Rule(f"true, false or {name}", convert)


def mapping() -> Rule:
    def convert(value: Any) -> dict:
        _require(isinstance(value, dict))
        return value

    return Rule("an object", convert)


def function() -> Rule:
    def convert(value: Any) -> Callable:
        _require(callable(value))
        return value

    return Rule("a function", convert)


def list_of(rule: Rule) -> Rule:
    def convert(value: Any) -> tuple:
        _require(isinstance(value, (list, tuple)) and len(value) > 0)
        return tuple(rule.convert(item) for item in value)

    return Rule(f"a list, each entry {rule.allowed}", convert)


def size(low: int, high: int) -> Rule:
    """[width, height] in pixels."""
    side = integer(low, high)

    def convert(value: Any) -> tuple[int, int]:
        _require(isinstance(value, (list, tuple)) and len(value) == 2)
        return side.convert(value[0]), side.convert(value[1])

    return Rule(f"[width, height], each {side.allowed}", convert)


def interval(low: int, high: int) -> Rule:
    """[first, last], in order."""
    end = integer(low, high)

    def convert(value: Any) -> tuple[int, int]:
        _require(isinstance(value, (list, tuple)) and len(value) == 2)
        first, last = end.convert(value[0]), end.convert(value[1])
        _require(first <= last)
        return first, last

    return Rule(f"[first, last], each {end.allowed}, in order", convert)


def optional(rule: Rule) -> Rule:
    if rule.allowed.endswith(", or none"):
        return rule
    return Rule(f"{rule.allowed}, or none", lambda value: None if value is None else rule.convert(value))


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """The known name that an unknown one resembles, if it does."""
    by_lower_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0.7)
    return by_lower_case[near[0]] if near else None


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A hint at the known name nearest to an unknown one, and all of them."""
    known = sorted(known)
    near, names = nearest(name, known), ", ".join(known)
    return f"; known are {names}" if near is None else f"; did you mean {near!r}? Known are {names}"
