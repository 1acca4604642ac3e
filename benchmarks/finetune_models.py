"""The whole models that are compared: one base in NF4 and dense, one adapter, loaded by minipeft and by its peers.

Everybody gets the same numbers: the base is quantized once and written as bitsandbytes writes it, the dense base holds
what that decodes to, and the adapter is one folder. What is right is computed in float64 by `reference_model`.
"""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import ROOT
from benchmarks.harness import Candidate, Missing, Run, Work
from benchmarks.options import HUGE_PAGES
from benchmarks.peers import BITSANDBYTES, Peers
from benchmarks.peers import PEFT as PEFT_MODULE
from benchmarks.shapes import FineTuning, Sizes
from minipeft import LoraConfig, NF4Config, PeftModel, get_peft_model
from minipeft.nf4 import NF4Linear
from minipeft.nf4.hf import read_bitsandbytes_with
from minipeft.train.models import without_bars

RANK, ALPHA = 16, 32
PEFT = "PEFT"
OP = "finetune"
OVER_BNB = f"{PEFT} + {BITSANDBYTES}"
NO_WORK = Work(0)


@dataclass(frozen=True)
class Result:
    """Of a training step: the loss, and the gradients of the adapter by their parameters' names."""

    loss: float
    grads: dict[str, Tensor]


class Models:
    """The folders that the models are loaded from, in a temporary directory; models that are loaded once.

    Args:
        base: folder of a causal language model; None makes a tiny random one.
        device: where models go.
    """

    def __init__(self, base: str | Path | None, device: torch.device) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="minipeft-bench-")
        self.device = device
        self.base = Path(base) if base is not None else _random_base(self._path("base"))
        self.label = "a tiny random Llama" if base is None else self.base.name

    def _path(self, name: str) -> Path:
        return Path(self._directory.name) / name

    @functools.cached_property
    def adapter(self) -> Path:
        """Folder of a rank-16 adapter on all linear layers that is no identity (both factors random)."""
        model = get_peft_model(self._plain(torch.float32), lora_config(init_lora_weights=False))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.1)
        model.save_pretrained(self._path("adapter"))
        return self._path("adapter")

    @functools.cache  # noqa: B019 - as long as the folders
    def quantized(self, dtype: torch.dtype) -> Path:
        """Folder of the base in NF4, quantized from `dtype`, which the rest of it is in."""
        # A folder of the base's name: an adapter's base is known by it.
        folder = self._path(f"nf4-{dtype}") / self.base.name
        load_base(self.base, dtype, quantization_config=NF4Config(compute_dtype=dtype)).save_pretrained(folder)
        return folder

    def dense(self, dtype: torch.dtype) -> Any:
        """The base with the numbers that its NF4 weights stand for, as a plain model in `dtype`."""
        model = self._plain(dtype)
        packed = load_base(self.quantized(dtype), dtype)
        with torch.no_grad():
            for name, module in packed.named_modules():
                if isinstance(module, NF4Linear):
                    model.get_submodule(name).weight.copy_(module.dequantize(dtype))
        return model

    def _plain(self, dtype: torch.dtype) -> Any:
        return load_base(self.base, dtype)

    @functools.cache  # noqa: B019
    def ours(self, kind: str, dtype: torch.dtype) -> Any:
        """The base, "nf4" or "dense", in `dtype`, with the adapter: by minipeft."""
        base = load_base(self.quantized(dtype), dtype) if kind == "nf4" else self.dense(dtype)
        return PeftModel.from_pretrained(base, self.adapter, is_trainable=True).to(self.device)

    @functools.cache  # noqa: B019
    def theirs(self, kind: str, dtype: torch.dtype) -> Any:
        """The same by PEFT, over bitsandbytes for "nf4"."""
        import peft

        base = bitsandbytes_base(self.quantized(dtype), dtype) if kind == "nf4" else self.dense(dtype)
        return peft.PeftModel.from_pretrained(base, str(self.adapter), is_trainable=True).to(self.device)

    def reference_model(self, dtype: torch.dtype) -> Any:
        """The same in float64, each adapted layer written out: x W^T + s (x A^T) B^T."""
        model = self.dense(dtype).to(torch.float64).to(self.device)
        model.requires_grad_(False)
        adapter = PeftModel.from_pretrained(self._plain(torch.float32), self.adapter)
        factors = {name: p.detach().double() for name, p in adapter.named_parameters() if ".lora_" in name}
        for name, module in list(model.named_modules()):
            if (key := f"{name}.lora_A.default.weight") in factors:
                other = factors[key.replace("lora_A", "lora_B")]
                replace_module(model, name, ReferenceLayer(module.weight, factors[key], other, ALPHA / RANK))
        return model.to(self.device)

    @functools.cache  # noqa: B019
    def right_step(self, dtype: torch.dtype, shape: tuple[int, int]) -> Result:
        """Loss and gradients of a step, in float64, a row at a time."""
        model = self.reference_model(dtype)
        ids = token_ids(shape, model.config.vocab_size, self.device)
        # All rows are of one length: the mean of their means is the mean.
        losses = []
        for row in ids:
            loss = model(input_ids=row[None], labels=row[None], use_cache=False).loss / len(ids)
            loss.backward()
            losses.append(loss.item())
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return Result(sum(losses), {plain_name(n): g for n, g in grads.items()})


class ReferenceLayer(nn.Module):
    """x W^T + s (x A^T) B^T, with the factors under the names that they have in minipeft and PEFT."""

    def __init__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.weight, self.scaling = weight, scaling
        self.lora_A, self.lora_B = nn.Module(), nn.Module()
        self.lora_A.weight, self.lora_B.weight = nn.Parameter(lora_A), nn.Parameter(lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), LoRA written out (Hu et al. 2021, equation 3)."""
        return x @ self.weight.T + self.scaling * (x @ self.lora_A.weight.T) @ self.lora_B.weight.T


def lora_config(**settings: Any) -> LoraConfig:
    """The adapter that is measured: rank 16 on all linear layers."""
    return LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", **settings})


def load_base(folder: str | Path, dtype: torch.dtype, **options: Any) -> Any:
    """A causal language model from a folder."""
    from transformers import AutoModelForCausalLM

    with without_bars():
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **options)


def bitsandbytes_base(folder: Path, dtype: torch.dtype) -> Any:
    """The model in a folder of NF4 weights, with bitsandbytes' layers."""
    # Importing minipeft makes it the reader of such folders.
    read_bitsandbytes_with("transformers")
    try:
        model = load_base(folder, dtype)
    finally:
        read_bitsandbytes_with("minipeft")
    if not any(type(m).__module__.startswith("bitsandbytes.") for m in model.modules()):
        raise RuntimeError("transformers did not load the folder with bitsandbytes")
    return model


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of a submodule."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def token_ids(shape: tuple[int, int], vocabulary: int, device: torch.device) -> Tensor:
    """The same random ids (rows, tokens) for everybody."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, vocabulary, shape, generator=generator).to(device)


def plain_name(name: str) -> str:
    """A parameter's name without what PEFT's wrapper and the adapter's name add."""
    return name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")


def stepper(model: Any, ids: Tensor, loss_of: Callable[[Any, Tensor], Tensor]) -> Callable[[], Result]:
    """A training step: forward, backward, AdamW.

    The learning rate is zero: the step does everything and every one starts from the same weights.
    """
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=0.0, fused=True)
    names = {name: plain_name(name) for name in trained}

    def run() -> Result:
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        return Result(loss.item(), {names[n]: p.grad for n, p in trained.items() if p.grad is not None})

    return run


def step_error(right: Callable[[], Result]) -> Callable[[Result], float]:
    """The larger of: the loss's relative error, and the length of all gradients' error over the gradients' own."""

    def error(result: Result) -> float:
        exact = right()
        if result.grads.keys() != exact.grads.keys():
            return float("inf")
        off = sum(float((g.double() - exact.grads[n]).square().sum()) for n, g in result.grads.items())
        size = sum(float(g.square().sum()) for g in exact.grads.values())
        return max(abs(result.loss - exact.loss) / abs(exact.loss), (off / size) ** 0.5)

    return error


def choice_error(model: Any, prompt_length: int) -> Callable[[Tensor], float]:
    """The error of generated tokens: their logits' largest distance below the best one, in deviations of the logits."""

    def error(ids: Tensor) -> float:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, prompt_length - 1 : -1].double()
        chosen = logits.gather(1, ids[0, prompt_length:, None])[:, 0]
        return float(((logits.amax(1) - chosen) / logits.std(1)).max())

    return error


def random_llama(hidden: int, layers: int = 2, vocabulary: int = 256) -> Any:
    """A Llama of random weights; `hidden` a multiple of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(4, hidden // 64),
        "num_key_value_heads": max(2, hidden // 128),
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def base_folder(sizes: Sizes) -> Path | None:
    """The model's folder: the one asked for, else the demo's; None for a tiny random model when quick."""
    if sizes.model is not None:
        return Path(sizes.model)
    if len(sizes.layers) == 1:
        return None
    from minipeft.demo.assets import smollm2_folder

    return smollm2_folder()


def _random_base(folder: Path) -> Path:
    random_llama(64).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Bench:
    """The models, sizes and peers that cases are made of; each model is loaded when first needed."""

    models: Models
    what: FineTuning
    peers: Peers

    @property
    def quick(self) -> bool:
        """True if everything runs once."""
        return self.what.rounds == 1

    def forget(self) -> None:
        """Free the models that were loaded; the next case loads its own."""
        for cached in (Models.ours, Models.theirs, Models.right_step):
            cached.cache_clear()  # type: ignore[attr-defined]
        gc.collect()

    def peer(self, name: str, run: Callable[[], Run], *check: Any) -> Candidate | Missing:
        """PEFT or `OVER_BNB` as a candidate, or why it is none."""
        for module in (PEFT_MODULE, *([BITSANDBYTES] if name == OVER_BNB else [])):
            found = self.peers.find(module)
            if isinstance(found, str):
                return Missing(name, found)
        return Candidate(name, run, *check)


def shape_title(shape: tuple[int, int]) -> str:
    """ "4x256" of (4, 256): rows and tokens."""
    return f"{shape[0]}x{shape[1]}"


def run_python(*words: str) -> str:
    """Run Python in a new process and return its output. Raises RuntimeError with the end of its errors if it fails."""
    # The allocator's large pages would be counted as used.
    environment = {k: v for k, v in os.environ.items() if k != HUGE_PAGES}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:80]} failed: {done.stderr.strip()[-150:]}")
    return done.stdout
