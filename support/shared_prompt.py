"""Scoring several answers to a prompt that is computed only once: the fast form of transformer.answer_logprobs.

All R answers read the same keys and values of their prompt, so it is computed once instead of R times, forward and
backward. (One row with the prompt and all R answers would save the same passes, but its attention grows with the square
of all answers together.)
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from attention import causal_mask


def round_up_to_8(n):
    """n rounded up to a multiple of 8. For each new length oneDNN compiles new bf16 kernels on a CPU, and torch.compile
    recompiles the model: a little padding costs less than many lengths."""
    return -(-n // 8) * 8


class SharedKeys:
    """A KV cache for training: nothing is written in place, so the gradient flows back through the keys and values."""

    def __init__(self, past=(), length=0):
        """past: (keys, values) of each layer, which the new ones are appended to."""
        self.past, self.layers, self.length = past, [], length  # layers: past and new (keys, values) together

    def update(self, layer, k, v):
        if self.past:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.past[layer], (k, v), strict=True))  # (B, G, S, D)
        self.layers.append((k, v))
        return k, v

    def repeat(self, prompt_index):
        """A cache for answers: row i holds the keys and values of prompt prompt_index[i]."""
        past = [(k.index_select(0, prompt_index), v.index_select(0, prompt_index)) for k, v in self.layers]
        return SharedKeys(past, self.length)


@dataclass
class AnswerPart:
    """b answers of similar length, padded to T. The prompt's last token is put before each answer, because it predicts
    the answer's first token; the answer's last token is left out, because its prediction is not needed."""

    rows: torch.Tensor  # (b,) indices of these answers among all k
    prompt_index: torch.Tensor  # (b,) index of each answer's prompt
    tokens: torch.Tensor  # (b, T) the prompt's last token, then the answer without its last token
    positions: torch.Tensor  # (b, T)
    targets: torch.Tensor  # (b, T) the answer
    visible: torch.Tensor  # (b, T, S + T) the real tokens of the prompt, and the answer's tokens up to the query

    def to(self, device):
        return replace(self, **{name: x.to(device) for name, x in vars(self).items()})


@dataclass
class PackedAnswers:
    """n prompts, each once, and k answers that read the prompts' keys and values; made by `pack`."""

    tokens: torch.Tensor  # (n, S) the prompts without their last tokens, padded on the left
    positions: torch.Tensor  # (n, S)
    real: torch.Tensor  # (n, S) False on padding
    parts: list  # of AnswerPart, sorted by length: the last part has the longest answers
    lengths: torch.Tensor  # (k,) number of tokens of each answer

    def to(self, device):
        moved = {name: x.to(device) for name, x in vars(self).items() if name != "parts"}
        return replace(self, **moved, parts=[part.to(device) for part in self.parts])

    def outputs(self, model, options=None):
        """Run a decoder over the prompts, then over the answers of each part, which also attend to their prompts' keys.
        Yields the output for each part, (b, T) or (b, T, …). options(part): further keyword arguments of that call."""
        prompts = SharedKeys()
        model(self.tokens, self.positions, self.real, prompts, last_only=True)
        for part in self.parts:
            keywords = {} if options is None else options(part)
            yield model(part.tokens, part.positions, part.visible, prompts.repeat(part.prompt_index), **keywords)

    def in_order(self, outputs):
        """The outputs of all parts, a list of (b, T) or (b, T, V) -> (k, T) or (k, T, V) in the order of the answers, 0
        after an answer's end."""
        T = outputs[-1].shape[1]
        padded = torch.cat([F.pad(x, (0, 0) * (x.dim() - 2) + (0, T - x.shape[1])) for x in outputs])  # (k, T, …)
        padded = padded[torch.cat([part.rows for part in self.parts]).argsort()]
        real = torch.arange(T, device=padded.device) < self.lengths[:, None]  # (k, T)
        return padded * (real if padded.dim() == 2 else real[:, :, None])


def pack(prompts, answers, pad, part_size=64):
    """prompts: n lists of ids; answers: for each prompt a list of lists of ids, k in all -> PackedAnswers. Each part
    has a quarter of the answers, or `part_size` of them if that is more."""
    S = round_up_to_8(max(1, *(len(p) - 1 for p in prompts)))
    tokens, real = torch.full((len(prompts), S), pad), torch.zeros(len(prompts), S, dtype=torch.bool)
    for g, prompt in enumerate(prompts):
        tokens[g, S - len(prompt) + 1 :] = torch.tensor(prompt[:-1], dtype=torch.long)
        real[g, S - len(prompt) + 1 :] = True
    flat = [(g, answer) for g, group in enumerate(answers) for answer in group]
    lengths = torch.tensor([len(answer) for _, answer in flat])
    order, parts = lengths.argsort(stable=True), []
    for rows in order.split(max(part_size, math.ceil(len(flat) / 4))):
        prompt_index, part_answers = (list(column) for column in zip(*(flat[k] for k in rows.tolist()), strict=True))
        b, T = len(part_answers), round_up_to_8(len(part_answers[-1]))
        x, y = torch.full((b, T), pad), torch.full((b, T), pad)
        for i, (g, answer) in enumerate(zip(prompt_index, part_answers, strict=True)):
            n = len(answer)
            x[i, :n], y[i, :n] = torch.tensor([prompts[g][-1], *answer[:-1]]), torch.tensor(answer)
        prompt_index = torch.tensor(prompt_index)
        offsets = torch.minimum(torch.arange(T), lengths[rows, None] - 1)  # (b, T) padding must stay inside the context
        positions = real.sum(1)[prompt_index][:, None] + offsets  # (b, T)
        prompt_visible = real[prompt_index][:, None].expand(b, T, S)
        visible = torch.cat([prompt_visible, causal_mask(T, T).expand(b, T, T)], dim=2)  # (b, T, S + T)
        parts.append(AnswerPart(rows, prompt_index, x, positions, y, visible))
    return PackedAnswers(tokens, (real.cumsum(1) - 1).clamp(min=0), real, parts, lengths)


def shared_answer_logprobs(model, packed, temperature=1.0):
    """log π of every token of the answers in `packed` -> (k, T), 0 after an answer's end; T is at least the length of
    the longest answer. Equal to transformer.answer_logprobs in value and gradient."""
    options = {"temperature": temperature}
    return packed.in_order(list(packed.outputs(model, lambda part: options | {"targets": part.targets})))


def shared_answer_logits(model, packed):
    """The logits that predict every token of the answers in `packed` -> (k, T, V), 0 after an answer's end; T as in
    `shared_answer_logprobs`."""
    return packed.in_order(list(packed.outputs(model)))
