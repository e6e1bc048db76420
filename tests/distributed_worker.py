"""One process of a distributed training run, started by test_training_stack.py: prints nothing, saves what it found."""

from __future__ import annotations

import copy
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from sentence_transformers import losses
from tiny_models import VERSION, build
from torch.nn.parallel import DistributedDataParallel
from training_runs import ADAM_EPSILON, COLUMNS

import sentfast
from sentfast import native, registry

ROWS = 8
LOSSES = {
    "ranking": lambda model, gather: losses.MultipleNegativesRankingLoss(model, gather_across_devices=gather),
    "cached": lambda model, gather: losses.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=3, gather_across_devices=gather
    ),
    "symmetric": lambda model, gather: losses.MultipleNegativesSymmetricRankingLoss(
        model, gather_across_devices=gather
    ),
}
if VERSION >= (6, 0):  # before, a guide with gathered documents takes the wrong positives
    # The anchors of other processes are no candidates, unlike those of a larger batch.
    LOSSES["guided"] = lambda model, gather: losses.GISTEmbedLoss(
        model, copy.deepcopy(model).eval(), contrast_anchors=False, gather_across_devices=gather
    )
if VERSION >= (5, 3):
    LOSSES["all directions"] = lambda model, gather: losses.MultipleNegativesRankingLoss(
        model,
        directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
        gather_across_devices=gather,
    )


def one_step(
    path: str, name: str, rank: int, world: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of this rank's rows. DDP averages the gradients; for the cached loss we do."""
    model = build(path).train().to(dtype)
    loss = LOSSES[name](model, world > 1)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in parameter_name)  # unused, and DDP would wait for it
    if world > 1 and name != "cached":
        loss.model = DistributedDataParallel(model)
    size = ROWS // world
    texts = [column[rank * size : (rank + 1) * size] for column in COLUMNS.values()]
    value = loss([model.tokenize(column) for column in texts], None)
    value.backward()
    value = value.detach().clone()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    if world > 1:
        dist.all_reduce(value)
        value /= world
        if name == "cached":
            dist.all_reduce(gradient)
            gradient /= world
    return value, gradient


def trained(path: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the trainer, which sets up DDP itself."""
    import datasets
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = build(path)
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        adam_epsilon=ADAM_EPSILON,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    loss = LOSSES["ranking"](model, True)
    data = datasets.Dataset.from_dict(COLUMNS)
    SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss).train()
    return {name: value.clone() for name, value in model.state_dict().items()}


def main(path: str, folder: Path, with_trainer: bool) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    sentfast.enable()
    found: dict[str, dict] = {"ours": {}, "eager": {}}
    with nullcontext() if native.cpu_loaded() else registry.use_backend("reference"):
        for name in LOSSES:
            found["eager"][name, "whole"] = whole(path, name)
            found["eager"][name, "exact"] = whole(path, name, torch.float64)
        dist.init_process_group("gloo", rank=rank, world_size=world)
        for mode, results in found.items():
            with nullcontext() if mode == "ours" else sentfast.disabled():
                for name in LOSSES:
                    sentfast.report(reset=True)
                    results[name] = one_step(path, name, rank, world)
                    results[name, "calls"] = sorted({operator for operator, _ in sentfast.report().calls})
                if with_trainer:
                    results["trainer"] = trained(path, folder / mode)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def whole(path: str, name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    with sentfast.disabled():
        return one_step(path, name, 0, 1, dtype)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "trainer")
