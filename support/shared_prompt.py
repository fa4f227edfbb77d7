"""Scoring answers that read one prompt's keys and values: the fast form of transformer.answer_logprobs."""

import math

import torch
import torch.nn.functional as F

from attention import causal_mask


def whole_eights(n):
    """n rounded up to a multiple of 8. For a length that no earlier batch had, oneDNN compiles new bf16 kernels on a
    CPU, and torch.compile everything: a little padding costs less than many lengths."""
    return -(-n // 8) * 8


class SharedKeys:
    """A cache for training: nothing is written in place, so the gradient flows back through the keys and values."""

    def __init__(self, past=(), length=0):
        self.past, self.seen, self.length = past, [], length  # (keys, values) of each layer: given, and with the new

    def update(self, layer, k, v):
        if self.past:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.past[layer], (k, v), strict=True))  # (B, G, S, D)
        self.seen.append((k, v))
        return k, v

    def of(self, owners):
        """What was seen, once for each of these rows."""
        return SharedKeys([(k.index_select(0, owners), v.index_select(0, owners)) for k, v in self.seen], self.length)


def pack(prompts, answers, pad, most=64):
    """Prompts once each, and batches of answers that read the prompts' keys and values: with R answers to a prompt,
    R − 1 of R prompt passes are saved, forward and backward. (All R behind the prompt in one row would save them too,
    but the scores then grow with the square of the R answers together.)

    prompts: n lists of ids; answers: n lists of lists of ids, k in all. A prompt's last token predicts a different
    first token in each answer, so it stands in front of each instead. Returns
        tokens, positions, real (n, S): the prompts without their last token, padded on the left;
        parts, a list: answers of like length, a quarter of all or `most` of them, as (rows (b,): which of the k they
            are; owners (b,): whose prompt each reads; tokens, positions, targets (b, T); visible (b, T, S + T));
        lengths (k,): how many tokens each answer has.
    """
    S = whole_eights(max(1, *(len(p) - 1 for p in prompts)))
    tokens, real = torch.full((len(prompts), S), pad), torch.zeros(len(prompts), S, dtype=torch.bool)
    for g, prompt in enumerate(prompts):
        tokens[g, S - len(prompt) + 1 :] = torch.tensor(prompt[:-1], dtype=torch.long)
        real[g, S - len(prompt) + 1 :] = True
    flat = [(g, answer) for g, group in enumerate(answers) for answer in group]
    lengths = torch.tensor([len(answer) for _, answer in flat])
    order, parts = lengths.argsort(stable=True), []
    for rows in order.split(max(most, math.ceil(len(flat) / 4))):
        owners, chosen = (list(part) for part in zip(*(flat[k] for k in rows.tolist()), strict=True))
        b, T = len(chosen), whole_eights(len(chosen[-1]))
        x, y = torch.full((b, T), pad), torch.full((b, T), pad)
        for i, (g, answer) in enumerate(zip(owners, chosen, strict=True)):
            n = len(answer)
            x[i, :n], y[i, :n] = torch.tensor([prompts[g][-1], *answer[:-1]]), torch.tensor(answer)
        owners = torch.tensor(owners)
        within = torch.minimum(torch.arange(T), lengths[rows, None] - 1)  # (b, T) pads must not leave the context
        positions = real.sum(1)[owners][:, None] + within  # (b, T)
        visible = torch.cat([real[owners][:, None].expand(b, T, S), causal_mask(T, T).expand(b, T, T)], dim=2)
        parts.append((rows, owners, x, positions, y, visible))
    return tokens, (real.cumsum(1) - 1).clamp(min=0), real, parts, lengths


def moved(packed, device):
    """The same on the device."""
    return tuple(
        x.to(device) if torch.is_tensor(x) else [tuple(t.to(device) for t in part) for part in x] for x in packed
    )


def in_order(found, packed):
    """What was found for each part's answers, (b, T) each -> (k, T) in the answers' order, 0 behind an answer's end."""
    *_, parts, lengths = packed
    T = found[-1].shape[1]  # the last part's are the longest
    found = torch.cat([F.pad(rows, (0, T - rows.shape[1])) for rows in found])  # (k, T)
    found = found[torch.cat([part[0] for part in parts]).argsort()]
    return found * (torch.arange(T, device=found.device) < lengths[:, None])


def answer_logprobs(model, packed, temperature=1.0):
    """log π of every token of the answers that `pack` packed -> (k, T), 0 behind an answer's end. T is at least the
    longest answer's length."""
    tokens, positions, real, parts, _ = packed
    prompts = SharedKeys()
    model(tokens, positions, real, prompts, last_only=True)
    logprobs = [
        model(x, at, visible, prompts.of(owners), targets=y, temperature=temperature)
        for _, owners, x, at, y, visible in parts
    ]
    return in_order(logprobs, packed)
