"""support/plots.py."""

from tiny import MODEL

from support import plots
from tokenizer_bpe import CharTokenizer
from transformer import Transformer, TransformerConfig


def test_tokens_that_look_like_formulas_are_drawn(here):
    tokenizer = CharTokenizer.train(["a$ b"])
    raw = Transformer(TransformerConfig(**MODEL | {"vocab_size": tokenizer.vocab_size}))
    tokenizer.decode = lambda ids: "$$"
    plots.draw_attention(here, raw, tokenizer, "a$ b$ a")
    assert (here / "attention.png").stat().st_size > 5000
