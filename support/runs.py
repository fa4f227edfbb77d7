"""A run directory: its name, its lock, what is saved and resumed, Ctrl-C; starts that a stage makes for itself."""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import distributed
from tqdm import tqdm

from support.checks import Amount, Count, Seed, Whole, check
from support.errors import CheckpointError, ConfigError, DivergedError
from support.locks import alone, hold
from support.log import Log
from support.sharding import gathered, share_of, unsharded

RUNS = Path("runs")


@dataclass
class RunConfig:
    """What means the same in every training stage; a stage's Config inherits it and adds its own."""

    init: str | None = None
    """Checkpoint to start from; default: one that is made once under runs/start, and reused."""
    name: str = "run"
    """Run directory below runs/."""
    steps: Count = 200
    """Optimizer steps."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw, or muon for the matrices of the blocks; adamw wants about a sixth of the learning rate."""
    lr: Amount = 2e-3
    """Peak learning rate."""
    warmup: Whole = 10
    """Steps of linear warm-up."""
    weight_decay: Amount = 0.0
    """Decoupled, on matrices only."""
    clip: Amount = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    eval_every: Count = 50
    """Steps between evaluations on the validation split."""
    save_every: Count = 100
    """Steps between checkpoints of last/."""
    seed: Seed = 0
    """Of all that is random: the start where one is made, the data order, the sampling, the dropout."""
    resume: bool = False
    """Continue runs/NAME/last as if it had never stopped."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto, fp32, bf16 or fp16; auto is bf16 where the machine is built for it (most GPUs, CPUs with AMX)."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""

    def __post_init__(self):
        check(self)
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ConfigError("--wandb needs a package that is not here: pip install wandb")


class Run:
    """A run under way: what the loop of every stage needs and does not teach.

        run = Run(config, dist, policy, tokenizer, optimizers, scaler, best=-1.0)     # new, or resumed
        for step in run.steps():                   # with a progress bar; Ctrl-C, and --save_every, write last/
            ...
            run.keep_best(accuracy)                # best/, if it is
            run.log(step + 1, loss=loss)           # metrics.jsonl and the trackers
        run.close()                                # last/, and Ctrl-C is as usual again

    `state` holds what a resumed run must know besides weights, optimizers, scaler and random numbers: the best value so
    far, and what the stage gives by name, as numbers, lists and dicts. `parts` holds further objects by name that have
    a state_dict. `model` is the unwrapped one.
    """

    def __init__(self, config, dist, model, tokenizer, optimizers, scaler, *, best=-math.inf, lower_is_better=False,
                 chat=True, parts=None, began=None, on_save=None, **state):  # fmt: skip
        """best: what a checkpoint must exceed (or, lower_is_better, undercut) to become best/. chat: whether generation
        ends with the turn or with the document. began: time.perf_counter() when the stage began. on_save(): called by
        rank 0 after last/ was written. Raises ConfigError on a name that cannot be used or a run that cannot go on."""
        self.config, self.dist, self.model, self.tokenizer = config, dist, model, tokenizer
        self.optimizers, self.scaler, self.parts = optimizers, scaler, parts or {}
        self.chat, self.on_save, self.lower_is_better = chat, on_save, lower_is_better
        self.state = SimpleNamespace(best=best, **state)
        self.began = time.perf_counter() if began is None else began
        self.path, self.first = open_run(config, dist), 0
        if config.resume:
            saved = load_state(self.path, dist, model, optimizers, scaler, config)
            for name in vars(self.state).keys() & saved.keys():
                setattr(self.state, name, saved[name])
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.first, self.began = saved["step"], self.began - saved.get("seconds", 0.0)
        self.done = self.first  # steps that have been taken
        self.log = Log(self.path, config, dist, self.first)
        self.interrupt = Interrupt(dist)

    def steps(self, total=None):
        """The steps that are still to do, 0 … total − 1, by default --steps of them."""
        total = self.config.steps if total is None else total
        steps = range(self.first, total)
        self.bar = tqdm(steps, initial=self.first, total=total, disable=not self.dist.is_main, unit="step")
        for step in self.bar:
            if self.interrupt:
                written = self.save("last")
                self.bar.close()
                stopped(self.config.name, step, written, self.dist)
            if step != self.first and step % self.config.save_every == 0:
                self.save("last")
            yield step
            self.done = step + 1

    def save(self, name):
        """Write the checkpoint best/, or last/ with all that resuming needs. Returns whether it could be written."""
        state = None
        if name == "last":
            moments = gathered([optimizer.state_dict() for optimizer in self.optimizers], self.dist.is_main)
            state = {"step": self.done, "config": asdict(self.config), "seconds": self.seconds, **vars(self.state)}
            state |= {"optimizers": moments, "scaler": self.scaler.state_dict()}
            state |= {part: kept.state_dict() for part, kept in self.parts.items()}
        written = save(self.path, name, self.dist, self.model, self.tokenizer, self.chat, state)
        if self.dist.is_main and written and name == "last":
            if keep := getattr(self.config, "keep", 0):
                keep_copy(self.path, self.done, keep)
            if self.on_save:
                self.on_save()
        return written

    def keep_best(self, value):
        """Write best/ if the value is better than all before; it belongs to the step that is under way."""
        if value < self.state.best if self.lower_is_better else value > self.state.best:
            self.state.best = value
            self.save("best")

    def due(self, every):
        """Whether the step under way is a multiple of `every`, or the last."""
        return (self.done + 1) % every == 0 or self.done + 1 == self.config.steps

    @property
    def seconds(self):
        """Since the stage began, earlier parts of a resumed run included."""
        return time.perf_counter() - self.began

    def say(self, text):
        """Print a line above the progress bar, once."""
        if self.dist.is_main:
            self.bar.write(text)

    def check_finite(self, lr, norm=None, mend="try a smaller --lr", **losses):
        """Raise DivergedError if a loss is no finite number, or the gradient's norm without a scaler, which meets inf,
        skips the step and goes lower. norm None: it is not known yet."""
        known = norm is None or math.isfinite(norm) or self.scaler.is_enabled()
        if known and all(map(math.isfinite, losses.values())):
            return
        self.bar.close()  # a sweep goes on with the next run
        self.log.close()
        values = {name.replace("_", " "): value for name, value in losses.items()}
        values |= {} if norm is None else {"gradient norm": norm}
        said = ", ".join(f"the {name} is {value}" for name, value in values.items())
        raise DivergedError(f"{said} at step {self.done} (learning rate {lr:.1e}); {mend}")

    def close(self):
        """After the last step: write last/, close the log, give Ctrl-C back."""
        self.save("last")
        self.interrupt.release()
        self.log.close()


def run_path(config):
    """runs/NAME. Raises ConfigError if that cannot be a run's name, if there is nothing to resume there, or if what the
    run is to read is the earlier run that it would move aside."""
    path = RUNS / config.name
    part = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"  # no ".", no "..", no path from the root
    if not re.fullmatch(rf"{part}(/{part})*", config.name) or config.name in ("start", "streams", "ablate", "evaluate"):
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


# Options that earlier versions had, at the value that made no difference: a run saved with it can still be resumed.
GONE = {
    "z_loss": 0.0,  # pretrain.py
    "entropy_bonus": 0.0,  # grpo.py
    "integer_weight": 0.0,
    "pairs_per_prompt": 4,  # dpo.py
}


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
    now, then = asdict(config), asdict(type(config)()) | state["config"]  # an option that is new was at its default
    changed = [k for k in now if k not in free and now[k] != then.get(k)]
    if changed:
        said = ", ".join(f"{k} {then.get(k)!r} -> {now[k]!r}" for k in changed)
        raise ConfigError(f"--resume continues a run as it was, but this changed: {said}")
    gone = {k: value for k, value in state["config"].items() if k not in now and value != GONE.get(k)}
    if gone:
        said = ", ".join(f"{k} {value!r}" for k, value in gone.items())
        raise ConfigError(f"{path} was made with {said}, which this version no longer has: it cannot be resumed here")
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


def start_name(data, seed, stage):
    """Where a stage that was given no --init keeps the start that it makes for itself."""
    known = data
    if not data.isidentifier():  # a path: two files of one name are two starts
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(data).stem)
        known = f"{stem}-{hashlib.sha256(str(Path(data).resolve()).encode()).hexdigest()[:6]}"
    return f"start/{known}-seed{seed}-{stage}"


def made_once(name, what, stage, settings, dist):
    """Run a stage into runs/NAME, unless that has been done with these settings; -> runs/NAME. When the stage ends, its
    settings go into the file `finished`: a run without that file was broken off, one with another was made otherwise,
    and either is moved aside by the new one. Of several processes that want the same start, one makes it, the others
    wait."""
    finished, lock = RUNS / name / "finished", RUNS / f"{name}.lock"
    made_by = {k: asdict(v) if is_dataclass(v) else v for k, v in settings.items() if k not in ("device", "dtype")}
    made_by = json.dumps(made_by, sort_keys=True)
    if dist.is_main:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with alone(lock) if dist.is_main else contextlib.nullcontext():
        found = dist.is_main and finished.exists() and finished.read_text() == made_by
        if dist.sum(found)[0]:  # the other ranks wait here for what rank 0 found
            if dist.is_main:
                print(f"starting from {RUNS / name} (made earlier; delete it to make it anew)")
        else:
            if dist.is_main:
                print(f"{what} -> {RUNS / name}")
            stage.main(stage.Config(name=name, **settings))
            if dist.is_main:
                finished.write_text(made_by)
    return str(RUNS / name)
