"""The encoder: the same blocks without the causal mask. BERT's pretraining, then one label per text.

    L = −(1/|M|) Σ_{t ∈ M} log p(x_t | x̃)              masked-LM: M a random 15 % of the tokens      arXiv:1810.04805
    h = mean of the last states over the real tokens,   p(label | x) = softmax(W h + b)

A decoder may see only what stands before a token, or predicting the next one would be copying. An encoder reads a
whole text at once, so every token may see every other; in exchange it cannot predict a token that it sees. Hence the
holes: x̃ is x with M hidden, and the states at M must say, from both sides, what stood there. Of M, 80 % become
<|mask|>, 10 % a random token and 10 % stay as they are. Texts met later have no <|mask|>, and a model that only ever
worked where it saw one would be blind there; with the 20 % it must doubt every token and represent each.

Pretraining leaves a vector per token; a label wants one per text. BERT trains its first token for that, with a
second objective (is the next sentence the next?) that RoBERTa found useless. The mean over tokens needs no training
of its own and suits what decides sentiment: a few words, anywhere. Padding must not count: `real` marks the tokens, is
made where the rows are made, hides the pads as keys in every layer and leaves them out of the mean, so a text's
label does not depend on what stands beside it.

One step:

    first --mlm_steps of masked-LM:
        x        = batch_at(stream, step)                   the next windows of a shuffled epoch       (B, T)
        x̃, M     = hide(x)                                  before the batch is shared and cut         (B, T)
        states   = encoder.hidden(x̃)                        attention in both directions               (B, T, C)
        log p    = log softmax(token_logits(states[M]))     at the holes alone                         (|M|, V)
        loss     = −Σ log p[x[M]] / |M|                                                                ()
    then --steps of labels, with new optimizers:
        x, real  = collate(texts)                           padded on the right, some tokens hidden    (B, T)
        states   = encoder.hidden(x, real)                  pads are seen by nobody                    (B, T, C)
        log p    = log softmax(W mean_pool(states, real) + b)                                          (B, n_class)
        loss     = −Σ log p[label] / B                                                                 ()
    in both: micro-batches' gradients add up; clip ‖g‖; optimizer step

The defaults train 0.8 M parameters, and embeddings, on generated reviews: 300 steps of 32 windows of 128 tokens, then
400 steps of 64 texts with 10 % of the tokens hidden as noise; dropout 0.1; Muon for the blocks' matrices and AdamW for
the rest, each part with 20 steps of warm-up and a cosine to a tenth; decay 0.1, clipping at 1.
The architecture is the decoder's: pre-norm RMSNorm, RoPE, SwiGLU. Off: a start from a checkpoint, further text
(`--text`), and what BERT has besides: post-norm, learned positions, token types, a pooler and exact GELU (x Φ(x), not
the tanh form). That is `bert_config(...)`, and BERT's checkpoints open (support/hf_bert.py).

Training and validation come from the training file, the best checkpoint is chosen on validation accuracy, the test
file is read once, at the end. Beside it stands a bag of words: logistic regression on which words occur, trained on
the same texts, its weight decay chosen on the same validation split. It knows nothing of order, so "not good" is good.

Or take a decoder that has been trained (--init): its blocks are the same and only the mask goes, which it learns to
live with while it learns the labels (LLM2Vec, arXiv:2404.05961, first trains it on holes as well).

Simplified: windows of the pretraining text may hold several documents that see each other. A text longer than the
context keeps its first quarter and its end (arXiv:1905.05583 finds the two ends best). No WordPiece: BERT's weights
open here, its tokenizer does not.

Run it:
    python encoder.py                                                   # generated reviews, 2 minutes on 2 cores
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
from evaluate import wilson
from norms import LayerNorm
from optim import lr_at, make_optimizers, optimizer_step
from positional import LearnedPositions, rope_cos_sin, rope_frequencies, sinusoidal_positions
from support.checkpoints import open_checkpoint, resolve_checkpoint
from support.checks import Amount, Count, FractionBelow1, Range, Whole
from support.classification import bag_of_words, confusion_table, write_mistakes
from support.cli import run_script
from support.devices import precision, setup
from support.errors import CheckpointError, ConfigError
from support.hf_bert import is_encoder, load_encoder, save_encoder
from support.plots import draw_curves
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
    """Token ids (B, T) -> states (B, T, C), each of them of the whole text; two heads read them: what stood in a hole,
    and the label of the text."""

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
        """tokens (B, T), real (B, T) True on tokens that are no padding, types (B, T) -> last states (B, T, C)."""
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
        """States (..., C) -> logits over the vocabulary (..., V): what stands, or stood, here."""
        return F.linear(self.transform_norm(F.gelu(self.transform(x))), self.embed.weight, self.token_bias)

    def forward(self, tokens, real=None, types=None, *, targets=None, chosen=None):
        """-> logits of the classes (B, n_class); or, with targets (B, T) and chosen (B, T) boolean, log p of the
        targets at the chosen places, (number of chosen,) in fp32."""
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
        """Open a directory in BERT's layout, where missing heads start anew, or our own; in fp32. CheckpointError."""
        return load_encoder(cls, path, dropout)

    @classmethod
    def from_trunk(cls, trunk, dropout=0.0, seed=0, **changes):
        """From a decoder (Transformer), whose blocks are the same: only the causal mask goes. Or from another encoder.
        What `trunk` does not have, heads or `changes` of the config with more layers, starts anew."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(EncoderConfig(**asdict(trunk.config) | {"dropout": dropout} | changes))
        own = model.state_dict()
        kept = {k: v for k, v in trunk.state_dict().items() if k in own and not k.startswith("classifier.")}
        model.load_state_dict(own | kept)
        return model


def mean_pool(x, real=None):
    """Mean of x (B, T, C) over the places where real (B, T) is True -> (B, C)."""
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
# Rows, and what is asked about them.


def hide(tokens, mask_id, vocab_size, keep, generator, rate=0.15):
    """Masked-LM's holes: tokens (B, T), and keep (B, T) True where none may be -> (x̃ (B, T), chosen (B, T)).

    Of the chosen, 80 % become mask_id, 10 % any token, 10 % stay.
    """
    chosen = (torch.rand(tokens.shape, generator=generator) < rate) & ~keep
    fate = torch.rand(tokens.shape, generator=generator)
    anything = torch.randint(vocab_size, tokens.shape, generator=generator)
    hidden = torch.where(chosen & (fate < 0.8), mask_id, tokens)
    return torch.where(chosen & (fate >= 0.9), anything, hidden), chosen


def encode(tokenizer, text, context):
    """A text's ids after <|endoftext|>, so that an empty one is a row too. Too long: the first quarter and the end."""
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
    """Rows of tokens; what stood in their holes (masked-LM), or each row's label."""

    tokens: torch.Tensor  # (B, T) x̃
    real: torch.Tensor  # (B, T) True on tokens that are no padding
    targets: torch.Tensor | None = None  # (B, T) x
    chosen: torch.Tensor | None = None  # (B, T) True on M
    labels: torch.Tensor | None = None  # (B,)

    def take(self, rows, device):
        """Some of the rows, as long as the longest of them, on a device."""
        T = self.real[rows].sum(1).max().item()

        def part(x):  # (B, T) -> (b, shorter T); (B,) -> (b,)
            return None if x is None else (x[rows][:, :T] if x.dim() == 2 else x[rows]).to(device)

        return TextBatch(*map(part, vars(self).values()))

    def micro_batches(self, size, dist):
        """This rank's share of the rows, in pieces of at most `size`: of like lengths, which waste no padding."""
        share, lengths = len(self.tokens) // dist.world, self.real.sum(1).tolist()
        own = sorted(range(dist.rank * share, (dist.rank + 1) * share), key=lambda row: lengths[row])
        return [self.take(own[i : i + size], dist.device) for i in range(0, share, size)]


def masked_batch(windows, tokenizer, generator, rate):
    """windows (B, T) of a text, int64 -> a TextBatch with holes, anywhere but at the borders of documents."""
    tokens = torch.from_numpy(windows)
    mask_id, border = tokenizer.special_ids[MASK], tokens == tokenizer.endoftext_id
    hidden, chosen = hide(tokens, mask_id, tokenizer.vocab_size, border, generator, rate)
    return TextBatch(hidden, torch.ones_like(chosen), tokens, chosen)


def labelled_batch(examples, tokenizer, generator, token_dropout):
    """[(ids, label), …] -> a TextBatch with labels, a share of its tokens hidden (no target: this is noise)."""
    pad = tokenizer.endoftext_id
    tokens, real = collate([ids for ids, _ in examples], pad)  # (B, T)
    if token_dropout:
        hole = torch.rand(tokens.shape, generator=generator) < token_dropout
        tokens = torch.where(hole & real & (tokens != pad), tokenizer.special_ids[MASK], tokens)
    return TextBatch(tokens, real, labels=torch.tensor([label for _, label in examples]))


def masked_lm_loss(logprobs, n=None):
    """logprobs (k,), log p(x_t | x̃) at the holes: the sum of −log p over n, by default their number."""
    loss = -logprobs.sum() / (max(1, len(logprobs)) if n is None else n)
    return loss, {"loss": loss.item()}


def classification_loss(logits, labels, n=None):
    """logits (B, n_class), labels (B,): the sum of −log p(label) over n, by default their number."""
    loss = F.cross_entropy(logits, labels, reduction="sum") / (len(labels) if n is None else n)
    return loss, {"loss": loss.item(), "right": (logits.argmax(-1) == labels).sum().item()}


# ---------------------------------------------------------------------------------------------------------------
# How good is it?


@torch.no_grad()
def predict(encoder, rows, pad, batch=64):
    """Lists of ids -> (N, n_class) probabilities."""
    was_training = encoder.training
    encoder.eval()
    device = encoder.embed.weight.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of like lengths waste no padding
    pieces = [collate([rows[i] for i in order[j : j + batch]], pad) for j in range(0, len(order), batch)]
    p = torch.cat([encoder(tokens.to(device), real.to(device)).softmax(-1).cpu() for tokens, real in pieces])
    encoder.train(was_training)
    return p[torch.tensor(order).argsort()]  # (N, n_class), as the rows came


def evaluate(encoder, examples, pad, dist):
    """examples [(ids, label)], dealt out to the ranks -> {"accuracy", "loss", "confusion"}, the same on all.
    confusion[i][j] counts the texts of label i that were taken for j."""
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
# The stage.


@dataclass
class Config(RunConfig):
    """Pretrain an encoder by masked-LM, then train it to classify texts."""

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
    """Peak learning rate of the pretraining."""
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
            raise ConfigError(f"--model.n_class is {self.model.n_class}; the labels are 0 and 1, so at least 2")


def pretraining_texts(config, reviews):
    """{"train", "valid"}: the reviews' texts, and those of --text, without their labels."""
    train = reviews["train"] + [review for name in config.text for review in load_sentiment(name, "train")]
    return {s: [f" {r.text.strip()}" for r in part] for s, part in (("train", train), ("valid", reviews["valid"]))}


def make_encoder(config, dist, texts):
    """-> (the encoder in CPU memory, its tokenizer, the config with its architecture in it): what --init holds; or
    random weights, with a tokenizer of these texts."""
    run_path(config)  # what is wrong with --name or --resume is said first
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
    else:  # trained once; no file, as there is no run directory yet
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
    reviews = {split: load_sentiment(config.data, split) for split in ("train", "valid", "test")}
    texts = pretraining_texts(config, reviews)
    encoder, tokenizer, config = make_encoder(config, dist, texts)
    pad, context = tokenizer.endoftext_id, config.model.context
    examples = {s: [(encode(tokenizer, r.text, context), r.label) for r in part] for s, part in reviews.items()}
    streams = make_streams(config, dist, tokenizer, context, texts) if config.mlm_steps else None
    if streams:  # the holes of the validation windows are the same each time
        windows, generator = validation_windows(streams["valid"], context), torch.Generator().manual_seed(config.seed)
        held_out = masked_batch(windows, tokenizer, generator, config.mlm_rate)

    encoder.to(dist.device)
    new_optimizers = partial(make_optimizers, encoder, config.optimizer, config.lr, config.weight_decay)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    state = {"best": -1.0, "chat": False, "began": began}
    run = Run(config, dist, encoder, tokenizer, new_optimizers(), scaler, **state)
    model = encoder
    if dist.world > 1:  # each of the two objectives leaves the other's head without a gradient
        model = DistributedDataParallel(encoder, broadcast_buffers=False, find_unused_parameters=True)
    if dist.is_main:
        announce(config, encoder, tokenizer, streams, examples["train"])

    for step in run.steps(config.mlm_steps + config.steps):
        # ------------------------------------------------------------------ the batch: first masked-LM, then labels
        started, pretraining = time.perf_counter(), step < config.mlm_steps
        phase_step, phase_steps, peak = step, config.mlm_steps, config.mlm_lr
        if not pretraining:
            phase_step, phase_steps, peak = step - config.mlm_steps, config.steps, config.lr
        # Batch, holes and n are those of all ranks, so none of them depends on how the batch is shared or cut.
        generator = torch.Generator().manual_seed((config.seed << 32) + step)
        if pretraining:
            windows, _ = batch_at(streams["train"], phase_step, config.mlm_batch, context, config.seed)  # (B, T)
            batch = masked_batch(windows, tokenizer, generator, config.mlm_rate)
            n = max(1, batch.chosen.sum().item())  # |M|
        else:
            indices = rows_at(len(examples["train"]), phase_step, config.batch, config.seed)
            texts = [examples["train"][i] for i in indices]
            batch, n = labelled_batch(texts, tokenizer, generator, config.token_dropout), config.batch
            if phase_step == 0:  # another objective: what the optimizer remembers of the old one would mislead
                run.optimizers = new_optimizers()

        # ------------------------------------------------------------------ one optimizer step
        model.train()
        loss_sum, right = 0.0, 0
        pieces = batch.micro_batches(config.micro_batch, dist)
        for x in pieces:
            # DDP sums up the gradients over the ranks in the last backward alone
            with contextlib.nullcontext() if x is pieces[-1] or dist.world == 1 else model.no_sync():
                if pretraining:
                    with autocast():
                        logprobs = model(x.tokens, x.real, targets=x.targets, chosen=x.chosen)  # (holes of the piece,)
                    loss, metrics = masked_lm_loss(logprobs, n)
                else:
                    with autocast():
                        logits = model(x.tokens, x.real)  # (b, n_class)
                    loss, metrics = classification_loss(logits, x.labels, n)
                scaler.scale(loss * dist.world).backward()  # DDP divides by world
            loss_sum += metrics["loss"]
            right += metrics.get("right", 0)
        lr = lr_at(phase_step, phase_steps, peak, config.warmup)
        norm = optimizer_step(encoder, run.optimizers, scaler, autocast, lr, config.clip)
        loss_sum, right = dist.sum(loss_sum, right)
        run.check_finite(lr, norm, "try a smaller --mlm_lr" if pretraining else "try a smaller --lr", loss=loss_sum)

        # ------------------------------------------------------------------ look
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
        report(config, run, encoder, result, words, f"{trained:.0f} s; {path}")
    figures = {"accuracy": result["accuracy"], "baseline": words["accuracy"], "confusion": result["confusion"]}
    return figures | {"path": str(path)}


def announce(config, encoder, tokenizer, streams, examples):
    """What the run will do: two lines, one for each of its parts."""
    print(f"{encoder.num_params():,} parameters, vocabulary {tokenizer.vocab_size}")
    if streams:
        seen, n_text = config.mlm_steps * config.mlm_batch * config.model.context, len(streams["train"])
        print(f"masked-LM: {config.mlm_steps} steps, {seen / n_text:.1f} epochs of {n_text:,} tokens")
    n, length = len(examples), sum(len(ids) for ids, _ in examples) / len(examples)
    epochs = config.steps * config.batch / n
    print(f"labels: {config.steps} steps, {epochs:.1f} epochs of {n:,} texts of {length:.0f} tokens")


def report(config, run, encoder, result, words, where):
    """The confusion table, the accuracy beside that of a bag of words, and the curves."""
    panels = [
        ("classification", {"loss": "train", "valid_loss": "validation"}, "nats per text", {}),
        ("accuracy", {"train_accuracy": "train", "accuracy": "validation"}, "share right", {}),
    ]
    if config.mlm_steps:
        names = {"mlm_loss": "train", "mlm_valid_loss": "validation"}
        panels.insert(0, ("masked-LM", names, "nats per hidden token", {}))
    title = f"an encoder on {config.data}, seed {config.seed}, {encoder.num_params() / 1e6:.1f} M parameters"
    draw_curves(run.path, title, panels)
    print(confusion_table(result["confusion"], LABELS))
    n = sum(map(sum, result["confusion"]))
    low, high = wilson(sum(row[i] for i, row in enumerate(result["confusion"])), n)
    print(
        f"test accuracy {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] on {n} texts (validation "
        f"{run.state.best:.1%}); bag of words {words['accuracy']:.1%} (validation {words['valid']:.1%}, weight decay "
        f"{words['strength']:g}); {where}, {run.path}/curves.png"
    )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
