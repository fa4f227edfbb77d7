"""support/sentiment.py: the generated reviews."""

import collections
import re

import numpy as np

from data import load_reviews
from support import sentiment, splits


def test_generated_reviews():
    parts = {split: load_reviews("sentiment", split) for split in splits.SPLITS}
    assert [len(part) for part in parts.values()] == [8000, 1000, 1000]
    for split, part in parts.items():
        assert all(splits.split_of(r.text) == split for r in part)
        assert len({r.text for r in part}) == len(part)
        assert 0.45 < np.mean([r.label for r in part]) < 0.55
        assert not any("{" in r.text or "}" in r.text for r in part)
    assert sentiment.sentiment_reviews("valid", 50) == parts["valid"][:50]
    assert sentiment.sentiment_reviews("valid", 50, seed=1) != parts["valid"][:50]


def test_the_label_of_a_generated_review_is_what_its_verdicts_say():
    """Read by a list of its own: for each kind of sentence, which word decides and whether it is turned round."""
    praise, blame = set(sentiment.REVIEW_WORDS["praise"]), set(sentiment.REVIEW_WORDS["blame"])
    readings = [
        (r"the \w+ is not (\w+) , it is (\w+) \.", 2, True),
        (r"one (\w+) \w+ does not save a film as (\w+) as this one \.", 2, True),
        (r"the \w+ may be (\w+) ; what stays is the (\w+) \w+ \.", 2, True),
        (r"the \w+ is (\w+) , even if the \w+ is (\w+) \.", 1, True),
        (r"although the \w+ is (\w+) , the \w+ is (\w+) \.", 2, True),
        (r"i had heard that the \w+ is (\w+) , but it is (\w+) \.", 2, True),
        (r"my \w+ finds the \w+ (\w+) , i do not \.", 1, False),
        (r"nobody could call the \w+ (\w+) \.", 1, False),
        (r"the \w+ is anything but (\w+) \.", 1, False),
        (r"the \w+ is not (\w+) \.", 1, False),
        (r"i find the \w+ (\w+) \.", 1, True),
        (r"the \w+ is (\w+) \.", 1, True),
    ]
    kinds = collections.Counter()
    for review in load_reviews("sentiment", "valid"):
        text, found = review.text, []
        for pattern, group, straight in readings:
            for match in re.finditer(pattern, text):
                word = match[group]
                assert word in praise | blame
                found.append((word in praise) == straight)
                kinds[pattern] += 1
            text = re.sub(pattern, "", text)
        assert found, review
        assert set(found) == {bool(review.label)}, review
        assert not (praise | blame) & set(text.split()), review
    assert len(kinds) == len(readings)
