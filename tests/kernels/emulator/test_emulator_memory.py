"""Global, shared and local memory: vectors, atomics, copies that arrive late, and accesses that are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_harness import assembles, kernel, launch

from minipeft_kernels.emulator import AccessError, Memory


def go(body: str, tensors: dict[str, np.ndarray], **options: int) -> None:
    text = kernel(body, list(tensors))
    assert assembles(text)
    launch(text, tensors, **options)


@pytest.mark.parametrize(
    ("vector", "kind"),
    [
        ("", "b8"),
        ("", "b64"),
        (".v2", "b8"),
        (".v4", "b8"),
        (".v2", "b16"),
        (".v4", "b16"),
        (".v2", "b32"),
        (".v4", "b32"),
        (".v2", "b64"),
    ],
)
def test_vectors_keep_their_order(vector: str, kind: str) -> None:
    size = int(kind[1:]) // 8
    count = int(vector[2:] or 1)
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[size]
    regs = [f"%{letter}{i + 10}" for i in range(count)]
    group = "{" + ", ".join(regs) + "}" if count > 1 else regs[0]
    swapped = "{" + ", ".join(reversed(regs)) + "}" if count > 1 else regs[0]
    step = size * count
    x = np.random.default_rng(0).integers(0, 256, (64, count, size), dtype=np.uint8)
    y = np.zeros_like(x)
    body = f"""
    mad.wide.u32 x, tid, {step}, x; mad.wide.u32 y, tid, {step}, y;
    mov.b32 %r1, smem; mad.lo.u32 %r1, tid, {step}, %r1;
    ld.global{vector}.{kind} {group}, [x];
    st.shared{vector}.{kind} [%r1], {group};
    ld.shared{vector}.{kind} {group}, [%r1];
    st.global{vector}.{kind} [y], {swapped};
    """
    go(body, {"x": x, "y": y}, shared_bytes=1024)
    np.testing.assert_array_equal(y, x[:, ::-1])


def test_a_signed_byte_is_extended() -> None:
    x, y = np.arange(-32, 32, dtype="i1"), np.zeros((64, 2), "i4")
    body = "cvt.u64.u32 %d1, tid; add.u64 x, x, %d1; mad.wide.u32 y, tid, 8, y; ld.global.s8 %r1, [x];"
    go(body + "ld.global.u8 %r2, [x]; st.global.v2.b32 [y], {%r1, %r2};", {"x": x, "y": y})
    np.testing.assert_array_equal(y, np.stack((x.astype("i4"), x.view("u1").astype("i4")), 1))


def test_local_memory_belongs_to_the_thread() -> None:
    y = np.zeros(64, "u4")
    body = """
    .local .align 4 .b8 stack[16];
    mov.u64 %d1, stack;
    st.local.b32 [%d1 + 4], tid;
    ld.local.b32 %r1, [%d1 + 4];
    mad.wide.u32 y, tid, 4, y;
    st.global.b32 [y], %r1;
    """
    launch(kernel(body, ["y"]), {"y": y})
    assert y.tolist() == list(range(64))


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("st.global.b32 [y + 256], tid;", r"4 bytes are accessed out of bounds, at byte 256 of y, which has 256 bytes"),
        ("st.global.b32 [y + -4], tid;", r"out of bounds, at 4 bytes before y"),
        ("st.global.b32 [y + 1], tid;", r"no multiple of 4: byte 1 of y"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [y + 4];", r"no multiple of 16"),
        (
            "mov.b32 %r1, smem; st.shared.b32 [%r1 + 1024], tid;",
            r"is accessed at byte 1024, out of its 1024",
        ),
        ("mov.b32 %r1, 0; st.shared.b32 [%r1], tid;", r"shared memory is accessed at byte -1024"),
        ("mov.b32 %r1, smem; st.shared.b64 [%r1 + 4], %d1;", r"shared memory is accessed at byte 4, no multiple of 8"),
        ("atom.global.add.u32 %r1, [y + 256], 1;", r"out of bounds, at byte 256 of y"),
    ],
)
def test_a_refused_access_names_tensor_thread_and_line(store: str, message: str) -> None:
    body = f"setp.ne.u32 %p1, tid, 37; @%p1 bra END; .loc 1 12 3\n {store}\n END:"
    text = kernel(body, ["y"]) + '\n.file 1 "somewhere/kernel.py"\n'
    with pytest.raises(AccessError, match=message) as error:
        launch(text, {"y": np.zeros(64, "u4")}, blocks=1, shared_bytes=1024)
    assert "block (0, 0, 0), thread 37 (warp 1, lane 5)" in str(error.value)
    assert "kernel.py:12" in str(error.value)


def test_tensors_that_overlap_are_refused() -> None:
    memory = Memory()
    memory.bind("a", np.zeros(64, "u1"), 4096)
    with pytest.raises(ValueError, match="overlaps a"):
        memory.bind("b", np.zeros(64, "u1"), 4100)
    with pytest.raises(TypeError, match="uint8"):
        memory.bind("c", np.zeros(64, "f4"), 8192)  # type: ignore[arg-type]


def test_a_tensor_may_start_anywhere() -> None:
    memory = Memory()
    data = np.arange(15, dtype="u1")
    memory.bind("odd", data, 4097)
    word = memory.load(np.array([4100, 4104]), 4)
    assert word.view("u1").tolist() == data[3:11].tolist()
    memory.store(np.array([4100]), np.array([0], "u4"))
    assert data[3:7].tolist() == [0] * 4


ATOMICS = {
    **{"add.u32": lambda o, b: (o + b) % 2**32, "exch.b32": lambda o, b: b, "and.b32": lambda o, b: o & b},
    **{"or.b32": lambda o, b: o | b, "xor.b32": lambda o, b: o ^ b, "min.u32": min, "max.u32": max},
    **{"inc.u32": lambda o, b: 0 if o >= b else o + 1, "dec.u32": lambda o, b: b if o == 0 or o > b else o - 1},
}


@pytest.mark.parametrize("name", ATOMICS)
@pytest.mark.parametrize("space", ["global", "shared"])
@settings(max_examples=6, deadline=None)
@given(places=st.lists(st.integers(0, 7), min_size=64, max_size=64), seed=st.integers(0, 1000))
def test_atomics_take_turns(name: str, space: str, places: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**32 if name[0] in "aeox" else 20, 64, dtype=np.uint32)
    x, old = rng.integers(0, 20, 8, dtype=np.uint32), np.zeros(64, "u4")
    expected, before = x.tolist(), []
    for place, value in zip(places, values.tolist(), strict=True):
        before.append(expected[place])
        expected[place] = ATOMICS[name](expected[place], value)
    body = """
    mad.wide.u32 place, tid, 4, place; mad.wide.u32 value, tid, 4, value; mad.wide.u32 old, tid, 4, old;
    ld.global.b32 %r1, [place]; ld.global.b32 %r2, [value];
    """
    if space == "global":
        body += f"mad.wide.u32 %d1, %r1, 4, x; atom.global.gpu.relaxed.{name} %r3, [%d1], %r2;"
    else:
        body += f"""
        mov.b32 %r5, smem; mad.lo.u32 %r6, tid, 4, %r5; mad.wide.u32 %d1, tid, 4, x;
        setp.lt.u32 %p1, tid, 8;
        @%p1 ld.global.b32 %r7, [%d1];
        @%p1 st.shared.b32 [%r6], %r7;
        bar.sync 0;
        mad.lo.u32 %r8, %r1, 4, %r5; atom.shared.{name} %r3, [%r8], %r2;
        bar.sync 0;
        @%p1 ld.shared.b32 %r7, [%r6];
        @%p1 st.global.b32 [%d1], %r7;
        """
    body += "st.global.b32 [old], %r3;"
    tensors = {"place": np.array(places, "u4"), "value": values, "x": x, "old": old}
    launch(kernel(body, list(tensors)), tensors, shared_bytes=64)
    assert x.tolist() == expected and old.tolist() == before


def test_compare_and_swap_lets_one_win() -> None:
    x, old = np.array([5], "u4"), np.zeros(64, "u4")
    body = "mad.wide.u32 old, tid, 4, old; add.u32 %r1, tid, 100; atom.global.cas.b32 %r2, [x], 5, %r1;"
    go(body + "st.global.b32 [old], %r2;", {"x": x, "old": old})
    assert x[0] == 100 and old.tolist() == [5] + [100] * 63


@pytest.mark.parametrize(("kind", "one"), [("f32", 0x3F800000), ("f16x2", 0x3C003C00), ("bf16x2", 0x3F803F80)])
def test_floats_are_added_atomically(kind: str, one: int) -> None:
    x = np.zeros(1, "u4")
    noftz = "" if kind == "f32" else ".noftz"
    go(f"mov.b32 %r1, {one:#x}; red.global.add{noftz}.{kind} [x], %r1;", {"x": x})
    expected = {"f32": 0x42800000, "f16x2": 0x54005400, "bf16x2": 0x42804280}[kind]
    assert x[0] == expected


COPY = """
mov.b32 %r1, smem; mad.lo.u32 %r2, tid, 16, %r1;
mad.wide.u32 x, tid, 16, x; mad.wide.u32 y, tid, 16, y;
mov.b32 %r3, 7;
st.shared.v4.b32 [%r2], {%r3, %r3, %r3, %r3};
{copy}
cp.async.commit_group;
{wait}
ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];
st.global.v4.b32 [y], {%r4, %r5, %r6, %r7};
"""


def copied(copy: str, wait: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.arange(256, dtype="u4").reshape(64, 4), np.zeros((64, 4), "u4")
    go(COPY.replace("{copy}", copy).replace("{wait}", wait), {"x": x, "y": y}, shared_bytes=1024)
    return x, y


def test_a_copy_arrives_at_the_wait_and_not_before() -> None:
    copy = "cp.async.cg.shared.global [%r2], [x], 16;"
    x, y = copied(copy, "cp.async.wait_group 0;")
    np.testing.assert_array_equal(y, x)
    x, y = copied(copy, "")
    assert (y == 7).all()
    x, y = copied(copy, "cp.async.wait_group 1;")
    assert (y == 7).all()
    x, y = copied(copy, "cp.async.commit_group; cp.async.wait_group 1;")
    np.testing.assert_array_equal(y, x)
    x, y = copied(copy, "cp.async.wait_all;")
    np.testing.assert_array_equal(y, x)


def test_a_copy_fills_with_zeros_what_it_does_not_read() -> None:
    sizes = "and.b32 %r8, tid, 3; mul.lo.u32 %r8, %r8, 4; cp.async.cg.shared.global [%r2], [x], 16, %r8;"
    x, y = copied(sizes, "cp.async.wait_group 0;")
    for thread in range(64):
        words = thread % 4
        assert y[thread].tolist() == [*x[thread, :words].tolist(), *[0] * (4 - words)]


def test_a_copy_of_nothing_may_point_nowhere() -> None:
    copy = "setp.lt.u32 %p1, tid, 9; selp.b32 %r8, 16, 0, %p1; selp.b64 %d1, x, 0, %p1;"
    x, y = copied(copy + "cp.async.cg.shared.global [%r2], [%d1], 16, %r8;", "cp.async.wait_group 0;")
    np.testing.assert_array_equal(y[:9], x[:9])
    assert not y[9:].any()


def test_lanes_wait_for_their_own_groups() -> None:
    # Odd lanes close one more group, so their copy is older than the newest one.
    copy = "and.b32 %r8, tid, 1; setp.eq.u32 %p1, %r8, 1; cp.async.cg.shared.global [%r2], [x], 16;"
    x, y = copied(copy, "@!%p1 bra W; cp.async.commit_group; W: cp.async.wait_group 1;")
    np.testing.assert_array_equal(y[1::2], x[1::2])
    assert (y[::2] == 7).all()


def test_a_wait_delivers_to_the_lanes_that_wait_alone() -> None:
    copy = "and.b32 %r8, tid, 1; setp.eq.u32 %p1, %r8, 1; cp.async.cg.shared.global [%r2], [x], 16;"
    x, y = copied(copy, "@!%p1 bra W; cp.async.wait_group 0; W:")
    np.testing.assert_array_equal(y[1::2], x[1::2])
    assert (y[::2] == 7).all()
