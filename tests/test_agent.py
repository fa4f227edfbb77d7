"""agent.py: the calculator, who wrote which token, the gradient of a row that a tool wrote in, and the guarantees of a
run."""

import itertools
import json
import random
import re
import shutil
import sys
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from conftest import (
    assert_one_line_error,
    assert_rate_clip_decay,
    assert_refused,
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

import agent
import grpo
import sft
from agent import TOOLS, Calls, Config, Tool, WithTools, calculator
from data import Problem, encode_prompt, load_problems
from evaluate import evaluate
from generate import generate
from grpo import group_advantages, grpo_loss
from lora import LoraConfig
from support import calls_start, devices, questions
from support.calls_start import encode_demonstration
from support.checkpoints import open_checkpoint
from support.cli import run_script
from support.errors import ConfigError
from support.recorder import read_recording
from support.rewards import brevity_reward
from support.rollouts import Sampler
from support.sampled_kl import sampled_kl
from support.shared_prompt import pack, shared_answer_logprobs
from support.tasks import LARGE_TASK
from support.tools import ask, load_tools, turns
from tokenizer_bpe import BPETokenizer, ByteTokenizer
from transformer import Transformer, TransformerConfig, answer_logprobs, token_logprobs

CALCULATOR = [TOOLS["calculator"]]

# ------------------------------------------------------------------------------------------------ the calculator


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12*(3+4)", "84"),
        ("3+4*2", "11"),
        ("10-2-3", "5"),
        ("24/4/2", "3"),
        ("2*3-4/2", "4"),
        (" 3 *\t4 ", "12"),
        ("-3+5", "2"),
        ("2*-3", "-6"),
        ("-(1+2)", "-3"),
        ("+7", "7"),
        ("1/8", "0.125"),
        ("0.1+0.2", "0.3"),
        (".5*5.", "2.5"),
        ("1/3*3", "1"),  # exact until the end
        ("2/3", "0.666667"),
        ("-2/3", "-0.666667"),
        ("1/10000000", "0"),
        ("0*-1", "0"),
        ("9999999*9999999", "99999980000001"),
        ("3×4÷2−1", "5"),
        ("007", "7"),
    ],
)
def test_the_calculator_by_hand(text, answer):
    assert calculator(text) == answer


def test_the_calculator_against_python():
    """Random expressions, whose values Python's own precedence gives, of fractions."""
    rng = random.Random(0)

    def expression(depth):
        if depth == 0 or rng.random() < 0.3:
            return str(rng.randint(0, 99))
        a, b = expression(depth - 1), expression(depth - 1)
        text = f"{a}{rng.choice('+-*/')}{b}"
        return f"({text})" if rng.random() < 0.5 else f"-({text})" if rng.random() < 0.2 else text

    values, errors = 0, 0
    for _ in range(2000):
        text = expression(4)
        if len(text) > 100:
            continue
        fractions = "".join(f"Fraction({token})" if token.isdigit() else token for token in re.findall(r"\d+|.", text))
        try:
            value = eval(fractions, {"Fraction": Fraction})
        except ZeroDivisionError:
            assert calculator(text) == "error: division by 0"
            errors += 1
            continue
        if abs(value) < 10**14:
            assert abs(Fraction(calculator(text)) - value) <= Fraction(1, 2 * 10**6), text
            values += 1
    assert values > 1000
    assert errors > 10


HOSTILE = [
    "",
    " ",
    "abc",
    "1+",
    "*2",
    "()",
    "(1",
    "1)",
    "1 2",
    "1/0",
    "5/(3-3)",
    "2**3",
    "9**9**9**9",
    "9^9",
    "1e9",
    "1_000",
    "0x10",
    "1,000",
    "1.2.3",
    ".",
    "5%",
    "$5",
    "٣+1",
    "²",
    "1=1",
    "1;2",
    "\x00",
    "\ud800",
    "nan",
    "inf",
    "True",
    "[1]*9",
    "__import__('os').system('true')",
    "lambda: 0",
    "(" * 10**6,
    "-" * 99 + "1",
    "(" * 40 + "1" + ")" * 40,
    "9" * 10**7,
    "9" * 16,
    "9" * 15 + "*" + "9" * 15,
    "1" + "*99" * 32,
    "1" + "/99" * 32 + "*0+" + "1/0",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_expression_gets_an_error_answer_and_nothing_else(text):
    began = time.perf_counter()
    answer = calculator(text)
    assert time.perf_counter() - began < 0.5
    assert answer.startswith("error")
    assert len(answer) < 60
    assert "\n" not in answer


# ------------------------------------------------------------------------------------------------ tools


def raises(question):
    raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (lambda question: f"{question}!", "3*4!"),
        (raises, "error: RuntimeError"),
        (lambda question: sys.exit(1), "error: SystemExit"),
        (lambda question: "a\udc80b", "a?b"),
        (lambda question: 12, "error: int instead of text"),
        (lambda question: "a\n b", "a b"),  # one line
        (lambda question: "x" * 10**6, "x" * 1000),
    ],
)
def test_whatever_a_tool_does_is_an_answer(function, answer):
    assert ask(Tool("t", "<<(.*)=", function), "3*4") == answer


def test_a_slow_tool_is_not_waited_for():
    began = time.perf_counter()
    assert ask(Tool("t", "<<(.*)=", lambda _: time.sleep(5), seconds=0.05), "") == "error: no answer within 0.05 s"
    assert time.perf_counter() - began < 2
    assert ask(Tool("t", "<<(.*)=", lambda _: "quick", seconds=5.0), "") == "quick"


OWN = """
from types import SimpleNamespace
from agent import Tool
prices = Tool("prices", r"<<price of ([a-z]+)=", {"kite": "12"}.get)
no_group = Tool("x", "<<[a-z]+=", str)
same = Tool("calculator", "<<([a-z]+)=", str)
bad = Tool("x", "<<([a-z]+=", str)
flags = Tool("x", "(?i)<<([a-z]+)=", str)
compiled = Tool("x", __import__("re").compile("<<([a-z]+)="), str)
no_name = SimpleNamespace(pattern="<<([a-z]+)=", function=str, seconds=None)
no_seconds = SimpleNamespace(name="x", pattern="<<([a-z]+)=", function=str)
worded = Tool("x", "<<([a-z]+)=", str, "5")
endless, none, before = (Tool("x", "<<([a-z]+)=", str, s) for s in (float("inf"), float("nan"), -1))
"""


def test_a_tool_of_your_own(scratch, monkeypatch):
    (scratch / "own_tools.py").write_text(OWN, encoding="utf-8")
    (scratch / "own_exit.py").write_text("raise SystemExit(0)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(scratch))
    tools = load_tools(["own_tools:prices", "calculator"], TOOLS)
    assert agent.reply_to(tools, "a <<price of kite=") == "12>>"
    assert agent.reply_to(tools, "a <<price of cap=") == "error: NoneType instead of text>>"
    assert agent.reply_to(tools, "a <<3*4=") == "12>>"  # the first whose pattern fits
    assert agent.reply_to(tools, "a <<3*4=1") is None
    for names, words in [
        (["nothing"], "not known; use calculator"),
        (["own_tools:nothing"], "AttributeError"),
        (["own_nowhere:x"], "ModuleNotFoundError"),
        (["own_exit:x"], "SystemExit"),
        (["own_tools:no_group"], "one group"),
        (["own_tools:bad"], "unterminated subpattern"),
        (["own_tools:flags"], r"write flags as \(\?i:…\)"),
        (["own_tools:compiled"], "pattern with one group"),
        (["own_tools:no_name"], "no attribute 'name'"),
        (["own_tools:no_seconds"], "no attribute 'seconds'"),
        (["own_tools:worded"], "seconds"),
        *((["own_tools:" + name], "seconds above 0, or None") for name in ("endless", "none", "before")),
        (["calculator", "own_tools:same"], "same name"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            load_tools(names, TOOLS)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ who wrote what


def test_a_solution_is_cut_into_turns():
    assert turns("a <<3*4=12>>12", CALCULATOR) == [("a <<3*4=", True), ("12>>", False), ("12", True)]
    assert turns("no call", CALCULATOR) == [("no call", True)]
    assert turns("<<3*4=12>>", []) == [("<<3*4=12>>", True)]
    assert [by for _, by in turns("<<1+1=2>><<2+2=4>>", CALCULATOR)] == [True, False, True, False, True]
    same_names = [Tool("a", r"<<a (?P<reply>\w+)=", str), Tool("b", r"<<b (?P<reply>\w) \1=", str)]
    text = "<<b 1 1=2>> <<b 1 2=3>> <<a 1=4>>"  # the second is no call: its two letters differ
    assert [part for part, by in turns(text, same_names) if not by] == ["2>>", "4>>"]
    greedy = Tool("t", "<<(.*)=", str)  # in a rollout the first = ends the first call
    assert [part for part, by in turns("<<1+1=2>> <<2+2=4>>", [greedy]) if not by] == ["2>>", "4>>"]


def test_the_mask_of_every_token_of_a_demonstration_by_hand():
    tokenizer = ByteTokenizer()  # a token per letter
    problem = Problem("2?", "a 12\n#### 12", "12", calls="a <<3*4=12>>12\n#### 12")
    ids, flags = encode_demonstration(tokenizer, problem, tools=CALCULATOR)
    shown = tokenizer.decode(ids)
    assert shown == "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\na <<3*4=12>>12\n#### 12<|im_end|>"
    text = "".join("x" if i > 255 else chr(i) for i in ids)  # a special token is one
    assert text == "xuser\n2?x\nxassistant\na <<3*4=12>>12\n#### 12x"
    by_hand = "0000000000" + "00000000000" + "11111111" + "0000" + "1111111111" + "1"
    assert "".join("1" if flag else "0" for flag in flags) == by_hand
    problem = replace(problem, calls="")
    plain, flags = encode_demonstration(tokenizer, problem, tools=CALCULATOR)
    whole, of_sft = sft.encode_example(tokenizer, problem)
    assert (plain, flags) == (whole[:-1], of_sft[:-1])  # without calls: SFT's, but for the line end after the end token


def test_earlier_answers_of_a_conversation_count_as_in_sft():
    problem = Problem("3?", "3", "3", history=(("user", "1?"), ("assistant", "1")))
    ids, flags = encode_demonstration(ByteTokenizer(), problem, tools=CALCULATOR)
    whole, of_sft = sft.encode_example(ByteTokenizer(), problem)
    assert (ids, flags) == (whole[:-1], of_sft[:-1])


def test_gsm8ks_annotations_are_calls():
    """And the built-in solutions get them."""
    text = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72.\n#### 72"
    assert [part for part, by_policy in turns(text, CALCULATOR) if not by_policy] == ["24>>", "72>>"]
    tokenizer = ByteTokenizer()
    for problem in load_problems(LARGE_TASK, "valid", 200, (2, 3)):
        ids, flags = encode_demonstration(tokenizer, problem, tools=CALCULATOR)
        runs = itertools.groupby(zip(ids, flags, strict=True), key=lambda pair: pair[1])
        runs = [(flag, tokenizer.decode([i for i, _ in run])) for flag, run in runs]
        assert [flag for flag, _ in runs] == [False, True] * (1 + problem.level)  # the prompt, then turn by turn
        answers = [text for flag, text in runs[1:] if not flag]
        calls = [re.search(r"<<(.*)=$", text)[1] for flag, text in runs[:-1] if flag]
        assert [calculator(call) + ">>" for call in calls] == answers
        assert answers[-1] == f"{problem.answer}>>"


class Scripted:
    """A policy that writes these ids, whatever it reads, one row each; as `generate` asks it."""

    def __init__(self, tokenizer, texts, tools):
        self.tokenizer, self.calls = tokenizer, Calls(tools, tokenizer, len(texts))
        self.sampled = [[*tokenizer.encode(text), tokenizer.im_end_id] for text in texts]

    def write(self, steps):
        """-> rows of ids, masks."""
        rows, masks = [[] for _ in self.sampled], [[] for _ in self.sampled]
        given, live = torch.full((len(rows),), -1), torch.ones(len(rows), dtype=torch.bool)
        for _ in range(steps):
            for r in live.nonzero().flatten().tolist():
                rows[r].append(self.sampled[r].pop(0) if given[r] < 0 else given[r].item())
                masks[r].append(bool(given[r] < 0))
            newest = torch.tensor([ids[-1] for ids in rows])
            given, live = self.calls(newest, live), live & (newest != self.tokenizer.im_end_id)
        return rows, masks


def test_a_letter_of_two_tokens_is_read_whole():
    """é is two bytes, so two ids: decoded one by one they are no letter, and no call would be seen."""
    prices = Tool("prices", r"<<price of (\w+)=", {"café": "3"}.get)
    policy = Scripted(tokenizer := ByteTokenizer(), ["<<price of café=!"], [prices])
    rows, masks = policy.write(60)
    assert tokenizer.decode(rows[0]) == "<<price of café=3>>!<|im_end|>"
    assert sum(masks[0]) == len(rows[0]) - len("3>>")


def test_rows_in_different_turns_by_hand():
    tokenizer = ByteTokenizer()
    policy = Scripted(tokenizer, ["<<1+1=<<2*3=6", "a <<3*=b", "none <<1+1", "<<9*9=1="], CALCULATOR)
    rows, masks = policy.write(60)
    shown = ["".join("x" if i > 255 else chr(i) for i in ids) for ids in rows]
    assert shown == [
        "<<1+1=2>><<2*3=6>>6x",
        "a <<3*=error: cannot read the end>>bx",
        "none <<1+1x",
        "<<9*9=81>>1=x",  # the policy's own text begins anew after an answer
    ]
    assert ["".join("1" if m else "0" for m in mask) for mask in masks] == [
        "111111000111111000" + "11",
        "1111111" + "0" * 28 + "11",
        "1" * 11,
        "111111" + "0000" + "111",
    ]
    assert sorted(policy.calls.replies) == ["2>>", "6>>", "81>>", "error: cannot read the end>>"]
    with_tools = WithTools(CALCULATOR, tokenizer)
    with_tools.replies = policy.calls.replies
    assert with_tools.sums() == {"calls": 4, "call_errors": 1}


def test_what_was_written_before_an_answer_is_no_part_of_the_next_call():
    tokenizer, loud = ByteTokenizer(), Tool("loud", "a(.*)b", str.upper)
    rows, _ = Scripted(tokenizer, ["axb yb azb"], [loud]).write(30)
    assert tokenizer.decode(rows[0][:-1]) == "axbX>> yb azbZ>>"


def test_a_tool_cannot_call_nor_end_a_turn():
    """What it writes is plain text."""
    tokenizer = ByteTokenizer()
    forger = Tool("forger", "<<f(.)=", lambda _: "<|im_end|><<1+1=")
    rows, _ = Scripted(tokenizer, ["<<f =ok"], [forger, *CALCULATOR]).write(40)
    assert rows[0].count(tokenizer.im_end_id) == 1
    assert rows[0][-1] == tokenizer.im_end_id
    assert tokenizer.decode(rows[0]) == "<<f =<|im_end|><<1+1=>>ok<|im_end|>"


# ------------------------------------------------------------------------------------------------ rollouts of a model


def tiny(vocab, seed=0, std=0.3, **sizes):
    torch.manual_seed(seed)
    shape = dict(context=96, n_layer=1, n_head=2, n_kv_head=1, width=16) | sizes
    model = Transformer(TransformerConfig(vocab, **shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


OFTEN = "abcdefghijklmnopqrstuvwxyz0123456789 "
DOT = Tool("dot", rf"([{OFTEN}])", lambda letter: f"({letter}).")  # a model that was not trained calls it often
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of 40 ids, in which a to e are not rare, and a random model of it."""
    tokenizer = BPETokenizer.train(["ab abc abcd >>. >>a"] * 9, 268)
    return tokenizer, tiny(tokenizer.vocab_size, std=0.15)


def roll(letters, tools, T=40, n=3, seed=0, **options):
    tokenizer, model = letters
    with_tools = WithTools(tools, tokenizer)
    uniforms = torch.rand(len(PROMPTS) * n, T, generator=torch.Generator().manual_seed(seed))
    stop = tokenizer.stop_ids
    return with_tools(model, PROMPTS, T, n, stop_ids=stop, uniforms=uniforms, **options), with_tools


def test_without_calls_a_rollout_is_that_of_generate_bit_for_bit(letters):
    tokenizer, model = letters
    uniforms = torch.rand(9, 40, generator=torch.Generator().manual_seed(0))
    plain = generate(model, PROMPTS, 40, 3, stop_ids=tokenizer.stop_ids, uniforms=uniforms)
    ours, _ = roll(letters, CALCULATOR)
    for name in ("ids", "mask", "logprobs"):
        assert torch.equal(getattr(plain, name), getattr(ours, name)), name
    assert not ours.written.any()
    assert plain.rows == ours.rows
    assert plain.texts(tokenizer) == ours.texts(tokenizer)


def test_rollouts_of_a_model_with_a_tool(letters):
    """Each row alone, by a loop that samples one token at a time with the model's own forward."""
    tokenizer, model = letters
    rollout, with_tools = roll(letters, [DOT])
    uniforms = torch.rand(9, 40, generator=torch.Generator().manual_seed(0))
    calls = 0
    for row in range(9):
        ids, mask, logprobs, queue = [], [], [], []
        while len(ids) < 40 and not (ids and mask[-1] and ids[-1] in tokenizer.stop_ids):
            if queue:
                ids, mask, logprobs = [*ids, queue.pop(0)], [*mask, False], [*logprobs, 0.0]
                continue
            with torch.no_grad():
                logits = model(torch.tensor([PROMPTS[row // 3] + ids]))[0, -1]
            cdf = logits.softmax(-1).cumsum(-1)
            token = int(torch.searchsorted(cdf, uniforms[row, len(ids)] * cdf[-1], right=True))
            ids, mask, logprobs = [*ids, token], [*mask, True], [*logprobs, logits.log_softmax(-1)[token].item()]
            if (last := tokenizer.decode([token])[-1:]) in OFTEN and last and token not in tokenizer.stop_ids:
                queue, calls = tokenizer.encode(" ".join(f"({last}).".split()) + ">>"), calls + 1
        n = len(ids)
        assert rollout.rows[row] == ids
        assert rollout.mask[row, :n].tolist() == mask
        assert rollout.written[row, :n].tolist() == [not m for m in mask]
        torch.testing.assert_close(rollout.logprobs[row, :n], torch.tensor(logprobs), atol=1e-4, rtol=1e-4)
        assert not rollout.ids[row, n:].any()
        assert not rollout.mask[row, n:].any()
        assert not rollout.written[row, n:].any()
    assert calls == len(with_tools.replies) > 10
    assert len({tuple(mask) for mask in rollout.written.tolist()}) > 4  # rows in different turns


def test_ids_are_not_decoded_and_encoded_again(letters):
    """Encoding the text of these rows again gives other ids: of what was sampled, and across a tool's border."""
    tokenizer, _ = letters
    rollout, _ = roll(letters, [DOT])
    texts = rollout.texts(tokenizer)
    ended = rollout.ended(tokenizer.stop_ids).tolist()
    other = [
        tokenizer.encode(text) != ids[: len(ids) - end]
        for text, ids, end in zip(texts, rollout.rows, ended, strict=True)
    ]
    assert sum(other) > 4
    tokenizer = BPETokenizer.train(["1>>1>>.1>>."], 261)
    border = tokenizer.encode("12>>") + tokenizer.encode(".")
    assert tokenizer.decode(border) == "12>>."
    assert len(border) == len(tokenizer.encode("12>>.")) + 1  # whose last token is >>.


@pytest.mark.parametrize("T", [1, 5, 6, 7, 8, 9, 10])
def test_what_the_limit_cuts_off_stays_as_it_is(T):
    tokenizer = ByteTokenizer()
    rows, masks = Scripted(tokenizer, ["<<3*4=12"], CALCULATOR).write(T)
    assert tokenizer.decode(rows[0]) == "<<3*4=12>>12"[:T]
    assert masks[0] == [True] * min(T, 6) + [False] * (min(T, 10) - min(T, 6))


def test_a_rollout_is_cut_at_max_new_tokens(letters):
    long, _ = roll(letters, [DOT], T=40)
    uniforms = torch.rand(9, 40, generator=torch.Generator().manual_seed(0))
    tokenizer, model = letters
    for T in (3, 4, 5, 6):
        short = WithTools([DOT], tokenizer)(model, PROMPTS, T, 3, stop_ids=tokenizer.stop_ids, uniforms=uniforms[:, :T])
        assert short.rows == [ids[:T] for ids in long.rows]
        assert torch.equal(short.mask, long.mask[:, :T])
        assert not (short.ended(tokenizer.stop_ids) & (torch.tensor([len(i) for i in long.rows]) > T)).any()


# ------------------------------------------------------------------------------------------------ the gradient


def test_plain_and_fast_log_probabilities_agree_on_rows_with_a_tool(letters):
    _, model = letters
    rollout, _ = roll(letters, [DOT])
    rows = rollout.rows
    plain, _ = answer_logprobs(model, [PROMPTS[i // 3] for i in range(9)], rows)  # (9, T)
    fast = shared_answer_logprobs(model, pack(PROMPTS, [rows[3 * g : 3 * g + 3] for g in range(3)], 0))[
        :, : plain.shape[1]
    ]
    torch.testing.assert_close(plain, fast, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain * rollout.mask, rollout.logprobs, atol=1e-4, rtol=1e-4)  # those sampled with
    for total in (plain, fast):
        model.zero_grad()
        (total * rollout.mask).sum().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()])
        first = norm if total is plain else first  # noqa: F821
    torch.testing.assert_close(first, norm, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
@pytest.mark.parametrize("ratio", grpo.RATIOS)
def test_a_tools_tokens_are_in_nobodys_loss(letters, loss_type, ratio):
    """Loss, metrics and gradient are those of rows from which the tool's tokens are cut out; whatever stands there."""
    rollout, _ = roll(letters, [DOT])
    mask, lengths = rollout.mask, rollout.mask.sum(1)
    torch.manual_seed(1)
    A, noise = torch.randn(9), 0.1 * torch.randn(2, *mask.shape)
    old, ref = rollout.logprobs + noise[0], rollout.logprobs + noise[1]
    options = dict(beta=0.3, loss_type=loss_type, ratio=ratio, kl_unbiased=True, max_length=40)

    def loss_of(new, old, ref, mask):
        new = new.clone().requires_grad_()
        loss, values = grpo_loss(new, old, A, mask, ref, **options)
        loss.backward()
        return values, new.grad

    values, gradient = loss_of(rollout.logprobs, old, ref, mask)
    assert not gradient[~mask].any()
    junk = [torch.where(mask, x, -50 * torch.rand(mask.shape)) for x in (rollout.logprobs, old, ref)]
    assert loss_of(*junk, mask)[0] == values
    assert torch.equal(loss_of(*junk, mask)[1], gradient)

    def without(x):  # (9, T) -> the policy's tokens alone, padded
        return torch.nn.utils.rnn.pad_sequence([row[m] for row, m in zip(x, mask, strict=True)], batch_first=True)

    alone, of_alone = loss_of(*map(without, (rollout.logprobs, old, ref)), without(mask.float()))
    assert alone == pytest.approx(values, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(without(gradient), of_alone)
    assert lengths.tolist() == without(mask.float()).sum(1).tolist()


SMALL = dict(init="start", data="twos.jsonl", steps=4, prompts=4, rollouts=4, micro_batch=16, minibatches=2, warmup=1)
SMALL |= dict(max_new_tokens=14, lr=3e-3, eval_every=2, eval_problems=6, test_problems=6, pass_problems=3, device="cpu")
SMALL |= dict(pass_samples=2, beta=0.1, sample_every=2)


def config(**changes):
    return Config(**(SMALL | changes))


def flags(**changes):
    return flags_of(SMALL | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """twos.jsonl, whose answers are all 2; `start`, a tiny model that calls 1+1 or 1+2 and says what comes out."""
    folder = tmp_path_factory.mktemp("agent")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cpu_without_bf16(patch)
        for name, answer in (("coin", lambda i: 2 + i % 2), ("twos", lambda i: 2)):
            records = [(f"Number {i}?", f"<<1+{answer(i) - 1}={answer(i)}>>\n#### {answer(i)}") for i in range(300)]
            lines = [json.dumps({"question": question, "answer": text}) for question, text in records]
            (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        tokenizer = BPETokenizer.train(["Number 1? Number 2?\n#### 3\n#### 4 user assistant user assistant"], 290)
        torch.manual_seed(0)
        layout = TransformerConfig(tokenizer.vocab_size, context=64, n_layer=1, n_head=2, n_kv_head=1, width=16)
        Transformer(layout).save_pretrained("random")
        tokenizer.save_pretrained("random")
        few = dict(batch=16, micro_batch=16, max_new_tokens=14, eval_problems=4, test_problems=4, device="cpu")
        settings = sft.Config(init="random", data="coin.jsonl", steps=200, lr=1e-2, eval_every=200, **few)
        sft.main(settings, partial(encode_demonstration, tools=CALCULATOR), partial(WithTools, CALCULATOR))
        shutil.copytree("runs/sft/last", "start")
        assert ">>\n####" in (folder / "runs/sft/samples.md").read_text(encoding="utf-8")  # it was asked with the tool
    return folder


@pytest.fixture
def here(scratch, folder, monkeypatch):
    for name in ("start", "random"):
        (scratch / name).symlink_to(folder / name)
    shutil.copy(folder / "twos.jsonl", scratch)
    monkeypatch.setattr("support.grpo_report.draw_curves", lambda *_: None)
    return scratch


@pytest.fixture
def spied(monkeypatch):
    """What a run did: its batches, and the gradients of its optimizer steps."""
    seen = {"batches": [], "gradients": []}
    judge_batch, optimizer_step = agent.judge_batch, agent.optimizer_step

    def see_batch(functions, batch, config):
        judge_batch(functions, batch, config)
        seen["batches"].append(batch)

    def see_gradient(raw, *args):
        seen["gradients"].append({name: p.grad.clone() for name, p in raw.named_parameters() if p.grad is not None})
        return optimizer_step(raw, *args)

    monkeypatch.setattr(agent, "judge_batch", see_batch)
    monkeypatch.setattr(agent, "optimizer_step", see_gradient)
    return seen


@pytest.mark.parametrize("wrong", [False, True])
def test_the_first_step_by_a_loop_over_the_policys_tokens(here, spied, wrong):
    agent.main(config(steps=1, minibatches=1, beta=0.0, train_on_tools=wrong, temperature=1.2))
    [batch] = spied["batches"]
    model, total, rewards = open_checkpoint("start")[0].eval(), 0.0, batch.rewards
    A = group_advantages(rewards["correct"] + 0.1 * rewards["format"])
    for row, ids in enumerate(batch.rollout.rows):
        prompt = batch.prompts[row // 4]
        logprobs = token_logprobs(model, torch.tensor([prompt + ids]), 1.2)[0, len(prompt) - 1 :]
        mask = batch.rollout.mask[row, : len(ids)]
        assert mask.sum() < len(ids)  # there is a call in each
        own = logprobs if wrong else logprobs[mask]
        total = total - A[row // 4, row % 4] * own.mean() / 16
    total.backward()
    assert max(p.grad.abs().max() for p in model.parameters()) > 1e-3
    for name, p in model.named_parameters():
        torch.testing.assert_close(spied["gradients"][0][name], p.grad, atol=1e-6, rtol=1e-3)
    assert metrics("runs/agent", "ratio_max")[1] == pytest.approx(1.0, abs=1e-4)  # the tool's tokens too, if they count
    assert metrics("runs/agent", "calls")[1] >= 1


def test_what_is_counted_and_measured_is_the_policys(here, spied):
    agent.main(config(steps=2))
    batch = spied["batches"][0]
    mask = batch.rollout.mask
    assert metrics("runs/agent", "length")[1] == pytest.approx(mask.sum().item() / 16)
    entropy = -(batch.rollout.logprobs * mask).sum() / mask.sum()
    assert metrics("runs/agent", "entropy")[1] == pytest.approx(entropy.item(), rel=1e-5)
    earned = batch.rewards["correct"] + 0.1 * batch.rewards["format"]
    silent = (earned == earned[:, :1]).all(1).float().mean().item()
    assert metrics("runs/agent", "zero_variance")[1] == silent  # a trajectory counts once, however many turns it has
    written = batch.rollout.written
    answers = (written[:, 1:] & ~written[:, :-1]).sum().item()  # each begins after a token of the policy
    assert answers >= 8
    assert metrics("runs/agent", "calls")[1] == pytest.approx(answers / 16)


def test_the_length_penalty_counts_what_the_limit_counts(here, spied, monkeypatch):
    """--max_new_tokens cuts off a row with the tools' tokens in it: --overlong counts them too, in validation also."""
    agent.main(config(steps=1, overlong=6))
    batch = spied["batches"][0]
    sizes = torch.tensor([len(ids) for ids in batch.rollout.rows])
    assert (sizes > batch.rollout.mask.sum(1).cpu()).any()
    expected = -((sizes - (14 - 6)) / 6).clamp(min=0.0)
    assert batch.rewards["overlong"].flatten().tolist() == pytest.approx(expected.tolist())
    assert expected.min() < 0
    policy, tokenizer, _ = open_checkpoint("start")
    problems, dist, seen = load_problems("twos.jsonl", "valid", 4), devices.setup("cpu"), []
    monkeypatch.setattr(questions, "verifiable", lambda *_: False)
    monkeypatch.setattr(questions, "judge", lambda *a: seen.append(a) or {})
    respond = WithTools(CALCULATOR, tokenizer)
    questions.validate(policy, tokenizer, {"valid": problems}, {}, {}, config(), dist, respond)
    ((_, texts, _, _, lengths, _),) = seen
    assert lengths == [len(tokenizer.encode(text)) + 1 for text in texts]  # + 1: the end token


def test_a_call_is_not_long_winded():
    """The reference of an answer with calls is the solution with calls; of one without, the solution."""
    problem = Problem("2?", "3 * 4 = 12\n#### 12", "12", calls="<<3*4=12>>12\n#### 12 ")
    texts = ["3 * 4 = 12\n#### 12", "3 * 4 = 12.\n#### 12", "<<3*4=12>>12\n#### 12", "<<3*4=12>>12.\n#### 12"]
    assert brevity_reward(texts, [problem] * 4, [True] * 4) == [1.0, 0.0, 1.0, 0.0]
    [shown] = load_problems(LARGE_TASK, "train", 1, (3,))
    assert len(shown.calls) > len(shown.solution)
    assert brevity_reward([shown.calls, shown.solution + "."], [shown] * 2, [True] * 2) == [1.0, 0.0]
    unknown = replace(problem, calls="")
    assert brevity_reward(["<<3*4=12>>12\n#### 12", "12"], [unknown] * 2, [True] * 2) == [0.0, 1.0]


def test_without_calls_it_is_grpo_to_the_last_bit(here):
    """A model that never calls, the same flags: the same batches, losses and weights."""
    same = SMALL | dict(init="random", correct_weight=0.0, reward="vowels:letter", format_weight=0.0, beta=0.1, steps=3)
    (here / "vowels.py").write_text(
        "def letter(texts, problems, ended): return [float('e' in t) for t in texts]\n", encoding="utf-8"
    )
    sys.path.insert(0, str(here))
    try:
        agent.main(Config(**same, name="ours"))
        grpo.main(grpo.Config(**same, name="theirs"))
    finally:
        sys.path.remove(str(here))
    assert max(metrics("runs/theirs", "grad_norm").values()) > 0
    assert not any(metrics("runs/ours", "calls").values())
    names = ("reward", "loss", "kl", "grad_norm", "entropy", "clip_fraction", "ratio_spread", "length", "accuracy")
    assert_same_metrics("runs/ours", "runs/theirs", names)
    assert_same_weights("runs/ours/last", "runs/theirs/last")


def test_micro_batches_change_nothing(here, spied):
    more = dict(steps=1, minibatches=1, inner_epochs=2, optimizer="adamw", lr=1e-3)
    for size in (64, 4):
        agent.main(config(name=f"n{size}", micro_batch=size, **more))
    first, _, second, _ = spied["gradients"]
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-3)
    assert metrics("runs/n64", "ratio_spread")[1] > 1e-5  # of the second update
    assert_same_metrics("runs/n64", "runs/n4", ("loss", "kl", "ratio_spread"), rel=1e-2, abs=1e-7)


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_learns_and_leaves_everything(here, capsys):
    result = agent.main(config(steps=30, prompts=8, eval_problems=20, test_problems=20, lr=1e-2, beta=0.0))
    assert result["before"]["accuracy"] < 0.9
    assert result["after"]["accuracy"] > 0.95
    assert result["kl"] > 0
    for name in ("best/model.safetensors", "last/trainer_state.pt", "samples.md"):
        assert (here / "runs" / "agent" / name).exists(), name
    assert "<<1+1=2>>" in (here / "runs/agent/samples.md").read_text(encoding="utf-8")
    assert "pass@2" in capsys.readouterr().out


def test_answers_are_evaluated_with_the_tools(here):
    policy, tokenizer, _ = open_checkpoint("start")
    problems, dist = load_problems("twos.jsonl", "train", 8), devices.setup("cpu")
    asked = []
    spy = Tool("calculator", TOOLS["calculator"].pattern, lambda text: asked.append(text) or "2")
    result = evaluate(policy, tokenizer, problems, 14, dist, respond=WithTools([spy], tokenizer))
    assert len(asked) == 8
    assert all("=2>>" in sample.text for sample in result["answers"])  # whatever is asked, the tool says 2
    own = [sample.length for sample in result["answers"]]
    assert all(length < len(tokenizer.encode(s.text)) for length, s in zip(own, result["answers"], strict=True))


def test_the_kl_is_that_of_the_policys_tokens(here):
    policy, tokenizer, _ = open_checkpoint("start")
    other, dist = tiny(tokenizer.vocab_size, context=64, std=0.05), devices.setup("cpu")
    prompts = [encode_prompt(tokenizer, p) for p in load_problems("twos.jsonl", "train", 6)]
    respond = WithTools(CALCULATOR, tokenizer)
    got = sampled_kl(policy, other, tokenizer, prompts, 14, dist, seed=3, respond=respond)
    uniforms = torch.rand(6, 14, generator=torch.Generator().manual_seed(3))
    rollout = respond(policy, prompts, 14, stop_ids=tokenizer.stop_ids, uniforms=uniforms)
    assert rollout.written.any()
    with torch.no_grad():
        new, ref = (answer_logprobs(model, prompts, rollout.rows)[0][rollout.mask] for model in (policy, other))
    assert got == pytest.approx(((ref - new).exp() - 1 - (ref - new)).mean().item(), rel=1e-3)


def test_a_run_that_was_stopped_before_its_first_step_keeps_the_start(here, monkeypatch):
    assert_the_start_is_kept(agent, config, "runs/agent", monkeypatch)


def test_the_rate_the_clip_and_the_decay_of_each_step(here, steps_of):
    seen = steps_of(agent)
    agent.main(config(steps=5, warmup=3, lr=1e-2, clip=0.3, weight_decay=0.2, minibatches=1))
    assert_rate_clip_decay(seen, "linear", 0.0, betas=(0.9, 0.999))


@pytest.mark.parametrize("options", [{}, {"lora": LoraConfig(2), "lr": 1e-2}, {"train_on_tools": True}])
def test_resumed_equals_uninterrupted_bit_for_bit(here, options):
    names = ("reward", "loss", "kl", "accuracy", "calls")
    whole, parts = assert_resumed_equals_whole(agent, config, 2, names, **options)
    assert max(metrics("runs/whole", "grad_norm").values()) > 0
    assert {k: whole[k] for k in ("before", "after", "kl")} == {k: parts[k] for k in ("before", "after", "kl")}


def test_resume_refuses_what_changed(here, monkeypatch):
    shutil.copytree("start", "own")
    (here / "own_tool.py").write_text(
        "from agent import *\ndef f(q): return calculator(q)\nt = Tool('t', TOOLS['calculator'].pattern, f)\n\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(here))
    assert_resume_refuses_what_changed(
        agent,
        lambda **c: config(init="own", tools=["own_tool:t"], **c),
        ["own", "twos.jsonl", "own_tool.py"],
        {"twos.jsonl": "split", "own_tool.py": "the file of --tools own_tool:t"},
    )


@pytest.mark.parametrize("wrong", [False, True])
def test_two_processes_equal_one(here, scaled, wrong):
    more = dict(train_on_tools=wrong, prompts=6, scale="batch", loss_type="dapo", dtype="fp32", steps=2)
    process = script("agent.py", *flags(name="two", **more), cwd=here, processes=2)
    assert process.returncode == 0, process.stderr
    scaled("support.policy_run")  # in one process; it changes nothing
    agent.main(config(name="one", **more))
    names = ("reward", "grad_norm", "kl", "length", "calls", "call_errors", "zero_variance", "entropy", "loss")
    assert_same_metrics("runs/one", "runs/two", (*names, "accuracy"), rel=1e-3, abs=1e-6)
    assert min(metrics("runs/one", "grad_norm").values()) > 0
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-3, rtol=1e-3)


def test_without_a_call_that_a_tool_answers_a_demonstration_is_the_plain_solution():
    """Else the policy would learn to write the replies itself."""
    problem = Problem("3 * 4?", "a 12\n#### 12", "12", calls="a <<3*4=12>>12\n#### 12")
    prices = Tool("prices", r"<<price of (\w+)=", str)
    for tools in ([], [prices]):
        ids, flags = calls_start.encode_demonstration(ByteTokenizer(), problem, tools=tools)
        plain, trained = sft.encode_example(ByteTokenizer(), problem)
        assert (ids, flags) == (plain[: len(ids)], trained[: len(ids)])
        assert len(plain) - len(ids) <= 1  # a line's end after the turn, which has no loss
        assert "<<" not in ByteTokenizer().decode(ids)


def test_a_start_is_made_of_demonstrations_and_made_once(scratch, monkeypatch, capsys):
    asked = []

    def see(settings, encode, responder):
        asked.append(settings)
        _, flags = encode(ByteTokenizer(), load_problems(LARGE_TASK, "train", 1, (2,))[0])
        assert 0 < sum(flags) < len(flags)
        assert responder(ByteTokenizer()).tools == CALCULATOR

    monkeypatch.setattr(calls_start.sft, "main", see)
    monkeypatch.setattr(calls_start, "sft_start", lambda *_: "plain")
    dist, tools = devices.setup("cpu"), CALCULATOR
    path = calls_start.calls_start(Config(), dist, tools, WithTools)
    assert path == f"runs/start/{LARGE_TASK}-seed0-calls-calculator-levels23"
    [settings] = asked
    assert (settings.data, settings.levels, settings.init) == (LARGE_TASK, [2, 3], None)
    assert settings.demonstrations == Config().demonstrations < 2000
    assert calls_start.calls_start(Config(), dist, [], WithTools) == "plain"
    Transformer(TransformerConfig(260, n_layer=1, width=16, n_head=2, n_kv_head=1)).save_pretrained("taught")
    ByteTokenizer().save_pretrained("taught")
    calls_start.calls_start(Config(teach="taught", optimizer="adamw", lr=1e-5), dist, tools, WithTools)
    assert (asked[1].init, asked[1].optimizer, asked[1].lr) == ("taught", "adamw", 1e-5)
    others = [dict(demonstrations=100), dict(max_new_tokens=100), dict(teach="taught"), dict(teach="taught", lr=1e-5)]
    paths = {calls_start.calls_start(Config(**other), dist, tools, WithTools) for other in others}
    assert len(paths | {path}) == 5  # other settings, another start: a run may still be reading the first
    own = [Tool("calculator", pattern, str) for pattern in (r"\(([^()]*)\)=", r"<([^<>]*)>")]
    monkeypatch.setattr(calls_start.sft, "main", lambda settings, *_: None)
    of_own = {calls_start.calls_start(Config(tools=["own:mine"]), dist, [tool], WithTools) for tool in own}
    assert len(of_own | {path}) == 3  # another pattern, other demonstrations
    mended = set()
    for reply in "12":  # another function, other answers in SFT's validation
        (scratch / "own.py").write_text(text := f"def reply(call):\n    return '{reply}'\n", encoding="utf-8")
        exec(compile(text, str(scratch / "own.py"), "exec"), space := {})
        tool = Tool("calculator", own[0].pattern, space["reply"])
        mended.add(calls_start.calls_start(Config(tools=["own:mine"]), dist, [tool], WithTools))
    assert len(mended | of_own) == 4
    named = calls_start.calls_start(Config(tools=["own:it"]), dist, [Tool("unit price", r"\[(.*)\]", str)], WithTools)
    assert "calls-unit_price" in named
    assert f"no demonstration of {LARGE_TASK} calls unit price: the start will not know how" in capsys.readouterr().out
    shown = [Problem("Kite?", "<<price of kite=12>>12\n#### 12", "12")]  # of a file; it has no calls of the calculator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls_start, "load_problems", lambda *_: shown)
        prices = Tool("prices", r"<<price of (\w+)=", str)
        calls_start.calls_start(Config(tools=["own:prices"]), dist, [prices], WithTools)
    assert "no demonstration" not in capsys.readouterr().out
    (scratch / "plain.jsonl").write_text('{"question": "2?", "answer": "2"}\n' * 9, encoding="utf-8")
    monkeypatch.setattr(calls_start, "load_problems", lambda *_: [Problem("2?", "#### 2", "2")])
    with pytest.raises(ConfigError, match=r"--data plain.jsonl shows no calls, such as <<3\*4=12>>"):
        calls_start.calls_start(Config(data="plain.jsonl", teach="taught"), dist, tools, WithTools)
    plain = Config(data="plain.jsonl", teach="taught", tools=[])  # no tool needs a call
    assert "-calls-" in calls_start.calls_start(plain, dist, [], WithTools)
    called, seen = Problem("3 * 4?", "12\n#### 12", "12", calls="<<3*4=12>>12\n#### 12"), []
    monkeypatch.setattr(calls_start, "load_problems", lambda *_: [called])
    monkeypatch.setattr(calls_start.sft, "main", lambda settings, *_: seen.append(settings))
    calls_start.calls_start(Config(data="plain.jsonl", teach="taught"), dist, tools, WithTools)
    assert seen[0].levels == [1, 2]  # a file has none to choose from, and sft.py refuses them


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--init", "nowhere"], ["nowhere"]),
        (["--tools", "[abacus]"], ["abacus", "calculator"]),
        (["--tools", "[nowhere:tool]"], ["nowhere:tool", "ModuleNotFoundError"]),
        (["--refill", "1"], ["--refill 1", "grpo.py"]),
        (["--stale", "2"], ["--stale 2"]),
        (["--algorithm", "rloo"], ["--kl_in reward"]),
        (["--teach", "start"], ["--init", "--teach"]),
        (["--demonstrations", "0"], ["--demonstrations"]),
        (["--demonstrations", "100"], ["--demonstrations is for a start that is made"]),
        (["--tools", "[]", "--train_on_tools", "true"], ["--train_on_tools has no use"]),
        (["--max_new_tokens", "64"], ["no train prompt fits"]),
    ],
)
def test_bad_input_is_one_line(here, monkeypatch, capsys, given, words):
    monkeypatch.setattr(sys, "argv", ["agent.py", *map(str, flags(steps=1)), *given])
    assert_refused(capsys, lambda: run_script(agent.main, Config), *words)
    assert not (here / "runs").exists()


def test_real_data_needs_a_start(here):
    assert_one_line_error(script("agent.py", "--data", "gsm8k", cwd=here), "--init")
    with pytest.raises(ConfigError, match="needs an SFT checkpoint to start from"):
        Config(data="gsm8k")
    assert Config(data="gsm8k", teach="somewhere").init is None


def test_a_start_without_calls_has_no_demonstrations_of_them():
    with pytest.raises(ConfigError, match="--demonstrations has no use with --tools"):
        Config(tools=[], demonstrations=5)
    assert Config(tools=[], demonstrations=5, teach="somewhere").demonstrations == 5
    assert Config(tools=[]).init is None


def test_the_weight_of_the_kl_is_that_of_the_algorithm():
    assert Config().beta == 0.1
    assert Config(algorithm="dapo").beta == 0
    assert Config(algorithm="dapo", beta=0.2).beta == 0.2
    assert Config(algorithm="reinforce++-baseline").beta == grpo.ALGORITHMS["grpo"]["beta"]


def test_the_sampler_asks_what_it_is_given(here):
    policy, tokenizer, _ = open_checkpoint("start")
    problems = load_problems("twos.jsonl", "train", 8)
    sample = Sampler(policy, tokenizer, problems, config(), devices.precision("fp32", devices.setup("cpu"))[0])
    plain = sample(0, [0, 1])
    sample.respond = WithTools(CALCULATOR, tokenizer)
    ours = sample(0, [0, 1])
    assert plain.rollout.written is None
    assert ours.rollout.written.any()
    assert [len(ids) for group in ours.answers for ids in group] == [len(ids) for ids in ours.rollout.rows]


@pytest.mark.parametrize("train_on_tools", [False, True])
def test_a_record_tells_whose_tokens_are_whose_and_changes_nothing(here, train_on_tools):
    for name, groups in (("seen", 3), ("unseen", 0)):
        some = dict(record_groups=groups, watch=min(groups, 2), record_every=1)
        agent.main(config(name=name, steps=3, train_on_tools=train_on_tools, **some))
    assert_same_weights("runs/seen/last", "runs/unseen/last")
    assert_same_metrics("runs/seen", "runs/unseen", ("loss", "reward", "grad_norm", "calls", "accuracy"))
    _, records = read_recording("runs/seen")
    pulled = by_tool = 0
    for record, group in ((r, group) for r in records for group in r["groups"]):
        for a in group["answers"]:
            written = "".join(record["vocab"][str(i)] for i, tool in zip(a["ids"], a["tool"], strict=True) if tool)
            text = "".join(record["vocab"][str(i)] for i in a["ids"])
            assert written == "".join(re.findall(r"<<[^<>=]*=([^<>]*>>)", text))
            by_tool += len(written)
            for gets, old, tool in zip(a.get("gets", ()), a.get("old", ()), a["tool"], strict=False):
                assert train_on_tools or not tool or (gets, old) == (0, None)
                assert old is not None or tool
                pulled += tool and gets != 0
    assert by_tool > 0
    assert (pulled > 0) == train_on_tools
