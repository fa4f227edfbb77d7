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

The default architecture is the decoder's: pre-norm RMSNorm, RoPE, SwiGLU. BERT's own, with post-norm, learned
positions, token types and exact GELU (x Φ(x), not the tanh form), is `bert_config(...)`, and its checkpoints open.

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
import re
import time
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import batch_at, load_sentiment, rows_at
from evaluate import wilson
from norms import LayerNorm
from optim import lr_at, make_optimizers, optimizer_step
from positional import LearnedPositions, rope_cos_sin, rope_frequencies, sinusoidal_positions
from support.checkpoints import open_checkpoint, resolve_checkpoint
from support.checks import Count, Whole
from support.cli import check_positive, check_rates, run
from support.devices import precision, setup
from support.errors import CheckpointError, ConfigError, DivergedError
from support.hf_bert import is_encoder, load_encoder, save_encoder
from support.log import Log
from support.plots import draw_curves
from support.runs import Interrupt, load_state, open_run, run_path, save, saved_run, stopped
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
    """Labels to tell apart."""
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
# Rows.


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
    """A text's ids behind <|endoftext|>, so that an empty one is a row too. Too long: the first quarter and the end."""
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


def classification_loss(logits, labels, n=None):
    """logits (B, n_class), labels (B,): the sum of −log p(label) over n, by default their number."""
    loss = F.cross_entropy(logits, labels, reduction="sum") / (len(labels) if n is None else n)
    return loss, {"loss": loss.item(), "right": (logits.argmax(-1) == labels).sum().item()}


@torch.no_grad()
def predict(raw, rows, pad, batch=64):
    """Lists of ids -> (N, n_class) probabilities."""
    was_training = raw.training
    raw.eval()
    device, out = raw.embed.weight.device, [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of like lengths waste no padding
    for i in range(0, len(order), batch):
        tokens, real = collate([rows[j] for j in order[i : i + batch]], pad)
        for j, p in zip(order[i : i + batch], raw(tokens.to(device), real.to(device)).softmax(-1).cpu(), strict=True):
            out[j] = p
    raw.train(was_training)
    return torch.stack(out)


def evaluate(raw, examples, pad, dist):
    """examples [(ids, label)], dealt out to the ranks -> {"accuracy", "loss", "confusion"}, the same on all.
    confusion[i][j] counts the texts of label i that were taken for j."""
    mine = examples[dist.rank :: dist.world]
    n_class = raw.config.n_class
    counts, loss = np.zeros((n_class, n_class)), 0.0
    if mine:
        p, labels = predict(raw, [ids for ids, _ in mine], pad), torch.tensor([label for _, label in mine])
        np.add.at(counts, (labels.numpy(), p.argmax(-1).numpy()), 1)
        loss = F.nll_loss(p.log(), labels, reduction="sum").item()
    *flat, loss = dist.sum(*counts.flatten(), loss)
    confusion = np.array(flat).reshape(n_class, n_class).astype(int)
    n = len(examples)
    return {"accuracy": confusion.trace().item() / n, "loss": loss / n, "confusion": confusion.tolist()}


@torch.no_grad()
def validate_mlm(raw, stream, context, mask_id, pad, dist, seed, rate, most=256):
    """Mean masked-LM loss in nats per hidden token over `most` windows; the holes are the same each time."""
    was_training = raw.training
    raw.eval()
    starts = np.linspace(0, len(stream) - context, min(most, max(1, len(stream) // context))).astype(int)
    tokens = torch.from_numpy(np.stack([stream[s : s + context] for s in starts]).astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    hidden, chosen = hide(tokens, mask_id, raw.config.vocab_size, tokens == pad, generator, rate)
    total, device = 0.0, raw.embed.weight.device
    for rows in torch.arange(len(tokens))[dist.rank :: dist.world].split(32):
        if len(rows) == 0:  # fewer windows than ranks
            continue
        x, y, where = (t[rows].to(device) for t in (hidden, tokens, chosen))
        total -= raw(x, targets=y, chosen=where).sum().item()
    raw.train(was_training)
    return dist.sum(total)[0] / max(1, chosen.sum().item())


# ---------------------------------------------------------------------------------------------------------------
# The baseline.


def bag_of_words(train, valid, test, strengths=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)):
    """Logistic regression on which words occur -> {"accuracy" on test, "valid", "strength", "weights" by word}.

    p(positive) = σ(b + Σ_{words of the text} w), minimising mean log-loss + λ/2 ‖w‖² by quasi-Newton steps (L-BFGS).
    λ is the one of `strengths` with the best validation accuracy. A word is a run of letters, digits and apostrophes,
    or one other character, in lower case.
    """
    parts = (train, valid, test)
    texts = [[sorted(set(re.findall(r"[\w']+|[^\w\s]", r.text.lower()))) for r in part] for part in parts]
    words = sorted({word for text in texts[0] for word in text})
    number = {word: i for i, word in enumerate(words)}

    def bags(part):  # all word numbers in one row, and where each text begins
        rows = [[number[word] for word in text if word in number] for text in part]
        starts = np.cumsum([0] + [len(row) for row in rows])[:-1]
        return torch.tensor([i for row in rows for i in row], dtype=torch.long), torch.from_numpy(starts)

    X = [bags(part) for part in texts]
    y = [torch.tensor([r.label for r in part], dtype=torch.float64) for part in parts]
    w = torch.zeros(len(words), 1, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def scores(numbers, starts):  # (texts,)
        return F.embedding_bag(numbers, w, starts, mode="sum").squeeze(1) + b

    best = {"valid": -1.0}
    for strength in sorted(strengths, reverse=True):  # from stiff to loose: each starts where the last one ended
        optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

        def closure(strength=strength, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(scores(*X[0]), y[0]) + strength / 2 * w.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            right = [((scores(*x) > 0) == (t > 0)).double().mean().item() for x, t in zip(X, y, strict=True)]
        if right[1] > best["valid"]:
            weights = dict(zip(words, w.detach().squeeze(1).tolist(), strict=True))
            best = {"accuracy": right[2], "valid": right[1], "strength": strength, "weights": weights}
    return best


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config:
    """Pretrain an encoder by masked-LM, then train it to classify texts."""

    data: str = "sentiment"
    """sentiment (generated), polarity, reviews, imdb, or the path of a table of texts and labels."""
    text: list[str] = field(default_factory=list)
    """Further data sets whose training texts, without their labels, are pretrained on."""
    vocab_size: int = 4096
    """Of the BPE tokenizer that is trained on the texts, special tokens included."""
    init: str | None = None
    """Checkpoint to start from, of an encoder or a decoder (its architecture and tokenizer are used); default: random
    weights."""
    name: str = "encoder"
    """Run directory below runs/."""
    mlm_steps: int = 300
    """Optimizer steps of masked-LM pretraining, which come first; 0 leaves it out."""
    mlm_batch: int = 32
    """Windows of the text per such step, over all ranks."""
    mlm_lr: float = 4e-3
    """Peak learning rate of the pretraining."""
    mlm_rate: float = 0.15
    """Share of the tokens that are hidden."""
    steps: int = 400
    """Optimizer steps of the classification."""
    batch: int = 64
    """Texts per such step, over all ranks."""
    micro_batch: int = 16
    """Rows per forward pass of one rank, sorted by length; smaller pads less and saves memory."""
    optimizer: str = "muon"
    """adamw, or muon for the matrices of the blocks."""
    lr: float = 2e-3
    """Peak learning rate of the classification."""
    token_dropout: float = 0.1
    """Share of the tokens that are hidden while classifying."""
    warmup: int = 20
    """Steps of linear warm-up, of both."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    eval_every: int = 100
    """Steps between evaluations on the validation split."""
    save_every: int = 200
    """Steps between checkpoints of last/."""
    seed: int = 0
    """Of the weights, the data order, the holes and the dropout."""
    resume: bool = False
    """Continue runs/NAME/last as if it had never stopped."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, fp32, bf16 or fp16; auto is bf16 where the machine is built for it (most GPUs, CPUs with AMX)."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""
    model: EncoderConfig = field(default_factory=lambda: EncoderConfig(dropout=0.1))
    """The architecture."""

    def __post_init__(self):
        check_positive(self, "mlm_batch", "steps", "batch", "micro_batch", "eval_every", "save_every")
        check_rates(self)
        if not self.init and self.vocab_size < 258:
            raise ConfigError(f"--vocab_size is {self.vocab_size}; it counts 256 bytes and 2 special tokens too")
        if self.mlm_lr < 0:
            raise ConfigError(f"--mlm_lr is {self.mlm_lr}; it must be at least 0")
        if self.model.n_class < 2:
            raise ConfigError(f"--model.n_class is {self.model.n_class}; the labels are 0 and 1, so at least 2")
        if self.mlm_steps < 0:
            raise ConfigError(f"--mlm_steps is {self.mlm_steps}; it must be 0 or more")
        if not (0 < self.mlm_rate < 1 and 0 <= self.token_dropout < 1):
            raise ConfigError("--mlm_rate must be above 0 and below 1, --token_dropout at least 0 and below 1")


def main(config):
    """Train; returns {"accuracy", "baseline", "confusion", "path"}, of the test split."""
    began = time.perf_counter()
    dist = setup(config.device)
    for name in ("batch", "mlm_batch"):
        if getattr(config, name) % dist.world:
            raise ConfigError(f"--{name} {getattr(config, name)} cannot be shared by {dist.world} processes evenly")
    autocast, scaler = precision(config.dtype, dist)
    reviews = {split: load_sentiment(config.data, split) for split in ("train", "valid", "test")}
    texts = {"valid": [f" {r.text.strip()}" for r in reviews["valid"]]}
    texts["train"] = [f" {r.text.strip()}" for r in reviews["train"]]
    texts["train"] += [f" {r.text.strip()}" for name in config.text for r in load_sentiment(name, "train")]
    run_path(config)
    if config.init:
        raw, tokenizer = open_start(config.init, config.model)
        if MASK not in tokenizer.special_ids and (config.mlm_steps or config.token_dropout):
            raise ConfigError(
                f"the tokenizer of {config.init} has no {MASK}, so nothing can be hidden: --mlm_steps 0 "
                "--token_dropout 0 trains on the labels alone"
            )
        config = replace(config, model=raw.config)
    else:
        made = [None]
        if config.resume:
            made = [load_tokenizer(saved_run(run_path(config)))]
        elif dist.is_main:
            made = [BPETokenizer.train(texts["train"], config.vocab_size, ("<|endoftext|>", MASK))]
        if dist.world > 1:
            distributed.broadcast_object_list(made)
        tokenizer = made[0]
        config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
        torch.manual_seed(config.seed)
        raw = Encoder(config.model)
    pad, context = tokenizer.endoftext_id, raw.config.context
    mask_id = tokenizer.special_ids.get(MASK, pad)
    examples = {s: [(encode(tokenizer, r.text, context), r.label) for r in part] for s, part in reviews.items()}
    streams = make_streams(config, dist, tokenizer, context, texts) if config.mlm_steps else None
    run_dir = open_run(config, dist)  # behind all that can refuse what was asked for: a typo moves no earlier run aside
    raw.to(dist.device)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # the same weights on every rank, but other dropout
    optimizers = make_optimizers(raw, config.optimizer, config.lr, config.weight_decay)
    first, best, total = 0, -1.0, config.mlm_steps + config.steps
    if config.resume:
        state = load_state(run_dir, dist, raw, optimizers, scaler, config)
        first, best = state["step"], state["best"]
    model = raw
    if dist.world > 1:  # each of the two objectives leaves the other's head without a gradient
        model = DistributedDataParallel(raw, broadcast_buffers=False, find_unused_parameters=True)
    log = Log(run_dir, config, dist, first)
    interrupt = Interrupt(dist)
    if dist.is_main:
        n_texts, n_tokens = len(examples["train"]), sum(len(ids) for ids, _ in examples["train"])
        print(f"{raw.num_params():,} parameters, vocabulary {tokenizer.vocab_size}")
        if streams:
            seen, length = config.mlm_steps * config.mlm_batch * context, len(streams["train"])
            print(f"masked-LM: {config.mlm_steps} steps, {seen / length:.1f} epochs of {length:,} tokens")
        epochs, length = config.steps * config.batch / n_texts, n_tokens / n_texts
        print(
            f"labels: {config.steps} steps, {epochs:.1f} epochs of {n_texts:,} texts of {n_tokens / n_texts:.0f} tokens"
        )

    def checkpoint(name, step):
        state = None
        if name == "last":
            state = {"step": step, "best": best, "config": asdict(config), "scaler": scaler.state_dict()}
            state["optimizers"] = [o.state_dict() for o in optimizers]
        return save(run_dir, name, dist, raw, tokenizer, chat=False, state=state)

    bar = tqdm(range(first, total), initial=first, total=total, disable=not dist.is_main, unit="step")
    for step in bar:
        # ------------------------------------------------------------------ once in a while
        if interrupt:
            written = checkpoint("last", step)
            bar.close()
            stopped(config.name, step, written, dist)
        if step != first and step % config.save_every == 0:
            checkpoint("last", step)
        if step == config.mlm_steps:  # another objective: what the optimizer remembers of the old one would mislead
            optimizers = make_optimizers(raw, config.optimizer, config.lr, config.weight_decay)

        # ------------------------------------------------------------------ the batch: first masked-LM, then labels
        started, pretraining = time.perf_counter(), step < config.mlm_steps
        # The holes are made for the batch of all ranks, so that they do not depend on how it is shared.
        generator = torch.Generator().manual_seed((config.seed << 32) + step)
        if pretraining:
            tokens = torch.from_numpy(batch_at(streams["train"], step, config.mlm_batch, context, config.seed)[0])
            hidden, chosen = hide(tokens, mask_id, tokenizer.vocab_size, tokens == pad, generator, config.mlm_rate)
            n = max(1, chosen.sum().item())  # of the whole step, all ranks, before the batch is cut
            batch = list(zip(hidden, torch.ones_like(chosen), tokens, chosen, strict=True))
            lr = lr_at(step, config.mlm_steps, config.mlm_lr, config.warmup)
        else:
            rows = rows_at(len(examples["train"]), step - config.mlm_steps, config.batch, config.seed)
            tokens, real = collate([examples["train"][i][0] for i in rows], pad)
            hole = torch.rand(tokens.shape, generator=generator) < config.token_dropout
            hidden = torch.where(hole & real & (tokens != pad), mask_id, tokens)
            labels, n = torch.tensor([examples["train"][i][1] for i in rows]), config.batch
            batch = list(zip(hidden, real, labels, strict=True))
            lr = lr_at(step - config.mlm_steps, config.steps, config.lr, config.warmup)

        # ------------------------------------------------------------------ one optimizer step
        share = len(batch) // dist.world
        mine = batch[dist.rank * share : (dist.rank + 1) * share]
        mine = sorted(mine, key=lambda row: int(row[1].sum()))  # micro-batches of like lengths waste no padding
        model.train()
        loss_sum, right = 0.0, 0
        for i in range(0, share, config.micro_batch):
            columns = [torch.stack(c) for c in zip(*mine[i : i + config.micro_batch], strict=True)]
            T = columns[1].sum(1).max().item()  # the longest row of the piece
            columns = [c.to(dist.device) for c in columns]
            x, real = columns[0][:, :T], columns[1][:, :T]  # (b, T) each
            last = i + config.micro_batch >= share
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                with autocast():
                    if pretraining:
                        output = model(x, real, targets=columns[2], chosen=columns[3])
                    else:
                        output = model(x, real)  # (b, n_class)
                if pretraining:
                    loss = -output.sum() / n
                    metrics = {"loss": loss.item(), "right": 0}
                else:
                    loss, metrics = classification_loss(output, columns[2], n)
                scaler.scale(loss * dist.world).backward()  # DDP divides by world
            loss_sum += metrics["loss"]
            right += metrics["right"]
        norm = optimizer_step(raw, optimizers, scaler, autocast, lr, config.clip)
        loss_sum, right = dist.sum(loss_sum, right)
        if not math.isfinite(loss_sum) or not (math.isfinite(norm) or scaler.is_enabled()):
            said = f"the loss is {loss_sum}, the gradient norm {norm} at step {step} (learning rate {lr:.1e})"
            raise DivergedError(f"{said}; try a smaller --lr")

        done = step + 1
        record = {"mlm_loss": loss_sum} if pretraining else {"loss": loss_sum, "train_accuracy": right / n}
        record |= {"lr": lr, "grad_norm": norm, "seconds": time.perf_counter() - started}
        if pretraining and (done % config.eval_every == 0 or done == config.mlm_steps):
            held = (streams["valid"], context, mask_id, pad, dist, config.seed, config.mlm_rate)
            record["mlm_valid_loss"] = validate_mlm(raw, *held)
            if dist.is_main:
                bar.write(f"step {done}  masked-LM {loss_sum:.3f}  valid {record['mlm_valid_loss']:.3f}")
        if not pretraining and ((done - config.mlm_steps) % config.eval_every == 0 or done == total):
            result = evaluate(raw, examples["valid"], pad, dist)
            record |= {"accuracy": result["accuracy"], "valid_loss": result["loss"]}
            if dist.is_main:
                bar.write(f"step {done}  loss {loss_sum:.3f}  valid {result['loss']:.3f}, {result['accuracy']:.1%}")
            if result["accuracy"] > best:
                best = result["accuracy"]
                checkpoint("best", done)
        log(done, **record)
        bar.set_postfix(loss=f"{loss_sum:.3f}", lr=f"{lr:.1e}", accuracy=f"{max(best, 0):.1%}")
    checkpoint("last", total)
    interrupt.release()
    log.close()
    trained = time.perf_counter() - began

    # The test split, once, with the checkpoint that the validation split chose.
    raw, tokenizer, path = open_encoder(run_dir, dist.device)
    result = evaluate(raw, examples["test"], pad, dist)
    baseline = None
    if dist.is_main:
        write_mistakes(run_dir, raw, reviews["test"], examples["test"], pad)
        panels = [
            ("classification", {"loss": "train", "valid_loss": "validation"}, "nats per text", {}),
            ("accuracy", {"train_accuracy": "train", "accuracy": "validation"}, "share right", {}),
        ]
        if config.mlm_steps:
            names = {"mlm_loss": "train", "mlm_valid_loss": "validation"}
            panels.insert(0, ("masked-LM", names, "nats per hidden token", {}))
        title = f"an encoder on {config.data}, seed {config.seed}, {raw.num_params() / 1e6:.1f} M parameters"
        draw_curves(run_dir, title, panels)
        print(confusion_table(result["confusion"]))
        words = bag_of_words(reviews["train"], reviews["valid"], reviews["test"])
        baseline, n = words["accuracy"], len(examples["test"])
        low, high = wilson(sum(row[i] for i, row in enumerate(result["confusion"])), n)
        print(
            f"test accuracy {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] on {n} texts (validation {best:.1%}); "
            f"bag of words {baseline:.1%} (validation {words['valid']:.1%}, weight decay {words['strength']:g}); "
            f"{trained:.0f} s; {path}, {run_dir}/curves.png"
        )
    return {"accuracy": result["accuracy"], "baseline": baseline, "confusion": result["confusion"], "path": str(path)}


def confusion_table(confusion):
    names = LABELS if len(confusion) == 2 else [str(i) for i in range(len(confusion))]
    lines = [f"{'':<18}" + "".join(f"{'taken for ' + name:>22}" for name in names)]
    for name, row in zip(names, confusion, strict=True):
        lines.append(f"{name:<18}" + "".join(f"{count:>22,}" for count in row))
    return "\n".join(lines)


def write_mistakes(run_dir, raw, reviews, examples, pad, most=20):
    """The surest wrong answers on the test split into samples.md."""
    p = predict(raw, [ids for ids, _ in examples], pad)
    wrong = [(p[i].max().item(), i) for i in range(len(p)) if p[i].argmax() != reviews[i].label]
    with (run_dir / "samples.md").open("w") as file:
        for sure, i in sorted(wrong, reverse=True)[:most]:
            names = LABELS if p.shape[1] == 2 else range(p.shape[1])
            said, truth = names[int(p[i].argmax())], names[reviews[i].label]
            file.write(f"**{said} with {sure:.0%}, but it is {truth}**\n\n> {reviews[i].text[:500]}\n\n")


if __name__ == "__main__":
    run(main, Config, __doc__)
