"""Attention sinks (arXiv:2309.17453): do the first few tokens keep a windowed model stable? Measured on a trained
model.

    python benchmarks/sinks.py --checkpoint PATH.gguf --windows 256       # 8 minutes on a busy core, 135 M parameters
    python benchmarks/sinks.py --checkpoint runs/NAME --windows 32 --length 128
    python benchmarks/sinks.py --checkpoint PATH.gguf --data FILE.txt     # a text file instead of the built-in stories

The model was trained with full attention. It is evaluated on rows of one text three times: with full attention, with a
window of W tokens, and with W tokens of which a few are the first tokens of the row, the sinks. Nothing is trained.

The table shows nats per token over the first W tokens of a row, where all three see the same, and after them, with the
standard error of the difference to full attention. The last column is the share of the attention after position W, in
the first row, that goes to the first token.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention import Attention
from support.attention_maps import attention_weights
from support.checkpoints import open_checkpoint
from support.errors import CheckpointError, TokenizerError
from support.output import prepare_output
from support.word_problems import narrative_texts
from transformer import token_logprobs


def narrow(model, window, sinks):
    """Set the window and the number of sinks of every layer, in place; no weight depends on them."""
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.window, layer.sinks = window, sinks


@torch.no_grad()
def losses(model, rows):
    """rows (n, T+1) -> nats per token (n, T)."""
    return -torch.cat([token_logprobs(model, row[None]) for row in rows])


@torch.no_grad()
def share_of_first(model, row, W):
    """row (T,) -> the attention to the first token, averaged over layers, heads and the queries after W."""
    weights = attention_weights(model, row[None])  # per layer (1, H, T, T)
    return sum(w[..., W:, 0].mean().item() for w in weights) / len(weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run, a model's directory or a GGUF file")
    parser.add_argument("--data", help="a text file; default: the built-in stories")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        model, tokenizer, _ = open_checkpoint(args.checkpoint)
        text = Path(args.data).read_text(encoding="utf-8") if args.data else "\n\n".join(narrative_texts("valid", 3000))
    except (CheckpointError, TokenizerError, OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    model.eval()
    n, T = args.rows, args.length
    ids = torch.tensor(tokenizer.encode(text[: 20 * n * (T + 1)]))  # more than enough: a token has 2 to 5 letters
    if len(ids) < n * (T + 1):
        parser.error(f"the text has {len(ids)} tokens, {n} rows of {T} need {n * (T + 1)}: fewer --rows or --length")
    if not 4 < min(args.windows) <= max(args.windows) < T <= model.config.context:
        parser.error(f"a window has 5 tokens or more, a row more than that, and at most {model.config.context}")
    rows = ids[: n * (T + 1)].view(n, T + 1)
    narrow(model, None, 0)
    full = losses(model, rows)  # (n, T)
    print(f"{n} rows of {T} tokens; nats per token")
    print(f"{'in sight':<26}{'up to W':>10}{'after W':>10}{'difference':>20}{'on the first token':>22}")
    for W in args.windows:
        print(f"{'everything':<26}", end="")
        print(f"{full[:, :W].mean():>10.3f}{full[:, W:].mean():>10.3f}{'':>20}", end="")
        print(f"{share_of_first(model, rows[0, :-1], W):>21.1%}")
        for sinks in (0, 1, 4):
            narrow(model, W - sinks, sinks)
            loss = losses(model, rows)
            difference = (loss - full)[:, W:].mean(1)  # (n,)
            error = difference.std() / n**0.5
            name = f"the last {W - sinks}" + (f" and {sinks} sink{'s'[: sinks - 1]}" if sinks else "")
            print(f"{name:<26}{loss[:, :W].mean():>10.3f}{loss[:, W:].mean():>10.3f}", end="")
            print(f"{f'{difference.mean():+.3f} ± {error:.3f}':>20}", end="")
            print(f"{share_of_first(model, rows[0, :-1], W):>21.1%}" if sinks else "", flush=True)
        narrow(model, None, 0)


if __name__ == "__main__":
    prepare_output()
    main()
