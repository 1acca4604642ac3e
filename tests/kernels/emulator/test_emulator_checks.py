"""Every check finds the bug that is planted for it, names it, and passes the program beside it that is right."""

from collections.abc import Callable

import numpy as np
import pytest
from ptx_harness import assembles, kernel, launch

from minipeft_kernels.emulator import (
    AsyncCopies,
    AsyncCopyError,
    Observer,
    RaceError,
    Races,
    Uninitialized,
    UninitializedError,
    all_checks,
)

PLACE = """
mov.b32 %r1, smem; mad.lo.u32 %r2, tid, 4, %r1;
mad.wide.u32 %d1, lane, 4, x;
xor.b32 %r3, tid, 63; mad.lo.u32 %r4, %r3, 4, %r1;
"""


def go(
    body: str, observers: list[Observer] | None = None, blocks: int = 1, unwritten: tuple[str, ...] = (), **options: int
) -> dict[str, np.ndarray]:
    tensors = {"x": np.zeros(64 * blocks, "u4"), "y": np.zeros(4, "u4")}
    text = kernel(PLACE + body, list(tensors))
    assert assembles(text)
    watching = tuple(all_checks() if observers is None else observers)
    launch(text, tensors, blocks, 64, 1024, watching, unwritten, **options)
    return tensors


EXCHANGE = "st.shared.b32 [%r2], tid; {barrier} ld.shared.b32 %r5, [%r4]; st.global.b32 [%d1], %r5;"
SYNC = "bar.sync 0;"


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_missing_barrier_is_a_race(seed: int | None) -> None:
    go(EXCHANGE.format(barrier=SYNC), seed=seed)
    message = r"race on byte \d+ of shared memory: block \(0, 0, 0\), warp \d (reads|writes) it at `(ld|st)\.shared"
    with pytest.raises(RaceError, match=message):
        # Without a seed nothing shows in the result: both warps store before either loads.
        go(EXCHANGE.format(barrier=""), [Races()], seed=seed)


def test_reuse_of_shared_memory_before_the_others_have_read_is_a_race() -> None:
    again = EXCHANGE.format(barrier=SYNC) + "{barrier} st.shared.b32 [%r2], 7;"
    go(again.format(barrier=SYNC))
    with pytest.raises(RaceError, match=r"writes it at `st\.shared.*reads it at `ld\.shared"):
        go(again.format(barrier=""))


def test_a_barrier_of_one_warp_does_not_order_two() -> None:
    with pytest.raises(RaceError, match="shared memory"):
        go(EXCHANGE.format(barrier="bar.warp.sync -1;"), [Races()])


def test_lanes_of_one_warp_do_not_race() -> None:
    body = "xor.b32 %r3, tid, 31; mad.lo.u32 %r4, %r3, 4, %r1;" + EXCHANGE.format(barrier="bar.warp.sync -1;")
    go(body)


def test_warps_that_meet_at_a_barrier_of_their_own_are_ordered_and_others_are_not() -> None:
    text = PLACE + "setp.ge.u32 %p1, tid, 64; @%p1 exit; " + EXCHANGE.format(barrier="barrier.sync 3, 64;")
    tensors = {"x": np.zeros(128, "u4")}
    launch(kernel(text, ["x"], 128), tensors, 1, 128, 1024, (Races(),))
    # Warps 0 and 1 meet; warp 2 reads what they wrote and met nobody.
    text = (
        PLACE
        + """
    setp.ge.u32 %p1, tid, 64; setp.ge.u32 %p2, tid, 96; @%p2 exit; @%p1 bra READ;
    st.shared.b32 [%r2], tid;
    barrier.sync 3, 64;
    exit;
    READ: ld.shared.b32 %r5, [%r1];
    """
    )
    with pytest.raises(RaceError, match=r"warp 2 reads.*warp 0 writes|warp 0 writes.*warp 2 reads"):
        launch(kernel(text, ["x"], 128), tensors, 1, 128, 1024, (Races(),))


def test_a_barrier_waits_for_the_last_thread_of_a_warp() -> None:
    text = (
        PLACE
        + """
    setp.eq.u32 %p1, tid, 0; @%p1 bra LATE;
    MEET: barrier.sync 0;
    ld.shared.b32 %r5, [%r1]; st.global.b32 [%d1], %r5;
    exit;
    LATE: st.shared.b32 [%r1], 42; bra MEET;
    """
    )
    tensors = {"x": np.zeros(64, "u4")}
    launch(kernel(text, ["x"]), tensors, 1, 64, 1024, (Races(),))
    assert tensors["x"].tolist() == [42] * 64


def test_a_barriers_count_is_forgotten_once_it_is_passed() -> None:
    """First two warps meet, by their number; then all three at the same barrier, by none."""
    text = (
        PLACE
        + """
    setp.ge.u32 %p1, tid, 64; @%p1 bra LATE;
    barrier.sync 3, 64;
    MEET: barrier.sync 3;
    ld.shared.b32 %r5, [%r1]; st.global.b32 [%d1], %r5;
    exit;
    LATE: st.shared.b32 [%r1], 42; bra MEET;
    """
    )
    tensors = {"x": np.zeros(96, "u4")}
    launch(kernel(text, ["x"], 96), tensors, 1, 96, 1024, (Races(same_value=True),))
    assert tensors["x"].tolist() == [42] * 96


SAME = "st.global.b32 [y], 5;"


def test_two_warps_that_write_the_same_are_reported_unless_that_is_allowed() -> None:
    with pytest.raises(RaceError, match=r"race on byte 0 of y \(16 bytes\).* warp \d writes it .*warp \d writes it"):
        go(SAME)
    go(SAME, [Races(same_value=False)])
    with pytest.raises(RaceError, match="byte 0 of y"):
        go("st.global.b32 [y], tid;", [Races(same_value=False)])


def test_a_collecting_check_goes_on() -> None:
    races = Races(collect=True)
    tensors = go(SAME + "st.global.b32 [%d1], tid; st.global.b32 [y + 4], 1;", [races])
    assert len(races.found) == 2 and tensors["x"].tolist() == list(range(64))


SUM = """
setp.ne.u32 %p1, tid, 0; @%p1 exit;
ld.global.b32 %r5, [y]; add.u32 %r5, %r5, 1; st.global.b32 [y], %r5;
"""


def test_two_blocks_that_update_one_place_race() -> None:
    with pytest.raises(RaceError, match=r"block \(1, 0, 0\), warp 0 .*block \(0, 0, 0\), warp 0"):
        go(SUM, blocks=2, lanes=64)
    with pytest.raises(RaceError, match="of y"):
        go(SUM, blocks=2)
    go("setp.ne.u32 %p1, tid, 0; @%p1 exit; atom.global.add.u32 %r5, [y], 1;", blocks=2)


# Each block leaves a value; the last to arrive adds them up, as the kernels that share a tile do.
LAST = """
st.global.b32 [%d1], lane;
{before}
setp.eq.u32 %p1, tid, 0;
mov.b32 %r9, 0;
@%p1 atom.global.gpu.{order}.add.u32 %r9, [y], 1;
@%p1 st.shared.b32 [%r1], %r9;
{after}
ld.shared.b32 %r9, [%r1];
setp.ne.u32 %p2, %r9, 2; @%p2 exit;
mad.wide.u32 %d2, tid, 4, x;
ld.global.b32 %r5, [%d2]; ld.global.b32 %r6, [%d2 + 256]; ld.global.b32 %r7, [%d2 + 512];
add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r7;
st.global.b32 [%d2], %r5;
"""


@pytest.mark.parametrize("lanes", [64, 1024])
def test_the_last_block_may_read_the_others_if_all_released_and_it_acquired(lanes: int) -> None:
    good = {"before": SYNC, "after": SYNC, "order": "acq_rel"}
    found = go(LAST.format(**good), blocks=3, lanes=lanes)["x"]
    assert found[:64].tolist() == [3 * t + 192 for t in range(64)]
    with pytest.raises(RaceError, match="of x"):
        go(LAST.format(**good | {"order": "relaxed"}), blocks=3, lanes=lanes)
    # Warp 1's stores are not part of what warp 0 releases.
    with pytest.raises(RaceError, match="of x"):
        go(LAST.format(**good | {"before": ""}), blocks=3, lanes=lanes)
    with pytest.raises(RaceError, match="shared memory"):
        go(LAST.format(**good | {"after": ""}), [Races()], blocks=3, lanes=lanes)


def test_reading_a_tensor_that_nothing_wrote_is_found_by_byte() -> None:
    body = "{first} ld.global.b32 %r5, [%d1];"
    go(body.format(first="st.global.b32 [%d1], tid;"), unwritten=("x",))
    with pytest.raises(UninitializedError, match=r"byte 0 of x \(256 bytes\) is read before .* thread 0 "):
        go(body.format(first=""), unwritten=("x",))
    half = "cvt.u16.u32 %h1, tid; st.global.b16 [%d1], %h1;"
    with pytest.raises(UninitializedError, match="byte 2 of x"):
        go(body.format(first=half), unwritten=("x",))


def test_what_one_launch_wrote_the_next_may_read() -> None:
    from minipeft_kernels.emulator import Memory, parse, run

    memory, x = Memory(), np.zeros(64, "u4")
    buffer = memory.bind("x", x.view(np.uint8), 4096, initialized=False)
    read = parse(kernel("mad.wide.u32 x, tid, 4, x; ld.global.b32 %r5, [x];", ["x"]))
    write = parse(kernel("mad.wide.u32 x, tid, 4, x; st.global.b32 [x], tid;", ["x"]))
    with pytest.raises(UninitializedError):
        run(read, [4096], memory, (1, 1, 1), 64, observers=[Uninitialized()])
    run(write, [4096], memory, (1, 1, 1), 64, observers=[Uninitialized()])
    run(read, [4096], memory, (1, 1, 1), 64, observers=[Uninitialized()])
    assert buffer.written is not None and buffer.written.all()


def test_shared_memory_starts_unwritten_in_every_block() -> None:
    go("st.shared.b32 [%r2], tid; ld.shared.b32 %r5, [%r2];", blocks=3, lanes=64)
    with pytest.raises(UninitializedError, match=r"byte 4 of shared memory .*block \(1, 0, 0\), thread 1 "):
        go(
            "setp.eq.u32 %p1, block, 0; @%p1 st.shared.b32 [%r2], tid; setp.eq.u32 %p2, tid, 1;"
            "@%p2 ld.shared.b32 %r5, [%r2];",
            blocks=3,
            lanes=64,
        )


COPY = """
mad.lo.u32 %r2, tid, 16, %r1;
cp.async.ca.shared.global [%r2], [y], 16;
cp.async.commit_group;
{wait}
{use}
"""
READ = "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r2];"


@pytest.mark.parametrize(
    ("wait", "use", "verb"),
    [
        ("", READ, "read"),
        ("cp.async.wait_group 1;", READ, "read"),
        ("", "st.shared.b32 [%r2], 7;", "written"),
        ("", "cp.async.ca.shared.global [%r2], [y], 16;", "the target of a second copy"),
    ],
)
def test_touching_what_a_copy_has_not_delivered_is_found(wait: str, use: str, verb: str) -> None:
    go(COPY.format(wait="cp.async.wait_group 0;", use=use))
    with pytest.raises(AsyncCopyError, match=rf"byte 0 of shared memory is {verb} while `cp\.async.* thread 0 "):
        go(COPY.format(wait=wait, use=use), [AsyncCopies()])


def test_a_copy_waited_for_is_the_waiting_threads_alone() -> None:
    # Each thread reads what its neighbour in the other warp copied: the wait is there, the barrier is not.
    use = "{barrier} xor.b32 %r3, tid, 32; mad.lo.u32 %r2, %r3, 16, %r1;" + READ
    go(COPY.format(wait="cp.async.wait_group 0;", use=use.replace("{barrier}", SYNC)))
    with pytest.raises(RaceError, match=r"`cp\.async"):
        go(COPY.format(wait="cp.async.wait_group 0;", use=use.replace("{barrier}", "")), [Races()])


def test_a_copy_into_memory_that_others_still_read_is_a_race() -> None:
    body = "st.shared.b32 [%r2], tid; bar.sync 0; ld.shared.b32 %r5, [%r4]; {barrier}"
    copy = "mad.lo.u32 %r2, tid, 4, %r1; cp.async.ca.shared.global [%r2], [%d1], 4; cp.async.wait_all;"
    go(body.format(barrier=SYNC) + copy)
    with pytest.raises(RaceError, match=r"writes it at `cp\.async.*reads it at `ld\.shared"):
        go(body.format(barrier="") + copy, [Races()])


@pytest.mark.parametrize("check", [Races, Uninitialized, AsyncCopies])
def test_matrix_loads_are_checked_too(check: Callable[[], Observer]) -> None:
    matrix = "mad.lo.u32 %r2, tid, 16, %r1; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r2];"
    fill = "mad.lo.u32 %r9, %r3, 16, %r1; cp.async.ca.shared.global [%r9], [y], 16; "
    waits = {Races: "cp.async.wait_all;", Uninitialized: "", AsyncCopies: ""}
    go(fill + "cp.async.wait_all; bar.sync 0;" + matrix)
    with pytest.raises((RaceError, UninitializedError, AsyncCopyError)):
        go(fill + waits[check] + matrix, [check()])  # type: ignore[index]


def test_a_warps_own_later_read_does_not_hide_anothers() -> None:
    body = """
    setp.lt.u32 %p1, tid, 32;
    @%p1 ld.shared.b32 %r5, [%r1];
    @!%p1 ld.shared.b32 %r6, [%r1];
    {barrier}
    @!%p1 st.shared.b32 [%r1], 7;
    """
    go(body.format(barrier=SYNC), [Races(same_value=False)])
    with pytest.raises(RaceError, match=r"warp 1 writes it .*warp 0 reads it"):
        go(body.format(barrier=""), [Races(same_value=False)])


def test_an_acquire_sees_what_every_block_released_at_the_place() -> None:
    # Blocks 0 and 1 release without acquiring; block 2 acquires once and reads both.
    body = """
    setp.ne.u32 %p1, tid, 0; @%p1 exit;
    setp.eq.u32 %p2, block, 2; @%p2 bra READ;
    st.global.b32 [%d1], 7;
    atom.global.gpu.release.add.u32 %r5, [y], 1;
    exit;
    READ:
    ld.acquire.gpu.global.b32 %r6, [y];
    ld.global.b32 %r7, [x]; ld.global.b32 %r8, [x + 256];
    """
    go(body, [Races()], blocks=3, lanes=64)
    with pytest.raises(RaceError, match="of x"):
        go(body.replace("ld.acquire.gpu", "ld.relaxed.gpu"), [Races()], blocks=3, lanes=64)
