"""PEFT's public names, and the modules under which scripts import them: one table and one finder, no file for each.

`from minipeft.tuners.lora import LoraLayer`, `from minipeft.utils import get_peft_model_state_dict`: every module of
PEFT that scripts import from is made on demand, and a name in it is looked up where minipeft has it. A name that
minipeft does not have raises an error that says why. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.abc
import importlib.machinery
import re
import sys
import types
from collections.abc import Callable
from typing import Any

# The version of PEFT whose names, arguments and files minipeft follows.
PEFT_VERSION = "0.21.2"

_TASKS = (
    *("CausalLM", "FeatureExtraction", "QuestionAnswering", "Seq2SeqLM", "SequenceClassification"),
    "TokenClassification",
)

# The names of `minipeft` itself, by the module that has them. "name=other" is called `other` there.
_PUBLIC: dict[str, tuple[str, ...]] = {
    "minipeft.auto": ("AutoPeftModel", *(f"AutoPeftModelFor{task}" for task in _TASKS)),
    "minipeft.bottleneck.config": ("BottleneckConfig",),
    "minipeft.config": ("PeftConfig", "PeftType", "TaskType", "get_peft_config"),
    "minipeft.directory": ("load_peft_weights",),
    "minipeft.errors": ("NoMatchingPeftModuleError", "PeftError", "PeftWarning"),
    "minipeft.lora.config": ("LoftQConfig", "LoraConfig", "LoraRuntimeConfig"),
    "minipeft.lora.rates": ("create_loraplus_optimizer", "lora_plus_groups"),
    "minipeft.lora.hotswap": ("hotswap_adapter",),
    "minipeft.lora.packed_start": ("replace_lora_weights_loftq",),
    "minipeft.lora.wrapper": ("LoraModel",),
    "minipeft.mappings": (
        *("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"),
        "PEFT_TYPE_TO_TUNER_MAPPING",
    ),
    "minipeft.model": ("PeftModel", *(f"PeftModelFor{task}" for task in _TASKS), "get_peft_model"),
    "minipeft.nf4": ("BitsAndBytesConfig", "NF4Config", "quantize_model", "quantized_sizes"),
    "minipeft.optim": ("PagedAdamW",),
    "minipeft.preparing": ("inject_adapter_in_model", "prepare_model_for_kbit_training"),
    "minipeft.state": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "minipeft.base_state": ("get_base_model_state_dict", "set_base_model_state_dict"),
    "minipeft.status": ("get_layer_status", "get_model_status"),
    "minipeft.tokens.config": ("TrainableTokensConfig",),
    "minipeft.tokens.wrapper": ("TrainableTokensModel",),
    "minipeft.utilities": ("cast_mixed_precision_params", "shift_tokens_right"),
    "minipeft.virtual.prefix": ("PrefixEncoder", "PrefixTuningConfig", "initialize_kv_prefix_from_text"),
    "minipeft.virtual.prompt": ("PromptEmbedding=PromptEncoder", "PromptTuningConfig", "PromptTuningInit"),
    "minipeft.virtual.tokens": ("PromptLearningConfig=VirtualTokensConfig",),
    "minipeft.wrappers": ("PeftMixedModel",),
}

# The further names of PEFT's modules, as above. A package has the names of its modules too, and every module those of
# `minipeft` itself: PEFT's own move between its modules from release to release.
_FURTHER: dict[str, dict[str, tuple[str, ...]]] = {
    "config": {"minipeft.config": ("PeftConfigMixin=PeftConfig",)},
    "auto": {},
    "functional": {
        "minipeft.utilities": ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"),
    },
    "helpers": {
        "minipeft.config": ("check_if_peft_model",),
        "minipeft.lora.contexts": ("DoraCaching", "disable_input_dtype_casting", "rescale_adapter_scale"),
        "minipeft.signatures": ("update_forward_signature", "update_generate_signature", "update_signature"),
    },
    "import_utils": {
        "minipeft.utilities": (
            *("is_aqlm_available", "is_bnb_4bit_available", "is_bnb_available", "is_diffusers_available"),
            *("is_eetq_available", "is_gptqmodel_available", "is_hqq_available", "is_optimum_available"),
            *("is_torchao_available", "is_xpu_available"),
        )
    },
    "mapping": {"minipeft.mappings": ("PEFT_TYPE_TO_PREFIX_MAPPING",)},
    "mapping_func": {},
    "mixed_model": {},
    "optimizers": {},
    "optimizers.loraplus": {},
    "peft_model": {"minipeft.status": ("TunerLayerStatus=LayerStatus", "TunerModelStatus=ModelStatus")},
    "tuners": {},
    "tuners.lora": {},
    "tuners.lora.bnb": {"minipeft.lora.layers": ("Linear4bit=LoraNF4Linear",)},
    "tuners.lora.config": {},
    "tuners.lora.layer": {
        "minipeft.lora.layer": ("LoraLayer",),
        "minipeft.lora.layers": ("Linear=LoraDenseLayer", "Embedding=LoraEmbedding"),
        "minipeft.lora.experts": ("ParamWrapper=LoraParameters",),
    },
    "tuners.lora.model": {},
    "tuners.prefix_tuning": {},
    "tuners.prompt_tuning": {},
    "tuners.trainable_tokens": {},
    "tuners.trainable_tokens.config": {},
    "tuners.trainable_tokens.model": {},
    "tuners.trainable_tokens.layer": {"minipeft.tokens.layer": ("TrainableTokensLayer=TrainedRows",)},
    "tuners.tuners_utils": {
        "minipeft.targets": ("check_target_module_exists", "inspect_matched_modules"),
        "minipeft.names": (
            *("_filter_state_dict_by_key_prefixes", "_get_tuner_state_dict_key_prefixes"),
            "_maybe_include_all_linear_layers",
        ),
        "minipeft.shorter": ("_find_minimal_target_modules",),
        "minipeft.wrappers": ("BaseTuner", "BaseTunerLayer"),
    },
    "utils": {},
    "utils.constants": {
        "minipeft.config": ("CONFIG_NAME",),
        "minipeft.directory": ("SAFETENSORS_WEIGHTS_NAME=WEIGHTS_NAME", "WEIGHTS_NAME=PICKLE_NAME"),
        "minipeft.lora.default_targets": ("TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=DEFAULT_TARGETS",),
        "minipeft.shorter": ("MIN_TARGET_MODULES_FOR_OPTIMIZATION",),
        "minipeft.utilities": ("INCLUDE_LINEAR_LAYERS_SHORTHAND=ALL_LINEAR",),
        "minipeft.wrappers": ("DUMMY_MODEL_CONFIG",),
    },
    "utils.error": {},
    "utils.hotswap": {
        "minipeft.lora.hotswap": ("hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"),
    },
    "utils.loftq_utils": {},
    "utils.other": {
        "minipeft.copies": ("ModulesToSaveWrapper=TrainedModule",),
        "minipeft.tokens.layer": ("TrainableTokensWrapper=TrainedRows",),
        "minipeft.tokens.wrapper": ("AuxiliaryTrainingWrapper",),
        "minipeft.utilities": (
            *("_freeze_adapter", "_get_batch_size", "_get_no_split_modules", "_get_submodules", "_set_adapter"),
            *("fsdp_auto_wrap_policy", "get_pattern_key", "id_tensor_storage", "infer_device", "str_to_bool"),
            "transpose",
        ),
        "minipeft.tying": ("_get_module_names_tied_with_embedding=tied_with_embedding",),
    },
    "utils.peft_types": {},
    "utils.save_and_load": {},
    "utils.warning": {},
}

_METHODS = "of a method that minipeft does not have (it has LoRA, bottleneck adapters, prefix and prompt tuning)"
_VARIANTS = "of a variant of LoRA that minipeft does not have"
# Names of `peft.__all__` that minipeft does not have -> the reason: regular expressions over whole names.
ABSENT: dict[str, str] = {
    r"(AdaLora|Adamss|AdaptionPrompt|BOFT|Beft|C3A|CPT|Cartridge|Deft|Delora|FourierFT|Frod|Glora|Gralora|HRA|Hira|IA3"
    r"|LNTuning|Lily|LoHa|LoKr|Miss|MultitaskPromptTuning|OFT|OSF|Peanut|Poly|PromptEncoder|Psoft|Pvera|RandLora|Road"
    r"|Shadow|Shira|Supertuning|TinyLora|UniLora|VBLoRA|Vera|WaveFT|XLora)"
    r"(Config|Model|Embedding|Encoder|Init|ReparameterizationType|)": _METHODS,
    r"(Arrow|BdLora|Eva|Kasa|LoraGA|Monteclora|Velora)Config|create_arrow_model|get_eva_state_dict|preprocess_loraga"
    r"|initialize_lora_eva_weights": _VARIANTS,
    r"compose_cartridge_adapters|(initialize_kv_prefix|prompt_embeddings)_from_past_key_values": (
        "about cartridges, which minipeft does not have; initialize_kv_prefix_from_text starts a prefix from text"
    ),
    r"convert_to_lora|save_as_lora": "for adapters of other methods than minipeft has",
    r"find_kappa_target_modules|KappaTuneSelector": "for choosing targets by their condition numbers, not in minipeft",
    r"bloom_model_postprocess_past_key_value|TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": (
        "about layouts of the key-value cache of old versions of transformers"
    ),
}


def _homes(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """name -> "module:name there"."""
    homes = {}
    for module, names in table.items():
        for name in names:
            public, _, own = name.partition("=")
            homes[public] = f"{module}:{own or public}"
    return homes


# Of `minipeft` itself, and of each of PEFT's modules.
HOMES: dict[str, str] = _homes(_PUBLIC)
PLACES: dict[str, dict[str, str]] = {path: dict(HOMES) for path in _FURTHER}
for _path, _names in PLACES.items():
    for _inner, _table in _FURTHER.items():
        if f"{_inner}.".startswith(f"{_path}."):
            _names |= _homes(_table)

# Modules that are imported beside another one. Importing minipeft.nf4.hf lets transformers read 4-bit checkpoints, so
# that a script that uses adapters can load its base model.
_WITH = {"minipeft.auto": "minipeft.nf4.hf", "minipeft.model": "minipeft.nf4.hf"}


def fetch(home: str) -> Any:
    """The object at "module:name"; imports the module, and those that belong beside it."""
    module, _, name = home.partition(":")
    if module in _WITH:
        importlib.import_module(_WITH[module])
    return getattr(importlib.import_module(module), name)


def attributes_of(path: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of PEFT's module `path` ("utils.other"), or of `minipeft` itself ("")."""
    module = f"minipeft.{path}" if path else "minipeft"
    homes = PLACES[path] if path else HOMES

    def __getattr__(name: str) -> Any:
        inner = f"{path}.{name}" if path else name
        if name in homes:
            value = fetch(homes[name])
            setattr(sys.modules[module], name, value)
            return value
        if inner in PLACES:
            return importlib.import_module(f"minipeft.{inner}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}{_why_not(name, homes)}")

    def __dir__() -> list[str]:
        start = f"{path}." if path else ""
        inner = {p.removeprefix(start).partition(".")[0] for p in PLACES if p.startswith(start)}
        return sorted({*vars(sys.modules[module]), *homes, *inner})

    return __getattr__, __dir__


def _why_not(name: str, homes: dict[str, str]) -> str:
    """The end of an error about a name that a module does not have; empty if there is nothing to say."""
    reason = next((reason for names, reason in ABSENT.items() if re.fullmatch(names, name)), None)
    if reason is not None:
        return f": it is {reason}"
    near = difflib.get_close_matches(name, homes, n=1, cutoff=0.8) if not name.startswith("__") else []
    return f"; did you mean {near[0]!r}?" if near else ""


class _Module(types.ModuleType):
    """A module of PEFT's that has no file here."""

    # `from module import name` reads it from the type, not from the object.
    def __getattr__(self, name: str) -> Any:
        return attributes_of(self.__name__.removeprefix("minipeft."))[0](name)

    def __dir__(self) -> list[str]:
        return attributes_of(self.__name__.removeprefix("minipeft."))[1]()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the modules of `PLACES` that have no file."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, place = fullname.partition(".")
        if package != "minipeft":
            return None
        if place in PLACES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        # `from minipeft import name` looks for a module of that name last, and its own error would not say why.
        module, _, name = fullname.rpartition(".")
        outer = module.removeprefix("minipeft").removeprefix(".")
        reason = _why_not(name, PLACES.get(outer, HOMES))
        if reason and (not outer or outer in PLACES):
            raise ImportError(f"cannot import name {name!r} from {module!r}{reason}", name=module)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name, f"The names of PEFT's `{spec.name.replace('minipeft', 'peft', 1)}`.")

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []
        module.__all__ = sorted(PLACES[module.__name__.removeprefix("minipeft.")])  # type: ignore[attr-defined]


def register() -> None:
    """Let Python find the modules of `PLACES`, after those that have a file."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
