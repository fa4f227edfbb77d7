"""Hugging Face's checkpoint format: the names that each model family gives to tensors and config fields, in and out.

save_decoder(model, path)                   -> config.json, model.safetensors
load_decoder(model_class, path)             -> a model, from a directory or a hub name
"""

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from support.checks import only_declared
from support.errors import CheckpointError
from support.files import as_bytes, read_json, replacing, to_json
from support.finite import check_finite, is_finite
from support.nodes import first_line

# A layout is a table: the names that Hugging Face gives to this project's tensors and config fields, and what all
# models of the family have in common. In a tensor's name the first {} is the block; a second {} is the expert (here all
# experts are one tensor). If several tensors have the same name there, they are stacked: GPT-2 keeps queries, keys and
# values in one matrix. A model with a field or a tensor that no table declares is one that no class of transformers
# computes; it is saved in this project's own layout.

# Extensions of the architecture, each with the value that turns it off. Code that cannot compute them requires these
# values: the layouts that have no key for them, BERT's layout, the fast decoding step. A new switch is one more entry:
# models with that value then work as before. Without an entry a new field of the config, or of a subclass, is safe but
# slow: no model takes the fast decoding step, and checkpoints are saved in this project's own layout.
EXTENSIONS_OFF = {"window": None, "sinks": 0, "n_expert": 0}
TRAINING_ONLY = ("dropout", "capacity_factor")
MIXTURE_ONLY = ("n_expert_active", "expert_width", "n_shared_expert", "moe_every", "norm_topk_prob", "routed_scale")
MIXTURE_ONLY += ("balancing",)


@dataclass(frozen=True)
class Layout:
    """`names` and `keys` map from this project's name to Hugging Face's."""

    architecture: str  # the class in transformers
    names: dict  # tensor -> tensor in the file
    keys: dict  # config field -> key in config.json
    implied: dict  # config fields whose value is the same in all models of this family
    fixed: dict  # further keys of config.json and their only supported values: written, and checked when reading
    defaults: dict  # the class's defaults for keys that config.json may omit
    unused: tuple  # config fields that change nothing in a model of this family, or only its training


def llama_like(architecture, keys=(), names=(), implied=(), fixed=(), defaults=()):
    """Llama's layout, with the differences of another family."""
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
    shared = dict(norm="rms", norm_placement="pre", positions="rope", activation="swiglu", bias=False, qkv_bias=False)
    shared |= dict(qk_norm=False) | EXTENSIONS_OFF | dict(implied)
    implied = {field: value for field, value in shared.items() if field not in keys}
    fixed = {"hidden_act": "silu"} | dict(fixed)
    omitted = dict(rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, head_dim=None, tie_word_embeddings=False)
    unused = TRAINING_ONLY if "n_expert" in keys else TRAINING_ONLY + MIXTURE_ONLY
    return Layout(architecture, names, keys, implied, fixed, omitted | dict(defaults), unused)


def gpt2_names():
    parts = {f"blocks.{{}}.attn.w{x}": "h.{}.attn.c_attn" for x in "qkv"} | {"norm": "ln_f"}
    parts |= {"blocks.{}.norm1": "h.{}.ln_1", "blocks.{}.norm2": "h.{}.ln_2", "blocks.{}.attn.wo": "h.{}.attn.c_proj"}
    parts |= {"blocks.{}.ffn.up": "h.{}.mlp.c_fc", "blocks.{}.ffn.down": "h.{}.mlp.c_proj"}
    names = {f"{a}.{kind}": f"transformer.{b}.{kind}" for a, b in parts.items() for kind in ("weight", "bias")}
    return names | {"embed.weight": "transformer.wte.weight", "learned.weight": "transformer.wpe.weight"}


TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D stores (in, out)
IGNORED = ("lm_head.weight", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # tied copies and buffers
WINDOW = {"window": "sliding_window"}
MIXTURE = dict(n_expert_active="num_experts_per_tok")
MIXTURE |= dict(balancing="balancing", routed_scale="routed_scale")  # keys of this project only, for further training
LAYOUTS = {
    "qwen3": llama_like(
        "Qwen3ForCausalLM",
        keys=WINDOW,
        implied=dict(qk_norm=True),
        fixed=dict(attention_bias=False),
        defaults=dict(head_dim=128, sliding_window=4096),
    ),
    "gpt2": Layout(
        "GPT2LMHeadModel",
        gpt2_names(),
        dict(vocab_size="vocab_size", context="n_positions", n_layer="n_layer", n_head="n_head", width="n_embd")
        | dict(ffn_width="n_inner", norm_eps="layer_norm_epsilon"),
        dict(norm="layer", norm_placement="pre", positions="learned", activation="gelu", bias=True, qkv_bias=True)
        | dict(qk_norm=False, tie_embeddings=True)
        | EXTENSIONS_OFF,
        dict(activation_function="gelu_new", tie_word_embeddings=True, scale_attn_weights=True)
        | dict(scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
        dict(n_inner=None, layer_norm_epsilon=1e-5),
        (*TRAINING_ONLY, *MIXTURE_ONLY, "rope_theta", "rope_scaling", "n_kv_head", "head_dim"),  # heads: see layout_of
    ),
    "llama": llama_like(
        "LlamaForCausalLM",
        fixed=dict(attention_bias=False, mlp_bias=False),
        defaults=dict(num_key_value_heads=None),
    ),
    "qwen2": llama_like(
        "Qwen2ForCausalLM",
        keys=WINDOW,
        implied=dict(qkv_bias=True),
        defaults=dict(sliding_window=4096),
    ),
    "mistral": llama_like(
        "MistralForCausalLM",
        keys=WINDOW,
        defaults=dict(sliding_window=4096),
    ),
    "mixtral": llama_like(
        "MixtralForCausalLM",
        keys=WINDOW | MIXTURE | dict(n_expert="num_local_experts", expert_width="intermediate_size"),
        names={"blocks.{}.ffn.router.weight": "model.layers.{}.block_sparse_moe.gate.weight"}
        | {
            f"blocks.{{}}.ffn.{name}": f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{hf_name}.weight"
            for name, hf_name in dict(gate="w1", down="w2", up="w3").items()
        },
        implied=dict(n_shared_expert=0, moe_every=1, norm_topk_prob=True),
        defaults=dict(rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, balancing="aux", routed_scale=1.0),
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
        implied=dict(qk_norm=True, n_shared_expert=0),
        fixed=dict(attention_bias=False, mlp_only_layers=[]),
        defaults=dict(sliding_window=4096, decoder_sparse_step=1, norm_topk_prob=False, balancing="aux")
        | dict(routed_scale=1.0),
    ),
    "attention_to_alignment": None,  # this project's own names and fields, for what no class of transformers computes
}


# Keys of config.json in the own layout that are not fields of the config.
EXTRA_KEYS = ("model_type", "architectures", "dtype", "id2label", "label2id", "pad_token_id")


def layout_of(config, tensors=()):
    """The layout whose class in transformers computes exactly what this config does, or "attention_to_alignment" if
    none does. `tensors`: the names of a model's tensors; one that a layout does not know rules this layout out."""
    c = config.resolved()
    named = {re.sub(r"^blocks\.\d+", "blocks.{}", name) for name in tensors}
    whole_heads = c.n_kv_head == c.n_head and c.head_dim * c.n_head == c.width
    for kind, layout in LAYOUTS.items():
        if layout is None or (kind == "gpt2" and not whole_heads):
            continue
        if c.n_expert and (c.balancing == "bias" or math.frexp(c.routed_scale)[0] != 0.5):  # 0.5: a power of two
            continue
        if only_declared(c, {*layout.keys, *layout.unused}, layout.implied) and named <= layout.names.keys():
            return kind
    return "attention_to_alignment"


def layout_names(layout, head=None):
    """{tensor: its name in a file of the layout}; `head`: names of further tensors, which no layout has."""
    return (LAYOUTS[layout].names if LAYOUTS[layout] else {}) | (head or {})


def save_decoder(model, path, head=None, entries=None):
    """Write config.json and model.safetensors in the layout that computes what the model does, else in the own layout.

    head: {tensor: its name in the file} for tensors that the decoder does not have; entries(content of config.json) ->
    further entries for it.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    layout = layout_of(model.config, state.keys() - (head or {}).keys())
    if LAYOUTS[layout] is not None:
        state = scale_experts(state, model.config.routed_scale)
    config = to_hf_config(model.config, layout)
    config["dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    config |= {} if entries is None else entries(config)
    write_checkpoint(path, to_layout(state, layout_names(layout, head)), config)


def one_label(config, pad_id):
    """`entries` of save_decoder for a model with one score: it opens as transformers' …ForSequenceClassification with
    num_labels 1, which finds an answer's end by `pad_id`."""
    kinds = [re.sub("ForCausalLM|LMHeadModel", "", kind) for kind in config.get("architectures", [])]
    entries = {"architectures": [f"{kind}ForSequenceClassification" for kind in kinds]}
    return entries | {"id2label": {"0": "score"}, "label2id": {"score": 0}, "pad_token_id": pad_id}


def write_checkpoint(path, tensors, config):
    """Write config.json and model.safetensors. Both are written under temporary names before one is renamed: a crash or
    a full disk leaves the old ones, but for a kill between the two renames."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path / "config.json") as settings, replacing(path / "model.safetensors") as weights:
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_bytes(as_bytes(to_json(config, indent=2) + "\n"))


def load_decoder(model_class, path, dtype=torch.float32, dropout=0.0, head=None):
    """A checkpoint directory or hub name, in any layout -> a `model_class`. dtype None keeps the dtype of the file;
    head: as in save_decoder. Raises CheckpointError."""
    path = local_directory(path)
    layout, config = read_hf_config(path, model_class.config_class)
    shapes, get = open_safetensors(path)
    prefix = {"gpt2": "transformer.", "attention_to_alignment": ""}.get(layout, "model.")
    if any(name.startswith(prefix) for name in shapes):  # OpenAI's own upload of GPT-2 omits the prefix
        prefix = ""
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    # Both act in training only, and the next stage sets its own.
    config = replace(config, dropout=dropout, capacity_factor=None)
    names = layout_names(layout, head)
    model = load_weights(model_class, config, names, shapes, lambda name: get(name.removeprefix(prefix)), path, dtype)
    if LAYOUTS[layout] is not None and model.config.n_expert:
        model.load_state_dict(scale_experts(model.state_dict(), 1 / model.config.routed_scale))
    return model


class EmptyOnMeta(TorchFunctionMode):
    """A context in which torch.empty makes shapes without numbers. Small tables are computed as ever: on the meta
    device torch would load its decompositions for them, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **kwargs | {"device": "meta"} if function is torch.empty else kwargs)


def meta_model(model_class, config, where):
    """The model with its weights on the meta device. CheckpointError if its sizes are beyond any memory."""
    try:
        with NoInit(), EmptyOnMeta():
            return model_class(config)
    except RuntimeError as error:
        if not re.search("allocate|overflow", str(error)):
            raise
        raise CheckpointError(f"{where}: no memory holds a model of its config: {first_line(error)}") from None


def _by_file_name(keys, names):
    """{name in the file: [names of the tensors stored under it]}, such as {"model.norm.weight": ["norm.weight"], ...}.
    A tensor that `names` does not contain keeps its name; with names None all do."""
    groups = {}
    for name in keys:
        block = re.match(r"blocks\.(\d+)", name)
        pattern = name if block is None else name.replace(block[0], "blocks.{}", 1)
        file_name = (names or {}).get(pattern, pattern)
        groups.setdefault(file_name if block is None else file_name.replace("{}", block[1], 1), []).append(name)
    return groups


def scale_experts(state, factor):
    """Multiply the experts' output matrices by `factor`. The layouts of transformers have no routed_scale, so it is
    multiplied into the weights; exactly, because it is a power of two."""
    if factor in (None, 1.0):
        return state
    return {name: w * factor if name.endswith("down") and w.dim() == 3 else w for name, w in state.items()}


def to_layout(state, names):
    """A model's state dict -> {name in the file: tensor}."""
    tensors = {}
    for file_name, group in _by_file_name(state, names).items():
        tensor = torch.cat([state[name] for name in group]) if len(group) > 1 else state[group[0]]
        if "{}" in file_name:
            tensors |= {file_name.format(e): expert for e, expert in enumerate(tensor)}
        else:
            tensors[file_name] = tensor.t() if file_name.endswith(TRANSPOSED) else tensor
    return tensors


def from_layout(get, like, names):
    """get(name in the file) -> tensor; like: a state dict of the model, for names and shapes. Yields (name, tensor)."""
    for file_name, group in _by_file_name(like, names).items():
        if "{}" in file_name:
            tensor = torch.stack([get(file_name.format(e)) for e in range(len(like[group[0]]))])
        else:
            tensor = get(file_name).t() if file_name.endswith(TRANSPOSED) else get(file_name)
        yield from zip(group, tensor.split([len(like[name]) for name in group]), strict=True)


class NoInit(TorchFunctionMode):
    """A context in which torch.nn.init does nothing: weights that a file overwrites need not be drawn, which is
    slow."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def load_weights(model_class, config, names, shapes, get, where, dtype=torch.float32):
    """A `model_class` of `config` with the weights of a file. shapes: {name in the file: shape}; get(name in the file)
    -> tensor. Names and shapes are checked before the weights take memory. Raises CheckpointError, also on a weight
    that is not finite in `dtype`."""
    empty = meta_model(model_class, config, where).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in to_layout(empty, names).items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            raise CheckpointError(f"{where}: the weights lack {name!r}, which its config asks for")
        if name not in expected and not name.endswith(IGNORED):
            raise CheckpointError(f"{where}: the weights hold {name!r}, which its config does not explain")
        if shapes[name] != expected.get(name, shapes[name]):
            raise CheckpointError(f"{where}: {name} has shape {shapes[name]}, its config asks for {expected[name]}")
    with torch.random.fork_rng(devices=[]), NoInit():  # opening a file must not change the caller's random state
        model = model_class(config).to(dtype or get(next(iter(expected))).dtype)
    state = model.state_dict()
    for name, tensor in from_layout(get, empty, names):
        state[name].copy_(tensor)
    if not all(map(is_finite, state.values())):
        check_finite(to_layout(state, names), where)
    for name in shapes.keys() - expected.keys():
        tied = name.endswith("lm_head.weight")
        if tied and not torch.equal(get(name).to(state["embed.weight"]), state["embed.weight"]):
            raise CheckpointError(f"{where}: {name} is not the embedding, though its config calls the two tied")
    return model


def open_safetensors(path):
    """The weights of a directory, in one file or in shards -> {name: shape}, and a function get(name) -> tensor. Raises
    CheckpointError."""
    file, index = path / "model.safetensors", path / "model.safetensors.index.json"
    files = [file]
    if not file.exists() and index.exists():
        try:
            weight_map = read_json(index)["weight_map"]
            files = [path / name for name in sorted(set(weight_map.values()))]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{index} is corrupt: no JSON with a weight_map") from None
    shapes, handles = {}, {}
    for file in files:
        try:
            handle = safe_open(file, "pt")
            for name in handle.keys():  # noqa: SIM118, the handle is not a dict
                shapes[name], handles[name] = tuple(handle.get_slice(name).get_shape()), handle
        except FileNotFoundError:
            hint = "is it a checkpoint directory?" if len(files) == 1 else f"{index.name} names it as a shard"
            raise CheckpointError(f"{path} has no {file.name}; {hint}") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is corrupt or unreadable: {error}") from None
    return shapes, lambda name: handles[name].get_tensor(name)


def local_directory(path):
    """The directory of a checkpoint. If the path does not exist and looks like a hub name, owner/name, the checkpoint
    is downloaded from the Hugging Face hub or taken from its cache. Raises CheckpointError."""
    name, path = str(path), Path(path)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.parent.exists():
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        hint = "to take it for a name on the Hugging Face hub: pip install huggingface_hub"
        raise CheckpointError(f"{name} is not there; {hint}") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "model*.safetensors", "merges.txt"]))
    except Exception as error:  # of many types: no such name, no permission, no network
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{name} is not there, and the Hugging Face hub does not give it: {reason}") from None


def to_hf_config(config, layout):
    """The content of config.json, without the special tokens, which the tokenizer's files hold."""
    table = LAYOUTS[layout]
    if table is None:
        return {"model_type": layout, **asdict(config)}
    content = {"architectures": [table.architecture], "model_type": layout}
    content |= {key: getattr(config, field) for field, key in table.keys.items()} | table.fixed
    if layout.startswith("qwen"):  # the blocks from max_window_layers on have the window
        content |= {"use_sliding_window": config.window is not None}
        content |= {"max_window_layers": config.n_layer if config.window is None else 0}
    return content


def read_hf_config(path, config_class):
    """The config.json of a checkpoint directory -> (layout, a `config_class`). Raises CheckpointError."""
    file = Path(path) / "config.json"
    try:
        hf = read_json(file)
        kind = hf["model_type"]
    except FileNotFoundError:
        problem = "has no config.json" if Path(path).is_dir() else "is not there"
        raise CheckpointError(f"{path} {problem}; a checkpoint is a directory that save_pretrained wrote") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"{file} is not a model's config.json: no JSON with a model_type") from None
    if kind not in list(LAYOUTS):  # a list, because kind may be any JSON value, even an unhashable one
        raise CheckpointError(f"{file}: model_type {kind!r} is not known here; known: {', '.join(LAYOUTS)}")
    try:
        if LAYOUTS[kind] is not None:
            return kind, config_class(**from_hf_config(hf, kind))
        return kind, own_config(hf, config_class)
    except KeyError as missing:
        raise CheckpointError(f"{file} lacks {missing}") from None
    except (TypeError, AttributeError, ValueError, OverflowError) as error:  # wrong types; a CheckpointError from above
        raise CheckpointError(f"{file}: {error}") from None


def own_config(hf, config_class):
    """The content of config.json in the own layout -> a `config_class`. CheckpointError on a key that is none of its
    fields: leaving it out would change the model."""
    settings = {key: value for key, value in hf.items() if key not in EXTRA_KEYS}
    for key in settings.keys() - {f.name for f in fields(config_class)}:
        raise CheckpointError(f"{key} = {hf[key]!r} is no field of {config_class.__name__}")
    return config_class(**settings)


def from_hf_config(hf, kind):
    """The content of config.json in a layout -> {config field: value}."""
    layout = LAYOUTS[kind]
    # Settings that change the computation and are not implemented here must raise an error.
    for name, value in (layout.fixed | dict(quantization_config=None, partial_rotary_factor=1.0)).items():
        if hf.get(name, value) not in (value, None):
            raise CheckpointError(f"{name} = {hf[name]!r} is not supported, only {value!r}")
    hf = layout.defaults | hf
    if "num_local_experts" in hf:  # transformers 5 uses this name for Qwen3-MoE too
        hf.setdefault("num_experts", hf["num_local_experts"])
    new, old = ((hf.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    if new and old and any(new.get(k, v) != v for k, v in {"rope_type": old.get("type"), **old}.items() if k != "type"):
        raise CheckpointError("rope_scaling and rope_parameters say different things: keep one of them")
    rope = new or old  # transformers 5 writes the first, with the base
    hf["rope_theta"] = float(rope.get("rope_theta", hf.get("rope_theta", 1e4)))
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    hf["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None
    if scaled and hf.get("original_max_position_embeddings"):  # outside the dict it takes precedence
        hf["rope_scaling"]["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    if kind.startswith("qwen"):
        hf["sliding_window"] = _qwen_window(hf, kind)
    if kind == "mistral" and hf.get("layer_types"):  # Ministral
        hf["sliding_window"] = _window_of_all(hf["layer_types"], hf["sliding_window"], "sliding_window")
    values = layout.implied | {field: hf[key] for field, key in layout.keys.items()}
    if values.get("n_kv_head") is None:
        values["n_kv_head"] = values["n_head"]
    if kind == "gpt2" and values["ffn_width"] is None:
        values["ffn_width"] = 4 * values["width"]
    return values


def _qwen_window(hf, kind):
    """The window of a Qwen config. Qwen allows it in some blocks only; here all blocks have it or none."""
    if not hf.get("use_sliding_window"):
        return None
    n_layer = hf["num_hidden_layers"]
    full = 0 if kind == "qwen3_moe" else min(n_layer, hf.get("max_window_layers", 28))
    kinds = hf.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (n_layer - full)
    return _window_of_all(kinds, hf["sliding_window"], "use_sliding_window")


def _window_of_all(kinds, window, name):
    """kinds: of each block's attention -> the window that all have, or None."""
    if len(set(kinds)) > 1:
        raise CheckpointError(f"{name} is not supported in some blocks only")
    return window if "sliding_attention" in kinds else None
