"""Exact search over the sentences of Python's language reference: neighbours, pairs, clusters, a saved corpus.

python examples/search.py [--query TEXT]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import common
from sentence_transformers import util

import sentfast
from sentfast import search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query", default="How do I catch an exception?")
    parser.add_argument("--sentences", type=int, default=2000)
    options = parser.parse_args()
    model = common.minilm()
    sentences = [sentence for paragraph in common.paragraphs() for sentence in paragraph]
    sentences = list(dict.fromkeys(sentences))[: options.sentences]
    rows = model.encode(sentences, convert_to_tensor=True)

    corpus = search.Corpus(rows, ids=sentences)
    result = corpus.topk(model.encode(options.query, convert_to_tensor=True), 3)
    print(f"{options.query}\n")
    for score, sentence in zip(result.scores[0].tolist(), corpus.names(result.indices[0]), strict=True):
        print(f"  {score:.3f}  {sentence}")
    print(f"\n{result.stats}\n")

    pairs = search.top_pairs(corpus, 3)
    print("The nearest pairs:")
    for score, first, second in zip(*(x.tolist() for x in pairs[:3]), strict=True):
        print(f"  {score:.3f}  {sentences[first]}\n         {sentences[second]}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.corpus"
        corpus.save(path)
        again = search.Corpus.load(path)
        same = (again.topk(rows[:100], 5).indices == corpus.topk(rows[:100], 5).indices).all()
        print(f"\nSaved as {path.stat().st_size / 1e6:.1f} MB and mapped again; the same results: {bool(same)}\n")

    # The functions of sentence-transformers run on the same search.
    for name, on in (("stock", False), ("sentfast", True)):
        (sentfast.enable if on else sentfast.disable)()
        start = time.perf_counter()
        communities = util.community_detection(rows, threshold=0.6, min_community_size=4)
        mined = util.paraphrase_mining_embeddings(rows)
        taken = time.perf_counter() - start
        print(f"{name}: {len(communities)} communities and {len(mined):,} pairs in {taken:.2f} s")


if __name__ == "__main__":
    main()
