"""Models under FSDP's second version (`fully_shard`): two processes, each with half of every tensor."""

from pathlib import Path

import pytest
from several import in_processes
from several_cases import CONFIGS, shard


@pytest.mark.parametrize(
    ("method", "packed"), [*((method, False) for method in CONFIGS), ("LoraConfig", True)], ids=str
)
def test_sharded_models_are_those_of_one_process(method: str, packed: bool, tmp_path: Path) -> None:
    """`several_cases.shard` compares loss, gradients, generation, the adapter's file and distributed checkpoints."""
    for said in in_processes(2, shard, method, packed, str(tmp_path)):
        assert "is a shard (DTensor)" in said["paging"] and "torch.optim.AdamW" in said["paging"]
        # A prefix or a prompt is not merged in any case.
        assert "merge it into the model in one process" in said["merging"] or "cannot be merged" in said["merging"]
