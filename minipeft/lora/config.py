"""`LoraConfig`: PEFT's class of this name, with the checks of its fields and the numbers that follow from them."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from minipeft.config import PeftConfig
from minipeft.lora.replication import check_map, replicate
from minipeft.stored import MOST_COUNT, check_regex, is_finite
from minipeft.tokens.find import check_indices

_UNSUPPORTED = (
    *(
        "megatron_config",
        "velora_config",
        "alora_invocation_tokens",
        "use_qalora",
        "monteclora_config",
    ),
    *("use_bdlora", "arrow_config", "kasa_config"),
)

# Values of init_lora_weights that minipeft does not make: PEFT changes the base weight by them, from data, and a reader
# of the file would have to change it in the same way.
_CHANGE_THE_BASE = ("corda", "lora_ga")
# Each has a field of its own, which has no meaning beside another start.
_STARTS_WITH_A_CONFIG = ("loftq", "eva", *_CHANGE_THE_BASE)
# A mark in the files of adapters with "pissa_niter_N": the random numbers were drawn as in `variants.py`, from seed 0.
_OWN_DRAW = {"pissa_draw": "minipeft"}


def is_pissa(kind: Any) -> bool:
    """True if `init_lora_weights` is a kind of PiSSA, or OLoRA: the adapter subtracts what it starts from."""
    return isinstance(kind, str) and (kind.startswith("pissa") or kind == "olora")


def changes_base(kind: Any) -> bool:
    """True if an adapter of this `init_lora_weights` acts rightly only beside a base weight that it came with."""
    return is_pissa(kind) or kind == "loftq"


@dataclasses.dataclass
class LoraRuntimeConfig:
    """PEFT's `LoraRuntimeConfig`: settings that no file holds.

    Args:
        ephemeral_gpu_offload: Make DoRA's start on a GPU though the model is not there. It changes no number, and has
            no effect here.
    """

    ephemeral_gpu_offload: bool = False


@dataclasses.dataclass
class LoftQConfig:
    """PEFT's `LoftQConfig`.

    Args:
        loftq_bits: 4, for NF4: the one kind of quantization that minipeft has.
        loftq_iter: T, the rounds of algorithm 1.

    Raises ValueError for other bits, and fewer than 1 round.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits != 4:
            raise ValueError(f"loftq_bits must be 4 (NF4), got {self.loftq_bits!r}")
        if not isinstance(self.loftq_iter, int) or self.loftq_iter < 1:
            raise ValueError(f"loftq_iter must be a positive whole number, got {self.loftq_iter!r}")


@dataclasses.dataclass
class LoraConfig(PeftConfig):
    """PEFT's `LoraConfig`: the same names, defaults and JSON.

    Args:
        r: Rank of the update.
        target_modules: Names or name endings, a regular expression that matches whole names, or "all-linear".
            None takes the model family's usual targets.
        exclude_modules: Names, endings or a regular expression taken out of the targets again.
        lora_alpha: Numerator of `scaling`.
        lora_dropout: Probability of dropping an input feature of the update.
        fan_in_fan_out: Accepted for compatibility; the layer's own class says how its weight lies.
        bias: Which base biases the adapter trains copies of: "none", "all" of the model's, or "lora_only".
        use_rslora: scaling = lora_alpha / sqrt(r).
        modules_to_save: Modules that the adapter trains whole.
        init_lora_weights: True (B = 0), "gaussian" (the same with normal A), "pissa" or "pissa_niter_N" (the weight's
            principal components), "olora" (its QR factors), "loftq" (the error of quantization; for these see
            `variants.py`), "orthogonal" (both random, with B A = 0), or False or None (both random: no identity, for
            tests). "eva" is for stored adapters alone.
        target_parameters: Names or name endings of 3-D parameters of a mixture's experts, and of its routers' weights
            (see `experts.py`).
        loftq_config: A `LoftQConfig` or its fields, for init_lora_weights="loftq".
        layers_to_transform, layers_pattern: Only targets in layers of these numbers, counted in the module list
            called `layers_pattern`.
        rank_pattern, alpha_pattern: r and lora_alpha of targets (modules or parameters) whose name ends with the key
            (a regular expression).
        use_dora: Train the length of each output feature's weight too.
        trainable_token_indices: Token numbers whose vectors in the input embedding are trained too, or a dictionary of
            module names to such numbers (see `tokens/`); weights tied to an embedding follow it.
        layer_replication: Pairs of layer numbers, [[0, 4], [2, 5]], to build a deeper model of the base's layers, which
            stays (see `replication.py`).
        lora_bias: Give B a bias, h = W0 x + b + s (B A x + b_B); not with DoRA, and not on embeddings.

    Raises ValueError for values out of range, and for fields of PEFT's that minipeft lacks.
    """

    r: int = 8
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    use_dora: bool = False
    loftq_config: Any = dataclasses.field(default_factory=dict)
    target_parameters: list[str] | None = None
    lora_bias: bool = False

    # PEFT 0.21's further fields: here so that files round-trip, refused when they ask for something.
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list | dict | None = None
    eva_config: dict | None = None
    corda_config: dict | None = None
    lora_ga_config: dict | None = None
    velora_config: dict | None = None
    alora_invocation_tokens: list | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict | None = None
    layer_replication: list | None = None
    use_bdlora: dict | None = None
    arrow_config: dict | None = None
    kasa_config: dict | None = None
    ensure_weight_tying: bool = False
    runtime_config: LoraRuntimeConfig = dataclasses.field(default_factory=LoraRuntimeConfig)

    mergeable: ClassVar[bool] = True
    unsupported: ClassVar[Mapping[str, tuple]] = {
        **dict.fromkeys(_UNSUPPORTED, ()),
        # This field has a meaning only beside `megatron_config`, which is refused.
        "megatron_core": ("megatron.core",),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._say_nothing_by_nothing()
        for field in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, field)
            if isinstance(value, set | tuple):
                value = sorted(value)
            _check_names(field, value, expression=field != "modules_to_save")
            # As in PEFT, where scripts add to the set.
            setattr(self, field, set(value) if isinstance(value, list) and field != "modules_to_save" else value)
        for field in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, got {getattr(self, field)!r}")
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        for field in ("rank_pattern", "alpha_pattern"):
            _check_pattern(field, getattr(self, field))
        for name, alpha in self.alpha_pattern.items():
            _check_number(f"alpha_pattern[{name!r}]", alpha)
        _check_positive_int("r", self.r)
        for name, rank in self.rank_pattern.items():
            _check_positive_int(f"rank_pattern[{name!r}]", rank)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        if isinstance(self.target_parameters, str):
            raise TypeError(
                "`target_parameters` must be a list of strings or None. A string is no pattern here, unlike in "
                f"target_modules; got {self.target_parameters!r}"
            )
        rows = self.trainable_token_indices
        for name, indices in (rows if isinstance(rows, dict) else {} if rows is None else {"": rows}).items():
            check_indices(f"trainable_token_indices[{name!r}]" if name else "trainable_token_indices", indices)
        check_map(self.layer_replication)
        self._check_kind_of_start()
        self._check_loftq()
        self._check_bias_of_B()
        if not isinstance(self.runtime_config, LoraRuntimeConfig):
            raise ValueError(f"runtime_config must be a LoraRuntimeConfig, got {self.runtime_config!r}")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            check_regex("target_modules", self.target_modules)
        if isinstance(self.exclude_modules, str):
            check_regex("exclude_modules", self.exclude_modules)
        layers = self.layers_to_transform
        if layers is not None and not all(type(n) is int for n in (layers if isinstance(layers, list) else [layers])):
            raise ValueError(f"layers_to_transform must be a layer number or a list of them, got {layers!r}")
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(self, field) is not None and isinstance(self.target_modules, str):
                raise ValueError(
                    f"`{field}` cannot be used when `target_modules` is a str. Give a list of names, or put the layer "
                    f"numbers into the expression {self.target_modules!r}"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["runtime_config"]
        return values

    def _register_custom_module(self, custom_mapping: dict[type, type]) -> None:
        """Adapt modules of these classes by LoRA layers of your own (PEFT's method): see `minipeft/lora/custom.py`.

        Not stored: a config that is read from a folder must be told again.

        Raises TypeError for classes that cannot be used so.
        """
        from minipeft.lora.custom import check_custom

        check_custom(custom_mapping)
        self._custom_modules = {**getattr(self, "_custom_modules", {}), **custom_mapping}

    def reshape(self, model: Any) -> Callable[[], None]:
        return replicate(model, self.layer_replication) if self.layer_replication else super().reshape(model)

    def own_mixin(self, module: Any) -> Any:
        from minipeft.lora.custom import custom_mixin

        return custom_mixin(module, getattr(self, "_custom_modules", {}))

    def _say_nothing_by_nothing(self) -> None:
        """Read null, empty lists and the settings of another start as what they ask for: nothing."""
        for field in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"):
            setattr(self, field, getattr(self, field) if getattr(self, field) is not None else False)
        for field in ("rank_pattern", "alpha_pattern", "loftq_config"):
            setattr(self, field, getattr(self, field) if getattr(self, field) is not None else {})
        if self.trainable_token_indices in ([], {}):
            self.trainable_token_indices = None
        if self.init_lora_weights == "eva" and not self.eva_config:
            warnings.warn(
                "`init_lora_weights` is 'eva' but `eva_config` is not specified. Using default EVA config.",
                stacklevel=4,
            )
        for kind in _STARTS_WITH_A_CONFIG:
            if self.init_lora_weights != kind and getattr(self, f"{kind}_config"):
                warnings.warn(
                    f"`{kind}_config` specified but will be ignored when `init_lora_weights` is not {kind!r}.",
                    stacklevel=4,
                )
                self.loftq_config = {} if kind == "loftq" else self.loftq_config

    def _check_kind_of_start(self) -> None:
        kind = self.init_lora_weights
        known = (True, False, "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
        if kind in _CHANGE_THE_BASE:
            raise ValueError(
                f"init_lora_weights={kind!r} is not supported by minipeft: it changes the base weights, by data; an "
                "adapter that PEFT saves with path_initial_model_for_weight_conversion is plain LoRA, which loads"
            )
        if kind not in known and not re.fullmatch(r"pissa_niter_\d+", str(kind)):
            raise ValueError(
                "init_lora_weights must be True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N', 'olora' or "
                f"'loftq', got {kind!r}"
            )

    def check_start(self) -> None:
        if self.init_lora_weights == "eva":
            raise ValueError(
                "init_lora_weights='eva' starts from the principal components of data: minipeft loads such an adapter, "
                "but does not start one; take True, or 'pissa' for those of the weight"
            )
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {odd[0]} instead.")

    def file_marks(self) -> dict[str, str]:
        return _OWN_DRAW if self._starts_from_a_draw() else {}

    def check_marks(self, marks: Mapping[str, str], source: str) -> None:
        if self._starts_from_a_draw() and not _OWN_DRAW.items() <= marks.items():
            raise ValueError(
                f"{source}: init_lora_weights={self.init_lora_weights!r} starts from random numbers that PEFT does not "
                "store, so nobody can know what the adapter was trained from; where it was trained, save it with "
                "path_initial_model_for_weight_conversion, as plain LoRA"
            )

    def saving_notice(self) -> str | None:
        if not self._starts_from_a_draw():
            return None
        return (
            f"PEFT would start init_lora_weights={self.init_lora_weights!r} from other random numbers and read it "
            "wrongly; for PEFT, save it with path_initial_model_for_weight_conversion, as plain LoRA"
        )

    def fields_of_training(self) -> set[str]:
        start = set() if changes_base(self.init_lora_weights) else {"init_lora_weights"}
        return (
            super().fields_of_training()
            | start
            | {
                *(
                    "lora_dropout",
                    "fan_in_fan_out",
                    "eva_config",
                    "corda_config",
                    "lora_ga_config",
                    "qalora_group_size",
                ),
                # Where the adapter lies, which its tensors say.
                *("target_parameters", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
            }
        )

    def plain(self) -> LoraConfig:
        """Of a PiSSA adapter: B A - B0 A0 is LoRA of twice the rank, at the same scaling."""
        if not is_pissa(self.init_lora_weights):
            super().plain()
        times = math.sqrt(2) if self.use_rslora else 2
        return dataclasses.replace(
            copy.deepcopy(self),
            init_lora_weights=True,
            r=2 * self.r,
            lora_alpha=times * self.lora_alpha,
            rank_pattern={name: 2 * r for name, r in self.rank_pattern.items()},
            alpha_pattern={name: times * alpha for name, alpha in self.alpha_pattern.items()},
        )

    def _starts_from_a_draw(self) -> bool:
        return str(self.init_lora_weights).startswith("pissa_niter_")

    def _check_loftq(self) -> None:
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = dataclasses.asdict(self.loftq_config)
        if self.init_lora_weights == "loftq" and not self.loftq_config:
            raise ValueError(
                "init_lora_weights='loftq' and loftq_config go together, got "
                f"{self.init_lora_weights!r} and {self.loftq_config!r}"
            )
        LoftQConfig(**self.loftq_config)
        if self.loftq_config and self.use_dora:
            raise ValueError("use_dora with init_lora_weights='loftq' is not supported by minipeft")

    def _check_bias_of_B(self) -> None:
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(
                "The argument lora_bias=True is for init_lora_weights=True or False alone, got "
                f"{self.init_lora_weights!r}"
            )
        if self.lora_bias and self.use_dora:
            raise ValueError("The argument lora_bias=True is not for DoRA: give up one of lora_bias and use_dora")

    def settings_for(self, path: str) -> tuple[int, float, float]:
        """(r, lora_alpha, scaling) of the target at `path`."""
        r = _by_pattern(self.rank_pattern, path, self.r)
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return r, alpha, alpha / (math.sqrt(r) if self.use_rslora else r)


def _by_pattern(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _check_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if value > MOST_COUNT:
        raise ValueError(f"{name} must be at most {MOST_COUNT:,}, got {value}: no layer has as many features")


def _check_names(field: str, value: Any, expression: bool) -> None:
    if value is None or (expression and isinstance(value, str)):
        return
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        kinds = "a list of names" + (" or a regular expression" if expression else "")
        raise ValueError(f"{field} must be {kinds}, got {value!r}")


def _check_number(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        raise ValueError(f"{field} must be a finite number, got {value!r}")


def _check_pattern(field: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{field} must map ends of names to numbers, got {value!r}")
    for key in value:
        check_regex(f"{field} key", key)
