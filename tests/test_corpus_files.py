"""Files that claim to be a corpus: loading raises CorpusFileError or gives one that can be used."""

from __future__ import annotations

import json
import random
import zlib

import pytest
import torch

from sentfast import search
from sentfast.search import files

TIMES = 250
WORDS = ["", "F32", "I64", "U8", "cos", "-1", "1e3", "٣", "9" * 30, "rows.0", "ids", "\ud800", "nan", "0x1", "[]", "{"]


def value(draw: random.Random, depth: int = 0):
    """Anything that JSON has, and what Python's parser takes beyond it."""
    kind = draw.randrange(9 if depth < 3 else 7)
    numbers = [0, 1, -1, 2, 7, 64, 2**31, 2**53, 2**62, 2**63, 2**64, 10**30, 10**400, draw.randrange(-500, 500)]
    if kind < 3:
        return draw.choice(numbers)
    if kind < 5:
        return draw.choice([0.5, 1.0, 4.0, -0.0, 1e300, float("nan"), float("inf"), True, False, None])
    if kind < 7:
        return draw.choice(WORDS)
    if kind == 7:
        return [value(draw, depth + 1) for _ in range(draw.randrange(5))]
    return {draw.choice(WORDS): value(draw, depth + 1) for _ in range(draw.randrange(4))}


def places(tree, path=()):
    """The way to everything in a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def forged_header(draw: random.Random, whole: bytes) -> bytes:
    """Some fields of the header have other values, and its checksum is right."""
    length = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8 : 8 + length])
    for _ in range(draw.choice([1, 1, 2, 4])):
        *way, last = draw.choice(list(places(head)))
        inside = head
        for key in way:
            inside = inside[key]
        change = draw.randrange(6)
        if change == 0:
            del inside[last]
        elif change == 1 and isinstance(inside, dict):
            inside[draw.choice(WORDS)] = inside[last]
        elif change == 2 and isinstance(inside[last], list):
            draw.shuffle(inside[last])
        elif change == 3 and way[:1] == ["__metadata__"]:
            inside[last] = json.dumps(value(draw))
        else:
            inside[last] = value(draw)
    if isinstance(head.get("__metadata__"), dict):
        head["__metadata__"]["header"] = files._header_sum(head)
    text = json.dumps(head).encode()
    text += b" " * (draw.choice([-(8 + len(text)) % 64, 0, 3]))
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def nested(draw: random.Random, whole: bytes) -> bytes:
    depth = draw.choice([100, 990, 3000, 200_000])
    text = draw.choice([b"[" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b'{"__metadata__":' + b"[" * depth])
    return len(text).to_bytes(8, "little") + text + whole[-64:]


def forged_names(draw: random.Random, whole: bytes) -> bytes:
    """What should be the rows' names is other JSON of the same length, with its checksum."""
    length = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8 : 8 + length])
    start, end = (8 + length + offset for offset in head["names"]["data_offsets"])
    text = json.dumps(value(draw)).encode()
    if draw.random() < 0.2:
        text = draw.choice([b"[" * (end - start), b"\xff" * 9, json.dumps([1] * 9).encode()])
    text = text[: end - start].ljust(end - start)
    sums = json.loads(head["__metadata__"]["crc32"])
    head["__metadata__"]["crc32"] = json.dumps({**sums, "names": f"{zlib.crc32(text):08x}"})
    head["__metadata__"]["header"] = files._header_sum(head)
    header = json.dumps(head, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % 64)
    return len(header).to_bytes(8, "little") + header + whole[8 + length : start] + text + whole[end:]


def damaged(draw: random.Random, whole: bytes) -> bytes:
    """Bits turned over, parts cut out, doubled or moved."""
    found = bytearray(whole)
    for _ in range(draw.choice([1, 1, 3])):
        # Half of them in the header.
        limit = len(found) if draw.random() < 0.5 else min(len(found), 900)
        a, b = sorted((draw.randrange(limit), draw.randrange(limit)))
        kind = draw.randrange(5)
        if kind == 0:
            found[a] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[a : a + draw.randrange(40)] = b""
        elif kind == 2:
            found[a:a] = found[a:b]
        elif kind == 3:
            found[b:] = b""
        else:
            found[a : a + 8] = draw.randbytes(8)
        if len(found) < 2:
            break
    return bytes(found)


@pytest.mark.parametrize("forge", [damaged, forged_header, forged_names, nested], ids=lambda forge: forge.__name__)
def test_forged_files(tmp_path, forge):
    draw = random.Random(torch.initial_seed())
    path, rows = tmp_path / "corpus", draw.randrange(1, 150)
    names = [f"text {i}" for i in range(rows)]
    ids = names if forge is forged_names or draw.random() < 0.5 else draw.choice([None, list(range(rows))])
    x = torch.randn(rows, draw.randrange(1, 40))
    search.Corpus(x, precision=draw.choice(["int8", "bf16", "fp32"]), ids=ids).save(path)
    whole, refused = path.read_bytes(), 0
    for _ in range(20 if forge is nested else TIMES):
        path.write_bytes(forge(draw, whole))
        try:
            corpus = search.Corpus.load(path, mmap=draw.random() < 0.5, verify=draw.random() < 0.7)
        except search.CorpusFileError:
            refused += 1
            continue
        found = corpus.topk(torch.randn(2, corpus.dim), min(3, len(corpus)))
        assert found.scores.shape == (2, min(3, len(corpus))) and len(corpus.names(found.indices)) == 2
    assert refused
