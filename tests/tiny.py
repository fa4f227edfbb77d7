"""A pretraining run of six small steps, for the tests of support/ (the fixture `here` writes its text)."""

from pretrain import Config
from transformer import TransformerConfig

TEXT = "".join(f"{a} plus {b} is {a + b}. " for a in range(20) for b in range(20))
MODEL = dict(context=32, n_layer=1, n_head=2, n_kv_head=1, width=16)
SMALL = dict(tokenizer="char", steps=6, batch=8, micro_batch=8, warmup=2, eval_every=3, eval_tokens=200, device="cpu")


def config(**changes):
    return Config(**(SMALL | {"data": "text.txt", "model": TransformerConfig(**MODEL)} | changes))


def flags(**changes):
    """The same settings as command-line flags."""
    words = []
    for name, value in (SMALL | {"data": "text.txt"} | changes).items():
        words += [f"--{name}", value]
    for name, value in MODEL.items():
        words += [f"--model.{name}", value]
    return words
