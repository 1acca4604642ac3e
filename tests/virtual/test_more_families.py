"""Prefix and prompt tuning in the families beyond those of test_families.py, against PEFT with the same files."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from replicas import replica_of
from torch import Tensor, nn

import minipeft
from minipeft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

_SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 2, "initializer_range": 0.3}
_ONE = {"num_key_value_heads": 1}
_HEADS = {**_ONE, "head_dim": 16}
_GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
_MOE: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
_NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "initializer_range": 0.3}
_FOUR = {**_SMALL, "num_hidden_layers": 4}
_KINDS = ["sliding_attention", "full_attention"] * 2
# Wider than the texts: under a narrower one PEFT's logits are others (docs/differences.md).
_WINDOW = {"sliding_window": 64}

DECODERS: dict[str, Callable[[], Any]] = {
    "apertus": lambda: t.ApertusConfig(**_SMALL),
    "arcee": lambda: t.ArceeConfig(**_SMALL),
    "bloom": lambda: t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3),
    "cohere": lambda: t.CohereConfig(**_SMALL, **_ONE),
    "cohere2": lambda: t.Cohere2Config(**_FOUR, **_ONE, **_WINDOW, layer_types=_KINDS),
    "ernie4_5": lambda: t.Ernie4_5Config(**_SMALL, **_HEADS),
    "exaone4": lambda: t.Exaone4Config(**_FOUR, **_HEADS, **_WINDOW, layer_types=_KINDS),
    "falcon": lambda: t.FalconConfig(**_FALCON, num_attention_heads=2),
    "falcon, new": lambda: t.FalconConfig(
        **_FALCON, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
    ),
    "gemma4_text": lambda: t.Gemma4TextConfig(**_SMALL, **_HEADS),
    "gemma4_text, layers of two shapes": lambda: t.Gemma4TextConfig(
        **{**_FOUR, "num_key_value_heads": 1, "head_dim": 8},
        **{"global_head_dim": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
        **{"vocab_size_per_layer_input": 64, "layer_types": _KINDS},
    ),
    "glm": lambda: t.GlmConfig(**_SMALL, **_HEADS, pad_token_id=0),
    "glm4": lambda: t.Glm4Config(**_SMALL, **_HEADS, pad_token_id=0),
    "gpt_bigcode": lambda: t.GPTBigCodeConfig(**_GPT, attn_pdrop=0.0),
    "gpt_bigcode, all heads": lambda: t.GPTBigCodeConfig(**_GPT, attn_pdrop=0.0, multi_query=False),
    "gpt_neo": lambda: t.GPTNeoConfig(**_NEO, attention_types=[[["global", "local"], 1]]),
    "gpt_oss": lambda: t.GptOssConfig(**_SMALL, **_HEADS, **_WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "gptj": lambda: t.GPTJConfig(**_GPT, rotary_dim=8),
    "helium": lambda: t.HeliumConfig(**_SMALL, **_HEADS),
    "hunyuan_v1_dense": lambda: t.HunYuanDenseV1Config(**_SMALL, **_HEADS),
    "llama4_text": lambda: t.Llama4TextConfig(
        **_FOUR, **_HEADS, num_local_experts=2, intermediate_size_mlp=48, no_rope_layers=[1, 1, 1, 0]
    ),
    "ministral": lambda: t.MinistralConfig(**_SMALL, **_HEADS, **_WINDOW),
    "nemotron": lambda: t.NemotronConfig(**_SMALL, num_key_value_heads=2),
    "olmo": lambda: t.OlmoConfig(**_SMALL),
    "olmo3": lambda: t.Olmo3Config(**_SMALL, **_WINDOW),
    "olmoe": lambda: t.OlmoeConfig(**_SMALL, num_experts=4, num_experts_per_tok=2),
    "phi": lambda: t.PhiConfig(**_SMALL),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**_SMALL, **_ONE, **_MOE),
    "seed_oss": lambda: t.SeedOssConfig(**_SMALL, **_HEADS, attention_dropout=0.0, residual_dropout=0.0),
    "stablelm": lambda: t.StableLmConfig(**_SMALL, num_key_value_heads=2),
    "starcoder2": lambda: t.Starcoder2Config(**_SMALL, **_ONE),
}
# PEFT has no such prefixes or prompts.
NOT_IN_PEFT = {("falcon", "prefix"), ("distilbert", "prompt"), ("electra, narrow", "prompt")}
ENCODERS: dict[str, Callable[[], Any]] = {
    "camembert": lambda: t.CamembertConfig(**_SMALL, pad_token_id=1),
    "deberta": lambda: t.DebertaConfig(
        **_SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=8
    ),
    "deberta-v2": lambda: t.DebertaV2Config(
        **_SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False
    ),
    "distilbert": lambda: t.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=2),
    "electra": lambda: t.ElectraConfig(embedding_size=32, **_SMALL),
    "electra, narrow": lambda: t.ElectraConfig(embedding_size=16, **_SMALL),
    "xlm-roberta": lambda: t.XLMRobertaConfig(**_SMALL, pad_token_id=1),
}
PROMPTS_ALONE = ("deberta", "deberta-v2", "distilbert")
CONFIGS = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
PAIRS = [
    (family, kind) for family in DECODERS for kind in CONFIGS if not (family.startswith("gemma4") and kind == "prompt")
]


def build(family: str, auto: Any = t.AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    return auto.from_config({**DECODERS, **ENCODERS}[family]()).eval()


def texts() -> Tensor:
    return torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(1))


def adapted(model: Any, kind: str, task: str = "CAUSAL_LM") -> Any:
    model = get_peft_model(model, CONFIGS[kind](num_virtual_tokens=3, task_type=task)).eval()
    for name, parameter in model.named_parameters():
        if "prompt_encoder" in name:
            nn.init.normal_(parameter)
    return model


def peft_of(folder: Path, base: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()


# PEFT says of Gemma 4 that the last layers get no prefix of their own.
@pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers:UserWarning")
@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_logits_are_pefts_for_the_same_file(family: str, kind: str, tmp_path: Path) -> None:
    model = adapted(build(family), kind)
    model.save_pretrained(tmp_path)
    ids = texts()
    with torch.no_grad():
        ours = model(ids, attention_mask=torch.ones_like(ids)).logits
        again = minipeft.PeftModel.from_pretrained(build(family), tmp_path)(ids).logits
        torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert (model(ids).logits - ours).abs().max() > 1e-3
        if (family, kind) not in NOT_IN_PEFT:
            theirs = peft_of(tmp_path, build(family))(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            torch.testing.assert_close(ours, theirs[:, -6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_a_padded_row_and_a_cached_text_give_what_they_give_alone(family: str, kind: str) -> None:
    model = adapted(build(family), kind)
    ids = texts()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        both = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(both[1:, 2:], model(ids[1:, 2:]).logits, rtol=1e-4, atol=1e-4)
        cache = model(ids[:, :4], use_cache=True).past_key_values
        rest = model(ids[:, 4:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_a_prefix_learns_under_checkpointing_as_without(family: str) -> None:
    model = adapted(build(family), "prefix").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = texts()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for one, two in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind"),
    [(f, k) for f in ENCODERS for k in CONFIGS if k == "prompt" or f not in PROMPTS_ALONE],
)
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_encoders_give_pefts_logits(family: str, kind: str, task: str, tmp_path: Path) -> None:
    auto = t.AutoModelForSequenceClassification if task == "SEQ_CLS" else t.AutoModelForTokenClassification
    model = adapted(build(family, auto), kind, task)
    model.save_pretrained(tmp_path)
    ids = texts()
    with torch.no_grad():
        ours = model(ids, attention_mask=torch.ones_like(ids)).logits
        with model.disable_adapter():
            assert (model(ids).logits - ours).abs().max() > 1e-3
        if (family, kind) not in NOT_IN_PEFT:
            theirs = peft_of(tmp_path, build(family, auto))(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            theirs = theirs if task == "SEQ_CLS" else theirs[:, -6:]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        tuples = model(ids, attention_mask=torch.ones_like(ids), return_dict=False)
        torch.testing.assert_close(tuples[0], ours, rtol=0, atol=0)


@pytest.mark.parametrize("family", PROMPTS_ALONE)
def test_prefixes_without_a_place_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match=f"PrefixTuning does not know .* {family!r}"):
        adapted(build(family, t.AutoModelForSequenceClassification), "prefix", "SEQ_CLS")


def test_what_decoders_refuse() -> None:
    alibi = t.FalconForCausalLM(t.FalconConfig(**_FALCON, num_attention_heads=2, alibi=True))
    with pytest.raises(ValueError, match="'falcon' with alibi=True"):
        adapted(alibi, "prefix")
    with pytest.raises(ValueError, match="looks every token up again in each layer"):
        adapted(build("gemma4_text"), "prompt")


# Frequencies that depend on the length

_LONG: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 16}
_LONG |= {"short_factor": [1.0] * 8, "long_factor": [float(n) for n in range(1, 9)]}


def _phi3() -> Any:
    sizes = {**_SMALL, **_ONE, "max_position_embeddings": 64, "pad_token_id": 0}
    return t.Phi3Config(**sizes, original_max_position_embeddings=16, rope_parameters=dict(_LONG))


def _llama() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    return t.LlamaConfig(**_SMALL, **_ONE, max_position_embeddings=16, rope_parameters=rope)


@pytest.mark.parametrize("config", [_phi3, _llama])
@pytest.mark.parametrize("tokens", [8, 14, 30])
def test_frequencies_by_length_are_those_of_the_prompt_and_the_text(config: Any, tokens: int) -> None:
    torch.manual_seed(0)
    model = adapted(t.AutoModelForCausalLM.from_config(config()).eval(), "prompt")
    ids = torch.randint(3, 64, (2, tokens))
    prompt = model.get_decoder().prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        for _ in range(2):  # frequencies are kept from call to call
            ours = model(ids).logits
            with model.disable_adapter():
                whole = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)
                theirs = model(inputs_embeds=whole).logits[:, 3:]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            model(ids[:, :4])
    model.unload()
    assert type(model.model.rotary_emb).__name__.endswith("RotaryEmbedding")


def test_a_prefix_under_frequencies_by_length_is_pefts(tmp_path: Path) -> None:
    for number, config in enumerate((_phi3, _llama)):
        torch.manual_seed(0)
        base = t.AutoModelForCausalLM.from_config(config()).eval()
        model = adapted(base, "prefix")
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        torch.manual_seed(0)
        theirs = peft_of(folder, t.AutoModelForCausalLM.from_config(config()).eval())
        ids = torch.randint(3, 64, (2, 20))
        with torch.no_grad():
            ones = torch.ones_like(ids)
            torch.testing.assert_close(
                model(ids).logits, theirs(input_ids=ids, attention_mask=ones).logits, rtol=1e-4, atol=1e-4
            )


# Sizes and ends


def test_prompts_are_as_wide_as_the_embeddings() -> None:
    config = t.OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    model = adapted(t.OPTForCausalLM(config).eval(), "prompt")
    prompt = model.get_decoder().prompt_encoder["default"].embedding.weight
    assert prompt.shape == (3, 16)
    ids = texts()
    with torch.no_grad():
        ours = model(ids).logits
        with model.disable_adapter():
            whole = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)
            torch.testing.assert_close(ours, model(inputs_embeds=whole).logits[:, 3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_text_too_long_for_the_position_table_says_so(kind: str) -> None:
    model = adapted(t.GPT2LMHeadModel(t.GPT2Config(**_GPT, n_positions=16)).eval(), kind)
    ids = torch.randint(3, 64, (1, 14))
    with torch.no_grad():
        model(ids[:, :13])
        with pytest.raises(ValueError, match="too long: the model has 16 positions, of which 3 are the virtual"):
            model(ids)


# nn.DataParallel


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("auto", [t.AutoModelForCausalLM, t.AutoModelForSequenceClassification])
def test_replicas_take_their_own_virtual_tokens(kind: str, auto: Any) -> None:
    causal = auto is t.AutoModelForCausalLM
    config = t.LlamaConfig(**_SMALL) if causal else t.BertConfig(**_SMALL)
    torch.manual_seed(0)
    model = adapted(auto.from_config(config).eval(), kind, "CAUSAL_LM" if causal else "SEQ_CLS")
    ids = texts()
    replica = replica_of(model)
    out = replica(ids).logits
    encoders = [m for m in replica.modules() if hasattr(m, "virtual_tokens")]
    originals = {id(module) for module in model.modules()}
    assert all(id(encoder) not in originals for m in encoders for encoder in m.virtual_tokens.values())
    out.sum().backward()
    trained = [p for n, p in model.named_parameters() if "prompt_encoder" in n]
    found = [p.grad.clone() for p in trained]
    model.zero_grad()
    expected = model(ids).logits
    torch.testing.assert_close(out, expected)
    expected.sum().backward()
    for got, parameter in zip(found, trained, strict=True):
        torch.testing.assert_close(got, parameter.grad)
