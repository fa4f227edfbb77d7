"""sft.py: the mask, the loss and its invariances, the interval, and the guarantees of a run."""

import json

import pytest
import torch
from conftest import assert_one_line_error, assert_same_weights, metrics, script
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain
import sft
from data import Problem, load_problems
from generate import ConfigError, open_checkpoint
from sft import Config, chat, collate, evaluate, rows_at, sft_loss, wilson
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig, token_logprobs

SMALL = dict(init="start", steps=4, batch=6, micro_batch=6, warmup=1, eval_every=2, eval_problems=4, test_problems=5)
SMALL |= dict(max_new_tokens=8, device="cpu", demonstrations=40)


def config(**changes):
    return Config(**(SMALL | changes))


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([p.question + p.solution for p in load_problems("word", "train", 200)], 400)


@pytest.fixture
def here(scratch, tokenizer):
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16))
    raw.save_pretrained("start")
    tokenizer.save_pretrained("start")
    return scratch


def test_exactly_the_answer_and_its_end_are_trained(tokenizer):
    problem = load_problems("word", "train", 1)[0]
    ids, mask = tokenizer.encode_chat(chat(problem))
    trained = [i for i, flag in zip(ids, mask, strict=True) if flag]
    assert trained == [*tokenizer.encode(problem.solution), tokenizer.special_ids["<|im_end|>"]]
    prompt = sft.encode_prompt(tokenizer, problem)
    assert ids[: len(prompt)] == prompt
    assert not any(mask[: len(prompt)])


def test_collate_pads_on_the_right_with_mask_false():
    tokens, mask = collate([([5, 6, 7], [False, True, True]), ([8], [True])], pad=3)
    assert tokens.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert mask.tolist() == [[False, True, True], [True, False, False]]


def test_loss_is_torchs_cross_entropy_over_the_masked_targets():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.randint(0, 7, (3, 5)), torch.rand(3, 5) < 0.5
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    loss, figures = sft_loss(logprobs, mask)
    ignored = targets.masked_fill(~mask, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ignored.flatten())
    torch.testing.assert_close(loss, expected)
    assert figures["loss"] == pytest.approx(loss.item())
    (ours,), (theirs,) = torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs)
    assert (ours[~mask] == 0).all()


def test_the_loss_on_a_prompt_alone_has_no_gradient():
    raw = Transformer(TransformerConfig(20, context=8, n_layer=1, n_head=2, n_kv_head=1, width=8))
    loss, _ = sft_loss(token_logprobs(raw, torch.randint(0, 20, (2, 6))), torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()
    assert all((p.grad == 0).all() for p in raw.parameters())


def test_a_pad_changes_nothing(tokenizer):
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, width=16)).double()
    examples = [tokenizer.encode_chat(chat(p)) for p in load_problems("word", "train", 3)]

    def gradient(batches):
        raw.zero_grad()
        n = sum(sum(flags) for _, flags in examples)
        for batch in batches:
            tokens, mask = collate(batch, tokenizer.endoftext_id)
            sft_loss(token_logprobs(raw, tokens), mask[:, 1:], n)[0].backward()
        return torch.cat([p.grad.flatten() for p in raw.parameters()])

    together, apart = gradient([examples]), gradient([[e] for e in examples])
    torch.testing.assert_close(together, apart, atol=1e-7, rtol=1e-5)
    assert together.norm() > 1e-3


def test_wilson_against_published_values():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3: 81/263, 15/148, 0/20, 1/29
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=6e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=6e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=6e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=6e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_sees_each_example_once(n, batch, seed):
    steps = 3 * n
    seen = [i for step in range(steps) for i in rows_at(n, step, batch, seed)]
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert rows_at(n, 2, batch, seed) == seen[2 * batch : 3 * batch]  # whatever came before


class Parrot(torch.nn.Module):
    """A model that always writes the same ids, to know what evaluate must count."""

    def __init__(self, ids, vocab, like):
        super().__init__()
        self.config, self.embed, self.like = like.config, like.embed, like
        self.script, self.vocab = ids, vocab

    def make_cache(self, *size):
        return self.like.make_cache(*size)

    def forward(self, tokens, positions=None, mask=None, cache=None, last_only=False):
        first = cache.length == 0
        self.at = 0 if first else self.at + 1
        cache.length += tokens.shape[1]
        logits = torch.zeros(len(tokens), 1, self.vocab)
        logits[:, :, self.script[self.at]] = 9.0
        return logits


def test_evaluate_counts(tokenizer):
    text = [*tokenizer.encode("#### 12"), tokenizer.special_ids["<|im_end|>"]]
    like = Transformer(TransformerConfig(tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, width=16))
    problems = [Problem("q?", "", a, level, "x") for a, level in [("12", 1), ("12.0", 2), ("13", 2), ("1", 1)]]
    result = evaluate(Parrot(text, tokenizer.vocab_size, like), tokenizer, problems, 20, pretrain.setup("cpu"))
    assert (result["correct"], result["n"], result["accuracy"]) == (2, 4, 0.5)
    assert result["length"] == len(text)
    assert result["truncated"] == 0
    assert result["by_level"] == {1: 0.5, 2: 0.5}
    cut = evaluate(Parrot(text, tokenizer.vocab_size, like), tokenizer, problems, len(text) - 1, pretrain.setup("cpu"))
    assert cut["truncated"] == 1


def test_a_run_learns_and_leaves_everything(here):
    result = sft.main(config(steps=40, lr=1e-2, eval_every=20))
    losses = list(metrics("runs/sft", "loss").values())
    assert losses[-1] < 0.7 * losses[0]
    assert 0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1
    for name in ("best/model.safetensors", "last/trainer_state.pt", "curves.png", "samples.md"):
        assert (here / "runs" / "sft" / name).exists(), name
    stops = json.loads((here / "runs/sft/best/generation_config.json").read_text())["eos_token_id"]
    assert stops == list(open_checkpoint("runs/sft")[1].stop_ids)


def test_the_cut_into_micro_batches_changes_nothing(here):
    sft.main(config(name="whole"))
    sft.main(config(name="cut", micro_batch=2))
    for name in ("loss", "grad_norm"):
        a, b = metrics("runs/whole", name), metrics("runs/cut", name)
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-4)


def test_two_processes_equal_one(here):
    flags = [x for k, v in SMALL.items() for x in (f"--{k}", v)]
    one = script("sft.py", *flags, "--name", "one", cwd=here)
    two = script("sft.py", *flags, "--name", "two", cwd=here, processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for name in ("loss", "grad_norm", "accuracy", "length"):
        a, b = metrics("runs/one", name), metrics("runs/two", name)
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-4), name
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-5, rtol=1e-4)


def test_resumed_equals_uninterrupted_bit_for_bit(here, monkeypatch):
    changes = dict(dropout=0.1)
    sft.main(config(name="whole", **changes))

    class StopAt2:
        def __init__(self, dist):
            self.asked = 0

        def __bool__(self):
            self.asked += 1
            return self.asked == 3

    with monkeypatch.context() as patch:
        patch.setattr(sft, "Interrupt", StopAt2)
        with pytest.raises(SystemExit):
            sft.main(config(name="parts", **changes))
    sft.main(config(name="parts", resume=True, **changes))
    assert metrics("runs/whole", "loss") == metrics("runs/parts", "loss")
    assert_same_weights("runs/whole/last", "runs/parts/last")


def test_bad_input_is_one_line(here):
    (here / "bad.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": \n')
    assert_one_line_error(script("sft.py", "--init", "start", "--data", "bad.jsonl", cwd=here), "bad.jsonl", "2")
    assert_one_line_error(script("sft.py", "--init", "start", "--data", "gsm9k", cwd=here), "gsm9k", "gsm8k")
    assert_one_line_error(script("sft.py", "--init", "nowhere", cwd=here), "nowhere")
    assert not (here / "runs").exists()
    with pytest.raises(ConfigError, match="batch"):
        config(batch=0)
    with pytest.raises(ConfigError, match="no valid prompt fits"):
        sft.main(config(max_new_tokens=159))
