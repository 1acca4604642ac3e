"""`BottleneckConfig`: the fields of AdapterHub's `BnConfig` under the same names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from minipeft.config import PeftConfig

NON_LINEARITIES = ("relu", "gelu", "gelu_new", "swish", "silu", "tanh", "sigmoid", "leakyrelu")
INIT_WEIGHTS = ("mam_adapter", "bert", "houlsby")


@dataclasses.dataclass
class BottleneckConfig(PeftConfig):
    """A small network with a narrow middle after a part of each layer: y = h + scaling * Up(act(Down(h))).

    PEFT has no such method. The names are those of AdapterHub's `BnConfig`; `houlsby`, `pfeiffer` and `parallel` make
    the configurations of the three papers. The defaults are Pfeiffer's.

    Args:
        mh_adapter: Adapters after each self-attention.
        output_adapter: Adapters after each feed-forward part (of a mixture of experts: after the whole block).
        cross_adapter: Adapters after each cross-attention of an encoder-decoder.
        reduction_factor: The middle is this many times narrower than the input.
        bottleneck_size: The width of the middle itself, in the place of `reduction_factor`.
        non_linearity: "relu", "gelu", "gelu_new", "swish" ("silu"), "tanh", "sigmoid" or "leakyrelu".
        is_parallel: The network reads the part's input, not its output: y = h + scaling * Up(act(Down(x))).
        scaling: A number, or "learned": a trained number that starts at 1.
        dropout: Probability of dropping a feature of the network's output.
        layer_norm, ln_before: Layer-normalize the network's input (two names for one thing, the second AdapterHub's).
        init_weights: "mam_adapter" (Up = 0: the start is exactly the identity), or "bert" (normal, 0.02) or "houlsby"
            (normal, 0.01, cut at two deviations), which start near it.
        target_modules: Names, endings or a regular expression of the modules to put adapters after, for models whose
            usual places are not known, or other places; mh_adapter, output_adapter and cross_adapter say nothing then.
        exclude_modules: Names, endings or a regular expression taken out of the targets again.
        layers_to_transform, layers_pattern: Only targets in layers of these numbers, counted in the module list
            called `layers_pattern`.
        modules_to_save: Modules that the adapter trains whole.
        hidden_size: Width of what the adapted parts give; filled in from the model.

    Raises ValueError for values out of range, and for fields of AdapterHub's that minipeft lacks.
    """

    mh_adapter: bool = False
    output_adapter: bool = True
    cross_adapter: bool = False
    reduction_factor: float | None = None
    bottleneck_size: int | None = None
    non_linearity: str = "relu"
    is_parallel: bool = False
    scaling: float | str = 1.0
    dropout: float = 0.0
    layer_norm: bool = False
    ln_before: bool = False
    init_weights: str = "mam_adapter"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    hidden_size: int | None = None

    # AdapterHub's further fields: refused when they ask for something. An adapter stands before the residual sum and
    # what follows it, which is original_ln_before=False, original_ln_after=True and residual_before_ln=True.
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    ln_after: bool = False
    init_weights_seed: int | None = None
    use_gating: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    leave_out: list[int] = dataclasses.field(default_factory=list)
    phm_layer: bool = False
    stochastic_depth: float = 0.0

    unsupported: ClassVar[Mapping[str, tuple]] = {
        **dict.fromkeys(("original_ln_before", "adapter_residual_before_ln", "ln_after"), (False,)),
        **dict.fromkeys(("use_gating", "phm_layer"), (False,)),
        **dict.fromkeys(("init_weights_seed", "inv_adapter", "inv_adapter_reduction_factor", "leave_out"), ()),
        "stochastic_depth": (0.0,),
    }

    @classmethod
    def houlsby(cls, **changes: Any) -> BottleneckConfig:
        """Houlsby et al. 2019: after attention and feed-forward part, reduction 16 (AdapterHub's `double_seq_bn`)."""
        preset: dict[str, Any] = {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish"}
        return cls(**{**preset, **_size(changes, 16), **changes})

    @classmethod
    def pfeiffer(cls, **changes: Any) -> BottleneckConfig:
        """Pfeiffer et al. 2021: after the feed-forward part alone, reduction 16 (AdapterHub's `seq_bn`).

        There `original_ln_before=True` gives the adapter the residual sum to read; here it reads the part's output.
        """
        preset: dict[str, Any] = {"mh_adapter": False, "output_adapter": True, "non_linearity": "relu"}
        return cls(**{**preset, **_size(changes, 16), **changes})

    @classmethod
    def parallel(cls, **changes: Any) -> BottleneckConfig:
        """He et al. 2022: beside the feed-forward part, scaled by 4, reduction 2 (AdapterHub's `par_bn`)."""
        preset: dict[str, Any] = {"is_parallel": True, "scaling": 4.0, "non_linearity": "relu"}
        return cls(**{**preset, **_size(changes, 2), **changes})

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, field)
            if isinstance(value, set | tuple):
                setattr(self, field, sorted(value))
        self._check_kinds()
        self.layer_norm = self.ln_before = bool(self.layer_norm or self.ln_before)
        if self.bottleneck_size is None and self.reduction_factor is None:
            self.reduction_factor = 16.0
        self._check_numbers()
        self._check_choices()
        if self.target_modules is None and not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise ValueError(
                "mh_adapter, output_adapter and cross_adapter are all False: no place is left; "
                "set one, or name the modules in target_modules"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where to count layers_to_transform, which is not given")

    def _check_kinds(self) -> None:
        for field in ("mh_adapter", "output_adapter", "cross_adapter", "is_parallel", "layer_norm", "ln_before"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, got {getattr(self, field)!r}")
        for field in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, field)
            names = isinstance(value, list) and all(isinstance(name, str) for name in value)
            expression = isinstance(value, str) and field != "modules_to_save"
            if not (value is None or names or expression):
                kinds = "a list of names" + (" or a regular expression" if field != "modules_to_save" else "")
                raise ValueError(f"{field} must be {kinds}, got {value!r}")
        layers = self.layers_to_transform
        if layers is not None and not all(type(n) is int for n in (layers if isinstance(layers, list) else [layers])):
            raise ValueError(f"layers_to_transform must be a layer number or a list of them, got {layers!r}")

    def fields_of_training(self) -> set[str]:
        return super().fields_of_training() | {"dropout"}

    def size_for(self, width: int) -> int:
        """The width of the middle for an input of `width` features."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        assert self.reduction_factor is not None
        return max(1, int(width / self.reduction_factor))

    def _check_numbers(self) -> None:
        size, factor = self.bottleneck_size, self.reduction_factor
        if size is not None and factor is not None:
            raise ValueError(f"give bottleneck_size ({size}) or reduction_factor ({factor}), not both")
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size <= 0):
            raise ValueError(f"bottleneck_size must be a positive integer, got {size!r}")
        if factor is not None and not (_is_number(factor) and factor > 0):
            raise ValueError(f"reduction_factor must be a number greater than 0, got {factor!r}")
        if not _is_number(self.scaling) and self.scaling != "learned":
            raise ValueError(f"scaling must be a number or 'learned', got {self.scaling!r}")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")

    def _check_choices(self) -> None:
        for field, choices in (("non_linearity", NON_LINEARITIES), ("init_weights", INIT_WEIGHTS)):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}")
        # False asks for something in these two, unlike everywhere else.
        for field in ("original_ln_after", "residual_before_ln"):
            if getattr(self, field) is not True:
                raise ValueError(
                    f"BottleneckConfig({field}={getattr(self, field)!r}) is not supported by minipeft; leave it at True"
                )
        if self.target_modules == "all-linear":
            raise ValueError("target_modules='all-linear' is LoRA's: adapters stand after whole parts of a layer")
        for field in ("target_modules", "exclude_modules"):
            expression = getattr(self, field)
            if isinstance(expression, str):
                try:
                    re.compile(expression)
                except re.error as error:
                    raise ValueError(f"{field} {expression!r} is not a regular expression: {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _size(changes: Mapping[str, Any], reduction_factor: int) -> dict[str, int]:
    """A preset's reduction, unless the caller gives the width itself."""
    return {} if changes.get("bottleneck_size") is not None else {"reduction_factor": reduction_factor}
