"""See inside a run: what each token of its answers received, step by step, as one page.

    python view.py runs/grpo                       writes runs/grpo/view.html: open it in a browser, from disk
    python view.py runs/dpo --output pairs.html

A run of grpo.py, gdpo.py, ppo.py, dpo.py, sft.py or distill.py records a few groups of answers as it trains
(--record_groups, --record_every, --watch; support/recorder.py). The page shows a step's groups side by side. Each token
is tinted by what the loss did to it, or by its log-probability, ratio, KL or entropy; hover over a token or move to it
with the arrow keys to read the numbers. The slider goes through the steps, and watched questions are answered with the
same random numbers at each, so what changes is the policy.
"""

import argparse
from pathlib import Path

from support.cli import run_script
from support.files import must_write, write_whole
from support.view_page import page_of


def parse(args=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="a run directory, such as runs/grpo")
    parser.add_argument("--output", help="the page; default: view.html in the run directory")
    return parser.parse_args(args)


def main(config):
    """Write the page; returns its path."""
    path = Path(config.output or Path(config.run) / "view.html")
    page, n_steps, left_out = page_of(config.run)
    with must_write(path):
        write_whole(path, page)
    fewer = f" ({left_out} more are left out: the page would be too large)" if left_out else ""
    print(f"{path}: {n_steps} steps{fewer}, {len(page.encode()) / 1e6:.1f} MB")
    return path


if __name__ == "__main__":
    run_script(main, None, parse=parse)
