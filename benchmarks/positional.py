"""RoPE past the trained context: a small model is trained on short windows and evaluated on longer ones.

    python benchmarks/positional.py                 # about a minute on an idle core
    python benchmarks/positional.py --steps 2000    # a better model, the same picture

A byte-level decoder is trained on windows of `--length` bytes of generated stories. It is then evaluated on windows
four times as long, with its rotary frequencies unchanged and with each scaling of positional.py: first without further
training, then after a few steps on long windows, each scaling from the same trained model. The tables show the loss in
nats per byte by position; training covered the positions of the first quarter only.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from positional import rope_attention_factor, rope_cos_sin, rope_frequencies
from support.word_problems import narrative_texts
from transformer import Transformer, TransformerConfig, token_logprobs


def windows(split, n, length, seed):
    """n windows of the stories as bytes, (n, length)."""
    text = "\n\n".join(narrative_texts(split, 3000, seed)).encode()
    stream = torch.tensor(list(text))
    starts = torch.randint(len(stream) - length, (n,), generator=torch.Generator().manual_seed(seed))
    return stream[starts[:, None] + torch.arange(length)]


def train(model, data, peak):
    """One AdamW step on each batch of data (steps, batch, length). The learning rate warms up, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, tokens in enumerate(data):
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 40, 1.0) * (1 - step / len(data))
        loss = -token_logprobs(model, tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def scale(model, scaling, length):
    """A copy of a model that was trained at `length`, with the rotary tables of `scaling` for its full context."""
    model, c = copy.deepcopy(model), model.config
    frequencies = rope_frequencies(c.head_dim, c.rope_theta, scaling, length, c.context)
    factor = rope_attention_factor(scaling, length)
    model.rope_cos, model.rope_sin = rope_cos_sin(torch.arange(c.context), frequencies, factor)
    return model


@torch.no_grad()
def losses(model, tokens, L):
    """Table cells: nats per byte in each block of L positions."""
    loss = -torch.cat([token_logprobs(model, part) for part in tokens.split(16)]).mean(0)
    return "".join(f"{part.mean():>12.3f}" for part in loss.split(L))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--length", type=int, default=64, help="bytes in a training window")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--more", type=int, default=40, help="further steps, on long windows")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    L, s = args.length, 4
    model = Transformer(TransformerConfig(256, context=s * L, n_layer=3, n_head=4, n_kv_head=2, width=96))
    train(model, windows("train", args.steps * 32, L, seed=0).view(-1, 32, L), peak=4e-3)
    tokens = windows("valid", 96, s * L, seed=1)
    scalings = {
        "as trained": None,
        "linear": {"rope_type": "linear", "factor": s},
        "dynamic (NTK)": {"rope_type": "dynamic", "factor": 1},
        "llama3": {"rope_type": "llama3", "factor": s, "low_freq_factor": 1, "high_freq_factor": 4},
        "yarn": {"rope_type": "yarn", "factor": s},
    }
    models = {name: scale(model, scaling, L) for name, scaling in scalings.items()}
    header = "".join(f"{f'{i * L} to {i * L + L - 1}':>12}" for i in range(s))
    print(f"trained on {L} bytes for {args.steps} steps; nats per byte at positions\n{'':<16}{header}")
    for name, scaled in models.items():
        print(f"{name:<16}{losses(scaled, tokens, L)}", flush=True)
    print(f"\nafter {args.more} more steps on {s * L} bytes")
    long_windows = windows("train", args.more * 8, s * L, seed=2).view(-1, 8, s * L)
    for name, scaled in models.items():
        train(scaled, long_windows, peak=1e-3)
        print(f"{name:<16}{losses(scaled, tokens, L)}", flush=True)


if __name__ == "__main__":
    main()
