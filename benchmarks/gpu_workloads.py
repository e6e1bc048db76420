"""What is measured on a GPU beside the rows of workloads.py: attention of packed sequences, the layers, search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import search as search_study
import torch
import torch.nn.functional as F
from timing import Variant
from torch import Tensor
from workload import OURS, STOCK, Inputs, Workload, random, rows_of, size

from sentfast import functional, native, reference
from sentfast.ops import search
from sentfast.ops.attention import _rotary_attention, _varlen_attention
from sentfast.ops.layers import _gated_activation, _rotate_
from sentfast.ops.linear import _linear_gated_activation
from sentfast.reference import ACTIVATIONS
from sentfast.registry import use_backend

Attend = Callable[[Tensor, Inputs], Tensor]

# ---- attention ---------------------------------------------------------------------------------------------------


def _sequences(batch: int, length: int, *, mixed: bool, bias: bool) -> Callable[[torch.device, int, int], Inputs]:
    """Twelve heads of 64, as in BERT-base and MPNet; mixed: lengths from 1 to the one given."""

    def make(device: torch.device, shrink: int, seed: int) -> Inputs:
        count = rows_of(batch, shrink)
        longest = length // max(1, shrink // 16)  # shorter in the test suite alone
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, longest + 1, (count,), generator=generator) if mixed else torch.tensor([longest])
        lengths = lengths.expand(count)
        mask = torch.arange(longest) < lengths.unsqueeze(1)
        total = int(lengths.sum())
        inputs = {
            "x": random(device, seed, total, 3, 12, 64).bfloat16(),
            "grad": random(device, seed + 1000, total, 12, 64).bfloat16(),
            "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().to(device),
            # Without padding there is nothing to mask, and a stock model passes no mask.
            "rows": mask.flatten().nonzero().squeeze(1).to(device) if mixed else None,
            "mask": mask.to(device)[:, None, None, :] if mixed else None,
            "batch": count,
            "longest": longest,
        }
        if bias:
            inputs["bias"] = random(device, seed + 2000, 12, 2 * longest - 1).bfloat16()
        return inputs

    return make


def _ours(x: Tensor, i: Inputs) -> Tensor:
    return functional.varlen_attention_qkvpacked(x, i["cu_seqlens"], i["longest"], bias=i.get("bias"))


def _in_cuda(x: Tensor, i: Inputs) -> Tensor:
    """csrc/cuda's kernel, which runs where it is asked for; see prefer_triton in sentfast/ops/attention.py."""
    with use_backend("cuda"):
        return _ours(x, i)


def _without_bias(x: Tensor, i: Inputs) -> Tensor:
    return functional.varlen_attention_qkvpacked(x, i["cu_seqlens"], i["longest"])


def _padded(x: Tensor, i: Inputs) -> Tensor:
    """PyTorch's attention over x [B, longest, 3, heads, d] with the mask that a padded batch needs."""
    q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
    mask = i["mask"]
    if "bias" in i:
        # Row i of the table's windows, last first, holds the distances from -i.
        bias = i["bias"].unfold(1, i["longest"], 1).flip(1).expand(i["batch"], -1, -1, -1)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return _unpad(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2), i)


def _pad(i: Inputs) -> Tensor:
    x = i["x"]
    if i["rows"] is not None:
        x = x.new_zeros(i["batch"] * i["longest"], *x.shape[1:]).index_copy(0, i["rows"], x)
    return x.view(i["batch"], i["longest"], *x.shape[1:])


def _unpad(x: Tensor, i: Inputs) -> Tensor:
    x = x.flatten(0, 1)
    return x if i["rows"] is None else x.index_select(0, i["rows"])


def _torch_varlen() -> Attend | None:
    """PyTorch's own attention of packed sequences, where it is there and runs."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        def attend(x: Tensor, i: Inputs) -> Tensor:
            ends, longest = i["cu_seqlens"], i["longest"]
            return varlen_attn(*x.unbind(1), ends, ends, longest, longest)

        x = torch.zeros(8, 3, 1, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        ends = torch.tensor([0, 8], dtype=torch.int32, device="cuda")
        attend(x, {"cu_seqlens": ends, "longest": 8}).sum().backward()
    except (ImportError, RuntimeError, AssertionError, TypeError):
        return None
    return attend


def _forward(attend: Attend, *, pad: bool = False, bound: bool = False) -> Variant:
    prepare = (lambda i: (_pad(i), i)) if pad else (lambda i: (i["x"], i))
    return Variant(lambda s: attend(*s), prepare=prepare, bound=bound)


def _backward(attend: Attend, *, pad: bool = False, bound: bool = False) -> Variant:
    """The gradients of q, k, v and of the bias, if there is one; the forward pass is not timed."""

    def prepare(i: Inputs) -> tuple[Tensor, list[Tensor], Inputs]:
        leaves = [(_pad(i) if pad else i["x"]).detach().requires_grad_()]
        if "bias" in i and not bound:
            leaves.append(i["bias"].detach().requires_grad_())
            i = {**i, "bias": leaves[1]}
        return attend(leaves[0], i), leaves, i

    def call(s: tuple[Tensor, list[Tensor], Inputs]) -> tuple[Tensor, ...]:
        out, leaves, i = s
        first, *rest = torch.autograd.grad(out, leaves, i["grad"])
        return _unpad(first, i) if pad else first, *rest

    return Variant(call, prepare=prepare, bound=bound)


def _attention_variants(form: Callable[..., Variant], bias: bool) -> dict[str, Variant]:
    found = {OURS: form(_ours), STOCK: form(_padded, pad=True)}
    if form is _forward and not native.why_no_cuda():
        found["CUDA C++"] = form(_in_cuda)
    if bias:
        found["without bias"] = form(_without_bias, bound=True)
    else:
        varlen = _torch_varlen()
        if varlen is not None:
            found["varlen_attn"] = form(varlen)
    return found


def _exact_forward(i: Inputs) -> tuple[Tensor, Tensor]:
    bias = i["bias"].double() if "bias" in i else None
    parts = i["x"].double().unbind(1)
    return reference.varlen_attention_forward(*parts, *_options(i, bias))


def _exact_backward(i: Inputs) -> tuple[Tensor, ...]:
    bias = i["bias"].double() if "bias" in i else None
    parts = i["x"].double().unbind(1)
    grads = reference.varlen_attention_backward(i["grad"].double(), *parts, *_exact_forward(i), *_options(i, bias))
    return grads[: 1 if bias is None else 2]


def _options(i: Inputs, bias: Tensor | None) -> tuple[Any, ...]:
    return i["cu_seqlens"], i["longest"], bias, 64**-0.5, -1, -1, 0.0, 0, 0


def _attention_rows() -> list[Workload]:
    rows = []
    shapes = {"128": (512, 128, False), "512": (128, 512, False), "mixed": (512, 256, True)}
    for (name, (batch, longest, mixed)), bias in ((shape, bias) for shape in shapes.items() for bias in (False, True)):
        words = f"{batch} sequences of {'1 to ' if mixed else ''}{longest}, 12 × 64{', bias' if bias else ''}"
        common: dict[str, Any] = {
            "table": "attention",
            "make": _sequences(batch, longest, mixed=mixed, bias=bias),
            "gpu": True,
        }
        rows.append(
            Workload(
                name=f"attention_{name}{'_bias' if bias else ''}",
                title=f"{words}, forward",
                variants=lambda bias=bias: _attention_variants(_forward, bias),
                exact=lambda i: _exact_forward(i)[0],
                work=lambda i: {"copy_fresh": 4.0 * size(i["grad"])},
                targets={"without bias": 1 / 1.1} if bias else {"limit": 1 / 1.4},
                **common,
            )
        )
        rows.append(
            Workload(
                name=f"attention_{name}{'_bias' if bias else ''}_backward",
                title=f"{words}, backward",
                variants=lambda bias=bias: _attention_variants(_backward, bias),
                exact=_exact_backward,
                work=lambda i: {"copy_fresh": 8.0 * size(i["grad"])},
                targets={"without bias": 1 / 1.2} if bias else {},
                **common,
            )
        )
    return rows


# ---- attention of ModernBERT -------------------------------------------------------------------------------------

APART = "one after the other"


def _rotary(batch: int, length: int, window: int) -> Callable[[torch.device, int, int], Inputs]:
    """Twelve heads of 64 with the angles of each position; window: keys that a query sees to each side, -1 for all."""

    def make(device: torch.device, shrink: int, seed: int) -> Inputs:
        inputs = _sequences(batch, length, mixed=False, bias=False)(device, shrink, seed)
        longest = inputs["longest"]
        positions = torch.arange(longest, device=device)
        turns = positions.unsqueeze(1) * 160000.0 ** -torch.linspace(0, 1, 33, device=device)[:32]
        inputs |= {"positions": positions.int().repeat(inputs["batch"]), "angles": (turns.cos(), turns.sin())}
        inputs["window"] = (window, window)
        if window >= 0:
            inputs["mask"] = (positions - positions.unsqueeze(1)).abs() <= window
        return inputs

    return make


def _turned_inside(i: Inputs) -> Tensor:
    where = i["positions"], *i["angles"], i["cu_seqlens"], i["longest"]
    return _rotary_attention(*i["x"].unbind(1), *where, 64**-0.5, *i["window"])


def _turned_before(i: Inputs) -> Tensor:
    _rotate_(i["x"], i["positions"], *i["angles"])
    where = i["cu_seqlens"], i["longest"], None
    return _varlen_attention(*i["x"].unbind(1), *where, 64**-0.5, *i["window"], 0.0, 0, 0)


def _turned_and_padded(i: Inputs) -> Tensor:
    """As transformers does it: angles in the dtype of the model, PyTorch's attention."""
    x = i["x"].view(i["batch"], i["longest"], *i["x"].shape[1:])
    cosines, sines = (torch.cat([a, a], dim=-1)[:, None, None].to(x.dtype) for a in i["angles"])
    real, imaginary = x[:, :, :2].chunk(2, dim=-1)
    qk = x[:, :, :2] * cosines + torch.cat([-imaginary, real], dim=-1) * sines
    return _padded(torch.cat([qk, x[:, :, 2:]], dim=2), i)


def _exact_rotary(i: Inputs) -> Tensor:
    where = i["positions"], *i["angles"], i["cu_seqlens"], i["longest"]
    return reference.rotary_attention(*i["x"].double().unbind(1), *where, 64**-0.5, *i["window"])


def _rotary_rows() -> list[Workload]:
    """Both ways of the encoder, for `fuses_rotary` to be set by: a key is turned once for 64 or 128 queries."""
    shapes = {"128": (512, 128, -1), "512": (128, 512, -1), "2048": (32, 2048, -1), "2048_window": (32, 2048, 64)}
    return [
        Workload(
            name=f"attention_rotary_{name}",
            table="attention",
            title=f"{batch} sequences of {length}, 12 × 64, rotary{'' if window < 0 else f', window of {window}'}",
            make=_rotary(batch, length, window),
            variants=lambda: {
                OURS: Variant(_turned_inside),
                STOCK: Variant(_turned_and_padded),
                APART: Variant(_turned_before, prepare=lambda i: {**i, "x": i["x"].clone()}),
            },
            exact=_exact_rotary,
            work=lambda i: {"copy_fresh": 4.0 * size(i["grad"])},
            targets={APART: 1.0},
            tiny=512,
            gpu=True,
        )
        for name, (batch, length, window) in shapes.items()
    ]


# ---- layers ------------------------------------------------------------------------------------------------------


def _rows(rows: int, columns: int) -> Callable[[torch.device, int, int], Inputs]:
    def make(device: torch.device, shrink: int, seed: int) -> Inputs:
        shape = rows_of(rows, shrink), columns
        return {
            "x": random(device, seed, *shape).bfloat16(),
            "residual": random(device, seed + 1000, *shape).bfloat16(),
            "grad": random(device, seed + 2000, *shape).bfloat16(),
            "weight": random(device, seed + 3000, columns).bfloat16(),
            "bias": random(device, seed + 4000, columns).bfloat16(),
        }

    return make


Layer = Callable[[Inputs], Tensor]
_LAYERS: dict[str, tuple[Layer, Layer, tuple[str, ...]]] = {
    "norm": (
        lambda i: functional.dropout_add_layer_norm(i["x"], i["residual"], i["weight"], i["bias"]),
        lambda i: F.layer_norm(i["x"] + i["residual"], i["weight"].shape, i["weight"], i["bias"]),
        ("x", "residual", "weight", "bias"),
    ),
    "gelu": (
        lambda i: functional.bias_activation(i["x"], i["bias"]),
        lambda i: F.gelu(i["x"] + i["bias"]),
        ("x", "bias"),
    ),
}


def _layer_backward(layer: Layer, names: tuple[str, ...]) -> Variant:
    def prepare(i: Inputs) -> tuple[Tensor, list[Tensor], Tensor]:
        leaves = {name: i[name].detach().requires_grad_() for name in names}
        return layer({**i, **leaves}), list(leaves.values()), i["grad"]

    return Variant(lambda s: torch.autograd.grad(*s), prepare=prepare)


def _exact_layer(layer: Layer, names: tuple[str, ...], i: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = {name: i[name].double().requires_grad_() for name in names}
    out = layer({**i, **leaves})
    return out.detach(), torch.autograd.grad(out, list(leaves.values()), i["grad"].double())


def _layer_rows() -> list[Workload]:
    rows = []
    # Reads of the inputs and writes of the results; layer norm keeps the sum for its gradient.
    for name, shape, title, forward, backward in (
        ("norm", (174_762, 768), "residual and layer norm, 174,762 × 768", 4.0, 3.0),
        ("gelu", (43_690, 3072), "bias and GELU, 43,690 × 3072", 2.0, 3.0),
    ):
        ours, stock, names = _LAYERS[name]
        common: dict[str, Any] = {"table": "layers", "make": _rows(*shape), "gpu": True}
        rows.append(
            Workload(
                name=f"layer_{name}",
                title=f"{title}, forward",
                variants=lambda ours=ours, stock=stock: {OURS: Variant(ours), STOCK: Variant(stock)},
                exact=lambda i, stock=stock, names=names: _exact_layer(stock, names, i)[0],
                work=lambda i, share=forward: {"copy_fresh": share * size(i["x"])},
                targets={"limit": 0.85},
                **common,
            )
        )
        rows.append(
            Workload(
                name=f"layer_{name}_backward",
                title=f"{title}, backward",
                variants=lambda ours=ours, stock=stock, names=names: {
                    OURS: _layer_backward(ours, names),
                    STOCK: _layer_backward(stock, names),
                },
                exact=lambda i, stock=stock, names=names: _exact_layer(stock, names, i)[1],
                work=lambda i, share=backward: {"copy_fresh": share * size(i["x"])},
                targets={"limit": 0.7},
                **common,
            )
        )
    return rows


# ---- the up product of the feed-forward --------------------------------------------------------------------------


def _up(tokens: int, hidden: int, dtype: torch.dtype) -> Callable[[torch.device, int, int], Inputs]:
    def make(device: torch.device, shrink: int, seed: int) -> Inputs:
        return {
            "x": random(device, seed, rows_of(tokens, shrink), hidden).to(dtype),
            "weight": (random(device, seed + 1000, 4 * hidden, hidden) * hidden**-0.5).to(dtype),
            "bias": random(device, seed + 2000, 4 * hidden).to(dtype),
        }

    return make


def _up_variants() -> dict[str, Variant]:
    return {
        OURS: Variant(lambda i: functional.linear_activation(i["x"], i["weight"], i["bias"])),
        STOCK: Variant(lambda i: F.gelu(F.linear(i["x"], i["weight"], i["bias"]))),
        APART: Variant(lambda i: functional.bias_activation(F.linear(i["x"], i["weight"]), i["bias"])),
    }


def _up_rows() -> list[Workload]:
    """Both ways of the encoder, for `fuses_activation` to be set by: MiniLM and BERT-base, many tokens and few."""
    sizes = [(tokens, hidden, torch.bfloat16) for hidden in (384, 768) for tokens in (16384, 256)]
    sizes += [(tokens, 768, torch.float32) for tokens in (16384, 2048, 256)]
    rows = []
    for tokens, hidden, dtype in sizes:
        kind = str(dtype).removeprefix("torch.")
        rows.append(
            Workload(
                name=f"up_{hidden}_{kind}_{tokens}",
                table="layers",
                title=f"linear and GELU, {tokens:,} × {hidden} to {4 * hidden}, {kind}",
                make=_up(tokens, hidden, dtype),
                variants=_up_variants,
                exact=lambda i: F.gelu(F.linear(i["x"].double(), i["weight"].double(), i["bias"].double())),
                work=lambda i, kind=kind: {f"peak_{kind}": 2.0 * i["x"].numel() * len(i["weight"])},
                targets={APART: 1.0},
                gpu=True,
            )
        )
    return rows


def _up_gated(tokens: int, dtype: torch.dtype) -> Callable[[torch.device, int, int], Inputs]:
    def make(device: torch.device, shrink: int, seed: int) -> Inputs:
        return {
            "x": random(device, seed, rows_of(tokens, shrink), 768).to(dtype),
            "weight": (random(device, seed + 1000, 2304, 768) * 768**-0.5).to(dtype),
        }

    return make


def _gated_as_in_pytorch(i: Inputs) -> Tensor:
    y, gate = F.linear(i["x"], i["weight"]).chunk(2, dim=-1)
    return F.gelu(y) * gate


def _up_gated_variants() -> dict[str, Variant]:
    gelu = ACTIVATIONS.index("gelu")
    return {
        OURS: Variant(lambda i: _linear_gated_activation(i["x"], i["weight"], None, gelu)),
        STOCK: Variant(_gated_as_in_pytorch),
        APART: Variant(lambda i: _gated_activation(F.linear(i["x"], i["weight"]), None, gelu)),
    }


def _up_gated_rows() -> list[Workload]:
    """The same of ModernBERT-base, whose up product makes numbers and their gates."""
    rows = []
    for tokens, dtype in ((16384, torch.bfloat16), (256, torch.bfloat16), (2048, torch.float32)):
        kind = str(dtype).removeprefix("torch.")
        rows.append(
            Workload(
                name=f"up_gated_{kind}_{tokens}",
                table="layers",
                title=f"linear, GELU and gate, {tokens:,} × 768 to 2 × 1152, {kind}",
                make=_up_gated(tokens, dtype),
                variants=_up_gated_variants,
                exact=lambda i: _gated_as_in_pytorch({name: x.double() for name, x in i.items()}),
                work=lambda i, kind=kind: {f"peak_{kind}": 2.0 * i["x"].numel() * len(i["weight"])},
                targets={APART: 1.0},
                gpu=True,
            )
        )
    return rows


# ---- search ------------------------------------------------------------------------------------------------------


def _search_inputs(case: search_study.Case) -> Callable[[torch.device, int, int], Inputs]:
    def make(device: torch.device, shrink: int, seed: int) -> Inputs:
        made = search_study.make(case, max(1, case.queries // shrink), rows_of(case.rows, shrink), seed)
        queries, rows = (x.to(device) for x in made)
        return {"queries": queries, "rows": rows, "packed": search.pack(rows)}

    return make


def _exact_topk(i: Inputs) -> Tensor:
    """The scores of the best, a few queries at a time."""
    rows = i["rows"].double()
    rows /= rows.norm(dim=1, keepdim=True)
    step = max(1, (1 << 27) // len(rows))
    queries = i["queries"].double()
    queries /= queries.norm(dim=1, keepdim=True)
    return torch.cat([(part @ rows.T).topk(search_study.K, dim=1).values for part in queries.split(step)])


def _search_rows() -> list[Workload]:
    """Stock: the product and its top k, as semantic_search and FAISS's flat index on a GPU do it."""
    return [
        Workload(
            name=f"gpu_search_{name}",
            table="gpu_search",
            title=f"top {search_study.K}, {case.queries:,} × {case.rows:,} × {search_study.DIM}",
            make=_search_inputs(case),
            variants=lambda: {
                OURS: Variant(lambda i: search.topk(i["queries"], i["rows"], i["packed"], k=search_study.K).scores),
                "rows as they are": Variant(lambda i: search.topk(i["queries"], i["rows"], k=search_study.K).scores),
                STOCK: Variant(lambda i: (i["queries"] @ i["rows"].T).topk(search_study.K, dim=1).values),
            },
            exact=_exact_topk,
            targets={STOCK: 1.0},
            gpu=True,
        )
        for name, case in search_study.CASES.items()
        if name in ("one", "many")
    ]


GPU_WORKLOADS = (*_attention_rows(), *_rotary_rows(), *_layer_rows(), *_up_rows(), *_up_gated_rows(), *_search_rows())
