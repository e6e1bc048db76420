"""Pooling of token embeddings into sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sentfast import reference
from sentfast.ops import checks
from sentfast.reference import POOLING_MODES
from sentfast.registry import define, result_of

_MODE_NUMBERS = {name: number for number, name in enumerate(POOLING_MODES)}
MAX_MODES = 8
_MASK_DTYPES = (torch.int64, torch.bool, torch.int32, torch.uint8, torch.int8, torch.int16)


def _pool_forward_fake(x, attention_mask, cu_seqlens, modes, prompt_length, normalize):
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    acc = reference.accumulation_dtype(x.dtype)
    out = x.new_empty(batch, len(modes) * x.shape[-1])
    norm = x.new_empty(batch if normalize else 0, dtype=acc)
    argmax_shape = (batch, x.shape[-1]) if reference.MAX in modes else (0,)
    return out, norm, x.new_empty(argmax_shape, dtype=torch.int32)


def _pool_backward_fake(grad, out, norm, argmax, attention_mask, cu_seqlens, modes, prompt_length, length, normalize):
    dim = grad.shape[-1] // len(modes)
    return grad.new_empty((length, dim) if cu_seqlens is not None else (grad.shape[0], length, dim))


_pool_forward = define(
    "pool_forward(Tensor x, Tensor? attention_mask, Tensor? cu_seqlens, int[] modes, int prompt_length, bool normalize)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.pool_forward,
    fake=_pool_forward_fake,
)
_pool = result_of(_pool_forward)
_pool_backward = define(
    "pool_backward(Tensor grad, Tensor out, Tensor norm, Tensor argmax, Tensor? attention_mask, Tensor? cu_seqlens,"
    " int[] modes, int prompt_length, SymInt length, bool normalize) -> Tensor",
    reference=reference.pool_backward,
    fake=_pool_backward_fake,
)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, attention_mask, cu_seqlens, options):
        modes, _, normalize = options
        if normalize or reference.MAX in modes:
            out, norm, argmax = _pool_forward(x, attention_mask, cu_seqlens, *options)
            ctx.save_for_backward(out if normalize else None, norm, argmax, attention_mask, cu_seqlens)
        else:
            out = _pool(x, attention_mask, cu_seqlens, *options)
            ctx.save_for_backward(None, None, None, attention_mask, cu_seqlens)
        ctx.length, ctx.options = x.shape[-2], options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        *state, attention_mask, cu_seqlens = ctx.saved_tensors
        # What these modes do not need is not read; any tensor stands in for it.
        state = [grad if x is None else x for x in state]
        modes, prompt_length, normalize = ctx.options
        grad_x = _pool_backward(grad, *state, attention_mask, cu_seqlens, modes, prompt_length, ctx.length, normalize)
        return grad_x, None, None, None


# `_Pool.apply` without its look at torch.func transforms, which `checks.native` has had already.
_apply = super(torch.autograd.Function, _Pool).apply


def _mode_numbers(mode: str | Sequence[str]) -> list[int]:
    if isinstance(mode, str) and mode in _MODE_NUMBERS:
        return [_MODE_NUMBERS[mode]]
    names = (mode,) if isinstance(mode, str) else tuple(mode)
    try:
        numbers = [_MODE_NUMBERS[name] for name in names]
    except (KeyError, TypeError):
        raise ValueError(f"mode: expected one or several of {POOLING_MODES}, got {mode!r}") from None
    if not 1 <= len(numbers) <= MAX_MODES:
        raise ValueError(f"mode: expected 1 to {MAX_MODES} modes, got {len(numbers)}")
    return numbers


def _check_mask(mask: object, x: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor or None, got {checks.describe(mask)}")
    if mask.dtype not in _MASK_DTYPES:
        raise TypeError(f"attention_mask: expected a bool or integer tensor, got {checks.describe(mask)}")
    batch, length, _ = x.shape
    if mask.shape != (batch, length):
        raise ValueError(f"attention_mask: expected shape {[batch, length]}, got {checks.describe(mask)}")
    if not (mask.is_cpu and x.is_cpu):
        checks.same_device("attention_mask", mask, "token_embeddings", x)


def _check(token_embeddings: object, attention_mask: object, cu_seqlens: object, prompt_length: int) -> None:
    if cu_seqlens is not None:
        x = checks.floats("token_embeddings", token_embeddings, "[T, D] with cu_seqlens", (2,))
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None with cu_seqlens, got both")
        checks.packed("cu_seqlens", cu_seqlens, "token_embeddings", x)
    else:
        x = checks.floats("token_embeddings", token_embeddings, "[B, L, D], or [T, D] with cu_seqlens", (3,))
        if attention_mask is not None:
            _check_mask(attention_mask, x)
    if prompt_length < 0:
        raise ValueError(f"prompt_length: expected 0 or more, got {prompt_length}")


def pool(
    token_embeddings: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    mode: str | Sequence[str] = "mean",
    prompt_length: int = 0,
    normalize: bool = False,
) -> Tensor:
    r"""Pools the token embeddings of each sentence into one vector, in one pass over the tokens in use.

    .. math::
        \text{mean} = \frac{\sum_t x_t}{n} \quad \text{mean\_sqrt\_len\_tokens} = \frac{\sum_t x_t}{\sqrt n} \quad
        \text{weightedmean} = \frac{\sum_t (t+1)\, x_t}{\sum_t (t+1)}

    with t counted from the sentence's first token and n its tokens in use; ``max`` is taken per column, ``cls`` is the
    first token, ``lasttoken`` the last. Padding is never read, so NaN in it does no harm; NaN in a token stays NaN.

    Args:
        token_embeddings: [B, L, D] padded or [T, D] packed; float32, bfloat16, float16 (float64 by plain PyTorch).
        attention_mask: [B, L], bool or integer, non-zero where there is a token; any pattern. None: all tokens.
        cu_seqlens: int32 [B + 1], rising from 0 to T: sentence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        mode: one of "mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", or several.
        prompt_length: leave out that many tokens at the start of each sentence (``include_prompt=False``).
        normalize: divide each result by max(its L2 norm, 1e-12).

    Returns:
        [B, len(mode) * D], several modes side by side in the order given; the dtype of token_embeddings. Sums
        accumulate in float32 (float64 for float64). A sentence with no tokens in use gives 0 for the means and
        ``lasttoken``, -inf for ``max``, and for ``cls`` its first position.

    Raises:
        TypeError, ValueError: naming the argument. On a GPU the values of cu_seqlens are not read but clamped.

    Gradients: to token_embeddings; ``max`` passes it to the first largest token. Not differentiable twice; torch.func
    transforms (vmap, jvp) are refused by PyTorch. Autocast does not change the result.

    Follows ``Pooling.forward`` and ``Normalize.forward`` of sentence-transformers 6.2.
    """
    modes = _mode_numbers(mode)
    other = cu_seqlens if attention_mask is None else attention_mask
    if not (checks.native(token_embeddings) and (other is None or getattr(other, "is_cpu", False))):
        _check(token_embeddings, attention_mask, cu_seqlens, prompt_length)
        if checks.needs_function(token_embeddings):
            return _Pool.apply(token_embeddings, attention_mask, cu_seqlens, (modes, prompt_length, normalize))
        return _pool(token_embeddings, attention_mask, cu_seqlens, modes, prompt_length, normalize)
    # The compiled kernel refuses bad arguments by itself; the checks here only find the words for it.
    try:
        if token_embeddings.requires_grad and torch.is_grad_enabled():
            return _apply(token_embeddings, attention_mask, cu_seqlens, (modes, prompt_length, normalize))
        return _pool.native(token_embeddings, attention_mask, cu_seqlens, modes, prompt_length, normalize)
    except (RuntimeError, TypeError):
        _check(token_embeddings, attention_mask, cu_seqlens, prompt_length)
        raise
