"""What windows, sinks and the rolling cache cost and save, measured.

    python benchmarks/attention.py                  # about a minute on one idle core; --tokens 5000 for a quick look
    python benchmarks/attention.py --flex           # FlexAttention as well: compiles first

1. One windowed layer with a RollingKVCache decodes a stream token by token: time per token, bytes of the cache and peak
   memory of the process, per tenth of the stream. For comparison, the same layer without a window, with a KVCache.
2. One windowed layer's attention over a whole sequence, forward and forward + backward, in several implementations:
   the formula, SDPA with a (T, S) mask, SDPA band by band (what attention.py uses), FlexAttention (made for such
   masks; it has no backward pass on a CPU).
3. One new token for each of B rows through Attention with a KVCache, T = 1: the cost of decoding per layer.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention import Attention, KVCache, RollingKVCache, fast_attention, naive_attention, window_mask
from positional import rope_cos_sin, rope_frequencies
from support.sdpa import banded_attention


def kib(cache):
    return sum(x.numel() * x.element_size() for x in cache.keys + cache.values) / 1024


def peak_mib():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)  # macOS counts bytes, Linux KiB


@torch.no_grad()
def stream(n, window, sinks, width=64, heads=4):
    """Decode n random inputs; prints a line per tenth."""
    D = width // heads
    torch.manual_seed(0)
    windowed = Attention(width, heads, 2, D, qk_norm=True, window=window, sinks=sinks)
    whole = Attention(width, heads, 2, D, qk_norm=True)
    rolling = RollingKVCache(1, 1, 2, window, D, sinks=sinks)
    growing = KVCache(1, 1, 2, n, D)
    growing.store.zero_()  # claim this memory now, so that only the rolling cache can raise the peak below
    frequencies, x = rope_frequencies(D), torch.randn(1, 64, width)

    def step(layer, cache, t):
        started = time.perf_counter()
        cos_sin = rope_cos_sin(torch.tensor([t]), frequencies)
        layer(x[:, t % 64 : t % 64 + 1], cos_sin, cache=cache)
        cache.length += 1
        return (time.perf_counter() - started) * 1e6

    print(f"\na stream of {n:,} tokens, a window of {window} and {sinks} sinks, width {width}, G = 2, D = {D}")
    print(
        f"{'tokens':>10}{'µs a token':>12}{'cache KiB':>11}{'peak MiB':>10}   everything kept: µs a token, KiB in use"
    )
    tenth = n // 10
    for block in range(10):
        times = [step(windowed, rolling, t) for t in range(block * tenth, (block + 1) * tenth)]
        growing.length = (block + 1) * tenth - 20  # skip to the end of the tenth: only its last steps are timed
        growing_times = [step(whole, growing, growing.length) for _ in range(20)]
        print(f"{rolling.length:>10,}{statistics.median(times):>12.1f}{kib(rolling):>11.1f}{peak_mib():>10.1f}", end="")
        print(f"{statistics.median(growing_times):>30.1f}{kib(growing) * growing.length / n:>12.1f}")


def best(call, repeats):
    """Milliseconds of the fastest run, after one warm-up run."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return min(times[1:])


def compare_implementations(T, window, sinks, repeats, flex, H=6, G=2, D=32):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, T, D, requires_grad=True) for heads in (H, G, G))
    mask, output_gradient = window_mask(T, T, window, sinks), torch.randn(1, H, T, D)
    implementations = {
        "formula": lambda *qkv: naive_attention(*qkv, mask)[0],
        "SDPA, mask": lambda *qkv: fast_attention(*qkv, mask),
        "SDPA, bands": lambda *qkv: banded_attention(*qkv, window, sinks),
    }
    if flex:
        seen = lambda b, h, i, j: (i >= j) & ((i - j < window) | (j < sinks))  # noqa: E731
        blocks, compiled = create_block_mask(seen, 1, 1, T, T, device="cpu"), torch.compile(flex_attention)
        implementations["Flex, compiled"] = lambda *qkv: compiled(*qkv, block_mask=blocks, enable_gqa=True)
    plain = [x.detach() for x in (q, k, v)]
    expected = implementations["formula"](*plain)
    for name, call in implementations.items():
        torch.testing.assert_close(call(*plain), expected, atol=1e-5, rtol=1e-5)
        forward = best(lambda call=call: call(*plain), repeats)
        try:
            total = best(lambda call=call: torch.autograd.grad(call(q, k, v), (q, k, v), output_gradient), repeats)
            total = f"{total:>10.2f}"
        except NotImplementedError as error:
            total = f"   {str(error).split('.')[0]}"
        print(f"{T:>8}  {name:<16}{forward:>10.2f}{total}")


@torch.no_grad()
def decode_step(B, S, window=None, width=192, H=6, G=2):
    D = width // H
    torch.manual_seed(0)
    layer = Attention(width, H, G, D, qk_norm=True, window=window)
    cache = RollingKVCache(1, B, G, window, D) if window else KVCache(1, B, G, S + 1, D)
    for store in cache.keys + cache.values:
        store.normal_()
    cache.length = S
    cos_sin = rope_cos_sin(torch.full((B, 1), S), rope_frequencies(D))
    x = torch.randn(B, 1, width)
    return best(lambda: layer(x, cos_sin, None, cache), max(20, 2000 // B))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flex", action="store_true", help="also time FlexAttention (needs a C++ compiler)")
    args = parser.parse_args()
    if args.tokens < 200:
        parser.error("--tokens: 200 or more, as the last 20 of each tenth are timed with everything kept")
    torch.set_num_threads(args.threads)
    stream(args.tokens, window=252, sinks=4)
    print(f"\nattention with a window of 256 and 4 sinks, H = 6, G = 2, D = 32, {args.threads} thread(s); milliseconds")
    print(f"{'T':>8}  {'form':<16}{'forward':>10}{'+ back':>10}")
    for T in (512, 2048):
        compare_implementations(T, 256, 4, args.repeats, args.flex)
    print("\none token for each of B rows, width 192, H = 6, G = 2: milliseconds for one layer")
    print(f"{'B':>8}{'S = 40':>10}{'S = 200':>10}{'S = 2000':>10}{'window 200':>12}")
    for B in (1, 16, 128):
        print(f"{B:>8}" + "".join(f"{decode_step(B, S):>10.3f}" for S in (40, 200, 2000)), end="")
        print(f"{decode_step(B, 2000, 200):>12.3f}")


if __name__ == "__main__":
    main()
