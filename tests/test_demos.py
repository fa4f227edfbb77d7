"""Every chapter has a `demo()`: its idea worked by hand, asserted and printed. Here all of them run."""

import ast
import io
import sys
from importlib import import_module

import pytest
from test_floor_plan import CHAPTERS, source

import grpo
from support import output
from support.cli import run_script


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_demo_prints_and_its_assertions_hold(chapter, capsys):
    import_module(chapter).demo()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2
    assert all(line.isprintable() for line in lines)


def test_every_script_has_the_flag():
    """A chapter that calls run_script hands its demo over; view.py, whose parser is its own, adds the flag there."""
    for chapter in CHAPTERS:
        calls = [node for node in ast.walk(source(chapter)) if isinstance(node, ast.Call)]
        for call in (call for call in calls if ast.unparse(call.func) == "run_script"):
            handed = [*call.args[3:], *(word.value for word in call.keywords if word.arg == "demo")]
            own_parser = [word.value for word in call.keywords if word.arg == "parse"]
            assert own_parser or [ast.unparse(value) for value in handed] == ["demo"], chapter


class Closed(io.StringIO):
    """A pipe whose reader has ended."""

    def write(self, text):
        raise BrokenPipeError


def test_the_line_after_a_demo_ends_as_the_demo_does(monkeypatch):
    """`python evaluate.py | head` may stop reading between the two."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    monkeypatch.setattr(output, "RUNNING", [])
    with pytest.raises(SystemExit) as left:
        run_script(None, None, demo=lambda: monkeypatch.setattr(sys, "stdout", Closed()), without_flags="a hint")
    assert left.value.code == 141


def test_a_chapter_without_settings_refuses_flags(capsys, monkeypatch):
    """`python moe.py --n_expert 16` works no example of 16 experts."""
    monkeypatch.setattr(sys, "argv", ["moe.py", "--n_expert", "16"])
    with pytest.raises(SystemExit) as left:
        output.run_demo(lambda: pytest.fail("the example ran"))
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: moe.py works an example and has no settings: leave --n_expert out\n"


def test_demo_is_a_flag_that_runs_it_and_leaves(capsys, monkeypatch):
    """--demo works the example and exits with 0 before the stage starts; it is no setting of a run."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--demo"])
    with pytest.raises(SystemExit) as left:
        run_script(lambda config: pytest.fail("the stage ran"), grpo.Config, demo=lambda: print("by hand"))
    assert left.value.code in (0, None)
    assert capsys.readouterr().out == "by hand\n"
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--print_config"])
    with pytest.raises(SystemExit):
        run_script(lambda config: None, grpo.Config, demo=lambda: None)
    assert "demo" not in capsys.readouterr().out
