"""One process that holds a part of a corpus, started by test_search.py: saves what it found."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from sentfast import native, registry, search


def main(folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    rows, queries = torch.load(folder / "rows.pt"), torch.load(folder / "queries.pt")
    ends = [0, len(rows) // 3, len(rows)]
    with nullcontext() if native.cpu_loaded() else registry.use_backend("reference"):
        corpus = search.ShardedCorpus(search.Corpus(rows[ends[rank] : ends[rank + 1]]))
        assert (len(corpus), corpus.dim) == tuple(rows.shape)
        found = {k: corpus.topk(queries, k) for k in (1, 7, len(rows))}
        found["limited"] = corpus.topk(queries, 5, metric="dot", threshold=0.5, ceiling=2.0)
    torch.save({name: (*result, result.stats.pairs) for name, result in found.items()}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
