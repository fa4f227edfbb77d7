"""Peak memory of the loss over a large vocabulary: in chunks, as the model computes it, against full fp32 logits.

    python benchmarks/loss_memory.py                     # batch 4; the plain form takes about 2.3 GB
    python benchmarks/loss_memory.py --batch 32          # as pretraining would; the plain form takes about 18 GB

Forward and backward from (B, 1024, 256) activations and a (50,000, 256) output matrix, each form in its own process;
the memory of the inputs is subtracted. On a GPU the figure is torch's peak, on a CPU the peak of the process.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformer import target_logprobs

VOCABULARY, CONTEXT, WIDTH = 50_000, 1024, 256


def plain(x, output, targets):
    return -F.linear(x, output).float().log_softmax(-1).gather(-1, targets[..., None]).mean()


def chunked(x, output, targets):
    return -target_logprobs(x, output, targets, 1.0).mean()


def peak():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)  # macOS counts bytes, Linux KiB


def measure(name, batch):
    """Run one form in this process and print its loss, gradient norm and peak memory in MB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(batch, CONTEXT, WIDTH, device=device, requires_grad=True)
    output = torch.randn(VOCABULARY, WIDTH, device=device).mul_(0.02).requires_grad_()  # in place: no second copy
    targets = torch.randint(0, VOCABULARY, (batch, CONTEXT), device=device)
    before = peak()
    loss = {"plain": plain, "chunked": chunked}[name](x, output, targets)
    loss.backward()
    print(loss.item(), x.grad.norm().item(), peak() - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args.one, args.batch)
    print(f"batch {args.batch} x {CONTEXT} tokens, vocabulary {VOCABULARY:,}")
    for name in ("plain", "chunked"):
        command = [sys.executable, __file__, "--one", name, "--batch", str(args.batch)]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        loss, norm, megabytes = map(float, process.stdout.split())
        print(f"{name:>8}: {megabytes:8,.0f} MB   (loss {loss:.5f}, norm of the gradient {norm:.6f})")


if __name__ == "__main__":
    main()
