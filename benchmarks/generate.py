"""Tokens per second of generate.py ("ours") against transformers' `generate` ("theirs"), with the same weights.

    python benchmarks/generate.py                     # 2 M and 10 M parameters; batch 1, 16 and 64; 128 new tokens

Both sample at temperature 1 from a random Qwen3-layout model, without a stop token, with a KV cache, in fp32 and, on a
GPU or a CPU that multiplies bf16, in bf16 too: generate.py under autocast, as in a rollout of grpo.py; transformers
with weights in bf16. The two take turns on the same machine, and each figure is the best of two rounds of `--repeats`
runs. The column "at best" compares the faster precision of each.

The floor is the time of the arithmetic alone in generate.py's faster
precision: the operations over the measured rate of a large matrix product, or the bytes of the weights, read once per
step, over the measured bandwidth, whichever takes longer. Needs the project's `.[dev]`.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rates import matrix_rate
from generate import generate
from support.devices import auto_dtype
from support.heap import keep_freed_memory
from transformer import Transformer, TransformerConfig

SIZES = (  # 1.9 and 9.6 M parameters
    TransformerConfig(1536, context=256, n_layer=4, n_head=6, n_kv_head=2, width=192),
    TransformerConfig(8192, context=256, n_layer=6, n_head=10, n_kv_head=5, width=320, ffn_width=896),
)


def best(call, repeats, device):
    """Seconds of the fastest run, after one warm-up run."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def rates(device, dtype):
    """-> operations per second of a product of two 2,048² matrices, bytes per second when reading 256 MB."""
    operations = matrix_rate(device, 2048, "bf16" if dtype == torch.bfloat16 else "fp32")
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
    if args.prompt + args.new_tokens > SIZES[0].context:
        parser.error(f"--prompt and --new_tokens do not fit the models' context of {SIZES[0].context}")
    from transformers import AutoModelForCausalLM
    from transformers import __version__ as version

    keep_freed_memory()  # as the training scripts do; it speeds up transformers too
    dtypes = {"fp32": torch.float32}
    if auto_dtype(torch.device(args.device)) == "bf16":
        dtypes["bf16"] = torch.bfloat16
    print(
        f"torch {torch.__version__}, transformers {version}, {args.device}, {torch.get_num_threads()} threads", end=""
    )
    speed = {name: rates(args.device, dtype) for name, dtype in dtypes.items()}
    for name, (operations, bandwidth) in speed.items():
        print(f"; {name} {operations / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s", end="")
    columns = "".join(f"{f'ours {name}':>12}{'theirs':>10}{'ratio':>7}" for name in dtypes)
    print(f"\n{'model':<8}{'batch':>5}{columns}{'at best':>9}{'floor':>12}{'of the floor':>14}")
    for config in SIZES:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            Transformer(config).save_pretrained(folder)
            model = Transformer.from_pretrained(folder).to(args.device).eval()
            hf_models = {
                name: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device).eval()
                for name, dtype in dtypes.items()
            }
        weights = sum(p.numel() for p in model.parameters())  # tied embeddings: read once per step, as the head
        for batch in args.batches:
            prompts = torch.randint(config.vocab_size, (batch, args.prompt))
            ids, lists = prompts.to(args.device), prompts.tolist()
            options = dict(max_new_tokens=args.new_tokens, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
            options |= {"attention_mask": torch.ones_like(ids)}
            seconds, hf_seconds = {name: [] for name in dtypes}, {name: [] for name in dtypes}
            for _ in range(2):  # in turn, so that a slow minute hits both

                def run():
                    return generate(model, lists, args.new_tokens)  # noqa: B023

                for name, dtype in dtypes.items():

                    def run_hf():
                        return hf_models[name].generate(ids, **options)  # noqa: B023

                    with torch.autocast(args.device, dtype) if name == "bf16" else contextlib.nullcontext():
                        seconds[name].append(best(run, args.repeats, args.device))
                    with torch.inference_mode():
                        hf_seconds[name].append(best(run_hf, args.repeats, args.device))
            tokens = batch * args.new_tokens
            rate = {name: tokens / min(times) for name, times in seconds.items()}  # tokens per second
            hf_rate = {name: tokens / min(times) for name, times in hf_seconds.items()}
            fastest = max(rate, key=rate.get)
            operations, bandwidth = speed[fastest]
            floor = batch / max(2 * weights * batch / operations, weights * dtypes[fastest].itemsize / bandwidth)
            cells = "".join(f"{rate[d]:>10,.0f}/s{hf_rate[d]:>8,.0f}/s{rate[d] / hf_rate[d]:>7.2f}" for d in dtypes)
            print(
                f"{weights / 1e6:<5.1f} M {batch:>5}{cells}{rate[fastest] / max(hf_rate.values()):>9.2f}"
                f"{floor:>10,.0f}/s{rate[fastest] / floor:>13.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
