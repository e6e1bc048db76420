"""What runs in place of ``Pooling.forward`` and ``Normalize.forward``.

Each function returns the features, or the reason code why the original has to run.
"""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor

from sentfast import functional
from sentfast.integrations import guards, layers
from sentfast.integrations.versions import Version
from sentfast.ops.pooling import MAX_MODES
from sentfast.reference import POOLING_MODES

# In the order in which the versions with one bool per mode put the results side by side.
MODE_FLAGS = (
    ("pooling_mode_cls_token", "cls"),
    ("pooling_mode_max_tokens", "max"),
    ("pooling_mode_mean_tokens", "mean"),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    ("pooling_mode_weightedmean_tokens", "weightedmean"),
    ("pooling_mode_lasttoken", "lasttoken"),
)
_MAPPINGS = (dict, UserDict)
_MEANS = ("mean", "mean_sqrt_len_tokens", "weightedmean")
# A subclass that overrides one of these expects its own code to run.
_POOLING_STEPS = ("_forward_padded", "_forward_flattened", "_exclude_prompt_from_mask")


def pooling_modes(version: Version, module: Any) -> tuple[str, ...]:
    if version.mode_flags:
        return tuple(mode for flag, mode in MODE_FLAGS if getattr(module, flag))
    modes = module.pooling_mode
    return (modes,) if isinstance(modes, str) else tuple(modes)


def why_not_pooling(version: Version, module: Any, modes: tuple[str, ...]) -> str:
    """What can be said against this Pooling module before it has seen an input."""
    if any(step in vars(module) for step in _POOLING_STEPS):
        return "SF110"
    for cls in type(module).__mro__:
        if cls.__module__ == version.pooling:
            break
        if any(step in vars(cls) for step in _POOLING_STEPS):
            return "SF110"
    if layers.any_foreign(type(module), _POOLING_STEPS):
        return "SF110"
    if not 0 < len(modes) <= MAX_MODES or any(mode not in POOLING_MODES for mode in modes):
        return "SF107"
    # A slice of the input: nothing is faster.
    return "SF117" if version.mode_flags and modes == ("cls",) else ""


def pooling_forward(version: Version, module: Any, features: Any, **kwargs: Any) -> Any:
    if not isinstance(features, _MAPPINGS):
        return "SF107"
    x: Any = features.get("token_embeddings")
    modes = pooling_modes(version, module)
    reason = guards.tensor(x) or why_not_pooling(version, module, modes) or _extra_features(modes, features)
    if not reason and (x.ndim != 3 or (kwargs and version.mode_flags)):
        reason = "SF107"
    if not reason and not version.scores_float32:
        reason = guards.half_under_autocast(x)
    if reason:
        return reason
    prompt_length = _prompt_length(version, module, features)
    if isinstance(prompt_length, str):
        return prompt_length
    out: Tensor | str
    if "cu_seq_lens_q" in features and not version.mode_flags:
        out = _pool_packed(version, x, features["cu_seq_lens_q"], modes, prompt_length)
    elif "attention_mask" in features and features["attention_mask"] is None:
        out = "SF104"
    else:
        out = _pool_padded(version, x, features.get("attention_mask"), modes, prompt_length)
    if isinstance(out, str):
        return out
    features["sentence_embedding"] = out
    return features


def _extra_features(modes: tuple[str, ...], features: Any) -> str:
    if "token_weights_sum" in features and any(mode in _MEANS for mode in modes):
        return "SF106"
    return "SF106" if "cls_token_embeddings" in features and "cls" in modes else ""


def _prompt_length(version: Version, module: Any, features: Any) -> int | str:
    if module.include_prompt or "prompt_length" not in features:
        return 0
    if not version.prompt_as_reference:
        return "SF109"
    length = features["prompt_length"]
    if isinstance(length, Tensor):
        if torch.compiler.is_compiling() or length.ndim == 0:
            return "SF107"
        length = int(length[0].item())
    return length if type(length) is int and length >= 0 else "SF107"


def _pool_padded(version: Version, x: Tensor, mask: Any, modes: tuple[str, ...], prompt_length: int) -> Tensor | str:
    if isinstance(mask, Tensor) and mask.ndim and mask.shape[-1] != x.shape[1] and not version.mode_flags:
        mask = None  # as the original: a mask of another length is no mask
    if mask is not None:
        if type(mask) not in guards.PLAIN or mask.layout != torch.strided:
            return "SF104"
        if mask.is_floating_point() or mask.is_complex() or mask.shape != x.shape[:2]:
            return "SF104"
        if mask.device != x.device:
            return "SF103"
        if any(mode in version.first_column for mode in modes) and not _first_column_in_use(mask):
            return "SF109"
    return functional.pool(x, mask, mode=modes, prompt_length=prompt_length)


def _first_column_in_use(mask: Tensor) -> bool:
    """Neither left padding nor an empty row. Known only where reading the mask waits for nobody."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(mask[:, 0].all())


def _pool_packed(
    version: Version, x: Tensor, cu_seqlens: Any, modes: tuple[str, ...], prompt_length: int
) -> Tensor | str:
    if x.shape[0] != 1:
        return "SF107"
    if type(cu_seqlens) not in guards.PLAIN or cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
        return "SF104"
    if cu_seqlens.device != x.device:
        return "SF103"
    if cu_seqlens.shape[0] < 2 or not _rises(cu_seqlens, x.shape[1]):
        return "SF104"
    if "max" in modes and x.requires_grad and torch.is_grad_enabled():
        return "SF109"  # the original divides the gradient of equal maxima among them
    return functional.pool(x[0], cu_seqlens=cu_seqlens, mode=modes, prompt_length=prompt_length)


def _rises(cu_seqlens: Tensor, total: int) -> bool:
    """Strictly from 0 to total, so no sequence is empty. On a GPU the values are not read: it would have to wait."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    ends = cu_seqlens.numpy()
    return bool(ends[0] == 0 and ends[-1] == total and (ends[1:] > ends[:-1]).all())


def normalize_forward(version: Version, module: Any, features: Any) -> Any:
    if not isinstance(features, _MAPPINGS):
        return "SF107"
    x: Any = features.get(getattr(module, "module_input_name", "sentence_embedding"))
    reason = guards.tensor(x) or guards.half_under_autocast(x)
    if reason:
        return reason
    if x.ndim != 2 and version.normalizes_dimension_1:
        return "SF107"
    features[getattr(module, "module_output_name", "sentence_embedding")] = functional.l2_normalize(x)
    return features
