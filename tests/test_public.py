"""PEFT's names: each is importable from where PEFT has it, or an error says why not."""

import importlib
import re
import sys

import peft
import peft.functional
import peft.utils
import pytest
import torch
from peft.tuners import lora as peft_lora
from processes import run_process
from tiny import tiny_llama
from torch import nn

import minipeft
from minipeft import LoraConfig, PrefixTuningConfig, get_peft_model, public
from minipeft.lora.layer import LoraLayer

# Public names of `peft.utils` that minipeft does not have: tables of other methods' targets, other ways to quantize,
# and what PEFT's own code calls.
_OF_UTILS = (
    r"TRANSFORMERS_MODELS_TO_(?!LORA_)\w+|TrainableTokensWrapper|ALLOWED_COMPUTE_DTYPES|UPCAST_DTYPES|register_peft_method"
    r"|get_gptqmodel_quant_linear|get_quantization_config|get_quantization_kwargs|quantization_extra_repr"
    r"|resolve_quantization_backend|map_cache_to_layer_device_map|set_additional_trainable_modules|_is_valid_match"
    r"|_get_input_embeddings_name|_prepare_prompt_learning_config|_set_trainable"
)


def _told(name: str) -> bool:
    return any(re.fullmatch(names, name) for names in public.ABSENT)


@pytest.mark.parametrize("name", sorted(peft.__all__))
def test_every_public_name_of_peft_is_there_or_its_absence_has_a_reason(name: str) -> None:
    if name in public.HOMES:
        assert not _told(name)
        assert getattr(minipeft, name) is not None
        assert name in dir(minipeft)
        return
    assert _told(name)
    with pytest.raises(AttributeError, match=f"{name}.*: it is "):
        getattr(minipeft, name)
    with pytest.raises(ImportError, match=f"cannot import name '{name}' from 'minipeft': it is "):
        importlib.import_module(f"minipeft.{name}")


@pytest.mark.parametrize(
    ("module", "absent"),
    [("utils", _OF_UTILS), ("tuners.lora", "Conv[123]d|GPTQLoraLinear"), ("functional", "")],
)
def test_modules_of_peft_have_its_names(module: str, absent: str) -> None:
    theirs = {"utils": peft.utils, "tuners.lora": peft_lora, "functional": peft.functional}[module]
    ours = importlib.import_module(f"minipeft.{module}")
    lacking = {name for name in theirs.__all__ if not hasattr(ours, name)}
    assert {name for name in lacking if not _told(name) and not re.fullmatch(absent, name)} == set()
    assert set(theirs.__all__) - lacking <= set(dir(ours))


@pytest.mark.parametrize("path", public.PLACES)
def test_every_entry_leads_somewhere(path: str) -> None:
    module = importlib.import_module(f"minipeft.{path}")
    for name, home in public.PLACES[path].items():
        assert getattr(module, name) is public.fetch(home)
    assert importlib.util.find_spec(f"peft.{path}") is not None


def test_modules_are_reached_through_minipeft_too() -> None:
    code = "import minipeft; assert minipeft.tuners.lora.layer.LoraLayer is minipeft.tuners.lora.LoraLayer"
    run_process([sys.executable, "-c", code], check=True)
    run_process([sys.executable, "-c", "import minipeft.utils, sys; assert 'torch' not in sys.modules"], check=True)


def test_a_name_that_is_nowhere_is_an_error_and_a_near_one_is_named() -> None:
    with pytest.raises(ImportError, match=r"cannot import name 'LoraConfg' .*'LoraConfig'"):
        from minipeft.tuners.lora import LoraConfg  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'nope'"):
        from minipeft.utils import nope  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"minipeft\.tuners\.adalora"):
        importlib.import_module("minipeft.tuners.adalora")
    assert not hasattr(minipeft.tuners, "AdaLoraModel")


def test_adapted_objects_are_instances_of_the_classes_of_peft_that_would_wrap_them() -> None:
    from minipeft.tuners.lora import Linear, LoraModel
    from minipeft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from minipeft.utils import ModulesToSaveWrapper

    model = tiny_llama()
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all")
    assert not isinstance(model, BaseTuner | LoraModel)
    get_peft_model(model, config)
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for ours, other in (
        (BaseTunerLayer, peft.tuners.tuners_utils.BaseTunerLayer),
        (ModulesToSaveWrapper, peft.utils.ModulesToSaveWrapper),
        (LoraLayer, peft_lora.LoraLayer),
        (Linear, peft_lora.Linear),
    ):
        # Whatever the wrapper is called, it is in the same place.
        wrapped = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if isinstance(m, other)}
        assert {name for name, module in model.named_modules() if isinstance(module, ours)} == wrapped
    assert isinstance(model.base_model, BaseTuner)
    assert isinstance(model, LoraModel)
    assert not issubclass(nn.Linear, BaseTunerLayer)


def test_lora_model_makes_a_model_with_lora() -> None:
    from minipeft.tuners.lora import LoraModel

    model = LoraModel(tiny_llama(), {"one": LoraConfig(target_modules=["q_proj"])}, "one")
    assert isinstance(model, LoraModel)
    assert list(model.peft_config) == ["one"]


def test_the_mappings_are_those_of_peft() -> None:
    for kind in minipeft.PeftType:
        config_class = minipeft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        assert config_class is minipeft.PEFT_TYPE_TO_CONFIG_MAPPING[kind.value]
        if kind.value in peft.PeftType.__members__:
            assert config_class.__name__ == peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind.value].__name__
            theirs = peft.PEFT_TYPE_TO_TUNER_MAPPING[kind.value].__name__
            assert getattr(minipeft, theirs) is minipeft.PEFT_TYPE_TO_TUNER_MAPPING[kind]
    assert minipeft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["LORA"] == "lora_"
    assert {name: kind.__name__ for name, kind in minipeft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()} == {
        name: kind.__name__ for name, kind in peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()
    }
    with pytest.raises(KeyError):
        minipeft.PEFT_TYPE_TO_CONFIG_MAPPING["IA3"]
    assert list(minipeft.PEFT_TYPE_TO_CONFIG_MAPPING) == list(minipeft.PeftType)


def test_the_version_is_the_one_of_peft_whose_names_these_are() -> None:
    assert minipeft.__version__ == peft.__version__


def test_adapters_of_a_model_without_verbs_are_switched_and_deleted_by_functions() -> None:
    from minipeft.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad

    model = tiny_llama().to(torch.bfloat16)
    ids = torch.arange(5)[None]
    plain = model(ids).logits
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    for name in ("a", "b"):
        minipeft.inject_adapter_in_model(config, model, name)
    of_b = model(ids).logits
    set_adapter(model, "a")
    of_a = model(ids).logits
    assert not torch.equal(of_a, of_b)
    layer = model.model.layers[0].self_attn.q_proj
    assert [layer.lora_A[name].weight.requires_grad for name in "ab"] == [True, False]
    set_requires_grad(model, ["a"], False)
    assert [layer.lora_A[name].weight.requires_grad for name in "ab"] == [False, False]
    set_adapter(model, ["a", "b"], inference_mode=True)
    assert [layer.lora_A[name].weight.requires_grad for name in "ab"] == [False, False]
    set_adapter(model, "a")
    layer.lora_A["a"].to(torch.bfloat16)
    cast_adapter_dtype(model, "a", autocast_adapter_dtype=False)
    assert layer.lora_A["a"].weight.dtype == torch.bfloat16
    cast_adapter_dtype(model, "a")
    assert layer.lora_A["a"].weight.dtype == torch.float32
    assert delete_adapter(model, "a", "lora_") == ["b"]
    assert torch.equal(model(ids).logits, of_b)
    with pytest.raises(ValueError, match="no adapter called 'a'; there are \\['b'\\]"):
        set_adapter(model, "a")
    assert delete_adapter(model, "b") is None
    assert torch.equal(model(ids).logits, plain)


def test_the_small_functions_answer_as_those_of_peft() -> None:
    theirs, ours = peft.utils.other, minipeft.utils.other
    labels = torch.tensor([[5, -100, 7], [1, 2, -100]])
    assert torch.equal(ours.shift_tokens_right(labels, 0, 9), theirs.shift_tokens_right(labels, 0, 9))
    weight = torch.randn(3, 2)
    for flag in (True, False):
        assert torch.equal(ours.transpose(weight, flag), theirs.transpose(weight, flag))
    assert ours.infer_device() == theirs.infer_device()
    for word in ("yes", "On", "f", "0"):
        assert ours.str_to_bool(word) == theirs.str_to_bool(word)
    with pytest.raises(ValueError, match="maybe"):
        ours.str_to_bool("maybe")
    for keys, name in (
        (["q_proj", "layers.1.q_proj"], "model.layers.1.q_proj"),
        ([r".*\.0\..*", "x"], "a.0.b"),
        ([], "a"),
    ):
        assert ours.get_pattern_key(keys, name) == theirs.get_pattern_key(keys, name)
    assert ours.id_tensor_storage(weight) == ours.id_tensor_storage(weight.T)
    assert ours._get_batch_size(None, weight) == theirs._get_batch_size(None, weight) == 3
    parent, module, name = ours._get_submodules(tiny_llama(), "model.layers.0.self_attn.q_proj")
    assert getattr(parent, name) is module


def test_mixed_precision_casts_as_peft_does() -> None:
    for library in (minipeft, peft):
        model = library.get_peft_model(tiny_llama(), library.LoraConfig(target_modules=["q_proj"]))
        library.cast_mixed_precision_params(model, torch.bfloat16)
        for parameter in model.parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_the_policy_for_fsdp_wraps_blocks_and_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    from minipeft.utils.other import fsdp_auto_wrap_policy

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    policy = fsdp_auto_wrap_policy(model)
    wrapped = [name for name, module in model.named_modules() if policy(module, False, 0)]
    leaves = [name for name in wrapped if "lora_" in name]
    assert leaves == [n.removesuffix(".weight") for n, p in model.named_parameters() if p.requires_grad]
    assert [name for name in wrapped if name not in leaves] == [
        f"model.layers.{n}" for n in range(len(model.model.layers))
    ]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchLayer")
    with pytest.raises(ValueError, match="no module of class 'NoSuchLayer'"):
        fsdp_auto_wrap_policy(model)


def test_signatures_are_the_plain_model_s_already() -> None:
    import inspect

    from minipeft.helpers import update_signature

    plain = inspect.signature(tiny_llama().forward)
    model = get_peft_model(tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    update_signature(model)
    assert inspect.signature(model.forward) == plain
    assert "max_new_tokens" in inspect.signature(model.generate).parameters or "kwargs" in str(
        inspect.signature(model.generate)
    )
    with pytest.raises(ValueError, match="'backward'"):
        update_signature(model, "backward")


def test_the_base_state_has_the_base_model_s_own_names_and_goes_in_again() -> None:
    base = tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all", init_lora_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("other", LoraConfig(target_modules=["v_proj", "embed_tokens"], use_dora=True))
    state = minipeft.get_base_model_state_dict(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    new = {name: torch.full_like(tensor, 0.25) for name, tensor in before.items()}
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    result = minipeft.set_base_model_state_dict(model, new)
    assert result == ([], [])
    assert all((tensor == 0.25).all() for tensor in minipeft.get_base_model_state_dict(model).values())
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters() if name in trained)
    del new["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: model.norm.weight"):
        minipeft.set_base_model_state_dict(model, new)
    assert minipeft.set_base_model_state_dict(model, {**new, "x": new["lm_head.weight"]}, strict=False) == (
        ["model.norm.weight"],
        ["x"],
    )
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged"):
        minipeft.set_base_model_state_dict(model, before)


@pytest.mark.parametrize("multiplier", [0, 0.5, -2.0])
def test_rescaling_scales_every_update_as_in_peft_and_ends_with_the_block(multiplier: float) -> None:
    from minipeft.helpers import rescale_adapter_scale

    config = {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False, "rank_pattern": {"q_proj": 3}}
    ours, ids = get_peft_model(tiny_llama().eval(), LoraConfig(**config)), torch.arange(5)[None]
    theirs = peft.get_peft_model(tiny_llama().eval(), peft.LoraConfig(**config))
    peft.set_peft_model_state_dict(theirs, minipeft.get_peft_model_state_dict(ours))
    before = ours(ids).logits
    with rescale_adapter_scale(ours, multiplier), peft.helpers.rescale_adapter_scale(theirs, multiplier):
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
        assert not torch.equal(ours(ids).logits, before)
    assert torch.equal(ours(ids).logits, before)
    with pytest.raises(TypeError, match="multiplier should be of type float"), rescale_adapter_scale(ours, "a"):
        pass
    with pytest.raises(ValueError, match="only supported for models"), rescale_adapter_scale(tiny_llama(), 1.0):
        pass
    with rescale_adapter_scale(ours, multiplier):
        scaled = ours(ids).logits
        plain = ours.merge_and_unload()
    torch.testing.assert_close(plain(ids).logits, scaled)
