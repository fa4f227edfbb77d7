"""sft.py: the mask, the loss and its invariances, packing, pacing, the figures, and the guarantees of a run."""

import importlib
import json
import random
import re
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import (
    assert_one_line_error,
    assert_ranks_draw_apart,
    assert_rate_clip_decay,
    assert_resumed_equals_whole,
    assert_same_metrics,
    assert_same_weights,
    flags_of,
    metrics,
    script,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import sft
from data import Pair, Problem, conversation, encode_answers, load_problems, rows_at
from evaluate import METRICS
from lora import LoraConfig
from sft import Config, collate, encode_example, pack_examples, sft_loss
from support import calls_start, devices, ppo_setup, pretrained_start, runs, sft_report, sft_start, sweeps, teachers
from support.checkpoints import open_checkpoint
from support.errors import CheckpointError, ConfigError, DivergedError
from support.locks import LOCKED
from support.splits import split_of
from transformer import Transformer, TransformerConfig, token_logprobs

SMALL = dict(init="start", steps=4, batch=6, micro_batch=6, warmup=1, eval_every=2, eval_problems=4, test_problems=5)
SMALL |= dict(max_new_tokens=8, device="cpu", demonstrations=40)


def config(**changes):
    return Config(**(SMALL | changes))


@pytest.fixture
def here(scratch, tokenizer):
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16))
    raw.save_pretrained("start")
    tokenizer.save_pretrained("start")
    return scratch


def test_exactly_the_answer_and_its_end_are_trained(tokenizer):
    problem = load_problems("word", "train", 1)[0]
    ids, mask = tokenizer.encode_chat(conversation(problem))
    trained = [i for i, flag in zip(ids, mask, strict=True) if flag]
    assert trained == [*tokenizer.encode(problem.solution), tokenizer.special_ids["<|im_end|>"]]
    prompt = data.encode_prompt(tokenizer, problem)
    assert ids[: len(prompt)] == prompt
    assert not any(mask[: len(prompt)])


TURNS = (("system", "Be brief."), ("user", "How many?"), ("assistant", "Three. #### 3"))


def test_every_turn_of_the_assistant_is_trained(tokenizer):
    problem = Problem("And now?", "Four. #### 4", "4", 1, "file", TURNS)
    ids, flags = encode_example(tokenizer, problem)
    end = tokenizer.special_ids["<|im_end|>"]
    said = [[*tokenizer.encode(text), end] for text in ("Three. #### 3", "Four. #### 4")]
    assert [i for i, flag in zip(ids, flags, strict=True) if flag] == said[0] + said[1]
    prompt = data.encode_prompt(tokenizer, problem)
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :] == [*said[1], *tokenizer.encode("\n")]


def test_a_pair_is_encoded_after_all_that_was_said(tokenizer):
    pair = Pair("And 3?", "Yes.", "No.", "file", (("user", "Is 2 even?"), ("assistant", "It is.")))
    prompt, answers = encode_answers(tokenizer, pair)
    said = "<|im_start|>user\nIs 2 even?<|im_end|>\n<|im_start|>assistant\nIt is.<|im_end|>\n"
    assert tokenizer.decode(prompt) == said + "<|im_start|>user\nAnd 3?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(answer) for answer in answers] == ["Yes.<|im_end|>", "No.<|im_end|>"]


def test_a_rating_weighs_its_tokens(tokenizer):
    rated = [Problem("Q?", "An answer.", "", 1, "file", rating=r) for r in (2, 4, 5, None)]
    examples = [encode_example(tokenizer, p, weighted=True) for p in rated]
    mask = collate(examples, 0).loss_mask
    assert mask.dtype == torch.float32
    assert [row.unique().tolist() for row in mask] == [[0, 0.25], [0, 0.75], [0, 1.0], [0, 1.0]]
    torch.manual_seed(0)
    logprobs = -torch.rand(4, mask.shape[1], dtype=torch.float64)
    loss, _ = sft_loss(logprobs, mask)
    rows = [logprobs[i][mask[i] > 0].sum() for i in range(4)]
    n = int((mask[0] > 0).sum())
    expected = -(0.25 * rows[0] + 0.75 * rows[1] + rows[2] + rows[3]) / (3.0 * n)
    torch.testing.assert_close(loss, expected)
    light, _ = sft_loss(logprobs[:1, :3], torch.tensor([[0.0, 0.25, 0.25]]))  # n is 1/2, and divides as any other
    torch.testing.assert_close(light, -logprobs[0, 1:3].mean())


def test_collate_pads_on_the_right_with_mask_false():
    rows = collate([([5, 6, 7], [False, True, True]), ([8], [True])], pad=3)
    tokens, mask = rows.tokens, rows.loss_mask
    assert tokens.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert mask.tolist() == [[False, True, True], [True, False, False]]


def test_loss_is_torchs_cross_entropy_over_the_masked_targets():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.randint(0, 7, (3, 5)), torch.rand(3, 5) < 0.5
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    loss, figures = sft_loss(logprobs, mask)
    ignored = targets.masked_fill(~mask, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ignored.flatten())
    torch.testing.assert_close(loss, expected)
    assert figures["loss"] == pytest.approx(loss.item())
    (ours,), (theirs,) = torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs)
    assert (ours[~mask] == 0).all()


def test_the_loss_on_a_prompt_alone_has_no_gradient():
    raw = Transformer(TransformerConfig(20, context=8, n_layer=1, n_head=2, n_kv_head=1, width=8))
    loss, _ = sft_loss(token_logprobs(raw, torch.randint(0, 20, (2, 6))), torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()
    assert all((p.grad == 0).all() for p in raw.parameters())


def test_a_pad_changes_nothing(tokenizer):
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, width=16)).double()
    examples = [tokenizer.encode_chat(conversation(p)) for p in load_problems("word", "train", 3)]

    def gradient(batches):
        raw.zero_grad()
        n = sum(sum(flags) for _, flags in examples)
        for batch in batches:
            rows = collate(batch, tokenizer.endoftext_id)
            tokens, mask = rows.tokens, rows.loss_mask
            sft_loss(token_logprobs(raw, tokens), mask[:, 1:], n)[0].backward()
        return torch.cat([p.grad.flatten() for p in raw.parameters()])

    together, apart = gradient([examples]), gradient([[e] for e in examples])
    torch.testing.assert_close(together, apart, atol=1e-7, rtol=1e-5)
    assert together.norm() > 1e-3


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_packing_changes_neither_loss_nor_gradient(tokenizer, positions):
    torch.manual_seed(0)
    layout = TransformerConfig(tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=1, width=16, positions=positions)
    raw = Transformer(layout).double()
    with torch.no_grad():
        for p in raw.parameters():
            p.mul_(3)  # a model at birth hardly looks at other tokens
    problems = [*load_problems("word", "train", 7, (1, 2, 3)), Problem("?", "Four.", "", 1, "file", TURNS)]
    examples = [encode_example(tokenizer, p) for p in problems]
    room = 256

    def gradient(tokens, loss_mask, positions=None, visible=None):
        raw.zero_grad()
        logprobs = token_logprobs(raw, tokens, positions=positions, mask=visible)
        loss, _ = sft_loss(logprobs, loss_mask[:, 1:])
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in raw.parameters()])

    padded = collate(examples, tokenizer.endoftext_id)
    packed = pack_examples(examples, tokenizer.endoftext_id, room)
    assert len(packed.tokens) < len(examples)
    assert packed.tokens.shape[1] <= room
    assert packed.loss_mask.sum() == padded.loss_mask.sum()
    loss, theirs = gradient(**vars(padded))
    again, ours = gradient(**vars(packed))
    assert again == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-5)
    assert theirs.norm() > 1e-3
    leaking, _ = gradient(packed.tokens, packed.loss_mask, packed.positions)  # no document mask: another loss
    assert abs(leaking - loss) > 1e-3
    if positions == "learned":
        shifted, _ = gradient(packed.tokens, packed.loss_mask, None, packed.visible)  # no positions that start anew
        assert abs(shifted - loss) > 1e-3


def test_packing_by_hand():
    examples = [([5, 6, 7], [False, True, True]), ([8, 9, 4, 3], [False, False, True, True]), ([1, 2], [False, True])]
    rows = pack_examples(examples, 0, 6)
    tokens, mask, positions, visible = rows.tokens, rows.loss_mask, rows.positions, rows.visible
    assert tokens.tolist() == [[8, 9, 4, 3, 1, 2], [5, 6, 7, 0, 0, 0]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert visible[0, 0, 5].tolist() == [False] * 4 + [True, True]
    assert visible[0, 0, 3].tolist() == [True] * 4 + [False, False]


def test_pacing_opens_the_easy_first():
    assert [sft.pacing(s, 100, 0.2, 0.5) for s in (0, 25, 50, 99)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert sft.pacing(0, 100, 0.2, 0.0) == 1.0  # after no step at all
    assert [sft.pacing(s, 10, 0.2, 0.05) for s in (0, 1)] == [0.2, 1.0]
    levels = [random.Random(i).randrange(1, 4) for i in range(60)]
    easy, hard = (sft.rank_examples(levels, order, 0) for order in ("curriculum", "anti"))
    assert sorted(easy) == sorted(hard) == list(range(60))
    assert [levels[i] for i in easy] == sorted(levels)
    assert [levels[i] for i in hard] == sorted(levels, reverse=True)
    assert easy != sft.rank_examples(levels, "curriculum", 1)  # ties are shuffled
    for step in range(20):
        chosen = sft.paced_rows(easy, step, 12, 0, 0.3)
        assert set(chosen) <= set(easy[:18])
        assert len(set(chosen)) == 12
        assert chosen == sft.paced_rows(easy, step, 12, 0, 0.3)  # a function of the step
    assert len(sft.paced_rows(easy, 0, 12, 0, 0.01)) == 12  # one example is open: it is repeated
    drawn = {tuple(sft.paced_rows(easy, step, 12, seed, 0.3)) for step in range(5) for seed in (0, 1)}
    assert len(drawn) == 10  # each step draws afresh, and so does each seed


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_sees_each_example_once(n, batch, seed):
    steps = 3 * n
    seen = [i for step in range(steps) for i in rows_at(n, step, batch, seed)]
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert rows_at(n, 2, batch, seed) == seen[2 * batch : 3 * batch]  # whatever came before


def test_a_run_ends_at_the_accuracy_asked_for(here, monkeypatch):
    reached = iter([0.2, 0.7, 0.9])
    said = dict.fromkeys(METRICS, 0) | {"answers": [], "low": 0, "high": 1, "n": 4, "by_level": {}}
    monkeypatch.setattr(sft_report, "evaluate", lambda *a, **k: said | {"accuracy": next(reached, 0.1)})
    sft.main(config(steps=9, eval_every=2, stop_at=0.5, name="early"))
    assert list(metrics("runs/early", "accuracy")) == [2, 4]
    assert max(metrics("runs/early", "loss")) == 4
    state = torch.load("runs/early/last/trainer_state.pt", weights_only=True)
    assert state["step"] == 4
    sft.main(config(steps=9, eval_every=2, stop_at=0.5, name="early", resume=True))  # there is nothing left to do
    with pytest.raises(ConfigError, match=r"--stop_at is -1\.0; it must be at least 0"):  # it would not even begin
        config(stop_at=-1.0)
    assert max(metrics("runs/early", "loss")) == 4


def test_a_start_is_made_once_and_a_broken_one_anew(here, monkeypatch, capsys):
    calls = []

    def attempt(asked):
        calls.append(asked.name)
        (runs.RUNS / asked.name / "best").mkdir(parents=True, exist_ok=True)
        (runs.RUNS / asked.name / "best" / "config.json").touch()
        if len(calls) == 1:
            raise KeyboardInterrupt  # a checkpoint is there, but the run is not at its end

    monkeypatch.setattr(sft, "main", attempt)
    dist = devices.setup("cpu")
    with pytest.raises(KeyboardInterrupt):
        sft_start.sft_start(config(init=None), dist)
    for _ in range(2):
        assert sft_start.sft_start(config(init=None), dist) == "runs/start/word-seed0-sft"
    assert calls == ["start/word-seed0-sft"] * 2
    assert "made earlier" in capsys.readouterr().out
    sft_start.sft_start(config(init=None, levels=[3]), dist)  # another start
    sft_start.sft_start(config(init=None, levels=[3], device="auto"), dist)  # the same
    assert calls[2:] == ["start/word-seed0-sft-levels3"]  # beside the other, which a run may be reading
    assert Path("runs/start/word-seed0-sft/finished").is_file()
    assert re.fullmatch(r"start/my_chats-[0-9a-f]{6}-seed0-sft", runs.start_name("my chats.jsonl", 0, "sft"))
    odd = [runs.start_name(f"caf{byte}.jsonl", 0, "sft") for byte in ("\udce9", "\udcea")]  # bytes that are no text
    assert odd[0] != odd[1]
    names = {runs.start_name(data, 0, "pretrain") for data in ("word", "a/word.csv", "b/word.csv", "a/../a/word.csv")}
    assert len(names) == 3
    assert len({runs.start_name("word", 0, "sft", levels) for levels in ([1, 23], [12, 3], [1, 2, 3], [123])}) == 4


def test_records_that_sft_skips_its_start_skips_too(here, monkeypatch):
    """In a start beside the one that skips none, which a run may be reading."""
    monkeypatch.setattr(
        pretrained_start, "make_start_once", lambda name, what, stage, settings, _: stage.Config(name=name, **settings)
    )
    dist, configs = devices.setup("cpu"), [sft.Config(data="mine.jsonl", skip_bad=skip) for skip in (False, True)]
    starts = [pretrained_start.pretrained_start(given, dist) for given in configs]
    assert [(start.data, start.skip_bad) for start in starts] == [("mine.jsonl", False), ("mine.jsonl", True)]
    assert starts[0].name == runs.start_name("mine.jsonl", 0, "pretrain") != starts[1].name


def test_a_start_on_another_task_may_write_answers_as_long_as_the_runs(monkeypatch):
    """Cut off, all its validation answers would be wrong and best/ would be that of step 5."""
    for module in (teachers, sft_start):
        monkeypatch.setattr(module, "make_start_once", lambda name, what, stage, settings, dist: (name, settings))
    dist, grpo = devices.setup("cpu"), importlib.import_module("grpo")
    for start in (sft_start.sft_start, teachers.student_start, teachers.teacher_start):
        short, settings = start(grpo.Config(data="word_large", max_new_tokens=64), dist)
        assert settings.get("max_new_tokens", 64) == 64
        long, settings = start(grpo.Config(data="word_large", max_new_tokens=150), dist)
        assert settings["max_new_tokens"] == 150
        assert long.startswith(short)
        assert long != short
        word, settings = start(grpo.Config(max_new_tokens=150), dist)  # its solutions fit
        assert settings.get("max_new_tokens", 64) == 64
        assert word.startswith("start/word-seed0")


@pytest.mark.parametrize(
    "stage", ["sft", "reward_model", "dpo", "ppo", "grpo", "gdpo", "rejection", "distill", "agent"]
)
@pytest.mark.parametrize("options", [{"resume": True}, {"name": "../elsewhere"}])
def test_what_cannot_run_makes_no_start(here, monkeypatch, stage, options):
    for start in (pretrained_start, sft_start, teachers, ppo_setup, calls_start):
        monkeypatch.setattr(start, "make_start_once", lambda *_: pytest.fail("a start was begun"))
    module = importlib.import_module(stage)
    with pytest.raises(ConfigError, match=r"holds no saved run|cannot be a run's directory"):
        module.main(module.Config(**{"name": "nowhere", **options}))


def test_a_start_that_two_runs_want_is_made_by_one(here, monkeypatch, capsys):
    """The second comes while the first is at it, waits, and takes what the first has made."""
    made, begun = [], threading.Event()

    def attempt(asked):
        begun.set()
        time.sleep(0.3)  # the other has asked by now
        made.append(asked.name)
        (runs.RUNS / asked.name / "best").mkdir(parents=True)

    def first():
        sft_start.sft_start(config(init=None), dist)

    monkeypatch.setattr(sft, "main", attempt)
    dist = devices.setup("cpu")
    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(10)
    assert sft_start.sft_start(config(init=None), dist) == "runs/start/word-seed0-sft"
    thread.join()
    assert made == ["start/word-seed0-sft"]
    assert "made earlier" in capsys.readouterr().out


def test_a_run_learns_and_leaves_everything(here):
    result = sft.main(config(steps=40, lr=1e-2, eval_every=20))
    losses = list(metrics("runs/sft", "loss").values())
    assert losses[-1] < 0.7 * losses[0]
    assert 0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1
    for name in ("best/model.safetensors", "last/trainer_state.pt", "curves.png", "samples.md"):
        assert (here / "runs" / "sft" / name).exists(), name
    stops = json.loads((here / "runs/sft/best/generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert stops == list(open_checkpoint("runs/sft")[1].stop_ids)


def test_the_cut_into_micro_batches_changes_nothing(here, scaled):
    """Nor does a gradient scaler."""
    sft.main(config(name="whole"))
    scaled("sft")
    sft.main(config(name="cut", micro_batch=2))
    assert_same_metrics("runs/whole", "runs/cut", ("loss", "grad_norm"), rel=1e-4)


def test_packed_run_equals_padded_run(here):
    sft.main(config(name="padded", micro_batch=3))
    sft.main(config(name="packed", packing=True))
    assert_same_metrics("runs/padded", "runs/packed", ("loss", "grad_norm"), rel=1e-4)


def test_the_rate_the_clip_and_the_decay_of_each_step(here, steps_of):
    seen = steps_of(sft)
    sft.main(config(steps=5, warmup=3, lr=1e-2, clip=0.3, weight_decay=0.2))
    assert_rate_clip_decay(seen, "cosine", 0.1)


def test_packing_packs(here, calls_of):
    packed = calls_of(sft, "pack_examples")
    sft.main(config(packing=True, steps=1))
    assert packed
    assert all(len(call.result.tokens) < len(call.args[0]) for call in packed)


@pytest.mark.parametrize(("order", "first"), [("curriculum", 1), ("anti", 2)])
def test_a_curriculum_begins_at_its_end(here, calls_of, order, first):
    chosen = calls_of(sft, "paced_rows")
    sft.main(config(order=order, steps=10, pace_start=0.2, pace=0.8, eval_every=10))
    levels = [p.level for p in load_problems("word", "train", 40)]
    assert {levels[i] for i in chosen[0].result} == {first}
    assert {levels[i] for i in chosen[-1].result} == {1, 2}
    share = list(metrics("runs/sft", "open").values())
    assert share == pytest.approx([min(1, 0.2 + 0.8 * s / 8) for s in range(10)])


def test_two_processes_equal_one(here):
    flags = flags_of(SMALL | dict(packing=True, order="curriculum", samples=2))
    sft.main(config(name="one", packing=True, order="curriculum", samples=2))
    two = script("sft.py", *flags, "--name", "two", "--micro_batch", 3, cwd=here, processes=2)
    assert two.returncode == 0, two.stderr
    sharded = script("sft.py", *flags, "--name", "sharded", "--fsdp", "true", cwd=here, processes=2)
    assert sharded.returncode == 0, sharded.stderr
    names = ("loss", "valid_loss", "grad_norm", "accuracy", "length")
    for other in ("two", "sharded"):
        assert_same_metrics("runs/one", f"runs/{other}", names, rel=1e-4)
        assert_same_weights("runs/one/last", f"runs/{other}/last", atol=1e-5, rtol=1e-4)
        assert_ranks_draw_apart(f"runs/{other}")


def test_resumed_equals_uninterrupted_bit_for_bit(here):
    assert_resumed_equals_whole(sft, config, 2, ["loss"], dropout=0.1)
    sft.main(config(name="plain", steps=1))
    assert metrics("runs/plain", "loss")[1] != metrics("runs/whole", "loss")[1]  # dropout acts


def write_ratings(path, n=120):
    rows = [{"prompt": f"Say {i}", "response": f"Well, {i}.", "rating": 1 + i % 5} for i in range(n)]
    rows += [{"instruction": f"Say nicely {i}", "output": f"Well, {i}."} for i in range(n // 4)]  # unrated
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.mark.parametrize("rated", ["weights", "threshold"])
def test_a_run_on_rated_responses(here, capsys, rated):
    """The first step's loss by a loop over the batch; what is learned and what is said."""
    write_ratings(here / "rated.jsonl")
    changes = dict(steps=30, lr=1e-2, demonstrations=None, eval_every=30, micro_batch=2)
    result = sft.main(config(data="rated.jsonl", rated=rated, **changes))
    said = capsys.readouterr().out
    losses = list(metrics("runs/sft", "loss").values())
    assert losses[-1] < 0.8 * losses[0]
    assert ("rated 1, which has weight 0: left out" if rated == "weights" else "rated below 4: left out") in said
    assert "\ntoken F1, greedy" in said
    assert "accuracy" not in said  # there is no answer to check
    assert 0 <= result["f1"] <= 1
    policy, tokenizer, _ = open_checkpoint("start")
    least, total, n = 2 if rated == "weights" else 4, 0.0, 0.0
    kept = [p for p in load_problems("rated.jsonl", "train") if p.rating is None or p.rating >= least]
    for problem in (kept[i] for i in rows_at(len(kept), 0, 6, 0)):
        weight = 1.0 if rated == "threshold" or problem.rating is None else (problem.rating - 1) / 4
        ids, flags = tokenizer.encode_chat(conversation(problem))
        logprobs = token_logprobs(policy, torch.tensor([ids]))[0][torch.tensor(flags[1:])]
        total, n = total - weight * logprobs.sum().item(), n + weight * len(logprobs)
    assert losses[0] == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("flag", [{"rated": "threshold"}, {"min_rating": 2.0}])
def test_a_flag_for_ratings_is_refused_where_nothing_is_rated(here, flag):
    with pytest.raises(ConfigError, match=f"--{next(iter(flag))} has no use here: no response of word is rated"):
        sft.main(config(**flag))
    assert not (here / "runs").exists()


def test_a_run_on_conversations(here):
    three = {"role": "assistant", "content": "Three."}
    asked = [[{"role": "user", "content": words} for words in (f"How many {i}?", "And now?")] for i in range(80)]
    chats = [{"messages": [first, three, second, three]} for first, second in asked]
    (here / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    result = sft.main(config(data="chats.jsonl", steps=60, lr=1e-2, demonstrations=None, eval_every=60, packing=True))
    assert result["f1"] > 0.9  # it always says the same


def test_a_heading_does_not_turn_a_run_into_exact_match(here, capsys):
    rows = [{"instruction": f"How {i}?", "output": f"#### {i}. Shape\nIt is round."} for i in range(80)]
    (here / "free.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = sft.main(config(data="free.jsonl", demonstrations=None))
    assert (result["valid"], result["test"]) == (max(metrics("runs/sft", "f1").values()), result["f1"])
    assert "accuracy" not in capsys.readouterr().out


def test_some_problems_have_an_answer_and_some_not(here, capsys, monkeypatch):
    """best/ is chosen by the accuracy of the ones and the F1 of the others, together."""
    rows = [
        {"question": f"How {i}?", "answer": f"It is {i}.\n#### {i}" if i % 2 else "It is round."} for i in range(150)
    ]
    (here / "both.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    kept = []
    monkeypatch.setattr(runs.Run, "keep_best", lambda run, value: kept.append(value))
    sizes = dict(demonstrations=None, eval_problems=20, test_problems=20, max_new_tokens=16)
    result = sft.main(config(data="both.jsonl", steps=60, lr=1e-2, eval_every=60, **sizes))
    assert 0.1 < kept[-1] == metrics("runs/sft", "own_measure")[60] < 1
    out = capsys.readouterr().out
    assert f"validation own_measure {kept[-1]:.1%}" in out
    assert "right, or token F1" in out
    assert 0 < result["test"] < 1


def test_the_test_split_has_a_measure_of_its_own(here, capsys):
    asked = [f"How {i}?" for i in range(150)]
    rows = [{"question": q, "answer": "7" if split_of(q) == "valid" else "It is round."} for q in asked]
    (here / "both.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sizes = dict(demonstrations=None, max_new_tokens=16)
    result = sft.main(config(data="both.jsonl", steps=120, lr=1e-2, eval_every=120, **sizes))
    assert result["test"] == result["f1"] > 0
    out = capsys.readouterr().out
    assert "validation accuracy 0.0%" in out
    assert "\naccuracy, greedy" not in out


def test_lora_trains_and_resumes(here):
    start = open_checkpoint("start")[0].state_dict()
    assert_resumed_equals_whole(sft, config, 2, ["loss"], lora=LoraConfig(rank=2), lr=1e-2)
    state = torch.load("runs/whole/last/trainer_state.pt", weights_only=True)
    assert state["lora"]
    after = open_checkpoint("runs/whole/last")[0].state_dict()  # a plain checkpoint, the adapters folded in
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert moved
    assert all(".wq" in name or ".wk" in name or ".wv" in name or ".wo" in name or ".ffn." in name for name in moved)


def test_sweep_takes_the_best_of_the_validation_split(here, capsys, monkeypatch):
    scores = {1e-3: 0.2, 3e-3: 0.6, 1e-2: 0.4}
    real = sft.main

    def pretended(settings, **given):
        if settings.sweep:
            return real(settings)
        assert settings.name == f"sft/lr{settings.lr:g}"
        assert settings.resume == (settings.name == "sft/lr0.001")
        return {"valid": scores[settings.lr], "test": 1 - scores[settings.lr]}

    monkeypatch.setattr(sft, "main", pretended)
    state = here / "runs/sft/lr0.001/last/trainer_state.pt"  # where an interrupted sweep stopped
    state.parent.mkdir(parents=True)
    with pytest.raises(ConfigError, match="runs/sft holds no saved run of this sweep"):
        sft.main(config(sweep=list(scores), resume=True))
    state.touch()
    result = sft.main(config(sweep=list(scores), resume=True))
    assert (result["lr"], result["valid"]) == (3e-3, 0.6)
    [best] = [line for line in capsys.readouterr().out.splitlines() if "<- best" in line]
    assert best.split()[:3] == ["0.003", "60.0%", "40.0%"]


def test_a_sweep_names_a_rate_once():
    with pytest.raises(ConfigError, match="two rates are the same in six digits"):
        config(sweep=[1e-3, 3e-3, 0.00100000001])


def test_a_sweep_that_torchrun_starts_again_goes_on(here, monkeypatch):
    seen = {}
    monkeypatch.setattr(sweeps, "restarted", lambda settings, dist: settings.name == "sft/lr0.001")
    run = lambda settings: seen.update({settings.lr: settings.resume}) or {"valid": settings.lr, "test": 0}  # noqa: E731
    sweeps.sweep(run, config(sweep=[1e-3, 3e-3]))
    assert seen == {1e-3: True, 3e-3: False}


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_sweep_of_several_processes_goes_on_only_if_all_have_the_error(here, monkeypatch, everywhere):
    """The others would wait in the next exchange for the one that went on. A model that diverged is let go."""
    alive, seen = [], []

    def run(settings):
        seen.append([model() is not None for model in alive])
        model = torch.nn.Linear(1, 1)
        alive.append(weakref.ref(model))
        if settings.lr == 1e-3:
            return {"valid": 0.5, "test": 0.5}
        error = DivergedError("NaN")
        error.on_all_ranks = everywhere
        raise error

    monkeypatch.setattr(sweeps, "setup", lambda _: devices.Dist(0, 2, torch.device("cpu")))
    monkeypatch.setattr(sweeps, "restarted", lambda *_: False)
    if everywhere:
        assert sweeps.sweep(run, config(sweep=[1.0, 1e-3]))["lr"] == 1e-3
        assert seen == [[], [False]]
    else:
        with pytest.raises(DivergedError):
            sweeps.sweep(run, config(sweep=[1.0, 1e-3]))


def test_the_runs_of_a_sweep_encode_and_answer_as_the_sweep_does(here):
    encoded, answered = [], []

    def encode(tokenizer, problem, weighted):
        encoded.append(problem)
        return encode_example(tokenizer, problem, weighted)

    def responder(tokenizer):
        answered.append(tokenizer)  # and returns None: the policy answers

    sft.main(config(sweep=[1e-3, 3e-3], steps=1), encode, responder)
    assert len(encoded) == 2 * (SMALL["demonstrations"] + SMALL["eval_problems"])
    assert len(answered) == 2


def test_the_validation_loss_is_cross_entropy_over_the_answers_of_the_validation_problems(here):
    sft.main(config(steps=2, micro_batch=3, lr=1e-2, dtype="fp32", dropout=0.3))  # which acts in training alone
    policy, tokenizer, _ = open_checkpoint("runs/sft/last", "cpu")
    total, count = 0.0, 0
    for problem in load_problems("word", "valid", SMALL["eval_problems"], (1, 2)):
        ids, flags = tokenizer.encode_chat(conversation(problem))
        with torch.no_grad():
            logits = policy(torch.tensor([ids]))[0]
        targets = torch.tensor([i if flag else -100 for i, flag in zip(ids, flags, strict=True)])
        total += torch.nn.functional.cross_entropy(logits[:-1], targets[1:], reduction="sum").item()
        count += sum(flags)
    assert metrics("runs/sft", "valid_loss") == {2: pytest.approx(total / count, abs=1e-5)}


@pytest.mark.parametrize("unusable", ["too long", "weight 0"])
def test_without_a_usable_validation_solution_there_is_no_held_out_loss(here, capsys, unusable):
    records = []
    for i in range(100):
        valid, prompt = split_of(f"{i} + 1?") == "valid", f"{i} + 1?"
        text = "so " * 200 if valid and unusable == "too long" else ""
        rating = 1 if valid and unusable == "weight 0" else 5
        records.append({"prompt": prompt, "response": f"{text}\n#### {i + 1}", "rating": rating})
    Path("rated.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    sft.main(config(data="rated.jsonl", min_rating=1.0, steps=2))
    out = capsys.readouterr().out
    assert "of 4 validation solutions have no held-out loss" in out
    assert "held out" not in out
    assert metrics("runs/sft", "valid_loss") == {}
    assert len(metrics("runs/sft", "accuracy")) == 1


def test_a_sweep_goes_on_after_a_rate_that_diverges(here, capsys):
    hot = dict(optimizer="adamw", clip=0.0, steps=3, dtype="fp32")
    result = sft.main(config(sweep=[9e5, 1e-3], **hot))
    assert result["lr"] == 1e-3
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["900000", "diverged"] in rows
    with pytest.raises(DivergedError, match="learning rate 9"):
        sft.main(config(sweep=[9e5], name="all", **hot))
    with pytest.raises(DivergedError, match="logits are not finite"):  # seen in the answers after its last step
        sft.main(config(lr=1e38, name="last", **hot | {"steps": 1}))
    sft.main(config(name="next", steps=1))
    assert Path("runs/last") not in LOCKED  # the log of the run that broke off is closed too


def test_a_typo_moves_no_earlier_run(here):
    (here / "runs/sft").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="'zz' matches no Linear layer"):
        sft.main(config(lora=LoraConfig(2, targets=["zz"])))
    assert not (here / "runs/sft.1").exists()


def test_bad_input_is_one_line(here):
    rated = here / "rated.csv"
    rated.write_text("prompt,response,rating\np,r,4\nq,s,7\n", encoding="utf-8")
    assert_one_line_error(script("sft.py", "--init", "start", "--data", "rated.csv", cwd=here), "record 2", "7")
    with pytest.raises(ConfigError, match="all examples have level 1; try --difficulty length"):
        sft.main(config(order="anti", levels=[1]))
    with pytest.raises(ConfigError, match=r"all examples have length 2$"):  # no advice to do what was done
        sft.main(config(order="anti", difficulty="length"), lambda *_: ([1, 2], [False, True]))
    for changes in (
        dict(demonstrations=0),
        dict(order="easy"),
        dict(difficulty="age"),
        dict(rated="stars"),
        dict(pace=2.0),
        dict(sweep=[0.0]),
        dict(samples=-1),
    ):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            config(**changes)
    with pytest.raises(ConfigError, match="min_rating"):
        config(min_rating=6.0)
    for changes in ({"lr": 0.5, "sweep": [0.1]}, {"difficulty": "length"}, {"pace_start": 0.5}, {"pace": 0.3}):
        with pytest.raises(ConfigError, match=f"--{next(iter(changes))} (has no effect|is for --order)"):
            config(**changes)
    (here / "bad.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": \n', encoding="utf-8")
    assert_one_line_error(script("sft.py", "--init", "start", "--data", "bad.jsonl", cwd=here), "bad.jsonl", "2")
    assert_one_line_error(script("sft.py", "--init", "start", "--data", "gsm9k", cwd=here), "gsm9k", "gsm8k")
    assert_one_line_error(script("sft.py", "--init", "nowhere", cwd=here), "nowhere")
    rows = [{"prompt": f"name {i}", "response": "some text", "rating": 5} for i in range(99)]
    (here / "free.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ConfigError, match="--samples needs answers to check"):
        sft.main(config(data="free.jsonl", samples=2, steps=1))
    assert not (here / "runs").exists()
    with pytest.raises(ConfigError, match="batch"):
        config(batch=0)
    with pytest.raises(ConfigError, match="no valid prompt fits"):
        sft.main(config(max_new_tokens=159))
