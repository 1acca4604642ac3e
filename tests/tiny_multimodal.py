"""A tiny random model of each kind that takes images or sound, and a batch that it takes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tiny import VOCABULARY, some_ids
from tiny_families import _SIZES, OTHERS

# The token that stands where an image's features go; `some_ids` is kept clear of it and of those after it.
IMAGE = VOCABULARY - 4
_VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
_IMAGE_TOKENS: dict[str, Any] = {"image_token_id": IMAGE}


def _text(kind: str, **changes: Any) -> dict[str, Any]:
    sizes = {**_SIZES, "model_type": kind, "pad_token_id": 0, **changes}
    if kind == "opt":
        del sizes["num_key_value_heads"]  # PEFT would take it for a number of OPT's
    return sizes


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


_PIXELS = {"pixel_values": _pixels(2, 3, 28, 28)}


def _text_batch(image_tokens: int, before: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Two rows: words, an image of that many tokens, words; the second is padded on the right."""
    ids = some_ids(tokens=image_tokens + len(before) + 9) % (IMAGE - 1) + 1
    ids[:, 2 : 2 + len(before)] = torch.tensor(before, dtype=torch.long)
    ids[:, 2 + len(before) : 2 + len(before) + image_tokens] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = ids.masked_fill((mask == 0) | (ids >= IMAGE), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a model is built, and what it takes.

    Attributes:
        model_type: transformers' name.
        auto: transformers' class that makes the model of a config.
        sizes: The fields of the config.
        inputs: Makes the batch, with labels.
        task_type: PEFT's name of the task, if it has one.
    """

    model_type: str
    auto: Any
    sizes: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    task_type: str | None = None

    def build(self) -> Any:
        """A model in eval mode; the same weights at every call."""
        torch.manual_seed(0)
        return self.auto.from_config(transformers.AutoConfig.for_model(self.model_type, **self.sizes)).eval()

    def batch(self) -> dict[str, torch.Tensor]:
        """Two rows, with labels."""
        return self.inputs()


def _with_image(image_tokens: int, **tensors: torch.Tensor) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {**_text_batch(image_tokens), **tensors}


def _typed_batch() -> dict[str, torch.Tensor]:
    """With the kinds of tokens, by which Gemma 3 and PaliGemma let an image's attend to one another."""
    batch = {**_text_batch(4), **_PIXELS}
    return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE).long()}


def _qwen_batch() -> dict[str, torch.Tensor]:
    patches = {"pixel_values": _pixels(2 * 16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    text = _text_batch(4, before=(VOCABULARY - 2,))
    return {**text, **patches, "mm_token_type_ids": (text["input_ids"] == IMAGE).long()}


def _gemma4_batch() -> dict[str, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    positions = torch.stack([x.flatten(), y.flatten()], -1).expand(2, -1, -1)
    text = _text_batch(4)
    kinds = {"mm_token_type_ids": (text["input_ids"] == IMAGE).long()}
    return {**text, **kinds, "pixel_values": _pixels(2, 36, 3 * 14 * 14).sigmoid(), "image_position_ids": positions}


_GEMMA3_TEXT: dict[str, Any] = {"sliding_window": 64, "head_dim": 16}
_QWEN_VISION: dict[str, Any] = {
    **{"hidden_size": 32, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    "depth": 2,
}
_QWEN: dict[str, Any] = {
    **{"image_token_id": IMAGE, "video_token_id": VOCABULARY - 3},
    **{"vision_start_token_id": VOCABULARY - 2, "vision_end_token_id": VOCABULARY - 1},
}
_MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
_GEMMA4_TEXT: dict[str, Any] = {
    **OTHERS["gemma4_text"].changes,
    **{"sliding_window": 64, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
}
_OPT: dict[str, Any] = {"ffn_dim": 96, "word_embed_proj_dim": 64}
_SPEECH: dict[str, Any] = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "num_mel_bins": 8},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 16},
    **{"max_target_positions": 32, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "decoder_start_token_id": 1,
}
_WAV2VEC2: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    **{"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 12, "pad_token_id": 0},
    **{"mask_time_prob": 0.0, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True},
}
_SEGFORMER: dict[str, Any] = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]},
    **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
    **{"decoder_hidden_size": 16, "num_labels": 3, "classifier_dropout_prob": 0.0},
    **dict.fromkeys(("drop_path_rate", "attention_probs_dropout_prob", "hidden_dropout_prob"), 0.0),
}
_RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
_CLIP_TEXT: dict[str, Any] = {**_SIZES, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_CLIP_TEXT.pop("num_key_value_heads")
_TOWERS: dict[str, Any] = {"text_config": _CLIP_TEXT, "vision_config": _VISION}
_CLASSES = {"labels": torch.tensor([0, 2])}
_TEXTS = transformers.AutoModelForImageTextToText


def _with_vision(kind: str, text: dict[str, Any], batch: Callable[..., Any], **sizes: Any) -> Kind:
    vision = {**_VISION, **sizes.pop("vision_config", {})}
    return Kind(kind, _TEXTS, {"text_config": text, "vision_config": vision, **sizes}, batch, "CAUSAL_LM")


# Language models that see images.
SEEING = {
    "LLaVA": _with_vision(
        *("llava", _text("llama"), _with_image(4, **_PIXELS)),
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=IMAGE,
    ),
    "Qwen2-VL": _with_vision(
        *("qwen2_vl", _text("qwen2_vl_text", **_MROPE), _qwen_batch),
        **_QWEN,
        vision_config={**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    ),
    "Qwen2.5-VL": _with_vision(
        *("qwen2_5_vl", _text("qwen2_5_vl_text", **_MROPE), _qwen_batch),
        **_QWEN,
        vision_config={**_QWEN_VISION, "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1]},
    ),
    "Gemma 3": _with_vision(
        *("gemma3", _text("gemma3_text", **_GEMMA3_TEXT), _typed_batch),
        **{"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 1, "eoi_token_index": 2},
        vision_config={"model_type": "siglip_vision_model"},
    ),
    "Gemma 4": _with_vision(
        *("gemma4", _text("gemma4_text", **_GEMMA4_TEXT), _gemma4_batch),
        **{**_IMAGE_TOKENS, "video_token_id": IMAGE + 1, "audio_token_id": IMAGE + 2},
        vision_config={"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16},
    ),
    "SmolVLM": _with_vision(
        *("smolvlm", _text("llama"), _with_image(4, pixel_values=_pixels(2, 1, 3, 56, 56))),
        **{**_IMAGE_TOKENS, "scale_factor": 2},
        vision_config={"image_size": 56},
    ),
    "Idefics3": _with_vision(
        *("idefics3", _text("llama"), _with_image(4, pixel_values=_pixels(2, 1, 3, 56, 56))),
        **{**_IMAGE_TOKENS, "scale_factor": 2},
        vision_config={"image_size": 56},
    ),
    "PaliGemma": _with_vision(
        *("paligemma", _text("gemma", head_dim=16), _typed_batch),
        **{"image_token_index": IMAGE, "projection_dim": 64, "hidden_size": 64},
        vision_config={"model_type": "siglip_vision_model", "projection_dim": 64, "vision_use_head": False},
    ),
    "Llama 4": _with_vision(
        *("llama4", {**_SIZES, **OTHERS["llama4_text"].changes}, _with_image(1, **_PIXELS)),
        image_token_index=IMAGE,
        vision_config={
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    ),
    "BLIP-2": _with_vision(
        *("blip-2", _text("opt", **_OPT), _with_image(4, **_PIXELS)),
        **{"num_query_tokens": 4, "image_token_index": IMAGE},
        qformer_config={**_SIZES, "hidden_size": 32, "encoder_hidden_size": 32},
    ),
}

# Speech, and images alone.
LISTENING_OR_SEEING = {
    "Whisper": Kind(
        *("whisper", transformers.AutoModelForSpeechSeq2Seq, _SPEECH),
        lambda: {"input_features": _pixels(2, 8, 32), "labels": some_ids(tokens=5)},
    ),
    "Wav2Vec2": Kind(
        *("wav2vec2", transformers.AutoModelForCTC, _WAV2VEC2),
        lambda: {"input_values": _pixels(2, 400), "labels": some_ids(tokens=3) % 11 + 1},
    ),
    "ViT": Kind(
        *("vit", transformers.AutoModelForImageClassification, {**_VISION, "num_labels": 3}),
        lambda: {**_PIXELS, **_CLASSES},
    ),
    "SigLIP": Kind(
        *("siglip", transformers.AutoModelForImageClassification, {**_TOWERS, "num_labels": 3}),
        lambda: {**_PIXELS, **_CLASSES},
    ),
    "CLIP": Kind(
        *("clip", transformers.AutoModel, {**_TOWERS, "projection_dim": 16}),
        lambda: {**_PIXELS, "input_ids": some_ids() % 100 + 3, "return_loss": True},
    ),
    "Segformer": Kind(
        *("segformer", transformers.AutoModelForSemanticSegmentation, _SEGFORMER),
        lambda: {"pixel_values": _pixels(2, 3, 32, 32), "labels": torch.arange(2 * 32 * 32).view(2, 32, 32) % 3},
    ),
    "ResNet": Kind(
        *("resnet", transformers.AutoModelForImageClassification, {**_RESNET, "num_labels": 3}),
        lambda: {**_PIXELS, **_CLASSES},
    ),
}
