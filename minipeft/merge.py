"""What becomes of the base weights under adapters: folded together, given back plain, and never resized."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minipeft.adapter import Switch, mix_out
from minipeft.attach import adapter_modules, tell_quantizer
from minipeft.lora.layer import LoraLayer
from minipeft.nf4 import NF4Linear
from minipeft.unloading import (
    dequantize_rest,
    detach_adapters,
    requantize_merged,
    untie_what_differs,
    weight_dtype,
)

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

logger = logging.getLogger("minipeft")


class MergedModel(_Base):
    """Merging and unloading (mixed into `PeftModel`)."""

    if TYPE_CHECKING:
        peft_config: dict[str, Any]
        _switch: Switch
        _config_of: Any

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (those that act by default) into the base weights; the output stays the same.

        The sum is made in float32 and the original weights are kept, so `unmerge_adapter` is exact.

        Args:
            safe_merge: Check first that no merged weight is infinite or NaN.

        Raises ValueError for unknown adapters and, with `safe_merge`, for non-finite weights, naming the module.
        """
        names = self._switch.active if adapter_names is None else tuple(adapter_names)
        for name in names:
            config = self._config_of(name)
            if not config.mergeable:
                kind = type(config).__name__.removesuffix("Config")
                raise ValueError(f"adapter {name!r} cannot be merged: {kind} changes more than the weights")
        self._check_compatible(names)
        self.unmerge_adapter()
        if safe_merge:
            self._check_finite(names)
        for _, module in adapter_modules(self) if names else ():
            module.merge(names)

    def unmerge_adapter(self) -> None:
        """Put the original base weights back. Nothing happens if nothing is merged."""
        for _, module in adapter_modules(self):
            if module.merged_adapters:
                module.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> Any:
        """Fold the adapters (those that act by default) into the weights and return the plain model.

        Args:
            requantize: What becomes of a 4-bit model. By default all its layers come back in the dtype that they had
                before quantization, exactly as they acted with the adapter. True quantizes the merged weights again:
                small, but rounded. Which of the two happened is logged.
        """
        self.merge_adapter(adapter_names, safe_merge)
        quantized = any(isinstance(module, NF4Linear) for module in self.modules())
        if requantize:
            requantize_merged(self)
        plain = self.unload(keep_merged=True)
        if quantized and requantize:
            logger.warning("merged into NF4: the merged weights were quantized again, which rounds them")
        elif quantized:
            dequantize_rest(plain)
            logger.warning("merged into %s: the model is no longer quantized", weight_dtype(plain))
        return plain

    def unload(self, keep_merged: bool = False) -> Any:
        """Remove all adapters and return the plain model, base weights as they were (unless `keep_merged`)."""
        if not keep_merged:
            self.unmerge_adapter()
        detach_adapters(self)
        untie_what_differs(self)
        tell_quantizer(self, attached=False)
        del self.peft_config, self._switch
        mix_out(self)
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain model's, unless an adapter trains an embedding: its tensors would not fit the new one.

        Raises ValueError then.
        """
        ends = [get() for get in (self.get_input_embeddings, self.get_output_embeddings)]  # type: ignore[operator]
        for path, module in adapter_modules(self):
            if (args or kwargs) and any(module is end for end in ends) and module.adapter_names():
                raise ValueError(
                    f"adapters {sorted(module.adapter_names())} train {path}, which cannot be resized under them: "
                    "resize the base model first, then attach adapters"
                )
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    def _merged(self) -> tuple[str, ...]:
        return next((m.merged_adapters for _, m in adapter_modules(self) if m.merged_adapters), ())

    def _check_finite(self, names: tuple[str, ...]) -> None:
        for path, module in adapter_modules(self):
            if isinstance(module, LoraLayer) and not torch.isfinite(module.merged_weight(names)).all():
                raise ValueError(f"merging {list(names)} would make a weight of {path} infinite or NaN")

    def _check_compatible(self, names: tuple[str, ...]) -> None:
        if len(names) < 2:
            return
        for path, module in adapter_modules(self):
            owners: dict[str, str] = {}
            for name in names:
                for tensor in module.replaced_tensors(name):
                    if owners.setdefault(tensor, name) != name:
                        raise ValueError(
                            f"adapters {owners[tensor]!r} and {name!r} cannot act together: both train "
                            f"{path}.{tensor} whole"
                        )
