"""LoRA on layers of other classes: a user's own mixin for them, as `LoraConfig._register_custom_module` takes it.

```python
class LoraMine(LoraLayer):  # or minipeft.tuners.lora.Linear, for a weight (out_features, in_features)
    def _lora_shape(self): ...  # (out_features, in_features)


config._register_custom_module({Mine: LoraMine})
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from minipeft.adapter import AdapterModule


def check_custom(classes: Mapping[Any, Any]) -> None:
    """Raise TypeError unless `classes` leads from classes of modules to mixins of LoRA.

    PEFT's own custom layers wrap a module, which they are given at their making; here the module stays, and gets the
    class in front of its own.
    """
    for kind, mixin in classes.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"_register_custom_module: expected classes of modules, got {kind!r}")
        if not (isinstance(mixin, type) and _is_lora(mixin)):
            raise TypeError(
                f"_register_custom_module: {mixin!r} must be a subclass of minipeft.tuners.lora.LoraLayer, for {kind!r}"
            )
        if any("__init__" in vars(cls) for cls in mixin.__mro__ if cls is not object and not _is_own(cls)):
            raise TypeError(
                f"_register_custom_module: {mixin!r} is made around a module (it is a module, or has an __init__), as "
                "in PEFT; minipeft puts the class in front of the module's own, so that `self` is the module: leave "
                "nn.Module and __init__ out, and let forward call super().forward() for the layer's own output"
            )


def custom_mixin(module: nn.Module, wanted_by: Mapping[type, type]) -> type | None:
    """The user's mixin that adapts `module`, of those in `wanted_by` or of an adapter that is there; or None.

    Raises ValueError when `module` carries LoRA already by another one.
    """
    if not wanted_by and not isinstance(module, AdapterModule):
        return None  # said first, since attaching asks of every module
    mixins = (cls for cls in type(module).__mro__ if "_plain_class" not in vars(cls))
    held = next((cls for cls in mixins if _is_lora(cls) and not _is_own(cls)), None)
    wanted = next((mixin for kind, mixin in wanted_by.items() if isinstance(module, kind)), None)
    if wanted is not None and _is_lora(type(module)) and not isinstance(module, wanted):
        raise ValueError(f"{type(module).__name__} carries LoRA already, by another class than {wanted!r}")
    return wanted or held


def _is_lora(cls: type) -> bool:
    # By what it can do: the module that has LoraLayer imports the config, which asks here.
    return issubclass(cls, AdapterModule) and hasattr(cls, "low_rank_matrix")


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "minipeft"
