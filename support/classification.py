"""Judging the encoder: both validation losses, the confusion table, the most confident mistakes, and a bag-of-words
baseline."""

import numpy as np
import torch
import torch.nn.functional as F

from support.files import may_fail, write_whole
from support.finite import diverged
from support.tables import text_table
from support.text_batches import pad_rows
from support.words import words_and_signs


@torch.no_grad()
def predict(encoder, rows, pad, batch=64):
    """Lists of ids -> (N, n_class) log-probabilities. DivergedError if they are not finite."""
    was_training = encoder.training
    encoder.eval()
    device = encoder.embed.weight.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together waste no padding
    pieces = [pad_rows([rows[i] for i in order[j : j + batch]], pad) for j in range(0, len(order), batch)]
    log_p = torch.cat([encoder(tokens.to(device), real.to(device)).log_softmax(-1).cpu() for tokens, real in pieces])
    encoder.train(was_training)
    if not log_p.isfinite().all():
        raise diverged("log-probabilities")
    return log_p[torch.tensor(order).argsort()]  # (N, n_class), as the rows came


def judge_labels(encoder, examples, pad, dist):
    """examples [(ids, label)], shared among the ranks -> {"accuracy", "loss", "confusion"}, the same on all of them.
    confusion[i][j] counts the texts of label i that were classified as j."""
    own, n_class = examples[dist.rank :: dist.world], encoder.config.n_class
    counts, loss = np.zeros((n_class, n_class)), 0.0
    if own:
        log_p, labels = predict(encoder, [ids for ids, _ in own], pad), torch.tensor([label for _, label in own])
        np.add.at(counts, (labels.numpy(), log_p.argmax(-1).numpy()), 1)
        loss = F.nll_loss(log_p, labels, reduction="sum").item()
    *flat, loss = dist.sum(*counts.flatten(), loss)
    confusion = np.array(flat).reshape(n_class, n_class).astype(int)
    n = len(examples)
    return {"accuracy": confusion.trace().item() / n, "loss": loss / n, "confusion": confusion.tolist()}


def validation_windows(stream, context):
    """A (tokens,) stream of at least one window -> at most 256 of them, spread evenly, (n, context)."""
    starts = np.linspace(0, len(stream) - context, min(256, len(stream) // context)).astype(int)
    return np.stack([stream[s : s + context] for s in starts]).astype(np.int64)


@torch.no_grad()
def validate_mlm(encoder, batch, dist):
    """Mean masked-LM loss of a TextBatch, in nats per masked token."""
    was_training = encoder.training
    encoder.eval()
    total = 0.0
    for rows in torch.arange(len(batch.tokens))[dist.rank :: dist.world].split(32):
        if len(rows) == 0:  # fewer windows than ranks
            continue
        x = batch.take(rows, dist.device)
        total -= encoder(x.tokens, targets=x.targets, masked=x.masked).sum().item()
    encoder.train(was_training)
    return dist.sum(total)[0] / max(1, batch.masked.sum().item())


def confusion_table(confusion, names):
    """confusion[i][j]: number of texts of label i that were classified as j. names: of the labels; labels without a
    name are shown as numbers."""
    names = [*names, *map(str, range(len(names), len(confusion)))]
    counts = [[name, *(f"{count:,}" for count in row)] for name, row in zip(names, confusion, strict=True)]
    return text_table([["", *(f"taken for {name}" for name in names)], *counts])


def write_mistakes(run_path, reviews, probabilities, names):
    """Write the 20 most confident wrong answers to samples.md. reviews: with .text and .label; probabilities (N,
    n_class)."""
    names = [*names, *map(str, range(len(names), probabilities.shape[1]))]
    confidence, answers = probabilities.amax(-1).tolist(), probabilities.argmax(-1).tolist()
    wrong = [(confidence[i], i) for i, review in enumerate(reviews) if answers[i] != review.label]
    text = ""
    for p, i in sorted(wrong, reverse=True)[:20]:
        answer, truth = names[answers[i]], names[reviews[i].label]
        text += f"**{answer} with {p:.0%}, but it is {truth}**\n\n> {reviews[i].text[:500]}\n\n"
    path = run_path / "samples.md"
    with may_fail(path):
        write_whole(path, text)


def bag_of_words(train, valid, test, strengths=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)):
    """Logistic regression on which words occur -> {"accuracy" on test, "valid", "strength", "weights" by word}.

    p(positive) = σ(b + Σ_{words of the text} w), minimising mean log-loss + λ/2 ‖w‖² by quasi-Newton steps (L-BFGS).
    λ is the value in `strengths` with the best validation accuracy. Words: see `support.words.words_and_signs`.
    """
    splits = (train, valid, test)
    texts = [[sorted(set(words_and_signs(r.text))) for r in split] for split in splits]
    words = sorted({word for text in texts[0] for word in text})
    word_ids = {word: i for i, word in enumerate(words)}

    def bags(split):  # the word ids of all texts in one tensor, and the position where each text begins
        bag_per_text = [[word_ids[word] for word in text if word in word_ids] for text in split]
        starts = np.cumsum([0] + [len(bag) for bag in bag_per_text])[:-1]
        return torch.tensor([i for bag in bag_per_text for i in bag], dtype=torch.long), torch.from_numpy(starts)

    X = [bags(split) for split in texts]
    y = [torch.tensor([r.label for r in split], dtype=torch.float64) for split in splits]
    w = torch.zeros(len(words), 1, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def scores(ids, starts):  # (texts,)
        return F.embedding_bag(ids, w, starts, mode="sum").squeeze(1) + b

    best = {"valid": -1.0}
    for strength in sorted(strengths, reverse=True):  # from strong to weak; each starts from the weights of the last
        optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

        def closure(strength=strength, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(scores(*X[0]), y[0]) + strength / 2 * w.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            accuracy = [((scores(*x) > 0) == (t > 0)).double().mean().item() for x, t in zip(X, y, strict=True)]
        if accuracy[1] > best["valid"]:
            weights = dict(zip(words, w.detach().squeeze(1).tolist(), strict=True))
            best = {"accuracy": accuracy[2], "valid": accuracy[1], "strength": strength, "weights": weights}
    return best
