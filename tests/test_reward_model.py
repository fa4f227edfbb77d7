"""reward_model.py: the losses and their gradients, where a score is read, what the report computes, and the guarantees
of a run."""

import copy
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    assert_one_line_error,
    assert_ranks_draw_apart,
    assert_rate_clip_decay,
    assert_same_metrics,
    assert_same_weights,
    flags_of,
    metrics,
    resumed_at,
    script,
    stopped_after,
)
from safetensors.torch import load_file, save_file

import reward_model
from data import TASKS, Problem, encode_answer, encode_prompt, load_pairs, load_problems
from encoder import Encoder, EncoderConfig
from reward_model import (
    Config,
    RewardEncoder,
    RewardModel,
    best_of_n,
    bradley_terry_loss,
    hinge_loss,
    open_reward_model,
    score_groups,
)
from support import devices, pretrained_start, reward_look, reward_report, reward_samples, reward_setup
from support.checkpoints import open_checkpoint
from support.errors import CheckpointError, ConfigError, DataError, DivergedError
from support.reward_report import calibration, consistency, length_figures, sample_figures, shaping
from support.reward_samples import judged_pairs, probe_samples, score_fitting
from support.splits import split_of
from support.word_problems import CORRUPTIONS, MEN, THEMES, WOMEN, rename
from tokenizer_bpe import ByteTokenizer
from transformer import Transformer, TransformerConfig, gpt2_config

SMALL = dict(init="start", pairs="both", n_pairs=30, prompts=6, rollouts=3, max_new_tokens=8, steps=4, batch=6)
SMALL |= dict(micro_batch=6, warmup=1, eval_every=2, eval_pairs=5, test_pairs=5, best_of=4, best_of_problems=2)
SMALL |= dict(device="cpu", lr=1e-3)


def small(**changes):
    """SMALL with these changes, without the sizes of samples that are not taken: they are refused."""
    given = SMALL | changes
    of_file = given.get("data", "word") not in TASKS
    no_pairs, no_report = of_file or given["pairs"] == "corrupted", of_file or given["best_of_problems"] == 0
    unused = {"prompts", "rollouts"} if no_pairs else set()
    unused |= {"best_of"} if no_report else set()
    unused |= {"max_new_tokens"} if no_pairs and no_report else set()
    unused |= {"best_of_problems"} if of_file else set()
    return {name: value for name, value in given.items() if name in changes or name not in unused}


def config(**changes):
    return Config(**small(**changes))


@pytest.fixture
def here(scratch, tokenizer):
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16))
    raw.save_pretrained("start")
    tokenizer.save_pretrained("start")
    return scratch


@pytest.fixture
def lucky(monkeypatch):
    """A verifier that finds some answers of a random model right."""
    monkeypatch.setattr(reward_samples, "is_correct", lambda text, problem: "e" in text)
    monkeypatch.setattr(reward_samples, "judged_pairs", uncut(judged_pairs))


def uncut(judge):
    """A random model never ends its turn: take its answers as if it did."""
    return lambda problems, groups, most: judge(problems, [[(t, r, True) for t, r, _ in g] for g in groups], most)


# ------------------------------------------------------------------------------------------------ losses


def two_scores(B=7):
    torch.manual_seed(0)
    return [(3 * torch.randn(B, dtype=torch.float64)).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("margin", [None, 0.7, "per pair"])
def test_bradley_terry_and_its_gradient_by_hand(margin):
    chosen, rejected = two_scores()
    margin = torch.rand(7, dtype=torch.float64) if margin == "per pair" else margin
    loss, figures = bradley_terry_loss(chosen, rejected, margin)
    gap = [(c - r).item() for c, r in zip(chosen, rejected, strict=True)]
    m = [0.0] * 7 if margin is None else margin.tolist() if torch.is_tensor(margin) else [margin] * 7
    sigma = [1 / (1 + math.exp(-(g - k))) for g, k in zip(gap, m, strict=True)]
    assert loss.item() == pytest.approx(sum(-math.log(s) for s in sigma) / 7)
    up, down = torch.autograd.grad(loss, (chosen, rejected))
    assert up.tolist() == pytest.approx([-(1 - s) / 7 for s in sigma])  # −σ(−Δ)
    torch.testing.assert_close(down, -up)
    assert figures["pair_accuracy"] == pytest.approx(sum(g > 0 for g in gap) / 7)
    assert figures["gap"] == pytest.approx(sum(gap) / 7)


def test_hinge_and_its_gradient_by_hand():
    chosen, rejected = two_scores()
    loss, _ = hinge_loss(chosen, rejected, 1.5)
    gap = (chosen - rejected).tolist()
    assert loss.item() == pytest.approx(sum(max(0, 1.5 - g) for g in gap) / 7)
    up, down = torch.autograd.grad(loss, (chosen, rejected))
    assert up.tolist() == pytest.approx([-1 / 7 if g < 1.5 else 0 for g in gap])
    torch.testing.assert_close(down, -up)
    assert 0 < (up == 0).sum() < 7
    assert [config(loss=name).margin for name in ("bradley_terry", "hinge")] == [0.0, 1.0]


def test_swap_symmetry_and_ln_2_at_a_tie():
    chosen, rejected = two_scores()
    ahead, behind = bradley_terry_loss(chosen, rejected)[0], bradley_terry_loss(rejected, chosen)[0]
    torch.testing.assert_close(ahead - behind, -(chosen - rejected).mean())  # L(Δ) − L(−Δ) = −Δ
    tie, figures = bradley_terry_loss(chosen, chosen)
    assert tie.item() == pytest.approx(math.log(2))
    assert figures["pair_accuracy"] == 0.5


@pytest.mark.parametrize("objective", [bradley_terry_loss, hinge_loss])
def test_a_constant_changes_nothing_but_the_centring(objective):
    chosen, rejected = two_scores()
    torch.testing.assert_close(objective(chosen + 5, rejected + 5, 0.5)[0], objective(chosen, rejected, 0.5)[0])
    plain, centred = (objective(chosen, rejected, 0.5, centre=c)[0] for c in (0.0, 0.3))
    torch.testing.assert_close(centred - plain, 0.3 * ((chosen + rejected) ** 2).mean())
    figures = objective(chosen, rejected, 0.5, centre=0.3)[1]
    assert figures["loss"] == pytest.approx(plain.item())  # as the validation loss, next to which it is drawn
    assert figures["score"] == pytest.approx(torch.cat([chosen, rejected]).mean().item())


def test_far_apart_scores_stay_finite():
    far = torch.tensor([1e4], requires_grad=True)
    loss, _ = bradley_terry_loss(-far, far)
    assert loss.item() == pytest.approx(2e4)
    assert torch.autograd.grad(loss, far)[0].isfinite()


@pytest.mark.parametrize("objective", [bradley_terry_loss, hinge_loss])
def test_any_cut_gives_the_same_gradient(objective):
    chosen, rejected = two_scores()
    whole = torch.autograd.grad(objective(chosen, rejected, 0.5, centre=0.1)[0], (chosen, rejected))
    parts = sum(
        objective(chosen[rows], rejected[rows], 0.5, centre=0.1, n_pairs=7)[0] for rows in ([0, 3], [1], [2, 4, 5, 6])
    )
    for a, b in zip(torch.autograd.grad(parts, (chosen, rejected)), whole, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ the model


def both_kinds():
    sizes = dict(context=64, n_layer=2, n_head=2, n_kv_head=1, width=16)
    torch.manual_seed(0)
    decoder = RewardModel.from_policy(Transformer(TransformerConfig(30, **sizes)), seed=1).double().eval()
    encoder = RewardEncoder.from_policy(Encoder(EncoderConfig(30, **sizes)), seed=1).double().eval()
    return {"decoder": decoder, "encoder": encoder}


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_an_answer_scores_as_if_it_stood_alone(kind):
    model = both_kinds()[kind]
    groups = [([1, 2, 3], [[4, 5], [6]]), ([7], [[8, 9, 10, 11, 12], [13]]), ([2, 4], [[6, 8], [9]])]
    got = model.read(model, model.pack(groups, pad=0))
    alone = []
    for prompt, answers in groups:
        for answer in answers:
            output = model(torch.tensor([[*prompt, *answer]]))
            alone.append(output[0, -1] if kind == "encoder" else output[0, -1, 0])  # at the last token
    torch.testing.assert_close(got, torch.stack(alone).flatten().float())
    assert got.std() > 1e-4
    torch.testing.assert_close(model.read(model, model.pack(groups, pad=29)), got)  # whatever the padding is made of
    upstream = torch.tensor([1.0, -2, 3, 0.5, -1, 2])
    pairs = zip(
        torch.autograd.grad((got * upstream).sum(), [p for p in model.parameters() if p.requires_grad]),
        torch.autograd.grad(
            (torch.stack(alone).flatten() * upstream).sum(), [p for p in model.parameters() if p.requires_grad]
        ),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_groups_of_any_number_and_length(kind):
    model = both_kinds()[kind]
    generator = torch.Generator().manual_seed(0)
    groups = []
    for n in (1, 5, 2, 3, 2):
        prompt, *answers = (
            torch.randint(1, 30, (k,), generator=generator).tolist()
            for k in torch.randint(1, 9, (n + 1,), generator=generator)
        )
        groups.append((prompt, answers))
    found = score_groups(model, groups, 0, torch.device("cpu"), devices.precision("fp32", devices.setup("cpu"))[0], 40)
    assert [len(f) for f in found] == [1, 5, 2, 3, 2]
    longest = max(len(prompt) + len(answer) for prompt, answers in groups for answer in answers)
    dist = devices.setup("cpu")
    for context in (longest, longest - 1):  # what fills the context fits
        model.config.context = context
        scored = score_fitting(model, groups, 0, dist, devices.precision("fp32", dist)[0])
        left_out = [any(map(math.isnan, row)) for row in scored]
        fits = [len(prompt) + max(map(len, answers)) <= context for prompt, answers in groups]
        assert left_out == [not fit for fit in fits]
        assert all(fits) == (context == longest)
    model.config.context = 64
    for (prompt, answers), row in zip(groups, found, strict=True):
        for answer, value in zip(answers, row, strict=True):
            assert value == pytest.approx(model.read(model, model.pack([(prompt, [answer])], 0)).item(), abs=1e-5)


def randomised(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)  # gains and biases too, or half of the mistakes stay hidden
    return model.eval()


@pytest.mark.parametrize("mixture", [{}, {"n_expert": 4, "n_shared_expert": 1, "balancing": "none"}], ids=str)
def test_new_blocks_add_nothing_and_the_words_keep_the_policys_probabilities(mixture):
    """Before the first step: scores as without new blocks, and of the first answers log π of the policy itself."""
    torch.manual_seed(0)
    sizes = dict(context=64, n_layer=2, n_head=2, n_kv_head=1, width=16)
    policy = Transformer(TransformerConfig(50, **sizes, **mixture)).eval()
    groups = [([1, 2, 3], [[4, 5, 6, 7], [8, 9]]), ([10, 11], [[12, 13], [14, 15, 16]])]
    plain, taller = (RewardModel.from_policy(policy, seed=3, extra=n).eval() for n in (0, 2))
    assert taller.config.n_layer == 4
    taller.head.weight.data.copy_(plain.head.weight)
    packed = RewardModel.pack(groups, 0)
    expected = plain.read(plain, packed)
    torch.testing.assert_close(taller.read(taller, packed), expected)
    found, logprobs = taller.read(taller, packed, with_logprobs=True)
    torch.testing.assert_close(found, expected)
    alone = []
    for prompt, (answer, _) in groups:
        lines = policy(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        alone.append(torch.stack([lines[len(prompt) - 1 + t, token] for t, token in enumerate(answer)]).mean())
    torch.testing.assert_close(logprobs, torch.stack(alone))
    found.sum().backward()
    assert taller.blocks[2].attn.wo.weight.grad.abs().sum() > 0  # what adds nothing yet still learns


def test_the_chosen_answers_loss_is_added(here):
    """With the words' loss the chosen answers of the training pairs become more probable, without it they do not."""
    after = {}
    for weight in (0.0, 1.0):
        reward_model.main(config(pairs="corrupted", steps=8, nll=weight, name=f"w{weight}", lr=3e-3))
        after[weight] = list(metrics(f"runs/w{weight}", "nll_loss").values())
    assert after[0.0] == [0.0] * 8
    assert after[1.0][-1] < after[1.0][0] - 0.1
    with pytest.raises(ConfigError, match="decoder"):
        config(backbone="encoder", nll=1.0)


def test_a_step_of_a_run_is_the_gradient_of_its_pairs(here, monkeypatch):
    """With a margin, the centring and the words' loss: against each answer alone."""
    seen, packs, step, pack = [], [], reward_model.optimizer_step, RewardModel.pack

    def spy(judge, *args):
        gradients = {name: p.grad.clone() for name, p in judge.named_parameters()}
        seen.append((copy.deepcopy(judge), gradients, packs[-1]))
        return step(judge, *args)

    monkeypatch.setattr(RewardModel, "pack", staticmethod(lambda groups, *a: packs.append(groups) or pack(groups, *a)))
    monkeypatch.setattr(reward_model, "optimizer_step", spy)
    reward_model.main(config(pairs="corrupted", steps=1, margin=0.7, centre=0.3, nll=0.4, best_of_problems=0))
    ((judge, gradients, groups),) = seen
    total = 0.0
    for prompt, answers in groups:
        rows = [torch.tensor([prompt + answer]) for answer in answers]
        r_w, r_l = (judge(row)[0, -1, 0] for row in rows)
        logprobs = judge(rows[0][:, :-1], targets=rows[0][:, 1:])[1][0, len(prompt) - 1 :]
        total = total + torch.log(1 + torch.exp(0.7 - r_w + r_l)) + 0.3 * (r_w + r_l) ** 2 - 0.4 * logprobs.mean()
    judge.zero_grad()
    (total / 6).backward()
    for name, p in judge.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("layout", ["qwen3", "gpt2", "mixture"])
def test_transformers_opens_it_and_gives_the_same_score(layout, scratch, tokenizer):
    from transformers import AutoModelForSequenceClassification

    sizes = dict(vocab_size=tokenizer.vocab_size, context=64, n_layer=2, n_head=4, width=32)
    c = TransformerConfig(n_kv_head=2, **sizes) if layout == "qwen3" else gpt2_config(**sizes)
    if layout == "mixture":
        c = TransformerConfig(n_kv_head=2, n_expert=4, balancing="none", **sizes)  # experts' outputs count twice: K = 2
    torch.manual_seed(0)
    model = randomised(RewardModel.from_policy(Transformer(c)))
    model.pad_id = tokenizer.endoftext_id
    model.save_pretrained("rm")
    tokenizer.save_pretrained("rm")
    theirs = AutoModelForSequenceClassification.from_pretrained("rm").eval()
    assert theirs.config.num_labels == 1
    prompt, answers = [5, 6, 7], [[8, 9, 10, 11], [12]]
    rows = [prompt + answer for answer in answers]
    ids = torch.tensor([row + [tokenizer.endoftext_id] * (7 - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (7 - len(row)) for row in rows])
    expected = theirs(ids, attention_mask=real).logits.squeeze(-1)
    got = model.read(model, model.pack([(prompt, answers)], tokenizer.endoftext_id))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    again, _, _ = open_reward_model("rm")
    torch.testing.assert_close(again.read(again.eval(), again.pack([(prompt, answers)], 0)), got)
    assert again.pad_id == tokenizer.endoftext_id


def test_an_encoder_survives_saving_and_starts_from_a_decoder(here):
    policy, tokenizer, _ = open_checkpoint("start")
    model = RewardEncoder.from_policy(policy).eval()
    torch.testing.assert_close(model.blocks[0].attn.wq.weight, policy.blocks[0].attn.wq.weight)
    model.save_pretrained("rm")
    tokenizer.save_pretrained("rm")
    again, _, _ = open_reward_model("rm")
    group = [([1, 2, 3], [[4, 5], [6]])]
    torch.testing.assert_close(again.read(again.eval(), again.pack(group, 0)), model.read(model, model.pack(group, 0)))


@pytest.mark.parametrize(("kind", "name"), [(RewardModel, "score.weight"), (RewardEncoder, "classifier.bias")])
def test_a_head_that_is_not_finite_is_refused(here, tokenizer, kind, name):
    model = kind.from_policy(open_checkpoint("start")[0])
    model.save_pretrained("rm")
    tokenizer.save_pretrained("rm")
    tensors = load_file("rm/model.safetensors")
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, "rm/model.safetensors")
    with pytest.raises(CheckpointError, match=f"rm: {name} has 1 of .* NaN or infinite"):
        open_reward_model("rm")


def test_a_model_that_has_diverged_scores_nothing(here, tokenizer):
    model = RewardModel.from_policy(open_checkpoint("start")[0])
    torch.nn.init.constant_(model.head.weight, 3e38)
    autocast = devices.precision("fp32", devices.setup("cpu"))[0]
    with pytest.raises(DivergedError, match="scores are not finite"):
        reward_samples.score_groups(model, [([1, 2], [[3], [4, 5]])], 0, "cpu", autocast)


def test_models_of_the_wrong_kind_are_refused(here, tokenizer):
    with pytest.raises(CheckpointError, match="no reward model"):
        open_reward_model("start")
    RewardModel.from_policy(open_checkpoint("start")[0]).save_pretrained("rm")
    tokenizer.save_pretrained("rm")
    with pytest.raises(CheckpointError, match=r"the weights hold 'score\.weight', which its config does not explain"):
        open_checkpoint("rm")


# ------------------------------------------------------------------------------------------------ pairs and report


def test_judged_pairs():
    problem = Problem("q?", "", "7", 1, "x")
    group = [("a", True, True), ("b", False, True), ("a", True, True), ("c", True, True), ("d", False, False)]
    group += [("e", False, True), ("", False, True)]
    pairs = judged_pairs([problem, problem], [group, [("a", True, True)]], most=9)
    assert [(p.chosen, p.rejected) for p in pairs] == [("a", "b"), ("c", "e")]  # no repeats, no cut-off, no empty ones
    assert len(judged_pairs([problem], [group], most=1)) == 1


def test_best_of_n_against_every_choice():
    rng = np.random.default_rng(0)
    values, correct = rng.normal(size=(3, 6)), rng.integers(0, 2, (3, 6)).astype(float)
    for n in (1, 2, 4, 6):
        expected = np.mean(
            [
                c[max(chosen, key=lambda k: v[k])]
                for v, c in zip(values, correct, strict=True)
                for chosen in combinations(range(6), n)
            ]
        )
        assert best_of_n(values, correct, [n])[0] == pytest.approx(expected)
    assert best_of_n(values, correct, [1])[0] == pytest.approx(correct.mean())


def test_calibration_of_a_model_that_is_right_as_often_as_it_says():
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=200_000) * 2
    told = np.where(rng.random(len(gaps)) < 1 / (1 + np.exp(-np.abs(gaps))), np.abs(gaps), -np.abs(gaps))
    rows, error = calibration(told)
    assert error < 0.01
    assert sum(n for *_, n in rows) == len(gaps)
    _, sure = calibration(3 * told)
    assert sure > 0.1


def test_calibration_by_hand():
    """Three pairs with σ(ln 3) = 3/4, two of them rightly ranked, and one with σ(ln 9) = 9/10, rightly."""
    rows, error = calibration(np.array([1, 1, -1, 2]) * math.log(3))
    assert rows == [pytest.approx((3 / 4, 2 / 3, 3)), pytest.approx((9 / 10, 1, 1))]
    assert error == pytest.approx((3 * (3 / 4 - 2 / 3) + 1 / 10) / 4)


def test_the_figures_of_samples_by_hand():
    """Five answers to each of two problems: three right, of two texts; none right."""
    texts = ["#### 5", "so 5", "#### 5", "#### 6", "7"], ["a", "#### 7", "b #### 7", "#### 7.", "x\n#### -7"]
    right, lengths = ([True] * 3 + [False] * 2, [False] * 5), ([1, 2, 3, 4, 5], [5, 1, 1, 2, 2])
    groups = [list(zip(*both, strict=True)) for both in zip(texts, right, strict=True)]
    scores = np.array([[1.0, 3, 1, 0, 0], [2, 2, 4, 4, 3]])
    correct, answers = np.array(right, dtype=float), [[[0] * n for n in row] for row in lengths]
    figures = sample_figures(scores, correct, groups, answers, (1, 2, 3))
    assert figures["best_possible"] == pytest.approx({"1": 0.3, "2": 0.45, "3": 0.5})  # of 10 pairs 9 have a right one
    assert figures["spread_of_right_answers"] == 1  # of the scores 1 and 3
    assert figures["spread_of_all_answers"] == pytest.approx((1.2**0.5 + 0.8**0.5) / 2)
    tidy = [[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    expected = shaping(scores, correct=right, length=lengths, tidy=tidy)
    assert figures["shaping"] == pytest.approx(expected)


def test_the_figures_of_length_by_hand():
    groups = [([1], [[0] * a, [0] * b]) for a, b in ((3, 1), (4, 1), (1, 2), (2, 2))]  # longer by 2, 3, −1 and 0
    scores = np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 2.0], [3.0, 2.0]])  # higher by 1, 0, −2 and 1
    expected = {"longer_is_chosen": 2.5 / 4, "gap_length_correlation": 4 / 60**0.5}
    assert length_figures(groups, scores) == pytest.approx(expected)
    assert math.isnan(length_figures(groups, 0 * scores)["gap_length_correlation"])


def test_shaping_is_the_correlation_within_a_prompt():
    values = np.array([[1.0, 2, 3], [11, 12, 13]])
    found = shaping(values, same=values * 2 + 5, length=[[3, 2, 1], [9, 8, 7]], constant=np.ones((2, 3)))
    assert found["same"] == pytest.approx(1)
    assert found["length"] == pytest.approx(-1)
    assert math.isnan(found["constant"])


def test_rename_keeps_the_sums_and_is_one_to_one():
    problems = load_problems("word", "test", 120)
    for p in problems:
        for text in (p.question, p.solution):
            new = rename(text)
            assert [w for w in new if w.isdigit()] == [w for w in text if w.isdigit()]
            assert len(new.split()) == len(text.split())
            assert len(set(new.split())) == len(set(text.split()))  # two names never become one
    assert sum(rename(p.question) != p.question for p in problems) > 80  # rides and classes have no hero
    for names in (MEN, WOMEN, *(theme.things for theme in THEMES.values() if len(theme.things) > 1)):
        turned = [rename(name) for name in names]
        assert sorted(turned) == sorted(names)  # a man stays a man, a fruit a fruit, and no two become one
        assert not any(a == b for a, b in zip(turned, names, strict=True))
    assert rename("Tom gives Anna 1 apple and 2 oranges.") == "Ben gives Mia 1 orange and 2 pears."
    assert rename("Tom has a book of 30 pages.") == "Ben has a book of 30 pages."  # it is read
    assert "book" not in rename("Tom has 2 books.")


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_learns_and_leaves_everything(here):
    rows = [
        {"prompt": f"question {i}?", "chosen": f"well, {i} it is", "rejected": f"{i % 7} and no"} for i in range(300)
    ]
    (here / "easy.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    result = reward_model.main(config(data="easy.jsonl", n_pairs=None, steps=40, batch=16, lr=1e-2, eval_every=20))
    assert result["accuracy"] > 0.95
    assert result["low"] <= result["accuracy"] <= result["high"]
    losses = list(metrics("runs/reward_model", "loss").values())
    assert losses[-1] < 0.3 * losses[0]
    assert metrics("runs/reward_model", "valid_loss")[40] < math.log(2)
    for name in ("best/model.safetensors", "last/trainer_state.pt", "curves.png", "report.png", "report.json"):
        assert (here / "runs" / "reward_model" / name).exists(), name


def test_every_kind_of_pair_is_reported(here, lucky):
    result = reward_model.main(config(test_pairs=12))
    assert set(result["by_kind"]) == {"all", "sampled", *CORRUPTIONS}
    kinds = [row[3] for kind, row in result["by_kind"].items() if kind != "all"]
    assert result["by_kind"]["all"][3] == sum(kinds)
    assert set(result["best_of"]) == {"1", "2", "4"}  # up to --best_of
    for name in ("renamed_same_order", "right_above_one_error", "one_error_above_two", "longer_is_chosen"):
        assert 0 <= result[name] <= 1


@pytest.mark.parametrize(
    ("loss", "margin", "coin", "unit"),
    [
        ("bradley_terry", None, math.log(2), "nats per pair"),
        ("bradley_terry", 1.0, math.log(1 + math.e), "nats per pair"),
        ("hinge", 1.5, 1.5, "per pair"),
    ],
)
def test_the_curve_shows_what_equal_scores_cost(here, monkeypatch, capsys, loss, margin, coin, unit):
    """And only where differences of scores are log-odds are they compared with how often they are right."""
    drawn = []
    monkeypatch.setattr(reward_report, "draw_curves", lambda folder, title, panels: drawn.append(panels[0]))
    result = reward_model.main(config(loss=loss, margin=margin, steps=1, pairs="corrupted", best_of_problems=0))
    log_odds = (loss, margin) == ("bradley_terry", None)
    assert ("calibration" in result) == ("calibration_error" in result) == log_odds
    assert ("calibration error" in capsys.readouterr().out) == log_odds
    assert drawn[0][2] == unit
    assert drawn[0][3] == {"equal scores": pytest.approx(coin, rel=1e-6)}


def test_a_training_problem_gives_as_many_sampled_pairs_as_it_can_and_a_held_out_one_a_single_pair(here, lucky):
    policy, tokenizer, _ = open_checkpoint("start")
    sizes = dict(rollouts=8, n_pairs=None, prompts=20, eval_pairs=20, test_pairs=20, max_new_tokens=20)
    settings = config(pairs="sampled", **sizes)
    autocast, dist = devices.precision("fp32", devices.setup("cpu"))[0], devices.setup("cpu")
    problems = load_problems("word", "valid", 3, (1, 2))
    train, valid = (
        reward_samples.sample_answers(policy, tokenizer, problems, 4, settings, split, dist, autocast)
        for split in ("train", "valid")
    )
    assert train != valid  # a split has random numbers of its own
    pairs = reward_samples.make_pairs(settings, policy, tokenizer, dist, autocast)
    most = {split: max(Counter(pair.prompt for pair in some).values()) for split, some in pairs.items()}
    assert most["train"] > 1
    assert most["valid"] == most["test"] == 1  # the intervals take the pairs to be independent


def test_consistency_by_hand():
    """A score that likes Toms, long texts and even sums of letters."""
    asked, given = [], []

    def score(groups):
        asked.append(groups)
        given.append(
            [[5 * t.count("Tom") + len(p + t) / 100 + sum(map(ord, t)) % 2 for t in texts] for p, texts in groups]
        )
        return given[-1]

    figures = consistency(score, 40, 0, (1, 2))
    pairs, renamed, ladders = asked
    assert renamed == [(rename(p), [rename(chosen), rename(rejected)]) for p, (chosen, rejected) in pairs]
    before, after, steps = given
    same = [(a > b) == (c > d) for (a, b), (c, d) in zip(before, after, strict=True)]
    assert 0 < figures["renamed_same_order"] == sum(same) / len(same) < 1
    flat = [[x for row in rows for x in row] for rows in (before, after)]
    assert figures["renamed_correlation"] == pytest.approx(np.corrcoef(*flat)[0, 1])
    assert figures["right_above_one_error"] == sum(a > b for a, b, _ in steps) / len(steps)
    assert figures["one_error_above_two"] == sum(b > c for _, b, c in steps) / len(steps)
    solutions = {p.question: p.solution for p in load_problems("word", "test", 40, (1, 2))}
    for question, (right, wrong, worse) in ladders:
        assert right == solutions[question] != wrong
        assert "####" in wrong
        assert wrong.startswith(worse)
        assert "####" not in worse


def test_scores_that_cannot_be_had_are_not_reported():
    def score(groups):
        return [[math.nan] * len(answers) for _, answers in groups]

    assert consistency(score, 5, 0, (1, 2)) == {}


def test_a_task_whose_problems_can_have_no_error_has_no_ladder(monkeypatch):
    asked = []

    def score(groups):
        asked.append(groups)
        return [[float(len(t)) for t in texts] for _, texts in groups]

    pairs = load_pairs("word", "test", 5, (1,))
    monkeypatch.setattr(reward_report, "load_pairs", lambda *_: pairs)
    monkeypatch.setitem(TASKS, "word", replace(TASKS["word"], corruptions=dict.fromkeys(CORRUPTIONS, 2)))
    assert consistency(score, 5, 0, (1,)) == {}
    assert asked[2] == []


def test_without_samples_the_rest_is_reported_in_plain_json(here, monkeypatch):
    monkeypatch.setattr(reward_look, "length_figures", lambda *_: {"longer_is_chosen": 0.5, "none": [math.nan, 1.0]})
    result = reward_model.main(config(steps=1, pairs="corrupted", best_of_problems=0))
    assert 0 <= result["renamed_same_order"] <= 1
    assert "best_of" not in result

    def refuse(word):
        raise AssertionError(word)

    written = json.loads((here / "runs/reward_model/report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert written["none"] == [None, 1.0]
    assert written["one_error_above_two"] == result["one_error_above_two"]


@pytest.mark.parametrize("loss", ["bradley_terry", "hinge"])
def test_micro_batches_change_nothing(here, lucky, scaled, loss):
    """Nor does a gradient scaler."""
    reward_model.main(config(name="whole", loss=loss))
    scaled("support.reward_setup")
    reward_model.main(config(name="cut", micro_batch=2, loss=loss))
    names = ("loss", "grad_norm", "pair_accuracy", "gap", "valid_loss")
    assert_same_metrics("runs/whole", "runs/cut", names, rel=1e-3, abs=1e-6)
    assert_same_weights("runs/whole/last", "runs/cut/last", atol=1e-4, rtol=1e-3)


def test_the_rate_the_clip_and_the_decay_of_each_step(here, steps_of):
    seen = steps_of(reward_model)
    reward_model.main(config(steps=5, warmup=3, lr=1e-2, clip=0.3, weight_decay=0.2))
    assert_rate_clip_decay(seen, "cosine", 0.1)


@pytest.mark.parametrize("backbone", ["decoder", "encoder"])
def test_resumed_equals_uninterrupted_bit_for_bit(here, lucky, monkeypatch, backbone):
    changes = dict(dropout=0.1, backbone=backbone, best_of_problems=0)
    reward_model.main(config(name="whole", **changes))
    reward_model.main(config(name="plain", steps=1, **changes | {"dropout": 0.0}))
    assert metrics("runs/plain", "loss")[1] != metrics("runs/whole", "loss")[1]  # dropout acts
    with stopped_after(2):
        reward_model.main(config(name="parts", **changes))
    monkeypatch.setattr(reward_setup, "make_pairs", None)  # the pairs are those of the first part, not sampled again
    with resumed_at(2):
        reward_model.main(config(name="parts", resume=True, **changes))
    assert_same_metrics("runs/whole", "runs/parts", ("loss", "valid_loss", "valid_all"))
    (here / "runs/parts/pairs.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"runs/parts/pairs\.json is corrupt"):
        reward_model.main(config(name="parts", resume=True, **changes))
    assert_same_weights("runs/whole/last", "runs/parts/last")


@pytest.mark.parametrize("backbone", ["decoder", "encoder"])
def test_two_processes_equal_one(here, backbone):
    changes = {"pairs": "corrupted", "backbone": backbone}
    reward_model.main(config(name="n1", **changes))
    two = script("reward_model.py", *flags_of(small(**changes, name="n2")), cwd=here, processes=2)
    assert two.returncode == 0, two.stderr
    names = ("loss", "grad_norm", "gap", "valid_loss", "valid_all")
    assert_same_metrics("runs/n1", "runs/n2", names, rel=1e-3, abs=1e-6)
    assert_same_weights("runs/n1/last", "runs/n2/last", atol=1e-5, rtol=1e-3)
    assert_ranks_draw_apart("runs/n2")
    reports = [json.loads((here / f"runs/n{n}/report.json").read_text(encoding="utf-8")) for n in (1, 2)]
    assert reports[0]["best_of"] == pytest.approx(reports[1]["best_of"], abs=1e-6)  # the same samples


def test_a_gradient_that_is_not_finite_stops_the_run(here, monkeypatch):
    monkeypatch.setattr(reward_model, "optimizer_step", lambda *args: math.inf)
    with pytest.raises(DivergedError, match="gradient norm is inf at step 0"):
        reward_model.main(config(pairs="corrupted"))
    assert not (here / "runs/reward_model/pairs.json").exists()  # nothing was sampled


def test_an_encoder_from_a_decoder_without_positions_is_refused(here, tokenizer):
    """Without its causal mask nothing would show the model the order of the words."""
    model = Transformer(TransformerConfig(tokenizer.vocab_size, 64, 1, 2, 2, 16, positions="none"))
    model.save_pretrained("unordered")
    tokenizer.save_pretrained("unordered")
    with pytest.raises(ConfigError, match="unordered: without positions"):
        reward_model.main(config(init="unordered", backbone="encoder", pairs="corrupted"))


@pytest.mark.parametrize("flag", ["centre", "nll", "margin"])
def test_a_negative_weight_is_refused(flag):
    with pytest.raises(ConfigError, match=f"--{flag} is -1"):
        config(**{flag: -1.0})


def test_bad_input_is_one_line(here):
    (here / "bad.jsonl").write_text(
        '{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}\n{"prompt": "x"}\n', encoding="utf-8"
    )
    begin = ["--init", "start"]
    assert_one_line_error(script("reward_model.py", *begin, "--data", "bad.jsonl", cwd=here), " 2", "chosen")
    assert_one_line_error(script("reward_model.py", *begin, "--loss", "mse", cwd=here), "mse", "hinge")
    assert not (here / "runs").exists()
    Encoder(EncoderConfig(40, n_layer=1, n_head=2, n_kv_head=1, width=16)).save_pretrained("encoder")
    open_checkpoint("start")[1].save_pretrained("encoder")
    with pytest.raises((ConfigError, CheckpointError), match="encoder"):
        reward_model.main(config(init="encoder"))
    for changes, words in [
        ({"pairs": "none"}, "--pairs 'none' is not known"),
        ({"backbone": "lstm"}, "--backbone 'lstm' is not known"),
        ({"batch": 0}, "--batch is 0; it must be at least 1"),
        ({"extra_layers": -1}, "--extra_layers is -1"),
        ({"data": "style", "sampler": "start"}, "no verifier"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"best_of_problems": -1}, "--best_of_problems is -1; it must be at least 0"),
        ({"kinds": ["wrong_sum", "typo"]}, "--kinds holds 'typo'; choose some of wrong_sum"),
        ({"kinds": []}, "--kinds is empty: name some of wrong_sum"),
        ({"rollouts": 1}, "--rollouts is 1; it must be at least 2"),
        ({"kinds": ["missing_answer"], "pairs": "sampled"}, "--kinds has no use here: no pair is corrupted"),
        ({"kinds": ["missing_answer"], "data": "hh"}, "--kinds has no use here: no pair is corrupted"),
        ({"pairs": "corrupted", "data": "hh"}, "--pairs corrupted has no use here: hh has pairs of its own"),
        ({"pairs": "sampled", "data": "hh"}, "--pairs sampled has no use here: hh has pairs of its own"),
        ({"n_pairs": -5}, "--n_pairs is -5; it must be at least 1"),
        ({"n_pairs": 9, "pairs": "sampled"}, "--n_pairs has no use here: no pair is corrupted"),
        ({"sampler": "start", "pairs": "corrupted", "best_of_problems": 0}, "--sampler has no use here: nothing is"),
        ({"data": "style", "n_pairs": 0}, "--n_pairs is 0; it must be at least 1"),
        ({"pairs": "corrupted", "prompts": 9}, "--prompts has no use here: no such answers are sampled"),
        ({"pairs": "corrupted", "rollouts": 5}, "--rollouts has no use here"),
        ({"pairs": "corrupted", "best_of_problems": 0, "max_new_tokens": 9}, "--max_new_tokens has no use here"),
        ({"best_of_problems": 0, "best_of": 8}, "--best_of has no use here"),
        ({"data": "hh", "best_of_problems": 9}, "--best_of_problems has no use here"),
    ]:
        with pytest.raises(ConfigError, match=words):
            config(**changes)
    sizes = dict(vocab_size=open_checkpoint("start")[1].vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1)
    Transformer(TransformerConfig(**sizes, width=16, tie_embeddings=False)).save_pretrained("start")
    with pytest.raises(ConfigError, match="--nll 0"):
        reward_model.main(config(pairs="corrupted"))
    assert not (here / "runs").exists()


def test_samples_that_are_never_right_make_no_pairs(here):
    with pytest.raises(ConfigError, match="no train problem got both a right and a wrong answer"):
        reward_model.main(config(pairs="sampled", n_pairs=None))
    with pytest.raises(ConfigError, match="do not fit the model's context"):
        reward_model.main(config(pairs="corrupted", max_new_tokens=150))


def test_a_report_whose_prompts_just_fit_the_context(here, tokenizer, capsys, monkeypatch):
    """Renamed solutions may be longer than the right ones: those are left out, and no run breaks off."""
    longer = replace(TASKS["word"], rename=lambda text: text.replace("####", "Done. ####"))
    monkeypatch.setitem(TASKS, "word", longer)
    lengths = []
    for p in load_problems("word", "test", 200, tuple(config().levels)):
        answer = max(48, len(encode_answer(tokenizer, p.solution)))
        lengths.append(len(encode_prompt(tokenizer, p)) + answer)
    sizes = dict(n_layer=1, n_head=2, n_kv_head=1, width=16)
    Transformer(TransformerConfig(tokenizer.vocab_size, context=max(lengths), **sizes)).save_pretrained("start")
    result = reward_model.main(config(pairs="corrupted", max_new_tokens=48))
    out = capsys.readouterr().out
    assert f"of 200 prompts of the report are, with their answers, longer than {max(lengths)} tokens: left out" in out
    assert 0 <= result["renamed_same_order"] <= 1
    assert 0 <= result["right_above_one_error"] <= 1
    Transformer(TransformerConfig(tokenizer.vocab_size, context=max(lengths) - 1, **sizes)).save_pretrained("start")
    with pytest.raises(ConfigError, match=f"solutions or --max_new_tokens, {max(lengths)} tokens together, do not fit"):
        reward_model.main(config(pairs="corrupted", max_new_tokens=48))


@pytest.mark.parametrize("own", [False, True])
def test_samples_of_broken_bytes_are_scored(here, tokenizer, monkeypatch, capsys, own):
    """As they were sampled: their text, in which a byte that is no UTF-8 has become three, may not fit the context. Of
    a policy with another tokenizer there is only the text: it is cut off."""
    policy = open_checkpoint("start")[0]
    reads = ByteTokenizer() if own else tokenizer
    c, dist = config(max_new_tokens=20, best_of=8), devices.setup("cpu")
    problems = load_problems("word", "test", c.best_of_problems)
    prompts = [encode_prompt(reads, p) for p in problems]
    sizes = TransformerConfig(reads.vocab_size, max(map(len, prompts)) + 20, 1, 2, 1, 16)
    model, seen = RewardModel.from_policy(Transformer(sizes)), []

    def see(model, groups, *more, true=reward_samples.score_groups, **options):
        seen.extend(groups)
        return true(model, groups, *more, **options)

    monkeypatch.setattr(reward_samples, "score_groups", see)
    autocast, _ = devices.precision("fp32", dist)
    sizes = (1, 2, 4, 8)
    scores, correct, figures = probe_samples(model, policy, tokenizer, reads, c, sizes, dist, autocast)
    assert scores.shape == correct.shape == (c.best_of_problems, 8)
    assert list(figures["best_possible"]) == ["1", "2", "4", "8"]
    assert [prompt for prompt, _ in seen] == prompts
    if not own:
        assert max(len(answer) for _, answers in seen for answer in answers) == 20  # none has got longer
    assert ("sampled answers are longer than the context: cut off" in capsys.readouterr().out) is own


def test_the_sampler_is_not_moved_aside(here):
    shutil.copytree("start", "runs/rm")
    with pytest.raises(ConfigError, match="--sampler runs/rm is the run that --name rm would move aside"):
        reward_model.main(config(sampler="runs/rm", name="rm", pairs="corrupted"))
    assert (here / "runs/rm/config.json").exists()


def test_what_cannot_run_is_said_before_anything_is_made(here, monkeypatch):
    monkeypatch.setattr(pretrained_start, "make_start_once", lambda *_: pytest.fail("a start was begun"))
    monkeypatch.setattr(reward_samples, "sample_answers", lambda *_: pytest.fail("answers were sampled"))
    with pytest.raises(ConfigError, match="holds no saved run"):
        reward_model.main(config(resume=True))
    pairs = [{"prompt": f"q{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    kept = [p for p in pairs if split_of(p["prompt"]) != "valid"]
    (here / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in kept), encoding="utf-8")
    with pytest.raises(DataError, match="has no pair in the split valid"):
        reward_model.main(config(init=None, data="pairs.jsonl"))


def test_the_start_on_the_text_of_pairs_is_another_than_that_of_sft(scratch, monkeypatch):
    row = {"chosen": "yes", "rejected": "no"}
    text = "".join(json.dumps(row | {"prompt": f"q{i}?"}) + "\n" for i in range(60))
    Path("pairs.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.setattr(pretrained_start, "make_start_once", lambda name, *_: name)
    settings, dist = config(init=None, data="pairs.jsonl"), devices.setup("cpu")
    starts = {start(settings, dist) for start in (pretrained_start.pretrained_start, pretrained_start.text_start)}
    assert len(starts) == 2


def test_a_broken_off_start_does_not_count(scratch, monkeypatch):
    rows = [{"prompt": f"q{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    made = []

    def broken(config):
        made.append(config)
        raise SystemExit(130)

    monkeypatch.setattr(pretrained_start.pretrain, "main", broken)
    for _ in range(2):  # nor is it reused
        with pytest.raises(SystemExit):
            reward_model.main(config(init=None, data="pairs.jsonl"))
    assert len(made) == 2
    assert Path(made[0].data).read_text(encoding="utf-8").count("yes") > 40


@pytest.mark.parametrize("kind", [RewardModel, RewardEncoder])
def test_scores_are_fp32_under_autocast(scratch, tokenizer, kind):
    torch.manual_seed(0)
    model = randomised(kind.from_policy(Transformer(TransformerConfig(tokenizer.vocab_size, 64, 1, 2, 1, 16))))
    packed = model.pack([([5, 6, 7], [[8, 9], [8, 10]]), ([5, 6], [[11], [12]])], 0)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.read(model, packed)
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())  # more than eight bits of it
    torch.testing.assert_close(got, model.read(model, packed), atol=0.1, rtol=0.05)


def test_a_tie_is_half_right_everywhere():
    rows, error = calibration(np.array([0.0, 0.0, 0.0]))
    assert rows == [(0.5, 0.5, 3)]
    assert error == 0


def test_equal_and_empty_answers_are_skipped_and_counted(here, capsys):
    rows = [{"prompt": f"q{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    rows += [{"prompt": "same?", "chosen": "a", "rejected": "a"}, {"prompt": "none?", "chosen": "a", "rejected": " "}]
    rows += [{"prompt": "long? " * 200, "chosen": "yes", "rejected": "no"} for _ in range(1)]
    (here / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    result = reward_model.main(config(data="pairs.jsonl", n_pairs=None, steps=1))
    out = capsys.readouterr().out
    accuracy, low, high, n = result["before"]
    assert f"; test pairs ranked rightly before: {accuracy:.1%} [{low:.1%}, {high:.1%}]" in out
    (line,) = (line.split() for line in out.splitlines() if line.startswith("all, before"))
    assert line[2:] == [f"{accuracy:.1%}", f"[{low:.1%},", f"{high:.1%}]", str(n)]
    assert "1 pairs of equal answers" in out
    assert "1 pairs with an empty answer" in out
    assert "longer than 160 tokens: left out" in out
    reward_model.main(config(data="pairs.jsonl", n_pairs=None, steps=1, max_tokens=100, name="shorter"))
    assert "longer than 100 tokens: left out" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_accuracy_before_is_that_of_the_new_head(here, kind):
    changes = dict(pairs="corrupted", steps=2, test_pairs=40, lr=0.0, warmup=0, best_of_problems=0, backbone=kind)
    changes |= dict(dropout=0.5, eval_every=1)
    result = reward_model.main(config(**changes))  # with lr 0 nothing moves
    assert tuple(result["before"]) == tuple(result["by_kind"]["all"])
    assert len(set(metrics("runs/reward_model", "valid_loss").values())) == 1  # dropout acts in training alone
    changed = reward_model.main(config(**changes | {"lr": 1.0, "steps": 3, "name": "moved"}))
    assert tuple(changed["before"]) == tuple(result["before"])
    assert changed["scores"] != result["scores"]
