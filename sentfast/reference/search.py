"""Exact search: top-k, pairs above a threshold and their counts, over blocks of scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sentfast.reference.similarity import COSINE, DOT, NORMALIZE_EPS

SEARCH_PANEL = 64  # rows of the corpus that are packed together
SEARCH_GROUPS = {8: 4, 16: 2}  # codes of so many bits of a row that lie together
SEARCH_FACTORS = 6  # numbers per row

_MOST_NORM = 2.0**64
_LOWEST = -1e300  # stands for a score of -inf, which is above a missing one
_BLOCK_SCORES = 1 << 21
_BLOCK_VALUES = 1 << 21
_CENTER_ROWS = 4096


def exact_scores(queries: Tensor, rows: Tensor, metric: int) -> Tensor:
    """Scores [Q, N] in float64, rounded once to float32."""
    q, k = queries.double(), rows.double()
    if metric == DOT:
        return (q @ k.mT).float()
    if metric == COSINE:
        norms = [divisors(x) for x in (q, k)]
        return (q @ k.mT / (norms[0].unsqueeze(-1) * norms[1])).float()
    # Differences, not the expanded square: near rows cancel there.
    return -torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").float()


def divisors(rows: Tensor) -> Tensor:
    """What a cosine divides by, [N] in float64: the norm, infinite where float32 cannot hold its square."""
    norms = torch.linalg.vector_norm(rows, dim=-1)
    infinite = (norms >= _MOST_NORM) & (rows.shape[-1] > 1)  # of one number nothing is squared
    return norms.clamp(min=NORMALIZE_EPS).masked_fill(infinite, torch.inf)


def search_pack(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [P, G, 64, 4] or bfloat16 [P, G, 64, 2], factors float32 [P, 6, 64], center float32 [D]; see
    ``ops.search.Packed``."""
    count, dim = rows.shape
    group = SEARCH_GROUPS[bits]
    panels, groups = -(-count // SEARCH_PANEL), -(-dim // group)
    dtype, zero = (torch.uint8, 128) if bits == 8 else (torch.bfloat16, 0)
    codes = torch.full((panels, groups, SEARCH_PANEL, group), zero, dtype=dtype, device=rows.device)
    factors = torch.zeros((panels, SEARCH_FACTORS, SEARCH_PANEL), dtype=torch.float32, device=rows.device)
    center = unit(rows[:: max(1, count // _CENTER_ROWS)].double())[0]
    center = center[center.abs().sum(dim=1) > 0]
    center = (center.mean(dim=0) if len(center) else rows.new_zeros(dim, dtype=torch.float64)).float()
    shift = torch.nn.functional.pad(center.double(), (0, groups * group - dim))
    step = max(1, _BLOCK_VALUES // max(1, dim * SEARCH_PANEL))
    for first in range(0, panels, step):
        block = slice(first, min(first + step, panels))
        part = rows[first * SEARCH_PANEL : block.stop * SEARCH_PANEL].double()
        number = part.shape[0]
        padded = part.new_zeros(((block.stop - first) * SEARCH_PANEL, groups * group))
        padded[:number, :dim] = part
        signed, values = quantize(padded, shift, bits)
        shape = (block.stop - first, SEARCH_PANEL, groups, group)
        codes[block] = (signed + zero).to(dtype).view(shape).transpose(1, 2)
        factors[block] = values.view(SEARCH_FACTORS, block.stop - first, SEARCH_PANEL).transpose(0, 1)
    return codes, factors, center


def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms, 0 where that is 0 or not finite, and the norms."""
    norm = torch.linalg.vector_norm(rows, dim=-1)
    return torch.where(((norm > 0) & norm.isfinite()).unsqueeze(-1), rows / norm.unsqueeze(-1), 0), norm


def quantize(rows: Tensor, center: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the unit rows less the center, and the factors [6, N]."""
    units, norm = unit(rows)
    exists = (units != 0).any(dim=-1, keepdim=True)
    units = torch.where(exists, units - center, 0)
    scale = exists.squeeze(-1).float()
    signed = units.to(torch.bfloat16).double()
    if bits == 8:
        scale = (units.abs().amax(dim=-1) / 127).float()
        wide = scale.double().unsqueeze(-1)
        signed = torch.where(wide > 0, (units / wide).round(), 0).clamp(-127, 127)
    near = signed * scale.double().unsqueeze(-1)
    residual = torch.linalg.vector_norm(units - near, dim=-1)
    height = torch.linalg.vector_norm(near, dim=-1)
    tilt = units @ center
    rest = torch.where(exists.squeeze(-1), norm - norm.float().double(), 0)
    # Rounded up, so that what is computed with them stays a bound.
    up = 1 + 2.0**-20
    return signed, torch.stack(
        [scale, (residual * up).float(), (height * up).float(), norm.float(), tilt.float(), rest.float()]
    )


def _excluded_mask(offsets: Tensor, ids: Tensor, queries: slice, rows: slice, shape: tuple[int, int]) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool, device=ids.device)
    ends = offsets[queries.start : queries.stop + 1]
    which = torch.repeat_interleave(torch.arange(shape[0], device=ids.device), ends[1:] - ends[:-1])
    mine = ids[ends[0] : ends[-1]]
    inside = (mine >= rows.start) & (mine < rows.stop)
    mask[which[inside], mine[inside] - rows.start] = True
    return mask


def _blocks(queries: Tensor, corpus: Tensor, metric: int) -> Iterator[tuple[slice, Iterator[tuple[slice, Tensor]]]]:
    """Blocks of queries, each with its blocks of corpus rows and their scores."""
    height = max(1, min(len(queries), 256))
    width = max(1, min(len(corpus), _BLOCK_SCORES // height))

    def scores(part: slice) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, len(corpus), width):
            rows = slice(begin, min(begin + width, len(corpus)))
            yield rows, exact_scores(queries[part], corpus[rows], metric)

    for begin in range(0, len(queries), height):
        part = slice(begin, min(begin + height, len(queries)))
        yield part, scores(part)


def search_topk(
    queries: Tensor,
    corpus: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    center: Tensor | None,
    k: int,
    metric: int,
    lowest: Tensor | None,
    highest: Tensor | None,
    excluded_offsets: Tensor | None,
    excluded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best pairs of each query, best first: scores [Q, k], ids [Q, k], statistics [4]."""
    device = queries.device
    scores = torch.full((len(queries), k), float("-inf"), dtype=torch.float32, device=device)
    ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=device)
    pairs = nans = 0
    for part, blocks in _blocks(queries, corpus, metric):
        best = torch.full((part.stop - part.start, k), float("-inf"), dtype=torch.float64, device=device)
        best_ids = ids[part]
        for rows, found in blocks:
            left_out = torch.zeros_like(found, dtype=torch.bool)
            if excluded_offsets is not None and excluded is not None:
                left_out = _excluded_mask(excluded_offsets, excluded, part, rows, (found.shape[0], found.shape[1]))
            pairs += found.numel()
            nans += int((found.isnan() & ~left_out).sum())
            left_out |= found.isnan()
            if lowest is not None:
                left_out |= ~(found >= lowest[part].unsqueeze(-1))
            if highest is not None:
                left_out |= ~(found <= highest[part].unsqueeze(-1))
            keys = found.double().clamp(min=_LOWEST).masked_fill(left_out, float("-inf"))
            numbers = torch.arange(rows.start, rows.stop, device=device).expand_as(found).masked_fill(left_out, -1)
            # Earlier rows come first, so a stable sort leaves equal scores in the order of their indices.
            keys, order = torch.cat([best, keys], dim=1).sort(dim=1, descending=True, stable=True)
            best, best_ids = keys[:, :k], torch.cat([best_ids, numbers], dim=1).gather(1, order[:, :k])
        scores[part], ids[part] = best.float(), best_ids
    return scores, ids, torch.tensor([pairs, pairs, 0, nans], device=device)


def search_pairs(
    queries: Tensor,
    corpus: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    center: Tensor | None,
    lowest: Tensor,
    metric: int,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every pair with a score of at least lowest [Q]: offsets [Q + 1], ids, scores, statistics [4]."""
    device = queries.device
    counts = torch.zeros(len(queries), dtype=torch.int64, device=device)
    found_ids, found_scores = [], []
    pairs = nans = 0
    for part, blocks in _blocks(queries, corpus, metric):
        kept = []
        for rows, found in blocks:
            chosen = torch.ones_like(found, dtype=torch.bool)
            if first >= 0:
                own = torch.arange(first + part.start, first + part.stop, device=device)
                chosen = torch.arange(rows.start, rows.stop, device=device) > own.unsqueeze(-1)
            pairs += int(chosen.sum())
            nans += int((found.isnan() & chosen).sum())
            which, column = (chosen & (found >= lowest[part].unsqueeze(-1))).nonzero(as_tuple=True)
            kept.append((which, column + rows.start, found[which, column]))
        which, column, values = (torch.cat(x) for x in zip(*kept, strict=True)) if kept else _no_pairs(device)
        order = which.argsort(stable=True)
        found_ids.append(column[order])
        found_scores.append(values[order])
        counts[part] = torch.bincount(which, minlength=part.stop - part.start)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    _, no_ids, no_scores = _no_pairs(device)
    statistics = torch.tensor([pairs, pairs, 0, nans], device=device)
    return offsets, torch.cat([*found_ids, no_ids]), torch.cat([*found_scores, no_scores]), statistics


def _no_pairs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.empty(0, dtype=torch.int64, device=device)
    return none, none.clone(), torch.empty(0, dtype=torch.float32, device=device)


def search_count(
    queries: Tensor,
    corpus: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    center: Tensor | None,
    lowest: Tensor,
    metric: int,
) -> tuple[Tensor, Tensor]:
    """The number of pairs of each query with a score of at least lowest [Q]: counts [Q], statistics [4]."""
    counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    pairs = nans = 0
    for part, blocks in _blocks(queries, corpus, metric):
        for _, found in blocks:
            pairs += found.numel()
            nans += int(found.isnan().sum())
            counts[part] += (found >= lowest[part].unsqueeze(-1)).sum(dim=1)
    return counts, torch.tensor([pairs, pairs, 0, nans], device=queries.device)
