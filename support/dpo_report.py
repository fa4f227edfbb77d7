"""What a DPO run measures, and what it prints and draws."""

import math
import time

import torch
from tqdm import tqdm

from evaluate import evaluate, wilson
from lora import merged
from support.checkpoints import open_checkpoint
from support.held_out import BEST_IS_WORSE, add_figures, before_and_after, logged, metric_panels
from support.pair_rows import held_out_share, reference_point
from support.pairs import Means, batch_of, chunks, pair_logprobs, to_floats
from support.plots import draw_curves
from support.sampled_kl import sampled_kl


@torch.no_grad()
def validate(policy, pairs, tokenizer, config, dist, autocast, loss_of):
    """The means of the loss and its metrics over pairs, split between the ranks: {"loss", "pair_accuracy", …};
    of pairs also `likelier`. loss_of: dpo.py's."""
    policy.eval()
    sums, pad, z0 = Means(), tokenizer.endoftext_id, None
    own_pairs, weight = held_out_share(pairs, dist)
    if "other" in pairs[0]:
        z0 = reference_point(policy, own_pairs, pad, dist, autocast, weight=weight)
    hidden = None if dist.is_main else True  # None: shown on a terminal alone
    for rows in tqdm(chunks(own_pairs), desc="held-out pairs", unit="chunk", leave=False, disable=hidden):
        micro = batch_of(rows, pad, dist.device)
        with autocast():
            logps = pair_logprobs(policy, micro.packed)  # a tuple of (b,)
        metrics = loss_of(config, logps, micro, z0)[1]
        if len(logps) == 2:
            metrics |= likelier(logps, micro.lengths)
        sums.add(metrics, micro, weight)
    return sums.over_ranks(dist)


def likelier(logps, lengths):
    """The share of pairs whose chosen answer has the higher log π, and of those where it has per token. Unlike the
    margin h, which is 0 there, this says something about the start model too. logps: of the chosen, of the rejected,
    (b,) each."""
    chosen, rejected = logps
    per_token = chosen / lengths["chosen_lengths"] > rejected / lengths["rejected_lengths"]
    shares = {"likelier": chosen > rejected, "likelier_per_token": per_token}
    return to_floats({name: share.float().mean() for name, share in shares.items()})


class Look:
    """What a run shows beside its steps: before(); begin_step() and at_step() of each; after(). start: the start model;
    None: it is the policy without its adapters. variant: a row of dpo.VARIANTS; loss_of: dpo.py's."""

    def __init__(self, run, pairs, problems, start, autocast, variant, loss_of):
        self.run, self.pairs, self.problems, self.start = run, pairs, problems, start
        self.autocast, self.variant, self.loss_of, self.on_bar = autocast, variant, loss_of, {}
        self.began = 0.0  # of the step

    def measure(self, policy, split):
        """{"pairs": their metrics} and, with a verifier, those of greedy answers: there "accuracy" is exact match."""
        run = self.run
        with merged(policy):  # adapters, if any, folded into the weights: as fast as without
            shared = run.tokenizer, run.config, run.dist, self.autocast, self.loss_of
            figures = {"pairs": validate(policy, self.pairs[split], *shared)}
            if self.problems:
                longest = run.config.max_new_tokens
                answering = run.tokenizer, self.problems[split], longest, run.dist
                result = evaluate(policy, *answering, dtype=run.config.dtype)
                figures |= {name: value for name, value in result.items() if name != "answers"}
        return figures

    def before(self, init):
        """The test split, unless an earlier part of the run has read it; and the line before the first step."""
        run = self.run
        if run.state.before is None:
            run.state.before = self.measure(run.model, "test")
        if run.dist.is_main:
            before, kind = run.state.before, "answers" if self.variant.unpaired else "pairs"
            accuracy = f"; test accuracy before: {before['accuracy']:.1%}" if "accuracy" in before else ""
            if "likelier" in before["pairs"]:
                accuracy += f"; the chosen answer is likelier in {before['pairs']['likelier']:.1%} of the test pairs"
            n_pairs = len(self.pairs["train"])
            print(f"{run.model.num_params():,} parameters from {init}; {n_pairs:,} training {kind}{accuracy}")

    def begin_step(self):
        self.began = time.perf_counter()

    def at_step(self, step, means):
        """Log a step, and every --eval_every steps what held-out pairs and problems say, and the KL."""
        run, means = self.run, means | {"steps_per_second": 1 / (time.perf_counter() - self.began)}
        record = dict(means)
        if run.due(run.config.eval_every):
            result = self.measure(run.model, "valid")
            record |= {f"valid_{name}": value for name, value in result["pairs"].items()}
            record["kl"] = kl_to_start(run.model, self.start, self.pairs, run.tokenizer, run.config, run.dist)
            self.on_bar = {"valid": f"{record['valid_loss']:.3f}", "kl": f"{record['kl']:.3f}"}
            if self.problems:
                add_figures(record, logged(result))
                self.on_bar["accuracy"] = f"{result['accuracy']:.1%}"
            run.keep_best(record["valid_loss"])
        run.log(step + 1, **record)
        logp = f"{means.get('logp_chosen', math.nan):.1f}"
        run.bar.set_postfix(loss=f"{record['loss']:.3f}", logp=logp, **self.on_bar, refresh=False)

    def after(self):
        """The test split again, with the checkpoint of the lowest validation loss."""
        run = self.run
        policy, _, path = open_checkpoint(run.path, run.dist.device)
        before, after = run.state.before, self.measure(policy, "test")
        if run.dist.is_main:
            report(run.config, before, after, len(self.pairs["test"]), run.seconds)
            draw(run.config, run.path, self.variant, bool(self.problems))
            print(f"{path}, {run.path}/last, {run.path}/curves.png")
        return {"before": before, "after": after, "path": str(path), "seconds": run.seconds}


def kl_to_start(policy, start, pairs, tokenizer, config, dist):
    """KL(π ‖ start model) in nats per token, of sampled answers to up to 64 validation prompts: those that leave
    room for --max_new_tokens, or, with shorter answers, the first ones if none does."""
    context, prompts = policy.config.context, [pair["prompt"] for pair in pairs["valid"]]
    fitting = [prompt for prompt in prompts if len(prompt) + config.max_new_tokens <= context]
    prompts = (fitting or prompts)[:64]  # one long prompt must not shorten the answers to all
    room = context - max(map(len, prompts))
    reference = policy if start is None else start.to(dist.device)  # the policy: sampled_kl turns the adapters off
    kl = sampled_kl(policy, reference, tokenizer, prompts, min(config.max_new_tokens, room), dist, config.seed)
    if start is not None:
        start.cpu()  # it waits there
    return kl


# What a row is; what its accuracy is; the kinds of answer. With kto the second line.
WORDS = (
    ("pairs", "pairs ordered rightly", "chosen", "rejected"),
    ("answers", "answers on their side of z0", "good", "bad"),
)


def report(config, before, after, n, seconds):
    """The table at the end. n: the number of test pairs."""
    unit, accuracy, chosen, rejected = WORDS[config.variant == "kto"]

    def interval(figures, name):
        low, high = wilson(figures["pairs"][name] * n, n)
        return f"{figures['pairs'][name]:.1%} [{low:.1%}, {high:.1%}]"

    rows = [[accuracy, "–", interval(after, "pair_accuracy")]]  # before: h is 0 up to rounding
    for name, label in (("likelier", "chosen answer likelier"), ("likelier_per_token", "likelier per token")):
        if name in before["pairs"]:
            rows.append([label, interval(before, name), interval(after, name)])
    labels = {"loss": f"loss on {unit}", "logp_chosen": f"log π({chosen})", "logp_rejected": f"log π({rejected})"}
    for name, label in labels.items():
        if name in before["pairs"]:  # the test answers of kto may all be bad
            rows.append([label, *(f"{figures['pairs'][name]:.3f}" for figures in (before, after))])
    before_and_after(before, after, config.steps, seconds, rows, warning=BEST_IS_WORSE)
    name = "logp_chosen"
    if config.variant != "apo_down" and after["pairs"].get(name, 0.0) < before["pairs"].get(name, 0.0):
        despite = f", in spite of --nll {config.nll:g}" if config.nll else ""
        cause = "" if config.variant in ("apo_zero", "orpo", "kto") else ": DPO fits the difference alone"
        print(f"the {chosen} answers became less probable too{despite}{cause} (see curves.png)")


def draw(config, run_path, variant, verified):
    """The curves. variant: a row of dpo.VARIANTS; verified: whether the answers were checked."""
    reward = f"β {'log π/π_ref' if variant.uses_reference else 'log π'}{' per token' if variant.per_token else ''}"
    unit, accuracy, chosen, rejected = WORDS[variant.unpaired]
    rewards = {"valid_reward_chosen": chosen, "valid_reward_rejected": rejected}
    logps = {"valid_logp_chosen": chosen, "valid_logp_rejected": rejected}
    point = [("reference point z0", {"z0": "train", "valid_z0": "validation"}, "nats", {})] if variant.unpaired else []
    draw_curves(
        run_path,
        f"DPO ({config.variant}, {config.pairs} {unit}) on {config.data}, seed {config.seed}",
        [
            *(metric_panels() if verified else ()),
            (f"loss on {unit}", {"loss": "train", "valid_loss": "validation"}, "loss", {}),
            (accuracy, {"pair_accuracy": "train", "valid_pair_accuracy": "validation"}, "share", {}),
            ("implicit rewards, validation", rewards, reward, {}),
            ("log π of the answers, validation", logps, "nats", {}),
            *point,
            ("KL to the start", {"kl": "sampled answers"}, "nats per token", {}),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
