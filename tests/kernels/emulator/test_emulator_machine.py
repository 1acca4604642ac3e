"""Running a program: grids, batches, divergence, spinning, barriers, errors that say where."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_harness import assembles, kernel, launch

from minipeft_kernels.emulator import BarrierError, DeadlockError, Memory, Observer, all_checks, parse, run

ADDRESS = "mad.wide.u32 out, lane, 4, out;"


def outcome(body: str, blocks: int = 1, threads: int = 64, shared_bytes: int = 0, **options: int | None) -> np.ndarray:
    """What each thread left in `out`, (blocks, threads) int32."""
    out = np.full(blocks * threads, -1, "i4")
    text = kernel(ADDRESS + body, ["out"], threads)
    assert assembles(text)
    launch(text, {"out": out}, blocks, threads, shared_bytes, **options)
    return out.reshape(blocks, threads)


@pytest.mark.parametrize("lanes", [64, 128, 1 << 20])
def test_blocks_that_do_not_fit_side_by_side_follow_each_other(lanes: int) -> None:
    found = outcome("st.global.b32 [out], lane;", blocks=5, lanes=lanes)
    np.testing.assert_array_equal(found.ravel(), np.arange(320))


def test_a_grid_has_three_axes_and_chosen_blocks_alone_may_run() -> None:
    text = kernel(
        "mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z; mov.u32 %r3, %nctaid.x; mov.u32 %r4, %nctaid.y;"
        "mad.lo.u32 %r5, %r2, %r4, %r1; mad.lo.u32 %r5, %r5, %r3, block; mad.wide.u32 out, %r5, 4, out;"
        "setp.eq.u32 %p1, tid, 0; @%p1 st.global.b32 [out], %r5;",
        ["out"],
    )
    out = np.full(24, -1, "i4")
    memory = Memory()
    memory.bind("out", out.view(np.uint8), 4096)
    run(parse(text), [4096], memory, (2, 3, 4), 64)
    assert out.tolist() == list(range(24))
    out[:] = -1
    run(parse(text), [4096], memory, (2, 3, 4), 64, blocks=[3, 20])
    assert np.flatnonzero(out >= 0).tolist() == [3, 20]


@settings(max_examples=20, deadline=None)
@given(trips=st.lists(st.integers(0, 9), min_size=64, max_size=64), seed=st.none() | st.integers(0, 99))
def test_each_lane_takes_its_own_number_of_turns(trips: list[int], seed: int | None) -> None:
    body = """
    mad.wide.u32 trips, tid, 4, trips;
    ld.global.b32 %r1, [trips];
    mov.b32 %r2, 0; mov.b32 %r3, 0;
    LOOP:
    setp.ge.s32 %p1, %r2, %r1;
    @%p1 bra DONE;
    mov.b32 %r4, 0;
    INNER:
    setp.ge.s32 %p2, %r4, %r2;
    @%p2 bra AFTER;
    add.s32 %r3, %r3, %r4;
    add.s32 %r4, %r4, 1;
    bra INNER;
    AFTER:
    add.s32 %r2, %r2, 1;
    bra.uni LOOP;
    DONE:
    mad.wide.u32 out, tid, 4, out;
    st.global.b32 [out], %r3;
    """
    out = np.full(64, -1, "i4")
    launch(kernel(body, ["trips", "out"]), {"trips": np.array(trips, "i4"), "out": out}, seed=seed)
    assert out.tolist() == [sum(j for i in range(n) for j in range(i)) for n in trips]


@settings(max_examples=20, deadline=None)
@given(a=st.integers(0, 64), b=st.integers(0, 64), c=st.integers(0, 64), seed=st.none() | st.integers(0, 99))
def test_nested_conditions(a: int, b: int, c: int, seed: int | None) -> None:
    body = f"""
    mov.b32 %r1, 0;
    setp.lt.u32 %p1, tid, {a};
    @!%p1 bra ELSE;
    setp.lt.u32 %p2, tid, {b};
    @%p2 add.u32 %r1, %r1, 1;
    @%p2 bra JOIN;
    add.u32 %r1, %r1, 10;
    bra JOIN;
    ELSE:
    setp.gt.u32 %p3, tid, {c};
    @!%p3 bra JOIN;
    add.u32 %r1, %r1, 100;
    JOIN:
    add.u32 %r1, %r1, 1000;
    st.global.b32 [out], %r1;
    """
    found = outcome(body, seed=seed)[0]
    for t in range(64):
        expected = (1 if t < b else 10) if t < a else (100 if t > c else 0)
        assert found[t] == 1000 + expected


def test_two_ways_meet_where_they_join() -> None:
    class Issues(Observer):
        def __init__(self) -> None:
            self.sizes: dict[str, list[int]] = {}

        def instruction(self, instruction, lanes, issued) -> None:  # type: ignore[no-untyped-def]
            self.sizes.setdefault(instruction.opcode, []).append(lanes.size)

    watcher = Issues()
    text = kernel(
        "setp.lt.u32 %p1, tid, 40; @%p1 bra A; not.b32 %r1, tid; bra B; A: neg.s32 %r1, tid; B: popc.b32 %r2, tid;",
        ["x"],
    )
    launch(text, {"x": np.zeros(4, "u1")}, observers=(watcher,))
    assert (watcher.sizes["not"], watcher.sizes["neg"], watcher.sizes["popc"]) == ([24], [40], [64])


def test_a_lock_that_lanes_of_one_warp_contend_for_is_passed_on() -> None:
    body = """
    SPIN:
    atom.global.acquire.gpu.cas.b32 %r1, [lock], 0, 1;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra SPIN;
    ld.global.b32 %r2, [sum];
    add.u32 %r2, %r2, 1;
    st.global.b32 [sum], %r2;
    atom.global.release.gpu.exch.b32 %r3, [lock], 0;
    """
    for seed in (None, 5):
        lock, total = np.zeros(1, "u4"), np.zeros(1, "u4")
        launch(kernel(body, ["lock", "sum"]), {"lock": lock, "sum": total}, blocks=2, seed=seed)
        assert total[0] == 128 and lock[0] == 0


@pytest.mark.parametrize("seed", [None, 0])
def test_a_lock_that_blocks_contend_for_with_a_barrier_in_the_loop(seed: int | None) -> None:
    body = """
    mov.b32 %r1, smem; setp.eq.u32 %p1, tid, 0; mad.wide.u32 sum, tid, 4, sum;
    SPIN:
    bar.sync 0;
    @%p1 atom.global.acq_rel.gpu.cas.b32 %r2, [lock], 0, 1;
    @%p1 st.shared.b32 [%r1], %r2;
    bar.sync 0;
    ld.shared.b32 %r2, [%r1];
    setp.eq.u32 %p2, %r2, 1;
    @%p2 bra SPIN;
    ld.global.b32 %r3, [sum];
    add.u32 %r3, %r3, block;
    st.global.b32 [sum], %r3;
    bar.sync 0;
    @%p1 atom.global.acq_rel.gpu.exch.b32 %r4, [lock], 0;
    """
    lock, total = np.zeros(1, "u4"), np.zeros(64, "u4")
    tensors = {"lock": lock, "sum": total}
    launch(kernel(body, list(tensors)), tensors, 6, 64, 64, tuple(all_checks()), seed=seed)
    assert total.tolist() == [15] * 64
    with pytest.raises(DeadlockError, match="jumps back"):
        text = kernel(body.replace("exch.b32 %r4, [lock], 0", "exch.b32 %r4, [lock], 1"), list(tensors))
        launch(text, tensors, 6, 64, 64, spin_limit=20_000)


WAIT = """
setp.ne.u32 %p1, tid, 0;
@%p1 bra DONE;
setp.eq.u32 %p2, block, {first};
@!%p2 bra FOLLOW;
mov.b32 %r9, 42;
st.global.b32 [data], %r9;
atom.global.release.gpu.exch.b32 %r1, [flag], 1;
bra DONE;
FOLLOW:
ld.acquire.gpu.global.b32 %r1, [flag];
setp.eq.u32 %p3, %r1, 0;
@%p3 bra FOLLOW;
ld.global.b32 %r2, [data];
st.global.b32 [data + 4], %r2;
DONE:
"""


@pytest.mark.parametrize("first", [0, 1])
def test_a_block_that_waits_for_another_gets_its_flag(first: int) -> None:
    data, flag = np.zeros(2, "u4"), np.zeros(1, "u4")
    launch(kernel(WAIT.format(first=first), ["data", "flag"]), {"data": data, "flag": flag}, blocks=2)
    assert data.tolist() == [42, 42]


def test_waiting_for_a_block_that_does_not_run_yet_is_an_error_that_says_so() -> None:
    data, flag = np.zeros(2, "u4"), np.zeros(1, "u4")
    with pytest.raises(DeadlockError, match=r"raise `lanes`"):
        text = kernel(WAIT.format(first=1), ["data", "flag"])
        launch(text, {"data": data, "flag": flag}, blocks=2, lanes=64, spin_limit=1000)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_barrier_makes_stores_visible(seed: int | None) -> None:
    body = """
    mov.b32 %r1, smem; mad.lo.u32 %r2, tid, 4, %r1;
    st.shared.b32 [%r2], tid;
    bar.sync 0;
    xor.b32 %r3, tid, 63; mad.lo.u32 %r3, %r3, 4, %r1;
    ld.shared.b32 %r4, [%r3];
    st.global.b32 [out], %r4;
    """
    np.testing.assert_array_equal(outcome(body, blocks=3, shared_bytes=256, seed=seed), [list(range(63, -1, -1))] * 3)


def test_a_seed_runs_warps_in_another_order() -> None:
    body = "atom.global.add.u32 %r1, [count], 1; mad.wide.u32 out, tid, 4, out; st.global.b32 [out], %r1;"
    orders = set()
    for seed in (None, 0, 1, 2, 3):
        count, out = np.zeros(1, "u4"), np.zeros(128, "u4")
        launch(kernel(body, ["count", "out"], 128), {"count": count, "out": out}, threads=128, seed=seed)
        assert sorted(out.tolist()) == list(range(128))
        orders.add(tuple(out.tolist()))
    assert len(orders) > 1


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_named_barriers_hand_over_between_warps(seed: int | None) -> None:
    # Warp 0 fills, warp 1 reads and gives back: barrier 1 is "full", barrier 2 "empty".
    body = """
    mov.b32 %r1, smem; and.b32 %r9, tid, 31; mad.lo.u32 %r2, %r9, 4, %r1;
    mov.b32 %r5, 0; mov.b32 %r6, 0;
    setp.ge.u32 %p1, tid, 32;
    @%p1 bra CONSUME;
    PRODUCE:
    barrier.sync 2, 64;
    add.u32 %r7, %r5, %r9;
    st.shared.b32 [%r2], %r7;
    barrier.arrive 1, 64;
    add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 4; @%p2 bra PRODUCE;
    bra END;
    CONSUME:
    barrier.arrive 2, 64;
    barrier.sync 1, 64;
    ld.shared.b32 %r7, [%r2];
    add.u32 %r6, %r6, %r7;
    add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 4; @%p2 bra CONSUME;
    END:
    st.global.b32 [out], %r6;
    """
    found = outcome(body, shared_bytes=128, seed=seed)[0]
    assert found.tolist() == [0] * 32 + [4 * lane + 6 for lane in range(32)]


def test_a_barrier_that_some_threads_never_reach_because_they_exited_is_an_error() -> None:
    with pytest.raises(BarrierError, match=r"32 of 64 threads have exited.*bar\.sync 0.*block \(0, 0, 0\), thread 0"):
        outcome("setp.ge.u32 %p1, tid, 32; @%p1 exit; bar.sync 0; st.global.b32 [out], tid;")


def test_a_barrier_in_two_ways_of_one_warp_is_an_error() -> None:
    body = "setp.lt.u32 %p1, tid, 40; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B: st.global.b32 [out], tid;"
    with pytest.raises(BarrierError, match=r"barrier under divergence: .*warp 1, lane 0"):
        outcome(body)


def test_a_barrier_in_two_ways_of_different_warps_is_one_barrier() -> None:
    body = "setp.lt.u32 %p1, tid, 32; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B: st.global.b32 [out], tid;"
    assert outcome(body)[0].tolist() == list(range(64))


def test_a_deadlock_says_where_each_warp_waits() -> None:
    body = "setp.lt.u32 %p1, tid, 32; @%p1 bra A; bar.sync 1; bra B; A: bar.sync 2; B: st.global.b32 [out], tid;"
    with pytest.raises(DeadlockError, match=r"warp 0, lane 0.*bar\.sync 2.*warp 1, lane 0.*bar\.sync 1"):
        outcome(body)


def test_a_warp_that_waits_for_lanes_at_a_barrier_is_a_deadlock() -> None:
    body = "setp.lt.u32 %p1, tid, 16; @%p1 bra A; bar.warp.sync -1; bra B; A: bar.sync 0; B: st.global.b32 [out], tid;"
    with pytest.raises(DeadlockError, match="lanes of its warp"):
        outcome(body, threads=32)


def test_arguments_must_fit_the_parameters() -> None:
    program = parse(kernel("", ["x"]))
    with pytest.raises(ValueError, match="1 parameters, got 2 arguments"):
        run(program, [1, 2], Memory(), (1, 1, 1), 64)
    with pytest.raises(ValueError, match="compiled for 64 threads a block, got 32"):
        run(program, [1], Memory(), (1, 1, 1), 32)
    with pytest.raises(ValueError, match="multiple of 32"):
        run(program, [1], Memory(), (1, 1, 1), 40)


def test_parameters_of_every_size() -> None:
    text = kernel("", ["out"]).replace(
        ".param .u64 .ptr .global .align 1 param_out)",
        ".param .u64 .ptr .global .align 1 param_out, .param .u8 b, .param .f32 f, .param .u16 h, .param .f64 d)",
    )
    loads = "ld.param.b8 %h1, [b]; ld.param.b32 %r2, [f]; ld.param.b16 %h2, [h]; ld.param.b64 %d3, [d];"
    stores = "cvt.u32.u16 %r1, %h1; cvt.u32.u16 %r3, %h2; st.global.v4.b32 [out], {%r1, %r2, %r3, %r3};"
    stores += " st.global.b64 [out + 16], %d3;"
    text = text.replace("ret;", f"setp.ne.u32 %p1, tid, 0; @%p1 exit; {loads} {stores} ret;")
    out = np.zeros(24, "u1")
    memory = Memory()
    memory.bind("out", out, 4096)
    run(parse(text), [4096, 200, 1.5, -2, 2.25], memory, (1, 1, 1), 64)
    assert out[:4].view("u4")[0] == 200 and out[4:8].view("f4")[0] == 1.5
    assert out[8:12].view("u4")[0] == 0xFFFE and out[16:].view("f8")[0] == 2.25
