"""Plain transformers: a BERT of two layers, the mean pooling of the model cards, and a training loop by hand.

``sentfast.accelerate(model)`` is the one line more.

python examples/train_transformers_mean_pooling.py [--steps N] [--out FILE.png]
"""

from __future__ import annotations

import random
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

import sentfast

BATCH, SCALE, MAX_LENGTH = 32, 20.0, 64


def mean_pooling(model_output: Any, attention_mask: Tensor) -> Tensor:
    token_embeddings = model_output[0]
    mask = attention_mask.unsqueeze(-1).expand(token_embeddings.size()).float()
    return torch.sum(token_embeddings * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)


def main() -> None:
    options = common.parse(__doc__, steps=120)
    pairs = common.neighbours()

    def train(run: common.Run) -> None:
        model, tokenizer = common.small_bert(2, 128, 2)
        if sentfast.is_enabled():
            sentfast.accelerate(model)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        draw = random.Random(common.SEED)

        def embed(texts: tuple[str, ...]) -> Tensor:
            batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            return F.normalize(mean_pooling(model(**batch), batch["attention_mask"]), dim=-1)

        for _ in range(options.steps):
            anchors, positives = zip(*draw.sample(pairs, BATCH), strict=True)
            scores = SCALE * embed(anchors) @ embed(positives).T
            loss = F.cross_entropy(scores, torch.arange(BATCH))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.add(loss.item())

    common.compare(train, __file__, options)


if __name__ == "__main__":
    main()
