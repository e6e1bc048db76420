"""Pooling of token embeddings into sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sentfast import reference
from sentfast.ops import checks, twice
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


def _kept(*layout: Tensor | None) -> tuple[Tensor | None, ...]:
    """Copies, since callers may write to a mask before the backward pass, as sentence-transformers lets them."""
    return tuple(None if x is None else x.clone() for x in layout)


class _Pool(torch.autograd.Function):
    """Without normalisation, whose gradient is the same whatever the tokens are."""

    @staticmethod
    def forward(ctx: Any, x, attention_mask, cu_seqlens, options):
        if reference.MAX in options[0]:
            out, _, argmax = _pool_forward(x, attention_mask, cu_seqlens, *options)
            ctx.save_for_backward(argmax, *_kept(attention_mask, cu_seqlens))
        else:
            out = _pool(x, attention_mask, cu_seqlens, *options)
            ctx.save_for_backward(None, *_kept(attention_mask, cu_seqlens))
        ctx.length, ctx.options = x.shape[-2], options
        return out

    @staticmethod
    def backward(ctx: Any, grad):
        argmax, *layout = ctx.saved_tensors
        # What these modes do not need is not read; any tensor stands in for it.
        state = grad, grad, grad if argmax is None else argmax
        modes, prompt_length, _ = ctx.options
        backward = twice.differentiable(_pool_backward)
        return backward(grad, *state, *layout, modes, prompt_length, ctx.length, False), None, None, None


class _PoolNormalized(torch.autograd.Function):
    """The unit vectors and the norms of the vectors they were made of, both of which backward reads.

    The norms are a result, and callers are given a copy of the other, which they may change in place.
    """

    @staticmethod
    def forward(ctx: Any, x, attention_mask, cu_seqlens, options):
        out, norm, argmax = _pool_forward(x, attention_mask, cu_seqlens, *options)
        ctx.save_for_backward(out, norm, argmax, *_kept(attention_mask, cu_seqlens))
        ctx.length, ctx.options = x.shape[-2], options
        ctx.set_materialize_grads(False)
        return out, norm

    @staticmethod
    def backward(ctx: Any, grad, grad_norm):
        out, norm, argmax, *layout = ctx.saved_tensors
        modes, prompt_length, _ = ctx.options
        backward = twice.differentiable(_pool_backward)
        grads = []
        if grad is not None:
            grads.append(backward(grad, out, norm, argmax, *layout, modes, prompt_length, ctx.length, True))
        if grad_norm is not None:  # asked for by gradients of gradients alone; the norm's own is the unit vector
            unit = out * (norm.clamp(min=reference.NORMALIZE_EPS) / norm.clamp(min=1e-30)).unsqueeze(-1).to(out.dtype)
            along = unit * grad_norm.unsqueeze(-1).to(out.dtype)
            grads.append(backward(along, out, norm, argmax, *layout, modes, prompt_length, ctx.length, False))
        return sum(grads) if grads else None, None, None, None


def _normalized(x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, modes, prompt_length) -> Tensor:
    return _PoolNormalized.apply(x, attention_mask, cu_seqlens, (modes, prompt_length, True))[0].clone()


# `_Pool.apply` without its look at torch.func transforms, which `checks.native` has had already.
_apply = super(torch.autograd.Function, _Pool).apply


def _mode_numbers(mode: str | Sequence[str]) -> list[int]:
    if isinstance(mode, str) and mode in _MODE_NUMBERS:
        return [_MODE_NUMBERS[mode]]
    names = (mode,) if isinstance(mode, str) else tuple(checks.sequence("mode", mode, "names or a name"))
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
    checks.dense("attention_mask", mask)
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
        checks.packed("cu_seqlens", cu_seqlens, "token_embeddings", x)
    else:
        x = checks.floats("token_embeddings", token_embeddings, "[B, L, D], or [T, D] with cu_seqlens", (3,))
        if attention_mask is not None:
            _check_mask(attention_mask, x)
    checks.whole("prompt_length", prompt_length, 0)


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

    Gradients: to token_embeddings; ``max`` passes it to the first largest token; those of gradients by plain PyTorch.
    torch.func transforms (vmap, jvp) are refused by PyTorch. Autocast does not change the result.

    Follows ``Pooling.forward`` and ``Normalize.forward`` of sentence-transformers 6.2.
    """
    modes = _mode_numbers(mode)
    normalize = checks.flag("normalize", normalize)
    if type(prompt_length) is not int:
        prompt_length = checks.whole("prompt_length", prompt_length, 0)
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask: expected None with cu_seqlens, got both")
    other = cu_seqlens if attention_mask is None else attention_mask
    if not (checks.native(token_embeddings) and (other is None or getattr(other, "is_cpu", False))):
        _check(token_embeddings, attention_mask, cu_seqlens, prompt_length)
        if checks.needs_function(token_embeddings):
            if normalize:
                return _normalized(token_embeddings, attention_mask, cu_seqlens, modes, prompt_length)
            return _Pool.apply(token_embeddings, attention_mask, cu_seqlens, (modes, prompt_length, False))
        return _pool(token_embeddings, attention_mask, cu_seqlens, modes, prompt_length, normalize)
    # The compiled kernel refuses bad arguments by itself; the checks here only find the words for it.
    try:
        if token_embeddings.requires_grad and torch.is_grad_enabled():
            if normalize:
                return _normalized(token_embeddings, attention_mask, cu_seqlens, modes, prompt_length)
            return _apply(token_embeddings, attention_mask, cu_seqlens, (modes, prompt_length, False))
        return _pool.native(token_embeddings, attention_mask, cu_seqlens, modes, prompt_length, normalize)
    except (RuntimeError, TypeError, IndexError):
        _check(token_embeddings, attention_mask, cu_seqlens, prompt_length)
        raise
