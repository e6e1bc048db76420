"""Retrieval: a small BERT learns to find the rest of a paragraph by its first sentence.

MultipleNegativesRankingLoss with scale 20 and batches of 32, SentenceTransformerTrainer, InformationRetrievalEvaluator.

python examples/train_mnrl_ir.py [--steps N] [--out FILE.png]
"""

from __future__ import annotations

import common
from datasets import Dataset
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

BATCH, SCALE, MAX_SEQ_LENGTH = 32, 20.0, 48
HELD_OUT = 5  # each fifth passage is for the evaluation


def evaluator(pairs: list[tuple[str, str]]) -> InformationRetrievalEvaluator:
    queries = {f"q{k}": query for k, (query, _) in enumerate(pairs)}
    corpus = {f"d{k}": passage for k, (_, passage) in enumerate(pairs)}
    return InformationRetrievalEvaluator(queries, corpus, {f"q{k}": {f"d{k}"} for k in range(len(pairs))})


def main() -> None:
    options = common.parse(__doc__, steps=120)
    pairs = common.passages()
    evaluate = evaluator(pairs[::HELD_OUT])
    queries, passages = zip(*(pair for k, pair in enumerate(pairs) if k % HELD_OUT), strict=True)
    train_dataset = Dataset.from_dict({"anchor": queries, "positive": passages})

    def train(run: common.Run) -> None:
        model = common.small_model(2, 128, 2, MAX_SEQ_LENGTH)
        loss = run.watch(losses.MultipleNegativesRankingLoss(model, scale=SCALE))
        run.scores["nDCG@10 before"] = evaluate(model)["cosine_ndcg@10"]
        common.fit(model, train_dataset, loss, options.steps, BATCH, learning_rate=5e-4)
        run.scores["nDCG@10 after"] = evaluate(model)["cosine_ndcg@10"]

    common.compare(train, __file__, options)


if __name__ == "__main__":
    main()
