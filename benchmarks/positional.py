"""RoPE past the trained length: a small model learns on short windows and is read on longer ones.

    python benchmarks/positional.py                 # half a minute on an idle core
    python benchmarks/positional.py --steps 2000    # a better model, the same picture

A byte-level decoder is trained on windows of `--length` bytes of generated stories. Then, without any more training, it
reads windows of four times that length with its frequencies as they were and scaled in each way of positional.py. The
table shows the loss in nats per byte by position: the first quarter is what training has seen.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import narrative_texts
from positional import rope_attention_factor, rope_cos_sin, rope_frequencies
from transformer import Transformer, TransformerConfig, token_logprobs


def windows(split, n, length, seed):
    """n windows of the stories as bytes, (n, length)."""
    text = "\n\n".join(narrative_texts(split, 3000, seed)).encode()
    stream = torch.tensor(list(text))
    starts = torch.randint(len(stream) - length, (n,), generator=torch.Generator().manual_seed(seed))
    return stream[starts[:, None] + torch.arange(length)]


def train(length, longest, steps, batch=32, peak=4e-3):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(256, context=longest, n_layer=3, n_head=4, n_kv_head=2, width=96))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    data = windows("train", steps * batch, length, seed=0).view(steps, batch, length)
    for step, tokens in enumerate(data):
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 40, 1.0) * (1 - step / steps)
        loss = -token_logprobs(model, tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def losses(model, tokens, scaling, length):
    """Nats per byte by position, (longest − 1,), with the tables of `scaling` in the place of the trained ones."""
    c, longest = model.config, tokens.shape[1]
    frequencies = rope_frequencies(c.head_dim, c.rope_theta, scaling, length, longest)
    factor = rope_attention_factor(scaling, length)
    model.rope_cos, model.rope_sin = rope_cos_sin(torch.arange(longest), frequencies, factor)
    return -torch.cat([token_logprobs(model, part) for part in tokens.split(16)]).mean(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--length", type=int, default=64, help="bytes in a training window")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    L, s = args.length, 4
    model = train(L, s * L, args.steps)
    tokens = windows("val", 96, s * L, seed=1)
    kinds = {
        "as trained": None,
        "linear": {"rope_type": "linear", "factor": s},
        "dynamic (NTK)": {"rope_type": "dynamic", "factor": 1},
        "llama3": {"rope_type": "llama3", "factor": s, "low_freq_factor": 1, "high_freq_factor": 4},
        "yarn": {"rope_type": "yarn", "factor": s},
    }
    print(f"trained on {L} bytes for {args.steps} steps, read on {s * L}; nats per byte at positions")
    ranges = [(i * L, (i + 1) * L) for i in range(s)]
    print(f"{'':<16}" + "".join(f"{f'{a} to {b - 1}':>12}" for a, b in ranges))
    for name, scaling in kinds.items():
        loss = losses(model, tokens, scaling, L)
        print(f"{name:<16}" + "".join(f"{loss[a : b - 1].mean():>12.3f}" for a, b in ranges), flush=True)


if __name__ == "__main__":
    main()
