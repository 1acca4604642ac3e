"""NF4 as transformers' `quantization_config`: our `NF4Config`, and `BitsAndBytesConfig` with transformers' arguments.

Both are the same class inside, because `from_pretrained` compares the class names of the configuration it is
given and the one it finds in `config.json`. On disk the configuration is written as bitsandbytes' (method
"bitsandbytes", `load_in_4bit`, ...), so a saved 4-bit model also loads with transformers + bitsandbytes.

Source of the names and defaults: `transformers.utils.quantization_config.BitsAndBytesConfig` (5.23).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from minipeft_kernels.nf4.checks import check_blocksize

logger = logging.getLogger("minipeft")

METHOD = "minipeft_nf4"
# The same packed bytes under another dtype; bitsandbytes offers these so that FSDP1 can flatten them.
STORAGE_DTYPES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
# Options of bitsandbytes' 8-bit method. They say nothing about 4-bit weights, so a checkpoint may hold any value.
_INT8_DEFAULTS: dict[str, Any] = {
    "llm_int8_threshold": 6.0,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
}


def _other_name(field: str, check: Callable[[Any], Any]) -> Any:
    """A property: bitsandbytes' name for a field of ours."""

    def get(config: Any) -> Any:
        """The field of ours."""
        return getattr(config, field)

    def put(config: Any, value: Any) -> None:
        setattr(config, field, check(value))

    return property(get, put)


def _always(name: str, value: Any) -> Any:
    """A property: an option of bitsandbytes' that has one value here."""

    def get(config: Any) -> Any:
        """The one value."""
        return value

    def refuse_others(config: Any, new: Any) -> None:
        if new != value:
            raise ValueError(f"{name}={new!r}: it is always {value!r} here, minipeft has 4-bit NF4 kept as uint8 only")

    return property(get, refuse_others)


class NF4Config(QuantizationConfigMixin):
    """Settings for `from_pretrained` and `quantize_model`, which put a model's linear layers into NF4.

    Args:
        blocksize: consecutive weights that share one absmax; a power of two from 32 to 4096.
        double_quant: quantize the absmax to 8 bits too (4.127 instead of 4.5 bits a weight at blocksize 64).
        compute_dtype: dtype of the matrix products, a `torch.dtype` or its name; None is the input's.
        skip_modules: names of modules to leave dense, matched as transformers does (a prefix up to a dot, a
            suffix, or a regular expression). None leaves the output head, tied weights and the last module
            dense; a list takes the place of that default, as in bitsandbytes, save that tied weights and the
            modules the model itself keeps in float32 stay dense in any case.
        experts: pack the experts of a mixture, each expert's matrices by themselves. False leaves them dense. None
            packs them, and of a checkpoint that is packed already takes them as they are stored.

    The fields and methods of transformers' `BitsAndBytesConfig` are here, too, for code that reads them
    (`load_in_4bit`, `bnb_4bit_compute_dtype`, `quantization_method()`, ...).

    Raises:
        ValueError: a blocksize or dtype that does not exist.
        TypeError: an argument of another type.

    Source: Dettmers et al. 2023 (QLoRA), section 3.
    """

    quant_method = METHOD

    load_in_4bit = _always("load_in_4bit", True)
    load_in_8bit = _always("load_in_8bit", False)
    bnb_4bit_quant_type = _always("bnb_4bit_quant_type", "nf4")
    bnb_4bit_quant_storage = _always("bnb_4bit_quant_storage", torch.uint8)
    bnb_4bit_use_double_quant = _other_name("double_quant", lambda value: _flag("bnb_4bit_use_double_quant", value))
    bnb_4bit_compute_dtype = _other_name("compute_dtype", lambda value: _compute_dtype(value))
    llm_int8_skip_modules = _other_name("skip_modules", lambda value: _names(value))
    llm_int8_threshold = _always("llm_int8_threshold", _INT8_DEFAULTS["llm_int8_threshold"])
    llm_int8_enable_fp32_cpu_offload = _always("llm_int8_enable_fp32_cpu_offload", False)
    llm_int8_has_fp16_weight = _always("llm_int8_has_fp16_weight", False)

    def __init__(
        self,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        experts: bool | None = None,
    ) -> None:
        check_blocksize(blocksize)
        self.blocksize = blocksize
        self.double_quant = _flag("double_quant", double_quant)
        self.compute_dtype = _compute_dtype(compute_dtype)
        self.skip_modules = _names(skip_modules)
        self.experts = None if experts is None else _flag("experts", experts)

    def is_quantizable(self) -> bool:
        """True, as for every configuration of bitsandbytes' that quantizes."""
        return True

    def quantization_method(self) -> str:
        """bitsandbytes' word for the format."""
        return "nf4"

    def to_dict(self) -> dict[str, Any]:
        """The entry of `config.json`: bitsandbytes' form, and `blocksize`, which that reads from the tensors."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": _dtype_name(self.compute_dtype),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": None if self.skip_modules is None else list(self.skip_modules),
            **_INT8_DEFAULTS,
            "blocksize": self.blocksize,
            **({} if self.experts is None else {"experts": self.experts}),
        }

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> NF4Config | tuple[NF4Config, dict[str, Any]]:
        """Read what `to_dict` or bitsandbytes wrote; our own argument names work too.

        Raises:
            ValueError: the dictionary asks for what NF4 is not (fp4, 8 bits) or holds an unknown option.
        """
        options = {k: v for k, v in config_dict.items() if k != "quant_method"}
        if config_dict.get("quant_method") == METHOD and "load_in_4bit" not in config_dict:
            config = cls(**options)
        else:
            config = _from_bitsandbytes_dict(options)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config


def BitsAndBytesConfig(
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    llm_int8_threshold: float = 6.0,
    llm_int8_skip_modules: list[str] | None = None,
    llm_int8_enable_fp32_cpu_offload: bool = False,
    llm_int8_has_fp16_weight: bool = False,
    bnb_4bit_compute_dtype: torch.dtype | str | None = None,
    bnb_4bit_quant_type: str = "fp4",
    bnb_4bit_use_double_quant: bool = False,
    bnb_4bit_quant_storage: torch.dtype | str | None = None,
    experts: bool | None = None,
    **unknown: Any,
) -> NF4Config:
    """`NF4Config` from the arguments of transformers' class of this name, with its defaults.

    `bnb_4bit_quant_storage` is accepted and has no effect, which a warning says: the packed bytes are the same
    under every dtype, and here they are always uint8. The compute dtype defaults to float32, as there. `experts` is
    `NF4Config`'s: a mixture's experts are packed, which bitsandbytes leaves dense, unless it is False.

    Raises:
        ValueError: an option that asks for something else than NF4; the message says what to do.
    """
    _refuse_other_formats(load_in_4bit, load_in_8bit, bnb_4bit_quant_type)
    given = {
        "llm_int8_threshold": llm_int8_threshold,
        "llm_int8_enable_fp32_cpu_offload": llm_int8_enable_fp32_cpu_offload,
        "llm_int8_has_fp16_weight": llm_int8_has_fp16_weight,
    }
    for name, value in given.items():
        if value != _INT8_DEFAULTS[name]:
            raise ValueError(f"{name}={value!r} belongs to 8-bit quantization, which minipeft lacks: leave it out")
    for name, value in unknown.items():
        raise ValueError(f"BitsAndBytesConfig got {name}={value!r}, an option minipeft does not know: leave it out")
    _check_storage(bnb_4bit_quant_storage)
    if bnb_4bit_quant_storage is not None and _dtype_name(bnb_4bit_quant_storage) != "uint8":
        logger.warning("bnb_4bit_quant_storage=%s has no effect: weights are kept as uint8", bnb_4bit_quant_storage)
    return NF4Config(
        double_quant=bnb_4bit_use_double_quant,
        compute_dtype=torch.float32 if bnb_4bit_compute_dtype is None else bnb_4bit_compute_dtype,
        skip_modules=llm_int8_skip_modules,
        experts=experts,
    )


def _from_bitsandbytes_dict(options: dict[str, Any]) -> NF4Config:
    """The configuration of a checkpoint that bitsandbytes or we wrote."""
    # transformers writes its two private flags beside the public ones
    options = {k: v for k, v in options.items() if k not in ("_load_in_4bit", "_load_in_8bit")}
    load_in_4bit, load_in_8bit = options.pop("load_in_4bit", False), options.pop("load_in_8bit", False)
    _refuse_other_formats(load_in_4bit, load_in_8bit, options.pop("bnb_4bit_quant_type", "fp4"))
    _check_storage(options.pop("bnb_4bit_quant_storage", None))
    config = NF4Config(
        blocksize=options.pop("blocksize", 64),
        double_quant=options.pop("bnb_4bit_use_double_quant", False),
        compute_dtype=options.pop("bnb_4bit_compute_dtype", None),
        skip_modules=options.pop("llm_int8_skip_modules", None),
        experts=options.pop("experts", None),
    )
    unknown = {k: v for k, v in options.items() if k not in _INT8_DEFAULTS and v}
    if unknown:
        raise ValueError(f"the quantization config asks for {unknown}, which minipeft does not know")
    return config


def _refuse_other_formats(load_in_4bit: bool, load_in_8bit: bool, quant_type: str) -> None:
    if load_in_8bit:
        raise ValueError("load_in_8bit=True: minipeft has 4-bit NF4 only; use load_in_4bit=True instead")
    if load_in_4bit is not True:
        raise ValueError(f"load_in_4bit={load_in_4bit!r}: pass load_in_4bit=True, minipeft has 4-bit NF4 only")
    if quant_type != "nf4":
        raise ValueError(
            f"bnb_4bit_quant_type={quant_type!r} (transformers' default is 'fp4'): minipeft has 'nf4' only; pass "
            "bnb_4bit_quant_type='nf4', or call read_bitsandbytes_with('transformers') to load an fp4 checkpoint "
            "with bitsandbytes"
        )


def _check_storage(storage: torch.dtype | str | None) -> None:
    if storage is not None and _dtype_name(storage) not in STORAGE_DTYPES:
        raise ValueError(f"bnb_4bit_quant_storage is {storage!r}; expected one of {', '.join(STORAGE_DTYPES)}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def _compute_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, _dtype_name(dtype) or "", None)
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"compute_dtype is {dtype!r}; expected float32, bfloat16, float16 or None (the input's)")
    return found


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _names(names: list[str] | None) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"skip_modules must be a list of module names, not {names!r}")
    return list(names)
