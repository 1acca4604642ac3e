"""The benchmark of experts compares with what is right, and its peers compute what they are said to."""

import pytest
import torch

from benchmarks.bench_experts import OTHER_SCALES, TOLERANCES, Layers, _matrix, _right, relative_error
from benchmarks.experts_models import ALPHA, DENSE, NF4, TARGETS, Batch, base_of, factors
from benchmarks.shapes import RANK, Mixture

MIXTURE = Mixture("tiny", 64, 6, 2, 128)
CPU = torch.device("cpu")


@pytest.fixture
def layers():
    return Layers(MIXTURE, CPU)


@pytest.fixture
def batch():
    return Batch(MIXTURE, 9, torch.float32, CPU)


def test_the_right_result_is_transformers_own_over_merged_weights(layers, batch):
    packed = layers.packed(torch.float32)
    up_A, down_A, up_B, down_B = (
        next(p for p in factors(layers.get("minipeft", NF4, torch.float32)) if tuple(p.shape) == shape)
        for shape in ((96, 64), (96, 128), (256, 96), (64, 96))
    )

    def fill(name, weight):
        lora_A, lora_B = (up_A, up_B) if name == "gate_up_proj" else (down_A, down_B)
        for e in range(MIXTURE.experts):
            own_A = lora_A.detach().double().view(MIXTURE.experts, RANK, -1)[e]
            own_B = lora_B.detach().double().view(-1, RANK, MIXTURE.experts)[:, :, e]
            weight[e] = _matrix(packed, name, e) + ALPHA / RANK * own_B @ own_A

    merged = base_of(MIXTURE, torch.float64, CPU, fill)
    merged.experts.config._experts_implementation = "eager"
    x = batch.x.detach().double().requires_grad_()
    y = merged(x, batch.chosen, batch.weights.double())
    y.backward(batch.dy.double())
    right = _right(layers, batch, torch.float32)
    assert relative_error([y.detach(), x.grad], right[:2]) < 1e-9


@pytest.mark.parametrize("side", ["minipeft", "peft"])
@pytest.mark.parametrize("kind", [NF4, DENSE])
def test_every_step_is_right_and_each_as_the_first(side, kind, layers, batch):
    """PEFT over weights that bitsandbytes packed needs a mend for both: see `experts_models._mend`."""
    model, right = layers.get(side, kind, torch.float32), _right(layers, batch, torch.float32)
    first = batch.step(model)
    tolerance = OTHER_SCALES if (side, kind) == ("peft", NF4) else TOLERANCES[torch.float32]
    assert relative_error(first, right) < tolerance
    assert relative_error(batch.step(model), [t.double() for t in first]) < 1e-5


def test_an_update_that_does_not_act_is_seen(layers, batch):
    model, right = layers.get("minipeft", NF4, torch.float32), _right(layers, batch, torch.float32)
    down_A = factors(model)[1]
    assert down_A.shape == (MIXTURE.experts * RANK, MIXTURE.intermediate)
    with torch.no_grad():
        down_A.zero_()
    assert relative_error(batch.step(model), right) > OTHER_SCALES


def test_both_weights_are_adapted(layers):
    for side in ("minipeft", "peft"):
        assert len(factors(layers.get(side, NF4, torch.float32))) == 2 * len(TARGETS)
