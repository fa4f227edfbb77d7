"""support/plots.py."""

import math

import torch
from tiny import MODEL

from support import plots, pretrain_report
from tokenizer_bpe import CharTokenizer
from transformer import Transformer, TransformerConfig


def test_who_looks_at_whom_in_the_first_tokens(here):
    tokenizer = CharTokenizer.train(["a$ b"])
    policy = Transformer(TransformerConfig(**MODEL | {"vocab_size": tokenizer.vocab_size})).train()
    maps, tokens = pretrain_report.first_tokens(policy, tokenizer, "a$ b$ a" * 20, most=5)
    assert tokens == ["a", "$", " ", "b", "$"]
    assert [tuple(w.shape) for w in maps] == [(MODEL["n_head"], 5, 5)] * MODEL["n_layer"]
    for w in maps:
        torch.testing.assert_close(w.sum(-1), torch.ones(MODEL["n_head"], 5))
    assert policy.training
    assert len(pretrain_report.first_tokens(policy, tokenizer, "a$ b" * 99)[1]) == min(24, MODEL["context"])


def test_tokens_that_look_like_formulas_are_drawn(here, monkeypatch):
    kept = []
    monkeypatch.setattr(plots.pyplot(), "close", kept.append)
    even = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]  # query t looks at t + 1 keys alike
    plots.draw_attention(here, [torch.stack([torch.eye(4), even])] * 3, ["$$", "\n", "a", "b"])
    assert (here / "attention.png").stat().st_size > 5000
    titles = [axis.get_title() for axis in kept[0].axes]
    entropy = sum(math.log(n) for n in (1, 2, 3, 4)) / 4
    assert titles[:2] == ["1.1: 0.00 nats", f"1.2: {entropy:.2f} nats"]
    assert [text.get_text() for text in kept[0].axes[0].get_yticklabels()] == ["$$", "\\n", "a", "b"]


def test_a_spike_does_not_flatten_the_curve(here, monkeypatch):
    """It is drawn at five times the 95th percentile, and the legend says how high it was."""
    assert plots.spikes([0.1] * 50 + [70.0] + [0.1] * 49) == ([0.1] * 50 + [0.5] + [0.1] * 49, 70.0)
    for steady in ([0.1, 0.2] * 50, [0.0] * 100, [-1.0, 2.0] * 50):
        assert plots.spikes(steady) == (steady, None)

    drawn = []
    monkeypatch.setattr(plots, "read_metrics", lambda run_dir: {"kl": (list(range(201)), [0.1] * 200 + [70.0])})
    close = plots.pyplot().close
    monkeypatch.setattr(plots.pyplot(), "close", lambda figure: (drawn.append(figure.axes[0]), close(figure)))
    plots.draw_curves(here, "a run", [("KL", {"kl": "to the start"}, "nats", {})])
    assert drawn[0].get_ylim()[1] < 1
    assert [text.get_text() for text in drawn[0].get_legend().get_texts()] == ["to the start (up to 70)"]


def test_the_running_mean_is_centred_and_shorter_at_the_ends():
    assert plots.smooth([3, 0, 6, 0, 0], 1) == [1.5, 3, 2, 2, 0]


def test_steps_are_whole_numbers_on_the_axis(here, monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "read_metrics", lambda run_dir: {"kl": ([1, 2], [0.1, 0.2])})
    monkeypatch.setattr(plots.pyplot(), "close", kept.append)
    plots.draw_curves(here, "a run", [("KL", {"kl": "to the start"}, "nats", {})])
    ticks = kept[0].axes[0].get_xticks()
    assert len(ticks) > 1
    assert all(tick == round(tick) for tick in ticks)
