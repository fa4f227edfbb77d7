"""What do large pages buy? Stages of the default model with support/heap.py's reserve_heap and without it, in turn.

    python benchmarks/large_pages.py                        # in a directory with runs/start of seed 0, or it is made

Each run is a process of its own, of so many steps; its speed is the median of the steps after the fifth. Prints a
Markdown table: the speed with large pages over the speed without, a ratio per pair of runs, and the largest memory
(with that of the start, in a run that has to make it). One pair begins without large pages, the next one with them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--test_problems", "1", "--eval_every", "1000"]
STAGES = {
    "pretrain": ["--eval_every", "1000"],
    "sft": [*SHORT, "--eval_problems", "1"],
    "grpo": [*SHORT, "--pass_problems", "1", "--pass_samples", "1"],
}
CODE = """
import resource, runpy, sys
sys.path.insert(0, {root!r})
from support import heap
if {without}:
    heap.reserve_heap = lambda libc: None
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def run(stage, flags, without):
    """-> steps or tokens per second, MB."""
    name = f"large_pages_{stage}"
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    argv = [str(ROOT / f"{stage}.py"), "--name", name, *flags]
    code = CODE.format(root=str(ROOT), without=without, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        sys.exit(f"{stage} failed:\n{done.stderr[-2000:]}")
    lines = (Path("runs") / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [r.get("steps_per_second") or r.get("tokens_per_second") for r in map(json.loads, lines)]
    peak = int(done.stdout.rsplit("peak ", 1)[1]) // 1024
    return statistics.median([speed for speed in speeds if speed][5:]), peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    if args.steps < 6:
        parser.error("--steps: 6 or more, as the first five are not counted")
    print("| stage | with large pages over without | MB with, without |\n|---|---|---|")
    for stage in args.stages:
        ratios, peaks = [], []
        for pair in range(args.pairs):
            order = (True, False) if pair % 2 == 0 else (False, True)
            runs = {without: run(stage, [*STAGES[stage], "--steps", str(args.steps)], without) for without in order}
            (plain, plain_peak), (large, peak) = runs[True], runs[False]
            ratios.append(large / plain)
            peaks.append((peak, plain_peak))
        peak, plain_peak = (max(column) for column in zip(*peaks, strict=True))
        print(f"| {stage} | {', '.join(f'{ratio:.2f}' for ratio in ratios)} | {peak:,}, {plain_peak:,} |", flush=True)


if __name__ == "__main__":
    main()
