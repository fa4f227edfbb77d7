"""What a setting may be, declared where the field stands and read in one place.

    steps: Count = 500                                   a whole number of at least 1
    beta: Amount = 0.04                                  a finite number of at least 0
    ratio: Literal["token", "sequence"] = "token"        one of these

`check(config)` reads the declarations of a dataclass and refuses the first value that breaks one, in one line.
"""

import math
import types
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from support.errors import ConfigError


@dataclass(frozen=True, repr=False)
class Range:
    """The numbers from low to high; `above`: without low itself, `below`: without high itself."""

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

    def refuses(self, value):
        """What is wrong with the value, or None."""
        if self.kind is int and not isinstance(value, int):
            return f"is {value!r}; it must be a whole number, {self}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"is {value!r}; it must be a number, {self}"
        high_enough = value > self.low if self.above else value >= self.low
        low_enough = value < self.high if self.below else value <= self.high
        return None if high_enough and low_enough else f"is {value}; it must be {self}"  # NaN is refused, and inf


Count = Annotated[int, Range(int, 1)]
Whole = Annotated[int, Range(int, 0)]
Seed = Annotated[int, Range(int, 0, 2**32)]  # what numpy and torch both take
Amount = Annotated[float, Range(float, 0)]
Positive = Annotated[float, Range(float, 0, above=True)]
Fraction = Annotated[float, Range(float, 0, 1, below=False)]  # all of it is a share too
FractionBelow1 = Annotated[float, Range(float, 0, 1)]  # never all of it


@cache
def declared(cls):
    """{field: its type}, of the parents too."""
    return get_type_hints(cls, include_extras=True)


def refusal(hint, value):
    """What is wrong with a value of this type, or None."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):  # X | None
        return None if value is None else refusal(next(part for part in parts if part is not type(None)), value)
    if kind is Literal:
        return None if value in parts else f"{value!r} is not known; use {listed(parts)}"
    if kind is Annotated:
        return next((said for r in parts[1:] if isinstance(r, Range) and (said := r.refuses(value))), None)
    if kind is list:
        return next((said for item in value if (said := refusal(parts[0], item))), None)
    return None


def listed(words):
    """("a", "b", "c") -> "a, b or c"."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def check(config, error=ConfigError, dashes="--"):
    """Raise `error`, one line, on the first field whose value its declaration does not allow."""
    for name, hint in declared(type(config)).items():
        if said := refusal(hint, getattr(config, name)):
            raise error(f"{dashes}{name} {said}")


def only_declared(config, any_value, required):
    """Whether every field of a config is declared: a name in `any_value`, or in `required` and of the value there. So
    code that computes a part of what a config can say opts in, field by field; one that it has never heard of may
    change anything, whatever its value."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return all(name in any_value or (name in required and required[name] == v) for name, v in values.items())
