"""The interpreter of PTX finds what it is there to find: small kernels with one mistake each, and the same without."""

from __future__ import annotations

import platform
import re
import struct

import pytest
import torch
from ptx.interpreter import Launch, Module, PtxError, Range
from ptx.settings import MOMENTS

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the interpreter is written for x86-64")

THREADS = 64
HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"
# %rd1: the input, %rd2: the output, %rd3: four bytes per thread, %r1: the thread, %r3: its four bytes of shared memory.
KERNEL = """
.visible .entry kernel(.param .u64 input, .param .u64 output) {{
  .reg .b32 %r<40>; .reg .b64 %rd<20>; .reg .b16 %h<8>; .reg .f32 %f<20>; .reg .f64 %fd<4>; .reg .pred %p<5>;
  .shared .align 16 .b8 shared[1024];
  ld.param.u64 %rd1, [input]; ld.param.u64 %rd2, [output];
  mov.u32 %r1, %tid.x; mov.u32 %r2, shared;
  mul.wide.u32 %rd3, %r1, 4; shl.b32 %r3, %r1, 2; add.u32 %r3, %r2, %r3;
  add.u64 %rd4, %rd1, %rd3; add.u64 %rd5, %rd2, %rd3;
{body}
  ret;
}}
"""
# Each thread's number goes through shared memory to the thread of the other warp.
THROUGH_SHARED = """
  ld.global.b32 %r4, [%rd4]; st.shared.b32 [%r3], %r4;
  {barrier}
  xor.b32 %r5, %r1, 32; shl.b32 %r5, %r5, 2; add.u32 %r5, %r2, %r5;
  ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd5], %r6;
"""
COPIED = """
  cp.async.ca.shared.global [%r3], [%rd4], 4;
  cp.async.commit_group;
  {wait}
  ld.shared.b32 %r6, [%r3]; st.global.b32 [%rd5], %r6;
"""


def run(body: str, moment: int = 2, blocks: int = 1, seed: int = 0, threads: int = THREADS) -> list[torch.Tensor]:
    """Input and output of the kernel, of a number for each thread."""
    tensors = [torch.randint(2**31 - 1, (THREADS,), dtype=torch.int32) for _ in range(2)]
    places = [x.data_ptr() for x in tensors]
    ranges = [Range(name, at, at + 4 * THREADS) for name, at in zip(("input", "output"), places, strict=True)]
    launch = Launch(grid=(blocks, 1, 1), threads=(threads, 1, 1), ranges=ranges, seed=seed, moment=moment)
    Module(HEAD + KERNEL.format(body=body)).launch("kernel", struct.pack("<QQ", *places), launch)
    return tensors


def test_numbers_pass_through_shared_memory() -> None:
    for seed in range(5):
        given, got = run(THROUGH_SHARED.format(barrier="bar.sync 0;"), seed=seed)
        assert torch.equal(got, given.roll(32))


def test_copies_arrive() -> None:
    for moment in range(len(MOMENTS)):
        given, got = run(COPIED.format(wait="cp.async.wait_group 0;"), moment=moment)
        assert torch.equal(given, got)


MISTAKES = {
    "no barrier": (THROUGH_SHARED.format(barrier=""), "shared race"),
    "read past the end": ("ld.global.b32 %r4, [%rd4+4]; st.global.b32 [%rd5], %r4;", "reads 4 bytes .* after .* input"),
    "write before the start": ("st.global.b32 [%rd5+-4], %r1;", "writes 4 bytes .* before output"),
    "outside shared memory": ("st.shared.b32 [%r3+1020], %r1;", "outside shared memory"),
    "misaligned": ("ld.global.b32 %r4, [%rd1+2];", "misaligned access of 4 bytes"),
    "half a warp at a barrier": (
        "and.b32 %r4, %r1, 1; setp.eq.u32 %p1, %r4, 0; @%p1 bar.sync 0;",
        "barrier reached by a part of a warp",
    ),
    "lanes that never meet": (
        "and.b32 %r4, %r1, 1; setp.eq.u32 %p1, %r4, 0; @%p1 bra even; bar.sync 0; bra end; even: bar.sync 0; end:",
        "deadlock",
    ),
    "two blocks write": ("mov.u32 %r4, %ctaid.x; st.global.b32 [%rd5], %r4;", "two blocks write to output"),
    "a lane that is not there": (
        "setp.lt.u32 %p1, %r1, 8; @%p1 bra end; shfl.sync.idx.b32 %r4, %r1, 0, 31, -1; end:",
        "reads from a lane that does not execute this",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported(mistake: str) -> None:
    body, message = MISTAKES[mistake]
    with pytest.raises(PtxError) as found:
        run(body, blocks=2 if mistake == "two blocks write" else 1)
    assert re.search(message, str(found.value)), found.value


def test_a_copy_that_nobody_waits_for_arrives_late() -> None:
    early, late = MOMENTS.index("early"), MOMENTS.index("late")
    given, got = run(COPIED.format(wait=""), moment=early)
    assert torch.equal(given, got)
    given, got = run(COPIED.format(wait=""), moment=late)
    assert not torch.equal(given, got)


@pytest.mark.parametrize(
    "statement", ["bar.arrive 0, 64;", "add.sat.s32 %r4, %r1, %r1;", "nonsense.b32 %r4, %r1;", "mov.b32 %r4, nowhere;"]
)
def test_what_is_unknown_is_refused_with_its_text(statement: str) -> None:
    with pytest.raises(PtxError, match=re.escape(statement.split()[0].rstrip(";"))) as found:
        run(statement)
    assert "unknown" in str(found.value)


def single(body: str) -> int:
    """The number that %r4 has in thread 0."""
    return int(run(f"{body} st.global.b32 [%rd5], %r4;", threads=32)[1][0]) & 0xFFFFFFFF


def float_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


# Every element of a and b is in the second number, every sum starts as the third.
PRODUCT = (
    "mov.b32 %r5, {2}; mov.b32 %r6, {3};"
    "mma.sync.aligned.m16n8k{1}.row.col.{0} {{%r4, %r7, %r8, %r9}}, {{%r5, %r5, %r5, %r5}}, {{%r5, %r5}},"
    " {{%r6, %r6, %r6, %r6}};"
)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mov.b32 %r5, -7; shr.s32 %r4, %r5, 40;", 0xFFFFFFFF),
        ("mov.b32 %r5, -7; shr.u32 %r4, %r5, 40;", 0),
        ("mov.b32 %r5, -7; mul.hi.s32 %r4, %r5, 3;", 0xFFFFFFFF),
        ("mov.b32 %r5, -7; mul.hi.u32 %r4, %r5, 3;", 2),
        ("mov.b32 %r5, -7; div.s32 %r4, %r5, 2;", 0xFFFFFFFD),
        ("mov.b32 %r5, -7; rem.s32 %r4, %r5, 2;", 0xFFFFFFFF),
        ("mov.b32 %r5, 0x12345678; prmt.b32 %r4, %r5, 0, 0x0123;", 0x78563412),
        ("mov.b32 %r5, 0x12345678; bfe.u32 %r4, %r5, 8, 12;", 0x456),
        ("mov.b32 %r5, 0x12345678; bfe.s32 %r4, %r5, 4, 4;", 7),
        ("mov.b32 %r5, 0x12345678; bfi.b32 %r4, 0xf, %r5, 28, 8;", 0xF2345678),
        ("mov.b32 %r5, 0x80000001; shf.l.wrap.b32 %r4, %r5, %r5, 33;", 3),
        ("mov.b32 %r5, 0xcc; lop3.b32 %r4, %r5, 0xaa, 0xf0, 0x96;", 0xCC ^ 0xAA ^ 0xF0),
        ("mov.b32 %r5, 0x00f0; clz.b32 %r4, %r5;", 24),
        ("mov.f32 %f1, 0f7F800000; sub.f32 %f2, %f1, %f1; max.f32 %f3, %f2, 0f3F800000; mov.b32 %r4, %f3;", 0x3F800000),
        ("mov.f32 %f1, 0f00000001; add.ftz.f32 %f2, %f1, %f1; mov.b32 %r4, %f2;", 0),
        ("mov.f32 %f1, 0f3F808001; cvt.rn.bf16.f32 %h1, %f1; mov.b32 %r4, {%h1, %h1};", 0x3F813F81),
        ("mov.f32 %f1, 0f3F808000; cvt.rn.bf16.f32 %h1, %f1; mov.b32 %r4, {%h1, %h1};", 0x3F803F80),
        ("mov.f32 %f1, 0f3F801000; cvt.rna.tf32.f32 %r4, %f1;", 0x3F802000),
        ("mov.f32 %f1, 0fC0600000; cvt.rzi.s32.f32 %r4, %f1;", 0xFFFFFFFD),
        ("mov.f32 %f1, 0fC0600000; cvt.rni.s32.f32 %r4, %f1;", 0xFFFFFFFC),
        ("mov.f32 %f1, 0f4F800000; cvt.rzi.u32.f32 %r4, %f1;", 0xFFFFFFFF),
        ("mov.f64 %fd1, 0d3FF0000010000001; cvt.rn.f32.f64 %f1, %fd1; mov.b32 %r4, %f1;", float_bits(1 + 2**-23)),
        ("mov.f64 %fd1, 0d3FF0000010000001; cvt.rz.f32.f64 %f1, %fd1; mov.b32 %r4, %f1;", float_bits(1.0)),
        ("vote.sync.ballot.b32 %r4, 0, -1;", 0),
        # 32 products of 127 and 127, added to the largest number.
        (PRODUCT.format("s32.s8.s8.s32", 32, 0x7F7F7F7F, 0x7FFFFFFF), (0x7FFFFFFF + 32 * 127**2) % 2**32),
        (PRODUCT.format("satfinite.s32.s8.s8.s32", 32, 0x7F7F7F7F, 0x7FFFFFFF), 0x7FFFFFFF),
        # 16 products of ones; of 1/4 and 1/4, added to 2^24 + 2, which has no neighbour 2^24 + 3.
        (PRODUCT.format("f32.bf16.bf16.f32", 16, 0x3F803F80, 0), float_bits(16.0)),
        (PRODUCT.format("f32.bf16.bf16.f32", 16, 0x3E803E80, 0x4B800001), 0x4B800001),
        (PRODUCT.format("f32.f16.f16.f32", 16, 0x3C003C00, 0), float_bits(16.0)),
        (PRODUCT.format("f32.tf32.tf32.f32", 8, 0x3F800FFF, 0), float_bits(8.0)),
        ("redux.sync.add.s32 %r4, %r1, -1;", 31 * 16),
        ("shfl.sync.bfly.b32 %r4, %r1, 5, 31, -1;", 5),
        ("shfl.sync.down.b32 %r4, %r1, 3, 31, -1;", 3),
    ],
)
def test_instructions(body: str, expected: int) -> None:
    assert single(body) == expected, hex(single(body))
