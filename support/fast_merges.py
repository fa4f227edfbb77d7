"""The merges of a BPE training, fast: those of tokenizer_bpe.train_bpe_naive, however long the words are.

All words stand in one row, with a GAP between two. A merge visits the places of its pair, which `where` lists, and
changes only the pairs next to them. A heap gives the best pair. Its counts may be outdated, but never too low: a pair
is pushed again whenever its count grows, and one that is popped with an outdated count is pushed back with the right
one. Until the end a byte is replaced by its place in BYTE_ORDER: the heap then breaks ties as tokenizer_bpe.tie_order
does.
"""

import heapq
from array import array
from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise

from support.tokenizer_files import BYTE_ORDER, BYTE_PLACE

GAP = -1  # no id, so that no pair crosses it


def learn_merges(words, n_merges):
    """words: {bytes: how often} -> [(left id, right id), …]; fewer than n_merges if every word is one token before."""
    ids, times = [GAP], [0]  # the token at each place; the count of its word
    for word, count in words.items():
        ids += [*word.translate(BYTE_PLACE), GAP]
        times += [count] * (len(word) + 1)
    before, after = array("q", range(-1, len(ids) - 1)), array("q", range(1, len(ids) + 1))  # each place's neighbours
    pairs, where = Counter(), defaultdict(partial(array, "q"))  # pair -> its count; -> the places it is at, or was once
    for place, pair in enumerate(pairwise(ids)):
        if GAP not in pair:
            pairs[pair] += times[place]
            where[pair].append(place)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:
            if pairs[best]:
                heapq.heappush(heap, (-pairs[best], best))
            continue
        (left, right), new, grown = best, 256 + len(merges), set()
        for i in where.pop(best):  # from left to right, as they were entered: in "aaa" the first two
            j = after[i]
            if ids[i] != left or ids[j] != right:
                continue  # another merge took one of them
            ids[i], ids[j] = new, None
            h, k = before[i], after[j]  # h i j k -> h i k
            after[i], before[k] = k, i
            for place, was, now in ((h, (ids[h], left), (ids[h], new)), (i, (right, ids[k]), (new, ids[k]))):
                if GAP not in now:
                    pairs[was] -= times[i]
                    pairs[now] += times[i]
                    where[now].append(place)
                    grown.add(now)
        del pairs[best]
        for pair in filter(pairs.get, grown):
            heapq.heappush(heap, (-pairs[pair], pair))
        merges.append(best)
    return [tuple(BYTE_ORDER[i] if i < 256 else i for i in pair) for pair in merges]
