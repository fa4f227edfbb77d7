"""encoder.py: BERT's own numbers, what may see what, the holes, the baseline, and the guarantees of a run."""

import json
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, assert_same_weights, metrics, script
from safetensors.torch import load_file, save_file

import encoder
from data import Review, load_sentiment
from encoder import (
    MASK,
    Config,
    Encoder,
    EncoderConfig,
    bag_of_words,
    bert_config,
    classification_loss,
    collate,
    confusion_table,
    encode,
    evaluate,
    hide,
    mean_pool,
    open_encoder,
    predict,
)
from support.devices import Dist
from support.errors import CheckpointError, ConfigError
from support.hf import to_layout
from support.hf_bert import BERT, OWN, is_bert
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig

ALONE = Dist(0, 1, torch.device("cpu"))
TINY = dict(vocab_size=61, context=20, n_layer=3, n_head=4, n_kv_head=2, width=24)
BERT_SIZES = TINY | dict(n_kv_head=4, ffn_width=40)


def shaken(model, seed=1):
    """Gains, biases and heads that are not where they started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def tiny(**changes):
    torch.manual_seed(0)
    return shaken(Encoder(EncoderConfig(**TINY | changes)))


def rows(seed=2):
    """Three texts of 11, 7 and 1 tokens, with types: tokens, real, types (3, 11)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (3, 11), generator=generator)
    return (
        tokens,
        torch.arange(11) < torch.tensor([[11], [7], [1]]),
        torch.arange(11) // 4 % 2 * torch.ones(3, 1).long(),
    )


# --------------------------------------------------------------------------------------------------------- BERT


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
    config = transformers.BertConfig(**sizes, max_position_embeddings=20, attn_implementation="eager")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    theirs, path = shaken(transformers.BertForPreTraining(config)), tmp_path_factory.mktemp("bert")
    theirs.save_pretrained(path)
    return theirs, path


def test_states_logits_pool_and_gradients_are_berts(bert):
    theirs, path = bert
    ours = Encoder.from_pretrained(path)
    tokens, real, types = rows()
    out = theirs(tokens, attention_mask=real.long(), token_type_ids=types, output_hidden_states=True)
    x = ours.hidden(tokens, real, types)
    logits = ours.token_logits(x)
    torch.testing.assert_close(x[real], out.hidden_states[-1][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[real], out.prediction_logits[real], atol=1e-4, rtol=1e-5)
    pooled = theirs.bert(tokens, attention_mask=real.long(), token_type_ids=types).pooler_output
    torch.testing.assert_close(ours.pooled(x), pooled, atol=1e-5, rtol=1e-5)
    up = torch.randn(logits[real].shape, generator=torch.Generator().manual_seed(3))
    theirs.zero_grad()
    (logits[real] * up).sum().backward()
    (out.prediction_logits[real] * up).sum().backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    compared = 0
    for name, p in to_layout(dict(ours.named_parameters()), BERT.names).items():
        if not name.startswith(("bert.pooler", "mean_classifier")):
            torch.testing.assert_close(p.grad, their_grads[name], atol=1e-3, rtol=1e-4, msg=name)
            compared += 1
    assert compared == 5 + 16 * 3 + 5


def test_saved_again_the_weights_are_byte_equal_and_bert_opens_them(bert, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, path = bert
    ours = Encoder.from_pretrained(path)
    ours.save_pretrained(tmp_path)
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {n for n in before if "seq_relationship" not in n} <= set(after)
    assert set(after) - set(before) == {"mean_classifier.weight", "mean_classifier.bias"}
    assert all(torch.equal(after[n], before[n]) for n in before.keys() & after.keys())
    tokens, real, types = rows()
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval().double()
    logits = again(tokens, attention_mask=real.long(), token_type_ids=types).logits
    double = Encoder.from_pretrained(path).eval().double()  # so that nothing but the formulas could differ
    torch.testing.assert_close(double.token_logits(double.hidden(tokens, real, types))[real], logits[real])
    assert torch.equal(Encoder.from_pretrained(tmp_path).classifier.weight, ours.classifier.weight)


def test_an_output_matrix_of_its_own_is_not_dropped(bert, tmp_path):
    shutil.copytree(bert[1], tmp_path / "untied")
    file = tmp_path / "untied" / "model.safetensors"
    tensors = load_file(file)
    words = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors | {"cls.predictions.decoder.weight": words.clone()}, file, {"format": "pt"})
    Encoder.from_pretrained(tmp_path / "untied")
    save_file(tensors | {"cls.predictions.decoder.weight": words + 1}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.weight is not the embedding"):
        Encoder.from_pretrained(tmp_path / "untied")


def test_the_bare_model_and_the_old_names_open_with_new_heads(bert, tmp_path):
    theirs, path = bert
    theirs.bert.save_pretrained(tmp_path / "bare")
    whole, bare = Encoder.from_pretrained(path), Encoder.from_pretrained(tmp_path / "bare")
    tokens, real, types = rows()
    assert torch.equal(whole.hidden(tokens, real, types), bare.hidden(tokens, real, types))
    assert (bare.token_bias == 0).all()
    (tmp_path / "old").mkdir()
    tensors = load_file(path / "model.safetensors")
    tensors = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in tensors.items()}
    save_file(tensors, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "old" / "config.json").write_text((path / "config.json").read_text())
    assert torch.equal(Encoder.from_pretrained(tmp_path / "old").hidden(tokens, real, types), whole.hidden(*rows()))
    pooled = {"classifier.weight": torch.full((2, 24), 7.0), "classifier.bias": torch.full((2,), 3.0)}
    save_file(tensors | pooled, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    assert Encoder.from_pretrained(tmp_path / "old").classifier.weight.abs().max() < 7  # reads the pooler: not ours


def test_what_berts_table_does_not_declare_is_not_saved_as_bert(tmp_path):
    """A field, even at a value that changes nothing, or a tensor."""
    assert sorted([*BERT.keys, *BERT.means, *BERT.no_matter]) == sorted(f.name for f in fields(EncoderConfig))
    assert is_bert(bert_config())
    assert not is_bert(bert_config(n_kv_head=4))
    assert not is_bert(bert_config(positions="sinusoidal"))

    @dataclass
    class GatedConfig(EncoderConfig):
        gate: bool = False

    class Gated(Encoder):
        config_class = GatedConfig

    model = Encoder(bert_config(**BERT_SIZES))
    gated = Gated(GatedConfig(**asdict(model.config)))
    model.blocks[1].attn.gate = torch.nn.Linear(24, 24)
    for name, ours in (("tensor", model), ("field", gated)):
        ours.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == OWN
    assert Gated.from_pretrained(tmp_path / "field").config == gated.config
    with pytest.raises(CheckpointError, match=r"gate = False is no field of EncoderConfig$"):
        Encoder.from_pretrained(tmp_path / "field")
    with pytest.raises(CheckpointError, match=r"hold 'blocks\.1\.attn\.gate\.bias'"):
        Encoder.from_pretrained(tmp_path / "tensor")


def test_bad_checkpoints_are_one_line(bert, tmp_path):
    _, path = bert
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")

    def opened(changes=None, drop=(), **more):
        (tmp_path / "config.json").write_text(json.dumps(config | (changes or {})))
        kept = {n: t for n, t in tensors.items() if n not in drop} | more
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return Encoder.from_pretrained(tmp_path)

    opened()
    query = "bert.encoder.layer.1.attention.self.query.weight"
    for word, arguments in [
        ("hidden_act = 'relu' is not supported", ({"hidden_act": "relu"},)),
        ("model_type 'roberta' is no encoder", ({"model_type": "roberta"},)),
        ("lack 'blocks.1.attn.wq.weight'", ({}, (query,))),
        (r"embed.weight has shape \(61, 24\), its config.json asks for \(62, 24\)", ({"vocab_size": 62},)),
        ("width 24 is not a multiple of n_head 5", ({"num_attention_heads": 5},)),
    ]:
        with pytest.raises(CheckpointError, match=word):
            opened(*arguments)
    with pytest.raises(CheckpointError, match=r"hold 'qa_outputs\.weight'"):
        opened(**{"qa_outputs.weight": torch.zeros(2, 24)})
    for changes, word in [({"n_class": 0}, "n_class is 0"), ({"n_type": -1}, "n_type is -1")]:
        with pytest.raises(CheckpointError, match=word):
            EncoderConfig(**changes)
    with pytest.raises(CheckpointError, match="exact_gelu is a form of gelu"):
        EncoderConfig(exact_gelu=True)
    with pytest.raises(CheckpointError, match="no config"):
        Encoder.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="corrupt or unreadable"):
        Encoder.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------- the model

LAYOUTS = pytest.mark.parametrize(
    "changes",
    [{}, dict(norm_placement="sandwich"), dict(positions="sinusoidal"), dict(positions="learned", activation="gelu")],
    ids=["default", "sandwich", "sinusoidal", "learned"],
)


@LAYOUTS
def test_a_text_does_not_depend_on_what_stands_beside_it(changes):
    model = tiny(**changes)
    tokens, real, _ = rows()
    together = model(tokens, real)
    for i, row in enumerate(tokens):
        torch.testing.assert_close(model(row[None, real[i]])[0], together[i], atol=1e-5, rtol=1e-4)
    other = torch.where(real, tokens, tokens.roll(1, 0) + 1).remainder(61)
    torch.testing.assert_close(model(other, real), together, atol=1e-6, rtol=1e-6)


def test_every_token_sees_every_other():
    model, (tokens, _, _) = tiny(), rows()
    changed = tokens.clone()
    for t in range(11):
        changed[:, t] = (tokens[:, t] + 1) % 61
        moved = (model.hidden(changed) - model.hidden(tokens)).abs().amax((0, 2))
        assert (moved > 1e-4).all(), t
        changed[:, t] = tokens[:, t]


def test_order_counts():
    model, (tokens, _, _) = tiny(), rows()
    assert (model(tokens) - model(tokens.flip(1))).abs().max() > 1e-3


def test_mean_pool_is_the_mean_over_real_tokens():
    x, (_, real, _) = torch.randn(3, 11, 4), rows()
    expected = torch.stack([x[i, :n].mean(0) for i, n in enumerate((11, 7, 1))])
    torch.testing.assert_close(mean_pool(x, real), expected)
    torch.testing.assert_close(mean_pool(x), x.mean(1))


def test_masked_lm_scores_the_chosen_places_alone():
    model, (tokens, real, _) = tiny(), rows()
    chosen = torch.zeros_like(real)
    chosen[0, 3] = chosen[0, 9] = chosen[1, 0] = True
    logprobs = model(tokens, real, targets=tokens.roll(1, 1), chosen=chosen)
    full = model.token_logits(model.hidden(tokens, real)).log_softmax(-1)
    expected = [full[b, t, tokens.roll(1, 1)[b, t]] for b, t in ((0, 3), (0, 9), (1, 0))]
    torch.testing.assert_close(logprobs, torch.stack(expected))
    assert model(tokens, real, targets=tokens, chosen=torch.zeros_like(real)).shape == (0,)


def test_exact_gelu_is_not_the_tanh_form():
    exact, tanh = (tiny(activation="gelu", exact_gelu=flag) for flag in (True, False))
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(exact.blocks[0].ffn(x), exact.blocks[0].ffn.down(F.gelu(exact.blocks[0].ffn.up(x))))
    assert (exact(rows()[0]) - tanh(rows()[0])).abs().max() > 1e-6


def test_every_parameter_of_the_objective_gets_a_gradient():
    model, (tokens, real, _) = tiny(), rows()
    model(tokens, real).square().sum().backward()
    silent = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"transform", "transform_norm", "token_bias"}
    model.zero_grad()
    model(tokens, real, targets=tokens, chosen=real).sum().backward()
    silent = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"classifier"}


def test_saved_and_opened_it_is_the_same(tmp_path):
    for i, model in enumerate([tiny(n_class=3), shaken(Encoder(bert_config(**BERT_SIZES))), tiny(n_type=2)]):
        model.save_pretrained(tmp_path / str(i))
        again = Encoder.from_pretrained(tmp_path / str(i)).eval()
        assert again.config == model.config
        assert torch.equal(again(rows()[0]), model(rows()[0]))
    kinds = [json.loads((tmp_path / str(i) / "config.json").read_text())["model_type"] for i in range(3)]
    assert kinds == ["attention_to_alignment_encoder", "bert", "attention_to_alignment_encoder"]
    with pytest.raises(CheckpointError, match="window is for decoders"):
        Encoder(EncoderConfig(**TINY, window=4))
    with pytest.raises(ValueError, match="21 tokens do not fit the encoder's context of 20"):
        tiny()(torch.zeros(1, 21, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------- the rows


def test_holes_are_fifteen_percent_of_which_eighty_ten_ten():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 1000, (400, 500), generator=generator)
    keep = tokens % 7 == 0
    hidden, chosen = hide(tokens, 3, 1000, keep, torch.Generator().manual_seed(1))
    assert not (chosen & keep).any()
    assert torch.equal(hidden[~chosen], tokens[~chosen])
    assert chosen[~keep].float().mean().item() == pytest.approx(0.15, abs=0.005)
    masked = hidden[chosen] == 3
    same = hidden[chosen] == tokens[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert same.float().mean().item() == pytest.approx(0.1, abs=0.01)
    other = hidden[chosen][~masked & ~same]
    assert other.float().mean().item() == pytest.approx(500, abs=20)  # any token, evenly
    again, _ = hide(tokens, 3, 1000, keep, torch.Generator().manual_seed(1))
    assert torch.equal(again, hidden)


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([r.text for r in load_sentiment()[:300]], 400, ("<|endoftext|>", MASK))


def test_a_text_keeps_its_beginning_and_its_end(tokenizer):
    text = "the cast is warm ."
    ids = encode(tokenizer, text, 50)
    assert ids[0] == tokenizer.endoftext_id
    assert tokenizer.decode(ids[1:]) == " " + text
    long = encode(tokenizer, text * 30, 1000)
    cut = encode(tokenizer, text * 30, 20)
    assert cut == long[:5] + long[-15:]
    assert encode(tokenizer, "", 20)[0] == tokenizer.endoftext_id
    assert MASK not in tokenizer.decode(encode(tokenizer, f"a {MASK} b", 50)[:1])  # text never becomes a special token
    assert tokenizer.special_ids[MASK] not in encode(tokenizer, f"a {MASK} b", 50)


def test_predictions_keep_their_order_and_the_confusion_counts(tokenizer):
    torch.manual_seed(0)
    model = shaken(Encoder(EncoderConfig(**TINY | dict(vocab_size=tokenizer.vocab_size, context=40, dropout=0.5))))
    reviews = load_sentiment("sentiment", "valid")[:30]
    examples = [(encode(tokenizer, r.text, 40), r.label) for r in reviews]
    pad = tokenizer.endoftext_id
    p = predict(model.train(), [ids for ids, _ in examples], pad, batch=7)
    assert model.training  # as it was, though it predicts without dropout
    model.eval()
    for i, (ids, _) in enumerate(examples):
        torch.testing.assert_close(p[i], model(torch.tensor([ids])).softmax(-1)[0], atol=1e-5, rtol=1e-4)
    said, labels = p.argmax(-1).tolist(), [label for _, label in examples]
    result = evaluate(model, examples, pad, ALONE)
    pairs = list(zip(labels, said, strict=True))
    assert result["confusion"] == [[pairs.count((i, j)) for j in (0, 1)] for i in (0, 1)]
    assert result["accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    expected = F.cross_entropy(p.log(), torch.tensor(labels)).item()
    assert result["loss"] == pytest.approx(expected, rel=1e-4)
    table = confusion_table([[5, 2], [1, 7]]).splitlines()
    assert table[1].split() == ["negative", "5", "2"]
    assert table[2].split() == ["positive", "1", "7"]


def test_collate_and_loss():
    tokens, real = collate([[4, 5, 6], [7]], 0)
    assert tokens.tolist() == [[4, 5, 6], [7, 0, 0]]
    assert real.tolist() == [[True] * 3, [True, False, False]]
    logits, labels = torch.tensor([[1.0, 3.0], [0.5, 0.0], [2.0, 2.5]]), torch.tensor([1, 1, 0])
    loss, figures = classification_loss(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert figures == {"loss": pytest.approx(loss.item()), "right": 1}
    torch.testing.assert_close(classification_loss(logits, labels, 6)[0], loss / 2)


# ----------------------------------------------------------------------------------------------------- the baseline


def test_bag_of_words_is_the_minimum_of_its_objective():
    train, valid, test = (load_sentiment("sentiment", split)[:200] for split in ("train", "valid", "test"))
    found = bag_of_words(train, valid, test, strengths=(1e-2,))
    words = sorted(found["weights"])
    X = np.array([[word in r.text.split() for word in words] for r in train], dtype=float)
    y = np.array([r.label for r in train], dtype=float)
    w, b = np.zeros(len(words)), 0.0  # Newton's method, written out
    for _ in range(30):
        p = 1 / (1 + np.exp(-(X @ w + b)))
        Z = np.hstack([X, np.ones((len(X), 1))])
        gradient = Z.T @ (p - y) / len(X) + 1e-2 * np.append(w, 0)
        hessian = Z.T @ (Z * (p * (1 - p))[:, None]) / len(X) + 1e-2 * np.diag(np.append(np.ones(len(words)), 0))
        step = np.linalg.solve(hessian, gradient)
        w, b = w - step[:-1], b - step[-1]
    np.testing.assert_allclose([found["weights"][word] for word in words], w, atol=1e-3)
    for part, name in ((valid, "valid"), (test, "accuracy")):
        T = np.array([[word in r.text.split() for word in words] for r in part], dtype=float)
        assert found[name] == pytest.approx(np.mean((T @ w + b > 0) == [r.label == 1 for r in part]), abs=0.011)


def test_bag_of_words_knows_words_and_not_their_order():
    easy = [Review("a good film", 1), Review("a bad film", 0)] * 4
    assert bag_of_words(easy, easy, [Review("good unseen", 1), Review("unseen, bad!", 0)])["accuracy"] == 1
    order = [Review("good not bad", 1), Review("bad not good", 0)] * 4
    assert bag_of_words(order, order, order)["accuracy"] == 0.5
    assert bag_of_words(easy, easy, easy, strengths=(1e-4, 1e-3))["strength"] == 1e-3  # a tie: the stiffer one
    mostly = [*easy, *[Review("a bad film", 0)] * 8]  # so stiff that only the majority counts, or not
    found = bag_of_words(mostly, mostly, [Review("a good film", 0)] * 4, strengths=(100.0, 1e-3))
    assert (found["strength"], found["valid"], found["accuracy"]) == (1e-3, 1.0, 0.0)  # chosen on validation, not test


# --------------------------------------------------------------------------------------------------------- the stage

SMALL = dict(mlm_steps=4, mlm_batch=6, steps=4, batch=6, micro_batch=6, warmup=1, eval_every=2, save_every=3)
SMALL |= dict(vocab_size=300, device="cpu")


def small(**changes):
    model = EncoderConfig(context=32, n_layer=1, n_head=2, n_kv_head=1, width=16, dropout=changes.pop("dropout", 0.1))
    return Config(**(SMALL | dict(model=model) | changes))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Runs in this process read less."""
    whole = load_sentiment
    monkeypatch.setattr(encoder, "load_sentiment", lambda name, split: whole(name, split)[:60])


def test_a_run_leaves_what_it_should(scratch, capsys):
    result = encoder.main(small())
    said = capsys.readouterr().out
    assert "taken for positive" in said
    assert "bag of words" in said
    run = scratch / "runs" / "encoder"
    for name in ("best", "last", "metrics.jsonl", "samples.md", "curves.png", "tensorboard"):
        assert (run / name).exists(), name
    assert list(metrics(run, "mlm_loss")) == [1, 2, 3, 4]
    assert list(metrics(run, "mlm_valid_loss")) == [2, 4]
    assert list(metrics(run, "loss")) == [5, 6, 7, 8]
    accuracy = metrics(run, "accuracy")
    assert list(accuracy) == [6, 8]
    best, tokenizer, _ = open_encoder(result["path"])
    if accuracy[8] <= accuracy[6]:  # the first of the best is kept
        assert not torch.equal(best.embed.weight, Encoder.from_pretrained(run / "last").embed.weight)
    test = encoder.load_sentiment("sentiment", "test")
    examples = [(encode(tokenizer, r.text, 32), r.label) for r in test]
    assert evaluate(best, examples, tokenizer.endoftext_id, ALONE)["confusion"] == result["confusion"]
    assert np.sum(result["confusion"]) == len(test)
    mistakes = (run / "samples.md").read_text()
    assert mistakes.count("%, but it is ") == min(20, len(test) - np.trace(result["confusion"]))
    encoder.main(small(resume=True))
    assert (run / "samples.md").read_text() == mistakes  # once, however often the end is resumed


def test_a_batch_without_holes_costs_nothing(scratch):
    encoder.main(small(mlm_rate=1e-9))
    assert set(metrics("runs/encoder", "mlm_loss").values()) == {0.0}


def test_every_step_has_its_own_holes(scratch, monkeypatch):
    made, whole = [], encoder.hide
    monkeypatch.setattr(encoder, "hide", lambda *args: made.append(whole(*args)) or made[-1])
    encoder.main(small(eval_every=100))
    holes = [chosen.numpy().tobytes() for _, chosen in made]
    assert len(set(holes)) == len(holes) == 5  # four steps and one validation


def test_the_second_objective_starts_with_a_new_optimizer(scratch, monkeypatch):
    made, whole = [], encoder.make_optimizers
    monkeypatch.setattr(encoder, "make_optimizers", lambda *args: made.append(args) or whole(*args))
    encoder.main(small(name="both"))
    assert len(made) == 2
    encoder.main(small(name="labels", mlm_steps=0))
    assert len(made) == 4  # at step 0, where it makes no difference


@pytest.mark.parametrize("stop", [3, 4, 6], ids=["while pretraining", "between", "while classifying"])
def test_resume_is_the_uninterrupted_run_bit_for_bit(scratch, stop):
    encoder.main(small(name="whole"))

    class Stop(encoder.Interrupt):
        asked_at = 0

        def __bool__(self):
            Stop.asked_at += 1
            return Stop.asked_at == stop + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "Interrupt", Stop)
        with pytest.raises(SystemExit):
            encoder.main(small(name="parts"))
    encoder.main(small(name="parts", resume=True))
    assert_same_weights("runs/whole/last", "runs/parts/last")
    assert metrics("runs/whole", "accuracy") == metrics("runs/parts", "accuracy")
    losses = [metrics(f"runs/{name}", "mlm_loss") | metrics(f"runs/{name}", "loss") for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_micro_batches_change_nothing(scratch):
    for size in (6, 4, 1):
        encoder.main(small(name=f"cut{size}", micro_batch=size, dropout=0.0))
    for size in (4, 1):
        assert_same_weights("runs/cut6/last", f"runs/cut{size}/last", atol=2e-5, rtol=1e-4)


def test_two_processes_are_one(scratch):
    flags = [f"--{k}={v}" for k, v in SMALL.items()]
    flags += [f"--model.{k}={v}" for k, v in dict(context=32, n_layer=1, n_head=2, n_kv_head=1, width=16).items()]
    flags += ["--model.dropout=0", "--eval_every=4"]
    for n in (1, 2):
        process = script("encoder.py", *flags, f"--name=world{n}", cwd=scratch, processes=n)
        assert process.returncode == 0, process.stderr
        assert "test accuracy" in process.stdout
    assert_same_weights("runs/world1/last", "runs/world2/last", atol=2e-5, rtol=1e-4)
    for name in ("mlm_loss", "mlm_valid_loss", "loss", "accuracy"):
        ours, theirs = metrics("runs/world1", name), metrics("runs/world2", name)
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_more_processes_than_validation_windows(scratch, monkeypatch):
    """Rank 1 of two has no window of a stream that holds one; it counts nothing, instead of falling over."""
    model, stream = tiny(), np.arange(40, dtype=np.uint16)
    monkeypatch.setattr(Dist, "sum", lambda self, *values: values)
    one, first, second = (
        encoder.validate_mlm(model, stream, 16, 1, 0, Dist(rank, world, torch.device("cpu")), 3, 0.4, most=1)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    assert (first, second) == (one, 0.0)
    assert one > 1


def test_a_mistaken_model_moves_no_earlier_run(scratch):
    (scratch / "runs/encoder").mkdir(parents=True)
    (scratch / "runs/encoder/metrics.jsonl").write_text("{}\n")
    for flags, words in [
        (["--vocab_size=100"], ["vocab_size is 100"]),
        (["--model.window=4"], ["window is for decoders"]),
        (["--model.tie_embeddings=false"], ["tie_embeddings is false"]),
        (["--seed=4294967296"], ["seed is 4294967296"]),
    ]:
        assert_one_line_error(script("encoder.py", *flags, cwd=scratch), *words)
    done = script("encoder.py", "--model.context=900000", cwd=scratch)  # behind the progress bar of its tokens
    assert (done.returncode, "smaller --model.context" in done.stderr.splitlines()[-1]) == (2, True)
    assert {path.name for path in (scratch / "runs").iterdir()} <= {"encoder", "streams"}


def test_a_later_run_starts_from_a_checkpoint(scratch):
    encoder.main(small(name="first"))
    result = encoder.main(small(name="second", init="runs/first", mlm_steps=0, steps=1, lr=1e-9, data="sentiment"))
    assert_same_weights("runs/first/best", "runs/second/last", atol=1e-6, rtol=1e-6)
    assert set(result) == {"accuracy", "baseline", "confusion", "path"}


@pytest.mark.parametrize(("positions", "placement"), [("rope", "pre"), ("learned", "sandwich"), ("rope", "post")])
def test_a_decoder_becomes_an_encoder_by_losing_its_mask(positions, placement):
    torch.manual_seed(0)
    sizes = dict(context=16, n_layer=2, n_head=4, n_kv_head=2, width=16, positions=positions, norm_eps=1e-5)
    sizes |= dict(norm_placement=placement)
    decoder = Transformer(TransformerConfig(40, rope_theta=500.0, qkv_bias=True, **sizes)).eval()
    shaken(decoder)
    both = Encoder.from_trunk(decoder, seed=1).eval()
    tokens = torch.randint(40, (3, 9))
    everything = torch.ones(3, 9, 9, dtype=torch.bool)
    logits = torch.nn.functional.linear(both.hidden(tokens), decoder.embed.weight)
    torch.testing.assert_close(logits, decoder(tokens, mask=everything), atol=1e-5, rtol=1e-5)
    assert (logits - decoder(tokens)).abs().max() > 0.1  # with its mask it says something else
    again, other = (Encoder.from_trunk(decoder, seed=n).classifier.weight for n in (1, 2))
    assert torch.equal(both.classifier.weight, again)
    assert not torch.equal(again, other)


def test_a_run_starts_from_a_decoder(scratch):
    texts = [r.text for r in load_sentiment("sentiment", "train")[:200]]
    tokenizer = BPETokenizer.train(texts, 300)
    torch.manual_seed(0)
    sizes = TransformerConfig(tokenizer.vocab_size, context=48, n_layer=1, n_head=2, n_kv_head=1, width=16)
    decoder = Transformer(sizes)
    decoder.save_pretrained("decoder")
    tokenizer.save_pretrained("decoder")
    with pytest.raises(ConfigError, match=re.escape(f"has no {MASK}")):
        encoder.main(small(init="decoder"))
    assert not Path("runs").exists()
    result = encoder.main(small(init="decoder", mlm_steps=0, token_dropout=0.0, steps=1, lr=1e-9))
    trained, _, _ = open_encoder(result["path"])
    assert trained.config.context == 32  # of the two the shorter
    for name, weight in decoder.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_bad_input_is_one_line(scratch, monkeypatch):
    for flags, words in [
        (["--steps=0"], ["steps is 0"]),
        (["--mlm_rate=1"], ["--mlm_rate must be"]),
        (["--data=nothing.csv"], ["no such file"]),
        (["--model.norm=batch"], ["norm 'batch' is not known"]),
        (["--model.n_class=1"], ["n_class is 1"]),
    ]:
        assert_one_line_error(script("encoder.py", *flags, cwd=scratch), *words)
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
    monkeypatch.setattr(encoder, "load_sentiment", lambda name, split: train)
    model = EncoderConfig(context=16, n_layer=1, n_head=2, n_kv_head=2, width=32)
    result = encoder.main(small(mlm_steps=0, steps=60, batch=16, micro_batch=16, eval_every=20, model=model))
    assert result["baseline"] == 0.5
    assert result["accuracy"] == 1
