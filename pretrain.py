"""Pretraining: predict the next token, on one CPU core or on many GPUs.

    L = −(1/n) Σ log π(token_t | tokens before t)          n = all tokens of the optimizer step, on all ranks

The text becomes one long stream of ids on disk, cut into windows of `context` tokens; each step reads the next
batch of windows of a shuffled epoch. What is in a step is a pure function of (seed, step), so a resumed run sees
what an uninterrupted one would have seen, and two ranks see what one rank with twice the batch sees.

The optimizer is AdamW (arXiv:1711.05101) with decay on the matrices alone, a linear warm-up (Adam's second moments
are noise at first) and a cosine to a tenth of the peak (or a line, or warm-up, stay, decay); or, for the matrices
inside the blocks, Muon (see `Muon`). Gradients are clipped by their global norm. A step whose loss or gradient is not
finite is never taken.

Mixed precision: bf16 autocast on GPUs that have it and on CPUs with AMX; fp16 with a loss scaler on other GPUs; fp32
on other CPUs. The weights stay fp32. DDP: `torchrun` starts a process per GPU, each holds the whole model and a share
of the batch, and `backward` averages the gradients. FSDP (`--fsdp true`, arXiv:2304.11277), for a model that outgrows
one GPU: each process keeps its part of every weight, gradient and moment alone, and a block's weights are gathered for
as long as it is at work. All of it stands in the loop below, in sight.

This file also owns the plumbing that every later stage imports: set-up, autocast, schedule, optimizers, checkpoint,
log, curves. It stands first, as plain functions and a few small classes, none of which holds the loop. On a first
reading begin at `Config` and `main`, and come back for each helper where it is called.

Run it:
    python pretrain.py                                                  # built-in stories, about 4 minutes on 2 cores
    python pretrain.py --data input.txt --tokenizer char --name shakespeare --steps 1000
    torchrun --nproc_per_node 8 pretrain.py --data input.txt --batch 256
    torchrun --nproc_per_node 8 pretrain.py --data input.txt --batch 256 --fsdp true
    python pretrain.py --resume true --name shakespeare                 # with the flags of the run it continues
    torchrun --nproc_per_node 8 --max-restarts 3 pretrain.py ...        # goes on from last/ when a process died
"""

import contextlib
import ctypes
import fcntl
import html
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from attention import attention_entropy, attention_weights, cast_once
from data import batch_at, load_text, narrative_entropy, open_stream, stream_path, tokenise
from generate import ConfigError, DivergedError, generate, open_checkpoint, run
from moe import balancing_losses, expert_load, update_biases
from tokenizer_bpe import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
from transformer import CheckpointError, Transformer, TransformerConfig, fill

RUNS = Path("runs")

# ---------------------------------------------------------------------------------------------------------------
# Plumbing, written here because a reader needs it here first.


@dataclass
class Dist:
    """Who am I among the processes, and on which device do I compute."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, *values):
        """Sums of numbers over all ranks: the same list of floats on every rank."""
        if self.world == 1:
            return [float(v) for v in values]
        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.tolist()


def keep_freed_memory():
    """Ask the C library, where it is glibc, to keep freed memory for the next tensor. It would hand that of large
    tensors back to the kernel, which clears every page before it lends it again: thousands in a step on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # elsewhere there is no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: only what is larger than 32 MiB, the most that it takes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor what is free at the heap's end


def setup(device="auto"):
    """Join the process group if torchrun started us (RANK, WORLD_SIZE, LOCAL_RANK), and choose the device."""
    keep_freed_memory()
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"--device {device!r} is not known; use auto, cpu or cuda")
    if device != "cpu":
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda, but torch sees no CUDA GPU here; use --device cpu")
        here, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        too_few = int(device[5:]) >= here if ":" in device else wanted > here
        if too_few:
            raise ConfigError(f"--device {device} for {wanted} processes, but torch sees {here} GPUs here")
        if device == "cuda":
            device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if world > 1 and not distributed.is_initialized():
        # torchrun gives the processes that it starts again the same key-value store, in which the addresses of the dead
        # still stand; whoever reads one of those waits forever. So each attempt gets keys of its own. (Several nodes
        # count attempts separately: there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store each time.)
        store, rank, _ = next(distributed.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            store = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # torch 2.13 renames DDP's broadcast_buffers; older ones do not know the new name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        wait = timedelta(hours=2)  # rank 0 may train a tokenizer and tokenise for long while the others wait
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    return Dist(int(os.environ.get("RANK", 0)), world, torch.device(device))


def auto_dtype(device):
    """bf16 where there are matrix units for it (most GPUs, CPUs with AMX), fp16 on older GPUs, which only emulate bf16,
    fp32 elsewhere."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def precision(dtype, dist):
    """--dtype -> (a function that makes the autocast context, the gradient scaler)."""
    if dtype == "auto":
        dtype = auto_dtype(dist.device)
    if dtype not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"--dtype {dtype!r} is not known; use auto, fp32, bf16 or fp16")
    # fp16 reaches only down to 6e-8: gradients are scaled up before they are made, and back before they are used.
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[dtype]

    def autocast():
        if kind is None:
            return contextlib.nullcontext()
        return torch.autocast(dist.device.type, kind)

    return autocast, scaler


def lr_at(step, steps, peak, warmup, floor=0.1, schedule="cosine", decay=0.2):
    """Learning rate of step 0 … steps−1: up a line to `peak` in `warmup` steps, then down to floor · peak.

    cosine or linear from there on; wsd (arXiv:2404.06395) stays at the peak until the last `decay` share of the steps,
    then falls in a line: a run can be prolonged from any checkpoint before the fall.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    start = steps - decay * steps if schedule == "wsd" else warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return peak * (floor + (1 - floor) * share)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (K. Jordan et al. 2024; scaled as in arXiv:2502.16982).

    A matrix's momentum M = U S Vᵀ is dominated by a few directions. Muon steps along U Vᵀ instead: every direction
    moves at the same pace. U Vᵀ comes without an SVD from five rounds of the odd polynomial
    X ← aX + b(XXᵀ)X + c(XXᵀ)²X, which drives all singular values of X towards 1; under autocast in its dtype, which
    is exact enough. Matrices of one shape go through it together: small ones, one by one, would not fill the machine.
    The factor 0.2 √max(rows, columns) gives the update the size of AdamW's, so both share a learning rate.

    Under FSDP a rank holds some rows of each matrix, but U Vᵀ needs them all: every rank gathers the matrix,
    orthogonalises it whole, the same on all ranks, and keeps its own rows. The momentum stays shared out.
    """

    STACK = 2**24  # numbers that go through the iteration together at most: bounds the memory

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # {shape: parameters}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                size = 1 if is_sharded(params[0]) else max(1, self.STACK // shape.numel())
                for i in range(0, len(params), size):
                    self._step_alike(params[i : i + size], group)

    def _step_alike(self, params, group):
        updates = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p.grad)
            m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(m, group["momentum"])  # Nesterov: look one step ahead
            updates.append(update.full_tensor() if is_sharded(update) else update)
        for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(share_of(update, p), alpha=-0.2 * math.sqrt(max(p.shape[-2:])) * group["lr"])


def orthogonalise(m, rounds=5):
    """A stack of matrices (..., rows, columns) -> the nearest ones with singular values 1, roughly (they end between
    0.7 and 1.2)."""
    x = m.reshape(-1, *m.shape[-2:])  # (n, rows, columns)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the iteration needs singular values of at most 1
    wide = m.shape[-2] <= m.shape[-1]
    x = x if wide else x.mT.contiguous()  # so that X Xᵀ is the smaller product
    for _ in range(rounds):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a @ a
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x + b @ x
    return (x if wide else x.mT).reshape(m.shape)


def is_sharded(x):
    """Whether a tensor is FSDP's, a DTensor. (Its module is slow to import: only where it is used.)"""
    return hasattr(x, "full_tensor")


def share_of(x, like):
    """A whole tensor -> this rank's part of it, cut as the sharded tensor `like` is; x itself if that is not sharded,
    or if x has nothing to cut (Adam's count of steps). All ranks hold the same x, so nothing is sent."""
    if not is_sharded(like) or x.dim() == 0:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(x, keep):
    """Nested dicts and lists -> the same with each sharded tensor made whole: in CPU memory if `keep`, else None. All
    ranks must call. It goes tensor by tensor, so a GPU needs room for one. Everything else stays as it is."""
    if isinstance(x, dict):
        return {key: gathered(value, keep) for key, value in x.items()}
    if isinstance(x, list):
        return [gathered(value, keep) for value in x]
    if not is_sharded(x):
        return x
    whole = x.full_tensor()
    return whole.cpu() if keep else None


def unsharded(raw, dist):
    """The model itself; under FSDP a plain copy of it in rank 0's CPU memory, and None on the other ranks. For
    `save_pretrained` and `generate`, which read the weights without a forward of all ranks. All ranks must call."""
    if not hasattr(raw, "reshard"):  # fully_shard gives a module its methods
        return raw
    weights = gathered(raw.state_dict(), dist.is_main)
    if not dist.is_main:
        return None
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    return fill(raw.config, None, shapes, weights.get, "the sharded model")


def make_optimizers(raw, kind, lr, weight_decay, betas=(0.9, 0.95)):
    """AdamW for all that learns, or Muon for the blocks' matrices and AdamW for the rest. Returns a list.

    Decay pulls matrices towards zero; gains, biases and positions have no business there. A router's rows are the
    experts' labels, as an embedding's are the words': AdamW, like the embedding (results/moe_word.md).
    """
    if kind not in ("adamw", "muon"):
        raise ConfigError(f"--optimizer {kind!r} is not known; use adamw or muon")
    named = [(n, p) for n, p in raw.named_parameters() if p.requires_grad]
    matrices = [(n, p) for n, p in named if p.dim() >= 2 and "learned" not in n]
    inner = [p for n, p in matrices if kind == "muon" and n.startswith("blocks.") and not n.endswith("router.weight")]
    chosen = {id(p) for p in inner}
    decayed = [p for _, p in matrices if id(p) not in chosen]
    chosen |= {id(p) for p in decayed}
    plain = [p for _, p in named if id(p) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)] if groups else []
    return optimizers + ([Muon(inner, lr, weight_decay=weight_decay)] if inner else [])


def optimizer_step(raw, optimizers, scaler, autocast, lr, clip):
    """Unscale, clip by the global norm, step (Muon's products in autocast's dtype), clear. Returns the norm before
    clipping; if that is not finite, the weights stay as they are."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)  # before clipping: the norm of scaled gradients means nothing
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), clip if clip > 0 else math.inf)
    norm = (norm.full_tensor() if is_sharded(norm) else norm).item()  # under FSDP, over all ranks' parts
    for optimizer in optimizers:
        if math.isfinite(norm):  # the scaler asks each optimizer by itself: one would step where the other overflowed
            with autocast():
                scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()  # half the scale after an overflow, twice after 2,000 steps without
    return norm


# Floating-point operations per second that the data sheets state, dense, bf16.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12}


def peak_flops(dist):
    """The device's, for model FLOPs utilisation: from its data sheet, or else as measured with one matrix product in
    the dtype of autocast."""
    name = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else "CPU"
    for known, flops in PEAK_FLOPS.items():
        if re.search(rf"\bG?{known}\b", name):
            return flops
    n, best = 768, math.inf
    a = cast_once(torch.ones(n, n, device=dist.device))
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def run_path(config):
    """runs/NAME. Raises ConfigError if that cannot be a run's name, if there is nothing to resume there, or if what the
    run is to read is the earlier run that it would move aside."""
    path = RUNS / config.name
    part = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"  # no ".", no "..", no path from the root
    if not re.fullmatch(rf"{part}(/{part})*", config.name) or config.name in ("start", "streams", "ablate"):
        raise ConfigError(f"--name {config.name!r} cannot be a run's directory; use letters, digits, . _ and -")
    if file := next((parent for parent in path.parents if parent.is_file()), None):
        raise ConfigError(f"--name {config.name} cannot be a run's directory: {file} is a file; give another --name")
    if config.resume and not saved_run(path):
        raise ConfigError(f"--resume: {path / 'last'} holds no saved run to continue")
    for flag in ("init", "tokenizer", "reward_model", "sampler"):
        read = getattr(config, flag, None)
        if read and not config.resume and Path(read).resolve().is_relative_to(path.resolve()):
            aside = f"the run that --name {config.name} would move aside"
            raise ConfigError(f"--{flag} {read} is {aside}: give another --name")
    return path


HELD = {}  # {run directory: a descriptor that holds its lock, from open_run to Log.close}


def hold(path):
    """Lock a run directory; the kernel unlocks it when the process ends, however. ConfigError if another has it."""
    let_go(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"{path} is being written by another process; give this run another --name") from None
    except OSError:  # a file system without locks
        pass
    HELD[path] = descriptor


def let_go(path):
    if path in HELD:
        os.close(HELD.pop(path))


def open_run(config, dist):
    """The run directory runs/NAME. A finished or abandoned run of that name is moved aside, never overwritten; one that
    is under way is left alone: ConfigError."""
    path = run_path(config)
    if dist.is_main:
        if path.exists():
            hold(path)
            if not config.resume:
                n = next(n for n in range(1, 10**6) if not Path(f"{path}.{n}").exists())
                path.rename(f"{path}.{n}")
                print(f"{path} held an earlier run: moved to {path}.{n}")
        path.mkdir(parents=True, exist_ok=True)
        hold(path)
        (path / "launcher").write_text(launcher())
    if dist.world > 1:
        distributed.barrier()
    return path


def launcher():
    """This launch: torchrun's --rdzv_id, which is new each time on one node, or else the process that started us."""
    known = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return str(os.getppid()) if known == "none" else known


def restarted(config, dist):
    """Whether torchrun started us again because a process had died, and this launch of it has made a run to go on from.
    An earlier launch's run of the same name is none of ours."""
    path, ours = RUNS / config.name, False
    if dist.is_main and saved_run(path) and (path / "launcher").is_file():
        ours = (path / "launcher").read_text() == launcher()
    # several nodes count their restarts apart: it is enough if one did
    count, ours = dist.sum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), ours)
    return count > 0 and ours > 0


def saved_run(path):
    """The checkpoint that a run directory can be resumed from, or None. last.old: killed between two renames."""
    found = [path / name for name in ("last", "last.old") if (path / name / "trainer_state.pt").is_file()]
    return found[0] if found else None


def rng_state(dist):
    """Every rank's random number generators; the same list on each rank."""
    mine = {"torch": torch.get_rng_state()}
    if dist.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(dist.device)
    if dist.world == 1:
        return [mine]
    states = [None] * dist.world
    distributed.all_gather_object(states, mine)
    return states


def save(run_dir, name, dist, raw, tokenizer, chat, state=None):
    """Write the checkpoint runs/NAME/name as a whole: into name.tmp, then renamed. A crash leaves the old one, and so
    does a full disk, which is said and does not end the run. Returns whether it was written.

    state: what resuming needs besides the weights (all ranks must call: it gathers their generators).
    """
    written = True
    if state is not None:
        state = state | {"rng": rng_state(dist)}
    raw = unsharded(raw, dist)
    if dist.is_main:
        new, old, final = (run_dir / f"{name}{end}" for end in (".tmp", ".old", ""))
        try:
            shutil.rmtree(new, ignore_errors=True)
            raw.save_pretrained(new)
            tokenizer.save_pretrained(new)
            stop = [int(i) for i in tokenizer.stop_ids] if chat else [tokenizer.endoftext_id]
            decoding = {"eos_token_id": stop, "pad_token_id": tokenizer.endoftext_id, "do_sample": False}
            (new / "generation_config.json").write_text(json.dumps(decoding, indent=2) + "\n")
            if state is not None:
                torch.save(state, new / "trainer_state.pt")
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
            new.rename(final)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the disk says
            written = False
            print(f"{final} could not be written ({str(error).splitlines()[0]}); the checkpoint before it is kept")
            shutil.rmtree(new, ignore_errors=True)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
    if dist.world > 1:
        distributed.barrier()
    return written


def keep_copy(run_dir, step, keep):
    """Keep last/ as step_STEP too, and the newest `keep` of those. Links, no copies: a checkpoint is never changed."""
    shutil.rmtree(run_dir / f"step_{step:07d}", ignore_errors=True)
    shutil.copytree(run_dir / "last", run_dir / f"step_{step:07d}", copy_function=os.link)
    for path in sorted(run_dir.glob("step_*"))[:-keep]:
        shutil.rmtree(path)


def load_state(run_dir, dist, raw, optimizers, scaler, config):
    """Put a saved run back: weights, optimizers, scaler, generators. Returns its state, with `step` done so far."""
    path = saved_run(run_dir)
    try:
        state = torch.load(path / "trainer_state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the unpickler trips over
        raise CheckpointError(f"{path / 'trainer_state.pt'} is corrupt: {str(error).splitlines()[0]}") from None
    if len(state["rng"]) != dist.world:
        raise ConfigError(f"{path} was saved by {len(state['rng'])} processes; resume it with as many")
    # What a resumed run may have otherwise than before:
    free = {"steps", "resume", "save_every", "keep", "eval_every", "sample_every", "wandb", "device", "name", "fsdp"}
    now, then = asdict(config), state["config"]
    changed = [k for k in now if k not in free and now[k] != then.get(k)]
    if changed:
        said = ", ".join(f"{k} {then.get(k)!r} -> {now[k]!r}" for k in changed)
        raise ConfigError(f"--resume continues a run as it was, but this changed: {said}")
    total = now["steps"] + now.get("mlm_steps", 0)  # encoder.py trains in two phases
    if state["step"] > total:
        raise ConfigError(f"{path} has done {state['step']} steps already, more than the {total} asked for")
    if now["steps"] != then["steps"] and dist.is_main:
        print(
            f"--steps {then['steps']} -> {now['steps']}: from here the learning rate is that of a run of the new length"
        )
    own = raw.state_dict()
    raw.load_state_dict({n: share_of(w, own.get(n)) for n, w in type(raw).from_pretrained(path).state_dict().items()})
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in saved["state"].items():
            saved["state"][i] = {name: share_of(x, params[i]) for name, x in moments.items()}
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(state["scaler"])
    mine = state["rng"][dist.rank]
    torch.set_rng_state(mine["torch"])
    if dist.device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], dist.device)
    return state


def commit():
    """Of this repository, with + if files differ from it; nothing without git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


class Log:
    """metrics.jsonl, TensorBoard and, if asked for, Weights & Biases: one record per call. Silent off rank 0.

    A resumed run's file is cut back to the step it resumes from, and so is samples.md: each step stands in them once.
    """

    def __init__(self, run_dir, config, dist, first_step=0):
        self.active, self.path, self.wandb = dist.is_main, run_dir / "metrics.jsonl", None
        self.run_dir = run_dir
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

        kept = []
        if first_step and self.path.exists():
            lines = [x for x in self.path.read_text().splitlines() if x.endswith("}")]  # a kill may cut the last one
            kept = [x for x in lines if json.loads(x).get("step", -1) <= first_step]
        header = {
            "config": asdict(config),
            "commit": commit(),
            "torch": torch.__version__,
            "device": str(dist.device),
            "world": dist.world,
        }
        self.path.write_text("".join(line + "\n" for line in kept or [json.dumps(header)]))
        said = run_dir / "samples.md"
        if said.exists():
            marks = re.finditer(rb"^<!-- step (\d+) -->$", said.read_bytes(), re.M)
            later = [mark.start() for mark in marks if int(mark[1]) > first_step]
            if later:
                os.truncate(said, later[0])
        self.board = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)
        if config.wandb:
            import wandb

            known = run_dir / "wandb_id"  # a resumed run goes on in the same one there
            if not (first_step and known.exists()):
                known.write_text(wandb.util.generate_id())
            about = {"project": config.wandb, "name": config.name, "config": header}
            self.wandb = wandb.init(**about, id=known.read_text(), resume="allow")

    def __call__(self, step, **record):
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        for name, value in record.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(record, step=step)

    def samples(self, step, text):
        """What the model said, in Markdown: into samples.md, behind a comment with the step, and to the trackers."""
        if not self.active:
            return
        with (self.run_dir / "samples.md").open("a") as file:
            file.write(f"<!-- step {step} -->\n" + text.rstrip("\n") + "\n\n")
        self.board.add_text("samples", text, step)
        if self.wandb is not None:
            import wandb

            self.wandb.log({"samples": wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def show(self, step, pictures=(), histograms=()):
        """For the trackers alone. pictures: names of PNG files in the run directory; histograms: {name: tensor}."""
        if not self.active:
            return
        from matplotlib.image import imread

        for name in pictures:
            self.board.add_image(name, imread(self.run_dir / f"{name}.png"), step, dataformats="HWC")
        for name, values in dict(histograms).items():
            self.board.add_histogram(name, values.detach().float().cpu(), step)
        if self.wandb is not None:
            import wandb

            shown = {name: wandb.Image(str(self.run_dir / f"{name}.png")) for name in pictures}
            shown |= {k: wandb.Histogram(v.detach().float().cpu().numpy()) for k, v in dict(histograms).items()}
            self.wandb.log(shown, step=step)

    def close(self):
        if self.active:
            self.board.close()
            if self.wandb is not None:
                self.wandb.finish()
            let_go(self.run_dir)


class Interrupt:
    """Ctrl-C (or SIGTERM) asks the loop to stop at its top, where everything is consistent; a second one kills."""

    def __init__(self, dist):
        self.dist, self.asked = dist, False
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: then nobody can press Ctrl-C either
                signal.signal(number, self._ask)

    def _ask(self, number, _):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def __bool__(self):
        return self.dist.sum(self.asked)[0] > 0  # all ranks stop at the same step or none

    def release(self):
        """Behind the loop all is saved, and Ctrl-C ends at once whatever still goes on."""
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            with contextlib.suppress(ValueError):
                signal.signal(number, usual)
        if self.asked:  # in the last step, when nobody looked any more
            raise KeyboardInterrupt


def stopped(name, step, written, dist):
    """Leave the loop before `step`, after Ctrl-C; say whether the run was saved and how to go on. A start that a later
    stage makes for itself is never resumed: whoever wants it next makes it anew."""
    if dist.is_main:
        how = "saved; add --resume true to the same command to continue" if written else "but not saved"
        how = "the same command makes this start anew" if name.startswith("start/") else how
        print(f"stopped at step {step}, {how}")
    raise SystemExit(130)


def pyplot():
    """matplotlib without a screen. Slow to import, so only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def read_metrics(run_dir):
    """metrics.jsonl as {name: (steps, values)}, for drawing."""
    series = {}
    for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if "step" in record and name != "step" and isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return series


def smooth(values, width):
    """Centred running mean, shorter at the ends."""
    values = np.asarray(values, dtype=float)
    return [values[max(0, i - width) : i + width + 1].mean() for i in range(len(values))]


def draw_curves(run_dir, title, panels):
    """curves.png: a panel per (heading, {metric: label}, y-axis label, {label: level of a dashed line}).

    A metric of more than 60 points is drawn faintly, with its running mean on top.
    """
    plt = pyplot()
    series = read_metrics(run_dir)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.3 * columns, 3.1 * rows), squeeze=False)
    for axis, (heading, metrics, ylabel, lines) in zip(axes.flat, panels, strict=False):
        for i, (name, label) in enumerate(metrics.items()):
            steps, values = series.get(name, ([], []))
            if len(values) > 60:
                axis.plot(steps, values, color=f"C{i}", alpha=0.2, linewidth=0.8)
                axis.plot(steps, smooth(values, len(values) // 40), color=f"C{i}", label=label)
            else:
                axis.plot(steps, values, color=f"C{i}", marker="o", markersize=3, label=label)
        for label, level in lines.items():
            axis.axhline(level, color="0.4", linestyle="--", linewidth=1, label=label)
        axis.set(title=heading, xlabel="step", ylabel=ylabel)
        axis.grid(alpha=0.25)
        drawn = [y for line in axis.lines for y in line.get_ydata()]
        if heading == "loss" and drawn and 0 < 5 * min(drawn) < max(drawn):
            axis.set_yscale("log")  # or the first steps would flatten all others
            axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        if len(metrics) + len(lines) > 1:
            bottom = axis.get_ylim()[0]
            axis.margins(y=0.25)  # room for the legend, above
            axis.set_ylim(bottom=bottom)
            axis.legend(fontsize=8, framealpha=0.5, loc="upper center", ncols=2)  # a point behind it shows through
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(Path(run_dir) / "curves.png", dpi=130)
    plt.close(figure)


def draw_attention(run_dir, raw, tokenizer, text, most=24):
    """attention.png: who looks at whom in the first tokens of a text; a row per block, a column per head, up to 6 x 6.
    Over each its mean entropy: e to that power is the number of tokens that a query looks at."""
    plt = pyplot()
    ids = tokenizer.encode(text[: 40 * most])[: min(most, raw.config.context)]
    training = raw.training
    raw.eval()
    maps = attention_weights(raw, torch.tensor([ids], device=raw.embed.weight.device))  # per block (1, H, T, T)
    raw.train(training)
    rows, columns = min(6, len(maps)), min(6, maps[0].shape[1])
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.0 * rows + 0.9), squeeze=False)
    labels = [tokenizer.decode([i]).replace("\n", "\\n") for i in ids]
    for layer in range(rows):
        entropies = attention_entropy(maps[layer])[0].mean(1).tolist()  # H
        for head in range(columns):
            axis = axes[layer, head]
            axis.imshow(maps[layer][0, head].cpu().numpy(), vmin=0, vmax=1, cmap="Blues")
            axis.set_title(f"{layer + 1}.{head + 1}: {entropies[head]:.2f} nats", fontsize=7)
            axis.set(xticks=[], yticks=[])
        axes[layer, 0].set_yticks(range(len(ids)), labels, fontsize=4, parse_math=False)  # a token may be "$$"
    for axis in axes[-1]:
        axis.set_xticks(range(len(ids)), labels, fontsize=4, rotation=90, parse_math=False)
    figure.suptitle("attention weights, block.head: query (row) to key (column)", fontsize=9)
    figure.tight_layout()
    figure.savefig(Path(run_dir) / "attention.png", dpi=150)
    plt.close(figure)


def load_record(load):
    """Loads in multiples of the even share (layers, E) -> what the log keeps of them."""
    record = {"load_min": load.min().item(), "load_max": load.max().item()}
    return record | {f"load/{i}/{e}": x for i, row in enumerate(load.tolist()) for e, x in enumerate(row)}


def draw_experts(run_dir):
    """experts.png: the least and the most loaded expert by step, and every expert's load at the last validation."""
    plt = pyplot()
    series = read_metrics(run_dir)
    last = {tuple(map(int, k.split("/")[1:])): v[1][-1] for k, v in series.items() if k.startswith("load/")}
    if not last:
        return
    load = np.zeros(np.array(list(last)).max(0) + 1)  # (layers, E)
    for place, value in last.items():
        load[place] = value
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, label in (("load_max", "most loaded expert"), ("load_min", "least loaded")):
        left.plot(*series[name], marker="o", markersize=3, label=label)
    for level, label in ((0.5, "half the even share, and twice"), (1, None), (2, None)):
        left.axhline(level, color="0.4", linestyle="-" if level == 1 else "--", linewidth=1, label=label)
    left.set(title="load of an expert", xlabel="step", ylabel="multiples of the even share", ylim=(0, None))
    left.legend(fontsize=8)
    image = right.imshow(load, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    right.set(title=f"at step {series['load_min'][0][-1]}", xlabel="expert", ylabel="mixture layer")
    if load.shape[1] <= 16:
        right.set(xticks=range(load.shape[1]), yticks=range(load.shape[0]))
    figure.colorbar(image, ax=right, label="multiples of the even share")
    figure.tight_layout()
    figure.savefig(Path(run_dir) / "experts.png", dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config:
    """Pretrain a decoder on text."""

    data: str = "word"
    """word (built-in stories), tinyshakespeare, tinystories, or the path of a text file."""
    skip_bad: bool = False
    """Where --data holds records (.jsonl, .json, .csv): count and leave out those that cannot be used."""
    tokenizer: str = "bpe"
    """bpe, char or byte, trained on the text; or a directory that holds a tokenizer.json."""
    vocab_size: int = 768
    """Of a BPE tokenizer, special tokens included."""
    init: str | None = None
    """Checkpoint to continue from (its architecture and tokenizer are used); default: random weights."""
    name: str = "pretrain"
    """Run directory below runs/."""
    steps: int = 400
    """Optimizer steps."""
    batch: int = 16
    """Windows per optimizer step, over all ranks."""
    micro_batch: int = 16
    """Windows per forward pass of one rank; smaller accumulates gradients and saves memory."""
    optimizer: str = "muon"
    """adamw, or muon for the matrices of the blocks."""
    lr: float = 4e-3
    """Peak learning rate."""
    warmup: int = 20
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """After the warm-up: cosine, linear or wsd (stays, falls over the last fifth)."""
    floor: float = 0.1
    """Last learning rate as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    z_loss: float = 0.0
    """Weight of (log Z)², which keeps the logits small."""
    aux_weight: float = 0.01
    """Mixture of experts: weight of the Switch loss, where the model balances by it."""
    z_weight: float = 0.001
    """Mixture of experts: weight of the routers' z-loss."""
    bias_rate: float = 0.001
    """Mixture of experts balanced by bias: how far the biases move after a step."""
    skip_nonfinite: bool = False
    """Leave out a step whose loss or gradient is not finite, and count it, instead of stopping."""
    eval_every: int = 100
    """Steps between validations (and text samples)."""
    eval_tokens: int = 30_000
    """Validation tokens read each time; the last validation reads all of them."""
    save_every: int = 200
    """Steps between checkpoints of last/."""
    keep: int = 0
    """Keep the newest of these checkpoints under step_STEP as well."""
    seed: int = 0
    """Of the weights, the data order and the dropout."""
    resume: bool = False
    """Continue runs/NAME/last as if it had never stopped."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, fp32, bf16 or fp16; auto is bf16 where the machine is built for it (most GPUs, CPUs with AMX)."""
    compile: bool = False
    """Let torch.compile fuse the model: a minute at the start, faster steps after."""
    fsdp: bool = False
    """With torchrun: share out weights, gradients and moments among the ranks, for a model that outgrows one GPU."""
    recompute: bool = False
    """Activation checkpointing: keep the blocks' inputs only, compute the rest again going back."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""
    model: TransformerConfig = field(default_factory=TransformerConfig)
    """The architecture."""

    def __post_init__(self):
        check_positive(self, "steps", "batch", "micro_batch", "eval_every", "save_every")
        check_rates(self)
        for name in ("floor", "z_loss", "keep"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 0")
        if self.schedule not in ("cosine", "linear", "wsd"):
            raise ConfigError(f"--schedule {self.schedule!r} is not known; use cosine, linear or wsd")
        if self.model.context < 2:
            raise ConfigError(
                f"--model.context is {self.model.context}; it must be at least 2, or nothing stands before"
            )
        if self.fsdp and self.compile:
            raise ConfigError("--fsdp and --compile do not work together here; leave one of them out")


def check_positive(config, *names):
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name} is {getattr(config, name)}; it must be at least 1")


def check_rates(config):
    """What every stage has: raises ConfigError on values that an optimizer or a generator would refuse."""
    for name in ("lr", "weight_decay", "warmup", "clip", "seed"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ConfigError(f"--{name} is {getattr(config, name)}; it must be at least 0")
    if config.seed >= 2**32:
        raise ConfigError(f"--seed is {config.seed}; it must be below 2^32, which is {2**32}")
    if config.optimizer not in ("adamw", "muon"):
        raise ConfigError(f"--optimizer {config.optimizer!r} is not known; use adamw or muon")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb needs a package that is not here: pip install wandb")
    if not 0 <= getattr(config, "dropout", 0.0) < 1:
        raise ConfigError(f"--dropout is {config.dropout}; it must be at least 0 and below 1")


def make_tokenizer(kind, texts, vocab_size):
    if kind == "bpe":
        return BPETokenizer.train(texts, vocab_size)
    if kind == "char":
        return CharTokenizer.train(texts)
    if kind == "byte":
        return ByteTokenizer()
    return load_tokenizer(kind)


def make_streams(config, dist, tokenizer, context, texts):
    """The texts as ids in runs/streams, made once by rank 0 for every run that wants the same; all ranks map the files
    into memory."""
    paths = {split: stream_path(RUNS / "streams", texts[split], tokenizer) for split in ("train", "valid")}
    if dist.is_main:
        for split, path in paths.items():
            tokenise(path, texts[split], tokenizer)
    if dist.world > 1:
        distributed.barrier()
    streams = {split: open_stream(path, tokenizer.fingerprint, dist.is_main) for split, path in paths.items()}
    for split, stream in streams.items():
        if len(stream) <= context:
            raise ConfigError(
                f"the {split} text of {config.data} has {len(stream)} tokens, a window needs {context + 1}: "
                + ("give more text" if config.init else "give more text or a smaller --model.context")
            )
    return streams


def validation_rows(documents, stream, context, separator, most_tokens=None):
    """What validation reads: rows of ids, int arrays of at most context + 1, whose tokens are all real.

    Documents that all fit are read whole, each from its beginning, as a reader would; otherwise the stream is cut into
    windows. `most_tokens` picks some of them, spread evenly.
    """
    if len(documents) > 1 and max(map(len, documents)) < context:
        rows = [np.array([separator, *ids, separator]) for ids in documents]
    else:
        rows = [stream[i : i + context + 1] for i in range(0, len(stream) - context, context)]
    if most_tokens is not None:
        wanted = max(1, most_tokens * len(rows) // sum(len(row) - 1 for row in rows))
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), wanted)).astype(int)]
    return rows


@torch.no_grad()
def validate(model, rows, byte_lengths, dist, autocast):
    """-> mean loss in nats per token, and in bits per byte of text. The rows are spread over the ranks.

    Rows of one length go together; rows of a document are padded behind, where a causal model does not look. A rank
    that has run out of rows passes an empty one: under FSDP every forward needs all ranks.
    """
    model.eval()
    mine = sorted(rows[dist.rank :: dist.world], key=len)
    total, tokens, n_bytes = 0.0, 0, 0
    for i in range(0, math.ceil(len(rows) / dist.world), 16):
        chunk = mine[i : i + 16]
        ids = np.zeros((max(1, len(chunk)), max(map(len, chunk), default=2)), dtype=np.int64)  # (b, L + 1)
        real = np.zeros(ids.shape, dtype=bool)
        for j, row in enumerate(chunk):
            ids[j, : len(row)], real[j, 1 : len(row)] = row, True
        n_bytes += byte_lengths[ids[real]].sum()
        ids, real = torch.from_numpy(ids).to(dist.device), torch.from_numpy(real[:, 1:]).to(dist.device)
        with autocast():
            total -= model(ids[:, :-1], targets=ids[:, 1:])[real].sum().item()
        tokens += real.sum().item()
    model.train()
    total, tokens, n_bytes = dist.sum(total, tokens, n_bytes)
    return total / tokens, total / math.log(2) / max(1, n_bytes)


def loss_of(model, x, y, z_loss):
    """(b, T) ids and their successors -> the sum of −log π(y), and of z_loss · (log Z)² for the gradient alone."""
    if not z_loss:
        loss = -model(x, targets=y).sum()
        return loss, loss
    logprobs, log_z = model(x, targets=y, log_z=True)  # (b, T) each
    loss = -logprobs.sum()
    return loss, loss + z_loss * (log_z**2).sum()


def main(config):
    """Train; returns {"valid_loss" (of the last step, over all of the validation text), "path" (of best/)}."""
    dist = setup(config.device)
    if restarted(config, dist):
        config = replace(config, resume=True)
    if config.batch % dist.world:
        raise ConfigError(f"--batch {config.batch} cannot be shared by {dist.world} processes evenly")
    autocast, scaler = precision(config.dtype, dist)
    if config.fsdp and (dist.world == 1 or scaler.is_enabled()):
        need = "bf16 or fp32" if dist.world > 1 else "torchrun, to start the processes that share the model"
        raise ConfigError(f"--fsdp needs {need}")
    run_path(config)
    if config.model.vocab_size != TransformerConfig.vocab_size and not config.init:
        raise ConfigError("--model.vocab_size is the tokenizer's; for another size of its vocabulary use --vocab_size")
    texts = {split: load_text(config.data, split, config.skip_bad) for split in ("train", "valid")}
    if config.init:
        raw, tokenizer, _ = open_checkpoint(config.init, dropout=config.model.dropout)
        config = replace(config, model=raw.config)
    if config.model.n_expert and config.model.n_expert_active == 1 and config.model.norm_topk_prob and not config.init:
        raise ConfigError(
            "one active expert, whose weight p / p is 1, leaves the router without a gradient: "
            "add --model.norm_topk_prob false"
        )
    if not config.init:
        made = [None]
        if config.resume:
            made = [load_tokenizer(saved_run(run_path(config)))]
        elif dist.is_main:
            made = [make_tokenizer(config.tokenizer, texts["train"], config.vocab_size)]
        if dist.world > 1:
            distributed.broadcast_object_list(made)  # trained once; no file, as there is no run directory yet
        tokenizer = made[0]
        config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    context = config.model.context
    streams = make_streams(config, dist, tokenizer, context, texts)
    digests = {split: Path(stream.filename).name for split, stream in streams.items()}  # of the texts
    run_dir = open_run(config, dist)  # behind all that can refuse what was asked for: a typo moves no earlier run aside
    if not config.init:
        torch.manual_seed(config.seed)
        raw = Transformer(config.model)
    if config.fsdp:  # made in CPU memory; each block goes to the GPU and is cut, before the next one follows
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        with autocast():
            kind = torch.bfloat16 if torch.is_autocast_enabled(dist.device.type) else None
        # Gathered in bf16, half the traffic; gradients are summed in fp32. Embedding and residual stream stay fp32.
        policy = MixedPrecisionPolicy(kind, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(dist.device.type, (dist.world,))
        for block in raw.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(raw, mesh=mesh)  # the rest: embedding, last norm, head
    else:
        raw.to(dist.device)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # the same weights on every rank, but other dropout
    optimizers = make_optimizers(raw, config.optimizer, config.lr, config.weight_decay)
    first, best, skipped, valid_loss = 0, math.inf, 0, math.nan
    if config.resume:
        state = load_state(run_dir, dist, raw, optimizers, scaler, config)
        first, best, skipped = (state.get(name, 0) for name in ("step", "best", "skipped"))
        valid_loss = state.get("whole", math.nan)
        if state.get("streams", digests) != digests:
            raise ConfigError(f"--resume continues a run as it was, but the text of --data {config.data} has changed")
    if config.recompute:
        for block in raw.blocks:
            block.forward = partial(recomputed, block.forward, use_reentrant=False)
    model = torch.compile(raw) if config.compile else raw
    if dist.world > 1 and not config.fsdp:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    log = Log(run_dir, config, dist, first)
    interrupt = Interrupt(dist)

    documents = tokenizer.encode_batch(texts["valid"]) if len(texts["valid"]) > 1 else []
    byte_lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)  # special tokens are no text
    for i in tokenizer.text_ids:
        byte_lengths[i] = len(tokenizer.token_bytes(i))
    entropy = None
    if config.data == "word":  # the built-in stories' entropy is known: no model can go below it
        entropy = narrative_entropy()[0] * len(documents) / sum(len(ids) + 1 for ids in documents)
    with autocast():
        at_peak = raw.flops_per_token(context) / (peak_flops(dist) * dist.world)  # seconds per token
    if dist.is_main:
        tokens = config.batch * context
        print(
            f"{raw.num_params():,} parameters, vocabulary {tokenizer.vocab_size}, {len(streams['train']):,} training "
            f"tokens; {config.steps} steps of {tokens:,} = {config.steps * tokens / len(streams['train']):.1f} epochs"
        )

    def checkpoint(name, step):
        state = None
        if name == "last":
            state = {"step": step, "best": best, "skipped": skipped, "whole": valid_loss, "config": asdict(config)}
            state |= {"streams": digests}
            moments = gathered([o.state_dict() for o in optimizers], dist.is_main)
            state |= {"scaler": scaler.state_dict(), "optimizers": moments}
        written = save(run_dir, name, dist, raw, tokenizer, chat=False, state=state)
        if dist.is_main and written and name == "last":
            if config.keep:
                keep_copy(run_dir, step, config.keep)
            curves()
        return written

    def curves():
        lines = {"entropy of the text": entropy} if entropy else {}
        draw_curves(
            run_dir,
            f"pretraining on {config.data}, seed {config.seed}, {raw.num_params() / 1e6:.1f} M parameters",
            [
                ("loss", {"loss": "train", "valid_loss": "validation"}, "nats per token", lines),
                ("gradient norm", {"grad_norm": "before clipping", "clipped": "share of clipped steps"}, "norm", {}),
                ("learning rate", {"lr": "lr"}, "learning rate", {}),
            ],
        )
        if raw.config.n_expert:
            draw_experts(run_dir)

    share = config.batch // dist.world
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not dist.is_main, unit="step")
    for step in bar:
        # ------------------------------------------------------------------ once in a while
        if interrupt:
            written = checkpoint("last", step)
            bar.close()
            stopped(config.name, step, written, dist)
        if step != first and step % config.save_every == 0:
            checkpoint("last", step)

        # ------------------------------------------------------------------ one optimizer step
        started = time.perf_counter()
        inputs, targets = batch_at(streams["train"], step, share, context, config.seed, dist.rank, dist.world)
        inputs, targets = torch.from_numpy(inputs).to(dist.device), torch.from_numpy(targets).to(dist.device)
        n_tokens = config.batch * context  # of the whole step, all ranks, before the batch is cut
        loss_sum, balancing = 0.0, 0.0
        for i in range(0, share, config.micro_batch):
            x, y = inputs[i : i + config.micro_batch], targets[i : i + config.micro_batch]  # (b, context)
            last = i + config.micro_batch >= share
            # DDP and FSDP sum up the gradients over the ranks in the last backward alone, and divide by their number
            if config.fsdp:
                raw.set_requires_gradient_sync(last)
            alone = last or config.fsdp or dist.world == 1
            with contextlib.nullcontext() if alone else model.no_sync():
                with autocast():
                    loss, objective = loss_of(model, x, y, config.z_loss)
                    if raw.config.n_expert:
                        terms = balancing_losses(raw)  # means over this micro-batch, so they count with its tokens
                        price = y.numel() * (config.aux_weight * terms["aux"] + config.z_weight * terms["z"])
                        objective, balancing = objective + price, balancing + price.detach() / n_tokens
                scaler.scale(objective / n_tokens * dist.world).backward()
            loss_sum += loss.detach() / n_tokens
        lr = lr_at(step, config.steps, config.lr, config.warmup, config.floor, config.schedule)
        (loss_sum,) = dist.sum(loss_sum)
        if math.isfinite(loss_sum):
            norm = optimizer_step(raw, optimizers, scaler, autocast, lr, config.clip)
        else:
            norm = math.nan
            raw.zero_grad(set_to_none=True)
        if not math.isfinite(loss_sum) or not (math.isfinite(norm) or scaler.is_enabled()):
            skipped += 1
            if not config.skip_nonfinite:
                where = f"at step {step} the loss is {loss_sum}, the gradient norm {norm}, the learning rate {lr:.1e}"
                good = saved_run(run_dir) or "none yet"
                mend = "try a smaller --lr or --skip_nonfinite true"
                raise DivergedError(f"{where}; last good checkpoint: {good}; {mend}")

        if raw.config.n_expert:
            (balancing,) = dist.sum(balancing)
            load = raw.config.n_expert * expert_load(raw)  # (layers, E) of this step, 1 is even
            update_biases(raw, config.bias_rate)

        done = step + 1
        speed = n_tokens / (time.perf_counter() - started)
        record = {"loss": loss_sum, "lr": lr, "grad_norm": norm, "clipped": float(0 < config.clip < norm)}
        record |= {"skipped": skipped, "tokens_per_second": speed, "mfu": speed * at_peak}
        if raw.config.n_expert:
            record["balancing_loss"] = balancing
        if done % config.eval_every == 0 or done == config.steps:
            if raw.config.n_expert:
                record |= load_record(load)
            rows = partial(validation_rows, documents, streams["valid"], context, tokenizer.endoftext_id)
            losses = validate(raw, rows(config.eval_tokens), byte_lengths, dist, autocast)
            score = losses[0]  # the best is chosen on the same rows each time
            if done == config.steps:
                losses = validate(raw, rows(None), byte_lengths, dist, autocast)
            record["valid_loss"], record["valid_bits_per_byte"] = losses
            valid_loss = losses[0]
            readable = unsharded(raw, dist)
            if dist.is_main:
                text = sample_text(readable, tokenizer, config.seed)
                bar.write(f"step {done}  loss {loss_sum:.3f}  valid {record['valid_loss']:.3f}  | {text!r}")
                log.samples(done, f"**step {done}** (validation loss {record['valid_loss']:.3f})\n\n{text}")
                log.show(done, histograms={f"weights/{n}": p for n, p in readable.named_parameters()})
                if done == config.steps:  # a second or two
                    draw_attention(run_dir, readable, tokenizer, texts["valid"][0])
                    log.show(done, ["attention"])
            if score < best:
                best = score
                checkpoint("best", done)
        log(done, **record)
        bar.set_postfix(loss=f"{loss_sum:.3f}", lr=f"{lr:.1e}", tok_s=f"{record['tokens_per_second']:,.0f}")
    checkpoint("last", config.steps)
    interrupt.release()
    log.close()
    if dist.is_main:
        known = f", entropy of the text {entropy:.4f}" if entropy else ""
        missed = f"; {skipped} steps skipped" if skipped else ""
        print(f"validation loss {valid_loss:.4f} nats per token{known}{missed}; {run_dir}/best, {run_dir}/curves.png")
    return {"valid_loss": valid_loss, "path": str(run_dir / "best")}


def sample_text(raw, tokenizer, seed, length=60):
    """What the model writes after a document border, at temperature 0.8."""
    length = min(length, raw.config.context - 1)
    generator = torch.Generator().manual_seed(seed)
    rollout = generate(
        raw,
        [[tokenizer.endoftext_id]],
        length,
        1,
        0.8,
        stop_ids=(tokenizer.endoftext_id,),
        generator=generator,
    )
    return rollout.texts(tokenizer)[0].strip()


if __name__ == "__main__":
    run(main, Config, __doc__)
