"""Where a stage computes: the device, the process group and its ranks, the precision; memory and speed.

dist = setup(config.device)                         one process, or one of torchrun's; a CPU or a GPU each
dist.is_main, dist.sum(loss), dist.per_rank(…)      is this rank 0; sums over all ranks; one rank's part of a batch
autocast, scaler = precision(config.dtype, dist)
with autocast(): ...                                a stage's forward passes; scaler.scale(loss).backward()
traits(x)                                           what torch can do on x's device, and what is fast there
in_float64(x), product_dtype(x)                     x in float64 wherever that exists; the dtype of its products
cast_once(x)                                        x in that dtype, for several products together
attention_dtype(x)                                  the dtype of attention: on a CPU fp32 instead of bf16
random_state(device), set_random_state(…)           the generators that dropout draws from, to resume
peak_flops(dist), free_memory(device)               the device's peak speed, and the memory it has left

All that depends on the kind of device is here. A chapter asks by name, and computes the same formula on all of them.
"""

import contextlib
import math
import re
import time
import warnings
from dataclasses import dataclass

import torch
from torch import distributed

from support.errors import ConfigError
from support.heap import keep_freed_memory
from support.nodes import MESH, WAIT, card, connect, first_line, launched, meet, what_differs, whole_from


@dataclass(frozen=True)
class Traits:
    """What torch can do on a kind of device, and what is fast there."""

    has_float64: bool = True
    bf16_attention: bool = True  # else attention computes in fp32: in bf16 SDPA's backward pass is slow
    repeats_shared_heads: bool = False  # SDPA is faster on repeated keys and values than on shared ones: see attention
    fused_rms_norm: bool = False  # F.rms_norm is one kernel forward and one backward
    grouped_products: bool = False  # F.grouped_mm, one kernel for all experts, in bf16
    expert_rows: int = 1  # in bf16 every expert gets a multiple of so many rows: for each new number oneDNN compiles
    stops_at_bad_index: bool = False  # F.embedding raises on an index outside the table
    decode_step: bool = True  # support/fast_decode.py has been compared with the model there
    bf16_cache: bool = True  # where products are in bf16, decoding reads keys and values faster in bf16 than in fp32
    decodes_by_sdpa: bool = False  # from a bf16 cache SDPA decodes faster than two batched products
    cuda_graphs: bool = False


def cpu_has(unit):
    """Whether the CPU has "amx_tile" or "avx512_bf16". torch has no public name for this: a later one may lack it."""
    return getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)()


TRAITS = {
    # Without AMX rollouts by SDPA from a bf16 cache take twice as long as by products from one in fp32 (EPYC of Zen 5)
    "cpu": Traits(bf16_attention=False, expert_rows=32, bf16_cache=cpu_has("amx_tile"), decodes_by_sdpa=True),
    "cuda": Traits(repeats_shared_heads=True, fused_rms_norm=True, grouped_products=True, stops_at_bad_index=True,
                   cuda_graphs=True),
    # Apple's GPU has no float64, and torch no process group for it. Its kernels have been wrong without an error on
    # results written into a part of a tensor (out=), of which the decoding step has many; the model's forward has none.
    "mps": Traits(has_float64=False, decode_step=False),
}  # fmt: skip


def traits(x):
    """The Traits of a tensor's device, or of a device; of the CPU for kinds that no stage computes on (meta)."""
    return TRAITS.get(getattr(x, "device", x).type, TRAITS["cpu"])


def in_float64(x):
    """x in float64, for a sum that needs its digits: where the device has no float64, a copy on the CPU."""
    return x.double() if traits(x).has_float64 else x.cpu().double()


def product_dtype(x):
    """The dtype of x's matrix products: autocast's where that is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def cast_once(x):
    """x in the dtype of its matrix products: several that read it would each convert it."""
    return x.to(product_dtype(x))


def attention_dtype(x):
    """The dtype in which attention computes, and caches keys and values, where x's products have product_dtype(x)."""
    dtype = product_dtype(x)
    return torch.float32 if dtype == torch.bfloat16 and not traits(x).bf16_attention else dtype


@dataclass
class Dist:
    """This process among all processes, and the device it computes on. With one process every method is free."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, *values):
        """Sum each number over all ranks; every rank gets the same list of floats."""
        if self.world == 1:
            return [float(v) for v in values]
        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.tolist()

    def split_work(self, items, work):
        """Split the items among the ranks: work(this rank's items) yields one result per item. Every rank gets the
        results of all items, in the order of the items."""
        results = list(work(items[self.rank :: self.world]))
        if self.world == 1:
            return results
        by_rank = [None] * self.world
        distributed.all_gather_object(by_rank, results)
        return [by_rank[i % self.world][i // self.world] for i in range(len(items))]

    def gather(self, values):
        """(n, …) of each rank -> (N, …), in rank order, on the CPU; with one process `values`, where they are."""
        if self.world == 1:
            return values
        by_rank = [torch.empty_like(values).to(self.device) for _ in range(self.world)]
        distributed.all_gather(by_rank, values.contiguous().to(self.device))
        return torch.cat(by_rank).cpu()

    def from_main(self, make):
        """Call make() on rank 0 and return its result on every rank. The result must be picklable."""
        value = [make() if self.is_main else None]
        if self.world > 1:
            distributed.broadcast_object_list(value)
        return value[0]

    def same(self, contents):
        """ConfigError on every rank unless all have the same contents, {name: value}, such as `content_of` gives."""
        if self.world > 1:
            by_rank = [None] * self.world
            distributed.all_gather_object(by_rank, card(contents))
            if problem := what_differs(by_rank):
                raise ConfigError(problem)

    def per_rank(self, flag, n):
        """One rank's part of the total n that --flag sets. ConfigError if the ranks cannot split n evenly."""
        if n % self.world:
            raise ConfigError(f"--{flag} {n} cannot be shared by {self.world} processes evenly")
        return n // self.world


def setup(device="auto", facts=None, folder=None):
    """--device -> Dist: join the process group if torchrun started this process (RANK, WORLD_SIZE, LOCAL_RANK), and
    choose the device. ConfigError if this machine does not have it.

    facts(device) -> {name: value}, and the folder that all processes must share: support/launch.py gives them."""
    keep_freed_memory()
    (rank, world), local = launched(), whole_from("LOCAL_RANK", 0)
    if device == "auto":
        device = best_device(world)
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ConfigError(f"--device {device!r} is not known; use auto, cpu, cuda or mps")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps, but torch sees no Apple GPU here; use --device cpu")
    if device == "mps" and world > 1:
        raise ConfigError(f"--device mps is one GPU, which {world} processes cannot share; use --device cpu")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda, but torch sees no CUDA GPU here; use --device cpu")
        if ":" in device and world > 1:
            raise ConfigError(f"--device {device} is one GPU, which {world} processes cannot share; use --device cuda")
        gpus, processes = torch.cuda.device_count(), whole_from("LOCAL_WORLD_SIZE", 1)
        too_few = int(device[5:]) >= gpus if ":" in device else processes > gpus
        if too_few:
            raise ConfigError(f"--device {device} for {processes} processes, but torch sees {gpus} GPUs here")
        if device == "cuda":
            device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if world > 1 and not distributed.is_initialized():
        store, own, problem = connect(), None, None
        try:
            own = facts and facts(torch.device(device))
        except (OSError, ValueError) as error:  # a file that cannot be read: the others wait, and must hear of it
            problem = error
        store = meet(store, rank, world, own, folder, problem)
        # torch 2.13 renames DDP's broadcast_buffers; older versions do not have the new name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of views: nothing writes into them
        backend = "nccl" if device.startswith("cuda") else "gloo"
        join_group(backend, store)
    return Dist(rank, world, torch.device(device))


def best_device(world=1):
    """What --device auto takes: a CUDA GPU, Apple's (for one process alone), or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if world == 1 and torch.backends.mps.is_available() else "cpu"


def join_group(backend, store):
    """Make the process group. ConfigError if its processes do not reach each other."""
    rank, world = launched()
    timeout = MESH if backend == "gloo" else WAIT  # gloo connects here; nccl does in the first exchange
    try:
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:
        network = "GLOO_SOCKET_IFNAME=NAME (NCCL_SOCKET_IFNAME on GPUs) chooses the network that joins the nodes"
        raise ConfigError(f"the processes do not reach each other ({first_line(error)}): {network}") from None
    distributed.distributed_c10d._set_pg_timeout(WAIT)


def precision(dtype, dist):
    """--dtype -> (a function that makes the autocast context, the gradient scaler, which is active in fp16 only)."""
    if dtype == "auto":
        dtype = auto_dtype(dist.device)
    if dtype not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"--dtype {dtype!r} is not known; use auto, fp32, bf16 or fp16")
    # fp16 cannot represent numbers below 6e-8: the loss is scaled up before backward, the gradients down before use.
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == "fp16")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[dtype]

    def autocast():
        if kind is None:
            return contextlib.nullcontext()
        return torch.autocast(dist.device.type, kind)

    return autocast, scaler


def auto_dtype(device):
    """bf16 where the hardware multiplies it (most GPUs; CPUs with AMX or AVX-512 BF16); fp16 on older GPUs, which only
    emulate bf16; fp32 elsewhere, on Apple's GPUs too."""
    if device.type == "mps":
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has("amx_tile") or cpu_has("avx512_bf16") else "fp32"


def answer_autocast(device):
    """The autocast context in which generate.py answers: bf16 on a CUDA GPU that multiplies it, elsewhere none."""
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=on_gpu)


def refuse_recompute(dropout, dist):
    """ConfigError if a repeated forward pass would drop other numbers than the first: torch.utils.checkpoint does not
    restore the generator of mps."""
    if dropout and dist.device.type == "mps":
        raise ConfigError("--recompute repeats the forward pass, but not its dropout on mps: use --model.dropout 0")


def lacking_on_mps(error):
    """What to do about torch's NotImplementedError, in a line, if mps lacks the operation; None for any other error."""
    found = re.search(r"operator '(\S+)' is not currently implemented for the MPS device", str(error))
    remedy = "set PYTORCH_ENABLE_MPS_FALLBACK=1 to run it on the CPU, or use --device cpu"
    return found and f"torch {torch.__version__} has no {found[1]} on mps: {remedy}"


def out_of_memory(error):
    """What to do about torch's error of memory that is not there, in a line; None for any other error."""
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    remedy = "take fewer or shorter rows at a time (--micro_batch and what a batch is made of), or a smaller model"
    return wanted and f"there is no memory for {wanted[1]} more: {remedy}"


def random_state(device):
    """{kind: state} of the generators that a run on this device draws from: the CPU's as "torch", and the device's."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state, device):
    """Restore what `random_state` returned; of a device that the state does not know, nothing."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


# Dense bf16 floating-point operations per second, from the data sheets.
PEAK_FLOPS = {"H200 NVL": 836e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12}
PEAK_FLOPS |= {"A100": 312e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12}


def peak_flops(dist):
    """Peak floating-point operations per second of the device, for model FLOPs utilisation: from its data sheet in bf16
    and fp16, which have the same peak; measured on a matrix product in autocast's dtype if that is fp32, or if the
    sheet is not listed."""
    name = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else "CPU"
    dtype = product_dtype(torch.empty(0, device=dist.device))
    for known, flops in PEAK_FLOPS.items():
        if dtype != torch.float32 and re.search(rf"\bG?{known}\b", name):
            return flops
    n, best = {"cuda": 4096, "mps": 2048}.get(dist.device.type, 768), math.inf  # on a GPU a small one is over too soon
    a = torch.ones(n, n, device=dist.device, dtype=dtype)
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def free_memory(device):
    """Free memory of `device` in bytes, on a CPU this process's share; None where the system does not report it."""
    if device.type == "cuda":  # plus the blocks that torch has reserved but does not use
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    if device.type == "mps":  # what Metal recommends to use of the memory that it shares with the CPU
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            # MemAvailable includes the page cache, which can be freed. torchrun's processes share it.
            kilobytes = int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
            return 1024 * kilobytes // whole_from("LOCAL_WORLD_SIZE", 1)
    except (OSError, StopIteration):
        return None
