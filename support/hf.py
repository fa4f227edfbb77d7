"""Hugging Face's format: how each model family calls our tensors and fields, in and out.

save_decoder(model, path)                   -> config.json, model.safetensors
load_decoder(model_class, path)             -> a model, from a directory or a hub name
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from support.checks import only_declared
from support.errors import CheckpointError

# A layout is a table: how Hugging Face calls our tensors and our config's fields, and what all models of the kind have
# in common. In a tensor's name the first {} is the block; a second one counts the experts, which are one tensor here.
# Several of ours under one name are stacked there: GPT-2 keeps queries, keys and values in one matrix. What no table
# declares, a field or a tensor, no class of transformers computes: such a model is saved in our own layout.

# Additions to the architecture, each at the value at which it adds nothing. What cannot compute them asks for these:
# every layout here that has no key for one, BERT's, and the fast decoding step. A new switch is one more entry.
OFF = {"window": None, "sinks": 0, "n_expert": 0}
TRAINING_ONLY = ("dropout", "capacity_factor")
MIXTURE_ONLY = ("n_expert_active", "expert_width", "n_shared_expert", "moe_every", "norm_topk_prob", "routed_scale")
MIXTURE_ONLY += ("balancing",)


@dataclass(frozen=True)
class Layout:
    architecture: str  # the class in transformers
    names: dict  # our tensor -> theirs
    keys: dict  # our config field -> their key in config.json
    means: dict  # fields of ours that are the same in every model of this kind
    fixed: dict  # further keys of config.json: written so, and refused if a file says otherwise
    left_out: dict  # what the class takes for a key that config.json leaves out
    no_matter: tuple  # fields of ours that change nothing in a model of this kind, or only its training


def llama_like(architecture, keys=(), names=(), means=(), fixed=(), left_out=()):
    """Llama's layout, with what another model of the family changes."""
    names = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "blocks.{}.norm1.weight": "model.layers.{}.input_layernorm.weight",
        "blocks.{}.norm2.weight": "model.layers.{}.post_attention_layernorm.weight",
        **{f"blocks.{{}}.attn.w{x}.weight": f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkvo"},
        **{f"blocks.{{}}.attn.w{x}.bias": f"model.layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"},
        **{f"blocks.{{}}.attn.{x}_norm.weight": f"model.layers.{{}}.self_attn.{x}_norm.weight" for x in "qk"},
        **{f"blocks.{{}}.ffn.{x}.weight": f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    } | dict(names)
    keys = {
        "vocab_size": "vocab_size",
        "context": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_dim": "head_dim",
        "width": "hidden_size",
        "ffn_width": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "rope_scaling": "rope_scaling",
        "tie_embeddings": "tie_word_embeddings",
    } | dict(keys)
    common = dict(norm="rms", norm_placement="pre", positions="rope", activation="swiglu", bias=False, qkv_bias=False)
    common |= dict(qk_norm=False) | OFF | dict(means)
    common = {field: value for field, value in common.items() if field not in keys}
    fixed = {"hidden_act": "silu"} | dict(fixed)
    left = dict(rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, head_dim=None, tie_word_embeddings=False)
    no_matter = TRAINING_ONLY if "n_expert" in keys else TRAINING_ONLY + MIXTURE_ONLY
    return Layout(architecture, names, keys, common, fixed, left | dict(left_out), no_matter)


def gpt2_names():
    parts = {f"blocks.{{}}.attn.w{x}": "h.{}.attn.c_attn" for x in "qkv"} | {"norm": "ln_f"}
    parts |= {"blocks.{}.norm1": "h.{}.ln_1", "blocks.{}.norm2": "h.{}.ln_2", "blocks.{}.attn.wo": "h.{}.attn.c_proj"}
    parts |= {"blocks.{}.ffn.up": "h.{}.mlp.c_fc", "blocks.{}.ffn.down": "h.{}.mlp.c_proj"}
    names = {f"{a}.{kind}": f"transformer.{b}.{kind}" for a, b in parts.items() for kind in ("weight", "bias")}
    return names | {"embed.weight": "transformer.wte.weight", "learned.weight": "transformer.wpe.weight"}


TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D stores (in, out)
IGNORED = ("lm_head.weight", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # tied copies and buffers
WINDOW = {"window": "sliding_window"}
MIXTURE = dict(n_expert_active="num_experts_per_tok")


MIXTURE |= dict(balancing="balancing", routed_scale="routed_scale")  # ours alone, to train on
LAYOUTS = {
    "qwen3": llama_like(
        "Qwen3ForCausalLM",
        keys=WINDOW,
        means=dict(qk_norm=True),
        fixed=dict(attention_bias=False),
        left_out=dict(head_dim=128, sliding_window=4096),
    ),
    "gpt2": Layout(
        "GPT2LMHeadModel",
        gpt2_names(),
        dict(vocab_size="vocab_size", context="n_positions", n_layer="n_layer", n_head="n_head", width="n_embd")
        | dict(ffn_width="n_inner", norm_eps="layer_norm_epsilon"),
        dict(norm="layer", norm_placement="pre", positions="learned", activation="gelu", bias=True, qkv_bias=True)
        | dict(qk_norm=False, tie_embeddings=True)
        | OFF,
        dict(activation_function="gelu_new", tie_word_embeddings=True, scale_attn_weights=True)
        | dict(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
        dict(n_inner=None, layer_norm_epsilon=1e-5),
        (*TRAINING_ONLY, *MIXTURE_ONLY, "rope_theta", "rope_scaling", "n_kv_head", "head_dim"),  # heads: see layout_of
    ),
    "llama": llama_like(
        "LlamaForCausalLM",
        fixed=dict(attention_bias=False, mlp_bias=False),
        left_out=dict(num_key_value_heads=None),
    ),
    "qwen2": llama_like(
        "Qwen2ForCausalLM",
        keys=WINDOW,
        means=dict(qkv_bias=True),
        left_out=dict(sliding_window=4096),
    ),
    "mistral": llama_like(
        "MistralForCausalLM",
        keys=WINDOW,
        left_out=dict(sliding_window=4096),
    ),
    "mixtral": llama_like(
        "MixtralForCausalLM",
        keys=WINDOW | MIXTURE | dict(n_expert="num_local_experts", expert_width="intermediate_size"),
        names={"blocks.{}.ffn.router.weight": "model.layers.{}.block_sparse_moe.gate.weight"}
        | {
            f"blocks.{{}}.ffn.{ours}": f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{theirs}.weight"
            for ours, theirs in dict(gate="w1", down="w2", up="w3").items()
        },
        means=dict(n_shared_expert=0, moe_every=1, norm_topk_prob=True),
        left_out=dict(rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, balancing="aux", routed_scale=1.0),
    ),
    "qwen3_moe": llama_like(
        "Qwen3MoeForCausalLM",
        keys=WINDOW
        | MIXTURE
        | dict(n_expert="num_experts", expert_width="moe_intermediate_size")
        | dict(moe_every="decoder_sparse_step", norm_topk_prob="norm_topk_prob"),
        names={"blocks.{}.ffn.router.weight": "model.layers.{}.mlp.gate.weight"}
        | {
            f"blocks.{{}}.ffn.{x}": f"model.layers.{{}}.mlp.experts.{{}}.{x}_proj.weight"
            for x in ("gate", "up", "down")
        },
        means=dict(qk_norm=True, n_shared_expert=0),
        fixed=dict(attention_bias=False, mlp_only_layers=[]),
        left_out=dict(sliding_window=4096, decoder_sparse_step=1, norm_topk_prob=False, balancing="aux")
        | dict(routed_scale=1.0),
    ),
    "attention_to_alignment": None,  # our own names and fields: what no class of transformers computes
}


# What stands in config.json beside the fields of the config in our own layout.
NOT_OURS = ("model_type", "architectures", "dtype", "id2label", "label2id", "pad_token_id")


def layout_of(config, tensors=()):
    """The Hugging Face class that computes exactly what this config does, or our own name if none does. `tensors`, the
    names of a model's, may belong to something that no config speaks of: then it is our own layout too."""
    c = config.resolved()
    named = {re.sub(r"^blocks\.\d+", "blocks.{}", name) for name in tensors}
    whole_heads = c.n_kv_head == c.n_head and c.head_dim * c.n_head == c.width
    for kind, layout in LAYOUTS.items():
        if layout is None or (kind == "gpt2" and not whole_heads):
            continue
        if c.n_expert and (c.balancing == "bias" or math.frexp(c.routed_scale)[0] != 0.5):  # 0.5: a power of two
            continue
        if only_declared(c, {*layout.keys, *layout.no_matter}, layout.means) and named <= layout.names.keys():
            return kind
    return "attention_to_alignment"


def layout_names(layout, head=None):
    """{our tensor: its name in a file of the layout}; `head`: further ones, which no layout has."""
    return (LAYOUTS[layout].names if LAYOUTS[layout] else {}) | (head or {})


def save_decoder(model, path, head=None, entries=None):
    """Write config.json and model.safetensors in the layout that computes what the model does, in our own if none does.

    head: {our tensor: its name in the file} of tensors that are beside the decoder's; entries(config.json's content) ->
    more of it.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    layout = layout_of(model.config, state.keys() - (head or {}).keys())
    if LAYOUTS[layout] is not None:
        state = scale_experts(state, model.config.routed_scale)
    config = to_hf_config(model.config, layout)
    config["dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    config |= {} if entries is None else entries(config)
    write_checkpoint(path, to_layout(state, layout_names(layout, head)), config)


def write_checkpoint(path, tensors, config):
    """config.json and model.safetensors, each under a temporary name first: a crash leaves the old ones."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors.tmp", metadata={"format": "pt"})
    (path / "config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        os.replace(path / f"{name}.tmp", path / name)


def load_decoder(model_class, path, dtype=torch.float32, dropout=0.0, head=None):
    """A checkpoint directory, or a hub name, in any layout -> a `model_class`. dtype None keeps the file's; head: as in
    save_decoder. Raises CheckpointError."""
    path = local_directory(path)
    layout, config = read_hf_config(path, model_class.config_class)
    shapes, get = open_safetensors(path)
    prefix = {"gpt2": "transformer.", "attention_to_alignment": ""}.get(layout, "model.")
    if any(name.startswith(prefix) for name in shapes):  # OpenAI's own upload of GPT-2 leaves it out
        prefix = ""
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    # Both act in training alone, and what the file was trained with is not for the next stage.
    config = replace(config, dropout=dropout, capacity_factor=None)
    names = layout_names(layout, head)
    model = fill(model_class, config, names, shapes, lambda name: get(name.removeprefix(prefix)), path, dtype)
    if LAYOUTS[layout] is not None and model.config.n_expert:
        model.load_state_dict(scale_experts(model.state_dict(), 1 / model.config.routed_scale))
    return model


def skeleton(model_class, config):
    """The model without its numbers: shapes alone, on no device."""
    with torch.device("meta"):
        return model_class(config)


def _grouped(keys, names):
    """Our tensors' names under each of theirs: {"model.norm.weight": ["norm.weight"], ...}. What `names` does not know,
    and with names None all, is called as it is here."""
    groups = {}
    for ours in keys:
        block = re.match(r"blocks\.(\d+)", ours)
        kind = ours if block is None else ours.replace(block[0], "blocks.{}", 1)
        theirs = (names or {}).get(kind, kind)
        groups.setdefault(theirs if block is None else theirs.replace("{}", block[1], 1), []).append(ours)
    return groups


def scale_experts(state, factor):
    """The experts' output matrices times `factor`: the layouts of transformers have no routed_scale, so there it is
    multiplied into the weights, exactly, as it is a power of two."""
    if factor in (None, 1.0):
        return state
    return {name: w * factor if name.endswith("down") and w.dim() == 3 else w for name, w in state.items()}


def to_layout(state, names):
    """Our state dict -> theirs."""
    out = {}
    for theirs, ours in _grouped(state, names).items():
        tensor = torch.cat([state[name] for name in ours]) if len(ours) > 1 else state[ours[0]]
        if "{}" in theirs:
            out |= {theirs.format(e): expert for e, expert in enumerate(tensor)}
        else:
            out[theirs] = tensor.t() if theirs.endswith(TURNED) else tensor
    return out


def from_layout(get, like, names):
    """get(their name) -> tensor; like: our state dict, for its names and shapes. Yields our names and tensors."""
    for theirs, ours in _grouped(like, names).items():
        if "{}" in theirs:
            tensor = torch.stack([get(theirs.format(e)) for e in range(len(like[ours[0]]))])
        else:
            tensor = get(theirs).t() if theirs.endswith(TURNED) else get(theirs)
        yield from zip(ours, tensor.split([len(like[name]) for name in ours]), strict=True)


class NoInit(TorchFunctionMode):
    """Within it torch.nn.init does nothing: what a file overwrites need not be drawn first, which takes longer."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def fill(model_class, config, names, found, get, where, dtype=torch.float32):
    """A `model_class` of `config` with a file's weights. found: {their name: shape} of what is there; get(their name)
    -> tensor. Names and shapes are checked before any memory is spent. Raises CheckpointError."""
    empty = skeleton(model_class, config).state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in to_layout(empty, names).items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{where}: the weights lack {name!r}, which its config asks for")
        if name not in wanted and not name.endswith(IGNORED):
            raise CheckpointError(f"{where}: the weights hold {name!r}, which its config does not explain")
        if found[name] != wanted.get(name, found[name]):
            raise CheckpointError(f"{where}: {name} has shape {found[name]}, its config asks for {wanted[name]}")
    with torch.random.fork_rng(devices=[]), NoInit():  # opening a file must not move the caller's random numbers
        model = model_class(config).to(dtype or get(next(iter(wanted))).dtype)
    own = model.state_dict()
    for name, tensor in from_layout(get, empty, names):
        own[name].copy_(tensor)
    for name in found.keys() - wanted.keys():
        if name.endswith("lm_head.weight") and not torch.equal(get(name).to(own["embed.weight"]), own["embed.weight"]):
            raise CheckpointError(f"{where}: {name} is not the embedding, though its config calls the two tied")
    return model


def open_safetensors(path):
    """A directory's weights, in one file or in shards -> {name: shape}, and get(name) -> tensor. CheckpointError."""
    file, index = path / "model.safetensors", path / "model.safetensors.index.json"
    files = [file]
    if not file.exists() and index.exists():
        try:
            files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{index} is corrupt: no JSON with a weight_map") from None
    shapes, where = {}, {}
    for file in files:
        try:
            handle = safe_open(file, "pt")
            for name in handle.keys():  # noqa: SIM118, it is no dict
                shapes[name], where[name] = tuple(handle.get_slice(name).get_shape()), handle
        except FileNotFoundError:
            what = "is it a checkpoint directory?" if len(files) == 1 else f"{index.name} names it as a shard"
            raise CheckpointError(f"{path} has no {file.name}; {what}") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is corrupt or unreadable: {error}") from None
    return shapes, lambda name: where[name].get_tensor(name)


def local_directory(path):
    """The checkpoint's directory. What is none here and reads like a hub name, owner/name, is downloaded from the
    Hugging Face hub first, or found in its cache. Raises CheckpointError."""
    name, path = str(path), Path(path)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.parent.exists():
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        why = "to take it for a name on the Hugging Face hub: pip install huggingface_hub"
        raise CheckpointError(f"{name} is not there; {why}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "model*.safetensors", "merges.txt"]))
    except Exception as error:  # of many kinds: no such name, no rights to it, no network
        why = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{name} is not there, and the Hugging Face hub does not give it: {why}") from None


def to_hf_config(config, layout):
    """config.json's content, without the special tokens, which the tokenizer knows."""
    table = LAYOUTS[layout]
    if table is None:
        return {"model_type": layout, **asdict(config)}
    content = {"architectures": [table.architecture], "model_type": layout}
    content |= {theirs: getattr(config, ours) for ours, theirs in table.keys.items()} | table.fixed
    if layout.startswith("qwen"):  # blocks from max_window_layers on have the window
        content |= {"use_sliding_window": config.window is not None}
        content |= {"max_window_layers": config.n_layer if config.window is None else 0}
    return content


def read_hf_config(path, config_class):
    """A checkpoint directory's config.json -> (layout, a `config_class`). Raises CheckpointError."""
    file = Path(path) / "config.json"
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
        kind = hf["model_type"]
    except FileNotFoundError:
        what = "has no config.json" if Path(path).is_dir() else "is not there"
        raise CheckpointError(f"{path} {what}; a checkpoint is a directory that save_pretrained wrote") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"{file} is not a model's config.json: no JSON with a model_type") from None
    if kind not in list(LAYOUTS):  # a list, as kind may be anything that JSON holds
        raise CheckpointError(f"{file}: model_type {kind!r} is not known here; known: {', '.join(LAYOUTS)}")
    try:
        if LAYOUTS[kind] is not None:
            return kind, config_class(**from_hf_config(hf, kind))
        settings = {key: value for key, value in hf.items() if key not in NOT_OURS}
        for key in settings.keys() - {
            f.name for f in fields(config_class)
        }:  # a model without it computes another thing
            raise CheckpointError(f"{key} = {hf[key]!r} is no field of {config_class.__name__}")
        return kind, config_class(**settings)
    except KeyError as missing:
        raise CheckpointError(f"{file} lacks {missing}") from None
    except (TypeError, AttributeError, ValueError) as error:  # wrong types, and our own CheckpointError
        raise CheckpointError(f"{file}: {error}") from None


def from_hf_config(hf, kind):
    """config.json's content in a layout -> {our field: value}."""
    layout = LAYOUTS[kind]
    # What would change the computation and is not written here must not pass in silence.
    for name, value in (layout.fixed | dict(quantization_config=None, partial_rotary_factor=1.0)).items():
        if hf.get(name, value) not in (value, None):
            raise CheckpointError(f"{name} = {hf[name]!r} is not supported, only {value!r}")
    hf = layout.left_out | hf
    if "num_local_experts" in hf:  # transformers 5 calls Qwen3-MoE's so too
        hf.setdefault("num_experts", hf["num_local_experts"])
    new, old = ((hf.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    if new and old and any(new.get(k, v) != v for k, v in {"rope_type": old.get("type"), **old}.items() if k != "type"):
        raise CheckpointError("rope_scaling and rope_parameters say different things: keep one of them")
    rope = new or old  # transformers 5 writes the first, with the base
    hf["rope_theta"] = float(rope.get("rope_theta", hf.get("rope_theta", 1e4)))
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    hf["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None
    if scaled and hf.get("original_max_position_embeddings"):  # beside the dict it goes before what stands in it
        hf["rope_scaling"]["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    if kind.startswith("qwen"):
        hf["sliding_window"] = _qwen_window(hf, kind)
    values = layout.means | {ours: hf[theirs] for ours, theirs in layout.keys.items()}
    if values.get("n_kv_head") is None:
        values["n_kv_head"] = values["n_head"]
    if kind == "gpt2" and values["ffn_width"] is None:
        values["ffn_width"] = 4 * values["width"]
    return values


def _qwen_window(hf, kind):
    """Qwen lets some blocks slide and others not; here all do or none."""
    if not hf.get("use_sliding_window"):
        return None
    n_layer = hf["num_hidden_layers"]
    full = 0 if kind == "qwen3_moe" else min(n_layer, hf.get("max_window_layers", 28))
    kinds = hf.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (n_layer - full)
    if len(set(kinds)) > 1:
        raise CheckpointError("use_sliding_window is not supported in some blocks only")
    return hf["sliding_window"] if "sliding_attention" in kinds else None
