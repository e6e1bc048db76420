"""The models that this project was made for, in their own sizes, with random weights and a vocabulary of letters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from encode_cases import TEXTS, check, ran
from process_settings import threads
from sentence_transformers import SentenceTransformer, models
from tiny_models import save_base

import sentfast

pytestmark = pytest.mark.usefixtures("switched_on", "one_thread")

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BASE |= {"max_position_embeddings": 514, "initializer_range": 0.02}
SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
DISTIL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1024}
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
SHORT = {"max_position_embeddings": 512, "initializer_range": 0.02}
LONG_TEXTS = [*TEXTS[:3], "weather in the passage " * 30]


@pytest.fixture
def one_thread():
    """Beside the other processes of a test run, threads that wait for each other take ten times as long."""
    with threads(1):
        yield


def build(folder, kind, sizes, max_length, *tail):
    transformer = models.Transformer(save_base(folder, kind, **sizes), max_seq_length=max_length)
    pooling = models.Pooling(sizes["hidden_size"], "mean")
    return SentenceTransformer(modules=[transformer, pooling, *tail], device="cpu").eval()


def test_mpnet(tmp_path):
    """512 tokens, then 384 and `similarity`: the same model otherwise."""
    model = build(tmp_path, "mpnet", BASE, 512, models.Normalize())
    check(model, LONG_TEXTS)
    model.max_seq_length = 384
    with sentfast.disabled():
        eager = model.encode(LONG_TEXTS)
        expected = model.similarity(eager, eager)
    with ran("encoder", "cosine_similarity"):
        embeddings = model.encode(LONG_TEXTS)
        scores = model.similarity(embeddings, embeddings)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_minilm(tmp_path):
    check(build(tmp_path, "bert", SMALL | SHORT, 128, models.Normalize()), LONG_TEXTS)


def test_xtremedistil(tmp_path):
    dense = models.Dense(256, 32, activation_function=torch.nn.Tanh())
    check(build(tmp_path, "bert", DISTIL | SHORT, 16, dense), LONG_TEXTS)


def test_bert_tiny(tmp_path):
    model = build(tmp_path, "bert", TINY | SHORT, 512)
    check(model, LONG_TEXTS)
    # The same in plain transformers, with mean pooling as its model card has it.
    base = sentfast.accelerate(transformers.AutoModel.from_pretrained(tmp_path / "bert").eval())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    batch = tokenizer(LONG_TEXTS, padding=True, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad(), ran("encoder", fused=False):
        tokens = base(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = (tokens * mask).sum(1) / mask.sum(1)
    with sentfast.disabled():
        np.testing.assert_allclose(pooled.numpy(), model.encode(LONG_TEXTS), atol=1e-5)
