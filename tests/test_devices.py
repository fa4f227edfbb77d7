"""support/devices.py: dtype, memory, ranks."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import script
from tiny import flags

import pretrain
from support import devices


@pytest.mark.parametrize(
    ("changes", "word"), [({"batch": 7}, "evenly"), ({"data": "short.txt"}, "smaller --model.context")]
)
def test_bad_input_on_two_ranks_is_said_once_and_ends_both(here, changes, word):
    (here / "short.txt").write_text("too short. " * 9, encoding="utf-8")
    process = script("pretrain.py", *flags(**changes), cwd=here, processes=2)
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
