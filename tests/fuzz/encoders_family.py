"""CrossEncoder, SparseEncoder and MultiVectorEncoder over drawn transformers, with their methods' arguments."""

from __future__ import annotations

from typing import Any

import architectures
import pipelines
import torch
from compare import Ranking
from draw import Draw, Raised
from sentence_transformers import CrossEncoder, SparseEncoder
from sentence_transformers.sentence_transformer import modules as st_modules
from sentence_transformers.sparse_encoder import modules as sparse_modules

try:
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder import modules as multi_modules
except ImportError:  # before 6.2
    MultiVectorEncoder = None


def case(draw: Draw) -> dict[str, Any]:
    families = {"cross": cross_encoder, "sparse": sparse_encoder, "multi": multi_vector_encoder}
    return families[draw.one_of("encoder", tuple(families))](draw)


def masked_models(draw: Draw) -> str:
    return draw.one_of(
        "architecture", ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
    )


def cross_encoder(draw: Draw) -> dict[str, Any]:
    kind = draw.one_of("architecture", (*architectures.COVERED, "albert", "deberta-v2"))
    labels = draw.one_of("labels", (1, 3))
    base = architectures.base(draw, kind, head="ForSequenceClassification", num_labels=labels)
    model = CrossEncoder(modules=[pipelines.transformer(draw, base, "sequence-classification")], device="cpu")
    architectures.cast(draw, model)
    count = draw.one_of("count", (3, 1, 8, 20))
    left, right = pipelines.texts(draw, "left", count), pipelines.texts(draw, "right", count)
    pairs: Any = list(zip(left, right, strict=True))
    pairs = pairs[0] if draw.chance("one pair", 0.15) else pairs
    options: dict[str, Any] = {"batch_size": draw.one_of("batch_size", (32, 1, 3, 0))}
    for name in draw.some_of("options", ("convert_to_tensor", "apply_softmax", "show_progress_bar"), 0.3):
        options[name] = True
    if draw.chance("activation", 0.2):
        options["activation_fn"] = draw.one_of(
            "which activation", (torch.nn.Identity(), torch.nn.Sigmoid(), torch.tanh)
        )
    seen: dict[str, Any] = {"predict": draw.attempt(model.predict, pairs, **options)}
    ranked = draw.attempt(model.rank, left[0], right, top_k=draw.one_of("top_k", (None, 2, 100)))
    if isinstance(ranked, Raised):
        seen["rank"] = ranked
    else:
        seen["rank"] = Ranking([each["corpus_id"] for each in ranked], [float(each["score"]) for each in ranked])
    return seen


def sparse_encoder(draw: Draw) -> dict[str, Any]:
    base = architectures.base(draw, masked_models(draw), head="ForMaskedLM")
    first = pipelines.transformer(draw, base, "fill-mask")
    strategy, function = draw.one_of("strategy", ("max", "sum")), draw.one_of("function", ("relu", "log1p_relu"))
    parts = [first, sparse_modules.SpladePooling(strategy, function)]
    if draw.chance("sparse autoencoder", 0.2):
        dense = architectures.base(draw, draw.one_of("dense architecture", tuple(architectures.COVERED)))
        width = pipelines.width(dense)
        auto = sparse_modules.SparseAutoEncoder(width, hidden_dim=2 * width, k=4)
        parts = [pipelines.transformer(draw, dense), pipelines.pooling(draw, width)]
        parts += [draw.weights(auto)] if parts[1].get_embedding_dimension() == width else []
    model = SparseEncoder(modules=parts, device="cpu")
    model.eval()
    architectures.cast(draw, model)
    texts = pipelines.texts(draw, "texts", draw.one_of("count", (3, 1, 9)))
    options: dict[str, Any] = {"batch_size": draw.one_of("batch_size", (32, 1, 4))}
    if draw.chance("dense result"):
        options["convert_to_sparse_tensor"] = False
    if draw.chance("max_active_dims", 0.3):
        options["max_active_dims"] = draw.one_of("active", (5, 1, 0))
    method = draw.one_of("method", ("encode", "encode_query", "encode_document"))
    out = draw.attempt(getattr(model, method), texts, **options)
    seen: dict[str, Any] = {"embeddings": out}
    if not isinstance(out, Raised) and "max_active_dims" not in options:
        seen["similarity"] = draw.attempt(model.similarity, out, out)
        seen["sparsity"] = list(draw.attempt(model.sparsity, out))
    return seen


def multi_vector_encoder(draw: Draw) -> dict[str, Any]:
    if MultiVectorEncoder is None:
        return {}
    base = architectures.base(draw, architectures.model_type(draw, covered=0.95))
    first = pipelines.transformer(draw, base)
    width, out = pipelines.width(base), draw.one_of("width", (16, 8, 24))
    strategy = draw.one_of("expansion", (None, "fixed", "min"))
    if strategy:
        length = draw.one_of("length", (12, 4, 32))
        first.query_expansion = {"strategy": strategy, "attend": draw.chance("attend", 0.3), "length": length}
    dense = st_modules.Dense(
        width,
        out,
        bias=False,
        activation_function=torch.nn.Identity(),
        module_input_name="token_embeddings",
        module_output_name="token_embeddings",
    )
    parts: list[Any] = [first, draw.weights(dense)]
    parts.append(multi_modules.MultiVectorMask(["the", "a"] if draw.chance("skiplist") else None))
    if draw.chance("normalize", 0.7):
        names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        parts.append(st_modules.Normalize(**names))
    model = MultiVectorEncoder(modules=parts, device="cpu", prompts=dict(pipelines.PROMPTS))
    model.eval()
    architectures.cast(draw, model)
    texts = pipelines.texts(draw, "texts", draw.one_of("count", (3, 1, 9)))
    options: dict[str, Any] = {"batch_size": draw.one_of("batch_size", (32, 1, 4))}
    options |= {name: True for name in draw.some_of("options", ("convert_to_numpy", "normalize_embeddings"), 0.3)}
    queries = draw.attempt(model.encode_query, texts, **options)
    documents = draw.attempt(model.encode_document, texts[::-1], **options)
    seen = {"queries": queries, "documents": documents}
    if not isinstance(queries, Raised) and not isinstance(documents, Raised):
        seen["similarity"] = draw.attempt(model.similarity, queries, documents)
    if draw.chance("every feature", 0.3):
        raw = draw.attempt(model.encode_query, texts, output_value=None)
        seen["raw"] = raw if isinstance(raw, Raised) else [scored(item) for item in raw]
    return seen


def scored(item: dict[str, Any]) -> dict[str, Any]:
    """The vectors that are scored; the others are padding."""
    rows = item["attention_mask"].bool()
    return {**item, "token_embeddings": item["token_embeddings"][rows]}
