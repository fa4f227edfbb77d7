"""view.py and support/recorder.py: what is recorded against a recomputation, a run with and without it, the file when
a run dies or the disk is full, and the page in a browser."""

import base64
import gzip
import html
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, assert_same_metrics, assert_same_weights, metrics, script, stopped_after

import distill
import dpo
import grpo
import ppo
import sft
from data import Problem, encode_prompt, load_problems
from lora import LoraConfig
from reward_model import RewardModel
from support import grpo_report, log, questions, recorder, view_page
from support.errors import DataError
from support.recorder import FILE, Recorder, lines_of, packed_line, portions, read_recording, spread
from support.view_page import page_of, visible
from tokenizer_bpe import load_tokenizer
from transformer import Transformer, TransformerConfig, answer_logprobs

SMALL = dict(init="start", steps=3, max_new_tokens=8, warmup=1, eval_every=2, eval_problems=4, test_problems=4, lr=1e-2)
SMALL |= dict(device="cpu", record_every=1, optimizer="adamw")
OF_GRPO = dict(prompts=4, rollouts=4, pass_problems=2, pass_samples=2, format_weight=0.0, temperature=0.8, lr=5e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """`start` and `other`, two random models of the problems' tokens; `judge`, a random reward model."""
    folder = tmp_path_factory.mktemp("models")
    layout = TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16)
    for seed, name in enumerate(("start", "other", "judge")):
        torch.manual_seed(seed)
        model = Transformer(layout)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))  # at first all tokens are about as likely
        if name == "judge":
            model = RewardModel.from_policy(model)
            model.pad_id = tokenizer.endoftext_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def vowels(texts, problems, ended):
    """A reward that a random model earns now and then, and sometimes all answers or none to a question."""
    return [float("e" in text or "o" in text) for text in texts]


@pytest.fixture
def here(scratch, folder, monkeypatch):
    for path in folder.iterdir():
        (scratch / path.name).symlink_to(path)
    few = {split: load_problems("word", split, 60) for split in ("train", "valid", "test")}
    monkeypatch.setattr(questions, "load_problems", lambda name, split, n, *more, **options: few[split][:n])
    monkeypatch.setattr(grpo_report, "draw_curves", lambda *_: None)
    monkeypatch.setitem(grpo.REWARDS, "correct", vowels)
    return scratch


STAGES = {
    "grpo": (grpo, OF_GRPO),
    "grpo, adapters": (grpo, OF_GRPO | dict(lora=LoraConfig(2), inner_epochs=2)),
    "ppo": (ppo, dict(prompts=4, rollouts=2, reward_model="judge", minibatches=2)),
    "dpo": (dpo, dict(pairs="offline", prompts=60, batch=6, micro_batch=4)),
    "kto": (dpo, dict(pairs="offline", prompts=60, batch=6, micro_batch=4, variant="kto")),
    "sft": (sft, dict(batch=6, micro_batch=3, packing=True, dropout=0.1)),
    "distill": (distill, dict(prompts=4, teacher="other", pass_problems=2, pass_samples=2, on_policy=0.5)),
    "distill, sample": (distill, dict(prompts=4, teacher="other", pass_problems=2, pass_samples=2, loss="sample")),
}


def train(stage, **changes):
    """A tiny run of a stage, runs/NAME -> its recorded steps."""
    module, options = STAGES[stage]
    config = module.Config(**(SMALL | options | changes))
    module.main(config)
    return read_recording(Path("runs") / config.name)[1] if config.record_groups + config.watch else None


@pytest.fixture
def checkpoints(monkeypatch):
    """{step: the policy before its update}, for every step that is recorded."""
    kept, begin = {}, Recorder.begin

    def keep(self):
        kept[self.run.done + 1] = {name: w.clone() for name, w in self.run.model.state_dict().items()}
        return begin(self)

    monkeypatch.setattr(Recorder, "begin", keep)
    return kept


def opened(weights):
    model = Transformer.from_pretrained("start")
    model.load_state_dict(weights)
    return model.eval()


def plain_logprobs(model, prompt, ids, temperature=1.0):
    """Each token's log π, in the plain form."""
    with torch.no_grad():
        logprobs, _ = answer_logprobs(model, [prompt], [ids], temperature)
    return logprobs[0, : len(ids)]


def close(recorded, computed, **tolerance):
    """Five digits are recorded."""
    tolerance = dict(rtol=1e-4, atol=2e-5) | tolerance
    torch.testing.assert_close(torch.tensor(recorded, dtype=torch.float32), computed.float(), **tolerance)


# ------------------------------------------------------------------------------------------------ what is recorded


def test_grpo_records_what_the_checkpoints_and_the_formulas_say(here, checkpoints):
    records = train("grpo", beta=0.3)
    assert [record["step"] for record in records] == [1, 2, 3]
    start, seen, B = (
        Transformer.from_pretrained("start").eval(),
        {"stopped": 0, "moved": 0, "pushed": 0, "silent": 0},
        8,
    )
    tokenizer = load_tokenizer("start")
    asked = {p.question: encode_prompt(tokenizer, p) for p in load_problems("word", "train", 60)}
    for record in records:
        policy = opened(checkpoints[record["step"]])
        trained = [group for group in record["groups"] if not group["watched"]]
        assert (len(trained), len(record["groups"])) == (3, 5)
        for slot, group in enumerate(trained):
            paid = torch.tensor([a["rewards"]["correct"] for a in group["answers"]])
            A = (paid - paid.mean()) / (paid.std() + 1e-4)
            if (paid == paid[0]).all():
                A.zero_()
                seen["silent"] += 1
            for a, advantage in zip(group["answers"], A, strict=True):
                assert a["rewards"]["correct"] == vowels([tokenizer.decode_answer(a["ids"])], 0, 0)[0]
                close(a["advantage"], advantage)
                prompt, length = asked[group["question"]], len(a["ids"])
                old = plain_logprobs(policy, prompt, a["ids"], 0.8)  # the sampler's: before the update
                close(a["ref"], plain_logprobs(start, prompt, a["ids"], 0.8))
                entropies = entropy_of(policy, prompt, a["ids"], 0.8)
                close(a["entropy"], entropies)
                if not A.any():
                    assert "gets" not in a
                    close(a["logp"], old)
                    continue
                close(a["old"], old)
                if slot % 2 == 0:  # the first minibatch: nothing has moved yet
                    close(a["logp"], old)
                rho = (torch.tensor(a["logp"]) - torch.tensor(a["old"])).exp()
                stopped = ((rho > 1.2) & (advantage > 0)) | ((rho < 0.8) & (advantage < 0))
                assert a["clipped"] == stopped.int().tolist()
                close(a["gets"], torch.where(stopped, 0.0, rho * advantage) / length / B, atol=1e-6, rtol=1e-3)
                shift = torch.tensor(a["logp"]) - torch.tensor(a["ref"])
                close(a["kl_gets"], -0.3 * rho * shift / length / B, atol=3e-6, rtol=1e-3)
                seen["stopped"] += int(stopped.sum())
                seen["moved"] += int(((rho - 1).abs() > 0.01).sum())
                seen["pushed"] += len(rho)
    assert all(seen.values()), seen


def entropy_of(model, prompt, ids, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1] / temperature
    return torch.distributions.Categorical(logits=logits).entropy()


def test_a_watched_question_is_answered_with_the_same_dice(here, checkpoints):
    """The first token of each is redrawn from the checkpoint and one table of uniform numbers."""
    records = train("grpo", beta=0.0, lr=0.3)
    watched = [[group for group in record["groups"] if group["watched"]] for record in records]
    assert [[g["question"] for g in groups] for groups in watched] == [[g["question"] for g in watched[0]]] * 3
    valid = {p.question: p for p in load_problems("word", "valid", 4)}
    assert {g["question"] for g in watched[0]} == {p.question for p in list(valid.values())[:2]}
    uniforms = torch.rand(2, 4, 8, generator=torch.Generator().manual_seed(0))
    tokenizer, first_ids = load_tokenizer("start"), []
    for record, groups in zip(records, watched, strict=True):
        policy = opened(checkpoints[record["step"]])
        for g, group in enumerate(groups):
            prompt = encode_prompt(tokenizer, valid[group["question"]])
            with torch.no_grad():
                probs = (policy(torch.tensor([prompt]))[0, -1] / 0.8).softmax(-1)
            drawn = torch.searchsorted(probs.cumsum(-1), uniforms[g, :, 0].contiguous(), right=True)
            assert [a["ids"][0] for a in group["answers"]] == drawn.tolist()
            assert all("advantage" not in a and "gets" not in a for a in group["answers"])
        first_ids.append([a["ids"] for group in groups for a in group["answers"]])
    assert first_ids[0] != first_ids[-1]  # the policy moved


@pytest.mark.parametrize("ended", [True, False])
def test_an_update_that_masks_what_was_cut_off_tells_nothing_of_it(ended):
    watcher = SimpleNamespace(config=SimpleNamespace(beta=0.1, mask_truncated=True))
    group = {"answers": [{"advantage": 1.0, "ended": ended}, {"advantage": -1.0, "ended": False}]}
    assert Recorder.learns(watcher, group) == ended


def test_an_answer_that_cannot_be_checked_is_neither_right_nor_wrong():
    watcher = Recorder.__new__(Recorder)
    watcher.record = {"groups": []}
    problems = [Problem("q", "s", answer, 1, "x") for answer in ("1", "")]
    ended = torch.ones(2, 1, dtype=torch.bool)
    batch = SimpleNamespace(problems=problems, ended=ended, answers=[[[5]], [[6]]], rollout=SimpleNamespace())
    rewards = {"correct": torch.zeros(2, 1), "score": torch.tensor([[0.5], [2.0]])}
    shown = [watcher.add_group(batch, g, rewards)["answers"][0]["rewards"] for g in (0, 1)]
    assert shown == [{"correct": 0.0, "score": 0.5}, {"score": 2.0}]


def test_ppo_records_values_rewards_and_advantages(here, checkpoints):
    records = train("ppo", name="ppo", whiten=False, lam=0.5, beta=0.5)
    start = Transformer.from_pretrained("start").eval()
    tokenizer = load_tokenizer("start")
    asked = {p.question: encode_prompt(tokenizer, p) for p in load_problems("word", "train", 60)}
    moved = 0
    for record, group in ((r, g) for r in records for g in r["groups"] if not g["watched"]):
        policy = opened(checkpoints[record["step"]])
        for a in group["answers"]:
            prompt = asked[group["question"]]
            old, ref = (plain_logprobs(model, prompt, a["ids"]) for model in (policy, start))
            reward = -0.5 * (old - ref)
            reward[-1] += a["advantage"]
            close(a["reward"], reward, atol=1e-4)
            close(a["advantage"], torch.tensor(a["rewards"]["paid"]))
            values = [*a["value"], 0.0]
            A, by_hand = 0.0, []
            for t in reversed(range(len(a["ids"]))):
                A = a["reward"][t] + values[t + 1] - values[t] + 0.5 * A
                by_hand.insert(0, A)
            close(a["A"], torch.tensor(by_hand), atol=1e-4)
            close(a["target"], torch.tensor(by_hand) + torch.tensor(a["value"]), atol=1e-4)
            rho = (torch.tensor(a["logp"]) - torch.tensor(a["old"])).exp()
            A = torch.tensor(a["A"])
            stopped = ((rho > 1.2) & (A > 0)) | ((rho < 0.8) & (A < 0))
            assert a["clipped"] == stopped.int().tolist()
            ratio = torch.tensor(a["gets"]) / torch.where(stopped, 1.0, rho * A)  # 1 / the minibatch's tokens, or 0
            assert torch.allclose(ratio[~stopped], ratio[~stopped][:1].expand_as(ratio[~stopped]), rtol=2e-3)
            assert 0.031 < ratio[~stopped][0] <= 0.2501  # 4 answers of 1 to 8 tokens
            assert not ratio[stopped].any()
            moved += int(((rho - 1).abs() > 0.01).sum())
    assert moved
    assert all("score" in a["rewards"] for r in records for g in r["groups"] for a in g["answers"])


def test_dpo_records_both_answers(here, checkpoints):
    """The sums of log π and log π_ref give the margin, and by DPO's gradient what each token gets."""
    records = train("dpo", name="dpo", nll=0.7, beta=0.4)
    start, pairs = Transformer.from_pretrained("start").eval(), torch.load("runs/dpo/pairs.pt", weights_only=True)
    prompts = {tuple(p["chosen"]): p["prompt"] for split in ("train", "valid") for p in pairs[split]}
    for record, group in ((r, g) for r in records for g in r["groups"]):
        policy, sums = opened(checkpoints[record["step"]]), []
        chosen, rejected = group["answers"]
        assert (chosen["label"], rejected["label"]) == ("chosen", "rejected")
        for a in (chosen, rejected):
            prompt = prompts[tuple(chosen["ids"])]
            logp, ref = (plain_logprobs(model, prompt, a["ids"]) for model in (policy, start))
            close(a["logp"], logp)
            close(a["ref"], ref)
            close(a["log_ratio"], (logp - ref).sum(), atol=2e-3)
            sums.append((logp - ref).sum())
        close(group["difference"], sums[0] - sums[1], atol=2e-3)
        assert "margin" not in group  # that of dpo.py is β times the difference
        if group["watched"]:
            assert "gets" not in chosen
            continue
        weight = 0.4 * torch.sigmoid(-0.4 * (sums[0] - sums[1]))
        close(chosen["gets"], ((weight + 0.7 / len(chosen["ids"])) / 6).expand(len(chosen["ids"])), rtol=1e-3)
        close(rejected["gets"], (-weight / 6).expand(len(rejected["ids"])), rtol=1e-3)
    last = [sum(g["watched"] for g in record["groups"]) for record in records]
    assert last == [2, 2, 2]


def test_sft_records_what_is_trained_and_what_is_masked(here, checkpoints):
    records = train("sft", name="sft")
    tokenizer = load_tokenizer("start")
    for record in records:
        policy, counts = opened(checkpoints[record["step"]]), set()
        for group in record["groups"]:
            (a,) = group["answers"]
            text = tokenizer.decode(a["ids"])
            assert text.startswith("<|im_start|>user\n")
            prompt = a["weight"].index(1.0)
            assert tokenizer.decode(a["ids"][:prompt]).endswith("<|im_start|>assistant\n")
            assert a["weight"][prompt:] == [1.0] * (len(a["ids"]) - prompt - 1) + [0.0]  # a line's end after the turn
            assert a["logp"][:prompt] == [None] * prompt
            close(a["logp"][prompt:], plain_logprobs(policy, a["ids"][:prompt], a["ids"][prompt:]))
            if not group["watched"]:
                n = a["weight"][prompt] / a["gets"][prompt]
                assert math.isclose(n, round(n), rel_tol=1e-4)
                assert n > sum(a["weight"])
                counts.add(round(n))
                close(a["gets"][prompt:], torch.tensor(a["weight"][prompt:]) / n)
        assert len(counts) == 1  # the trained tokens of all six examples
    with_steps = [[g["answers"][0]["logp"] for g in r["groups"] if g["watched"]] for r in records]
    assert with_steps[0] != with_steps[2]


def test_sft_records_a_step_whose_weights_add_up_to_less_than_1(here):
    rows = [{"prompt": f"{i}?", "response": "So.", "rating": 1.2} for i in range(60)]
    (here / "rated.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sizes = dict(batch=1, micro_batch=1, packing=False, watch=0, min_rating=1.0)
    for record in train("sft", name="rated", data="rated.jsonl", rated="weights", **sizes):
        ((a,),) = (group["answers"] for group in record["groups"])
        trained = [weight for weight in a["weight"] if weight]
        assert 0 < sum(trained) < 1
        assert sum(gets for gets in a["gets"] if gets) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("stage", ["distill", "distill, sample"])
def test_distill_records_the_divergence_of_each_token(here, checkpoints, stage):
    records = train(stage, name="distill")
    teacher, tokenizer = Transformer.from_pretrained("other").eval(), load_tokenizer("start")
    problems = [*load_problems("word", "train", 60), *load_problems("word", "valid", 60)]
    prompts = {p.question: encode_prompt(tokenizer, p) for p in problems}
    labels = set()
    for record, group in ((r, g) for r in records for g in r["groups"]):
        student, prompt = opened(checkpoints[record["step"]]), prompts[group["question"]]
        for a in group["answers"]:
            tokens = torch.tensor([[*prompt, *a["ids"]]])
            with torch.no_grad():
                ours, theirs = (m(tokens)[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (student, teacher))
            forward = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
            close(a["forward_kl"], forward)
            close(a["kl"], F.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1))
            at = torch.tensor(a["ids"])[:, None]
            logp, ref = ours.gather(1, at)[:, 0], theirs.gather(1, at)[:, 0]
            close(a["logp"], logp)
            close(a["ref"], ref)
            assert [row[0] for row in a["ref_top"]] == theirs.argmax(-1).tolist()
            if stage == "distill":
                close(a["divergence"], forward)
            elif not group["watched"]:
                n = (ref - logp) / torch.tensor(a["gets"])
                assert torch.allclose(n, n[:1].round().expand_as(n), rtol=1e-2)
            labels.add(a.get("label"))
    assert labels >= ({"by the student", "by the teacher"} if stage == "distill" else {"by the student"})


# ------------------------------------------------------------------------------------------------ the run is the same


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_the_same_bit_for_bit_with_and_without_it(here, stage):
    records = train(stage, name="seen")
    assert len(records) == 3
    assert all(group["answers"] for record in records for group in record["groups"])
    train(stage, name="unseen", record_groups=0, watch=0)
    assert not Path("runs/unseen", FILE).exists()
    numbers = ("loss", "grad_norm", "accuracy", "kl", "entropy", "policy_loss", "margin", "reward", "ratio_max")
    compared = [name for name in numbers if metrics("runs/seen", name)]
    assert len(compared) >= 2
    assert_same_metrics("runs/seen", "runs/unseen", compared)
    assert_same_weights("runs/seen/last", "runs/unseen/last")


def test_a_clip_that_lets_through_is_a_clip():
    """cispo's clip lowers a token's pull and leaves some of it: "clipped" is not "gets nothing"."""
    recorder, rho, A = Recorder.__new__(Recorder), torch.tensor([[3.0, 0.9, 1.5]]), torch.tensor([2.0])
    recorder.rows = {5: {"ids": [1, 2, 3]}}
    old = torch.tensor([[-4.0, -1.0, -2.0]])
    options = {"surrogate": "cispo", "loss_type": "dapo", "clip_low": 1.0, "clip_high": 1.0}
    rows = torch.cat([rho.log() + old, old]), torch.cat([old, old]), A.repeat(2), torch.ones(2, 3), None
    recorder.tokens([5, 6], grpo.grpo_loss, rows, options | {"n_tokens": 3})
    answer = recorder.rows[5]
    close(answer["gets"], torch.tensor([2.0, 0.9, 1.5]) * 2 / 3)
    assert answer["clipped"] == [1, 0, 0]
    assert "ref" not in answer
    nothing = *rows[:3], torch.zeros(2, 3), None  # the group of weight 0 of a rank that has nothing to learn from
    recorder.tokens([5, 6], grpo.grpo_loss, nothing, options | {"n_tokens": 3})
    close(answer["gets"], torch.tensor([2.0, 0.9, 1.5]) * 2 / 3)


def test_a_step_whose_log_probabilities_are_not_finite_is_left_to_the_stage(here, monkeypatch):
    look_inside = Recorder.look_inside

    def nan(self, groups, *rest, **options):
        look_inside(self, groups, *rest, **options)
        groups[0]["answers"][0]["logp"][0] = None

    monkeypatch.setattr(Recorder, "look_inside", nan)
    assert train("dpo", steps=1) == []
    assert "gets" not in train("distill", steps=1, loss="sample")[0]["groups"][0]["answers"][0]


def test_only_the_steps_asked_for(here):
    records = train("grpo", steps=5, record_every=3, record_groups=1, watch=0)
    assert [record["step"] for record in records] == [1, 3, 5]
    assert [len(record["groups"]) for record in records] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------ the file


def test_a_resumed_run_drops_later_records_and_goes_on(here):
    whole = train("grpo", steps=4, name="whole")
    with stopped_after(2):
        train("grpo", steps=4, name="parts")
    path = Path("runs/parts", FILE)
    assert [r["step"] for r in read_recording("runs/parts")[1]] == [1, 2]
    with path.open("ab") as file:  # a step after the checkpoint, then half of one
        file.write(packed_line({"step": 3, "vocab": {}, "groups": []}) + packed_line({"step": 4, "groups": []})[:20])
    assert [r["step"] for r in read_recording("runs/parts")[1]] == [1, 2, 3]
    parts = train("grpo", steps=4, name="parts", resume=True)
    assert parts == whole
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == 5
    train("grpo", steps=5, name="parts", resume=True)
    assert read_recording("runs/parts")[0]["config"]["steps"] == 5  # the settings of now: step 5 is not "step 5 of 4"


def test_a_full_disk_ends_no_run(here, monkeypatch, capsys):
    def full(path, text):
        if Path(path).name == FILE:
            raise OSError(28, "No space left on device")
        append(path, text)

    append = log.append_whole
    monkeypatch.setattr(recorder, "append_whole", full)
    records = train("grpo", name="full")
    assert records == []
    said = capsys.readouterr().out
    assert said.count(f"runs/full/{FILE} could not be written (No space left on device)") == 1
    assert metrics("runs/full", "loss").keys() == {1, 2, 3}


def test_a_file_that_breaks_off_is_read_as_far_as_it_goes(scratch):
    lines = [
        {"config": {}, "about": "x"},
        {"step": 1, "groups": [], "vocab": {}},
        {"step": 2, "groups": [], "vocab": {}},
    ]
    whole, ends = b"".join(map(packed_line, lines)), list(itertools.accumulate(len(packed_line(x)) for x in lines))
    for size in range(len(whole) + 1):
        (scratch / FILE).write_bytes(whole[:size])
        read = list(lines_of(scratch / FILE))
        assert read == lines[: sum(size >= end for end in ends)]
    assert read == lines
    assert read_recording(scratch) == (lines[0], lines[1:])
    for line in ("no gzip", "[" * 10**5, "5", '{"config": {}}', '{"config": 5, "about": "x"}'):
        (scratch / FILE).write_bytes(line.encode() if line == "no gzip" else gzip.compress(line.encode()))
        with pytest.raises(DataError, match="cannot be read"):
            read_recording(scratch)
    (scratch / FILE).write_bytes(packed_line(lines[0]) + packed_line({"groups": []}) + packed_line(5))
    assert read_recording(scratch) == (lines[0], [])


def test_groups_are_spread_and_fit_the_room():
    assert spread(10, 3) == [1, 5, 8]
    assert spread(2, 3) == [0, 1]
    assert spread(5, 0) == []
    groups = [{"answers": [{"ids": [0] * n} for n in lengths]} for lengths in ([3, 5], [2], [9, 1, 1])]
    for room in (1, 6, 10, 20, 100):
        split = list(portions(groups, room))
        flat = [(g, id(a)) for portion in split for g, answers in portion for a in answers]
        assert flat == [(g, id(a)) for g, group in enumerate(groups) for a in group["answers"]]
        for portion in split:
            answers = [a for _, some in portion for a in some]
            assert len(answers) == 1 or len(answers) * max(len(a["ids"]) for a in answers) <= room
    assert len(list(portions(groups, 100))) == 1


# ------------------------------------------------------------------------------------------------ the page


def record_of(step, texts=("a", "b"), n=1, question="Q?", **columns):
    """A record of one group with one answer, whose tokens are `texts` n times over."""
    ids = list(range(len(texts))) * n
    answer = {"ids": ids, "ended": True, "rewards": {"correct": 1.0}, "advantage": 0.5} | columns
    answer.setdefault("logp", [-0.5] * len(ids))
    group = {"question": question, "answer": "1", "watched": False, "answers": [answer]}
    return {"step": step, "vocab": {str(i): text for i, text in enumerate(texts)}, "groups": [group]}


def write_run(path, records, config=None):
    path.mkdir(exist_ok=True)
    header = {"about": "A test.", "config": {"name": "test", "steps": 100} | (config or {})}
    (path / FILE).write_bytes(b"".join(map(packed_line, [header, *records])))


def data_of(page):
    packed = re.search(r'<script type="text/plain" id="data">(.*?)</script>', page, re.S)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_what_cannot_be_seen_is_made_visible():
    assert visible("a\nb\tc") == "a⏎\nb⇥c"
    assert visible("\x00\x1b\x7f\x85") == "\\x00\\x1b\\x7f\\x85"
    assert visible("x\u202ey\u200bz\ufeff\u2028") == "x\\u202ey\\u200bz\\ufeff\\u2028"
    assert visible("\ud800\U000e0041") == "\\ud800\\U000e0041"
    assert visible("שלום é 日本 <b>&amp;") == "שלום é 日本 <b>&amp;"


def test_a_page_that_would_be_too_large_leaves_out_steps(scratch, monkeypatch):
    numbers = torch.randn(20, 80).tolist()
    write_run(scratch / "run", [record_of(step, n=40, logp=numbers[step - 1]) for step in range(1, 21)])
    page, whole, left_out = page_of(scratch / "run")
    assert (whole, left_out) == (20, 0)
    most = len(page.encode()) - 10
    monkeypatch.setattr(view_page, "MOST", most)
    page, kept, left_out = page_of(scratch / "run")
    steps = [record["step"] for record in data_of(page)["records"]]
    assert (steps[0], steps[-1], kept + left_out, len(steps)) == (1, 20, 20, kept)
    assert 1 < kept < 20
    assert len(page.encode()) <= most
    monkeypatch.setattr(view_page, "MOST", 10)
    with pytest.raises(DataError, match="--record_groups"):
        page_of(scratch / "run")


def test_the_page_reads_nothing_from_elsewhere(scratch):
    write_run(scratch / "run", [record_of(1)])
    page, _, _ = page_of(scratch / "run")
    outside = set(
        re.findall(
            r"""(?:https?:)?//[\w.]+|(?:src|href)=["'][^"']*""", re.sub(r'id="data">.*?<', "<", page, flags=re.S)
        )
    )
    assert outside <= {"http://www.w3.org", 'href="data:,'}  # a name space, no address
    assert "default-src 'none'" in page


def test_bad_input_is_one_line(scratch):
    (scratch / "empty").mkdir()
    write_run(scratch / "none", [])
    assert_one_line_error(script("view.py", "nowhere", cwd=scratch), "nowhere is no run directory")
    assert_one_line_error(script("view.py", "empty", cwd=scratch), "empty holds no rollouts.jsonl.gz")
    assert_one_line_error(script("view.py", "none", cwd=scratch), "no step yet")
    write_run(scratch / "run", [record_of(1)])
    failed = script("view.py", "run", "--output", "no/such/page.html", cwd=scratch)
    assert_one_line_error(failed, "no/such/page.html cannot be written")
    done = script("view.py", "run", cwd=scratch)
    assert done.returncode == 0, done.stderr
    assert "run/view.html: 1 steps, 0.0 MB" in done.stdout


# ------------------------------------------------------------------------------------------------ in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WATCH = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
for (const name of ["error", "warn"]) console[name] = (...words) => errors.push(words.join(" "));
document.addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
</script>"""


DRIVE = """<script>
const out = {}, pick = (css) => document.querySelector(css), all = (css) => [...document.querySelectorAll(css)];
const tip = () => all("#tip tr").map((row) => [...row.children].map((cell) => cell.textContent));
const ask = (id, value) => {
  const node = document.getElementById(id);
  if (node.type === "checkbox") node.checked = value; else node.value = value;
  node.dispatchEvent(new Event(node.type === "range" ? "input" : "change"));
};
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const wait = setInterval(() => {
  if (!document.body.dataset.ready && !errors.length) return;
  clearInterval(wait);
  try { STEPS } catch (error) { errors.push(String(error)); }
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify({ ...out, errors });
  document.body.append(result);
}, 20);
</script>"""


def in_browser(page, steps, scratch):
    """Open a page from disk, run `steps`, JavaScript that fills the object `out` -> it, with "errors"."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: apt-get install chromium (any of {', '.join(BROWSERS)})")
    path = scratch / "driven.html"
    page = page.replace("<head>", "<head>" + WATCH).replace("</body>", DRIVE.replace("STEPS", steps) + "</body>")
    path.write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=20000"]
    flags += [f"--user-data-dir={scratch / 'browser'}", "--window-size=1300,900", "--dump-dom", path.as_uri()]
    done = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=240, check=False)
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert result, done.stderr[-2000:]
    return json.loads(html.unescape(result[1]))


def test_the_slider_moves_and_a_token_shows_the_numbers_of_the_loss(here):
    records = train("grpo", beta=0.3)
    page, _, _ = page_of("runs/grpo")
    steps = """
out.start = pick("#where").textContent;
out.cursor = pick("#curves line").getAttribute("x1");
ask("slider", 2);
out.end = pick("#where").textContent;
out.cursor_at_the_end = pick("#curves line").getAttribute("x1");
out.label = pick("#curves svg").getAttribute("aria-label");
out.all = pick("#count").textContent;
const cards = all(".answer");
out.cards = cards.map((card) => [card.getAttribute("aria-label"), card.querySelectorAll(".text span").length]);
out.tips = cards.map((card) => { card.querySelector(".text span").focus(); press("ArrowRight"); return tip(); });
out.described = document.activeElement.getAttribute("aria-describedby");
out.tinted = cards.map((card) => card.querySelector(".text span").style.background !== "");
document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
out.hidden = pick("#tip").hidden;
cards[0].querySelector(".text span:nth-child(3)").dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
out.hovered = tip();
ask("verdict", "wrong"); out.wrong = all(".answer").length;
ask("verdict", ""); ask("cut", true); out.cut = all(".answer").length;
ask("cut", false); ask("clipped", true); out.clipped = all(".answer").length;
ask("clipped", false); ask("signal", "without"); out.silent = all(".answer").length;
ask("signal", ""); ask("question", "watched1");
out.watched = all(".group h2").map((x) => x.textContent);
ask("question", ""); ask("scale", "entropy"); out.legend = pick("#what").textContent;
pick("#before").click(); out.before = pick("#where").textContent;
"""
    out = in_browser(page, steps, here)
    assert out["errors"] == []
    assert (out["start"], out["end"], out["before"]) == ("step 1 of 3", "step 3 of 3", "step 2 of 3")
    assert float(out["cursor_at_the_end"]) > float(out["cursor"]) > 0
    assert "at step 3" in out["label"]
    answers = [a for group in records[2]["groups"] for a in group["answers"]]
    assert out["all"] == f"{len(answers)} of {len(answers)} shown"
    assert [n for _, n in out["cards"]] == [len(a["ids"]) for a in answers]
    for a, (label, n), rows in zip(answers, out["cards"], out["tips"], strict=True):
        assert f"tokens {n}" in label
        assert ("cut off" in label) == (not a["ended"])
        t = min(1, n - 1)
        shown = {name: float(text.split()[0]) for name, text in rows if name not in ("likely here",)}
        expected = {"log π": a["logp"][t], "log π_ref": a["ref"][t], "entropy": a["entropy"][t]}
        if "gets" in a:
            expected |= {"gets": a["gets"][t], "by the KL": a["kl_gets"][t], "advantage A": a["advantage"]}
            expected["ratio ρ"] = math.exp(a["logp"][t] - a["old"][t])
        assert shown.keys() >= expected.keys()
        for name, value in expected.items():
            assert math.isclose(shown[name], value, rel_tol=6e-3, abs_tol=1e-7), name
    assert out["described"] == "tip"
    assert out["hidden"]
    assert float(dict(out["hovered"])["log π"].split()[0]) == pytest.approx(answers[0]["logp"][2], rel=1e-3)
    assert out["tinted"] == ["gets" in a and a["gets"][0] != 0 for a in answers]
    assert out["wrong"] == sum(a["rewards"]["correct"] == 0 for a in answers)
    assert out["cut"] == sum(not a["ended"] for a in answers)
    assert out["clipped"] == sum(1 in a.get("clipped", []) for a in answers)
    trained = [g for g in records[2]["groups"] if not g["watched"]]
    assert out["silent"] == sum(4 for g in trained if not any(a["advantage"] for a in g["answers"]))
    assert out["watched"] == [[g["question"] for g in records[2]["groups"] if g["watched"]][1]]
    assert "distribution" in out["legend"]


HOSTILE = [
    "<script>document.title='no'</script>",
    "</script><img src=x onerror=\"document.title='no'\">",
    "\x00\x1b[31m",
]
HOSTILE += ["\u202eevil\u202c", "שלום", "&lt;b&gt;", "a\u0301\u0301\u0301", "{{data}}", "${x}`", "\ud800"]


def test_hostile_text_is_shown_as_text(scratch):
    write_run(
        scratch / "run", [record_of(1, texts=HOSTILE, question=HOSTILE[1])], {"name": HOSTILE[1], "data": HOSTILE[0]}
    )
    page, _, _ = page_of(scratch / "run")
    steps = """
out.tokens = all(".text span").map((x) => x.textContent);
out.title = document.title; out.heading = pick("h1").textContent; out.question = pick(".group h2").textContent;
out.settings = pick("#settings").textContent; out.pictures = document.images.length;
document.querySelector(".text span").focus(); out.tip = pick("#tip .token").textContent;
out.left = all(".text span").slice(3, 5).map((x) => getComputedStyle(x).unicodeBidi);
"""
    out = in_browser(page, steps, scratch)
    assert out["errors"] == []
    shown = [visible(text) for text in HOSTILE]
    assert out["tokens"] == shown
    assert "\u202e" not in "".join(shown)
    assert (out["heading"], out["question"], out["tip"]) == (HOSTILE[1], HOSTILE[1], f"“{HOSTILE[0]}”")
    assert out["title"] == f"{HOSTILE[1]}: inside the run"
    assert HOSTILE[0] in out["settings"]
    assert out["pictures"] == 0
    assert out["left"] == ["isolate", "isolate"]


def test_tools_stand_apart_and_a_score_is_held_against_the_truth(scratch):
    record = record_of(1, texts=["12 * 3 = <<", "36", ">>", " so ", "2 + 2 = <<", "4>>"], tool=[0, 1, 1, 0, 0, 1])
    (answer,) = record["groups"][0]["answers"]
    scored = [(1.0, 0.5), (1.0, -2.0), (0.0, -1.0), (0.0, 0.5)]  # right, score: 1 of the 4 pairs is in order
    record["groups"][0]["answers"] = [
        answer | {"rewards": {"correct": right, "score": score}} for right, score in scored
    ]
    write_run(scratch / "run", [record])
    steps = """
const text = all(".text")[0];
out.tools = [...text.querySelectorAll(".tool")].map((x) => x.textContent);
out.turns = [...text.querySelectorAll(".turn")].map((x) => x.textContent);
out.apart = [...text.children].map((x) => parseFloat(getComputedStyle(x).marginLeft) > 0);
out.facts = all(".facts")[0].textContent; out.head = pick(".group header").textContent;
out.legend = pick("#what").textContent;
"""
    out = in_browser(page_of(scratch / "run")[0], steps, scratch)
    assert out["errors"] == []
    assert out["tools"] == ["36", ">>", "4>>"]
    assert out["turns"] == ["36", " so ", "4>>"]
    assert out["apart"] == [False, True, False, True, False, True]
    assert "calls 2" in out["facts"]
    assert "the score puts 1 of 4 pairs (right, wrong) in order" in out["head"]
    assert "a tool wrote it" in out["legend"]


def test_a_watched_question_is_found_where_another_watch_asks_it_in_another_place(scratch):
    """--resume allows another --watch; the questions then come in another order."""

    def watched(step, *questions):
        groups = [record_of(step, question=question)["groups"][0] | {"watched": True} for question in questions]
        return record_of(step) | {"groups": groups}

    write_run(scratch / "run", [watched(1, "B?", "A?"), watched(2, "A?", "B?", "C?")])
    steps = """
out.seen = ["watched0", "watched1", "watched2"].map((value) => {
  ask("question", value);
  return [0, 1].map((i) => { ask("slider", i); return all(".group h2").map((x) => x.textContent); });
});
"""
    out = in_browser(page_of(scratch / "run")[0], steps, scratch)
    assert out["errors"] == []
    assert out["seen"] == [[["A?"], ["A?"]], [["B?"], ["B?"]], [[], ["C?"]]]


def test_a_run_that_has_recorded_text_alone_has_a_page(scratch):
    """As grpo.py --fsdp true does before any group has a signal."""
    record = record_of(1)
    del record["groups"][0]["answers"][0]["logp"]
    write_run(scratch / "run", [record])
    out = in_browser(page_of(scratch / "run")[0], 'out.tokens = all(".text span").map((x) => x.textContent);', scratch)
    assert out["errors"] == []
    assert out["tokens"] == ["a", "b"]


@pytest.mark.parametrize("stage", ["ppo", "dpo", "sft", "distill"])
def test_every_stage_has_a_page(here, stage):
    records = train(stage, name=stage)
    page, _, _ = page_of(f"runs/{stage}")
    steps = """
out.scales = [...pick("#scale").options].map((x) => x.value);
out.cards = all(".answer").length;
out.masked = all(".masked").length;
out.facts = all(".facts")[0].textContent;
const last = all(".text")[0].lastChild; last.focus(); out.tip = tip().map((row) => row[0]);
"""
    out = in_browser(page, steps, here)
    assert out["errors"] == []
    assert out["cards"] == sum(len(group["answers"]) for group in records[0]["groups"])
    wanted = {"ppo": {"gets", "A", "value", "reward", "ratio", "kl"}, "dpo": {"gets", "log_ratio", "logp"}}
    wanted |= {"sft": {"gets", "logp", "entropy", "weight"}, "distill": {"divergence", "kl", "forward_kl", "log_ratio"}}
    assert set(out["scales"]) >= wanted[stage]
    assert (out["masked"] > 0) == (stage == "sft")
    first = {"ppo": "gets", "dpo": "gets", "sft": "in the loss", "distill": "divergence"}[stage]
    assert out["tip"][0] == first
    assert ("final" in out["facts"]) == ("final" in out["tip"]) == (stage == "ppo")  # it has no A of a whole answer
