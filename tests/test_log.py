"""support/log.py: metrics.jsonl, samples.md and the trackers."""

import json

import pytest
from conftest import metrics, weights
from tiny import config

import pretrain
from support import pretrain_report, runs


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
    pretrain.main(config(steps=1))
    assert (
        json.loads((here / "runs/pretrain/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["commit"] == ""
    )
