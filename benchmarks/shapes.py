"""The sizes that are measured: layers of models that people fine-tune, and rows of a decoding and a training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCKSIZE = 64
RANK = 16


@dataclass(frozen=True)
class Layer:
    """A linear layer: W is (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int

    @property
    def label(self) -> str:
        """The shape in words: "4096x4096"."""
        return f"{self.out_features}x{self.in_features}"

    @property
    def numel(self) -> int:
        """The number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer: `experts` of hidden -> 2 intermediate -> hidden, `chosen` of them for each token."""

    name: str
    hidden: int
    experts: int
    chosen: int
    intermediate: int


@dataclass(frozen=True)
class FineTuning:
    """The sizes that are measured on a whole model.

    batches: (rows, tokens) of a training step. generated: tokens. adapters: that are loaded, one beside the other.
    rounds: of everything that takes long; 1 when quick.
    tokens, ranks, widths, depths: over which a step's time grows, and over which attaching and loading do.
    """

    batches: tuple[tuple[int, int], ...] = ((1, 128), (4, 256))
    prompt: int = 32
    generated: int = 64
    adapters: int = 30
    rounds: int = 5
    tokens: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    ranks: tuple[int, ...] = (4, 16, 64, 256)
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (8, 16, 32, 64)


@dataclass(frozen=True)
class Sizes:
    """The sizes that one run measures.

    rows: M, the tokens of a batch.
    lora_layers: (out, in) of the layers whose adapters AdamW updates at once; big_parameter: elements of the one
        tensor that it updates alone.
    model: folder of the whole model; None for a tiny random one.
    mixtures: whose experts are trained, with `expert_tokens` of a batch, in `expert_dtypes`, `expert_rounds` times.
    """

    layers: tuple[Layer, ...]
    dtypes: tuple[torch.dtype, ...]
    rows: tuple[int, ...]
    lora_layers: tuple[tuple[int, int], ...]
    big_parameter: int
    mixtures: tuple[Mixture, ...]
    expert_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    expert_tokens: tuple[int, ...] = (1, 32, 128, 512)
    expert_rounds: int = 3
    finetuning: FineTuning = FineTuning()
    model: str | None = None


LLAMA_7B_ATTENTION = Layer("Llama-2-7B q_proj", 4096, 4096)
LLAMA_7B_UP = Layer("Llama-2-7B up_proj", 11008, 4096)
LLAMA_7B_DOWN = Layer("Llama-2-7B down_proj", 4096, 11008)
LLAMA_8B_UP = Layer("Llama-3-8B up_proj", 14336, 4096)
SMOLLM2_UP = Layer("SmolLM2-135M up_proj", 1536, 576)

QWEN3_30B = Mixture("Qwen3-30B-A3B", 2048, 128, 8, 768)
MIXTRAL = Mixture("Mixtral-8x7B", 4096, 8, 2, 14336)
# A quarter of Mixtral's width, of which PEFT's updated weights fit in 20 GB beside the weights.
MIXTRAL_QUARTER = Mixture("Mixtral-8x7B/4", 4096, 8, 2, 3584)

# (out, in) of the seven projections of a Llama-2-7B layer, each with one LoRA.
LLAMA_7B_PROJECTIONS = (*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008))

CPU = Sizes(
    layers=(LLAMA_7B_ATTENTION, SMOLLM2_UP),
    dtypes=(torch.float32, torch.bfloat16),
    rows=(1, 16, 256),
    lora_layers=LLAMA_7B_PROJECTIONS * 8,
    big_parameter=1 << 24,
    mixtures=(QWEN3_30B, MIXTRAL_QUARTER),
)
CUDA = Sizes(
    layers=(LLAMA_7B_ATTENTION, LLAMA_7B_UP, LLAMA_7B_DOWN, LLAMA_8B_UP),
    dtypes=(torch.bfloat16, torch.float16),
    rows=(1, 4, 16, 64, 128, 256, 1024, 2048),
    lora_layers=LLAMA_7B_PROJECTIONS * 32,
    big_parameter=1 << 26,
    mixtures=(QWEN3_30B, MIXTRAL),
    expert_dtypes=(torch.bfloat16,),
    expert_rounds=20,
)
QUICK_LAYER = Layer("quick", 128, 256)
QUICK_MIXTURE = Mixture("quick mixture", 128, 8, 2, 192)
QUICK_FINETUNING = FineTuning(((1, 16), (2, 16)), 4, 4, 3, 1, (8, 16), (2, 4), (32, 64), (2, 4))


def sizes_for(kind: str, quick: bool = False) -> Sizes:
    """The sizes for a device type: "cpu" or "cuda".

    Args:
        quick: one small size of each thing, to show that everything runs.
    """
    full = CUDA if kind == "cuda" else CPU
    if not quick:
        return full
    shape = (QUICK_LAYER.out_features, QUICK_LAYER.in_features)
    small = {"lora_layers": (shape,), "big_parameter": 1 << 12, "finetuning": QUICK_FINETUNING}
    experts = {"mixtures": (QUICK_MIXTURE,), "expert_dtypes": full.expert_dtypes[:1], "expert_tokens": (1, 16)}
    return Sizes((QUICK_LAYER,), full.dtypes[:1], (1, 16), **small, **experts, expert_rounds=1)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
