"""Supervised fine-tuning: a chat template, and next-token prediction on the answers alone (arXiv:2203.02155, §3.5).

Pretraining's loss with a mask: what the user says is given, so the model learns the answers, and when to stop. For
tokens x_1 x_2 … of a conversation, and the logits z (V,) that predict x_t:

    L     = −(1/n) Σ_t m_t log π(x_t | x_<t)         m_t = 1 on the assistant's tokens and their end token, else 0
    dL/dz = m_t (softmax(z) − onehot(x_t)) / n       n = Σ m_t of the optimizer step, over micro-batches and ranks

The logits that predict a prompt get no gradient; its states do, from the answer that attends to them. A conversation
becomes one row of ids (ChatML), with a flag m_t for each: 1 on what is underlined, else 0.

    <|im_start|>user⏎Tom has 5 apples. …?<|im_end|>⏎<|im_start|>assistant⏎Tom has 5 + 3 = 8. … #### 8<|im_end|>⏎
                                                                          ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

One step, for B examples, of which b rows of up to T tokens go through the model at once (main has the same parts):

    1. batch     batch = the next B of (ids, flags)           shuffled, or in the order of a curriculum; of all ranks
                 n     = Σ flags                              the tokens that count, before the batch is cut
    2. gradient  for part in micro_batches:                   of this rank's B / world (world: the number of ranks)
                     tokens, loss_mask = collate(part)        padded on the right (or packed)        (b, T) each
                     logprobs = token_logprobs(model, tokens) entry t: log π of token t + 1          (b, T − 1)
                     loss = −Σ loss_mask[:, 1:] · logprobs / n    sft_loss                           ()
                     backward(loss · world)                   gradients add up over micro-batches; DDP and FSDP
                                                              average them over the ranks, world makes it a sum
    3. update    clip ‖g‖; lr = lr_at(step); optimizer step
    4. look      log; every --eval_every steps answer validation problems, and take validation_loss on their solutions;
                 the checkpoint that answers best is kept

The defaults run 200 such steps of 64 worked solutions, or stop at 100 % on the validation split: shuffled, padded, all
weights trained, Muon and AdamW, a learning rate of 2e-3 after 10 steps of warm-up, down a cosine to a tenth. Off:
packing, curricula, ratings, LoRA, dropout, a sweep of learning rates. A mixture of experts is not balanced here:
neither pretrain.py's balancing loss nor its move of the biases. The test split is read once, at the end (evaluate.py).

What to watch: `loss` beside `valid_loss`, the loss on the validation split's solutions. Where `valid_loss` rises while
`loss` still falls, the model learns its examples by heart. Its answers may improve all the same, so they choose the
checkpoint, by accuracy or F1. (In the paper it rises after one epoch of 16; a reward model, reward_model.py, chooses.)

Traps:
  * The mask is made where the ids are made (tokenizer.encode_chat). A mask taken from `ids != pad` drops the end token
    where pad = eos, and the model never learns to stop.
  * The mask selects targets, so it meets the log-probabilities, which are one token shorter, as loss_mask[:, 1:].
  * n is counted before the batch is cut. If each micro-batch is averaged by its own count (as many trainers did until
    2024), short answers in a micro-batch of their own weigh more.
  * Packing puts several conversations in one row. Each must see only itself, and its positions must begin at 0; then
    loss and gradient are those of padding. No loss crosses a border: the first token of a conversation has flag 0.

Ratings. Responses rated 1 to 5 train with weight w = (rating − 1) / 4: m_t becomes w m_t, in the sum and in n. Or, with
--rated threshold, all responses of at least --min_rating train alike, and the others not at all.

Curriculum. --order curriculum ranks the examples by level or length and draws each batch from the first `share` of
them, min(1, a + (1 − a) s / (pace · steps)) at step s, with a = --pace_start; linear as in arXiv:1903.09848
(arXiv:1904.03626 has exponential steps). `anti` begins with the hardest. The baseline to beat is `shuffled`: epochs
without replacement. A paced batch is drawn afresh each step, so some examples repeat and others never come.

Run it:
    python sft.py                                    # built-in word problems; pretrains its start first
    python sft.py --demo                             # mask, packing and loss by hand
    python sft.py --data gsm8k                       # real GSM8K, found as data.py finds it
    python sft.py --data chats.jsonl --packing true  # {"messages": [...]} a line, of any number of turns
    python sft.py --data rated.csv --rated threshold # prompt,response,rating
    python sft.py --config configs/sft_lr_sweep.yaml # one run per learning rate, and a table
    torchrun --nproc_per_node 2 sft.py --init runs/pretrain
"""

import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Annotated, Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import pretrain
from attention import document_mask
from data import DEFAULT_TASK, Problem, conversation, rows_at
from lora import LoraConfig, add_lora
from optim import lr_at, make_optimizers, optimizer_step
from support.checkpoints import open_checkpoint
from support.checks import Amount, Count, Fraction, FractionBelow1, Positive, Range, Whole
from support.cli import run_script
from support.content import records_of, weights_of
from support.devices import precision, setup
from support.lora_files import LoraState
from support.pretrained_start import pretrained_start
from support.recorder import Recorder, RecordFlags
from support.runs import Run, RunConfig
from support.sft_data import encode_training, load_examples, refuse_unused
from support.sft_report import Look, validation_loss
from support.sharding import averaging, refuse_fsdp
from support.sweeps import sweep
from tokenizer_bpe import CharTokenizer
from transformer import token_logprobs

# ---------------------------------------------------------------------------------------------------------------
# The mask, the rows, the loss.


def encode_example(tokenizer, problem, weighted=False):
    """-> ids, flags: True on the tokens that count, all of the assistant's; weighted: w on these, 0.0 on the rest."""
    ids, flags = tokenizer.encode_chat(conversation(problem))
    if weighted:
        weight = 1.0 if problem.rating is None else (problem.rating - 1) / 4  # unrated counts in full
        flags = [weight * flag for flag in flags]
    return ids, flags


@dataclass
class MicroBatch:
    """Examples in rows, padded or packed."""

    tokens: torch.Tensor  # (b, T) int64
    loss_mask: torch.Tensor  # (b, T) True on the tokens that count, or their weight in fp32
    positions: torch.Tensor | None = None  # (b, T) packed: from 0 in each example
    visible: torch.Tensor | None = None  # (b, 1, T, T) packed: causal, and only within one example

    def to(self, device):
        return MicroBatch(**{name: x if x is None else x.to(device) for name, x in vars(self).items()})


def collate(examples, pad):
    """[(ids, flags), …] -> MicroBatch: a row each, padded on the right, where no token of an example looks."""
    T = max(len(ids) for ids, _ in examples)
    tokens = torch.full((len(examples), T), pad, dtype=torch.long)
    weighted = any(isinstance(flag, float) for flag in examples[0][1])
    loss_mask = torch.zeros(len(examples), T, dtype=torch.float32 if weighted else torch.bool)
    for row, (ids, flags) in enumerate(examples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        loss_mask[row, : len(ids)] = torch.tensor(flags)
    return MicroBatch(tokens, loss_mask)


def pack_examples(examples, pad, room):
    """Several examples in a row of at most `room` tokens: the longest first, each into the first row that has room
    (first-fit decreasing)."""
    packed = []  # the examples of each row
    for example in sorted(examples, key=lambda e: -len(e[0])):
        row = next((row for row in packed if sum(len(ids) for ids, _ in [*row, example]) <= room), None)
        if row is None:
            packed.append(row := [])
        row.append(example)
    joined = [([i for ids, _ in row for i in ids], [f for _, flags in row for f in flags]) for row in packed]
    micro = collate(joined, pad)
    positions = torch.zeros_like(micro.tokens)  # (b, T)
    documents = torch.full_like(micro.tokens, -1)  # (b, T); pads: a document of their own, so no softmax row is empty
    for r, row in enumerate(packed):
        start = 0
        for number, (ids, _) in enumerate(row):
            positions[r, start : start + len(ids)] = torch.arange(len(ids))
            documents[r, start : start + len(ids)] = number
            start += len(ids)
    return replace(micro, positions=positions, visible=document_mask(documents))


def sft_loss(logprobs, loss_mask, n_tokens=None):
    """logprobs, loss_mask (b, T − 1), boolean or weights -> −Σ loss_mask · logprobs / n_tokens.

    n_tokens: the step's Σ loss_mask, a sum of weights where it holds weights; default: this one's own. Where it is 0,
    no token counts and the loss is 0.
    """
    n = loss_mask.sum() if n_tokens is None else n_tokens
    n = n if n > 0 else 1
    loss = -(logprobs * loss_mask).sum() / n
    return loss, {"loss": loss.item()}


def pacing(step, steps, start, pace):
    """The share of the ranked examples that is open to a step: a line from `start` to 1 at pace · steps."""
    return 1.0 if step >= pace * steps else start + (1 - start) * step / (pace * steps)


def rank_examples(difficulties, order, seed):
    """Indices, the easiest first (curriculum) or last (anti); ties are shuffled."""
    shuffled = np.random.default_rng((seed, 1)).permutation(len(difficulties))
    sign = -1 if order == "anti" else 1
    return sorted(shuffled.tolist(), key=lambda i: sign * difficulties[i])


def paced_rows(ranked, step, batch, seed, share):
    """The batch of a step from the first `share` of the ranked examples, above 0, at most 1: a pure function of step.
    Without replacement within a batch, unless the share holds fewer examples than it."""
    n = max(1, round(share * len(ranked)))
    rng = np.random.default_rng((seed, 2, step))
    return [ranked[i] for i in rng.choice(n, batch, replace=n < batch)]


def demo():
    """Which tokens of a chat count, a packed row, and the loss by hand."""
    tokenizer = CharTokenizer.train(["1+2?3"])
    turns = (("user", "1+1?"), ("assistant", "2"))
    ids, flags = encode_example(tokenizer, Problem("2+1?", "3", "3", history=turns))
    print("a chat with two answers, one token per character and per <|…|>: what counts")
    for flag, stretch in groupby(zip(ids, flags, strict=True), key=lambda pair: pair[1]):
        print(f"  mask {flag:d}  {tokenizer.decode([i for i, _ in stretch])}".replace("\n", "⏎"))
    counted = [i for i, flag in zip(ids, flags, strict=True) if flag]
    assert tokenizer.decode(counted) == "2<|im_end|>3<|im_end|>"

    examples = [([10, 11, 12], [False, True, True]), ([20, 21], [False, True])]
    padded, packed = collate(examples, pad=0), pack_examples(examples, pad=0, room=6)
    assert packed.tokens.tolist() == [[10, 11, 12, 20, 21]]
    assert packed.loss_mask.int().tolist() == [[0, 1, 1, 0, 1]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1]]  # each example begins at 0
    assert packed.visible.int().squeeze().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    print("two examples in one row: tokens, mask, positions, and who sees whom")
    for name, numbers in (("token", packed.tokens), ("mask", packed.loss_mask.int()), ("position", packed.positions)):
        print(f"  {name:<10}" + "".join(f"{i:>4}" for i in numbers[0].tolist()))
    for i, row in zip(packed.tokens[0].tolist(), packed.visible[0, 0].int().tolist(), strict=True):
        print(f"  {i} sees   " + "".join(f"{'x' if sees else '.':>4}" for sees in row))

    one_row = torch.tensor([[1.0, 2, 3, 1]])  # −log₂ π of the tokens 11, 12, 20, 21
    two_rows = torch.tensor([[1.0, 2], [1, 9]])  # the same, padded: 11, 12; 21 and a pad, whose 9 must not count
    print("loss in bits, where π of the tokens 11, 12, 20, 21 is 1/2, 1/4, 1/8, 1/2")
    for name, bits, mask, by_hand, formula in (
        ("packed", one_row, packed.loss_mask[:, 1:], 4 / 3, "(1 + 2 + 1) / 3: token 20 does not count"),
        ("padded", two_rows, padded.loss_mask[:, 1:], 4 / 3, "the same: a pad does not count either"),
        ("rated", one_row, torch.tensor([[1, 1, 0, 0.5]]), 7 / 5, "(1 + 2 + ½) / (2 + ½): the second example rated 3"),
    ):
        loss, _ = sft_loss(-math.log(2) * bits, mask)
        assert abs(loss.item() - by_hand * math.log(2)) < 1e-6
        print(f"  {name:<8} {loss / math.log(2):.4f} = {formula}")
    means = [sft_loss(-bits, mask)[0] for bits, mask in zip(two_rows, padded.loss_mask[:, 1:], strict=True)]
    assert sum(means) / 2 == ((1 + 2) / 2 + 1) / 2 == 1.25
    print("  the mean of their means is ((1 + 2) / 2 + 1) / 2 = 1.25: 21 weighs as much as 11 and 12 together")


# ---------------------------------------------------------------------------------------------------------------
# The settings.


@dataclass
class Config(RecordFlags, RunConfig):
    """Fine-tune a pretrained decoder on worked solutions. What every stage shares (--steps, --lr, --warmup …) is in
    support/runs.py."""

    data: str = DEFAULT_TASK
    """The name of a task (default: built-in problems), gsm8k, instructions, ratings, or the path of a .jsonl, .json or
    .csv of questions and answers, conversations (messages), instructions or rated responses."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Difficulty levels of the task's problems; the built-in ones have 1 to 3 steps."""
    demonstrations: Count | None = None
    """Use only this many training examples; default: all."""
    init: str | None = None
    """Checkpoint to start from; default: a short pretraining run on all the text of --data, made once into runs/start,
    whatever --demonstrations and --min_rating leave out."""
    name: str = "sft"
    batch: Count = 64
    """Examples per optimizer step, over all ranks."""
    micro_batch: Count = 64
    """Examples per forward pass of one rank, counted before --packing, which packs each micro-batch by itself; fewer
    means gradient accumulation and less memory."""
    fsdp: bool = False
    """With torchrun: shard weights, gradients and optimizer state over the ranks, for a model too large for one GPU."""
    packing: bool = False
    """Pack several examples into a row instead of padding; an example cannot attend to the others."""
    order: Literal["shuffled", "curriculum", "anti"] = "shuffled"
    """shuffled, curriculum (easy first) or anti (hard first)."""
    difficulty: Literal["level", "length"] = "level"
    """What a curriculum sorts by: level (arithmetic steps) or length (tokens)."""
    pace_start: Annotated[float, Range(float, 0, 1, above=True, below=False)] = 0.2
    """Share of the sorted examples that a curriculum starts with."""
    pace: Fraction = 0.5
    """Share of the steps after which a curriculum uses all examples."""
    rated: Literal["weights", "threshold"] = "weights"
    """How ratings are used: weights ((rating - 1) / 4) or threshold (--min_rating). Examples without a rating have
    weight 1."""
    min_rating: Annotated[float, Range(float, 1, 5, below=False)] = 4.0
    """Lowest rating that is trained on with --rated threshold, and lowest rating of the references of an evaluation."""
    stop_at: Amount = 1.0
    """Stop at the first evaluation whose validation accuracy (F1 for problems of free text) is at least this."""
    sweep: list[Positive] = field(default_factory=list)
    """Learning rates: one run each, then a table of their validation results."""
    weight_decay: Amount = 0.1
    max_new_tokens: Count = 96
    """Longest answer in an evaluation, in tokens."""
    eval_every: Count = 100
    eval_problems: Count = 200
    """Validation problems per evaluation."""
    test_problems: Count = 1000
    """Test problems of the last evaluation."""
    samples: Whole = 0
    """Sampled answers per test problem for pass@k and majority@n; 0 turns them off."""
    save_every: Count = 200
    dropout: FractionBelow1 = 0.0
    """Dropout during training."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""

    def __post_init__(self):
        super().__post_init__()
        refuse_unused(self)


# ---------------------------------------------------------------------------------------------------------------
# The loop.


def main(config, encode=encode_example, responder=None):
    """Fine-tune -> of the test split "accuracy", "low", "high", "f1", with --samples pass@k, and "test": the accuracy,
    the F1 of free text, or, where only some problems can be checked, the mean of both kinds; "valid": the best such
    figure of the validation split; "path". agent.py gives an encode of its own, and what answers in evaluations."""
    if config.sweep:
        return sweep(partial(main, encode=encode, responder=responder), config)
    dist = setup(config.device)
    per_rank = dist.per_rank("batch", config.batch)  # examples of a step on this rank
    autocast, scaler = precision(config.dtype, dist)
    refuse_fsdp(config, dist, scaler)
    problems = load_examples(config, dist)
    init = config.init or pretrained_start(config, dist)
    policy, tokenizer, _ = open_checkpoint(init, "cpu" if config.fsdp else dist.device, config.dropout)
    add_lora(policy, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    context = policy.config.context
    # examples, valid: [(ids, flags), …] of the training and of the validation split; difficulties: of the examples
    problems, examples, valid, difficulties = encode_training(config, problems, tokenizer, context, dist, encode)
    ranked = rank_examples(difficulties, config.order, config.seed)

    adapters = {"lora": LoraState(policy, init)}
    reads = records_of(config.data, problems) | weights_of(init, policy)  # what a resumed run must find unchanged
    model = policy  # the loss goes through `model`, which may be wrapped, all else through `policy`
    if config.fsdp:
        pretrain.shard(policy, dist, autocast)
    elif dist.world > 1:
        model = DistributedDataParallel(policy, broadcast_buffers=False)
    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    run = Run(config, dist, policy, tokenizer, optimizers, scaler, best=-1.0, parts=adapters, reads=reads)
    recorder = Recorder(run, autocast, valid=problems["valid"])
    pad = tokenizer.endoftext_id
    valid_loss = partial(validation_loss, model, valid, pad, config.micro_batch, autocast, dist, collate, sft_loss)
    look = Look(run, problems, valid_loss if valid else None, responder and responder(tokenizer))
    look.before(init, len(examples))

    for step in run.steps():
        if run.state.best >= config.stop_at:  # here, so that a run that is resumed stops as well
            break
        # 1. the batch: the next B examples, of all ranks
        started = time.perf_counter()
        if config.order == "shuffled":
            share, chosen = 1.0, rows_at(len(examples), step, config.batch, config.seed)
        else:
            share = pacing(step, config.steps, config.pace_start, config.pace)
            chosen = paced_rows(ranked, step, config.batch, config.seed, share)
        batch = [examples[i] for i in chosen]
        n = sum(sum(flags) for _, flags in batch)  # the tokens that count (or their weights), before the batch is cut
        own = batch[dist.rank * per_rank : (dist.rank + 1) * per_rank]
        own = sorted(own, key=lambda example: len(example[0]))  # examples of like lengths waste no padding
        recorder.examples(own, n)  # for view.py

        # 2. the gradient: parts of it add up, over micro-batches and ranks
        model.train()
        loss_sum = 0.0
        for i in range(0, per_rank, config.micro_batch):
            part = own[i : i + config.micro_batch]
            micro = pack_examples(part, pad, context) if config.packing else collate(part, pad)
            micro = micro.to(dist.device)
            loss_mask = micro.loss_mask[:, 1:]  # (b, T − 1): of the tokens that the log-probabilities belong to
            last = i + config.micro_batch >= per_rank
            with averaging(model, last):  # DDP and FSDP average over the ranks in the last backward pass alone
                with autocast():
                    # None if the rows are padded. This mask says who sees whom; loss_mask, what counts
                    attends = {"positions": micro.positions, "mask": micro.visible}
                    logprobs = token_logprobs(model, micro.tokens, counted=loss_mask > 0, **attends)  # (b, T − 1)
                loss, metrics = sft_loss(logprobs, loss_mask, n)
                scaler.scale(loss * dist.world).backward()  # * world makes the average a sum
            loss_sum += metrics["loss"]
        (loss_sum,) = dist.sum(loss_sum)

        # 3. the update: clip, then a step of the optimizers
        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(policy, optimizers, scaler, autocast, lr, config.clip)
        run.check_finite(lr, norm, loss=loss_sum)

        # 4. look: log, and every so often answer validation problems, keep the best checkpoint
        trained = sum(flag > 0 for _, flags in batch for flag in flags)  # tokens of answers; pretrain.py counts all
        speed = trained / (time.perf_counter() - started)
        record = {"loss": loss_sum, "lr": lr, "grad_norm": norm, "tokens_per_second": speed, "open": share}
        look.at_step(record)
    run.close()
    return look.after()  # the test split, once, with the checkpoint that the validation split chose


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
