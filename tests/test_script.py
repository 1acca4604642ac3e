"""The script that our users come with: written for PEFT, only the imports changed."""

import math
from pathlib import Path

import pytest
import torch
from tiny import some_ids, tiny_llama
from transformers import AutoModelForCausalLM

from minipeft import BitsAndBytesConfig, LoraConfig, get_peft_model, prepare_model_for_kbit_training


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("bits", [4, 16])
def test_qlora_training_script(bits: int, tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16, quantization_config=quantization if bits == 4 else None
    )
    model = prepare_model_for_kbit_training(model)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = some_ids(8, 24).split(2)

    def evaluate() -> float:
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return sum(model(input_ids=b, labels=b).loss.item() for b in batches) / len(batches)

    start = evaluate()
    assert start == pytest.approx(math.log(128), rel=0.1)
    model.train()
    for _ in range(10):
        for batch in batches:  # accumulation over 4 micro-batches
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss / len(batches)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate() < start - 0.3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)
