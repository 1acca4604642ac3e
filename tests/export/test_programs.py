"""Programs made of adapted models: ONNX of a merged one, a shared library by AOTInductor, generation compiled once."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama

from minipeft import LoraConfig, NF4Config, get_peft_model, quantize_model

DOCS = Path(__file__).parents[2] / "docs" / "tools.md"
IDS = torch.tensor([[5, 9, 70, 71, 72], [7, 8, 3, 2, 1]])


def adapted(packed: bool = False) -> Any:
    base = tiny_llama(num_hidden_layers=1)
    base = quantize_model(base, NF4Config()) if packed else base
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, config).eval()


class Logits(torch.nn.Module):
    """A model as a function of token ids alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V)."""
        return self.model(input_ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_merged_model_runs_as_onnx_for_any_batch_and_length(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    model = adapted()
    with torch.no_grad():
        right = model(IDS).logits
    sizes = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("length", min=2, max=64)}
    merged = Logits(model.merge_and_unload())
    program = torch.onnx.export(merged, (IDS[:, :3],), dynamo=True, dynamic_shapes={"input_ids": sizes}, verbose=False)
    program.save(tmp_path / "merged.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "merged.onnx", providers=["CPUExecutionProvider"])
    for ids, expected in ((IDS, right), (IDS[:1], right[:1])):
        (logits,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


class Two(torch.nn.Module):
    """A linear layer that is adapted, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(128, 64), torch.nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 128) -> (B, 2)."""
        return self.second(self.first(x).relu())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_packed_model_is_a_library_of_aot_inductors_as_the_docs_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantize_model(Two(), NF4Config(skip_modules=["second"]))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["first"], init_lora_weights=False)).eval()
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (torch.randn(3, 128),), dynamic_shapes=sizes)
    (said,) = re.findall(r"```python\n(from minipeft.nf4.codes .*?)```", DOCS.read_text(), re.DOTALL)
    file = str(tmp_path / "model.pt2")
    exec(said, {"program": program, "file": file, "torch": torch})
    x = torch.randn(5, 128)
    torch.testing.assert_close(torch._inductor.aoti_load_package(file)(x), model(x))


def test_generation_with_a_static_cache_is_compiled_once() -> None:
    model, compiled = adapted(packed=True), []
    plain = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    # What transformers compiles by itself, it does on a GPU alone.
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    with torch.compiler.set_stance("default"):
        assert torch.equal(model.generate(IDS, **options, disable_compile=True), plain)
        assert len(compiled) == 2  # the prompt, and one token
        assert torch.equal(model.generate(IDS.flip(0), **options, disable_compile=True), plain.flip(0))
    assert len(compiled) == 2
