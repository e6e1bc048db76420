"""The random numbers of dropout: a function of an element's place, so that backward makes the same choice again.

Philox 4x32 with seven rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The counter is
(column, row, head, stream) and the key the seed; the four numbers of a counter serve columns that lie 16 apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Four uint32 numbers, held in int64, for each counter of four such numbers."""
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        first, second = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]  # modulo 2^64, as int64 has it
        x0, x1 = ((second >> 32) & _WORD) ^ x1 ^ key0, second & _WORD
        x2, x3 = ((first >> 32) & _WORD) ^ x3 ^ key1, first & _WORD
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return x0, x1, x2, x3


def kept(rows: Tensor, columns: Tensor, p: float, seed: int, stream: int, head: Tensor | int = 0) -> Tensor:
    """Whether dropout with probability p leaves an element; bool, in the shape that the arguments broadcast to."""
    if p >= 1.0:
        return torch.zeros(torch.broadcast_shapes(rows.shape, columns.shape), dtype=torch.bool, device=rows.device)
    rows, columns, heads, streams = torch.broadcast_tensors(
        rows & _WORD, columns, torch.as_tensor(head, device=rows.device), torch.as_tensor(stream, device=rows.device)
    )
    words = philox((columns // 64 * 16 + columns % 16, rows, heads, streams), seed)
    word = torch.stack(words).gather(0, (columns // 16 % 4).unsqueeze(0)).squeeze(0)
    return word >= int(p * 2**32)


def dropout(x: Tensor, p: float, seed: int, stream: int) -> Tensor:
    """x / (1 - p) where the element is kept, else 0; a row is what comes before the last dimension."""
    if p == 0.0:
        return x.clone()
    rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)
    keep = kept(rows, torch.arange(x.shape[-1], device=x.device), p, seed, stream)
    return torch.where(keep, x * scale(p), 0)


def scale(p: float) -> float:
    """What the elements that stay are multiplied by."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0
