"""mma.sync, ldmatrix, stmatrix and wgmma against plain matrix products and the ISA's layouts, element by element."""

import numpy as np
import pytest
from ptx_harness import assembles, kernel, launch

from minipeft_kernels.emulator import BarrierError
from minipeft_kernels.emulator.float8 import encode

RNG = np.random.default_rng(0)


def bits(matrix: np.ndarray, kind: str) -> np.ndarray:
    """Small whole numbers as a type's bits, one unsigned element each."""
    if kind == "f16":
        return matrix.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return (matrix.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if kind == "tf32":
        return matrix.astype(np.float32).view(np.uint32)
    if kind in ("e4m3", "e5m2"):
        return encode(matrix, kind)
    return matrix.astype(np.int64).astype(np.uint8)


def fragments_a(matrix: np.ndarray, kind: str) -> np.ndarray:
    """(32, registers) of A (16, K): registers alternate between rows g and g + 8, then go on along the columns."""
    e = bits(matrix, kind)
    per = 4 // e.itemsize
    out = np.zeros((32, 16 * matrix.shape[1] // 32 // per, per), e.dtype)
    for lane in range(32):
        for register in range(out.shape[1]):
            for i in range(per):
                row = lane // 4 + (8 if register % 2 else 0)
                column = lane % 4 * per + i + 4 * per * (register // 2)
                out[lane, register, i] = e[row, column]
    return out.reshape(32, -1).view(np.uint32)


def fragments_b(matrix: np.ndarray, kind: str) -> np.ndarray:
    """(32, registers) of B (K, 8)."""
    e = bits(matrix, kind)
    per = 4 // e.itemsize
    out = np.zeros((32, matrix.shape[0] * 8 // 32 // per, per), e.dtype)
    for lane in range(32):
        for register in range(out.shape[1]):
            for i in range(per):
                out[lane, register, i] = e[lane % 4 * per + i + 4 * per * register, lane // 4]
    return out.reshape(32, -1).view(np.uint32)


def sums(values: np.ndarray) -> np.ndarray:
    """(32, 4) of D back to (16, 8)."""
    out = np.zeros((16, 8), values.dtype)
    for lane in range(32):
        for i in range(4):
            out[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] = values[lane, i]
    return out


def names(letter: str, count: int) -> str:
    return "{" + ", ".join(f"{letter}{i}" for i in range(count)) + "}"


SHAPES = [
    *[("m16n8k16", "f32", "f16"), ("m16n8k8", "f32", "f16"), ("m16n8k16", "f32", "bf16"), ("m16n8k8", "f32", "bf16")],
    *[("m16n8k8", "f32", "tf32"), ("m16n8k4", "f32", "tf32"), ("m16n8k16", "f16", "f16"), ("m16n8k8", "f16", "f16")],
    *[("m16n8k32", "s32", "s8"), ("m16n8k16", "s32", "s8"), ("m16n8k32", "s32", "u8"), ("m16n8k32", "f32", "e4m3")],
    ("m16n8k32", "f32", "e5m2"),
]


DTYPES = {"f32": "f4", "f16": "f2", "s32": "i4"}


def mma(shape: str, result: str, kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, clamp: str = "") -> np.ndarray:
    """a b + c of two warps, float64 (2, 16, 8), by the instruction; c is (2, 32, 4), as lanes hold it."""
    words = {"A": np.stack([fragments_a(m, kind) for m in a]), "B": np.stack([fragments_b(m, kind) for m in b])}
    words["C"] = np.ascontiguousarray(c.astype(DTYPES[result])).view(np.uint32).reshape(2, 32, -1)
    words["D"] = np.zeros_like(words["C"])
    code, counts = [], {n: w.shape[2] for n, w in words.items()}
    for name, count in counts.items():
        code.append(f".reg .b32 {name.lower()}<{count}>; mad.wide.u32 {name}, lane, {4 * count}, {name};")
        code += [f"ld.global.b32 {name.lower()}{i}, [{name} + {4 * i}];" for i in range(count) if name != "D"]
    regs = {n: names(n.lower(), count) for n, count in counts.items()}
    name = f"mma.sync.aligned.{shape}.row.col{clamp}.{result}.{kind}.{kind}.{result}"
    code.append(f"{name} {regs['D']}, {regs['A']}, {regs['B']}, {regs['C']};")
    code += [f"st.global.b32 [D + {4 * i}], d{i};" for i in range(counts["D"])]
    text = kernel("\n".join(code), list(words))
    assert assembles(text)
    launch(text, words)
    return np.stack([sums(d.view(DTYPES[result]).astype(np.float64)) for d in words["D"]])


@pytest.mark.parametrize(("shape", "result", "kind"), SHAPES)
def test_mma_is_a_matrix_product(shape: str, result: str, kind: str) -> None:
    depth = int(shape.partition("k")[2])
    low = 0 if kind[0] == "u" else -8
    a, b = RNG.integers(low, 8, (2, 16, depth)), RNG.integers(low, 8, (2, depth, 8))
    c = RNG.integers(-50, 50, (2, 32, 4))
    np.testing.assert_array_equal(mma(shape, result, kind, a, b, c), a @ b + np.stack([sums(m) for m in c]))


@pytest.mark.parametrize("clamp", ["", ".satfinite"])
def test_sums_of_integers_wrap_or_end_at_the_largest(clamp: str) -> None:
    a, b = RNG.integers(-8, 8, (2, 16, 32)), RNG.integers(-8, 8, (2, 32, 8))
    c = RNG.choice([-(2**31), 2**31 - 1], (2, 32, 4))
    exact = a @ b + np.stack([sums(m) for m in c])
    wanted = np.clip(exact, -(2**31), 2**31 - 1) if clamp else exact.astype(np.int32)
    assert (wanted != exact).any()
    np.testing.assert_array_equal(mma("m16n8k32", "s32", "s8", a, b, c, clamp), wanted)


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix_move_rows_to_fragments(matrices: int, transposed: bool) -> None:
    source = RNG.integers(0, 1 << 16, (2, 4, 8, 8), dtype=np.uint16)
    out, back = np.zeros((2, 32, 4), np.uint32), np.zeros_like(source)
    trans, regs = (".trans" if transposed else ""), "{" + ", ".join(f"%r{i}" for i in range(matrices)) + "}"
    body = f"""
    mov.b32 %r10, smem;
    mad.lo.u32 %r11, tid, 16, %r10;
    mad.wide.u32 src, tid, 16, src;
    ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [src];
    st.shared.v4.b32 [%r11], {{%r20, %r21, %r22, %r23}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{matrices}{trans}.shared.b16 {regs}, [%r11];
    bar.sync 0;
    mov.b32 %r30, 0;
    st.shared.v4.b32 [%r11], {{%r30, %r30, %r30, %r30}};
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x{matrices}{trans}.shared.b16 [%r11], {regs};
    bar.sync 0;
    ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r11];
    mad.wide.u32 back, tid, 16, back;
    st.global.v4.b32 [back], {{%r20, %r21, %r22, %r23}};
    mad.wide.u32 out, tid, 16, out;
    """ + "\n".join(f"st.global.b32 [out + {4 * i}], %r{i};" for i in range(matrices))
    text = kernel(body, ["src", "out", "back"])
    assert assembles(text)
    launch(text, {"src": source, "out": out, "back": back}, shared_bytes=1024)
    for warp in range(2):
        for lane in range(32):
            for i in range(matrices):
                m = source[warp, i].T if transposed else source[warp, i]
                low, high = m[lane // 4, lane % 4 * 2], m[lane // 4, lane % 4 * 2 + 1]
                assert out[warp, lane, i] == int(low) | int(high) << 16
    np.testing.assert_array_equal(back[:, :matrices], source[:, :matrices])


def test_an_aligned_instruction_needs_all_lanes_of_its_warp() -> None:
    body = "setp.eq.u32 %p1, tid, 5; @%p1 exit; mov.b32 %r10, smem;"
    body += " ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r10];"
    with pytest.raises(BarrierError, match="all lanes of a warp"):
        launch(kernel(body, ["x"]), {"x": np.zeros(4, np.uint8)}, shared_bytes=1024)


def chunk_of(row: int, chunk: int, width: int) -> int:
    """Where a row's 16-byte chunk lies in its swizzled row, as layouts in shared memory are drawn."""
    return {128: chunk ^ row % 8, 64: chunk ^ row // 2 % 4, 32: chunk ^ row // 4 % 2}[width]


def laid_out(matrix: np.ndarray, width: int) -> np.ndarray:
    """(rows, columns) 16-bit elements in shared memory, columns contiguous, in swizzled rows of `width` bytes; wider
    matrices are several such blocks of columns, one behind the other."""
    rows, columns = matrix.shape
    per_block = width // 2
    memory = np.zeros((columns // per_block, rows, width // 16, 8), np.uint16)
    for block in range(columns // per_block):
        for row in range(rows):
            for chunk in range(width // 16):
                at = block * per_block + 8 * chunk
                memory[block, row, chunk_of(row, chunk, width)] = matrix[row, at : at + 8]
    return memory.ravel()


MODE = {128: 1, 64: 2, 32: 3}


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("registers", [True, False])
def test_wgmma_is_a_matrix_product(width: int, transposed: bool, registers: bool) -> None:
    columns = 64
    a, b = RNG.integers(-8, 8, (64, 16)), RNG.integers(-8, 8, (columns, 16))
    # A by descriptor: depth contiguous, 32 bytes a row.
    a_shared = laid_out(bits(a, "bf16"), 32)
    if transposed:
        b_shared = laid_out(bits(b.T, "bf16"), width)  # rows of depth, columns of B's rows
        leading, stride = 16 * width, 8 * width
    else:
        deep = np.zeros((columns, width // 2), int)
        deep[:, :16] = b
        b_shared = laid_out(bits(deep, "bf16"), width)
        leading, stride = 16, 8 * width
    pad = np.zeros(1024 - a_shared.size % 1024 if a_shared.size % 1024 else 0, np.uint16)
    memory = np.concatenate((a_shared, pad, b_shared))
    b_at = 2 * (a_shared.size + pad.size)
    words = {
        "src": np.resize(memory, -(-memory.size // 1024) * 1024),
        "frag": np.concatenate([fragments_a(a[16 * w : 16 * w + 16], "bf16") for w in range(4)]),
        "out": np.full((128, columns // 2), np.nan, np.float32),
    }
    copies = words["src"].nbytes // 2048
    ds = names("f", columns // 2)
    left = "{%r0, %r1, %r2, %r3}" if registers else "%d5"
    flags = f"1, 1, {int(transposed)}" if registers else f"1, 1, 0, {int(transposed)}"
    load = "\n".join(
        f"ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [src + {2048 * i}];"
        f"st.shared.v4.b32 [%r11 + {2048 * i}], {{%r20, %r21, %r22, %r23}};"
        for i in range(copies)
    )
    body = f"""
    .reg .b32 f<{columns // 2}>;
    mov.b32 %r10, smem;
    mad.lo.u32 %r11, tid, 16, %r10;
    mad.wide.u32 src, tid, 16, src;
    {load}
    bar.sync 0;
    mad.wide.u32 frag, tid, 16, frag;
    ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [frag];
    cvt.u64.u32 %d1, %r10;
    shr.u64 %d1, %d1, 4;
    or.b64 %d5, %d1, {3 << 62 | 256 // 16 << 32 | 1 << 16};
    add.u64 %d2, %d1, {b_at // 16};
    or.b64 %d2, %d2, {MODE[width] << 62 | stride // 16 << 32 | leading // 16 << 16};
    setp.ne.b32 %p1, 0, 0;
    setp.eq.b32 %p2, 0, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {ds}, {left}, %d2, %p1, {flags};
    wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {ds}, {left}, %d2, %p2, {flags};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 out, tid, {2 * columns}, out;
    """ + "\n".join(f"st.global.b32 [out + {4 * i}], f{i};" for i in range(columns // 2))
    text = kernel(body, list(words), threads=128)
    assert assembles(text)
    launch(text, words, threads=128, shared_bytes=words["src"].nbytes)
    found = np.zeros((64, columns))
    for thread in range(128):
        for i in range(columns // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            found[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = words["out"][thread, i]
    # The first product overwrites, the second adds.
    np.testing.assert_array_equal(found, 2 * a @ b.T)
