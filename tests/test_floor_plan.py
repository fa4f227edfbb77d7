"""The two floors: chapters at the top level in reading order, the engine room in support/. Imports go upwards only."""

import ast
import re
from importlib import import_module

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")

CHAPTERS = [
    "norms",
    "positional",
    "attention",
    "moe",
    "transformer",
    "tokenizer_bpe",
    "data",
    "optim",
    "generate",
    "pretrain",
    "lora",
    "evaluate",
    "sft",
    "encoder",
    "reward_model",
    "dpo",
    "ppo",
    "grpo_plain",
    "grpo",
    "gdpo",
    "rejection",
    "distill",
    "agent",
    "ablate",
    "view",
]
ROOMS = sorted(f"support.{path.stem}" for path in (ROOT / "support").glob("[!_]*.py"))


def source(module):
    return ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imports(tree):
    """The modules of this repository that are imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "support":
            found |= {f"support.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & {*CHAPTERS, *ROOMS}


def chapters_below(module, above=()):
    """Every chapter that importing a module brings in, through the engine room too. A circle fails."""
    assert module not in above, f"a circle of imports: {' -> '.join([*above, module])}"
    found = set()
    for name in imports(source(module)):
        if name in CHAPTERS:
            found.add(name)
        else:
            found |= chapters_below(name, (*above, module))
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_imports_only_what_stands_before_it(chapter):
    later = CHAPTERS[CHAPTERS.index(chapter) :]
    assert not chapters_below(chapter) & set(later)


@pytest.mark.parametrize("module", [*CHAPTERS, *ROOMS])
def test_nothing_of_ours_is_imported_inside_a_function(module):
    functions = [node for node in ast.walk(source(module)) if isinstance(node, ast.FunctionDef)]
    assert not set().union(*map(imports, functions)), "an import that dodges the order is a wall in the wrong place"


def test_every_file_of_the_top_level_is_a_chapter_in_the_readme_and_installed():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == set(CHAPTERS)
    places = [README.index(f"| `{name}.py` |") for name in CHAPTERS]
    assert places == sorted(places)
    installed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{name}"' in installed for name in CHAPTERS)


def test_no_chapter_is_longer_than_the_readme_says():
    (longest,) = re.findall(r"in at most (\d+) lines each", README)
    for name in CHAPTERS:
        n_lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").count("\n")
        assert n_lines <= int(longest), f"{name}.py has {n_lines} lines"


NAMES = """
transformer: TransformerConfig Transformer token_logprobs masked_mean
tokenizer_bpe: BPETokenizer load_tokenizer
generate: generate
reward_model: bradley_terry_loss
dpo: dpo_loss kto_loss orpo_loss
ppo: gae ppo_policy_loss value_loss
grpo: group_advantages grpo_loss ALGORITHMS extract_answer
gdpo: gdpo_advantages
distill: distill_loss
agent: calculator
moe: MoE load_balancing_loss
lora: add_lora merge_lora
optim: AdamW Muon lr_at
evaluate: extract_answer same_answer pass_at_k wilson mcnemar token_f1
"""


@pytest.mark.parametrize("line", NAMES.strip().splitlines())
def test_the_names_that_others_may_rely_on(line):
    module, _, names = line.partition(": ")
    for name in names.split():
        assert hasattr(import_module(module), name), name


@pytest.mark.parametrize(("file", "line", "code"), re.findall(r"`([\w/]+\.py):(\d+)` `(.+?)`", README))
def test_the_readme_points_at_the_line_that_it_quotes(file, line, code):
    lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
    where = [i for i, text in enumerate(lines, 1) if code in text]
    assert int(line) in where, f"README says {file}:{line}; it stands in line {where}"


def test_the_readme_answers_with_a_line_of_code():
    answers = README.partition("## Questions")[2].partition("\n## ")[0]
    quoted = re.findall(r"`([\w/]+\.py):(\d+)` `(.+?)`", answers)  # by this the test above finds its lines, if any
    assert len(quoted) == len(re.findall(r"^\| .*\? \|", answers, re.M)) >= 8


def opens_text_by_locale(call):
    """Whether a call opens, reads or writes a file as text without naming the encoding."""
    words = {word.arg for word in call.keywords}
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute) and not words & {"encoding", None}
    binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value)[:3] for arg in call.args[:2])
    other = ast.unparse(call.func) in ("os.open", "Image.open")
    return name == "open" and "encoding" not in words and not binary and not other


@pytest.mark.parametrize("folder", [".", "support", "benchmarks", "tests"])
def test_text_files_are_utf8_whatever_the_locale(folder):
    for path in sorted((ROOT / folder).glob("*.py")):
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        lines = [call.lineno for call in calls if opens_text_by_locale(call)]
        assert not lines, f"{path} opens a text file without an encoding in lines {lines}"


def test_what_is_written_as_json_has_null_for_nan():
    """support.files.to_json; json.dumps would write NaN, which is no JSON."""
    files = [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")]
    calls = {path.name: path.read_text(encoding="utf-8").count("json.dump") for path in files}
    assert {name: n for name, n in calls.items() if n} == {"files.py": 2, "tokenizer_files.py": 1}  # a Jinja string
