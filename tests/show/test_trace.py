"""`minipeft trace`: one step by module and operation, beside counts that follow from the model."""

import json
from pathlib import Path

import pytest
from command_line import ok, refused
from tiny_folder import save_model

from minipeft.show.trace import Row, trace
from minipeft.train.config import TrainConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("trace") / "model", num_hidden_layers=3)


def calls(rows: list[Row], phase: str, module: str, operation: str) -> int:
    return sum(r.calls for r in rows if (r.phase, r.module, r.operation) == (phase, module, operation))


def test_operations_are_counted_under_the_module_that_asked(model):
    rows = trace(TrainConfig(str(model), "-", "-", "lora", {"target_modules": ["q_proj"]}), 2, 16)
    # Three layers: an adapted layer is one operation, with one backward; one that is not adapted is torch's.
    query, key = "model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj"
    assert calls(rows, "forward", query, "_Linear") == calls(rows, "backward", query, "_LinearBackward") == 3
    assert calls(rows, "forward", key, "aten::linear") == 3 and calls(rows, "forward", key, "_Linear") == 0
    # The first layer's input needs no gradient, so its key projection has no backward.
    assert calls(rows, "backward", key, "MmBackward0") == 2
    assert calls(rows, "update", "", "Optimizer.step#AdamW.step") == 1
    # What is left of the three: outputs of 2 x 16 x 64 numbers of 4 bytes, and x A^T for the backward pass, of rank 8.
    left = sum(r.nbytes for r in rows if (r.phase, r.module) == ("forward", query))
    assert left == 3 * 2 * 16 * (64 + 8) * 4
    assert {r.phase for r in rows} == {"forward", "backward", "update"}


def test_what_is_recomputed_is_of_its_module_in_the_backward_pass(model):
    settings = {"quantize": "nf4", "gradient_checkpointing": True}
    rows = trace(TrainConfig(str(model), "-", "-", "lora", {"target_modules": ["q_proj"]}, **settings), 2, 16)
    query = "model.layers.*.self_attn.q_proj"
    assert calls(rows, "forward", query, "_Linear") == calls(rows, "backward", query, "_Linear") == 3


def test_the_command_writes_a_table_a_page_and_a_trace(model, tmp_path):
    chrome, page = tmp_path / "trace.json", tmp_path / "page.html"
    asked = ("trace", model, "--method", "prefix", "--tokens", 12, "--batch", 2, "--device", "cpu")
    text = ok(*asked, "--rows", 5, "--chrome", chrome, "--html", page)
    assert "2 x 12 tokens" in text and "more rows" in text and "self_attn" in page.read_text()
    names = {event.get("name") for event in json.loads(chrome.read_text())["traceEvents"]}
    assert "module model.layers.2.self_attn.q_proj" in names and "phase backward" in names
    told = json.loads(ok(*asked, "--json"))
    assert told["phases"].keys() == {"forward", "backward", "update"}
    assert sum(told["phases"].values()) == pytest.approx(sum(row["milliseconds"] for row in told["rows"]))


def test_bad_input_is_one_sentence(model, tmp_path):
    assert "cannot write" in refused("trace", model, "--chrome", tmp_path / "no" / "trace.json")
    assert "device must be" in refused("trace", model, "--device", "tpu")
    assert "set --tokens to" in refused("trace", model, "--tokens", 99999)
    assert "no model" in refused("trace", tmp_path)
