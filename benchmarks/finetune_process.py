"""One training run in a process of its own, so that the process's peak memory is the run's.

    python -m benchmarks.finetune_process '{"side": "minipeft", "base": FOLDER, ...}'

It imports what its side's user would, and nothing of the other. Printed is a line of JSON: peak memory in bytes, the
first step's loss.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.resident import resident_bytes

STEPS = 2


def main(text: str) -> None:
    """Load, attach the adapter, train, print."""
    settings: dict[str, Any] = json.loads(text)
    torch.set_num_threads(settings["threads"])
    dtype = getattr(torch, settings["dtype"])
    model = _model(settings, dtype)
    model.to(settings["device"]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.tensor(settings["ids"], device=settings["device"])
    losses = []
    for _ in range(STEPS):
        loss = (as_our_loop if settings["loop"] else as_user)(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    cuda = torch.device(settings["device"]).type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    print(json.dumps({"peak": peak, "loss": losses[0]}))


def as_user(model: Any, ids: Tensor) -> Tensor:
    """The mean loss as transformers' Trainer has it: the model's own."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def as_our_loop(model: Any, ids: Tensor) -> Tensor:
    """The mean loss as `minipeft train` has it."""
    # Here, so that a peer's process does not hold what it does not use.
    from minipeft.train.batches import Batch
    from minipeft.train.loss import token_loss_sum

    learned = ids.shape[0] * (ids.shape[1] - 1)
    return token_loss_sum(model, Batch({"input_ids": ids}, ids, ids.numel(), learned)) / learned


def _model(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    if settings["side"] == "minipeft":
        from minipeft import BitsAndBytesConfig, PeftModel
    else:
        from peft import PeftModel
        from transformers import BitsAndBytesConfig

    options = {"quantization_config": BitsAndBytesConfig(**_nf4(dtype))} if settings["kind"] == "nf4" else {}
    base = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=dtype, **options)
    return PeftModel.from_pretrained(base, settings["adapter"], is_trainable=True)


def _nf4(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


if __name__ == "__main__":
    main(sys.argv[1])
