"""The command line, from its arguments to the files it leaves and the sentences it refuses with."""

import io
import json
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from command_line import ok, refused, run
from processes import run_process
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from tiny_folder import byte_tokenizer, save_model, write_jsonl
from tolerances import TOLERANCES
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from minipeft import PeftModel
from minipeft.commands import cli, others
from minipeft.commands.cli import main
from minipeft.commands.inspect import read_header
from minipeft.nf4 import NF4Linear
from minipeft.optim import PagingError
from minipeft.train.generation import sampling_config
from minipeft.train.run import hold_run

RECORDS = [{"prompt": f"{word}?", "completion": f" {word[::-1]}"} for word in ("abc", "cab", "bca", "acb") * 4]
QUICK = ["--max-steps", "6", "--lr", "0.02", "--batch-size", "4", "--method-args", "{r: 4, lora_alpha: 8}"]


def tree(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", RECORDS)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, base, data):
    output = tmp_path_factory.mktemp("runs") / "lora"
    printed = ok("train", "--model", base, "--method", "lora", "--data", data, "--output", output, *QUICK)
    return output, printed


@pytest.fixture(scope="module")
def adapter(lora_run):
    return lora_run[0] / "adapter"


def loss_of(*argv):
    return float(re.search(r"loss (\S+)", ok("eval", *argv)).group(1))


def logits(model, ids=((5, 9, 70, 71, 72),)):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits


# The commands


def test_train_saves_an_adapter_that_eval_finds_better_than_the_base(base, data, lora_run, adapter):
    assert (adapter / "adapter_model.safetensors").is_file()
    assert "trainable params" in lora_run[1] and str(adapter) in lora_run[1]
    # The data are prompts and completions, which no chat template saw.
    assert f"--adapter {adapter} --raw --prompt" in lora_run[1]
    before = loss_of("--model", base, "--data", data)
    assert loss_of("--model", base, "--adapter", adapter, "--data", data) < before - 0.5


def test_train_qlora_trains_on_a_packed_base(base, data, tmp_path):
    ok("train", "--model", base, "--method", "qlora", "--data", data, "--output", tmp_path / "run", *QUICK)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert settings["quantize"] == "nf4"
    where = ["--model", base, "--quantize", "nf4", "--data", data]
    assert loss_of(*where, "--adapter", tmp_path / "run" / "adapter") < loss_of(*where) - 0.5


@pytest.mark.parametrize("quantize", [(), ("--quantize", "nf4")])
def test_train_bottleneck(quantize, base, data, tmp_path):
    settings = ["--max-steps", "10", "--lr", "0.02", "--batch-size", "4", *quantize]
    arguments = ["--method-args", "{mh_adapter: true, bottleneck_size: 8, scaling: learned}"]
    where = ["--model", base, "--data", data, *quantize]
    ok("train", *where, "--method", "bottleneck", "--output", tmp_path / "run", *settings, *arguments)
    adapter = tmp_path / "run" / "adapter"
    values = json.loads((adapter / "adapter_config.json").read_text())
    assert (values["peft_type"], values["target_modules"]) == ("BOTTLENECK", ["self_attn", "mlp"])
    assert loss_of(*where, "--adapter", adapter) < loss_of(*where) - 0.5
    sentence = refused("merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "merged", *quantize)
    assert "cannot be merged: Bottleneck changes more than the weights" in sentence
    assert "BOTTLENECK" in ok("inspect", adapter)


VIRTUAL = {
    "prefix": ("PREFIX_TUNING", "{num_virtual_tokens: 4}"),
    "prefix_projection": ("PREFIX_TUNING", "{num_virtual_tokens: 4, prefix_projection: true}"),
    "prompt": ("PROMPT_TUNING", "{num_virtual_tokens: 4}"),
    "prompt_text": ("PROMPT_TUNING", "{num_virtual_tokens: 4, prompt_tuning_init_text: 'a'}"),
}


@pytest.mark.parametrize("case", VIRTUAL)
def test_train_virtual_tokens_and_resume(case, base, data, tmp_path):
    kind, method_args = VIRTUAL[case]
    where = ["--model", base, "--data", data]
    arguments = ["train", *where, "--method", case[:6], "--method-args", method_args, "--output", tmp_path / "run"]
    settings = ["--max-steps", "6", "--lr", "0.1", "--batch-size", "4", "--save-every", "3"]
    ok(*arguments, *settings)
    adapter = tmp_path / "run" / "adapter"
    assert loss_of(*where, "--adapter", adapter) < loss_of(*where) - 0.05
    assert f"{kind} adapter" in ok("inspect", adapter)
    ok("generate", "--model", base, "--adapter", adapter, "--prompt", "ab", "--max-new-tokens", "2")
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(adapter)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    ok(*arguments, *settings, "--resume")
    assert (adapter / "adapter_model.safetensors").read_bytes() == whole


def started(tmp_path, base, data, method, arguments="{num_virtual_tokens: 5}"):
    """The adapter as it was before the first step: the learning rate is 0."""
    where = ["train", "--model", base, "--data", data, "--output", tmp_path / "run"]
    printed = ok(*where, "--method", method, "--method-args", arguments, "--lr", "0", "--max-steps", "1")
    return load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")["prompt_embeddings"], printed


def test_a_prefix_starts_from_the_first_tokens_of_the_data(base, data, tmp_path):
    prefix, printed = started(tmp_path, base, data, "prefix")
    assert "the prefix starts from the first 5 tokens of the data" in printed
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    text = "".join(record["prompt"] + record["completion"] for record in RECORDS[:1])
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :5]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    both = [states[0] for layer in cache.layers for states in (layer.keys, layer.values)]  # each (heads, 5, head_dim)
    expected = torch.cat([states.permute(1, 0, 2).flatten(1) for states in both], dim=1)
    torch.testing.assert_close(prefix, expected, **TOLERANCES[torch.float32])


def test_a_projected_prefix_starts_from_zero(base, data, tmp_path):
    prefix, _ = started(tmp_path, base, data, "prefix", "{num_virtual_tokens: 5, prefix_projection: true}")
    assert prefix.shape[0] == 5 and not prefix.any()


def test_a_prompt_starts_from_words_of_the_vocabulary_or_of_a_text(base, data, tmp_path):
    words = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    prompt, _ = started(tmp_path, base, data, "prompt")
    found = [(words == row).all(dim=1).nonzero().flatten().tolist() for row in prompt]
    assert all(len(places) == 1 for places in found) and len({places[0] for places in found}) > 1
    (tmp_path / "text").mkdir()
    text = "{num_virtual_tokens: 5, prompt_tuning_init_text: 'ab'}"
    prompt, _ = started(tmp_path / "text", base, data, "prompt", text)
    a, b = AutoTokenizer.from_pretrained(base)("ab").input_ids
    assert torch.equal(prompt, words[[a, b, a, b, a]])


def test_flags_win_over_the_yaml_file(base, data, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {base}\ndata: {data}\nmax_steps: 50\nlr: 1e-3\nmethod_args: {{r: 2}}\n")
    ok("train", "--config", config, "--output", tmp_path / "run", "--max-steps", "1")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (settings["max_steps"], settings["lr"]) == (1, 1e-3)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_resume_goes_on_to_the_same_adapter(base, data, lora_run, tmp_path):
    arguments = ["train", "--model", base, "--data", data, "--output", tmp_path / "run", *QUICK, "--save-every", "3"]
    ok(*arguments)
    # As a run looks that was killed after its checkpoint at step 3.
    for name in ("adapter", "checkpoint-6"):
        for file in (tmp_path / "run" / name).iterdir():
            file.unlink()
        (tmp_path / "run" / name).rmdir()
    ok(*arguments, "--resume")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run/adapter" / weights).read_bytes() == (lora_run[0] / "adapter" / weights).read_bytes()


def test_generate_uses_the_chat_template_unless_raw(base, tmp_path):
    chat = ok("generate", "--model", base, "--prompt", "ab?", "--max-new-tokens", "8")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()

    def greedy(text):
        ids = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) + "\n"

    assert chat == greedy("<|im_start|>user\nab?<|im_end|>\n<|im_start|>assistant\n")
    raw = ok("generate", "--model", base, "--prompt", "ab?", "--max-new-tokens", "8", "--raw")
    assert raw == greedy("ab?")
    assert raw != chat
    system = ok("generate", "--model", base, "--prompt", "ab?", "--max-new-tokens", "8", "--system", "cd")
    expected = "<|im_start|>system\ncd<|im_end|>\n<|im_start|>user\nab?<|im_end|>\n<|im_start|>assistant\n"
    assert system == greedy(expected)


def test_the_likeliest_token_is_taken_whatever_search_the_model_is_set_to() -> None:
    model = tiny_llama().eval()
    config = sampling_config(max_new_tokens=5)
    plain = model.generate(torch.ones(1, 3, dtype=torch.long), generation_config=config, pad_token_id=0)
    model.generation_config.penalty_alpha = 0.6
    again = model.generate(torch.ones(1, 3, dtype=torch.long), generation_config=config, pad_token_id=0)
    assert torch.equal(plain, again)


def test_generate_draws_the_same_for_the_same_seed(base):
    arguments = ["generate", "--model", base, "--prompt", "ab", "--temperature", "2", "--max-new-tokens", "16"]
    first = ok(*arguments, "--seed", "1")
    assert first == ok(*arguments, "--seed", "1")
    assert first != ok(*arguments, "--seed", "2")


def test_generate_reads_standard_input_and_streams(base, monkeypatch):
    arguments = ["generate", "--model", base, "--raw", "--max-new-tokens", "8"]
    whole = ok(*arguments, "--prompt", "ab?")
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab?"))
    assert ok(*arguments, "--prompt", "-", "--stream") == whole


def test_a_prompt_from_standard_input_that_is_not_utf8(base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "standard input is not UTF-8" in refused("generate", "--model", base, "--prompt", "-")


def test_the_adapter_changes_what_is_generated(base, adapter):
    arguments = ["generate", "--model", base, "--raw", "--prompt", "abc?", "--max-new-tokens", "8"]
    assert ok(*arguments, "--adapter", adapter) != ok(*arguments)


def test_merge_writes_a_plain_model_with_the_same_logits(base, adapter, tmp_path):
    printed = ok("merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "merged")
    assert "32-bit (float32)" in printed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    torch.testing.assert_close(logits(merged), logits(adapted), **TOLERANCES[torch.float32])
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").decode([5]) is not None


def test_merge_says_whether_the_result_is_16_bit_or_nf4(base, adapter, tmp_path):
    where = ["merge", "--model", base, "--adapter", adapter, "--quantize", "nf4", "--dtype", "bfloat16"]
    assert "16-bit (bfloat16)" in ok(*where, "--output", tmp_path / "dense")
    assert "NF4" in ok(*where, "--requantize", "--output", tmp_path / "packed")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert not any(isinstance(module, NF4Linear) for module in dense.modules())
    assert any(isinstance(module, NF4Linear) for module in packed.modules())


def test_a_packed_model_needs_no_bitsandbytes(base, adapter, data, tmp_path):
    where = ["merge", "--model", base, "--adapter", adapter, "--quantize", "nf4", "--requantize"]
    ok(*where, "--output", tmp_path / "packed")
    code = (
        "import sys; sys.modules['bitsandbytes'] = None; from minipeft.commands.cli import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["eval", "--model", str(tmp_path / "packed"), "--data", str(data)]
    done = run_process([sys.executable, "-c", code, *arguments])
    assert done.returncode == 0, done.stderr
    assert done.stdout == ok(*arguments)


def test_inspect_tells_adapters_runs_checkpoints_and_models_apart(base, lora_run, adapter):
    about = ok("inspect", adapter)
    values = sum(t.numel() for t in _tensors(adapter).values())
    assert "LORA adapter" in about and f"{values:,} in " in about
    assert re.search(r"q_proj\.lora_A\.weight\s+\[4, 64\] F32", about)
    total = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert f"{100 * values / (total + values):.3f} % of {total + values:,}" in about
    assert "training run" in ok("inspect", lora_run[0])
    checkpoint = ok("inspect", lora_run[0] / "checkpoint-6")
    assert re.search(r"checkpoint of a training run\n +steps done +6\n", checkpoint) and "LORA adapter" in checkpoint
    model = ok("inspect", base)
    assert "LlamaForCausalLM" in model and f"{total:,}" in model


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_inspect_counts_the_values_of_packed_weights(base, adapter, tmp_path):
    where = ["merge", "--model", base, "--adapter", adapter, "--quantize", "nf4", "--requantize"]
    ok(*where, "--output", tmp_path / "packed")
    total = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert f"{total:,}" in ok("inspect", tmp_path / "packed")


def test_inspect_knows_the_bytes_of_every_dtype(tmp_path):
    names = ("bool", "uint8", "int16", "float16", "bfloat16", "int32", "float32", "int64", "float64", "float8_e4m3fn")
    tensors = {name: torch.zeros(3, 5, dtype=getattr(torch, name)) for name in names}
    save_file(tensors, tmp_path / "all.safetensors")
    found = read_header(tmp_path / "all.safetensors")
    assert {name: (info.shape, info.nbytes) for name, info in found.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
    }


# What is refused


def test_commands_of_other_methods_are_absent(base, data, tmp_path):
    said = refused("train", "--model", base, "--data", data, "--output", tmp_path / "o", "--method", "ia3")
    assert "'ia3'" in said and "lora, qlora" in said


def test_targets_and_operations_that_are_none():
    assert "target must be one of sm_80" in refused("kernels", "--target", "sm_99")
    assert "'nope'" in refused("bench", "nope")


@pytest.mark.parametrize("command", ["train", "eval", "generate", "merge"])
def test_a_model_path_that_is_none(command, data, adapter, tmp_path):
    more = {
        "train": ["--data", data, "--output", tmp_path / "o"],
        "eval": ["--data", data],
        "generate": ["--prompt", "a"],
        "merge": ["--adapter", adapter, "--output", tmp_path / "o"],
    }[command]
    empty = tmp_path / "nothing"
    assert str(empty) in refused(command, "--model", empty, *more)
    empty.mkdir()
    assert "config.json" in refused(command, "--model", empty, *more)
    assert tree(tmp_path) == [Path("nothing")]


def test_an_adapter_for_another_base(adapter, data, tmp_path):
    other = save_model(tmp_path / "other", hidden_size=32, intermediate_size=48)
    for command in (["eval", "--data", data], ["generate", "--prompt", "a"], ["merge", "--output", tmp_path / "o"]):
        where = ["--model", other, "--adapter", adapter]
        assert "was trained on" in refused(*command, *where)
        said = refused(*command, *where, "--any-base")
        assert "does not fit this model" in said and "lora_A" in said
    deeper = save_model(tmp_path / "deeper", num_hidden_layers=3)
    said = refused("eval", "--data", data, "--model", deeper, "--adapter", adapter, "--any-base")
    assert "missing tensors" in said
    twin = save_model(tmp_path / "twin")
    assert "was trained on" in refused("eval", "--data", data, "--model", twin, "--adapter", adapter)
    assert "perplexity" in ok("eval", "--data", data, "--model", twin, "--adapter", adapter, "--any-base")
    assert tree(tmp_path / "o") == []


def test_a_place_without_an_adapter_names_the_one_inside(base, lora_run, tmp_path):
    said = refused("generate", "--prompt", "a", "--model", base, "--adapter", lora_run[0])
    assert f"there is one in {lora_run[0] / 'adapter'}" in said
    assert "no adapter at" in refused("generate", "--prompt", "a", "--model", base, "--adapter", tmp_path)


def test_a_damaged_adapter(base, adapter, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = refused("generate", "--prompt", "a", "--model", base, "--adapter", tmp_path)
    assert "damaged" in said
    assert "cut off" in refused("inspect", tmp_path)


def test_wrong_target_names_list_the_near_ones(base, data, tmp_path):
    arguments = ["train", "--model", base, "--data", data, "--output", tmp_path / "o"]
    assert "q_proj" in refused(*arguments, "--method-args", "{target_modules: [q_prj]}")
    assert "LoraConfig has no argument 'rank'; did you mean rank_pattern" in refused(
        *arguments, "--method-args", "{rank: 8}"
    )
    assert "method_args" in refused(*arguments, "--method-args", "{r: 0}")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json}", "invalid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"prompt": "a"}', "completion"),
        ('{"text": 3}', "string"),
        ('{"question": "a"}', '{"text"}'),
        ('{"text": "a", "id": ' + "9" * 5000 + "}", "a number of too many digits"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(line, expected, base, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "fine"}\n' + line + "\n")
    for arguments in (["train", "--output", tmp_path / "o"], ["eval"]):
        said = refused(*arguments, "--model", base, "--data", data)
        assert f"{data}:2: " in said and expected in said
    assert tree(tmp_path) == [Path("bad.jsonl")]


def test_no_data(base, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for arguments in (["train", "--output", tmp_path / "o"], ["eval"]):
        assert "data set is empty" in refused(*arguments, "--model", base, "--data", empty)
        assert "No such file" in refused(*arguments, "--model", base, "--data", tmp_path / "none.jsonl")
    assert tree(tmp_path) == [Path("empty.jsonl")]


def test_a_sequence_longer_than_the_model(base, data, tmp_path):
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "a"}, {"text": "b" * 300}])
    for arguments in (["train", "--output", tmp_path / "o"], ["eval"]):
        said = refused(*arguments, "--model", base, "--data", long)
        assert f"{long}:2: " in said and "301 tokens" in said
        said = refused(*arguments, "--model", base, "--data", data, "--max-length", "257")
        assert "max_position_embeddings (256)" in said
    said = refused("generate", "--model", base, "--raw", "--prompt", "a" * 200, "--max-new-tokens", "57")
    assert "200 tokens" in said and "(256)" in said
    assert "1 of 2 records" in ok("eval", "--model", base, "--data", long, "--too-long", "drop")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A model with a learned table of 64 positions."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tokenizer = byte_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "method", "room"),
    [
        *(("base", "prompt", 236), ("base", "prefix", 256), ("base", "lora", 256)),
        *(("gpt2", "prompt", 44), ("gpt2", "prefix", 44), ("gpt2", "bottleneck", 64)),
    ],
)
def test_virtual_tokens_take_their_positions_from_the_text(model, method, room, tmp_path, request):
    where = ["--model", request.getfixturevalue(model)]
    # One token a byte, and the end token.
    fits, longer = (write_jsonl(tmp_path / f"{n}.jsonl", [{"text": "b" * n}]) for n in (room - 1, room))
    train = ["train", *where, "--method", method, "--max-steps", "1", "--output"]
    said = refused(*train, tmp_path / "o", "--data", longer)
    assert f"{room + 1} tokens, more than max_length ({room})" in said
    said = refused(*train, tmp_path / "o", "--data", fits, "--max-length", room + 1)
    assert f"set max_length to {room} or less" in said
    ok(*train, tmp_path / "run", "--data", fits)
    adapter = ["--adapter", tmp_path / "run" / "adapter"]
    assert f"{room + 1} tokens" in refused("eval", *where, *adapter, "--data", longer)
    assert "loss" in ok("eval", *where, *adapter, "--data", fits)
    prompt = ["generate", *where, *adapter, "--raw", "--max-new-tokens", "4", "--prompt"]
    assert "together more than the model's max_position_embeddings" in refused(*prompt, "a" * (room - 3))
    ok(*prompt, "a" * (room - 4))


def test_virtual_tokens_without_room_for_a_text(gpt2, data, tmp_path):
    where = ["train", "--model", gpt2, "--data", data, "--output", tmp_path / "o", "--method", "prefix"]
    said = refused(*where, "--method-args", "{num_virtual_tokens: 64}")
    assert "64 virtual tokens leave no room for a text" in said


def test_output_directories(base, data, lora_run, adapter, tmp_path):
    train = ["train", "--model", base, "--data", data]
    merge = ["merge", "--model", base, "--adapter", adapter]
    demo = ["demo", "--model", base, "--data", data]
    for command in (train, merge, demo):
        said = refused(*command, "--output", tmp_path / "no" / "such")
        assert f"parent directory {tmp_path / 'no'} does not exist" in said
        assert "not a directory" in refused(*command, "--output", data)
    assert "already holds a run" in refused(*train, "--output", lora_run[0])
    for command in (merge, demo):
        assert "not empty" in refused(*command, "--output", lora_run[0])
    assert "nothing to resume" in refused(*train, "--output", tmp_path, "--resume")
    assert tree(tmp_path) == []


def test_bad_yaml(base, data, tmp_path):
    config = tmp_path / "run.yaml"
    arguments = ["train", "--model", base, "--data", data, "--output", tmp_path / "o", "--config", config]
    assert "cannot read" in refused(*arguments)
    config.write_text("learning_rate: 1\n")
    assert "unknown setting 'learning_rate'" in refused(*arguments)
    config.write_text("batch_size: many\n")
    assert "'batch_size'" in refused(*arguments)
    config.write_text("lr: [1\n")
    assert "not valid YAML" in refused(*arguments)
    assert "missing setting" in refused("train", "--model", base)
    assert tree(tmp_path) == [Path("run.yaml")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["generate", "--model", "m"], "--prompt"),
        (["generate", "--model", "m", "--prompt", "a", "--top-p", "2"], "top_p must be in (0, 1]"),
        (["generate", "--model", "m", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens"),
        (
            ["eval", "--model", "m", "--data", "d", "--batch-size", "0"],
            "must be a whole number of 1 or greater, got '0'",
        ),
        (["demo", "--steps", "none"], "argument --steps: must be a whole number"),
        (["demo", "--seed", "-1"], "argument --seed"),
        (["generate", "--model", "m", "--prompt", "a", "--seed", str(2**63)], "below 2**63"),
        (["generate", "--model", "m", "--prompt", "a", "--seed", "9" * 5000], "below 2**63"),
        (["generate", "--model", "m", "--prompt", "a", "--temperature", "1e-300"], "temperature must be 0, or 1e-06"),
        (["generate", "--model", "", "--prompt", "a"], "argument --model: must not be empty"),
        (["eval", "--model", "m", "--data", ""], "argument --data: must not be empty"),
        (["train", "--model", "m", "--data", "d", "--output", ""], "argument --output: must not be empty"),
        (["merge", "--model", "m", "--adapter", "a", "--output", ""], "argument --output: must not be empty"),
        (["inspect", "no/such/place"], "does not exist"),
        (["inspect", "x", "--wat"], "--wat"),
    ],
)
def test_a_wrong_command_line(arguments, expected):
    assert expected in refused(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_device_that_there_is_not(base, data, tmp_path):
    for arguments in (["train", "--output", tmp_path / "o"], ["eval"]):
        cases = {"cuda": "torch sees no CUDA device"}
        for device, expected in (cases | dict.fromkeys(("gpu", "mps", "meta"), "device must be auto")).items():
            assert expected in refused(*arguments, "--model", base, "--data", data, "--device", device)
    assert tree(tmp_path) == []


def test_an_empty_prompt_and_a_missing_chat_template(base, tmp_path):
    assert "prompt is empty" in refused("generate", "--model", base, "--raw", "--prompt", "")
    plain = save_model(tmp_path / "plain", chat=False)
    assert "no chat template" in refused("generate", "--model", plain, "--system", "s", "--prompt", "a")
    assert ok("generate", "--model", plain, "--prompt", "a", "--max-new-tokens", "4")


def test_requantize_needs_a_packed_base(base, adapter, tmp_path):
    where = ["merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "o"]
    assert "--requantize needs a 4-bit base" in refused(*where, "--requantize")
    assert tree(tmp_path) == []


def test_inspect_refuses_what_is_nothing_of_ours(tmp_path):
    assert "no adapter, checkpoint, run or model" in refused("inspect", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "not valid JSON" in refused("inspect", tmp_path)
    assert "is a file" in refused("inspect", tmp_path / "adapter_config.json")


@pytest.fixture
def small_files():
    """Files of 20 kB at most, which stops a writer as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(base, adapter, small_files, tmp_path):
    said = refused("merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "merged")
    assert "File too large" in said
    assert tree(tmp_path) == []


def test_a_merged_model_is_as_readable_as_any_new_file(base, adapter, tmp_path):
    ok("merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "merged")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_text_that_the_terminal_cannot_show_is_printed_with_replacements(stream, base, monkeypatch):
    arguments = ["generate", "--model", str(base), "--raw", "--prompt", "ab?", "--temperature", "3", *stream]
    whole = ok(*arguments)
    assert not whole.isascii()
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(arguments) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == whole.encode("ascii", errors="replace")


WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [("lack", f"{WEIGHT}"), ("shape", f"{WEIGHT}.*5, 64.*96, 64"), ("norm", "model.norm.weight")],
)
def test_a_base_without_all_its_weights(method, change, expected, base, data, tmp_path):
    damaged = shutil.copytree(base, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    removed = weights.pop("model.norm.weight" if change == "norm" else WEIGHT)
    if change == "shape":
        weights[WEIGHT] = removed[:5].clone()
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    said = refused("train", "--model", damaged, "--data", data, "--output", tmp_path / "o", "--method", method, *QUICK)
    assert re.search(expected, said)
    assert not (tmp_path / "o").exists()


def test_weights_that_nf4_cannot_hold_are_named(base, data, tmp_path):
    damaged = shutil.copytree(base, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights[WEIGHT][3, 4] = float("nan")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    said = refused("train", "--model", damaged, "--data", data, "--output", tmp_path / "o", "--method", "qlora")
    assert f"{WEIGHT}: NF4 needs finite weights" in said and "(3, 4) is nan" in said


def test_a_base_without_a_tokenizer_says_what_is_missing(base, data, tmp_path):
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    said = refused("eval", "--model", bare, "--data", data)
    assert f"cannot load a tokenizer from {bare}: " in said and "`tokenizers` library serialization file" in said


def test_a_second_run_in_the_same_directory(base, data, lora_run, monkeypatch):
    monkeypatch.setattr("minipeft.train.load_base_model", None)
    arguments = ["train", "--model", base, "--data", data, "--output", lora_run[0], *QUICK]
    with hold_run(lora_run[0]):
        for resume in ((), ("--resume",)):
            assert f"another process is training in {lora_run[0]}" in refused(*arguments, *resume)
    with hold_run(lora_run[0]):
        pass


@pytest.mark.parametrize(
    ("package", "flags", "expected"),
    [
        ("matplotlib", ["--plot"], "needs matplotlib"),
        ("torch.utils.tensorboard", ["--tensorboard"], "package tensorboard"),
        ("none", ["--scheduler-args", "{nope: 1}", "--scheduler", "cosine"], "refuses scheduler_args"),
        ("none", ["--optimizer-args", "{host_budget: 1e9}"], "adamw takes no optimizer_args"),
        ("none", ["--optimizer", "paged_adamw", "--optimizer-args", "{hots_budget: 1}"], "unknown optimizer_args"),
        ("none", ["--optimizer", "paged_adamw_8bit", "--optimizer-args", "{page_bytes: 5}"], "page_bytes"),
        ("none", ["--loraplus-lr-ratio", "4", "--method", "prompt"], "loraplus_lr_ratio is for LoRA"),
    ],
)
def test_extras_schedules_and_optimizers_are_checked_before_the_model_is_loaded(
    package, flags, expected, base, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("minipeft.train.load_base_model", None)
    said = refused("train", "--model", base, "--data", data, "--output", tmp_path / "o", *flags)
    assert expected in said
    assert tree(tmp_path) == []


def test_an_output_that_cannot_be_written_is_refused_at_once(base, data, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    for command in (["train", "--data", data], ["merge", "--adapter", adapter], ["demo"]):
        assert f"cannot write in {tmp_path}" in refused(*command, "--model", base, "--output", tmp_path / "o")


# Bugs, interruptions, debugging


@pytest.mark.parametrize("bug", [ValueError("a bug"), TypeError("a bug"), RuntimeError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(bug, monkeypatch):
    def broken(args):
        raise bug

    monkeypatch.setattr(others, "inspect", broken)
    with pytest.raises(type(bug), match="a bug"):
        main(["inspect", "x"])


def test_debug_shows_the_traceback_of_a_users_error(monkeypatch):
    with pytest.raises(cli.TrainingError, match="does not exist"):
        main(["inspect", "no/such/place", "--debug"])
    monkeypatch.setenv("MINIPEFT_DEBUG", "1")
    with pytest.raises(cli.TrainingError, match="does not exist"):
        main(["inspect", "no/such/place"])


@pytest.mark.parametrize(
    ("raised", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "minipeft: interrupted\n"),
        (cli.TrainingInterrupted("stopped at 3", Path("c"), 3), 130, "minipeft: stopped at 3\n"),
        (OSError(28, "No space left on device"), 2, "minipeft: error: [Errno 28] No space left on device\n"),
        (torch.OutOfMemoryError("CUDA"), 2, "out of memory"),
        (SafetensorError("No space left on device"), 2, "minipeft: error: No space left on device\n"),
        (PagingError("no room in spill_dir"), 2, "minipeft: error: no room in spill_dir\n"),
    ],
)
def test_interruptions_and_the_machines_limits(raised, code, expected, monkeypatch):
    def stopped(args):
        raise raised

    monkeypatch.setattr(others, "inspect", stopped)
    got, _, err = run("inspect", "x")
    assert got == code and expected in err


def test_the_installed_command_in_a_process_of_its_own(tmp_path):
    def minipeft(*argv):
        return run_process([sys.executable, "-m", "minipeft.commands.cli", *argv])

    helped = minipeft("--help")
    assert helped.returncode == 0
    assert all(name in helped.stdout for name in ("train", "demo", "eval", "generate", "merge", "inspect"))
    failed = minipeft("inspect", str(tmp_path / "none"))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == f"minipeft: error: {tmp_path / 'none'} does not exist\n"
    helped = " ".join(minipeft("train", "--help").stdout.split())
    assert "--method-args" in helped
    # Every setting that has a default says it.
    for said in ("peak learning rate (default: 0.0002)", "warmup_stable_decay) (default: linear)"):
        assert said in helped
    assert "to save memory (default: no)" in helped and "newest N checkpoints (null: all) (default: 2)" in helped


@pytest.mark.parametrize("during", ["minipeft.commands.cli", "yaml", "torch", "transformers.models.auto"])
def test_ctrl_c_while_modules_are_imported_ends_without_a_traceback(during, base, data):
    code = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {during!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from minipeft.__main__ import main
sys.exit(main())
"""
    command = [sys.executable, "-c", code, "eval", "--model", str(base), "--data", str(data)]
    done = run_process(command)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "minipeft: interrupted\n")
    if during == "yaml":
        # Started in a script's background, Ctrl-C is not meant for it.
        ignoring = run_process(command, ignoring=[signal.SIGINT])
        assert ignoring.returncode == 0 and ignoring.stdout, ignoring.stderr


def test_show_data_prints_what_is_learned_and_trains_nothing(base, tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text(
        json.dumps({"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]}) * 1
    )
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
                        "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    run_dir = tmp_path / "run"
    said = ok(
        "train", "--model", base, "--data", file, "--output", run_dir, "--chat-template", template, "--show-data", "3"
    )
    assert "1: " in said and ">>>" in said and said.count("<<<") == 2 and not run_dir.exists()
    learned = said.rpartition(">>>")[2].partition("<<<")[0]
    assert "ba" in learned.replace(" ", "") and "ab" not in learned.replace(" ", "")
    missing = refused("train", "--model", base, "--data", file, "--output", run_dir, "--chat-template", tmp_path / "no")
    assert "chat_template" in missing and "no" in missing


def test_train_goes_on_with_an_adapter(base, data, lora_run, adapter, tmp_path):
    before = loss_of("--model", base, "--adapter", adapter, "--data", data)
    settings = ["--data", data, "--max-steps", "10", "--lr", "0.01", "--batch-size", "4"]
    ok("train", "--model", base, "--adapter", adapter, "--output", tmp_path / "one", *settings)
    # The same by the adapter alone, which knows its base.
    ok("train", "--model", adapter, "--output", tmp_path / "two", *settings)
    tensors = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    started = load_file(adapter / "adapter_model.safetensors")
    assert any(not torch.equal(started[name], tensors[0][name]) for name in started)
    assert loss_of("--model", base, "--adapter", tmp_path / "one" / "adapter", "--data", data) < before
    where = ["--model", base, "--adapter", adapter, "--output", tmp_path / "three", *settings]
    assert "cannot change" in refused("train", *where, "--method-args", "{r: 3}")
    assert "is a LORA: take --method lora or qlora" in refused("train", *where, "--method", "prefix")
    assert "no adapter" in refused(
        "train", "--model", base, "--adapter", base, "--output", tmp_path / "four", *settings
    )


def test_a_model_by_another_path_is_the_same_model(base, data, lora_run, adapter, tmp_path, monkeypatch):
    link = tmp_path / "current"
    link.symlink_to(base)
    ok("generate", "--model", link, "--adapter", adapter, "--raw", "--prompt", "a", "--max-new-tokens", "1")
    monkeypatch.chdir(base)
    ok("generate", "--model", ".", "--adapter", adapter, "--raw", "--prompt", "a", "--max-new-tokens", "1")


def test_a_model_that_is_named_by_a_dot_is_found_from_elsewhere(base, data, tmp_path, monkeypatch):
    for where, output in ((".", tmp_path / "dot"), ("./", tmp_path / "slash"), ("x/..", tmp_path / "up")):
        (base / "x").mkdir(exist_ok=True)
        monkeypatch.chdir(base)
        ok("train", "--model", where, "--data", data, "--output", output, *QUICK)
        monkeypatch.chdir(tmp_path)
        ok("generate", "--model", base, "--adapter", output / "adapter", "--raw", "--prompt", "a")
        ok("train", "--model", output / "adapter", "--data", data, "--output", tmp_path / f"{output.name}2", *QUICK[:2])


def test_a_run_goes_on_whatever_its_model_is_called(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--org--tiny"
    folder = save_model(home / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(folder.name)
    (tmp_path / "link").symlink_to(folder)
    arguments = ["--data", data, "--output", tmp_path / "run", "--lr", "0.02", "--batch-size", "4"]
    arguments += ["--method", "prompt", "--method-args", "{prompt_tuning_init_text: abc}"]
    ok("train", "--model", "org/tiny", *arguments, "--max-steps", "2")
    for steps, model in enumerate((folder, tmp_path / "link", f"{folder}/", "org/tiny"), 3):
        ok("train", "--model", model, *arguments, "--max-steps", str(steps), "--resume")
        ok("generate", "--model", model, "--adapter", tmp_path / "run" / "adapter", "--raw", "--prompt", "a")
    assert "was trained on" not in caplog.text


def test_a_finished_run_is_prolonged_and_says_so(base, data, tmp_path, caplog):
    arguments = ["--model", base, "--data", data, "--output", tmp_path / "run", "--batch-size", "4"]
    ok("train", *arguments, "--epochs", "1")
    said = ok("train", *arguments, "--epochs", "2", "--resume")
    assert "trained 8 steps" in said
    assert "the run of 4 steps goes on to 8; from step 5 the learning rate is that of the linear" in caplog.text
    assert "had 8 steps and would now have 4" in refused("train", *arguments, "--epochs", "1", "--resume")


def test_env_says_what_a_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", "reference")
    told = dict(line.split(maxsplit=1) for line in ok("env").splitlines() if not line.startswith("NF4"))
    assert {"minipeft", "python", "torch", "transformers", "triton", "processor", "compiler", "GPU"} <= told.keys()
    assert told["torch"] == torch.__version__ and told["MINIPEFT_BACKEND"] == "reference"


def test_env_without_torch_or_a_compiler_tells_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv("CC", "no-such-compiler --flag")
    said = ok("env")
    assert "problem       torch cannot be imported: " in said
    assert "compiler      no no-such-compiler: " in said


def test_a_run_goes_on_from_the_checkpoint_that_is_named(base, data, tmp_path):
    arguments = ["--model", base, "--data", data, "--output", tmp_path / "run", "--max-steps", "4", "--save-every", "1"]
    ok("train", *arguments, "--keep-last", "4")
    expected = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert "trained 4 steps" in ok("train", *arguments, "--resume", tmp_path / "run" / "checkpoint-2")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == expected
    with (tmp_path / "run" / "checkpoint-4" / "training_state.json").open("a") as file:
        file.write(" ")
    said = refused("train", *arguments, "--resume", tmp_path / "run" / "checkpoint-4")
    assert "checkpoint-4 is damaged: training_state.json has" in said
    assert "is not a training checkpoint" in refused("train", *arguments, "--resume", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_the_command_bounds_how_long_threads_wait_busily(given: dict[str, str], spins: str) -> None:
    code = (
        "import atexit, os, sys; sys.argv = ['minipeft', '--version']; "
        "atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)); "
        "from minipeft.__main__ import main; main()"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = run_process([sys.executable, "-c", code], env={**kept, **given}, check=True)
    # Set before torch is imported, which reads it.
    assert done.stdout.splitlines()[-1] == f"{spins} False"
