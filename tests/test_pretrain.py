"""pretrain.py: its loss, and what a run must guarantee: the cut of a batch, the number of processes and
an interruption change nothing."""

import contextlib
import itertools
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    assert_one_line_error,
    assert_ranks_draw_apart,
    assert_rate_clip_decay,
    assert_resumed_equals_whole,
    assert_same_metrics,
    assert_same_weights,
    metrics,
    script,
    weights,
)
from tiny import MODEL, TEXT, config, flags

import pretrain
import transformer
from pretrain import next_token_loss
from support import devices, pretrain_report, runs, streams
from support.checkpoints import open_checkpoint
from support.errors import ConfigError, DivergedError, TokenizerError
from support.pretrain_report import validate, validation_sequences
from tokenizer_bpe import load_tokenizer
from transformer import Transformer, TransformerConfig


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
    assert json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["config"]["steps"] == 60


def test_the_final_validation_loss_is_torchs_cross_entropy(here):
    pretrain.main(config(model=TransformerConfig(**MODEL, dropout=0.3)))  # which acts in training alone
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
    rows = validation_sequences(ids, stream, 32, separator)
    got = validate(raw, rows, byte_lengths, dist, contextlib.nullcontext)
    assert got == pytest.approx((total / n_tokens, total / n_bytes / math.log(2)), rel=1e-5)
    halves = []  # two ranks, each with its own rows, add up to one
    for rank in range(2):
        half = devices.Dist(rank, 2, torch.device("cpu"))
        half.sum = lambda *values: halves.append(values) or values
        validate(raw, rows, byte_lengths, half, contextlib.nullcontext)
    assert halves[0][0] + halves[1][0] == pytest.approx(total, rel=1e-5)
    assert halves[0][1] + halves[1][1] == n_tokens
    few = validation_sequences(ids, stream, 32, separator, most_tokens=100)
    assert 5 < len(few) < 20
    windows = validation_sequences(ids, stream, 8, separator)  # the documents do not fit: the stream in windows
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
    assert_same_metrics("runs/plain", "runs/changed", ("loss", "grad_norm", "valid_loss"), rel=1e-5)


def test_the_entropy_of_a_task_is_per_token_and_end_token(monkeypatch):
    row = replace(pretrain_report.task_of("word"), entropy=lambda: (6.0, 0.1))
    monkeypatch.setattr(pretrain_report, "task_of", lambda name: row)
    assert pretrain_report.known_entropy("word", [[1, 2], [3]]) == pytest.approx(6.0 * 2 / 5)
    monkeypatch.setattr(pretrain_report, "task_of", lambda name: replace(row, entropy=None))
    assert pretrain_report.known_entropy("text.txt", [[1]]) is None


def test_the_rate_the_clip_and_the_decay_of_each_step(here, steps_of):
    seen = steps_of(pretrain)
    pretrain.main(config(steps=5, warmup=3, lr=1e-2, clip=0.3, weight_decay=0.2))
    assert_rate_clip_decay(seen, "cosine", 0.1)


def test_micro_batches_and_recomputing_do_what_they_say(here, monkeypatch):
    """That they change nothing in the weights is tested elsewhere, and would be so if they did nothing."""
    sizes, loss = [], pretrain.next_token_loss
    monkeypatch.setattr(pretrain, "next_token_loss", lambda *args: sizes.append(len(args[1])) or loss(*args))
    pretrain.main(config(name="cut", steps=1, batch=8, micro_batch=3))
    assert sizes[:3] == [3, 3, 2]
    calls, forward = [], transformer.Block.forward
    monkeypatch.setattr(transformer.Block, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    pretrain.main(config(name="plain", steps=1))
    plain = len(calls)
    pretrain.main(config(name="again", steps=1, recompute=True))
    assert len(calls) - plain > plain


def test_what_is_logged(here, monkeypatch):
    monkeypatch.setattr(pretrain_report, "peak_flops", lambda dist: 1e12)
    limit = 0.9
    pretrain.main(config(clip=limit, steps=20, lr=1e-2, schedule="wsd", floor=0.0))
    norms, clipped = metrics("runs/pretrain", "grad_norm"), metrics("runs/pretrain", "grad_clipped")
    assert clipped == {step: float(norm > limit) for step, norm in norms.items()}
    assert 0 < sum(clipped.values()) < 20
    nats, bits = (metrics("runs/pretrain", f"valid_{x}")[20] for x in ("loss", "bits_per_byte"))
    assert bits == pytest.approx(nats / math.log(2))  # a character is a byte here
    assert metrics("runs/pretrain", "lr")[20] == pytest.approx(1e-2 / 4)
    speed, mfu = metrics("runs/pretrain", "tokens_per_second")[20], metrics("runs/pretrain", "mfu")[20]
    assert 0 < mfu < 1 < speed
    per_token = pretrain_report.flops_per_token(open_checkpoint("runs/pretrain/last")[0], MODEL["context"])
    assert mfu == pytest.approx(speed * per_token / 1e12)


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
    with pytest.raises(DivergedError, match="logits are not finite"):  # after the last step, which no loss shows
        pretrain.main(config(name="hot", lr=1e38, steps=1, warmup=0))
    pretrain.main(config(name="hot", lr=1e38, steps=3, warmup=0, skip_nonfinite=True))
    assert metrics("runs/hot", "skipped")[3] == 2
    assert "no sample: the model's logits are not finite" in (here / "runs/hot/samples.md").read_text(encoding="utf-8")


def test_a_diverged_run_that_goes_on_logs_null(here):
    pretrain.main(config(skip_nonfinite=True, lr=1e30))
    log = (here / "runs/pretrain/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line, parse_constant=pytest.fail) for line in log][1:]
    assert len(steps) == 6
    assert steps[-1]["grad_norm"] is None
    assert steps[-1]["skipped"] > 0
    assert "logits are not finite" in (here / "runs/pretrain/samples.md").read_text(encoding="utf-8")


def test_fp16_run_skips_what_overflowed_and_resumes_its_scale(here, monkeypatch):
    """On a CPU, autocast to fp16; the second step's gradient overflows, its loss does not."""

    def loss(*args):
        loss, scale = plain(*args), 1e38 if next(calls) == 1 else 1
        loss.register_hook(lambda gradient: gradient * scale)  # going back alone
        return loss

    calls, plain = itertools.count(), pretrain.next_token_loss
    monkeypatch.setattr(pretrain, "next_token_loss", loss)
    monkeypatch.setattr(pretrain_report, "draw_curves", lambda *args: None)
    whole = config(name="whole", dtype="fp16", save_every=1, keep=6)
    pretrain.main(whole)
    assert metrics("runs/whole", "grad_norm")[2] is None  # not finite
    assert metrics("runs/whole", "skipped") == {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    assert_same_weights("runs/whole/step_0000001", "runs/whole/step_0000002")
    scaler = torch.load("runs/whole/last/trainer_state.pt")["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (2.0**15, 4)  # from 2¹⁶, then four good steps
    shutil.copytree("runs/whole/step_0000004", "runs/parts/last")
    pretrain.main(replace(whole, name="parts", resume=True))
    assert torch.load("runs/parts/last/trainer_state.pt")["scaler"] == scaler
    assert_same_weights("runs/whole/last", "runs/parts/last")
    pretrain.main(config(name="plain", steps=1))
    assert metrics("runs/plain", "loss")[1] == pytest.approx(metrics("runs/whole", "loss")[1], rel=1e-3)


@pytest.mark.parametrize(("dtype", "step"), [("fp32", 0), ("fp16", 16)])  # a scale of 2¹⁶, halved 17 times
def test_a_gradient_that_is_never_finite_stops_the_run(here, monkeypatch, dtype, step):
    def loss(*args):
        loss = plain(*args)
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    plain = pretrain.next_token_loss
    monkeypatch.setattr(pretrain, "next_token_loss", loss)
    with pytest.raises(DivergedError, match=rf"the loss is \d.*, the gradient norm is nan at step {step} "):
        pretrain.main(config(steps=20, eval_every=20, dtype=dtype))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_cut_into_micro_batches_changes_nothing(here, scaled, optimizer):
    """Nor does a gradient scaler."""
    pretrain.main(config(name="whole", optimizer=optimizer))
    scaled("pretrain")
    pretrain.main(config(name="cut", micro_batch=3, optimizer=optimizer))
    a, b = metrics("runs/whole", "loss"), metrics("runs/cut", "loss")
    assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-5)
    assert metrics("runs/whole", "grad_norm")[1] == pytest.approx(metrics("runs/cut", "grad_norm")[1], rel=1e-5)


def test_two_processes_equal_one(here):
    one = script("pretrain.py", *flags(name="one"), cwd=here)
    two = script("pretrain.py", *flags(name="two", micro_batch=2), cwd=here, processes=2, torchrun=True)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert "Warning" not in one.stderr + two.stderr
    assert_same_metrics("runs/one", "runs/two", ("loss", "grad_norm", "valid_loss"), rel=1e-5)
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-5, rtol=1e-4)
    assert_ranks_draw_apart("runs/two")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(here, optimizer):
    changes = dict(optimizer=optimizer, save_every=3, model=TransformerConfig(**MODEL, dropout=0.2))
    assert_resumed_equals_whole(pretrain, config, 3, ["loss"], **changes)
    assert_same_weights("runs/whole/best", "runs/parts/best")


def test_the_stream_is_made_once(here, monkeypatch):
    pretrain.main(config(name="first"))
    monkeypatch.setattr(streams, "write_stream", None)
    pretrain.main(config(name="second"))
    assert metrics("runs/first", "loss") == metrics("runs/second", "loss")
    assert len(list((here / "runs/streams").glob("*.bin"))) == 2  # training and validation


def test_continuing_from_a_checkpoint_takes_its_architecture(here):
    pretrain.main(config(name="first"))
    pretrain.main(config(name="second", init="runs/first", steps=1, model=TransformerConfig()))
    assert metrics("runs/second", "loss")[1] < metrics("runs/first", "loss")[1]
    pretrain.main(config(name="third", init="runs/first", steps=1))  # the flags of the first, which agree with it
    no_norm = TransformerConfig(qk_norm=False)
    for flag, value, changes in [
        ("model.qk_norm", False, {"model": no_norm}),
        ("tokenizer", "byte", {"tokenizer": "byte"}),
        ("vocab_size", 500, {"vocab_size": 500}),
        ("model.n_expert_active", 3, {"model": TransformerConfig(n_expert_active=3)}),
    ]:
        with pytest.raises(ConfigError, match=f"--{flag} {value} has no effect with --init runs/first"):
            pretrain.main(config(name="fourth", init="runs/first", steps=1, **changes))
    with pytest.raises(ConfigError, match="--z_weight has no effect on runs/first"):
        pretrain.main(config(name="fourth", init="runs/first", steps=1, z_weight=0.5))
    assert not (here / "runs/fourth").exists()


def test_bad_input_is_one_line_and_leaves_nothing(here):
    (here / "empty.txt").write_text("", encoding="utf-8")
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


MIXTURE = dict(n_expert_active=1, expert_width=8, n_shared_expert=1, moe_every=2, norm_topk_prob=False)
MIXTURE |= dict(routed_scale=2.0, balancing="bias", capacity_factor=1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"optimizer": "sgd"}, "sgd"),
        ({"dtype": "int8"}, "int8"),
        ({"device": "abacus"}, "abacus"),
        ({"resume": True}, "no saved run"),
        *[
            ({"name": name}, "a run's directory")
            for name in ("../x", ".", "/x", "a/./b", "start", "streams", "evaluate")
        ],
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
        (
            {"compile": True, "recompute": True, "model": TransformerConfig(n_expert=2)},
            "with experts --compile and --recompute",
        ),
        ({"vocab_size": 100}, "--vocab_size has no effect .*--tokenizer char"),
        *[
            ({"model": TransformerConfig(**{name: value})}, f"--model.{name} has no effect .*--model.n_expert")
            for name, value in MIXTURE.items()
        ],
        *[
            ({name: 0.5, "model": TransformerConfig(**model)}, f"--{name} has no effect .*--model.{needed}")
            for name, model, needed in (
                ("aux_weight", {}, "n_expert"),
                ("z_weight", {}, "n_expert"),
                ("bias_rate", {}, "n_expert"),
                ("aux_weight", {"n_expert": 2, "balancing": "bias"}, "balancing aux"),
                ("bias_rate", {"n_expert": 2}, "balancing bias"),
            )
        ],
        *[
            ({"model": TransformerConfig(**MODEL | model)}, f"--model.{name} has no effect")
            for name, model in (
                ("rope_theta", {"positions": "learned", "rope_theta": 5e5}),
                ("rope_theta", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}),
                ("rope_scaling", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
                ("ffn_width", {"n_expert": 2, "expert_width": 8, "ffn_width": 16}),
            )
        ],
    ],
)
def test_bad_settings(here, changes, message, monkeypatch):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)  # wandb is not there
    earlier = here / "runs/pretrain/metrics.jsonl"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    with pytest.raises((ConfigError, TokenizerError), match=message):
        pretrain.main(config(**changes))
    assert earlier.exists()  # a typo moves no earlier run aside


def test_the_alphabet_is_that_of_the_whole_text(here):
    """The ß is in the validation part alone. A text for --init must do with the alphabet that there is."""
    (here / "odd.txt").write_text(TEXT + "ß", encoding="utf-8")
    pretrain.main(config(tokenizer="char", data="odd.txt"))
    tokenizer = load_tokenizer("runs/pretrain/last")
    assert tokenizer.vocab_size == len({*TEXT, *"\nsystemuserassistant", "ß"}) + 3
    assert tokenizer.decode(tokenizer.encode("ß")) == "ß"
    (here / "odder.txt").write_text(TEXT + "aǅ", encoding="utf-8")
    place = r"valid text of odder.txt: character 'ǅ' in '[^']*aǅ' was not in"
    with pytest.raises(TokenizerError, match=place):
        pretrain.main(config(data="odder.txt", init="runs/pretrain/last", name="more"))


def test_the_best_is_chosen_on_the_same_rows_each_time(here, monkeypatch):
    """The last evaluation reads all of the text, which may be easier; that is no reason to call it the best."""
    losses = iter([(3.0, 1.0), (3.5, 1.0), (2.0, 1.0)])  # the part at step 2, the part at 4, the whole at 4
    monkeypatch.setattr(pretrain_report, "validate", lambda *_: next(losses))
    result = pretrain.main(config(steps=4, eval_every=2))
    assert result["valid_loss"] == 2.0
    assert list(metrics("runs/pretrain", "valid_loss").values()) == [3.0, 2.0]
    best, last = (weights(f"runs/pretrain/{name}") for name in ("best", "last"))
    assert any(not torch.equal(best[k], last[k]) for k in best)
