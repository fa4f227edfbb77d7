"""A training step beside another process that wants a core: how much longer does it take?

    python benchmarks/busy.py                      # every setting below, about 4 minutes on 2 cores
    python benchmarks/busy.py --settings default

The step is pretrain.py's default one. Beside it runs, at the lowest priority (nice 19), a process that does nothing but
count, in a session of its own, as another user's would: Linux shares the cores between sessions first and asks for
priorities only within one. Quiet and busy take turns; the figures are medians over the steps after the first five.

The settings are the environment and the flags of the training process. OpenMP's threads wait for each other in a busy
loop for a while before they sleep; GOMP_SPINCOUNT and OMP_WAIT_POLICY say how long.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "default": {},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin a little": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def step_seconds(environment, steps, dtype):
    """The median step of a short run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "pretrain.py"), "--steps", str(steps), "--dtype", dtype]
        command += ["--eval_every", "1000", "--save_every", "1000", "--eval_tokens", "2000"]
        names = {name for setting in SETTINGS.values() for name in setting}  # never the caller's own
        env = {k: v for k, v in os.environ.items() if k not in names} | environment
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(result.stderr[-1000:])
        lines = (Path(folder) / "runs/pretrain/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [record["tokens_per_second"] for record in map(json.loads, lines) if "tokens_per_second" in record]
    tokens = 16 * 256  # the defaults of --batch and --model.context
    return tokens / statistics.median(speeds[5:])


def beside(call):
    """call() beside a process that keeps one core busy."""
    other = subprocess.Popen(
        ["nice", "-n", "19", sys.executable, "-c", "while True: pass"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        return call()
    finally:
        other.kill()
        other.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    args = parser.parse_args()
    if args.steps < 6:
        parser.error("--steps: 6 or more, as the first five are not counted")
    print(f"{os.cpu_count()} cores, --dtype {args.dtype}\n")
    print("| setting | quiet, s | busy, s | ratio |\n|---|---:|---:|---:|")
    for name in args.settings:
        quiet, busy = [], []
        for _ in range(args.rounds):
            quiet.append(step_seconds(SETTINGS[name], args.steps, args.dtype))
            busy.append(beside(lambda: step_seconds(SETTINGS[name], args.steps, args.dtype)))  # noqa: B023
        a, b = statistics.median(quiet), statistics.median(busy)
        print(f"| {name} | {a:.3f} | {b:.3f} | {b / a:.2f} |", flush=True)


if __name__ == "__main__":
    main()
