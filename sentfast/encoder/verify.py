"""The original against the encoder, on a few short sequences, before a model runs packed for the first time.

The original runs on a twin: the same classes, parameters and buffers in other module objects, in evaluation mode and
without hooks. So nothing of the model is touched, no gradient reaches it and no random number is drawn.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sentfast import private, switch
from sentfast.encoder.examine import Parts, Refusal, examine
from sentfast.encoder.tables import Tables
from sentfast.encoder.training import token_embeddings
from sentfast.report import uncounted, warn

# The largest difference allowed, relative to the largest number of the original's result. Two ways to round differ by
# some 1e-6 in float32; a patch that changes less than this changes nothing that embeddings are used for.
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same of gradients, which go through every layer twice.
ALLOWED_OF_GRADIENT = {torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 3e-1}
# Numbers of an embedding table by which a gradient is tried.
_SMALL = 1 << 20
# Lengths of the sequences; the first is longer where layers see a window only, so that it matters.
_LENGTHS = (11, 1, 6)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Run = Callable[..., Tensor]
_Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _verify(model: nn.Module, parts: Parts, runs: list[tuple[torch.dtype, Run]]) -> Refusal | None:
    """Why a model cannot be accelerated: one of the `runs`, in products of such a dtype, differs from the original.

    run: from int32 ids, cu_seqlens, token types and positions, both or None, on the CPU to token embeddings [T, H].
    """
    with uncounted(), private.InferenceMode(False), torch.no_grad(), private.WithoutAutocast():
        copy = _twin_without_pooler(model)
        tried = [_ragged(parts), _last_positions(parts)]
        if "position_ids" not in inspect.signature(type(model).forward).parameters:
            tried.pop()
        for inputs in filter(None, tried):
            try:
                expected = _original(copy, parts, inputs)
            except Exception as error:
                return Refusal("SF129", f"the original code does not run: {type(error).__name__}: {error}")
            for dtype, run in runs:
                worst = difference(run(*inputs), expected)
                if not worst <= ALLOWED[dtype]:
                    where = "largest difference by the largest number of the original"
                    return Refusal("SF129", f"{where}: {worst:.2g}, allowed {ALLOWED[dtype]:g}")
    return None


def try_encoders(model: nn.Module, parts: Parts, tried: list[Any]) -> Refusal | None:
    """Whether encoders of the model agree with the original code; else why it cannot be accelerated."""
    found = []
    for encoder in tried:

        def run(ids: Tensor, ends: Tensor, types: Any, positions: Any, encoder: Any = encoder) -> Tensor:
            return encoder.run(ids, ends, token_type_ids=types, position_ids=positions)

        # The coarser of the products' dtype and the model's.
        found.append((_DTYPES[encoder.precision] if parts.dtype == torch.float32 else parts.dtype, run))
    return _told(model, _verify(model, parts, found))


def try_steps(model: nn.Module) -> Refusal | None:
    """The same for the steps that a training runs, on the twin's modules, which drop nothing."""
    own = _with_leaves(_twin_without_pooler(model))
    parts = examine(own)
    if isinstance(parts, Refusal):
        return _told(model, parts)
    device, tables = parts.device, parts.tables

    def run(ids: Tensor, ends: Tensor, types: Tensor | None, positions: Tensor | None) -> Tensor:
        positions = tables.count_positions(ids, ends) if positions is None else positions
        longest, types = int(ends.diff().max()), None if types is None else types.to(device)
        return token_embeddings(parts, ids.to(device), ends.to(device), longest, types, positions.to(device))

    refusal = _verify(model, parts, [(parts.dtype, run)])
    return _told(model, refusal or _verify_gradients(model, parts, own, run))


def _verify_gradients(model: nn.Module, parts: Parts, own: nn.Module, run: Run) -> Refusal | None:
    """The same for the gradients, of smaller parameters: those of the first layers come through all others.

    own: whose parts are `parts`.
    """
    with uncounted(), private.InferenceMode(False), private.WithoutAutocast(), torch.enable_grad(), unseen():
        copy = _with_leaves(_twin_without_pooler(model))
        inputs = _ragged(parts)
        try:
            expected = gradients([_original(copy, parts, inputs)], _leaves(copy))
        except Exception as error:
            return Refusal("SF129", f"the original code does not go backward: {type(error).__name__}: {error}")
        worst = _gradient_difference(gradients([run(*inputs)], _leaves(own)), expected)
    allowed = ALLOWED_OF_GRADIENT[parts.dtype]
    if worst <= allowed:
        return None
    return Refusal("SF129", f"difference of the gradient by its length: {worst:.2g}, allowed {allowed:g}")


def _with_leaves(copy: Any) -> Any:
    """A twin whose parameters are its own, around the same memory; biases, norms, small tables require a gradient."""
    known: dict[int, nn.Parameter] = {}
    for module in copy.modules():
        for name, x in module._parameters.items():
            if x is not None:
                leaf = x.ndim == 1 or (isinstance(module, nn.Embedding) and x.numel() <= _SMALL)
                made = nn.Parameter(_usual(x.detach()), requires_grad=leaf)
                module._parameters[name] = known.setdefault(id(x), made)
    return copy


def _usual(x: Tensor) -> Tensor:
    """The tensor; a copy of one that was made in inference mode, which can require no gradient."""
    return x.clone() if x.is_inference() else x


def _leaves(copy: nn.Module) -> list[Tensor]:
    return [x for x in copy.parameters() if x.requires_grad]


def gradients(outputs: Iterable[Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
    """Of the sum of all numbers of the outputs, each with a weight of its own; None where nothing comes."""
    found = [x for x in outputs if x.requires_grad]
    if not found:
        return [None] * len(leaves)
    weights = [torch.arange(1, x.numel() + 1, device=x.device).view(x.shape).sin().to(x.dtype) for x in found]
    return list(torch.autograd.grad(found, leaves, weights, allow_unused=True))


def _gradient_difference(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """Of all in a row, by the length of the expected one; where none comes, it is 0.

    Where the expected one is not finite, half precision has overflowed, and ours decides nothing; else ours is finite.
    """
    total = length = 0.0
    for pair in zip(found, expected, strict=True):
        x, y = torch.broadcast_tensors(*map(_exact, pair))
        finite = y.isfinite()
        x, y = x[finite], y[finite]
        total, length = total + float((x - y).square().sum()), length + float(y.square().sum())
    return math.inf if math.isnan(total) else (total / max(length, 1e-60)) ** 0.5


def _exact(gradient: Tensor | None) -> Tensor:
    """In float64, dense; 0 for none."""
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return (gradient.to_dense() if gradient.is_sparse else gradient).double().cpu()


def unseen() -> Any:
    """Hooks of somebody else on what autograd keeps are not called inside."""
    return saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach)


def _told(model: nn.Module, refusal: Refusal | None) -> Refusal | None:
    if refusal is not None:
        warn(f"{type(model).__name__} runs its own code: {refusal.detail} [{refusal.code}]")
    return refusal


def twin(module: nn.Module, known: dict[int, nn.Module] | None = None) -> Any:
    """Other module objects around the same parameters and buffers, in evaluation mode and without hooks."""
    known = {} if known is None else known
    if id(module) in known:
        return known[id(module)]
    made = known[id(module)] = type(module).__new__(type(module))
    space = vars(made)
    space.update(vars(module))
    for name, value in space.items():
        if "_hooks" in name and isinstance(value, dict):
            space[name] = OrderedDict()
    for name in ("_parameters", "_buffers"):
        space[name] = space[name].copy()
    space["_modules"] = {
        name: None if child is None else twin(child, known) for name, child in vars(module)["_modules"].items()
    }
    space["training"] = False
    return made


def _twin_without_pooler(model: nn.Module) -> Any:
    copy = twin(model)
    if "pooler" in vars(copy)["_modules"]:
        copy.pooler = None  # it runs as it is
    return copy


def _ragged(parts: Parts) -> _Inputs:
    longest = max(_LENGTHS[0], *(window + 4 for window in parts.windows or (0,)))
    return example(parts.tables, [max(min(n, parts.tables.max_length), 1) for n in (longest, *_LENGTHS[1:])], None)


def _last_positions(parts: Parts) -> _Inputs | None:
    """The end of the position table, which no short sequence reaches by itself."""
    tables = parts.tables
    if tables.max_length < 3 or parts.bias is not None:
        return None
    positions = torch.arange(tables.positions - 3, tables.positions, dtype=torch.int32, device="cpu")
    return example(tables, [3], positions)


def example(tables: Tables, lengths: list[int], positions: Tensor | None) -> _Inputs:
    """Ids from all over the vocabulary, the first and the last among them, but no padding; some of each token type."""
    total = sum(lengths)
    ids = (torch.arange(total, device="cpu") * 7919 + tables.vocabulary_size - 1) % tables.vocabulary_size
    if tables.padding_idx is not None:
        ids = torch.where(ids == tables.padding_idx, (ids + 1) % tables.vocabulary_size, ids)
    ends = torch.tensor([0, *lengths], device="cpu").cumsum(0)
    types = (torch.arange(total, device="cpu") // 2 % tables.token_types).int() if tables.token_types > 1 else None
    return ids.int(), ends.int(), types, positions


def _original(model: Any, parts: Parts, inputs: _Inputs) -> Tensor:
    """[T, H] of the padded batch."""
    ids, ends, types, positions = inputs
    lengths = ends.diff().long()
    mask = torch.arange(int(lengths.max()), device="cpu") < lengths.unsqueeze(1)

    def padded(x: Tensor, fill: int) -> Tensor:
        return torch.full(mask.shape, fill, device="cpu").masked_scatter(mask, x.long()).to(parts.device)

    padding = parts.tables.padding_idx or 0
    arguments = {"input_ids": padded(ids, padding), "attention_mask": mask.long().to(parts.device)}
    if types is not None:
        arguments["token_type_ids"] = padded(types, 0)
    if positions is not None:
        arguments["position_ids"] = padded(positions, 0)
    result = switch.run_original(type(model).forward, model, **arguments, return_dict=True)
    return result.last_hidden_state.cpu()[mask]


def difference(result: Tensor, expected: Tensor) -> float:
    """Infinite where the two are finite at different places."""
    result, expected = result.double().cpu(), expected.double()
    finite = expected.isfinite()
    if result.shape != expected.shape or not torch.equal(finite, result.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    size = expected[finite].abs().max().item()
    return (result - expected)[finite].abs().max().item() / max(size, 1e-30)
