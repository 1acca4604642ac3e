"""A method that minipeft does not know, in 40 lines, does all that its own methods do once it is registered."""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from processes import run_process
from tiny import some_ids, tiny_llama
from tiny_folder import save_model, write_jsonl
from torch import Tensor, nn

from minipeft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    get_peft_model_state_dict,
    methods,
    quantize_model,
)
from minipeft.adapter import AdapterModule, Method
from minipeft.commands.cli import main
from minipeft.compare.plan import plan_runs
from minipeft.nf4 import NF4Config
from minipeft.targets import match_targets

# -- the method: y = m * (W x), with a learned number m for each output feature of a linear layer


@dataclasses.dataclass
class ToyConfig(PeftConfig):
    target_modules: list[str] | str | None = None
    mergeable: ClassVar[bool] = True


class ToyLayer(AdapterModule):
    name_prefix: ClassVar[str] = "Toy"
    _own_attributes: ClassVar[tuple[str, ...]] = ("toy_scale",)

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "toy_scale"):
            self.toy_scale = nn.ParameterDict()

    def add_adapter(self, adapter: str, config: ToyConfig, path: str, dtype: torch.dtype, init: bool) -> None:
        self.toy_scale[adapter] = nn.Parameter(torch.ones(self.out_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if self.merged_adapters else self._scale(self.switch.acting))

    def _scale(self, adapters: tuple[str, ...]) -> Any:
        return math.prod(self.toy_scale[adapter] for adapter in adapters if adapter in self.toy_scale)

    def adapter_names(self) -> set[str]:
        return super().adapter_names() | set(self.toy_scale)

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        own = {"toy_scale": self.toy_scale[adapter]} if adapter in self.toy_scale else {}
        return {**super().adapter_state(adapter), **own}

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        if adapter in self.toy_scale:
            del self.toy_scale[adapter]

    def fold(self, adapters: tuple[str, ...]) -> None:
        super().fold(adapters)
        self._install("weight", self.weight * torch.as_tensor(self._scale(adapters)).view(-1, 1))


def find(model: nn.Module, config: ToyConfig, skip: list[str]) -> list[str]:
    return match_targets(model, config, lambda module: isinstance(module, nn.Linear), skip)


TOY = Method(find, mixin_for=lambda module: ToyLayer)

# -- the method ends here


def register_toy() -> None:
    """The entry point of a package that brings the method."""
    methods.register(
        "toy",
        config="test_registry:ToyConfig",
        attach=TOY,
        train_defaults={"target_modules": ["q_proj", "v_proj"]},
        compare_defaults={"lr": 1e-2},
    )


@pytest.fixture
def toy() -> Iterator[None]:
    register_toy()
    yield
    methods.unregister("toy")


def toy_model() -> Any:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), ToyConfig(target_modules=["q_proj", "v_proj"]))
    for tensor in get_peft_model_state_dict(model).values():
        tensor.data.add_(torch.randn_like(tensor))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(some_ids(2)).logits


def test_the_method_is_forty_lines() -> None:
    text = Path(__file__).read_text()
    lines = text.partition("-- the method: ")[2].partition("# -- the method ends here")[0].splitlines()[1:]
    assert len([line for line in lines if line.strip()]) <= 40


def test_it_trains_and_acts(toy: None) -> None:
    model = get_peft_model(tiny_llama(), ToyConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(model), logits(tiny_llama()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.self_attn.q_proj.toy_scale.default" for i in (0, 1)}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        losses.append(model(some_ids(2), labels=some_ids(2)).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert model.get_model_status().peft_types == {"default": "TOY"} and isinstance(model, PeftModel)


def test_it_is_saved_and_loaded(toy: None, tmp_path: Path) -> None:
    model = toy_model()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TOY"
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert isinstance(again.peft_config["default"], ToyConfig)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(tiny_llama()))


def test_it_merges_and_unloads(toy: None) -> None:
    model = toy_model()
    adapted, base = logits(model), logits(tiny_llama())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    torch.testing.assert_close(logits(toy_model().merge_and_unload(safe_merge=True)), adapted)
    assert torch.equal(logits(model.unload()), base) and type(model) is type(tiny_llama())


def test_it_acts_beside_lora(toy: None) -> None:
    model = toy_model()
    adapted = logits(model)
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    torch.testing.assert_close(logits(model), adapted)
    model.set_adapter(["default", "lora"])
    assert not torch.allclose(logits(model), adapted)
    model.delete_adapter("lora")
    torch.testing.assert_close(logits(model), adapted)


def test_it_acts_on_what_a_packed_model_leaves_dense(toy: None) -> None:
    packed = quantize_model(tiny_llama(), NF4Config(skip_modules=["q_proj"]))
    plain = get_peft_model(packed, ToyConfig(target_modules=["q_proj"])).merge_and_unload()
    assert not any("absmax" in name for name in plain.state_dict())


def test_refusals_name_the_method(toy: None) -> None:
    model = toy_model()
    with pytest.raises(ValueError, match=r"'default' acts on the whole batch .ToyConfig."):
        model(some_ids(1), adapter_names=["default"])
    with pytest.raises(ValueError, match=r"no LoRA adapter .ToyConfig.: only those combine"):
        model.add_weighted_adapter(["default"], [1.0], "new")
    with pytest.warns(PeftWarning, match="ToyConfig is for peft_type 'TOY'; the given 'LORA' is ignored"):
        assert ToyConfig(peft_type="LORA").peft_type == "TOY"


def test_the_commands_find_it(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["train", "--help"])
    assert "lora|qlora|bottleneck|prefix|prompt|trainable_tokens|toy" in printed.getvalue().replace("\n", "").replace(
        " ", ""
    )
    base = save_model(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "abc?", "completion": " cba"}] * 4)
    where = ["--model", str(base), "--data", str(data), "--output", str(tmp_path / "run")]
    assert main(["train", "--method", "toy", "--max-steps", "2", *where]) == 0, capsys.readouterr().err
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["target_modules"]) == ("TOY", ["q_proj", "v_proj"])
    run = next(run for run in plan_runs(None, None) if run.name == "toy")
    assert run.settings["lr"] == 1e-2


def test_the_command_line_finds_an_installed_method(tmp_path: Path) -> None:
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[minipeft.methods]\ntoy = test_registry:register_toy\n")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    command = [sys.executable, "-c", "from minipeft import methods; print(*methods.METHODS)"]
    printed = run_process(command, env={**os.environ, "PYTHONPATH": paths}, check=True)
    assert printed.stdout.split() == ["lora", "qlora", "bottleneck", "prefix", "prompt", "trainable_tokens", "toy"]


def test_import_strings_that_lead_nowhere_are_named() -> None:
    for where in ("no_such_module:ToyConfig", "test_registry:Nothing", "test_registry"):
        method = methods.Registration("toy", "TOY", config=where, attach=TOY)
        with pytest.raises(ValueError, match=f"method 'toy': config='{where}' leads nowhere"):
            method.load("config")


def test_a_config_of_no_registered_method_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="ToyConfig is the config of no registered method"):
        get_peft_model(model, ToyConfig(target_modules=["q_proj"]))
    assert type(model) is type(tiny_llama()) and all(p.requires_grad for p in model.parameters())


def test_an_entry_point_that_fails_is_named(tmp_path: Path) -> None:
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[minipeft.methods]\nbroken = math:no_such_function\n")
    command = [sys.executable, "-c", "from minipeft import methods; print(*methods.METHODS)"]
    printed = run_process(command, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "toy offers minipeft a method by the entry point broken = math:no_such_function" in printed.stderr
