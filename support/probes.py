"""Measurements of ablate.py: of a trained model, beyond what its stage reports, and of a start without training.

A probe is a function (run_dir, figures, settings) -> further figures. run_dir: the run's directory; figures: those so
far, with the checkpoint's "path"; settings: what ablate.py ran the stage with. An experiment names its probe.

    layers     the residual stream and its gradient by layer, the attention, a sample of text
    beyond     the loss at positions beyond the trained context
    copying    over what distance the model can copy a letter
    clipping   gradient norms, how often they were clipped, loss spikes
    held_out   pass@8, format, length, and the KL to the SFT checkpoint
    training   the same, and the means of what the run logged
    earned     how often each of several rewards was earned, and the share of collapsed groups
    taught     pass@8, the KL to the teacher, how many tokens the student was trained on
    carried_over   held_out, and the accuracy on problems of kinds that training lacks
"""

import math
import re
import statistics
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Literal

import torch

import agent
import grpo
import sft
from data import DEFAULT_TASK, encode_prompt, load_problems, load_text
from evaluate import evaluate, evaluate_samples
from generate import generate
from grpo import format_reward
from support.attention_maps import attention_entropy, attention_weights
from support.calls_start import calls_start
from support.checkpoints import open_checkpoint
from support.checks import Count, Seed, check
from support.copy_lines import DISTANCES, MOST_DOTS, copy_line
from support.devices import setup
from support.downloads import find
from support.errors import DataError
from support.log import read_metrics
from support.pretrained_start import pretrained_start
from support.sampled_kl import sampled_kl
from support.sft_start import sft_start
from support.shifted import BY_HAND, SHIFTS, shifted_problems
from support.teachers import student_start, teacher_start
from support.tools import load_tools
from tokenizer_bpe import SPECIAL_TOKENS
from transformer import Transformer, TransformerConfig

NEW_TOKENS = 64  # longest answer to a built-in problem, as in the stages after SFT
READS = {"carried_over": (BY_HAND,)}  # the files that a probe reads, beside the data of the run

# ---------------------------------------------------------------------------------------------------------------
# Character models.


def corpus():
    """The training text of the character models: Tiny Shakespeare if it is available, else the built-in stories."""
    try:
        find("tinyshakespeare")
        return "tinyshakespeare"
    except DataError:
        return DEFAULT_TASK


def validation_text(settings):
    return "".join(load_text(settings["config"]["data"], "valid"))


def layers(run_dir, figures, settings):
    """Root mean square of the residual stream and of its gradient by layer, before and after training, each time on a
    batch of random ids, drawn anew; and a sample of the trained model's text.

    Both are taken at the output of each block. If a norm placement makes the gradient shrink towards the first layers,
    they train slowly; if it lets the stream grow, the branches of the last layers become small compared with it.
    """
    trained, tokenizer, _ = open_checkpoint(figures["path"])
    seed = settings["config"]["seed"]
    torch.manual_seed(seed)
    results = {}
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
        results[f"stream_{name}"] = [x.detach().square().mean().sqrt().item() for x in outputs]
        results[f"gradient_{name}"] = [x.grad.square().mean().sqrt().item() for x in outputs]
    results["gradient_ratio"] = results["gradient_built"][0] / results["gradient_built"][-1]
    generator = torch.Generator().manual_seed(seed)
    prompt, new_tokens = tokenizer.encode("\n"), min(100, trained.config.context - 1)
    text = generate(trained, [prompt], new_tokens, generator=generator).texts(tokenizer)[0]
    results["text"] = re.sub("|".join(map(re.escape, SPECIAL_TOKENS)), "", text)  # shown, not judged
    ids = torch.tensor(tokenizer.encode(validation_text(settings)[: 32 * 64]))
    return results | attention_figures(trained, ids[: len(ids) // 32 * 32].view(32, -1))


def attention_figures(model, tokens):
    """tokens (B, T) -> the mean entropy of the attention in nats, and the mean attention map of all blocks and heads
    over the first 32 tokens, for a picture."""
    weights = torch.stack(attention_weights(model, tokens))  # (blocks, B, H, T, T)
    return {
        "entropy": attention_entropy(weights).mean().item(),
        "attention": weights[..., :32, :32].mean((0, 1, 2)).tolist(),
    }


@torch.no_grad()
def beyond(run_dir, figures, settings):
    """Loss by position on windows of twice the trained context, unless the model's position table is too short."""
    model, tokenizer, _ = open_checkpoint(figures["path"])
    context = model.config.context
    ids = torch.tensor(tokenizer.encode(validation_text(settings)[: 64 * 8 * context]))
    windows = ids[: len(ids) // (2 * context + 1) * (2 * context + 1)].view(-1, 2 * context + 1)[:64]
    inside = -model(windows[:, :context], targets=windows[:, 1 : context + 1]).mean().item()
    results = {"inside": inside, "outside": math.nan} | attention_figures(model, windows[:16, :context])
    if model.config.positions != "learned":  # a learned table ends at the trained context
        longer = stretched(model, 2 * context)
        loss = -longer(windows[:, :-1], targets=windows[:, 1:])  # (windows, 2·context)
        results["outside"] = loss[:, context:].mean().item()
        results["by_position"] = loss.mean(0).view(16, -1).mean(1).tolist()  # sixteenths of the window
    return results


def stretched(model, context):
    """A model with the same weights and a longer table of rotary angles."""
    sizes = {f.name: getattr(model.config, f.name) for f in fields(model.config)}
    longer = Transformer(TransformerConfig(**sizes | {"context": context}))
    longer.load_state_dict(model.state_dict())
    return longer.eval()


@torch.no_grad()
def copying(run_dir, figures, settings):
    """Share of letters copied correctly, by distance, inside and beyond the distances of training."""
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


def clipping(run_dir, figures, settings):
    """From the log: the distribution of the gradient norm, the share of clipped steps, and the number of loss
    spikes."""
    series = read_metrics(run_dir)
    norms, losses = sorted(series["grad_norm"][1]), series["loss"][1]
    spikes = sum(b > a + 0.5 for a, b in pairwise(losses))
    return {
        "norm_median": norms[len(norms) // 2],
        "norm_p99": norms[int(0.99 * (len(norms) - 1))],
        "clipped_share": 100 * statistics.mean(series["grad_clipped"][1]),
        "spikes": spikes,
    }


# ---------------------------------------------------------------------------------------------------------------
# Policies for the built-in problems.


@dataclass
class Start:
    """Measure a checkpoint that later stages start from, without training it."""

    start: Literal["pretrain", "sft", "student", "teacher", "calls"] = "sft"
    """pretrain: the start of SFT; sft: the start of DPO and of all reinforcement learning; student and teacher: those
    of a distillation; calls: that of agent.py, on its problems."""
    tools: list[str] = field(default_factory=lambda: ["calculator"])
    """calls: what the start was shown, and may use."""
    test_problems: Count = 1000
    """Held-out problems."""
    seed: Seed = 0
    """Seed of the start, which is trained if it does not exist."""
    name: str = "start"
    """Unused: every stage has a name, but this one writes no run directory."""

    def __post_init__(self):
        check(self)


def measure_start(config):
    """The figures of a start that a stage would return after training: "accuracy", "low", "high", "f1", …, "path"."""
    dist = setup()
    if config.start == "calls":
        of_agent = agent.Config(seed=config.seed, tools=config.tools)
        tools = load_tools(of_agent.tools, agent.TOOLS)
        init = calls_start(of_agent, dist, tools, agent.WithTools)
        data, levels, longest = of_agent.data, of_agent.levels, of_agent.max_new_tokens
    else:
        init, tools = make_start(config.seed, config.start), []
        data, levels, longest = DEFAULT_TASK, (1, 2), NEW_TOKENS
    policy, tokenizer, path = open_checkpoint(init, dist.device)
    problems = load_problems(data, "test", config.test_problems, levels)
    respond = agent.WithTools(tools, tokenizer) if tools else None
    return evaluate(policy, tokenizer, problems, longest, dist, respond=respond, dtype="auto") | {"path": str(path)}


def make_start(seed, kind="sft"):
    """The run directory of the start that stages with this seed make for themselves; trained now if it does not
    exist."""
    train = {"pretrain": pretrained_start, "sft": sft_start}
    train |= {"student": student_start, "teacher": teacher_start}
    return train[kind](sft.Config(seed=seed), setup())


def grpo_of_student(config):
    """What grpo.main returns, from the student of a distillation."""
    return grpo.main(replace(config, init=make_start(config.seed, "student")))


def held_out(run_dir, figures, settings):
    """A policy on 200 held-out problems: pass@8 at temperature 1; the share of greedy answers in the right format and
    their length in tokens; the KL to the SFT checkpoint of the same seed, per token of the policy's own samples. For
    stages that begin there, on the built-in problems."""
    problems, dist = load_problems(DEFAULT_TASK, "test", 200, (1, 2)), setup()
    policy, tokenizer, _ = open_checkpoint(figures["path"], dist.device)
    start = open_checkpoint(make_start(settings["config"]["seed"]), dist.device)[0]
    greedy = evaluate(policy, tokenizer, problems, NEW_TOKENS, dist, dtype="auto")
    texts, ended = zip(*((s.text, s.ended) for s in greedy["answers"]), strict=True)
    sampled = evaluate_samples(policy, tokenizer, problems, 8, NEW_TOKENS, dist, dtype="auto")
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    return {
        "pass_at_8": 100 * sampled["pass@8"],
        "sampled": 100 * sampled["pass@1"],
        "format": 100 * statistics.mean(format_reward(texts, problems, ended)),
        "length": greedy["length"],
        "kl": sampled_kl(policy, start, tokenizer, prompts, NEW_TOKENS, dist),
    }


def carried_over(run_dir, figures, settings):
    """What `held_out` measures, whether the story survives, and the greedy accuracy on problems unlike those of
    training (support/shifted.py): 500 of each kind, and the fifty by hand."""
    policy, tokenizer, _ = open_checkpoint(figures["path"], setup().device)
    results = held_out(run_dir, figures, settings)
    for name in SHIFTS:
        result = evaluate(policy, tokenizer, shifted_problems(name, 500), NEW_TOKENS, setup(), dtype="auto")
        results[name.replace(" ", "_")] = 100 * result["accuracy"]
    return results


def training(run_dir, figures, settings):
    """What `held_out` measures, and from the log, means over the steps: the shares of tokens that the clip and the
    correction limited, KL(sampler ‖ trainer) per token; and the median of a step's seconds."""
    series = {name: values for name, (_, values) in read_metrics(run_dir).items()}
    means = {"clipped": (100, "clip_fraction"), "limited": (100, "sampler_limited"), "sampler_kl": (1, "sampler_kl")}
    means = {k: scale * statistics.mean(series[name]) for k, (scale, name) in means.items() if name in series}
    seconds = statistics.median(1 / speed for speed in series["steps_per_second"])
    return held_out(run_dir, figures, settings) | means | {"seconds": seconds}


def earned(run_dir, figures, settings):
    """From the log: the share of rollouts that earned each reward in the last 20 steps, and the share of groups, over
    all steps, in which different rewards got the same advantage (see support.grpo_report.collapse)."""
    series = read_metrics(run_dir)
    results = {
        f"earned_{name}": 100 * statistics.mean(series[f"reward_{name}"][1][-20:])
        for name in ("correct", "format", "brevity")
    }
    if settings["stage"] == "gdpo":
        method = "grpo" if settings["config"]["combine"] == "sum" else "gdpo"
        results["collapsed"] = 100 * statistics.mean(series[f"collapsed_{method}"][1])
    return results


def taught(run_dir, figures, settings):
    """A student on 200 held-out problems: pass@8 and one sample at temperature 1, the KL to the teacher of the same
    seed, per token of its own samples; and how many tokens it was trained on, in thousands."""
    problems, dist, c = load_problems(DEFAULT_TASK, "test", 200, (1, 2)), setup(), settings["config"]
    policy, tokenizer, _ = open_checkpoint(figures["path"], dist.device)
    teacher = open_checkpoint(make_start(c["seed"], "teacher"), dist.device)[0]
    sampled = evaluate_samples(policy, tokenizer, problems, 8, NEW_TOKENS, dist, dtype="auto")
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    results = {
        "pass_at_8": 100 * sampled["pass@8"],
        "sampled": 100 * sampled["pass@1"],
        "teacher_kl": sampled_kl(policy, teacher, tokenizer, prompts, NEW_TOKENS, dist),
    }
    if "rollouts" in c:  # a start has no run
        results["tokens"] = sum(read_metrics(run_dir)["length"][1]) * c["prompts"] * c["rollouts"] / 1000
    return results
