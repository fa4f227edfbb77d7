"""pretrain.py: its loss, and what a run must guarantee: the cut of a batch, the number of processes and
an interruption change nothing."""

import contextlib
import ctypes
import fcntl
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, assert_same_weights, metrics, script, weights

import pretrain
import transformer
from pretrain import Config, next_token_loss, validate, validation_rows
from support import cli, devices, log, plots, runs, streams
from support.errors import ConfigError, TokenizerError
from tokenizer_bpe import CharTokenizer
from transformer import Transformer, TransformerConfig

TEXT = "".join(f"{a} plus {b} is {a + b}. " for a in range(20) for b in range(20))
MODEL = dict(context=32, n_layer=1, n_head=2, n_kv_head=1, width=16)
SMALL = dict(tokenizer="char", steps=6, batch=8, micro_batch=8, warmup=2, eval_every=3, eval_tokens=200, device="cpu")


def config(**changes):
    return Config(**(SMALL | {"data": "text.txt", "model": TransformerConfig(**MODEL)} | changes))


@pytest.fixture
def here(scratch):
    (scratch / "text.txt").write_text(TEXT)
    return scratch


def flags(**changes):
    out = []
    for name, value in (SMALL | {"data": "text.txt"} | changes).items():
        out += [f"--{name}", value]
    for name, value in MODEL.items():
        out += [f"--model.{name}", value]
    return out


def test_a_run_learns_and_leaves_everything(here, capsys):
    result = pretrain.main(config(steps=60, lr=1e-2, eval_every=30, dtype="fp32"))
    losses = metrics("runs/pretrain", "loss")
    assert losses[1] > 3.0  # ln(vocabulary) is 3.4
    assert result["valid_loss"] < 2.0 < losses[1]
    assert result["valid_loss"] == list(metrics("runs/pretrain", "valid_loss").values())[-1]
    run = here / "runs" / "pretrain"
    for name in ("best/model.safetensors", "last/trainer_state.pt", "curves.png", "samples.md", "tensorboard"):
        assert (run / name).exists(), name
    assert not list(run.glob("*.tmp")) + list(run.glob("*.old"))
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["config"]["steps"] == 60


def test_tensorboard_gets_it_all(here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain.main(config(eval_every=3))
    board = EventAccumulator(str(here / "runs/pretrain/tensorboard"), {"images": 0, "histograms": 0, "tensors": 0})
    board.Reload()
    logged = {e.step: e.value for e in board.Scalars("loss")}
    assert logged == pytest.approx(metrics("runs/pretrain", "loss"))
    histograms = board.Histograms("weights/blocks.0.attn.wq.weight")
    assert [h.step for h in histograms] == [3, 6]
    wq = weights("runs/pretrain/last")["model.layers.0.self_attn.q_proj.weight"]
    got = histograms[-1].histogram_value
    assert (got.num, got.min, got.max) == (wq.numel(), wq.min().item(), wq.max().item())
    assert board.Images("attention")[0].encoded_image_string.startswith(b"\x89PNG")
    text = board.Tensors("samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text in (here / "runs/pretrain/samples.md").read_text()


def test_weights_and_biases_gets_it_all(here, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    pretrain.main(config(eval_every=3, wandb="a-project"))
    assert wandb.run is None  # finished
    (folder,) = (here / "wandb").glob("offline-run-*")
    assert len(list((folder / "files/media/images").glob("attention_6_*.png"))) == 1
    assert len(list((folder / "files/media/html").glob("samples_*.html"))) == 2
    written = next(folder.glob("*.wandb")).read_bytes()
    for name in (b"a-project", b"grad_norm", b"valid_bits_per_byte", b"weights/blocks.0.attn.wq.weight"):
        assert name in written


def test_the_final_validation_loss_is_torchs_cross_entropy(here):
    pretrain.main(config())
    from support.checkpoints import open_checkpoint

    raw, tokenizer, _ = open_checkpoint("runs/pretrain/last")
    ids = torch.tensor(tokenizer.encode(TEXT[len(TEXT) * 9 // 10 :]))
    n = (len(ids) - 1) // 32
    x, y = ids[: n * 32].view(n, 32), ids[1 : n * 32 + 1].view(n, 32)
    expected = torch.nn.functional.cross_entropy(raw(x).flatten(0, 1), y.flatten()).item()
    assert metrics("runs/pretrain", "valid_loss")[6] == pytest.approx(expected, abs=1e-5)


def test_documents_are_validated_whole(here):
    """Each from the separator on, to its own end, whatever stands beside it; bits are counted over the text's bytes."""
    documents = [f"{a} + {b} = {a + b}" for a in range(9) for b in range(11)]
    raw = Transformer(TransformerConfig(vocab_size=300, **MODEL))
    separator, byte_lengths = 299, np.array([1] * 256 + [0] * 44)
    ids = [list(d.encode()) for d in documents]
    stream = np.concatenate([[*i, separator] for i in ids]).astype(np.uint16)
    total = 0.0
    for i in ids:
        x = torch.tensor([[separator, *i]])
        y = torch.tensor([*i, separator])
        total += torch.nn.functional.cross_entropy(raw(x)[0], y, reduction="sum").item()
    n_tokens, n_bytes = sum(len(i) + 1 for i in ids), sum(map(len, ids))
    dist = devices.Dist(0, 1, torch.device("cpu"))
    rows = validation_rows(ids, stream, 32, separator)
    got = validate(raw, rows, byte_lengths, dist, contextlib.nullcontext)
    assert got == pytest.approx((total / n_tokens, total / n_bytes / math.log(2)), rel=1e-5)
    halves = []  # two ranks, each with its own rows, add up to one
    for rank in range(2):
        half = devices.Dist(rank, 2, torch.device("cpu"))
        half.sum = lambda *values: halves.append(values) or values
        validate(raw, rows, byte_lengths, half, contextlib.nullcontext)
    assert halves[0][0] + halves[1][0] == pytest.approx(total, rel=1e-5)
    assert halves[0][1] + halves[1][1] == n_tokens
    few = validation_rows(ids, stream, 32, separator, most_tokens=100)
    assert 5 < len(few) < 20
    windows = validation_rows(ids, stream, 8, separator)  # the documents do not fit: the stream in windows
    assert [len(row) for row in windows] == [9] * ((len(stream) - 1) // 8)
    assert np.array_equal(np.concatenate([row[:-1] for row in windows]), stream[: 8 * len(windows)])


@pytest.mark.parametrize("numbers", [2**24, 33])  # all tokens at once, and 3 of the 10 in a chunk
def test_the_loss_against_torchs(monkeypatch, numbers):
    chunked = partial(transformer.target_logprobs, chunk_numbers=numbers)
    monkeypatch.setattr(transformer, "target_logprobs", chunked)
    raw = Transformer(TransformerConfig(vocab_size=11, **MODEL))
    x, y = torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 5))
    loss = next_token_loss(raw, x, y)
    expected = torch.nn.functional.cross_entropy(raw(x).flatten(0, 1), y.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(f, list(raw.parameters())) for f in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_recomputed_activations_change_nothing(here):
    model = TransformerConfig(**MODEL, dropout=0.2)
    pretrain.main(config(name="plain", model=model))
    pretrain.main(config(name="changed", model=model, recompute=True))
    for name in ("loss", "grad_norm", "valid_loss"):
        assert metrics("runs/plain", name) == pytest.approx(metrics("runs/changed", name), rel=1e-5), name


def test_what_is_logged(here):
    limit = 0.9
    pretrain.main(config(clip=limit, steps=20, lr=1e-2, schedule="wsd", floor=0.0))
    norms, clipped = metrics("runs/pretrain", "grad_norm"), metrics("runs/pretrain", "clipped")
    assert clipped == {step: float(norm > limit) for step, norm in norms.items()}
    assert 0 < sum(clipped.values()) < 20
    nats, bits = (metrics("runs/pretrain", f"valid_{x}")[20] for x in ("loss", "bits_per_byte"))
    assert bits == pytest.approx(nats / math.log(2))  # a character is a byte here
    assert metrics("runs/pretrain", "lr")[20] == pytest.approx(1e-2 / 4)
    speed, mfu = metrics("runs/pretrain", "tokens_per_second")[20], metrics("runs/pretrain", "mfu")[20]
    assert 0 < mfu < 1 < speed
    assert mfu == pytest.approx(
        metrics("runs/pretrain", "mfu")[10] * speed / metrics("runs/pretrain", "tokens_per_second")[10]
    )


def test_the_newest_checkpoints_are_kept(here):
    pretrain.main(config(save_every=1, keep=2))
    assert sorted(p.name for p in (here / "runs/pretrain").glob("step_*")) == ["step_0000005", "step_0000006"]
    assert_same_weights("runs/pretrain/last", "runs/pretrain/step_0000006")
    assert not torch.equal(*(weights(f"runs/pretrain/step_000000{i}")["model.norm.weight"] for i in (5, 6)))


def poison(monkeypatch, call):
    """The loss of the call-th micro-batch is NaN."""
    calls = itertools.count()

    def loss(*args):
        return plain(*args) * (math.nan if next(calls) == call else 1)

    plain = pretrain.next_token_loss
    monkeypatch.setattr(pretrain, "next_token_loss", loss)


def test_a_loss_that_is_not_finite_stops_the_run(here, monkeypatch):
    poison(monkeypatch, 4)
    with pytest.raises(
        ConfigError, match=r"the loss is nan.* at step 4 .*learning rate 2\.\de-03.*checkpoint: runs/pretrain/last"
    ):
        pretrain.main(config(save_every=2))
    assert all(w.isfinite().all() for w in weights("runs/pretrain/last").values())
    pretrain.main(config(save_every=2, resume=True))  # from step 4: the poison was spent
    pretrain.main(config(name="whole", save_every=2))
    assert_same_weights("runs/whole/last", "runs/pretrain/last")


def test_a_loss_that_is_not_finite_is_skipped_and_counted(here, monkeypatch, capsys):
    poison(monkeypatch, 4)
    pretrain.main(config(skip_nonfinite=True))
    assert metrics("runs/pretrain", "skipped") == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1}
    assert math.isfinite(metrics("runs/pretrain", "loss")[6])
    assert "1 steps skipped" in capsys.readouterr().out


def test_fp16_run_skips_what_overflowed_and_resumes_its_scale(here, monkeypatch):
    """On a CPU, autocast to fp16; the second step's gradient overflows, its loss does not."""

    def loss(*args):
        loss, scale = plain(*args), 1e38 if next(calls) == 1 else 1
        loss.register_hook(lambda gradient: gradient * scale)  # going back alone
        return loss

    calls, plain = itertools.count(), pretrain.next_token_loss
    monkeypatch.setattr(pretrain, "next_token_loss", loss)
    monkeypatch.setattr(pretrain, "draw_curves", lambda *args: None)
    whole = config(name="whole", dtype="fp16", save_every=1, keep=6)
    pretrain.main(whole)
    assert not math.isfinite(metrics("runs/whole", "grad_norm")[2])
    assert_same_weights("runs/whole/step_0000001", "runs/whole/step_0000002")
    scaler = torch.load("runs/whole/last/trainer_state.pt")["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (2.0**15, 4)  # from 2¹⁶, then four good steps
    shutil.copytree("runs/whole/step_0000004", "runs/parts/last")
    pretrain.main(replace(whole, name="parts", resume=True))
    assert torch.load("runs/parts/last/trainer_state.pt")["scaler"] == scaler
    assert_same_weights("runs/whole/last", "runs/parts/last")
    pretrain.main(config(name="plain", steps=1))
    assert metrics("runs/plain", "loss")[1] == pytest.approx(metrics("runs/whole", "loss")[1], rel=1e-3)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_keeps_the_checkpoint_before(here, monkeypatch, capsys, error):
    pretrain.main(config(name="three", steps=3))
    calls, plain = itertools.count(), torch.save

    def full(*args):
        if next(calls) > 0:
            Path(args[1]).write_bytes(b"half")
            raise error
        plain(*args)

    monkeypatch.setattr(torch, "save", full)
    pretrain.main(config(save_every=3))
    said = capsys.readouterr().out
    assert "runs/pretrain/last could not be written" in said
    assert str(error) in said
    assert torch.load("runs/pretrain/last/trainer_state.pt")["step"] == 3
    assert not list((here / "runs/pretrain").glob("*.tmp"))


def start(here, *changes, processes=0):
    command = [sys.executable, str(ROOT / "pretrain.py")]
    if processes:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--max-restarts=1"]
        command = [sys.executable, *launch, str(ROOT / "pretrain.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [str(x) for x in (*flags(steps=60, save_every=5, eval_every=30), *changes)]
    with open(here / "stderr.txt", "w") as said:  # a pipe that nobody reads would fill up and stop the process
        return subprocess.Popen(command, cwd=here, env=env, stdout=subprocess.DEVNULL, stderr=said)


def assert_ends_well(process, here, seconds=240):
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    assert process.wait() == 0, (here / "stderr.txt").read_text()[-3000:]


def until(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def test_killed_anywhere_and_resumed(here):
    """SIGKILL at a random step, and in the middle of writing a checkpoint; KILLS=10 tries more often."""
    assert_ends_well(start(here, "--name", "whole"), here)
    run, rng = here / "runs" / "parts", random.Random()
    for trial in range(int(os.environ.get("KILLS", 2))):
        shutil.rmtree(run, ignore_errors=True)
        process = start(here, "--name", "parts")
        after = rng.randint(6, 50)
        log = run / "metrics.jsonl"
        until(lambda: log.exists() and len(log.read_text().splitlines()) > after, process)  # noqa: B023
        if trial % 2:
            until((run / "last.tmp").exists, process)
        process.kill()
        process.wait()
        assert_ends_well(start(here, "--name", "parts", "--resume", "true"), here)
        assert_same_weights("runs/whole/last", "runs/parts/last")
        assert metrics("runs/whole", "loss") == metrics("runs/parts", "loss")


def test_a_killed_worker_is_started_again(here):
    assert_ends_well(start(here, "--name", "whole", processes=2), here)
    process, log = start(here, "--name", "parts", processes=2), here / "runs" / "parts" / "metrics.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) > 20, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(c) for c in children if "pretrain.py" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(workers[-1], signal.SIGKILL)
    assert_ends_well(process, here)
    assert_same_weights("runs/whole/last", "runs/parts/last")
    assert metrics("runs/whole", "loss") == metrics("runs/parts", "loss")
    assert not (here / "runs" / "parts.1").exists()  # resumed, not begun again


def test_samples_are_cut_back_to_the_step_that_is_resumed(here, monkeypatch):
    class KillAt4:
        def __init__(self, dist):
            self.asked = 0

        def __bool__(self):
            self.asked += 1
            if self.asked == 5:
                raise ProcessLookupError
            return False

    said = "a $b\n**step 9**\r\n<!-- step 9"  # it writes almost as we do
    monkeypatch.setattr(pretrain, "sample_text", lambda *_: said)
    changes = dict(save_every=2, eval_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "Interrupt", KillAt4)
        with pytest.raises(ProcessLookupError):
            pretrain.main(config(name="parts", **changes))
    samples = here / "runs/parts/samples.md"
    assert samples.read_bytes().count(said.encode()) == 4
    pretrain.main(config(name="parts", resume=True, **changes))
    pretrain.main(config(name="whole", **changes))
    assert samples.read_bytes() == (here / "runs/whole/samples.md").read_bytes()
    assert samples.read_bytes().count(said.encode()) == 6


def test_a_log_cut_in_the_middle_of_a_line(here):
    pretrain.main(config(save_every=3, steps=3))
    with open("runs/pretrain/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    pretrain.main(config(steps=6, resume=True))
    assert set(metrics("runs/pretrain", "loss")) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    ("changes", "word"), [({"batch": 7}, "evenly"), ({"data": "short.txt"}, "smaller --model.context")]
)
def test_bad_input_on_two_ranks_is_said_once_and_ends_both(here, changes, word):
    (here / "short.txt").write_text("too short. " * 9)
    process = script("pretrain.py", *flags(**changes), cwd=here, processes=2)
    assert process.returncode != 0
    assert [word in line for line in process.stderr.splitlines() if line.startswith("error: ")] == [True]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_cut_into_micro_batches_changes_nothing(here, optimizer):
    for name, size in (("whole", 8), ("cut", 3)):
        pretrain.main(config(name=name, micro_batch=size, optimizer=optimizer))
    a, b = metrics("runs/whole", "loss"), metrics("runs/cut", "loss")
    assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-5)
    assert metrics("runs/whole", "grad_norm")[1] == pytest.approx(metrics("runs/cut", "grad_norm")[1], rel=1e-5)


def test_two_processes_equal_one(here):
    one = script("pretrain.py", *flags(name="one"), cwd=here)
    two = script("pretrain.py", *flags(name="two", micro_batch=2), cwd=here, processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert "Warning" not in one.stderr + two.stderr
    for name in ("loss", "grad_norm", "valid_loss"):
        a, b = metrics("runs/one", name), metrics("runs/two", name)
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-5), name
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-5, rtol=1e-4)


def assert_same_moments(a, b):
    """The optimizers' states of two checkpoints, as plain tensors; what one has and the other lacks fails too."""
    a, b = (torch.load(f"{path}/trainer_state.pt", weights_only=True)["optimizers"] for path in (a, b))
    torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


ODD = dict(n_layer=2, n_head=1, width=18, ffn_width=31)  # two ranks do not get as many rows of each matrix
SHARDED = {  # what FSDP is tried with; the mixture is of three experts, balanced by biases that no optimizer sees
    "adamw": dict(optimizer="adamw", model=ODD),
    "muon": dict(optimizer="muon", model=ODD),
    "mixture": dict(recompute=True, bias_rate=0.01, model=ODD | dict(n_expert=3, expert_width=15, balancing="bias")),
    "bf16": dict(dtype="bf16", optimizer="adamw", model=ODD),
}


def sharded_case(case, **changes):
    changes = dict(data="longer.txt", dtype="fp32", save_every=2, keep=3, clip=0.5) | SHARDED[case] | changes
    return config(**changes | dict(model=TransformerConfig(**MODEL | changes["model"])))


def run_sharded():
    """What each of two ranks does: all cases, and the first two again from step 4, with FSDP and without."""
    pretrain.draw = lambda *args: None  # the pictures are the most of a short run's time
    dist = devices.setup("cpu")
    for case in SHARDED:
        done = sharded_case(case, name=f"{case}/two", micro_batch=3, fsdp=True)  # 4 windows a rank, in two parts
        pretrain.main(done)
        for fsdp in (True, False) if case in ("adamw", "muon") else ():
            if dist.is_main:
                shutil.copytree(f"runs/{case}/two/step_0000004", f"runs/{case}/two-{fsdp}/last")
            torch.distributed.barrier()
            pretrain.main(replace(done, name=f"{case}/two-{fsdp}", fsdp=fsdp, resume=True))


def assert_same_checkpoint(one, two, atol):
    assert_same_weights(one, two, atol=atol, rtol=0)
    one, two = (torch.load(f"{path}/trainer_state.pt", weights_only=True)["optimizers"] for path in (one, two))
    torch.testing.assert_close(two, one, atol=atol, rtol=0)  # moments are plain tensors, in the same places


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


def test_auto_is_bf16_where_the_processor_has_units_for_it(monkeypatch):
    dist = devices.Dist(0, 1, torch.device("cpu"))
    for amx, kind in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        autocast, scaler = devices.precision("auto", dist)
        with autocast():
            assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == kind
        assert not scaler.is_enabled()


def test_sharded_equals_one_process(here, monkeypatch):
    """FSDP: losses, norms, validation, samples, weights and moments are those of one process with the same batch."""
    (here / "longer.txt").write_text((TEXT * 2)[:10_700])  # 33 windows to validate: one more pass for rank 0
    (here / "ranks.py").write_text(
        f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
        "from test_pretrain import run_sharded\nrun_sharded()\n"
    )
    process = script(here / "ranks.py", cwd=here, processes=2)
    assert process.returncode == 0, process.stderr
    monkeypatch.setattr(pretrain, "draw", lambda *args: None)
    for case in SHARDED:
        pretrain.main(sharded_case(case, name=f"{case}/one"))
        near = 0.01 if case == "bf16" else 1e-5  # autocast leaves gains in fp32, FSDP gathers them in bf16
        for name in ("loss", "grad_norm", "valid_loss"):
            one, two = (list(metrics(f"runs/{case}/{x}", name).values()) for x in ("one", "two"))
            assert one == pytest.approx(two, rel=near), (case, name)
        assert set(metrics(f"runs/{case}/two", "clipped").values()) == {1.0}
        for step in (2, 4, 6):
            assert_same_checkpoint(*(f"runs/{case}/{x}/step_000000{step}" for x in ("one", "two")), near)
        assert all(w.dtype == torch.float32 for w in weights(f"runs/{case}/two/last").values())
    for case in ("adamw", "muon"):
        for again in ("two-True", "two-False"):
            assert set(metrics(f"runs/{case}/{again}", "loss")) == {5, 6}
            assert_same_checkpoint(f"runs/{case}/one/last", f"runs/{case}/{again}/last", 1e-5)
        one, two = (Path(f"runs/{case}/{x}/samples.md").read_text() for x in ("one", "two"))
        assert one == two
    assert weights("runs/mixture/two/last")["blocks.0.ffn.selection_bias"].abs().max() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "torchrun"), ({"compile": True}, "--compile do not"), ({"dtype": "fp16"}, "bf16 or fp32")],
)
def test_what_sharding_refuses(here, changes, message, monkeypatch):
    if changes:
        monkeypatch.setattr(pretrain, "setup", lambda _: devices.Dist(0, 2, torch.device("cpu")))
        monkeypatch.setattr(pretrain, "restarted", lambda *_: False)  # it would ask the other process
    with pytest.raises(ConfigError, match=f"^--fsdp.*{message}"):
        pretrain.main(config(fsdp=True, **changes))
    assert not (here / "runs").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(here, optimizer, monkeypatch):
    changes = dict(optimizer=optimizer, save_every=3, model=TransformerConfig(**MODEL, dropout=0.2))
    pretrain.main(config(name="whole", **changes))

    class StopAt3:  # what Ctrl-C does: the loop asks at its top
        def __init__(self, dist):
            self.asked = 0

        def __bool__(self):
            self.asked += 1
            return self.asked == 4

    with monkeypatch.context() as patch:
        patch.setattr(runs, "Interrupt", StopAt3)
        with pytest.raises(SystemExit):
            pretrain.main(config(name="parts", **changes))
    assert set(metrics("runs/parts", "loss")) == {1, 2, 3}
    pretrain.main(config(name="parts", resume=True, **changes))
    assert metrics("runs/whole", "loss") == metrics("runs/parts", "loss")
    assert_same_weights("runs/whole/last", "runs/parts/last")
    assert_same_weights("runs/whole/best", "runs/parts/best")


@pytest.mark.parametrize("name", ["lr", "weight_decay", "warmup", "clip", "seed"])
def test_rates_below_0_are_refused(name):
    with pytest.raises(ConfigError, match=f"--{name} is -1"):
        Config(**{name: -1})


def test_ctrl_c_in_the_loop_and_behind_it():
    """In the loop the first one is only noted; behind it it ends the program, as does one that nobody saw."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before, dist = [signal.getsignal(number) for number in numbers], devices.setup("cpu")
    try:
        interrupt = runs.Interrupt(dist)
        assert not interrupt
        signal.raise_signal(signal.SIGTERM)
        assert interrupt
        with pytest.raises(KeyboardInterrupt):
            interrupt.release()
        runs.Interrupt(dist).release()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_what_is_said_when_it_stops(capsys):
    dist = devices.setup("cpu")
    for name, written, word in [
        ("mine", True, "saved; add --resume true"),
        ("mine", False, "but not saved"),
        ("start/word-seed0-sft", True, "makes this start anew"),
    ]:
        with pytest.raises(SystemExit) as stop:
            runs.stopped(name, 3, written, dist)
        assert stop.value.code == 130
        assert word in capsys.readouterr().out


def test_a_restart_adopts_only_a_run_of_its_own_launch(here, monkeypatch, capsys):
    first = pretrain.main(config(steps=4, save_every=2))
    assert pretrain.main(config(steps=4, save_every=2, resume=True)) == first  # nothing left to do: the same figures
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    dist = devices.setup("cpu")
    assert runs.restarted(config(), dist)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not runs.restarted(config(), dist)
    (here / "runs/pretrain/launcher").write_text("another")  # though its process may be another: rank 0 can move
    assert runs.restarted(config(), dist)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not runs.restarted(config(), dist)
    monkeypatch.setattr(devices.Dist, "sum", lambda self, *values: [v + (i == 0) for i, v in enumerate(values)])
    assert runs.restarted(config(), dist)  # another node counted a restart


def test_the_stream_is_made_once(here, monkeypatch):
    pretrain.main(config(name="first"))
    monkeypatch.setattr(streams, "write_stream", None)
    pretrain.main(config(name="second"))
    assert metrics("runs/first", "loss") == metrics("runs/second", "loss")
    assert len(list((here / "runs/streams").glob("*.bin"))) == 2  # training and validation


def test_an_earlier_run_is_moved_aside(here):
    pretrain.main(config(steps=1))
    with pytest.raises(ConfigError, match="the run that --name pretrain would move aside"):
        pretrain.main(config(steps=2, init="runs/pretrain"))
    with pytest.raises(ConfigError, match="--tokenizer runs/pretrain/best is the run that --name pretrain would"):
        pretrain.main(config(steps=2, tokenizer="runs/pretrain/best"))
    pretrain.main(config(steps=2))
    assert set(metrics("runs/pretrain.1", "loss")) == {1}
    assert set(metrics("runs/pretrain", "loss")) == {1, 2}


def test_a_run_under_way_is_left_alone(here):
    """Another process's run is not moved from under its feet, nor written into; once that has ended, it is as any."""
    pretrain.main(config(steps=1))
    before = (here / "runs/pretrain/metrics.jsonl").read_bytes()
    other = os.open("runs/pretrain", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # our own run let go of it when it ended, or this would raise
    for changes in ({}, {"resume": True, "steps": 2}):
        with pytest.raises(ConfigError, match=r"runs/pretrain is being written by another process; give .* --name"):
            pretrain.main(config(steps=1) if not changes else config(**changes))
    assert (here / "runs/pretrain/metrics.jsonl").read_bytes() == before
    os.close(other)
    seen = []

    class Log(log.Log):
        def __call__(self, step, **record):
            with contextlib.suppress(BlockingIOError):  # a lock is held while the run is under way
                fcntl.flock(os.open(self.run_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
                seen.append(step)
            super().__call__(step, **record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "Log", Log)
        pretrain.main(config(steps=1))
    assert not seen
    assert (here / "runs/pretrain.1/metrics.jsonl").read_bytes() == before


def test_continuing_from_a_checkpoint_takes_its_architecture(here):
    pretrain.main(config(name="first"))
    pretrain.main(config(name="second", init="runs/first", steps=1, model=TransformerConfig()))
    assert metrics("runs/second", "loss")[1] < metrics("runs/first", "loss")[1]


def test_bad_input_is_one_line_and_leaves_nothing(here):
    (here / "empty.txt").write_text("")
    cases = [
        (["--data", "missing.txt"], "missing.txt"),
        (["--data", "empty.txt"], "empty.txt"),
        (["--stepz", "3"], "stepz"),
        (["--steps", "many"], "steps"),
        (["--model.n_head", "5"], "5"),
    ]
    for extra, word in cases:
        assert_one_line_error(script("pretrain.py", *flags(), *extra, cwd=here), word)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"optimizer": "sgd"}, "sgd"),
        ({"dtype": "int8"}, "int8"),
        ({"device": "abacus"}, "abacus"),
        ({"resume": True}, "no saved run"),
        *[({"name": name}, "a run's directory") for name in ("../x", ".", "/x", "a/./b", "start", "streams")],
        *[({"name": f"pretrain/metrics.jsonl/{x}"}, "metrics.jsonl is a file") for x in ("x", "x/y")],
        ({"wandb": "project"}, "pip install wandb"),
        ({"tokenizer": "bytes"}, "bytes"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"floor": -1.0}, "floor is -1.0"),
        ({"model": TransformerConfig(n_expert=4, n_expert_active=1)}, "norm_topk_prob false"),
        ({"model": TransformerConfig(context=4096)}, "smaller --model.context"),
        ({"model": TransformerConfig(context=1)}, "model.context is 1"),
        ({"model": TransformerConfig(vocab_size=5000)}, "use --vocab_size"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size 100 is too small"),
        ({"tokenizer": "char", "data": "odd.txt"}, "character 'ß' at position"),
    ],
)
def test_bad_settings(here, changes, message, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)  # wandb is not there
    (here / "odd.txt").write_text(TEXT + "ß")  # the ß is in the validation part alone
    earlier = here / "runs/pretrain/metrics.jsonl"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    with pytest.raises((ConfigError, TokenizerError), match=message):
        pretrain.main(config(**changes))
    assert earlier.exists()  # a typo moves no earlier run aside


def test_the_best_is_chosen_on_the_same_rows_each_time(here, monkeypatch):
    """The last evaluation reads all of the text, which may be easier; that is no reason to call it the best."""
    losses = iter([(3.0, 1.0), (3.5, 1.0), (2.0, 1.0)])  # the part at step 2, the part at 4, the whole at 4
    monkeypatch.setattr(pretrain, "validate", lambda *_: next(losses))
    result = pretrain.main(config(steps=4, eval_every=2))
    assert result["valid_loss"] == 2.0
    assert list(metrics("runs/pretrain", "valid_loss").values()) == [3.0, 2.0]
    best, last = (weights(f"runs/pretrain/{name}") for name in ("best", "last"))
    assert any(not torch.equal(best[k], last[k]) for k in best)


def test_tokens_that_look_like_formulas_are_drawn(here):
    tokenizer = CharTokenizer.train(["a$ b"])
    raw = Transformer(TransformerConfig(**MODEL | {"vocab_size": tokenizer.vocab_size}))
    tokenizer.decode = lambda ids: "$$"
    plots.draw_attention(here, raw, tokenizer, "a$ b$ a")
    assert (here / "attention.png").stat().st_size > 5000


def test_a_machine_without_git_trains_too(here, monkeypatch):
    monkeypatch.setenv("PATH", "")
    pretrain.main(config(steps=1))
    assert json.loads((here / "runs/pretrain/metrics.jsonl").read_text().splitlines()[0])["commit"] == ""


def test_resume_refuses_another_recipe_and_a_corrupt_state(here):
    pretrain.main(config())
    with pytest.raises(ConfigError, match="has done 6 steps already, more than the 2 asked for"):
        pretrain.main(config(resume=True, steps=2))
    with pytest.raises(ConfigError, match=r"lr 0\.004 -> 0\.1"):
        pretrain.main(config(resume=True, lr=0.1))
    text = (here / "text.txt").read_text()
    (here / "text.txt").write_text(text.replace("plus", "slup", 1))
    with pytest.raises(ConfigError, match=r"the text of --data text\.txt has changed"):
        pretrain.main(config(resume=True))
    (here / "text.txt").write_text(text)
    (here / "runs/pretrain/last/trainer_state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="corrupt"):
        pretrain.main(config(resume=True))


def test_a_run_with_an_option_that_is_gone_resumes_if_it_made_no_difference(here):
    pretrain.main(config(steps=3))
    path = here / "runs/pretrain/last/trainer_state.pt"
    state = torch.load(path)
    for value in (1e-4, 0.0):
        torch.save(state | {"config": state["config"] | {"z_loss": value}}, path)
        if value:
            with pytest.raises(ConfigError, match=r"made with z_loss 0\.0001, which this version no longer has"):
                pretrain.main(config(resume=True))
    pretrain.main(config(resume=True))
    assert set(metrics("runs/pretrain", "loss")) == {1, 2, 3, 4, 5, 6}


def test_rank_0_makes_it_for_all(monkeypatch):
    def broadcast(box):  # rank 0 comes first
        sent.extend(box if not sent else [])
        box[:] = sent

    sent, calls = [], []
    monkeypatch.setattr(devices.distributed, "broadcast_object_list", broadcast)
    ranks = [devices.Dist(rank, 2, torch.device("cpu")) for rank in range(2)]
    assert [dist.from_main(lambda rank=dist.rank: calls.append(rank) or "made") for dist in ranks] == ["made"] * 2
    assert calls == [0]
