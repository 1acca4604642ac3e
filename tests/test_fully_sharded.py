"""Models under FSDP's second version (`fully_shard`): each process has a part of every tensor."""

from pathlib import Path

import pytest
import torch
from several import in_processes
from several_cases import CONFIGS, accelerated, after_sharding, loading_peak, page, shard, shard_others, split_model
from tiny import tiny_llama
from tiny_folder import save_model

from minipeft import LoraConfig, get_peft_model


@pytest.mark.parametrize(
    ("method", "packed"), [*((method, False) for method in CONFIGS), ("LoraConfig", True)], ids=str
)
def test_sharded_models_are_those_of_one_process(method: str, packed: bool, tmp_path: Path) -> None:
    """`several_cases.shard` compares loss, gradients, generation, the adapter's file and distributed checkpoints."""
    for said in in_processes(2, shard, method, packed, str(tmp_path)):
        assert "sharded parameters (DTensor): take state_bits=32" in said


def test_adapters_that_read_more_than_their_layer_are_those_of_one_process(tmp_path: Path) -> None:
    in_processes(2, shard_others, str(tmp_path))


def test_models_that_accelerate_shards_are_those_of_one_process(tmp_path: Path) -> None:
    in_processes(2, accelerated, str(tmp_path))


def test_a_model_that_is_split_by_tensor_parallelism_is_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for said in in_processes(2, split_model, str(tmp_path)):
        assert len(said) == 2
        assert all("is split over 2 processes by tensor parallelism (tp_plan)" in sentence for sentence in said)


def test_no_process_holds_weights_in_full_precision_while_it_loads_4_bits(tmp_path: Path) -> None:
    """The page's own script: a checkpoint in 16 bits, loaded in float32, so that a copy of it would count."""
    config = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = tiny_llama(**config)
    dense = sum(p.numel() for p in model.parameters()) * 4 / 1e6
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for held in in_processes(2, loading_peak, str(tmp_path), "nf4", True):
        assert held["afterwards"] < held["peak"] < 0.6 * dense


def test_each_process_pages_its_own_shard_and_another_number_of_them_goes_on(tmp_path: Path) -> None:
    """`several_cases.page` compares with torch.optim.AdamW over the same shards and over whole tensors."""
    for count, first, last in ((2, 0, 3), (3, 3, 5), (1, 5, 6)):
        in_processes(count, page, str(tmp_path), first, last)


def test_adapters_are_merged_and_loaded_into_parts_as_into_whole_weights(tmp_path: Path) -> None:
    for (shared, packed, broken), late in in_processes(2, after_sharding, str(tmp_path)):
        assert "embed_tokens: its weight is another module's, too" in shared
        assert "its weight is in 4 bits and sharded over processes: save the adapter" in packed
        assert "a weight of model.layers.1.mlp.down_proj infinite or NaN" in broken
        assert len(late) == 8
        assert all("holds what is made of the base weights, of which each" in said for said in late[:4])
        assert all("does not average the gradients of an adapter that comes later" in said for said in late[4:7])
        assert "loaded after the model was sharded (FSDP2) cannot be trained" in late[7]
