"""support/code_used.py: which files a result depends on, and what of a file counts."""

import pytest

from support import code_used as module
from support.code_used import code_used, files_that_differ


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository of four files -> write(name, text)."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "support").mkdir()

    def write(name, text):
        module._read.cache_clear()
        (tmp_path / name).write_text(text, encoding="utf-8")

    write("stage.py", '"""A stage."""\nimport math\nfrom loss import loss_of\nfrom support import tools\n')
    write("loss.py", "def loss_of(x):\n    import support.deep\n    return x\n")
    write("support/tools.py", "import loss  # a circle\n")
    write("support/deep.py", "x = 1\n")
    write("other.py", "y = 2\n")
    yield write
    module._read.cache_clear()


def test_what_is_imported_counts_also_inside_a_function_and_nothing_else(house):
    assert list(code_used(["stage"])) == ["loss.py", "stage.py", "support/deep.py", "support/tools.py"]
    assert list(code_used(["other", "support.deep"])) == ["other.py", "support/deep.py"]
    assert code_used(["torch"]) == {}


@pytest.mark.parametrize(
    ("text", "differs"),
    [
        ('"""Other words."""\n\nimport math  # why\nfrom loss import loss_of\n\nfrom support import tools\n', []),
        ('"""A stage."""\nimport math\nfrom loss import loss_of as f\nfrom support import tools\n', ["stage.py"]),
        ("from loss import loss_of\n", ["stage.py", "support/tools.py"]),  # which nothing imports any more
    ],
)
def test_statements_count_and_words_do_not(house, text, differs):
    before = code_used(["stage"])
    house("stage.py", text)
    assert files_that_differ(before, code_used(["stage"])) == differs


def test_a_change_far_below_is_seen_and_a_docstring_there_is_not(house):
    before = code_used(["stage"])
    house("loss.py", 'def loss_of(x):\n    """The loss."""\n    import support.deep\n    return x\n')
    assert files_that_differ(before, code_used(["stage"])) == []
    house("support/deep.py", "x = 2\n")
    assert files_that_differ(before, code_used(["stage"])) == ["support/deep.py"]


def test_a_stage_of_this_repository_depends_on_its_model_and_not_on_a_later_stage():
    files = code_used(["grpo"])
    assert {"grpo.py", "transformer.py", "attention.py", "optim.py", "support/rollouts.py"} <= set(files)
    assert not {"agent.py", "ablate.py", "distill.py"} & set(files)
