"""An NF4 layer's tensors in state dictionaries, under bitsandbytes' names: written, read and checked."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.nf4.codes import HoldsCodes
from minipeft.nf4.format import STATE_NAMES
from minipeft.nf4.weight import NF4Weight
from minipeft.packed import PackedLayer
from minipeft.shards import is_sharded
from minipeft_kernels.nf4.codebooks import NESTED_BLOCKSIZE, NF4_LEVELS, dynamic_map


class StoredNF4(HoldsCodes, PackedLayer):
    """The part of `NF4Linear` that answers `state_dict` and `load_state_dict`."""

    bias: nn.Parameter | None

    def nf4_weight(self) -> NF4Weight:
        """The weight as an object, which shares its tensors."""
        raise NotImplementedError

    def set_weight(self, w: NF4Weight) -> None:
        """Take another weight, of the same shape."""
        raise NotImplementedError

    def _check_shape(self, w: NF4Weight) -> None:
        raise NotImplementedError

    def _set_sizes(self, w: NF4Weight) -> None:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if is_sharded(self.weight):
            # By the names of parameter and buffers: distributed checkpoints look up what a name leads to.
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        # Not super()'s: the buffers have other names on disk.
        for name, tensor in self.nf4_weight().state(prefix).items():
            destination[name] = tensor.detach()
        if keep_vars:
            destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        args = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if is_sharded(self.weight):
            super()._load_from_state_dict(*args)
            return
        for hook in self._load_state_dict_pre_hooks.values():
            hook(*args)
        assign = local_metadata.get("assign_to_params_buffers", False)
        for load in (self._load_weight, self._load_bias):
            try:
                load(state_dict, prefix, assign, missing_keys)
            except ValueError as error:
                error_msgs.append(str(error))
        known = {prefix + name for name in (*STATE_NAMES, *(["bias"] if self.bias is not None else []))}
        if strict:
            mine = (key for key in state_dict if key.startswith(prefix) and key not in known)
            unexpected_keys += [key for key in mine if key[len(prefix) :].split(".")[0] not in self._modules]

    def _load_weight(self, state: dict[str, Any], prefix: str, assign: bool, missing_keys: list[str]) -> None:
        key = prefix + "weight"
        if not any(name == key or name.startswith(key + ".") for name in state):
            missing_keys += self.nf4_weight().state(prefix)
            return
        if key in state and state[key].shape == (self.out_features, self.in_features) and key + ".absmax" not in state:
            raise ValueError(f"{key} is a dense weight: load it into nn.Linear and use NF4Linear.from_linear")
        w = NF4Weight.from_state(state, prefix)
        self._check_shape(w)
        if assign:
            return self.set_weight(w)
        _needs_data(key, self.weight)
        # As in torch, what is copied takes the dtype that the module has: `weight_dtype` is the bias's, too.
        w = replace(w.to(self.weight.device), dtype=self.weight_dtype)
        old, new = self.nf4_weight().tensors(), w.tensors()
        same = old.keys() == new.keys() and all(
            old[name].shape == new[name].shape and old[name].dtype == new[name].dtype for name in old
        )
        if not same:
            # The stored weight is cut into other blocks: its tensors take the place of ours.
            return self.set_weight(w.clone())
        for name, tensor in old.items():
            tensor.copy_(new[name])
        self._set_sizes(w)

    def _load_bias(self, state: dict[str, Any], prefix: str, assign: bool, missing_keys: list[str]) -> None:
        if self.bias is None:
            return
        key = prefix + "bias"
        if key not in state:
            missing_keys.append(key)
            return
        if state[key].shape != self.bias.shape:
            raise ValueError(f"{key} should have shape {tuple(self.bias.shape)}, and has {tuple(state[key].shape)}")
        if assign:
            self.bias = nn.Parameter(state[key], self.bias.requires_grad)
            return
        _needs_data(key, self.bias)
        with torch.no_grad():
            self.bias.copy_(state[key])


def _needs_data(key: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{key} is on device meta, where nothing can be copied to: load with assign=True")


def zeros(
    shape: torch.Size,
    dtype: torch.dtype,
    blocksize: int,
    double_quant: bool,
    device: torch.device | str | None,
) -> NF4Weight:
    """A packed weight of zeros, without going through a float matrix."""
    device = device or torch.get_default_device()
    n = shape.numel()
    blocks = -(-n // blocksize)
    nested = -(-blocks // NESTED_BLOCKSIZE)
    w = NF4Weight(
        codes=torch.full(((n + 1) // 2, 1), 0x77, dtype=torch.uint8, device=device),
        absmax=torch.zeros(blocks, device=device, dtype=torch.uint8 if double_quant else torch.float32),
        quant_map=NF4_LEVELS.to(device, copy=True),
        blocksize=blocksize,
        shape=shape,
        dtype=dtype,
    )
    if double_quant:
        w.nested_absmax = torch.zeros(nested, dtype=torch.float32, device=device)
        w.nested_quant_map = dynamic_map().to(device, copy=True)
        w.offset = torch.zeros((), dtype=torch.float32, device=device)
    return w
