"""QLoRA training steps of a tiny Llama, in Triton kernels and in the references: the same losses and gradients."""

from typing import Any

import pytest
import torch
from tiny import randomize, some_ids, tiny_llama
from torch import Tensor

from minipeft import LoraConfig, get_peft_model
from minipeft.kernels import adamw_
from minipeft.nf4 import NF4Config, quantize_model

# The interpreter computes in numpy, which warns where a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

STEPS = 2


def train(dtype: torch.dtype) -> list[tuple[Tensor, list[Tensor]]]:
    """Quantize, adapt, train: at each step the loss and the gradients."""
    # 64 columns go to the fused kernels; 96 are no multiple of the blocksize, and are decoded first.
    model: Any = tiny_llama(intermediate_size=96).to(dtype)
    quantize_model(model, NF4Config())
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize(model)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    moments = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    ids = some_ids()
    history = []
    for step in range(1, STEPS + 1):
        loss = model(input_ids=ids, labels=ids).loss
        gradients = list(torch.autograd.grad(loss, params))
        adamw_(params, gradients, *moments, step=step, lr=1e-2)
        history.append((loss.detach(), gradients))
    return history


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_kernels_and_references_train_alike(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    histories = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("MINIPEFT_BACKEND", backend)
        histories[backend] = train(dtype)
    for (loss, gradients), (right_loss, right) in zip(histories["triton"], histories["reference"], strict=True):
        torch.testing.assert_close(loss, right_loss, rtol=tolerance / 10, atol=0)
        assert len(gradients) == 28
        for a, b in zip(gradients, right, strict=True):
            assert (a - b).norm() <= tolerance * b.norm()
    # The second step's loss is another: the optimizer moved the parameters.
    assert histories["triton"][1][0] < histories["triton"][0][0] - 0.05
