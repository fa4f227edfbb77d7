"""Where a pretraining run stands: its log, the loss on validation text, samples of what it writes, the pictures."""

import math
from functools import partial

import numpy as np
import torch

from data import task_of
from generate import generate
from support.attention_maps import attention_weights
from support.checkpoints import resolve_checkpoint
from support.devices import peak_flops
from support.errors import DivergedError
from support.plots import draw_attention, draw_curves, draw_experts
from support.runs import RUNS
from support.sharding import unsharded


class Look:
    """What a pretraining run shows beside its steps: before(), at_step() each, after(). It has the curves drawn each
    time that last/ is saved.

    texts: the validation documents; streams: {"train", "valid"}, arrays of ids.
    """

    def __init__(self, run, texts, streams, autocast):
        tokenizer, context = run.tokenizer, run.config.model.context
        self.run, self.texts, self.streams, self.autocast = run, texts, streams, autocast
        documents = tokenizer.encode_batch(texts) if len(texts) > 1 else []
        self.sequences = partial(validation_sequences, documents, streams["valid"], context, tokenizer.endoftext_id)
        self.byte_lengths, self.entropy = bytes_of_tokens(tokenizer), known_entropy(run.config.data, documents)
        with autocast():  # seconds per token, if every rank computed at its peak
            self.at_peak = flops_per_token(run.model, context) / (peak_flops(run.dist) * run.dist.world)
        run.on_save = lambda: draw(run.config, run.model.num_params(), self.entropy)

    def before(self):
        """Print what is trained, and how long."""
        run, config = self.run, self.run.config
        if run.dist.is_main:
            per_step, n_text = config.batch * config.model.context, len(self.streams["train"])
            print(
                f"{run.model.num_params():,} parameters, vocabulary {run.tokenizer.vocab_size}, {n_text:,} training "
                f"tokens; {config.steps} steps of {per_step:,} = {config.steps * per_step / n_text:.1f} epochs"
            )

    def validate(self, most_tokens=None):
        """-> nats per token, bits per byte: of all of the validation text, or of about so many tokens."""
        run = self.run
        return validate(run.model, self.sequences(most_tokens), self.byte_lengths, run.dist, self.autocast)

    def at_step(self, record):
        """Log a step's record; every --eval_every steps validate, write a sample, keep the best checkpoint."""
        run, config = self.run, self.run.config
        step, speed = run.done + 1, record["tokens_per_second"]
        record = record | {"skipped": run.state.skipped, "mfu": speed * self.at_peak}
        if run.due(config.eval_every):
            losses = self.validate(config.eval_tokens)
            chosen_by = losses[0]  # the best is chosen on the same tokens each time
            if step == config.steps:
                losses = self.validate()
            record["valid_loss"], record["valid_bits_per_byte"] = losses
            run.state.last_valid = losses[0]
            show(run, run.model, run.tokenizer, record, self.texts[0])
            run.keep_best(chosen_by)
        run.log(step, **record)
        run.bar.set_postfix(loss=f"{record['loss']:.3f}", lr=f"{record['lr']:.1e}", tok_s=f"{speed:,.0f}")

    def after(self):
        """Print the last validation loss -> what pretrain.main returns."""
        run, loss = self.run, self.run.state.last_valid
        path = resolve_checkpoint(run.path)  # best/; last/ if no loss was finite, or none came after a return
        if run.dist.is_main:
            floor = f", entropy of the text {self.entropy:.4f}" if self.entropy else ""
            skipped = f"; {run.state.skipped} steps skipped" if run.state.skipped else ""
            where = f"{path}, {run.path}/curves.png"
            print(f"validation loss {loss:.4f} nats per token{floor}{skipped}; {where}")
        return {"valid_loss": loss, "path": str(path)}


def flops_per_token(model, T):
    """Of one training step on rows of T tokens, per token: 6 per matrix weight (2 forward, 4 backward), of the experts
    only the active ones; and attention's two products of width D per head, for the keys that a query sees on average,
    T/2 without a window. (PaLM, arXiv:2204.02311, Appendix B, and nanoGPT count all T: their utilisation comes out
    higher.)"""
    c = model.config
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "learned" not in n)
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)  # (E, inner, C) each
    matrices += experts * c.n_expert_active // max(c.n_expert, 1)
    matrices -= 0 if c.tie_embeddings else c.vocab_size * c.width  # looking an embedding up is no product
    window = min(c.window or T, T)
    return 6 * matrices + 12 * c.n_layer * c.n_head * c.head_dim * (window - window**2 / (2 * T))


def validation_sequences(documents, stream, context, separator, most_tokens=None):
    """The sequences of ids that validation reads: a list of int arrays of at most context + 1.

    If all documents fit, each is read whole, from its beginning; otherwise the stream is cut into windows, and what is
    left at its end, less than a window, is not read.
    `most_tokens` picks some of them, spread evenly.
    """
    if len(documents) > 1 and max(map(len, documents)) < context:
        sequences = [np.array([separator, *ids, separator]) for ids in documents]
    else:
        sequences = [stream[i : i + context + 1] for i in range(0, len(stream) - context, context)]
    if most_tokens is not None:
        wanted = max(1, most_tokens * len(sequences) // sum(len(ids) - 1 for ids in sequences))
        places = np.linspace(0, len(sequences) - 1, min(len(sequences), wanted))
        sequences = [sequences[i] for i in places.astype(int)]
    return sequences


@torch.no_grad()
def validate(policy, sequences, byte_lengths, dist, autocast):
    """-> mean loss in nats per token, and in bits per byte of text. The sequences are shared among the ranks;
    byte_lengths (V,) are the bytes of each token's text.

    Sequences of like lengths go together, padded on the right, which a causal model never sees. A rank that has none
    left passes an empty one: under FSDP every forward pass needs all ranks.
    """
    policy.eval()
    own = sorted(sequences[dist.rank :: dist.world], key=len)
    total, tokens, n_bytes = 0.0, 0, 0
    for i in range(0, math.ceil(len(sequences) / dist.world), 16):
        chunk = own[i : i + 16]
        ids = np.zeros((max(1, len(chunk)), max(map(len, chunk), default=2)), dtype=np.int64)  # (b, L + 1)
        real = np.zeros(ids.shape, dtype=bool)  # True on targets
        for j, sequence in enumerate(chunk):
            ids[j, : len(sequence)], real[j, 1 : len(sequence)] = sequence, True
        n_bytes += byte_lengths[ids[real]].sum()
        ids, real = torch.from_numpy(ids).to(dist.device), torch.from_numpy(real[:, 1:]).to(dist.device)  # real (b, L)
        with autocast():
            total -= policy(ids[:, :-1], targets=ids[:, 1:])[real].sum().item()
        tokens += real.sum().item()
    policy.train()
    total, tokens, n_bytes = dist.sum(total, tokens, n_bytes)
    return total / tokens, total / math.log(2) / max(1, n_bytes)


def bytes_of_tokens(tokenizer):
    """(V,): the number of bytes of each token's text, 0 for special tokens."""
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for i in tokenizer.text_ids:
        lengths[i] = len(tokenizer.token_bytes(i))
    return lengths


def known_entropy(data, documents):
    """Entropy of a task's generated text, in nats per token of these documents and their end tokens: the least loss
    that a model can have. None where it is not known."""
    if task_of(data).entropy is None:
        return None
    nats, _ = task_of(data).entropy()  # per document
    return nats * len(documents) / sum(len(ids) + 1 for ids in documents)


def draw(config, n_params, entropy):
    """Draw curves.png, and for a mixture of experts experts.png."""
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
            ("gradient norm", {"grad_norm": "before clipping", "grad_clipped": "share of clipped steps"}, "norm", {}),
            ("learning rate", {"lr": "lr"}, "learning rate", {}),
        ],
    )
    if config.model.n_expert:
        draw_experts(RUNS / config.name)


def show(run, policy, tokenizer, record, text):
    """Print and log a sample of what the model writes; log its weights, and at the end what its heads attend to in a
    text. All ranks must call it. DivergedError on logits that are not finite, unless --skip_nonfinite."""
    policy, step = unsharded(policy, run.dist), run.done + 1
    if not run.dist.is_main:
        return
    loss, valid_loss = record["loss"], record["valid_loss"]
    try:
        sample = sample_text(policy, tokenizer, run.config.seed)
    except DivergedError as error:
        if not run.config.skip_nonfinite:
            raise
        sample = f"(no sample: {error})"
    run.say(f"step {step}  loss {loss:.3f}  valid {valid_loss:.3f}  | {sample!r}")
    run.log.samples(step, f"**step {step}** (validation loss {valid_loss:.3f})\n\n{sample}")
    run.log.show(step, histograms={f"weights/{name}": weight for name, weight in policy.named_parameters()})
    if step == run.config.steps:  # a second or two
        draw_attention(run.path, *first_tokens(policy, tokenizer, text))
        run.log.show(step, ["attention"])


def first_tokens(policy, tokenizer, text, most=24):
    """-> attention weights among the first T tokens of a text, (H, T, T) per block, and those tokens as text."""
    ids = tokenizer.encode(text[: 40 * most])[: min(most, policy.config.context)]
    training = policy.training
    policy.eval()
    tokens = torch.tensor([ids], device=policy.embed.weight.device)  # (1, T)
    weights = attention_weights(policy, tokens)  # (1, H, T, T) per block
    policy.train(training)
    return [w[0] for w in weights], [tokenizer.decode([i]) for i in ids]


def sample_text(policy, tokenizer, seed):
    """What the model writes after an end-of-text token, at temperature 0.8: at most 60 tokens."""
    end, generator = tokenizer.endoftext_id, torch.Generator().manual_seed(seed)
    length = min(60, policy.config.context - 1)
    rollout = generate(policy, [[end]], length, temperature=0.8, stop_ids=(end,), generator=generator)
    return rollout.texts(tokenizer)[0].strip()
