"""Shuffles, votes, matches and reductions against loops over lanes, for whole warps and for parts of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_harness import evaluate, kernel, launch

VALUES = np.arange(64, dtype="u4") * 7 + 3


def shuffled(mode: str, lane: int, by: int, clamp: int) -> tuple[int, bool]:
    """The source lane and whether it is in range, as the ISA's pseudocode has it."""
    by, limit, segment = by & 31, clamp & 31, clamp >> 8 & 31
    last = lane & segment | limit & ~segment & 31
    first = lane & segment
    if mode == "up":
        j, inside = lane - by, lane - by >= last
    elif mode == "down":
        j, inside = lane + by, lane + by <= last
    elif mode == "bfly":
        j, inside = lane ^ by, (lane ^ by) <= last
    else:
        j = first | by & ~segment
        inside = j <= last
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@settings(max_examples=25, deadline=None)
@given(by=st.integers(0, 40), width=st.sampled_from([32, 16, 8, 4, 2]))
def test_shuffles(mode: str, by: int, width: int) -> None:
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = f"shfl.sync.{mode}.b32 y|%p1, a, {by}, {clamp}, -1; selp.u32 z, 1, 0, %p1;"
    found = evaluate(body, {"a": VALUES}, {"y": "u4", "z": "u4"})
    for thread in range(64):
        lane, inside = shuffled(mode, thread % 32, by, clamp)
        assert found["y"][thread] == VALUES[thread // 32 * 32 + lane]
        assert found["z"][thread] == inside


def test_a_shuffle_by_a_lane_of_its_own() -> None:
    a = np.random.default_rng(0).permutation(32).astype("u4")
    found = evaluate("mov.u32 %r1, %laneid; shfl.sync.idx.b32 y, %r1, a, 31, -1;", {"a": a}, {"y": "u4"})["y"]
    np.testing.assert_array_equal(found, a)


@settings(max_examples=20, deadline=None)
@given(flags=st.lists(st.booleans(), min_size=64, max_size=64))
def test_votes_count_the_lanes_of_the_warp(flags: list[bool]) -> None:
    body = """
    setp.ne.u32 %p1, a, 0;
    vote.sync.ballot.b32 y, %p1, -1;
    vote.sync.any.pred %p2, %p1, -1; selp.u32 z, 1, 0, %p2;
    vote.sync.all.pred %p3, %p1, -1; selp.u32 w, 1, 0, %p3;
    vote.sync.uni.pred %p4, !%p1, -1; selp.u32 v, 1, 0, %p4;
    """
    found = evaluate(body, {"a": np.array(flags, "u4")}, dict.fromkeys("yzwv", "u4"))
    for warp in range(2):
        mine = flags[32 * warp : 32 * warp + 32]
        ballot = sum(f << i for i, f in enumerate(mine))
        expected = {"y": ballot, "z": any(mine), "w": all(mine), "v": len(set(mine)) == 1}
        for name, value in expected.items():
            assert (found[name][32 * warp : 32 * warp + 32] == value).all()


REDUCTIONS = {"add": sum, "min": min, "max": max}


@pytest.mark.parametrize("kind", ["s32", "u32"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_redux_reduces_each_mask_apart(name: str, kind: str) -> None:
    a = np.random.default_rng(1).integers(-100, 100, 64).astype("i4")
    body = f"""
    mov.u32 %r1, %laneid;
    setp.lt.u32 %p1, %r1, 12;
    selp.b32 %r2, 0xfff, 0xfffff000, %p1;
    redux.sync.{name}.{kind} y, a, %r2;
    """
    found = evaluate(body, {"a": a}, {"y": "i4" if kind == "s32" else "u4"})["y"]
    typed = a if kind == "s32" else a.view("u4")
    for warp in range(2):
        for low, high in ((0, 12), (12, 32)):
            part = slice(32 * warp + low, 32 * warp + high)
            expected = REDUCTIONS[name](typed[part].tolist())
            assert (found[part] == np.array(expected).astype(typed.dtype)).all()


def test_redux_of_bits() -> None:
    a = np.random.default_rng(2).integers(0, 2**32, 32, dtype="u4")
    body = "redux.sync.and.b32 y, a, -1; redux.sync.or.b32 z, a, -1; redux.sync.xor.b32 w, a, -1;"
    found = evaluate(body, {"a": a}, dict.fromkeys("yzw", "u4"))
    for name, ufunc in (("y", np.bitwise_and), ("z", np.bitwise_or), ("w", np.bitwise_xor)):
        assert (found[name] == ufunc.reduce(a)).all()


def test_match_finds_equal_values() -> None:
    a = np.array([3, 5, 3, 5, 9] * 6 + [1, 1] + [4] * 32, "u4")
    body = "match.any.sync.b32 y, a, -1; match.all.sync.b32 z|%p1, a, -1; selp.u32 w, 1, 0, %p1;"
    found = evaluate(body, {"a": a}, dict.fromkeys("yzw", "u4"))
    for thread in range(64):
        warp = a[thread // 32 * 32 :][:32]
        assert found["y"][thread] == sum(int(v == a[thread]) << i for i, v in enumerate(warp))
    assert found["z"].tolist() == [0] * 32 + [0xFFFFFFFF] * 32
    assert found["w"].tolist() == [0] * 32 + [1] * 32


def test_elect_chooses_the_lowest_lane_of_the_mask() -> None:
    body = "elect.sync y|%p1, 0xffffff00; selp.u32 z, 1, 0, %p1;"
    text = kernel(
        f"setp.lt.u32 %p9, tid, 8; @%p9 bra E; .reg .b32 y, z; {body} mad.wide.u32 out, tid, 4, out;"
        "st.global.b32 [out], z; E:",
        ["out"],
        threads=32,
    )
    out = np.full(32, 9, "u4")
    launch(text, {"out": out}, threads=32)
    assert out.tolist() == [9] * 8 + [1] + [0] * 23


def test_activemask_is_the_lanes_that_run_together() -> None:
    body = """
    and.b32 %r1, tid, 3;
    setp.eq.u32 %p1, %r1, 0;
    mad.wide.u32 out, tid, 4, out;
    @%p1 bra THEN;
    activemask.b32 %r2;
    bra JOIN;
    THEN:
    activemask.b32 %r2;
    JOIN:
    st.global.b32 [out], %r2;
    activemask.b32 %r3;
    st.global.b32 [out + 256], %r3;
    """
    out = np.zeros(128, "u4")
    launch(kernel(body, ["out"]), {"out": out})
    assert out[:64].tolist() == [0x11111111 if t % 4 == 0 else 0xEEEEEEEE for t in range(64)]
    # They meet again where the two ways join.
    assert (out[64:] == 0xFFFFFFFF).all()


def test_lanes_of_a_mask_meet_from_different_ways() -> None:
    # Even lanes take a detour; the shuffle must wait for them.
    body = """
    and.b32 %r1, tid, 1;
    setp.eq.u32 %p1, %r1, 1;
    mov.b32 %r2, 100;
    @%p1 bra MEET;
    add.u32 %r2, %r2, tid;
    LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 5; @%p2 bra LOOP;
    MEET:
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
    mad.wide.u32 out, tid, 4, out;
    st.global.b32 [out], %r3;
    """
    for seed in (None, 0, 1):
        out = np.zeros(64, "u4")
        launch(kernel(body, ["out"]), {"out": out}, seed=seed)
        assert out.tolist() == [100 if t % 2 == 0 else 100 + t - 1 for t in range(64)]
