"""What a training step and a change of adapters cost, in counts that no load on the machine moves.

Bytes kept for backward, operations that torch runs, Python calls: a change that costs something shows here before it
does in a timing.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import some_ids, tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft import LoraConfig, get_peft_model
from minipeft.nf4 import NF4Config, quantize_model
from minipeft.train.batches import Batch
from minipeft.train.loss import token_loss_sum

RANK, TOKENS = 4, 32
HIDDEN, INTERMEDIATE = 64, 96
LINEAR_LAYERS = 7  # of a decoder layer


def llama(kind: str, layers: int = 2, adapted: bool = True) -> Any:
    model = tiny_llama(num_hidden_layers=layers).requires_grad_(False)
    if kind == "nf4":
        quantize_model(model, NF4Config())
    if adapted:
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    return model.train()


def kept_for_backward(model: nn.Module, compute: Callable[[], Tensor]) -> dict[int, int]:
    """Bytes of the storages that autograd keeps, but for the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = compute()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert result.requires_grad
    return {at: size for at, size in storages.items() if at not in own}


class Operations(TorchDispatchMode):
    """The names of the operations that run inside, those that compute nothing left out."""

    FREE = ("aten.promote_types", "aten.detach", "aten.view", "aten.expand")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith(self.FREE):
            self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_an_adapted_layer_is_one_operation_each_way_and_keeps_x_and_its_projection(kind: str) -> None:
    layer = llama(kind).model.layers[0].mlp.up_proj
    x = torch.randn(2, TOKENS // 2, HIDDEN, requires_grad=True)
    kept = kept_for_backward(layer, lambda: layer(x))
    assert sorted(kept.values()) == [TOKENS * RANK * 4, TOKENS * HIDDEN * 4]
    assert x.untyped_storage().data_ptr() in kept, "x itself, not a copy"
    with Operations() as forward:
        y = layer(x)
    with Operations() as backward:
        torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], torch.ones(y.shape))
    assert forward.names == ["minipeft.linear"]
    assert [n for n in backward.names if n != "aten.ones"] == ["minipeft.linear_backward"]


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_a_step_keeps_of_each_layer_what_the_base_does_and_four_more_things(kind: str) -> None:
    """The projections x A^T; and for dA the inputs that a frozen base forgets: of q, k, v; of gate, up; of down."""
    ids = some_ids(2, TOKENS // 2)

    def kept(model: Any, inputs: dict[str, Tensor]) -> int:
        batch = Batch(inputs, ids, ids.numel(), ids.numel() - 2)
        return sum(kept_for_backward(model, lambda: token_loss_sum(model, batch)).values())

    def of_a_layer(adapted: bool) -> int:
        sizes = []
        for layers in (1, 2):
            model = llama(kind, layers, adapted)
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            sizes.append(kept(model, {"input_ids": ids} if adapted else {"inputs_embeds": embedded}))
        return sizes[1] - sizes[0]

    more = 7 * RANK + 2 * HIDDEN + INTERMEDIATE
    assert of_a_layer(adapted=True) - of_a_layer(adapted=False) == TOKENS * 4 * more


def python_calls(run: Callable[[], Any]) -> int:
    """Calls of Python functions.

    Without those of the garbage collector, which has callbacks and its own time, and of dynamo, which follows the
    modules' lives once something was compiled.
    """
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call" and "_dynamo" not in frame.f_code.co_filename

    gc.disable()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Adapter second was active which is now deleted:UserWarning")
def test_attaching_saving_loading_and_switching_are_linear_in_the_modules(tmp_path: Path) -> None:
    calls: dict[str, list[int]] = {}
    # The first, small one pays for what is imported at first use.
    for layers in (2, 4, 8, 16):
        model = tiny_llama(num_hidden_layers=layers)
        doing: dict[str, Callable[[], Any]] = {
            "attach": lambda model=model: get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear")),
            "save": lambda model=model: model.save_pretrained(tmp_path),
            "load": lambda model=model: model.load_adapter(tmp_path, "second"),
            "switch": lambda model=model: model.set_adapter("second"),
            "load a third": lambda model=model: model.load_adapter(tmp_path, "third"),
            "delete": lambda model=model: model.delete_adapter("second"),
            "unload": lambda model=model: model.unload(),
        }
        for name, run in doing.items():
            calls.setdefault(name, []).append(python_calls(run))
    for name, (_, four, eight, sixteen) in calls.items():
        assert sixteen - eight <= 2.05 * (eight - four), f"{name}: {four}, {eight}, {sixteen} calls"
    # Some more than it was when each container became a module only once something was in it: what other tests leave
    # behind (callbacks on weak references) may call, too.
    at_most = {"attach": 340, "load": 270, "save": 140, "switch": 40, "delete": 30, "unload": 70}
    for name, limit in at_most.items():
        *_, eight, sixteen = calls[name]
        assert (sixteen - eight) / (8 * LINEAR_LAYERS) <= limit, f"{name}: Python calls of an adapted module"
    for second, third in zip(calls["load"][1:], calls["load a third"][1:], strict=True):
        assert third <= 1.01 * second, "an adapter's load does not pay for those that are there"
