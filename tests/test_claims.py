"""support/claims.py: the page of the papers' claims, and the figures of README and of the results."""

import json
import shutil

import pytest

from support import claims
from support.ablation_report import HEADINGS
from support.claims import (
    CLAIMS,
    NO_FIGURE,
    Compared,
    figures_and_parts,
    figures_in,
    page,
    parts_of,
    seen_in,
    stands,
    unsupported,
)
from support.errors import ConfigError
from support.experiments import EXPERIMENTS


def test_every_figure_stands_on_its_page():
    assert unsupported() == []


def test_the_page_is_what_its_command_writes():
    assert (claims.ROOT / "results/claims.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("compared", [row.compared for row in CLAIMS if row.compared], ids=lambda c: c.experiment)
def test_what_is_compared_is_in_its_experiment(compared):
    experiment = EXPERIMENTS[compared.experiment]
    pairs = set(experiment.compared())
    assert (compared.a, compared.b) in pairs or (compared.b, compared.a) in pairs
    assert compared.metrics
    assert set(compared.metrics) <= set(experiment.columns) & set(HEADINGS)
    assert compared.expects in ("+", "-", "0")


def test_a_sentence_stands_only_where_there_are_no_figures(tmp_path):
    for row in CLAIMS:
        has_figures = row.compared and (claims.ROOT / f"results/{row.compared.experiment}.json").exists()
        assert not (row.seen and has_figures), row.claim
        assert row.seen or row.compared, row.claim
    assert "| compared by `python ablate.py ffn` |" in page(tmp_path)


@pytest.fixture
def copy(tmp_path):
    """The pages with all that they link to, in a directory of their own."""
    (tmp_path / "results").mkdir()
    for path in (claims.ROOT / "results").glob("*.md"):
        shutil.copy(path, tmp_path / "results")
    shutil.copy(claims.ROOT / "README.md", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "| a | gains 44.4 points ([kv](results/kv-heads.md)) |",
        "The gain is 0.003 to\n44.4 points ([kv](results/kv-heads.md)).",
        "* It gains 44.4 points ([kv](results/kv-heads.md)).",
        "As follows ([kv](results/kv-heads.md)):\n\n```\naccuracy    44.4%\n```",
    ],
)
def test_a_figure_that_is_on_no_page(copy, line):
    readme = copy / "README.md"
    before = readme.read_text(encoding="utf-8")
    readme.write_text(f"{before}\n\n{line}\n\nNo link: 44.4.\n", encoding="utf-8")
    [(name, number, figure, links)] = unsupported(copy)
    assert (name, figure, links) == ("README.md", "44.4", ["results/kv-heads.md"])
    assert number == before.count("\n") + 3


def test_a_row_without_a_link_is_checked_on_the_pages_of_the_paragraph_before_the_table(copy):
    readme = copy / "README.md"
    before = readme.read_text(encoding="utf-8")
    table = "As follows ([kv](results/kv-heads.md)):\n\n| a | b |\n|---|---:|\n| gain | 44.4 |\n"
    readme.write_text(f"{before}\n\n{table}", encoding="utf-8")
    assert [(figure, links) for _, _, figure, links in unsupported(copy)] == [("44.4", ["results/kv-heads.md"])]


@pytest.mark.parametrize(
    ("quoted", "wrong", "figure"),
    [
        ("story -2.7 ± 9.8", "story +2.7 ± 9.8", "+2.7 ± 9.8"),
        ("story -2.7 ± 9.8", "story -2.7 ± 6.6", "-2.7 ± 6.6"),
        ("story -2.7 ± 9.8", "story 2.7 ± 9.8", "2.7 ± 9.8"),
        (": +11.3 to +21.8 points", ": -11.3 to +21.8 points", "-11.3"),
        (": +11.3 to +21.8 points", ": +11.3 to -21.8 points", "-21.8"),
        ("GRPO +33.7 [30.7, 36.6]", "GRPO +25.4 [33.4, 39.0]", "+25.4 [33.4, 39.0]"),
        ("GRPO +33.7 [30.7, 36.6]", "GRPO +33.7 [-36.6, -30.7]", "+33.7 [-36.6, -30.7]"),
        ("GRPO +33.7 [30.7, 36.6]", "GRPO 30.7\n[+33.7, +36.6]", "30.7 [+33.7, +36.6]"),
        ("(95 % interval [+27.1, +32.9]", "(95 % interval [-32.9, -27.1]", "+30.1 [-32.9, -27.1]"),
        ("[56.8%, 62.9%]  [88.0%", "[88.0%, 62.9%]  [88.0%", "[88.0, 62.9]"),
    ],
)
def test_a_figure_with_another_sign_or_interval(copy, quoted, wrong, figure):
    readme = copy / "README.md"
    before = readme.read_text(encoding="utf-8")
    assert before.count(quoted) == 1
    readme.write_text(before.replace(quoted, wrong), encoding="utf-8")
    assert [missing[2] for missing in unsupported(copy)] == [figure]


def test_a_link_to_a_place_of_a_page_and_one_that_leads_nowhere(copy):
    page = copy / "README.md"
    before = page.read_text(encoding="utf-8")
    page.write_text(before + "\ngains 44.4 points ([kv](results/kv-heads.md#reading))\n", encoding="utf-8")
    assert [figure for _, _, figure, _ in unsupported(copy)] == ["44.4"]
    page.write_text(before + "\ngains 44.4 points ([kv](results/kv-headz.md))\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"README.md:\d+ links to results/kv-headz.md, which is not there"):
        unsupported(copy)


def test_a_page_that_changes_is_noticed(copy):
    """Each of its numbers becomes another one: README and the table of the results no longer stand."""
    result = copy / "results/grpo_word.md"
    text = result.read_text(encoding="utf-8")
    result.write_text("".join("7" if c in "0123456" else c for c in text), encoding="utf-8")
    assert len({line for name, line, *_ in unsupported(copy) if name == "README.md"}) >= 2
    assert any(name == "results/README.md" for name, *_ in unsupported(copy))


def test_figures():
    text = "-1,234.5 points [−0.1, +0.2] at level 2, seeds 0, pass@8, `lr 3e-4`, [7](results/8.md), [1706.03762], 5 %."
    assert figures_in(NO_FIGURE.sub(" ", text)) == ["-1234.5 [-0.1, +0.2]", "7", "5"]
    cells = "| **+0.12** | [0.11, 0.13] | 8 ± 2 % | by 3 nats at the\n  end (95 % interval [-1, +7])"
    assert figures_in(cells) == ["+0.12 [0.11, 0.13]", "8 ± 2", "3 [-1, +7]"]


@pytest.mark.parametrize(
    ("quoted", "on_page", "right"),
    [
        ("0.1", "0.12", True),
        ("12", "12", True),
        ("12", "-12", True),
        ("-12", "12", False),
        ("+12", "12", False),
        ("0.12", "0.1", False),
        ("0.1", "0.16", False),
        ("5 ± 1", "+5.2 ± 1.3", True),
        ("5 ± 1", "-5.2 ± 1.3", False),
        ("[5, 6]", "+5.5 [+5, +6]", True),
        ("[5, 6]", "5 and 6", False),
        ("5 and 6", "6 [5, 7]", True),
        ("5 lower [-1, 6]", "-5.1 [-6.2, +0.9]", True),
        ("5 lower [-6, 1]", "-5.1 [-6.2, +0.9]", False),
        ("-5 [-6, 1]", "-5.1 [-6.2, +0.9]", True),
        ("+5 [-1, 6]", "-5.1 [-6.2, +0.9]", False),
        ("[-6, -5]", "+5.5 [+5, +6]", False),
        ("[5, 6]", "-5.5 [-6, -5]", True),
        ("6e-3", "0.006", True),
        ("6e-3", "3 at 0.002", False),
    ],
)
def test_what_stands(quoted, on_page, right):
    on = figures_and_parts(on_page)
    assert all(stands(figure, on) for figure in figures_in(quoted)) == right


def test_parts():
    text = "one\ntwo\n\n* three\n* four\n  five\n\n```\nsix\n\nseven\n```\n| eight |\n| nine |\n"
    parts = [(part.line, part.text, part.block) for part in parts_of(text)]
    four = (5, "* four\n  five", "six\n\nseven\n")
    assert parts == [(1, "one\ntwo", ""), (4, "* three", ""), four, (13, "| eight |", ""), (14, "| nine |", "")]
    assert [(part.line, part.block) for part in parts_of("```\na\n```\nb")] == [(1, "a\n"), (4, "")]


@pytest.mark.parametrize(
    ("values", "compared", "words"),
    [
        # RMSNorm − LayerNorm, seed by seed
        ([0.1, 0.1, 0.1], ("RMSNorm", "LayerNorm", "+"), "yes (validation loss): RMSNorm against LayerNorm +0.100 "),
        (
            [-0.1, -0.11, -0.1],
            ("RMSNorm", "LayerNorm", "+"),
            "no, the reverse (validation loss): RMSNorm against LayerNorm -0.103 ",
        ),
        (
            [-0.1, -0.11, -0.1],
            ("RMSNorm", "LayerNorm", "-"),
            "yes (validation loss): RMSNorm against LayerNorm -0.103 ",
        ),
        (
            [-0.1, -0.11, -0.1],
            ("LayerNorm", "RMSNorm", "+"),
            "yes (validation loss): RMSNorm against LayerNorm -0.103 ",
        ),
        ([0.1, 0.11, 0.1], ("RMSNorm", "LayerNorm", "0"), "it differs (validation loss): "),
        ([0.1, -0.1, 0.0], ("RMSNorm", "LayerNorm", "0"), "not significantly different (validation loss): "),
        ([0.1, -0.1, 0.1], ("RMSNorm", "LayerNorm", "+"), "not significant (validation loss): "),
    ],
)
def test_what_the_figures_say(tmp_path, values, compared, words):
    runs = [["RMSNorm", seed, {"valid_loss": 1.5 + x}] for seed, x in enumerate(values)]
    runs += [["LayerNorm", seed, {"valid_loss": 1.5}] for seed in range(3)]
    (tmp_path / "norm-kind.json").write_text(json.dumps({"tuned": {}, "runs": runs}), encoding="utf-8")
    a, b, expects = compared
    seen = seen_in(Compared("norm-kind", a, b, ("valid_loss",), expects), tmp_path)
    assert seen.startswith(words)
    assert seen.endswith(" nats per character ([norm-kind](norm-kind.md))")
    assert seen in page(tmp_path) or (a, b, expects) != ("RMSNorm", "LayerNorm", "0")
    assert seen_in(Compared("ffn", "SwiGLU", "GELU", ("valid_loss",), "-"), tmp_path) is None


def test_what_diverged_or_was_not_tested_is_said(tmp_path):
    def seen(runs):
        (tmp_path / "norm-kind.json").write_text(json.dumps({"tuned": {}, "runs": runs}), encoding="utf-8")
        return seen_in(Compared("norm-kind", "RMSNorm", "LayerNorm", ("valid_loss",), "0"), tmp_path)

    both = [[v, seed, {"valid_loss": 1.5 + seed}] for v in ("RMSNorm", "LayerNorm") for seed in range(3)]
    both[1][2] = {"diverged": True}
    assert seen(both).startswith("no means to compare (validation loss): diverged: RMSNorm on 1 of 3 seeds (")
    assert seen([both[0], both[3]]).startswith("one seed, not tested (validation loss): ")
    with pytest.raises(ConfigError, match=r"norm-kind.json has no 'LayerNorm', .*: python ablate.py norm-kind"):
        seen(both[:3])


def test_what_the_figures_of_two_metrics_say_of_a_claim_that_is_not_tested_alone(tmp_path):
    runs = [["LayerNorm", seed, {"valid_loss": 1.5, "minutes": 2.0}] for seed in range(3)]
    runs += [["RMSNorm", seed, {"valid_loss": 1.4 + seed / 1000, "minutes": 3 + seed / 1000}] for seed in range(3)]
    (tmp_path / "norm-kind.json").write_text(json.dumps({"tuned": {}, "runs": runs}), encoding="utf-8")
    compared = Compared("norm-kind", "RMSNorm", "LayerNorm", ("valid_loss", "minutes"), "-", alone=False)
    seen = seen_in(compared, tmp_path)
    assert seen.startswith(
        "not tested alone; significant, as claimed (validation loss): RMSNorm against LayerNorm -0.09"
    )
    assert "; significant, the reverse (minutes): RMSNorm against LayerNorm +1.0" in seen
