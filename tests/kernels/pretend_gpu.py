"""Launches every kernel by its own launcher on an H100 that is not there: all is real but the launch itself.

Run as a program, in a process without the interpreter. The interpreter does not show a launcher that passes a wrong
option, or a kernel that does not compile with the arguments it is given; this does. Prints the launches as JSON.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from minipeft.kernels import adamw_, adamw_8bit_, lora_matmul, nf4_dequantize, nf4_matmul
from minipeft.nf4 import NF4Weight
from minipeft_kernels import dispatch
from minipeft_kernels.adamw.eight_bit import initial_state
from minipeft_kernels.experts.op import experts_linear
from minipeft_kernels.lab.sass import read_cubin

# As a program it finds its own folder alone.
sys.path.insert(0, str(Path(__file__).parents[1]))
from stacks import stack_of

SHARED_MEMORY = 232448  # bytes a program may have on an H100
launches: list[dict[str, Any]] = []


class PretendDriver:
    """What Triton asks a driver: which GPU it compiles for, and to load and launch what it compiled."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY},
            load_binary=self.load,
            unload_module=lambda module: None,
        )

    def load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, str, int, int, int]:
        """Triton takes what is loaded as a handle, and gives it back to launch."""
        if "matmul" in name:  # has tests of its own
            return object(), "", 0, 0, 1024
        function, _, _ = read_cubin(binary)
        return object(), " ".join(sorted({i.full for i in function.instructions})), 0, 0, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, instructions: str, *rest: Any) -> None:
            launches.append({"kernel": metadata.name, "shared": metadata.shared, "code": instructions})

        return launch


def train_step(rows: int, dtype: torch.dtype, double: bool, features: tuple[int, int]) -> None:
    """Forward and backward through both products, with a bias."""
    out_features, in_features = features
    with patch.dict("os.environ", MINIPEFT_BACKEND="reference"):
        w = NF4Weight.quantize(torch.randn(out_features, in_features), 64, double)
    x = torch.randn(rows, in_features, dtype=dtype, requires_grad=True)
    lora_A, lora_B = torch.randn(8, in_features, requires_grad=True), torch.randn(out_features, 8, requires_grad=True)
    bias = torch.zeros(out_features, requires_grad=True)
    nf4_matmul(x, w.packed(), bias).sum().backward()
    lora_matmul(x, w.packed(), lora_A, lora_B, 0.5, bias).sum().backward()
    nf4_dequantize(w.packed(), dtype)


def experts_step(dtype: torch.dtype) -> None:
    """Forward and backward of a few rows that go to two of three experts."""
    with patch.dict("os.environ", MINIPEFT_BACKEND="reference"):
        stack = stack_of(torch.randn(3, 48, 128))
    x = torch.randn(5, 128, dtype=dtype, requires_grad=True)
    lora_A, lora_B = torch.randn(3, 8, 128, requires_grad=True), torch.randn(3, 48, 8, requires_grad=True)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    experts_linear(x, offsets, stack, (lora_A, lora_B, 0.5)).sum().backward()


def quantize(dtype: torch.dtype) -> None:
    from minipeft_kernels.nf4.quantize_triton import quantize_absmax_into, quantize_into

    codes, absmax, nested = torch.empty(2048, dtype=torch.uint8), torch.rand(64), torch.empty(1)
    quantize_into(torch.randn(4096).to(dtype), codes, absmax, 64)
    quantize_absmax_into(absmax, absmax.mean(), codes[:64], nested)


def optimize(dtype: torch.dtype) -> None:
    params = [torch.randn(16, 64).to(dtype), torch.randn(3).to(dtype)]  # the second is not aligned
    grads, moments = [p.float() for p in params], [[torch.zeros(p.shape) for p in params] for _ in range(2)]
    adamw_(params, grads, *moments, step=1, lr=1e-3)
    adamw_8bit_(params, grads, *zip(*map(initial_state, params), strict=True), step=1, lr=1e-3)


def main() -> None:
    import minipeft_kernels.linear.gpu as matmul

    assert not dispatch.interpreting()
    driver.set_active(PretendDriver())
    here = patch.object(dispatch, "triton_obstacle", lambda device: "")
    permute = patch.object(matmul, "can_permute", lambda x: x.element_size() == 2)
    with here, permute:
        for dtype in (torch.bfloat16, torch.float32):
            quantize(dtype)
            optimize(dtype)
            train_step(1, dtype, double=dtype == torch.bfloat16, features=(48, 128))
            launches.append({"kernel": "experts"})
            experts_step(dtype)
        launches.append({"kernel": "many rows"})
        train_step(300, torch.bfloat16, True, (48, 128))
        launches.append({"kernel": "ragged"})
        train_step(2, torch.bfloat16, True, (5, 100))
    print(json.dumps(launches))


if __name__ == "__main__":
    main()
