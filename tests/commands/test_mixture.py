"""The whole job on a mixture of experts, from the command line: train in 4 bits, stop, resume, evaluate, merge."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_cli import RECORDS, ok, refused
from tiny_families import Family
from tiny_folder import byte_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

from minipeft.experts import has_interface
from minipeft.nf4.experts import NF4Experts
from minipeft.train.models import load_base_model
from minipeft.train.report import read_log

SIZES: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "num_experts": 4}
FAMILIES = {
    "qwen3_moe": Family("qwen3_moe", {**SIZES, "output_router_logits": True, "router_aux_loss_coef": 0.5}),
    "gpt_oss": Family("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("models") / request.param, byte_tokenizer()
    family = FAMILIES[request.param]
    words = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0}
    Family(family.model_type, {**family.changes, **words}).build().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_mixture_from_training_to_a_merged_model(mixture: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", RECORDS)
    run = ["train", "--model", mixture, "--method", "qlora", "--data", data, "--batch-size", "4", "--lr", "0.01"]
    run += ["--save-every", "2", "--gradient-checkpointing", "--log-every", "1"]
    ok(*run, "--output", tmp_path / "whole", "--max-steps", "4")
    ok(*run, "--output", tmp_path / "parts", "--max-steps", "4")
    ok(*run, "--output", tmp_path / "parts", "--max-steps", "4", "--resume", tmp_path / "parts" / "checkpoint-2")
    whole, parts = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    adapter = tmp_path / "whole" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert set(config["target_parameters"]) == {"gate_up_proj", "down_proj"}
    assert not {"gate", "router"} & set(config["target_modules"])

    packed = load_base_model(mixture, quantize="nf4")
    experts = [module for module in packed.modules() if has_interface(module)]
    assert len(experts) == 2 and all(isinstance(module, NF4Experts) for module in experts)
    ok("merge", "--model", mixture, "--quantize", "nf4", "--adapter", adapter, "--output", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, NF4Experts) for module in merged.modules())
    losses = [
        float(re.search(r"loss ([\d.]+)", ok("eval", *which, "--data", data))[1])  # type: ignore[index]
        for which in (
            ["--model", mixture, "--quantize", "nf4", "--adapter", adapter],
            ["--model", tmp_path / "merged"],
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] < whole[0]["loss"]


def test_a_choice_that_experts_cannot_have_is_refused_by_name(mixture: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", RECORDS)
    run = ["train", "--model", mixture, "--method", "qlora", "--data", data, "--output", tmp_path / "out"]
    said = refused(*run, "--method-args", "{use_dora: true}")
    assert "use_dora=True does not go with target_parameters" in said
    with pytest.warns(RuntimeWarning, match=r"target_parameters=\['nowhere'\] were set but no parameter was matched"):
        ok(*run, "--max-steps", "1", "--method-args", "{target_modules: [q_proj], target_parameters: [nowhere]}")
