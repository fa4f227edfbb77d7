"""generate.py: the sampler's distribution, batches against rows alone, and the script as a user meets it."""

import sys

import pytest
import torch
from conftest import assert_one_line_error, script

from generate import (
    Config,
    ConfigError,
    Rollout,
    generate,
    main,
    open_checkpoint,
    parse_config,
    resolve_checkpoint,
    run,
    sample,
    truncate,
)
from tokenizer_bpe import BPETokenizer
from transformer import CheckpointError, Transformer, TransformerConfig, token_logprobs

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


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    ids, _ = sample(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert ids.tolist() == [1, 3, 3]


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


def test_a_batch_of_finished_rows_ends_early(model):
    first = generate(model, PROMPTS, 1, temperature=0).ids.flatten().tolist()
    rollout = generate(model, PROMPTS, 20, temperature=0, stop_ids=first)
    assert rollout.ids.tolist() == [[i] for i in first]
    assert rollout.mask.all()


def test_the_context_can_be_filled_to_the_last_token(model):
    assert generate(model, [[1] * 40], 8).ids.shape == (1, 8)
    assert generate(model, PROMPTS, 41).ids.shape == (3, 41)


def test_texts_leave_out_pads_and_special_tokens():
    tokenizer = BPETokenizer.train("the cat sat on the mat " * 9, 270)
    cat, end = tokenizer.encode(" cat"), tokenizer.endoftext_id
    ids = torch.tensor([[*cat, end, 0, 0]])
    mask = torch.tensor([[True] * len(cat) + [True, False, False]])
    assert Rollout(ids, mask, torch.zeros(ids.shape)).texts(tokenizer) == [" cat"]


def test_seed_streaming_and_training_mode(model):
    def draw(seed, **more):
        return generate(model, PROMPTS, 9, n=2, generator=torch.Generator().manual_seed(seed), **more)

    assert torch.equal(draw(1).ids, draw(1).ids)
    assert not torch.equal(draw(1).ids, draw(2).ids)
    seen = []
    rollout = draw(1, stop_ids=(2, 3, 4), on_tokens=lambda ids, live: seen.append((ids.clone(), live.clone())))
    assert torch.equal(torch.stack([ids for ids, _ in seen], 1), rollout.ids)
    assert torch.equal(torch.stack([live for _, live in seen], 1), rollout.mask)
    model.train()
    draw(1)
    assert model.training
    model.eval()
    draw(1)
    assert not model.training


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
    (checkpoint / "c.yaml").write_text("checkpoint: run\ntop_k: 7\ntemperature: 0.5\n")
    config = parse_config(Config, ["--config", "c.yaml", "--temperature", "0.9"])
    assert (config.checkpoint, config.top_k, config.temperature, config.prompt) == ("run", 7, 0.9, None)


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
    (scratch / "unknown.yaml").write_text("checkpoint: run\npromt: x\n")
    (scratch / "type.yaml").write_text("checkpoint: run\ntop_k: few\n")
    (scratch / "broken.yaml").write_text("checkpoint: [run\nprompt: :\n")
    line = failure(capsys, lambda: parse_config(Config, flags))
    assert any(w in line for w in word.split("|"))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top_k", "0"], "top_k is 0"),
        (["--top_p", "1.5"], "top_p is 1.5"),
        (["--max_new_tokens", "-3"], "max_new_tokens is -3"),
        (["--device", "toaster"], "'toaster'"),
        (["--checkpoint", "other"], "do not belong"),
        ([], "base model"),  # no prompt
    ],
)
def test_settings_that_cannot_be_used(checkpoint, capsys, monkeypatch, flags, word):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "run", *flags])
    assert word in failure(capsys, lambda: run(main, Config))


def test_the_script(checkpoint):
    done = script("generate.py", "--checkpoint", "run", "--prompt", "the cat", "--max_new_tokens", 5, cwd=checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip("\n")
    for flags, words in [
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
