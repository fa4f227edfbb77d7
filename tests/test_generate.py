"""generate.py: the sampler's distribution, batches against rows alone, and the script as a user meets it."""

import pytest
import torch
from conftest import assert_one_line_error, script

from generate import (
    Config,
    ConfigError,
    generate,
    open_checkpoint,
    parse_config,
    resolve_checkpoint,
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
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_flags_and_yaml(checkpoint):
    (checkpoint / "c.yaml").write_text("checkpoint: run\ntop_k: 7\ntemperature: 0.5\n")
    config = parse_config(Config, ["--config", "c.yaml", "--temperature", "0.9"])
    assert (config.checkpoint, config.top_k, config.temperature, config.prompt) == ("run", 7, 0.9, None)


def test_the_script(checkpoint):
    done = script("generate.py", "--checkpoint", "run", "--prompt", "the cat", "--max_new_tokens", 5, cwd=checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip("\n")
    for flags, words in [
        (["--checkpoint", "nowhere", "--prompt", "x"], ["nowhere"]),
        (["--checkpoint", "run", "--prompt", "cat " * 60], ["context of 48", "shorten"]),
        (["--checkpoint", "run", "--promt", "x"], ["promt"]),
        (["--checkpoint", "run", "--temperature", "-1"], ["temperature"]),
    ]:
        assert_one_line_error(script("generate.py", *flags, cwd=checkpoint), *words)


@pytest.mark.parametrize(
    "name", ["attention", "data", "generate", "norms", "positional", "tokenizer_bpe", "transformer"]
)
def test_every_component_proves_something_by_itself(scratch, name):
    done = script(f"{name}.py", cwd=scratch, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4
