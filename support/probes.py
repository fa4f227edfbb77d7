"""What ablate.py measures of a trained model beyond what its stage reports, and of a start that no stage trains.

A probe is a function (folder, figures, settings) -> more figures: the run's directory, the figures so far, among them
the checkpoint's "path", and the settings that ablate.py made the run with. An experiment names its probe.

    layers     the residual stream and its gradient by layer, the attention, a sample of text
    beyond     the loss at positions beyond the trained length
    copying    how far a letter is carried
    clipping   gradient norms, how often they were clipped, loss spikes
    held_out   pass@8, format, length, and the KL to the SFT checkpoint
    earned     how often each of several rewards was earned, and the groups that collapsed
"""

import math
import statistics
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal

import torch

import sft
from attention import attention_entropy, attention_weights
from data import DEFAULT_TASK, encode_prompt, find, load_problems, load_text
from evaluate import evaluate, evaluate_samples, sampled_kl
from generate import generate
from grpo import tidy
from support.checkpoints import open_checkpoint
from support.checks import Count, Seed, check
from support.copy_lines import DISTANCES, MOST_DOTS, copy_line
from support.devices import setup
from support.errors import DataError
from support.log import read_metrics
from transformer import Transformer, TransformerConfig

NEW_TOKENS = 64  # of an answer to a built-in problem: what the stages after SFT allow

# ---------------------------------------------------------------------------------------------------------------
# Character models.


def corpus():
    """The text of the character models: Tiny Shakespeare where it is at hand, the built-in stories otherwise."""
    try:
        find("tinyshakespeare")
        return "tinyshakespeare"
    except DataError:
        return DEFAULT_TASK


def validation_text():
    return "".join(load_text(corpus(), "valid"))


def layers(folder, figures, settings):
    """Root mean square of the residual stream and of the gradient, by layer, on one batch, as built and as trained; and
    what the trained model writes.

    The gradient of a layer is that of the output of block l. A placement that lets it shrink with depth trains the
    first layers slowly; one that lets the stream grow makes the late layers' branches small beside it.
    """
    trained, tokenizer, _ = open_checkpoint(figures["path"])
    seed = settings["config"]["seed"]
    torch.manual_seed(seed)
    more = {}
    for name, model in (("built", Transformer(trained.config)), ("trained", trained)):
        outputs = []

        def keep(block, inputs, output, outputs=outputs):
            output.retain_grad()
            outputs.append(output)

        hooks = [block.register_forward_hook(keep) for block in model.blocks]
        tokens = torch.randint(model.config.vocab_size, (4, min(64, model.config.context)))
        model(tokens[:, :-1], targets=tokens[:, 1:]).mean().neg().backward()
        for hook in hooks:
            hook.remove()
        more[f"stream_{name}"] = [x.detach().square().mean().sqrt().item() for x in outputs]
        more[f"gradient_{name}"] = [x.grad.square().mean().sqrt().item() for x in outputs]
    more["gradient_ratio"] = more["gradient_built"][0] / more["gradient_built"][-1]
    generator = torch.Generator().manual_seed(seed)
    start, length = tokenizer.encode("\n"), min(100, trained.config.context - 1)
    more["text"] = generate(trained, [start], length, generator=generator).texts(tokenizer)[0]
    ids = torch.tensor(tokenizer.encode(validation_text()[: 32 * 64]))
    return more | attention_of(trained, ids[: len(ids) // 32 * 32].view(32, -1))


def attention_of(model, rows):
    """rows (B, T) -> the attention's mean entropy in nats, and the mean map of all blocks and heads over the first 32
    tokens, for a picture."""
    weights = torch.stack(attention_weights(model, rows))  # (blocks, B, H, T, T)
    return {
        "entropy": attention_entropy(weights).mean().item(),
        "attention": weights[..., :32, :32].mean((0, 1, 2)).tolist(),
    }


@torch.no_grad()
def beyond(folder, figures, settings):
    """Loss by position on windows of twice the trained length, where the model can read them at all."""
    model, tokenizer, _ = open_checkpoint(figures["path"])
    context = model.config.context
    ids = torch.tensor(tokenizer.encode(validation_text()[: 64 * 8 * context]))
    rows = ids[: len(ids) // (2 * context + 1) * (2 * context + 1)].view(-1, 2 * context + 1)[:64]
    inside = -model(rows[:, :context], targets=rows[:, 1 : context + 1]).mean().item()
    more = {"inside": inside, "outside": math.nan} | attention_of(model, rows[:16, :context])
    if model.config.positions != "learned":  # its table ends where training did
        longer = stretched(model, 2 * context)
        loss = -longer(rows[:, :-1], targets=rows[:, 1:])  # (rows, 2·context)
        more["outside"] = loss[:, context:].mean().item()
        more["by_position"] = loss.mean(0).view(16, -1).mean(1).tolist()  # sixteenths of the window
    return more


def stretched(model, context):
    """The same weights with a longer table of angles."""
    sizes = {f.name: getattr(model.config, f.name) for f in fields(model.config)}
    longer = Transformer(TransformerConfig(**sizes | {"context": context}))
    longer.load_state_dict(model.state_dict())
    return longer.eval()


@torch.no_grad()
def copying(folder, figures, settings):
    """Share of letters repeated rightly, by their distance, inside and beyond the distances of training."""
    model, tokenizer, _ = open_checkpoint(figures["path"])
    shares = []
    for distance in DISTANCES:
        lines = [copy_line(10_000_000 + i, distance, distance) for i in range(100)]
        prompts = [tokenizer.encode("\n" + line[:-1]) for line in lines]
        letters = generate(model, prompts, 1, temperature=0).texts(tokenizer)
        shares.append(100 * statistics.mean(x == line[-1] for x, line in zip(letters, lines, strict=True)))
    inside = [share for distance, share in zip(DISTANCES, shares, strict=True) if distance <= MOST_DOTS]
    return {
        "copied": shares,
        "copied_inside": statistics.mean(inside),
        "copied_outside": statistics.mean(shares[len(inside) :]),
    }


def clipping(folder, figures, settings):
    """From the log: how gradient norms are distributed, how often they were clipped, and loss spikes."""
    series = read_metrics(folder)
    norms, losses = sorted(series["grad_norm"][1]), series["loss"][1]
    spikes = sum(b > a + 0.5 for a, b in pairwise(losses))
    return {
        "norm_median": norms[len(norms) // 2],
        "norm_p99": norms[int(0.99 * (len(norms) - 1))],
        "clipped_share": 100 * statistics.mean(series["clipped"][1]),
        "spikes": spikes,
    }


# ---------------------------------------------------------------------------------------------------------------
# Policies that solve the built-in problems.


@dataclass
class Start:
    """A checkpoint that later stages start from, measured as it is: nothing is trained."""

    start: Literal["pretrain", "sft"] = "sft"
    """pretrain: where SFT starts; sft: where DPO and all reinforcement learning start."""
    test_problems: Count = 1000
    """Held-out problems."""
    seed: Seed = 0
    """Of the start, which is made if it is not there."""
    name: str = "start"
    """As every stage has one; here no run directory is written."""

    def __post_init__(self):
        check(self)


def measure_start(config):
    """The figures that a stage returns after training, of a start: "accuracy", "low", "high", "f1", …, "path"."""
    dist = setup()
    policy, tokenizer, path = open_checkpoint(start_of(config.seed, config.start), dist.device)
    problems = load_problems(DEFAULT_TASK, "test", config.test_problems, (1, 2))
    return evaluate(policy, tokenizer, problems, NEW_TOKENS, dist) | {"path": str(path)}


def start_of(seed, kind="sft"):
    """The run directory of the start that a seed's stages make for themselves; made now if it is not there."""
    make = {"pretrain": sft.pretrained_start, "sft": sft.sft_start}[kind]
    return make(sft.Config(seed=seed), setup())


def held_out(folder, figures, settings):
    """A policy on 200 of the held-out problems: pass@8 at temperature 1, the share of answers in the right format and
    their length (greedy), and the KL to the SFT checkpoint of the seed, per token of its own samples."""
    problems, dist = load_problems(DEFAULT_TASK, "test", 200, (1, 2)), setup()
    policy, tokenizer, _ = open_checkpoint(figures["path"], dist.device)
    start = open_checkpoint(start_of(settings["config"]["seed"]), dist.device)[0]
    greedy = evaluate(policy, tokenizer, problems, NEW_TOKENS, dist)
    texts, ended = zip(*((s.text, s.ended) for s in greedy["samples"]), strict=True)
    sampled = evaluate_samples(policy, tokenizer, problems, 8, NEW_TOKENS, dist)
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    return {
        "pass_at_8": 100 * sampled["pass@8"],
        "sampled": 100 * sampled["pass@1"],
        "format": 100 * statistics.mean(tidy(texts, problems, ended)),
        "length": greedy["length"],
        "kl": sampled_kl(policy, start, tokenizer, prompts, NEW_TOKENS, dist),
    }


def earned(folder, figures, settings):
    """From the log: the share of rollouts that earned each reward in the last 20 steps, and the share of groups, over
    all steps, in which different rewards got one advantage (see gdpo.collapse)."""
    series = read_metrics(folder)
    more = {
        f"earned_{name}": 100 * statistics.mean(series[f"reward_{name}"][1][-20:])
        for name in ("correct", "format", "brevity")
    }
    if settings["stage"] == "gdpo":
        method = "grpo" if settings["config"]["combine"] == "sum" else "gdpo"
        more["collapsed"] = 100 * statistics.mean(series[f"collapsed_{method}"][1])
    return more
