"""What is counted, on programs whose counts can be worked out by hand."""

import numpy as np
import pytest

from minipeft_kernels.emulator import Memory, parse, run
from minipeft_kernels.emulator.classes import CLASSES, class_of, tensor_flops
from minipeft_kernels.emulator.counts import Counter, Counts
from minipeft_kernels.lab.bounds import bounds, gpus_of
from minipeft_kernels.lab.roofline import GPU

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
X, OUT = 1 << 40, 2 << 40


def count(
    ptx: str, x: np.ndarray, out: np.ndarray, grid: int = 1, threads: int = 32, blocks: list[int] | None = None
) -> Counts:
    """Run a program on two arrays, and count."""
    memory = Memory()
    memory.bind("x", x.view(np.uint8).reshape(-1), X)
    memory.bind("out", out.view(np.uint8).reshape(-1), OUT)
    counter = Counter()
    arguments = [address.to_bytes(8, "little") for address in (X, OUT)]
    run(parse(HEAD + ptx), arguments, memory, (grid, 1, 1), threads, 0, [counter], blocks=blocks)
    return counter.counts


def copy_kernel(stride: int) -> str:
    """out[i] = x[i * stride] for 4-byte words."""
    return f"""
.visible .entry copy(.param .u64 px, .param .u64 pout) {{
    .reg .b64 %rd<6>; .reg .b32 %r<6>;
    ld.param.u64 %rd1, [px];
    ld.param.u64 %rd2, [pout];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r1, %r2, %r3, %r1;
    mul.lo.s32 %r4, %r1, {stride};
    mad.wide.u32 %rd3, %r4, 4, %rd1;
    ld.global.b32 %r5, [%rd3];
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    st.global.b32 [%rd4], %r5;
    ret;
}}"""


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (32, 32)])
def test_a_strided_copy(stride: int, sectors: int) -> None:
    """4 blocks of 2 warps: 8 accesses each way. A warp reads 128 bytes, out of 4 sectors, twice as many, or 32."""
    x, out = np.arange(256 * stride, dtype=np.uint32), np.zeros(256, np.uint32)
    counts = count(copy_kernel(stride), x, out, grid=4, threads=64)
    assert (out == np.arange(256) * stride).all()
    load, store = counts.global_load, counts.global_store
    assert (load.requests, load.transactions, load.least, load.bytes) == (8, 8 * sectors, 32, 1024)
    assert (store.requests, store.transactions, store.least, store.bytes) == (8, 32, 32, 1024)
    assert load.efficiency == 4 / sectors and store.efficiency == 1
    assert counts.tensors["x"].unique_read == 1024 and counts.tensors["x"].sector_bytes_read == 8 * 32 * sectors
    assert counts.tensors["out"].unique_written == 1024 and counts.tensors["out"].unique_read == 0
    assert counts.unique_bytes == 2048


def test_instructions_by_class() -> None:
    """8 warps execute the 12 instructions of the copy: 5 moves, 4 products, a load, a store, a return."""
    counts = count(copy_kernel(1), np.zeros(256, np.uint32), np.zeros(256, np.uint32), grid=4, threads=64)
    assert counts.instructions == {"move": 40, "multiply-add": 32, "global": 16, "control": 8}
    assert counts.issued == 56 and counts.lanes == 12 * 256
    assert counts.mnemonics["mad.wide.u32"] == 16
    assert (counts.blocks, counts.executed, counts.warps) == (4, 4, 2)


def test_a_part_of_the_blocks_is_scaled_up() -> None:
    x, out = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    whole = count(copy_kernel(1), x, out, grid=4, threads=64)
    part = count(copy_kernel(1), x, out, grid=4, threads=64, blocks=[1])
    assert part.executed == 1 and part.blocks == 4
    assert part.instructions == whole.instructions and part.lanes == whole.lanes
    assert part.global_load == whole.global_load and part.tensors == whole.tensors


def transpose_kernel(pitch: int) -> str:
    """A 32 x 32 tile of words through shared memory whose rows are `pitch` words apart: one warp."""
    rows = range(32)
    load = "\n".join(f"ld.global.b32 %r3, [%rd3+{r * 128}]; st.shared.b32 [%r4+{r * pitch * 4}], %r3;" for r in rows)
    store = "\n".join(f"ld.shared.b32 %r3, [%r5+{r * 4}]; st.global.b32 [%rd4+{r * 128}], %r3;" for r in rows)
    return f"""
.visible .entry transpose(.param .u64 px, .param .u64 pout) {{
    .reg .b64 %rd<5>; .reg .b32 %r<7>;
    .shared .align 16 .b8 tile[{32 * pitch * 4}];
    ld.param.u64 %rd1, [px];
    ld.param.u64 %rd2, [pout];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    mov.u32 %r2, tile;
    mad.lo.s32 %r4, %r1, 4, %r2;
    mad.lo.s32 %r5, %r1, {pitch * 4}, %r2;
    {load}
    bar.sync 0;
    {store}
    ret;
}}"""


@pytest.mark.parametrize(("pitch", "wavefronts"), [(32, 32 * 32), (33, 32)])
def test_a_transpose_through_shared_memory(pitch: int, wavefronts: int) -> None:
    """Reading down a column: all 32 lanes want one bank, unless each row starts a bank further."""
    x, out = np.arange(1024, dtype=np.uint32), np.zeros(1024, np.uint32)
    counts = count(transpose_kernel(pitch), x, out)
    assert (out.reshape(32, 32) == x.reshape(32, 32).T).all()
    load, store = counts.shared_load, counts.shared_store
    assert (load.requests, load.transactions, load.least) == (32, wavefronts, 32)
    assert (store.requests, store.transactions, store.least) == (32, 32, 32)
    assert counts.global_load.efficiency == 1 and counts.global_store.efficiency == 1
    assert counts.instructions["shared"] == 64 and counts.instructions["barrier"] == 1


def test_a_diverged_warp_takes_a_slot_for_each_side() -> None:
    """16 lanes go one way and 16 the other: every instruction is executed by one warp, half full."""
    counts = count(
        """
.visible .entry diverge(.param .u64 px, .param .u64 pout) {
    .reg .b32 %r<3>; .reg .pred %p<2>;
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 16;
    @%p1 bra $LOW;
    add.s32 %r2, %r1, 1;
    bra $END;
$LOW:
    xor.b32 %r2, %r1, 1;
$END:
    ret;
}""",
        np.zeros(1, np.uint32),
        np.zeros(1, np.uint32),
    )
    assert counts.instructions["integer"] == 3  # setp, add, xor
    assert counts.mnemonics["add.s32"] == counts.mnemonics["xor.b32"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r1}, {%r1}, {%r1}", "tensor"),
        ("prmt.b32 %r1, %r1, %r1, %r1", "integer"),
        ("add.s32 %r1, %r1, 1", "integer"),
        ("add.f32 %r1, %r1, %r1", "multiply-add"),
        ("mul.hi.u32 %r1, %r1, %r1", "multiply-add"),
        ("fma.rn.bf16x2 %r1, %r1, %r1, %r1", "multiply-add"),
        ("cvt.rn.bf16x2.f32 %r1, %r1, %r1", "convert"),
        ("cvt.u64.u32 %rd1, %r1", "move"),
        ("div.rn.f32 %r1, %r1, %r1", "special"),
        ("ld.shared.v4.b32 {%r1,%r1,%r1,%r1}, [%r1]", "shared"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1,%r1,%r1,%r1}, [%r1]", "shared"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16", "global"),
        ("cp.async.wait_group 0", "barrier"),
        ("atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], %r1", "global"),
        ("ld.param.b64 %rd1, [p]", "move"),
        ("shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1", "lane"),
        ("bar.sync 0", "barrier"),
        ("bra $L", "control"),
    ],
)
def test_the_class_of_an_instruction(text: str, expected: str) -> None:
    body = f".visible .entry k(.param .u64 p) {{ .reg .b32 %r<2>; .reg .b64 %rd<2>; {text}; $L: ret; }}"
    (instruction, _) = parse(HEAD + body).instructions
    assert class_of(instruction) == expected and expected in CLASSES
    assert tensor_flops(instruction) == (2 * 16 * 8 * 16 if expected == "tensor" else 0)


def test_a_bound_is_work_over_rate() -> None:
    """One multiprocessor at 1 GHz issues 4 a clock: 4000 instructions take a microsecond."""
    gpu = GPU("test", 80, 2, 1.0, 1.0, 1.0)
    counts = Counts(blocks=1, executed=1, warps=1)
    counts.instructions.update({"integer": 3000, "global": 1000, "move": 500})
    counts.global_load.transactions, counts.global_load.requests = 800, 200
    counts.shared_load.transactions = 700
    counts.tensor_flops = 2e6
    found = {b.resource: b.microseconds for b in bounds(counts, gpu)}
    assert found["issue"] == 1.0 and found["integer"] == 1.5 and found["L1"] == 0.2
    assert found["shared"] == 0.7 and found["tensor"] == 2.0 and found["requests"] == 0.2
    # Two blocks, one on each multiprocessor: half the time. Three: as long as two on one of them.
    counts.blocks = 2
    assert {b.resource: b.microseconds for b in bounds(counts, gpu)}["issue"] == 0.5
    counts.blocks = 3
    assert {b.resource: b.microseconds for b in bounds(counts, gpu)}["issue"] == pytest.approx(2 / 3)
    assert bounds(counts, gpu)[0].resource == "tensor" and bounds(Counts(), gpu) == []


def test_every_target_of_the_emulator_has_a_gpu() -> None:
    assert [g.name for g in gpus_of(80)] == ["A100 SXM 80 GB"]
    assert [g.name for g in gpus_of(90)] == ["H100 SXM", "H200 SXM"]
