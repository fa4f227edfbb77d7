"""Shared by the tests: a scratch directory to run in, and the scripts started as a user starts them."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch

from optim import lr_at
from support import runs
from support.devices import precision
from support.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # the tensors are small, and other tests run on the other cores
hypothesis.settings.register_profile("no deadline", deadline=None)  # a test may be slow on a busy machine
hypothesis.settings.load_profile("no deadline")


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A temporary directory as the current one, because runs/ is relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(scratch):
    """`scratch`, with the text file that tests/tiny.py trains on."""
    from tiny import TEXT  # imported here: it imports a stage, which most test files do not need

    (scratch / "text.txt").write_text(TEXT, encoding="utf-8")
    return scratch


@pytest.fixture(scope="session")
def tokenizer():
    """A small BPE tokenizer of word problems."""
    from data import load_problems  # imported here: most test files need neither
    from tokenizer_bpe import BPETokenizer

    return BPETokenizer.train([p.question + p.solution for p in load_problems("word", "train", 200)], 400)


@pytest.fixture(autouse=True)
def fp32_on_every_cpu(monkeypatch):
    """--dtype auto means fp32 in the tests on every CPU, so that results compared for equality are rounded the same
    way."""
    cpu_without_bf16(monkeypatch)


def cpu_without_bf16(patch):
    for unit in ("amx_tile", "avx512_bf16"):
        patch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: False, raising=False)


def flags_of(settings):
    """{name: value} as the flags of a script."""
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def script(name, *flags, cwd, processes=1, torchrun=False, timeout=240):
    """Run a script as a user does; returns the finished process. processes > 1: with what torchrun gives each of them,
    or torchrun itself, which takes 2 seconds more. Training scripts get --dtype=fp32 unless a flag sets another (see
    `fp32_on_every_cpu`)."""
    trains = Path(name).stem in (
        "pretrain",
        "encoder",
        "sft",
        "reward_model",
        "dpo",
        "ppo",
        "grpo",
        "gdpo",
        "rejection",
        "distill",
        "agent",
    )
    if trains and not any(str(flag).startswith("--dtype") for flag in flags):
        flags = [*flags, "--dtype=fp32"]
    command, env = [str(ROOT / name), *map(str, flags)], os.environ | {"OMP_NUM_THREADS": "1"}
    if processes > 1 and not torchrun:
        return ranks([sys.executable, *command], processes, cwd, env, timeout)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if torchrun else []
    command = [sys.executable, *launcher, *command]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def ranks(command, n, cwd, env, timeout):
    """n processes with the environment that torchrun gives them on one node. Killed at the timeout, or 5 seconds after
    one has failed. Returned as one: what all have written, and the status of one that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
    ):
        processes = [
            subprocess.Popen(
                command, cwd=cwd, env=env | {"RANK": str(i), "LOCAL_RANK": str(i)}, stdout=out, stderr=err, text=True
            )
            for i in range(n)
        ]
        end = time.monotonic() + timeout
        while any(p.poll() is None for p in processes):
            if any(p.returncode for p in processes):
                end = min(end, time.monotonic() + 5)
            if time.monotonic() > end:
                for p in processes:
                    p.kill()
            time.sleep(0.02)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    status = next((p.returncode for p in processes if p.returncode > 0), min(p.returncode for p in processes))
    return subprocess.CompletedProcess(command, status, *texts)


def metrics(run_dir, name):
    """{step: value} of a metric."""
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {r["step"]: r[name] for r in records if name in r}


def assert_same_metrics(one, two, names, **tolerance):
    """Two runs have logged each of these metrics, at the same steps: the same numbers, or with a tolerance (as
    pytest.approx has it) near ones."""
    for name in names:
        a, b = metrics(one, name), metrics(two, name)
        assert a, f"{one} has no {name}"
        assert a == (pytest.approx(b, **tolerance) if tolerance else b), name


@contextlib.contextmanager
def stopped_after(steps):
    """The run in this block is stopped after so many steps, as by Ctrl-C: its loop asks at the top of each."""
    asked = itertools.count()
    stop = type("Stop", (), {"__init__": lambda self, dist: None, "__bool__": lambda self: next(asked) == steps})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "Interrupt", stop)
        with pytest.raises(SystemExit):
            yield


@contextlib.contextmanager
def resumed_at(step):
    """The run in this block goes on after so many steps. Begun anew it would end alike too."""
    first, steps = [], runs.Run.steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "steps", lambda run, *total: first.append(run.first) or steps(run, *total))
        yield
    assert first == [step]


def assert_resumed_equals_whole(stage, config, stop, names, **changes):
    """A run of `stage` that is stopped after `stop` steps and resumed has the metrics and the weights of one that is
    not stopped, bit for bit. config(**changes) -> its settings. Returns what main returned: of the whole, of the
    resumed."""

    def seconds():
        return torch.load("runs/parts/last/trainer_state.pt", weights_only=True)["seconds"]

    whole = stage.main(config(name="whole", **changes))
    with stopped_after(stop):
        stage.main(config(name="parts", **changes))
    before = seconds()
    with resumed_at(stop):
        parts = stage.main(config(name="parts", resume=True, **changes))
    assert seconds() > before > 0  # the time before the stop counts
    assert_same_metrics("runs/whole", "runs/parts", names)
    assert_same_weights("runs/whole/last", "runs/parts/last")
    return whole, parts


def assert_the_start_is_kept(stage, config, run_dir, monkeypatch):
    """Stop a run of `stage` before its first step and resume it: it still has the accuracy of step 0."""
    with monkeypatch.context() as patch:
        patch.setattr(stage if hasattr(stage, "Interrupt") else runs, "Interrupt", lambda dist: True)
        with pytest.raises(SystemExit):
            stage.main(config())
    start = metrics(run_dir, "accuracy")
    stage.main(config(resume=True))
    assert metrics(run_dir, "accuracy").items() >= start.items()
    assert list(start) == [0]


class Step(NamedTuple):
    """What an optimizer step was given; decays, betas: those of its groups; new: no step came before it."""

    lr: float
    clip: float
    decays: set
    betas: set
    new: bool


@pytest.fixture
def steps_of(monkeypatch):
    """steps_of(stage) -> a list that fills with a Step for each call of the stage's optimizer_step."""

    def watch(stage):
        seen, step = [], stage.optimizer_step

        def watched(model, optimizers, scaler, autocast, lr, clip):
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            decays = {group["weight_decay"] for group in groups}
            betas = {group["betas"] for group in groups if "betas" in group}  # Muon has none
            seen.append(Step(lr, clip, decays, betas, not any(optimizer.state for optimizer in optimizers)))
            return step(model, optimizers, scaler, autocast, lr, clip)

        monkeypatch.setattr(stage, "optimizer_step", watched)
        return seen

    return watch


@pytest.fixture
def scaled(monkeypatch):
    """scaled(module): the stage that takes `precision` from this module gets a gradient scaler, as in fp16. In fp32 it
    changes nothing: its scale, a power of 2, comes off the gradients before anything looks at them."""

    def scale(module):
        monkeypatch.setattr(
            f"{module}.precision", lambda *args: (precision(*args)[0], torch.amp.GradScaler("cpu", init_scale=1024.0))
        )

    return scale


class Call(NamedTuple):
    """A call of a function: what it was given, and what it returned."""

    args: tuple
    options: dict
    result: object


@pytest.fixture
def calls_of(monkeypatch):
    """calls_of(module, name) -> a list that fills with a Call for each call of the module's function."""

    def watch(module, name):
        calls, function = [], getattr(module, name)

        def watched(*args, **options):
            calls.append(Call(args, options, function(*args, **options)))
            return calls[-1].result

        monkeypatch.setattr(module, name, watched)
        return calls

    return watch


def assert_rate_clip_decay(seen, schedule, floor, steps=5, betas=(0.9, 0.95)):
    """seen: the steps of a run with --lr 0.01 --warmup 3 --clip 0.3 --weight_decay 0.2."""
    rates = [lr_at(i, steps, 1e-2, 3, floor, schedule) for i in range(steps)]
    assert [step.lr for step in seen] == pytest.approx(rates)
    assert {step.clip for step in seen} == {0.3}
    assert set().union(*(step.decays for step in seen)) == {0.0, 0.2}
    assert set().union(*(step.betas for step in seen)) == {betas}


def weights(run_dir):
    from safetensors.torch import load_file

    return load_file(Path(run_dir) / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


def assert_ranks_draw_apart(run_dir):
    """The random generators of a run's two ranks have other states: each drops other numbers."""
    first, second = torch.load(Path(run_dir) / "last/trainer_state.pt", weights_only=True)["rng"]
    assert not torch.equal(first["torch"], second["torch"])


def assert_one_line_error(process, *words):
    """Exit status 2 and a single line on stderr, which contains all `words`; no traceback."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, process.stderr
    for word in words:
        assert word in lines[0]


def assert_refused(capsys, call, *words):
    """call() ends this process as `assert_one_line_error` has it."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert_one_line_error(subprocess.CompletedProcess([], stop.value.code, "", capsys.readouterr().err), *words)


def assert_resume_refuses_what_changed(stage, config, paths, names):
    """Run `stage` for two steps of four; then change each of the files that it has read, checkpoints by one weight and
    texts by their last line: --resume says so, and goes on when the file is as it was. config(**changes) -> its
    settings. names: what the message calls a file, if not by its name."""
    from safetensors.torch import load_file, save_file

    stage.main(config(steps=2))
    for path in map(Path, paths):
        weights = path / "model.safetensors"
        file, name = (
            (weights, f"the weights of .*{path.name}") if path.is_dir() else (path, names.get(*[path.name] * 2))
        )
        before = file.read_bytes()
        if path.is_dir():
            tensors = load_file(file)
            tensors[min(tensors)].view(-1)[0] += 1e-3
            save_file(tensors, file)
        else:
            file.write_bytes(before.rstrip(b"\n").rpartition(b"\n")[0] + b"\n")
        with pytest.raises(ConfigError, match=f"--resume continues a run as it was, but .*{name}.* changed"):
            stage.main(config(steps=2, resume=True))
        file.write_bytes(before)
    stage.main(config(steps=4, resume=True))
    assert set(metrics(Path("runs") / config().name, "lr")) == {1, 2, 3, 4}
