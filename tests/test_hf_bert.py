"""support/hf_bert.py: transformers' BERT opens here and computes the same, ours opens there, and what is no BERT."""

import json
import shutil
from dataclasses import asdict, dataclass, fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import TINY_BERT, example_texts, perturbed

from encoder import Encoder, EncoderConfig
from support.errors import CheckpointError
from support.hf import to_layout
from support.hf_bert import BERT, OWN, is_bert, is_encoder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
    config = transformers.BertConfig(**sizes, max_position_embeddings=20, attn_implementation="eager")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    theirs, path = perturbed(transformers.BertForPreTraining(config)), tmp_path_factory.mktemp("bert")
    theirs.save_pretrained(path)
    return theirs, path


def test_states_logits_pool_and_gradients_are_berts(bert):
    theirs, path = bert
    ours = Encoder.from_pretrained(path)
    tokens, real, types = example_texts()
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
    tokens, real, types = example_texts()
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


def test_the_output_bias_under_its_other_name(bert, tmp_path):
    import transformers

    shutil.copytree(bert[1], tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    bias = tensors["cls.predictions.bias"]
    other = {"cls.predictions.decoder.bias": bias.clone()}
    save_file(tensors | other, file, {"format": "pt"})
    assert torch.equal(Encoder.from_pretrained(tmp_path / "other").token_bias, bias)
    save_file(tensors | {"cls.predictions.decoder.bias": bias + 1}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.bias is not cls\.predictions\.bias"):
        Encoder.from_pretrained(tmp_path / "other")
    del tensors["cls.predictions.bias"]
    save_file(tensors | other, file, {"format": "pt"})
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "other")
    assert torch.equal(theirs.cls.predictions.bias, bias)
    assert torch.equal(Encoder.from_pretrained(tmp_path / "other").token_bias, bias)


def test_the_bare_model_and_the_old_names_open_with_new_heads(bert, tmp_path):
    theirs, path = bert
    theirs.bert.save_pretrained(tmp_path / "bare")
    whole, bare = Encoder.from_pretrained(path), Encoder.from_pretrained(tmp_path / "bare")
    tokens, real, types = example_texts()
    assert torch.equal(whole.hidden(tokens, real, types), bare.hidden(tokens, real, types))
    assert (bare.token_bias == 0).all()
    (tmp_path / "old").mkdir()
    tensors = load_file(path / "model.safetensors")
    tensors = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in tensors.items()}
    save_file(tensors, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "old" / "config.json").write_text((path / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    assert torch.equal(
        Encoder.from_pretrained(tmp_path / "old").hidden(tokens, real, types), whole.hidden(*example_texts())
    )
    pooled = {"classifier.weight": torch.full((2, 24), 7.0), "classifier.bias": torch.full((2,), 3.0)}
    save_file(tensors | pooled, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    assert Encoder.from_pretrained(tmp_path / "old").classifier.weight.abs().max() < 7  # reads the pooler: not ours


def test_what_berts_table_does_not_declare_is_not_saved_as_bert(tmp_path):
    """A field, even at a value that changes nothing, or a tensor."""
    assert sorted([*BERT.keys, *BERT.implied, *BERT.unused]) == sorted(f.name for f in fields(EncoderConfig))
    assert is_bert(EncoderConfig(**TINY_BERT))
    assert not is_bert(EncoderConfig(**TINY_BERT | dict(n_kv_head=2)))
    assert not is_bert(EncoderConfig(**TINY_BERT | dict(positions="sinusoidal")))

    @dataclass
    class GatedConfig(EncoderConfig):
        planted_gate: bool = False

    class Gated(Encoder):
        config_class = GatedConfig

    model = Encoder(EncoderConfig(**TINY_BERT))
    gated = Gated(GatedConfig(**asdict(model.config)))
    model.blocks[1].attn.planted = torch.nn.Linear(24, 24)
    for name, ours in (("tensor", model), ("field", gated)):
        ours.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))["model_type"] == OWN
    assert Gated.from_pretrained(tmp_path / "field").config == gated.config
    with pytest.raises(CheckpointError, match=r"planted_gate = False is no field of EncoderConfig$"):
        Encoder.from_pretrained(tmp_path / "field")
    with pytest.raises(CheckpointError, match=r"hold 'blocks\.1\.attn\.planted\.bias'"):
        Encoder.from_pretrained(tmp_path / "tensor")


def test_bad_checkpoints_are_one_line(bert, tmp_path):
    _, path = bert
    config, tensors = (
        json.loads((path / "config.json").read_text(encoding="utf-8")),
        load_file(path / "model.safetensors"),
    )

    def opened(changes=None, drop=(), **more):
        (tmp_path / "config.json").write_text(json.dumps(config | (changes or {})), encoding="utf-8")
        kept = {n: t for n, t in tensors.items() if n not in drop} | more
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return Encoder.from_pretrained(tmp_path)

    opened()
    query = "bert.encoder.layer.1.attention.self.query.weight"
    for word, arguments in [
        ("hidden_act = 'relu' is not supported", ({"hidden_act": "relu"},)),
        ("model_type 'roberta' is not a known encoder", ({"model_type": "roberta"},)),
        ("lack 'blocks.1.attn.wq.weight'", ({}, (query,))),
        (r"embed.weight has shape \(61, 24\), its config.json asks for \(62, 24\)", ({"vocab_size": 62},)),
        ("width 24 is not a multiple of n_head 5", ({"num_attention_heads": 5},)),
        ("vocab_size is 1000000000000000000, more than any", ({"vocab_size": 10**18},)),
        ("n_type is 1000000000000000000, more than any", ({"type_vocab_size": 10**18},)),
        ("its config.json asks for .*16008", ({"vocab_size": 10**7, "hidden_size": 16008},)),  # 640 GB
    ]:
        with pytest.raises(CheckpointError, match=word):
            opened(*arguments)
    for name in (query, "bert.embeddings.word_embeddings.weight"):  # the second has a tied copy, which is no news
        damaged = tensors[name].clone()
        damaged[0, 3] = float("nan")
        with pytest.raises(CheckpointError, match=f"{name} has 1 of .* NaN or infinite"):
            opened(**{name: damaged})
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
    (tmp_path / "config.json").write_text("[" * 10**5, encoding="utf-8")
    assert not is_encoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: too many brackets"):
        Encoder.from_pretrained(tmp_path)
