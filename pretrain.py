"""Pretraining: predict the next token, on one CPU core or on many GPUs.

    L = −(1/n) Σ log π(token_t | tokens before t)          n = all tokens of the optimizer step, on all ranks

The text becomes one long stream of ids on disk, cut into windows of `context` tokens; each step reads the next
batch of windows of a shuffled epoch. What is in a step is a pure function of (seed, step), so a resumed run sees
what an uninterrupted one would have seen, and two ranks see what one rank with twice the batch sees.

The optimizer is AdamW (arXiv:1711.05101) with decay on the matrices alone, a linear warm-up (Adam's second moments
are noise at first) and a cosine to a tenth of the peak (or a line, or warm-up, stay, decay); or, for the matrices
inside the blocks, Muon (see `Muon`). Gradients are clipped by their global norm. A step whose loss or gradient is not
finite is never taken.

Mixed precision: bf16 autocast on GPUs that have it and on CPUs with AMX; fp16 with a loss scaler on other GPUs; fp32
on other CPUs. The weights stay fp32. DDP: `torchrun` starts a process per GPU, each holds the whole model and a share
of the batch, and `backward` averages the gradients. FSDP (`--fsdp true`, arXiv:2304.11277), for a model that outgrows
one GPU: each process keeps its part of every weight, gradient and moment alone, and a block's weights are gathered for
as long as it is at work. All of it stands in the loop below, in sight.

This file also owns the plumbing that every later stage imports: set-up, autocast, schedule, optimizers, checkpoint,
log, curves. It stands first, as plain functions and a few small classes, none of which holds the loop. On a first
reading begin at `Config` and `main`, and come back for each helper where it is called.

Run it:
    python pretrain.py                                                  # built-in stories, about 4 minutes on 2 cores
    python pretrain.py --data input.txt --tokenizer char --name shakespeare --steps 1000
    torchrun --nproc_per_node 8 pretrain.py --data input.txt --batch 256
    torchrun --nproc_per_node 8 pretrain.py --data input.txt --batch 256 --fsdp true
    python pretrain.py --resume true --name shakespeare                 # with the flags of the run it continues
    torchrun --nproc_per_node 8 --max-restarts 3 pretrain.py ...        # goes on from last/ when a process died
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from data import batch_at, load_text
from generate import generate
from moe import balancing_losses, expert_load, update_biases
from optim import lr_at, make_optimizers, optimizer_step
from support.checkpoints import open_checkpoint
from support.cli import check_positive, check_rates, run
from support.devices import peak_flops, precision, setup
from support.errors import ConfigError, DivergedError
from support.log import Log
from support.plots import draw_attention, draw_curves, draw_experts, load_record
from support.runs import Interrupt, keep_copy, load_state, open_run, restarted, run_path, save, saved_run, stopped
from support.sharding import gathered, unsharded
from support.streams import make_streams
from support.word_problems import narrative_entropy
from tokenizer_bpe import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
from transformer import Transformer, TransformerConfig

# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config:
    """Pretrain a decoder on text."""

    data: str = "word"
    """word (built-in stories), tinyshakespeare, tinystories, or the path of a text file."""
    skip_bad: bool = False
    """Where --data holds records (.jsonl, .json, .csv): count and leave out those that cannot be used."""
    tokenizer: str = "bpe"
    """bpe, char or byte, trained on the text; or a directory that holds a tokenizer.json."""
    vocab_size: int = 768
    """Of a BPE tokenizer, special tokens included."""
    init: str | None = None
    """Checkpoint to continue from (its architecture and tokenizer are used); default: random weights."""
    name: str = "pretrain"
    """Run directory below runs/."""
    steps: int = 400
    """Optimizer steps."""
    batch: int = 16
    """Windows per optimizer step, over all ranks."""
    micro_batch: int = 16
    """Windows per forward pass of one rank; smaller accumulates gradients and saves memory."""
    optimizer: str = "muon"
    """adamw, or muon for the matrices of the blocks."""
    lr: float = 4e-3
    """Peak learning rate."""
    warmup: int = 20
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """After the warm-up: cosine, linear or wsd (stays, falls over the last fifth)."""
    floor: float = 0.1
    """Last learning rate as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    z_loss: float = 0.0
    """Weight of (log Z)², which keeps the logits small."""
    aux_weight: float = 0.01
    """Mixture of experts: weight of the Switch loss, where the model balances by it."""
    z_weight: float = 0.001
    """Mixture of experts: weight of the routers' z-loss."""
    bias_rate: float = 0.001
    """Mixture of experts balanced by bias: how far the biases move after a step."""
    skip_nonfinite: bool = False
    """Leave out a step whose loss or gradient is not finite, and count it, instead of stopping."""
    eval_every: int = 100
    """Steps between validations (and text samples)."""
    eval_tokens: int = 30_000
    """Validation tokens read each time; the last validation reads all of them."""
    save_every: int = 200
    """Steps between checkpoints of last/."""
    keep: int = 0
    """Keep the newest of these checkpoints under step_STEP as well."""
    seed: int = 0
    """Of the weights, the data order and the dropout."""
    resume: bool = False
    """Continue runs/NAME/last as if it had never stopped."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, fp32, bf16 or fp16; auto is bf16 where the machine is built for it (most GPUs, CPUs with AMX)."""
    compile: bool = False
    """Let torch.compile fuse the model: a minute at the start, faster steps after."""
    fsdp: bool = False
    """With torchrun: share out weights, gradients and moments among the ranks, for a model that outgrows one GPU."""
    recompute: bool = False
    """Activation checkpointing: keep the blocks' inputs only, compute the rest again going back."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""
    model: TransformerConfig = field(default_factory=TransformerConfig)
    """The architecture."""

    def __post_init__(self):
        check_positive(self, "steps", "batch", "micro_batch", "eval_every", "save_every")
        check_rates(self)
        for name in ("floor", "z_loss", "keep"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 0")
        if self.schedule not in ("cosine", "linear", "wsd"):
            raise ConfigError(f"--schedule {self.schedule!r} is not known; use cosine, linear or wsd")
        if self.model.context < 2:
            raise ConfigError(
                f"--model.context is {self.model.context}; it must be at least 2, or nothing stands before"
            )
        if self.fsdp and self.compile:
            raise ConfigError("--fsdp and --compile do not work together here; leave one of them out")


def make_tokenizer(kind, texts, vocab_size):
    if kind == "bpe":
        return BPETokenizer.train(texts, vocab_size)
    if kind == "char":
        return CharTokenizer.train(texts)
    if kind == "byte":
        return ByteTokenizer()
    return load_tokenizer(kind)


def validation_rows(documents, stream, context, separator, most_tokens=None):
    """What validation reads: rows of ids, int arrays of at most context + 1, whose tokens are all real.

    Documents that all fit are read whole, each from its beginning, as a reader would; otherwise the stream is cut into
    windows. `most_tokens` picks some of them, spread evenly.
    """
    if len(documents) > 1 and max(map(len, documents)) < context:
        rows = [np.array([separator, *ids, separator]) for ids in documents]
    else:
        rows = [stream[i : i + context + 1] for i in range(0, len(stream) - context, context)]
    if most_tokens is not None:
        wanted = max(1, most_tokens * len(rows) // sum(len(row) - 1 for row in rows))
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), wanted)).astype(int)]
    return rows


@torch.no_grad()
def validate(model, rows, byte_lengths, dist, autocast):
    """-> mean loss in nats per token, and in bits per byte of text. The rows are spread over the ranks.

    Rows of one length go together; rows of a document are padded behind, where a causal model does not look. A rank
    that has run out of rows passes an empty one: under FSDP every forward needs all ranks.
    """
    model.eval()
    mine = sorted(rows[dist.rank :: dist.world], key=len)
    total, tokens, n_bytes = 0.0, 0, 0
    for i in range(0, math.ceil(len(rows) / dist.world), 16):
        chunk = mine[i : i + 16]
        ids = np.zeros((max(1, len(chunk)), max(map(len, chunk), default=2)), dtype=np.int64)  # (b, L + 1)
        real = np.zeros(ids.shape, dtype=bool)
        for j, row in enumerate(chunk):
            ids[j, : len(row)], real[j, 1 : len(row)] = row, True
        n_bytes += byte_lengths[ids[real]].sum()
        ids, real = torch.from_numpy(ids).to(dist.device), torch.from_numpy(real[:, 1:]).to(dist.device)
        with autocast():
            total -= model(ids[:, :-1], targets=ids[:, 1:])[real].sum().item()
        tokens += real.sum().item()
    model.train()
    total, tokens, n_bytes = dist.sum(total, tokens, n_bytes)
    return total / tokens, total / math.log(2) / max(1, n_bytes)


def loss_of(model, x, y, z_loss):
    """(b, T) ids and their successors -> the sum of −log π(y), and of z_loss · (log Z)² for the gradient alone."""
    if not z_loss:
        loss = -model(x, targets=y).sum()
        return loss, loss
    logprobs, log_z = model(x, targets=y, log_z=True)  # (b, T) each
    loss = -logprobs.sum()
    return loss, loss + z_loss * (log_z**2).sum()


def main(config):
    """Train; returns {"valid_loss" (of the last step, over all of the validation text), "path" (of best/)}."""
    dist = setup(config.device)
    if restarted(config, dist):
        config = replace(config, resume=True)
    if config.batch % dist.world:
        raise ConfigError(f"--batch {config.batch} cannot be shared by {dist.world} processes evenly")
    autocast, scaler = precision(config.dtype, dist)
    if config.fsdp and (dist.world == 1 or scaler.is_enabled()):
        need = "bf16 or fp32" if dist.world > 1 else "torchrun, to start the processes that share the model"
        raise ConfigError(f"--fsdp needs {need}")
    run_path(config)
    if config.model.vocab_size != TransformerConfig.vocab_size and not config.init:
        raise ConfigError("--model.vocab_size is the tokenizer's; for another size of its vocabulary use --vocab_size")
    texts = {split: load_text(config.data, split, config.skip_bad) for split in ("train", "valid")}
    if config.init:
        raw, tokenizer, _ = open_checkpoint(config.init, dropout=config.model.dropout)
        config = replace(config, model=raw.config)
    if config.model.n_expert and config.model.n_expert_active == 1 and config.model.norm_topk_prob and not config.init:
        raise ConfigError(
            "one active expert, whose weight p / p is 1, leaves the router without a gradient: "
            "add --model.norm_topk_prob false"
        )
    if not config.init:
        made = [None]
        if config.resume:
            made = [load_tokenizer(saved_run(run_path(config)))]
        elif dist.is_main:
            made = [make_tokenizer(config.tokenizer, texts["train"], config.vocab_size)]
        if dist.world > 1:
            distributed.broadcast_object_list(made)  # trained once; no file, as there is no run directory yet
        tokenizer = made[0]
        config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    context = config.model.context
    streams = make_streams(config, dist, tokenizer, context, texts)
    digests = {split: Path(stream.filename).name for split, stream in streams.items()}  # of the texts
    run_dir = open_run(config, dist)  # behind all that can refuse what was asked for: a typo moves no earlier run aside
    if not config.init:
        torch.manual_seed(config.seed)
        raw = Transformer(config.model)
    if config.fsdp:  # made in CPU memory; each block goes to the GPU and is cut, before the next one follows
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        with autocast():
            kind = torch.bfloat16 if torch.is_autocast_enabled(dist.device.type) else None
        # Gathered in bf16, half the traffic; gradients are summed in fp32. Embedding and residual stream stay fp32.
        policy = MixedPrecisionPolicy(kind, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(dist.device.type, (dist.world,))
        for block in raw.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(raw, mesh=mesh)  # the rest: embedding, last norm, head
    else:
        raw.to(dist.device)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # the same weights on every rank, but other dropout
    optimizers = make_optimizers(raw, config.optimizer, config.lr, config.weight_decay)
    first, best, skipped, valid_loss = 0, math.inf, 0, math.nan
    if config.resume:
        state = load_state(run_dir, dist, raw, optimizers, scaler, config)
        first, best, skipped = (state.get(name, 0) for name in ("step", "best", "skipped"))
        valid_loss = state.get("whole", math.nan)
        if state.get("streams", digests) != digests:
            raise ConfigError(f"--resume continues a run as it was, but the text of --data {config.data} has changed")
    if config.recompute:
        for block in raw.blocks:
            block.forward = partial(recomputed, block.forward, use_reentrant=False)
    model = torch.compile(raw) if config.compile else raw
    if dist.world > 1 and not config.fsdp:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    log = Log(run_dir, config, dist, first)
    interrupt = Interrupt(dist)

    documents = tokenizer.encode_batch(texts["valid"]) if len(texts["valid"]) > 1 else []
    byte_lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)  # special tokens are no text
    for i in tokenizer.text_ids:
        byte_lengths[i] = len(tokenizer.token_bytes(i))
    entropy = None
    if config.data == "word":  # the built-in stories' entropy is known: no model can go below it
        entropy = narrative_entropy()[0] * len(documents) / sum(len(ids) + 1 for ids in documents)
    with autocast():
        at_peak = raw.flops_per_token(context) / (peak_flops(dist) * dist.world)  # seconds per token
    if dist.is_main:
        tokens = config.batch * context
        print(
            f"{raw.num_params():,} parameters, vocabulary {tokenizer.vocab_size}, {len(streams['train']):,} training "
            f"tokens; {config.steps} steps of {tokens:,} = {config.steps * tokens / len(streams['train']):.1f} epochs"
        )

    def checkpoint(name, step):
        state = None
        if name == "last":
            state = {"step": step, "best": best, "skipped": skipped, "whole": valid_loss, "config": asdict(config)}
            state |= {"streams": digests}
            moments = gathered([o.state_dict() for o in optimizers], dist.is_main)
            state |= {"scaler": scaler.state_dict(), "optimizers": moments}
        written = save(run_dir, name, dist, raw, tokenizer, chat=False, state=state)
        if dist.is_main and written and name == "last":
            if config.keep:
                keep_copy(run_dir, step, config.keep)
            curves()
        return written

    def curves():
        lines = {"entropy of the text": entropy} if entropy else {}
        draw_curves(
            run_dir,
            f"pretraining on {config.data}, seed {config.seed}, {raw.num_params() / 1e6:.1f} M parameters",
            [
                ("loss", {"loss": "train", "valid_loss": "validation"}, "nats per token", lines),
                ("gradient norm", {"grad_norm": "before clipping", "clipped": "share of clipped steps"}, "norm", {}),
                ("learning rate", {"lr": "lr"}, "learning rate", {}),
            ],
        )
        if raw.config.n_expert:
            draw_experts(run_dir)

    share = config.batch // dist.world
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not dist.is_main, unit="step")
    for step in bar:
        # ------------------------------------------------------------------ once in a while
        if interrupt:
            written = checkpoint("last", step)
            bar.close()
            stopped(config.name, step, written, dist)
        if step != first and step % config.save_every == 0:
            checkpoint("last", step)

        # ------------------------------------------------------------------ one optimizer step
        started = time.perf_counter()
        inputs, targets = batch_at(streams["train"], step, share, context, config.seed, dist.rank, dist.world)
        inputs, targets = torch.from_numpy(inputs).to(dist.device), torch.from_numpy(targets).to(dist.device)
        n_tokens = config.batch * context  # of the whole step, all ranks, before the batch is cut
        loss_sum, balancing = 0.0, 0.0
        for i in range(0, share, config.micro_batch):
            x, y = inputs[i : i + config.micro_batch], targets[i : i + config.micro_batch]  # (b, context)
            last = i + config.micro_batch >= share
            # DDP and FSDP sum up the gradients over the ranks in the last backward alone, and divide by their number
            if config.fsdp:
                raw.set_requires_gradient_sync(last)
            alone = last or config.fsdp or dist.world == 1
            with contextlib.nullcontext() if alone else model.no_sync():
                with autocast():
                    loss, objective = loss_of(model, x, y, config.z_loss)
                    if raw.config.n_expert:
                        terms = balancing_losses(raw)  # means over this micro-batch, so they count with its tokens
                        price = y.numel() * (config.aux_weight * terms["aux"] + config.z_weight * terms["z"])
                        objective, balancing = objective + price, balancing + price.detach() / n_tokens
                scaler.scale(objective / n_tokens * dist.world).backward()
            loss_sum += loss.detach() / n_tokens
        lr = lr_at(step, config.steps, config.lr, config.warmup, config.floor, config.schedule)
        (loss_sum,) = dist.sum(loss_sum)
        if math.isfinite(loss_sum):
            norm = optimizer_step(raw, optimizers, scaler, autocast, lr, config.clip)
        else:
            norm = math.nan
            raw.zero_grad(set_to_none=True)
        if not math.isfinite(loss_sum) or not (math.isfinite(norm) or scaler.is_enabled()):
            skipped += 1
            if not config.skip_nonfinite:
                where = f"at step {step} the loss is {loss_sum}, the gradient norm {norm}, the learning rate {lr:.1e}"
                good = saved_run(run_dir) or "none yet"
                mend = "try a smaller --lr or --skip_nonfinite true"
                raise DivergedError(f"{where}; last good checkpoint: {good}; {mend}")

        if raw.config.n_expert:
            (balancing,) = dist.sum(balancing)
            load = raw.config.n_expert * expert_load(raw)  # (layers, E) of this step, 1 is even
            update_biases(raw, config.bias_rate)

        done = step + 1
        speed = n_tokens / (time.perf_counter() - started)
        record = {"loss": loss_sum, "lr": lr, "grad_norm": norm, "clipped": float(0 < config.clip < norm)}
        record |= {"skipped": skipped, "tokens_per_second": speed, "mfu": speed * at_peak}
        if raw.config.n_expert:
            record["balancing_loss"] = balancing
        if done % config.eval_every == 0 or done == config.steps:
            if raw.config.n_expert:
                record |= load_record(load)
            rows = partial(validation_rows, documents, streams["valid"], context, tokenizer.endoftext_id)
            losses = validate(raw, rows(config.eval_tokens), byte_lengths, dist, autocast)
            score = losses[0]  # the best is chosen on the same rows each time
            if done == config.steps:
                losses = validate(raw, rows(None), byte_lengths, dist, autocast)
            record["valid_loss"], record["valid_bits_per_byte"] = losses
            valid_loss = losses[0]
            readable = unsharded(raw, dist)
            if dist.is_main:
                text = sample_text(readable, tokenizer, config.seed)
                bar.write(f"step {done}  loss {loss_sum:.3f}  valid {record['valid_loss']:.3f}  | {text!r}")
                log.samples(done, f"**step {done}** (validation loss {record['valid_loss']:.3f})\n\n{text}")
                log.show(done, histograms={f"weights/{n}": p for n, p in readable.named_parameters()})
                if done == config.steps:  # a second or two
                    draw_attention(run_dir, readable, tokenizer, texts["valid"][0])
                    log.show(done, ["attention"])
            if score < best:
                best = score
                checkpoint("best", done)
        log(done, **record)
        bar.set_postfix(loss=f"{loss_sum:.3f}", lr=f"{lr:.1e}", tok_s=f"{record['tokens_per_second']:,.0f}")
    checkpoint("last", config.steps)
    interrupt.release()
    log.close()
    if dist.is_main:
        known = f", entropy of the text {entropy:.4f}" if entropy else ""
        missed = f"; {skipped} steps skipped" if skipped else ""
        print(f"validation loss {valid_loss:.4f} nats per token{known}{missed}; {run_dir}/best, {run_dir}/curves.png")
    return {"valid_loss": valid_loss, "path": str(run_dir / "best")}


def sample_text(raw, tokenizer, seed, length=60):
    """What the model writes after a document border, at temperature 0.8."""
    length = min(length, raw.config.context - 1)
    generator = torch.Generator().manual_seed(seed)
    rollout = generate(
        raw,
        [[tokenizer.endoftext_id]],
        length,
        1,
        0.8,
        stop_ids=(tokenizer.endoftext_id,),
        generator=generator,
    )
    return rollout.texts(tokenizer)[0].strip()


if __name__ == "__main__":
    run(main, Config, __doc__)
