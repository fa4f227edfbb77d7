"""support/devices.py: dtype, memory, ranks."""

import ctypes
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line_error, script
from tiny import flags

import pretrain
from support import devices, heap, runs
from support.cli import run_script
from support.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "word"), [({"batch": 7}, "evenly"), ({"data": "short.txt"}, "smaller --model.context")]
)
def test_bad_input_on_two_ranks_is_said_once_and_ends_both(here, changes, word):
    (here / "short.txt").write_text("too short. " * 9, encoding="utf-8")
    process = script("pretrain.py", *flags(**changes), cwd=here, processes=2, torchrun=True)
    assert process.returncode != 0
    assert [word in line for line in process.stderr.splitlines() if line.startswith("error: ")] == [True]


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc: its malloc is the matter"
)
def test_freed_memory_is_kept(scratch):
    """Eight tensors of 20 MiB, made and dropped: without keep_freed_memory their pages are cleared anew each time.

    glibc's own threshold starts at 128 KiB and then follows what is freed, and chance decides what is kept: held there
    by its variable, every tensor is lost.
    """
    code = """
import resource, sys, torch, pretrain
pretrain.setup("cpu") if sys.argv[1] == "kept" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(5 * 2**20) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(pretrain.__file__).parent)}
    environment = {k: v for k, v in environment.items() if not k.startswith(("MALLOC_", "THP_", "LD_PRELOAD"))}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
    kept, lost = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, how], env=environment, stdout=subprocess.PIPE, check=True
            ).stdout
        )
        for how in ("kept", "lost")
    )
    assert kept < 1000 < 10_000 < lost


def large_pages_on_request():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[madvise]" in setting.read_text(encoding="utf-8")


@pytest.mark.skipif(not large_pages_on_request(), reason="this kernel gives large pages to nobody, or to all")
def test_tensors_lie_in_large_pages(scratch):
    """100 MiB of tensors, before a stage is set up and after: only then in pages of 2 MiB."""
    code = """
import torch, pretrain
def large():
    tensors = [torch.ones(2**18) for _ in range(100)]  # 1 MiB each
    lines = open("/proc/self/smaps").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages")) // 1024
print(large())
pretrain.setup("cpu")
print(large())
"""
    environment = os.environ | {"PYTHONPATH": str(Path(pretrain.__file__).parent)}
    environment = {k: v for k, v in environment.items() if not k.startswith(("MALLOC_", "THP_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 30
    assert after > 70


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: what a process holds is read there")
def test_what_a_start_needed_is_given_back(scratch):
    """400 tensors of 1 MiB, all dropped but the last, which stands at the heap's end: kept, until a start is made."""
    code = """
import torch, pretrain
from types import SimpleNamespace
from support.runs import make_start_once
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
def main(config):
    global last
    last = [torch.ones(2**18) for _ in range(400)][-1]
    print(held())
dist = pretrain.setup("cpu")
before = held()
main(None)
print(held())
make_start_once("start", "", SimpleNamespace(Config=pretrain.Config, main=main), {"data": "text.txt"}, dist)
print(before, held())
"""
    (scratch / "text.txt").write_text("A text.", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(pretrain.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    in_use, kept, _, before, after = map(float, re.findall(r"\d+\.\d+", done.stdout))
    assert in_use > before + 390
    assert kept > before + 390
    assert after < before + 60


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc: where the heap lies is read there")
def test_a_mapped_file_may_have_a_name_that_is_no_text(tmp_path):
    """As a token stream or a library has in a folder of such a name."""
    with open(os.fsencode(tmp_path / "caf") + b"\xe9", "w+b") as file:
        file.write(b"text")
        file.flush()
        with mmap.mmap(file.fileno(), 0):
            heap.return_freed_memory()


def test_where_memory_is_short_each_step_gives_back_what_it_freed(tmp_path, monkeypatch):
    info, own, page = tmp_path / "meminfo", tmp_path / "statm", os.sysconf("SC_PAGE_SIZE") // 1024  # kB
    for left, held, is_short in ((260, 130, False), (240, 130, True), (240, 120, False)):  # thousandths
        text = f"MemTotal: {1000 * page} kB\nMemFree: 1 kB\nMemAvailable: {left * page} kB\nHugePages_Total: 0\n"
        info.write_text(text, encoding="utf-8")
        own.write_text(f"9000 {held} 50 1 0 300 0\n", encoding="utf-8")
        assert heap.memory_is_short(info, own) == is_short
    assert not heap.memory_is_short(tmp_path / "none", own)
    given_back = []
    monkeypatch.setattr(runs, "return_freed_memory", lambda: given_back.append(True))
    monkeypatch.setattr(runs, "memory_is_short", lambda: len(given_back) < 2)
    run = SimpleNamespace(config=SimpleNamespace(steps=5, save_every=9), first=0, interrupt=None, done=0)
    run.dist = SimpleNamespace(is_main=False)
    assert list(runs.Run.steps(run)) == [0, 1, 2, 3, 4]
    assert len(given_back) == 2


@pytest.mark.parametrize("unit", ["amx_tile", "avx512_bf16", "other"])
def test_auto_is_bf16_where_the_cpu_multiplies_it(monkeypatch, unit):
    monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: True, raising=False)
    autocast, scaler = devices.precision("auto", devices.Dist(0, 1, torch.device("cpu")))
    with autocast():
        kind = torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    assert kind == (torch.float32 if unit == "other" else torch.bfloat16)
    assert not scaler.is_enabled()


def test_rank_0_makes_it_for_all(monkeypatch):
    def broadcast(box):  # rank 0 comes first
        sent.extend(box if not sent else [])
        box[:] = sent

    sent, calls = [], []
    monkeypatch.setattr(devices.distributed, "broadcast_object_list", broadcast)
    ranks = [devices.Dist(rank, 2, torch.device("cpu")) for rank in range(2)]
    assert [dist.from_main(lambda rank=dist.rank: calls.append(rank) or "made") for dist in ranks] == ["made"] * 2
    assert calls == [0]


def test_a_torch_that_does_not_tell_whether_the_cpu_multiplies_bf16(monkeypatch):
    """Its names for that are not public, so a later version may lack them."""
    for unit in ("amx_tile", "avx512_bf16"):
        monkeypatch.delattr(torch.cpu, f"_is_{unit}_supported")
    assert devices.auto_dtype(torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(("cuda", "apple", "world", "kind"), [
    (True, True, 1, "cuda"), (False, True, 1, "mps"), (False, True, 2, "cpu"), (False, False, 1, "cpu"),
])  # fmt: skip
def test_auto_takes_the_best_there_is(monkeypatch, cuda, apple, world, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    assert devices.best_device(world) == kind


def test_an_apple_gpu_is_one_device_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dist = devices.setup("auto")
    assert (dist.device.type, dist.world, devices.auto_dtype(dist.device)) == ("mps", 1, "fp32")
    autocast, scaler = devices.precision("auto", dist)
    with autocast():
        assert not torch.is_autocast_enabled("mps")
    assert not scaler.is_enabled()
    with devices.precision("bf16", dist)[0]():
        assert torch.get_autocast_dtype("mps") == torch.bfloat16
    assert devices.precision("fp16", dist)[1].is_enabled()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--device mps is one GPU, which 2 processes cannot share; use --device cpu"):
        devices.setup("mps")


def test_one_nvidia_gpu_is_not_for_two_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--device cuda:0 is one GPU, which 2 processes cannot share"):
        devices.setup("cuda:0")


def test_memory_of_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 4)
    assert devices.free_memory(torch.device("mps")) == 6


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this is a Mac")
def test_no_apple_gpu_is_one_line(here):
    process = script("pretrain.py", *flags(device="mps"), cwd=here)
    assert_one_line_error(process, "--device mps, but torch sees no Apple GPU here; use --device cpu")
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H100 NVL", torch.float16, 835e12),
        ("NVIDIA H200", torch.float16, 989e12),
        ("NVIDIA H200 NVL", torch.bfloat16, 836e12),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA H100 PCIe", torch.float32, None),
        ("NVIDIA L4", torch.bfloat16, None),
    ],
)
def test_the_peak_is_that_of_the_data_sheet_in_16_bits(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(devices, "product_dtype", lambda x: dtype)
    empty, ones, multiplied = torch.empty, torch.ones, []

    def few(*sizes, device, dtype=None):
        multiplied.append(dtype)
        return ones(8, 8, dtype=dtype)

    monkeypatch.setattr(torch, "empty", lambda *sizes, device: empty(*sizes))
    monkeypatch.setattr(torch, "ones", few)
    got = devices.peak_flops(devices.Dist(0, 1, torch.device("cuda", 0)))
    assert got == peak or peak is None
    assert multiplied == ([] if peak else [dtype])  # else it is measured


def test_recompute_on_an_apple_gpu_wants_no_dropout():
    apple, cpu = (devices.Dist(0, 1, torch.device(kind)) for kind in ("mps", "cpu"))
    devices.refuse_recompute(0.0, apple)
    devices.refuse_recompute(0.1, cpu)
    with pytest.raises(ConfigError, match="use --model"):
        devices.refuse_recompute(0.1, apple)


def test_what_mps_lacks_is_one_line_with_a_remedy(monkeypatch, capsys):
    """PYTORCH_ENABLE_MPS_FALLBACK is named where it is needed; any other error keeps its traceback."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    text = "The operator 'aten::frexp.Tensor_out' is not currently implemented for the MPS device. If you want …"

    def stage(config):
        raise NotImplementedError(text)

    with pytest.raises(SystemExit) as left:
        run_script(stage, pretrain.Config)
    (line,) = capsys.readouterr().err.splitlines()
    assert (left.value.code, line.startswith("error: torch")) == (2, True)
    for word in ("aten::frexp.Tensor_out", "PYTORCH_ENABLE_MPS_FALLBACK=1", "--device cpu"):
        assert word in line
    text = "something else"
    with pytest.raises(NotImplementedError, match="something else"):
        run_script(stage, pretrain.Config)


def test_memory_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(SystemExit) as left:
        run_script(lambda config: torch.empty(2**60), pretrain.Config)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert line.startswith(f"error: there is no memory for {2**62} bytes more: take fewer")
    gpu = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.00 GiB of which …"
    assert devices.out_of_memory(RuntimeError(gpu)).startswith("there is no memory for 20.00 GiB more")
    assert devices.out_of_memory(RuntimeError("something else")) is None


def test_float64_is_taken_where_it_exists():
    x = torch.tensor([1.0, 2.0])
    assert devices.in_float64(x).dtype == torch.float64
    assert not devices.traits(torch.device("mps")).has_float64
    assert devices.traits(torch.device("meta")) is devices.traits(x)
