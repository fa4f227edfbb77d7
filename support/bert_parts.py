"""What BERT's encoder has besides the blocks: token types, a norm after the embeddings, exact GELU, a pooler.

encoder.py builds on both classes, so that BERT's checkpoints open as its `Encoder` (support/hf_bert.py). All is off by
default.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from support.checks import Whole
from support.errors import CheckpointError
from support.hf_bert import load_encoder, save_encoder
from transformer import FeedForward, TransformerConfig, make_norm


@dataclass
class BertConfig(TransformerConfig):
    """An architecture with BERT's switches."""

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


def refuse_unsupported(c):
    """CheckpointError on a config that asks for what only the decoder has."""
    for name in ("window", "rope_scaling", "n_expert"):
        if getattr(c, name):
            raise CheckpointError(f"{name} is not supported in the encoder")
    if not c.tie_embeddings:
        raise CheckpointError("tie_embeddings is false, but the masked-LM head is the embedding matrix itself")


class ExactFeedForward(FeedForward):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class BertParts:
    """Methods of an nn.Module: BERT's parts, the files, and the start from another model.

    The module's parameters keep their order, by which an optimizer's state is saved and resumed, and by which the
    weights are drawn: so one method adds what precedes the blocks, another what follows them.
    """

    def add_bert_embeddings(self, c):
        """The token types and the norm after the embeddings, where a resolved config asks for them."""
        self.types = nn.Embedding(c.n_type, c.width) if c.n_type else None
        self.embed_norm = make_norm(c) if c.embed_norm else nn.Identity()

    def add_bert_layers(self, c):
        """The pooler, and exact GELU in the `blocks`, where a resolved config asks for them."""
        if c.exact_gelu:
            for block in self.blocks:
                block.ffn = ExactFeedForward(c)
        self.pooler = nn.Linear(c.width, c.width) if c.pooler else None

    def bert_embedding(self, x, types=None):
        """x (B, T, C), types (B, T) or None for type 0 everywhere -> (B, T, C): plus the types' embedding, normalised.
        Without the switches x itself."""
        if self.types is not None:
            x = x + self.types(torch.zeros_like(x[..., 0], dtype=torch.long) if types is None else types)
        return self.embed_norm(x)

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
        What `trunk` does not have, heads or the layers that `changes` add, starts from random weights, and so does the
        classifier in any case: its labels may be others."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(cls.config_class(**asdict(trunk.config) | {"dropout": dropout} | changes))
        own = model.state_dict()
        kept = {k: v for k, v in trunk.state_dict().items() if k in own and not k.startswith("classifier.")}
        model.load_state_dict(own | kept)
        return model
