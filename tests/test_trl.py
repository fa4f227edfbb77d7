"""The objectives against TRL itself: its trainers' losses, and their gradients in every weight, for the same model and
the same tokens; the advantages that it makes of the same rewards."""

import importlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import distill
import dpo
import gdpo
import grpo
from grpo import ALGORITHMS, group_advantages, grpo_loss, less_baseline, reward_sums
from reward_model import RewardModel, bradley_terry_loss
from support import devices, shared_prompt, taught
from support.family import loss_options
from support.hf import LAYOUTS, layout_of, to_layout
from support.judged import shift_answers
from support.off_policy import sampler_weights
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig, token_logprobs

pytest.importorskip("trl", reason="trl is not installed: the loops of the other tests are the check then")
pytestmark = pytest.mark.filterwarnings("ignore")

SIDES = ("chosen", "rejected")
PROMPTS = ["How many apples?", "Tom has 3. He buys 4 more. How many?"]
ANSWERS = [
    ["Tom has 7 now.", "There are 3 + 4 = 7.\n#### 7", "No"],
    ["#### 12", "He has 3 + 4 = 7 apples.", "Tom buys"],
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A random model and its tokenizer, as files that both sides open, and the prompts and answers as ids."""
    path = tmp_path_factory.mktemp("trl")
    tokenizer = BPETokenizer.train(["\n".join(PROMPTS + [text for group in ANSWERS for text in group])] * 4, 300)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(tokenizer.vocab_size, context=96, n_layer=2, n_head=4, n_kv_head=2, width=32))
    with torch.no_grad():
        for p in model.parameters():  # far from uniform: mistakes must show
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(path / "start")
    tokenizer.save_pretrained(path / "start")
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    answers = [[[*tokenizer.encode(text), tokenizer.im_end_id] for text in group] for group in ANSWERS]
    return path / "start", tokenizer, prompts, answers


def trainer_of(kind, start, tmp_path, rows, **options):
    """TRL's trainer `kind` on the model of `start`, in float64."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    opener = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    common = dict(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    common |= dict(gradient_checkpointing=False, max_steps=1) | options.pop("args")
    if kind in ("ORPO", "GKD"):
        trl = importlib.import_module(f"trl.experimental.{kind.lower()}")
    return getattr(trl, f"{kind}Trainer")(
        model=opener.from_pretrained(start).double(),
        args=getattr(trl, f"{kind}Config")(**common),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
        **options,
    )


def assert_same_gradients(ours, theirs, atol=1e-6):
    """Of every weight, by the names of the layout that transformers knows."""
    gradients = {name: p.grad for name, p in ours.named_parameters() if name != "head.weight"}
    expected = {name: p.grad for name, p in theirs.named_parameters() if name != "score.weight"}
    mapped = to_layout(gradients, LAYOUTS[layout_of(ours.config)].names)
    assert len(expected) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(mapped[name], gradient, atol=atol, rtol=1e-4, msg=lambda m, at=name: f"{at}: {m}")


def padded(rows, left):
    """Lists of ids -> ids and mask (B, T), padded with 0 on the left or on the right."""
    T = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        zeros, ones = [0] * (T - len(row)), [1] * len(row)
        ids.append(zeros + row if left else row + zeros)
        mask.append(zeros + ones if left else ones + zeros)
    return torch.tensor(ids), torch.tensor(mask)


@pytest.fixture(scope="module")
def grpo_trainer(start, tmp_path_factory):
    args = dict(per_device_train_batch_size=6, num_generations=3, max_completion_length=20, beta=0.3, temperature=0.7)
    args |= dict(epsilon=0.2, epsilon_high=0.28)
    path, into, rows = start[0], tmp_path_factory.mktemp("grpo"), [{"prompt": text} for text in PROMPTS]
    return trainer_of("GRPO", path, into, rows, reward_funcs=[lambda **_: [0.0]], args=args)


def loss_inputs(start):
    """A policy with its answers' log-probabilities at temperature 0.7, and those of an older policy and a reference
    (6, T); advantages (6,); the same as TRL's batch: -> model, logprobs, old, ref, A, mask, batch."""
    path, _, prompts, answers = start
    model = Transformer.from_pretrained(path).double()
    ids, mask = padded([prompts[0]] * 3 + [prompts[1]] * 3, left=True)
    completions, completion_mask = padded([answer for group in answers for answer in group], left=False)
    packed = shared_prompt.pack(prompts, answers, 0)
    logprobs = shared_prompt.shared_answer_logprobs(model, packed, 0.7)[:, : completions.shape[1]]
    torch.manual_seed(1)
    noise = 0.3 * torch.randn(2, *logprobs.shape, dtype=torch.float64) + 0.3 * torch.randn(6, 1)
    old, ref = logprobs.detach() + noise
    A = torch.randn(6, dtype=torch.float64)
    batch = {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": completions, "completion_mask": completion_mask}
    batch |= {"advantages": A, "old_per_token_logps": old, "ref_per_token_logps": ref}
    return model, logprobs, old, ref, A, completion_mask, batch | {"num_items_in_batch": completion_mask.sum()}


@pytest.mark.parametrize(("ratio", "unbiased"), [("token", False), ("token", True), ("sequence", False)])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_loss_and_gradient(start, grpo_trainer, loss_type, ratio, unbiased, beta):
    """(With a sequence's ratio TRL weighs each token's KL by that ratio too, a known fault: huggingface/trl#6586.)"""
    trainer = grpo_trainer
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = loss_type, ratio, beta
    trainer.epsilon_low, trainer.epsilon_high = 0.2, 0.28
    trainer.current_gradient_accumulation_steps, trainer.args.use_bias_correction_kl = 1, unbiased
    model, logprobs, old, ref, A, mask, batch = loss_inputs(start)
    trainer.model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, batch)
    theirs.backward()
    options = dict(beta=beta, clip_low=0.2, clip_high=0.28, loss_type=loss_type, ratio=ratio, kl_unbiased=unbiased)
    ours, figures = grpo_loss(logprobs, old, A, mask, ref, **options, max_length=20)
    ours.backward()
    torch.testing.assert_close(ours, theirs.to(ours), atol=1e-6, rtol=1e-6)
    assert 0 < figures["clip_fraction"] < 1
    assert_same_gradients(model, trainer.model)


# What to set in TRL for a row of ours. Its cap of CISPO is the bound itself, not its distance from 1.
AS_IN_TRL = {
    "grpo": dict(loss_type="grpo", beta=0.3),
    "dr_grpo": dict(loss_type="dr_grpo"),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4),
    "cispo": dict(loss_type="cispo", epsilon_high=5.0),
    "sapo": dict(loss_type="sapo"),
}


@pytest.mark.parametrize("name", AS_IN_TRL)
def test_the_family_loss_and_gradient(start, grpo_trainer, monkeypatch, name):
    """A row as a run has it, with TRL's trainer as the same paper's name sets it."""
    trainer, plain = grpo_trainer, dict(importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2, beta=0.0)
    for key, value in (plain | AS_IN_TRL[name] | {"current_gradient_accumulation_steps": 1}).items():
        monkeypatch.setattr(trainer, key, value, raising=False)
    trainer.args.use_bias_correction_kl = True
    model, logprobs, old, ref, A, mask, batch = loss_inputs(start)
    old[0, 0] -= 2.0  # a ratio above CISPO's cap
    trainer.model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, batch)
    theirs.backward()
    ours, figures = grpo_loss(
        logprobs, old, A, mask, ref, **loss_options(grpo.Config(algorithm=name, max_new_tokens=20))
    )
    ours.backward()
    torch.testing.assert_close(ours, theirs.to(ours), atol=1e-6, rtol=1e-6)
    assert (0 < figures["clip_fraction"] < 1) == (name != "sapo")
    assert_same_gradients(model, trainer.model)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_samplers_weights_stand_before_the_surrogate_alone(start, grpo_trainer, monkeypatch, loss_type):
    """Not before the KL, and a token of weight 0 counts in the mean. (TRL computes the weights while it generates.)"""
    trainer, token = grpo_trainer, dict(importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2, beta=0.3)
    vllm = dict(use_vllm=True, vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1)
    for key, value in (token | vllm | {"loss_type": loss_type}).items():
        monkeypatch.setattr(trainer, key, value, raising=False)
    trainer.args.use_bias_correction_kl = True
    model, logprobs, old, ref, A, mask, batch = loss_inputs(start)
    weights, _ = sampler_weights(old, old + 0.5 * torch.randn_like(old), mask, "mask", "token", 1.5)
    assert 0 < (weights[mask > 0] == 0).sum() < mask.sum()
    trainer.model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, batch | {"importance_sampling_ratio": weights})
    theirs.backward()
    options = dict(beta=0.3, loss_type=loss_type, kl_unbiased=True, max_length=20)
    ours, _ = grpo_loss(logprobs, old, A, mask, ref, **options, sampler_weights=weights)
    ours.backward()
    torch.testing.assert_close(ours, theirs.to(ours), atol=1e-6, rtol=1e-6)
    assert_same_gradients(model, trainer.model)


@pytest.fixture(scope="module")
def rloo_trainer(start, tmp_path_factory):
    args = dict(per_device_train_batch_size=6, num_generations=3, max_completion_length=20, temperature=0.7, beta=0.05)
    path, into, prompts = start[0], tmp_path_factory.mktemp("rloo"), [{"prompt": text} for text in PROMPTS]
    return trainer_of("RLOO", path, into, prompts, reward_funcs=[lambda **_: [0.0]], args=args)


def test_rloo_loss_and_gradient(start, rloo_trainer):
    trainer = rloo_trainer
    model, logprobs, old, _, A, mask, batch = loss_inputs(start)
    old = logprobs.detach() + 0.2 * (old - logprobs.detach())  # products of ratios of which the clip lets some through
    trainer.model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, batch | {"old_logps": (old * mask).sum(1)})
    theirs.backward()
    ours, figures = grpo_loss(logprobs, old, A, mask, **loss_options(grpo.Config(algorithm="rloo", max_new_tokens=20)))
    ours.backward()
    torch.testing.assert_close(ours, theirs.to(ours), atol=1e-6, rtol=1e-6)
    assert 0 < figures["clip_fraction"] < 1
    assert_same_gradients(model, trainer.model, atol=1e-5)  # they are |y| times as large


def test_advantages_of_rloo(rloo_trainer, monkeypatch):
    """With the KL, off the reward and before the baseline, of a reference that is not the policy."""
    rewards, weights, seen = made_rewards(), {"a": 1.0, "b": 0.5, "c": 0.2}, []
    scored = rloo_trainer._get_per_token_logps_and_entropies

    def score(model, ids, *args, **options):
        logprobs, *more = scored(model, ids, *args, **options)
        seen.append(logprobs + 0.3 * len(seen) * torch.arange(len(ids)).remainder(4)[:, None])  # old, then reference
        return seen[-1], *more

    monkeypatch.setattr(rloo_trainer, "_get_per_token_logps_and_entropies", score)
    theirs, mask = advantages_of(rloo_trainer, rewards, weights, monkeypatch)
    row, (old, ref) = ALGORITHMS["rloo"], seen
    A = group_advantages(reward_sums(rewards, weights), row["scale"], row["baseline"])
    kl = ((old - ref) * mask).sum(1).view(2, 3)
    paid = A - row["beta"] * less_baseline(kl, row["baseline"])
    torch.testing.assert_close(paid, theirs.to(paid), atol=1e-5, rtol=1e-5)
    assert (paid - A).abs().max() > 0.01


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_grpo(grpo_trainer, scale, monkeypatch):
    rewards, weights = made_rewards(), {"a": 1.0, "b": 0.5, "c": 0.2}
    monkeypatch.setattr(grpo_trainer, "scale_rewards", scale)
    theirs, _ = advantages_of(grpo_trainer, rewards, weights, monkeypatch)
    torch.testing.assert_close(group_advantages(reward_sums(rewards, weights), scale), theirs, atol=1e-6, rtol=1e-5)


def test_advantages_of_gdpo(grpo_trainer, monkeypatch):
    rewards, weights = made_rewards(), {"a": 1.0, "b": 0.5, "c": 0.2}
    monkeypatch.setattr(grpo_trainer, "multi_objective_aggregation", "normalize_then_sum")
    theirs, _ = advantages_of(grpo_trainer, rewards, weights, monkeypatch)
    ours = gdpo.gdpo_advantages(rewards, weights.values())
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert (ours - group_advantages(reward_sums(rewards, weights))).abs().max() > 0.1


def made_rewards():
    """(2, 3, 3): groups, rollouts, rewards; one of the rewards is the same for a whole group."""
    torch.manual_seed(2)
    rewards = torch.rand(2, 3, 3)
    rewards[0, :, 1] = 0.3
    return rewards


def advantages_of(trainer, rewards, weights, monkeypatch):
    """What TRL makes of these rewards (N, R, M) of its own rollouts: (N, R), and the rollouts' mask (N·R, T)."""
    flat = rewards.flatten(0, 1)  # (N·R, M)
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: flat)
    monkeypatch.setattr(trainer, "reward_weights", torch.tensor(list(weights.values())))
    names = list(weights)
    monkeypatch.setattr(trainer, "reward_funcs", names)
    monkeypatch.setattr(trainer, "reward_func_names", names)
    rows = [{"prompt": text} for text in PROMPTS for _ in range(3)]
    batch = trainer._generate_and_score_completions(rows)
    return batch["advantages"].view(2, 3), batch["completion_mask"]


def pairs_of(prompts, answers):
    """The first two answers of each prompt as TRL's batch, the chosen ones first: -> model inputs, completion mask."""
    rows = [(p, group[side]) for side in (0, 1) for p, group in zip(prompts, answers, strict=True)]
    ids, real = padded([p + answer for p, answer in rows], left=False)
    spoken = torch.zeros_like(real)
    for i, (p, answer) in enumerate(rows):
        spoken[i, len(p) : len(p) + len(answer)] = 1
    return {"input_ids": ids, "attention_mask": real}, spoken


@pytest.mark.parametrize(
    ("variant", "loss_type"),
    [*((name, name) for name in ("sigmoid", "hinge", "apo_zero", "apo_down")), ("ipo_mean", "ipo")],
)
def test_dpo_loss_and_gradient(start, tmp_path, variant, loss_type):
    path, _, prompts, answers = start
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    trainer = trainer_of("DPO", path, tmp_path, rows, args=dict(beta=0.7, loss_type=loss_type))
    policy, reference = moved(trainer, tmp_path), Transformer.from_pretrained(path).double()
    batch, spoken = pairs_of(prompts, answers)
    theirs = trainer.compute_loss(trainer.model, batch | {"completion_mask": spoken})
    theirs.backward()
    packed = shared_prompt.pack(prompts, [group[:2] for group in answers], 0)
    with torch.no_grad():
        ref = dpo.pair_logprobs(reference, packed)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), packed.lengths.view(-1, 2).unbind(1), strict=True))
    ours, _ = dpo.dpo_loss(*dpo.pair_logprobs(policy, packed), *ref, 0.7, variant, **lengths)
    ours.backward()
    torch.testing.assert_close(ours, theirs.to(ours), atol=1e-6, rtol=1e-5)
    assert_same_gradients(policy, trainer.model)


def moved(trainer, tmp_path, seed=1):
    """The trainer's policy, moved away from the reference, as ours."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    trainer.model.save_pretrained(tmp_path / "moved")
    return Transformer.from_pretrained(tmp_path / "moved", dtype=torch.float64)


@pytest.mark.parametrize(("seed", "weights"), [(1, (1.0, 1.0)), (4, (1.0, 1.0)), (4, (1.3, 0.7))])
def test_kto_loss_and_gradient(start, tmp_path, seed, weights):
    """(TRL's collator makes the batch: it pairs each prompt with the answer of the row before.)"""
    path, _, prompts, answers = start
    good = [True, False, False, True, True]
    args = dict(beta=0.7, desirable_weight=weights[0], undesirable_weight=weights[1], per_device_train_batch_size=5)
    rows = [{"prompt": "a", "completion": "b", "label": x} for x in good]
    trainer = trainer_of("KTO", path, tmp_path, rows, args=args)
    policy, reference = moved(trainer, tmp_path, seed), Transformer.from_pretrained(path).double()
    order = [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2)]  # prompt, answer to it
    ours = [{"prompt": prompts[i], "answer": answers[i][j], "good": x} for (i, j), x in zip(order, good, strict=True)]
    examples = [{"prompt_ids": row["prompt"], "completion_ids": row["answer"], "label": row["good"]} for row in ours]
    for k, example in enumerate(examples):
        example["KL_completion_ids"] = examples[k - 1]["completion_ids"]
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    theirs.backward()

    dist = devices.setup("cpu")
    autocast, _ = devices.precision("fp32", dist)
    z0 = dpo.reference_point(policy, shift_answers(ours, 96), 0, dist, autocast, reference)
    assert z0 == pytest.approx(trainer._metrics["eval"]["kl"][-1], rel=1e-5)
    batch = dpo.batch_of(ours, 0, "cpu")
    (logps,) = dpo.pair_logprobs(policy, batch.packed)
    with torch.no_grad():
        (ref,) = dpo.pair_logprobs(reference, batch.packed)
    loss, _ = dpo.kto_loss(logps - ref, batch.desirable, z0, 0.7, *weights)
    loss.backward()
    torch.testing.assert_close(loss, theirs.to(loss), atol=1e-6, rtol=1e-5)
    assert_same_gradients(policy, trainer.model)
    assert (z0 > 0) == (seed == 4)


def test_orpo_loss_and_gradient(start, tmp_path):
    """(TRL's first term is SFT on prompt and answer, a mean over the batch's tokens; ours, as in the paper, on the
    answer alone. So the sum here is of their first term and our second.)"""
    path, _, prompts, answers = start
    trainer = trainer_of("ORPO", path, tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], args=dict(beta=0.7))
    policy = moved(trainer, tmp_path)
    batch, spoken = pairs_of(prompts, answers)
    batch["labels"] = batch["input_ids"].masked_fill(spoken == 0, -100)
    sides = {f"{side}_{name}": x for name, both in batch.items() for side, x in zip(SIDES, both.chunk(2), strict=True)}
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model, sides)
    theirs.backward()
    packed = shared_prompt.pack(prompts, [group[:2] for group in answers], 0)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), packed.lengths.view(-1, 2).unbind(1), strict=True))
    ours, _ = dpo.dpo_loss(*dpo.pair_logprobs(policy, packed), None, None, 0.7, "orpo", **lengths)
    rows = [p + group[0] for p, group in zip(prompts, answers, strict=True)]
    sft = -torch.cat([token_logprobs(policy, torch.tensor([row]))[0] for row in rows]).mean()
    both_terms = ours + sft
    both_terms.backward()
    assert ours > 0.1
    torch.testing.assert_close(both_terms, theirs.to(ours), atol=1e-6, rtol=1e-5)
    assert_same_gradients(policy, trainer.model)


def test_reward_loss_and_gradient(start, tmp_path):
    path, tokenizer, prompts, answers = start
    model = RewardModel.from_policy(Transformer.from_pretrained(path))
    model.pad_id = tokenizer.endoftext_id
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    trainer = trainer_of("Reward", tmp_path / "judge", tmp_path, rows, args=dict(center_rewards_coefficient=0.05))
    batch, _ = pairs_of(prompts, answers)
    batch["input_ids"][batch["attention_mask"] == 0] = model.pad_id
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    model = model.double()
    groups = [(p, group[:2]) for p, group in zip(prompts, answers, strict=True)]
    scores = model.read(model, model.pack(groups, model.pad_id)).view(-1, 2)
    ours, _ = bradley_terry_loss(*scores.unbind(1), centre=0.05)
    ours.backward()
    torch.testing.assert_close(ours, theirs.to(ours), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.head.weight.grad, trainer.model.score.weight.grad, atol=1e-6, rtol=1e-4)
    assert_same_gradients(model, trainer.model)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["Distillation", "GKD"])
def test_distill_loss_and_gradient(start, tmp_path, kind, beta):
    """TRL's two trainers of whole distributions, on answers of both prompts; a teacher of another width."""
    from transformers import AutoModelForCausalLM

    path, tokenizer, prompts, answers = start
    torch.manual_seed(2)
    teacher = Transformer(
        TransformerConfig(tokenizer.vocab_size, context=96, n_layer=1, n_head=2, n_kv_head=1, width=24)
    )
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.2 * torch.randn_like(p))
    teacher.save_pretrained(tmp_path / "teacher")
    rows = [{"prompt": text} for text in PROMPTS]
    args = dict(beta=beta, temperature=0.7) if kind == "Distillation" else dict(beta=beta, lmbda=1.0)
    if kind == "GKD":
        rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").double()
    trainer = trainer_of(kind, path, tmp_path, rows, args=args, teacher_model=opened)
    flat = [(p, answer) for p, group in zip(prompts, answers, strict=True) for answer in group]
    if kind == "Distillation":
        prompt_ids, prompt_mask = padded([p for p, _ in flat], left=True)
        completion_ids, completion_mask = padded([answer for _, answer in flat], left=False)
        batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
        batch |= {"completion_ids": completion_ids, "completion_mask": completion_mask}
        theirs, _, n = trainer._compute_loss(trainer.model, batch, None)
        assert n == completion_mask.sum()
    else:
        ids, real = padded([p + answer for p, answer in flat], left=False)
        spoken = torch.zeros_like(real)
        for i, (p, answer) in enumerate(flat):
            spoken[i, len(p) : len(p) + len(answer)] = 1
        batch = {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(spoken == 0, -100)}
        theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    student = Transformer.from_pretrained(path).double()
    texts = taught.Texts(prompts, prompts, answers, [True, True])
    (piece,) = taught.pieces_of(texts, 64, 0, torch.device("cpu"))
    temperature = 0.7 if kind == "Distillation" else 1.0
    settings = distill.Config(beta=beta, temperature=temperature)
    ours, _ = distill.piece_loss(student, teacher.double(), piece, settings, texts.n_tokens)
    ours.backward()
    assert ours > 0.01
    torch.testing.assert_close(ours, theirs.to(ours), atol=1e-6, rtol=1e-5)
    assert_same_gradients(student, trainer.model)
