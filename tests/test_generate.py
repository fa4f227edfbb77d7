"""generate.py: the sampler's distribution, batches against rows alone, and the script as a user meets it."""

import contextlib
import copy
import io
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_one_line_error, script
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as generate_module
from generate import Config, Rollout, answer, chat, generate, main, sample, truncate
from support import cli, generate_setup
from support.answers import extract_answer
from support.checkpoints import open_checkpoint, resolve_checkpoint
from support.cli import parse_config, run_script
from support.devices import TRAITS, free_memory
from support.errors import CheckpointError, ConfigError, DivergedError
from support.streaming import StreamedText
from tokenizer_bpe import BPETokenizer, ByteTokenizer, CharTokenizer
from transformer import Transformer, TransformerConfig, token_logprobs

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(40, context=48, n_layer=2, n_head=2, n_kv_head=1, width=16))
    for p in raw.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return raw


def test_sampling_follows_the_softmax():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    u = (torch.arange(20_000) + 0.5) / 20_000  # an even grid: the shares are exact up to 1 / 20,000
    ids, logprobs = sample(logits.expand(20_000, 4), u, temperature=0.7)
    expected = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(ids.bincount(minlength=4) / 20_000, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[ids])


def test_draws_of_a_generator_follow_the_softmax():
    """χ² of 50,000 draws against 9 degrees of freedom: beyond 35 once in 17,000 seeds, and the seed is fixed."""
    torch.manual_seed(0)
    logits, n = torch.randn(10), 50_000
    for more in ({}, {"top_k": 4}, {"top_p": 0.6}):
        ids, _ = sample(logits.expand(n, 10), torch.rand(n), 1.3, **more)
        probs = truncate((logits / 1.3).softmax(-1)[None], **more)[0]
        expected = n * probs / probs.sum()
        counts = ids.bincount(minlength=10)
        assert not counts[expected == 0].any()
        held = expected > 0
        assert ((counts - expected)[held] ** 2 / expected[held]).sum() < 35


def test_greedy_sampling_ignores_the_uniforms_and_scores_at_temperature_one():
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]]).expand(3, 4)
    ids, logprobs = sample(logits, torch.tensor([0.0, 0.5, 0.999]), temperature=0, top_k=2)
    assert ids.tolist() == [2, 2, 2]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 2])


def test_greedy_decoding_draws_nothing(model):
    before = torch.get_rng_state()
    generate(model, PROMPTS, 3, temperature=0)
    assert torch.equal(torch.get_rng_state(), before)  # an evaluation does not change what dropout draws
    generate(model, PROMPTS, 3)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    ids, _ = sample(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert ids.tolist() == [1, 3, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("choice", [{}, {"temperature": 0}, {"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.5}])
def test_logits_that_are_no_distribution_have_no_logprob(bad, choice):
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0], [0.5, bad, 2.0, 0.0], [0.5, -math.inf, 2.0, 0.0]])
    _, logprobs = sample(logits, torch.full((3,), 0.5), **choice)
    assert logprobs.isnan().tolist() == [False, True, False]  # a single −inf is a probability of 0


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("settings", [{}, {"static": True}, {"temperature": 0, "stop_ids": (7, 39)}])
def test_logits_that_are_not_finite_become_no_tokens(model, monkeypatch, at, settings):
    """From the first token on, or later in one of the rows."""
    good, calls, shown = generate(model, PROMPTS, 9, uniforms=torch.rand(3, 9)), [], []
    plain = generate_module.sample

    def broken(logits, *args, **options):
        calls.append(1)
        if len(calls) == at + 1:
            logits = logits.clone()
            logits[-1, 3] = math.nan
        return plain(logits, *args, **options)

    monkeypatch.setattr(generate_module, "sample", broken)
    for more in ({}, {"on_tokens": lambda ids, live: shown.append(ids)}):
        calls.clear()
        with pytest.raises(DivergedError, match="logits are not finite") as error:
            generate(model, PROMPTS, 9, uniforms=torch.zeros(3, 9), **settings | more)
        assert "\n" not in str(error.value)
        assert model.training
    assert len(shown) == at  # a stream ends before the token that means nothing
    assert good.logprobs.isfinite().all()


def test_what_a_row_meets_after_its_end_does_not_count(model, monkeypatch):
    """A row that has ended decodes on until the batch shrinks; what it reads there may be no number."""
    plain, uniforms = generate_module.sample, torch.rand(3, 9)
    first = generate(model, PROMPTS, 1, uniforms=uniforms[:, :1]).ids[0].item()  # where row 0 ends
    good, ended = generate(model, PROMPTS, 9, stop_ids=(first,), uniforms=uniforms), []

    def broken(logits, *args, **options):
        if ended:
            logits = logits.clone()
            logits[0] = math.nan
        ended.append(True)
        return plain(logits, *args, **options)

    monkeypatch.setattr(generate_module, "sample", broken)
    rollout = generate(model, PROMPTS, 9, stop_ids=(first,), uniforms=uniforms)
    assert rollout.mask[0].sum() == 1
    assert len(ended) > 1
    assert torch.equal(rollout.logprobs, good.logprobs)


def test_truncation_against_plain_lists():
    torch.manual_seed(0)
    for _ in range(20):
        probs = torch.rand(9).softmax(-1)
        order = sorted(range(9), key=lambda i: -probs[i])
        assert set(truncate(probs[None], top_k=3)[0].nonzero().flatten().tolist()) == set(order[:3])
        nucleus, mass = [], 0.0
        for i in order:
            if mass >= 0.6:
                break
            nucleus.append(i)
            mass += probs[i].item()
        assert set(truncate(probs[None], top_p=0.6)[0].nonzero().flatten().tolist()) == set(nucleus)
        both = truncate(probs[None], top_k=3, top_p=0.6)[0]  # the nucleus of what the k keep
        mass, three = 0.0, sum(probs[i].item() for i in order[:3])
        nucleus = []
        for i in order[:3]:
            if mass >= 0.6 * three:
                break
            nucleus.append(i)
            mass += probs[i].item()
        assert set(both.nonzero().flatten().tolist()) == set(nucleus)
        assert torch.equal(both[nucleus], probs[nucleus])
    for off in ({}, {"top_k": 9}, {"top_k": 99}, {"top_p": 1.0}):
        assert torch.equal(truncate(probs[None], **off)[0], probs)
    assert truncate(probs[None], top_p=1e-9).count_nonzero() == 1
    quarters = torch.tensor([[0.5, 0.25, 0.25]])  # the limits themselves, exact in binary
    assert truncate(quarters, top_p=0.5).count_nonzero() == 1
    assert truncate(quarters, min_p=0.5).count_nonzero() == 3


def test_greedy_is_the_argmax_without_a_cache(model):
    rollout = generate(model, PROMPTS, 12, temperature=0)
    for prompt, ids in zip(PROMPTS, rollout.ids.tolist(), strict=True):
        row = list(prompt)
        for _ in range(12):
            row.append(model(torch.tensor([row]))[0, -1].argmax().item())
        assert ids == row[len(prompt) :]


def test_logprobs_are_those_of_the_full_softmax_at_the_temperature(model):
    rollout = generate(model, PROMPTS, 10, n=2, temperature=0.7, top_k=5, stop_ids=(3, 7))
    for row in range(6):
        n = int(rollout.mask[row].sum())
        tokens = torch.tensor([PROMPTS[row // 2] + rollout.ids[row, :n].tolist()])
        torch.testing.assert_close(
            rollout.logprobs[row, :n], token_logprobs(model, tokens, 0.7)[0, -n:], atol=1e-4, rtol=1e-4
        )


def test_a_row_does_not_depend_on_its_batch(model):
    uniforms, stop = torch.rand(12, 20), tuple(range(8))
    batch = generate(model, PROMPTS, 20, n=4, stop_ids=stop, uniforms=uniforms)
    lengths = batch.mask.sum(1)
    assert lengths.min() < lengths.max()
    for row in range(12):
        alone = generate(model, [PROMPTS[row // 4]], 20, stop_ids=stop, uniforms=uniforms[row : row + 1])
        n = int(lengths[row])
        assert batch.ids[row, :n].tolist() == alone.ids[0].tolist()
        assert batch.mask[row].tolist() == [True] * n + [False] * (batch.mask.shape[1] - n)
        ids = batch.ids[row].tolist()
        assert not any(i in stop for i in ids[: n - 1])
        assert ids[n - 1] in stop or n == 20
        assert set(ids[n:]) <= {0}
        assert (batch.logprobs[row, n:] == 0).all()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
def test_padding_changes_nothing_under_other_positions(positions):
    torch.manual_seed(0)
    config = TransformerConfig(40, context=48, n_layer=2, n_head=2, n_kv_head=1, width=16, positions=positions)
    raw = Transformer(config)
    for p in raw.parameters():
        torch.nn.init.normal_(p, std=0.3)
    uniforms = torch.rand(3, 12)
    batch = generate(raw, PROMPTS, 12, uniforms=uniforms)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(raw, [prompt], 12, uniforms=uniforms[row : row + 1])
        assert batch.ids[row].tolist() == alone.ids[0].tolist()
        torch.testing.assert_close(batch.logprobs[row], alone.logprobs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("change", [{}, {"norm": "layer"}, {"positions": "learned"}, {"window": 6}], ids=str)
def test_prompts_of_one_length_continue_as_beside_a_longer_one(change, static):
    """Without pads all rows share a position; a longer prompt among them gives each row its own."""
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(40, context=48, n_layer=2, n_head=2, n_kv_head=1, width=16, **change))
    for p in raw.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prompts, uniforms, how = [[1, 2, 3], [4, 5, 6], [9, 8, 7]], torch.rand(12, 30), {"stop_ids": range(6), "n": 3}
    even = generate(raw, prompts, 30, uniforms=uniforms[:9], static=static, **how)
    beside = generate(raw, [*prompts, [11] * 8], 30, uniforms=uniforms, static=static, **how)
    assert even.mask.sum(1).min() < 8  # rows have left
    T = even.ids.shape[1]
    assert torch.equal(even.ids, beside.ids[:9, :T])
    assert torch.equal(even.mask, beside.mask[:9, :T])
    torch.testing.assert_close(even.logprobs, beside.logprobs[:9, :T], atol=1e-4, rtol=1e-4)


def test_a_batch_of_finished_rows_ends_early(model):
    first = generate(model, PROMPTS, 1, temperature=0).ids.flatten().tolist()
    rollout = generate(model, PROMPTS, 20, temperature=0, stop_ids=first)
    assert rollout.ids.tolist() == [[i] for i in first]
    assert rollout.mask.all()


def test_the_context_can_be_filled_to_the_last_token(model):
    assert generate(model, [[1] * 40], 8).ids.shape == (1, 8)
    assert generate(model, PROMPTS, 41).ids.shape == (3, 41)


def test_texts_leave_out_what_ends_them():
    tokenizer = BPETokenizer.train("the cat sat on the mat " * 9, 270)
    cat, end = tokenizer.encode(" cat"), tokenizer.endoftext_id
    ids = torch.tensor([[*cat, end, 0, 0]])
    mask = torch.tensor([[True] * len(cat) + [True, False, False]])
    ids = torch.cat([ids, torch.tensor([[*cat, 270 + 9, 0, 0]])])  # a row that a padded vocabulary has to spare
    mask = torch.cat([mask, mask])
    assert Rollout(ids, mask, torch.zeros(ids.shape)).texts(tokenizer) == [" cat", " cat"]
    tokenizer.add_words({"<think>": 270 + 9})
    assert Rollout(ids, mask, torch.zeros(ids.shape)).texts(tokenizer) == [" cat", " cat<think>"]


def test_a_special_token_inside_an_answer_is_seen():
    """Left out, it would make one number of two: every reward, metric and report reads Rollout.texts."""
    tokenizer = BPETokenizer.train("#### 18", 262)
    start, end, stop = (tokenizer.special_ids[f"<|{name}|>"] for name in ("im_start", "im_end", "endoftext"))
    before, eight, spare = tokenizer.encode("#### 1"), *tokenizer.encode("8"), tokenizer.vocab_size + 5
    answers = {
        (*before, eight, end): "#### 18",
        (*before, eight, stop): "#### 18",
        (*before, start, eight, end): "#### 1<|im_start|>8",
        (*before, end, eight): "#### 1<|im_end|>8",
        (*before, spare, eight, end): "#### 1\ufffd8",
        (*before, start): "#### 1<|im_start|>",
        (end,): "",
    }
    ids = torch.zeros(len(answers), 12, dtype=torch.long)
    for row, of_row in enumerate(answers):
        ids[row, : len(of_row)] = torch.tensor(of_row)
    mask = torch.arange(12) < torch.tensor([*map(len, answers)])[:, None]
    texts = Rollout(ids, mask, torch.zeros(ids.shape)).texts(tokenizer)
    assert texts == list(answers.values())
    assert [extract_answer(text) for text in texts] == ["18", "18", None, None, None, None, None]


@settings(max_examples=200, deadline=None)
@given(st.text("ab🙂 ", max_size=30), st.lists(st.text("ab🙂", min_size=1, max_size=3), max_size=3))
def test_a_streamed_text_ends_before_the_first_stop_text(text, stops):
    streamed, tokenizer = StreamedText(ByteTokenizer(), stops), ByteTokenizer()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        ended = any(streamed.add(token) for token in tokenizer.encode(text))
        whole = streamed.end()
    assert out.getvalue() == whole + "\n"
    assert ended == any(stop in text for stop in stops)
    seen = text[: min((text.index(stop) + len(stop) for stop in stops if stop in text), default=len(text))]
    assert whole == seen[: min((seen.index(stop) for stop in stops if stop in seen), default=len(seen))]


def test_a_character_that_is_cut_off_is_shown_as_one(capsys):
    """But not after a stop text; token 0 is that and half a character."""
    both = SimpleNamespace(text_ids={0}, decode_bytes=lambda ids: b"|\xc3")
    for tokenizer, ids, cut in ((ByteTokenizer(), [*"né".encode()][:-1], "n�"), (both, [0], "")):
        streamed = StreamedText(tokenizer, ["|"])
        assert [streamed.add(token) for token in ids][-1] is (tokenizer is both)
        assert streamed.end() == cut
    assert capsys.readouterr().out == "n�\n\n"


def test_what_generate_is_given_must_fit(model):
    for bad, words in [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"n": 0}, "n is 0"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"min_p": 2.0}, r"min_p 2\.0"),
        ({"min_p": math.nan}, "min_p nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty 0\.0"),
        ({"uniforms": torch.rand(1, 5)}, r"uniforms are \(1, 5\), not \(1, 4\)"),
        ({"uniforms": torch.rand(2, 4)}, r"uniforms are \(2, 4\)"),
    ]:
        with pytest.raises(ConfigError, match=words):
            generate(model, [[1, 2]], **{"max_new_tokens": 4} | bad)


def test_free_memory_is_what_the_system_says(monkeypatch):
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    assert free_memory(torch.device("cpu")) == pytest.approx(1024 * int(available.split()[1]), rel=0.2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == pytest.approx(1024 * int(available.split()[1]) / 4, rel=0.2)


def test_a_chat_survives_what_goes_wrong(checkpoint, monkeypatch, capsys):
    asked = []

    def answer(model, tokenizer, ids, stop_ids, config, generator):
        asked.append(tokenizer.decode(ids))
        if len(asked) == 2:
            raise KeyboardInterrupt
        if len(asked) == 3:
            raise ConfigError("the prompt has 99 tokens")
        return f"said {len(asked)}"

    lines = iter(["cat", "\udcff", "rat", "long", "bat", "/new", "hat", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(generate_module, "answer", answer)
    monkeypatch.setattr(generate_module, "is_chat_model", lambda *_: True)
    roomy = TransformerConfig(270, context=200, n_layer=1, n_head=2, n_kv_head=1, width=16)
    monkeypatch.setattr(Transformer, "from_pretrained", lambda *_, **__: Transformer(roomy))
    main(Config(checkpoint="run"))
    told = capsys.readouterr().out
    assert "surrogate" in told  # what cannot be encoded is said, and the chat goes on
    assert "(stopped)" in told
    assert "(the prompt has 99 tokens)" in told
    assert [("said 1" in a, "rat" in a, "long" in a) for a in asked[3:]] == [(True, False, False), (False,) * 3]


def test_a_full_context_forgets_whole_exchanges(monkeypatch, capsys):
    """A chat of 10 tokens a message, in a context that keeps 16 for the answer."""
    for context, lengths in ((46, [1, 3, 3, 3]), (45, [1, 1, 1, 1]), (20, [1, 1, 1, 1])):
        lines = iter(["a", "b", "c", "d", ""])
        monkeypatch.setattr("builtins.input", lambda _, lines=lines: next(lines))
        asked, read = [], []

        def encode_chat(turns, _, asked=asked):
            asked.append(turns[0]["role"])
            return [0] * 10 * len(turns), None

        chat(
            SimpleNamespace(encode_chat=encode_chat), context, lambda ids, read=read: read.append(len(ids) // 10) or ""
        )
        assert read == lengths
        assert set(asked) == {"user"}  # never an answer without its question
        assert "the oldest exchange was forgotten" in capsys.readouterr().out


def test_later_turns_do_not_read_thoughts(monkeypatch):
    lines, asked = iter(["a", "b", ""]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    encode = SimpleNamespace(encode_chat=lambda turns, _: (asked.append([t["content"] for t in turns]), ([0], None))[1])
    chat(encode, 100, lambda ids: "<think>\nfive?\n</think>\n\n5")
    assert asked == [["a"], ["a", "5", "b"]]


def test_bytes_that_are_no_text_get_one_line_and_the_next_prompt(checkpoint):
    """A half-erased character, a NUL, a carriage return, and an end in the middle of a line."""
    (checkpoint / "run/best/generation_config.json").write_text('{"eos_token_id": [268, 269]}', encoding="utf-8")
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", "run", "--max_new_tokens", "2"]
    keys = b"hi\nc\xc3\n\0x\rcat\n\xe4\xbd"
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in a UTF-8 locale; in C it is surrogateescape
    done = subprocess.run(command, input=keys, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert done.stdout.count(b"> ") == 5  # two lines are answered, two are refused, and the end is asked for
    assert done.stdout.count(b"a byte that is no text here") == 2


@pytest.mark.parametrize("stdin", [None, io.TextIOWrapper(io.BytesIO(b"hi\n"), encoding="utf-8")])
def test_a_chat_without_stdin_ends(monkeypatch, stdin, capsys):
    if stdin is not None:
        stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    chat(None, 48, None)
    assert capsys.readouterr().out.startswith("Chat.")


def test_a_locale_without_surrogateescape_goes_on_too(monkeypatch, capsys):
    lines = iter([UnicodeDecodeError("utf-16", b"x", 0, 1, "truncated data"), EOFError()])

    def asked(prompt):
        raise next(lines)

    monkeypatch.setattr("builtins.input", asked)
    chat(None, 48, None)
    assert "(the line is no text in the encoding of this terminal; type it again)" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["fp16", "fp64"])
def test_other_precisions_continue_as_fp32(model, what):
    """fp16 under autocast, as --dtype fp16 on a CPU, and weights that are fp64."""
    uniforms = torch.rand(9, 5, generator=torch.Generator().manual_seed(1))
    other, tight = copy.deepcopy(model), dict(atol=1e-5, rtol=1e-5)
    context = contextlib.nullcontext()
    if what == "fp16":
        context, tight = torch.autocast("cpu", torch.float16), dict(atol=0.01, rtol=0.005)
    else:
        other = other.double()
    with context:
        found = generate(other, PROMPTS, 5, 3, uniforms=uniforms)
    with torch.no_grad():
        for i, prompt in enumerate(p for p in PROMPTS for _ in range(3)):
            expected = token_logprobs(model, torch.tensor([prompt + found.ids[i].tolist()]))[0, -5:]
            torch.testing.assert_close(found.logprobs[i].float(), expected, **tight)


def test_a_model_whose_weights_are_bf16_continues_as_in_fp32(model):
    rounded = copy.deepcopy(model).bfloat16()
    uniforms = torch.rand(9, 5, generator=torch.Generator().manual_seed(1))
    for static in (False, True):
        found = generate(rounded, PROMPTS, 5, 3, uniforms=uniforms, static=static)
        with torch.no_grad():
            for i, prompt in enumerate(p for p in PROMPTS for _ in range(3)):
                tokens = torch.tensor([prompt + found.ids[i].tolist()])
                expected = token_logprobs(model, tokens)[0, -5:]
                torch.testing.assert_close(found.logprobs[i], expected, atol=0.03, rtol=0.02)


def test_fixed_shapes_change_no_text(model):
    """Prompts of three lengths, rows that leave, and answers until the cache is full."""
    uniforms = torch.rand(9, 40, generator=torch.Generator().manual_seed(0))
    plain, still = (
        generate(model, PROMPTS, 40, 3, stop_ids=(3, 5), uniforms=uniforms, static=s) for s in (False, True)
    )
    assert torch.equal(plain.ids, still.ids)
    assert torch.equal(plain.mask, still.mask)
    torch.testing.assert_close(plain.logprobs, still.logprobs, atol=1e-4, rtol=1e-4)
    lengths = plain.mask.sum(1).tolist()
    assert min(lengths) < 10  # most rows left the batch on the way
    assert len(set(lengths)) > 4


def test_min_p_and_the_repetition_penalty_against_transformers():
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits = torch.randn(5, 30) * 3
    kept = MinPLogitsWarper(0.1)(None, logits).isfinite()
    assert torch.equal(truncate(logits.softmax(-1), min_p=0.1) > 0, kept)
    assert 5 < kept.sum() < 100
    context = torch.randint(30, (5, 6))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(context, logits.clone())
    seen = torch.zeros(5, 30, dtype=torch.bool).scatter_(1, context, True)
    u = (torch.arange(4000) + 0.5) / 4000
    for row in range(5):
        for temperature in (1.0, 0.7):
            shape = (4000, 30)
            penalty = {"penalty": 1.7, "seen": seen[row].expand(shape)}
            ids, logprobs = sample(logits[row].expand(shape), u, temperature, **penalty)
            shares = ids.bincount(minlength=30) / 4000
            torch.testing.assert_close(shares, (expected[row] / temperature).softmax(-1), atol=1e-3, rtol=0)
            torch.testing.assert_close(logprobs, (logits[row] / temperature).log_softmax(-1)[ids])  # the model's own
    ids, logprobs = sample(logits, u[:5], 0, penalty=1.7, seen=seen)
    assert ids.tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    negative = torch.tensor([[-1.0, -1.5]])
    assert sample(negative, u[:1], 0, penalty=2.0, seen=torch.tensor([[True, False]]))[0].item() == 1


def test_the_penalty_sees_the_prompt_and_what_was_written(model):
    from transformers import RepetitionPenaltyLogitsProcessor

    prompts = PROMPTS + [[i] for i in range(40)]  # of which some would say their last token again
    got = generate(model, prompts, 12, temperature=0, repetition_penalty=1.5, stop_ids=(3,))
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for t in range(int(got.mask[row].sum())):
            logits = model(torch.tensor([ids]))[:, -1].detach()
            ids.append(RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([ids]), logits).argmax().item())
            assert got.ids[row, t] == ids[-1]


def test_little_memory_means_more_batches_and_the_same_rows(model, monkeypatch):
    calls = []
    make = Transformer.make_cache  # once for the prompts of a batch
    monkeypatch.setattr(Transformer, "make_cache", lambda self, *a: calls.append(a[0]) or make(self, *a))
    table = torch.rand(6, 9)
    stop = generate(model, PROMPTS[:1], 1, n=2, uniforms=table[:2, :1]).ids.flatten().tolist()  # prompt 0 ends at once
    calls.clear()
    whole = generate(model, PROMPTS, 9, n=2, uniforms=table, stop_ids=stop)
    assert calls == [3]
    assert whole.mask.sum(1).tolist()[:2] == [1, 1]
    assert whole.mask.sum(1).max() > 1
    parts = generate(model, PROMPTS, 9, n=2, uniforms=table, stop_ids=stop, memory=1)
    assert calls == [3, 1, 1, 1]
    assert torch.equal(whole.ids, parts.ids)
    assert torch.equal(whole.mask, parts.mask)
    # 2 prompts · (prefill, 2 rollouts of all slots) · head width · layers · (k, v) · fp32
    two = 2 * (7 + 2 * (7 + 9)) * 8 * 2 * 2 * 4
    for limit, batches in ((two, [2, 1]), (two - 1, [1, 1, 1])):
        calls.clear()
        generate(model, PROMPTS, 9, n=2, uniforms=table, memory=limit)
        monkeypatch.setattr(generate_setup, "free_memory", lambda device, limit=limit: 2 * limit)  # half of it
        generate(model, PROMPTS, 9, n=2, uniforms=table)
        assert calls == batches * 2
    calls.clear()
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], bf16_cache=True))
    with torch.autocast("cpu", torch.bfloat16):  # the rollouts' in bf16, half the size
        generate(model, PROMPTS, 9, n=2, uniforms=table, memory=2 * (7 + 7 + 9) * 8 * 2 * 2 * 4)
    assert calls == [2, 1]
    torch.testing.assert_close(whole.logprobs, parts.logprobs, atol=1e-4, rtol=1e-4)


def test_what_comes_back_can_stand_in_a_loss(model):
    rollout = generate(model, PROMPTS, 4)
    x = torch.ones(3, 4, requires_grad=True)
    (x * rollout.logprobs * rollout.mask).sum().backward()  # an inference tensor would refuse
    torch.testing.assert_close(x.grad, rollout.logprobs)


def test_stop_texts_end_an_answer_and_are_not_shown(capsys):
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train("abcdefgh")
    raw = Transformer(TransformerConfig(tokenizer.vocab_size, context=64, n_layer=1, n_head=2, n_kv_head=1, width=16))
    for p in raw.parameters():
        torch.nn.init.normal_(p, std=0.3)

    def say(*stop, most=30):
        config = Config("x", max_new_tokens=most, temperature=1.0, stop=list(stop))
        text = answer(raw, tokenizer, tokenizer.encode("a"), (), config, torch.Generator().manual_seed(1))
        assert capsys.readouterr().out == text + "\n"
        return text

    whole = say()
    assert say(whole[5:8], "never said") == whole[: whole.index(whole[5:8])]
    assert say(whole[6:8], whole[5:8]) == whole[: whole.index(whole[5:8])]  # both end here, one begins before the other
    assert len(whole) < len(say(most=500)) < 64  # until the context is full
    assert say(whole[-1] + "never said") == whole  # held back as a beginning, then shown
    first = whole[0]  # a word that is a token, but no special one, is shown
    tokenizer.special_ids["<think>"] = tokenizer.encode(first)[0]
    tokenizer.text_ids.discard(tokenizer.encode(first)[0])
    assert first not in say()
    tokenizer.add_words({"<think>": tokenizer.encode(first)[0]})
    assert say() == whole.replace(first, "<think>")


def test_seed_streaming_and_training_mode(model):
    def draw(seed, **more):
        return generate(model, PROMPTS, 9, n=2, generator=torch.Generator().manual_seed(seed), **more)

    assert torch.equal(draw(1).ids, draw(1).ids)
    assert not torch.equal(draw(1).ids, draw(2).ids)
    seen = []
    rollout = draw(1, stop_ids=(2, 3, 4), on_tokens=lambda ids, live: seen.append((ids.clone(), live.clone())))
    assert torch.equal(torch.stack([ids for ids, _ in seen], 1), rollout.ids)
    assert torch.equal(torch.stack([live for _, live in seen], 1), rollout.mask)
    rollout = draw(1, on_tokens=lambda ids, live: torch.tensor([True, False] * len(PROMPTS)))
    assert rollout.mask.sum(1).tolist() == [1, 9] * len(PROMPTS)
    assert not rollout.ids[::2, 1:].any()
    assert draw(1, on_tokens=lambda ids, live: torch.ones(len(ids), dtype=torch.bool)).ids.shape[1] == 1
    model.train()
    draw(1)
    assert model.training
    model.eval()
    draw(1)
    assert not model.training


@pytest.mark.parametrize("more", [{}, {"static": True}, {"temperature": 0}, {"repetition_penalty": 1.3}])
def test_tokens_that_are_written_are_read_and_not_sampled(model, more):
    """Row 0 is told what to say from its third token on, row 1 once; row 2 goes on as if alone."""
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(4))
    alone = generate(model, PROMPTS, 12, uniforms=uniforms, **more)
    says, seen = {(0, t): 5 + t for t in range(2, 12)} | {(1, 4): 9}, []

    def write(ids, live):
        seen.append((ids.clone(), live.clone()))
        return torch.tensor([says.get((row, len(seen)), -1) for row in range(3)])

    rollout = generate(model, PROMPTS, 12, uniforms=uniforms, write=write, **more)
    by_hand = torch.zeros(3, 12, dtype=torch.bool)
    for row, t in says:
        by_hand[row, t] = True
        assert rollout.ids[row, t] == says[row, t]
    assert torch.equal(rollout.written, by_hand)
    assert torch.equal(rollout.mask, ~by_hand)
    assert not rollout.logprobs[by_hand].any()
    assert rollout.ids[2].tolist() == alone.ids[2].tolist()
    assert rollout.ids[1, :4].tolist() == alone.ids[1, :4].tolist()
    assert rollout.ids[1, 5:].tolist() != alone.ids[1, 5:].tolist()  # what was written was read
    assert torch.equal(torch.stack([ids for ids, _ in seen], 1), rollout.ids)
    assert all(live.all() for _, live in seen)
    for row in range(3):
        whole = torch.tensor([PROMPTS[row] + rollout.rows[row]])
        logprobs = token_logprobs(model, whole)[0, len(PROMPTS[row]) - 1 :]
        torch.testing.assert_close(logprobs * rollout.mask[row], rollout.logprobs[row], atol=1e-4, rtol=1e-4)


def test_a_row_that_has_ended_is_told_nothing(model):
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(4))
    first, _, stop = generate(model, PROMPTS, 12, uniforms=uniforms).ids[0, :3].tolist()
    rollout = generate(model, PROMPTS, 12, uniforms=uniforms, stop_ids=(first,), write=lambda *_: torch.full((3,), 7))
    assert rollout.rows[0] == [first]
    assert not rollout.written[0].any()
    ended = generate(
        model, PROMPTS, 12, uniforms=uniforms, stop_ids=(stop,), write=lambda ids, live: torch.full((3,), stop)
    )
    assert [len(ids) for ids in ended.rows] == [2] * 3  # what is written may end a row too
    assert ended.written[:, 1].all()


def test_prompts_that_cannot_be_continued(model):
    for prompts, message in [
        ([], "at least one token"),
        ([[1], []], "at least one token"),
        ([[1] * 40], "context of 48"),
    ]:
        with pytest.raises(ConfigError, match=message):
            generate(model, prompts, 9)


@pytest.fixture
def checkpoint(scratch, model):
    tokenizer = BPETokenizer.train("the cat sat on the mat " * 9, 270)
    raw = Transformer(TransformerConfig(tokenizer.vocab_size, context=48, n_layer=1, n_head=2, n_kv_head=1, width=16))
    for name in ("run/last", "run/best"):
        raw.save_pretrained(name)
        tokenizer.save_pretrained(name)
    model.save_pretrained("other")  # 40 tokens only
    tokenizer.save_pretrained("other")
    (scratch / "empty").mkdir()
    return scratch


def test_checkpoints(checkpoint):
    assert resolve_checkpoint("run").name == "best"
    Path("run/best").rename("run/best.old")  # a process was killed between the two renames of a save
    assert resolve_checkpoint("run").name == "best.old"
    Path("run/best.old").rename("run/best")
    assert resolve_checkpoint("run/last").name == "last"
    for path, message in [("nowhere", "is not there"), ("empty", "holds no checkpoint"), ("other", "do not belong")]:
        with pytest.raises(CheckpointError, match=message) as error:
            open_checkpoint(path)
        assert "\n" not in str(error.value)
    model, tokenizer, path = open_checkpoint("run")
    assert (model.config.vocab_size, path.name) == (tokenizer.vocab_size, "best")


def failure(capsys, call):
    """The one line that a failing call leaves on stderr."""
    with pytest.raises(SystemExit) as stop:
        call()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_flags_and_yaml(checkpoint):
    (checkpoint / "c.yaml").write_text("checkpoint: run\ntop_k: 7\ntemperature: 0.5\n", encoding="utf-8")
    config = parse_config(Config, ["--config", "c.yaml", "--temperature", "0.9"])
    assert (config.checkpoint, config.top_k, config.temperature, config.prompt) == ("run", 7, 0.9, None)


@pytest.mark.parametrize("words", [["--prompt", "# A heading"], ["--prompt=# A heading"]])
def test_a_prompt_that_yaml_takes_for_a_comment(words):
    config = parse_config(Config, ["--checkpoint", "run", *words])
    assert config.prompt == "# A heading"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--checkpoint", "run", "--promt", "x"], "promt"),
        (["--checkpoint", "run", "--top_k", "few"], "top_k"),
        (["--checkpoint", "run", "--seed", "1.5"], "seed"),
        (["--prompt", "x"], "checkpoint"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--config", "unknown.yaml"], "promt"),
        (["--config", "type.yaml"], "top_k"),
        (["--config", "broken.yaml"], "broken.yaml|config"),
    ],
)
def test_flags_that_cannot_be_read(scratch, capsys, flags, word):
    (scratch / "unknown.yaml").write_text("checkpoint: run\npromt: x\n", encoding="utf-8")
    (scratch / "type.yaml").write_text("checkpoint: run\ntop_k: few\n", encoding="utf-8")
    (scratch / "broken.yaml").write_text("checkpoint: [run\nprompt: :\n", encoding="utf-8")
    line = failure(capsys, lambda: parse_config(Config, flags))
    assert any(w in line for w in word.split("|"))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", ".nan"], "temperature is nan"),
        (["--temperature", "1e-39"], "at least 1e-5"),
        (["--repetition_penalty", "1e-39"], "repetition_penalty is 1e-39; it must be at least 1e-05"),
        (["--seed", str(2**64)], "which is 2^32"),
        (["--top_k", "0"], "top_k is 0"),
        (["--top_p", "1.5"], "top_p is 1.5"),
        (["--max_new_tokens", "-3"], "max_new_tokens is -3"),
        (["--device", "toaster"], "'toaster'"),
        (["--top_p", "0.9", "--prompt", "the"], "--temperature above 0"),
        (["--seed", "7", "--prompt", "the"], "--seed has no effect on greedy"),
        (["--checkpoint", "other"], "do not belong"),
        ([], "base model"),  # no prompt
    ],
)
def test_settings_that_cannot_be_used(checkpoint, capsys, monkeypatch, flags, word):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "run", *flags])
    assert word in failure(capsys, lambda: run_script(main, Config))


@pytest.mark.parametrize(
    ("error", "status"), [(None, 0), (ConfigError("no"), 2), (KeyboardInterrupt(), 130), (SystemExit(130), 130)]
)
def test_one_of_several_processes_ends_at_once(monkeypatch, tmp_path, capfd, error, status):
    """At the interpreter's end gloo's threads sometimes abort a process whose work is done."""
    begun, left = [], []

    def main(config):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        begun.append(torch.distributed.is_initialized())
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "x"])
    monkeypatch.setattr(cli.os, "_exit", left.append)
    with contextlib.suppress(SystemExit):
        run_script(main, Config)
    assert begun == [True]
    assert left == [status]
    assert capfd.readouterr().err == ("error: no\n" if status == 2 else "")
    assert torch.distributed.is_initialized() == (status != 0)
    if status:
        torch.distributed.destroy_process_group()


def test_the_script(checkpoint):
    done = script("generate.py", "--checkpoint", "run", "--prompt", "the cat", "--max_new_tokens", 5, cwd=checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip("\n")
    raw = Transformer.from_pretrained("run/last")
    raw.blocks[0].ffn.up.weight.data[2, 1] = math.nan
    raw.save_pretrained("nan")
    shutil.copy("run/last/tokenizer.json", "nan")
    for flags, words in [
        (["--checkpoint", "nan", "--prompt", "hi"], ["nan", "model.layers.0.mlp.up_proj.weight", "earlier checkpoint"]),
        (["--checkpoint", "nowhere", "--prompt", "x"], ["nowhere"]),
        (["--checkpoint", "run", "--prompt", "cat " * 60], ["context of 48", "shorten"]),
    ]:
        assert_one_line_error(script("generate.py", *flags, cwd=checkpoint), *words)


@pytest.mark.parametrize(
    "name", ["attention", "data", "generate", "norms", "positional", "tokenizer_bpe", "transformer"]
)
def test_every_component_proves_something_by_itself(scratch, name):
    done = script(f"{name}.py", cwd=scratch, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4
