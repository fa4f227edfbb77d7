"""tokenizer_bpe.py ("ours") against minbpe, `tokenizers` and tiktoken, taking turns on the same machine.

    git clone https://github.com/karpathy/minbpe ../minbpe
    ALIGN_DATA=DIR python benchmarks/tokenizer.py --minbpe ../minbpe

Training: vocabulary 4,096 on Tiny Shakespeare (1.1 MB), then 4,096 and 32,768 on all text in the data folder (20 MB or
more; or --large FILE). Each trainer runs in its own process, to measure its peak memory; reading the file is timed,
importing is not. minbpe counts the whole text again for each merge, so only --minbpe_merges merges are timed and the
result is extrapolated. `tokenizers` gets the same split pattern, and the text in pieces (the merges stay the same),
because it counts in parallel over pieces.

Encoding: megabytes per second of `BPETokenizer.encode` and of tiktoken with the same merges, on the whole text and line
by line. Needs the project's `.[dev]`.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support import word_counts  # noqa: E402
from support.tokenizer_files import from_printable  # noqa: E402
from tokenizer_bpe import PATTERN, BPETokenizer  # noqa: E402

# Each trains, and returns a function that reads the merges back, which is not timed.


def train_ours(file, vocab_size):
    tokenizer = BPETokenizer.train(Path(file), vocab_size, special_tokens=())
    return lambda: tokenizer.merges


def train_tokenizers(file, vocab_size):
    import tokenizers

    word_counts.BATCH = 2**16
    pieces = list(word_counts.cut(word_counts.blocks(Path(file))))
    level = tokenizers.pre_tokenizers.ByteLevel
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [split, level(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(pieces, trainer)

    def merges():
        pairs = json.loads(tokenizer.to_str())["model"]["merges"]
        return [(from_printable(left), from_printable(right)) for left, right in pairs]

    return merges


def train_minbpe(file, vocab_size):
    from minbpe import RegexTokenizer

    tokenizer = RegexTokenizer(PATTERN)
    tokenizer.train(Path(file).read_text(encoding="utf-8"), vocab_size)
    return lambda: [(tokenizer.vocab[left], tokenizer.vocab[right]) for left, right in tokenizer.merges]


def train(name, file, vocab_size):
    """Train in this process and print JSON: seconds, peak memory in MB, the merges."""
    trainers = {"ours": train_ours, "tokenizers": train_tokenizers, "minbpe": train_minbpe}
    if name != "ours":
        import_module(name)  # which is not timed; ours is imported above
    started = time.perf_counter()
    merges = trainers[name](file, vocab_size)
    seconds, merges = time.perf_counter() - started, merges()
    unit = 1024**2 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peak = [resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"seconds": seconds, "peak": peak[0], "worker": peak[1], "merges": repr(merges)}))


def measure(name, file, vocab_size, args):
    """Call `train` in a new process; returns its JSON."""
    paths = [str(ROOT), str(args.minbpe or ""), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, "--one", name, str(file), str(vocab_size)]
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def training(title, file, vocab_size, args):
    print(f"\ntraining: vocabulary {vocab_size:,} on {title}, {Path(file).stat().st_size / 1e6:.1f} MB")
    runs = {"ours": [], "tokenizers": []}
    for _ in range(args.repeats):
        for name, results in runs.items():
            results.append(measure(name, file, vocab_size, args))
    best = {name: min(results, key=lambda r: r["seconds"]) for name, results in runs.items()}
    for name, result in best.items():
        worker = f" + {result['worker']:,.0f} MB a worker" if result["worker"] else ""
        print(f"  {name:>10}: {result['seconds']:8.2f} s   peak {result['peak']:,.0f} MB{worker}")
    equal = best["ours"]["merges"] == best["tokenizers"]["merges"]
    ratio = best["ours"]["seconds"] / best["tokenizers"]["seconds"]
    print(f"  ours takes {ratio:.2f} times the time of tokenizers; the merges are {'equal' if equal else 'NOT equal'}")
    if args.minbpe and Path(file).stat().st_size < 2e6:
        result = measure("minbpe", file, 256 + args.minbpe_merges, args)
        total = result["seconds"] / args.minbpe_merges * (vocab_size - 256)
        print(f"  {'minbpe':>10}: {result['seconds']:8.2f} s   peak {result['peak']:,.0f} MB for {args.minbpe_merges}")
        print(f"    merges alone; {total:,.0f} s for all at that rate: {total / best['ours']['seconds']:,.0f} x ours")


def encoding(title, text, repeats):
    tokenizer = BPETokenizer.train(text, 4096)
    size = len(text.encode()) / 1e6
    print(f"\nencoding: {title}, {size:.1f} MB, vocabulary 4,096, one thread")
    for label, texts in (("whole", [text]), ("by line", text.splitlines(keepends=True))):
        speed = {"ours": [], "tiktoken": []}
        for _ in range(repeats):
            for name, encode in (("ours", tokenizer.encode), ("tiktoken", tokenizer._fast.tiktoken.encode_ordinary)):
                started = time.perf_counter()
                for t in texts:
                    encode(t)
                speed[name].append(size / (time.perf_counter() - started))
        ours, tiktoken = max(speed["ours"]), max(speed["tiktoken"])
        print(
            f"  {label:>10}: ours {ours:5.2f} MB/s, tiktoken {tiktoken:5.2f} MB/s: {ours / tiktoken:.2f} of its speed"
        )


def all_text(folder, out):
    """Write all texts in the data folder into one file."""
    with open(out, "w", encoding="utf-8") as file:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix == ".gz":
                file.write(gzip.decompress(path.read_bytes()).decode() + "\n")
            elif path.suffix in (".txt", ".jsonl", ".json", ".tsv", ".csv") and path.name != "encoder.json":
                file.write(path.read_text(encoding="utf-8") + "\n")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minbpe", type=Path, help="a checkout of karpathy/minbpe; default: minbpe is not run")
    parser.add_argument("--minbpe_merges", type=int, default=30)
    parser.add_argument("--large", type=Path, help="a text of 20 MB or more; default: all text in $ALIGN_DATA")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs; the best one counts")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for path, inside in ((args.minbpe, "minbpe"), (args.large, "")):
        if path and not (path / inside).exists():
            parser.error(f"{path / inside} is not there")
    if args.one:
        name, file, size = args.one
        return train(name, file, int(size))
    folder = Path(os.environ.get("ALIGN_DATA", "downloads"))
    small = folder / "tinyshakespeare" / "input.txt"
    if not small.exists():
        raise SystemExit(f"{small} is not there: set ALIGN_DATA to the data folder")
    with tempfile.TemporaryDirectory() as scratch:
        large = args.large or all_text(folder, Path(scratch) / "all.txt")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
        print(f"{cores} cores, best of {args.repeats} runs, in turn")
        training("Tiny Shakespeare", small, 4096, args)
        for size in (4096, 32768):
            training("all text", large, size, args)
    encoding("Tiny Shakespeare", small.read_text(encoding="utf-8"), args.repeats)


if __name__ == "__main__":
    main()
