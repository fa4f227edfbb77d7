"""support/checks.py: the declarations of a Config are read in one place, parents and lists included."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import pytest

from support.checks import Amount, Count, Fraction, FractionBelow1, Positive, Range, Seed, Whole, check
from support.errors import CheckpointError, ConfigError


@dataclass
class Parent:
    steps: Count = 5
    seed: Seed = 0
    lr: Amount = 0.1


@dataclass
class Child(Parent):
    lr: Amount = 0.2
    kind: Literal["a", "b", "c"] = "a"
    few: Count | None = None
    rates: list[Positive] = field(default_factory=list)
    keep: Whole = 0
    share: Fraction = 1.0
    dropout: FractionBelow1 = 0.0
    bounded: Annotated[int, Range(int, 2, 4, below=False)] = 2
    free: str = "anything"
    weight: float = -1.0
    margin: float | None = None

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"steps": 1.5}, "--steps is 1.5; it must be a whole number, at least 1"),
        ({"lr": -1e-3}, "--lr is -0.001; it must be at least 0"),
        ({"lr": math.nan}, "--lr is nan; it must be at least 0"),
        ({"lr": math.inf}, "--lr is inf; it must be at least 0"),
        ({"lr": "x"}, "--lr is 'x'; it must be a number, at least 0"),
        ({"seed": 2**32}, "--seed is 4294967296; it must be at least 0 and below 4294967296, which is 2^32"),
        ({"kind": "d"}, "--kind 'd' is not known; use a, b or c"),
        ({"few": 0}, "--few is 0; it must be at least 1"),
        ({"rates": [1.0, 0.0]}, "--rates is 0.0; it must be above 0"),
        ({"keep": -1}, "--keep is -1; it must be at least 0"),
        ({"share": 1.01}, "--share is 1.01; it must be at least 0 and at most 1"),
        ({"dropout": 1}, "--dropout is 1; it must be at least 0 and below 1"),
        ({"bounded": 5}, "--bounded is 5; it must be at least 2 and at most 4"),
        ({"weight": math.nan}, "--weight is nan; it must be a finite number"),
        ({"margin": -math.inf}, "--margin is -inf; it must be a finite number"),
    ],
)
def test_what_is_refused_and_how(changes, said):
    with pytest.raises(ConfigError) as error:
        Child(**changes)
    assert str(error.value) == said


def test_what_is_allowed():
    config = Child(steps=1, lr=0, few=3, rates=[0.5], share=0, seed=2**32 - 1, bounded=4, kind="c")
    assert replace(config, few=None).few is None
    with pytest.raises(CheckpointError, match="steps is -1"):
        check(Parent(steps=-1), CheckpointError, dashes="")
