"""--device mps: every stage runs for two steps on a device that refuses what Apple's refuses (tests/pretend_mps.py); on
a Mac, on the device itself."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights
from test_rejection import folder  # noqa: F401  a fixture: `start`, a tiny model that answers coin.jsonl with 1 or 2
from tiny import MODEL, TEXT

from generate import generate
from moe import balancing_loss, update_biases
from reward_model import RewardModel
from support.checkpoints import open_checkpoint
from transformer import Transformer, TransformerConfig, token_logprobs

FILE = Path(__file__).parent / "pretend_mps.py"
SIZES = {f"model.{name}": value for name, value in MODEL.items()}
FEW = dict(steps=2, eval_every=2, eval_problems=4, test_problems=4, max_new_tokens=8)
ASK = FEW | dict(init="start", data="coin.jsonl", prompts=4, rollouts=4)
CHECKED = ASK | dict(pass_problems=2, pass_samples=2)
PAIRS = FEW | dict(init="wide", prompts=20, rollouts=4, batch=4, micro_batch=2, eval_problems=12)
TUNE = FEW | dict(init="start", data="coin.jsonl", batch=4, micro_batch=2)
TEXTS = dict(data="text.txt", tokenizer="char", steps=2, batch=4, micro_batch=2, eval_every=2, eval_tokens=100) | SIZES
CODER = dict(mlm_steps=2, mlm_batch=4, steps=2, batch=4, micro_batch=2, eval_every=2, vocab_size=300) | SIZES
JUDGE = dict(init="wide", steps=2, batch=4, micro_batch=2, eval_every=2, n_pairs=20, eval_pairs=8, test_pairs=8)
JUDGE |= dict(pairs="corrupted", best_of=2, best_of_problems=4, max_new_tokens=8)
MEASURE = dict(checkpoint="start", against="wide", data="coin.jsonl", problems=4, samples=2, max_new_tokens=8)
ANSWER = dict(checkpoint="start", prompt="Number 7?", max_new_tokens=8, temperature=1)
ANSWER |= dict(top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)

STAGES = {  # each once: its flags. A stage may read the runs of those before it
    "pretrain": TEXTS,
    "sft": TUNE | dict(samples=2),
    "reward_model": JUDGE,
    "dpo": PAIRS,
    "ppo": ASK | dict(reward_model="judge", micro_batch=8),
    "grpo": CHECKED | dict(micro_batch=8),
    "gdpo": CHECKED | dict(micro_batch=8, brevity_weight=1),
    "rejection": CHECKED | dict(prompts=8, batch=4, round_steps=1),
    "distill": CHECKED | dict(teacher="runs/grpo/last", prompts=8, micro_batch=8),
    "agent": CHECKED | dict(micro_batch=8, max_new_tokens=14),
    "encoder": CODER,
    "evaluate": MEASURE,
    "generate": ANSWER,
}
OPTIONS = {  # what takes other paths: (stage, flags)
    "grpo in bf16": ("grpo", CHECKED | dict(dtype="bf16")),
    "sft in fp16": ("sft", TUNE | dict(dtype="fp16")),
    "pretraining with AdamW": ("pretrain", TEXTS | {"optimizer": "adamw", "model.window": 8, "recompute": "true"}),
    "grpo with DoRA": ("grpo", CHECKED | {"lora.rank": 2, "lora.dora": "true"}),
    "grpo with old, rounded samples": ("grpo", CHECKED | dict(stale=1, sampler_dtype="bf16", correction="mask")),
    "ppo with a critic": ("ppo", ASK | dict(reward_model="judge", value="separate")),
    "kto": ("dpo", PAIRS | dict(variant="kto")),
}
LAYOUTS = {
    "default": {},
    "experts balanced by bias": dict(n_expert=4, balancing="bias", capacity_factor=1.2),
    "experts, one of them shared": dict(n_expert=4, n_shared_expert=1),
    "a window": dict(window=4, sinks=2, norm_placement="sandwich"),
    "GPT-2": dict(positions="learned", norm="layer", activation="gelu", bias=True, n_kv_head=2),
    "sinusoidal": dict(positions="sinusoidal", norm_placement="post"),
}

# In the child: a verifier of a random model's answers, all of which count as ended; fewer texts;
# a tool that is called where an answer writes #; no pictures.
SHORTER = """
import agent, pathlib
from support import encoder_start, reward_look
texts, consistency = encoder_start.load_reviews, reward_look.consistency
patch.setattr("support.pairs.is_correct", lambda text, problem: len(text) % 2 == 0)
patch.setattr("generate.Rollout.ended", lambda rollout, stop_ids: rollout.mask.any(1))
patch.setattr(encoder_start, "load_reviews", lambda name, split, *more: texts(name, split, *more)[:20])
patch.setattr(reward_look, "consistency", lambda score, n, *more: consistency(score, 4, *more))
patch.setitem(agent.TOOLS, "calculator", agent.Tool("calculator", "(#)", lambda text: "1"))
patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: pathlib.Path(path).touch())
"""


def as_on_the_cpu(change):
    """In the child: loss, gradients and sampled answers of a small model on mps are those of the CPU."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=40, **MODEL | {"n_layer": 2} | change))
    tokens, uniforms = torch.randint(40, (3, 20)), torch.rand(6, 8)
    prompts, outputs = [[1, 2, 3], [4] * 9, [5]], {}
    for device in ("cpu", "mps"):
        policy = copy.deepcopy(model).to(device)
        loss = -token_logprobs(policy, tokens.to(device)).mean()
        loss = loss + balancing_loss(policy, 0.1, 0.1) if policy.config.n_expert else loss
        loss.backward()
        if policy.config.n_expert:
            update_biases(policy, 0.1)
        gradients = [p.grad.cpu() for p in policy.parameters() if p.grad is not None]
        rollout = generate(policy, prompts, 8, n=2, stop_ids=(7,), uniforms=uniforms)
        buffers = [buffer.cpu() for buffer in policy.buffers()]
        outputs[device] = [loss.detach().cpu(), gradients, buffers, rollout.ids.cpu(), rollout.logprobs.cpu()]
    torch.testing.assert_close(outputs["mps"], outputs["cpu"], atol=1e-5, rtol=1e-4)


def run_on_mps(path, runs):
    """runs {name: (stage, flags, Python code to execute before)} in one process -> {name: [error, operations]}."""
    plan = []
    for name, (stage, flags, code) in runs.items():
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        plan.append([name, stage, words, code])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FILE.parent.parent)}
    command = [sys.executable, str(FILE), "results.json"]
    child = subprocess.run(command, input=json.dumps(plan), cwd=path, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads((path / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def here(folder, tokenizer):  # noqa: F811
    """The folder of coin.jsonl, with a text, a random model with a longer context, and a reward model of `start`."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    torch.manual_seed(0)
    Transformer(TransformerConfig(tokenizer.vocab_size, **MODEL | {"context": 200})).save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "wide")
    (folder / "wide/generation_config.json").write_text(
        f'{{"eos_token_id": [{tokenizer.im_end_id}]}}', encoding="utf-8"
    )
    start, tokenizer, _ = open_checkpoint(folder / "start")
    judge = RewardModel.from_policy(start)
    judge.pad_id = tokenizer.endoftext_id
    judge.save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    return folder


def test_every_stage_runs(here):
    runs = {stage: (stage, flags, SHORTER) for stage, flags in STAGES.items()}
    runs |= {name: (stage, flags, SHORTER) for name, (stage, flags) in OPTIONS.items()}
    for name, change in LAYOUTS.items():
        runs[name] = (None, {}, f"import test_mps; test_mps.as_on_the_cpu({change})")
    results = run_on_mps(here, runs)
    failed = [f"{name}: {error}" for name, (error, _) in results.items() if error]
    assert not failed, "\n".join(failed)
    if not torch.backends.mps.is_available():  # the real device does not count
        assert all(operations for _, operations in results.values()), results


# ---------------------------------------------------------------------------------------------------------------
# The device itself: it refuses what it should, and no more.

MOVED = "patch.setattr('support.shared_prompt.PackedAnswers.to', lambda packed, device: packed)"
DOUBLE = "from support.devices import TRAITS; patch.setitem(TRAITS, 'mps', TRAITS['cpu'])"
DRAWN = """
import torch
rand = torch.rand
patch.setattr(torch, "rand", lambda *sizes, generator: rand(*sizes, generator=generator, device="mps"))
"""
MISSING = "import torch; patch.setattr('grpo.masked_mean', lambda x, mask: torch.frexp(x).mantissa.mean())"
PLANTED = {  # a bug in a stage: (stage, the bug, what the error says)
    "a tensor left on the CPU": ("grpo", MOVED, "RuntimeError: Expected all tensors to be on the same device"),
    "float64 on the device": ("ppo", DOUBLE, "float64"),
    "a CPU generator": ("grpo", DRAWN, "RuntimeError: Expected a 'mps' device type for generator"),
    "a missing operation": ("grpo", MISSING, "not currently implemented for the MPS device"),
}
REFUSED = {  # an expression: the type of its error
    "torch.ones(2, device='mps').double()": "TypeError",
    "torch.tensor([1.0], dtype=torch.float64, device='mps')": "TypeError",
    "torch.from_numpy(__import__('numpy').ones(2)).to('mps')": "TypeError",
    "torch.ones(2, dtype=torch.complex128, device='mps')": "TypeError",
    "torch.ones(2, device='mps') + torch.ones(2)": "RuntimeError",
    "torch.ones(2) * torch.ones((), device='mps')": "RuntimeError",
    "torch.cat([torch.ones(2), torch.ones(2, device='mps')])": "RuntimeError",
    "torch.ones(3)[torch.tensor([0], device='mps')]": "RuntimeError",
    "torch.nn.Linear(2, 2)(torch.ones(2, device='mps'))": "RuntimeError",
    "torch.ones(2, device='mps').normal_(generator=torch.Generator())": "RuntimeError",
    "torch.randperm(3, device='mps', generator=torch.Generator())": "RuntimeError",
    "torch.ones(2, device='mps').numpy()": "TypeError",
    "torch.linalg.eigh(torch.eye(2, device='mps'))": "NotImplementedError",
    "torch.special.log_ndtr(torch.ones(2, device='mps'))": "NotImplementedError",
}
TAKEN = [
    "torch.ones(2, device='mps') + torch.tensor(1.0)",
    "torch.ones(2, device='mps') * torch.tensor(2.0, dtype=torch.float64)",
    "torch.ones(3, device='mps')[torch.tensor([0])]",
    "torch.ones(2, device='mps').cpu().double().numpy()",
    "torch.ones(2, device='mps', requires_grad=True).logsumexp(0).backward()",
]


def test_what_torch_refuses_on_mps_is_refused(here):
    """A bug planted in a stage fails there, and each expression by itself. A resumed run draws the dropout that the
    uninterrupted one drew, from the generator of mps."""
    dropping = TEXTS | {"steps": 4, "save_every": 2, "keep": 2, "model.dropout": 0.2}
    copied = "import shutil; shutil.copytree('runs/whole/step_0000002', 'runs/again/last')"
    runs = {bug: (stage, STAGES[stage], SHORTER + code) for bug, (stage, code, _) in PLANTED.items()}
    runs |= {code: (None, {}, f"import torch; {code}") for code in [*REFUSED, *TAKEN]}
    runs["whole"] = ("pretrain", dropping | {"name": "whole"}, SHORTER)
    runs["again"] = ("pretrain", dropping | {"name": "again", "resume": "true"}, SHORTER + copied)
    last_lines = {name: error.rstrip().rpartition("\n")[2] for name, (error, _) in run_on_mps(here, runs).items()}
    for bug, (*_, said) in PLANTED.items():
        assert said in last_lines[bug], bug
    for code, kind in REFUSED.items():
        assert last_lines[code].startswith(f"{kind}: "), code
    assert [last_lines[name] for name in (*TAKEN, "whole", "again")] == [""] * (len(TAKEN) + 2)
    assert_same_weights(here / "runs/whole/last", here / "runs/again/last")
