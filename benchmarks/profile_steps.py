"""Where does a step's time go? Each stage's default step, by kind of operation, against the machine's two ceilings.

    python benchmarks/profile_steps.py                        # in a directory with runs/start of seed 0, or it is made
    python benchmarks/profile_steps.py --dtype fp32 --threads 1 --stages pretrain grpo

Two ceilings: a product of large matrices (by MKL and by oneDNN, support/products.py), and a copy of a large tensor. The
*floor* of the products is their operations at the first, that of the passes their bytes at the second: what is read and
written once each, at the width of --dtype. Times are torch.profiler's, per step, over --steps steps after three; it
adds a fixed time to every operation, up to twice the step again where most are small. "attention" is fused attention
and softmax; the products (bmm) of attention where it is not fused, as in decoding, are among "products". Each stage
runs in a process of its own, whose largest memory in the first three steps, first evaluation included (and the start,
if it has to make one), is in the table.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

STAGES = ("pretrain", "sft", "reward_model", "dpo", "ppo", "grpo")
KINDS = {  # the first whose words an operation's name holds
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "attention": ("scaled_dot_product", "softmax"),
    "products": ("::mm", "addmm", "bmm", "linear_pointwise", "addmv"),
    "passes": (
        "mul",
        "add",
        "silu",
        "div",
        "pow",
        "sum",
        "mean",
        "norm",
        "sub",
        "neg",
        "exp",
        "where",
        "rsqrt",
        "Back",
    ),
    "copies": ("copy", "cat", "index", "fill", "zero", "scatter", "gather", "clone", "repeat", "pad"),
}


def best_seconds(call, repeats=20):
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def ceilings(dtype):
    """-> {"MKL" or "torch", "oneDNN": GFLOP/s of a product of 1,024³, "copy": GB/s}."""
    from support.products import onednn_product

    n = 1024
    a, big = torch.randn(n, n), torch.randn(2**25)
    rates = {}
    if dtype == "fp32":
        rates["torch"] = 2 * n**3 / best_seconds(lambda: a @ a.T) / 1e9
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            rates["oneDNN"] = 2 * n**3 / best_seconds(lambda: onednn_product(a, a)) / 1e9
    else:
        half = a.bfloat16()
        rates["torch"] = 2 * n**3 / best_seconds(lambda: half @ half.T) / 1e9
    target = torch.empty_like(big)
    rates["copy"] = 2 * big.nbytes / best_seconds(lambda: target.copy_(big)) / 1e9
    return rates


def kind_of(event):
    """The optimizer's operations are its own kind, whatever they do."""
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer.step"):
            return "optimizer"
        parent = parent.cpu_parent
    return next((kind for kind, words in KINDS.items() if any(word in event.name for word in words)), "other")


def flops_of(event):
    if "linear_pointwise" in event.name:
        x, weight = event.input_shapes[:2]
        return 2 * math.prod(x) * weight[0]
    return event.flops or 0


def numbers_of(event):
    """Read and written once each: the inputs, and an output as large as the largest of them."""
    sizes = [math.prod(shape) for shape in event.input_shapes or () if shape]
    return sum(sizes) + max(sizes, default=0)


def profile(stage, dtype, steps, threads):
    """Run the stage's main with its defaults until `steps` steps are profiled; print a line of JSON."""
    torch.set_num_threads(threads)
    from support.runs import Run

    module, all_steps = import_module(stage), Run.steps
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, with_flops=True
    )

    class Done(Exception):
        pass

    def some_steps(run, total=None):
        if run.config.name != few["name"]:  # a start that the stage makes for itself
            yield from all_steps(run, total)
            return
        for i, step in enumerate(all_steps(run, total)):
            if i == 3:
                unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
                some_steps.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9  # no profiler yet
                some_steps.began = time.perf_counter()
                profiler.start()
            if i == 3 + steps:
                profiler.stop()
                some_steps.seconds = (time.perf_counter() - some_steps.began) / steps
                raise Done
            yield step

    few = {"steps": 1000, "eval_every": 10**6, "save_every": 10**6, "dtype": dtype, "name": f"profile-{stage}"}
    fields = module.Config.__dataclass_fields__
    few |= {name: 4 for name in ("eval_problems", "test_problems", "pass_problems") if name in fields}
    Run.steps = some_steps
    try:
        module.main(module.Config(**few))
        raise AssertionError(f"{stage} ended before {3 + steps} steps")
    except Done:
        pass
    seconds, calls, flops, numbers = Counter(), Counter(), Counter(), Counter()
    for event in profiler.events():
        kind = kind_of(event)
        seconds[kind] += event.self_cpu_time_total / 1e6 / steps
        if event.name.startswith(("aten::", "mkldnn::")):
            calls[kind] += 1 / steps
        flops[kind] += flops_of(event) / steps
        if kind in ("passes", "copies") and event.self_cpu_time_total > 20:  # not views
            numbers[kind] += numbers_of(event) / steps
    record = {"stage": stage, "step": some_steps.seconds, "peak": some_steps.peak, "seconds": seconds, "calls": calls}
    print(json.dumps(record | {"flops": flops, "numbers": numbers}))


def page(records, rates, dtype, threads):
    """-> the Markdown tables."""
    product, width = max(rates.get("oneDNN", 0), rates["torch"]) * 1e9, 4 if dtype == "fp32" else 2
    words = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items() if name != "copy")
    yield f"{dtype}, {threads} threads; a product of 1,024³: {words} GFLOP/s; a copy: {rates['copy']:.1f} GB/s\n"
    kinds = ("products", "attention", "loss", "passes", "copies", "optimizer", "other")
    yield "| stage | s a step | peak GB | " + " | ".join(kinds) + " | floor: products | floor: passes |"
    yield "|---|" + "---:|" * (len(kinds) + 4)
    for r in records:
        total = sum(r["seconds"].values())
        shares = [f"{r['seconds'].get(kind, 0) / total:.0%}" for kind in kinds]
        floors = [r["flops"].get("products", 0) / product, sum(r["numbers"].values()) * width / rates["copy"] / 1e9]
        cells = [r["stage"], f"{r['step']:.3f}", f"{r['peak']:.2f}", *shares, *(f"{floor:.3f} s" for floor in floors)]
        yield "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return profile(args.stages[0], args.dtype, args.steps, args.threads)
    torch.set_num_threads(args.threads)
    rates, records = ceilings(args.dtype), []
    for stage in args.stages:
        command = [sys.executable, __file__, "--one", "--stages", stage, "--dtype", args.dtype]
        command += ["--threads", str(args.threads), "--steps", str(args.steps)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{stage} failed:\n{result.stderr[-2000:]}")
        records.append(json.loads(result.stdout.splitlines()[-1]))
    print("\n".join(page(records, rates, args.dtype, args.threads)))


if __name__ == "__main__":
    main()
