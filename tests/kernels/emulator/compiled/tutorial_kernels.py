"""Kernels of the kind that Triton's tutorials teach, written for these tests: each uses a part of the machine."""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="annotation-unchecked"

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    """out = x + y, elementwise."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


@triton.jit
def softmax_kernel(x, out, columns, row_stride, BLOCK: tl.constexpr):
    """A row a program: maximum, sum of exponentials, quotient."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    values = tl.load(x + row * row_stride + i, mask=i < columns, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * columns + i, powers / tl.sum(powers, axis=0), mask=i < columns)


@triton.jit
def layer_norm_kernel(x, weight, bias, out, columns, eps, BLOCK: tl.constexpr):
    """A row a program, in pieces of BLOCK: mean, variance about it, then the result."""
    row = tl.program_id(0).to(tl.int64) * columns
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        total += tl.load(x + row + start + i, mask=start + i < columns, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / columns
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        value = tl.load(x + row + start + i, mask=start + i < columns, other=0.0).to(tl.float32)
        centred = tl.where(start + i < columns, value - mean, 0.0)
        squares += centred * centred
    scale = 1 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)
    for start in range(0, columns, BLOCK):
        inside = start + i < columns
        value = (tl.load(x + row + start + i, mask=inside, other=0.0).to(tl.float32) - mean) * scale
        value = value * tl.load(weight + start + i, mask=inside) + tl.load(bias + start + i, mask=inside)
        tl.store(out + row + start + i, value, mask=inside)


@triton.jit
def layer_norm_weight_grad_kernel(dy, normed, sums, lock, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over rows of dy * normed: each program adds its part to one buffer, under a lock."""
    i = tl.arange(0, BLOCK)
    part = tl.zeros([BLOCK], tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0) * ROWS + step
        inside = (i < columns) & (row < rows)
        part += tl.load(dy + row * columns + i, mask=inside, other=0.0) * tl.load(
            normed + row * columns + i, mask=inside, other=0.0
        )
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    old = tl.load(sums + i, mask=i < columns, other=0.0)
    tl.store(sums + i, old + part, mask=i < columns)
    # All stores of the program before the lock opens.
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF32: tl.constexpr
):
    """c = a b with (M, K) a and (K, N) b: tiles in groups of rows, so that neighbours share the second-level cache."""
    tile = tl.program_id(0)
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    m = (group * GROUP + tile % (GROUP * across) % height) * BM + tl.arange(0, BM)
    n = (tile % (GROUP * across) // height) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        right = tl.load(b + k[:, None] * N + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        acc = tl.dot(left, right, acc, input_precision="tf32" if TF32 else "ieee")
    place = c + m[:, None] * N + n[None, :]
    tl.store(place, acc.to(c.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def split_matmul_kernel(a, b, c, lock, count, M, N, K, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """c = a b, the sum cut among SPLIT programs which add to c in turn, under a lock; the first one writes."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(part * 32, K, 32 * SPLIT):
        k = start + tl.arange(0, 32)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        right = tl.load(b + k[:, None] * N + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        acc = tl.dot(left, right, acc)
    place = c + m[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    while tl.atomic_cas(lock + tile, 0, 1) == 1:
        pass
    if tl.load(count + tile) > 0:
        acc += tl.load(place, mask=inside, other=0.0)
    tl.store(place, acc, mask=inside)
    tl.debug_barrier()
    tl.atomic_add(count + tile, 1)
    tl.atomic_xchg(lock + tile, 0)


@triton.jit
def dropout_kernel(x, out, n, p, seed, BLOCK: tl.constexpr):
    """Philox numbers by element: the same seed drops the same elements."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.rand(seed, i) > p
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, tl.where(kept, value / (1 - p), 0.0), mask=i < n)


@triton.jit
def attention_kernel(q, k, v, out, scale, T, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """softmax(scale q k^T) v by blocks of keys, with running maximum and sum (Dao et al. 2022, algorithm 1)."""
    head = tl.program_id(1) * T * D
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    query = tl.load(q + head + m[:, None] * D + d[None, :], mask=m[:, None] < T, other=0.0)
    largest = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    last = tl.minimum(tl.program_id(0) * BM + BM, T) if CAUSAL else T
    for start in range(0, last, BN):
        n = start + tl.arange(0, BN)
        key = tl.load(k + head + n[None, :] * D + d[:, None], mask=n[None, :] < T, other=0.0)
        scores = tl.dot(query, key) * (scale * 1.4426950408889634)
        seen = n[None, :] < T
        if CAUSAL:
            seen = seen & (n[None, :] <= m[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp2(largest - new)
        powers = tl.exp2(scores - new[:, None])
        total = total * shrink + tl.sum(powers, axis=1)
        value = tl.load(v + head + n[:, None] * D + d[None, :], mask=n[:, None] < T, other=0.0)
        acc = tl.dot(powers.to(value.dtype), value, acc * shrink[:, None])
        largest = new
    place = out + head + m[:, None] * D + d[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=m[:, None] < T)


@triton.jit
def histogram_kernel(x, counts, sums, n, BLOCK: tl.constexpr):
    """How often each value occurs, and their float sum: atomics on memory that all programs share."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(counts + value, 1, mask=i < n)
    tl.atomic_add(sums, tl.sum(tl.where(i < n, value, 0), axis=0).to(tl.float32))
    tl.atomic_max(sums + 1, tl.max(tl.where(i < n, value, 0), axis=0).to(tl.float32))


@triton.jit
def scan_kernel(x, out, n, BLOCK: tl.constexpr):
    """Running sums of a row and its sorted values: shuffles, and shared memory between warps."""
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, tl.cumsum(value, axis=0), mask=i < n)
    tl.store(out + n + i, tl.sort(tl.where(i < n, value, float("inf"))), mask=i < n)
