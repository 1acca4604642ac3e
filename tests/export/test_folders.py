"""Merged folders, as others read them: whole, and in 4 bits by bitsandbytes, without minipeft in the process."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ok
from processes import run_process
from tiny_folder import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minipeft import LoraConfig, get_peft_model

READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.startswith("minipeft") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
print(json.dumps([type(model.model.layers[0].mlp.up_proj).__module__, logits.float().tolist()]))
"""
IDS = [[5, 9, 70, 71, 72]]


@pytest.fixture
def base_and_adapter(tmp_path: Path) -> list[Any]:
    """Flags of a base with settings of its own for generation, and of an adapter over it."""
    # Rows of whole blocks: of others bitsandbytes decodes something else on a CPU than it quantized.
    save_model(tmp_path / "base", intermediate_size=128)
    GenerationConfig(temperature=0.3, top_k=7, do_sample=True, max_new_tokens=11).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return ["--model", tmp_path / "base", "--adapter", tmp_path / "adapter"]


def test_a_merged_folder_keeps_tokenizer_chat_template_and_generation_config(
    tmp_path: Path, base_and_adapter: list[Any]
) -> None:
    ok("merge", *base_and_adapter, "--output", tmp_path / "merged")
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("base", "merged"))
    chat = [{"role": "user", "content": "Hi \u00e9"}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    assert after("Hello \u00e9")["input_ids"] == before("Hello \u00e9")["input_ids"]
    assert (after.eos_token_id, after.pad_token_id) == (before.eos_token_id, before.pad_token_id)
    kept = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (kept.temperature, kept.top_k, kept.do_sample, kept.max_new_tokens) == (0.3, 7, True, 11)
    (tmp_path / "other.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    ok("merge", *base_and_adapter, "--output", tmp_path / "other", "--chat-template", tmp_path / "other.jinja")
    assert AutoTokenizer.from_pretrained(tmp_path / "other").apply_chat_template(chat, tokenize=False) == "[Hi \u00e9]"


def test_bitsandbytes_reads_a_folder_merged_in_4_bits(tmp_path: Path, base_and_adapter: list[Any]) -> None:
    ok("merge", *base_and_adapter, "--output", tmp_path / "packed", "--quantize", "nf4", "--requantize")
    done = run_process([sys.executable, "-c", READ, str(tmp_path / "packed"), json.dumps(IDS)])
    assert done.returncode == 0, done.stderr
    module, theirs = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("bitsandbytes.")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()(torch.tensor(IDS)).logits
    # It multiplies in bfloat16 where the processor does.
    assert (torch.tensor(theirs) - ours).abs().max() < 0.02 * ours.std()
