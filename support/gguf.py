"""GGUF, llama.cpp's format: one file that holds the weights, quantised in blocks, and the tokenizer."""

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

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
CHUNK_NUMBERS = 2**17
GGUF_MODELS = ("llama", "qwen2", "qwen3")


def read_gguf(path):
    """-> metadata {key: value}; tensors {name: (shape, a function that returns it dequantised)}. CheckpointError."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"to open {path}: pip install gguf") from None

    class Reader(gguf.GGUFReader):
        """Reads each array of strings or numbers in one pass: a tokenizer has three, of up to 150,000 entries each."""

        data = property(lambda self: self.plain, lambda self, mapped: setattr(self, "plain", np.asarray(mapped)))

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, n = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
            number = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind))
            start = orig_offs + 12
            if number is not None:
                values = self._get(start, number, n)
                if len(values) < n:
                    raise ValueError("it ends in an array")
                parts, end = list(values[:, None]), start + values.nbytes
            elif kind == gguf.GGUFValueType.STRING:
                parts, end = strings_at(self.plain, start, n, ">" if self.byte_order == "S" else "<")
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            types = [gguf.GGUFValueType.ARRAY] + [gguf.GGUFValueType(kind)] * (n > 0)
            return end - orig_offs, parts, list(range(n)), types

    try:
        reader = Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{path} is corrupt or no GGUF file: {error}") from None

    def dequantiser(tensor):
        return lambda: dequantised(tensor, gguf.dequantize)

    return metadata, {t.name: (tuple(map(int, t.shape[::-1])), dequantiser(t)) for t in reader.tensors}


def strings_at(data, start, n, order):
    """n strings in the bytes `data`, each after its length in 8 bytes -> their bytes as arrays, and where they end."""
    view, length, parts = memoryview(data), struct.Struct(order + "Q"), []
    for _ in range(n):
        (size,) = length.unpack_from(view, start)
        start += 8
        if start + size > len(view):
            raise ValueError("it ends in a string")
        parts.append(view[start : start + size])
        start += size
    return parts, start


def dequantised(tensor, dequantize):
    """A tensor of the file in fp32. A few rows at a time, which stay in the processor's cache, on all of its cores."""
    data = tensor.data  # (rows, bytes of a row) if it is quantised
    if data.ndim < 2:
        return torch.from_numpy(dequantize(data, tensor.tensor_type).copy())
    data = data.reshape(-1, data.shape[-1])
    few = max(1, CHUNK_NUMBERS // int(tensor.shape[0]))
    out = np.empty((len(data), int(tensor.shape[0])), np.float32)

    def fill(i):
        out[i : i + few] = dequantize(data[i : i + few], tensor.tensor_type)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, len(data), few)))
    return torch.from_numpy(out.reshape(tuple(map(int, tensor.shape[::-1]))))


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
