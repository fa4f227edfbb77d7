"""One GPU: is it right, and how fast is it? Checks first, then times, then a page. No section begins after 8 minutes.

    python benchmarks/gpu.py --out DIR                        # DIR/gpu.md, written again after each section
    python benchmarks/gpu.py --out DIR --nanogpt ../nanoGPT   # its model too, in turn with ours
    python benchmarks/gpu.py --out DIR --quick                # tiny sizes: does it work? On a CPU too

Needs no network. A section that fails is on the page with its error, and the exit status is 1; the others go on. What
is compared with a library that is not installed is left out, which the page says.

1. Checks: outputs and gradients of every layout against the CPU in fp32; attention's paths against each other; fp16
   with its scaler; the decoding step as a CUDA graph, token by token; torch.compile; NCCL; a resumed run.
2. Pretraining the shape of GPT-2 (124 M parameters), bf16, compiled. Utilisation: `flops_per_token` of
   support/pretrain_report.py over the data sheet's peak.
3. Generation at 10 M and 135 M parameters against transformers. Bandwidth: the bytes of weights and cache that a token
   must read, over the rate of a large copy.
4. A GRPO step against TRL's (benchmarks/grpo_vs_trl.py).
5. `python grpo.py --steps 500` from nothing.
6. Muon against AdamW, and the loss in chunks against full logits: time and peak memory.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from attention import causal_mask
from generate import generate
from optim import make_optimizers, optimizer_step
from support.devices import Dist, peak_flops, precision
from support.fast_decode import Decoder, DecodeStep, decoding_dtype
from support.pretrain_report import flops_per_token
from transformer import Transformer, TransformerConfig, target_logprobs, token_logprobs

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {  # the heads and widths are small, the kinds of layers all there are
    "Qwen3": {},
    "Llama": {"qk_norm": False, "tie_embeddings": False},
    "Qwen2": {"qk_norm": False, "qkv_bias": True},
    "GPT-2": {"norm": "layer", "bias": True, "positions": "learned", "activation": "gelu", "qk_norm": False}
    | {"n_kv_head": 4},
    "window and sinks": {"window": 16, "sinks": 2},
    "mixture": {"n_expert": 4, "expert_width": 64},
    "sandwich, YaRN": {
        "norm_placement": "sandwich",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
}
SMALL = {"vocab_size": 256, "context": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "width": 128}
GPT2 = dict(vocab_size=50304, context=1024, n_layer=12, n_head=12, n_kv_head=12, width=768) | LAYOUTS["GPT-2"]
GPT2["n_kv_head"] = 12
TEN = dict(vocab_size=8192, context=512, n_layer=6, n_head=10, n_kv_head=5, width=320, ffn_width=896)
SMOLLM2 = dict(vocab_size=49152, context=512, n_layer=30, n_head=9, n_kv_head=3, width=576, ffn_width=1536)
SMOLLM2 |= {"qk_norm": False}


class Bench:
    """The device, whether it is quick, and what the checks have found."""

    def __init__(self, args):
        self.device, self.quick, self.args = torch.device(args.device), args.quick, args
        self.dist = Dist(0, 1, self.device)
        self.cuda = self.device.type == "cuda"

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call, repeats=5, warm_up=2):
        """Median of `repeats` calls."""
        times = []
        for i in range(warm_up + repeats):
            began = time.perf_counter()
            call()
            self.sync()
            if i >= warm_up:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def peak_gb(self, call):
        """Of the memory of the GPU; None on a CPU."""
        if not self.cuda:
            call()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.sync()
        return torch.cuda.max_memory_allocated() / 1e9

    def script(self, name, *flags, cwd, timeout=420):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / name), *map(str, flags)]
        result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        if result.returncode:
            last = (result.stderr or result.stdout).strip().splitlines()[-1:]  # none of a process that was killed
            raise RuntimeError(f"{name}: {last[0] if last else f'exit status {result.returncode}'}")
        return result.stdout


def largest_difference(a, b):
    """Of two tensors, in units of b's root mean square."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return ((a - b).abs().max() / b.square().mean().sqrt().clamp(min=1e-8)).item()


def in_short(error):
    return f"**FAILED**: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


# ---------------------------------------------------------------------------------------------------------------
# 1. Checks. Each yields (name, largest difference, tolerance).


def check_layouts(bench):
    """Log-probabilities and all gradients on the device, fp32 and bf16, against the CPU in fp32."""
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    for name, changes in LAYOUTS.items():
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(**SMALL | changes))
        logprobs = token_logprobs(model, tokens)
        logprobs.mean().backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        # in bf16 a router may send a token to another expert
        for kind, near in ((None, 1e-3), (torch.bfloat16, 0.2 if changes.get("n_expert") else 0.03)):
            other = copy.deepcopy(model).to(bench.device)
            other.zero_grad(set_to_none=True)
            autocast = torch.autocast(bench.device.type, kind) if kind else contextlib.nullcontext()
            with autocast:
                ours = token_logprobs(other, tokens.to(bench.device))
            ours.mean().backward()
            worst = largest_difference(ours, logprobs)
            if kind is None:
                grads = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
                worst = max(worst, *(largest_difference(grads[n], expected[n]) for n in expected))
            yield f"{name}, {'bf16' if kind else 'fp32'}", worst, near


def check_attention(bench):
    """Scaled dot-product attention as torch chooses its kernel, as a formula, and as FlexAttention."""
    q, k, v = (torch.randn(2, 4, 64, 32, device=bench.device) for _ in range(3))
    mask = causal_mask(64, 64).to(bench.device)
    plain = ((q @ k.mT / 32**0.5).masked_fill(~mask, -torch.inf)).softmax(-1) @ v
    yield "SDPA, causal", largest_difference(F.scaled_dot_product_attention(q, k, v, is_causal=True), plain), 1e-3
    yield "SDPA with a mask", largest_difference(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), plain), 1e-3
    if bench.cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, 64, 64, device="cuda")
        flex = torch.compile(flex_attention)(q, k, v, block_mask=blocks)
        yield "FlexAttention, compiled", largest_difference(flex, plain), 0.02


def check_training(bench):
    """fp16 with its scaler learns; compiled equals eager; Muon and AdamW on the device equal the CPU's."""
    tokens = torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0))

    def losses(dtype, device, optimizer="adamw", compiled=False, steps=4):
        torch.manual_seed(0)
        policy = Transformer(TransformerConfig(**SMALL)).to(device)
        model = torch.compile(policy) if compiled else policy
        autocast, scaler = precision(dtype, Dist(0, 1, torch.device(device)))
        optimizers, values = make_optimizers(policy, optimizer, 1e-3, 0.1), []
        for _ in range(steps):
            with autocast():
                loss = -token_logprobs(model, tokens.to(device)).mean()
            scaler.scale(loss).backward()
            optimizer_step(policy, optimizers, scaler, autocast, 1e-3, 1.0)
            values.append(loss.item())
        return torch.tensor(values)

    expected = {kind: losses("fp32", "cpu", kind) for kind in ("adamw", "muon")}
    for kind in expected:
        yield f"4 steps of {kind}, fp32", largest_difference(losses("fp32", bench.device, kind), expected[kind]), 1e-3
    yield "4 steps, bf16", largest_difference(losses("bf16", bench.device), expected["adamw"]), 0.02
    if bench.cuda:
        # the scaler begins at 65,536 and may skip steps: the first loss is before any
        yield "fp16, first loss", largest_difference(losses("fp16", "cuda", steps=1), expected["adamw"][:1]), 0.02
        fell = losses("fp16", "cuda", steps=8)
        yield "fp16 with its scaler learns (last loss / first)", (fell[-1] / fell[0]).item(), 0.99
    if bench.cuda or not bench.quick:
        compiled = losses("fp32", bench.device, compiled=True)
        yield "4 steps compiled, fp32", largest_difference(compiled, expected["adamw"]), 1e-3


@torch.inference_mode()
def check_decoding(bench):
    """The logits of 24 tokens: the model's own forward, the decoding step, and the step as a CUDA graph."""
    from attention import KVCache

    torch.manual_seed(0)
    for name in ("Qwen3", "Llama", "Qwen2"):
        model = Transformer(TransformerConfig(**SMALL | LAYOUTS[name])).to(bench.device).eval()
        c, B, S = model.config, 3, 8
        tokens = torch.randint(256, (B, S + 24), device=bench.device)
        full = model(tokens)[:, S - 1 :]  # (B, 25, V)
        for static in (False, True):
            cache = KVCache(c.n_layer, B, c.n_kv_head, S + 25, c.head_dim, device=bench.device)
            model(tokens[:, :S], cache=cache)
            decoder = Decoder(model, cache, torch.full((B,), S - 1, device=bench.device), static=static)
            assert isinstance(decoder.step, DecodeStep), "the fast step does not take this layout"
            logits = torch.stack([decoder(tokens[:, S + t]).clone() for t in range(24)], 1)
            kind = ("CUDA graph" if bench.cuda else "static step") if static else "fast step"
            yield f"{name}: {kind}, 24 tokens", largest_difference(logits, full[:, 1:]), 2e-3
    greedy = [generate(model, [[1, 2, 3]] * 4, 20, temperature=0.0, static=static).ids for static in (False, True)]
    yield "greedy tokens, graph against step (share that differ)", (greedy[0] != greedy[1]).float().mean().item(), 0.0


def check_processes(bench):
    """NCCL (gloo on a CPU) with one process: the gradients of DDP are those of the model alone."""
    from torch.nn.parallel import DistributedDataParallel

    with tempfile.TemporaryDirectory() as folder:
        backend, store = "nccl" if bench.cuda else "gloo", f"file://{folder}/store"
        torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(**SMALL)).to(bench.device)
        tokens = torch.randint(256, (4, 64), device=bench.device)
        token_logprobs(model, tokens).mean().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        token_logprobs(DistributedDataParallel(model), tokens).mean().backward()
        worst = max(largest_difference(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
        torch.distributed.destroy_process_group()
        yield f"DDP, {backend}, one process", worst, 1e-4


def check_resume(bench):
    """A run of 6 steps, and one stopped after 3 and resumed: the same losses."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--eval_every", 100, "--eval_tokens", 2000, "--batch", 8, "--device", bench.device.type]
        flags += ["--model.n_layer", 2, "--model.width", 96, "--dtype", "fp32", "--floor", 1]
        flags += ["--data", Path(folder) / "text.txt"]
        (Path(folder) / "text.txt").write_text("One sees that all is well, and well it is. " * 3000, encoding="utf-8")
        bench.script("pretrain.py", "--name", "whole", "--steps", 6, *flags, cwd=folder)
        bench.script("pretrain.py", "--name", "parts", "--steps", 3, *flags, cwd=folder)
        bench.script("pretrain.py", "--name", "parts", "--steps", 6, "--resume", "true", *flags, cwd=folder)
        logged = []
        for name in ("whole", "parts"):
            lines = (Path(folder) / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            logged.append([r["loss"] for r in map(json.loads, lines) if "loss" in r])
    assert len(logged[0]) == len(logged[1]) == 6
    yield "resumed after 3 of 6 steps", largest_difference(torch.tensor(logged[1]), torch.tensor(logged[0])), 1e-5


CHECKS = (check_layouts, check_attention, check_training, check_decoding, check_processes, check_resume)


def checks(bench):
    rows, wrong = [], []
    for check in CHECKS:
        try:
            for name, difference, tolerance in check(bench):
                right = difference <= tolerance
                rows.append([name, f"{difference:.1e}", f"{tolerance:g}", "right" if right else "**WRONG**"])
                wrong += [] if right else [name]
        except Exception as error:  # one broken check must not hide the others
            traceback.print_exc()
            rows.append([check.__name__, "", "", in_short(error)])
            wrong.append(check.__name__)
    yield "Largest differences, in units of the root mean square of what is compared with: fp32 on the CPU.\n"
    yield from table(["check", "difference", "at most", ""], rows)
    bench.wrong = wrong


# ---------------------------------------------------------------------------------------------------------------
# 2 to 6. Times.


def pretraining(bench):
    batch, T = (2, 64) if bench.quick else (16, 1024)
    shape = SMALL if bench.quick else GPT2
    tokens = torch.randint(shape["vocab_size"], (batch, T + 1), device=bench.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    compiled = bench.cuda
    dtype = "bf16"

    def trained(model, loss_of, optimizers, policy):
        autocast, scaler = precision(dtype, bench.dist)

        def step():
            with autocast():
                loss = loss_of(model)
            loss.backward()
            optimizer_step(policy, optimizers, scaler, autocast, 1e-4, 1.0)

        return step

    policy = Transformer(TransformerConfig(**shape)).to(bench.device)
    model = torch.compile(policy) if compiled else policy
    ours = trained(model, lambda m: -m(x, targets=y).mean(), make_optimizers(policy, "adamw", 1e-4, 0.1), policy)
    steps = {"ours, AdamW": ours}
    if bench.args.nanogpt:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(bench.args.nanogpt) / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        settings = {"block_size": shape["context"], "vocab_size": shape["vocab_size"], "n_layer": shape["n_layer"]}
        settings |= {"n_head": shape["n_head"], "n_embd": shape["width"], "dropout": 0.0, "bias": True}
        theirs = module.GPT(module.GPTConfig(**settings)).to(bench.device)
        called = torch.compile(theirs) if compiled else theirs
        adamw = theirs.configure_optimizers(0.1, 1e-4, (0.9, 0.95), bench.device.type)
        steps["nanoGPT, AdamW"] = trained(called, lambda m: m(x, y)[1], [adamw], theirs)
    times = {name: [] for name in steps}
    for _ in range(2):  # in turn
        for name, step in steps.items():
            times[name].append(bench.seconds(step, 3 if bench.quick else 15, 2 if bench.quick else 5))
    with precision(dtype, bench.dist)[0]():
        peak = peak_flops(bench.dist)
    rows = []
    for name, seconds in times.items():
        speed = batch * T / min(seconds)
        rows.append([name, f"{min(seconds):.4f}", f"{speed:,.0f}", f"{speed * flops_per_token(policy, T) / peak:.1%}"])
    state = "compiled" if compiled else "eager"
    size = f"{policy.num_params() / 1e6:.0f} M parameters, {dtype}, {state}, {batch} x {T} tokens a step"
    yield f"{size}; the best of two medians.\n"
    yield from table(["", "s a step", "tokens/s", "of the peak"], rows)


def copy_rate(bench):
    """Bytes per second, read and written, of copying a large tensor."""
    x = torch.empty(2**22 if bench.quick else 2**28, device=bench.device)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / bench.seconds(lambda: y.copy_(x))


def bytes_read(model, rows, length):
    """What decoding a token of each row must read: the weights once, and a cache of so many tokens; in bf16."""
    with torch.autocast(model.embed.weight.device.type, torch.bfloat16):
        width = (decoding_dtype(model, model.make_cache(1, 1)) or torch.float32).itemsize
    c = model.config
    return 2 * model.num_params() + rows * c.n_layer * 2 * c.n_kv_head * c.head_dim * length * width


def generation(bench):
    new, rate = (8 if bench.quick else 128), copy_rate(bench)
    shapes = {"small": SMALL} if bench.quick else {"10 M": TEN, "135 M": SMOLLM2}
    library = importlib.util.find_spec("transformers") is not None
    rows = []
    for name, shape in shapes.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            Transformer(TransformerConfig(**shape)).save_pretrained(folder)
            model = Transformer.from_pretrained(folder).to(bench.device).eval()
            if library:
                from transformers import AutoModelForCausalLM

                theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(bench.device).eval()
        for B in (1, 4) if bench.quick else (1, 64, 256):
            ids = torch.randint(model.config.vocab_size, (B, 32), device=bench.device)
            prompts = ids.tolist()
            options = dict(max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
            options |= {"attention_mask": torch.ones_like(ids)}
            times, others = [], []
            for _ in range(3):  # in turns
                with torch.autocast(bench.device.type, torch.bfloat16):
                    times.append(bench.seconds(lambda: generate(model, prompts, new), 1, 1))  # noqa: B023
                if library:
                    with torch.inference_mode():
                        others.append(bench.seconds(lambda: theirs.generate(ids, **options), 1, 1))  # noqa: B023
            seconds = statistics.median(times)
            cells = [name, str(B), f"{B * new / seconds:,.0f}"]
            read = bytes_read(model, B, 32 + new / 2)  # the cache as long as it is on average
            cells.append(f"{read * new / seconds / rate:.0%}")
            if library:
                other = statistics.median(others)
                cells += [f"{B * new / other:,.0f}", f"{other / seconds:.2f}"]
            else:
                cells += ["not installed", ""]
            rows.append(cells)
    yield f"bf16, 32 prompt and {new} new tokens; a large copy moves {rate / 1e9:,.0f} GB/s.\n"
    yield from table(["parameters", "rows", "tokens/s", "of the copy's rate", "transformers' defaults", "ratio"], rows)


def grpo_step(bench):
    if importlib.util.find_spec("trl") is None:
        yield "Not compared: TRL is not installed here.\n"
        return
    with tempfile.TemporaryDirectory() as folder:
        dtype = "fp32" if bench.quick else "bf16"
        flags = ["--rounds", 1, "--steps", 2, "--dtype", dtype, "--device", bench.device.type]
        out = bench.script("benchmarks/grpo_vs_trl.py", *flags, cwd=folder)
    yield "```\n" + out.strip() + "\n```\n"


def whole_grpo(bench):
    flags = ["--steps", 500]
    with tempfile.TemporaryDirectory() as folder:
        if bench.quick:
            (Path(folder) / "text.txt").write_text("Two and two are four. " * 2000, encoding="utf-8")
            small = ["--steps", 2, "--eval_every", 2, "--model.n_layer", 1, "--model.width", 48, "--batch", 4]
            bench.script("pretrain.py", *small, "--micro_batch", 4, "--eval_tokens", 500, "--name", "base", cwd=folder)
            flags = [
                "--steps",
                2,
                "--init",
                "runs/base",
                "--max_new_tokens",
                8,
                "--test_problems",
                2,
                "--eval_problems",
                2,
            ]
            flags += ["--pass_problems", 1, "--pass_samples", 2, "--prompts", 2]
        began = time.perf_counter()
        out = bench.script("grpo.py", *flags, "--device", bench.device.type, cwd=folder)
    minutes, last = (time.perf_counter() - began) / 60, [line for line in out.splitlines() if "points" in line][-1:]
    yield f"`python grpo.py {' '.join(map(str, flags))}`: {minutes:.1f} minutes. {' '.join(last)}\n"


def optimizer_rows(bench):
    shape = SMALL if bench.quick else GPT2
    policy, rows = Transformer(TransformerConfig(**shape)).to(bench.device), []
    autocast, scaler = precision("bf16", bench.dist)
    for kind in ("adamw", "muon"):
        optimizers = make_optimizers(policy, kind, 1e-5, 0.1)

        def step():
            for p in policy.parameters():
                p.grad = torch.full_like(p, 1e-3)
            optimizer_step(policy, optimizers, scaler, autocast, 1e-5, 1.0)  # noqa: B023

        peak = bench.peak_gb(step)
        rows.append([f"a step of {kind}, {policy.num_params() / 1e6:.0f} M", f"{bench.seconds(step):.4f}", peak])
    return rows


def loss_rows(bench):
    autocast, rows = precision("bf16", bench.dist)[0], []
    B, T, C, V = (2, 64, 64, 1000) if bench.quick else (16, 1024, 768, 50_304)
    x = torch.randn(B, T, C, device=bench.device, requires_grad=True)
    output = (torch.randn(V, C, device=bench.device) * 0.02).requires_grad_()
    targets = torch.randint(0, V, (B, T), device=bench.device)
    forms = {
        "loss, full logits": lambda: -F.linear(x, output).float().log_softmax(-1).gather(-1, targets[..., None]).mean(),
        "loss, in chunks": lambda: -target_logprobs(x, output, targets, 1.0).mean(),
    }
    for name, loss_of in forms.items():

        def both():
            with autocast():
                loss = loss_of()  # noqa: B023
            loss.backward()
            x.grad = output.grad = None

        peak = bench.peak_gb(both)
        rows.append([f"{name}, {B} x {T} tokens, vocabulary {V:,}", f"{bench.seconds(both):.4f}", peak])
    return rows


def memory(bench):
    rows = optimizer_rows(bench)  # when it returns, its model and optimizers are gone
    rows += loss_rows(bench)
    yield from table(["", "s", "peak GB"], [[*r[:2], "" if r[2] is None else f"{r[2]:.2f}"] for r in rows])


SECTIONS = {
    "Is it right?": checks,
    "Pretraining": pretraining,
    "Generation": generation,
    "GRPO": whole_grpo,
    "Muon, and the loss in chunks": memory,
    "A GRPO step against TRL": grpo_step,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the page, gpu.md")
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="TITLE")
    parser.add_argument("--minutes", type=float, default=8, help="no section begins after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    args = parser.parse_args()
    if args.device == "cpu" and not args.quick:
        parser.error("there is no GPU here: --quick runs the same on a CPU, with tiny sizes")
    args.out.mkdir(parents=True, exist_ok=True)
    bench, began, failed = Bench(args), time.perf_counter(), []
    name = torch.cuda.get_device_name() if bench.cuda else "a CPU, tiny sizes: this page says nothing of speed"
    lines = [f"# One GPU: {name}\n", f"torch {torch.__version__}; `python benchmarks/gpu.py`.\n"]
    for title in args.sections:
        started, section = time.perf_counter(), SECTIONS[title]
        lines.append(f"## {title}\n")
        try:
            if started - began > 60 * args.minutes:
                lines.append("Not run: the time was up.\n")
                failed.append(title)
            else:
                lines += section(bench)
        except Exception as error:  # the page says so, and the other sections go on
            traceback.print_exc()
            lines.append(in_short(error) + "\n")
            failed.append(title)
        if bench.cuda:
            torch.cuda.empty_cache()
        (args.out / "gpu.md").write_text("\n".join(lines), encoding="utf-8")
        print(f"{title}: {time.perf_counter() - started:.0f} s", flush=True)
    print("\n".join(lines))
    failed += getattr(bench, "wrong", [])
    if failed:
        sys.exit(f"{len(failed)} wrong or failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
