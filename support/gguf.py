"""GGUF, llama.cpp's format: one file that holds the weights, quantised in blocks, and the tokenizer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from positional import interleaved_to_half
from support.errors import CheckpointError, TokenizerError
from support.hf import LAYOUTS, load_weights
from support.tokenizer_files import spec_of_gguf
from tokenizer_bpe import from_spec
from transformer import Transformer, TransformerConfig

GGUF_NAMES = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "blocks.{}.norm1.weight": "blk.{}.attn_norm.weight",
    "blocks.{}.norm2.weight": "blk.{}.ffn_norm.weight",
    "blocks.{}.attn.wo.weight": "blk.{}.attn_output.weight",
    **{f"blocks.{{}}.attn.w{x}.{kind}": f"blk.{{}}.attn_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")},
    **{f"blocks.{{}}.attn.{x}_norm.weight": f"blk.{{}}.attn_{x}_norm.weight" for x in "qk"},
    **{f"blocks.{{}}.ffn.{x}.weight": f"blk.{{}}.ffn_{x}.weight" for x in ("gate", "up", "down")},
}
GGUF_KEYS = {
    "context": "context_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_kv_head": "attention.head_count_kv",
    "width": "embedding_length",
    "ffn_width": "feed_forward_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
GGUF_MODELS = ("llama", "qwen2", "qwen3")


def read_gguf(path):
    """-> metadata {key: value}; tensors {name: (shape, a function that returns it dequantised)}. CheckpointError."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path} is not there")
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"to open {path}: pip install gguf") from None

    class Reader(gguf.GGUFReader):  # 300,000 slices: of a plain array they are three times faster than of a memmap
        data = property(lambda self: self.plain, lambda self, mapped: setattr(self, "plain", np.asarray(mapped)))

    try:
        reader = Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise CheckpointError(f"{path} is corrupt or no GGUF file: {error}") from None

    def dequantiser(tensor):
        return lambda: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    return metadata, {t.name: (tuple(map(int, t.shape[::-1])), dequantiser(t)) for t in reader.tensors}


def gguf_config(metadata, tensors, path):
    """The metadata of a GGUF file -> TransformerConfig. Raises CheckpointError."""
    kind = metadata.get("general.architecture")
    if kind not in GGUF_MODELS:
        raise CheckpointError(f"{path}: architecture {kind!r} is not known here; known: {', '.join(GGUF_MODELS)}")
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    factors = (metadata.get(f"{kind}.rope.{key}", 1.0) for key in ("scaling.factor", "scale_linear"))
    if scaling == "none" and any(factor not in (0.0, 1.0) for factor in factors):
        scaling = "linear"  # as llama.cpp reads it
    if scaling != "none" or "rope_freqs.weight" in tensors or metadata.get(f"{kind}.expert_count"):
        feature = "mixtures of experts" if metadata.get(f"{kind}.expert_count") else "RoPE scaling"
        raise CheckpointError(f"{path}: {feature} in a GGUF file is not supported; use the safetensors checkpoint")
    values = dict(LAYOUTS[kind].implied)
    try:
        values |= {field: metadata[f"{kind}.{key}"] for field, key in GGUF_KEYS.items()}
        values["vocab_size"] = tensors["token_embd.weight"][0][0]
    except KeyError as missing:
        raise CheckpointError(f"{path} lacks {missing}") from None
    values["head_dim"] = metadata.get(f"{kind}.attention.key_length")
    values["rope_theta"] = metadata.get(f"{kind}.rope.freq_base", 10000.0)
    values["window"] = metadata.get(f"{kind}.attention.sliding_window")
    values["tie_embeddings"] = "output.weight" not in tensors
    try:
        config = TransformerConfig(**values)
    except (CheckpointError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    rotated = metadata.get(f"{kind}.rope.dimension_count", config.resolved().head_dim)
    if rotated != config.resolved().head_dim:
        raise CheckpointError(f"{path}: RoPE over {rotated} of {config.resolved().head_dim} features is not supported")
    return config


def open_gguf(path, dropout=0.0):
    """Open a GGUF file and dequantise it to fp32 -> (model, metadata); gguf_tokenizer takes the metadata. Raises
    CheckpointError."""
    metadata, tensors = read_gguf(path)
    config = gguf_config(metadata, tensors, path)
    shapes = {name: shape for name, (shape, _) in tensors.items()}

    def get(name):
        try:
            tensor = tensors[name][1]()
        except NotImplementedError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
        heads = {"attn_q": config.n_head, "attn_k": config.n_kv_head}.get(name.split(".")[-2])
        if heads and metadata["general.architecture"] == "llama":  # rotates neighbouring features; see positional.py
            return interleaved_to_half(tensor, heads)
        return tensor

    return load_weights(Transformer, replace(config, dropout=dropout), GGUF_NAMES, shapes, get, path), metadata


def gguf_tokenizer(metadata, path):
    """The byte-level BPE in a GGUF file. Its encode_chat gives what the file's chat template would, including a default
    system turn; .chat_template is that template, or None. Raises TokenizerError."""
    spec = spec_of_gguf(metadata, path)
    try:
        return from_spec(spec)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: the tokenizer is corrupt: {error}") from None
