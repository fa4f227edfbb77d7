"""Pretraining: predict the next token, on one CPU core or on many GPUs (GPT: Radford et al. 2018).

By the chain rule of probability a text x_1 x_2 … has the probability Π_t π(x_t | x_1 … x_{t−1}), π the model. Training
makes the text as likely as it can, which is to make the mean of −log π as small as it can. With y the target of a
position, the token after it, and z (V,) the logits there, V the size of the vocabulary:

    L     = −(1/n) Σ log π(y | the window up to it)     nats per token (natural logarithms; 1 nat = 1.44 bits), over
                                                        all n targets of the optimizer step
    dL/dz = (softmax(z) − onehot(y)) / n                as log π(y) = z_y − log Σ_v exp z_v, for each target

One step, for B windows of T tokens (main has the same four parts). A forward pass takes b of them, a micro-batch. With
torchrun there are `world` processes, the ranks: each takes B / world of the windows, and their gradients are averaged:

    1. batch     inputs, targets = batch_at(stream, step)   the next windows of a shuffled epoch, and the same
                                                            windows one token later              (B / world, T) each
                 n = B · T                                  targets of the whole step, over micro-batches and ranks
    2. gradient  for x, y in micro_batches:                 of this rank's B / world windows             (b, T) each
                     nll = next_token_loss(model, x, y)     −Σ log π(y)                           (b, T) -> ()
                     loss = (nll + balancing) / n           balancing: b · T times the routers' losses; 0 if no experts
                     backward(loss · world)                 gradients add up over micro-batches; DDP and FSDP average
                                                            them over the ranks, world makes it a sum
    3. update    lr = lr_at(step)                           a line up, then a cosine down to --floor · --lr
                 optimizer_step(policy, lr, clip)           g ← g · min(1, clip / ‖g‖), ‖g‖ over all weights (--clip 0
                                                            leaves g alone); Muon for the blocks' matrices but a
                                                            router, AdamW for the rest
                 update_biases(policy)                      of experts, with --model.balancing bias
    4. look      look.at_step(record)                       log; every --eval_every steps validate, write a sample,
                                                            keep the best checkpoint

The defaults run 400 such steps on built-in stories: B = 16, T = 256, V = 768, 1.7 M parameters, one micro-batch per
step, one process, 20 steps of warm-up, weight decay 0.1, clip 1; bf16 where the machine multiplies it, fp16 on older
NVIDIA GPUs, else fp32. Off: accumulation, --compile, --recompute (arXiv:1604.06174), dropout, experts (--model.n_expert
8; moe.py). In GPT's paper: --optimizer adamw --lr 2.5e-4 --warmup 2000 --floor 0 --weight_decay 0.01 --batch 64
--vocab_size 40478 and, each after --model., context 512, n_layer 12, n_head 12, n_kv_head 12, width 768, norm layer,
norm_placement post, positions learned, activation gelu, bias true, qk_norm false, dropout 0.1 (β₂: 0.999, here 0.95).

Which option changes what:

    the gradient     --data, --tokenizer, --vocab_size, --batch, --model.context and --seed (which tokens are in it),
                     --init and --model.* (the model), --clip (its length). With experts --aux_weight and
                     --z_weight, which add two losses of the routers
    the update       --optimizer, --lr, --warmup, --steps, --schedule, --floor, --weight_decay, --skip_nonfinite; with
                     experts --bias_rate
    only rounding    --micro_batch, the number of ranks, --fsdp, --recompute, --compile, --dtype: they change memory and
                     time. (But dropout draws other numbers in another cut and under --compile; the balancing loss
                     and --model.capacity_factor are those of each micro-batch; fp16 may skip steps, see the traps.)

Traps:
  * n is counted before the batch is cut. Averaging each micro-batch by itself, and then the means, is another loss
    wherever one micro-batch is smaller than the others (demo).
  * A window begins anywhere and may hold several stories. A target sees its own window alone, other stories in it
    included (sft.py's packing masks these). Validation reads each story by itself, from its beginning, if every story
    fits into T tokens: `loss` and `valid_loss` differ for that reason too, not by overfitting alone.
  * The loss starts near log V, as the logits of random weights are all near 0. On fresh text it cannot, on average, get
    below the entropy, which is known for the built-in stories (the dashed line in curves.png). L / log 2 / (bytes per
    token) is bits per byte: only that compares tokenizers.
  * --optimizer adamw wants a lower learning rate than Muon (optim.py).
  * A loss or gradient that is not finite never reaches the weights or the experts' biases: the run stops, or, with
    --skip_nonfinite true, counts the step and goes on. (In fp16 a gradient may overflow: the scaler skips that update
    and halves its scale, and the run stops only if the scale falls below 1.)

Mixed precision (arXiv:1710.03740): weights, their gradients and what is summed over many numbers (softmax, norms, the
loss) stay fp32; autocast runs the matrix products in bf16, or on older GPUs in fp16, where the scaler keeps small
gradients from rounding to 0 (optim.py).

Many GPUs: torchrun starts one process, a rank, per GPU. Which windows a step reads depends on (seed, step) alone, so
two ranks read what one would, and a resumed run what an uninterrupted one would. Weight, gradient and AdamW's two
moments are 16 bytes per parameter (12 for a matrix that Muon trains: one moment).

    DDP     the default       every rank holds the whole model, 16 bytes per parameter, and 4 more: the buckets that it
                              sends hold the gradients a second time
    FSDP    --fsdp true       every rank holds 16 / world bytes per parameter. It gathers a block's weights only while
                              that block computes, and embedding and output from the forward pass to the end of the
                              backward pass (ZeRO-3, arXiv:1910.02054; arXiv:2304.11277). While gradients add up over
                              micro-batches it also holds them whole

Run it:
    python pretrain.py                                                  # built-in stories, minutes on two CPU cores
    python pretrain.py --demo                                           # the loss and its gradient by hand
    python pretrain.py --data input.txt --tokenizer char --name shakespeare --steps 1000
    torchrun --nproc_per_node 8 pretrain.py --data input.txt --batch 256                # add --fsdp true for FSDP
    python pretrain.py --resume true --name shakespeare ...             # with the flags of the run it continues
    torchrun --nproc_per_node 8 --max-restarts 3 pretrain.py ...        # continues from last/ if a process dies
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from data import DEFAULT_TASK, batch_at, load_text
from moe import balancing_loss, update_biases
from optim import lr_at, make_optimizers, optimizer_step
from support.checks import Amount, Count, Whole
from support.cli import run_script
from support.content import weights_of
from support.decoder_setup import check_decoder, make_decoder
from support.devices import precision, refuse_recompute, setup
from support.errors import ConfigError
from support.expert_load import load_record
from support.pretrain_report import Look
from support.runs import Run, RunConfig, run_path
from support.sharding import averaging, refuse_fsdp
from support.streams import make_streams
from transformer import TransformerConfig

# ---------------------------------------------------------------------------------------------------------------
# The loss.


def next_token_loss(model, x, y):
    """x (b, T) ids, y (b, T) the id after each -> −Σ log π(y) in nats, a scalar in fp32. `model` may be wrapped.

    With targets the model returns log_softmax(logits)[y], (b, T). With a large vocabulary the logits, (b, T, V), would
    be the largest tensor of the step: above 64 MiB they are computed some tokens at a time.
    """
    return -model(x, targets=y).sum()


def demo():
    """One step on six tokens: the loss and its gradient by hand, and why n is counted before the batch is cut."""
    names, ln2 = "abc", math.log(2)
    table = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64) * ln2  # (V, V)
    table.requires_grad_()  # each row's softmax is ½ once and ¼ twice

    def model(x, targets):  # (b, T) -> (b, T) log π: a model that sees one token only; table[x] are its logits
        return table[x].log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)

    windows = torch.tensor([[names.index(c) for c in window] for window in ("aba", "bab", "cac")])  # (B, T + 1)
    x, y = windows[:, :-1], windows[:, 1:]  # (3, 2) each: n = 6
    print("three windows, aba bab cac: six targets. The logits after a are (0, ln 2, 0), so the softmax is (¼, ½, ¼)")
    print("  x → y     π(y)    −log π(y)    softmax − onehot(y)")
    for i, j in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        p = table[i].softmax(-1)
        gradient = "  ".join(f"{g:+.2f}" for g in (p - torch.eye(3)[j]).tolist())
        print(f"  {names[i]} → {names[j]}     {p[j]:.2f}    {-p[j].log():.4f}       {gradient}")

    loss = next_token_loss(model, x, y) / 6
    (gradient,) = torch.autograd.grad(loss, table)
    assert abs(loss.item() - 8 * ln2 / 6) < 1e-12  # four times ½, twice ¼: 4 ln 2 + 2 · 2 ln 2
    by_hand = [[0.75, -0.5, -0.25], [-1, 0.5, 0.5], [-0.75, 0.25, 0.5]]  # after a, b, c: sums of the lines above
    worst = (gradient - torch.tensor(by_hand, dtype=torch.float64) / 6).abs().max().item()
    assert worst < 1e-12
    print(f"loss = 8 ln 2 / 6 = {loss:.4f} nats per token = {loss / ln2:.3f} bits")
    print(f"gradient of the logits after a: (+0.75 -0.50 -0.25) / 6; autograd's differ by {worst:.0e} at most")

    parts = [next_token_loss(model, x[i:j], y[i:j]).item() for i, j in ((0, 2), (2, 3))]  # 4 targets, then 2
    added, averaged = sum(part / 6 for part in parts), (parts[0] / 4 + parts[1] / 2) / 2
    assert abs(added - 8 * ln2 / 6) < 1e-12
    assert abs(averaged - 1.5 * ln2) < 1e-12
    print(f"micro-batches of two windows and one: 4 ln 2 / 6 + 4 ln 2 / 6 = {added:.4f}, the same")
    print(f"the mean of their means counts the last window double: (ln 2 + 2 ln 2) / 2 = {averaged:.4f}, another loss")


# ---------------------------------------------------------------------------------------------------------------
# The settings.


@dataclass
class Config(RunConfig):
    """Pretrain a decoder on text. What every stage shares is in support/runs.py."""

    data: str = DEFAULT_TASK
    """The name of a task (default: built-in stories), tinyshakespeare, tinystories, or the path of a text file."""
    tokenizer: str = "bpe"
    """bpe, char or byte, trained on the text; or a directory that holds a tokenizer.json."""
    vocab_size: int = 768
    """Vocabulary of a BPE tokenizer that is trained, special tokens included."""
    init: str | None = None
    """Checkpoint to start from (its architecture and tokenizer are used); default: random weights."""
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
    """Mixture of experts with balancing aux: weight of the Switch loss (moe.py)."""
    z_weight: Amount = 0.001
    """Mixture of experts: weight of the routers' z-loss."""
    bias_rate: Amount = 0.001
    """Mixture of experts with balancing bias: how far the biases move after a step."""
    skip_nonfinite: bool = False
    """Skip and count a step whose loss or gradient is not finite, instead of stopping."""
    eval_every: Count = 100
    """Steps between validations (and text samples)."""
    eval_tokens: Count = 30_000
    """Validation tokens per evaluation; the last one uses all (of texts longer than a window, all whole windows)."""
    save_every: Count = 200
    keep: Whole = 0
    """Also keep this many of the newest checkpoints, as step_STEP; 0 keeps none."""
    compile: bool = False
    """Use torch.compile: a minute at the start, often faster steps after that."""
    fsdp: bool = False
    """With torchrun: shard weights, gradients and optimizer state over the ranks, for a model too large for one GPU."""
    recompute: bool = False
    """Activation checkpointing: keep only the inputs of the blocks and compute the rest again in the backward pass."""
    model: TransformerConfig = field(default_factory=TransformerConfig)
    """The architecture."""

    def __post_init__(self):
        super().__post_init__()
        check_decoder(self)
        if self.fsdp and self.compile:
            raise ConfigError("--fsdp and --compile do not work together here; leave one of them out")


# ---------------------------------------------------------------------------------------------------------------
# One rank or many.


def distribute(policy, config, dist, autocast):
    """Move the decoder to this rank's device, in place -> the model that the loop calls: the decoder itself, or wrapped
    by torch.compile and DDP."""
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
    """FSDP, in place: one block at a time moves from CPU memory to the GPU and is split among the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with autocast():
        dtype = torch.bfloat16 if torch.is_autocast_enabled(dist.device.type) else None
    # The blocks' weights are gathered in bf16, half the traffic; gradients are summed in fp32, and the
    # residual stream stays fp32.
    mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(dist.device.type, (dist.world,))
    for block in policy.blocks:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(policy, mesh=mesh)  # the rest: embedding, last norm, head


# ---------------------------------------------------------------------------------------------------------------
# The loop.


def main(config):
    """Train -> {"valid_loss": after the last step, "path": of best/ or, without one, of last/}. The loss is over the
    whole validation text (a long one: all its whole windows); best/ is chosen by the loss on --eval_tokens of it."""
    dist = setup(config.device)
    per_rank = dist.per_rank("batch", config.batch)  # B / world: the windows of a step on this rank
    autocast, scaler = precision(config.dtype, dist)
    refuse_fsdp(config, dist, scaler)
    if config.recompute:
        refuse_recompute(config.model.dropout, dist)
    run_path(config)  # raises on a bad --name or --resume before the text is read
    texts = {split: load_text(config.data, split, config.skip_bad) for split in ("train", "valid")}
    policy, tokenizer, config = make_decoder(config, dist, texts)
    context = config.model.context  # T
    streams = make_streams(config, dist, tokenizer, context, texts)  # {split: (tokens,)}, ids of all documents, on disk
    reads = weights_of(config.init, policy) if config.init else {}  # what a resumed run must find unchanged
    # `model` wraps `policy`: forward passes of the loss go through it, everything else through `policy`.
    model = distribute(policy, config, dist, autocast)
    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    # run: steps, checkpoints, what a resumed run must know (parts, skipped, last_valid). look: logs and validates.
    run = Run(config, dist, policy, tokenizer, optimizers, scaler, best=math.inf, lower_is_better=True, chat=False,
              parts={"streams": streams}, reads=reads, skipped=0, last_valid=math.nan)  # fmt: skip
    look = Look(run, texts["valid"], streams, autocast)
    look.before()

    # `policy` is in training mode, as it was built: dropout acts. An evaluation switches it off and on again.
    for step in run.steps():  # which also writes last/ every --save_every steps and on Ctrl-C; run.close() at the end
        # 1. the batch: B windows of T tokens, of which this rank reads its part
        started = time.perf_counter()
        batch = batch_at(streams["train"], step, per_rank, context, config.seed, dist.rank, dist.world)
        inputs, targets = (torch.from_numpy(ids).to(dist.device) for ids in batch)  # (B / world, T) each
        n = config.batch * context  # targets of the whole step, over micro-batches and ranks

        # 2. the gradient: parts of it add up, over micro-batches and ranks
        nll_mean, balancing_mean = 0.0, 0.0  # over the n targets
        for i in range(0, per_rank, config.micro_batch):
            x, y = inputs[i : i + config.micro_batch], targets[i : i + config.micro_batch]  # (b, T) each
            last = i + config.micro_batch >= per_rank
            with averaging(model, last):  # DDP and FSDP average over the ranks in the last backward pass alone
                with autocast():
                    nll = next_token_loss(model, x, y)  # (): a sum over this micro-batch
                    # The routers' losses, a mean over this micro-batch, times its targets; 0 without experts
                    balancing = y.numel() * balancing_loss(policy, config.aux_weight, config.z_weight)
                scaler.scale((nll + balancing) / n * dist.world).backward()  # * world makes the average a sum
            nll_mean += nll.detach() / n
            balancing_mean += balancing.detach() / n
        nll_mean, balancing_mean = dist.sum(nll_mean, balancing_mean)

        # 3. the update: clip, then a step of Muon and AdamW; none where the loss or the gradient is not finite
        lr = lr_at(step, config.steps, config.lr, config.warmup, config.floor, config.schedule)
        if math.isfinite(nll_mean):
            norm = optimizer_step(policy, optimizers, scaler, autocast, lr, config.clip)
        else:
            norm = math.nan
            policy.zero_grad(set_to_none=True)
        run.stop_or_skip(lr, norm, config.skip_nonfinite, loss=nll_mean)
        balance = {}
        if config.model.n_expert:
            balance = {"balancing_loss": balancing_mean} | (load_record(policy) if run.due(config.eval_every) else {})
            # --model.balancing bias: the biases move if the weights did. All counts of loads begin anew.
            update_biases(policy, config.bias_rate if math.isfinite(norm) else 0.0)

        # 4. look: log, and every so often validate, write a sample, keep the best checkpoint
        speed = n / (time.perf_counter() - started)
        record = {"loss": nll_mean, "lr": lr, "grad_norm": norm, "grad_clipped": float(0 < config.clip < norm)}
        look.at_step(record | {"tokens_per_second": speed} | balance)
    run.close()
    return look.after()


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
