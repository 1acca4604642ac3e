"""Raw operations with arguments that do not fit: refused before anything is read by its address, in every form."""

import os
import sys
from pathlib import Path

import pytest
import torch
from misfits import call_many, operation, some_arguments
from native_weights import needs_library
from processes import run_process

from minipeft.nf4 import NF4Weight
from minipeft_kernels import native
from minipeft_kernels.linear import cpu

HERE = Path(__file__).parent
# A process of its own: what reads beyond a tensor may end it.
SEARCH = """
import random
import hypothesis, hypothesis.strategies as st
import torch
from misfits import call_at_random

@hypothesis.settings(max_examples=%d, deadline=None, database=None, derandomize=True,
                     suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.integers(0, 2**32), st.randoms(use_true_random=False))
def search(seed, choose):
    torch.manual_seed(seed)
    call_at_random(choose)

search()
"""


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_a_call_that_does_not_fit_is_refused_and_its_fake_form_agrees(backend: str) -> None:
    if backend == "native" and native.obstacle():
        pytest.skip(native.obstacle())
    paths = [HERE.parents[1], HERE.parents[1] / "kernels", HERE.parent, HERE, HERE / "experts"]
    environment = {
        **os.environ,
        "MINIPEFT_BACKEND": backend,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    examples = 60 if backend == "triton" else 150
    run_process([sys.executable, "-W", "ignore", "-c", SEARCH % examples], check=True, env=environment)


def test_some_calls_are_computed_and_some_refused() -> None:
    computed, refused = call_many(100, seed=0)
    assert computed > 20 and refused > 40


NUMBERS = (0.5, torch.float32, torch.float32)


@pytest.mark.parametrize("fake", [False, True])
def test_the_error_names_what_does_not_fit(fake: bool) -> None:
    def to(t: torch.Tensor) -> torch.Tensor:
        return t.to("meta") if fake else t

    w = [to(t) if isinstance(t, torch.Tensor) else t for t in NF4Weight.quantize(torch.randn(48, 128)).packed()]
    linear, backward = torch.ops.minipeft.linear, torch.ops.minipeft.linear_backward
    x, dy, A, B = to(torch.randn(2, 128)), to(torch.randn(2, 48)), to(torch.randn(4, 128)), to(torch.randn(48, 4))
    for match, call in {
        r"x's last dimension \(192\) must be in_features \(128\)": lambda: linear(
            to(torch.randn(2, 192)), None, None, None, *NUMBERS, *w
        ),
        r"dy's last dimension \(128\) must be out_features \(48\)": lambda: backward(
            x, None, None, None, None, *NUMBERS, [True, False, False], *w
        ),
        r"rows \(-48\) and columns \(-128\) .* must not be negative": lambda: linear(
            x, None, None, None, *NUMBERS, *w[:6], -48, -128, *w[8:]
        ),
        r"codes of the NF4 weight must be 6144 of torch.uint8": lambda: linear(
            x, None, None, None, *NUMBERS, *w[:6], 96, 128, *w[8:]
        ),
        r"B must be \(48, 4\), as the others say, got \(47, 4\)": lambda: linear(x, None, A, B[1:], *NUMBERS, *w),
        r"A must be \(4, 128\), as the others say, got \(4, 64\)": lambda: linear(x, None, A[:, :64], B, *NUMBERS, *w),
        "the gradient of A is made from x, which is None": lambda: backward(
            dy, None, A, B, None, *NUMBERS, [False, True, False], *w
        ),
        r"low must be \(2, 4\), as the others say, got \(1, 4\)": lambda: backward(
            dy, x, A, B, to(torch.randn(1, 4)), *NUMBERS, [False, False, True], *w
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_moments_of_another_length_are_refused() -> None:
    *lists, step, lr, beta1, beta2, eps, decay, maximize = some_arguments(torch.float32, True)["adamw_"]
    params, grads, exp_avgs, exp_avg_sqs = lists
    hyper = (step, lr, beta1, beta2, eps, decay, maximize)
    before = [p.clone() for p in params]
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[1\] should be torch.float32 \(300,\)"):
        operation("adamw_")(params, grads, exp_avgs, [exp_avg_sqs[0], torch.zeros(3)], *hyper)
    with pytest.raises(ValueError, match="betas must be from 0 up to 1"):
        operation("adamw_")(*lists, step, lr, 1.0, beta2, eps, decay, maximize)
    assert all(map(torch.equal, params, before))


@needs_library
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("backward", [False, True])
def test_compiled_products_take_no_rows_of_another_width(backward: bool) -> None:
    w = NF4Weight.quantize(torch.randn(64, 128)).packed()
    if native.level() == native.SCALAR:
        pytest.skip("no compiled products at this level")
    with pytest.raises(ValueError, match="must be 64" if backward else "must be 128"):
        cpu.product(torch.randn(2, 192), w, torch.float32, backward)
