"""support/shared_prompt.py: answers beside their prompts' keys are scored as in rows of their own."""

import pytest
import torch

from generate import generate
from support.shared_prompt import pack, round_up_to_8, shared_answer_logprobs
from transformer import Transformer, TransformerConfig, answer_logprobs, gpt2_config, token_logprobs


@pytest.mark.parametrize("sight", [{}, {"window": 4, "sinks": 1}], ids=["all", "window"])
def test_packed_answers_are_scored_as_if_each_stood_alone(sight):
    torch.manual_seed(0)
    sizes = dict(context=64, n_layer=2, n_head=2, n_kv_head=1, width=16)
    raw = Transformer(TransformerConfig(30, **sizes, **sight)).eval()
    prompts, sizes = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], (5, 3, 4)
    generator = torch.Generator().manual_seed(1)
    rollout = generate(raw, prompts, 9, n=5, stop_ids=tuple(range(22, 30)), generator=generator, temperature=0.8)
    rows = [ids[real].tolist() for ids, real in zip(rollout.ids, rollout.mask, strict=True)]
    groups = [rows[5 * g : 5 * g + n] for g, n in enumerate(sizes)]  # not as many to each prompt
    kept = [5 * g + r for g, n in enumerate(sizes) for r in range(n)]
    assert len({len(rows[k]) for k in kept}) > 2
    packed = pack(prompts, groups, pad=0, part_size=4)
    assert [len(part.rows) for part in packed.parts] == [4, 4, 4]
    logprobs, m = shared_answer_logprobs(raw, packed, 0.8), rollout.mask[kept]
    assert (logprobs[:, m.shape[1] :] == 0).all()
    logprobs = logprobs[:, : m.shape[1]]
    assert (logprobs[~m] == 0).all()
    torch.testing.assert_close(logprobs[m], rollout.logprobs[kept][m], atol=1e-4, rtol=1e-4)  # so the first ratio is 1
    up = torch.randn(logprobs.shape)
    together = torch.autograd.grad((logprobs * up).sum(), list(raw.parameters()))
    alone = 0.0
    for i, k in enumerate(kept):
        tokens, n = torch.tensor([prompts[k // 5] + rows[k]]), len(rows[k])
        alone = alone + (token_logprobs(raw, tokens, 0.8)[0, -n:] * up[i, :n]).sum()
    for a, b in zip(together, torch.autograd.grad(alone, list(raw.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_rounded_lengths_stay_within_the_context():
    """Prompts and answers that fill the context to its last token, of lengths that are no multiples of 8; and a long
    prompt's short answer beside a short prompt's long one, whose lengths together would leave it."""
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(30, context=18, n_layer=1, n_head=2, n_kv_head=1, width=16)).eval()
    prompts, answers = [[1] * 13, [2] * 4], [[[3, 4, 5, 6, 7], [8]], [[9, 10] * 7, [11, 12, 13]]]
    packed = pack(prompts, answers, pad=0)
    assert packed.tokens.shape[1] == 16  # 12 tokens of the longest prompt
    assert [part.tokens.shape[1] for part in packed.parts] == [16]
    logprobs = shared_answer_logprobs(raw, packed)
    for row, answer in enumerate(answer for group in answers for answer in group):
        expected = token_logprobs(raw, torch.tensor([prompts[row // 2] + answer]))[0, -len(answer) :]
        torch.testing.assert_close(logprobs[row, : len(answer)], expected, atol=1e-5, rtol=1e-5)


SIZES = {"vocab_size": 30, "context": 40, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "width": 16}
LAYOUTS = {
    "Qwen3's": TransformerConfig(**SIZES),
    "GPT-2's": gpt2_config(**SIZES | {"n_kv_head": 2}),
    "a window": TransformerConfig(**SIZES, window=4, sinks=1),
    "a mixture": TransformerConfig(**SIZES, n_expert=3, n_expert_active=2, balancing="none"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_plain_form_and_the_fast_form_are_equal_in_value_and_gradient(layout, temperature):
    torch.manual_seed(0)
    raw = Transformer(LAYOUTS[layout]).double()
    for p in raw.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6]]  # unequal in length and in the number of answers
    answers = [[[7, 8, 9, 1], [2]], [[3, 3, 3, 3, 3, 3, 3, 3, 3]], [[1, 2], [5, 6, 7, 8, 9], [29], [4, 1, 2]]]
    owners = [g for g, group in enumerate(answers) for _ in group]
    flat = [answer for group in answers for answer in group]
    plain, mask = answer_logprobs(raw, [prompts[g] for g in owners], flat, temperature)
    assert plain.shape == mask.shape == (7, 9)
    assert mask.sum(1).tolist() == [len(answer) for answer in flat]
    for part_size in (2, 64):
        fast = shared_answer_logprobs(raw, pack(prompts, answers, pad=0, part_size=part_size).to("cpu"), temperature)
        assert fast.shape == (7, 16)
        assert (fast[:, 9:] == 0).all()
        torch.testing.assert_close(fast[:, :9], plain, atol=1e-12, rtol=0)
        up = torch.randn(7, 9, dtype=torch.float64) * mask
        gradients = [torch.autograd.grad((x * up).sum(), list(raw.parameters())) for x in (fast[:, :9], plain)]
        plain, _ = answer_logprobs(raw, [prompts[g] for g in owners], flat, temperature)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_round_up_to_8():
    assert [round_up_to_8(n) for n in (1, 7, 8, 9, 16, 17)] == [8, 8, 8, 16, 16, 24]
