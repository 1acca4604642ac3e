"""`minipeft diff`: beside numpy's singular value decomposition of the whole products."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ok, refused
from safetensors.torch import load_file, save_file
from tiny import randomize, tiny_gpt2, tiny_llama

from minipeft import BottleneckConfig, LoraConfig, get_peft_model
from minipeft.show.diff import angles, decompose, diff


def save(folder: Path, seed: int, model: Any = None, **settings: Any) -> dict[str, np.ndarray]:
    """An adapter with random factors in `folder`; its updates, which minipeft itself multiplies out."""
    model = get_peft_model(model or tiny_llama(), LoraConfig(**settings))
    randomize(model, seed)
    model.save_pretrained(folder)
    layers = {path: m for path, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {path: m.get_delta_weight("default").detach().double().numpy() for path, m in layers.items()}


def numpy_angles(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """By cosines alone, which are exact enough for angles that are not small."""
    return np.degrees(np.arccos(np.clip(np.linalg.svd(one.T @ two, compute_uv=False), -1, 1)))


def test_norms_spectra_and_angles_are_those_of_the_products(tmp_path):
    some = {"target_modules": ["q_proj", "down_proj"]}
    first = save(tmp_path / "a", 3, r=4, use_rslora=True, alpha_pattern={"layers.1.mlp.down_proj": 5}, **some)
    second = save(tmp_path / "b", 4, r=6, rank_pattern={"q_proj": 3}, **some)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert not found.alone and not found.tensors and {x.layer for x in found.layers} == first.keys()
    for x in found.layers:
        one, two = first[x.layer], second[x.layer]
        assert x.shape == one.shape
        assert x.norms == pytest.approx((np.linalg.norm(one), np.linalg.norm(two)), rel=1e-6)
        assert x.difference == pytest.approx(np.linalg.norm(one - two), rel=1e-6)
        assert x.cosine == pytest.approx((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-7)
        U, V = [], []
        for spectrum, dense in zip(x.spectra, (one, two), strict=True):
            u, s, vt = np.linalg.svd(dense)
            assert spectrum == pytest.approx(s[: len(spectrum)], rel=1e-5) and s[len(spectrum)] < 1e-6 * s[0]
            U.append(u[:, : len(spectrum)])
            V.append(vt[: len(spectrum)].T)
        assert x.output_angles == pytest.approx(numpy_angles(*U), abs=1e-3)
        assert x.input_angles == pytest.approx(numpy_angles(*V), abs=1e-3)
        assert len(x.input_angles) == min(map(len, x.spectra))


def test_angles_are_exact_near_0_and_90_degrees():
    turn = 1e-9
    one = torch.eye(4, 2, dtype=torch.float64)
    two = torch.tensor([[1.0, 0], [0, 0], [turn, 0], [0, 1]], dtype=torch.float64)
    assert angles(one, two) == pytest.approx([np.degrees(turn), 90.0], rel=1e-6)
    assert angles(one, one) == pytest.approx([0, 0], abs=1e-12)
    # A line within a plane, and a space of no dimension.
    assert angles(one, one[:, :1]) == pytest.approx([0], abs=1e-12) and angles(one, one[:, :0]) == []


def test_an_update_of_nothing_and_a_lower_rank_are_seen():
    A, B = torch.randn(3, 5, dtype=torch.float64), torch.zeros(7, 3, dtype=torch.float64)
    assert decompose(A, B).norm == 0 and decompose(A, B).U.shape == (7, 0)
    B[:, 0] = 1
    assert len(decompose(A, B).singular_values) == 1


def test_what_is_no_factor_is_compared_tensor_by_tensor_and_what_one_has_alone_is_told(tmp_path):
    model = tiny_llama()
    for folder, scale in (("a", 1.0), ("b", 3.0)):
        adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        head = adapted.lm_head.modules_to_save["default"].weight
        head.data.copy_(scale * model.lm_head.weight)
        adapted.save_pretrained(tmp_path / folder)
    (pair,) = diff(tmp_path / "a", tmp_path / "b").tensors
    norm = float(model.lm_head.weight.detach().double().norm())
    assert (*pair.norms, pair.difference) == pytest.approx((norm, 3 * norm, 2 * norm), rel=1e-6)

    save(tmp_path / "c", 1, target_modules=["q_proj", "v_proj"])
    alone = diff(tmp_path / "a", tmp_path / "c").alone
    assert any("v_proj is adapted by" in line for line in alone) and any("lm_head" in line for line in alone)

    for folder in ("e", "f"):
        get_peft_model(tiny_llama(), BottleneckConfig()).save_pretrained(tmp_path / folder)
    bottlenecks = diff(tmp_path / "e", tmp_path / "f")
    assert not bottlenecks.layers and bottlenecks.tensors


def test_the_command(tmp_path):
    for folder, seed in (("a", 1), ("b", 2)):
        save(tmp_path / folder, seed, r=4, target_modules=["q_proj"])
    text = ok("diff", tmp_path / "a", tmp_path / "b", "--html", tmp_path / "page.html")
    assert "model.layers.1.self_attn.q_proj" in text and "principal angles" in text
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2 and "http" not in page
    assert len(json.loads(ok("diff", tmp_path / "a", tmp_path / "b", "--json"))["layers"]) == 2
    save(tmp_path / "other", 1, tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    assert "nothing in common" in refused("diff", tmp_path / "a", tmp_path / "other")
    assert "no adapter at" in refused("diff", tmp_path / "a", tmp_path)
    file = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    for value, said in ((tensors[name].flatten(), "must be matrices"), (tensors[name] / 0, "NaN or infinity")):
        save_file(tensors | {name: value.contiguous()}, file)
        assert said in refused("diff", tmp_path / "a", tmp_path / "b")
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
    assert "only one of the factors" in refused("diff", tmp_path / "a", tmp_path / "b")
    file.write_bytes(b"abc")
    assert "cut off" in refused("diff", tmp_path / "a", tmp_path / "b")
