"""support/content.py: a resumed run must read what it read before, in every stage; a start is made again if its data or
its checkpoint has changed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_resume_refuses_what_changed
from tiny import SMALL as PRETRAIN

import dpo
import encoder
import grpo
import ppo
import pretrain
import reward_model
import sft
from data import Problem, load_problems
from encoder import EncoderConfig
from lora import LoraConfig
from support import devices, downloads
from support.content import content_of
from support.runs import make_start_once
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig

PROBLEMS = [{"question": p.question, "answer": p.solution} for p in load_problems("word", "train", 120)]
PAIRS = [{"prompt": p["question"], "chosen": p["answer"], "rejected": f"It is {i}."} for i, p in enumerate(PROBLEMS)]
REVIEWS = [{"text": f"{p['question']} It is {('bad', 'good')[i % 2]}.", "label": i % 2} for i, p in enumerate(PROBLEMS)]
FEW = dict(device="cpu", warmup=1, eval_every=2)
ROLLOUTS = FEW | dict(
    init="start", data="problems.jsonl", prompts=4, rollouts=2, max_new_tokens=6, eval_problems=3, test_problems=3
)
GRPO = ROLLOUTS | dict(pass_problems=2, pass_samples=2, reward="own:letters", micro_batch=16)
MINI = dict(context=200, n_layer=1, n_head=2, n_kv_head=1, width=16)


@pytest.fixture
def here(scratch, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])  # load_reward adds to it
    tokenizer = BPETokenizer.train([p["question"] + p["answer"] for p in PROBLEMS], 400)
    torch.manual_seed(0)
    start = Transformer(TransformerConfig(tokenizer.vocab_size, **MINI))
    judge = reward_model.RewardModel.from_policy(start)
    judge.pad_id = tokenizer.endoftext_id
    for path, model in (("start", start), ("judge", judge), ("other", start)):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    for name, records in (("problems", PROBLEMS), ("pairs", PAIRS), ("reviews", REVIEWS), ("more", REVIEWS[:40])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    Path("own.py").write_text(
        "def letters(texts, problems, ended):\n    return [len(t) % 2 for t in texts]\n#\n", encoding="utf-8"
    )
    yield scratch
    sys.modules.pop("own", None)


@pytest.mark.parametrize(
    ("stage", "settings", "reads"),
    [
        (pretrain, PRETRAIN | dict(data="problems.jsonl", init="start", tokenizer="bpe"), ["problems.jsonl", "start"]),
        (sft, FEW | dict(init="start", data="problems.jsonl", max_new_tokens=6), ["problems.jsonl", "start"]),
        (sft, FEW | dict(init="start", max_new_tokens=6, lora=LoraConfig(2)), ["start"]),
        (
            reward_model,
            FEW | dict(init="start", sampler="other", n_pairs=20, pairs="corrupted", best_of_problems=2, best_of=2),
            ["start", "other"],
        ),
        (reward_model, FEW | dict(init="start", data="pairs.jsonl", backbone="encoder"), ["pairs.jsonl", "start"]),
        (dpo, FEW | dict(init="start", data="pairs.jsonl", max_new_tokens=6), ["pairs.jsonl", "start"]),
        (dpo, FEW | dict(init="start", data="pairs.jsonl", max_new_tokens=6, variant="kto"), ["pairs.jsonl"]),
        (dpo, FEW | dict(init="start", pairs="offline", max_new_tokens=6, lora=LoraConfig(2)), ["start"]),
        (ppo, ROLLOUTS | dict(reward_model="judge", minibatches=1), ["problems.jsonl", "start", "judge"]),
        (grpo, GRPO, ["problems.jsonl", "start", "own.py"]),
        (grpo, GRPO | dict(lora=LoraConfig(2)), ["start"]),
        (
            encoder,
            FEW | dict(data="reviews.jsonl", text=["more.jsonl"], vocab_size=300, mlm_steps=0,
                       model=EncoderConfig(context=32, n_layer=1, n_head=2, n_kv_head=1, width=16)),
            ["reviews.jsonl", "more.jsonl"],
        ),
        (encoder, FEW | dict(data="reviews.jsonl", mlm_steps=0, token_dropout=0.0, init="start"), ["start"]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_resume_refuses_what_changed(here, stage, settings, reads):
    names = {"own.py": "own:letters", "more.jsonl": "--text"}
    settings = settings | ({"batch": 4} if "prompts" not in settings else {})
    assert_resume_refuses_what_changed(stage, lambda **changes: stage.Config(**settings | changes), reads, names)


def test_a_start_is_made_again_if_what_it_read_has_changed(here, capsys):
    def start(**settings):
        kind = "bpe" if "init" in settings else "char"  # the checkpoint's
        settings = PRETRAIN | dict(data="problems.jsonl", steps=1, tokenizer=kind) | settings
        make_start_once("start/mini", "making", pretrain, settings, devices.setup("cpu"))
        return "made earlier" not in capsys.readouterr().out

    assert start()
    assert not start()
    Path("problems.jsonl").write_text(
        Path("problems.jsonl").read_text(encoding="utf-8") + json.dumps(PROBLEMS[0]) + "\n", encoding="utf-8"
    )
    assert start()
    assert not start()
    assert start(init="start")
    assert not start(init="start")
    (here / "run").mkdir()
    (here / "start").rename("run/best")
    assert start(init="run")
    assert not start(init="run")
    model = Transformer.from_pretrained("run/best")
    model.norm.weight.data[0] += 1e-3
    model.save_pretrained("run/best")
    assert start(init="run")
    Path("run/best/chat_template.jinja").write_text("You are A.", encoding="utf-8")  # another frame of every prompt
    assert start(init="run")
    assert not start(init="run")


def test_a_start_is_the_same_after_its_data_were_downloaded(scratch, monkeypatch, capsys):
    """Though its stage reads one file of two; the run that needs the start downloads the other one later."""
    for split in ("train", "test"):
        Path(f"{split}.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.setenv("ALIGN_DATA", "downloads")
    monkeypatch.setitem(downloads.DATASETS, "gsm8k", downloads.files("g/{}.jsonl", f"file://{scratch}/{{}}.jsonl"))

    def main(config):
        downloads.find(config.data)
        Path("runs/start/mini").mkdir(exist_ok=True)

    stage, dist = SimpleNamespace(Config=pretrain.Config, main=main), devices.setup("cpu")
    for _ in range(2):
        make_start_once("start/mini", "making", stage, {"data": "gsm8k"}, dist)
    assert capsys.readouterr().out.count("making") == 1


def test_content_is_that_of_values_not_of_names_or_places():
    problem = Problem("q", "s", "1")
    assert content_of([problem]) == content_of([Problem("q", "s", "1", history=[])])  # as JSON returns a tuple
    assert content_of([problem]) != content_of([Problem("q", "s", "2")])
    assert content_of(["ab", "c"]) != content_of(["a", "bc"])
    assert content_of([["a"], "b"]) != content_of([["a", "b"]])
    layer = torch.nn.Linear(2, 2)
    before = content_of(layer)
    assert content_of(layer.requires_grad_(False)) == before
    layer.weight.data[0, 0] += 1e-6
    assert content_of(layer) != before
    assert content_of(torch.ones(2, 3)) != content_of(torch.ones(3, 2))
