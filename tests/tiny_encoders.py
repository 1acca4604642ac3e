"""Tiny random models that read in both directions, and encoder-decoders: those that virtual tokens work on."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

_BERT: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3},
    **{"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0},
}
_T5: dict[str, Any] = {
    **{"vocab_size": 128, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    **{"decoder_start_token_id": 0, "eos_token_id": 127},
}
_BART: dict[str, Any] = {
    **{"vocab_size": 128, "d_model": 32, "max_position_embeddings": 40, "forced_eos_token_id": None},
    **{f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 127},
}

# Name -> its task and how it is made.
BASES: dict[str, tuple[str, Callable[..., Any]]] = {
    "bert": ("SEQ_CLS", lambda **k: hf.BertForSequenceClassification(hf.BertConfig(**{**_BERT, **k}))),
    "bert_tokens": ("TOKEN_CLS", lambda **k: hf.BertForTokenClassification(hf.BertConfig(**{**_BERT, **k}))),
    "roberta": ("SEQ_CLS", lambda **k: hf.RobertaForSequenceClassification(hf.RobertaConfig(**{**_BERT, **k}))),
    "t5": ("SEQ_2_SEQ_LM", lambda **k: hf.T5ForConditionalGeneration(hf.T5Config(**{**_T5, **k}))),
    "mt5": ("SEQ_2_SEQ_LM", lambda **k: hf.MT5ForConditionalGeneration(hf.MT5Config(**{**_T5, **k}))),
    "bart": ("SEQ_2_SEQ_LM", lambda **k: hf.BartForConditionalGeneration(hf.BartConfig(**{**_BART, **k}))),
    "mbart": ("SEQ_2_SEQ_LM", lambda **k: hf.MBartForConditionalGeneration(hf.MBartConfig(**{**_BART, **k}))),
}
ENCODER_DECODERS = tuple(name for name, (task, _) in BASES.items() if task == "SEQ_2_SEQ_LM")


def tiny_encoder(kind: str, attention: str | None = None, **changes: Any) -> Any:
    """A 2-layer model of `kind` in eval mode; the same weights for the same arguments."""
    torch.manual_seed(0)
    model = BASES[kind][1](**changes).eval()
    if attention is not None:
        model.set_attn_implementation(attention)
    # Random models of this size say the same whatever they read; larger weights make them differ.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not kind.endswith("t5"):
                parameter.mul_(1.0 if "embed" in name or name.endswith("shared.weight") else 5.0)
    if hasattr(model, "generation_config"):
        # The model is asked for so many tokens, whatever they are.
        model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model
