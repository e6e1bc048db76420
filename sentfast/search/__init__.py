"""Exact search over many rows, without a score matrix: the k best, pairs, counts, and corpora packed once."""

from sentfast.search.corpus import Corpus
from sentfast.search.files import CorpusFileError
from sentfast.search.functions import count_above, hard_negatives, pairs_above, topk
from sentfast.search.mining import top_pairs
from sentfast.search.results import Pairs, Stats, TopK, TopPairs
from sentfast.search.sharded import ShardedCorpus

__all__ = [
    "Corpus",
    "CorpusFileError",
    "Pairs",
    "ShardedCorpus",
    "Stats",
    "TopK",
    "TopPairs",
    "count_above",
    "hard_negatives",
    "pairs_above",
    "top_pairs",
    "topk",
]
