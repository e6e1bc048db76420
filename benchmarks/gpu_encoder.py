"""The packed encoder on a GPU against sentence-transformers on the same GPU: encode, a training step, one short query.

python benchmarks/gpu_encoder.py [--device cuda] [--only NAME ...] [--quick] [--output FILE]

Needs no network: weights are random, made from the configurations of all-MiniLM-L6-v2, BERT-base and all-mpnet-base-v2,
and a text is made of random words, as many as a real one has tokens. Stock is what a user gets without a choice: sdpa,
for MPNet eager, padded. --quick, also with --device cpu, shrinks models and samples, to see that everything runs.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import fnmatch
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gate
import machine
import tokenizers
import torch
from study import OURS, STOCK, cosines, judged
from timing import Variant, interleave, ratio, spread, switch
from training_step import distance, without_dropout

from sentfast import report
from sentfast.encoder import lengths

NO_GRAPHS = "sentfast without graphs"
WORDS = 30000
# Tokens of WordNet's glosses and of paragraphs of Python's language reference, in all-MiniLM-L6-v2's vocabulary: 25
# quantiles of each, from 2% to 98%.
GLOSSES = (5, 7, 8, 9, 10, 10, 11, 12, 13, 14, 14, 15, 16, 17, 18, 18, 20, 21, 22, 24, 26, 28, 31, 36, 47)
PARAGRAPHS = (
    *(106, 114, 122, 128, 135, 143, 151, 157, 161, 165, 170, 174, 180),
    *(185, 189, 195, 199, 204, 209, 216, 220, 227, 233, 240, 250),
)
TEXTS, PAIRS, QUERIES, BLOCK, QUERY_TOKENS = 2048, 64, 200, 20, 12
SAME = 0.999  # least mean cosine to stock in bfloat16
GRADIENTS_AGREE = (
    2e-2  # distance of the gradients to stock's under bfloat16 autocast, on top of twice stock's to float32
)
# What issue and design promise, times faster than stock.
ENCODE = {"minilm": 2.5, "bert_base": 2.5, "mpnet": 4.0}
TRAINING = {"bert_base": 2.0, "mpnet": 3.0}
QUERY = {"minilm": 2.0, "mpnet": 2.0}


def config_of(name: str, quick: bool) -> Any:
    import transformers

    layers, hidden, heads = {"minilm": (6, 384, 12), "bert_base": (12, 768, 12), "mpnet": (12, 768, 12)}[name]
    if quick:
        layers, hidden, heads = 2, 128, 4
    kind = transformers.MPNetConfig if name == "mpnet" else transformers.BertConfig
    return kind(
        vocab_size=WORDS + 5,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=514,
        pad_token_id=1,
    )


def build(name: str, device: torch.device, quick: bool) -> Any:
    """Transformer, mean pooling, Normalize in float32; a word is a token."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    special = {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": 4}
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(special | {f"w{i}": i + 5 for i in range(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("cls", "pad", "sep", "unk", "mask")}
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(config_of(name, quick))
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, model_max_length=384, model_input_names=["input_ids", "attention_mask"], **names
        ).save_pretrained(folder)
        body = modules.Transformer(folder, max_seq_length=384)
    parts = [body, modules.Pooling(base.config.hidden_size, "mean"), modules.Normalize()]
    return SentenceTransformer(modules=parts, device=str(device)).eval()


def texts_of(lengths: Sequence[int], seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(length - 2)) for length in lengths]


def mixed(count: int, seed: int) -> list[str]:
    """Half glosses, half paragraphs, in random order."""
    draw = random.Random(seed)
    return texts_of([draw.choice(draw.choice((GLOSSES, PARAGRAPHS))) for _ in range(count)], seed)


def encode(model: Any, sample: Sequence[str]) -> torch.Tensor:
    return model.encode(sample, convert_to_tensor=True, show_progress_bar=False)


def check_ran(name: str, run: Callable[[], Any], backends: set[str]) -> Any:
    """The result of a call with sentfast on; refuses one whose layers ran elsewhere."""
    switch(True)
    report(reset=True)
    result = run()
    found = report(reset=True)
    ran = {backend for op, backend in found.calls if op in ("varlen_attention", "encoder")}
    if not ran or not ran <= backends:
        raise gate.Refused(f"{name}: the layers ran on {sorted(ran)}, wanted {sorted(backends)}\n{found}")
    return result


# ---- rows --------------------------------------------------------------------------------------------------------


def encode_row(name: str, device: torch.device, backends: set[str], quick: bool) -> dict[str, Any]:
    """Texts of mixed lengths to embeddings in bfloat16, tokenisation included."""
    model = build(name, device, quick).to(torch.bfloat16)
    sample = mixed(64 if quick else TEXTS, 0)
    switch(False)
    stock = encode(model, sample)
    found = cosines(stock, check_ran(name, lambda: encode(model, sample), backends))
    if not found["mean"] >= SAME:
        raise gate.Refused(f"{name}: its embeddings have mean cosine {found['mean']:.4f} to stock")
    variants = {
        STOCK: Variant(lambda sample: encode(model, sample)),
        OURS: Variant(lambda sample: encode(model, sample), switched=True),
    }
    samples = interleave(variants, [sample], device, cold=False, budget=1.0 if quick else 15.0)
    row = timed(samples, ENCODE[name])
    tokens = sum(len(text.split()) + 2 for text in sample)
    rates = {variant: tokens / taken["median"] for variant, taken in row["seconds"].items()}
    return {**row, "texts": len(sample), "tokens": tokens, "tokens_per_second": rates, "cosine": found}


def training_row(name: str, device: torch.device, backends: set[str], quick: bool) -> dict[str, Any]:
    """Forward and backward of MultipleNegativesRankingLoss under bfloat16 autocast, with dropout."""
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import batch_to_device

    model = build(name, device, quick).train()
    count = 4 if quick else PAIRS
    columns = [texts_of(random.Random(i).choices(GLOSSES, k=count), i) for i in range(2)]
    batch = []
    for column in map(model.preprocess, columns):
        known = lengths.of_mask(column["attention_mask"])
        batch.append(batch_to_device(column, device))
        lengths.note(column["attention_mask"], known)  # as it happens where the Trainer's data loader sends a batch
    loss = losses.MultipleNegativesRankingLoss(model)

    def step(batch: Any, half: bool = True) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            value = loss([dict(column) for column in batch], None)
        value.backward()
        return value.detach()

    def gradients(half: bool = True) -> dict[str, torch.Tensor]:
        step(batch, half)
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    with without_dropout(model):
        switch(False)
        exact, stock = gradients(half=False), gradients()
        apart = distance(check_ran(name, gradients, backends), exact)
    allowed = 2 * distance(stock, exact) + GRADIENTS_AGREE
    if not apart <= allowed:
        raise gate.Refused(f"{name}: gradients are {apart:.3g} apart from stock's in float32, allowed is {allowed:.3g}")
    variants = {STOCK: Variant(step), OURS: Variant(step, switched=True)}
    samples = interleave(variants, [batch], device, cold=False, budget=1.0 if quick else 10.0)
    return {**timed(samples, TRAINING[name]), "pairs": count, "gradients": {"apart": apart, "allowed": allowed}}


def query_row(name: str, device: torch.device, backends: set[str], quick: bool) -> dict[str, Any]:
    """p50 of encode for one short text in bfloat16, as a caller who gets a numpy vector of float32 sees it."""
    model = build(name, device, quick).to(torch.bfloat16)
    models = {STOCK: model, OURS: model, NO_GRAPHS: copy.deepcopy(model)}
    queries = texts_of([QUERY_TOKENS] * (20 if quick else QUERIES), 0)
    taken: dict[str, list[float]] = {variant: [] for variant in models}
    for variant in (OURS, NO_GRAPHS):
        with environment("SENTFAST_CUDA_GRAPHS", "0" if variant == NO_GRAPHS else "1"):
            for _ in range(4):
                check_ran(name, lambda variant=variant: models[variant].encode(queries[0]), backends)
    for start in range(0, len(queries), BLOCK):
        for variant, one in models.items():
            switch(variant != STOCK)
            one.encode(queries[start])
            for query in queries[start : start + BLOCK]:
                begin = time.perf_counter()
                one.encode(query)
                taken[variant].append(time.perf_counter() - begin)
    switch(False)
    row = timed(taken, QUERY[name])
    p50 = {variant: statistics.median(times) for variant, times in taken.items()}
    return {**row, "tokens": QUERY_TOKENS, "p50": p50}


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def timed(samples: dict[str, list[float]], least: float) -> dict[str, Any]:
    ratios = {name: ratio(samples[STOCK], found) for name, found in samples.items() if name != STOCK}
    got = ratios[OURS]["median"]
    target = judged(f"at least {least:g} × faster than sentence-transformers", least, got, "×")
    return {"seconds": {name: spread(x) for name, x in samples.items()}, "ratios": ratios, "targets": {"speed": target}}


ROWS: dict[str, Callable[[torch.device, set[str], bool], dict[str, Any]]] = {
    **{f"gpu_encode_{name}": lambda *a, name=name: encode_row(name, *a) for name in ENCODE},
    **{f"gpu_training_{name}": lambda *a, name=name: training_row(name, *a) for name in TRAINING},
    **{f"gpu_query_{name}": lambda *a, name=name: query_row(name, *a) for name in QUERY},
}


def describe(name: str, row: dict[str, Any]) -> str:
    target = row["targets"]["speed"]
    parts = [f"{name:24} {row['seconds'][OURS]['median'] * 1e3:9.3f} ms"]
    parts += [f"{variant} {found['median']:.2f}x" for variant, found in row["ratios"].items()]
    return "  ".join(parts) + ("" if target["met"] else f"  MISSED: {target['wanted']:g}x")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help=f"of {', '.join(ROWS)}; wildcards")
    parser.add_argument("--quick", action="store_true", help="tiny models, few rounds")
    parser.add_argument("--output", type=Path, help="write the rows there as JSON")
    options = parser.parse_args(arguments)
    chosen = [name for name in ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    if not chosen:
        parser.error(f"--only: expected names of {', '.join(ROWS)}, got {' '.join(options.only)}")
    device = torch.device(options.device)
    rows, refused = {}, 0
    for name in chosen:
        try:
            row = ROWS[name](device, gate.EXPECTED[device.type], options.quick)
        except gate.Refused as reason:
            print(f"REFUSED {name}: {reason}", flush=True)
            refused += 1
            continue
        finally:
            switch(False)
        rows[name] = {**row, **machine.commit(), "date": datetime.date.today().isoformat()}
        print(describe(name, row), flush=True)
        if options.output:
            head = {"machine": machine.describe(device, torch.get_num_threads()), "versions": machine.versions()}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
