"""pretrain.py: schedule, optimizers, and what a run must guarantee: the cut of a batch, the number of processes and
an interruption change nothing."""

import json
import math

import pytest
import torch
from conftest import assert_one_line_error, assert_same_weights, metrics, script

import pretrain
from generate import ConfigError
from pretrain import Config, Muon, lr_at, make_optimizers, orthogonalise
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


def test_learning_rate_by_hand():
    got = [lr_at(s, 8, 1.0, 2) for s in range(8)]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert got == pytest.approx([0.5, 1.0, *cosine])
    assert cosine[3] == pytest.approx(0.55)
    assert lr_at(100, 8, 1.0, 2) == pytest.approx(0.1)


def test_decay_only_where_it_belongs():
    raw = Transformer(TransformerConfig(vocab_size=20, positions="learned", bias=True, norm="layer", **MODEL))
    (adamw,) = make_optimizers(raw, "adamw", 1e-3, 0.1)
    decay = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert len(decay) == len(list(raw.parameters()))
    for name, p in raw.named_parameters():
        assert decay[id(p)] == (0.1 if p.dim() == 2 and "learned" not in name else 0.0), name
    adamw, muon = make_optimizers(raw, "muon", 1e-3, 0.1)
    in_muon = {id(p) for g in muon.param_groups for p in g["params"]}
    assert in_muon == {id(p) for n, p in raw.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    assert len(in_muon) + sum(len(g["params"]) for g in adamw.param_groups) == len(decay)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_orthogonalise_against_svd(shape):
    torch.manual_seed(0)
    m = torch.randn(*shape)
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    got = orthogonalise(m)
    inside = u.t() @ got @ vh.t()  # diagonal if the singular vectors are kept
    assert torch.linalg.svdvals(got).min() > 0.6
    assert torch.linalg.svdvals(got).max() < 1.3
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), atol=1e-4, rtol=0)


def test_muon_step_by_hand():
    torch.manual_seed(0)
    p, grad = torch.nn.Parameter(torch.randn(4, 6)), torch.randn(4, 6)
    before = p.detach().clone()
    p.grad = grad.clone()
    Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    update = orthogonalise(0.1 * grad + 0.9 * (0.1 * grad))  # Nesterov, from momentum 0
    torch.testing.assert_close(p.detach(), before * (1 - 0.05) - 0.1 * 0.2 * math.sqrt(6) * update)


def test_a_run_learns_and_leaves_everything(here, capsys):
    result = pretrain.main(config(steps=60, lr=1e-2, eval_every=30, dtype="fp32"))
    losses = metrics("runs/pretrain", "loss")
    assert losses[1] > 3.0  # ln(vocabulary) is 3.4
    assert result["valid_loss"] < 2.0 < losses[1]
    assert result["valid_loss"] == min(metrics("runs/pretrain", "valid_loss").values())
    run = here / "runs" / "pretrain"
    for name in ("best/model.safetensors", "last/trainer_state.pt", "curves.png", "samples.md", "tensorboard"):
        assert (run / name).exists(), name
    assert not list(run.glob("*.tmp")) + list(run.glob("*.old"))
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["config"]["steps"] == 60


def test_the_final_validation_loss_is_torchs_cross_entropy(here):
    pretrain.main(config())
    from generate import open_checkpoint

    raw, tokenizer, _ = open_checkpoint("runs/pretrain/last")
    ids = torch.tensor(tokenizer.encode(TEXT[len(TEXT) * 9 // 10 :]))
    n = (len(ids) - 1) // 32
    x, y = ids[: n * 32].view(n, 32), ids[1 : n * 32 + 1].view(n, 32)
    expected = torch.nn.functional.cross_entropy(raw(x).flatten(0, 1), y.flatten()).item()
    assert metrics("runs/pretrain", "valid_loss")[6] == pytest.approx(expected, abs=1e-5)


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
    for name in ("loss", "grad_norm", "valid_loss"):
        a, b = metrics("runs/one", name), metrics("runs/two", name)
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-5), name
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-5, rtol=1e-4)


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
        patch.setattr(pretrain, "Interrupt", StopAt3)
        with pytest.raises(SystemExit):
            pretrain.main(config(name="parts", **changes))
    assert set(metrics("runs/parts", "loss")) == {1, 2, 3}
    pretrain.main(config(name="parts", resume=True, **changes))
    assert metrics("runs/whole", "loss") == metrics("runs/parts", "loss")
    assert_same_weights("runs/whole/last", "runs/parts/last")
    assert_same_weights("runs/whole/best", "runs/parts/best")


def test_an_earlier_run_is_moved_aside(here):
    pretrain.main(config(steps=1))
    pretrain.main(config(steps=2))
    assert set(metrics("runs/pretrain.1", "loss")) == {1}
    assert set(metrics("runs/pretrain", "loss")) == {1, 2}


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
        ({"name": "../x"}, "directory name"),
        ({"model": TransformerConfig(context=4096)}, "smaller --model.context"),
    ],
)
def test_bad_settings(here, changes, message):
    with pytest.raises(ConfigError, match=message):
        pretrain.main(config(**changes))


def test_resume_refuses_another_recipe_and_a_corrupt_state(here):
    pretrain.main(config())
    with pytest.raises(ConfigError, match=r"lr 0\.004 -> 0\.1"):
        pretrain.main(config(resume=True, lr=0.1))
    (here / "runs/pretrain/last/trainer_state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="corrupt"):
        pretrain.main(config(resume=True))
