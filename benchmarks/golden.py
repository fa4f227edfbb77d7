"""A regression check for refactoring: short seeded runs of every stage, compared between two versions of the code.

    python benchmarks/golden.py record OLD --repo ../old-checkout      # every figure of metrics.jsonl, and the weights
    python benchmarks/golden.py record NEW                             # the same with this checkout
    python benchmarks/golden.py compare OLD NEW                        # lists the differences; status 1 if any

Runs are compared bit by bit: every metric in metrics.jsonl except the timings, and a checksum of each checkpoint's
weights. So both records must come from the same machine and the same version of torch. Each process computes in fp32
with one thread; runs named `…_2` use two processes under torchrun. Recording takes about 6 minutes on two cores. --only
sft limits it to the runs whose names begin with sft; the runs that those start from must exist already.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TIMINGS = ("_per_second", "seconds", "mfu")
BASE = "--init runs/pretrain/best"
SFT = "--init runs/sft/best"
SHORT = "--eval_problems 20 --test_problems 20"
RL = f"{SFT} {SHORT} --prompts 4 --rollouts 4 --steps 4 --eval_every 2 --max_new_tokens 40"
PAIRS = "--n_pairs 60 --eval_pairs 20 --test_pairs 20"
GRPO = f"{RL} --pass_problems 4 --pass_samples 4 --minibatches 1 --beta 0 --skip_zero_variance false --lr 3e-4"
GRPO += " --kl_unbiased false --kl k3"
PPO = f"{RL} --reward_model runs/reward_model/best --baseline wins --normalise false --lam 1 --minibatches 1"
# In groups: the runs of a group run in parallel, and may start from checkpoints of earlier groups.
RUNS = [
    {
        "pretrain": "pretrain.py --steps 120 --eval_every 40 --eval_tokens 4000",
        "pretrain_2": "pretrain.py --steps 8 --eval_every 4 --eval_tokens 2000",
        "pretrain_adamw": "pretrain.py --steps 8 --eval_every 4 --eval_tokens 2000 --optimizer adamw --lr 1e-3 "
        "--micro_batch 4 --schedule wsd --model.dropout 0.1 --recompute true",
        "pretrain_moe": "pretrain.py --steps 8 --eval_every 4 --eval_tokens 2000 --model.n_expert 4 "
        "--model.n_expert_active 2",
        "pretrain_bias": "pretrain.py --steps 8 --eval_every 4 --eval_tokens 2000 --model.n_expert 4 "
        "--model.balancing bias --model.n_shared_expert 1 --model.moe_every 2",
        "pretrain_gpt2": "pretrain.py --steps 8 --eval_every 4 --eval_tokens 2000 --model.norm layer --model.bias true "
        "--model.positions learned --model.activation gelu --model.qk_norm false --model.n_kv_head 6 --tokenizer char",
        "pretrain_window": "pretrain.py --steps 8 --eval_every 4 --eval_tokens 2000 --model.window 32 --model.sinks 2",
        "pretrain_fsdp_2": "pretrain.py --steps 6 --eval_every 3 --eval_tokens 2000 --fsdp true",
        "encoder": "encoder.py --mlm_steps 6 --steps 6 --eval_every 3",
        "encoder_2": "encoder.py --mlm_steps 4 --steps 4 --eval_every 2",
    },
    {
        "sft": f"sft.py {BASE} {SHORT} --steps 60 --eval_every 30 --samples 2",
        "sft_2": f"sft.py {BASE} {SHORT} --steps 6 --eval_every 3 --micro_batch 16",
        "sft_packed": f"sft.py {BASE} {SHORT} --steps 6 --eval_every 3 --packing true --dropout 0.1",
        "sft_curriculum": f"sft.py {BASE} {SHORT} --steps 6 --eval_every 3 --order curriculum",
        "sft_lora": f"sft.py {BASE} {SHORT} --steps 6 --eval_every 3 --lora.rank 4 --optimizer adamw --lr 1e-3",
    },
    {
        "reward_model": f"reward_model.py {SFT} --steps 6 --eval_every 3 {PAIRS} --prompts 60 --best_of_problems 4",
        "reward_model_2": f"reward_model.py {SFT} --steps 6 --eval_every 3 {PAIRS} --best_of_problems 0 "
        "--pairs corrupted",
        "reward_hinge": f"reward_model.py {SFT} --steps 6 --eval_every 3 {PAIRS} --best_of_problems 0 "
        "--pairs corrupted --loss hinge --margin 1 --centre 0.01 --nll 0",
        "dpo": f"dpo.py {SFT} {SHORT} --prompts 60 --steps 6 --eval_every 3 --batch 8 --max_new_tokens 40",
        "dpo_2": f"dpo.py {SFT} {SHORT} --prompts 60 --steps 6 --eval_every 3 --batch 8 --max_new_tokens 40",
        "dpo_ipo": f"dpo.py {SFT} {SHORT} --prompts 60 --steps 6 --eval_every 3 --batch 8 --pairs offline "
        "--variant ipo --nll 0",
        "dpo_simpo": f"dpo.py {SFT} {SHORT} --prompts 60 --steps 6 --eval_every 3 --batch 8 --pairs offline "
        "--variant simpo --beta 2 --gamma 1 --nll 0 --micro_batch 4",
        "dpo_lora": f"dpo.py {SFT} {SHORT} --prompts 60 --steps 6 --eval_every 3 --batch 8 --pairs offline "
        "--variant hinge --lora.rank 4",
        "grpo": f"grpo.py {GRPO}",
        "grpo_2": f"grpo.py {GRPO} --beta 0.05",
        "grpo_dapo": f"grpo.py {GRPO} --loss_type dapo --clip_high 0.28 --refill 2 --overlong 8 --mask_truncated "
        "true --minibatches 2 --inner_epochs 2 --micro_batch 8",
        "grpo_dr": f"grpo.py {GRPO} --loss_type dr_grpo --scale none --beta 0.05 --kl_in reward --kl k1 "
        "--minibatches 2",
        "grpo_gspo": f"grpo.py {GRPO} --ratio sequence --clip_low 3e-4 --clip_high 4e-4 --minibatches 2 --scale batch "
        "--beta 0.05 --kl_unbiased true",
        "grpo_lora": f"grpo.py {GRPO} --lora.rank 4 --beta 0.05 --kl k2",
        "grpo_cispo": f"grpo.py {RL} --algorithm cispo",
        "grpo_rloo": f"grpo.py {RL} --algorithm rloo --stale 2 --correction mask",
        "rejection": f"rejection.py {SFT} {SHORT} --round_steps 3 --prompts 8 --batch 8 --steps 6 "
        "--eval_every 3 --max_new_tokens 40",
        "gdpo": f"gdpo.py {GRPO} --brevity_weight 0.5 --format_weight 0.5 --conditioned [brevity]",
        "gdpo_2": f"gdpo.py {GRPO} --brevity_weight 0.5 --combine sum",
    },
    {
        "ppo": f"ppo.py {PPO}",
        "ppo_2": f"ppo.py {PPO} --minibatches 2",
        "ppo_textbook": f"ppo.py {PPO} --baseline none --normalise true "
        "--inner_epochs 2 --minibatches 2 --lam 0.95 --kl_target 3 --kl_horizon 50 --micro_batch 8",
        "ppo_separate": f"ppo.py {PPO} --value separate --baseline mean --lora.rank 4",
    },
]


def run(name, command, repo, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    script, *flags = command.split()
    launch = [sys.executable]
    if name.endswith("_2"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    args = [*launch, str(repo / script), *flags, "--name", name, "--device", "cpu", "--dtype", "fp32"]
    started = time.perf_counter()
    done = subprocess.run(args, cwd=folder, env=env, capture_output=True, text=True, check=False)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    print(f"{name:<18}{time.perf_counter() - started:7.1f} s" + (f"   FAILED: see {name}.log" * (done.returncode != 0)))
    return done.returncode == 0


def figures(path):
    """The steps of metrics.jsonl without the timings, and a checksum of each checkpoint's weights."""
    records = []
    for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "step" in record:
            records.append({k: v for k, v in record.items() if not any(part in k for part in TIMINGS)})
    sums = {}
    for name in ("best", "last"):
        file = path / name / "model.safetensors"
        if file.exists():
            sums[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"steps": records, "weights": sums}


def record(folder, repo, only):
    folder.mkdir(parents=True, exist_ok=True)
    ok = True
    for group in RUNS:
        selected = {name: command for name, command in group.items() if name.startswith(only)}
        with ThreadPoolExecutor(2) as pool:
            ok &= all(list(pool.map(lambda item: run(*item, repo, folder), selected.items())))
    results = {
        path.parent.name: figures(path.parent)
        for path in sorted((folder / "runs").glob("*/metrics.jsonl"))
        if "." not in path.parent.name
    }
    (folder / "golden.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return ok


def compare(old, new, only):
    """Compare every metric that both records have, bit by bit. A metric that one of them lacks is listed but does not
    count as a difference; a run that OLD has and NEW lacks does, and so does having no run in common."""
    old, new = (json.loads((path / "golden.json").read_text(encoding="utf-8")) for path in (old, new))
    common, missing, more = (
        sorted(name for name in names if name.startswith(only))
        for names in (old.keys() & new.keys(), old.keys() - new.keys(), new.keys() - old.keys())
    )
    n_different, removed, added = 0, set(), set()
    for name in common:
        pairs = list(zip(old[name]["steps"], new[name]["steps"], strict=False))
        differences = [
            f"step {a['step']}: {k} {a[k]} -> {b[k]}" for a, b in pairs for k in a.keys() & b.keys() if a[k] != b[k]
        ]
        if len(old[name]["steps"]) != len(new[name]["steps"]):
            differences.append("the number of steps")
        if old[name]["weights"] != new[name]["weights"]:
            differences.append("the weights")
        removed |= {k for a, b in pairs for k in a.keys() - b.keys()}
        added |= {k for a, b in pairs for k in b.keys() - a.keys()}
        if differences:
            n_different += 1
            print(f"{name}: {'; '.join(differences[:4])}")
    alone = (("runs that NEW lacks", missing), ("runs that OLD lacks", more))
    for heading, names in (*alone, ("no longer logged", removed), ("logged now", added)):
        if names:
            print(f"{heading}: {', '.join(sorted(names))}")
    print(f"{len(common)} runs that both have, {n_different} differ")
    return bool(common) and not missing and n_different == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--repo", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if len(args.folders) != (1 if args.command == "record" else 2):
        parser.error("record takes one folder; compare takes two, OLD NEW")
    if args.command == "record":
        sys.exit(not record(args.folders[0], args.repo.resolve(), args.only))
    sys.exit(not compare(*args.folders, args.only))
