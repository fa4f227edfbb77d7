"""BERT's checkpoint format, in and out: Hugging Face's names for an encoder, and the own format."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from support.checks import only_declared
from support.errors import CheckpointError
from support.files import read_json
from support.finite import check_finite
from support.hf import (
    EXTENSIONS_OFF,
    MIXTURE_ONLY,
    TRAINING_ONLY,
    Layout,
    meta_model,
    open_safetensors,
    own_config,
    to_layout,
    write_checkpoint,
)

OWN = "attention_to_alignment_encoder"  # the model_type of encoders that are not BERTs

MODULES = {  # each with a weight and a bias
    "embed_norm": "bert.embeddings.LayerNorm",
    "blocks.{}.attn.wq": "bert.encoder.layer.{}.attention.self.query",
    "blocks.{}.attn.wk": "bert.encoder.layer.{}.attention.self.key",
    "blocks.{}.attn.wv": "bert.encoder.layer.{}.attention.self.value",
    "blocks.{}.attn.wo": "bert.encoder.layer.{}.attention.output.dense",
    "blocks.{}.norm1": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "blocks.{}.ffn.up": "bert.encoder.layer.{}.intermediate.dense",
    "blocks.{}.ffn.down": "bert.encoder.layer.{}.output.dense",
    "blocks.{}.norm2": "bert.encoder.layer.{}.output.LayerNorm",
    "pooler": "bert.pooler.dense",
    "transform": "cls.predictions.transform.dense",
    "transform_norm": "cls.predictions.transform.LayerNorm",
    "classifier": "mean_classifier",  # not BERT's "classifier", which reads the pooler
}
WORDS = "bert.embeddings.word_embeddings.weight"
BIAS = "cls.predictions.bias"
BERT = Layout(
    architecture="BertForMaskedLM",
    names={f"{name}.{part}": f"{hf_name}.{part}" for name, hf_name in MODULES.items() for part in ("weight", "bias")}
    | {
        "embed.weight": WORDS,
        "learned.weight": "bert.embeddings.position_embeddings.weight",
        "types.weight": "bert.embeddings.token_type_embeddings.weight",
        "token_bias": BIAS,
    },
    keys=dict(vocab_size="vocab_size", context="max_position_embeddings", n_layer="num_hidden_layers")
    | dict(n_head="num_attention_heads", width="hidden_size", ffn_width="intermediate_size")
    | dict(norm_eps="layer_norm_eps", n_type="type_vocab_size", n_class="num_labels"),
    implied=dict(norm="layer", norm_placement="post", positions="learned", activation="gelu", exact_gelu=True)
    | dict(bias=True, qkv_bias=True, qk_norm=False, embed_norm=True, pooler=True, tie_embeddings=True)
    | EXTENSIONS_OFF,
    fixed=dict(hidden_act="gelu", position_embedding_type="absolute", is_decoder=False),
    defaults={},
    unused=(*TRAINING_ONLY, *MIXTURE_ONLY, "rope_theta", "rope_scaling", "n_kv_head", "head_dim"),  # heads: is_bert
)
HEADS = ("classifier.", "pooler.", "transform", "token_bias")  # may be missing in a BERT: then initialised randomly


def is_encoder(path):
    """Whether a directory holds an encoder checkpoint, in the own layout or in BERT's."""
    try:
        return read_json(Path(path) / "config.json")["model_type"] in (OWN, "bert")
    except (OSError, ValueError, TypeError, KeyError):
        return False  # opening the checkpoint will report the error


def is_bert(config, tensors=()):
    """Whether transformers' BertModel computes exactly what this config does and knows all these tensor names."""
    c = config.resolved()
    named = {re.sub(r"^blocks\.\d+", "blocks.{}", name) for name in tensors}
    whole_heads = c.n_kv_head == c.n_head and c.head_dim * c.n_head == c.width
    declared = only_declared(c, {*BERT.keys, *BERT.unused}, BERT.implied) and named <= BERT.names.keys()
    return declared and whole_heads and c.n_type > 0


def save_encoder(model, path):
    """Write config.json and model.safetensors: in BERT's layout if the config is BERT's, else in the own layout."""
    c = model.config
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    config = {"model_type": OWN, **asdict(c)}
    if is_bert(c, state):
        state = to_layout(state, BERT.names)
        config = {"architectures": [BERT.architecture], "model_type": "bert", "tie_word_embeddings": True, **BERT.fixed}
        config |= {key: getattr(c, field) for field, key in BERT.keys.items()}
    config["dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    write_checkpoint(path, state, config)


def load_encoder(model_class, path, dropout=0.0):
    """A directory in BERT's layout, where missing heads are initialised randomly, or in the own layout -> a
    `model_class` in fp32. Raises CheckpointError, also on a weight that is not finite."""
    path = Path(path)
    layout, config = read_config(path, model_class.config_class)
    shapes, get = open_safetensors(path)
    config = replace(config, dropout=dropout)
    state, tensors = meta_model(model_class, config, path).state_dict(), {name: get(name).float() for name in shapes}
    check_finite(tensors, path)
    if layout == "bert":
        tensors = from_bert(tensors, state)
    for name in sorted(state.keys() | tensors.keys()):
        if name not in state:
            raise CheckpointError(f"{path}: the weights hold {name!r}, which its config.json does not explain")
        if name not in tensors:
            if layout != "bert" or not name.startswith(HEADS):
                raise CheckpointError(f"{path}: the weights lack {name!r}, which its config.json asks for")
        elif state[name].shape != tensors[name].shape:
            expected, shape = tuple(state[name].shape), tuple(tensors[name].shape)
            raise CheckpointError(f"{path}: {name} has shape {shape}, its config.json asks for {expected}")
    with torch.random.fork_rng(devices=[]):  # opening a file must not change the caller's random state
        torch.manual_seed(0)  # new heads are the same on every rank
        model = model_class(config)
    model.load_state_dict(model.state_dict() | tensors)
    return model


def from_bert(tensors, like):
    """{BERT's name: tensor} -> {name in `like`, a state dict of the model: tensor}. Tensors that have no use here are
    left out."""
    names = {hf_name: name for name, hf_name in zip(like, to_layout(like, BERT.names), strict=True)}
    embedding = tensors.get(WORDS, tensors.get(WORDS.removeprefix("bert.")))
    bare = not any(name.startswith("bert.") for name in tensors)  # BertModel alone is saved without the prefix
    state = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if bare and not name.startswith(("cls.", "mean_classifier.")):
            name = f"bert.{name}"
        if name.endswith("decoder.weight") and (embedding is None or not torch.equal(tensor, embedding)):
            raise CheckpointError(f"{name} is not the embedding, though here the two are tied")
        if name == "cls.predictions.decoder.bias":  # the same bias
            if not torch.equal(tensor, tensors.get(BIAS, tensor)):
                raise CheckpointError(f"{name} is not {BIAS}, though the two are tied")
            name = BIAS
        # Not used here: a tied copy, a buffer of positions, the next-sentence head, a classifier that reads the pooler
        unused = name.startswith(("bert.classifier.", "classifier.")) or "seq_relationship" in name
        if not unused and not name.endswith(("decoder.weight", "position_ids")):
            state[names.get(name, name)] = tensor
    return state


def read_config(path, config_class):
    """The config.json of a directory -> (its model_type, a `config_class`). Raises CheckpointError."""
    file = Path(path) / "config.json"
    try:
        hf = read_json(file)
        kind = hf["model_type"]
        if kind == OWN:
            return kind, own_config(hf, config_class)
        if kind != "bert":
            raise CheckpointError(f"model_type {kind!r} is not a known encoder; known: bert and {OWN}")
        for name, value in BERT.fixed.items():
            if hf.get(name, value) != value:
                raise CheckpointError(f"{name} = {hf[name]!r} is not supported, only {value!r}")
        hf["num_labels"] = hf.get("num_labels") or len(hf.get("id2label", "01"))
        values = BERT.implied | {field: hf[key] for field, key in BERT.keys.items()}
        return kind, config_class(**values, n_kv_head=values["n_head"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no config.json; a checkpoint is a directory that holds one") from None
    except KeyError as missing:
        raise CheckpointError(f"{file} lacks {missing}") from None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:  # wrong types, and from above
        raise CheckpointError(f"{file}: {error}") from None
