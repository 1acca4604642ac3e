"""The low-rank update against finite differences and plain products."""

import torch
from torch import Tensor

from minipeft.kernels.lora_matmul import lora_update


def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, lora_A, lora_B = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(6, 3)
    return tuple(t.to(dtype).requires_grad_() for t in (x, lora_A, lora_B))  # type: ignore[return-value]


def test_gradients_agree_with_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda *t: lora_update(*t, 0.7), factors(torch.float64))


def test_dtype_is_the_wider_one_and_autocasts_under_autocast() -> None:
    x, lora_A, lora_B = factors(torch.float32)
    narrow = x.detach().bfloat16()
    assert lora_update(narrow, lora_A, lora_B, 1.0).dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lora_update(x, lora_A, lora_B, 1.0)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert lora_A.grad is not None and lora_A.grad.dtype is torch.float32
    torch.testing.assert_close(out.float(), x @ lora_A.T @ lora_B.T, rtol=0.02, atol=0.1)


def test_only_the_gradients_that_are_needed_are_made() -> None:
    x, lora_A, lora_B = factors(torch.float64)
    out = lora_update(x.detach(), lora_A, lora_B.detach(), 2.0)
    out.sum().backward()
    assert lora_A.grad is not None and x.grad is None and lora_B.grad is None
