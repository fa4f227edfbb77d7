"""Where a stage computes: the device, the process group and its ranks, the precision; memory and speed.

dist = setup(config.device)                      one process, or one of torchrun's; a CPU or a GPU each
dist.is_main, dist.sum(loss), dist.share(…)      who am I among them, and what we have together
autocast, scaler = precision(config.dtype, dist)
with autocast(): ...                             a stage's forward passes; scaler.scale(loss).backward()
peak_flops(dist), free_memory(device)            what the device could do, what it has left
"""

import contextlib
import ctypes
import math
import os
import re
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from support.errors import ConfigError


@dataclass
class Dist:
    """Who am I among the processes, and on which device do I compute. Of one process it costs nothing."""

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

    def deal(self, items, work):
        """work(the items of this rank) -> one result per item; every rank gets all of them, in the items' order."""
        own = list(work(items[self.rank :: self.world]))
        if self.world == 1:
            return own
        everyone = [None] * self.world
        distributed.all_gather_object(everyone, own)
        return [everyone[i % self.world][i // self.world] for i in range(len(items))]

    def gather(self, values):
        """(n, …) of each rank -> (N, …), in rank order, on the CPU."""
        if self.world == 1:
            return values
        everywhere = [torch.empty_like(values).to(self.device) for _ in range(self.world)]
        distributed.all_gather(everywhere, values.contiguous().to(self.device))
        return torch.cat(everywhere).cpu()

    def from_main(self, make):
        """What make() returns on rank 0, on every rank; it must be something that can be pickled."""
        value = [make() if self.is_main else None]
        if self.world > 1:
            distributed.broadcast_object_list(value)
        return value[0]

    def share(self, flag, n):
        """One rank's part of the n that --flag asks of all together. ConfigError if it does not come out even."""
        if n % self.world:
            raise ConfigError(f"--{flag} {n} cannot be shared by {self.world} processes evenly")
        return n // self.world


def setup(device="auto"):
    """--device -> Dist: join the process group if torchrun started us (RANK, WORLD_SIZE, LOCAL_RANK), and choose the
    device. ConfigError if there is none such here."""
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


def precision(dtype, dist):
    """--dtype -> (a function that makes the autocast context, the gradient scaler, which does nothing but in fp16)."""
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


def auto_dtype(device):
    """bf16 where there are matrix units for it (most GPUs, CPUs with AMX), fp16 on older GPUs, which only emulate bf16,
    fp32 elsewhere."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


# Floating-point operations per second that the data sheets state, dense, bf16.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12}


def peak_flops(dist):
    """The device's, for model FLOPs utilisation: from its data sheet, or else as measured with one matrix product in
    the dtype of autocast."""
    name = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else "CPU"
    for known, flops in PEAK_FLOPS.items():
        if re.search(rf"\bG?{known}\b", name):
            return flops
    kind = dist.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    n, best = 768, math.inf
    a = torch.ones(n, n, device=dist.device, dtype=dtype)
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def free_memory(device):
    """Bytes that `device` can still give; None where the system does not say."""
    if device.type == "cuda":  # blocks that torch keeps for itself are free to us
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:  # MemAvailable counts the page cache, which gives way
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return None


def keep_freed_memory():
    """Ask the C library, where it is glibc, to keep freed memory for the next tensor. It would hand that of large
    tensors back to the kernel, which clears every page before it lends it again: thousands in a step on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # elsewhere there is no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: only what is larger than 32 MiB, the most that it takes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor what is free at the heap's end
