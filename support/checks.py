"""Allowed values of settings, declared as the types of a dataclass's fields and checked in one place.

    steps: Count = 500                                   a whole number of at least 1
    beta: Amount = 0.04                                  a finite number of at least 0
    ratio: Literal["token", "sequence"] = "token"        one of these

`check(config)` raises an error of one line on the first field whose value its type does not allow.
"""

import math
import types
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from support.errors import ConfigError


@dataclass(frozen=True, repr=False)
class Range:
    """The numbers from low to high; `above` excludes low, `below` excludes high."""

    kind: type
    low: float
    high: float = math.inf
    above: bool = False
    below: bool = True

    def __repr__(self):  # --help shows it
        text = f"above {self.low}" if self.above else f"at least {self.low}"
        if self.high < math.inf:
            high = f"{self.high:g}" if self.high < 1e9 else f"{self.high}, which is 2^{math.log2(self.high):.0f}"
            text += f" and below {high}" if self.below else f" and at most {high}"
        return text

    def error(self, value):
        """What is wrong with the value, or None."""
        if self.kind is int and not isinstance(value, int):
            return f"is {value!r}; it must be a whole number, {self}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"is {value!r}; it must be a number, {self}"
        high_enough = value > self.low if self.above else value >= self.low
        low_enough = value < self.high if self.below else value <= self.high
        return None if high_enough and low_enough else f"is {value}; it must be {self}"  # NaN and inf fail too


Count = Annotated[int, Range(int, 1)]  # 1, 2, …
Whole = Annotated[int, Range(int, 0)]  # 0, 1, 2, …
Seed = Annotated[int, Range(int, 0, 2**32)]  # valid in numpy and in torch
Amount = Annotated[float, Range(float, 0)]  # 0 or more
Positive = Annotated[float, Range(float, 0, above=True)]  # more than 0
Fraction = Annotated[float, Range(float, 0, 1, below=False)]  # 0 … 1, both included
FractionBelow1 = Annotated[float, Range(float, 0, 1)]  # 0 included, 1 not


@cache
def declared(cls):
    """{field: its type}, including inherited fields."""
    return get_type_hints(cls, include_extras=True)


def type_error(hint, value):
    """What is wrong with a value of this type, or None."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):  # X | None
        return None if value is None else type_error(next(part for part in parts if part is not type(None)), value)
    if kind is Literal:
        return None if value in parts else f"{value!r} is not known; use {listed(parts)}"
    if kind is Annotated:
        return next((error for part in parts[1:] if isinstance(part, Range) and (error := part.error(value))), None)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; it must be a finite number"
    if kind is list:
        return next((error for item in value if (error := type_error(parts[0], item))), None)
    return None


def listed(words):
    """("a", "b", "c") -> "a, b or c"."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def choice(flag, name, table):
    """table[name], or an error of one line that lists what the flag may be."""
    if name not in table:
        raise ConfigError(f"--{flag} {name!r} is not known; use {listed(table)}")
    return table[name]


def check(config, error=ConfigError, dashes="--"):
    """Raise `error`, one line, on the first field whose value its type does not allow."""
    for name, hint in declared(type(config)).items():
        if problem := type_error(hint, getattr(config, name)):
            raise error(f"{dashes}{name} {problem}")


def only_declared(config, any_value, required):
    """Whether each field of a config is in `any_value`, or in `required` with the value given there. Code that supports
    only some configs declares what it supports, field by field. A field that it does not know makes this False,
    whatever its value, because the field may change anything."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return all(name in any_value or (name in required and required[name] == v) for name, v in values.items())
