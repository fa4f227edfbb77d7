"""How far a policy has moved from a reference: the KL between them, from samples, for the reports of the stages."""

import torch
import torch.nn.functional as F

from evaluate import kl_estimate
from generate import generate
from lora import lora_off
from support.shared_prompt import pack, shared_answer_logprobs


@torch.no_grad()
def sampled_kl(
    policy, reference, tokenizer, prompts, max_new_tokens, dist, seed=0, batch=64, *, ref_prompts=None, respond=None
):
    """KL(π ‖ π_ref) in nats per token: the mean of k3 over the tokens of one answer of the policy to each prompt (lists
    of ids). The reference may be the policy itself, then without its adapters. ref_prompts: those after which the
    reference reads the answers; default: the same.

    The prompts are dealt out to the ranks; a prompt has the same random numbers whichever rank answers it. Under FSDP
    call it within `support.sharding.whole`, under the run's autocast.
    """
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))  # (N, T)
    own, uniforms = prompts[dist.rank :: dist.world], uniforms[dist.rank :: dist.world]
    total, n_tokens = 0.0, 0
    for i in range(0, len(own), batch):
        chunk, drawn = own[i : i + batch], uniforms[i : i + batch]
        sampling = {"stop_ids": tokenizer.stop_ids, "uniforms": drawn}
        rollout = (respond or generate)(policy, chunk, max_new_tokens, **sampling)
        answers = [[ids] for ids in rollout.rows]
        packed = pack(chunk, answers, tokenizer.endoftext_id).to(dist.device)
        seen = ref_prompts and ref_prompts[dist.rank :: dist.world][i : i + batch]
        with lora_off(policy):
            ref_packed = pack(seen, answers, tokenizer.endoftext_id).to(dist.device) if seen else packed
            ref_logprobs = shared_answer_logprobs(reference, ref_packed)  # (b, T), 0 after an answer's end
        logprobs = shared_answer_logprobs(policy, packed)
        # Of the policy's own tokens: (b, T) of the packed answers is rounded up to 8, the rollout's is its longest row.
        # The others are zeroed first: a tool's token may be so unlikely that k3 overflows, and inf · 0 = NaN.
        own_tokens = F.pad(rollout.mask, (0, logprobs.shape[1] - rollout.mask.shape[1]))
        total += kl_estimate(*(x.masked_fill(~own_tokens, 0.0) for x in (logprobs, ref_logprobs))).sum().item()
        n_tokens += rollout.mask.sum().item()
    total, n_tokens = dist.sum(total, n_tokens)
    return total / n_tokens
