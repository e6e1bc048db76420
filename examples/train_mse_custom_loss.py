"""Distillation with two losses at once: MSELoss on embeddings, and a loss of your own on their similarities.

A student of two layers learns all-MiniLM-L6-v2's embeddings. SentenceTransformerTrainer takes a batch of each loss in
turn.

python examples/train_mse_custom_loss.py [--steps N] [--out FILE.png]
"""

from __future__ import annotations

from collections.abc import Iterable

import common
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses, modules
from torch import Tensor, nn

BATCH, MAX_SEQ_LENGTH = 32, 48


class SimilarityMSELoss(nn.Module):
    """Mean squared difference of all cosines within a batch: those of the model, and those of the given embeddings."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        (features,) = sentence_features
        embeddings = self.model(features)["sentence_embedding"]
        return nn.functional.mse_loss(util.cos_sim(embeddings, embeddings), util.cos_sim(labels, labels))


def main() -> None:
    options = common.parse(__doc__, steps=120)
    sentences = [*common.shipped_sentences(), *(first for first, _ in common.neighbours())]
    shipped = len(common.shipped_sentences())
    sentences = sentences[: shipped + options.steps * BATCH]
    embeddings = common.minilm().encode(sentences, convert_to_tensor=True)
    held_out, target = sentences[:shipped], embeddings[:shipped]
    columns = {"sentence": sentences[shipped:], "label": embeddings[shipped:].tolist()}

    def train(run: common.Run) -> None:
        dense = modules.Dense(128, embeddings.shape[1], activation_function=nn.Identity())
        model = common.small_model(2, 128, 2, MAX_SEQ_LENGTH, dense)
        both = {
            "embeddings": run.watch(losses.MSELoss(model), "embeddings"),
            "similarities": run.watch(SimilarityMSELoss(model), "similarities"),
        }
        common.fit(
            model,
            {name: Dataset.from_dict(columns) for name in both},
            both,
            options.steps,
            BATCH,
            learning_rate=1e-3,
            multi_dataset_batch_sampler="round_robin",
        )
        with torch.no_grad():
            found = util.pairwise_cos_sim(model.encode(held_out, convert_to_tensor=True), target)
        run.scores["mean cosine to the teacher, sentences not seen"] = found.mean().item()

    common.compare(train, __file__, options)


if __name__ == "__main__":
    main()
