"""Models under FSDP's second version (`fully_shard`): each process has a part of every tensor."""

from pathlib import Path

import pytest
from several import in_processes
from several_cases import CONFIGS, page, shard, shard_others


@pytest.mark.parametrize(
    ("method", "packed"), [*((method, False) for method in CONFIGS), ("LoraConfig", True)], ids=str
)
def test_sharded_models_are_those_of_one_process(method: str, packed: bool, tmp_path: Path) -> None:
    """`several_cases.shard` compares loss, gradients, generation, the adapter's file and distributed checkpoints."""
    for said in in_processes(2, shard, method, packed, str(tmp_path)):
        assert "sharded parameters (DTensor): take state_bits=32" in said["8 bits"]
        # A prefix or a prompt is not merged in any case.
        assert "merge it into the model in one process" in said["merging"] or "cannot be merged" in said["merging"]


def test_adapters_that_read_more_than_their_layer_are_those_of_one_process(tmp_path: Path) -> None:
    in_processes(2, shard_others, str(tmp_path))


def test_each_process_pages_its_own_shard_and_another_number_of_them_goes_on(tmp_path: Path) -> None:
    """`several_cases.page` compares with torch.optim.AdamW over the same shards and over whole tensors."""
    for count, first, last in ((2, 0, 3), (3, 3, 5), (1, 5, 6)):
        in_processes(count, page, str(tmp_path), first, last)
