"""The memory that training takes, predicted from a model's config: none of its weights is loaded.

The run itself is made, model, adapter, optimizer and two steps by the library's own code, on tensors without data
(`ghost.py`), and what is alive is counted. So the prediction is of what PyTorch allocates for tensors, on a CPU; the
process and its libraries, and what an operation needs within itself, come on top.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from minipeft.nf4 import NF4Config, NF4Weight, quantize_model
from minipeft.show.ghost import Ghosts
from minipeft.state import get_peft_model_state_dict
from minipeft.train.batches import Batch
from minipeft.train.config import TrainConfig
from minipeft.train.errors import ConfigError, ModelLoadError, as_user_error
from minipeft.train.loss import autocast, training_loss_sum
from minipeft.train.methods import AdapterError, attach, method_config
from minipeft.train.models import load_config, loaded_dtype, resolve_max_length, told_short, training_mode
from minipeft.train.schedule import make_optimizer, trainable_parameters

# Batches beyond this are not searched for.
MOST_ROWS = 1024


@dataclass(frozen=True)
class StepMemory:
    """The bytes that one training step holds in tensors when it holds the most.

    Attributes:
        rows, tokens: Of the batch: rows, and tokens in each.
        kinds: Bytes at the peak under each of `ghost.KINDS`.
        phase: The part of the step in which the peak is: forward, backward or update.
        history: Phase and bytes by kind after each operation.
    """

    rows: int
    tokens: int
    kinds: dict[str, int]
    phase: str
    history: list[tuple[str, tuple[int, ...]]]

    @property
    def peak(self) -> int:
        """The sum over the kinds, in bytes."""
        return sum(self.kinds.values())


class GhostRun:
    """A training run of `config` without data, to be asked for the memory of a step.

    Args:
        config: Its `model`, `method`, `method_args`, `quantize`, `dtype`, `precision`, `gradient_checkpointing` and
            `gradient_accumulation` count; the optimizer is torch's AdamW.

    Attributes:
        parameters, trained: Numbers of weights: of the model without the adapter (packed ones count), and trained.

    Raises:
        ModelLoadError: no such model, or one that transformers does not make from its config alone.
        ConfigError, AdapterError: settings or an adapter that do not fit.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._steps: dict[tuple[int, int, bool], StepMemory] = {}
        adapter_config = method_config(config)
        self._ghosts, model = ghost_model(config.model, config.quantize, config.dtype)
        text = model.config.get_text_config()
        self._limits = getattr(text, "max_position_embeddings", None), adapter_config.positions_taken(text.model_type)
        self.parameters = model.num_parameters()
        with self._ghosts.running(), _no_values(config.model):
            self._model = model = attach(model, as_new(adapter_config))
            if config.adapter is not None:
                check_stored(model, config.adapter)
            trained = list(trainable_parameters(model).values())
            self.trained = sum(parameter.numel() for parameter in trained)
            self._ghosts.count([*model.parameters(), *model.buffers()], "weights")
            self._ghosts.count(trained, "adapter")
            self._update = self._second_update(trained)
            # What the loss finds out of a model once.
            with torch.no_grad():
                training_loss_sum(model, _batch(1, 4, padded=False))

    def _second_update(self, trained: Sequence[torch.nn.Parameter]) -> StepMemory:
        """The optimizer's part of a step, its state being there; it does not depend on the batch."""
        ghosts, optimizer = self._ghosts, make_optimizer(self._model, self.config)
        # Held by the optimizer, which lives as long as this does.
        self._optimizer = optimizer
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        ghosts.count([p.grad for p in trained if p.grad is not None], "gradients")
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        ghosts.count([value for value in states if isinstance(value, torch.Tensor)], "optimizer")
        ghosts.start("update")
        torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update = StepMemory(0, 0, ghosts.peak, ghosts.peak_phase, list(ghosts.history))
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._count_gradient)
        return update

    def step(self, rows: int, tokens: int, padded: bool = True) -> StepMemory:
        """The memory of a step, not the first, over `rows` texts, the longest of `tokens`.

        Args:
            padded: the texts differ in length, as a run's do (one ends a token early): attention is then given a mask,
                and may hold more. False is a batch of equal texts.

        Raises:
            ConfigError: more tokens than the model has positions for.
            ModelLoadError: a model that asks for values of its activations.
        """
        tokens = resolve_max_length(tokens, *self._limits, setting="--tokens")
        asked = rows, tokens, padded
        if asked not in self._steps:
            ghosts = self._ghosts
            with ghosts.running(), _no_values(self.config.model):
                batch = _batch(rows, tokens, padded)
                ghosts.start("forward")
                for _ in range(min(2, self.config.gradient_accumulation)):
                    self._forward_and_backward(batch)
                self._optimizer.zero_grad(set_to_none=True)
            update = self._update
            most = (ghosts.peak, ghosts.peak_phase)
            if update.peak > sum(ghosts.peak.values()):
                most = (update.kinds, update.phase)
            self._steps[asked] = StepMemory(rows, tokens, *most, ghosts.history + update.history)
        return self._steps[asked]

    def largest(self, budget: int, tokens: int, padded: bool = True, near: int = 1) -> StepMemory | None:
        """The step with the most rows, up to MOST_ROWS, that takes at most `budget` bytes; None if one row takes more.

        Args:
            near: rows to begin with.
        """
        return _largest(lambda rows: self.step(rows, tokens, padded), budget, near)

    def _forward_and_backward(self, batch: Batch) -> None:
        with training_mode(self._model, self.config.gradient_checkpointing):
            self._ghosts.phase = "forward"
            with autocast(torch.device("cpu"), self.config.precision):
                loss = training_loss_sum(self._model, batch)
            self._ghosts.phase = "backward"
            (loss / batch.loss_tokens).backward()

    def _count_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._ghosts.count([parameter.grad], "gradients")


def ghost_model(path: str, quantize: str | None, dtype: str) -> tuple[Ghosts, Any]:
    """A model without data, as `load_base_model` would load it, and the mode that its operations are to run in.

    Raises:
        ModelLoadError, ConfigError: no such model, one that transformers does not make from its config alone, or that
            is stored in another form than dense or NF4.
    """
    base = load_config(path)
    packing = _take_packing(base, path, quantize)
    dtype_of_weights = loaded_dtype(path, dtype, base)
    ghosts = Ghosts(getattr(base.get_text_config(), "vocab_size", None))
    # The tables of NF4 are computed once for the process, so here with data.
    NF4Weight.quantize(torch.ones(1, 64), 64, True).dequantize()
    with ghosts.running():
        model = _model(base, dtype_of_weights, path)
        if packing is not None:
            with as_user_error(ModelLoadError, path):
                model = quantize_model(model, packing)
    return ghosts, model


@contextlib.contextmanager
def _no_values(path: str) -> Iterator[None]:
    """Turn torch's error about values that are asked for, and are not there, into one about the model."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelLoadError(
            f"the memory of {path} cannot be predicted: its forward pass depends on values of its activations ({error})"
        ) from error


def as_new(config: Any) -> Any:
    """A stored adapter's config as one for a new adapter, which has the same tensors; changed in place."""
    config.inference_mode = False
    # The name under which the base model is known here may be another.
    config.base_model_name_or_path = None
    return config


def check_stored(model: Any, adapter: str | Path) -> None:
    """Hold a model with an adapter made from a folder's config against the shapes in the folder's file.

    Only tensors that both have are compared; other files than safetensors are not read.

    Raises:
        AdapterError: a stored tensor has another shape: the adapter is of another model.
    """
    file = Path(adapter) / "adapter_model.safetensors"
    if not file.is_file():
        return
    with as_user_error(AdapterError, str(adapter)), safe_open(file, "pt") as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    for name, tensor in get_peft_model_state_dict(model).items():
        if shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            raise AdapterError(
                f"{adapter} does not fit this model: {name} has shape {shapes[name]}, expected {tuple(tensor.shape)}"
            )


def _largest(step: Callable[[int], StepMemory], budget: int, near: int) -> StepMemory | None:
    """The last step within the budget, of steps whose peak grows with the rows, along a line but for jumps."""
    best: StepMemory | None = None
    beyond, before, rows = MOST_ROWS + 1, None, near
    while beyond - (best.rows if best else 0) > 1:
        found = step(rows)
        if found.peak <= budget:
            best = found
        else:
            beyond = found.rows
        guess = 2 * found.rows if best is found else found.rows // 2
        if before is not None:
            a_row = max(1.0, (found.peak - before.peak) / (found.rows - before.rows))
            guess = found.rows + math.floor((budget - found.peak) / a_row)
        before = found
        rows = max(best.rows + 1 if best else 1, min(guess, beyond - 1))
    return best


def _batch(rows: int, tokens: int, padded: bool) -> Batch:
    """Texts of which every token is learned; the last, if padded, ends a token early."""
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    mask, labels = torch.ones_like(ids), torch.ones_like(ids)
    if padded and rows > 1 and tokens > 2:
        mask[-1, -1], labels[-1, -1] = 0, -100
    learned = int((labels[:, 1:] != -100).sum())
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, int(mask.sum()), learned)


def _take_packing(base: Any, path: str, quantize: str | None) -> NF4Config | None:
    """The way in which linear layers are packed, which is taken out of the model's config; None if they are not."""
    stored = getattr(base, "quantization_config", None)
    if stored is None:
        return NF4Config() if quantize else None
    del base.quantization_config
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    if method == "mxfp4" and quantize:
        return NF4Config()
    if method != "bitsandbytes":
        raise ConfigError(f"{path} is stored in {method}: known is the memory of dense weights and of NF4")
    with as_user_error(ConfigError, path):
        return NF4Config.from_dict(stored)  # type: ignore[return-value]


def _model(base: Any, dtype: torch.dtype, path: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(base, dtype=dtype).eval()
    except Exception as error:  # whatever a model's own code raises
        raise ModelLoadError(f"cannot make a model from the config in {path}: {told_short(error)}") from error
