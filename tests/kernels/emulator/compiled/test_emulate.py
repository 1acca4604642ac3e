"""`emulate`: what a launch may be given, what is put back, and what is said when it cannot be."""

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from processes import run_process
from triton.runtime import driver

from minipeft.kernels.emulator import AccessError, RaceError, UninitializedError, emulate
from minipeft_kernels.emulator.arguments import pack


@triton.jit
def scale_kernel(x, out, factor, n, extra, pair, BLOCK: tl.constexpr, PLUS: tl.constexpr = 0):
    """out = x * factor + n-th element's number of the pair + PLUS."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n).to(tl.float32) * factor + pair[1] + PLUS
    if extra is not None:
        value += tl.load(extra + i, mask=i < n)
    tl.store(out + i, value, mask=i < n)


@pytest.mark.parametrize("factor", [2.5, 3, 1, True, 16])
@pytest.mark.parametrize("extra", [None, torch.arange(100.0)])
def test_every_kind_of_argument(factor: Any, extra: torch.Tensor | None) -> None:
    x, out = torch.randn(100), torch.full((100,), torch.nan)
    with emulate("sm_80"):
        scale_kernel[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](
            x, out, factor, 100, extra, (x, 7), BLOCK=64, PLUS=1
        )
    torch.testing.assert_close(out, x * factor + 8 + (0 if extra is None else extra))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int64])
def test_every_dtype_and_views_that_start_anywhere(dtype: torch.dtype) -> None:
    base = torch.randint(-50, 50, (103,)).to(dtype)
    x, out = base[3:], torch.full((104,), torch.nan)[2:102]
    with emulate("sm_80"):
        scale_kernel[(2, 1, 1)](x, out, 2.0, 100, None, (x, 0), BLOCK=64)
    assert torch.equal(out, x.float() * 2)


def test_one_tensor_in_two_roles() -> None:
    x = torch.randn(128)
    expected = x * 2 + 5
    with emulate("sm_80") as run:
        scale_kernel[(1,)](x, x, 2.0, 128, None, (x, 5), BLOCK=128)
    assert torch.equal(x, expected)
    assert list(run.launches[0].counts.tensors) == ["x/out/pair.0"]  # type: ignore[union-attr]


def test_a_grid_of_nothing_launches_nothing() -> None:
    out = torch.full((4,), torch.nan)
    with emulate("sm_80") as run:
        scale_kernel[(0,)](out, out, 2.0, 4, None, (out, 0), BLOCK=64)
    assert out.isnan().all() and not run.launches


def test_threads_that_only_repeat_others_race_with_them() -> None:
    """128 threads on 64 elements: two warps read what the other two write. Their own results go nowhere, and yet."""
    x = torch.randn(64)
    with emulate("sm_80"), pytest.raises(RaceError, match="race on byte 0 of x/out"):
        scale_kernel[(1,)](x, x, 2.0, 64, None, (x, 5), BLOCK=64)


def test_launches_are_told() -> None:
    x = torch.randn(100)
    with emulate("sm_90") as run:
        scale_kernel[(2,)](x, x, 2.0, 100, None, (x, 0), BLOCK=64, num_warps=2)
    (launch,) = run.launches
    assert (launch.name, launch.grid, launch.warps) == ("scale_kernel", (2, 1, 1), 2)
    assert launch.constants["BLOCK"] == 64 and ".target sm_90a" in launch.ptx
    assert launch.counts is not None and launch.counts.warps == 2


def test_heuristics_and_autotuning_take_the_first_configuration() -> None:
    tuned = triton.autotune([triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["n"])(scale_kernel)
    chosen = triton.heuristics({"PLUS": lambda given: given["n"]})(tuned)
    x, out = torch.randn(100), torch.empty(100)
    with emulate("sm_80") as run:
        chosen[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, out, 1.0, 100, None, (x, 0))
    torch.testing.assert_close(out, x + 100)
    assert run.launches[-1].constants["BLOCK"] == 32


def test_contexts_nest_and_put_everything_back() -> None:
    from triton import knobs

    x = torch.ones(128)
    before = driver._active, knobs.runtime.add_stages_inspection_hook

    def launch() -> None:
        scale_kernel[(1,)](x, x, 2.0, 128, None, (x, 0), BLOCK=128)

    with emulate("sm_80") as outer:
        launch()
        with emulate("sm_90") as inner, pytest.raises(ZeroDivisionError):
            launch()
            raise ZeroDivisionError
        launch()
    assert (driver._active, knobs.runtime.add_stages_inspection_hook) == before
    assert [run.launches[0].program.target for run in (outer, inner)] == ["sm_80", "sm_90a"]
    assert len(outer.launches) == 2 and len(inner.launches) == 1 and x.eq(8).all()


def test_a_true_driver_keeps_its_kernels_and_gets_none_of_the_emulators() -> None:
    calls: list[str] = []

    class True_:
        """As a GPU's driver: it must not hear of the emulation."""

        def __getattr__(self, name: str) -> Callable[..., Any]:
            calls.append(name)
            raise AssertionError(name)

    true = True_()
    x = torch.ones(128)
    with patch.object(driver, "_active", true):
        with emulate("sm_80"):
            scale_kernel[(1,)](x, x, 2.0, 128, None, (x, 0), BLOCK=128)
        assert driver._active is true
    assert not calls
    # Triton keeps compiled kernels by device: none is kept for a device that a GPU could be.
    assert all(device >= 1_000_000 for device in scale_kernel.device_caches)


def test_an_access_out_of_bounds_names_tensor_and_kernel_line() -> None:
    x, out = torch.randn(100), torch.empty(64)
    with emulate("sm_80"), pytest.raises(AccessError, match=r"out.*test_emulate\.py"):
        scale_kernel[(2,)](x, out, 2.0, 100, None, (x, 0), BLOCK=64)


def test_memory_that_torch_did_not_write_is_not_read_unnoticed() -> None:
    with emulate("sm_80"):
        x, out = torch.empty(64), torch.empty(64)
        with pytest.raises(UninitializedError, match="x"):
            scale_kernel[(1,)](x, out, 2.0, 64, None, (x, 0), BLOCK=64)
        x.fill_(1.0)
        scale_kernel[(1,)](x, out, 2.0, 64, None, (x, 0), BLOCK=64)
        # Written by a kernel, so it may be read by the next.
        scale_kernel[(1,)](out, x, 2.0, 64, None, (x, 0), BLOCK=64)
    assert x.eq(4).all()


def test_half_written_memory_is_known_byte_by_byte() -> None:
    with emulate("sm_80"):
        out = torch.empty(128)
        x = torch.ones(128)
        scale_kernel[(1,)](x, out, 2.0, 64, None, (x, 0), BLOCK=64)
        scale_kernel[(1,)](out, x, 2.0, 64, None, (x, 0), BLOCK=64)
        with pytest.raises(UninitializedError):
            scale_kernel[(2,)](out, x, 2.0, 128, None, (x, 0), BLOCK=64)


def test_what_cannot_be_emulated_is_said() -> None:
    with pytest.raises(ValueError, match=r"target must be one of .* got 'sm_12'"), emulate("sm_12"):
        pass
    with patch.object(triton, "__version__", "3.7.1"), pytest.raises(RuntimeError, match=r"3\.7\.1 .* 3\.8 and 3\.9"):
        emulate("sm_80").__enter__()
    with patch.dict(os.environ, TRITON_INTERPRET="1"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        emulate("sm_80").__enter__()
    meta = torch.empty(64, device="meta")
    with emulate("sm_80"), pytest.raises(ValueError, match="x is on meta"):
        scale_kernel[(1,)](meta, meta, 2.0, 64, None, (meta, 0), BLOCK=64)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("i32", -2, b"\xfe\xff\xff\xff"),
        ("u8", 255, b"\xff"),
        ("i1", True, b"\x01"),
        ("fp32", 1.5, b"\x00\x00\xc0\x3f"),
        ("fp16", 1.0, b"\x00\x3c"),
        ("bf16", 1.0, b"\x80\x3f"),
        ("fp64", 1.0, b"\0\0\0\0\0\0\xf0\x3f"),
    ],
)
def test_scalars_become_bytes(kind: str, value: Any, expected: bytes) -> None:
    assert pack("n", kind, value) == expected


def test_a_scalar_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError, match="argument n = 300 does not fit i8"):
        pack("n", "i8", 300)


def test_the_operations_run_by_an_environment_variable() -> None:
    """A process of its own, as a user would: MINIPEFT_BACKEND=ptx."""
    program = (
        "import torch; from minipeft.kernels import NF4, nf4_quantize, nf4_dequantize\n"
        "from minipeft_kernels import dispatch\n"
        "from minipeft_kernels.nf4.codebooks import NF4_LEVELS\n"
        "w = torch.randn(8, 64); codes, absmax = nf4_quantize(w, 64)\n"
        "weight = NF4(codes, absmax, NF4_LEVELS, None, None, None, 8, 64, 64)\n"
        "out = nf4_dequantize(weight, torch.float32)\n"
        "import os; os.environ['MINIPEFT_BACKEND'] = 'reference'\n"
        "right_codes, right = nf4_quantize(w, 64)\n"
        "assert torch.equal(codes, right_codes) and torch.equal(absmax, right)\n"
        "assert torch.equal(out, nf4_dequantize(weight, torch.float32))\n"
        "print(dispatch.capability(torch.device('cpu')))\n"
        "os.environ['MINIPEFT_BACKEND'] = 'ptx'; print(dispatch.capability(torch.device('cpu')))\n"
    )
    environment = {**os.environ, "MINIPEFT_BACKEND": "ptx", "MINIPEFT_PTX_TARGET": "sm_90"}
    done = run_process([sys.executable, "-c", program], env=environment, check=True)
    assert done.stdout.split() == ["80", "90"]
