"""What runs in place of the loop of ``SentenceTransformer.encode``.

Texts are tokenised ahead in one thread, sorted by tokens within a window, cut into batches by a budget of tokens and
run without padding; each batch goes to its rows of the one output.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sentfast import functional, private
from sentfast.encoder import Composed
from sentfast.encoder import device as devices
from sentfast.integrations import hidden_rows, pipeline, shells, tokenize
from sentfast.integrations.ahead import ahead
from sentfast.integrations.output import output_of
from sentfast.integrations.pipeline import Pipeline
from sentfast.integrations.versions import Version
from sentfast.report import fallback

# Tokens per batch: enough work for every thread, small enough for the caches and for memory.
TOKENS = 8192
# The same on a GPU: several waves of tiles in every product of a small model (hidden size 384), and the widest state of
# a large one (4096 columns of float32) takes half a gigabyte.
TOKENS_ON_DEVICE = 32768
# Texts tokenised at a time. The first window is small: until it is there, nothing can be computed. A GPU needs more of
# them, so that most of its batches are full.
_FIRST_WINDOW, _WINDOW, _WINDOW_ON_DEVICE = 512, 4096, 16384
# As many texts are tokenised sooner than a thread is started.
_AT_ONCE = 64
_NO_LIMIT = 2**62


class _UnfitError(Exception):
    """An input turns out to be nothing for the fused path; the argument is the reason code."""


class Plan(NamedTuple):
    """How a call is cut into batches: most rows and tokens of one, and texts tokenised at a time.

    fetched: the results come from the GPU to the CPU.
    """

    rows: int
    tokens: int
    window: int
    device: torch.device
    fetched: bool = False


class Batch(NamedTuple):
    """Packed texts, the rows of the output that they are for, and the fewest and most tokens of a text."""

    rows: np.ndarray
    ids: Tensor
    cu_seqlens: Tensor
    types: Tensor | None
    shortest: int
    longest: int


# The model that `encode` runs for, and whether its caller has passed batch_size.
_call: ContextVar[tuple[Any, bool] | None] = ContextVar("sentfast_encode_call", default=None)
_BATCH_SIZE_POSITION = 4


@contextmanager
def batch_size_noted(version: Version, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Around `encode`, `encode_query` and `encode_document`, which hand down 32 as if it had been asked for."""
    outer = _call.get()
    model = args[0] if args else None
    if outer is not None and outer[0] is model:
        yield
        return
    try:
        _call.set((model, "batch_size" in kwargs or len(args) > _BATCH_SIZE_POSITION))
        yield
    finally:
        _call.set(outer)


def _most_rows(model: Any, batch_size: int) -> int:
    call = _call.get()
    return _NO_LIMIT if call is not None and call[0] is model and not call[1] else operator.index(batch_size)


def loop(version: Version, name: str, original: Callable, model: Any, inputs: list, **kwargs: Any) -> Any:
    """The loop, or the original's."""
    result = inference(version, model, inputs, **kwargs)
    if not isinstance(result, str):
        return result
    fallback(name, result)
    with hidden_rows.around_encode(version, **kwargs):
        return original(model, inputs, **kwargs)


def inference(
    version: Version,
    model: Any,
    inputs: list,
    *,
    prompt: str | None,
    batch_size: int,
    show_progress_bar: bool,
    output_value: str | None,
    save_to_cpu: bool,
    normalize_embeddings: bool,
    truncate_dim: int | None,
    device: Any = None,
    **kwargs: Any,
) -> Tensor | str:
    """The embeddings [N, D], or the reason code why the original loop has to run."""
    reason = _why_not_arguments(prompt, batch_size, truncate_dim)
    reason = reason or _why_not_call(model, inputs, output_value, device, kwargs)
    if reason:
        return reason
    with private.InferenceMode(True):
        found = pipeline.find_evaluated(version, model)
        if isinstance(found, str):
            return found
        if not inputs:
            return torch.tensor([], device=found.encoder.device)
        steps = _steps(found, prompt, normalize_embeddings, truncate_dim)
        tokenizer = tokenize.Tokenizer(found.transformer.processor, _max_length(found.transformer, kwargs), prompt)
        device, rows = found.encoder.device, _most_rows(model, batch_size)
        if isinstance(found.encoder, Composed):
            plan = Plan(rows, TOKENS_ON_DEVICE, _WINDOW_ON_DEVICE, device, save_to_cpu)
        else:
            plan = Plan(rows, TOKENS, _WINDOW, device)
        try:
            bar = partial(_shown, version, operator.index(batch_size)) if show_progress_bar else None
            return _run(tokenizer, inputs, plan, steps, bar)
        except _UnfitError as unfit:
            return unfit.args[0]
        except shells.NoCopyError:
            return "SF110"


def _why_not_arguments(prompt: Any, batch_size: Any, truncate_dim: Any) -> str:
    """Those that the original refuses, when it comes to use them."""
    try:
        operator.index(batch_size)
        operator.index(0 if truncate_dim is None else truncate_dim)
    except TypeError:
        return "SF107"
    return "" if isinstance(prompt, str | None) else "SF107"


def _why_not_call(model: Any, inputs: list, output_value: str | None, device: Any, kwargs: dict[str, Any]) -> str:
    if output_value != pipeline.EMBEDDING or not kwargs.keys() <= {"task"} or any((model.module_kwargs or {}).values()):
        return "SF107"
    if model._placement_is_delegated:
        return "SF103"
    if device is not None:
        try:
            wanted = torch.device(device)
        except (TypeError, RuntimeError):
            return "SF107"
        if wanted.type != "cpu" and not devices.composed(wanted):
            return "SF103"
        if wanted.type != "cpu" or model.device.type != "cpu":
            model._resolve_inference_device(device)
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        kind = model.device.type
        if kind not in ("cpu", "cuda") or torch.is_autocast_enabled(kind):
            return "SF116"
    return tokenize.why_not_texts(inputs)


def _max_length(transformer: Any, kwargs: dict[str, Any]) -> int | None:
    task = kwargs.get("task")
    if task == "query":
        return transformer.query_length
    return transformer.document_length if task == "document" else None


def _steps(
    found: Pipeline, prompt: str | None, normalize_embeddings: bool, truncate_dim: int | None
) -> Callable[[Batch], Tensor]:
    """From a batch to its embeddings."""
    # Asked where it is not used as well: the original remembers it for later calls.
    counted = tokenize.prompt_length(found.transformer, prompt) if prompt else 0
    excluded = counted if found.excludes_prompt else 0
    longest = found.encoder.max_length
    last = normalize_embeddings and truncate_dim is None and not found.tail
    fused = found.normalizes or last

    def run(batch: Batch) -> Tensor:
        if not 0 < batch.shortest <= batch.longest <= longest:
            raise _UnfitError("SF107" if batch.shortest == 0 else "SF126")
        # Of a text that is a prompt and nothing else, padded, the original has zeros for the last token.
        if "lasttoken" in found.modes and batch.shortest <= excluded:
            raise _UnfitError("SF109")
        try:
            x = found.encoder.run(
                batch.ids,
                batch.cu_seqlens,
                token_type_ids=batch.types,
                modes=found.modes,
                prompt_length=excluded,
                normalize=fused,
            )
        except IndexError:  # a number outside its table: the original code has its own error
            raise _UnfitError("SF126") from None
        if found.tail:
            x = found.run_tail(x)
        if truncate_dim is not None:
            x = x[..., :truncate_dim]
        return functional.l2_normalize(x) if normalize_embeddings and not last else x

    return run


def _run(
    tokenizer: tokenize.Tokenizer,
    texts: list,
    plan: Plan,
    steps: Callable[[Batch], Tensor],
    bar: Callable[[int], Callable[[int], None]] | None,
) -> Tensor:
    """bar: from the number of texts to what is told how many of them are done; None: nothing is shown."""
    if len(texts) <= min(_AT_ONCE, plan.rows) and bar is None:
        tokens = tokenizer(texts)
        if len(texts) == 1 or tokens.lengths.sum() <= plan.tokens:
            x = _compact(steps(_whole(tokens)))
            return x.cpu() if plan.fetched else x
        return _fill(len(texts), iter([(0, tokens)]), plan, steps, _not_shown)
    windows = tokenizer.windows(texts, itertools.chain([_FIRST_WINDOW], itertools.repeat(plan.window)))
    advance = _not_shown if bar is None else bar(len(texts))
    if len(texts) <= _AT_ONCE:
        return _fill(len(texts), filter(None, windows), plan, steps, advance)
    with closing(ahead(windows)) as windows:
        return _fill(len(texts), windows, plan, steps, advance)


def _fill(
    count: int,
    windows: Iterator[tuple[int, tokenize.Tokens]],
    plan: Plan,
    steps: Callable[[Batch], Tensor],
    advance: Callable[[int], None],
) -> Tensor:
    output = output_of(plan.device, plan.fetched, count)
    for start, tokens in windows:
        output.open(start, len(tokens.lengths))
        for batch in _batches(tokens, plan):
            output.put(batch.rows, steps(batch))
            advance(len(batch.rows))
    return output.result()


def _compact(x: Tensor) -> Tensor:
    """In memory of its own: truncated embeddings are part of longer ones."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def _whole(tokens: tokenize.Tokens) -> Batch:
    """All of it as one batch, in the order that it has."""
    return _batch(np.empty(0, np.int64), tokens.ids, tokens.types, tokens.lengths)


def _batches(tokens: tokenize.Tokens, plan: Plan) -> Iterator[Batch]:
    """Long texts first, so that those of a batch have much the same length."""
    lengths = tokens.lengths
    starts = lengths.cumsum() - lengths
    order = (-lengths).argsort(kind="stable")
    ends = lengths[order].cumsum()
    first = 0
    while first < len(order):
        before = ends[first] - lengths[order[first]]
        last = int(ends.searchsorted(before + plan.tokens, side="right"))
        last = min(max(last, first + 1), first + plan.rows)
        rows = order[first:last]
        yield _gather(tokens, rows, starts[rows], lengths[rows])
        first = last


def _gather(tokens: tokenize.Tokens, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Batch:
    packed = lengths.cumsum() - lengths
    index = np.arange(lengths.sum()) + np.repeat(starts - packed, lengths)
    types = None if tokens.types is None else tokens.types[index]
    return _batch(rows, tokens.ids[index], types, lengths)


def _batch(rows: np.ndarray, ids: np.ndarray, types: np.ndarray | None, lengths: np.ndarray) -> Batch:
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    lengths.cumsum(out=cu_seqlens[1:])
    return Batch(
        rows,
        torch.from_numpy(ids),
        torch.from_numpy(cu_seqlens),
        None if types is None else torch.from_numpy(types),
        int(lengths.min()),
        int(lengths.max()),
    )


def _not_shown(count: int) -> None:
    pass


def _shown(version: Version, step: int, count: int) -> Callable[[int], None]:
    """The original's progress bar, by its own name for it, which somebody may have replaced; a step is `step` texts."""
    bar = iter(sys.modules[version.model].trange(0, count, step, desc="Batches", disable=False))
    next(bar, None)
    done = 0

    def advance(texts: int) -> None:
        nonlocal done
        before, done = done, done + texts
        # The last step is the end of the iteration, where the bar closes.
        for _ in range(-(-count // step) - before // step if done == count else done // step - before // step):
            next(bar, None)

    return advance
