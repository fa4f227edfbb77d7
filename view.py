"""See inside a run: what each token of its answers received, step by step, as one page.

    python view.py runs/grpo                       writes runs/grpo/view.html: open it in a browser, from disk
    python view.py runs/dpo --output pairs.html
    python view.py --demo                          what two answers of two tokens get, by hand

A run of grpo.py, gdpo.py, agent.py, ppo.py, dpo.py, sft.py or distill.py records a few groups of answers (pairs,
examples) as it trains (--record_groups, --record_every, --watch; support/recorder.py). The page shows a step's groups
side by side. Each token is tinted by what the loss did to it, or by its log-probability, ratio, KL or entropy; hover
over a token or move to it with the arrow keys to read the numbers. The slider goes through the steps. A watched
question is answered with the same random numbers at each recorded step (in a run of sft.py or dpo.py a watched solution
or pair is scored again): what changes is the policy.
"""

import argparse
from pathlib import Path

import torch

from grpo import grpo_loss
from support.cli import Demo, run_script
from support.files import must_write, write_whole
from support.recorder import pull
from support.view_page import page_of


def demo():
    """What two answers of two tokens get, by hand."""
    old = torch.tensor([[0.5, 0.8], [0.5, 0.9]]).log()  # (B, T) log π_old
    rho, A = torch.tensor([[1.3, 1.05], [1.1, 0.7]]), torch.tensor([1.0, -1.0])  # (B, T), (B,)
    gets = pull(grpo_loss, (old + rho.log(), old, A, torch.ones(2, 2)), {"clip_low": 0.2, "clip_high": 0.2})
    by_hand = torch.tensor([[0.0, 1.05], [-1.1, 0.0]]) / 4  # A ρ / (2 answers · 2 tokens), or 0 where the clip stops
    torch.testing.assert_close(gets, by_hand)
    print("two answers of two tokens, the clip at 0.8 and 1.2   first, right: A = 1     second, wrong: A = −1")
    for name, x in (("ratio ρ = π / π_old", rho), ("gets, −∂loss/∂log π = A ρ / 4, or 0", gets)):
        print(f"{name:<53}" + "".join(f"{first:+8.4f} {second:+8.4f}       " for first, second in x.tolist()).rstrip())
    print("the tint: blue above 0, orange below, none at 0; dotted where the clip stops: the first token and the last")


def parse(args=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", action=Demo, demo=demo, help="print a small example worked by hand, and exit")
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
