"""The table of controlled experiments that ablate.py runs: a question, what is held, and the variants.

A new experiment is a row of EXPERIMENTS: each variant names a stage and the flags that differ; `_pretrain`, `_grpo`,
`_dpo` and `_distill` add those that are held. A nested flag is a dictionary: --lora.rank 4 is {"lora": {"rank": 4}}.
Metrics in `columns` and `curves` get their labels in support/ablation_report.py; what a stage does not return, a
function of support/probes.py measures. (As that file is then another, saved runs with a probe need --old_code true.)
Try a row with --quick true: a few steps, the probe, the page. In seven lines:

    "tying": Experiment(
        "What does it cost to read out with the embedding matrix?",
        _chars(),
        {"tied": _pretrain(), "untied": _pretrain(tie_embeddings=False)},
        ("valid_loss", "parameters"),
        ("loss",),
    ),
"""

from dataclasses import dataclass, fields, replace

from grpo import ALGORITHMS
from support import probes
from support.ablation_report import CURVES, HEADINGS
from support.copy_lines import MOST_DOTS, copy_file
from support.errors import ConfigError
from transformer import TransformerConfig


@dataclass
class Experiment:
    """One question. `variants`: {label: (stage, {flag: value})}; `columns`: the metrics of the table; `curves`: the
    logged ones in the picture."""

    question: str
    held: str
    variants: dict
    columns: tuple
    curves: tuple
    probe: str | None = None  # the function of support/probes.py that measures more
    against: str | None = None  # the variant that the others are compared with; default: the first
    pairs: tuple = ()  # (variant, the one it is compared with), …: replaces `against`
    bars: tuple = ()  # columns drawn beside the first
    gains: tuple = ()  # columns whose differences are drawn, a point per seed, in the place of means
    dashed: str = ""  # variants with this in their name are drawn dashed, as some coincide with their twins
    front: tuple = ()  # two columns to draw against each other, a point per run
    tune: str = ""  # the flag whose value the validation split chooses for each variant
    grid: tuple = ()  # among these
    times_own: bool = False  # times the value that the variant has anyway
    tune_steps: int = 100  # in runs of so many steps

    def with_flags(self, changes):
        """{variant: {flag: value}} -> the experiment with these flags too."""
        variants = {v: (stage, flags | changes.get(v, {})) for v, (stage, flags) in self.variants.items()}
        return replace(self, variants=variants)

    def compared(self):
        """[(variant, the one it is compared with), …]"""
        first = self.against or next(iter(self.variants))
        return self.pairs or [(v, first) for v in self.variants if v != first]

    @property
    def text(self):
        """The name of the corpus that its models read, or None."""
        reads_corpus = any(flags.get("data") is probes.corpus for _, flags in self.variants.values())
        return probes.corpus() if reads_corpus else None

    @property
    def unit(self):
        """Of a loss: the character models' tokens are characters."""
        return "character" if any(flags.get("tokenizer") == "char" for _, flags in self.variants.values()) else "token"


def refuse_unknown(name, experiment):
    """ConfigError if a row of the table names what is not there: better now than after the last run."""
    e, unknown = experiment, []
    unknown += [x for x in (*e.columns, *e.bars, *e.gains, *e.front) if x not in HEADINGS]
    unknown += [x for x in (*e.bars, *e.gains) if x not in e.columns]  # nothing else has means and differences
    unknown += [x for x in e.curves if x not in CURVES]
    unknown += [x for pair in e.compared() for x in pair if x not in e.variants]
    unknown += [e.probe] if e.probe and not hasattr(probes, e.probe) else []
    if unknown:
        raise ConfigError(f"the experiment {name} names what is not there: {', '.join(sorted(set(unknown)))}")


def _pretrain(**changes):
    """A small character model: 0.8 M parameters, 600 steps of 16 x 128 tokens."""
    flags = {"data": probes.corpus, "tokenizer": "char", "steps": 600, "batch": 16, "micro_batch": 16}
    flags |= {"optimizer": "adamw", "lr": 2e-3, "warmup": 50, "eval_every": 200, "save_every": 100_000}
    sizes = {f.name for f in fields(TransformerConfig)}
    flags |= {k: changes.pop(k) for k in list(changes) if k not in sizes}
    return "pretrain", flags | {"model": {"context": 128, "n_head": 4, "n_kv_head": 4, "width": 128} | changes}


def _grpo(stage="grpo", **flags):
    """One optimizer step per batch of rollouts and no KL penalty: only what the experiment varies is at work."""
    plain = {"prompts": 16, "minibatches": 1, "beta": 0.0, "lr": 3e-4}
    return stage, plain | {"steps": 150, "test_problems": 500, "eval_every": 50, "pass_problems": 50} | flags


_BRIEF = {"pass_problems": 1, "pass_samples": 1}  # the probe asks for samples


def _distill(**flags):
    return "distill", {"steps": 200, "test_problems": 500} | _BRIEF | flags


def _dpo(**flags):
    return "dpo", {"steps": 150, "prompts": 1500, "eval_every": 50, "test_problems": 500} | flags


def _chars(size="4 layers, width 128", steps=600, rate="AdamW at 2e-3"):
    return f"a character model of {size}, context 128; {rate}, {steps} steps of 16 windows, the data order"


_HELD_POLICY = (
    "the SFT checkpoint that the stage itself makes for the seed, 16 prompts x 8 rollouts and one optimizer step per "
    "batch, no KL penalty, lr 3e-4 (but for the variant's own settings), the prompts' order"
)
_POLICY = ("accuracy", "story_kept", "length", "kl")

_GRPO = {
    "default": _grpo(),
    "4 rollouts x 32 prompts": _grpo(prompts=32, rollouts=4),
    "16 rollouts x 8 prompts": _grpo(prompts=8, rollouts=16),
    "no std": _grpo(scale="none"),
    "lr 1e-4": _grpo(lr=1e-4),
    "lr 1e-3": _grpo(lr=1e-3),
    "beta 0.05": _grpo(beta=0.05),
    "2 inner epochs": _grpo(inner_epochs=2),
    "clip higher": _grpo(clip_high=0.28, inner_epochs=2),
}

# What a sampler that is not the policy is corrected by.
_CORRECTIONS = {
    "uncorrected": {"old_logprobs": "trainer"},
    "in the ratio": {},
    "in the ratio, masked": {"correction": "mask"},
    "truncated": {"old_logprobs": "trainer", "correction": "truncate"},
    "masked": {"old_logprobs": "trainer", "correction": "mask"},
    "answers masked": {"old_logprobs": "trainer", "correction": "mask", "correction_level": "geometric"},
}
_SAMPLERS = {
    "1 step old": ({"stale": 1}, ("uncorrected", "in the ratio", "truncated")),
    "4 steps old": ({"stale": 4}, ("uncorrected", "in the ratio", "truncated", "masked")),
    "16 steps old": ({"stale": 16}, tuple(_CORRECTIONS)),
    "int8": ({"sampler_dtype": "int8"}, ("uncorrected", "in the ratio", "truncated")),
}
_OFF_POLICY = {
    f"{sampler}, {name}": _grpo(**flags, **_CORRECTIONS[name])
    for sampler, (flags, names) in _SAMPLERS.items()
    for name in names
}

EXPERIMENTS = {
    "ladder": Experiment(
        "What does each method add to SFT, from the same start?",
        "the pretrained and the SFT checkpoint of a seed; after it as many steps as take each method as long as GRPO's "
        "500, all else but the tuned lr as the stage has it (GDPO is also paid for brevity, weight 0.2); the 1,000 "
        "test problems, greedy decoding (the minutes leave out what runs/start had already: the starts, PPO's reward "
        "model)",
        {
            "base": ("measure", {"start": "pretrain"}),
            "SFT": ("measure", {"start": "sft"}),  # from which all that follow start
            "rejection": ("rejection", _BRIEF | {"steps": 400}),
            "DPO": ("dpo", {"steps": 630}),
            "PPO": ("ppo", {"steps": 205}),
            "GRPO": ("grpo", _BRIEF | {"steps": 500}),
            "GDPO": ("gdpo", _BRIEF | {"steps": 450, "brevity_weight": 0.2}),
        },
        (
            "accuracy",
            "sampled",
            "pass_at_8",
            "story_kept",
            "kl",
            "minutes",
            "more_steps",
            "larger_numbers",
            "new_words",
            "by_hand",
        ),
        (),
        probe="carried_over",
        gains=("accuracy", "sampled", "pass_at_8", "story_kept", "more_steps", "by_hand"),
        pairs=(
            *((method, "SFT") for method in ("rejection", "DPO", "PPO", "GRPO", "GDPO")),
            *((method, "GRPO") for method in ("rejection", "DPO", "PPO", "GDPO")),
        ),
        tune="lr",
        grid=(0.5, 1, 2, 4),
        times_own=True,
    ),
    "norm-placement": Experiment(
        "Where should the norm stand: before a branch, after it, or both, with and without a warm-up?",
        _chars("12 layers, width 64", 400),
        {
            f"{placement}, {'warm-up' if warmup > 1 else 'no warm-up'}": _pretrain(
                norm_placement=placement, n_layer=12, width=64, warmup=warmup, steps=400
            )
            for warmup in (50, 1)
            for placement in ("pre", "post", "sandwich")
        },
        ("valid_loss", "gradient_ratio", "entropy"),
        ("loss", "grad_norm"),
        probe="layers",
        dashed="no warm-up",
        pairs=tuple((f"{p}, {w}", f"pre, {w}") for w in ("warm-up", "no warm-up") for p in ("post", "sandwich"))
        + tuple((f"{p}, no warm-up", f"{p}, warm-up") for p in ("pre", "post", "sandwich")),
    ),
    "norm-depth": Experiment(
        "How deep can a stack be with the norm after its branches, and before them?",
        _chars("6 to 48 layers, width 64", 200) + "; a warm-up of 50 steps",
        {
            f"{placement}, {depth} layers": _pretrain(norm_placement=placement, n_layer=depth, width=64, steps=200)
            for depth in (6, 12, 24, 48)
            for placement in ("pre", "post")
        },
        ("valid_loss", "gradient_ratio", "entropy"),
        ("loss", "grad_norm"),
        probe="layers",
        pairs=tuple((f"post, {depth} layers", f"pre, {depth} layers") for depth in (6, 12, 24, 48)),
    ),
    "norm-kind": Experiment(
        "Does it matter that RMSNorm leaves the mean in?",
        _chars(),
        {"LayerNorm": _pretrain(norm="layer"), "RMSNorm": _pretrain(norm="rms")},
        ("valid_loss", "minutes"),
        ("loss", "grad_norm"),
    ),
    "positions": Experiment(
        "What do positions buy inside the trained length, and beyond it?",
        _chars(),
        {kind: _pretrain(positions=kind) for kind in ("none", "learned", "sinusoidal", "rope")},
        ("valid_loss", "inside", "outside", "entropy"),
        ("loss",),
        probe="beyond",
    ),
    "copying": Experiment(
        "How far can a letter be carried, with each kind of positions, inside and beyond the distances of training?",
        "a character model of 2 layers, width 64, context 128; AdamW at 1e-3, 2,000 steps of 16 windows, the data "
        f"order; lines of a letter, 0 to {MOST_DOTS} dots, the same letter",
        {
            kind: _pretrain(positions=kind, data=copy_file, n_layer=2, width=64, lr=1e-3, steps=2000)
            for kind in ("none", "learned", "sinusoidal", "rope")
        },
        ("copied_inside", "copied_outside"),
        ("loss",),
        probe="copying",
    ),
    "grad-clip": Experiment(
        "What does clipping the gradient's norm change, at a good and at a high learning rate?",
        _chars(rate="AdamW"),
        {f"clip {clip or 'off'}, lr {lr:g}": _pretrain(clip=clip, lr=lr) for lr in (2e-3, 2e-2) for clip in (1.0, 0.0)},
        ("valid_loss", "norm_median", "norm_p99", "clipped_share", "spikes"),
        ("loss", "grad_norm"),
        probe="clipping",
        pairs=tuple((f"clip off, lr {lr:g}", f"clip 1.0, lr {lr:g}") for lr in (2e-3, 2e-2))
        + tuple((f"clip {clip}, lr 0.02", f"clip {clip}, lr 0.002") for clip in ("1.0", "off")),
    ),
    "ffn": Experiment(
        "GELU or SwiGLU, at equal parameters?",
        _chars() + "; inner width 512 for GELU's two matrices, 341 for SwiGLU's three",
        {
            "GELU": _pretrain(activation="gelu", ffn_width=512),
            "SwiGLU": _pretrain(activation="swiglu", ffn_width=341),
        },
        ("valid_loss", "minutes"),
        ("loss",),
    ),
    "kv-heads": Experiment(
        "What do shared key/value heads cost in loss, and save in the cache?",
        _chars(),
        {
            f"{name}, {g} of 4": _pretrain(n_kv_head=g)
            for name, g in (("multi-head", 4), ("grouped", 2), ("multi-query", 1))
        },
        ("valid_loss", "cache", "parameters"),
        ("loss",),
    ),
    "moe": Experiment(
        "Experts at equal active parameters: dense, and three ways to balance.",
        _chars() + "; 8 experts of inner width 160, 2 active, against a dense inner width of 320",
        {
            "dense": _pretrain(ffn_width=320),
            **{
                f"8 experts, {kind}": _pretrain(n_expert=8, n_expert_active=2, expert_width=160, balancing=kind)
                for kind in ("aux", "bias", "none")
            },
        },
        ("valid_loss", "load_min", "load_max", "parameters"),
        ("loss", "load_max"),
        pairs=tuple((f"8 experts, {kind}", "dense") for kind in ("aux", "bias", "none"))
        + tuple((f"8 experts, {kind}", "8 experts, aux") for kind in ("bias", "none"))
        + (("8 experts, bias", "8 experts, none"),),
    ),
    "curriculum": Experiment(
        "Does the order of the demonstrations matter: shuffled, easy to hard, hard to easy?",
        "the pretrained checkpoint of a seed, 100 steps of SFT on levels 1 to 3",
        {
            order: ("sft", {"order": order, "steps": 100, "levels": [1, 2, 3], "test_problems": 500})
            for order in ("shuffled", "curriculum", "anti")
        },
        ("accuracy",),
        ("loss",),
    ),
    "sft-lr": Experiment(
        "Which learning rate does SFT want?",
        "the pretrained checkpoint of a seed, 60 steps of SFT with Muon",
        {f"lr {lr:g}": ("sft", {"lr": lr, "steps": 60, "test_problems": 500}) for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)},
        ("accuracy",),
        ("loss",),
    ),
    "grpo": Experiment(
        "Which of GRPO's settings matter, in 150 steps?",
        _HELD_POLICY,
        _GRPO,
        _POLICY,
        ("reward_correct", "kl"),
        pairs=tuple((v, "2 inner epochs" if v == "clip higher" else "default") for v in list(_GRPO)[1:]),
    ),
    "gdpo": Experiment(
        "Three rewards: GRPO on the answer alone, GRPO on the sum, GDPO, and brevity paid for right answers alone.",
        _HELD_POLICY,
        {
            "GRPO, answer alone": _grpo(format_weight=0.0),
            "GRPO, sum": _grpo("gdpo", combine="sum", format_weight=0.5, brevity_weight=0.5),
            "GDPO": _grpo("gdpo", format_weight=0.5, brevity_weight=0.5),
            "GDPO, brevity if right": _grpo("gdpo", format_weight=0.5, brevity_weight=0.5, conditioned=["brevity"]),
        },
        (*_POLICY, "earned_correct", "earned_format", "earned_brevity", "collapsed"),
        ("reward_correct", "reward_format", "reward_brevity", "collapsed_grpo"),
        pairs=(
            ("GRPO, sum", "GRPO, answer alone"),
            ("GDPO", "GRPO, sum"),
            ("GDPO, brevity if right", "GDPO"),
        ),
        front=("earned_brevity", "earned_correct"),
        probe="earned",
    ),
    "policy-gradients": Experiment(
        "Ten policy gradients, with equally many rollouts and optimizer steps: which learn, and at what price?",
        "the SFT checkpoint that the stage itself makes for the seed, 500 steps of 12 prompts x 8 rollouts in two "
        "minibatches, the prompts' order, all else but the tuned lr as `grpo.py --algorithm` sets it",
        {name: ("grpo", _BRIEF | {"algorithm": name}) for name in ALGORITHMS},
        ("accuracy", "sampled", "pass_at_8", "story_kept", "kl", "length", "clipped", "seconds"),
        ("reward_correct", "kl"),
        against="grpo",
        probe="training",
        bars=("pass_at_8", "story_kept", "kl"),
        tune="lr",
        grid=(7.5e-5, 1.5e-4, 3e-4, 6e-4),
    ),
    "off-policy": Experiment(
        "How far may the sampler be from the policy, and what saves a run from it?",
        _HELD_POLICY,
        {"on policy": _grpo()} | _OFF_POLICY,
        ("accuracy", "pass_at_8", "story_kept", "kl", "clipped", "sampler_kl", "limited", "seconds"),
        ("reward_correct", "sampler_kl"),
        pairs=tuple(
            (v, "on policy" if "uncorrected" in v else f"{v.split(', ')[0]}, uncorrected") for v in _OFF_POLICY
        ),
        probe="training",
        dashed="uncorrected",
    ),
    "distill": Experiment(
        "What is a teacher's word at every token worth, against its answers and against a reward, at equal student "
        "tokens?",
        "the student and the teacher that `distill.py` makes for the seed, 200 steps of 96 answers (GRPO: 12 questions "
        "x 8), all else but the tuned lr as the stage's defaults",
        {
            "student": ("measure", {"start": "student", "test_problems": 500}),
            "teacher": ("measure", {"start": "teacher", "test_problems": 500}),
            "SFT on the teacher's answers": _distill(on_policy=0.0, loss="sample"),
            "off-policy, forward KL": _distill(on_policy=0.0),
            "on-policy, forward KL": _distill(),
            "on-policy, reverse KL": _distill(beta=1.0),
            "on-policy, sampled token": _distill(loss="sample"),
            "GRPO": ("student_grpo", {"steps": 200, "test_problems": 500} | _BRIEF),
        },
        ("accuracy", "sampled", "pass_at_8", "teacher_kl", "tokens", "minutes"),
        ("accuracy",),
        probe="taught",
        against="on-policy, forward KL",
        bars=("sampled", "teacher_kl"),
        tune="lr",
        grid=(2e-4, 6e-4, 2e-3, 6e-3),
    ),
    "tools": Experiment(
        "What does a calculator add, what does RL, and what if the calculator's tokens are in the loss?",
        "problems of two and three steps with numbers of up to four digits; the pretrained start of a seed; SFT on 300 "
        "demonstrations with calls, or on all solutions without; `agent.py` as it is",
        {
            "no tool, SFT": ("measure", {"start": "calls", "tools": []}),
            "no tool, GRPO": ("agent", {"tools": []}),
            "tool, SFT": ("measure", {"start": "calls"}),
            "tool, GRPO": ("agent", {}),
            "tool, GRPO, its tokens in the loss": ("agent", {"train_on_tools": True}),
        },
        ("accuracy", "length", "kl", "minutes"),
        ("reward_correct", "kl", "grad_norm"),
        pairs=(
            ("no tool, GRPO", "no tool, SFT"),
            ("tool, SFT", "no tool, SFT"),
            ("tool, GRPO", "tool, SFT"),
            ("tool, GRPO", "no tool, GRPO"),
            ("tool, GRPO, its tokens in the loss", "tool, GRPO"),
        ),
    ),
    "dpo": Experiment(
        "Beta and variant, offline against sampled pairs.",
        "the SFT checkpoint of a seed, 150 steps of 32 pairs, the pairs and their order (kto: 32 single answers, NLL "
        "5, lr 1e-4, beta 0.1; corrupted solutions: their own pairs)",
        {
            "sampled pairs": _dpo(),
            "without the NLL term": _dpo(nll=0.0),
            "beta 0.05": _dpo(beta=0.05),
            "beta 1": _dpo(beta=1.0),
            "ipo": _dpo(variant="ipo", beta=0.1),
            "simpo": _dpo(variant="simpo", beta=2.0, gamma=0.5),
            "apo_zero": _dpo(variant="apo_zero"),
            "orpo": _dpo(variant="orpo", beta=0.1),
            "kto": _dpo(variant="kto", nll=5.0, beta=0.1, lr=1e-4),
            "corrupted solutions": _dpo(pairs="offline"),
        },
        ("accuracy", "length"),
        ("logp_chosen", "pair_accuracy", "kl"),
    ),
}
