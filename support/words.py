"""The words of a text in any script, for token F1."""

from itertools import pairwise

import regex

UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"  # no spaces between the words
CHARACTER = rf"(?={UNSPACED})[\p{{L}}\p{{N}}]\p{{M}}*"  # with its combining marks
RUN = regex.compile(rf"(?:{CHARACTER})+|(?:(?!{UNSPACED})[\p{{L}}\p{{N}}_]\p{{M}}*)+")
CHARACTER = regex.compile(CHARACTER)


def words(text):
    """Lower case, without punctuation and articles, much as SQuAD compares answers (arXiv:1606.05250).

    Where a script has no spaces between words, its characters and the pairs of neighbours stand for them: 灰色 is 灰,
    色 and 灰色. Characters alone say little where they are letters: two Thai sentences share half of theirs by chance.
    """
    words = []
    for run in RUN.findall(text.lower()):
        characters = CHARACTER.findall(run)
        words += [*characters, *map("".join, pairwise(characters))] if characters else [run]
    return [word for word in words if word not in ("a", "an", "the")]
