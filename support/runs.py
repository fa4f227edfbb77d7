"""A run directory: its name, its lock, what it saves and resumes; Ctrl-C; the starts that stages make for themselves.

A *start* is the checkpoint that a stage begins from when --init is not given. It is trained once, into runs/start, and
reused.
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import re
import shutil
import signal
import time
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import distributed
from tqdm import tqdm

from support.checks import Amount, Count, Seed, Whole, check
from support.content import content_of, content_of_checkpoint, content_of_data
from support.devices import random_state, set_random_state
from support.downloads import fetch_missing
from support.errors import CheckpointError, ConfigError, DivergedError
from support.files import UNWRITTEN, may_fail, must_write, say_unwritten, to_json, write_whole
from support.finite import check_state
from support.heap import memory_is_short, return_freed_memory
from support.locks import file_lock, lock_run, unlock_run
from support.log import Log, commit
from support.nodes import launch_id, one_store
from support.products import fast_linears
from support.sharding import gathered, shard_like, unsharded
from support.tasks import refuse_skip_bad

RUNS = Path("runs")
STARTS = {}  # {run directory: the commit that made it} of the starts that this process has taken
OPENED = set()  # the run directories that this process has begun or resumed


@dataclass
class RunConfig:
    """The flags that mean the same in every training stage. Each stage's Config inherits them and adds its own."""

    init: str | None = None
    """Checkpoint to start from; default: one that is trained once into runs/start, and reused."""
    name: str = "run"
    """Name of the run; its directory is runs/NAME."""
    steps: Count = 200
    """Optimizer steps."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw, or muon for the matrices of the blocks and adamw for the rest; adamw alone needs a lower learning
    rate."""
    lr: Amount = 2e-3
    """Peak learning rate."""
    warmup: Whole = 10
    """Steps over which the learning rate rises linearly to its peak."""
    weight_decay: Amount = 0.0
    """Decoupled weight decay, on matrices only."""
    clip: Amount = 1.0
    """Clip the gradient norm to this; 0 turns clipping off."""
    eval_every: Count = 50
    """Steps between evaluations on the validation split."""
    save_every: Count = 100
    """Steps between saves of the checkpoint last/."""
    seed: Seed = 0
    """Random seed of everything: the start if one is trained, the data order, the sampling, the dropout."""
    skip_bad: bool = False
    """Skip and count records of --data that cannot be read or used (a line that is cut off, a rating outside 1 to 5, an
    empty response), instead of stopping at the first one."""
    resume: bool = False
    """Continue from runs/NAME/last, with the same result as if the run had never stopped."""
    device: str = "auto"
    """auto (the best there is), cpu, cuda or mps (Apple)."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 where the hardware multiplies it (most GPUs; CPUs with AMX or AVX-512 BF16), fp16 on older GPUs,
    else fp32, also on Apple's, which take bf16 and fp16 by this flag."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""

    def __post_init__(self):
        check(self)
        for field in fields(self):
            if getattr(self, field.name) == "" != field.default:  # --init "$CHECKPOINT", which is not set
                raise ConfigError(f"--{field.name} is empty: give it a value, or leave it out")
        refuse_skip_bad(self)
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ConfigError("--wandb needs a package that is not here: pip install wandb")


class Run:
    """A training run: saving, resuming, logging and Ctrl-C, for the loop of every stage.

        run = Run(config, dist, policy, tokenizer, optimizers, scaler, best=-1.0)     # new, or resumed
        for step in run.steps():                   # progress bar; writes last/ every --save_every steps and on Ctrl-C
            ...
            run.keep_best(accuracy)                # writes best/ if the accuracy is the best so far
            run.log(step + 1, loss=loss)           # metrics.jsonl and the trackers
        run.close()                                # writes last/, restores Ctrl-C

    `state` holds what resuming needs besides weights, optimizers, scaler and random generators: the best value so far,
    and whatever the stage passes by name (numbers, lists, dicts). `parts` holds further objects by name, each with a
    state_dict. `model` is the unwrapped model; on a CPU where that is faster its
    matrix products go through support/products.py from now on (`fast_linears`).
    """

    open_log = None  # of this process; an error that a sweep survives, a DivergedError, may leave it open
    on_save = None  # a function that rank 0 calls after last/ is written: support/pretrain_report.py sets it

    def __init__(self, config, dist, model, tokenizer, optimizers, scaler, *, best=-math.inf, lower_is_better=False,
                 chat=True, parts=None, reads=None, began=None, **state):  # fmt: skip
        """best: the value that a checkpoint must exceed (stay below, with lower_is_better) to become best/. chat:
        whether generation stops at the end of a turn (True) or of a document (False). reads: {name: what the stage has
        read, models as they are before the first step}; a resumed run must read the same. began: time.perf_counter() at
        the start of the stage. Raises ConfigError on an unusable name, or if the run cannot be resumed."""
        self.config, self.dist, self.model, self.tokenizer = config, dist, fast_linears(model), tokenizer
        self.optimizers, self.scaler, self.parts = optimizers, scaler, parts or {}
        self.chat, self.lower_is_better = chat, lower_is_better
        self.state = SimpleNamespace(best=best, **state)
        self.began = time.perf_counter() if began is None else began
        self.reads = {name: content_of(thing) for name, thing in (reads or {}).items()}
        dist.same(self.reads | {"the tokenizer": tokenizer.fingerprint})
        self.close_log()
        self.path, self.first = open_run(config, dist), 0
        if config.resume:
            saved = load_state(self.path, dist, model, optimizers, scaler, config, self.reads)
            for name in vars(self.state).keys() & saved.keys():
                setattr(self.state, name, saved[name])
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.first, self.began = saved["step"], self.began - saved.get("seconds", 0.0)
            if saved["config"]["steps"] != config.steps:  # another learning rate from here on: another branch
                self.leave_later_best(best)
        self.done = self.first  # number of completed steps
        try:
            self.log = Run.open_log = Log(self.path, config, dist, self.first)
        except ConfigError:  # a full disk, a tracker that cannot begin
            if dist.is_main and not config.resume:
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        self.interrupt = Interrupt(dist)

    def steps(self, total=None):
        """The remaining steps of 0 … total − 1; total is --steps by default."""
        total = self.config.steps if total is None else total
        steps = range(self.first, total)
        self.bar = tqdm(steps, initial=self.first, total=total, disable=not self.dist.is_main, unit="step")
        for step in self.bar:
            if self.interrupt:
                written = self.save("last")
                self.bar.close()
                self.log.close()
                exit_stopped(self.config.name, step, written, self.dist)
            if step != self.first and step % self.config.save_every == 0:
                self.save("last")
                return_freed_memory()  # batches of many lengths leave holes in the heap
            yield step
            self.done = step + 1
            if memory_is_short():
                return_freed_memory()

    def save(self, name):
        """Write the checkpoint best/, or last/ with everything that resuming needs. Returns whether it was written."""
        state = None
        if name == "last":
            self.log.flush()
            moments = gathered([optimizer.state_dict() for optimizer in self.optimizers], self.dist.is_main)
            state = {"step": self.done, "config": asdict(self.config), "seconds": self.seconds, **vars(self.state)}
            state["reads"] = self.reads
            state |= {"optimizers": moments, "scaler": self.scaler.state_dict()}
            state |= {part_name: part.state_dict() for part_name, part in self.parts.items()}
        written = save(self.path, name, self.dist, self.model, self.tokenizer, self.chat, state)
        if self.dist.is_main and written and name == "last":
            if keep := getattr(self.config, "keep", 0):
                keep_copy(self.path, self.done, keep)
            if self.on_save:
                self.on_save()
        if self.dist.is_main and written and name == "best":
            with may_fail(self.path / "best/step"):
                write_whole(self.path / "best/step", f"{self.done + 1}\n")
        return written

    def leave_later_best(self, worst):
        """If best/ is of a later step than the one that the run goes on from, it is none of this run's: it is moved
        aside, and the next validation makes another. worst: the value that any other beats."""
        file = self.path / "best/step"  # a run that an older version saved has none
        step = self.dist.from_main(lambda: int(file.read_text(encoding="utf-8")) if file.is_file() else 0)
        if step > self.first > 0:
            self.state.best = worst
            if self.dist.is_main:
                aside = self.path / f"best_{step:07d}"
                with must_write(aside):
                    shutil.rmtree(aside, ignore_errors=True)
                    file.parent.rename(aside)
                print(f"{file.parent} is of step {step}, after the step {self.first} that is resumed: moved to {aside}")

    def keep_best(self, value):
        """Write best/ if the value, measured in the current step, is better than all earlier ones."""
        better = value < self.state.best if self.lower_is_better else value > self.state.best
        if better and self.save("best"):
            self.state.best = value

    def best_so_far(self):
        """For the bar of a stage that keeps the best accuracy: {"best": "50.0%"}, or {} if none has been measured."""
        return {"best": f"{self.state.best:.1%}"} if self.state.best >= 0 else {}

    def due(self, every):
        """Whether the current step is a multiple of `every`, or the last step."""
        return (self.done + 1) % every == 0 or self.done + 1 == self.config.steps

    @property
    def seconds(self):
        """Seconds since the stage began, including the earlier parts of a resumed run."""
        return time.perf_counter() - self.began

    def say(self, text):
        """Print a line above the progress bar, on rank 0."""
        if self.dist.is_main:
            self.bar.write(text)

    def is_finite(self, norm, losses):
        """Whether {name: loss} and the gradient norm are finite. An fp16 scaler handles an overflow itself: it skips
        the step and halves its scale. Below a scale of 1 it is no overflow. norm None: not computed yet."""
        norm_ok = norm is None or math.isfinite(norm) or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1)
        return norm_ok and all(map(math.isfinite, losses.values()))

    def check_finite(self, lr, norm=None, advice="try a smaller --lr", **losses):
        """Raise DivergedError unless `is_finite`. The losses and the norm are those of all ranks."""
        if self.is_finite(norm, losses):
            return
        self.bar.close()  # a sweep continues with the next run
        self.close_log()
        self.interrupt.release()
        values = {name.replace("_", " "): value for name, value in losses.items()}
        values |= {} if norm is None else {"gradient norm": norm}
        problem = ", ".join(f"the {name} is {value}" for name, value in values.items())
        error = DivergedError(f"{problem} at step {self.done} (learning rate {lr:.1e}); {advice}")
        error.on_all_ranks = True
        raise error

    def stop_or_skip(self, lr, norm, skip, **losses):
        """`check_finite`; but with `skip`, go on. Counts in state.skipped the steps without an update, the scaler's
        too."""
        self.state.skipped += not all(map(math.isfinite, (norm, *losses.values())))
        if not skip and not self.is_finite(norm, losses):
            good = saved_run(self.path) or "none yet"
            advice = f"last good checkpoint: {good}; try a smaller --lr or --skip_nonfinite true"
            self.check_finite(lr, norm, advice, **losses)

    def close(self):
        """After the last step: write last/, close the log, restore the usual Ctrl-C. ConfigError if the disk never had
        room for a checkpoint. The directory stays locked, as it is still read and drawn in, until this process begins
        another run or ends."""
        self.save("last")
        self.log.close()
        self.interrupt.release()
        if self.dist.is_main and not any((self.path / name / "config.json").is_file() for name in ("best", "last")):
            raise ConfigError(f"{self.path} holds no checkpoint, for none could be written: make room and train again")

    @staticmethod
    def close_log():
        """Close the log that is open in this process, if any, and unlock its directory."""
        if Run.open_log is not None:
            Run.open_log.close()
            unlock_run(Run.open_log.run_dir)
            Run.open_log = None


def run_path(config):
    """runs/NAME. Raises ConfigError if NAME is not a valid run name, if it holds nothing to resume, or if the run would
    read something in the earlier run that it renames."""
    path = RUNS / config.name
    part = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"  # excludes ".", "..", absolute paths, and what no disk can name
    if not re.fullmatch(rf"{part}(/{part})*", config.name) or config.name in ("start", "streams", "ablate", "evaluate"):
        raise ConfigError(
            f"--name {config.name!r} cannot be a run's directory; use at most 200 letters, digits, . _ and -"
        )
    if inner := {"best", "last"}.intersection(config.name.split("/")[1:]):
        raise ConfigError(f"--name {config.name}: {min(inner)}/ is a run's checkpoint; give another --name")
    if file := next((parent for parent in path.parents if parent.is_file()), None):
        raise ConfigError(f"--name {config.name} cannot be a run's directory: {file} is a file; give another --name")
    if config.resume and not saved_run(path):
        raise ConfigError(f"--resume: {path / 'last'} holds no saved run to continue")
    read_from = ("init", "tokenizer", "reward_model", "sampler", "teacher", "teach", "data", "text")  # they name a path
    given = [] if config.resume else [(flag, getattr(config, flag, None)) for flag in read_from]
    for flag, paths in given:
        for read in filter(None, paths if isinstance(paths, list) else [paths]):
            inner, outer = Path(read).resolve(), path.resolve()
            if inner.is_relative_to(outer):
                conflict = f"is {'in ' * (inner != outer)}the run that --name {config.name} would move aside"
                raise ConfigError(f"--{flag} {read} {conflict}: give another --name")
    return path


def open_run(config, dist):
    """Make and lock the run directory runs/NAME. An earlier run of that name is renamed to runs/NAME.1, .2, …, never
    overwritten. ConfigError if a process is still writing it."""
    path = run_path(config)
    if dist.is_main:
        with must_write(path):
            if path.exists():
                lock_run(path)
                if not config.resume:
                    lock_inner(path)
                    n = next(n for n in range(1, 10**6) if not Path(f"{path}.{n}").exists())
                    path.rename(f"{path}.{n}")
                    print(f"{path} held an earlier run: moved to {path}.{n}")
            path.mkdir(parents=True, exist_ok=True)
            lock_run(path)
            write_whole(path / "launcher", launch_id())
    OPENED.add(path)
    if dist.world > 1:
        distributed.barrier()
    return path


def lock_inner(path):
    """ConfigError if a process is writing a run inside this one's directory: NAME/lr0.001 of a sweep."""
    inner = [file.parent for file in path.glob("*/**/launcher")]
    try:
        for run in inner:
            lock_run(run)
    except ConfigError:
        unlock_run(path)
        raise
    finally:
        for run in inner:
            unlock_run(run)


def restarted(config, dist):
    """Whether an earlier attempt of this launch, before torchrun started its processes again, has saved the run. A run
    of the same name from an earlier launch does not count."""
    path, same_launch = RUNS / config.name, False
    if dist.is_main and saved_run(path) and (path / "launcher").is_file():
        same_launch = (path / "launcher").read_text(encoding="utf-8") == launch_id()
        same_launch = same_launch and not (one_store() and path in OPENED)  # then this very process has saved it
    # Without a store that knows the launch: several nodes count their restarts separately, and one is enough.
    restarts, same_launch = dist.sum(one_store() or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), same_launch)
    return restarts > 0 and same_launch > 0


def saved_run(path):
    """The checkpoint that a run directory can be resumed from, or None. last.old remains if a process is killed between
    the two renames of `save`."""
    saved = [path / name for name in ("last", "last.old") if (path / name / "trainer_state.pt").is_file()]
    return saved[0] if saved else None


def rng_state(dist):
    """The states of every rank's random generators; each rank gets the same list."""
    own_rng = random_state(dist.device)
    if dist.world == 1:
        return [own_rng]
    states = [None] * dist.world
    distributed.all_gather_object(states, own_rng)
    return states


def save(run_dir, name, dist, model, tokenizer, chat, state=None):
    """Write the checkpoint runs/NAME/name: first as name.tmp, then renamed, so a crash leaves the old one intact. So
    does a full disk, which prints one message and does not end the run. Returns whether the checkpoint was written.

    model: the unwrapped one. state: what resuming needs besides the weights. All ranks must call: their random
    generators are gathered.
    """
    written = True
    if state is not None:
        state = state | {"rng": rng_state(dist)}
    model = unsharded(model, dist)
    if dist.is_main:
        new, old, final = (run_dir / f"{name}{end}" for end in (".tmp", ".old", ""))
        try:
            shutil.rmtree(new, ignore_errors=True)
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            stop = [int(i) for i in tokenizer.stop_ids] if chat else [tokenizer.endoftext_id]
            decoding = {"eos_token_id": stop, "pad_token_id": tokenizer.endoftext_id, "do_sample": False}
            write_whole(new / "generation_config.json", to_json(decoding, indent=2) + "\n")
            if state is not None:
                torch.save(state, new / "trainer_state.pt")
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
            new.rename(final)
            UNWRITTEN.discard(str(final))  # if it cannot be written once more, that is news
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the disk's error
            written = False
            why = str(error).splitlines()[0] + (": is the disk full?" if isinstance(error, RuntimeError) else "")
            say_unwritten(final, why, "the checkpoint before it is kept")
            shutil.rmtree(new, ignore_errors=True)
            if not final.exists() and old.exists():
                old.rename(final)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
    return dist.sum(not written)[0] == 0  # the other ranks wait here for rank 0


def keep_copy(run_dir, step, keep):
    """Keep last/ under the name step_STEP too. Of the copies up to that step only the newest `keep` stay; copies of
    later steps, which are there if a run returned to an earlier checkpoint, are left alone. The files are hard links
    where the file system has them, since a checkpoint never changes. A copy that the disk has no room for is left
    out."""

    def link(file, to):
        try:
            os.link(file, to)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, to)

    final, new = run_dir / f"step_{step:07d}", run_dir / "step.tmp"
    shutil.rmtree(new, ignore_errors=True)
    with may_fail(final):
        shutil.copytree(run_dir / "last", new, copy_function=link)
        shutil.rmtree(final, ignore_errors=True)
        new.rename(final)
    shutil.rmtree(new, ignore_errors=True)
    for path in sorted(path for path in run_dir.glob("step_*") if path.name <= final.name)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def load_saved(path):
    """The dict that torch.save has written, on the CPU. Raises CheckpointError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch passes on any error of the unpickler
        why = str(error).partition("\n")[0] or "it ends too early"
        raise CheckpointError(f"{path} is corrupt: {why}") from None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} is corrupt: it holds a {type(saved).__name__}, not a dict")
    return saved


def load_state(run_dir, dist, model, optimizers, scaler, config, reads):
    """Restore a saved run: weights, optimizers, scaler, random generators. Returns its state; `step` counts the steps
    done. reads: {name: content} of what this process has read."""
    path = saved_run(run_dir)
    state = load_saved(path / "trainer_state.pt")
    if missing := {"config", "optimizers", "reads", "rng", "scaler", "step"} - state.keys():
        raise CheckpointError(f"{path / 'trainer_state.pt'} is corrupt: it lacks {min(missing)!r}")
    check_state(state, path / "trainer_state.pt")
    if len(state["rng"]) != dist.world:
        raise ConfigError(f"{path} was saved by {len(state['rng'])} processes; resume it with as many")
    may_change = {"algorithm"}  # a name for choices that are compared one by one
    may_change |= {"steps", "resume", "save_every", "keep", "eval_every", "sample_every"}
    may_change |= {"record_groups", "record_every", "watch", "wandb", "device", "name", "fsdp"}
    new = asdict(config)
    old = filled(asdict(type(config)()), state["config"])
    if changed := [line for k in new if k not in may_change for line in changes_of(k, old.get(k), new[k])]:
        raise ConfigError(f"--resume continues a run as it was, but this changed: {', '.join(changed)}")
    if gone := ", ".join(f"{k} {value!r}" for k, value in state["config"].items() if k not in new):
        raise ConfigError(f"{path} was made with {gone}, which this version no longer has: it cannot be resumed here")
    saved_reads = state["reads"]
    changed = [name for name, content in reads.items() if saved_reads.get(name, content) != content]
    # A start has another name if this version makes another one
    changed += [name for name in saved_reads if name.startswith("the weights of ") and name not in reads]
    if changed:
        raise ConfigError(f"--resume continues a run as it was, but {' and '.join(changed)} changed since it began")
    total = new["steps"] + new.get("mlm_steps", 0)  # encoder.py trains in two phases
    if state["step"] > total:
        raise ConfigError(f"{path} has done {state['step']} steps already, more than the {total} asked for")
    if new["steps"] != old["steps"] and dist.is_main:
        change = f"--steps {old['steps']} -> {new['steps']}"
        print(f"{change}: from here the learning rate is that of a run of the new length")
    weights, current = type(model).from_pretrained(path).state_dict(), model.state_dict()
    model.load_state_dict({name: shard_like(weight, current.get(name)) for name, weight in weights.items()})
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in saved["state"].items():
            saved["state"][i] = {name: shard_like(x, params[i]) for name, x in moments.items()}
        optimizer.load_state_dict(saved)
    if state["scaler"]:  # empty if the run was in another precision: --dtype auto on another device
        scaler.load_state_dict(state["scaler"])
    set_random_state(state["rng"][dist.rank], dist.device)
    return state


def filled(defaults, saved):
    """The settings of a saved run, with the defaults of options that it did not have yet."""
    nested = [k for k, v in saved.items() if isinstance(v, dict) and isinstance(defaults.get(k), dict)]
    return defaults | saved | {k: defaults[k] | saved[k] for k in nested}


def changes_of(name, old, new):
    """["lr 0.1 -> 0.2"], or of nested settings a line for each that differs; [] if none does."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = old | new  # in their order
        return [line for k in names for line in changes_of(f"{name}.{k}", old.get(k), new.get(k))]
    return [f"{name} {old!r} -> {new!r}"] if new != old else []


class Interrupt:
    """The first Ctrl-C (or SIGTERM) asks the loop to stop before its next step, where the state is consistent; the
    second one kills the process."""

    def __init__(self, dist):
        self.dist, self.asked = dist, False
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                signal.signal(number, self._ask)

    def _ask(self, number, _):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def __bool__(self):
        return self.dist.sum(self.asked)[0] > 0  # all ranks stop at the same step

    def release(self):
        """After the loop everything is saved, so Ctrl-C ends the process at once again."""
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            with contextlib.suppress(ValueError):
                signal.signal(number, default)
        if self.asked:  # during the last step, after the last check
            raise KeyboardInterrupt


def exit_stopped(name, step, written, dist):
    """Exit before `step`, after Ctrl-C; print whether the run was saved and how to continue. A start is never resumed:
    the next stage that needs it trains it again."""
    if dist.is_main:
        next_step = "saved; add --resume true to the same command to continue" if written else "but not saved"
        next_step = "the same command trains this start again" if name.startswith("start/") else next_step
        print(f"stopped at step {step}, {next_step}")
    raise SystemExit(130)


def start_name(data, seed, stage, levels=(1, 2), **others):
    """The run name under which a stage without --init keeps its start. Other levels make another name, and so do
    `others`, further settings that are not the default: under the same name the new start would move aside one that a
    run still reads."""
    label = data
    if not data.isidentifier():  # a path: two files of the same name are two starts
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(data).stem)
        place = str(Path(data).resolve()).encode(errors="backslashreplace")  # a path may be no text
        label = f"{stem}-{hashlib.sha256(place).hexdigest()[:6]}"
    mark = "" if all(0 <= level <= 9 for level in levels) else "-"  # 1, 23 and 12, 3 are two starts
    some = "" if list(levels) == [1, 2] else "-levels" + "".join(f"{mark}{level}" for level in levels)
    some += "-" + hashlib.sha256(to_json(others, sort_keys=True).encode()).hexdigest()[:6] if others else ""
    return f"start/{label}-seed{seed}-{stage}{some}"


def make_start_once(name, message, stage, settings, dist):
    """Train a start: run `stage` into runs/NAME unless it was already run with these settings; -> runs/NAME.

    When the stage ends, its settings and the content of its data and --init are written to the file `finished`, beside
    it the commit. A run without `finished` is incomplete, and one where it differs was made from something else; the
    new run renames it. If several processes need the same start, one trains it and the others wait. A
    change of the code alone makes no new start: the commit that made it is printed, kept in STARTS, and named on the
    pages of ablate.py."""
    finished, lock = RUNS / name / "finished", RUNS / f"{name}.lock"
    made_by = {k: asdict(v) if is_dataclass(v) else v for k, v in settings.items() if k not in ("device", "dtype")}
    if dist.is_main:
        data = settings.get("data", stage.Config.data)
        fetch_missing(data)  # now: a file that the stage downloads would make this another start the next time
        made_by["reads"] = [content_of_data(data)]
        if settings.get("init"):
            made_by["reads"].append(content_of_checkpoint(settings["init"]))
        made_by = to_json(made_by, sort_keys=True)
        with must_write(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
    with file_lock(lock) if dist.is_main else contextlib.nullcontext():
        exists = dist.is_main and finished.exists() and finished.read_text(encoding="utf-8") == made_by
        if dist.sum(exists)[0]:  # the other ranks wait here for rank 0
            if dist.is_main:
                print(
                    f"starting from {RUNS / name} (made earlier, commit {commit_of(name)}; delete it to train it again)"
                )
        else:
            if dist.is_main:
                print(f"{message} -> {RUNS / name}")
            config = stage.Config(name=name, **settings)
            config.resume = restarted(config, dist)
            stage.main(config)
            return_freed_memory()
            if dist.is_main:
                with may_fail(finished):
                    if not {str(RUNS / name / part) for part in ("last", "best")} & UNWRITTEN:
                        write_whole(finished.with_name("commit"), commit() or "unknown")
                        write_whole(finished, made_by)  # else the next stage trains it again
        STARTS[str(RUNS / name)] = commit_of(name)
    return str(RUNS / name)


def commit_of(name):
    """The commit at which the start runs/NAME was made."""
    file = RUNS / name / "commit"
    return file.read_text(encoding="utf-8") if file.is_file() else "unknown"
