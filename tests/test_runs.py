"""support/runs.py: what is saved, kept, moved aside and resumed; kills, Ctrl-C, locks."""

import contextlib
import errno
import fcntl
import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_same_weights, metrics, weights
from tiny import MODEL, SMALL, config, flags

import pretrain
from pretrain import Config
from support import devices, locks, log, runs
from support.cli import parse_config
from support.errors import CheckpointError, ConfigError, DivergedError
from support.launch import join
from support.runs import Run
from transformer import TransformerConfig


def test_the_newest_checkpoints_are_kept(here):
    pretrain.main(config(save_every=1, keep=2))
    assert sorted(p.name for p in (here / "runs/pretrain").glob("step_*")) == ["step_0000005", "step_0000006"]
    assert_same_weights("runs/pretrain/last", "runs/pretrain/step_0000006")
    assert not torch.equal(*(weights(f"runs/pretrain/step_000000{i}")["model.norm.weight"] for i in (5, 6)))


def test_copies_of_later_steps_do_not_push_a_new_one_out(tmp_path):
    """They are there where a run returned to an earlier checkpoint."""
    for name in ("last", "step_0000003", "step_0000006"):
        (tmp_path / name).mkdir()
    runs.keep_copy(tmp_path, 4, 1)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_0000004", "step_0000006"]


def test_after_a_return_best_is_not_of_the_branch_that_was_left(here, monkeypatch, capsys):
    """configs/tinystories_50m.yaml says how one returns."""
    losses = iter([5.0, 4.0, 1.0, 1.0, 6.0, 6.0])  # of steps 2, 4 and 6; then of another step 4; the last one twice
    monkeypatch.setattr("support.pretrain_report.validate", lambda *_: (next(losses), 1.0))
    pretrain.main(config(eval_every=2, save_every=2, keep=3))
    shutil.rmtree("runs/pretrain/last")
    shutil.copytree("runs/pretrain/step_0000002", "runs/pretrain/last")
    pretrain.main(config(eval_every=2, save_every=2, keep=3, steps=4, resume=True))
    assert_same_weights("runs/pretrain/best", "runs/pretrain/last")
    assert_same_weights("runs/pretrain/best_0000006", "runs/pretrain/step_0000006")
    assert "runs/pretrain/best is of step 6" in capsys.readouterr().out
    shutil.rmtree("runs/pretrain/best")
    again = pretrain.main(config(eval_every=2, save_every=2, keep=3, steps=4, resume=True))  # no step is left
    assert again["path"] == "runs/pretrain/last"


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
    with open(
        here / "stderr.txt", "w", encoding="utf-8"
    ) as said:  # a pipe that nobody reads would fill up and stop the process
        return subprocess.Popen(command, cwd=here, env=env, stdout=subprocess.DEVNULL, stderr=said)


def assert_ends_well(process, here, seconds=240):
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    assert process.wait() == 0, (here / "stderr.txt").read_text(encoding="utf-8")[-3000:]


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
        until(lambda: log.exists() and len(log.read_text(encoding="utf-8").splitlines()) > after, process)  # noqa: B023
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
    until(lambda: log.exists() and len(log.read_text(encoding="utf-8").splitlines()) > 20, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    workers = [int(c) for c in children if "pretrain.py" in Path(f"/proc/{c}/cmdline").read_text(encoding="utf-8")]
    os.kill(workers[-1], signal.SIGKILL)
    assert_ends_well(process, here)
    assert_same_weights("runs/whole/last", "runs/parts/last")
    assert metrics("runs/whole", "loss") == metrics("runs/parts", "loss")
    assert not (here / "runs" / "parts.1").exists()  # resumed, not begun again


@pytest.mark.parametrize("name", ["lr", "weight_decay", "warmup", "clip", "seed"])
def test_rates_below_0_are_refused(name):
    with pytest.raises(ConfigError, match=f"--{name} is -1"):
        Config(**{name: -1})


@pytest.mark.parametrize("name", ["init", "data", "name"])
def test_an_empty_text_is_refused(name):
    """--init "$CHECKPOINT" where the shell does not have the variable: no start is trained in its place."""
    with pytest.raises(ConfigError, match=f"--{name} is empty: give it a value, or leave it out"):
        parse_config(Config, [f"--{name}", ""])


@pytest.mark.parametrize("name", ["a/last", "a/best/b"])
def test_a_run_is_no_checkpoint_of_another(name):
    with pytest.raises(ConfigError, match="is a run's checkpoint; give another --name"):
        runs.run_path(config(name=name))


def test_ctrl_c_in_the_loop_and_after_it():
    """In the loop the first one is only noted; after the loop it ends the program, as does one that nobody saw."""
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


@pytest.mark.parametrize("lower", [True, False])
def test_the_best_is_the_first_of_equals_and_the_last_step_is_always_due(lower):
    kept, sign = [], -1 if lower else 1
    config = SimpleNamespace(steps=7)
    run = SimpleNamespace(state=SimpleNamespace(best=sign * -9.0), lower_is_better=lower, config=config)
    run.save = lambda name: kept.append(run.value) or run.value != sign * 3.0  # the disk is full once
    for run.value in [sign * x for x in (1.0, 1.0, 0.5, 3.0, 2.0, 2.0, -4.0)]:
        Run.keep_best(run, run.value)
    assert kept == [sign * x for x in (1.0, 3.0, 2.0)]
    steps = [run.done + 1 for run.done in range(7) if Run.due(run, 3)]
    assert steps == [3, 6, 7]


def test_what_is_said_when_it_stops(capsys):
    dist = devices.setup("cpu")
    for name, written, word in [
        ("mine", True, "saved; add --resume true"),
        ("mine", False, "but not saved"),
        ("start/word-seed0-sft", True, "trains this start again"),
    ]:
        with pytest.raises(SystemExit) as stop:
            runs.exit_stopped(name, 3, written, dist)
        assert stop.value.code == 130
        assert word in capsys.readouterr().out


def test_a_restart_adopts_only_a_run_of_its_own_launch(here, monkeypatch, capsys):
    first = pretrain.main(config(steps=4, save_every=2))
    assert pretrain.main(config(steps=4, save_every=2, resume=True)) == first  # nothing left to do: the same figures
    assert not join(config()).resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    dist = devices.setup("cpu")
    assert runs.restarted(config(), dist)
    assert join(config()).resume  # with one process too
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not runs.restarted(config(), dist)
    (here / "runs/pretrain/launcher").write_text(
        "another", encoding="utf-8"
    )  # though its process may be another: rank 0 can move
    assert runs.restarted(config(), dist)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not runs.restarted(config(), dist)
    monkeypatch.setattr(devices.Dist, "sum", lambda self, *values: [v + (i == 0) for i, v in enumerate(values)])
    assert runs.restarted(config(), dist)  # another node counted a restart


def test_a_run_goes_on_where_dtype_auto_is_fp16(here, monkeypatch):
    pretrain.main(config(steps=2, dtype="auto"))
    monkeypatch.setattr(devices, "auto_dtype", lambda device: "fp16")
    pretrain.main(config(steps=3, dtype="auto", resume=True))  # the scaler, of which nothing was saved, begins anew
    assert list(metrics("runs/pretrain", "loss")) == [1, 2, 3]


def test_an_earlier_run_is_moved_aside(here):
    pretrain.main(config(steps=1))
    with pytest.raises(ConfigError, match="the run that --name pretrain would move aside"):
        pretrain.main(config(steps=2, init="runs/pretrain"))
    with pytest.raises(ConfigError, match="--tokenizer runs/pretrain/best is in the run that --name pretrain would"):
        pretrain.main(config(steps=2, tokenizer="runs/pretrain/best"))
    for flag, path in [("teach", "runs/one"), ("data", "runs/one/a.jsonl"), ("text", ["reviews", "runs/one/a.txt"])]:
        with pytest.raises(ConfigError, match=f"--{flag} runs/one.* is (in )?the run that --name one would move"):
            runs.run_path(SimpleNamespace(**{"name": "one", "resume": False, flag: path}))
    pretrain.main(config(steps=2))
    assert set(metrics("runs/pretrain.1", "loss")) == {1}
    assert set(metrics("runs/pretrain", "loss")) == {1, 2}


def test_a_run_under_way_is_left_alone(here):
    """Another process's run is not moved from under its feet, nor written into; once that has ended, it is as any."""
    pretrain.main(config(steps=1))
    with pytest.raises(BlockingIOError):  # our own run is still read and drawn in: in a script, to the process's end
        fcntl.flock(os.open("runs/pretrain", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    runs.Run.close_log()
    before = (here / "runs/pretrain/metrics.jsonl").read_bytes()
    other = os.open("runs/pretrain", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def test_what_changed_since_a_run_was_saved():
    """An option that it did not have has its default, one of the model's too."""
    defaults = {"lr": 0.1, "new": 1, "model": {"width": 64, "newer": None}, "texts": ["a"]}
    assert runs.filled(defaults, {"lr": 0.2, "model": {"width": 32}}) == {
        "lr": 0.2,
        "new": 1,
        "model": {"width": 32, "newer": None},
        "texts": ["a"],
    }
    assert runs.changes_of("lr", 0.1, 0.1) == []
    assert runs.changes_of("lr", 0.1, 0.2) == ["lr 0.1 -> 0.2"]
    old, new = {"width": 32, "newer": None, "rope": None}, {"width": 64, "newer": None, "rope": {"factor": 2}}
    assert runs.changes_of("model", old, new) == ["model.width 32 -> 64", "model.rope None -> {'factor': 2}"]


def test_a_run_without_an_option_of_the_model_goes_on(here):
    """An older version had no such option."""
    pretrain.main(config(steps=2))
    path = here / "runs/pretrain/last/trainer_state.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["model"]["dropout"]
    torch.save(state, path)
    different = TransformerConfig(**MODEL | {"dropout": 0.5})
    with pytest.raises(ConfigError, match=r"but this changed: model\.dropout 0\.0 -> 0\.5"):
        pretrain.main(config(resume=True, model=different))
    pretrain.main(config(resume=True))


def test_all_ranks_raise_at_a_loss_that_is_not_finite(here):
    with pytest.raises(DivergedError) as error:
        pretrain.main(config(lr=1e38, steps=3, warmup=0))
    assert error.value.on_all_ranks


def test_ctrl_c_in_the_step_in_which_a_run_diverges_is_not_lost(here):
    run = SimpleNamespace(is_finite=lambda *_: False, bar=SimpleNamespace(close=lambda: None), close_log=lambda: None)
    usual = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run.interrupt = runs.Interrupt(devices.setup("cpu"))
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            Run.check_finite(run, 0.1, loss=math.nan)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), usual, strict=True):
            signal.signal(number, handler)


def test_a_sweep_under_way_is_left_alone(here):
    pretrain.main(config(steps=1))
    pretrain.main(config(steps=1, name="pretrain/lr0.1"))
    runs.Run.close_log()
    other = os.open("runs/pretrain/lr0.1", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(ConfigError, match=r"runs/pretrain/lr0.1 is being written by another process; give .* --name"):
        pretrain.main(config(steps=1))
    assert not (here / "runs/pretrain.1").exists()
    os.close(other)
    assert not locks.LOCKED
    pretrain.main(config(steps=1))
    assert (here / "runs/pretrain.1/lr0.1/last").is_dir()


def test_a_lock_on_what_another_process_has_moved_aside_is_none(here, monkeypatch):
    pretrain.main(config(steps=1))
    runs.Run.close_log()

    def flock(_, how):
        if how & fcntl.LOCK_NB:  # of a run's directory
            (here / "runs/pretrain").rename(here / "runs/pretrain.1")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="runs/pretrain is being written by another process"):
        pretrain.main(config(steps=1))
    assert (here / "runs/pretrain.1/metrics.jsonl").is_file()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
def test_without_locks_everything_goes_on(here, monkeypatch, error):
    """As on some network file systems, where flock answers one of these."""

    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    pretrain.main(config(steps=1))  # locks the run, and the folder of its streams
    settings = SMALL | {"data": "text.txt", "model": TransformerConfig(**MODEL), "steps": 1}
    runs.make_start_once("start/one", "making", pretrain, settings, devices.setup("cpu"))
    assert (here / "runs/start/one/finished").is_file()
    assert runs.STARTS["runs/start/one"] == (here / "runs/start/one/commit").read_text(encoding="utf-8") != ""


def test_resume_refuses_another_recipe_and_a_corrupt_state(here):
    pretrain.main(config())
    with pytest.raises(ConfigError, match="has done 6 steps already, more than the 2 asked for"):
        pretrain.main(config(resume=True, steps=2))
    with pytest.raises(ConfigError, match=r"lr 0\.004 -> 0\.1"):
        pretrain.main(config(resume=True, lr=0.1))
    text = (here / "text.txt").read_text(encoding="utf-8")
    (here / "text.txt").write_text(text.replace("plus", "slup", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the text of --data text\.txt has changed"):
        pretrain.main(config(resume=True))
    (here / "text.txt").write_text(text, encoding="utf-8")
    file = here / "runs/pretrain/last/trainer_state.pt"
    state = torch.load(file, weights_only=True)
    moments = state["optimizers"][0]["state"]
    key, (name, tensor) = next((key, item) for key, of in moments.items() for item in of.items() if item[1].dim())
    tensor.view(-1)[3] = math.nan
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=rf"trainer_state\.pt: optimizers\.0\.state\.{key}\.{name} has 1 of"):
        pretrain.main(config(resume=True))
    for content in (b"not a checkpoint", b""):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"trainer_state\.pt is corrupt: \w"):
            pretrain.main(config(resume=True))
    torch.save({"step": 1}, file)  # of another program
    with pytest.raises(CheckpointError, match=r"trainer_state\.pt is corrupt: it lacks 'config'"):
        pretrain.main(config(resume=True))


def test_a_run_with_an_option_that_is_gone(here):
    pretrain.main(config(steps=3))
    path = here / "runs/pretrain/last/trainer_state.pt"
    state = torch.load(path)
    torch.save(state | {"config": state["config"] | {"z_loss": 1e-4}}, path)
    with pytest.raises(ConfigError, match=r"made with z_loss 0\.0001, which this version no longer has"):
        pretrain.main(config(resume=True))
