"""Tokens per second of generate.py against transformers' `generate`, the same weights, in turn on the same machine.

    python benchmarks/generate.py                     # 2 M and 10 M parameters; batch 1, 16 and 64; 128 new tokens
    python benchmarks/generate.py --dtype bfloat16    # on a GPU

Both sample at temperature 1 from a random Qwen3-layout model, without a stop token, and keep a cache. Each figure is
the best of two rounds of `--repeats` runs, taken in turn. The floor is the time that the arithmetic alone takes:
operations over the rate of a large matrix product measured in the same run, or the bytes of the weights, read once a
step, over the measured bandwidth, whichever is longer.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import generate
from transformer import Transformer, TransformerConfig

SIZES = (  # 1.9 and 9.6 M parameters
    TransformerConfig(1536, context=256, n_layer=4, n_head=6, n_kv_head=2, width=192),
    TransformerConfig(8192, context=256, n_layer=6, n_head=10, n_kv_head=5, width=320, ffn_width=896),
)


def best(call, repeats, device):
    """Seconds of the fastest run, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def rates(device, dtype):
    """-> operations per second of a product of two 2,048² matrices, bytes per second read from 256 MB."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    operations = 2 * 2048**3 / best(lambda: a @ a, 5, device)
    big = torch.randn(2**26, device=device)
    return operations, big.numel() * 4 / best(big.sum, 5, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM
    from transformers import __version__ as version

    dtype = getattr(torch, args.dtype)
    operations, bandwidth = rates(args.device, dtype)
    print(f"torch {torch.__version__}, transformers {version}, {args.device}, {args.dtype}, ", end="")
    print(f"{torch.get_num_threads()} threads, {operations / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    print(f"{'model':<8}{'batch':>6}{'ours':>12}{'transformers':>14}{'ratio':>8}{'floor':>12}{'of the floor':>14}")
    for config in SIZES:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            Transformer(config).save_pretrained(folder)
            ours = Transformer.from_pretrained(folder, dtype=torch.float32).to(args.device, dtype).eval()
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device).eval()
        for batch in args.batches:
            prompts = torch.randint(config.vocab_size, (batch, args.prompt))
            ids = prompts.to(args.device)
            how = dict(max_new_tokens=args.new_tokens, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
            how |= {"attention_mask": torch.ones_like(ids)}
            lists, a, b = prompts.tolist(), [], []
            for _ in range(2):  # in turn, so that a slow minute hits both
                a.append(best(lambda: generate(ours, lists, args.new_tokens), args.repeats, args.device))  # noqa: B023
                with torch.inference_mode():
                    b.append(best(lambda: theirs.generate(ids, **how), args.repeats, args.device))  # noqa: B023
            tokens = batch * args.new_tokens
            weights = sum(p.numel() for p in ours.parameters())  # tied: read once, used once a step as the head
            step = max(2 * weights * batch / operations, weights * ours.embed.weight.element_size() / bandwidth)
            floor = 1 / step * batch
            print(
                f"{weights / 1e6:<5.1f} M {batch:>6}{tokens / min(a):>10,.0f}/s{tokens / min(b):>12,.0f}/s"
                f"{min(b) / min(a):>8.2f}{floor:>10,.0f}/s{tokens / min(a) / floor:>13.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
