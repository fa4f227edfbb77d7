"""The words of a text in any script: for token F1, and for a bag of words."""

from itertools import pairwise

import regex

UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"  # no spaces between the words
CHARACTER = rf"(?={UNSPACED})[\p{{L}}\p{{N}}]\p{{M}}*"  # with its combining marks
WORD = regex.compile(rf"(?:{CHARACTER})+|(?:(?!{UNSPACED})[\p{{L}}\p{{N}}_]\p{{M}}*)+")
SIGN = r"[^\p{L}\p{N}_\s]"
WORD_OR_SIGN = regex.compile(rf"(?:{CHARACTER})+|(?:(?!{UNSPACED})[\p{{L}}\p{{N}}_']\p{{M}}*)+|{SIGN}")
CHARACTER = regex.compile(CHARACTER)


def words(text):
    """Lower case, without punctuation and articles, much as SQuAD compares answers (arXiv:1606.05250)."""
    return [word for word in split(text, WORD) if word not in ("a", "an", "the")]


def words_and_signs(text):
    """Lower case: runs of letters, digits and apostrophes, and every other character by itself."""
    return split(text, WORD_OR_SIGN)


def split(text, pattern):
    """Where a script has no spaces between words, its characters and the pairs of neighbours stand for them: 灰色 is
    灰, 色 and 灰色. Characters alone say little where they are letters: two Thai sentences share half of theirs by
    chance."""
    words = []
    for word in pattern.findall(text.lower()):
        characters = CHARACTER.findall(word)
        words += [*characters, *map("".join, pairwise(characters))] if characters else [word]
    return words
