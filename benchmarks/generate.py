"""Tokens per second of generate.py against transformers' `generate`, the same weights, in turn on the same machine.

    python benchmarks/generate.py                     # 2 M and 10 M parameters; batch 1, 16 and 64; 128 new tokens

Both sample at temperature 1 from a random Qwen3-layout model, without a stop token, and keep a cache, in fp32 and, on
a GPU or a CPU with AMX, in bf16 too: ours under autocast, as in a rollout of grpo.py, theirs with weights in bf16. Each
figure is the best of two rounds of `--repeats` runs, taken in turn; the last ratio is between the faster precisions of
the two. The floor is the time that the arithmetic alone takes in the faster of ours: operations over the rate of a
large matrix product measured in the same run, or the bytes of the weights, read once a step, over the measured
bandwidth, whichever is longer. Needs the project's `.[dev]`.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import generate
from support.devices import auto_dtype, keep_freed_memory
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM
    from transformers import __version__ as version

    keep_freed_memory()  # as the training scripts do, for transformers too
    kinds = {"fp32": torch.float32}
    if auto_dtype(torch.device(args.device)) == "bf16":
        kinds["bf16"] = torch.bfloat16
    print(
        f"torch {torch.__version__}, transformers {version}, {args.device}, {torch.get_num_threads()} threads", end=""
    )
    speed = {kind: rates(args.device, dtype) for kind, dtype in kinds.items()}
    for kind, (operations, bandwidth) in speed.items():
        print(f"; {kind} {operations / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s", end="")
    columns = "".join(f"{f'ours {kind}':>12}{'theirs':>10}{'ratio':>7}" for kind in kinds)
    print(f"\n{'model':<8}{'batch':>5}{columns}{'at best':>9}{'floor':>12}{'of the floor':>14}")
    for config in SIZES:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            Transformer(config).save_pretrained(folder)
            ours = Transformer.from_pretrained(folder).to(args.device).eval()
            theirs = {
                kind: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device).eval()
                for kind, dtype in kinds.items()
            }
        weights = sum(p.numel() for p in ours.parameters())  # tied: read once, used once a step as the head
        for batch in args.batches:
            prompts = torch.randint(config.vocab_size, (batch, args.prompt))
            ids, lists = prompts.to(args.device), prompts.tolist()
            how = dict(max_new_tokens=args.new_tokens, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
            how |= {"attention_mask": torch.ones_like(ids)}
            a, b = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
            for _ in range(2):  # in turn, so that a slow minute hits both
                for kind, dtype in kinds.items():
                    half = torch.autocast(args.device, dtype) if kind == "bf16" else contextlib.nullcontext()
                    with half:
                        a[kind].append(best(lambda: generate(ours, lists, args.new_tokens), args.repeats, args.device))  # noqa: B023
                    with torch.inference_mode():
                        b[kind].append(best(lambda: theirs[kind].generate(ids, **how), args.repeats, args.device))  # noqa: B023
            tokens = batch * args.new_tokens
            a, b = ({kind: tokens / min(times) for kind, times in x.items()} for x in (a, b))  # per second
            kind = max(a, key=a.get)
            operations, bandwidth = speed[kind]
            floor = batch / max(2 * weights * batch / operations, weights * kinds[kind].itemsize / bandwidth)
            shown = "".join(f"{a[k]:>10,.0f}/s{b[k]:>8,.0f}/s{a[k] / b[k]:>7.2f}" for k in kinds)
            print(
                f"{weights / 1e6:<5.1f} M {batch:>5}{shown}{a[kind] / max(b.values()):>9.2f}"
                f"{floor:>10,.0f}/s{a[kind] / floor:>13.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
