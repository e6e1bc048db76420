"""Every argument of every public function and method is given wrong values, which an error has to name."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import sentfast
import sentfast.functional as F
from sentfast import native, search

ROWS, COLUMNS = 4, 8


def wrong_values() -> dict[str, Any]:
    """By name; each is nonsense for most arguments."""
    x = torch.randn(ROWS, COLUMNS)
    shape = tuple(int(n) for n in torch.randint(5, 8, (2,)))  # neither ROWS nor COLUMNS
    nested = [torch.randn(2, COLUMNS), torch.randn(3, COLUMNS)]
    values = {
        **{"none": None, "false": False, "true": True, "text": "x", "empty text": "", "class": int, "object": object()},
        **{"negative": -1, "large": 2**70, "very negative": -(2**70), "fraction": 2.5},
        **{"nan": float("nan"), "infinity": float("inf"), "number in a tensor": torch.tensor(1.0)},
        **{"list": [1], "list of fractions": [1.5], "list of texts": ["a"], "ragged list": [[1], [1, 2]]},
        **{"tuple": (), "dictionary": {}, "array": np.ones((2, 3)), "array of objects": np.array([object()])},
        **{"list of tensors": [torch.randn(2), torch.randn(3)], "list of large": [2**70]},
        **{"rank": torch.randn(1, 2, 3, 4, 5), "shape": torch.randn(shape), "float64": x.double()},
        **{"integers": torch.ones(x.shape, dtype=torch.long), "bools": x > 0, "complex": x.to(torch.complex64)},
        **{"meta": x.to("meta"), "coo": x.to_sparse(), "csr": x.to_sparse_csr(), "with nan": x / 0 - x / 0},
        **{"quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)},
    }
    for layout in (torch.strided, torch.jagged):
        values[f"nested {layout}"] = torch.nested.nested_tensor(nested, layout=layout)
    return values


# What is no nonsense for some arguments.
_ANY_NUMBER = {"negative", "very negative", "large", "infinity", "fraction", "number in a tensor"}
_ABOVE_ZERO = {"large", "fraction", "number in a tensor"}
_NUMBERS = {"list", "tuple", "ragged list", "negative", "integers"}
RIGHT: dict[str, set[str]] = {
    **dict.fromkeys(("threshold", "ceiling", "max_score", "min_score", "absolute_margin"), _ANY_NUMBER),
    **dict.fromkeys(("relative_margin", "margin", "softmax_scale"), _ANY_NUMBER),
    **dict.fromkeys(("eps", "scale", "hardness_strength"), _ABOVE_ZERO),
    **{"p": {"number in a tensor"}, "dropout_p": {"number in a tensor"}},
    **{"exclude": {"integers"}, "positives": {"integers"}},  # a list for each query
    **{"seed": {"negative"}, "indices": _NUMBERS, "residual": {"none"}, "path": {"text", "empty text"}},
}
# By function: inputs of any shape or dtype, alone in a call.
_ALONE = {"float64", "rank", "shape", "meta"}
ALONE = {
    ("l2_normalize", "x"): _ALONE,
    ("dropout", "x"): _ALONE,
    ("dropout_add_layer_norm", "x"): {"float64"},  # beside a float32 residual
    ("bias_activation", "x"): {"float64"},
    ("pool packed", "token_embeddings"): {"float64"},
    ("top_pairs", "corpus"): {"list of fractions", "shape"},
    ("Corpus.metric_of", "metric"): {"none"},
}


# What the search functions call, which have checked.
INSIDE = {"Corpus.for_one_search", "Corpus.blocks"}


def public() -> dict[str, Callable]:
    """What the packages export and takes arguments, by name; not what is raised or returned."""
    found: dict[str, Callable] = {}
    for module in (sentfast, F, search):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            if inspect.isclass(value):
                if issubclass(value, (Exception, Warning, tuple, search.Stats)):
                    continue
                methods = {method: getattr(value, method) for method in vars(value) if not method.startswith("_")}
                found |= {f"{name}.{method}": each for method, each in methods.items() if callable(each)}
            found[name] = value
    return {name: each for name, each in found.items() if name not in INSIDE and parameters(each)}


def parameters(function: Callable) -> dict[str, inspect.Parameter]:
    found = inspect.signature(function).parameters
    return {name: each for name, each in found.items() if name != "self"}


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process, a folder for files, and whatever is chosen for the process undone."""
    monkeypatch.chdir(tmp_path)
    search.Corpus(torch.randn(2, 3)).save("there")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_calls() -> dict[str, tuple[Callable, dict[str, Any]]]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=9, **sizes)
    right = {"model": transformers.BertModel(config).eval()}

    def use_backend(backend):
        with sentfast.use_backend(backend):
            pass

    found = {
        **{name: (getattr(sentfast, name), right) for name in ("restore", "refresh", "is_accelerated", "precision_of")},
        "accelerate": (sentfast.accelerate, {**right, "precision": "match", "padded_rows": "zeros"}),
        "explain": (sentfast.explain, right),
        "report": (sentfast.report, {"reset": False}),
        "use_backend": (use_backend, {"backend": "reference"}),
    }
    if native.cpu_loaded():
        found["cpu_isa"] = (sentfast.cpu_isa, {"name": sentfast.cpu_isa()})
    return found


def calls() -> dict[str, tuple[Callable, dict[str, Any]]]:
    """For each function right values of all its arguments."""
    x, ends = torch.randn(ROWS, COLUMNS), torch.tensor([0, 1, ROWS], dtype=torch.int32)
    tokens = torch.randn(2, ROWS, COLUMNS)
    heads, mask = torch.randn(ROWS, 3, 2, COLUMNS), torch.ones(2, ROWS, dtype=torch.long)
    pool = {"mode": "mean", "prompt_length": 0, "normalize": False}
    drop = {"dropout_p": 0.1, "seed": 1, "stream": 0}
    attention = {"cu_seqlens": ends, "max_seqlen": 3, "bias": torch.randn(2, 5), "softmax_scale": 1.0, **drop}
    attention |= {"causal": False, "window_size": (2, 2)}
    pair = {"a": x, "b": x}
    documents = torch.randn(2 * ROWS, COLUMNS)
    loss = {"queries": x, "documents": documents, "all_queries": x, "guide": (x, documents, x), "reduction": "mean"}
    loss |= {"query_ids": torch.arange(ROWS), "document_ids": torch.arange(2 * ROWS), "offset": 0, "positives": ROWS}
    loss |= {"scale": 2.0, "similarity": "cosine", "directions": ("query_to_doc",), "partition_mode": "joint"}
    loss |= {"hardness_mode": "hard_negatives", "hardness_strength": 0.5, "margin": 0.1, "workspace": 1 << 20}
    loss |= {"dims": (COLUMNS, 4), "dim_weights": (1.0, 0.5), "margin_strategy": "absolute"}
    find = {"queries": x, "metric": "cos", "progress": False}
    best = {**find, "k": 2, "threshold": 0.1, "exclude": [1, 2, 3, 0], "exclude_self": False, "ceiling": 0.9}
    above = {**find, "corpus": x, "threshold": 0.1}
    hard = {**find, "corpus": x, "positives": [0, 1, 2, 3], "k": 2, "max_score": 0.9, "min_score": -0.5}
    hard |= {"absolute_margin": 0.1, "relative_margin": 0.1}
    corpus = search.Corpus(x)

    def append(embeddings, ids=None):
        search.Corpus(x, ids=[1, 2, 3, 4]).append(embeddings, ids)

    def sharded_topk(queries, k, *, metric=None, **options):
        search.ShardedCorpus(corpus).topk(queries, k, metric=metric, **options)

    shared = {name: value for name, value in best.items() if name not in ("exclude", "exclude_self")}
    return {
        **model_calls(),
        "pool": (
            F.pool,
            {"token_embeddings": tokens, "attention_mask": mask, "cu_seqlens": None, **pool},
        ),
        "pool packed": (F.pool, {"token_embeddings": x, "attention_mask": None, "cu_seqlens": ends, **pool}),
        "l2_normalize": (F.l2_normalize, {"x": x, "eps": 1e-12}),
        "cosine_similarity": (F.cosine_similarity, {**pair, "eps": 1e-12}),
        "dot_similarity": (F.dot_similarity, pair),
        "pairwise_similarity": (F.pairwise_similarity, {**pair, "metric": "cosine", "eps": 1e-12}),
        "pairwise_cosine_similarity": (F.pairwise_cosine_similarity, {**pair, "eps": 1e-12}),
        "dropout": (F.dropout, {"x": x, "p": 0.5, "seed": 1, "stream": 0}),
        "dropout_add_layer_norm": (
            F.dropout_add_layer_norm,
            {"x": x, "residual": x, "weight": x[0], "bias": x[0], "eps": 1e-5, **drop},
        ),
        "bias_activation": (F.bias_activation, {"x": x, "bias": x[0], "activation": "gelu"}),
        "linear": (F.linear, {"x": x, "weight": x, "bias": x[:, 0]}),
        "linear_activation": (F.linear_activation, {"x": x, "weight": x, "bias": x[:, 0], "activation": "gelu"}),
        "varlen_attention": (F.varlen_attention, {**dict(zip("qkv", heads.unbind(1), strict=True)), **attention}),
        "varlen_attention_qkvpacked": (F.varlen_attention_qkvpacked, {"qkv": heads, **attention}),
        "contrastive_loss": (F.contrastive_loss, loss),
        "Corpus": (search.Corpus, {"embeddings": x, "precision": "int8", "ids": list("abcd"), "metric": "cos"}),
        "Corpus.append": (append, {"embeddings": x, "ids": [5, 6, 7, 8]}),
        "Corpus.topk": (corpus.topk, best),
        "Corpus.rows": (corpus.rows, {"indices": [1, 2]}),
        "Corpus.names": (corpus.names, {"indices": [1, 2]}),
        "Corpus.metric_of": (corpus.metric_of, {"metric": "dot"}),
        "Corpus.save": (corpus.save, {"path": "saved"}),
        "Corpus.load": (search.Corpus.load, {"path": "there", "mmap": True, "verify": True}),
        "ShardedCorpus": (search.ShardedCorpus, {"corpus": corpus, "group": None}),
        "ShardedCorpus.topk": (sharded_topk, shared),
        "topk": (search.topk, {**best, "corpus": x}),
        "pairs_above": (search.pairs_above, above),
        "count_above": (search.count_above, above),
        "hard_negatives": (search.hard_negatives, hard),
        "top_pairs": (search.top_pairs, {"corpus": x, "count": 3, "metric": "cos", "progress": False}),
    }


def test_every_function_is_here() -> None:
    given = {name: set(right) for name, (_, right) in calls().items()}
    functions = public()
    if not native.cpu_loaded():
        del functions["cpu_isa"]
    assert {name.split()[0] for name in given} == set(functions)
    for name, right in given.items():
        assert set(parameters(functions[name.split()[0]])) == right, name


def is_right(name: str, argument: str, kind: str, value: Any) -> bool:
    default = parameters(public()[name.split()[0]])[argument].default
    if value is None and default is None:
        return True
    if isinstance(value, bool) and isinstance(default, bool):
        return True
    if kind == "with nan":  # numbers like others
        return True
    return kind in RIGHT.get(argument, set()) | ALONE.get((name, argument), set())


@pytest.mark.parametrize("gradient", [False, True], ids=["", "with a gradient"])
@pytest.mark.parametrize("name", calls())
def test_wrong_values(name: str, gradient: bool) -> None:
    function, right = calls()[name]
    if gradient:
        if not hasattr(F, name.split()[0]):
            pytest.skip("has no gradient")
        first = next(iter(right))
        right[first] = right[first].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(**right)
        for kind, value in wrong_values().items():
            for argument in right:
                try:
                    function(**{**right, argument: value})
                except Exception as error:
                    if name == "linear" and isinstance(value, Tensor):
                        continue  # whose errors of tensors are PyTorch's
                    if argument == "path" and isinstance(error, OSError):
                        continue
                    what = f"{name}({argument}={kind}): {type(error).__name__}: {error}"
                    assert isinstance(error, (ValueError, TypeError, IndexError)), what
                    # Two arguments may not fit each other; then either is named.
                    assert re.match(rf"({'|'.join([*right, name])})[\w.\[\]]*: expected .*", str(error)), what
                else:
                    accepted = is_right(name, argument, kind, value) or name == "linear"
                    assert accepted, f"{name}({argument}={kind}) was accepted"
