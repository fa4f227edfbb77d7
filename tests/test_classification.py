"""support/classification.py: the bag of words, the confusion table, the mistakes that are shown."""

import numpy as np
import pytest
import torch

from data import Review, load_reviews
from support.classification import bag_of_words, confusion_table, write_mistakes


def test_bag_of_words_is_the_minimum_of_its_objective():
    train, valid, test = (load_reviews("sentiment", split)[:200] for split in ("train", "valid", "test"))
    found = bag_of_words(train, valid, test, strengths=(1e-2,))
    words = sorted(found["weights"])
    X = np.array([[word in r.text.split() for word in words] for r in train], dtype=float)
    y = np.array([r.label for r in train], dtype=float)
    w, b = np.zeros(len(words)), 0.0  # Newton's method, written out
    for _ in range(30):
        p = 1 / (1 + np.exp(-(X @ w + b)))
        Z = np.hstack([X, np.ones((len(X), 1))])
        gradient = Z.T @ (p - y) / len(X) + 1e-2 * np.append(w, 0)
        hessian = Z.T @ (Z * (p * (1 - p))[:, None]) / len(X) + 1e-2 * np.diag(np.append(np.ones(len(words)), 0))
        step = np.linalg.solve(hessian, gradient)
        w, b = w - step[:-1], b - step[-1]
    np.testing.assert_allclose([found["weights"][word] for word in words], w, atol=1e-3)
    for part, name in ((valid, "valid"), (test, "accuracy")):
        T = np.array([[word in r.text.split() for word in words] for r in part], dtype=float)
        assert found[name] == pytest.approx(np.mean((T @ w + b > 0) == [r.label == 1 for r in part]), abs=0.011)


def test_bag_of_words_knows_words_and_not_their_order():
    easy = [Review("a good film", 1), Review("a bad film", 0)] * 4
    assert bag_of_words(easy, easy, [Review("good unseen", 1), Review("unseen, bad!", 0)])["accuracy"] == 1
    order = [Review("good not bad", 1), Review("bad not good", 0)] * 4
    assert bag_of_words(order, order, order)["accuracy"] == 0.5
    assert bag_of_words(easy, easy, easy, strengths=(1e-4, 1e-3))["strength"] == 1e-3  # a tie: the stiffer one
    spaceless = [Review(text, label) for text, label in (("这部电影很好看！", 1), ("这部电影很难看！", 0))] * 4
    assert bag_of_words(spaceless, spaceless, [Review("好书", 1), Review("很难", 0)])["accuracy"] == 1
    mostly = [*easy, *[Review("a bad film", 0)] * 8]  # so stiff that only the majority counts, or not
    found = bag_of_words(mostly, mostly, [Review("a good film", 0)] * 4, strengths=(100.0, 1e-3))
    assert (found["strength"], found["valid"], found["accuracy"]) == (1e-3, 1.0, 0.0)  # chosen on validation, not test


def test_a_confusion_table_and_the_surest_mistakes(tmp_path):
    table = confusion_table([[5, 2], [1, 7]], ("negative", "positive")).splitlines()
    assert table[1].split() == ["negative", "5", "2"]
    assert table[2].split() == ["positive", "1", "7"]
    assert [line.split()[0] for line in confusion_table([[1] * 3] * 3, ("no", "yes")).splitlines()] == [
        "taken",
        "no",
        "yes",
        "2",
    ]
    reviews = [Review(text, label) for text, label in (("a", 0), ("b", 0), ("c", 1), ("d", 1))]
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.8, 0.2], [0.5, 0.5]])
    write_mistakes(tmp_path, reviews, p, ("negative", "positive"))
    sentences = [line for line in (tmp_path / "samples.md").read_text(encoding="utf-8").splitlines() if line]
    assert sentences == [
        "**negative with 80%, but it is positive**",
        "> c",
        "**positive with 70%, but it is negative**",
        "> b",
        "**negative with 50%, but it is positive**",
        "> d",
    ]
    write_mistakes(tmp_path, [Review("a", 1)] * 30, torch.tensor([[0.9, 0.1]] * 30), ("negative", "positive"))
    assert (tmp_path / "samples.md").read_text(encoding="utf-8").count("but it is") == 20
