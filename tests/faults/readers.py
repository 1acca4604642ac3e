"""Every reader of files, with files that it reads: what the fuzzer changes, and how they are read.

A reader is given a folder with the files, reads them, and gives nothing back; it raises as the library does. Where a
command reads them, it is the command that is called, and its exit code decides.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import randomize, tiny_llama
from tiny_folder import byte_tokenizer, save_model

from minipeft import (
    BottleneckConfig,
    LoraConfig,
    PagedAdamW,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from minipeft.card import write_card
from minipeft.commands.cli import USER_ERROR, main
from minipeft.compare.plan import plan_runs
from minipeft.nf4 import NF4Config, quantize_model
from minipeft.train import TrainConfig, Trainer, encode_records, load_base_model, load_tokenizer, read_jsonl
from minipeft.train.manifest import MANIFEST, write_manifest


@dataclasses.dataclass
class Reader:
    """One way in.

    Attributes:
        files: their contents by name; those of `changed` are changed.
        read: reads them from a folder.
        weight: how often it is chosen beside others.
    """

    name: str
    files: dict[str, bytes]
    changed: tuple[str, ...]
    read: Callable[[Path], None]
    weight: int = 10


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


class ExitCode(Exception):
    """A command ended with another code than 0 and 2, or said more than one sentence."""


def command(*arguments: str) -> None:
    """Run `minipeft` with these arguments in this process.

    Raises ValueError with what it says to the user where the exit code is 2, ExitCode for any other but 0.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    if code == USER_ERROR:
        said = err.getvalue().strip().splitlines()
        if len(said) != 1:
            raise ExitCode(f"code {code} and {len(said)} lines: {said[:3]}")
        raise ValueError(said[0])
    if code:
        raise ExitCode(f"code {code}: {err.getvalue()[-300:]}")


def files_in(folder: Path) -> dict[str, bytes]:
    """The contents of all files below a folder by their names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@functools.cache
def base() -> Any:
    """The plain model that adapters are loaded into; read only by copies."""
    return tiny_llama(**SMALL)


def adapter_reader(name: str, config: Any) -> Reader:
    """Loads an adapter, by PeftModel."""
    model = get_peft_model(copy.deepcopy(base()), config)
    randomize(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = files_in(Path(folder))
    del files["README.md"]

    def read(folder: Path) -> None:
        model = PeftModel.from_pretrained(copy.deepcopy(base()), folder)
        # Numbers that no file may hold must not have come through.
        json.dumps(model.peft_config["default"].to_dict(), allow_nan=False)

    return Reader(f"adapter of {name}", files, ("adapter_config.json", "adapter_model.safetensors"), read)


def adapter_readers() -> list[Reader]:
    """All methods, LoRA with what its file may hold besides."""
    every = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}
    rich = LoraConfig(
        **every,
        use_dora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3.0},
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    tokens = LoraConfig(**every, trainable_token_indices=[1, 5], lora_bias=True, use_rslora=True)
    bottleneck = BottleneckConfig(reduction_factor=4, leave_out=[1], mh_adapter=True)
    return [
        adapter_reader("LoRA", LoraConfig(**every)),
        adapter_reader("LoRA with patterns", rich),
        adapter_reader("LoRA with tokens", tokens),
        adapter_reader("bottleneck", bottleneck),
        adapter_reader("prefix tuning", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        adapter_reader("prompt tuning", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        adapter_reader("tokens", TrainableTokensConfig(token_indices=[1, 2])),
    ]


def inspect_readers() -> list[Reader]:
    """`minipeft inspect` over each kind of folder."""
    found = []

    def read(folder: Path) -> None:
        command("inspect", str(folder))

    run = finished_run()
    last = max(name.split("/")[0] for name in run if name.startswith("checkpoint-"))
    checkpoint = {name.split("/", 1)[1]: content for name, content in run.items() if name.startswith(last)}
    found.append(Reader("inspect a run", run, ("run.json", "log.jsonl"), read, 3))
    names = ("training_state.json", "training_state.safetensors", "adapter_config.json", "adapter_model.safetensors")
    found.append(Reader("inspect a checkpoint", checkpoint, names, read, 3))
    found.append(Reader("inspect a model", packed_model(), ("config.json", "model.safetensors"), read, 3))
    return found


@functools.cache
def finished_run(**settings: Any) -> dict[str, bytes]:
    """The files of a run of two steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer(Path(folder) / "run", **settings).train()
        return files_in(Path(folder) / "run")


def trainer(output: Path, **settings: Any) -> Trainer:
    """A Trainer of the smallest model."""
    from tiny_runs import make_config, make_data

    few = {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 2, "save_every": 1, "scheduler": "constant"}
    config = make_config(output, **(few | {"warmup_steps": None} | settings))
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base()), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return Trainer(model, make_data(6), config, progress_bar=False)


def resume_reader(optimizer: str, honest: bool) -> Reader:
    """Goes on from a checkpoint. `honest`: its manifest says what was written; else it was written anew, too."""
    files = finished_run(optimizer=optimizer)
    last = max(name.split("/")[0] for name in files if name.startswith("checkpoint-"))
    names = tuple(name for name in files if name.startswith(last) and not name.endswith((".md", MANIFEST)))
    changed = (*names, f"{last}/{MANIFEST}") if honest else (*names, "run.json", "log.jsonl")

    def read(folder: Path) -> None:
        if not honest:
            write_manifest(folder / last)
        trainer(folder, optimizer=optimizer).train(resume=folder / last)

    kind = "" if honest else ", its manifest written anew"
    return Reader(f"resume with {optimizer}{kind}", files, changed, read, 4 if honest else 8)


@functools.cache
def packed_model() -> dict[str, bytes]:
    """A folder with a model in 4 bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(Path(folder) / "model", **SMALL)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4Config())
        model.save_pretrained(Path(folder) / "packed")
        return files_in(Path(folder) / "packed")


@functools.cache
def dense_model() -> dict[str, bytes]:
    """A folder with a model and its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        return files_in(save_model(Path(folder) / "model", **SMALL))


@functools.cache
def gguf_model() -> dict[str, bytes]:
    """The same as a GGUF file."""
    import gguf

    model = base()
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "tiny.gguf", "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_vocab_size(config.vocab_size)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            place = names.get_name(name.removesuffix(".weight"))
            if place is not None:
                writer.add_tensor(f"{place}.weight", tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return files_in(Path(folder))


def model_readers() -> list[Reader]:
    """Base models: dense, in 4 bits, as GGUF; and the tokenizer."""

    def load(folder: Path) -> None:
        load_base_model(folder)

    def load_gguf(folder: Path) -> None:
        load_base_model(folder / "tiny.gguf")

    def load_tokens(folder: Path) -> None:
        load_tokenizer(folder)("text")

    names = ("config.json", "model.safetensors")
    tokens = ("tokenizer.json", "tokenizer_config.json")
    return [
        Reader("a model", dense_model(), (*names, "generation_config.json"), load, 2),
        Reader("a model in 4 bits", packed_model(), names, load, 4),
        Reader("a GGUF file", gguf_model(), ("tiny.gguf",), load_gguf, 2),
        Reader("a tokenizer", dense_model(), tokens, load_tokens, 1),
    ]


CONFIG = """model: m
data: d.jsonl
output_dir: out
method: lora
method_args: {r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}
batch_size: 4
lr: 1e-4
scheduler: cosine
scheduler_args: {num_cycles: 0.5}
warmup_ratio: 0.1
optimizer: adamw
max_steps: 10
eval_fraction: 0.1
keep_last: null
packing: true
"""
RUNS = """lora:
  method: lora
  method_args: {r: 4}
prefix:
  method_args: {num_virtual_tokens: 4}
small lr: {method: bottleneck, lr: 0.001, quantize: nf4}
"""
RECORDS = [
    {"text": "a text"},
    {"prompt": "a question", "completion": "an answer", "id": 3},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}], "tools": [{"name": "f"}]},
]


def settings_readers() -> list[Reader]:
    """What people write by hand: a run's settings, a comparison's runs, records."""

    def read_config(folder: Path) -> None:
        TrainConfig.from_sources(folder / "run.yaml")

    def read_config_by_command(folder: Path) -> None:
        try:
            command("train", "--config", str(folder / "run.yaml"))
        except ValueError as error:
            # A config that can be read ends at the model or the data, which are not there.
            if "cannot load a tokenizer from" not in str(error) and "d.jsonl" not in str(error):
                raise

    def read_runs(folder: Path) -> None:
        plan_runs(None, folder / "runs.yaml")

    def read_records(folder: Path) -> None:
        encode_records(read_jsonl(folder / "data.jsonl"), byte_tokenizer(), 4096)

    records = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    return [
        Reader("a run's settings", {"run.yaml": CONFIG.encode()}, ("run.yaml",), read_config),
        Reader("minipeft train", {"run.yaml": CONFIG.encode()}, ("run.yaml",), read_config_by_command, 3),
        Reader("a comparison's runs", {"runs.yaml": RUNS.encode()}, ("runs.yaml",), read_runs),
        Reader("records", {"data.jsonl": records}, ("data.jsonl",), read_records),
    ]


def state_readers() -> list[Reader]:
    """A paged optimizer's state, the card beside an adapter, packed weights in a state dict."""
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    optimizer = PagedAdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        optimizer.save_state(Path(folder) / "state.safetensors")
        state = files_in(Path(folder))

    def load_state(folder: Path) -> None:
        other = PagedAdamW([torch.nn.Parameter(p.detach().clone()) for p in params])
        other.load_state(folder / "state.safetensors")

    model = get_peft_model(copy.deepcopy(base()), LoraConfig(r=2, target_modules=["q_proj"]))
    with tempfile.TemporaryDirectory() as folder:
        write_card(model, model.peft_config["default"], folder)
        card = files_in(Path(folder))

    def update_card(folder: Path) -> None:
        write_card(model, model.peft_config["default"], folder)

    linear = quantize_model(torch.nn.Sequential(torch.nn.Linear(32, 8)), NF4Config())
    packed = linear.state_dict()
    entries = next(name for name in packed if name.endswith("bitsandbytes__nf4"))
    described = bytes(packed[entries].tolist())

    def load_packed(folder: Path) -> None:
        changed = torch.frombuffer(bytearray((folder / "quant_state.json").read_bytes() or b" "), dtype=torch.uint8)
        other = quantize_model(torch.nn.Sequential(torch.nn.Linear(32, 8)), NF4Config())
        try:
            other.load_state_dict({**packed, entries: changed})
        except RuntimeError as error:
            # As torch says it, which collects what is wrong with a state dict; the tensor's name stands for a file's.
            if "Error(s) in loading state_dict" not in str(error) or entries.partition(".")[0] not in str(error):
                raise
            raise ValueError(f"quant_state.json: {error}") from None

    return [
        Reader("a paged optimizer's state", state, tuple(state), load_state),
        Reader("a card", card, tuple(card), update_card),
        Reader("quant_state", {"quant_state.json": described}, ("quant_state.json",), load_packed),
    ]


@functools.cache
def readers() -> tuple[Reader, ...]:
    """All of them."""
    return (
        *adapter_readers(),
        *inspect_readers(),
        *(resume_reader(optimizer, honest) for optimizer in ("adamw", "paged_adamw") for honest in (True, False)),
        *model_readers(),
        *settings_readers(),
        *state_readers(),
    )


def lay_out(files: dict[str, bytes], folder: Path) -> None:
    """Write files to a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
