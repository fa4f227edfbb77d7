"""encoder.py: what may see what, what is masked, and the guarantees of a run. BERT's numbers are in test_hf_bert.py."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_one_line_error,
    assert_ranks_draw_apart,
    assert_resumed_equals_whole,
    assert_same_metrics,
    assert_same_weights,
    metrics,
    script,
)
from safetensors.torch import load_file
from tiny_encoder import TINY, TINY_BERT, example_texts, perturbed

import encoder
from data import Review, load_reviews
from encoder import (
    MASK,
    Config,
    Encoder,
    EncoderConfig,
    classification_loss,
    labelled_batch,
    mask_tokens,
    masked_lm_loss,
    mean_pool,
)
from optim import lr_at
from reward_model import RewardEncoder
from support import encoder_report, encoder_start
from support.classification import judge_labels, predict, validate_mlm, validation_windows
from support.cli import parse_config, run_script
from support.devices import Dist
from support.encoder_start import check_new, make_encoder, open_encoder
from support.errors import CheckpointError, ConfigError, DataError, DivergedError
from support.plots import draw_curves
from support.text_batches import TextBatch, encode, pad_rows
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig

ALONE = Dist(0, 1, torch.device("cpu"))


@cache
def generated(split):
    return load_reviews("sentiment", split)[:60]


def tiny(**changes):
    torch.manual_seed(0)
    return perturbed(Encoder(EncoderConfig(**TINY | changes)))


# ---------------------------------------------------------------------------------------------------- the model

LAYOUTS = pytest.mark.parametrize(
    "changes",
    [{}, dict(norm_placement="sandwich"), dict(positions="sinusoidal"), dict(positions="learned", activation="gelu")],
    ids=["default", "sandwich", "sinusoidal", "learned"],
)


@LAYOUTS
def test_a_text_does_not_depend_on_what_stands_beside_it(changes):
    model = tiny(**changes)
    tokens, real, _ = example_texts()
    together = model(tokens, real)
    for i, row in enumerate(tokens):
        torch.testing.assert_close(model(row[None, real[i]])[0], together[i], atol=1e-5, rtol=1e-4)
    other = torch.where(real, tokens, tokens.roll(1, 0) + 1).remainder(61)
    torch.testing.assert_close(model(other, real), together, atol=1e-6, rtol=1e-6)


def test_every_token_sees_every_other():
    model, (tokens, _, _) = tiny(), example_texts()
    changed = tokens.clone()
    for t in range(11):
        changed[:, t] = (tokens[:, t] + 1) % 61
        moved = (model.hidden(changed) - model.hidden(tokens)).abs().amax((0, 2))
        assert (moved > 1e-4).all(), t
        changed[:, t] = tokens[:, t]


def test_order_counts():
    model, (tokens, _, _) = tiny(), example_texts()
    assert (model(tokens) - model(tokens.flip(1))).abs().max() > 1e-3


def test_mean_pool_is_the_mean_over_real_tokens():
    x, (_, real, _) = torch.randn(3, 11, 4), example_texts()
    expected = torch.stack([x[i, :n].mean(0) for i, n in enumerate((11, 7, 1))])
    torch.testing.assert_close(mean_pool(x, real), expected)
    torch.testing.assert_close(mean_pool(x), x.mean(1))
    model, (tokens, real, _) = tiny(), example_texts()
    states = model.hidden(tokens, real)
    h = torch.stack([states[i, :n].mean(0) for i, n in enumerate((11, 7, 1))])
    torch.testing.assert_close(model(tokens, real), h @ model.classifier.weight.T + model.classifier.bias)


def test_masked_lm_scores_the_chosen_places_alone():
    model, (tokens, real, _) = tiny(), example_texts()
    chosen = torch.zeros_like(real)
    chosen[0, 3] = chosen[0, 9] = chosen[1, 0] = True
    logprobs = model(tokens, real, targets=tokens.roll(1, 1), masked=chosen)
    full = model.token_logits(model.hidden(tokens, real)).log_softmax(-1)
    expected = [full[b, t, tokens.roll(1, 1)[b, t]] for b, t in ((0, 3), (0, 9), (1, 0))]
    torch.testing.assert_close(logprobs, torch.stack(expected))
    assert model(tokens, real, targets=tokens, masked=torch.zeros_like(real)).shape == (0,)


def test_dropout_acts_on_the_embeddings_the_branches_and_the_mean():
    """At p = 1 in one place after the other: nothing goes in, no branch adds anything, only the bias comes out."""
    model, (tokens, real, _) = tiny(dropout=0.5).train(), example_texts()

    def drop(everywhere, in_branches):
        model.dropout.p = everywhere
        for block in model.blocks:
            block.dropout.p = in_branches

    drop(1.0, 0.0)
    assert not model.hidden(tokens, real).any()
    drop(0.0, 1.0)
    states = model.hidden(tokens, real)
    torch.testing.assert_close(states, model.norm(model.embed(tokens)))
    drop(1.0, 0.0)
    model.hidden = lambda *_: states
    torch.testing.assert_close(model(tokens, real), model.classifier.bias.expand(3, 2))


def test_exact_gelu_is_not_the_tanh_form():
    exact, tanh = (tiny(activation="gelu", exact_gelu=flag) for flag in (True, False))
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(exact.blocks[0].ffn(x), exact.blocks[0].ffn.down(F.gelu(exact.blocks[0].ffn.up(x))))
    assert (exact(example_texts()[0]) - tanh(example_texts()[0])).abs().max() > 1e-6


def test_every_parameter_of_the_objective_gets_a_gradient():
    model, (tokens, real, _) = tiny(), example_texts()
    model(tokens, real).square().sum().backward()
    silent = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"transform", "transform_norm", "token_bias"}
    model.zero_grad()
    model(tokens, real, targets=tokens, masked=real).sum().backward()
    silent = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"classifier"}


@LAYOUTS
def test_the_parameters_and_no_table_are_saved(changes, tmp_path):
    for model in (tiny(**changes), RewardEncoder(EncoderConfig(**TINY | changes))):
        model.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == dict(model.named_parameters()).keys()


def test_parameters_keep_their_order():
    """By it an optimizer's state is saved, and a new model's weights are drawn."""
    model = Encoder(EncoderConfig(**TINY_BERT))
    order = list(dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters()))
    inputs, heads = ["embed", "learned", "types", "embed_norm"], ["transform", "transform_norm", "classifier"]
    assert order == ["token_bias", *inputs, "blocks", "pooler", *heads]


def test_saved_and_opened_it_is_the_same(tmp_path):
    for i, model in enumerate([tiny(n_class=3), perturbed(Encoder(EncoderConfig(**TINY_BERT))), tiny(n_type=2)]):
        model.save_pretrained(tmp_path / str(i))
        again = Encoder.from_pretrained(tmp_path / str(i)).eval()
        assert again.config == model.config
        assert torch.equal(again(example_texts()[0]), model(example_texts()[0]))
    kinds = [
        json.loads((tmp_path / str(i) / "config.json").read_text(encoding="utf-8"))["model_type"] for i in range(3)
    ]
    assert kinds == ["attention_to_alignment_encoder", "bert", "attention_to_alignment_encoder"]
    with pytest.raises(CheckpointError, match="window is not supported in the encoder"):
        Encoder(EncoderConfig(**TINY, window=4))
    with pytest.raises(ValueError, match="21 tokens do not fit the encoder's context of 20"):
        tiny()(torch.zeros(1, 21, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------- the rows


def test_masked_tokens_are_fifteen_percent_of_which_eighty_ten_ten():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 1000, (400, 500), generator=generator)
    keep = tokens % 7 == 0
    hidden, chosen = mask_tokens(tokens, 3, 1000, keep, torch.Generator().manual_seed(1))
    assert not (chosen & keep).any()
    assert torch.equal(hidden[~chosen], tokens[~chosen])
    assert chosen[~keep].float().mean().item() == pytest.approx(0.15, abs=0.005)
    masked = hidden[chosen] == 3
    same = hidden[chosen] == tokens[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert same.float().mean().item() == pytest.approx(0.1, abs=0.01)
    other = hidden[chosen][~masked & ~same]
    assert other.float().mean().item() == pytest.approx(500, abs=20)  # any token, evenly
    again, _ = mask_tokens(tokens, 3, 1000, keep, torch.Generator().manual_seed(1))
    assert torch.equal(again, hidden)


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([r.text for r in generated("train")], 400, ("<|endoftext|>", MASK))


def test_what_stands_between_documents_is_never_masked(tokenizer):
    windows = np.full((8, 60), tokenizer.endoftext_id, dtype=np.int64)
    windows[:, ::2] = 300
    batch = encoder.masked_batch(windows, tokenizer, torch.Generator().manual_seed(0), 0.5)
    border = batch.targets == tokenizer.endoftext_id
    assert torch.equal(batch.tokens[border], batch.targets[border])
    assert not batch.masked[border].any()
    assert batch.masked[~border].any()


def test_a_text_keeps_its_beginning_and_its_end(tokenizer):
    text = "the cast is warm ."
    ids = encode(tokenizer, text, 50)
    assert ids[0] == tokenizer.endoftext_id
    assert tokenizer.decode(ids[1:]) == " " + text
    long = encode(tokenizer, text * 30, 1000)
    cut = encode(tokenizer, text * 30, 20)
    assert cut == long[:5] + long[-15:]
    assert encode(tokenizer, "", 20)[0] == tokenizer.endoftext_id
    assert tokenizer.special_ids[MASK] not in encode(tokenizer, f"a {MASK} b", 50)  # text becomes no special token


def test_predictions_keep_their_order_and_the_confusion_counts(tokenizer):
    torch.manual_seed(0)
    model = perturbed(Encoder(EncoderConfig(**TINY | dict(vocab_size=tokenizer.vocab_size, context=40, dropout=0.5))))
    reviews = generated("valid")[:30]
    examples = [(encode(tokenizer, r.text, 40), r.label) for r in reviews]
    pad = tokenizer.endoftext_id
    log_p = predict(model.train(), [ids for ids, _ in examples], pad, batch=7)
    assert model.training  # as it was, though it predicts without dropout
    model.eval()
    for i, (ids, _) in enumerate(examples):
        torch.testing.assert_close(log_p[i], model(torch.tensor([ids])).softmax(-1)[0].log(), atol=1e-5, rtol=1e-4)
    said, labels = log_p.argmax(-1).tolist(), [label for _, label in examples]
    result = judge_labels(model, examples, pad, ALONE)
    pairs = list(zip(labels, said, strict=True))
    assert result["confusion"] == [[pairs.count((i, j)) for j in (0, 1)] for i in (0, 1)]
    assert result["accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    expected = F.cross_entropy(log_p, torch.tensor(labels)).item()
    assert result["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_text_that_is_surely_wrong_has_a_loss():
    """p of its label is 0 in fp32, but log p is not −inf."""
    model = tiny()
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([120.0, 0.0])
    assert judge_labels(model, [([1, 2], 1), ([3], 0)], 0, ALONE)["loss"] == pytest.approx(60)


def test_a_model_that_has_diverged_predicts_nothing(tokenizer):
    model = tiny(vocab_size=tokenizer.vocab_size)
    torch.nn.init.constant_(model.classifier.weight, 3e38)
    with pytest.raises(DivergedError, match="probabilities are not finite"):
        predict(model, [[1, 2], [3]], 0)
    model = tiny()
    model.classifier.bias.data[0] = -torch.inf
    with pytest.raises(DivergedError, match="probabilities are not finite"):
        predict(model, [[1, 2], [3]], 0)


def test_pad_rows_and_loss():
    tokens, real = pad_rows([[4, 5, 6], [7]], 0)
    assert tokens.tolist() == [[4, 5, 6], [7, 0, 0]]
    assert real.tolist() == [[True] * 3, [True, False, False]]
    logits, labels = torch.tensor([[1.0, 3.0], [0.5, 0.0], [2.0, 2.5]]), torch.tensor([1, 1, 0])
    loss, figures = classification_loss(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert figures == {"loss": pytest.approx(loss.item()), "right": 1}
    torch.testing.assert_close(classification_loss(logits, labels, 6)[0], loss / 2)


def test_masked_lm_loss_is_torchs():
    logits, targets = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 6, 3, 3])
    logprobs = logits.log_softmax(-1)[torch.arange(5), targets]
    loss, figures = masked_lm_loss(logprobs)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    assert figures == {"loss": pytest.approx(loss.item())}
    torch.testing.assert_close(masked_lm_loss(logprobs, 10)[0], loss / 2)
    assert masked_lm_loss(logprobs[:0])[0] == 0


def test_noise_on_labelled_texts_spares_pads_and_borders(tokenizer):
    pad, mask_id = tokenizer.endoftext_id, tokenizer.special_ids[MASK]
    examples = [([pad, *range(300, 300 + n)], n % 2) for n in (1, 30, 7)]
    plain, noisy = (
        labelled_batch(examples, tokenizer, torch.Generator().manual_seed(0), share) for share in (0.0, 0.5)
    )
    assert torch.equal(plain.tokens, pad_rows([ids for ids, _ in examples], pad)[0])
    assert torch.equal(noisy.real, plain.real)
    assert noisy.labels.tolist() == [1, 0, 1]
    hidden = noisy.tokens != plain.tokens
    assert (noisy.tokens[hidden] == mask_id).all()
    assert not hidden[plain.tokens == pad].any()
    assert 10 < hidden.sum() < 28  # of 38


def test_micro_batches_hold_every_row_once_and_no_more_padding_than_they_need():
    lengths, rng = [5, 1, 3, 8, 2, 7, 4, 6], torch.Generator().manual_seed(0)
    tokens, real = pad_rows([torch.randint(1, 60, (n,), generator=rng).tolist() for n in lengths], 0)
    batch = TextBatch(tokens, real, tokens + 1, tokens % 2 == 0, labels=torch.tensor(lengths))
    for world in (1, 2):
        dealt = [batch.micro_batches(3, Dist(rank, world, torch.device("cpu"))) for rank in range(world)]
        assert [len(pieces) for pieces in dealt] == [3] if world == 1 else [2, 2]
        for rank, pieces in enumerate(dealt):
            own = lengths[rank * 8 // world : (rank + 1) * 8 // world]
            assert [n for x in pieces for n in x.labels.tolist()] == sorted(own)
            for x in pieces:
                assert x.tokens.shape == x.masked.shape == (len(x.labels), x.labels.max())
                assert x.real.sum(1).tolist() == x.labels.tolist()
                assert torch.equal(x.targets, x.tokens + 1)
                for row, n in zip(x.tokens, x.labels.tolist(), strict=True):
                    assert torch.equal(row[:n], tokens[lengths.index(n), :n])


# --------------------------------------------------------------------------------------------------------- the stage

SMALL = dict(mlm_steps=4, mlm_batch=6, steps=4, batch=6, micro_batch=6, warmup=1, eval_every=2, save_every=3)
SMALL |= dict(vocab_size=300, device="cpu")


MODEL = dict(context=32, n_layer=1, n_head=2, n_kv_head=1, width=16)


def small(**changes):
    model = EncoderConfig(**MODEL, dropout=changes.pop("dropout", 0.1))
    settings = SMALL | dict(model=model) | changes
    if not settings["mlm_steps"]:
        settings.pop("mlm_batch")  # of no use, and refused
    return Config(**settings)


def refused(capsys, *flags):
    """The last line on stderr of a run that ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        run_script(encoder.main, Config, parse=lambda: parse_config(Config, ["--device=cpu", *flags]))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Runs in this process read less, what is generated is so once, and draw no picture."""

    def load(name, split, *more):
        return generated(split) if name == "sentiment" else load_reviews(name, split, *more)[:60]

    monkeypatch.setattr(encoder_start, "load_reviews", load)
    monkeypatch.setattr(encoder_report, "draw_curves", lambda *args: None)


def test_a_run_leaves_what_it_should(scratch, capsys, monkeypatch):
    monkeypatch.setattr(encoder_report, "draw_curves", draw_curves)
    result = encoder.main(small())
    said, bar = capsys.readouterr()
    assert "taken for positive" in said
    assert "bag of words" in said
    assert "best=" in bar
    assert "best=0.0%" not in bar  # while none is measured
    state = torch.load(scratch / "runs/encoder/last/trainer_state.pt", weights_only=True)
    assert state["reads"].keys() == {f"the {split} split of --data sentiment" for split in ("train", "valid", "test")}
    run = scratch / "runs" / "encoder"
    for name in ("best", "last", "metrics.jsonl", "samples.md", "curves.png", "tensorboard"):
        assert (run / name).exists(), name
    assert list(metrics(run, "mlm_loss")) == [1, 2, 3, 4]
    assert list(metrics(run, "mlm_valid_loss")) == [2, 4]
    assert list(metrics(run, "loss")) == [5, 6, 7, 8]
    accuracy = metrics(run, "accuracy")
    assert list(accuracy) == [6, 8]
    best, tokenizer, _ = open_encoder(Encoder, result["path"])
    if accuracy[8] <= accuracy[6]:  # the first of the best is kept
        assert not torch.equal(best.embed.weight, Encoder.from_pretrained(run / "last").embed.weight)
    test = encoder_start.load_reviews("sentiment", "test")
    examples = [(encode(tokenizer, r.text, 32), r.label) for r in test]
    assert judge_labels(best, examples, tokenizer.endoftext_id, ALONE)["confusion"] == result["confusion"]
    assert np.sum(result["confusion"]) == len(test)
    mistakes = (run / "samples.md").read_text(encoding="utf-8")
    assert mistakes.count("%, but it is ") == min(20, len(test) - np.trace(result["confusion"]))
    encoder.main(small(resume=True))
    assert (run / "samples.md").read_text(encoding="utf-8") == mistakes  # once, however often the end is resumed


def test_a_batch_without_masked_tokens_costs_nothing(scratch):
    encoder.main(small(mlm_rate=1e-9))
    assert set(metrics("runs/encoder", "mlm_loss").values()) == {0.0}


def test_every_step_masks_its_own_tokens(scratch, calls_of):
    made = calls_of(encoder, "mask_tokens")
    encoder.main(small(eval_every=100))
    masks = [call.result[1].numpy().tobytes() for call in made]
    assert len(set(masks)) == len(masks) == 5  # four steps and one validation


def test_another_seed_masks_by_other_random_numbers(scratch, monkeypatch):
    """Not only other words: what `mask_tokens` is about to draw."""
    drawn, whole = [], encoder.mask_tokens

    def look_ahead(*args):
        ahead = torch.Generator()
        ahead.set_state(args[4].get_state())
        drawn.append(tuple(torch.rand(4, generator=ahead).tolist()))
        return whole(*args)

    monkeypatch.setattr(encoder, "mask_tokens", look_ahead)
    for seed in (0, 1):
        encoder.main(small(name=f"seed{seed}", seed=seed, eval_every=100))
    assert len(set(drawn[1:5] + drawn[6:])) == 8  # after the validation of each, four steps


def test_the_second_objective_starts_with_a_new_optimizer(scratch, calls_of):
    made = calls_of(encoder, "make_optimizers")
    encoder.main(small(name="both"))
    assert len(made) == 2
    encoder.main(small(name="labels", mlm_steps=0))
    assert len(made) == 4  # at step 0, where it makes no difference


def test_each_objective_has_its_own_rate_and_moments(scratch, steps_of):
    seen = steps_of(encoder)
    encoder.main(small(mlm_lr=5e-3, lr=3e-3, clip=0.7, weight_decay=0.2))
    rates = [lr_at(i, 4, peak, SMALL["warmup"]) for peak in (5e-3, 3e-3) for i in range(4)]
    assert [step.lr for step in seen] == pytest.approx(rates)
    assert {step.clip for step in seen} == {0.7}
    assert [step.new for step in seen] == [True, False, False, False] * 2
    assert all(step.decays == {0.0, 0.2} for step in seen)


def test_the_share_of_tokens_that_is_hidden_from_the_classifier(scratch, calls_of):
    made = calls_of(encoder, "labelled_batch")
    encoder.main(small(mlm_steps=0, steps=1, token_dropout=0.25))
    assert {call.args[3] for call in made} == {0.25}


@pytest.mark.parametrize("stop", [3, 4, 6], ids=["while pretraining", "between", "while classifying"])
def test_resume_is_the_uninterrupted_run_bit_for_bit(scratch, stop):
    assert_resumed_equals_whole(encoder, small, stop, ("mlm_loss", "loss", "accuracy"))


def test_micro_batches_change_nothing(scratch):
    for size in (6, 4, 1):
        encoder.main(small(name=f"cut{size}", micro_batch=size, dropout=0.0))
    for size in (4, 1):
        assert_same_weights("runs/cut6/last", f"runs/cut{size}/last", atol=2e-5, rtol=1e-4)
        assert_same_metrics("runs/cut6", f"runs/cut{size}", ("mlm_loss", "loss", "train_accuracy"), rel=1e-3)


def test_two_processes_are_one(scratch, scaled, capsys):
    reviews = [r for split in ("train", "valid", "test") for r in generated(split)]
    text = "".join(json.dumps({"text": r.text, "label": r.label}) + "\n" for r in reviews)
    Path("own.jsonl").write_text(text, encoding="utf-8")
    settings = SMALL | dict(data="own.jsonl", eval_every=4)
    scaled("encoder")  # in one process; it changes nothing
    encoder.main(small(**settings, name="world1", dropout=0.0))
    flags = [f"--{k}={v}" for k, v in settings.items()]
    flags += [f"--model.{k}={v}" for k, v in MODEL.items()] + ["--model.dropout=0", "--name=world2"]
    process = script("encoder.py", *flags, cwd=scratch, processes=2)
    assert process.returncode == 0, process.stderr
    for out in (capsys.readouterr().out, process.stdout):
        assert "test accuracy" in out
    assert_same_weights("runs/world1/last", "runs/world2/last", atol=2e-5, rtol=1e-4)
    assert_ranks_draw_apart("runs/world2")
    names = ("mlm_loss", "mlm_valid_loss", "loss", "accuracy")
    assert_same_metrics("runs/world1", "runs/world2", names, rel=1e-4)
    assert_same_metrics("runs/world1", "runs/world2", ("valid_loss", "train_accuracy", "grad_norm"), rel=1e-2)


def test_more_processes_than_validation_windows(scratch, monkeypatch):
    """Rank 1 of two has no window of a stream that holds one; it counts nothing, instead of falling over."""
    windows = validation_windows(np.arange(20, dtype=np.uint16), 16)
    assert windows.shape == (1, 16)
    tokens, chosen = torch.from_numpy(windows), torch.arange(16)[None] % 3 == 0
    batch = TextBatch(torch.where(chosen, 1, tokens), torch.ones_like(chosen), tokens, chosen)
    monkeypatch.setattr(Dist, "sum", lambda self, *values: values)
    one, first, second = (
        validate_mlm(tiny(), batch, Dist(rank, world, torch.device("cpu"))) for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    assert (first, second) == (one, 0.0)
    model = tiny()
    logits = model.token_logits(model.hidden(batch.tokens))[chosen]  # (6, V)
    assert one == pytest.approx(F.cross_entropy(logits, tokens[chosen]).item(), rel=1e-5)


def test_a_mistaken_model_moves_no_earlier_run(scratch, capsys):
    (scratch / "runs/encoder").mkdir(parents=True)
    (scratch / "runs/encoder/metrics.jsonl").write_text("{}\n", encoding="utf-8")
    for flag, words in [
        ("vocab_size=100", "vocab_size is 100"),
        ("model.window=4", "window is not supported"),
        ("model.tie_embeddings=false", "tie_embeddings is false"),
        ("seed=4294967296", "seed is 4294967296"),
        ("model.context=900000", "smaller --model.context"),
        ("model.pooler=true", "--model.pooler has no effect"),
    ]:
        assert words in refused(capsys, f"--{flag}"), flag
    assert {path.name for path in (scratch / "runs").iterdir()} <= {"encoder", "streams"}


def test_flags_that_a_new_model_would_ignore_are_refused():
    check_new(EncoderConfig(n_layer=2, dropout=0.3, embed_norm=True, activation="gelu", exact_gelu=True))
    for words, changes in [
        ("--model.vocab_size is the tokenizer's", dict(vocab_size=600)),
        ("--model.n_class is 3; it must be 2", dict(n_class=3)),
        ("--model.positions none: without positions", dict(positions="none")),
        ("--model.rope_theta has no effect", dict(positions="learned", rope_theta=500.0)),
        *((f"--model.{name} has no effect", {name: value}) for name, value in NO_EFFECT.items()),
    ]:
        with pytest.raises(ConfigError, match=words):
            check_new(EncoderConfig(**changes))


NO_EFFECT = dict(n_expert_active=1, expert_width=8, n_shared_expert=1, moe_every=2, norm_topk_prob=False)
NO_EFFECT |= dict(routed_scale=2.0, balancing="bias", capacity_factor=1.5, n_type=2, pooler=True)


def test_masked_lm_that_is_skipped_has_no_flags_and_no_batch_to_share():
    for flag in (dict(mlm_batch=16), dict(mlm_lr=1e-3), dict(mlm_rate=0.3)):
        with pytest.raises(ConfigError, match=f"--{next(iter(flag))} is for masked-LM, which --mlm_steps 0 skips"):
            Config(mlm_steps=0, **flag)
    with pytest.raises(ConfigError, match="--text is for masked-LM and a new tokenizer"):
        Config(mlm_steps=0, init="start", text=["imdb"])
    alone = Config(mlm_steps=0, text=["imdb"], batch=6)  # the new tokenizer is trained on the text
    encoder_start.check_sizes(alone, Dist(0, 3, torch.device("cpu")))  # 32 windows would not do


def test_a_start_without_positions_or_with_one_score_is_refused(scratch):
    tokenizer = BPETokenizer.train(["a few words"], 258, ("<|endoftext|>", MASK))
    sizes = MODEL | dict(vocab_size=tokenizer.vocab_size)
    for model, words in [
        (Encoder(EncoderConfig(**sizes, positions="none")), "start: without positions"),
        (Transformer(TransformerConfig(**sizes, positions="none")), "start: without positions"),
        (RewardEncoder(EncoderConfig(**sizes)), "start gives a text one number"),
    ]:
        model.save_pretrained("start")
        tokenizer.save_pretrained("start")
        with pytest.raises(ConfigError, match=words):
            encoder.main(small(init="start"))
        assert not Path("runs").exists()


def test_a_later_run_starts_from_a_checkpoint(scratch):
    encoder.main(small(name="first"))
    result = encoder.main(small(name="second", init="runs/first", mlm_steps=0, steps=1, lr=1e-9, data="sentiment"))
    assert_same_weights("runs/first/best", "runs/second/last", atol=1e-6, rtol=1e-6)
    assert set(result) == {"accuracy", "baseline", "confusion", "path"}


@pytest.mark.parametrize(
    ("positions", "placement"),
    [("rope", "pre"), ("learned", "sandwich"), ("rope", "post"), ("sinusoidal", "pre"), ("none", "pre")],
)
def test_a_decoder_becomes_an_encoder_by_losing_its_mask(positions, placement):
    torch.manual_seed(0)
    sizes = dict(context=16, n_layer=2, n_head=4, n_kv_head=2, width=16, positions=positions, norm_eps=1e-5)
    sizes |= dict(norm_placement=placement)
    decoder = Transformer(TransformerConfig(40, rope_theta=500.0, qkv_bias=True, **sizes)).eval()
    perturbed(decoder)
    both = Encoder.from_trunk(decoder, seed=1).eval()
    tokens = torch.randint(40, (3, 9))
    everything = torch.ones(3, 9, 9, dtype=torch.bool)
    logits = torch.nn.functional.linear(both.hidden(tokens), decoder.embed.weight)
    torch.testing.assert_close(logits, decoder(tokens, mask=everything), atol=1e-5, rtol=1e-5)
    assert (logits - decoder(tokens)).abs().max() > 0.1  # with its mask it says something else
    again, other = (Encoder.from_trunk(decoder, seed=n).classifier.weight for n in (1, 2))
    assert torch.equal(both.classifier.weight, again)
    assert not torch.equal(again, other)
    another = Encoder.from_trunk(both, seed=2)  # the labels of another task: its head does not come along
    assert torch.equal(another.classifier.weight, other)
    assert torch.equal(another.token_bias, both.token_bias)


def test_a_run_starts_from_a_decoder(scratch):
    tokenizer = BPETokenizer.train([r.text for r in generated("train")], 300)
    torch.manual_seed(0)
    sizes = TransformerConfig(tokenizer.vocab_size, context=48, n_layer=1, n_head=2, n_kv_head=1, width=16)
    decoder = Transformer(sizes)
    decoder.save_pretrained("decoder")
    tokenizer.save_pretrained("decoder")
    given = dict(init="decoder", model=EncoderConfig(context=32))
    with pytest.raises(ConfigError, match=re.escape(f"has no {MASK}")):
        encoder.main(small(**given))
    given |= dict(mlm_steps=0, token_dropout=0.0, steps=1, lr=1e-9)
    for flag, value, has in [("n_layer", 2, 1), ("context", 64, 48), ("embed_norm", True, False)]:
        ignored = given | {"model": EncoderConfig(**{flag: value})}
        with pytest.raises(ConfigError, match=f"--model.{flag} {value} has no effect .* whose {flag} is {has}"):
            encoder.main(small(**ignored))
    assert not Path("runs").exists()
    result = encoder.main(small(**given))
    trained, _, _ = open_encoder(Encoder, result["path"])
    assert trained.config.context == 32  # of the two the shorter
    new = [make_encoder(Encoder, small(**given, seed=seed, name="x"), None, {}, MASK)[0] for seed in (0, 1, 1)]
    assert not torch.equal(new[0].classifier.weight, new[1].classifier.weight)
    assert torch.equal(new[1].classifier.weight, new[2].classifier.weight)
    for name, weight in decoder.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_rows_that_cannot_be_read_are_left_out_if_asked(scratch, capsys):
    rows = [f"It was {('bad', 'good')[i % 2]} {i},{i % 2}" for i in range(200)]
    Path("own.csv").write_text("\n".join(["text,label", *rows, "It was"]), encoding="utf-8")
    with pytest.raises(DataError, match="record 201"):
        encoder.main(small(data="own.csv"))
    with pytest.raises(ConfigError, match="--skip_bad has no effect with --data sentiment, which is generated"):
        small(data="sentiment", skip_bad=True)
    assert small(data="sentiment", text=["own.csv"], skip_bad=True).skip_bad  # this file may have some
    encoder.main(small(data="own.csv", text=["own.csv"], skip_bad=True))
    assert capsys.readouterr().out.count("own.csv: skipped 1 records") == 4


def test_bad_input_is_one_line(scratch, monkeypatch, capsys):
    assert_one_line_error(script("encoder.py", "--mlm_rate=1", cwd=scratch), "mlm_rate is 1.0; it must be above 0 and")
    for flag, words in [
        ("steps=0", "steps is 0"),
        ("mlm_rate=1", "mlm_rate is 1.0; it must be above 0 and below 1"),
        ("token_dropout=1", "token_dropout is 1.0; it must be at least 0 and below 1"),
        ("data=nothing.csv", "no such file"),
        ("model.norm=batch", "norm 'batch' is not known"),
        ("model.n_class=1", "n_class is 1"),
    ]:
        assert words in refused(capsys, f"--{flag}"), flag
    with pytest.raises(ConfigError, match="mlm_lr is -1"):
        small(mlm_lr=-1.0)
    with pytest.raises(CheckpointError, match="tie_embeddings is false"):
        Encoder(EncoderConfig(40, n_layer=1, n_head=2, n_kv_head=1, width=16, tie_embeddings=False))
    monkeypatch.setattr(encoder, "setup", lambda device: Dist(0, 4, torch.device("cpu")))
    with pytest.raises(ConfigError, match="cannot be shared by 4 processes"):
        encoder.main(small())


def test_it_learns_what_no_bag_of_words_can(scratch, monkeypatch):
    """Order is all that tells these apart, and there is room for 20 points above chance in seconds."""
    train = [Review(f"{a} not {b}", int(a == "good")) for a, b in (("good", "bad"), ("bad", "good"))] * 40
    monkeypatch.setattr(encoder_start, "load_reviews", lambda name, split, skip_bad: train)
    model = EncoderConfig(context=16, n_layer=1, n_head=2, n_kv_head=2, width=32)
    result = encoder.main(small(mlm_steps=0, steps=60, batch=16, micro_batch=16, eval_every=20, model=model))
    assert result["baseline"] == 0.5
    assert result["accuracy"] == 1
