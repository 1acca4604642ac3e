"""gpt-oss checkpoints in MXFP4, decoded stack by stack on their way into NF4, or into dense experts.

MXFP4 (Open Compute Project, "OCP Microscaling Formats", version 1.0) has 4-bit floating point numbers in blocks of 32
that share a power of two. A checkpoint holds a stack as `<name>_blocks` and `<name>_scales`, bytes both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.quantizers_utils import get_module_from_name

from minipeft.nf4.experts import expert_parameters
from minipeft.nf4.hf.load import Deserialize, LoadRecord, only


class MXFP4ToDense(Deserialize):
    """The blocks and scales of a stack -> its weights, in the class's own layout."""

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Stored tensors by pattern in, {the parameter's full name: weights in its dtype} out."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        # transformers casts what is to be quantized to the dtype of the model; bytes are exact in each.
        stored = {
            "blocks" if "blocks" in pattern else "scales": only(value).to(torch.uint8)
            for pattern, value in input_dict.items()
        }
        if len(stored) < 2:
            self.record.problems[full_layer_name] = f"the checkpoint has MXFP4 {', '.join(stored)} of it alone"
            return {}
        module, leaf = get_module_from_name(model, full_layer_name)
        dtype = module.get_parameter(leaf).dtype
        return {full_layer_name: convert_moe_packed_tensors(stored["blocks"], stored["scales"], dtype=dtype)}


def mxfp4_conversions(names: list[str] | None, model: nn.Module, record: LoadRecord) -> list[WeightConverter]:
    """The conversions of the stacks that a checkpoint, whose tensors' names are `names`, holds in MXFP4."""
    leaves = {
        ".".join(f"{path}.{weight}".split(".")[-2:])
        for path, module in model.named_modules()
        for weight in expert_parameters(module)
    }
    stored = [leaf for leaf in sorted(leaves) if any(name.endswith(f"{leaf}_blocks") for name in names or ())]
    return [WeightConverter([f"{leaf}_blocks", f"{leaf}_scales"], leaf, [MXFP4ToDense(record)]) for leaf in stored]
