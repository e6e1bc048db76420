"""all-MiniLM-L6-v2 with its real weights, MultipleNegativesRankingLoss, 128 pairs of sentences that follow each other.

python examples/train_mnrl_batch128.py [--steps N] [--out FILE.png]
"""

from __future__ import annotations

import common
from datasets import Dataset
from sentence_transformers.sentence_transformer import losses

BATCH, MAX_SEQ_LENGTH = 128, 16


def main() -> None:
    options = common.parse(__doc__, steps=6)
    first, second = zip(*common.neighbours(), strict=True)
    train_dataset = Dataset.from_dict({"anchor": first, "positive": second})

    def train(run: common.Run) -> None:
        model = common.minilm(MAX_SEQ_LENGTH)
        loss = run.watch(losses.MultipleNegativesRankingLoss(model))
        sampler = {"batch_sampler": "no_duplicates"}
        common.fit(model, train_dataset, loss, options.steps, BATCH, learning_rate=2e-5, **sampler)

    common.compare(train, __file__, options)


if __name__ == "__main__":
    main()
