"""Running a program: batches of blocks, arguments, divergence, barriers, seeds."""

import numpy as np
import pytest

from minipeft.kernels.emulator import Memory, Observer, Program, parse, run

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 .ptr .global .align 1 out, .param .u32 n)
.reqntid {threads}
{{
.reg .pred %p<9>;
.reg .b32 %r<40>;
.reg .b64 %rd<9>;
ld.param.b64 %rd1, [out];
ld.param.b32 %r1, [n];
mov.u32 %r2, %tid.x;
mov.u32 %r3, %ctaid.x;
mad.lo.s32 %r4, %r3, {threads}, %r2;
mad.wide.u32 %rd2, %r4, 4, %rd1;
"""


def program(body: str, threads: int = 64) -> Program:
    return parse(HEAD.format(threads=threads) + body + "\nret;\n}\n")


def result(
    body: str,
    n: int = 0,
    blocks: int = 3,
    threads: int = 64,
    shared: int = 0,
    observers: tuple[Observer, ...] = (),
    **kw,
) -> np.ndarray:
    """What the threads of a grid leave in `out`, one int32 each, as (blocks, threads)."""
    out = np.full(4 * blocks * threads, 0xEE, np.uint8)
    memory = Memory()
    memory.bind("out", out, 0x1000)
    run(program(body, threads), [0x1000, n], memory, (blocks, 1, 1), threads, shared, observers, **kw)
    return out.view(np.int32).reshape(blocks, threads)


def test_every_thread_knows_its_place() -> None:
    found = result("add.s32 %r5, %r4, %r1; st.global.b32 [%rd2], %r5;", n=7)
    np.testing.assert_array_equal(found, np.arange(192).reshape(3, 64) + 7)


@pytest.mark.parametrize("lanes", [64, 128, 1 << 20])
def test_blocks_that_do_not_fit_side_by_side_follow_each_other(lanes: int) -> None:
    found = result("st.global.b32 [%rd2], %r4;", blocks=5, lanes=lanes)
    np.testing.assert_array_equal(found.ravel(), np.arange(320))
