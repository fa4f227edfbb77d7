"""rejection.py: what is kept, what it weighs, its gradient against SFT's and MaxRL's, and the guarantees of a run."""

import itertools
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import (
    assert_one_line_error,
    assert_rate_clip_decay,
    assert_resume_refuses_what_changed,
    assert_resumed_equals_whole,
    assert_same_metrics,
    assert_same_weights,
    assert_the_start_is_kept,
    cpu_without_bf16,
    flags_of,
    metrics,
    script,
)

import rejection
import sft
from data import load_problems, rows_at
from grpo import group_advantages
from lora import LoraConfig, add_lora
from rejection import Config, encode_kept, keep_right, keep_round
from sft import collate, encode_example, sft_loss
from support import devices, questions, verified
from support.checkpoints import open_checkpoint
from support.errors import ConfigError, DivergedError
from support.rollouts import Sampler
from support.rounds import round_figures
from support.runs import Run
from support.verified import judged_answers
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig, answer_logprobs, token_logprobs

SMALL = dict(init="start", data="twos.jsonl", steps=6, round_steps=3, prompts=6, rollouts=4, batch=6, micro_batch=6)
SMALL |= dict(max_new_tokens=8, warmup=1, lr=3e-3, eval_every=2, eval_problems=6, test_problems=6, pass_problems=3)
SMALL |= dict(pass_samples=2, device="cpu")


def config(**changes):
    return Config(**(SMALL | changes))


def write_questions(path, answer):
    """300 questions; answer(i) -> the number that the solution gives."""
    records = [{"question": f"Number {i}?", "answer": f"#### {answer(i)}"} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """twos.jsonl, whose answers are all 2; `start`, a tiny model that says 1 as often; `random`, which says neither."""
    folder = tmp_path_factory.mktemp("twos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cpu_without_bf16(patch)
        write_questions(folder / "coin.jsonl", lambda i: 1 + i % 2)
        write_questions(folder / "twos.jsonl", lambda i: 2)
        tokenizer = BPETokenizer.train([(folder / "twos.jsonl").read_text(encoding="utf-8")], 300)
        torch.manual_seed(0)
        layout = TransformerConfig(tokenizer.vocab_size, context=64, n_layer=1, n_head=2, n_kv_head=1, width=16)
        Transformer(layout).save_pretrained("random")
        tokenizer.save_pretrained("random")
        few = dict(batch=16, micro_batch=16, max_new_tokens=8, eval_problems=4, test_problems=4, device="cpu")
        sft.main(sft.Config(init="random", data="coin.jsonl", steps=120, lr=1e-2, eval_every=120, **few))
        Run.close_log()  # tests/test_mps.py has a run of this name in another process
        shutil.copytree("runs/sft/last", "start")
    return folder


@pytest.fixture
def here(scratch, folder):
    for name in ("start", "random"):
        (scratch / name).symlink_to(folder / name)
    shutil.copy(folder / "twos.jsonl", scratch)
    return scratch


# ------------------------------------------------------------------------------------------------ what is kept

ANSWERS = [
    ([5, 1], True, True),
    ([6, 1], False, True),
    ([5, 1], True, True),
    ([5, 5], True, False),
    ([7, 1], True, True),
]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [[5, 1], [7, 1]]),
        ({"distinct": False}, [[5, 1], [5, 1], [7, 1]]),
        ({"limit": 1}, [[5, 1]]),
        ({"distinct": False, "limit": 2}, [[5, 1], [5, 1]]),
        ({"limit": 9}, [[5, 1], [7, 1]]),
    ],
)
def test_right_and_complete_answers_are_kept(options, kept):
    assert keep_right(ANSWERS, **options) == kept
    assert keep_right(ANSWERS[1:2] + ANSWERS[3:4], **options) == []  # a wrong one, and a right one that was cut off


def test_what_a_round_keeps_by_hand():
    hard = [
        ([8, 1], False, True),
        ([9, 1], True, True),
        ([8, 1], False, True),
        ([8, 8], False, False),
        ([9], False, True),
    ]
    never = [([4, 1], False, True)] * 5
    groups = [([2, 3], ANSWERS), ([2], hard), ([3], never)]
    assert keep_round(groups) == [([2, 3], [5, 1], 1 / 2), ([2, 3], [7, 1], 1 / 2), ([2], [9, 1], 1.0)]
    with pytest.raises(DivergedError, match="none of 5 sampled answers of round 2 is right and complete"):
        round_figures([([3], never)], 1)  # an experiment takes it as the run's result
    figures = round_figures(groups, 0)
    assert figures["usable"] == pytest.approx(4 / 15)  # the one that was cut off is none of them
    assert figures["problems_solved"] == pytest.approx(2 / 3)
    assert [w for *_, w in keep_round(groups, distinct=False)] == [1 / 3, 1 / 3, 1 / 3, 1.0]
    assert [w for *_, w in keep_round(groups, weigh="answer")] == [1.0, 1.0, 1.0]
    assert [w for *_, w in keep_round(groups, limit=1)] == [1.0, 1.0]
    assert encode_kept([2, 3], [5, 1], 0.5) == ([2, 3, 5, 1], [0.0, 0.0, 0.5, 0.5])


# ------------------------------------------------------------------------------------------------ the gradient


def tiny(vocab=30):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab, context=64, n_layer=1, n_head=2, n_kv_head=1, width=16)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def gradient_of(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def loss_on(model, kept, n=None):
    """The loss of the kept answers, as a step of main computes it."""
    micro = collate([encode_kept(*x) for x in kept], 0)
    return sft_loss(token_logprobs(model, micro.tokens), micro.loss_mask[:, 1:], n)[0]


def test_loss_and_gradient_are_those_of_sft_on_what_is_kept(here):
    tokenizer = open_checkpoint("start")[1]
    model, problems = tiny(tokenizer.vocab_size), load_problems("twos.jsonl", "train", 4)
    examples = [encode_example(tokenizer, problem) for problem in problems]
    micro = collate(examples, 0)
    expected, _ = sft_loss(token_logprobs(model, micro.tokens), micro.loss_mask[:, 1:])
    groups = []
    for problem in problems:  # its solution among other answers
        prompt, answer = (
            rejection_prompt(tokenizer, problem),
            [*tokenizer.encode(problem.solution), tokenizer.im_end_id],
        )
        groups.append(
            (prompt, [([9, 9], False, True), (answer, True, True), (answer, True, True), (answer[:-1], True, False)])
        )
    loss = loss_on(model, keep_round(groups))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(model, loss), gradient_of(model, expected))


def rejection_prompt(tokenizer, problem):
    return tokenizer.encode_chat([{"role": "user", "content": problem.question}], add_generation_prompt=True)[0]


def some_groups(N=4, R=5):
    """Answers of different lengths, copies among them; the last problem has no right one."""
    torch.manual_seed(1)
    groups = []
    for x in range(N):
        answers = [
            (torch.randint(3, 30, (n,)).tolist(), (x + i) % 3 > 0 and x < N - 1, True)
            for i, n in enumerate((2, 5, 3, 4, 6))
        ]
        answers[1] = answers[2]
        groups.append((torch.randint(3, 30, (3 + x,)).tolist(), answers[:R]))
    return groups


def test_the_on_policy_gradient_is_maxrls():
    """algorithms2.md: mean_i A_i S_i = Σ r_i S_i / K − Σ S_i / R with A_i = (r_i − r̄) / r̄, 0 where r̄ = 0; and the mean
    over all problems, also those with no right answer."""
    model, groups = tiny(), some_groups()
    N, R = len(groups), len(groups[0][1])
    maxrl, of_grpo, baseline, reinforce = 0.0, 0.0, 0.0, 0.0
    rewards = torch.tensor([[float(right) for _, right, _ in answers] for _, answers in groups], dtype=torch.float64)
    order_R = group_advantages(rewards, scale="mean", baseline="none")  # r_i / r̄
    for g, (prompt, answers) in enumerate(groups):
        mean = rewards[g].mean().item()
        for i, (ids, *_) in enumerate(answers):
            r = rewards[g, i].item()
            logprobs, mask = answer_logprobs(model, [prompt], [ids])
            S = gradient_of(model, (logprobs * mask).sum())  # ∇log π of the whole answer
            maxrl = maxrl + ((r - mean) / mean if mean else 0.0) * S / R / N
            of_grpo = of_grpo + order_R[g, i] * S / R / N
            baseline = baseline + (S / R / N if mean else 0.0)
            reinforce = reinforce + r * S / R / N
    ours = -gradient_of(model, loss_on(model, keep_round(groups, distinct=False), n=N))
    torch.testing.assert_close(ours, maxrl + baseline)
    torch.testing.assert_close(ours, of_grpo)
    assert (maxrl - reinforce).norm() > 0.1 * maxrl.norm()  # the problems are not equally hard
    by_answer = keep_round(groups, distinct=False, weigh="answer")
    torch.testing.assert_close(-gradient_of(model, loss_on(model, by_answer, n=N * R)), reinforce)


@pytest.mark.parametrize("R", [1, 2, 3])
def test_its_expectation_over_all_groups(R):
    """∇p (1 + (1 − p) + … + (1 − p)^(R − 1)) with weights 1/K; ∇p with 1/R."""
    torch.manual_seed(2)
    logits, right = torch.randn(5, dtype=torch.float64, requires_grad=True), [False, True, True, False, True]
    pi = logits.detach().softmax(0)
    (grad_p,) = torch.autograd.grad(logits.softmax(0)[right].sum(), logits)
    p = pi[right].sum()
    for weigh, n, factor in (("problem", 1, sum((1 - p) ** k for k in range(R))), ("answer", R, 1.0)):
        mean = torch.zeros(5, dtype=torch.float64)
        for group in itertools.product(range(5), repeat=R):
            if any(right[y] for y in group):
                answers = [([y], right[y], True) for y in group]
                kept = keep_round([([0], answers)], distinct=False, weigh=weigh)
                mask = torch.tensor([[w] for *_, w in kept])
                loss, _ = sft_loss(logits.log_softmax(0)[[ids[0] for _, ids, _ in kept], None], mask, n)
                mean -= pi[list(group)].prod() * torch.autograd.grad(loss, logits)[0]
        torch.testing.assert_close(mean, factor * grad_p)


def test_a_step_of_a_run_is_that_gradient(here, calls_of):
    """Loss and gradient norm of the first step, against a loop over the batch."""
    rounds = calls_of(rejection, "keep_round")
    rejection.main(config(steps=1, round_steps=1, micro_batch=2, distinct=False))
    kept = rounds[0].result
    assert len({w for *_, w in kept}) > 1
    batch = [kept[i] for i in rows_at(len(kept), 0, 6, 0)]
    model = open_checkpoint("start")[0]
    n = sum(w * len(answer) for _, answer, w in batch)
    loss = 0.0
    for prompt, answer, w in batch:
        logprobs, mask = answer_logprobs(model, [prompt], [answer])
        loss = loss - w * (logprobs * mask).sum() / n
    assert metrics("runs/rejection", "loss")[1] == pytest.approx(loss.item(), rel=1e-4)
    norm = gradient_of(model, loss).norm().item()
    assert metrics("runs/rejection", "grad_norm")[1] == pytest.approx(norm, rel=1e-3)
    assert metrics("runs/rejection", "kept") == {1: len(kept)}


def test_a_run_keeps_and_weighs_as_asked(here, calls_of):
    rounds = calls_of(rejection, "keep_round")
    rejection.main(config(steps=1, round_steps=1, distinct=False, max_per_problem=2, weigh="answer"))
    prompts = [prompt for prompt, *_ in rounds[0].result]
    assert max(prompts.count(prompt) for prompt in prompts) == 2
    assert {w for *_, w in rounds[0].result} == {1.0}


# ------------------------------------------------------------------------------------------------ sampling


def test_sampled_answers_are_judged_alike_however_they_are_cut(here, monkeypatch):
    dist, settings = devices.setup("cpu"), config(prompts=7, rollouts=4)
    policy, tokenizer, _ = open_checkpoint("start")
    problems = questions.open_problems(settings, tokenizer, policy.config.context, dist, checked=True)["train"]
    autocast, _ = devices.precision("fp32", dist)
    sample = Sampler(policy, tokenizer, problems, settings, autocast)
    whole = judged_answers(sample, 1, settings, dist)
    assert whole == judged_answers(sample, 1, settings, dist, chunk=3)
    assert [prompt for prompt, _ in whole] == [rejection_prompt(tokenizer, p) for p in sample.asked(1)]
    assert [len(answers) for _, answers in whole] == [4] * 7
    assert [prompt for prompt, _ in whole] != [prompt for prompt, _ in judged_answers(sample, 0, settings, dist)]
    by_prompt = {tuple(rejection_prompt(tokenizer, p)): p for p in problems}
    for prompt, answers in whole:
        answer = by_prompt[tuple(prompt)].answer
        for ids, right, ended in answers:
            text = tokenizer.decode([i for i in ids if i in tokenizer.text_ids])
            assert right == (text.strip() == f"#### {answer}")
            assert ended == (ids[-1] in tokenizer.stop_ids)
    verdicts = [right for _, answers in whole for _, right, _ in answers]
    assert 0 < sum(verdicts) < len(verdicts)


def test_problems_without_an_answer_are_refused(here):
    with open("twos.jsonl", "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"question": "Why?", "answer": "Because."}))
    with pytest.raises(ConfigError, match="have no answer after ####"):
        rejection.main(config(eval_problems=300, test_problems=300))


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_learns_and_leaves_everything(here, capsys):
    result = rejection.main(
        config(
            steps=40, round_steps=10, prompts=30, batch=16, micro_batch=16, lr=1e-2, eval_problems=20, test_problems=20
        )
    )
    assert result["before"]["accuracy"] < 0.8
    assert result["after"]["accuracy"] > 0.9
    assert result["kl"] > 0
    right = metrics("runs/rejection", "usable")
    assert list(right) == [1, 11, 21, 31]  # each round samples from what the last one left
    assert right[31] > right[1] + 0.2
    for name in ("best/model.safetensors", "last/trainer_state.pt", "curves.png", "samples.md"):
        assert (here / "runs" / "rejection" / name).exists(), name
    printed = capsys.readouterr().out
    assert "accuracy, greedy" in printed
    assert "pass@2, temperature 1" in printed


def test_the_start_stays_best_until_something_beats_it(here, monkeypatch):
    monkeypatch.setattr(
        verified, "measure_valid", lambda *_, step=None: {"accuracy": float(step == 0), "story_kept": 0.0}
    )
    rejection.main(config(steps=3))
    assert_same_weights("runs/rejection/best", "start")


def test_a_run_that_was_stopped_before_its_first_step_keeps_the_start(here, monkeypatch):
    assert_the_start_is_kept(rejection, config, "runs/rejection", monkeypatch)


def test_the_cut_into_micro_batches_changes_nothing(here, scaled):
    """Nor does a gradient scaler."""
    rejection.main(config(name="whole"))
    scaled("support.rounds")
    rejection.main(config(name="cut", micro_batch=2))
    assert_same_metrics("runs/whole", "runs/cut", ("loss", "grad_norm", "kept", "accuracy"), rel=1e-3)


def test_the_rate_the_clip_and_the_decay_of_each_step(here, steps_of):
    seen = steps_of(rejection)
    rejection.main(config(steps=5, warmup=3, lr=1e-2, clip=0.3, weight_decay=0.2, round_steps=5))
    assert_rate_clip_decay(seen, "cosine", 0.1)


@pytest.mark.parametrize("stop", [2, 3])  # within a round, and between two
@pytest.mark.parametrize("changes", [{}, {"restart": True, "lora": LoraConfig(rank=2)}])
def test_resumed_equals_uninterrupted_bit_for_bit(here, stop, changes):
    assert_resumed_equals_whole(rejection, config, stop, ("loss", "kept", "usable", "accuracy"), **changes)


def test_resume_refuses_what_changed(here):
    shutil.copytree("start", "own")
    assert_resume_refuses_what_changed(
        rejection,
        lambda **c: config(init="own", **(dict(round_steps=1) | c)),
        ["own", "twos.jsonl"],
        {"twos.jsonl": "split"},
    )


def test_a_number_of_answers_per_problem_is_none_of_checkpoints(here):
    rejection.main(config(steps=3, max_per_problem=1, save_every=1))
    assert not list((here / "runs/rejection").glob("step_*"))
    with pytest.raises(ConfigError, match="this changed: max_per_problem 1 -> 2"):
        rejection.main(config(max_per_problem=2, resume=True))


def test_two_processes_equal_one(here):
    rejection.main(config(name="one", prompts=70))
    flags = flags_of(SMALL | {"prompts": 70, "name": "two"})
    two = script("rejection.py", *flags, cwd=here, processes=2)
    assert two.returncode == 0, two.stderr
    assert_same_metrics("runs/one", "runs/two", ["kept"])
    assert_same_metrics("runs/one", "runs/two", ("loss", "grad_norm", "usable", "accuracy"), rel=1e-4)
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_round_samples_what_the_last_left_and_trains_it_or_the_start(here, monkeypatch, restart, rank):
    """Three rounds of two steps; with --restart the optimizers forget, and the learning rate begins anew."""
    settings = config(round_steps=2, restart=restart, lora=LoraConfig(rank=rank), warmup=2)
    start = open_checkpoint("start")[0]
    add_lora(start, **asdict(settings.lora), seed=0)
    sampled, asked, trained, memory, rates = [], [], [], [], []
    judged, step = rejection.judged_answers, rejection.optimizer_step

    def seen(sample, *args):
        sampled.append(copy(sample.policy))
        groups = judged(sample, *args)
        asked.append([prompt for prompt, _ in groups])
        return groups

    def copy(policy):
        return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])

    def watched(policy, optimizers, scaler, autocast, lr, clip):
        trained.append(copy(policy))
        memory.append(sum(len(o.state) for o in optimizers))
        rates.append(lr)
        norm = step(policy, optimizers, scaler, autocast, lr, clip)
        trained.append(copy(policy))
        return norm

    monkeypatch.setattr(rejection, "judged_answers", seen)
    monkeypatch.setattr(rejection, "optimizer_step", watched)
    rejection.main(settings)
    ends = [copy(start), trained[3], trained[7]]  # of the start, and of the first two rounds
    assert all(torch.equal(a, b) for a, b in zip(sampled, ends, strict=True))
    assert not torch.equal(ends[1], ends[0])
    assert asked[0] != asked[1] != asked[2] != asked[0]  # other problems in each round
    for k in range(3):
        assert torch.equal(trained[4 * k], ends[0] if restart else ends[k])
        assert (memory[2 * k] == 0) is (restart or k == 0)
    assert (rates[:2] == rates[2:4] == rates[4:]) is restart


def test_a_problem_that_a_round_asks_twice_is_one_problem():
    once, again = [([5, 1], True, True), ([6, 1], False, True)], [([5, 1], True, True), ([7, 1], True, True)]
    groups = [([2], once), ([3], [([9, 1], True, True), ([4, 1], False, True)]), ([2], again)]
    assert keep_round(groups) == [([2], [5, 1], 1 / 2), ([2], [7, 1], 1 / 2), ([3], [9, 1], 1.0)]
    assert [prompt for prompt, *_ in keep_round(groups, distinct=False, limit=1)] == [[2], [3]]
    wrong = [([6, 1], False, True)] * 2
    assert round_figures([([2], once), ([2], wrong), ([3], wrong)], 0)["problems_solved"] == 1 / 2


def test_without_a_right_answer_a_run_says_so_and_moves_nothing(here, monkeypatch):
    (here / "runs/rejection").mkdir(parents=True)
    failed = script("rejection.py", *flags_of(SMALL | {"init": "random"}), cwd=here)
    assert_one_line_error(failed, "none of 24 sampled answers is right and complete", "--init")
    assert not (here / "runs/rejection.1").exists()
    monkeypatch.setattr(verified, "is_correct", lambda text, problem: False)
    with pytest.raises(ConfigError, match="none of 24 sampled answers is right and complete"):
        rejection.main(config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=10, round_steps=3), "--steps 10 is no whole number of rounds of --round_steps 3"),
        (dict(temperature=0.0), "--temperature 0 samples the same answer 4 times; use --rollouts 1"),
        (dict(max_per_problem=5), "--max_per_problem 5 is more than the --rollouts 4"),
        (dict(max_per_problem=0), "--max_per_problem is 0"),
        (dict(weigh="length"), "--weigh 'length' is not known"),
        (dict(init=None), "needs an SFT checkpoint"),
        (dict(prompts=0), "--prompts is 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_policy_that_collapses_in_a_later_round_is_told_so(here, monkeypatch):
    rounds, judged = [], rejection.judged_answers

    def all_wrong_later(sample, k, *more):
        rounds.append(k)
        groups = judged(sample, k, *more)
        return [(prompt, [(ids, right and k == 0, end) for ids, right, end in answers]) for prompt, answers in groups]

    monkeypatch.setattr(rejection, "judged_answers", all_wrong_later)
    with pytest.raises(ConfigError, match=r"24 sampled answers of round 2 is right.*collapsed: best/ keeps the best"):
        rejection.main(config())
    assert rounds == [0, 1]
    assert (here / "runs/rejection/best/model.safetensors").exists()


def test_what_is_tuned_is_what_was_sampled(here, monkeypatch):
    """In eval mode: in training an MoE drops assignments beyond its capacity, by the cut into micro-batches."""
    modes, logprobs_of = [], rejection.token_logprobs
    monkeypatch.setattr(
        rejection, "token_logprobs", lambda model, *a, **k: modes.append(model.training) or logprobs_of(model, *a, **k)
    )
    rejection.main(config(steps=6, micro_batch=3, instruction="Say it."))
    assert len(modes) == 12
    assert not any(modes)


def test_the_instruction_stands_after_each_question(here, calls_of):
    asked = calls_of(rejection, "judged_answers")
    rejection.main(config(steps=3, instruction="Say it."))
    tokenizer = open_checkpoint("start")[1]
    prompts = [tokenizer.decode(prompt) for prompt, _ in asked[0].result]
    assert prompts
    assert all("?\nSay it." in prompt for prompt in prompts)


def test_star_is_one_greedy_answer(here):
    rejection.main(config(rollouts=1, temperature=0.0, restart=True, prompts=20))
    assert all(count <= 20 for count in metrics("runs/rejection", "kept").values())
    right, solved = metrics("runs/rejection", "usable"), metrics("runs/rejection", "problems_solved")
    assert right == solved
