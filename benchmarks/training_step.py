"""The training step that is measured: real pairs, the loss, gradients, their clipping, AdamW, as the trainer does it.

Nothing here imports sentfast, so a process that measures sentence-transformers alone stays without it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import texts
import torch
from torch import Tensor, nn

LEARNING_RATE = 2e-5
CLIP = 1.0  # the trainer's max_grad_norm
OPENING_WORDS = 12

Pairs = list[tuple[str, str]]
Batch = tuple[dict[str, Tensor], dict[str, Tensor]]  # tokenised anchors and positives


@dataclass(frozen=True)
class Task:
    """What one row trains on.

    Attributes:
        kind: of the pairs, a name in PAIRS.
        batch: pairs of a step.
        max_seq_length: tokens after which a text is cut.
        bf16: also measured under bfloat16 autocast.
        rounds: timed steps of each variant.
    """

    kind: str
    batch: int
    max_seq_length: int
    bf16: bool = False
    rounds: int = 3


TASKS = {
    "minilm": (Task("short", 128, 128, bf16=True, rounds=7), Task("long", 64, 256)),
    "mpnet": (Task("short", 32, 384),),
}
QUICK = (Task("short", 8, 128, bf16=True, rounds=2), Task("long", 4, 256, rounds=2))


def tasks_of(model: str, quick: bool) -> tuple[Task, ...]:
    return QUICK if quick else TASKS[model]


def word_pairs(count: int, seed: int) -> Pairs:
    """Words with what they mean; no word and no gloss comes twice."""
    every = list(texts.glosses())
    random.Random(seed).shuffle(every)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for gloss in every:
        if len(found) == count:
            break
        if gloss.words[0] not in found and gloss.text not in taken:
            found[gloss.words[0]] = gloss.text
            taken.add(gloss.text)
    return list(found.items())


def document_pairs(count: int, seed: int) -> Pairs:
    """The opening words of a paragraph with the rest of it."""
    words = [text.split() for text in dict.fromkeys(texts.KINDS["long"](count, seed))]
    return [(" ".join(found[:OPENING_WORDS]), " ".join(found[OPENING_WORDS:])) for found in words]


PAIRS = {"short": word_pairs, "long": document_pairs}


def batches_of(model: Any, task: Task, count: int, seed: int) -> list[Batch]:
    """`count` full batches, tokenised as the trainer's collator does; fewer where there are not so many pairs."""
    pairs = PAIRS[task.kind](count * task.batch, seed)
    starts = range(0, len(pairs) - task.batch + 1, task.batch)
    if not starts:
        raise texts.Unavailable(f"{task.kind}: {len(pairs)} pairs, a batch takes {task.batch}")
    return [tokenized(model, pairs[start : start + task.batch]) for start in starts]


def tokenized(model: Any, pairs: Pairs) -> Batch:
    tokenize = getattr(model, "preprocess", None) or model.tokenize
    anchors, positives = zip(*pairs, strict=True)
    return tokenize(list(anchors)), tokenize(list(positives))


def lengths_of(batch: Batch) -> list[int]:
    """Real tokens of every text of the batch."""
    return [int(count) for column in batch for count in column["attention_mask"].sum(1)]


class Learner:
    """A model in training mode, with its loss and optimiser. It changes the model that it is given.

    Attributes:
        ours: its steps run with sentfast switched on.
        bf16: they run under bfloat16 autocast.
    """

    def __init__(self, model: Any, *, ours: bool = False, bf16: bool = False, learning_rate: float = LEARNING_RATE):
        from sentence_transformers.sentence_transformer import losses

        self.model, self.ours, self.bf16 = model.train(), ours, bf16
        self.loss = losses.MultipleNegativesRankingLoss(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate)

    def gradients(self, batch: Batch) -> tuple[float, float]:
        """Forward and backward; the loss and the norm of the gradients, which are clipped then."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            # The model writes into the features.
            loss = self.loss([dict(column) for column in batch], None)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        return loss.item(), norm.item()

    def step(self, batch: Batch) -> float:
        """One whole step; its loss."""
        loss, _ = self.gradients(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def take_gradients(self) -> dict[str, Tensor]:
        """The gradients by parameter, taken away from the model."""
        named = self.model.named_parameters()
        found = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        self.optimizer.zero_grad()
        return found


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode with every dropout at 0: what two implementations compute alike."""
    layers = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in layers:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in layers:
            module.p = p


def distance(gradients: dict[str, Tensor], stock: dict[str, Tensor]) -> float:
    """|gradients - stock| / |stock| over all parameters; infinite if they are not of the same parameters."""
    if gradients.keys() != stock.keys():
        return float("inf")
    apart = _norm([gradients[name].double() - stock[name].double() for name in stock])
    norm = _norm(list(stock.values()))
    return apart / norm if norm else float("inf")


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(x.double().square().sum().item() for x in tensors) ** 0.5
