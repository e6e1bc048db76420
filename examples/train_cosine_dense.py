"""A small student with 32 columns learns the similarities that all-MiniLM-L6-v2 gives to pairs of sentences.

Six layers of 256, texts cut to 16 tokens, mean pooling, Dense 256 to 32 with tanh; CosineSimilarityLoss and the
trainer of earlier days, ``model.fit``.

python examples/train_cosine_dense.py [--steps N] [--out FILE.png]
"""

from __future__ import annotations

import random
import tempfile

import common
import torch
from sentence_transformers import InputExample, SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses, modules
from torch.utils.data import DataLoader

BATCH, MAX_SEQ_LENGTH, COLUMNS = 32, 16, 32
HELD_OUT = 200


def labelled_pairs(teacher: SentenceTransformer) -> list[InputExample]:
    """As many pairs of neighbours as of sentences drawn at random, with the teacher's cosine."""
    draw = random.Random(common.SEED)
    pairs = common.neighbours()
    sentences = [first for first, _ in pairs]
    pairs += [(first, draw.choice(sentences)) for first, _ in pairs]
    draw.shuffle(pairs)
    texts = list({text: None for pair in pairs for text in pair})
    embeddings = dict(zip(texts, teacher.encode(texts, convert_to_tensor=True), strict=True))
    left, right = (torch.stack([embeddings[text] for text in side]) for side in zip(*pairs, strict=True))
    cosines = util.pairwise_cos_sim(left, right).tolist()
    return [InputExample(texts=list(pair), label=cosine) for pair, cosine in zip(pairs, cosines, strict=True)]


def take_words(model: SentenceTransformer, teacher: SentenceTransformer) -> None:
    """The student begins with the principal components of the teacher's word embeddings."""
    words = teacher[0].auto_model.embeddings.word_embeddings.weight.detach()
    own = model[0].auto_model.embeddings.word_embeddings.weight
    with torch.no_grad():
        left, values, _ = torch.linalg.svd(words - words.mean(0), full_matrices=False)
        own.copy_(left[:, : own.shape[1]] * values[: own.shape[1]])


def correlation(model: SentenceTransformer, examples: list[InputExample]) -> float:
    """Pearson's, between the cosines of the model and those of the teacher."""
    left, right = zip(*(example.texts for example in examples), strict=True)
    embeddings = [model.encode(list(side), convert_to_tensor=True) for side in (left, right)]
    cosines = util.pairwise_cos_sim(*embeddings)
    labels = torch.tensor([example.label for example in examples])
    return torch.corrcoef(torch.stack([cosines, labels]))[0, 1].item()


def main() -> None:
    options = common.parse(__doc__, steps=60)
    teacher = common.minilm()
    examples = labelled_pairs(teacher)
    held_out, training = examples[:HELD_OUT], examples[HELD_OUT:]

    def train(run: common.Run) -> None:
        dense = modules.Dense(256, COLUMNS, activation_function=torch.nn.Tanh())
        model = common.small_model(6, 256, 8, MAX_SEQ_LENGTH, dense)
        take_words(model, teacher)
        run.scores["correlation with the teacher, before"] = correlation(model, held_out)
        loss = run.watch(losses.CosineSimilarityLoss(model))
        loader = DataLoader(training, shuffle=True, batch_size=BATCH)
        with tempfile.TemporaryDirectory() as folder:
            model.fit(
                [(loader, loss)],
                steps_per_epoch=options.steps,
                warmup_steps=options.steps // 10,
                optimizer_params={"lr": 3e-4},
                checkpoint_path=folder,
                checkpoint_save_steps=10**9,
                show_progress_bar=False,
            )
        run.scores["correlation with the teacher, after"] = correlation(model, held_out)

    common.compare(train, __file__, options)


if __name__ == "__main__":
    main()
