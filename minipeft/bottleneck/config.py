"""`BottleneckConfig`: the fields of AdapterHub's `BnConfig` under the same names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from minipeft.config import PeftConfig
from minipeft.stored import MOST_COUNT, check_regex, is_finite

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
        reduction_factor: The middle is this many times narrower than the input; or a dict of such numbers by layer,
            such as {"0": 16, "11": 4, "default": 8}.
        bottleneck_size: The width of the middle itself, in the place of `reduction_factor`.
        non_linearity: "relu", "gelu", "gelu_new", "swish" ("silu"), "tanh", "sigmoid" or "leakyrelu".
        is_parallel: The network reads the part's input, not its output: y = h + scaling * Up(act(Down(x))).
        scaling: A number, or "learned": a trained number that starts at 1; or "channel": one for each feature.
        dropout: Probability of dropping a feature of the network's output.
        layer_norm, ln_before: Layer-normalize the network's input (two names for one thing, the second AdapterHub's).
        ln_after: Layer-normalize the network's output.
        original_ln_before: The network reads the sum of the part and its input, after the layer norm of a model that
            has one there (BERT), and its output joins the sum, which is then normalized again:
            y = LN(s + scaling * Up(act(Down(LN(s))))) with s = h + x; or, where norms stand before the parts (Llama),
            y = s + scaling * Up(act(Down(s))).
        original_ln_after, residual_before_ln: Where the network's output joins in a model whose norms stand after the
            sum: True, True as above; False, "post_add" gives s + ..., and False, False gives LN(s) + ....
        init_weights: "mam_adapter" (Up = 0: the start is exactly the identity), or "bert" (normal, 0.02) or "houlsby"
            (normal, 0.01, cut at two deviations), which start near it.
        target_modules: Names, endings or a regular expression of the modules to put adapters after, for models whose
            usual places are not known, or other places; mh_adapter, output_adapter and cross_adapter say nothing then.
        exclude_modules: Names, endings or a regular expression taken out of the targets again.
        layers_to_transform, layers_pattern: Only targets in layers of these numbers, counted in the module list
            called `layers_pattern`.
        leave_out: Numbers of layers without an adapter. As for reduction_factor, the decoder's layers of an
            encoder-decoder are counted after the encoder's.
        inv_adapter: "nice" puts an invertible network (MAD-X: Pfeiffer et al. 2020, section 3.2) behind the input
            embeddings, and its inverse in front of the output embeddings if the model has them.
        inv_adapter_reduction_factor: Its middles are this many times narrower than the halves that they read.
        parallel_reads: With is_parallel, ending of a target -> ending of the module whose input the network reads in
            the place of the target's, such as {"fc2": "fc1"}; filled in for the usual places.
        modules_to_save: Modules that the adapter trains whole.
        hidden_size: Width of what the adapted parts give; filled in from the model.
        encoder_layers: Number of the encoder's layers in an encoder-decoder; filled in from the model.
        inv_target: The module behind which the invertible network stands; filled in from the model.
        sum_norm: With original_ln_before, the module inside of each target that normalizes its sum, such as
            "LayerNorm" for BERT's `output`; filled in for the usual places. None: the target returns the sum itself.

    Raises ValueError for values out of range, and for fields of AdapterHub's that minipeft lacks.
    """

    mh_adapter: bool = False
    output_adapter: bool = True
    cross_adapter: bool = False
    reduction_factor: float | dict[str, float] | None = None
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
    ln_after: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    leave_out: list[int] = dataclasses.field(default_factory=list)
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    parallel_reads: dict[str, str] | None = None
    encoder_layers: int | None = None
    inv_target: str | None = None
    sum_norm: str | None = None

    # AdapterHub's further fields: refused when they ask for something. `adapter_residual_before_ln` says which comes
    # first, `ln_after` or the sum.
    adapter_residual_before_ln: bool = False
    init_weights_seed: int | None = None
    use_gating: bool = False
    phm_layer: bool = False
    stochastic_depth: float = 0.0

    unsupported: ClassVar[Mapping[str, tuple]] = {
        **dict.fromkeys(("adapter_residual_before_ln", "use_gating", "phm_layer"), (False,)),
        "init_weights_seed": (),
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

    @classmethod
    def from_adapterhub(cls, config: str | Mapping[str, Any], **changes: Any) -> BottleneckConfig:
        """The configuration that AdapterHub has under a name, or published as the "config" of an adapter's JSON file.

        Args:
            config: "seq_bn" (its default, once "pfeiffer"), "double_seq_bn" ("houlsby"), "par_bn" ("parallel"),
                "seq_bn_inv", "double_seq_bn_inv", or the fields.
            changes: Fields that shall be otherwise.

        Raises ValueError for a name or a field that is not known, and for fields that minipeft lacks.
        """
        if isinstance(config, str):
            name = _OLD_NAMES.get(config, config)
            if name not in ADAPTERHUB:
                raise ValueError(f"AdapterHub's bottleneck configurations are {', '.join(ADAPTERHUB)}, got {config!r}")
            preset = dict(ADAPTERHUB[name])
            factor = preset.pop("reduction_factor")
            return cls(**{**preset, **_size(changes, factor), **changes})
        if config.get("phm_layer"):
            raise ValueError("phm_layer=True asks for a Compacter, which minipeft lacks")
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in config.items() if name not in _OF_OTHERS}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not known among AdapterHub's fields of a bottleneck adapter")
        if "init_weights" not in fields:
            fields["init_weights"] = "bert"
        return cls(**{**fields, **changes})

    def __post_init__(self) -> None:
        super().__post_init__()
        # Dotted name of a target -> the width of what it returns: found in the model, and no field.
        self.widths: dict[str, int | None] = {}
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
        self._check_placement()
        if self.target_modules is None and not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise ValueError(
                "mh_adapter, output_adapter and cross_adapter are all False: no place is left; "
                "set one, or name the modules in target_modules"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where to count layers_to_transform, which is not given")

    def _check_kinds(self) -> None:
        switches = (
            "mh_adapter",
            "output_adapter",
            "cross_adapter",
            "is_parallel",
            "layer_norm",
            "ln_before",
            "ln_after",
        )
        for field in (*switches, "original_ln_before", "original_ln_after"):
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

    def size_for(self, width: int, layer: int | None = None) -> int:
        """The width of the middle for an input of `width` features, in the layer of this number.

        Raises ValueError when reduction_factor has nothing for the layer.
        """
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        factor = self.reduction_factor
        if isinstance(factor, dict):
            factor = factor.get(str(layer), factor.get("default"))
            if factor is None:
                raise ValueError(
                    f"reduction_factor {self.reduction_factor!r} has no entry for layer {layer}, and no 'default'"
                )
        assert factor is not None
        return max(1, int(width / factor))

    def width_of(self, path: str) -> int | None:
        """The width of what the module `path` returns, as far as it is known."""
        return self.widths.get(path, self.hidden_size)

    def layer_of(self, path: str) -> int | None:
        """The number of the layer that the module `path` is in, None if in none: a decoder's after its encoder's."""
        names = path.split(".")
        number = next((int(name) for name in names if name.isdigit()), None)
        if number is not None and "decoder" in names and self.encoder_layers is not None:
            return self.encoder_layers + number
        return number

    def _check_numbers(self) -> None:
        size, factor = self.bottleneck_size, self.reduction_factor
        if size is not None and factor is not None:
            raise ValueError(f"give bottleneck_size ({size}) or reduction_factor ({factor}), not both")
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size <= 0):
            raise ValueError(f"bottleneck_size must be a positive integer, got {size!r}")
        if size is not None and size > MOST_COUNT:
            raise ValueError(f"bottleneck_size must be at most {MOST_COUNT:,}, got {size}")
        if isinstance(factor, Mapping):
            # JSON makes strings of a dict's keys.
            factor = self.reduction_factor = {str(layer): value for layer, value in factor.items()}
        for value in factor.values() if isinstance(factor, dict) else () if factor is None else (factor,):
            if not (_is_number(value) and value > 0):
                raise ValueError(f"reduction_factor must be a number greater than 0, got {value!r}")
        for layer in factor if isinstance(factor, dict) else ():
            if layer != "default" and not layer.isdigit():
                raise ValueError(f"reduction_factor: {layer!r} is no layer's number, nor 'default'")
        if not _is_number(self.scaling) and self.scaling not in ("learned", "channel"):
            raise ValueError(f"scaling must be a number, 'learned' or 'channel', got {self.scaling!r}")
        if not isinstance(self.leave_out, list) or not all(type(layer) is int for layer in self.leave_out):
            raise ValueError(f"leave_out must be a list of layer numbers, got {self.leave_out!r}")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")

    def _check_choices(self) -> None:
        for field, choices in (("non_linearity", NON_LINEARITIES), ("init_weights", INIT_WEIGHTS)):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}")
        if self.target_modules == "all-linear":
            raise ValueError("target_modules='all-linear' is LoRA's: adapters stand after whole parts of a layer")
        for field in ("target_modules", "exclude_modules"):
            expression = getattr(self, field)
            if isinstance(expression, str):
                check_regex(field, expression)

    def _check_placement(self) -> None:
        placement = (self.original_ln_before, self.residual_before_ln, self.original_ln_after)
        if placement not in _PLACEMENTS:
            raise ValueError(
                "original_ln_before={}, residual_before_ln={!r}, original_ln_after={}: minipeft has no such placement "
                "of an adapter; it has {}".format(*placement, ", ".join(map(str, _PLACEMENTS)))
            )
        if self.is_parallel and self.original_ln_before:
            raise ValueError("original_ln_before=True is for adapters after a part, not beside it (is_parallel=True)")
        if self.parallel_reads is not None and not self.is_parallel:
            raise ValueError("parallel_reads says what a network with is_parallel=True reads")
        if self.sum_norm is not None and not self.original_ln_before:
            raise ValueError("sum_norm says what original_ln_before=True normalizes again")
        if self.inv_adapter not in (None, "nice"):
            raise ValueError(f"inv_adapter must be 'nice', got {self.inv_adapter!r}")
        if self.inv_adapter_reduction_factor is not None:
            if self.inv_adapter is None:
                raise ValueError("inv_adapter_reduction_factor is of inv_adapter, which is not given")
            if not (_is_number(self.inv_adapter_reduction_factor) and self.inv_adapter_reduction_factor > 0):
                raise ValueError(
                    "inv_adapter_reduction_factor must be a number greater than 0, "
                    f"got {self.inv_adapter_reduction_factor!r}"
                )


# (original_ln_before, residual_before_ln, original_ln_after).
_PLACEMENTS = (
    (False, True, True),
    (False, False, True),
    (True, True, True),
    (True, "post_add", False),
    (True, False, False),
)
_SEQ_BN = {"original_ln_before": True, "non_linearity": "relu", "reduction_factor": 16, "init_weights": "bert"}
_DOUBLE_SEQ_BN = {"mh_adapter": True, "non_linearity": "swish", "reduction_factor": 16, "init_weights": "bert"}
_INVERTIBLE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
# The presets of AdapterHub 1.x, and the names that they had before.
ADAPTERHUB: dict[str, dict[str, Any]] = {
    "seq_bn": _SEQ_BN,
    "double_seq_bn": _DOUBLE_SEQ_BN,
    "par_bn": {"is_parallel": True, "scaling": 4.0, "non_linearity": "relu", "reduction_factor": 2},
    "seq_bn_inv": {**_SEQ_BN, **_INVERTIBLE},
    "double_seq_bn_inv": {**_DOUBLE_SEQ_BN, **_INVERTIBLE},
}
_OLD_NAMES = {
    **{"pfeiffer": "seq_bn", "houlsby": "double_seq_bn", "parallel": "par_bn"},
    **{"pfeiffer+inv": "seq_bn_inv", "houlsby+inv": "double_seq_bn_inv"},
}
# Fields of AdapterHub's files that say what a method is, and those of its Compacter, which mean nothing without it.
_OF_OTHERS = {
    *("architecture", "version", "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity", "learn_phm"),
    *("phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def _size(changes: Mapping[str, Any], reduction_factor: int) -> dict[str, int]:
    """A preset's reduction, unless the caller gives the width itself."""
    return {} if changes.get("bottleneck_size") is not None else {"reduction_factor": reduction_factor}
