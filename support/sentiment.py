"""Generated film reviews, positive or negative, for the encoder's classification without a download.

A review has up to two neutral sentences and one or two verdicts of the same sentiment, in any order. A verdict contains
both positive and negative words ("the plot may be dull ; what stays is the moving cast ."), so a bag of words learns
little: the sentiment depends on where the words are.
"""

import random

from support.splits import check_split, split_of

# In a sentence marked +, {v} is a word of the review's own sentiment and {o} one of the opposite sentiment; in a
# sentence marked -, the other way round. {a} and {b} are parts of a film.
VERDICTS = """
+ the {a} is {v} .
+ i find the {a} {v} .
- the {a} is not {v} .
- the {a} is anything but {v} .
- nobody could call the {a} {v} .
+ i had heard that the {a} is {o} , but it is {v} .
- my {f} finds the {a} {v} , i do not .
+ although the {a} is {o} , the {b} is {v} .
+ the {a} is {v} , even if the {b} is {o} .
+ the {a} may be {o} ; what stays is the {v} {b} .
- one {v} {b} does not save a film as {o} as this one .
+ the {a} is not {o} , it is {v} .
"""
NEUTRAL = """
we saw it on a {d} with my {f} .
it runs for about two hours .
the {a} is by a newcomer .
it opens in the city on {d} .
my {f} had read the book .
there is a song at the end .
"""
WORDS = """
a acting plot camera music dialogue ending pace cast script story humour editing
d monday tuesday wednesday thursday friday saturday sunday
f sister brother friend neighbour teacher cousin mother father
praise superb moving clever funny warm fresh gripping honest rich bold lovely witty subtle tender sharp
blame dull clumsy tired flat cold noisy silly shallow stale muddled dreary lazy bland hollow forced
"""
VERDICTS, NEUTRAL, WORDS = (table.strip().split("\n") for table in (VERDICTS, NEUTRAL, WORDS))
REVIEW_WORDS = {line.split()[0]: line.split()[1:] for line in WORDS}


def sentiment_review(rng: random.Random) -> tuple[str, int]:
    """-> (text, label): 1 for a positive review, 0 for a negative one."""
    label = rng.randrange(2)
    sentences = [rng.choice(NEUTRAL) for _ in range(rng.randrange(3))]
    for _ in range(rng.choice((1, 1, 2))):
        sign, _, sentence = rng.choice(VERDICTS).partition(" ")
        good = (sign == "+") == bool(label)
        for slot, kind in (("{v}", "praise" if good else "blame"), ("{o}", "blame" if good else "praise")):
            sentence = sentence.replace(slot, rng.choice(REVIEW_WORDS[kind]))
        sentences.append(sentence)
    rng.shuffle(sentences)
    filled = []
    for sentence in sentences:
        slots = {name: rng.choice(words) for name, words in REVIEW_WORDS.items()}
        slots["b"] = rng.choice([word for word in REVIEW_WORDS["a"] if word != slots["a"]])
        filled.append(sentence.format_map(slots))
    return " ".join(filled), label


def sentiment_reviews(split: str, n: int, seed: int = 0) -> list[tuple[str, int]]:
    """n different reviews of one split. A longer list begins with the shorter one."""
    check_split(split)
    rng, reviews = random.Random(f"sentiment/{seed}/{split}"), {}
    while len(reviews) < n:
        review = sentiment_review(rng)
        if split_of(review[0]) == split:
            reviews.setdefault(review[0], review)
    return list(reviews.values())
