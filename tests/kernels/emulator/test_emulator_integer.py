"""Integer instructions against Python's own integers, a value at a time."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_harness import evaluate

from minipeft_kernels.emulator import UnsupportedInstruction

EDGES = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 127, 128, 255, 0x7FFF, 0x8000, 0xFFFF]
EDGES += [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 2]


def width(kind: str) -> int:
    return int(kind[1:])


def wrapped(value: int, kind: str) -> int:
    """An int as a type keeps it."""
    bits = value & ((1 << width(kind)) - 1)
    return bits - (1 << width(kind)) if kind[0] == "s" and bits >> (width(kind) - 1) else bits


def values(kind: str) -> st.SearchStrategy[int]:
    edges = st.sampled_from(EDGES).map(lambda v: wrapped(v, kind))
    low, high = (-(1 << width(kind) - 1), (1 << width(kind) - 1) - 1) if kind[0] == "s" else (0, (1 << width(kind)) - 1)
    return edges | st.integers(low, high)


def truncated(a: int, b: int) -> int:
    """Quotient towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a: int, position: int, length: int, kind: str) -> int:
    """bfe as the ISA writes it, bit by bit."""
    n, position, length = width(kind), position & 255, length & 255
    top = a >> min(position + length - 1, n - 1) & 1 if kind[0] == "s" and length else 0
    bits = [(a >> position + i & 1) if i < length and position + i < n else top for i in range(n)]
    return sum(bit << i for i, bit in enumerate(bits))


def inserted(a: int, b: int, position: int, length: int) -> int:
    """bfi.b32 likewise."""
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < 32:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def permuted(a: int, b: int, selector: int) -> int:
    """prmt.b32 likewise."""
    source = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return result


def shifted(a: int, by: int, kind: str, left: bool) -> int:
    by = min(by, width(kind))
    return a << by if left else a >> by


Case = tuple[str, str, tuple[str, ...], Callable[..., int]]
CASES: list[Case] = []
for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
    twice = kind[0] + str(2 * width(kind))
    two, three, bits = (kind, kind), (kind, kind, kind), width(kind)
    CASES += [
        (f"add.{kind}", kind, two, lambda a, b: a + b),
        (f"sub.{kind}", kind, two, lambda a, b: a - b),
        (f"mul.lo.{kind}", kind, two, lambda a, b: a * b),
        (f"mul.hi.{kind}", kind, two, lambda a, b, n=bits: a * b >> n),
        (f"mad.lo.{kind}", kind, three, lambda a, b, c: a * b + c),
        (f"mad.hi.{kind}", kind, three, lambda a, b, c, n=bits: (a * b >> n) + c),
        (f"min.{kind}", kind, two, min),
        (f"max.{kind}", kind, two, max),
        (f"div.{kind}", kind, two, lambda a, b: truncated(a, b) if b else -1),
        (f"rem.{kind}", kind, two, lambda a, b: a - truncated(a, b) * b if b else a),
        (f"shr.{kind}", kind, (kind, "u32"), lambda a, b, k=kind: shifted(a, b, k, False)),
        (f"shl.b{kind[1:]}", kind, (kind, "u32"), lambda a, b, k=kind: shifted(a, b, k, True)),
    ]
    if width(kind) < 64:
        CASES += [
            (f"mul.wide.{kind}", twice, two, lambda a, b: a * b),
            (f"mad.wide.{kind}", twice, (kind, kind, twice), lambda a, b, c: a * b + c),
        ]
    if width(kind) > 16:
        CASES += [(f"bfe.{kind}", kind, (kind, "u32", "u32"), lambda a, p, n, k=kind: field(a, p, n, k))]
    if kind[0] == "s":
        CASES += [(f"neg.{kind}", kind, (kind,), lambda a: -a), (f"abs.{kind}", kind, (kind,), abs)]
for kind in ("b32", "b64"):
    bits = width(kind)
    CASES += [
        (f"and.{kind}", kind, (kind, kind), lambda a, b: a & b),
        (f"or.{kind}", kind, (kind, kind), lambda a, b: a | b),
        (f"xor.{kind}", kind, (kind, kind), lambda a, b: a ^ b),
        (f"not.{kind}", kind, (kind,), lambda a: ~a),
        (f"cnot.{kind}", kind, (kind,), lambda a: int(a == 0)),
        (f"popc.{kind}", "u32", (kind,), lambda a: a.bit_count()),
        (f"clz.{kind}", "u32", (kind,), lambda a, n=bits: n - a.bit_length()),
        (f"brev.{kind}", kind, (kind,), lambda a, n=bits: int(f"{a:0{n}b}"[::-1], 2)),
        (f"bfind.u{kind[1:]}", "u32", (kind,), lambda a: a.bit_length() - 1),
    ]
CASES += [
    ("bfi.b32", "b32", ("b32", "b32", "u32", "u32"), inserted),
    ("prmt.b32", "b32", ("b32", "b32", "b32"), permuted),
    ("shf.l.wrap.b32", "b32", ("b32", "b32", "u32"), lambda a, b, n: (b << 32 | a) << (n & 31) >> 32),
    ("shf.r.wrap.b32", "b32", ("b32", "b32", "u32"), lambda a, b, n: (b << 32 | a) >> (n & 31)),
    ("shf.l.clamp.b32", "b32", ("b32", "b32", "u32"), lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32),
    ("shf.r.clamp.b32", "b32", ("b32", "b32", "u32"), lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    ("add.sat.s32", "s32", ("s32", "s32"), lambda a, b: max(-(2**31), min(2**31 - 1, a + b))),
    ("sub.sat.s32", "s32", ("s32", "s32"), lambda a, b: max(-(2**31), min(2**31 - 1, a - b))),
    ("mul24.lo.u32", "u32", ("u32", "u32"), lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    ("sad.s32", "u32", ("s32", "s32", "u32"), lambda a, b, c: c + abs(a - b)),
    ("bfind.s32", "u32", ("s32",), lambda a: (a if a >= 0 else ~a).bit_length() - 1),
]


@pytest.mark.parametrize(("name", "result", "kinds", "oracle"), CASES, ids=[c[0] for c in CASES])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_an_instruction_equals_integer_arithmetic(
    name: str, result: str, kinds: tuple[str, ...], oracle: Callable[..., int], data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.tuples(*(values(k) for k in kinds)), min_size=1, max_size=32))
    if "sad" in name:
        rows = [(*r[:2], wrapped(r[2], "s32")) for r in rows]
    dtype = {k: f"{'i' if k[0] == 's' else 'u'}{width(k) // 8}" for k in (*kinds, result)}
    names = "abcd"[: len(kinds)]
    columns = zip(*rows, strict=True)
    inputs = {n: np.array([wrapped(v, k) for v in c], dtype[k]) for n, k, c in zip(names, kinds, columns, strict=True)}
    found = evaluate(f"{name} y, {', '.join(names)};", inputs, {"y": dtype[result]})["y"]
    expected = [wrapped(oracle(*(wrapped(v, k) for v, k in zip(r, kinds, strict=True))), result) for r in rows]
    assert found.tolist() == expected


@pytest.mark.parametrize("table", [0xEA, 0x96, 0xE8, 0x1D, 0x00, 0xFF, 0x40])
def test_lop3_is_its_table(table: int) -> None:
    a, b, c = (np.array([m], "u4") for m in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    found = evaluate(f"lop3.b32 y, a, b, c, {table:#x};", {"a": a, "b": b, "c": c}, {"y": "u4"})["y"][0]
    assert found == table * 0x01010101


@pytest.mark.parametrize("selector", [0x3210, 0x7654, 0x6420, 0x7531, 0x4051, 0x6273, 0x8888, 0xB0F4])
def test_a_permute_by_a_constant_is_that_by_a_register(selector: int) -> None:
    rng = np.random.default_rng(selector)
    a, b = rng.integers(0, 2**32, (2, 32), dtype=np.uint32)
    body = f"mov.u32 %r1, {selector:#x}; prmt.b32 y, a, b, {selector:#x}; prmt.b32 z, a, b, %r1;"
    found = evaluate(body, {"a": a, "b": b}, {"y": "u4", "z": "u4"})
    expected = [permuted(int(x), int(y), selector) for x, y in zip(a, b, strict=True)]
    assert found["y"].tolist() == found["z"].tolist() == expected


COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("kind", ["u32", "s32", "u16", "s64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_order_by_the_type(name: str, kind: str) -> None:
    numbers = sorted({wrapped(v, kind) for v in EDGES})
    pairs = [(a, b) for a in numbers for b in numbers]
    dtype = f"{'i' if kind[0] == 's' else 'u'}{width(kind) // 8}"
    a, b = (np.array(c, dtype) for c in zip(*pairs, strict=True))
    body = f"setp.{name}.{kind} %p1, a, b; selp.u32 y, 1, 0, %p1;"
    found = evaluate(body, {"a": a, "b": b}, {"y": "u4"})["y"]
    assert found.tolist() == [int(eval(f"{x} {COMPARISONS[name]} {y}")) for x, y in pairs]


def test_two_predicates_come_from_one_comparison() -> None:
    a = np.array([1, 5, 9], "i4")
    body = "setp.lt.s32 %p1, a, 9; setp.gt.and.s32 %p2|%p3, a, 4, %p1; selp.u32 y, 1, 0, %p2; selp.u32 z, 1, 0, %p3;"
    found = evaluate(body, {"a": a}, {"y": "u4", "z": "u4"})
    assert found["y"].tolist() == [0, 1, 0] and found["z"].tolist() == [1, 0, 0]


PROGRAM_OPS: dict[str, tuple[int, Callable[..., int]]] = {
    **{"add.u32": (2, lambda a, b: a + b), "sub.u32": (2, lambda a, b: a - b), "mul.lo.u32": (2, lambda a, b: a * b)},
    **{"xor.b32": (2, lambda a, b: a ^ b), "and.b32": (2, lambda a, b: a & b), "or.b32": (2, lambda a, b: a | b)},
    **{"shl.b32": (2, lambda a, b: a << min(b, 32)), "shr.u32": (2, lambda a, b: a >> min(b, 32))},
    **{
        "mad.lo.u32": (3, lambda a, b, c: a * b + c),
        "prmt.b32": (3, permuted),
        "bfe.u32": (3, lambda a, b, c: field(a, b, c, "u32")),
    },
    **{"not.b32": (1, lambda a: ~a), "popc.b32": (1, int.bit_count), "min.u32": (2, min), "max.u32": (2, max)},
    "shf.l.wrap.b32": (3, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_straight_line_programs_equal_the_same_in_python(data: st.DataObject) -> None:
    inputs = data.draw(st.lists(st.tuples(values("u32"), values("u32")), min_size=1, max_size=8))
    lanes = [list(row) + [0] * 4 for row in inputs]
    code = ["mov.b32 %r0, a; mov.b32 %r1, b;"] + [f"mov.b32 %r{i}, 0;" for i in range(2, 6)]
    for _ in range(data.draw(st.integers(1, 12))):
        name = data.draw(st.sampled_from(sorted(PROGRAM_OPS)))
        arity, oracle = PROGRAM_OPS[name]
        target, *sources = (data.draw(st.integers(0, 5)) for _ in range(arity + 1))
        guard = data.draw(st.none() | st.tuples(st.integers(0, 5), st.booleans()))
        prefix = ""
        if guard is not None:
            code.append(f"setp.gt.u32 %p1, %r{guard[0]}, 1000;")
            prefix = "@!%p1 " if guard[1] else "@%p1 "
        for lane in lanes:
            if guard is None or (lane[guard[0]] > 1000) != guard[1]:
                lane[target] = wrapped(oracle(*(lane[s] for s in sources)), "u32")
        code.append(f"{prefix}{name} %r{target}, {', '.join(f'%r{s}' for s in sources)};")
    outputs = {f"y{i}": "u4" for i in range(6)}
    code += [f"mov.b32 y{i}, %r{i};" for i in range(6)]
    columns = {n: np.array(c, "u4") for n, c in zip("ab", zip(*inputs, strict=True), strict=True)}
    found = evaluate("\n".join(code), columns, outputs)
    assert [[int(found[f"y{i}"][j]) for i in range(6)] for j in range(len(lanes))] == lanes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("frobnicate.u32 y, a, a;", "frobnicate"),
        ("add.fancy.u32 y, a, a;", "fancy"),
        ("prmt.b32.f4e y, a, a, a;", "f4e"),
    ],
)
def test_what_is_lacking_is_named_before_anything_runs(text: str, why: str) -> None:
    with pytest.raises(UnsupportedInstruction, match=why):
        evaluate(text, {"a": np.zeros(1, "u4")}, {"y": "u4"})
