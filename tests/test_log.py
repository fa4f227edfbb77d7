"""support/log.py: metrics.jsonl, samples.md and the trackers."""

import json
import math
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from conftest import metrics, weights
from tiny import config

import pretrain
from support import devices, log, pretrain_report, runs
from support.errors import ConfigError
from support.log import Log, read_metrics
from support.plots import draw_curves


@dataclass
class Settings:
    """What a Log needs of a run's Config."""

    rate: float
    wandb: str | None = None


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
    assert text in (here / "runs/pretrain/samples.md").read_text(encoding="utf-8")


def test_weights_and_biases_gets_it_all(here, monkeypatch):
    """The real package, offline; a resumed run continues the same W&B run."""
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
    run_id = (here / "runs/pretrain/wandb_id").read_text(encoding="utf-8")
    pretrain.main(config(eval_every=3, wandb="a-project", steps=7, resume=True))
    assert (here / "runs/pretrain/wandb_id").read_text(encoding="utf-8") == run_id
    assert all(path.name.endswith(run_id) for path in (here / "wandb").glob("offline-run-*"))


class BrokenRun:
    """A W&B run whose service has died."""

    id = "chosen-by-a-sweep"

    def log(self, record, step):
        raise ConnectionError("the service\nis gone")

    finish = None


def test_an_error_of_weights_and_biases_ends_no_run(here, monkeypatch, capsys):
    package = ModuleType("wandb")
    package.__spec__ = ModuleSpec("wandb", None)
    ids = []
    package.init = lambda **settings: ids.append(settings["id"]) or BrokenRun()
    monkeypatch.setitem(sys.modules, "wandb", package)
    pretrain.main(config(eval_every=3, wandb="p"))
    assert capsys.readouterr().out.count("--wandb p failed (the service is gone); the run goes on") == 1
    assert set(metrics("runs/pretrain", "loss")) == {1, 2, 3, 4, 5, 6}
    assert (here / "runs/pretrain/wandb_id").read_text(encoding="utf-8") == BrokenRun.id
    pretrain.main(config(eval_every=3, wandb="p", resume=True))
    pretrain.main(config(steps=1, wandb="p"))
    assert ids[1] == BrokenRun.id
    assert len({*ids}) == 3


def test_weights_and_biases_that_cannot_begin_is_one_line(here, monkeypatch):
    def refuse(**_):
        raise RuntimeError("No API key\nconfigured.")

    package = ModuleType("wandb")
    package.__spec__ = ModuleSpec("wandb", None)
    package.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(ConfigError, match=r"^--wandb p cannot begin: No API key configured; log in"):
        pretrain.main(config(wandb="p"))
    assert not (here / "runs/pretrain").exists()


def test_numbers_that_are_not_finite(here, capsys):
    """They are null in metrics.jsonl, left out of what is read from it, and points of TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Log(here, Settings(rate=math.inf), devices.setup("cpu"))
    weights = torch.tensor([math.nan, 1.0, -math.inf, 2.0, 1e30])
    for step, norm in ((1, 0.5), (2, math.nan), (3, math.inf), (4, 0.25)):
        run(step, grad_norm=norm, loss=1.0, all=math.nan)
        run.show(step, histograms={"w": weights, "broken": weights[:1], "empty": weights[:0]})
    run.close()

    def refuse(word):
        raise ValueError(word)

    lines = (here / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert records[0]["config"] == {"rate": None, "wandb": None}
    assert [record["grad_norm"] for record in records[1:]] == [0.5, None, None, 0.25]
    assert read_metrics(here) == {"grad_norm": ([1, 4], [0.5, 0.25]), "loss": ([1, 2, 3, 4], [1.0] * 4)}
    with (here / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": NaN}\n')  # as an older version wrote it
        file.write('{"step": 6, "lo')  # the process was killed
    assert read_metrics(here)["loss"] == ([1, 2, 3, 4], [1.0] * 4)
    draw_curves(here, "a run", [("norm", {"grad_norm": "norm", "all": "none"}, "norm", {})])
    board = EventAccumulator(str(here / "tensorboard")).Reload()
    assert [math.isfinite(event.value) for event in board.Scalars("grad_norm")] == [True, False, False, True]
    assert board.Tags()["histograms"] == ["w"]
    assert capsys.readouterr().out == ""  # no tracker failed
    shown = board.Histograms("w")[0].histogram_value
    assert (shown.num, shown.min, shown.max) == (2, 1, 2)


def test_a_log_of_an_older_version_with_nan_is_resumed_as_json(here):
    pretrain.main(config(steps=3))
    log = here / "runs/pretrain/metrics.jsonl"
    text = log.read_text(encoding="utf-8")
    log.write_text(text.replace('"skipped": 0', '"skipped": NaN'), encoding="utf-8")
    pretrain.main(config(steps=6, resume=True))
    assert '"skipped": 0' in text
    assert list(metrics("runs/pretrain", "skipped").values()) == [None] * 3 + [0] * 3
    assert "NaN" not in log.read_text(encoding="utf-8")


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
    monkeypatch.setattr(pretrain_report, "sample_text", lambda *_: said)
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
    with open("runs/pretrain/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    pretrain.main(config(steps=6, resume=True))
    assert set(metrics("runs/pretrain", "loss")) == {1, 2, 3, 4, 5, 6}


def test_a_machine_without_git_trains_too(here, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(log, "commit", log.commit.__wrapped__)  # not what it has kept
    pretrain.main(config(steps=1))
    assert (
        json.loads((here / "runs/pretrain/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["commit"] == ""
    )
