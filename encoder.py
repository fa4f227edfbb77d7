"""The encoder: the decoder's blocks without the causal mask. BERT's masked-LM, then one label per text (1810.04805).

    masked-LM          L = −(1/|M|) Σ_{t ∈ M} log p(x_t | x̃)             M: a random 15 % of the tokens, hidden in x̃
    classification     h = mean of the last states over the real tokens,  p(label | x) = softmax(W h + b)
                       L = −(1/B) Σ log p(label | x)

A decoder sees only the tokens before a position, or predicting the next one would be copying. In an encoder every token
sees the whole text, so it predicts the tokens that are hidden from it. Of M, 80 % become <|mask|>, 10 % a random token,
and 10 % stay as they are: later texts have no <|mask|>, and a model that has to predict only where it sees one learns
nothing about all other tokens. With the 20 % any token may be wrong, so the model must represent each in its context.

One step (main has the same four parts; first --mlm_steps of masked-LM, then --steps of labels):

    1. batch     masked-LM   x = batch_at(stream, step)           windows of a shuffled epoch            (B, T)
                             x̃, chosen = hide(x)                  chosen is True on M                    (B, T) each
                             n = |M|                              of all ranks, before the batch is cut
                 labels      x̃, real = collate(texts)             padded, and 10 % of the tokens hidden  (B, T) each
                             n = B
    2. gradient  for each micro-batch of this rank:
                             states = hidden(x̃, real)             no causal mask; nobody sees a pad      (b, T, C)
                 masked-LM   log p  = log softmax(token_logits(states[chosen]))[x[chosen]]               (holes,)
                 labels      log p  = log softmax(W mean_pool(states, real) + b)[label]                  (b,)
                             backward(−Σ log p / n)               gradients add up, over micro-batches and ranks
    3. update    clip ‖g‖; lr = lr_at(step of this objective); optimizer step
    4. look      log; every --eval_every steps validate, keep the best classifier

The defaults run 300 steps of 32 windows of 128 generated tokens, then, with new optimizers, 400 steps of 64 reviews:
0.8 M parameters and embeddings, dropout 0.1, Muon and AdamW. Off: a start from a checkpoint, further text (--text), and
what BERT has besides: post-norm, learned positions, token types, a pooler, exact GELU. The layout is the decoder's;
BERT's is `bert_config()`, and its checkpoints open here (support/hf_bert.py), though not its WordPiece tokenizer.

Traps:
  * No mask at all means causal in this code. `real` (B, 1, 1, T) lets every token see every real one.
  * Pads must not count: `real` hides them as keys in every layer and leaves them out of the mean, so a text's label
    does not depend on the other texts of its batch. It is made where the rows are made, never from ids != pad.
  * The loss is read at M alone, kept tokens included. A loss at all tokens would mostly reward copying.
  * The best checkpoint is chosen on validation accuracy, and the test file is read once, at the end. A bag of words
    (logistic regression on which words occur), trained and chosen in the same way, is reported beside it. It knows
    nothing of order, so "not good" is good.

BERT reads a text's summary from its first token, trained by a second objective (is the next sentence the next?) that
RoBERTa (arXiv:1907.11692) showed to be useless. The mean needs no training of its own. --init may be a decoder: its
blocks are the same, and it learns to do without the causal mask while it learns the labels (LLM2Vec, arXiv:2404.05961,
trains it on masked-LM first). A text longer than the context keeps its first quarter and its end (arXiv:1905.05583).

Simplified: windows of the pretraining text may hold several documents, which see each other.

Run it:
    python encoder.py                                                   # generated reviews, 2 minutes on 2 cores
    python encoder.py --demo                                            # ten tokens hidden, both losses by hand
    python encoder.py --data polarity --config configs/encoder_polarity.yaml
    python encoder.py --data reviews.csv                                # columns text and label
    python encoder.py --config configs/encoder_polarity_smollm2.yaml    # starts from a trained decoder
    torchrun --nproc_per_node 2 encoder.py --data imdb
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import batch_at, load_sentiment, rows_at
from norms import LayerNorm
from optim import lr_at, make_optimizers, optimizer_step
from positional import LearnedPositions, rope_cos_sin, rope_frequencies, sinusoidal_positions
from support.checkpoints import open_checkpoint, resolve_checkpoint
from support.checks import Amount, Count, FractionBelow1, Range, Whole
from support.classification import announce, bag_of_words, report, write_mistakes
from support.cli import run_script
from support.content import records_of, weights_of
from support.devices import precision, setup
from support.errors import CheckpointError, ConfigError
from support.finite import diverged
from support.hf_bert import is_encoder, load_encoder, save_encoder
from support.runs import Run, RunConfig, run_path, saved_run
from support.streams import make_streams
from tokenizer_bpe import BPETokenizer, load_tokenizer
from transformer import Block, FeedForward, TransformerConfig, init_weights, make_norm

MASK = "<|mask|>"
LABELS = ("negative", "positive")

# ---------------------------------------------------------------------------------------------------------------
# The model.


@dataclass
class EncoderConfig(TransformerConfig):
    """The architecture. The defaults are a 0.8 M-parameter model, without its embeddings."""

    context: Count = 128
    """Longest text in tokens."""
    n_layer: Count = 4
    """Number of blocks."""
    n_head: Count = 4
    """Query heads H."""
    n_kv_head: Count = 4
    """Key/value heads G."""
    width: Count = 128
    """Width C of the residual stream."""
    n_class: Count = 2
    """Number of labels."""
    n_type: Whole = 0
    """Token types (BERT's two: first and second text); 0 for none."""
    embed_norm: bool = False
    """Normalise the sum of the embeddings, as BERT does."""
    exact_gelu: bool = False
    """x Φ(x) where the activation is gelu, instead of its tanh form."""
    pooler: bool = False
    """BERT's tanh layer on the first token. Its own tasks use it; the classifier here does not."""

    def __post_init__(self):
        super().__post_init__()
        if self.exact_gelu and self.activation != "gelu":
            raise CheckpointError(f"exact_gelu is a form of gelu, but activation is {self.activation}")


def bert_config(**changes):
    """BERT's layout; the sizes of bert-base-uncased unless `changes` says otherwise."""
    config = dict(vocab_size=30522, context=512, n_layer=12, n_head=12, width=768, ffn_width=3072, norm_eps=1e-12)
    config |= dict(norm="layer", norm_placement="post", positions="learned", activation="gelu", exact_gelu=True)
    config |= dict(qk_norm=False, bias=True, n_type=2, embed_norm=True, pooler=True) | changes
    return EncoderConfig(**{"n_kv_head": config["n_head"], **config})


class ExactFeedForward(FeedForward):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Encoder(nn.Module):
    """Token ids (B, T) -> states (B, T, C), each of them of the whole text. Two heads read them: the token that was
    hidden, and the label of the text."""

    config_class = EncoderConfig

    def __init__(self, config):
        super().__init__()
        self.config = c = config.resolved()
        for name in ("window", "rope_scaling", "n_expert"):
            if getattr(c, name):
                raise CheckpointError(f"{name} is for decoders, the encoder has none")
        if not c.tie_embeddings:
            raise CheckpointError("tie_embeddings is false, but the masked-LM head is the embedding matrix itself")
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.learned = LearnedPositions(c.context, c.width) if c.positions == "learned" else None
        self.types = nn.Embedding(c.n_type, c.width) if c.n_type else None
        self.embed_norm = make_norm(c) if c.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        if c.activation == "gelu" and c.exact_gelu:
            for block in self.blocks:
                block.ffn = ExactFeedForward(c)
        self.norm = nn.Identity() if c.norm_placement == "post" else make_norm(c)
        self.pooler = nn.Linear(c.width, c.width) if c.pooler else None
        # The two heads. Masked-LM is BERT's: one more layer, then the embedding matrix and a bias per token.
        self.transform, self.transform_norm = nn.Linear(c.width, c.width), LayerNorm(c.width, c.norm_eps)
        self.token_bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.classifier = nn.Linear(c.width, c.n_class)
        if c.positions == "rope":
            cos, sin = rope_cos_sin(torch.arange(c.context), rope_frequencies(c.head_dim, c.rope_theta))
            self.register_buffer("rope_cos", cos, persistent=False)  # (context, D)
            self.register_buffer("rope_sin", sin, persistent=False)
        init_weights(self)  # as the decoder's

    def hidden(self, tokens, real=None, types=None):
        """tokens (B, T), real (B, T) False on padding, types (B, T) -> last states (B, T, C)."""
        c, (_, T) = self.config, tokens.shape
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
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        x = self.dropout(self.embed_norm(x))
        real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        mask = real[:, None, None]  # (B, 1, 1, T): every token sees every real one. No mask at all would mean causal
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, None, layer)
        return self.norm(x)

    def token_logits(self, x):
        """States (..., C) -> logits over the vocabulary (..., V): which token is, or was, here."""
        return F.linear(self.transform_norm(F.gelu(self.transform(x))), self.embed.weight, self.token_bias)

    def forward(self, tokens, real=None, types=None, *, targets=None, chosen=None):
        """-> logits of the labels (B, n_class); or, with targets (B, T) and chosen (B, T) boolean, log p of the targets
        where chosen is True, (number of chosen,) in fp32."""
        x = self.hidden(tokens, real, types)  # (B, T, C)
        if targets is not None:
            return -F.cross_entropy(self.token_logits(x[chosen]).float(), targets[chosen], reduction="none")
        return self.classifier(self.dropout(mean_pool(x, real))).float()

    def pooled(self, x):
        """BERT's summary of a text: states (B, T, C) -> (B, C), from the first token alone."""
        return torch.tanh(self.pooler(x[:, 0]))

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, path):
        """Write config.json and model.safetensors: in BERT's layout if the config is BERT's, else in our own."""
        save_encoder(self, path)

    @classmethod
    def from_pretrained(cls, path, dropout=0.0):
        """Open a directory in BERT's layout, where missing heads start from random weights, or our own; in fp32.
        CheckpointError."""
        return load_encoder(cls, path, dropout)

    @classmethod
    def from_trunk(cls, trunk, dropout=0.0, seed=0, **changes):
        """From a decoder (Transformer), whose blocks are the same: only the causal mask goes. Or from another encoder.
        What `trunk` does not have, heads or the layers that `changes` add, starts from random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(EncoderConfig(**asdict(trunk.config) | {"dropout": dropout} | changes))
        own = model.state_dict()
        kept = {k: v for k, v in trunk.state_dict().items() if k in own and not k.startswith("classifier.")}
        model.load_state_dict(own | kept)
        return model


def mean_pool(x, real=None):
    """Mean of x (B, T, C) over the tokens where real (B, T) is True -> (B, C)."""
    if real is None:
        return x.mean(1)
    return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def open_encoder(path, device="cpu", dropout=0.0):
    """-> (model in fp32, tokenizer, directory), from a checkpoint or a run directory. Raises CheckpointError."""
    path = resolve_checkpoint(path)
    model, tokenizer = Encoder.from_pretrained(path, dropout), load_tokenizer(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(f"{path}: {tokenizer.vocab_size} tokens, but {model.config.vocab_size} embeddings")
    return model.to(device), tokenizer, path


def open_start(init, model):
    """-> (Encoder, tokenizer) of an encoder's checkpoint, or of a decoder's. Of `model` only the dropout counts, and
    the context where a decoder's is longer. Raises CheckpointError."""
    path = resolve_checkpoint(init)
    if is_encoder(path):
        return open_encoder(path, dropout=model.dropout)[:2]
    decoder, tokenizer, _ = open_checkpoint(path)
    shorter = {} if decoder.config.positions == "learned" else {"context": min(model.context, decoder.config.context)}
    return Encoder.from_trunk(decoder, model.dropout, **shorter), tokenizer


# ---------------------------------------------------------------------------------------------------------------
# The holes, the batches, the losses.


def hide(tokens, mask_id, vocab_size, keep, generator, rate=0.15):
    """Masked-LM's holes: tokens (B, T), and keep (B, T) True where none may be -> (x̃ (B, T), chosen (B, T)).

    Of the chosen tokens, 80 % become mask_id, 10 % a random token, 10 % stay.
    """
    chosen = (torch.rand(tokens.shape, generator=generator) < rate) & ~keep
    fate = torch.rand(tokens.shape, generator=generator)
    anything = torch.randint(vocab_size, tokens.shape, generator=generator)
    hidden = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    return torch.where(chosen & (fate >= 0.9), anything, hidden), chosen


def encode(tokenizer, text, context):
    """A text's ids after <|endoftext|>, so that an empty text has a row too. Of a text that is too long, the first
    quarter of the context and the end."""
    ids = [tokenizer.endoftext_id, *tokenizer.encode(" " + text.strip())]  # " word" is a token, "word" often is not
    return ids if len(ids) <= context else ids[: context // 4] + ids[context // 4 - context :]


def collate(rows, pad):
    """Lists of ids -> tokens (B, T), real (B, T): padded on the right."""
    T = max(map(len, rows))
    tokens, real = torch.full((len(rows), T), pad), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        real[i, : len(ids)] = True
    return tokens, real


@dataclass
class TextBatch:
    """Rows of tokens; with them the tokens that were hidden (masked-LM), or each row's label."""

    tokens: torch.Tensor  # (B, T) x̃
    real: torch.Tensor  # (B, T) False on padding
    targets: torch.Tensor | None = None  # (B, T) x
    chosen: torch.Tensor | None = None  # (B, T) True on M
    labels: torch.Tensor | None = None  # (B,)

    def take(self, rows, device):
        """Some of the rows, cut to the longest of them, on a device."""
        T = self.real[rows].sum(1).max().item()

        def part(x):  # (B, T) -> (b, shorter T); (B,) -> (b,)
            return None if x is None else (x[rows][:, :T] if x.dim() == 2 else x[rows]).to(device)

        return TextBatch(*map(part, vars(self).values()))

    def micro_batches(self, size, dist):
        """This rank's share of the rows, in pieces of at most `size`, sorted by length to waste no padding."""
        share, lengths = len(self.tokens) // dist.world, self.real.sum(1).tolist()
        own = sorted(range(dist.rank * share, (dist.rank + 1) * share), key=lambda row: lengths[row])
        return [self.take(own[i : i + size], dist.device) for i in range(0, share, size)]


def masked_batch(windows, tokenizer, generator, rate):
    """windows (B, T) of a text, int64 -> a TextBatch with holes, anywhere but at <|endoftext|>."""
    tokens = torch.from_numpy(windows)
    mask_id, border = tokenizer.special_ids[MASK], tokens == tokenizer.endoftext_id
    hidden, chosen = hide(tokens, mask_id, tokenizer.vocab_size, border, generator, rate)
    return TextBatch(hidden, torch.ones_like(chosen), tokens, chosen)


def labelled_batch(examples, tokenizer, generator, token_dropout):
    """[(ids, label), …] -> a TextBatch with labels; a share of its tokens is hidden, as noise and without targets."""
    pad = tokenizer.endoftext_id
    tokens, real = collate([ids for ids, _ in examples], pad)  # (B, T)
    if token_dropout:
        hole = torch.rand(tokens.shape, generator=generator) < token_dropout
        tokens = torch.where(hole & real & (tokens != pad), tokenizer.special_ids[MASK], tokens)
    return TextBatch(tokens, real, labels=torch.tensor([label for _, label in examples]))


def masked_lm_loss(logprobs, n=None):
    """logprobs (k,), log p(x_t | x̃) at the holes -> their −Σ log p / n; n is by default their number."""
    loss = -logprobs.sum() / (max(1, len(logprobs)) if n is None else n)
    return loss, {"loss": loss.item()}


def classification_loss(logits, labels, n=None):
    """logits (B, n_class), labels (B,) -> −Σ log p(label) / n; n is by default B."""
    loss = F.cross_entropy(logits, labels, reduction="sum") / (len(labels) if n is None else n)
    return loss, {"loss": loss.item(), "right": (logits.argmax(-1) == labels).sum().item()}


def demo():
    """Ten tokens and their holes, the masked-LM loss at the holes, and the classification head's loss, by hand."""
    x, mask_id, ln2 = torch.arange(10, 20)[None], 0, math.log(2)  # (1, 10)
    keep = x == 10  # the row begins with <|endoftext|>
    x_hidden, chosen = hide(x, mask_id, 100, keep, torch.Generator().manual_seed(97), rate=0.5)
    print("ten tokens, hidden at a rate of 1/2 so that there is something to see (the first is never hidden)")
    for name, numbers in (("x", x), ("x̃", x_hidden), ("in M", chosen.int())):
        print(f"  {name:<5}" + "".join(f"{i or '<mask>' if name == 'x̃' else i:>8}" for i in numbers[0].tolist()))
    assert (x_hidden == x)[~chosen].all()
    assert not chosen[0, 0]
    many = torch.full((1, 1_000_000), 7)
    hidden, holes = hide(many, mask_id, 100, many != 7, torch.Generator().manual_seed(0))
    shares = [holes.double().mean(), *((hidden == i)[holes].double().mean() for i in (mask_id, 7))]
    by_hand = (0.15, 0.8 + 0.1 / 100, 0.1 + 0.1 / 100)  # a random token may be any of the 100
    assert all(abs(share - wanted) < 0.003 for share, wanted in zip(shares, by_hand, strict=True))
    print("of a million tokens {:.1%} are in M; of those {:.1%} are <mask> and {:.1%} as they were".format(*shares))

    k = int(chosen.sum())
    logprobs = -ln2 * torch.arange(1.0, k + 1)  # the hidden tokens have p = 1/2, 1/4, 1/8 …
    loss, _ = masked_lm_loss(logprobs)
    assert abs(loss.item() - ln2 * (k + 1) / 2) < 1e-6
    print(f"masked-LM, where p at the {k} holes is 1/2, 1/4 … 1/{2**k}: loss = ln 2 · {(k + 1) / 2:g} = {loss:.4f}")

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
# Validation.


@torch.no_grad()
def predict(encoder, rows, pad, batch=64):
    """Lists of ids -> (N, n_class) probabilities. DivergedError if they are not finite."""
    was_training = encoder.training
    encoder.eval()
    device = encoder.embed.weight.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together waste no padding
    pieces = [collate([rows[i] for i in order[j : j + batch]], pad) for j in range(0, len(order), batch)]
    p = torch.cat([encoder(tokens.to(device), real.to(device)).softmax(-1).cpu() for tokens, real in pieces])
    encoder.train(was_training)
    if p.isnan().any():
        raise diverged("probabilities")
    return p[torch.tensor(order).argsort()]  # (N, n_class), as the rows came


def evaluate(encoder, examples, pad, dist):
    """examples [(ids, label)], shared among the ranks -> {"accuracy", "loss", "confusion"}, the same on all of them.
    confusion[i][j] counts the texts of label i that were classified as j."""
    own, n_class = examples[dist.rank :: dist.world], encoder.config.n_class
    counts, loss = np.zeros((n_class, n_class)), 0.0
    if own:
        p, labels = predict(encoder, [ids for ids, _ in own], pad), torch.tensor([label for _, label in own])
        np.add.at(counts, (labels.numpy(), p.argmax(-1).numpy()), 1)
        loss = F.nll_loss(p.log(), labels, reduction="sum").item()
    *flat, loss = dist.sum(*counts.flatten(), loss)
    confusion = np.array(flat).reshape(n_class, n_class).astype(int)
    n = len(examples)
    return {"accuracy": confusion.trace().item() / n, "loss": loss / n, "confusion": confusion.tolist()}


def validation_windows(stream, context, most=256):
    """A (tokens,) stream -> at most `most` windows, spread evenly, (n, context)."""
    starts = np.linspace(0, len(stream) - context, min(most, max(1, len(stream) // context))).astype(int)
    return np.stack([stream[s : s + context] for s in starts]).astype(np.int64)


@torch.no_grad()
def validate_mlm(encoder, batch, dist):
    """Mean masked-LM loss of a TextBatch, in nats per hidden token."""
    was_training = encoder.training
    encoder.eval()
    total = 0.0
    for rows in torch.arange(len(batch.tokens))[dist.rank :: dist.world].split(32):
        if len(rows) == 0:  # fewer windows than ranks
            continue
        x = batch.take(rows, dist.device)
        total -= encoder(x.tokens, targets=x.targets, chosen=x.chosen).sum().item()
    encoder.train(was_training)
    return dist.sum(total)[0] / max(1, batch.chosen.sum().item())


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
    """Share of the tokens that are masked."""
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
        if not self.init and self.vocab_size < 258:
            raise ConfigError(f"--vocab_size is {self.vocab_size}; it counts 256 bytes and 2 special tokens too")
        if self.model.n_class < 2:
            raise ConfigError(f"--model.n_class is {self.model.n_class}; it must be at least 2: the labels are 0 and 1")


# ---------------------------------------------------------------------------------------------------------------
# Set-up and the loop.


def pretraining_texts(config, reviews):
    """{"train", "valid"}: the reviews' texts, and those of --text, without the labels."""
    more = [review for name in config.text for review in load_sentiment(name, "train", config.skip_bad)]
    train = reviews["train"] + more
    return {s: [f" {r.text.strip()}" for r in part] for s, part in (("train", train), ("valid", reviews["valid"]))}


def make_encoder(config, dist, texts):
    """-> (encoder in CPU memory, tokenizer, config with the encoder's architecture): those of --init, or random weights
    and a tokenizer trained on these texts."""
    run_path(config)  # raises on a bad --name or --resume first
    if config.init:
        encoder, tokenizer = open_start(config.init, config.model)
        if MASK not in tokenizer.special_ids and (config.mlm_steps or config.token_dropout):
            raise ConfigError(
                f"the tokenizer of {config.init} has no {MASK}, so nothing can be hidden: --mlm_steps 0 "
                "--token_dropout 0 trains on the labels alone"
            )
        return encoder, tokenizer, replace(config, model=encoder.config)
    if config.resume:
        tokenizer = load_tokenizer(saved_run(run_path(config)))
    else:  # trained on rank 0
        specials = ("<|endoftext|>", MASK)
        tokenizer = dist.from_main(lambda: BPETokenizer.train(texts["train"], config.vocab_size, specials))
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    torch.manual_seed(config.seed)  # the same weights on every rank
    return Encoder(config.model), tokenizer, config


def main(config):
    """Train; returns {"accuracy", "baseline", "confusion", "path"}, of the test split."""
    began = time.perf_counter()
    dist = setup(config.device)
    for name in ("batch", "mlm_batch"):
        dist.per_rank(name, getattr(config, name))
    autocast, scaler = precision(config.dtype, dist)
    reviews = {split: load_sentiment(config.data, split, config.skip_bad) for split in ("train", "valid", "test")}
    texts = pretraining_texts(config, reviews)
    encoder, tokenizer, config = make_encoder(config, dist, texts)
    pad, context = tokenizer.endoftext_id, config.model.context
    examples = {s: [(encode(tokenizer, r.text, context), r.label) for r in part] for s, part in reviews.items()}
    streams = make_streams(config, dist, tokenizer, context, texts) if config.mlm_steps else None
    if streams:  # the validation windows have the same holes each time
        windows, generator = validation_windows(streams["valid"], context), torch.Generator().manual_seed(config.seed)
        held_out = masked_batch(windows, tokenizer, generator, config.mlm_rate)

    reads = records_of(config.data, reviews) | {f"the texts of --text {config.text}": texts["train"]}
    if config.init:
        reads |= weights_of(config.init, encoder)
    encoder.to(dist.device)
    new_optimizers = partial(make_optimizers, encoder, config.optimizer, config.lr, config.weight_decay)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    state = {"best": -1.0, "chat": False, "reads": reads, "began": began}
    run = Run(config, dist, encoder, tokenizer, new_optimizers(), scaler, **state)
    model = encoder
    if dist.world > 1:  # each of the two objectives leaves the other's head without a gradient
        model = DistributedDataParallel(encoder, broadcast_buffers=False, find_unused_parameters=True)
    if dist.is_main:
        announce(config, encoder, tokenizer, streams, examples["train"])

    for step in run.steps(config.mlm_steps + config.steps):
        # 1. the batch: first masked-LM, then labels. Batch, holes and n are those of all ranks, however it is cut
        started, pretraining = time.perf_counter(), step < config.mlm_steps
        generator = torch.Generator().manual_seed((config.seed << 32) + step)
        if pretraining:
            phase_step, phase_steps, peak = step, config.mlm_steps, config.mlm_lr
            windows, _ = batch_at(streams["train"], phase_step, config.mlm_batch, context, config.seed)  # (B, T)
            batch = masked_batch(windows, tokenizer, generator, config.mlm_rate)
            n = max(1, batch.chosen.sum().item())  # |M|
        else:
            phase_step, phase_steps, peak = step - config.mlm_steps, config.steps, config.lr
            indices = rows_at(len(examples["train"]), phase_step, config.batch, config.seed)
            texts = [examples["train"][i] for i in indices]
            batch, n = labelled_batch(texts, tokenizer, generator, config.token_dropout), config.batch
            if phase_step == 0:  # a new objective: the optimizers' running means belong to the old one
                run.optimizers = new_optimizers()

        # 2. the gradient: parts of it add up, over micro-batches and ranks
        model.train()
        loss_sum, right = 0.0, 0
        micro_batches = batch.micro_batches(config.micro_batch, dist)
        for x in micro_batches:
            # DDP averages the gradients of the ranks in the last backward pass alone; * world makes the average a sum.
            last = x is micro_batches[-1]
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                if pretraining:
                    with autocast():
                        logprobs = model(x.tokens, x.real, targets=x.targets, chosen=x.chosen)  # (its holes,)
                    loss, metrics = masked_lm_loss(logprobs, n)
                else:
                    with autocast():
                        logits = model(x.tokens, x.real)  # (b, n_class)
                    loss, metrics = classification_loss(logits, x.labels, n)
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
        due = (phase_step + 1) % config.eval_every == 0 or phase_step + 1 == phase_steps
        if pretraining:
            record["mlm_loss"] = loss_sum
            if due:
                record["mlm_valid_loss"] = validate_mlm(encoder, held_out, dist)
                run.say(f"step {step + 1}  masked-LM {loss_sum:.3f}  valid {record['mlm_valid_loss']:.3f}")
        else:
            record |= {"loss": loss_sum, "train_accuracy": right / n}
            if due:
                result = evaluate(encoder, examples["valid"], pad, dist)
                record |= {"accuracy": result["accuracy"], "valid_loss": result["loss"]}
                figures = f"valid {result['loss']:.3f}, {result['accuracy']:.1%}"
                run.say(f"step {step + 1}  loss {loss_sum:.3f}  {figures}")
                run.keep_best(result["accuracy"])
        run.log(step + 1, **record)
        run.bar.set_postfix(loss=f"{loss_sum:.3f}", lr=f"{lr:.1e}", accuracy=f"{max(run.state.best, 0):.1%}")
    run.close()
    trained = run.seconds

    # The test split, once, with the checkpoint that the validation split chose.
    encoder, tokenizer, path = open_encoder(run.path, dist.device)
    result = evaluate(encoder, examples["test"], pad, dist)
    words = {"accuracy": None}
    if dist.is_main:
        words = bag_of_words(reviews["train"], reviews["valid"], reviews["test"])
        p = predict(encoder, [ids for ids, _ in examples["test"]], pad)  # (N, n_class)
        write_mistakes(run.path, reviews["test"], p, LABELS)
        report(config, run, encoder, result, words, LABELS, f"{trained:.0f} s; {path}")
    figures = {"accuracy": result["accuracy"], "baseline": words["accuracy"], "confusion": result["confusion"]}
    return figures | {"path": str(path)}


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
