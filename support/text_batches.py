"""Whole texts as rows of tokens, for encoder.py: encoded, padded, then cut into micro-batches of like lengths."""

from dataclasses import dataclass

import torch

from sft import collate


def spaced(text):
    return " " + text.strip()  # " word" is a token, "word" often is not


def encode(tokenizer, text, context):
    """A text's ids after <|endoftext|>, so that an empty text has a row too. Of a text that is too long, the first
    quarter of the context and the end (arXiv:1905.05583)."""
    ids = [tokenizer.endoftext_id, *tokenizer.encode(spaced(text))]
    return ids if len(ids) <= context else ids[: context // 4] + ids[context // 4 - context :]


def labelled_rows(reviews, tokenizer, context):
    """Reviews -> [(ids, label), …]."""
    return [(encode(tokenizer, review.text, context), review.label) for review in reviews]


def pad_rows(rows, pad):
    """Lists of ids -> tokens (B, T), real (B, T) False on padding: padded on the right."""
    padded = collate([(ids, [True] * len(ids)) for ids in rows], pad)
    return padded.tokens, padded.loss_mask


@dataclass
class TextBatch:
    """Rows of tokens; with them the tokens that were masked (masked-LM), or each row's label."""

    tokens: torch.Tensor  # (B, T) x̃
    real: torch.Tensor  # (B, T) False on padding
    targets: torch.Tensor | None = None  # (B, T) x
    masked: torch.Tensor | None = None  # (B, T) True on M
    labels: torch.Tensor | None = None  # (B,)

    def take(self, rows, device):
        """Some of the rows, cut to the longest of them, on a device."""
        T = self.real[rows].sum(1).max().item()

        def cut(x):  # (B, T) -> (b, shorter T)
            return None if x is None else x[rows][:, :T].to(device)

        labels = None if self.labels is None else self.labels[rows].to(device)  # (b,)
        return TextBatch(cut(self.tokens), cut(self.real), cut(self.targets), cut(self.masked), labels)

    def micro_batches(self, size, dist):
        """This rank's share of the rows, in pieces of at most `size`, sorted by length to waste no padding."""
        share, lengths = len(self.tokens) // dist.world, self.real.sum(1).tolist()
        own = sorted(range(dist.rank * share, (dist.rank + 1) * share), key=lambda row: lengths[row])
        return [self.take(own[i : i + size], dist.device) for i in range(0, share, size)]
