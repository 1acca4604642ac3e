"""What the processes of `test_several_processes.py` run: importable, since they are processes of their own."""

import copy
import ctypes
import os
import runpy
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_llama
from tiny_families import FAMILIES
from tiny_runs import make_config, make_data

import minipeft
from minipeft import get_peft_model
from minipeft.nf4 import quantize_model
from minipeft.optim import PagedAdamW
from minipeft.shards import is_sharded, own_part, whole
from minipeft.train import Trainer, TrainingError, read_log
from minipeft.train.processes import join
from minipeft.train.processes import shard as shard_model

CONFIGS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False},
    "BottleneckConfig": {"reduction_factor": 8},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
}


def a_model(method: str, packed: bool = False, mixture: bool = False, dropout: float = 0.0) -> Any:
    model = FAMILIES["Qwen3-MoE"].build() if mixture else tiny_llama(0)
    torch.manual_seed(0)
    config = {**CONFIGS[method], **({"lora_dropout": dropout} if dropout else {})}
    if mixture:
        config |= {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj"]}
    base = quantize_model(model) if packed else model
    return get_peft_model(base, getattr(minipeft, method)(task_type="CAUSAL_LM", **config))


def train(
    output: str, model: dict[str, Any], resume: Any = False, count: int = 23, sharded: bool = False, **settings: Any
) -> dict[str, Any]:
    """A run of 7 steps of 4 micro-batches, shared among the processes.

    Returns: the losses of its log, and the trained parameters' bytes.
    """
    processes = join(60)
    adapted = a_model(**model)
    if sharded:
        shard_model(adapted, "cpu")
    few = {"gradient_accumulation": 4 // processes.count, "save_every": 3, "eval_every": 4, "log_every": 1, **settings}
    trainer = Trainer(
        adapted,
        make_data(count, high=12),
        make_config(Path(output), **few),
        eval_data=make_data(3, seed=5),
        progress_bar=False,
        processes=processes,
    )
    result = trainer.train(resume=resume)
    rows = read_log(result.log_path)
    trained = {name: whole(p.detach()).clone().numpy() for name, p in adapted.named_parameters() if p.requires_grad}
    processes.leave()
    return {
        "held": sum(own_part(p).numel() for p in adapted.parameters()) / sum(p.numel() for p in adapted.parameters()),
        "norms": [row["grad_norm"] for row in rows if "grad_norm" in row],
        "losses": [row["loss"] for row in rows if "loss" in row],
        "evals": [(row["eval_loss"], row["eval_tokens"]) for row in rows if "eval_loss" in row],
        "trained": trained,
        "drawn": torch.rand(2).tolist(),
        "tokens": result.tokens,
    }


def who_is_there(timeout: float) -> str:
    """Meet the others; the error that says who has not come."""
    from minipeft.train.errors import TrainingError

    if os.environ["RANK"] == "2":
        return "did not come"
    try:
        join(timeout)
    except TrainingError as error:
        return str(error)
    return "all came"


def shard(method: str, packed: bool, folder: str) -> str:
    """One model under FSDP2 beside the same one alone: loss, gradients, generation, files, distributed checkpoints."""
    import torch.distributed.checkpoint as distributed_checkpoint
    from safetensors.torch import load_file
    from tiny import some_ids
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    processes = join(60)
    alone, model, ids = a_model(method, packed), a_model(method, packed), some_ids(4)
    mesh = torch.distributed.init_device_mesh("cpu", (processes.count,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    loss, wanted = model.train()(ids, labels=ids).loss, alone.train()(ids, labels=ids).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-5)

    register_fsdp_forward_method(model, "generate")
    given = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones(4, 4)}
    assert torch.equal(model.eval().generate(ids[:, :4], **given), alone.eval().generate(ids[:, :4], **given))

    model.save_pretrained(f"{folder}/sharded", is_main_process=processes.first)
    if processes.first:
        alone.save_pretrained(f"{folder}/alone")
        files = [load_file(f"{folder}/{name}/adapter_model.safetensors") for name in ("sharded", "alone")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][name], tensor) for name, tensor in files[1].items())

    state = get_model_state_dict(model)
    distributed_checkpoint.save(state, checkpoint_id=f"{folder}/distributed")
    kept = {name: getattr(t, "full_tensor", lambda t=t: t)().clone() for name, t in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    read = get_model_state_dict(model)
    distributed_checkpoint.load(read, checkpoint_id=f"{folder}/distributed")
    set_model_state_dict(model, read)
    for name, tensor in get_model_state_dict(model).items():
        assert torch.equal(getattr(tensor, "full_tensor", lambda t=tensor: t)(), kept[name]), name

    try:
        PagedAdamW([p for p in model.parameters() if p.requires_grad], state_bits=8)
        said = ""
    except TypeError as error:
        said = str(error)
    processes.leave()
    return said


TWO = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {**TWO, "target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    ("LoraConfig", {**TWO, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    ("LoraConfig", {**TWO, "bias": "all"}),
    ("LoraConfig", {**TWO, "modules_to_save": ["lm_head"]}),
    ("LoraConfig", {**TWO, "trainable_token_indices": [1, 5]}),
    ("LoraConfig", {**TWO, "layer_replication": [[0, 2], [1, 2]]}),
    ("TrainableTokensConfig", {"token_indices": [1, 5]}),
    ("BottleneckConfig", {"reduction_factor": 8, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2}),
    ("PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16}),
]


def shard_others(folder: str) -> None:
    """Adapters that read more than a layer's own weight, sharded beside alone: loss, gradients, files, loading."""
    from safetensors.torch import load_file
    from tiny import randomize, some_ids

    processes, ids = join(60), some_ids(4)
    for number, (method, given) in enumerate(OTHERS):
        tied = given.get("ensure_weight_tying", method == "TrainableTokensConfig")
        built = (tiny_llama(0, tie_word_embeddings=tied, mlp_bias=True) for _ in range(2))
        config = getattr(minipeft, method)(task_type="CAUSAL_LM", **given)
        alone, model = (get_peft_model(base, config).train() for base in built)
        for adapted in (alone, model):
            randomize(adapted)
        shard_model(model, "cpu")
        for _ in range(2):
            wanted, loss = (adapted(ids, labels=ids).loss for adapted in (alone, model))
            torch.testing.assert_close(loss, wanted)
        for pair in ((wanted, alone), (loss, model)):
            pair[0].backward()
        for (name, mine), (_, single) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
            assert torch.equal(whole(mine.detach()), single), name
            if single.requires_grad:
                torch.testing.assert_close(whole(mine.grad), single.grad, rtol=1e-4, atol=1e-5)
        for name, adapted in (("alone", alone), ("shards", model)):
            adapted.save_pretrained(f"{folder}/{number}/{name}", is_main_process=processes.first)
        torch.distributed.barrier()
        files = [load_file(f"{folder}/{number}/{name}/adapter_model.safetensors") for name in ("alone", "shards")]
        assert files[0].keys() == files[1].keys()
        for name, tensor in files[0].items():
            torch.testing.assert_close(files[1][name], tensor, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    own_part(parameter).zero_()
        model.load_adapter(f"{folder}/{number}/alone", "default", is_trainable=True)
        for mine, single in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(mine.detach()), single, rtol=1e-5, atol=1e-6)
    processes.leave()


def accelerated(folder: str) -> None:
    """Models that accelerate shards (FSDP2) beside the same ones alone: training, generation, the adapters' files."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from safetensors.torch import load_file
    from tiny import some_ids

    ids = some_ids(4)
    for number, (method, packed) in enumerate([*((method, False) for method in CONFIGS), ("LoraConfig", True)]):
        accelerator = Accelerator(cpu=True)
        # On CPUs accelerate chooses DistributedDataParallel, whatever it is told.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
        )
        alone, model = (a_model(method, packed).train() for _ in range(2))
        theirs, ours = (
            kind([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
            for kind, adapted in ((torch.optim.AdamW, alone), (PagedAdamW, model))
        )
        model, ours = accelerator.prepare(model, ours)
        assert all(is_sharded(p) for p in model.parameters())
        for _ in range(2):
            wanted, loss = (adapted(ids, labels=ids).loss for adapted in (alone, model))
            torch.testing.assert_close(loss, wanted)
            wanted.backward()
            accelerator.backward(loss)
            for optimizer in (theirs, ours):
                optimizer.step()
                optimizer.zero_grad()
        given = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones(4, 4)}
        assert torch.equal(model.eval().generate(ids[:, :4], **given), alone.eval().generate(ids[:, :4], **given))
        state, main = accelerator.get_state_dict(model), accelerator.is_main_process
        accelerator.unwrap_model(model).save_pretrained(f"{folder}/{number}/a", is_main_process=main, state_dict=state)
        if main:
            alone.save_pretrained(f"{folder}/{number}/b")
            a, b = (load_file(f"{folder}/{number}/{name}/adapter_model.safetensors") for name in "ab")
            assert a.keys() == b.keys()
            for name, tensor in b.items():
                torch.testing.assert_close(a[name], tensor, rtol=1e-3, atol=2e-5)
    torch.distributed.destroy_process_group()


def split_model(folder: str) -> list[str]:
    """What is said of a model that transformers splits by tensor parallelism, new adapter or stored."""
    from transformers import AutoModelForCausalLM

    processes, said = join(60), []
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", tp_plan="auto")
    config = minipeft.LoraConfig(r=4, target_modules=["q_proj"])
    for call in (
        lambda: get_peft_model(model, config),
        lambda: minipeft.PeftModel.from_pretrained(model, f"{folder}/adapter"),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    processes.leave()
    return said


def loading_peak(*given: Any) -> dict[str, float]:
    """`measure` of docs/loading_peak.py."""
    # As MALLOC_MMAP_THRESHOLD_=65536 where a process starts anew: glibc would keep freed blocks, other ones each time.
    ctypes.CDLL(None).mallopt(-3, 65536)
    script = Path(__file__).parent.parent / "docs" / "loading_peak.py"
    held: dict[str, float] = runpy.run_path(str(script))["measure"](*given, dtype="float32")
    return held


def page(folder: str, first: int, last: int) -> None:
    """Steps `first` to `last` of PagedAdamW over shards, beside those of torch.optim.AdamW over the same, and alone."""
    from torch import nn
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    processes = join(60)
    mesh = torch.distributed.init_device_mesh("cpu", (processes.count,))
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    # Of one row and of five: some processes have none of it, or less than the others.
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(70, 55), nn.Tanh(), nn.Linear(55, 5), nn.Tanh(), nn.Linear(5, 1))
    theirs = torch.optim.AdamW(alone.parameters(), **settings)

    def step(model: nn.Module, optimizer: Any, number: int) -> None:
        x = torch.randn(6, 70, generator=torch.Generator().manual_seed(number))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(first):
        step(alone, theirs, number)
    model, other, swept = (fully_shard(copy.deepcopy(alone), mesh=mesh) for _ in range(3))
    memory = {"page_bytes": 4096, "host_budget": 2 * 4096, "spill_dir": folder}
    # `fused` means nothing to ours: torch takes it from the settings that its state is stored with.
    ours = PagedAdamW(model.parameters(), **settings, **memory, fused=True)
    torchs = torch.optim.AdamW(other.parameters(), **settings, fused=True)
    if first:
        ours.load_state(f"{folder}/state-{first}")
        set_optimizer_state_dict(other, torchs, get_optimizer_state_dict(model, ours))
    in_backward = PagedAdamW(swept.parameters(), **settings, fuse_backward=True)
    in_backward.load_state_dict(ours.state_dict())
    for number in range(first, last):
        for pair in ((alone, theirs), (model, ours), (other, torchs), (swept, in_backward)):
            step(*pair, number)
        for mine, same, single in zip(model.parameters(), other.parameters(), alone.parameters(), strict=True):
            assert torch.equal(mine.to_local(), same.to_local())
            torch.testing.assert_close(mine.full_tensor(), single, rtol=1e-5, atol=1e-6)
        for mine, same in zip(model.parameters(), swept.parameters(), strict=True):
            assert torch.equal(mine.to_local(), same.to_local())
    ours.save_state(f"{folder}/state-{last}", is_main_process=processes.first)

    for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
        mine, same = (get_optimizer_state_dict(*pair, options=options) for pair in ((model, ours), (other, torchs)))
        assert mine["state"].keys() == same["state"].keys() and len(same["state"]) == 6
        for name, entries in same["state"].items():
            assert mine["state"][name].keys() == entries.keys()
            for key, value in entries.items():
                got = mine["state"][name][key]
                assert getattr(got, "placements", None) == getattr(value, "placements", None)
                assert torch.equal(
                    getattr(got, "to_local", lambda t=got: t)(), getattr(value, "to_local", lambda t=value: t)()
                )
        fresh = PagedAdamW(model.parameters(), **settings)
        set_optimizer_state_dict(model, fresh, same, options=options)
        for p in model.parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(fresh.state[p][key].to_local(), ours.state[p][key].to_local())
    if processes.first:
        # The file is a single process's, and torch's optimizer takes what it holds.
        single = PagedAdamW(alone.parameters(), **settings)
        single.load_state(f"{folder}/state-{last}")
        for p in alone.parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(single.state[p][key], theirs.state[p][key], rtol=1e-4, atol=1e-7)
    ours.close()
    processes.leave()


def page_replicas() -> list[Any]:
    """Steps of PagedAdamW in DistributedDataParallel; beside each, torch.optim.AdamW's on the very same gradients."""
    from torch import nn

    processes = join(60)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 55), nn.Tanh(), nn.Linear(55, 5))
    single = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    ours = PagedAdamW(model.parameters(), **settings, page_bytes=4096, device_budget=2 * 4096)
    theirs = torch.optim.AdamW(single.parameters(), **settings, fused=True)
    for _ in range(4):
        parallel(torch.randn(6, 70, generator=torch.Generator().manual_seed(processes.rank))).square().sum().backward()
        for mine, same in zip(model.parameters(), single.parameters(), strict=True):
            same.grad = mine.grad.clone()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        for mine, same in zip(model.parameters(), single.parameters(), strict=True):
            assert torch.equal(mine, same)
    return [p.detach().numpy() for p in single.parameters()]


MERGED: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {**TWO, "use_rslora": True}),
    ("LoraConfig", {**TWO, "target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    ("LoraConfig", {**TWO, "target_modules": ["embed_tokens", "v_proj"], "bias": "all"}),
    ("LoraConfig", {**TWO, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    ("LoraConfig", {**TWO, "modules_to_save": ["mlp", "lm_head"], "trainable_token_indices": [1, 5]}),
    ("TrainableTokensConfig", {"token_indices": [1, 5]}),
]


def merge_shards(processes: Any, folder: str) -> list[str]:
    """Models that are merged in parts beside the same ones merged whole, bit for bit; what is refused."""
    from tiny import randomize, some_ids
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers import AutoModelForCausalLM

    def same(mine: Any, single: Any) -> None:
        for (name, a), (_, b) in zip(mine.named_parameters(), single.named_parameters(), strict=True):
            assert torch.equal(whole(a.detach()), b), name

    def pair(method: str, given: dict[str, Any], tied: bool = False) -> tuple[Any, Any]:
        config = getattr(minipeft, method)(task_type="CAUSAL_LM", **given)
        built = [
            get_peft_model(tiny_llama(0, tie_word_embeddings=tied, mlp_bias=True, vocab_size=131).to(dtype), config)
            for dtype in (torch.bfloat16,) * 2
        ]
        for adapted in built:
            randomize(adapted)
        shard_model(built[1], "cpu")
        return built[0], built[1]

    ids, said = some_ids(4), []
    for number, (method, given) in enumerate(MERGED):
        tied = given.get("ensure_weight_tying", method == "TrainableTokensConfig")
        alone, model = pair(method, given, tied)
        # FSDP2 would leave what is not a layer gathered after a pass.
        model.set_reshard_after_forward(False)
        before = [own_part(p).clone() for p in model.parameters()]
        with torch.no_grad():
            model(ids)
        for _ in range(2):
            alone.merge_adapter(safe_merge=True)
            model.merge_adapter(safe_merge=True)
            same(model, alone)
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, alone(ids).logits)
            alone.unmerge_adapter()
            model.unmerge_adapter()
            assert all(torch.equal(own_part(p), old) for p, old in zip(model.parameters(), before, strict=True))
        plain, single = model.merge_and_unload(), alone.merge_and_unload()
        same(plain, single)
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, single(ids).logits)
        state = get_model_state_dict(plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if processes.first:
            plain.save_pretrained(f"{folder}/{number}", state_dict=state)
            same(AutoModelForCausalLM.from_pretrained(f"{folder}/{number}", dtype=torch.bfloat16), single)
    _, model = pair("LoraConfig", {**TWO, "target_modules": ["embed_tokens"]}, tied=True)
    packed = a_model("LoraConfig", packed=True)
    shard_model(packed, "cpu")
    broken = pair("LoraConfig", TWO)[1]
    last = broken.model.layers[1].mlp.down_proj.lora_B["default"].weight
    with torch.no_grad():
        own_part(last).fill_(torch.nan)
    for refused, safe in ((model, False), (packed, False), (broken, True)):
        old = [own_part(p).clone() for p in refused.parameters()]
        try:
            refused.merge_and_unload(safe_merge=safe)
        except ValueError as error:
            said.append(str(error))
        assert all(
            torch.equal(own_part(p).nan_to_num(), o.nan_to_num())
            for p, o in zip(refused.parameters(), old, strict=True)
        )
    fail_alone(processes.rank, pair("LoraConfig", TWO)[1])
    return said


COPIES: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"},
    {"trainable_token_indices": [1, 5]},
    {"modules_to_save": ["lm_head"]},
    {"bias": "all"},
]


def load_into_shards(processes: Any, folder: str) -> list[str]:
    """Adapters that come to a model which is sharded already: those that act as in one process, and what is refused."""
    from tiny import randomize, some_ids

    ids, said = some_ids(4), []

    def stored(name: str, adapted: Any) -> str:
        randomize(adapted)
        adapted.save_pretrained(f"{folder}/{name}", is_main_process=processes.first)
        torch.distributed.barrier()
        return f"{folder}/{name}"

    def sharded(**given: Any) -> Any:
        base = tiny_llama(0, **given)
        shard_model(base, "cpu")
        return base

    def refused(call: Any, model: Any) -> None:
        names = [name for name, _ in model.named_parameters()]
        try:
            call()
        except ValueError as error:
            said.append(str(error))
        assert [name for name, _ in model.named_parameters()] == names

    for method, packed in (*((method, False) for method in CONFIGS), ("LoraConfig", True)):
        alone = a_model(method, packed)
        path = stored(f"{method}-{packed}", alone)
        base = tiny_llama(0)
        if packed:
            quantize_model(base)
        shard_model(base, "cpu")
        model = minipeft.PeftModel.from_pretrained(base, path)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, alone.eval()(ids).logits)
    for number, given in enumerate(COPIES):
        config = minipeft.LoraConfig(task_type="CAUSAL_LM", **{**TWO, **given})
        path, base = stored(str(number), get_peft_model(tiny_llama(0, mlp_bias=True), config)), sharded(mlp_bias=True)
        refused(lambda base=base, path=path: minipeft.PeftModel.from_pretrained(base, path), base)
    path, base = f"{folder}/LoraConfig-False", sharded()
    refused(lambda: get_peft_model(base, minipeft.LoraConfig(task_type="CAUSAL_LM", **TWO)), base)
    refused(lambda: minipeft.PeftModel.from_pretrained(base, path, is_trainable=True), base)
    model = a_model("LoraConfig")
    shard_model(model, "cpu")
    refused(lambda: model.load_adapter(path, "late", is_trainable=True), model)
    model.load_adapter(path, "late")
    model.set_adapter("late")
    try:
        Trainer(model, make_data(4), make_config(Path(folder) / "run"), processes=processes)
    except TrainingError as error:
        said.append(str(error))
    return said


def after_sharding(folder: str) -> tuple[list[str], list[str]]:
    """What `merge_shards` and `load_into_shards` say."""
    processes = join(60)
    said = merge_shards(processes, folder), load_into_shards(processes, folder)
    processes.leave()
    return said


def fail_alone(rank: int, model: Any) -> None:
    """What fails in the second process alone, while weights are checked or changed, ends in all, and is undone."""
    old = [own_part(p).clone() for p in model.parameters()]
    layer = model.model.layers[1].self_attn.q_proj

    def fail(*_: Any) -> None:
        raise ArithmeticError("no room")

    failing = [("merged_finite", lambda *_: False, "NaNs"), ("merged_finite", fail, ""), ("_install_weight", fail, "")]
    for name, instead, expected in failing:
        if rank == 1:
            setattr(layer, name, instead)
        try:
            model.merge_adapter(safe_merge=name == "merged_finite")
        except (ArithmeticError, ValueError) as error:
            assert str(error).startswith(expected or ("another process" if rank == 0 else "no room")), error
        else:
            raise AssertionError("one process merged what another did not")
        vars(layer).pop(name, None)
        if name == "_install_weight":
            model.unmerge_adapter()
        assert all(torch.equal(own_part(p), o) for p, o in zip(model.parameters(), old, strict=True))
    # And then all goes on.
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert all(torch.equal(own_part(p), o) for p, o in zip(model.parameters(), old, strict=True))
