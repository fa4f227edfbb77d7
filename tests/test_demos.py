"""Every chapter has a `demo()`: its idea worked by hand, asserted and printed. Here all of them run."""

from importlib import import_module

import pytest
from test_floor_plan import CHAPTERS

PENDING = set()  # chapters whose demo is still to be written; only shrinks


@pytest.mark.parametrize("chapter", [name for name in CHAPTERS if hasattr(import_module(name), "demo")])
def test_the_demo_prints_and_its_assertions_hold(chapter, capsys):
    import_module(chapter).demo()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2
    assert all(line.isprintable() for line in lines)


def test_every_chapter_has_a_demo():
    assert {name for name in CHAPTERS if not hasattr(import_module(name), "demo")} <= PENDING
