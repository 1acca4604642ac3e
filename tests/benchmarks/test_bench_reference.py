"""The float64 results that everything is checked with are right, and see what is wrong."""

import pytest
import torch

from benchmarks.reference import adamw_steps, block_scales, decoded, near, packed_weight, quantization_error
from benchmarks.shapes import CPU, CUDA, Layer, sizes_for
from minipeft.nf4 import NF4Weight


@pytest.mark.parametrize("double_quant", [True, False])
def test_decoding_agrees_with_the_library(double_quant):
    weight = NF4Weight.quantize(torch.randn(48, 100), double_quant=double_quant)
    torch.testing.assert_close(decoded(weight).float(), weight.dequantize(torch.float32), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(block_scales(weight).float(), weight.scales())


def test_a_right_quantization_passes():
    w = torch.randn(64, 128)
    weight = NF4Weight.quantize(w)
    assert quantization_error(w.view(-1), weight.quant_map, 64, weight.codes, weight.scales()) <= 1


def test_one_code_beside_the_nearest_is_seen():
    w = torch.randn(64, 128)
    weight = NF4Weight.quantize(w)
    codes = weight.codes.clone()
    codes[100] ^= 1
    assert quantization_error(w.view(-1), weight.quant_map, 64, codes, weight.scales()) > 100


def test_one_scale_off_by_a_step_is_seen():
    w = torch.randn(64, 128)
    weight = NF4Weight.quantize(w)
    scales = weight.scales().clone()
    scales[3] *= 1.05
    assert quantization_error(w.view(-1), weight.quant_map, 64, weight.codes, scales) > 1


def test_adamw_agrees_with_torch():
    start, grads = torch.randn(7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    p = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    for g in grads:
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(adamw_steps(start, list(grads), 0.1, (0.8, 0.9), 1e-6, 0.3), p.detach())


def test_the_right_result_is_computed_once():
    made = []
    error = near(lambda: made.append(1) or torch.ones(3))
    assert made == [] and error(torch.ones(3)) == 0 and error(2 * torch.ones(3)) == 1 and made == [1]


def test_packed_weights_are_quantized_on_the_cpu():
    weight = packed_weight(Layer("small", 32, 64), torch.bfloat16, torch.device("meta"))
    assert weight.codes.is_meta and weight.dtype == torch.bfloat16 and weight.double_quant


def test_quick_sizes_are_small():
    assert sizes_for("cpu") == CPU and sizes_for("cuda") == CUDA
    for kind in ("cpu", "cuda"):
        quick = sizes_for(kind, quick=True)
        assert max(layer.numel for layer in quick.layers) <= 1 << 16 and max(quick.rows) <= 16
