"""What is measured: one row per workload. A new one is a row here and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import model_level
import torch
from gpu_workloads import GPU_WORKLOADS
from stock import compiled_pool, stock_pool
from timing import Variant
from torch import Tensor
from workload import OURS, STOCK, Inputs, Workload, in_slices, random, rows_of, size

from sentfast import functional, reference
from sentfast.reference import NORMALIZE_EPS, POOLING_MODES

# ---- pooling and normalisation -----------------------------------------------------------------------------------

PICKS = ("cls", "lasttoken")  # modes that take one token as it is


def _tokens(device: torch.device, shrink: int, seed: int) -> Inputs:
    """all-MiniLM-L6-v2's width, 128 positions, half of them padding on the right."""
    batch, length, dim = rows_of(1024, shrink), 128, 384
    lengths = torch.randint(1, length, (batch, 1), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < lengths).long().to(device)
    return {
        "x": random(device, seed, batch, length, dim),
        "mask": mask,
        "grad": random(device, seed + 1000, batch, dim),
    }


def _pool_variants(mode: str) -> dict[str, Variant]:
    stock, compiled = stock_pool(mode), compiled_pool(mode)
    return {
        OURS: Variant(lambda i: functional.pool(i["x"], i["mask"], mode=mode, normalize=True)),
        "drop-in": Variant(lambda i: stock(i["x"], i["mask"]), switched=True),
        STOCK: Variant(lambda i: stock(i["x"], i["mask"])),
        "torch.compile": Variant(lambda i: compiled(i["x"], i["mask"])),
        _read_name(mode): _read_of(mode),
    }


def _read_name(mode: str) -> str:
    return "picked rows" if mode in PICKS else "read"


def _read_of(mode: str) -> Variant:
    """PyTorch's sum over as many rows as are in use; for modes that pick a row, its copy of those rows."""
    if mode not in PICKS:
        return Variant(lambda rows: rows.sum(), prepare=lambda i: _rows(i)[: int(i["mask"].sum())], bound=True)

    def picked(i: Inputs) -> tuple[Tensor, Tensor]:
        last = i["mask"].sum(1) - 1 if mode == "lasttoken" else 0
        return _rows(i), torch.arange(len(i["x"]), device=i["x"].device) * i["x"].shape[1] + last

    return Variant(lambda s: s[0].index_select(0, s[1]), prepare=picked, bound=True)


def _rows(i: Inputs) -> Tensor:
    return i["x"].flatten(0, 1)


def _with_gradient(pool: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    def step(inputs: Inputs) -> tuple[Tensor, Tensor]:
        x = inputs["x"].detach().requires_grad_()
        out = pool(x, inputs["mask"])
        return out.detach(), torch.autograd.grad(out, x, inputs["grad"])[0]

    return step


def _pool_step_variants(mode: str) -> dict[str, Variant]:
    stock = _with_gradient(stock_pool(mode))
    read = _rows_in_use(mode)

    def move(inputs: Inputs) -> Tensor:
        inputs["x"].flatten(0, 1)[: read(inputs)].sum()
        return torch.full_like(inputs["x"], 2.0)

    return {
        OURS: Variant(_with_gradient(lambda x, mask: functional.pool(x, mask, mode=mode, normalize=True))),
        "drop-in": Variant(stock, switched=True),
        STOCK: Variant(stock),
        "torch.compile": Variant(_with_gradient(compiled_pool(mode))),
        "read and write": Variant(move, bound=True),
    }


def _exact_pool(mode: str) -> Callable[[Inputs], Tensor]:
    number = POOLING_MODES.index(mode)
    return lambda i: reference.pool_forward(i["x"].double(), i["mask"], None, [number], 0, True)[0]


def _exact_pool_step(mode: str) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    number = POOLING_MODES.index(mode)

    def exact(i: Inputs) -> tuple[Tensor, Tensor]:
        out, norm, argmax = reference.pool_forward(i["x"].double(), i["mask"], None, [number], 0, True)
        length = i["x"].shape[1]
        grad = i["grad"].double()
        return out, reference.pool_backward(grad, out, norm, argmax, i["mask"], None, [number], 0, length, True)

    return exact


def _rows_in_use(mode: str) -> Callable[[Inputs], int]:
    return lambda i: i["x"].shape[0] if mode in PICKS else int(i["mask"].sum())


def _pool_work(mode: str, step: bool) -> Callable[[Inputs], dict[str, float]]:
    rows = _rows_in_use(mode)

    def work(i: Inputs) -> dict[str, float]:
        row = i["x"].shape[-1] * i["x"].element_size()
        mask = 0 if mode == "cls" else size(i["mask"])
        written = size(i["x"]) if step else 0
        return {"read": rows(i) * row + mask, "write_fresh": i["x"].shape[0] * row + written}

    return work


def _pooling_rows() -> list[Workload]:
    rows = []
    for mode in POOLING_MODES:
        speedup = {STOCK: 10.0} if mode in ("mean", "max", "weightedmean") else {}
        rows.append(
            Workload(
                name=f"pool_{mode}",
                table="pooling",
                title=f"{mode}, forward",
                make=_tokens,
                variants=lambda mode=mode: _pool_variants(mode),
                exact=in_slices(_exact_pool(mode), "x", "mask"),
                work=_pool_work(mode, step=False),
                targets={**speedup, _read_name(mode): 0.8},
            )
        )
        rows.append(
            Workload(
                name=f"pool_{mode}_step",
                table="pooling",
                title=f"{mode}, forward and backward",
                make=_tokens,
                variants=lambda mode=mode: _pool_step_variants(mode),
                exact=in_slices(_exact_pool_step(mode), "x", "mask", "grad"),
                work=_pool_work(mode, step=True),
                targets={STOCK: 6.0},
            )
        )
    return rows


# ---- similarity --------------------------------------------------------------------------------------------------


def _util() -> Any:
    """Looked up at every call: the switch replaces attributes of this module."""
    import sentence_transformers.util

    return sentence_transformers.util


def _matrices(device: torch.device, shrink: int, seed: int) -> Inputs:
    rows = rows_of(4096, shrink)
    return {"a": random(device, seed, rows, 384), "b": random(device, seed + 1000, rows, 384)}


def _half_matrices(device: torch.device, shrink: int, seed: int) -> Inputs:
    made = _matrices(device, shrink, seed)
    half = {name: x.bfloat16() for name, x in made.items()}
    return {**half, "a_float32": half["a"].float(), "b_float32": half["b"].float()}


def _cosine_variants() -> dict[str, Variant]:
    return {
        OURS: Variant(lambda i: functional.cosine_similarity(i["a"], i["b"])),
        "drop-in": Variant(lambda i: _util().cos_sim(i["a"], i["b"]), switched=True),
        STOCK: Variant(lambda i: _util().cos_sim(i["a"], i["b"])),
    }


def _half_cosine_variants() -> dict[str, Variant]:
    in_float32 = Variant(lambda i: functional.cosine_similarity(i["a_float32"], i["b_float32"]))
    return {**_cosine_variants(), "sentfast, float32": in_float32}


def _exact_cosine(i: Inputs) -> Tensor:
    return reference.cosine_similarity_forward(i["a"].double(), i["b"].double(), NORMALIZE_EPS)[0]


def _matrix_work(peak: str) -> Callable[[Inputs], dict[str, float]]:
    return lambda i: {peak: 2.0 * i["a"].shape[0] * i["b"].shape[0] * i["a"].shape[1]}


def _vectors(rows: int) -> Callable[[torch.device, int, int], Inputs]:
    def make(device: torch.device, shrink: int, seed: int) -> Inputs:
        shape = rows_of(rows, shrink), 384
        return {"x": random(device, seed, *shape), "y": random(device, seed + 1000, *shape)}

    return make


def _normalize_variants() -> dict[str, Variant]:
    return {
        OURS: Variant(lambda i: functional.l2_normalize(i["x"])),
        STOCK: Variant(lambda i: torch.nn.functional.normalize(i["x"], p=2, dim=-1)),
        "copy": Variant(lambda i: i["x"].clone(), bound=True),
    }


def _backward_of(normalize: Callable[[Tensor], Tensor]) -> Variant:
    def forward(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        x = i["x"].detach().requires_grad_()
        return normalize(x), x, i["y"]

    return Variant(lambda s: torch.autograd.grad(s[0], s[1], s[2])[0], prepare=forward)


def _normalize_backward_variants() -> dict[str, Variant]:
    def move(i: Inputs) -> Tensor:
        i["x"].sum()
        return i["y"].clone()

    return {
        OURS: _backward_of(functional.l2_normalize),
        STOCK: _backward_of(lambda x: torch.nn.functional.normalize(x, p=2, dim=-1)),
        "copy and read": Variant(move, bound=True),
    }


def _exact_normalize(i: Inputs) -> Tensor:
    return reference.l2_normalize_forward(i["x"].double(), NORMALIZE_EPS)[0]


def _exact_normalize_backward(i: Inputs) -> Tensor:
    x = i["x"].double()
    norm = torch.linalg.vector_norm(x, dim=-1)
    return reference.l2_normalize_backward(i["y"].double(), x, norm, NORMALIZE_EPS)


def _pairwise_variants() -> dict[str, Variant]:
    return {
        OURS: Variant(lambda i: functional.pairwise_cosine_similarity(i["x"], i["y"])),
        "drop-in": Variant(lambda i: _util().pairwise_cos_sim(i["x"], i["y"]), switched=True),
        STOCK: Variant(lambda i: _util().pairwise_cos_sim(i["x"], i["y"])),
        "read": Variant(lambda i: (i["x"].sum(), i["y"].sum()), bound=True),
    }


def _exact_pairwise(i: Inputs) -> Tensor:
    return reference.pairwise_similarity_forward(i["x"].double(), i["y"].double(), reference.COSINE, NORMALIZE_EPS)[0]


_SIMILARITY = [
    Workload(
        name="cosine",
        table="similarity",
        title="cosine matrix, 4096 × 4096 × 384, float32",
        make=_matrices,
        variants=_cosine_variants,
        exact=_exact_cosine,
        work=_matrix_work("peak_float32"),
        targets={STOCK: 1.35, "extra_memory": 1.05},
        memory=True,
    ),
    Workload(
        name="cosine_bfloat16",
        table="similarity",
        title="cosine matrix, 4096 × 4096 × 384, bfloat16 to float32",
        make=_half_matrices,
        variants=_half_cosine_variants,
        exact=_exact_cosine,
        work=_matrix_work("peak_bfloat16"),
        targets={"sentfast, float32": 1.8, "extra_memory": 1.05},
        memory=True,
    ),
    Workload(
        name="normalize",
        table="similarity",
        title="L2 normalise, 256 MiB, forward",
        make=_vectors(174_762),
        variants=_normalize_variants,
        exact=in_slices(_exact_normalize, "x"),
        work=lambda i: {"copy_fresh": 2.0 * size(i["x"])},
        targets={"limit": 0.85},
        memory=True,
    ),
    Workload(
        name="normalize_backward",
        table="similarity",
        title="L2 normalise, 256 MiB, backward",
        make=_vectors(174_762),
        variants=_normalize_backward_variants,
        exact=in_slices(_exact_normalize_backward, "x", "y"),
        work=lambda i: {"copy_fresh": 2.0 * size(i["x"]), "read": float(size(i["x"]))},
        targets={"limit": 0.85},
    ),
    Workload(
        name="pairwise_cosine",
        table="similarity",
        title="pairwise cosine, 262,144 × 384",
        make=_vectors(262_144),
        variants=_pairwise_variants,
        exact=in_slices(_exact_pairwise, "x", "y"),
        work=lambda i: {"read": float(size(i["x"], i["y"]))},
        memory=True,
    ),
]


# ---- overhead of a call ------------------------------------------------------------------------------------------


def _tiny(*shape: int) -> Callable[[torch.device, int, int], Inputs]:
    def make(device: torch.device, shrink: int, seed: int) -> Inputs:
        x = random(device, seed, *shape)
        mask = torch.ones(shape[:-1], dtype=torch.int64, device=device)
        grad = random(device, seed + 1000, shape[0], shape[-1])
        return {"x": x, "mask": mask, "grad": grad, "leaf": x.clone().requires_grad_()}

    return make


def _pool_ours(x: Tensor, mask: Tensor) -> Tensor:
    return functional.pool(x, mask, normalize=True)


def _overhead_rows() -> list[Workload]:
    mean = stock_pool("mean")
    pairs: dict[str, tuple] = {
        "pool": ((2, 4, 8), _pool_ours, mean, _exact_pool("mean"), _exact_pool_step("mean")),
        "normalize": (
            (2, 8),
            lambda x, mask: functional.l2_normalize(x),
            lambda x, mask: torch.nn.functional.normalize(x, p=2, dim=-1),
            _exact_normalize,
            lambda i: (_exact_normalize(i), _exact_normalize_backward({"x": i["x"], "y": i["grad"]})),
        ),
    }
    rows = []
    for name, (shape, ours, stock, exact, exact_step) in pairs.items():
        words = f"{'pool and normalise' if name == 'pool' else 'normalise'}, {list(shape)}"
        forms = [
            ("", words, lambda f: lambda i: f(i["x"], i["mask"]), exact, {"microseconds": 5.0}),
            (
                "_recorded",
                f"{words}, with gradient recording",
                lambda f: lambda i: f(i["leaf"], i["mask"]),
                exact,
                {"microseconds": 12.0},
            ),
            ("_step", f"{words}, forward and backward", _with_gradient, exact_step, {}),
        ]
        for suffix, title, form, oracle, targets in forms:
            rows.append(
                Workload(
                    name=f"overhead_{name}{suffix}",
                    table="overhead",
                    title=title,
                    make=_tiny(*shape),
                    variants=lambda form=form, ours=ours, stock=stock: {
                        OURS: Variant(form(ours)),
                        STOCK: Variant(form(stock)),
                    },
                    exact=oracle,
                    targets=targets,
                    cold=False,
                )
            )
    rows.append(
        Workload(
            name="overhead_cos_sim",
            table="overhead",
            title="cos_sim as it is patched, [1, 8] by [2, 8]; compares all that the original looks up",
            make=lambda device, shrink, seed: {"a": random(device, seed, 1, 8), "b": random(device, seed + 1, 2, 8)},
            variants=lambda: {OURS: Variant(_cos_sim, switched=True), STOCK: Variant(_cos_sim)},
            exact=_exact_cosine,
            cold=False,
        )
    )
    return rows


def _cos_sim(inputs: Inputs) -> Tensor:
    from sentence_transformers import util

    return util.cos_sim(inputs["a"], inputs["b"])


# ---- whole models ------------------------------------------------------------------------------------------------

_MODEL = [
    Workload(
        name="encode",
        table="model",
        title="all-MiniLM-L6-v2, encode of 64 sentences",
        make=model_level.sentences,
        variants=lambda: {
            OURS: Variant(model_level.encode, switched=True),
            STOCK: Variant(model_level.encode),
        },
        exact=model_level.exact_encode,
        work=model_level.encode_work,
        tiny=16,
    ),
    Workload(
        name="model_similarity",
        table="model",
        title="all-MiniLM-L6-v2, similarity of 4096 embeddings",
        make=model_level.embeddings,
        variants=lambda: {
            OURS: Variant(model_level.similarity, switched=True),
            STOCK: Variant(model_level.similarity),
        },
        exact=lambda i: _exact_cosine({"a": i["embeddings"], "b": i["embeddings"]}),
        work=lambda i: {"peak_float32": 2.0 * i["embeddings"].shape[0] ** 2 * i["embeddings"].shape[1]},
        targets={STOCK: 1.35},
    ),
]

WORKLOADS: tuple[Workload, ...] = (*_pooling_rows(), *_SIMILARITY, *_overhead_rows(), *_MODEL, *GPU_WORKLOADS)
