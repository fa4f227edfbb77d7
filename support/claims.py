"""What the papers claim and what is seen here, from the figures of the pages; and whether each figure stands on a page.

`python -m support.claims` writes results/claims.md: a line for each row of CLAIMS. A row that names a comparison of an
experiment is computed from results/NAME.json, which `ablate.py NAME` writes beside its page. The others say in a
sentence what a test, a demo or a page shows.

`unsupported` reads README.md, results/README.md and results/claims.md: wherever a paragraph, a list item or a row of a
table links to pages of results/, its figures must stand on one of them, with their signs and intervals, as they are or
with more digits; those of a fenced block, and of a row without a link, on the pages of the paragraph before. A test
runs it.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ablate import differences_of, intervals_of
from support.ablation_report import HEADINGS, read_figures, signed
from support.cli import run_script
from support.errors import ConfigError
from support.experiments import EXPERIMENTS
from support.files import must_write, write_whole

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "results/README.md", "results/claims.md")


class Compared(NamedTuple):
    """A variant of an experiment against another, in some metrics. expects: what the paper says of the difference, "+",
    "-" or "0". alone: False if the two differ in more than what is claimed."""

    experiment: str
    a: str
    b: str
    metrics: tuple
    expects: str
    alone: bool = True


class Claim(NamedTuple):
    """seen: a sentence, with its link; none where `compared` has its figures in results/."""

    claim: str
    paper: str
    code: str
    seen: str = ""
    compared: Compared | None = None


CLAIMS = [
    Claim("√D keeps the softmax out of saturation", "[1706.03762] §3.2.1", "attention.naive_attention",
          "by hand, `python attention.py`"),
    Claim("RMSNorm does as well as LayerNorm", "[1910.07467]", "norms.RMSNorm",
          compared=Compared("norm-kind", "RMSNorm", "LayerNorm", ("valid_loss",), "0")),
    Claim("post-norm needs a warm-up", "[2002.04745]", "norms.place",
          compared=Compared("norm-placement", "post, no warm-up", "post, warm-up", ("valid_loss",), "+")),
    Claim("rotated scores depend on the distance alone", "[2104.09864] Eq. 11", "positional.apply_rope",
          "yes, `test_positional.py`"),
    Claim("YaRN reads past the trained length", "[2309.00071]", "positional.rope_frequencies",
          "yes, after 40 steps at 4 times the length; one seed ([page](benchmarks.md))"),
    Claim("grouped queries cost little", "[2305.13245]", "attention.Attention",
          compared=Compared("kv-heads", "grouped, 2 of 4", "multi-head, 4 of 4", ("valid_loss",), "0")),
    Claim("sink tokens keep a window stable", "[2309.17453]", "attention.RollingKVCache",
          "yes, 1,024 tokens ([benchmarks](benchmarks.md))"),
    Claim("SwiGLU beats GELU", "[2002.05202]", "transformer.py",
          compared=Compared("ffn", "SwiGLU", "GELU", ("valid_loss",), "-")),
    Claim("balancing experts by a bias costs no loss", "[2408.15664]", "moe.update_biases",
          compared=Compared("moe", "8 experts, bias", "8 experts, none", ("valid_loss",), "0")),
    Claim("clipping prevents blow-ups", "[1211.5063]", "optim.optimizer_step",
          compared=Compared("grad-clip", "clip off, lr 0.02", "clip 1.0, lr 0.02", ("valid_loss",), "+")),
    Claim("LoRA merges exactly", "[2106.09685] §4.1", "lora.merge_lora", "yes, `test_lora.py`"),
    Claim("easy examples first help", "[Bengio 2009]", "sft.pacing",
          compared=Compared("curriculum", "curriculum", "shuffled", ("accuracy",), "+")),
    Claim("a policy is its own reward model", "[2305.18290] Eq. 7", "dpo.dpo_loss",
          "as a reward, yes: without the NLL term it orders 82.9 to 89.5 % of held-out pairs rightly; as a policy "
          "no gain seen: after 150 steps 9.1 points below the start [-3.5, +21.7], not significant ([dpo](dpo.md))"),
    Claim("learned rewards get over-optimised", "[2210.10760]", "best_of_n",
          "600 steps, five seeds: not significant, best of 64 less best of 8 -0.8 points [-6.3, +4.7] "
          "([ladder](ladder.md)); older runs of 300 steps: yes, by 11.4 points, uncorrected, and n = 8 was taken "
          "after seeing the curves † ([page](reward_model.md))"),
    Claim("an LM loss helps a reward model", "[2406.10216]", "RewardModel.read",
          "part of the recipe, not tested alone"),
    Claim("a group's mean replaces the critic", "[2402.03300]", "grpo.group_advantages",
          "it learns without one, +27.6 points; not compared with one at equal settings ([grpo_word](grpo_word.md))"),
    Claim("a baseline beats none", "[2402.14740]", "grpo.group_advantages",
          compared=Compared("policy-gradients", "reinforce", "grpo", ("accuracy", "sampled"), "-", alone=False)),
    Claim("dividing by std and length biases GRPO", "[2503.20783]", "grpo.ALGORITHMS",
          compared=Compared("policy-gradients", "dr_grpo", "grpo", ("accuracy", "sampled"), "+", alone=False)),
    Claim("a ratio of the whole sequence is the better one", "[2507.18071]", "grpo.ALGORITHMS",
          compared=Compared("policy-gradients", "gspo", "grpo", ("accuracy", "sampled"), "+", alone=False)),
    Claim("clipped tokens should keep their gradient", "[2506.13585]", "grpo.ALGORITHMS",
          compared=Compared("policy-gradients", "cispo", "grpo", ("accuracy", "sampled"), "+", alone=False)),
    Claim("a sum of rewards collapses advantages", "[2601.05242] §2", "gdpo.collapse",
          compared=Compared("gdpo", "GRPO, sum", "GDPO", ("collapsed",), "+")),
    Claim("pay the easy reward where the hard is won", "[2601.05242] §3.2", "gdpo.condition",
          compared=Compared("gdpo", "GDPO, brevity if right", "GDPO", ("accuracy",), "+")),
    Claim("mask the tokens on which sampler and trainer disagree", "[2510.18855]", "support.off_policy.sampler_weights",
          compared=Compared("off-policy", "16 steps old, masked", "16 steps old, uncorrected", ("accuracy",), "+")),
    Claim("a student should meet its own mistakes", "[2306.13649]", "distill.distill_loss",
          compared=Compared("distill", "on-policy, forward KL", "off-policy, forward KL", ("accuracy",), "+")),
    Claim("what a tool writes must not be in the loss", "[2504.11536]", "agent.Calls",
          compared=Compared("tools", "tool, GRPO, its tokens in the loss", "tool, GRPO", ("accuracy",), "-")),
    Claim("RL sharpens more than it adds", "[2504.13837]", "evaluate.pass_at_k",
          "mixed: default task pass@1 +36.6, pass@16 +7.3 ± 9.4 where 5 to 13 were possible "
          "([grpo_word](grpo_word.md)); with a calculator pass@16 +23.0 ± 4.3, most problems that 16 samples never "
          "solved are solved after ([agent_word](agent_word.md)); a larger k was not measured"),
]  # fmt: skip


def seen_in(compared, results=ROOT / "results"):
    """What an experiment's figures say of a comparison, in a sentence with its link; None where there are none."""
    name, a, b, metrics, expects, alone = compared
    path = results / f"{name}.json"
    if not path.exists():
        return None
    runs = {(variant, seed): figures for variant, seed, figures in read_figures(path)["runs"]}
    seeds, experiment = sorted({seed for _, seed in runs}), EXPERIMENTS[name]
    if missing := [v for v in experiment.variants if (v, seeds[0]) not in runs]:
        raise ConfigError(f"{path} has no {missing[0]!r}, which the experiment has: python ablate.py {name}")
    differences = differences_of(experiment, runs, seeds)
    turned = (a, b) not in differences  # the page may have it the other way round
    first, second = (b, a) if turned else (a, b)
    means = intervals_of(experiment, runs, seeds)
    seen, words = [], ("yes", "no, the reverse") if alone else ("significant, as claimed", "significant, the reverse")
    for metric in metrics:
        difference = differences[first, second][metric]
        of_what, _, unit = HEADINGS[metric].rstrip(")").partition(" (")
        lost = {v: sum("diverged" in runs[v, seed] for seed in seeds) for v in (first, second)}
        if any(lost.values()):
            said = " and ".join(f"{v} on {n} of {len(seeds)} seeds" for v, n in lost.items() if n)
            seen.append(f"no means to compare ({of_what}): diverged: {said}")
            continue
        rises = (difference.mean > 0) != turned
        if len(seeds) == 1:
            verdict = "one seed, not tested"
        elif not difference.significant:
            verdict = "not significantly different" if expects == "0" else "not significant"
        elif expects == "0":
            verdict = "it differs"
        else:
            verdict = words[rises != (expects == "+")]
        of = means[first][metric].mean or means[second][metric].mean
        unit = {"%": "points", "": of_what}.get(unit, unit)
        by = signed(difference, of, metric).strip("*")
        seen.append(f"{verdict} ({of_what}): {first} against {second} {by} {unit}")
    return f"{'' if alone else 'not tested alone; '}{'; '.join(seen)} ([{name}]({name}.md))"


def page(results=ROOT / "results"):
    """The text of results/claims.md."""
    lines = [
        "# What the papers claim",
        "",
        "`python -m support.claims` writes this page from the figures of the experiments. *Yes*: seen here, and "
        "significant where there are several seeds. *Not tested alone*: a row of grpo.ALGORITHMS differs from grpo in "
        "several choices, the KL penalty and the learning rate among them, and is compared as a whole. Accuracy is of "
        "greedy answers. A verdict is after Holm's correction over a column's comparisons where the page "
        "has a .json, on the older pages uncorrected; an interval never is: one that leaves out 0 may be not "
        "significant. Small models on small problems: a claim that is not seen here may hold elsewhere. † and ‡: see "
        "[results](README.md).",
        "",
        "| claim | paper | code | here |",
        "|---|---|---|---|",
    ]
    for row in CLAIMS:
        seen = row.seen
        if row.compared:
            unmeasured = f"compared by `python ablate.py {row.compared.experiment}`"
            seen = seen_in(row.compared, results) or row.seen or unmeasured
        lines.append(f"| {row.claim} | {row.paper} | `{row.code}` | {seen} |")
    papers = dict.fromkeys(re.match(r"\[(.+?)\]", row.paper)[1] for row in CLAIMS)
    places = {"Bengio 2009": "https://doi.org/10.1145/1553374.1553380"}
    lines += ["", *(f"[{paper}]: {places.get(paper, f'https://arxiv.org/abs/{paper}')}" for paper in papers)]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------
# Does each figure stand on the page that it is taken from?

NUMBER = r"(?<![\w.,])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w]|[.,]\d)"
POWER = re.compile(r"(?<![\w.,])\d+(?:\.\d+)?e-\d+\b")  # 6e-3
UNIT = r"(?: ?%)?(?: [A-Za-z]+){0,4}"  # also "points higher"
MEAN = rf"({NUMBER}){UNIT}"
FIGURE = re.compile(rf"{MEAN} ± ({NUMBER})|(?:{MEAN} ?\(? ?)?\[({NUMBER})%?, ({NUMBER})%?\]|({NUMBER})")
LINK = re.compile(r"\]\(((?:results/)?[\w.-]+\.md)(?:#[\w-]+)?\)")
NO_FIGURE = re.compile(
    r"`[^`]*`|\]\([^)]*\)|\[(?:\d{4}\.\d{5}|\w+ \d{4})\]|§[\d.]+|Eq\. \d+|pass@\d+|[Ll]evel \d|[Ss]eeds? \d+"
)


@dataclass
class Part:
    """A paragraph, list item or table row, with the fenced block that follows it; of a row also what stands before the
    table."""

    line: int
    text: str
    block: str = ""
    before: str = ""


def parts_of(text):
    """The parts of a Markdown page."""
    parts, fenced, goes_on = [], False, False
    for number, line in enumerate(text.split("\n"), start=1):
        if line.startswith("```"):
            fenced, goes_on = not fenced, False
            parts = parts or [Part(number, "")]  # the page begins with it
        elif fenced:
            parts[-1].block += line + "\n"  # also after an empty line
        elif not line.strip():
            goes_on = False
        elif goes_on and not line.startswith(("|", "* ", "#")):
            parts[-1].text += "\n" + line
        else:
            before = ""
            if line.startswith("|") and parts:
                before = parts[-1].before if parts[-1].text.startswith("|") else parts[-1].text
            parts.append(Part(number, line, before=before))
            goes_on = True
    return parts


def figures_in(text):
    """The figures of a text, each written plainly: "x", "[low, high]", "mean [low, high]" or "mean ± x". Signs stay."""
    text = text.replace("−", "-").replace("‑", "-").replace("*", "").replace("95 % interval", "")
    text = re.sub(r"\n {0,2}(?=\S)", " ", text).replace(" | [", " [")  # over a line's end, and of two cells
    text = POWER.sub(lambda power: format(Decimal(power[0]), "f"), text)
    figures = []
    for numbers in FIGURE.findall(text):
        center, half, mean, low, high, x = (number.replace(",", "") for number in numbers)
        figures.append(x or (f"{center} ± {half}" if half else f"{mean} [{low}, {high}]".strip()))
    return figures


def figures_and_parts(text):
    """The figures of a text, the intervals without their means, and each number by itself."""
    figures = set(figures_in(text))
    intervals = {figure[figure.index("[") :] for figure in figures if "[" in figure}
    return figures | intervals | {x for figure in figures for x in parsed(figure)[1]}


@cache
def parsed(figure):
    """-> its form, such as "x [x, x]", and its numbers."""
    return re.sub(NUMBER, "x", figure), re.findall(NUMBER, figure)


def stands(figure, on):
    """Whether a figure is one of those, or one of them rounded. A sign in it must stand there. One whose first number
    has no sign may be the opposite: 0.12 [0.11, 0.13] lower is -0.12 [-0.13, -0.11]."""

    def near(x, other, sign=1):
        decimals = len(x.partition(".")[2])
        return float(f"{sign * float(other):.{decimals}f}") == float(x)

    def same(x, other):
        return near(x, other) and (x[0] not in "+-" or x[0] == other[0])

    def opposite(numbers, others):
        turned = (*others[:-2], *reversed(others[-2:]))  # (mean, high, low)
        return all(near(x, other, -1) for x, other in zip(numbers, turned, strict=True))

    form, numbers = parsed(figure)
    may_turn = numbers[0][0] not in "+-" and "±" not in form
    same_form = [others for kind, others in map(parsed, on) if kind == form]
    return any(all(map(same, numbers, others)) or (may_turn and opposite(numbers, others)) for others in same_form)


def links_of(text):
    """The pages of results/ that a text links to."""
    return [link for link in LINK.findall(text) if Path(link).name not in ("README.md", "claims.md")]


def unsupported(root=ROOT):
    """[(page, line, figure, the pages that it links to), …]: figures that do not stand on a linked page. ConfigError if
    such a page is not there."""
    missing = []
    for name in PAGES:
        folder = (root / name).parent
        for part in parts_of((root / name).read_text(encoding="utf-8")):
            links = links_of(part.text) or links_of(part.before)
            if lost := [link for link in links if not (folder / link).exists()]:
                raise ConfigError(f"{name}:{part.line} links to {lost[0]}, which is not there")
            texts = [(folder / link).read_text(encoding="utf-8") for link in links]
            known = set().union(*map(figures_and_parts, texts))
            for figure in figures_in(NO_FIGURE.sub(" ", f"{part.text}\n{part.block}")) if links else ():
                if not stands(figure, known):
                    missing.append((name, part.line, figure, links))
    return missing


@dataclass
class Config:
    """Write results/claims.md, and check that the figures of README and of the results stand on their pages."""


def main(config):
    """Raises ConfigError if a figure does not stand on a page."""
    target = ROOT / "results" / "claims.md"
    with must_write(target):
        write_whole(target, page())
    if missing := unsupported():
        lines = (f"{name}:{line}: {figure} is not on {', '.join(links)}" for name, line, figure, links in missing)
        raise ConfigError(f"{len(missing)} figures stand on no page that is linked beside them:\n" + "\n".join(lines))
    print(f"{target}: {len(CLAIMS)} claims; every figure stands on its page")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
