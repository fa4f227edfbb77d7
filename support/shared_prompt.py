"""Scoring answers that read one prompt's keys and values: the fast form of transformer.answer_logprobs.

With R answers to a prompt, R − 1 of R passes over the prompt are saved, forward and backward. (One row with all R after
the prompt would save them too, but the scores then grow with the square of the R answers together.)
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from attention import causal_mask


def round_up_to_8(n):
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


@dataclass
class AnswerPart:
    """b answers of like length, T or up to 7 less. A prompt's last token predicts a different first token in each
    answer, so it stands in front of each, and what an answer's last token predicts is left out."""

    rows: torch.Tensor  # (b,) which of all k answers they are
    owners: torch.Tensor  # (b,) which prompt each one reads
    tokens: torch.Tensor  # (b, T) the prompt's last token, then the answer without its last
    positions: torch.Tensor  # (b, T)
    targets: torch.Tensor  # (b, T) the answer
    visible: torch.Tensor  # (b, T, S + T) real tokens of the prompt, and of the answer the ones up to the query

    def to(self, device):
        return replace(self, **{name: x.to(device) for name, x in vars(self).items()})


@dataclass
class PackedAnswers:
    """n prompts once each, and k answers that read the prompts' keys and values; see `pack`."""

    tokens: torch.Tensor  # (n, S) the prompts without their last token, padded on the left
    positions: torch.Tensor  # (n, S)
    real: torch.Tensor  # (n, S) False on pads
    parts: list  # of AnswerPart, by length: the last one's answers are the longest
    lengths: torch.Tensor  # (k,) tokens of each answer

    def to(self, device):
        moved = {name: x.to(device) for name, x in vars(self).items() if name != "parts"}
        return replace(self, **moved, parts=[part.to(device) for part in self.parts])

    def outputs(self, model, options=None):
        """Run a decoder over the prompts, then over each part's answers beside their prompts' keys; yields what comes
        back of each part, (b, T) or (b, T, …). options(part): further arguments of that call."""
        prompts = SharedKeys()
        model(self.tokens, self.positions, self.real, prompts, last_only=True)
        for part in self.parts:
            more = {} if options is None else options(part)
            yield model(part.tokens, part.positions, part.visible, prompts.of(part.owners), **more)

    def in_order(self, outputs):
        """What came back of each part, a list of (b, T) -> (k, T) in the answers' order, 0 after an answer's end."""
        T = outputs[-1].shape[1]
        padded = torch.cat([F.pad(x, (0, T - x.shape[1])) for x in outputs])  # (k, T)
        padded = padded[torch.cat([part.rows for part in self.parts]).argsort()]
        return padded * (torch.arange(T, device=padded.device) < self.lengths[:, None])


def pack(prompts, answers, pad, most=64):
    """prompts: n lists of ids; answers: to each a list of lists of ids, k in all -> PackedAnswers, in parts of a
    quarter of the answers, or of `most` of them if that is more."""
    S = round_up_to_8(max(1, *(len(p) - 1 for p in prompts)))
    tokens, real = torch.full((len(prompts), S), pad), torch.zeros(len(prompts), S, dtype=torch.bool)
    for g, prompt in enumerate(prompts):
        tokens[g, S - len(prompt) + 1 :] = torch.tensor(prompt[:-1], dtype=torch.long)
        real[g, S - len(prompt) + 1 :] = True
    flat = [(g, answer) for g, group in enumerate(answers) for answer in group]
    lengths = torch.tensor([len(answer) for _, answer in flat])
    order, parts = lengths.argsort(stable=True), []
    for rows in order.split(max(most, math.ceil(len(flat) / 4))):
        owners, chosen = (list(part) for part in zip(*(flat[k] for k in rows.tolist()), strict=True))
        b, T = len(chosen), round_up_to_8(len(chosen[-1]))
        x, y = torch.full((b, T), pad), torch.full((b, T), pad)
        for i, (g, answer) in enumerate(zip(owners, chosen, strict=True)):
            n = len(answer)
            x[i, :n], y[i, :n] = torch.tensor([prompts[g][-1], *answer[:-1]]), torch.tensor(answer)
        owners = torch.tensor(owners)
        within = torch.minimum(torch.arange(T), lengths[rows, None] - 1)  # (b, T) pads must not leave the context
        positions = real.sum(1)[owners][:, None] + within  # (b, T)
        visible = torch.cat([real[owners][:, None].expand(b, T, S), causal_mask(T, T).expand(b, T, T)], dim=2)
        parts.append(AnswerPart(rows, owners, x, positions, y, visible))
    return PackedAnswers(tokens, (real.cumsum(1) - 1).clamp(min=0), real, parts, lengths)


def shared_answer_logprobs(model, packed, temperature=1.0):
    """log π of every token of the answers that `pack` packed -> (k, T), 0 after an answer's end. T is at least the
    longest answer's length. Equal to transformer.answer_logprobs in value and gradient."""
    options = {"temperature": temperature}
    return packed.in_order(list(packed.outputs(model, lambda part: options | {"targets": part.targets})))
