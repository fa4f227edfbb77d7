"""FSDP: what ranks that share the model compute, save and resume is what one process does."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_metrics, assert_same_weights, metrics, script, weights
from tiny import MODEL, TEXT, config

import grpo
import pretrain
from lora import LoraConfig
from support import devices, policy_run, pretrain_report
from support.errors import ConfigError
from support.sharding import accumulating, averaging
from support.shared_prompt import pack, shared_answer_logprobs
from transformer import Transformer, TransformerConfig

ODD = dict(n_layer=2, n_head=1, width=18, ffn_width=31)  # two ranks do not get as many rows of each matrix
EXPERTS = dict(ffn_width=None, n_expert=3, expert_width=15, balancing="bias")

SHARDED = {  # what FSDP is tried with; the mixture is of three experts, balanced by biases that no optimizer sees
    "adamw": dict(optimizer="adamw", model=ODD),
    "muon": dict(optimizer="muon", model=ODD),
    "mixture": dict(recompute=True, bias_rate=0.01, model=ODD | EXPERTS),
    "bf16": dict(dtype="bf16", optimizer="adamw", model=ODD),
}


def sharded_case(case, **changes):
    changes = dict(data="longer.txt", dtype="fp32", save_every=2, keep=3, clip=0.5) | SHARDED[case] | changes
    return config(**changes | dict(model=TransformerConfig(**MODEL | changes["model"])))


def run_sharded():
    """What each of two ranks does: all cases, and the first two again from step 4, with FSDP and without."""
    pretrain_report.draw = lambda *args: None  # the pictures are the most of a short run's time
    dist = devices.setup("cpu")
    for case in SHARDED:
        done = sharded_case(case, name=f"{case}/two", micro_batch=3, fsdp=True)  # 4 windows a rank, in two parts
        pretrain.main(done)
        for fsdp in (True, False) if case in ("adamw", "muon") else ():
            if dist.is_main:
                shutil.copytree(f"runs/{case}/two/step_0000004", f"runs/{case}/two-{fsdp}/last")
            torch.distributed.barrier()
            pretrain.main(replace(done, name=f"{case}/two-{fsdp}", fsdp=fsdp, resume=True))


def run_pieces():
    """What each of two ranks does: pieces of prompts and their answers, one on rank 0, two on rank 1."""
    dist = devices.setup("cpu")
    autocast, _ = devices.precision("fp32", dist)
    torch.manual_seed(0)
    policy = Transformer(TransformerConfig(**MODEL | ODD, vocab_size=40)).eval()
    plain = copy.deepcopy(policy)
    pieces = [pack([[1, 2, 3 + i]], [[[5, 6, 7 + i], [8]]], pad=0) for i in range(3)]
    pretrain.shard(policy, dist, autocast)
    for _ in range(2):  # optimizer steps
        with accumulating(policy, autocast):
            for packed in pieces[:1] if dist.is_main else pieces[1:]:
                with averaging(policy, False):
                    (shared_answer_logprobs(policy, packed).sum() * dist.world).backward()
        for packed in pieces:
            shared_answer_logprobs(plain, packed).sum().backward()
        for (name, p), q in zip(policy.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, atol=1e-5, rtol=1e-5, msg=name)
        policy.zero_grad()
        plain.zero_grad()
    if dist.is_main:
        print("the same gradients")


def ranks_of(function):
    """A script that calls a function of this file, and ends as cli.run_script does: torch's threads may abort the
    interpreter's end."""
    return (
        f"import os\nimport sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
        f"from test_sharding import {function}\n{function}()\nsys.stdout.flush()\nsys.stderr.flush()\nos._exit(0)\n"
    )


def test_ranks_with_other_numbers_of_pieces_have_the_gradients_of_all(here):
    (here / "ranks.py").write_text(ranks_of("run_pieces"), encoding="utf-8")
    process = script(here / "ranks.py", cwd=here, processes=2, timeout=60)
    assert process.returncode == 0, process.stderr
    assert "the same gradients" in process.stdout


def assert_same_checkpoint(one, two, atol):
    assert_same_weights(one, two, atol=atol, rtol=0)
    one, two = (torch.load(f"{path}/trainer_state.pt", weights_only=True)["optimizers"] for path in (one, two))
    torch.testing.assert_close(two, one, atol=atol, rtol=0)  # moments are plain tensors, in the same places


def test_sharded_equals_one_process(here, monkeypatch):
    """FSDP: losses, norms, validation, samples, weights and moments are those of one process with the same batch."""
    # 33 windows to validate: one more pass for rank 0
    (here / "longer.txt").write_text((TEXT * 2)[:10_700], encoding="utf-8")
    (here / "ranks.py").write_text(ranks_of("run_sharded"), encoding="utf-8")
    process = script(here / "ranks.py", cwd=here, processes=2)
    assert process.returncode == 0, process.stderr
    monkeypatch.setattr(pretrain_report, "draw", lambda *args: None)
    for case in SHARDED:
        pretrain.main(sharded_case(case, name=f"{case}/one"))
        near = 0.01 if case == "bf16" else 1e-5  # autocast leaves gains in fp32, FSDP gathers them in bf16
        names = ("loss", "grad_norm", "valid_loss")
        assert_same_metrics(f"runs/{case}/one", f"runs/{case}/two", names, rel=near)
        assert set(metrics(f"runs/{case}/two", "grad_clipped").values()) == {1.0}
        for step in (2, 4, 6):
            assert_same_checkpoint(*(f"runs/{case}/{x}/step_000000{step}" for x in ("one", "two")), near)
        assert all(w.dtype == torch.float32 for w in weights(f"runs/{case}/two/last").values())
    for case in ("adamw", "muon"):
        for again in ("two-True", "two-False"):
            assert set(metrics(f"runs/{case}/{again}", "loss")) == {5, 6}
            assert_same_checkpoint(f"runs/{case}/one/last", f"runs/{case}/{again}/last", 1e-5)
        one, two = (Path(f"runs/{case}/{x}/samples.md").read_text(encoding="utf-8") for x in ("one", "two"))
        assert one == two
    assert weights("runs/mixture/two/last")["blocks.0.ffn.selection_bias"].abs().max() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "torchrun"), ({"compile": True}, "--compile do not"), ({"dtype": "fp16"}, "bf16 or fp32")],
)
def test_what_sharding_refuses(here, changes, message, monkeypatch):
    if changes:
        monkeypatch.setattr(pretrain, "setup", lambda _: devices.Dist(0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match=f"^--fsdp.*{message}"):
        pretrain.main(config(fsdp=True, **changes))
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "torchrun"),
        ({"dtype": "fp16"}, "bf16 or fp32"),
        ({"lora": LoraConfig(2)}, "--lora.rank do not"),
        ({"stale": 1}, "--stale do not"),
        ({"sampler_dtype": "int8"}, "--sampler_dtype do not"),
        ({"refresh_reference": 1}, "--refresh_reference do not"),
    ],
)
def test_what_sharding_refuses_in_the_later_stages(here, changes, message, monkeypatch):
    if changes:
        monkeypatch.setattr(policy_run, "setup", lambda _: devices.Dist(0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match=f"^--fsdp.*{message}"):
        grpo.main(grpo.Config(init="nowhere", fsdp=True, device="cpu", **changes))
    assert not (here / "runs").exists()
