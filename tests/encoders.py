"""Small transformers with random weights, one of each architecture that the packed encoder covers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from accuracy import assert_accurate
from backends import BACKEND
from torch import Tensor

import sentfast
from sentfast import native, registry
from sentfast.encoder import Encoder, encoder_of, pack_padded
from sentfast.integrations import transformers as adapter

VOCABULARY = 60
PADDING = 1
FEW_TOKENS = 16

_CLASSES = {
    "bert": ("BertConfig", "BertModel"),
    "roberta": ("RobertaConfig", "RobertaModel"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"),
    "camembert": ("CamembertConfig", "CamembertModel"),
    "electra": ("ElectraConfig", "ElectraModel"),
    "distilbert": ("DistilBertConfig", "DistilBertModel"),
    "mpnet": ("MPNetConfig", "MPNetModel"),
    "modernbert": ("ModernBertConfig", "ModernBertModel"),
}
MODEL_TYPES = tuple(_CLASSES)
WITH_TOKEN_TYPES = ("bert", "roberta", "electra")
# Linear layers that get LoRA adapters: model type and names.
SOME, EVERY = ["query", "value"], ["query", "key", "value", "dense"]
ADAPTED = {
    "some": ("bert", SOME),
    "every": ("bert", EVERY),
    "mpnet": ("mpnet", ["q", "k", "v", "dense"]),
    "gated": ("modernbert", ["Wqkv", "Wo", "Wi"]),
    "projection": ("electra", ["embeddings_project", "key"]),
}


def drawn_size() -> tuple[int, int]:
    """A hidden size and its heads, one to three of 8 to 128 columns."""
    heads = int(torch.randint(1, 4, ()))
    return heads * 8 * int(torch.randint(1, 17, ())), heads


def config(model_type: str, hidden: int = 32, heads: int = 4, **options: Any) -> Any:
    common = dict(vocab_size=VOCABULARY, pad_token_id=PADDING, max_position_embeddings=66)
    usual = dict(hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=2, intermediate_size=2 * hidden + 10)
    special: dict[str, Any] = {
        "roberta": dict(type_vocab_size=2),
        "electra": dict(embedding_size=24),
        "distilbert": dict(dim=hidden, n_heads=heads, n_layers=2, hidden_dim=2 * hidden + 10),
        "modernbert": dict(
            num_hidden_layers=4,
            global_attn_every_n_layers=3,
            local_attention=8,
            global_rope_theta=1000.0,
            local_rope_theta=100.0,
            cls_token_id=2,
            sep_token_id=3,
            bos_token_id=2,
            eos_token_id=3,
        ),
    }
    own = special.get(model_type, {})
    usual = {} if model_type == "distilbert" else usual
    return getattr(transformers, _CLASSES[model_type][0])(**{**common, **usual, **own, **options})


def class_of(model_type: str) -> Any:
    return getattr(transformers, _CLASSES[model_type][1])


def model(model_type: str, hidden: int = 32, heads: int = 4, *, pooler: bool = True, **options: Any) -> Any:
    """In evaluation mode; every parameter is random, so a bias or a norm that is forgotten is seen."""
    cls = class_of(model_type)
    made = cls(config(model_type, hidden, heads, **options), **({} if pooler else {"add_pooling_layer": False})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5 if "embedding" not in name else 1.0
            parameter.copy_(torch.randn_like(parameter) * spread + norm)
    return made


def batch(lengths: list[int], *, ids: Tensor | None = None) -> dict[str, Tensor]:
    """Right padded; without the padding token inside a text."""
    shape = len(lengths), max(lengths)
    ids = torch.randint(PADDING + 1, VOCABULARY, shape) if ids is None else ids
    mask = (torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": torch.where(mask.bool(), ids, PADDING), "attention_mask": mask}


def exact(made: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The token embeddings [T, H] in float64, each row by itself: in float64, masks of padding may overflow to NaN."""
    double = copy.deepcopy(made).double()
    if double.config.model_type == "modernbert":
        double.set_attn_implementation("sdpa")  # "eager" takes its softmax in float32
    rows = []
    for i in range(inputs["input_ids"].shape[0]):
        length = inputs["attention_mask"][i].sum() if "attention_mask" in inputs else inputs["input_ids"].shape[1]
        row = {name: x[i % len(x) :][:1, :length] for name, x in inputs.items() if name != "attention_mask"}
        with torch.no_grad():
            rows.append(double(**row)[0][0])
    return torch.cat(rows)


@contextmanager
def surroundings() -> Iterator[None]:
    """Switched on, without a gradient; afterwards no class of transformers is patched.

    Without compiled kernels the reference is asked for by name. One thread: the models are so small that waking
    others would take most of the time.
    """
    sentfast.enable()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), nullcontext() if native.cpu_loaded() else registry.use_backend("reference"):
            yield
    finally:
        torch.set_num_threads(threads)
        for made in list(adapter._marked):
            adapter.unmark(made)
        adapter.sweep()
        sentfast.enable()


@contextmanager
def ran(site: str = "", code: str = "") -> Iterator[None]:
    """The block runs the encoder, or hands `site` to the original for the reason `code`."""
    sentfast.report(reset=True)
    yield
    report = sentfast.report()
    if code:
        assert report.fallbacks == {(site, code): 1} and ("encoder", BACKEND) not in report.calls, str(report)
    else:
        calls = {call: count for call, count in report.calls.items() if call[0] != "pack_panels"}
        assert calls == {("encoder", BACKEND): 1} and not report.fallbacks, str(report)


def stock(made: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers gives."""
    with sentfast.disabled():
        return made(*args, **kwargs)


def run(encoder: Encoder, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    packed = pack_padded(encoder.tables, *(inputs.get(name) for name in names))
    assert not isinstance(packed, str), packed
    given = {"token_type_ids": packed.token_type_ids, "position_ids": packed.position_ids}
    return encoder.run(packed.input_ids, packed.cu_seqlens, **given, **options)


def check(made: Any, inputs: dict[str, Tensor]) -> tuple[Encoder, Tensor]:
    """The encoder of the model and its token embeddings of the batch, held to the rule of accuracy."""
    encoder = encoder_of(made)
    assert not isinstance(encoder, str), encoder
    used = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"]) > 0
    with sentfast.disabled():
        eager = made(**inputs).last_hidden_state[used]
        accurate = exact(made, inputs)
    result = run(encoder, inputs)
    assert result.dtype == eager.dtype
    # Stock's error in a few tokens may be small by chance, and a softmax of large scores multiplies every rounding.
    size = 4 * accurate.abs().max().item() if len(accurate) < FEW_TOKENS else 0.0
    assert_accurate(result, eager, accurate, size=size)
    return encoder, result
