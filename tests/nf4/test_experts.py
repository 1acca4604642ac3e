"""Experts in NF4: the bits are bitsandbytes', one matrix at a time, and the output that of the dequantized experts."""

import ast
import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers.models
from test_nf4 import assert_is_bitsandbytes
from tiny_experts import EXPERTS, HIDDEN, INTERMEDIATE, experts_classes, routed, tiny_experts
from torch import Tensor

from minipeft.mixins import plain_class
from minipeft.nf4 import NF4Weight
from minipeft.nf4.experts import NF4Experts, expert_parameters, pack_weights, start_packing
from minipeft.nf4.stack import NF4ExpertsWeight

NAMES = ["mixtral.MixtralExperts", "gpt_oss.GptOssExperts", "nemotron_h.NemotronHExperts"]


def packed(name: str, double_quant: bool = True, blocksize: int = 64, compute_dtype: Any = None) -> tuple[Any, Any]:
    """A packed module of the class `name`, and the dense one that it was made of."""
    torch.manual_seed(1)
    dense = tiny_experts(experts_classes()[name])
    module = start_packing(copy.deepcopy(dense), compute_dtype)
    for weight in expert_parameters(module):
        pack_weights(module, weight, blocksize, double_quant)
    return module, dense


def run(module: Any) -> list[Tensor]:
    """The output, and the gradients of what comes in and of the parameters that are trained."""
    hidden, index, weights = routed()
    given = hidden.requires_grad_(), weights.requires_grad_()
    out = module(given[0], index, given[1])
    out.square().sum().backward()
    return [out, *(t.grad for t in given)]


def tensors(module: Any) -> dict[str, Tensor]:
    return dict(module.state_dict())


def assert_equal_state(got: Any, wanted: Any) -> None:
    got, wanted = tensors(got), tensors(wanted)
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key


@pytest.mark.parametrize("name", experts_classes())
def test_every_class_of_experts_computes_as_with_its_dequantized_weights(name: str) -> None:
    module, dense = packed(name)
    assert type(module).__name__ == f"NF4{type(dense).__name__}" and plain_class(module) is type(dense)
    kept = [n for n, p in dense.named_parameters() if p.dim() != 3 or "bias" in n]
    with torch.no_grad():
        for weight in expert_parameters(dense):
            dequantized = module.dense_experts(weight)
            assert 0 < (dequantized - dense.get_parameter(weight)).abs().max() < 0.2
            dense.get_parameter(weight).copy_(dequantized)
    for got, wanted in zip(run(module), run(dense), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for n in kept:
        assert torch.equal(module.get_parameter(n), dense.get_parameter(n))
        torch.testing.assert_close(module.get_parameter(n).grad, dense.get_parameter(n).grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_of_an_expert_are_those_of_its_matrix_alone(name: str, double_quant: bool) -> None:
    # 32 x 96 weights are no whole number of blocks of 4096, so a block that straddled experts would be seen.
    module, dense = packed(name, double_quant, blocksize=4096)
    for weight in expert_parameters(dense):
        stack = module.packed_experts(weight)
        for e, matrix in enumerate(dense.get_parameter(weight).detach()):
            matrix = (matrix.T if dense.is_transposed else matrix).contiguous()
            codes, state = bnb.quantize_4bit(matrix, blocksize=4096, quant_type="nf4", compress_statistics=double_quant)
            expert = stack.expert(e)
            assert torch.equal(expert.codes, codes) and torch.equal(expert.quant_map, state.code)
            if double_quant:
                assert torch.equal(expert.offset, state.offset)
                assert torch.equal(expert.nested_absmax, state.state2.absmax)
            else:
                assert torch.equal(expert.absmax, state.absmax)
            assert_is_bitsandbytes(matrix, 4096, double_quant)
            alone = NF4Weight.quantize(matrix, 4096, double_quant).packed()
            both = zip(expert.tensors(), alone.tensors(), strict=True)
            assert all(a is b is None or torch.equal(a, b) for a, b in both)


def test_odd_sizes_and_wrong_ones() -> None:
    w = torch.randn(3, 5, 7)
    stack = NF4ExpertsWeight.quantize(w)
    for e, matrix in enumerate(w):
        assert torch.equal(stack.dequantize()[e], NF4Weight.quantize(matrix).dequantize())
    assert stack.codes.shape == (3, 18) and stack.dequantize(torch.bfloat16).dtype == torch.bfloat16
    for wrong in (torch.randn(5, 7), torch.randn(0, 5, 7)):
        with pytest.raises(ValueError, match=r"\(experts, rows, columns\), got"):
            NF4ExpertsWeight.quantize(wrong)
    with pytest.raises(ValueError, match="finite"):
        NF4ExpertsWeight.quantize(torch.full((2, 4, 4), float("nan")))
    module, _ = packed("mixtral.MixtralExperts")
    with pytest.raises(ValueError, match=r"\(3, 5, 7\) do not fit experts of shape \(5, 64, 32\)"):
        module.set_stack("down_proj", stack)


@pytest.mark.parametrize("name", NAMES)
def test_casts_touch_neither_codes_nor_scales(name: str) -> None:
    module, _ = packed(name)
    before = {key: t.clone() for key, t in tensors(module).items() if "quant_state" not in key}
    module.to(torch.float64).half().to(torch.bfloat16)
    assert module.weight_dtype == torch.bfloat16
    for key, tensor in tensors(module).items():
        weight = key.split(".")[0]
        if weight in module.stack_sizes and "quant_state" not in key:
            assert torch.equal(tensor, before[key]) and tensor.dtype == before[key].dtype
        elif weight not in module.stack_sizes:
            assert tensor.dtype == torch.bfloat16
    assert module.dense_experts("down_proj").dtype == torch.bfloat16
    hidden, index, weights = routed()
    assert module(hidden.bfloat16(), index, weights.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_devices_and_shared_memory(name: str) -> None:
    module, _ = packed(name)
    wanted = run(module)[0]
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).share_memory()):
        assert type(again) is type(module) and again.down_proj.data_ptr() != module.down_proj.data_ptr()
        assert_equal_state(again, module)
        assert torch.equal(run(again)[0], wanted)
    on_meta = copy.deepcopy(module).to("meta")
    assert all(t.is_meta for t in tensors(on_meta).values()) and tensors(on_meta).keys() == tensors(module).keys()
    on_meta.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(run(on_meta)[0], wanted)
    assert not module.down_proj.requires_grad and module.down_proj.dtype == torch.uint8


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dicts_go_in_and_out(assign: bool, double_quant: bool) -> None:
    module, _ = packed("gpt_oss.GptOssExperts", double_quant)
    state = module.state_dict()
    ends = ["", ".absmax", ".quant_map", *((".nested_absmax", ".nested_quant_map") if double_quant else ())]
    assert list(state) == [
        *("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
        *(f"{weight}{end}" for weight in ("gate_up_proj", "down_proj") for end in [*ends[1:], QUANT_STATE]),
    ]
    for blocksize in (64, 128):
        # Of other numbers, and other blocks, in which they are loaded all the same.
        other = start_packing(tiny_experts(experts_classes()["gpt_oss.GptOssExperts"]), None)
        for weight in expert_parameters(other):
            pack_weights(other, weight, blocksize, True)
        codes = other.down_proj
        result = other.load_state_dict(state, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert_equal_state(other, module)
        assert torch.equal(run(other)[0], run(module)[0])
        same_blocks = blocksize == 64 and double_quant
        assert (other.down_proj is codes) == (same_blocks and not assign)


QUANT_STATE = ".quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.pop("down_proj"), "down_proj is missing"),
        (lambda s: s.pop("down_proj.absmax"), "down_proj.absmax is missing"),
        (lambda s: s.pop("down_proj" + QUANT_STATE), "down_proj.quant_state.bitsandbytes__nf4 is missing"),
        (lambda s: s.update({"down_proj": s["down_proj"][:4]}), r"down_proj \(as bytes\) should be uint8 \(5, 1024\)"),
        (lambda s: s.update({"down_proj.absmax": s["down_proj.absmax"][:, :-1]}), r"down_proj.absmax should be"),
        (lambda s: s.update({"down_proj": torch.randn(5, 64, 32), **dense(s)}), "down_proj is a dense weight"),
        (lambda s: s.update(other_json(s, "shape", [5, 32, 64])), r"\(5, 32, 64\) do not fit"),
        (lambda s: s.update(other_json(s, "shape", [64, 32])), r"shape = \[64, 32\]"),
        (lambda s: s.update(other_json(s, "nested_offset", 0.5)), "nested_offset = 0.5"),
        (lambda s: s.update(other_json(s, "nested_offset", [0.5] * 4)), "4 nested offsets for 5 experts"),
        (lambda s: s.update(other_json(s, "nested_offset", [float("nan")] * 5)), "NaN is no JSON number"),
    ],
)
@pytest.mark.parametrize("assign", [True, False])
def test_damaged_states_are_refused_by_name(edit: Any, message: str, assign: bool) -> None:
    module, _ = packed("mixtral.MixtralExperts")
    state = dict(module.state_dict())
    edit(state)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, assign=assign)


def dense(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What takes the scales of down_proj out of `state`."""
    for key in [key for key in state if key.startswith("down_proj.")]:
        del state[key]
    return {}


def other_json(state: dict[str, Tensor], entry: str, value: Any) -> dict[str, Tensor]:
    key = "down_proj" + QUANT_STATE
    entries = {**json.loads(bytes(state[key].tolist())), entry: value}
    return {key: torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)}


def test_missing_and_unexpected_keys_are_named_as_a_layers_are() -> None:
    module, _ = packed("gpt_oss.GptOssExperts")
    state = {key: t for key, t in module.state_dict().items() if not key.startswith("down_proj")}
    result = module.load_state_dict({**state, "more": torch.ones(1)}, strict=False)
    assert sorted(result.missing_keys) == sorted(key for key in tensors(module) if key.startswith("down_proj"))
    assert result.unexpected_keys == ["more"]
    with pytest.raises(RuntimeError, match=r"Missing key.*down_proj"):
        module.load_state_dict(state)


@pytest.mark.parametrize("name", NAMES)
def test_dense_again_and_packed_anew(name: str) -> None:
    module, dense = packed(name)
    for weight in expert_parameters(dense):
        assert module.dense_experts(weight).shape == dense.get_parameter(weight).shape
        module.set_experts(weight, dense.get_parameter(weight) * 2)
        # A power of two changes the scales alone.
        torch.testing.assert_close(module.dense_experts(weight), packed(name)[0].dense_experts(weight) * 2)
    wanted = run(module)[0]
    again = module.to_dense(torch.float32)
    assert again is module and type(again) is type(dense)
    assert list(again.state_dict()) == list(dense.state_dict()) and not list(again.buffers())
    assert vars(again).keys() == vars(dense).keys()
    torch.testing.assert_close(run(again)[0], wanted, rtol=1e-4, atol=1e-5)


def test_the_compute_dtype_is_that_of_the_products() -> None:
    narrow, _ = packed("mixtral.MixtralExperts", compute_dtype=torch.bfloat16)
    exact, _ = packed("mixtral.MixtralExperts")
    error = (run(narrow)[0] - run(exact)[0]).norm() / run(exact)[0].norm()
    assert error < 2e-2 and narrow.compute_dtype == torch.bfloat16 and exact.compute_dtype is None


def test_the_classes_that_stay_dense_are_those_that_the_page_names() -> None:
    found = set()
    for source in Path(transformers.models.__path__[0]).glob("*/modeling_*.py"):
        text = source.read_text(encoding="utf-8")
        for node in ast.parse(text).body if "Expert" in text else ():
            # Classes of experts with parameters of their own: others are made of layers, which are packed as such.
            if isinstance(node, ast.ClassDef) and "Expert" in node.name and "nn.Parameter(" in ast.unparse(node):
                found.add(node.name)
    packed_ones = {name.split(".")[1] for name in experts_classes()}
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    named = page.split("A warning names a class that stays dense:")[1].split(".\n")[0]
    assert found - packed_ones == set(re.findall(r"`(\w+)`", named))


def test_its_description_says_what_is_packed() -> None:
    module, _ = packed("mixtral.MixtralExperts")
    assert f"experts={EXPERTS}, out_features={HIDDEN}, in_features={INTERMEDIATE}, blocksize=64" in str(module)
    assert isinstance(module, NF4Experts) and "double_quant=True, 5." in str(module)
