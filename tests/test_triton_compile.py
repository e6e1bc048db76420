"""Compiles every Triton kernel, as its launcher would, for real GPUs on a machine without one.

The compiled binaries must not spill registers and must fit the shared memory of their GPU. What they use is compared
with benchmarks/results/triton_resources.json; SENTFAST_TEST_RECORD=1 writes that file anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sentfast.reference import ACTIVATIONS, search

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "triton_resources.json"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block can have
TARGETS = [(torch.bfloat16, cc) for cc in SHARED_LIMIT] + [(torch.float32, 90), (torch.float16, 90)]
# Small changes of a compiler are no news.
REGISTER_TOLERANCE = 16
SHARED_TOLERANCE = 4096

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
BATCH, LENGTH, COLUMNS = 32, 128, 384
SIX_MODES = [0, 1, 2, 3, 4, 5]
COSINE, EUCLIDEAN = 0, 2
EPS = 1e-12


def calls(dtype: torch.dtype) -> Iterator[tuple[str, str, tuple]]:
    """What to launch: a label, the operator and its arguments."""
    padded, packed = torch.empty(BATCH, LENGTH, COLUMNS, dtype=dtype), torch.empty(4096, COLUMNS, dtype=dtype)
    mask, cu_seqlens = torch.empty(BATCH, LENGTH, dtype=torch.int64), torch.empty(BATCH + 1, dtype=torch.int32)
    norm, none = torch.empty(BATCH), torch.empty(0)
    rows, wide = torch.empty(BATCH, COLUMNS, dtype=dtype), torch.empty(BATCH, 6 * COLUMNS, dtype=dtype)
    argmax = torch.empty(BATCH, COLUMNS, dtype=torch.int32)
    yield "padded, six modes", "pool_forward", (padded, mask, None, SIX_MODES, 0, False)
    yield "packed, mean, normalize", "pool_forward", (packed, None, cu_seqlens, [0], 0, True)
    yield (
        "padded, six modes",
        "pool_backward",
        (wide, wide, none, argmax, mask, None, SIX_MODES, 0, LENGTH, False),
    )
    yield (
        "packed, mean, normalize",
        "pool_backward",
        (rows, rows, norm, none.int(), None, cu_seqlens, [0], 0, 4096, True),
    )
    yield "", "l2_normalize_forward", (rows, EPS)
    yield "", "l2_normalize_backward", (rows.float(), rows, norm, EPS)
    for name, metric in (("cosine", COSINE), ("euclidean", EUCLIDEAN)):
        yield name, "pairwise_similarity_forward", (rows, rows, metric, EPS)
        yield name, "pairwise_similarity_backward", (norm, rows, rows, norm, norm, norm, metric, EPS)
    many = torch.empty(1024, COLUMNS, dtype=dtype)
    yield "", "dot_similarity", (many, many)
    yield "", "cosine_similarity_forward", (many, many, EPS)
    if dtype == torch.float32:
        yield "tf32", "dot_similarity", (many, many)
        yield "tf32", "cosine_similarity_forward", (many, many, EPS)
    else:
        yield "float32 gradient", "dot_similarity", (torch.empty(1024, 1024), many.mT)

    yield from loss_calls(many)
    yield from layer_calls(dtype)
    yield from attention_calls(dtype)
    if dtype == torch.bfloat16:  # for every GPU
        yield from search_calls()


def search_calls() -> Iterator[tuple[str, str, tuple]]:
    """Of rows and of codes, for few queries and for many; rows are float32 whatever the dtype of the others."""
    corpus = torch.randn(4096, COLUMNS)
    packed = search.search_pack(corpus, 8)
    for metric, name in enumerate(("cos", "dot", "euclidean")):
        for count in (8, 256) if metric == COSINE else (256,):
            queries, limits = corpus[:count], torch.zeros(count)
            for label, given in (("float32 rows", (None, None, None)), ("codes", packed)):
                label = f"{name}, {count} queries, {label}"
                yield label, "search_topk", (queries, corpus, *given, 10, metric, None, None, None, None)
                if metric == COSINE:
                    limited = (queries, corpus, *given, 100, metric, None, limits, None, None)
                    yield f"{label}, limited", "search_topk", limited
                    yield label, "search_pairs", (queries, corpus, *given, limits, metric, 0)
                    yield label, "search_count", (queries, corpus, *given, limits, metric)


def loss_calls(many: torch.Tensor) -> Iterator[tuple[str, str, tuple]]:
    """The plain loss, each kind of hardness with ids and a guide, and all directions."""
    count = len(many)
    end = (False, 0.1, [many.shape[1]], [1.0], 64 << 20)
    none = (None, None, None, None, None)
    ids = torch.zeros(count, dtype=torch.int64)

    def arguments(directions: list[int], hardness: int, rest: tuple, cosine: bool = True) -> tuple:
        first = (many, many, None, None, 20.0, cosine, 0, count)
        return *first, directions, False, hardness, 1.0, *rest, *end

    for hardness in (1, 2, 3):
        full = arguments([0], hardness, (ids, ids, many, many, None))
        yield f"hardness {hardness}, ids, guide", "contrastive_loss_forward", (*full, None)
    yield "all directions", "contrastive_loss_forward", (*arguments([0, 1, 2, 3], 0, none), None)
    yield "dot", "contrastive_loss_forward", (*arguments([0], 0, none, cosine=False), None)
    yield "", "contrastive_loss", arguments([0], 0, none)
    yield "", "contrastive_loss_forward", (*arguments([0], 0, none), None)


SEED = 2**40 + 1


def layer_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, tuple]]:
    """Of MiniLM (384, 1536) and of MPNet and BERT (768, 3072)."""
    statistic = torch.empty(4096)
    for columns, p in ((384, 0.0), (768, 0.1)):
        x, weight = torch.empty(4096, columns, dtype=dtype), torch.empty(columns)
        label, rest = f"{columns}, dropout {p}", (p, SEED, 3)
        yield label, "dropout_add_layer_norm_forward", (x, x, weight, weight, EPS, *rest)
        yield label, "dropout_add_layer_norm", (x, x, weight, weight, EPS, *rest)
        yield label, "dropout_add_layer_norm_backward", (x, x, statistic, statistic, weight, x[:0], *rest)
    yield "768", "dropout", (x, *rest)
    for columns, name in ((1536, "gelu"), (3072, "gelu_tanh"), (3072, "relu"), (3072, "silu")):
        x, bias = torch.empty(4096, columns, dtype=dtype), torch.empty(columns)
        number = ACTIVATIONS.index(name)
        yield f"{columns}, {name}", "bias_activation", (x, bias, number)
        narrow, up = x[:, : columns // 4].contiguous(), torch.empty(columns, columns // 4, dtype=dtype)
        yield f"{columns // 4} to {columns}, {name}", "linear_activation", (narrow, up, bias, number)
        if name in ("gelu", "silu"):
            yield f"{columns // 4} to {columns}, {name}", "linear_gated_activation", (narrow, up, None, number)
        if dtype == torch.float32 and name == "gelu":
            yield "tf32", "linear_activation", (narrow, up, bias, number)
        yield f"{columns}, {name}", "bias_activation_backward", (x, x, bias, number)
    # Of ModernBERT-base.
    positions, angles = torch.empty(4096, dtype=torch.int32), torch.empty(512, 32)
    yield "head size 64", "rotate_", (torch.empty(4096, 3, 12, 64, dtype=dtype), positions, angles, angles)
    yield "1152, gelu", "gated_activation", (torch.empty(4096, 2304, dtype=dtype), None, ACTIVATIONS.index("gelu"))


def attention_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, tuple]]:
    """Of MiniLM (12 heads of 32) and of BERT and MPNet (12 heads of 64, the latter with a bias)."""
    lse, cu_seqlens = torch.empty(12, 4096), torch.empty(BATCH + 1, dtype=torch.int32)
    sizes = ((32, 128, False, 0.0), (64, 128, True, 0.0), (64, 512, True, 0.0), (64, 512, True, 0.1))
    for head_dim, longest, with_bias, p in sizes:
        bias = torch.empty(12, 2 * longest - 1) if with_bias else None
        qkv = torch.empty(4096, 3, 12, head_dim, dtype=dtype)
        parts, out = qkv.unbind(1), torch.empty(4096, 12, head_dim, dtype=dtype)
        rest = cu_seqlens, longest, bias, head_dim**-0.5, -1, -1, p, SEED, 3
        label = f"head size {head_dim}{', bias' if with_bias else ''}{', dropout' if p else ''}"
        yield f"{label}{'' if longest > 128 else ', short'}", "varlen_attention_forward", (*parts, *rest)
        if longest == 128 and with_bias:
            continue  # backward there is one size of blocks
        yield label, "varlen_attention_backward", (out, *parts, out, lse, *rest)
    # Of ModernBERT-base, in its layers of short and of long reach.
    positions, angles = torch.empty(4096, dtype=torch.int32), torch.empty(512, 32)
    for longest, window in ((128, -1), (512, -1), (512, 64)):
        rest = positions, angles, angles, cu_seqlens, longest, 64**-0.5, window, window
        label = f"head size 64{', window' if window >= 0 else ''}{'' if longest > 128 else ', short'}"
        yield label, "rotary_attention", (*parts, *rest)


class Recorder:
    """Stands in for a kernel: keeps the arguments of a launch."""

    def __init__(self, kernel: Any, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def source(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A launch as Triton's compiler takes it, specialised on its integers as a launch is; and its options."""
    from triton.compiler import ASTSource

    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and not free):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of spills in a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    # The kernels keep no arrays in local memory, so whatever is there was spilled.
    return int(found[1]), int(found[2]) + int(found[3])


def compile_all() -> dict[str, Any]:
    """Compiles the launches of every call for every target; runs in a process without TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    import sentfast.functional  # noqa: F401  (defines the operators)
    from sentfast import native
    from sentfast.registry import ops

    native.load_triton()
    launches: list[tuple[Any, tuple, dict]] = []
    kernels = set()
    for module in [m for name, m in sys.modules.items() if name.startswith("sentfast.kernels.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                kernels.add(name)
                setattr(module, name, Recorder(value, launches))

    # No kernel runs, so the bounds that it would have written decide nothing.
    sys.modules["sentfast.kernels.search"]._DENSE = 2.0
    resources, threads, launched = {}, {}, set()
    for dtype, cc in TARGETS:
        for label, name, args in calls(dtype):
            torch.backends.cuda.matmul.allow_tf32 = label == "tf32"
            ops[name].triton(*args)
            for kernel, kernel_args, kwargs in launches:
                built, options = source(kernel, kernel_args, kwargs)
                compiled = triton.compile(built, target=GPUTarget("cuda", cc, 32), options=options)
                registers, spills = usage(compiled.asm["cubin"])
                launched.add(kernel.__name__)
                key = f"{name}{f' ({label})' if label else ''}: {kernel.__name__}, {str(dtype)[6:]}, sm_{cc}"
                resources[key] = {"registers": registers, "spills": spills, "shared": compiled.metadata.shared}
                threads[key] = 32 * compiled.metadata.num_warps
            launches.clear()
    found = {"resources": resources, "threads": threads, "never_launched": sorted(kernels - launched)}
    return {"triton": triton.__version__, **found}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_compiled(compiled: dict[str, Any]) -> None:
    assert not compiled["never_launched"], "add a call that launches these kernels to calls()"


def test_no_register_spills(compiled: dict[str, Any]) -> None:
    spilled = {key: used for key, used in compiled["resources"].items() if used["spills"]}
    assert not spilled


def test_shared_memory_fits(compiled: dict[str, Any]) -> None:
    for key, used in compiled["resources"].items():
        assert used["shared"] <= SHARED_LIMIT[int(key.rpartition("_")[2])], key


def test_attention_has_the_blocks_per_multiprocessor_of_the_plan(compiled: dict[str, Any]) -> None:
    """In half precision; docs/design.md says why."""
    planned = {"_attention_kernel": 1, "_queries_kernel": 2, "_keys_kernel": 2}
    seen = set()
    for key, used in compiled["resources"].items():
        kernel = next((name for name in planned if f" {name}," in key), None)
        if kernel is None or "float32" in key:
            continue
        seen.add(kernel)
        wanted = planned[kernel]
        if kernel == "_attention_kernel" and "short" in key:
            # On sm_100 the tensor cores leave more in registers; on sm_80 they take from there what was turned.
            wanted = 2 if key.endswith("sm_100") or (key.startswith("rotary") and key.endswith("sm_80")) else 3
        # Registers are given out 8 a thread, shared memory with 1 KiB more for each block.
        by_registers = 65536 // (-(-used["registers"] // 8) * 8 * compiled["threads"][key])
        by_shared = (SHARED_LIMIT[int(key.rpartition("_")[2])] + 1024) // (used["shared"] + 1024)
        assert min(by_registers, by_shared) >= wanted, (key, used, by_registers, by_shared)
    assert seen == set(planned)


def test_resources_are_those_on_record(compiled: dict[str, Any]) -> None:
    if os.environ.get("SENTFAST_TEST_RECORD") == "1":
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        kept = {"triton": compiled["triton"], "resources": compiled["resources"]}
        RECORD.write_text(json.dumps(kept, indent=1) + "\n")
    renew = f"renew {RECORD.name} with: SENTFAST_TEST_RECORD=1 python -m pytest {Path(__file__).name}"
    assert RECORD.exists(), renew
    recorded = json.loads(RECORD.read_text())
    assert recorded["resources"].keys() == compiled["resources"].keys(), renew
    if recorded["triton"] != compiled["triton"]:
        pytest.skip(f"recorded with Triton {recorded['triton']}, this is {compiled['triton']}")
    moved = {
        key: (recorded["resources"][key], used)
        for key, used in compiled["resources"].items()
        if abs(recorded["resources"][key]["registers"] - used["registers"]) > REGISTER_TOLERANCE
        or abs(recorded["resources"][key]["shared"] - used["shared"]) > SHARED_TOLERANCE
        or recorded["resources"][key]["spills"] != used["spills"]
    }
    assert not moved, f"(on record, now): {moved}; {renew}"


if __name__ == "__main__":
    print(json.dumps(compile_all()))
