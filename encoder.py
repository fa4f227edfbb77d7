"""The encoder: the decoder's blocks without the causal mask. Masked-LM, then a label per text (BERT, arXiv:1810.04805).

    masked-LM          p(x_t | x̃) = softmax(E norm(gelu(A h_t + a)) + c)[x_t]     h_t (C,): the last state of token t
                       L = −(1/|M|) Σ_{t ∈ M} log p(x_t | x̃)                     M: each token with probability 0.15
    classification     h = mean of h_t over the real tokens,  p(label | x) = softmax(W h + bias)
                       L = −(1/B) Σ log p(label | x)

x are the tokens of a text, x̃ the same with those of M corrupted; E (V, C) are the embeddings. A (C, C), a, the norm
and c (V,) make the one head, W (labels, C) and bias the other. A decoder predicts a token from those before it; if it
saw the token itself, it could copy it. In an encoder every token sees the whole text, so it reads x̃ and predicts what
the tokens of M are in x. Of M, 80 % become <|mask|>, 10 % a random token, and 10 % stay: a model that predicts only
where it sees <|mask|> could neglect the tokens that it sees elsewhere, and a text to classify has no <|mask|> at test
time. This way any token may be a random one, or one to predict, and the model must represent each in its context.

One step (main has the same four parts; first --mlm_steps of masked-LM, then --steps of labels):

    1. batch     masked-LM   windows = batch_at(stream, step)     windows of a shuffled epoch            (B, T)
                             batch = masked_batch(windows)        .tokens x̃, .targets x, .masked: in M?  (B, T) each
                             n = |M|                              counted over the whole batch, all ranks
                 labels      batch = labelled_batch(rows)         .tokens x̃, .real: not a pad            (B, T) each
                             n = B                                here x̃ has 10 % of all tokens masked, as noise
    2. gradient  for each micro-batch of this rank:
                             states = hidden(x̃, real)             no causal mask; nobody sees a pad      (b, T, C)
                 masked-LM   log p  = log softmax(token_logits(states[masked]))[x[masked]]               (masked,)
                 labels      log p  = log softmax(W mean_pool(states, real) + bias)[label]               (b,)
                             backward(−Σ log p / n)               gradients add up, over micro-batches and ranks
    3. update    clip ‖g‖; lr = lr_at(step of this objective); optimizer step
    4. look      log; every --eval_every steps validate, keep the best classifier

B rows in a step, over all ranks, b of them in a micro-batch; T tokens in a row, C width; (masked,): one per token of M.

The defaults run 300 steps of 32 windows of 128 generated tokens, then, with new optimizers, 400 steps of 64 reviews:
0.8 M parameters and the embeddings of 555 tokens (the generated reviews have no more pairs to merge), dropout 0.1, Muon
and AdamW. Off: further text (--text), BERT's layout (support/bert_parts.py), and a start from an encoder, or from a
decoder, whose blocks are the same (--init). If its tokenizer lacks <|mask|>, as most do, give --mlm_steps 0
--token_dropout 0: it learns to do without the causal mask while it learns the labels. `Encoder.from_pretrained` opens
BERT's own checkpoints (support/hf_bert.py); --init cannot, for lack of their tokenizer.

Traps:
  * No mask at all means causal in this code. `real[:, None, None]`, (B, 1, 1, T), lets every token see every real one.
  * Pads must not count: `real` hides them as keys in every layer and leaves them out of the mean, so a text's label
    does not depend on the other texts of its batch. It is made where the rows are made, never from ids != pad.
  * Without positions a decoder knows the order from its causal mask, an encoder not at all: it is refused.
  * The loss is read at M alone, its 10 % unchanged tokens included. A loss at all tokens would mostly reward copying.
  * The best checkpoint is chosen on validation accuracy, and the test split is judged once, at the end, beside a bag of
    words: logistic regression on which words occur, fitted and chosen on the same splits. That knows nothing of order:
    "good, not bad" and "bad, not good" are one text to it.

BERT reads a text's summary from its first token, trained by a second objective (does the second text follow the first?)
that RoBERTa (arXiv:1907.11692) showed to be unnecessary. The mean needs no training of its own. Simplified: windows of
the pretraining text may hold several documents, which see each other.

Run it:
    python encoder.py                                                   # generated reviews, minutes on two CPU cores
    python encoder.py --demo                                            # ten tokens, some masked; both losses by hand
    python encoder.py --config configs/encoder_polarity.yaml            # real film reviews (needs the data)
    python encoder.py --data reviews.csv                                # columns text and label
    python encoder.py --config configs/encoder_polarity_smollm2.yaml    # starts from a trained decoder
    torchrun --nproc_per_node 2 encoder.py --data imdb
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import batch_at, rows_at
from norms import LayerNorm
from optim import lr_at, make_optimizers, optimizer_step
from positional import LearnedPositions, rope_cos_sin, rope_frequencies, sinusoidal_positions
from support.bert_parts import BertConfig, BertParts, refuse_unsupported
from support.checks import Amount, Count, FractionBelow1, Range, Whole
from support.cli import run_script
from support.content import weights_of
from support.devices import precision, setup
from support.encoder_report import Look
from support.encoder_start import check_sizes, make_encoder, masked_lm_texts, read_texts, refuse_unused
from support.runs import Run, RunConfig
from support.sharding import averaging
from support.text_batches import TextBatch, labelled_rows, pad_rows
from transformer import Block, Transformer, TransformerConfig, init_weights, make_norm

MASK = "<|mask|>"

# ---------------------------------------------------------------------------------------------------------------
# The model.


@dataclass
class EncoderConfig(BertConfig):
    """The architecture: the decoder's settings with other defaults, 0.8 M parameters without the embeddings."""

    context: Count = 128
    """Longest text in tokens."""
    n_layer: Count = 4
    n_head: Count = 4
    n_kv_head: Count = 4
    width: Count = 128
    n_class: Count = 2
    """Number of labels."""


class Encoder(BertParts, nn.Module):
    """Token ids (B, T) -> states (B, T, C), each of which depends on the whole text. Two heads read them: one says
    which token was masked, the other what label the text has. `BertParts` adds the files and from_trunk."""

    config_class = EncoderConfig

    def __init__(self, config):
        super().__init__()
        self.config = c = config.resolved()
        refuse_unsupported(c)
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.learned = LearnedPositions(c.context, c.width) if c.positions == "learned" else None
        self.add_bert_embeddings(c)  # this and add_bert_layers add nothing with the defaults
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.Identity() if c.norm_placement == "post" else make_norm(c)
        self.add_bert_layers(c)
        # The two heads. Masked-LM is BERT's: one more layer, then the embedding matrix and a bias per token.
        self.transform = nn.Linear(c.width, c.width)
        self.transform_norm = LayerNorm(c.width, c.norm_eps)
        self.token_bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.classifier = nn.Linear(c.width, c.n_class)
        if c.positions == "rope":
            cos, sin = rope_cos_sin(torch.arange(c.context), rope_frequencies(c.head_dim, c.rope_theta))
            self.register_buffer("rope_cos", cos, persistent=False)  # (context, D)
            self.register_buffer("rope_sin", sin, persistent=False)
        init_weights(self)  # as the decoder's

    def hidden(self, tokens, real=None, types=None):
        """tokens (B, T), real (B, T) False on padding, types (B, T) -> last states (B, T, C)."""
        c, T = self.config, tokens.shape[1]
        if c.context < T:
            raise ValueError(f"{T} tokens do not fit the encoder's context of {c.context}")
        positions = torch.arange(T, device=tokens.device)
        x, rope = self.embed(tokens), None  # (B, T, C)
        if c.positions == "rope":
            rope = (self.rope_cos[:T], self.rope_sin[:T])
        elif c.positions == "learned":
            x = x + self.learned(positions)
        elif c.positions == "sinusoidal":
            x = x * math.sqrt(c.width) + sinusoidal_positions(positions, c.width).to(x)
        x = self.dropout(self.bert_embedding(x, types))  # with the defaults x itself
        real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        mask = real[:, None, None]  # (B, 1, 1, T): every token sees every real one. No mask at all would mean causal
        for block in self.blocks:
            x = block(x, rope, mask)
        return self.norm(x)

    def token_logits(self, x):
        """States (..., C) -> logits over the vocabulary (..., V): which token is, or was, here."""
        return F.linear(self.transform_norm(F.gelu(self.transform(x))), self.embed.weight, self.token_bias)

    def forward(self, tokens, real=None, types=None, *, targets=None, masked=None):
        """-> logits of the labels (B, n_class); or, with targets (B, T) and masked (B, T) boolean, log p of the targets
        where masked is True, (masked,) in fp32. One forward for both: DDP exchanges gradients for its calls only."""
        x = self.hidden(tokens, real, types)  # (B, T, C)
        if targets is not None:
            return -F.cross_entropy(self.token_logits(x[masked]).float(), targets[masked], reduction="none")
        pooled = self.dropout(mean_pool(x, real))  # (B, C)
        with torch.autocast(x.device.type, enabled=False):  # in bf16 two similar texts would have the same logits
            return self.classifier(pooled.to(self.classifier.weight.dtype)).float()


def mean_pool(x, real=None):
    """Mean of x (B, T, C) over the tokens where real (B, T) is True -> (B, C)."""
    if real is None:
        return x.mean(1)
    return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------
# The masked tokens, the batches, the losses.


def mask_tokens(tokens, mask_id, vocab_size, never, generator, rate=0.15):
    """tokens x (B, T), never (B, T): True on what M must not hold -> x̃ (B, T), masked (B, T): True on M, whatever x̃
    has there: 80 % of M become mask_id, 10 % a random token, 10 % stay."""
    masked = (torch.rand(tokens.shape, generator=generator) < rate) & ~never
    u = torch.rand(tokens.shape, generator=generator)
    random_tokens = torch.randint(vocab_size, tokens.shape, generator=generator)
    corrupted = torch.where(masked & (u < 0.8), mask_id, tokens)
    return torch.where(masked & (u >= 0.9), random_tokens, corrupted), masked


def masked_batch(windows, tokenizer, generator, rate):
    """windows (B, T) of a text, int64 -> a TextBatch with masked tokens, any but <|endoftext|>."""
    tokens = torch.from_numpy(windows)
    never = tokens == tokenizer.endoftext_id  # what stands between documents
    corrupted, masked = mask_tokens(tokens, tokenizer.special_ids[MASK], tokenizer.vocab_size, never, generator, rate)
    return TextBatch(corrupted, real=torch.ones_like(masked), targets=tokens, masked=masked)


def labelled_batch(rows, tokenizer, generator, token_dropout):
    """[(ids, label), …] -> a TextBatch with labels; a share of its tokens becomes <|mask|>, as noise: not in M."""
    tokens, real = pad_rows([ids for ids, _ in rows], tokenizer.endoftext_id)  # (B, T)
    if token_dropout:
        dropped = torch.rand(tokens.shape, generator=generator) < token_dropout
        start = tokens == tokenizer.endoftext_id  # the opening token is never masked
        tokens = torch.where(dropped & real & ~start, tokenizer.special_ids[MASK], tokens)
    return TextBatch(tokens, real, labels=torch.tensor([label for _, label in rows]))


def masked_lm_loss(logprobs, n=None):
    """logprobs (masked,), log p(x_t | x̃) of the tokens in M -> their −Σ log p / n; n is by default their number."""
    loss = -logprobs.sum() / (max(1, len(logprobs)) if n is None else n)
    return loss, {"loss": loss.item()}


def classification_loss(logits, labels, n=None):
    """logits (B, n_class), labels (B,) -> −Σ log p(label) / n; n is by default B."""
    loss = F.cross_entropy(logits, labels, reduction="sum") / (len(labels) if n is None else n)
    return loss, {"loss": loss.item(), "right": (logits.argmax(-1) == labels).sum().item()}


def demo():
    """Who sees whom, ten tokens of which some are masked, the masked-LM loss and the labels' loss, by hand."""
    x = torch.arange(10, 20)[None]  # (1, 10)
    other = torch.where(x == 19, 50, x)  # another last token
    sizes = dict(vocab_size=100, context=10, n_layer=2, n_head=2, n_kv_head=2, width=16)
    torch.manual_seed(0)
    decoder = Transformer(TransformerConfig(**sizes))
    encoder = Encoder.from_trunk(decoder)  # the same weights
    first, first_causal = ((m.hidden(x) - m.hidden(other))[0, 0].abs().max().item() for m in (encoder, decoder))
    pad_last = (encoder.hidden(x, x < 19) - encoder.hidden(other, x < 19))[0, :9].abs().max().item()
    assert first > 0.01
    assert first_causal == pad_last == 0
    print("ten tokens; how far another last token moves the first state, in a random model with two layers:")
    print(f"  {first_causal:g} in a decoder, {first:.2f} in an encoder with its weights, {pad_last:g} if it is a pad")

    mask_id, ln2 = 0, math.log(2)
    corrupted, masked = mask_tokens(x, mask_id, 100, x == 10, torch.Generator().manual_seed(97), rate=0.5)
    print("the same tokens, masked at a rate of 1/2 so that there is something to see (the first is never masked)")
    for name, numbers in (("x", x), ("x̃", corrupted), ("in M", masked.int())):
        print(f"  {name:<5}" + "".join(f"{i or '<mask>' if name == 'x̃' else i:>8}" for i in numbers[0].tolist()))
    assert (corrupted == x)[~masked].all()
    assert not masked[0, 0]
    many = torch.full((1, 1_000_000), 7)
    corrupted, in_M = mask_tokens(many, mask_id, 100, many != 7, torch.Generator().manual_seed(0))
    shares = [in_M.double().mean(), *((corrupted == i)[in_M].double().mean() for i in (mask_id, 7))]
    by_hand = (0.15, 0.8 + 0.1 / 100, 0.1 + 0.1 / 100)  # a random token may be any of the 100
    assert all(abs(share - wanted) < 0.003 for share, wanted in zip(shares, by_hand, strict=True))
    print("of a million tokens {:.1%} are in M; of those {:.1%} are <mask> and {:.1%} as they were".format(*shares))

    k = int(masked.sum())
    logprobs = -ln2 * torch.arange(1.0, k + 1)  # the masked tokens have p = 1/2, 1/4, 1/8 …
    loss, _ = masked_lm_loss(logprobs)
    assert abs(loss.item() - ln2 * (k + 1) / 2) < 1e-6
    print(f"masked-LM, p of {k} masked tokens 1/2, 1/4 … 1/{2**k}: loss = ln 2 · {(k + 1) / 2:g} = {loss:.4f}")

    states = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [2.0, 4.0], [99.0, 99.0]]])  # (1, 4, C = 2), the last one a pad
    h = mean_pool(states, torch.tensor([[True, True, True, False]]))  # (1, 2)
    assert h.tolist() == [[2.0, 2.0]]
    W = torch.tensor([[0.0, 0.0], [math.log(3) / 2, 0.0]])  # (n_class, C)
    logits = (h @ W.T).requires_grad_()  # (0, ln 3): p = 1/4, 3/4
    loss, _ = classification_loss(logits, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item() - math.log(4 / 3)) < 1e-6
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.25]]))
    print(f"labels: mean without the pad (2, 2), logits (0, ln 3), p = (1/4, 3/4), label 1: loss = ln 4/3 = {loss:.4f}")
    print("        gradient of the logits, p − onehot = (+1/4, −1/4) = autograd's")


# ---------------------------------------------------------------------------------------------------------------
# The settings.


@dataclass
class Config(RunConfig):
    """Pretrain an encoder by masked-LM, then train it to classify texts. What every stage shares: support/runs.py."""

    data: str = "sentiment"
    """sentiment (generated), polarity, reviews, imdb, or the path of a table of texts and labels."""
    text: list[str] = field(default_factory=list)
    """Further data sets whose training texts, without their labels, are used for pretraining."""
    vocab_size: Count = 4096
    """Vocabulary of the BPE tokenizer that is trained on the texts, special tokens included."""
    init: str | None = None
    """Checkpoint to start from, of an encoder or a decoder (its architecture and tokenizer are used); default: random
    weights."""
    name: str = "encoder"
    mlm_steps: Whole = 300
    """Optimizer steps of the masked-LM pretraining before the classification; 0 skips it."""
    mlm_batch: Count = 32
    """Windows of text per pretraining step, over all ranks."""
    mlm_lr: Amount = 4e-3
    """Peak learning rate of masked-LM."""
    mlm_rate: Annotated[float, Range(float, 0, 1, above=True)] = 0.15
    """Share of the tokens that are predicted: 80 % of them masked, 10 % replaced by a random token, 10 % kept."""
    steps: Count = 400
    """Optimizer steps of the classification."""
    batch: Count = 64
    """Texts per classification step, over all ranks."""
    micro_batch: Count = 16
    """Rows per forward pass of one rank, sorted by length; fewer means less padding and less memory."""
    lr: Amount = 2e-3
    """Peak learning rate of the classification."""
    token_dropout: FractionBelow1 = 0.1
    """Share of the tokens that are masked while training the classifier."""
    warmup: Whole = 20
    """Steps over which the learning rate rises linearly, in both phases."""
    weight_decay: Amount = 0.1
    eval_every: Count = 100
    save_every: Count = 200
    model: EncoderConfig = field(default_factory=lambda: EncoderConfig(dropout=0.1))
    """The architecture."""

    def __post_init__(self):
        super().__post_init__()
        refuse_unused(self)


# ---------------------------------------------------------------------------------------------------------------
# The loop.


def main(config):
    """Train; returns {"accuracy", "baseline", "confusion"} of the test split, and the "path" of the checkpoint."""
    began = time.perf_counter()
    dist = setup(config.device)
    check_sizes(config, dist)
    autocast, scaler = precision(config.dtype, dist)
    # {split: reviews}; {split: their texts and those of --text}; what a resumed run must find unchanged
    reviews, texts, reads = read_texts(config)
    encoder, tokenizer, config = make_encoder(Encoder, config, dist, texts, MASK)
    reads |= weights_of(config.init, encoder) if config.init else {}
    context = config.model.context
    examples = {split: labelled_rows(part, tokenizer, context) for split, part in reviews.items()}  # (ids, label) each
    streams, held_out = masked_lm_texts(config, dist, tokenizer, texts, masked_batch)  # {split: ids}, a TextBatch

    encoder.to(dist.device)
    new_optimizers = partial(make_optimizers, encoder, config.optimizer, config.lr, config.weight_decay)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    optimizers = new_optimizers()
    run = Run(config, dist, encoder, tokenizer, optimizers, scaler, best=-1.0, chat=False, reads=reads, began=began)
    options = {"broadcast_buffers": False, "find_unused_parameters": True}  # each objective leaves out the other's head
    model = DistributedDataParallel(encoder, **options) if dist.world > 1 else encoder
    look = Look(run, reviews, examples, streams, held_out)
    look.before()

    for step in run.steps(config.mlm_steps + config.steps):
        # 1. the batch: first masked-LM, then labels. Every rank makes all of it and so knows n; then it takes its rows
        started, pretraining = time.perf_counter(), step < config.mlm_steps
        # By (seed, step) alone: a resumed run masks the same tokens
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        if pretraining:
            phase_step, phase_steps, peak = step, config.mlm_steps, config.mlm_lr
            windows, _ = batch_at(streams["train"], phase_step, config.mlm_batch, context, config.seed)  # (B, T)
            batch = masked_batch(windows, tokenizer, generator, config.mlm_rate)
            n = max(1, batch.masked.sum().item())  # |M|
        else:
            phase_step, phase_steps, peak = step - config.mlm_steps, config.steps, config.lr
            indices = rows_at(len(examples["train"]), phase_step, config.batch, config.seed)
            rows = [examples["train"][i] for i in indices]
            batch, n = labelled_batch(rows, tokenizer, generator, config.token_dropout), config.batch
            if phase_step == 0:  # a new objective: the optimizers' running means belong to the old one
                run.optimizers = new_optimizers()

        # 2. the gradient: parts of it add up, over micro-batches and ranks
        model.train()
        loss_sum, right = 0.0, 0
        micro_batches = batch.micro_batches(config.micro_batch, dist)  # this rank's rows, cut
        for micro in micro_batches:
            last = micro is micro_batches[-1]
            with averaging(model, last):  # DDP averages in the last backward; * world makes it a sum
                if pretraining:
                    with autocast():
                        logprobs = model(micro.tokens, micro.real, targets=micro.targets, masked=micro.masked)
                    loss, metrics = masked_lm_loss(logprobs, n)  # logprobs: (masked,)
                else:
                    with autocast():
                        logits = model(micro.tokens, micro.real)  # (b, n_class)
                    loss, metrics = classification_loss(logits, micro.labels, n)
                scaler.scale(loss * dist.world).backward()
            loss_sum += metrics["loss"]
            right += metrics.get("right", 0)
        loss_sum, right = dist.sum(loss_sum, right)

        # 3. the update: clip, then a step of the optimizers
        lr = lr_at(phase_step, phase_steps, peak, config.warmup)
        norm = optimizer_step(encoder, run.optimizers, scaler, autocast, lr, config.clip)
        run.check_finite(lr, norm, "try a smaller --mlm_lr" if pretraining else "try a smaller --lr", loss=loss_sum)

        # 4. look: log, and every so often validate, keep the best classifier
        record = {"lr": lr, "grad_norm": norm, "seconds": time.perf_counter() - started}
        record |= {"mlm_loss": loss_sum} if pretraining else {"loss": loss_sum, "train_accuracy": right / n}
        look.at_step(record, (phase_step + 1) % config.eval_every == 0 or phase_step + 1 == phase_steps)
    run.close()
    return look.after(Encoder)  # the test split, once, with the checkpoint that the validation split chose


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
