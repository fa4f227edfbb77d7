"""Pretraining: predict the next token, on one CPU core or on many GPUs.

    L = −(1/n) Σ log π(x_t | x_1 … x_{t−1})        n = all tokens of the optimizer step, over micro-batches and ranks

in nats per token. A model that knows nothing has L = log V, and none gets below the entropy of the text, which for the
built-in stories is known: the dashed line in curves.png. Divided by log 2 and by a token's mean bytes, L is in bits
per byte, which compares models of different tokenizers.

One step:

    windows = batch_at(stream, step)                the next B windows of a shuffled epoch            (B, T + 1)
    x, y    = windows[:, :-1], windows[:, 1:]       each token and the one after it; a rank's share   (B / world, T)
    n       = B · T                                 of all ranks, counted before the batch is cut
    for x, y in cut(x, y, micro_batch):             a forward pass each, as much as memory holds      (b, T)
        log π = log softmax(model(x))[y]            in bf16 under autocast, the softmax in fp32       (b, T)
        loss  = −Σ log π / n                        parts of L: they add up to it, however it is cut  ()
        backward(loss · world)                      gradients add up; in the last pass the ranks
                                                    average theirs, and · world makes that a sum
    η = lr_at(step); clip ‖g‖; optimizer step       every rank the same

The text is one long stream of ids on disk. What is in a step is a pure function of (seed, step), so a resumed run sees
what an uninterrupted one would have seen, and two ranks see what one rank with twice the batch sees.

Mixed precision (arXiv:1710.03740): weights, gradients and sums stay fp32; autocast runs the matrix products in bf16
where the machine is built for it (most GPUs, CPUs with AMX), in fp16 on older GPUs. fp16 reaches down to 6e-8 only:
there the scaler multiplies the loss by S before the backward and divides the gradients by S after it (optim.py).

Many GPUs: `torchrun` starts one process for each. Weight, gradient and AdamW's two moments are 16 bytes a parameter
(Muon has one moment: 12).

    DDP     the default       each rank holds the whole model: 16 bytes a parameter on every GPU
    FSDP    --fsdp true       each rank keeps its part of all four, 16 / world bytes, and gathers a block's weights
                              for as long as the block is at work (ZeRO-3, arXiv:1910.02054; arXiv:2304.11277)

The defaults train 1.7 M parameters on built-in stories, 400 steps of 16 windows of 256 tokens: Muon for the blocks'
matrices and AdamW for the rest, 20 steps of warm-up and a cosine to a tenth of the peak, decay 0.1, clipping at 1.
Off: FSDP, `--compile`, `--recompute` (arXiv:1604.06174), dropout, and a mixture of experts (`--model.n_expert 8`; the
price that its routers pay is moe.py's).

A step whose loss or gradient is not finite is never taken: the run stops there, or with `--skip_nonfinite true` counts
it and goes on.

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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from attention import attention_weights
from data import DEFAULT_TASK, batch_at, load_text, task_of
from generate import generate
from moe import balancing_price, load_record, update_biases
from optim import lr_at, make_optimizers, optimizer_step
from support.checkpoints import open_checkpoint
from support.checks import Amount, Count, Whole
from support.cli import run_script
from support.devices import peak_flops, precision, setup
from support.errors import ConfigError
from support.plots import draw_attention, draw_curves, draw_experts
from support.runs import RUNS, Run, RunConfig, restarted, run_path, saved_run
from support.sharding import unsharded
from support.streams import make_streams
from tokenizer_bpe import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
from transformer import Transformer, TransformerConfig

# ---------------------------------------------------------------------------------------------------------------
# The loss, in training and in validation.


def next_token_loss(model, x, y):
    """x (b, T) ids, y (b, T) the id after each -> −Σ log π(y), in nats, a scalar in fp32. `model` may be wrapped."""
    return -model(x, targets=y).sum()


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
def validate(policy, rows, byte_lengths, dist, autocast):
    """-> mean loss in nats per token, and in bits per byte of text. The rows are spread over the ranks; byte_lengths
    (V,) has the bytes of each token's text.

    Rows of one length go together; rows of a document are padded on the right, where a causal model does not look. A
    rank that has run out of rows passes an empty one: under FSDP every forward needs all ranks.
    """
    policy.eval()
    own = sorted(rows[dist.rank :: dist.world], key=len)
    total, tokens, n_bytes = 0.0, 0, 0
    for i in range(0, math.ceil(len(rows) / dist.world), 16):
        chunk = own[i : i + 16]
        ids = np.zeros((max(1, len(chunk)), max(map(len, chunk), default=2)), dtype=np.int64)  # (b, L + 1)
        real = np.zeros(ids.shape, dtype=bool)
        for j, row in enumerate(chunk):
            ids[j, : len(row)], real[j, 1 : len(row)] = row, True
        n_bytes += byte_lengths[ids[real]].sum()
        ids, real = torch.from_numpy(ids).to(dist.device), torch.from_numpy(real[:, 1:]).to(dist.device)
        with autocast():
            total -= policy(ids[:, :-1], targets=ids[:, 1:])[real].sum().item()
        tokens += real.sum().item()
    policy.train()
    total, tokens, n_bytes = dist.sum(total, tokens, n_bytes)
    return total / tokens, total / math.log(2) / max(1, n_bytes)


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config(RunConfig):
    """Pretrain a decoder on text."""

    data: str = DEFAULT_TASK
    """The name of a task (default: built-in stories), tinyshakespeare, tinystories, or the path of a text file."""
    skip_bad: bool = False
    """If --data is a file of records (.jsonl, .json, .csv): skip and count those that cannot be used."""
    tokenizer: str = "bpe"
    """bpe, char or byte, trained on the text; or a directory that holds a tokenizer.json."""
    vocab_size: int = 768
    """Vocabulary of a BPE tokenizer that is trained, special tokens included."""
    init: str | None = None
    """Checkpoint to continue from (its architecture and tokenizer are used); default: random weights."""
    name: str = "pretrain"
    steps: Count = 400
    batch: Count = 16
    """Windows per optimizer step, over all ranks."""
    micro_batch: Count = 16
    """Windows per forward pass of one rank; fewer means gradient accumulation and less memory."""
    lr: Amount = 4e-3
    warmup: Whole = 20
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Learning rate after the warm-up: cosine, linear, or wsd (constant, then falling over the last fifth)."""
    floor: Amount = 0.1
    """Final learning rate as a share of the peak."""
    weight_decay: Amount = 0.1
    aux_weight: Amount = 0.01
    """Mixture of experts with balancing aux: weight of the load-balancing loss of Switch."""
    z_weight: Amount = 0.001
    """Mixture of experts: weight of the routers' z-loss."""
    bias_rate: Amount = 0.001
    """Mixture of experts with balancing bias: how far the biases move after a step."""
    skip_nonfinite: bool = False
    """Skip and count a step whose loss or gradient is not finite, instead of stopping."""
    eval_every: Count = 100
    """Steps between validations (and text samples)."""
    eval_tokens: Count = 30_000
    """Validation tokens per evaluation; the last one uses all of them."""
    save_every: Count = 200
    keep: Whole = 0
    """Also keep this many of the newest checkpoints, as step_STEP; 0 keeps none."""
    compile: bool = False
    """Use torch.compile: a minute at the start, faster steps after that."""
    fsdp: bool = False
    """With torchrun: shard weights, gradients and optimizer state over the ranks, for a model too large for one GPU."""
    recompute: bool = False
    """Activation checkpointing: keep only the inputs of the blocks and compute the rest again in the backward pass."""
    model: TransformerConfig = field(default_factory=TransformerConfig)
    """The architecture."""

    def __post_init__(self):
        super().__post_init__()
        if self.model.context < 2:
            context = self.model.context
            raise ConfigError(f"--model.context is {context}; it must be at least 2, or nothing stands before")
        if self.model.n_expert and self.model.n_expert_active == 1 and self.model.norm_topk_prob and not self.init:
            raise ConfigError(
                "one active expert, whose weight p / p is 1, leaves the router without a gradient: "
                "add --model.norm_topk_prob false"
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


def make_decoder(config, dist, texts):
    """-> (the decoder in CPU memory, its tokenizer, the config with the decoder's architecture in it): what --init
    holds; or random weights, with a tokenizer of these texts."""
    if config.init:
        policy, tokenizer, _ = open_checkpoint(config.init, dropout=config.model.dropout)
        return policy, tokenizer, replace(config, model=policy.config)
    if config.model.vocab_size != TransformerConfig.vocab_size:
        raise ConfigError("--model.vocab_size is the tokenizer's; for another size of its vocabulary use --vocab_size")
    if config.resume:
        tokenizer = load_tokenizer(saved_run(run_path(config)))
    else:  # trained once; no file, as there is no run directory yet
        tokenizer = dist.from_main(lambda: make_tokenizer(config.tokenizer, texts, config.vocab_size))
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    torch.manual_seed(config.seed)  # the same weights on every rank
    return Transformer(config.model), tokenizer, config


def distribute(policy, config, dist, autocast):
    """Bring the decoder onto this rank's device, in place -> the model that the loop calls: recomputing, compiled, and
    with the other ranks in step, as asked for."""
    if config.fsdp:
        shard(policy, dist, autocast)
    else:
        policy.to(dist.device)
    if config.recompute:
        for block in policy.blocks:
            block.forward = partial(recomputed, block.forward, use_reentrant=False)
    model = torch.compile(policy) if config.compile else policy
    if dist.world > 1 and not config.fsdp:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    return model


def shard(policy, dist, autocast):
    """FSDP: each block goes from CPU memory to the GPU and is cut, before the next one follows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with autocast():
        kind = torch.bfloat16 if torch.is_autocast_enabled(dist.device.type) else None
    # Gathered in bf16, half the traffic; gradients are summed in fp32. Embedding and residual stream stay fp32.
    mixed = MixedPrecisionPolicy(kind, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(dist.device.type, (dist.world,))
    for block in policy.blocks:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(policy, mesh=mesh)  # the rest: embedding, last norm, head


def bytes_of_tokens(tokenizer):
    """(V,): the bytes of each token's text; special tokens are no text and have none."""
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for i in tokenizer.text_ids:
        lengths[i] = len(tokenizer.token_bytes(i))
    return lengths


def known_entropy(data, documents):
    """Of a task's generated text, in nats per token of these documents, of which each ends with one more: no model can
    go below it. None where it is not known."""
    if task_of(data).entropy is None:
        return None
    nats, _ = task_of(data).entropy()  # per document
    return nats * len(documents) / sum(len(ids) + 1 for ids in documents)


def main(config):
    """Train; returns {"valid_loss" (of the last step, over all of the validation text), "path" (of best/)}."""
    dist = setup(config.device)
    if restarted(config, dist):
        config = replace(config, resume=True)
    share = dist.per_rank("batch", config.batch)  # windows of a step on this rank
    autocast, scaler = precision(config.dtype, dist)
    if config.fsdp and (dist.world == 1 or scaler.is_enabled()):
        need = "bf16 or fp32" if dist.world > 1 else "torchrun, to start the processes that share the model"
        raise ConfigError(f"--fsdp needs {need}")
    run_path(config)  # what is wrong with --name or --resume is said before the text is read
    texts = {split: load_text(config.data, split, config.skip_bad) for split in ("train", "valid")}
    policy, tokenizer, config = make_decoder(config, dist, texts["train"])
    context = config.model.context  # T
    streams = make_streams(config, dist, tokenizer, context, texts)
    documents = tokenizer.encode_batch(texts["valid"]) if len(texts["valid"]) > 1 else []
    rows = partial(validation_rows, documents, streams["valid"], context, tokenizer.endoftext_id)
    byte_lengths, entropy = bytes_of_tokens(tokenizer), known_entropy(config.data, documents)

    model = distribute(policy, config, dist, autocast)
    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    state = {"skipped": 0, "whole": math.nan}  # steps left out; the last validation loss
    curves = partial(draw, config, policy.num_params(), entropy)
    run = Run(config, dist, policy, tokenizer, optimizers, scaler, best=math.inf, lower_is_better=True, chat=False,
              parts={"streams": streams}, on_save=curves, **state)  # fmt: skip
    with autocast():
        at_peak = policy.flops_per_token(context) / (peak_flops(dist) * dist.world)  # seconds per token
    if dist.is_main:
        n_tokens, n_text = config.batch * context, len(streams["train"])
        print(
            f"{policy.num_params():,} parameters, vocabulary {tokenizer.vocab_size}, {n_text:,} training tokens; "
            f"{config.steps} steps of {n_tokens:,} = {config.steps * n_tokens / n_text:.1f} epochs"
        )

    for step in run.steps():
        # ------------------------------------------------------------------ the batch
        started = time.perf_counter()
        windows = batch_at(streams["train"], step, share, context, config.seed, dist.rank, dist.world)
        inputs, targets = (torch.from_numpy(ids).to(dist.device) for ids in windows)  # (share, T) each
        n_tokens = config.batch * context  # of all ranks, counted before the batch is cut

        # ------------------------------------------------------------------ one optimizer step
        loss_sum, price_sum = 0.0, 0.0
        for i in range(0, share, config.micro_batch):
            x, y = inputs[i : i + config.micro_batch], targets[i : i + config.micro_batch]  # (b, T)
            last = i + config.micro_batch >= share
            # DDP and FSDP sum up the gradients over the ranks in the last backward alone, and divide by their number
            if config.fsdp:
                policy.set_requires_gradient_sync(last)
            alone = last or config.fsdp or dist.world == 1
            with contextlib.nullcontext() if alone else model.no_sync():
                with autocast():
                    loss = next_token_loss(model, x, y)
                    # what routers pay for crowding, a mean over this micro-batch; 0 without a mixture of experts
                    price = y.numel() * balancing_price(policy, config.aux_weight, config.z_weight)
                scaler.scale((loss + price) / n_tokens * dist.world).backward()
            loss_sum += loss.detach() / n_tokens
            price_sum += price.detach() / n_tokens
        loss_sum, price_sum = dist.sum(loss_sum, price_sum)
        lr = lr_at(step, config.steps, config.lr, config.warmup, config.floor, config.schedule)
        norm = math.nan
        if math.isfinite(loss_sum):
            norm = optimizer_step(policy, optimizers, scaler, autocast, lr, config.clip)
        policy.zero_grad(set_to_none=True)
        if not (math.isfinite(loss_sum) and (math.isfinite(norm) or scaler.is_enabled())):
            run.state.skipped += 1
            if not config.skip_nonfinite:
                good = saved_run(run.path) or "none yet"
                mend = f"last good checkpoint: {good}; try a smaller --lr or --skip_nonfinite true"
                run.check_finite(lr, norm, mend, loss=loss_sum)

        # ------------------------------------------------------------------ look
        speed = n_tokens / (time.perf_counter() - started)
        record = {"loss": loss_sum, "lr": lr, "grad_norm": norm, "clipped": float(0 < config.clip < norm)}
        record |= {"skipped": run.state.skipped, "tokens_per_second": speed, "mfu": speed * at_peak}
        if config.model.n_expert:
            record |= {"balancing_loss": price_sum} | (load_record(policy) if run.due(config.eval_every) else {})
            update_biases(policy, config.bias_rate)
        if run.due(config.eval_every):
            losses = validate(policy, rows(config.eval_tokens), byte_lengths, dist, autocast)
            score = losses[0]  # the best is chosen on the same rows each time
            if step + 1 == config.steps:
                losses = validate(policy, rows(None), byte_lengths, dist, autocast)
            record["valid_loss"], record["valid_bits_per_byte"] = losses
            run.state.whole = losses[0]
            show(run, policy, tokenizer, record, texts["valid"][0])
            run.keep_best(score)
        run.log(step + 1, **record)
        run.bar.set_postfix(loss=f"{loss_sum:.3f}", lr=f"{lr:.1e}", tok_s=f"{speed:,.0f}")
    run.close()

    if dist.is_main:
        floor = f", entropy of the text {entropy:.4f}" if entropy else ""
        skipped = f"; {run.state.skipped} steps skipped" if run.state.skipped else ""
        where = f"{run.path}/best, {run.path}/curves.png"
        print(f"validation loss {run.state.whole:.4f} nats per token{floor}{skipped}; {where}")
    return {"valid_loss": run.state.whole, "path": str(run.path / "best")}


def draw(config, n_params, entropy):
    """curves.png, and of a mixture of experts experts.png."""
    draw_curves(
        RUNS / config.name,
        f"pretraining on {config.data}, seed {config.seed}, {n_params / 1e6:.1f} M parameters",
        [
            (
                "loss",
                {"loss": "train", "valid_loss": "validation"},
                "nats per token",
                {"entropy of the text": entropy} if entropy else {},
            ),
            ("gradient norm", {"grad_norm": "before clipping", "clipped": "share of clipped steps"}, "norm", {}),
            ("learning rate", {"lr": "lr"}, "learning rate", {}),
        ],
    )
    if config.model.n_expert:
        draw_experts(RUNS / config.name)


def show(run, policy, tokenizer, record, text):
    """Where the run stands: a sample of what the model writes, its weights, and at the end what its heads look at in a
    text. All ranks must call."""
    policy, step = unsharded(policy, run.dist), run.done + 1
    if not run.dist.is_main:
        return
    loss, valid_loss, sample = record["loss"], record["valid_loss"], sample_text(policy, tokenizer, run.config.seed)
    run.say(f"step {step}  loss {loss:.3f}  valid {valid_loss:.3f}  | {sample!r}")
    run.log.samples(step, f"**step {step}** (validation loss {valid_loss:.3f})\n\n{sample}")
    run.log.show(step, histograms={f"weights/{name}": weight for name, weight in policy.named_parameters()})
    if step == run.config.steps:  # a second or two
        draw_attention(run.path, *first_tokens(policy, tokenizer, text))
        run.log.show(step, ["attention"])


def first_tokens(policy, tokenizer, text, most=24):
    """The attention among the first tokens of a text: per block the weights (H, T, T); and those T tokens as text."""
    ids = tokenizer.encode(text[: 40 * most])[: min(most, policy.config.context)]
    training = policy.training
    policy.eval()
    weights = attention_weights(
        policy, torch.tensor([ids], device=policy.embed.weight.device)
    )  # per block (1, H, T, T)
    policy.train(training)
    return [w[0] for w in weights], [tokenizer.decode([i]) for i in ids]


def sample_text(policy, tokenizer, seed, length=60):
    """What the model writes after a document border, at temperature 0.8."""
    end, generator = tokenizer.endoftext_id, torch.Generator().manual_seed(seed)
    length = min(length, policy.config.context - 1)
    rollout = generate(policy, [[end]], length, temperature=0.8, stop_ids=(end,), generator=generator)
    return rollout.texts(tokenizer)[0].strip()


if __name__ == "__main__":
    run_script(main, Config, __doc__)
