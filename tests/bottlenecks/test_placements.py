"""AdapterHub's placements of bottleneck adapters, in every family that has usual places.

The oracle is AdapterHub's formula, written down here and applied by hooks to the plain model.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from replicas import replica_of
from tiny import randomize, tiny_llama
from torch import Tensor, nn

from minipeft import BottleneckConfig, LoraConfig, PeftModel, get_peft_model
from minipeft.bottleneck.places import PLACES

_SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"hidden_dropout_prob": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_BART = {
    **{"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
_T5 |= {"decoder_start_token_id": 0}
_IMAGE = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
_MOE |= {"shared_expert_intermediate_size": 16}
# Language models that transformers makes inside of those with images alone: tests/test_multimodal.py tries them.
INSIDE = ("qwen2_vl_text", "qwen2_5_vl_text")
# model_type -> the fields of its config; those that are not named take _SIZES.
SIZES: dict[str, dict[str, Any]] = {
    **{name: {**_SIZES, "head_dim": 16} for name in PLACES if name not in INSIDE},
    **{name: {**_SIZES, **_MOE} for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_bigcode": _GPT,
    "falcon": _SIZES,
    "gpt_neo": {**_SIZES, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "distilbert": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "dropout": 0.0},
    "electra": {**_SIZES, "embedding_size": 32},
    **{name: {**_SIZES, "attention_probs_dropout_prob": 0.0} for name in ("deberta", "deberta-v2")},
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "pegasus"), _BART),
    "whisper": {**_BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
    **{name: {**_IMAGE, "num_attention_heads": 2} for name in ("vit", "deit", "clip_vision_model")},
    "siglip_vision_model": {**_IMAGE, "num_attention_heads": 2},
    **{
        name: {"text_config": {**_SIZES, "hidden_size": width}, "vision_config": {**_IMAGE, "num_attention_heads": 2}}
        for name, width in (("clip", 24), ("siglip", _IMAGE["hidden_size"]))
    },
    "gemma3": {
        "text_config": {**_SIZES, "head_dim": 16},
        "vision_config": {**_IMAGE, "hidden_size": 16, "num_attention_heads": 2},
        "mm_tokens_per_image": 4,
    },
}
# Families whose layer norms stand after the sums: model_type -> the norm in the module that returns the normalized sum.
POST_NORM = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2"), "LayerNorm"),
    **{"distilbert": "output_layer_norm", "bart": "final_layer_norm"},
}
# The modules that return the sum after a feed-forward part in the other families, where it is not the layer.
T5_PARTS = ("encoder.block.0.layer.1", "decoder.block.0.layer.2")


def build(family: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES[family])
    # Grouped products take no float64.
    config._experts_implementation = "eager"
    text = family == "siglip_text_model"
    model = transformers.SiglipTextModel(config) if text else transformers.AutoModel.from_config(config)
    model.eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "norm" not in name.lower():
            nn.init.normal_(parameter, std=0.1)
    return model.double()


def run(model: Any) -> Tensor:
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (2, 5))
    if hasattr(model.config, "patch_size"):
        out = model(pixel_values=torch.rand(2, 3, 16, 16, dtype=torch.float64))
    elif model.config.model_type == "whisper":
        out = model(input_features=torch.rand(2, 8, 16, dtype=torch.float64), decoder_input_ids=ids)
    elif model.config.model_type in ("clip", "siglip"):
        out = model(input_ids=ids, pixel_values=torch.rand(2, 3, 16, 16, dtype=torch.float64))
        return torch.cat([out.text_embeds, out.image_embeds], dim=-1)
    elif model.config.is_encoder_decoder:
        out = model(input_ids=ids, decoder_input_ids=ids[:, :4])
    else:
        out = model(input_ids=ids)
    return out.last_hidden_state


def network_of(network: Any, read: Tensor) -> Tensor:
    """s Up(relu(Down(read)))."""
    middle = F.linear(read, network.down.weight, network.down.bias).relu()
    return network.scaling * F.linear(middle, network.up.weight, network.up.bias)


def first_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def with_first(out: Any, more: Tensor) -> Any:
    """`out`, or the first of a tuple, with `more` added: Llama 4's experts give all tokens in one row."""
    return (out[0] + more.reshape(out[0].shape), *out[1:]) if isinstance(out, tuple) else out + more


def adapted(family: str, config: BottleneckConfig) -> Any:
    model = get_peft_model(build(family), config)
    randomize(model, scale=0.3)
    return model.eval()


def networks(model: Any) -> dict[str, Any]:
    return {n: m.bottleneck["default"] for n, m in model.named_modules() if hasattr(m, "bottleneck")}


@pytest.mark.parametrize("family", SIZES)
def test_every_preset_starts_as_the_identity_and_changes_the_output_afterwards(family: str) -> None:
    plain = run(build(family))
    for make in (BottleneckConfig.houlsby, BottleneckConfig.pfeiffer, BottleneckConfig.parallel):
        model = get_peft_model(build(family), make())
        torch.testing.assert_close(run(model), plain, rtol=1e-9, atol=1e-9)
        randomize(model, scale=0.3)
        assert (run(model) - plain).abs().max() > 1e-3
        with model.disable_adapter():
            torch.testing.assert_close(run(model), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", SIZES)
def test_seq_bn_reads_the_sum_of_the_part_and_its_input(family: str) -> None:
    model = adapted(family, BottleneckConfig.from_adapterhub("seq_bn", bottleneck_size=4))
    found = networks(model)
    plain = build(family)
    for path, network in found.items():
        module = plain.get_submodule(path)
        if family in POST_NORM:
            norm = plain.get_submodule(f"{path}.{POST_NORM[family]}")

            def normed(module: Any, args: Any, out: Tensor, network: Any = network) -> Tensor:
                return type(module).forward(module, args[0] + network_of(network, out))

            norm.register_forward_hook(normed)
        else:

            def added(module: Any, args: Any, out: Any, network: Any = network) -> Any:
                return with_first(out, network_of(network, first_of(out)))

            module.register_forward_hook(added)
    layers = 4 if plain.config.is_encoder_decoder or family in ("clip", "siglip") else 2
    assert len(found) == layers
    torch.testing.assert_close(run(model), run(plain))


def test_the_modules_that_are_said_to_return_sums_do() -> None:
    """Of one family of each kind: the module's output less the part's is its output when the part gives nothing."""
    for family, module, part in [
        ("llama", "layers.1", "layers.1.mlp"),
        ("gpt2", "h.1", "h.1.mlp"),
        ("t5", T5_PARTS[0], f"{T5_PARTS[0]}.DenseReluDense"),
        ("t5", T5_PARTS[1], f"{T5_PARTS[1]}.DenseReluDense"),
        ("vit", "layers.1", "layers.1.mlp"),
        ("mbart", "encoder.layers.1", "encoder.layers.1.fc2"),
    ]:
        model = build(family)
        seen: dict[str, Any] = {}
        for name in (module, part):
            model.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name, seen=seen: seen.update(
                    {name: out[0] if isinstance(out, tuple) else out}
                )
            )
        run(model)
        before: dict[str, Any] = {}
        again = build(family)
        again.get_submodule(part).register_forward_hook(lambda m, args, out: torch.zeros_like(out))
        again.get_submodule(module).register_forward_hook(
            lambda m, args, out, before=before: before.update(out=first_of(out))
        )
        run(again)
        torch.testing.assert_close(seen[module] - seen[part], before["out"])


@pytest.mark.parametrize("family", SIZES)
def test_par_bn_reads_what_the_feed_forward_part_reads(family: str) -> None:
    # Beside the attention, too.
    model = adapted(family, BottleneckConfig.from_adapterhub("par_bn", bottleneck_size=4, mh_adapter=True))
    plain = build(family)
    reads = model.peft_config["default"].parallel_reads
    for path, network in networks(model).items():
        seen: dict[str, Tensor] = {}
        endings = sorted((end for end in reads or {} if path.endswith(f".{end}")), key=len)
        read_path = path.removesuffix(endings[-1]) + reads[endings[-1]] if endings else path
        plain.get_submodule(read_path).register_forward_pre_hook(
            lambda m, args, kwargs, seen=seen: seen.update(x=(args or tuple(kwargs.values()))[0]), with_kwargs=True
        )
        plain.get_submodule(path).register_forward_hook(
            lambda m, args, out, seen=seen, network=network: with_first(out, network_of(network, seen["x"]))
        )
        assert network.scaling == 4.0
    torch.testing.assert_close(run(model), run(plain))


@pytest.mark.parametrize("family", ["bert", "bart", "opt", "bloom"])
@pytest.mark.parametrize("preset", ["seq_bn", "par_bn"])
def test_inputs_of_other_modules_survive_copies_checkpointing_and_switching(family: str, preset: str) -> None:
    model = adapted(family, BottleneckConfig.from_adapterhub(preset, bottleneck_size=4))
    other = BottleneckConfig.from_adapterhub("par_bn" if preset == "seq_bn" else "seq_bn", bottleneck_size=3)
    expected = run(model)
    torch.testing.assert_close(run(copy.deepcopy(model)), expected, rtol=0, atol=0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    out = run(model)
    plain_grads = torch.autograd.grad(out.sum(), [p for p in model.parameters() if p.requires_grad])
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    again = torch.autograd.grad(run(model).sum(), [p for p in model.parameters() if p.requires_grad])
    for one, two in zip(plain_grads, again, strict=True):
        torch.testing.assert_close(one, two)
    model.activation_checkpointing_disable()
    model.eval()
    model.add_adapter("other", other)
    assert torch.equal(run(model), expected)
    model.set_adapter("other")
    randomize(model, scale=0.3)
    assert not torch.equal(run(model), expected)
    model.set_adapter("default")
    model.delete_adapter("other")
    model.unload()
    assert type(model) is type(build(family))
    assert torch.equal(run(model), run(build(family)))


def test_two_adapters_in_one_norm_act_one_after_the_other() -> None:
    config = BottleneckConfig.from_adapterhub("seq_bn", bottleneck_size=4)
    model = get_peft_model(build("bert"), config, adapter_name="a")
    model.add_adapter("b", copy.deepcopy(config))
    randomize(model, scale=0.3)
    model.eval().set_adapter(["a", "b"])
    plain = build("bert")
    for layer in range(2):
        both = model.encoder.layer[layer].output.bottleneck

        def hook(module: Any, args: Any, out: Tensor, both: Any = both) -> Tensor:
            summed = args[0]
            for network in both.values():
                summed = summed + network_of(network, out)
                out = type(module).forward(module, summed)
            return out

        plain.encoder.layer[layer].output.LayerNorm.register_forward_hook(hook)
    torch.testing.assert_close(run(model), run(plain))


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"residual_before_ln": "post_add", "original_ln_after": False}, lambda s, h, net: s + net),
        ({"residual_before_ln": False, "original_ln_after": False}, lambda s, h, net: h + net),
    ],
)
def test_the_other_ends_of_a_sum(options: dict[str, Any], formula: Any) -> None:
    model = adapted("bert", BottleneckConfig(original_ln_before=True, bottleneck_size=4, **options))
    plain = build("bert")
    for layer in range(2):
        network = model.encoder.layer[layer].output.bottleneck["default"]
        plain.encoder.layer[layer].output.LayerNorm.register_forward_hook(
            lambda m, args, out, network=network: formula(args[0], out, network_of(network, out))
        )
    torch.testing.assert_close(run(model), run(plain))


def test_attention_sums_where_a_module_returns_them() -> None:
    """BERT's attention output and T5's attention layers; in the other families it is refused by name."""
    for family, places in {
        "bert": ["encoder.layer.0.attention.output", "encoder.layer.0.output"],
        "t5": ["encoder.block.0.layer.0", "encoder.block.0.layer.1", "decoder.block.0.layer.0", T5_PARTS[1]],
    }.items():
        model = adapted(family, BottleneckConfig(mh_adapter=True, original_ln_before=True, layers_to_transform=[0]))
        assert list(networks(model)) == places
        run(model)
    with pytest.raises(ValueError, match="mh_adapter=True with original_ln_before=True: no module of a 'llama' model"):
        get_peft_model(build("llama"), BottleneckConfig(mh_adapter=True, original_ln_before=True))


# Layers


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "gpt2"])
def test_reduction_and_absence_by_layer(family: str) -> None:
    config = BottleneckConfig.houlsby(reduction_factor={"0": 16, "1": 4, "default": 2}, leave_out=[1])
    model = get_peft_model(build(family), config)
    sizes = {path: network.down.weight.shape[0] for path, network in networks(model).items()}
    decoder = {path for path in sizes if path.startswith("decoder.")}
    # The decoder's two layers are the third and the fourth.
    assert all(("decoder" in path and size == 16) or size == 2 for path, size in sizes.items())
    assert not [path for path in sizes if ".1.attention" in path or "encoder.block.1" in path]
    assert bool(decoder) == model.config.is_encoder_decoder
    assert len(sizes) == (2 + 4 if decoder else 2)
    assert all(sizes[path] == 16 for path in decoder)


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"leave_out: there is no adapter in layer 7; there are in \[0, 1\]"):
        get_peft_model(build("bert"), BottleneckConfig.houlsby(leave_out=[7]))
    with pytest.raises(ValueError, match=r"leave_out=\[0, 1\] leaves no adapter"):
        get_peft_model(build("bert"), BottleneckConfig.houlsby(leave_out=[0, 1]))
    with pytest.raises(ValueError, match=r"no entry for layer 1, and no 'default'"):
        get_peft_model(build("bert"), BottleneckConfig.houlsby(reduction_factor={"0": 2}))


# Invertible adapters


def by_hand(coupling: Any, x: Tensor) -> Tensor:
    def network(layers: Any, x: Tensor) -> Tensor:
        middle = F.linear(x, layers.down.weight, layers.down.bias).relu()
        return F.linear(middle, layers.up.weight, layers.up.bias)

    x1, x2 = x.chunk(2, dim=-1)
    y1 = x1 + network(coupling.inv_f, x2)
    return torch.cat([y1, x2 + network(coupling.inv_g, y1)], dim=-1)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_an_invertible_adapter_is_undone_in_front_of_the_head(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, kind.partition("For")[0] + "Config")(**_SIZES)
    model = getattr(transformers, kind)(config).double().eval()
    plain = copy.deepcopy(model)
    model = get_peft_model(model, BottleneckConfig.from_adapterhub("seq_bn_inv", layers_to_transform=[0]))
    randomize(model, scale=0.3)
    embeddings = model.bert.embeddings if kind.startswith("Bert") else model.model.embed_tokens
    coupling = embeddings.bottleneck["default"]
    x = torch.randn(3, 4, 32, dtype=torch.float64)
    torch.testing.assert_close(coupling(x), by_hand(coupling, x))
    torch.testing.assert_close(coupling.inverse(coupling(x)), x)
    layer = (model.bert.encoder.layer[0].output if kind.startswith("Bert") else model.model.layers[0]).bottleneck
    head = model.get_output_embeddings()
    seen: dict[str, Tensor] = {}
    ids = torch.randint(3, 60, (2, 5))
    # The plain model with both done by hand.
    plain_embeddings = plain.bert.embeddings if kind.startswith("Bert") else plain.model.embed_tokens
    plain_embeddings.register_forward_hook(lambda m, args, out: by_hand(coupling, out))
    plain.get_output_embeddings().register_forward_pre_hook(lambda m, args: (coupling.inverse(args[0]),))
    with model.disable_adapter():
        assert not torch.equal(model(ids).logits, plain(ids).logits)
    with torch.no_grad():
        for name, parameter in layer["default"].named_parameters():
            if name.startswith("up"):
                parameter.zero_()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert not seen and type(head).__name__.startswith("Inverse")
    model.unload()
    assert type(model.get_output_embeddings()) is nn.Linear


def test_each_replica_undoes_an_invertible_adapter_by_its_own_network() -> None:
    model = get_peft_model(tiny_llama(), BottleneckConfig.from_adapterhub("seq_bn_inv"))
    randomize(model, scale=0.3)
    ids = torch.arange(8)[None]
    replica = replica_of(model.eval())
    # Of another device's numbers: here a replica's parameters are moved instead.
    with torch.no_grad():
        torch.testing.assert_close(replica(ids).logits, model(ids).logits)
        own = replica.model.embed_tokens.bottleneck["default"].inv_f.up
        own.weight = own.weight + 1
        assert not torch.allclose(replica(ids).logits, model(ids).logits)
        network, here = replica.lm_head.bottleneck_inverses["default"]
        assert here.network is replica.model.embed_tokens.bottleneck["default"] and here.network is not network
        x = replica.model.embed_tokens(ids)
        plain = F.embedding(ids, model.model.embed_tokens._parameters["weight"])
        torch.testing.assert_close(replica.lm_head._network("default").inverse(x), plain)
    replica_of(model)(ids, labels=ids).loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad)


def test_an_invertible_adapter_is_saved_and_loaded(tmp_path: Any) -> None:
    model = get_peft_model(tiny_llama(), BottleneckConfig.from_adapterhub("double_seq_bn_inv"))
    randomize(model, scale=0.3)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    ids = torch.randint(3, 60, (2, 5))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    model.delete_adapter("default")
    torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="inv_adapter is for models with input embeddings"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), BottleneckConfig(target_modules=["0"], inv_adapter="nice"))


# AdapterHub's own configurations

# What AdapterHub 1.0 writes into adapter_config.json under "config" for seq_bn.
PUBLISHED: dict[str, Any] = {
    **{"adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True},
    **{"factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert"},
    **{"init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False},
    **{"learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False},
    **{"non_linearity": "relu", "original_ln_after": True, "original_ln_before": True, "output_adapter": True},
    **{"phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False},
    **{"phm_rank": 1, "reduction_factor": 16, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False},
    **{"shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False},
}


def test_a_published_configuration_is_the_preset() -> None:
    assert BottleneckConfig.from_adapterhub(PUBLISHED) == BottleneckConfig.from_adapterhub("seq_bn")
    assert BottleneckConfig.from_adapterhub("pfeiffer") == BottleneckConfig.from_adapterhub("seq_bn")
    inner = {**PUBLISHED, "mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
    assert BottleneckConfig.from_adapterhub(inner) == BottleneckConfig.from_adapterhub("houlsby")
    assert BottleneckConfig.from_adapterhub("seq_bn", bottleneck_size=3).reduction_factor is None


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("seq", r"configurations are seq_bn, .*, got 'seq'"),
        ({**PUBLISHED, "phm_layer": True}, "phm_layer=True asks for a Compacter"),
        ({**PUBLISHED, "use_gating": True}, r"use_gating=True\) is not supported"),
        ({**PUBLISHED, "adapter_size": 4}, "adapter_size: not known"),
    ],
)
def test_what_adapterhub_has_and_minipeft_lacks_is_named(config: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BottleneckConfig.from_adapterhub(config)


@pytest.mark.parametrize("options", [{"ln_after": True}, {"scaling": "channel"}])
def test_a_norm_and_a_scale_behind_the_network(options: dict[str, Any]) -> None:
    model = adapted("llama", BottleneckConfig(bottleneck_size=4, target_modules=["layers.1"], **options))
    network = model.layers[1].bottleneck["default"]
    plain = build("llama")

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        middle = F.linear(out, network.down.weight, network.down.bias).relu()
        up = F.linear(middle, network.up.weight, network.up.bias) * network.scaling
        if network.norm_after is not None:
            up = F.layer_norm(up, up.shape[-1:], network.norm_after.weight, network.norm_after.bias)
        return out + up

    plain.layers[1].register_forward_hook(hook)
    torch.testing.assert_close(run(model), run(plain))


# Rows and averages


@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "par_bn", "double_seq_bn_inv"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_each_row_goes_through_its_own_adapter(family: str, preset: str) -> None:
    config = BottleneckConfig.from_adapterhub(preset, bottleneck_size=4)
    model = get_peft_model(build(family), config, adapter_name="a")
    model.add_adapter("b", copy.deepcopy(config))
    randomize(model, scale=0.3)
    model.eval()
    ids = torch.randint(3, 60, (4, 5))
    more = {"decoder_input_ids": ids[:, :3]} if family == "t5" else {}

    def run_rows(rows: list[int], **kwargs: Any) -> Tensor:
        return model(ids[rows], **{n: v[rows] for n, v in more.items()}, **kwargs).last_hidden_state

    rows = run_rows([0, 1, 2, 3], adapter_names=["b", "a", "__base__", "b"])
    for name, which in (("a", [1]), ("b", [0, 3])):
        model.set_adapter(name)
        torch.testing.assert_close(rows[which], run_rows(which))
    with model.disable_adapter():
        torch.testing.assert_close(rows[2:3], run_rows([2]))


def test_lora_and_bottleneck_rows_in_one_batch() -> None:
    model = get_peft_model(tiny_llama(), BottleneckConfig(bottleneck_size=4), adapter_name="a")
    model.add_adapter("b", LoraConfig(target_modules=["q_proj", "mlp.down_proj"]))
    randomize(model, scale=0.3)
    model.eval()
    ids = torch.randint(3, 60, (2, 5))
    rows = model(ids, adapter_names=["a", "b"]).logits
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        torch.testing.assert_close(rows[row : row + 1], model(ids[row : row + 1]).logits)
    model.add_adapter("c", BottleneckConfig(bottleneck_size=4, modules_to_save=["lm_head"]))
    rows = model(ids, adapter_names=["a", "c"]).logits
    model.set_adapter("c")
    torch.testing.assert_close(rows[1:], model(ids[1:]).logits)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -1.0]])
def test_a_weighted_sum_of_adapters(weights: list[float], tmp_path: Any) -> None:
    config = BottleneckConfig.from_adapterhub("double_seq_bn_inv", scaling="learned")
    model = get_peft_model(tiny_llama(), config, adapter_name="a")
    model.add_adapter("b", copy.deepcopy(config))
    randomize(model, scale=0.3)
    model.add_weighted_adapter(["a", "b"], weights, "sum", combination_type="linear")
    state = dict(model.named_parameters())
    summed = [name for name in state if ".sum." in name]
    assert len(summed) == sum(".a." in name for name in state) > 0
    for name in summed:
        one, two = state[name.replace(".sum.", ".a.")], state[name.replace(".sum.", ".b.")]
        torch.testing.assert_close(state[name], weights[0] * one + weights[1] * two)
        assert not state[name].requires_grad
    assert model.active_adapters == ["a"]
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    model.set_adapter("sum")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum")
    ids = torch.randint(3, 60, (2, 5))
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)


def test_adapters_that_do_not_combine_are_named() -> None:
    model = get_peft_model(tiny_llama(), BottleneckConfig(bottleneck_size=4), adapter_name="a")
    model.add_adapter("wide", BottleneckConfig(bottleneck_size=5))
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    names = set(dict(model.named_parameters()))
    for others, options, complaint in [
        (
            ["wide"],
            {},
            r"'wide' does not combine with 'a': .*down.weight has shape \(5, 64\), expected \(4, 64\)",
        ),
        (["lora"], {}, "'lora' is no bottleneck adapter"),
        ([], {"combination_type": "svd"}, "combine by combination_type='linear' alone, got {'combination_type': 'svd'"),
        ([], {"density": 0.5}, "alone, got {'combination_type': 'linear', 'density': 0.5}"),
        (["a"], {}, "different names with a weight each"),
    ]:
        adapters = ["a", *others]
        with pytest.raises(ValueError, match=complaint):
            model.add_weighted_adapter(
                adapters, [1.0] * len(adapters), "new", **{"combination_type": "linear", **options}
            )
        assert set(dict(model.named_parameters())) == names and "new" not in model.peft_config
