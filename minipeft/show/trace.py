"""One training step as it runs, by torch's profiler: time and bytes of every operation, under the module that asked.

A module's range is opened and closed by hooks of torch's that are called for every module, so that the modules
themselves stay as they are in a run. An operation of the backward pass belongs to the module whose forward pass
recorded it: autograd gives both the same sequence number.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

from minipeft.train.batches import Batch, collate
from minipeft.train.config import TrainConfig
from minipeft.train.encoding import Example
from minipeft.train.loss import autocast, training_loss_sum
from minipeft.train.methods import attach, method_config
from minipeft.train.models import load_base_model, resolve_max_length, text_positions, training_mode, without_bars
from minipeft.train.schedule import make_optimizer, trainable_parameters

_MODULE, _PHASE, _NODE = "module ", "phase ", "autograd::engine::evaluate_function: "
# Counted as a part of the operation that wants the memory.
_ALLOCATIONS = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::resize_")


@dataclass(frozen=True)
class Row:
    """An operation within a kind of module, in one part of the step.

    Attributes:
        phase: forward, backward or update.
        module: The path, with * for the number of a layer; "" outside of all modules.
        calls: How often it ran.
        milliseconds: Time in it and not in an operation that it calls: of the GPU where it ran there.
        nbytes: Bytes allocated in it, less those freed in it.
    """

    phase: str
    module: str
    operation: str
    calls: int
    milliseconds: float
    nbytes: int


def trace(config: TrainConfig, rows: int, tokens: int, chrome: Path | None = None) -> list[Row]:
    """Profile the second step of a run over texts that are drawn, and give its rows, the longest time first.

    Args:
        config: As `GhostRun` takes it, and the device.
        chrome: Where the trace is written that Chrome (chrome://tracing) and Perfetto show.

    Raises:
        ModelLoadError, ConfigError, AdapterError: a model, settings or an adapter that do not fit.
    """
    adapter_config = method_config(config)
    tokens = resolve_max_length(tokens, *text_positions(config.model, adapter_config), setting="--tokens")
    with without_bars():
        model = load_base_model(config.model, quantize=config.quantize, dtype=config.dtype, device=config.device)
    model = attach(model, adapter_config, config.adapter)
    trained = list(trainable_parameters(model).values())
    device = trained[0].device
    optimizer = make_optimizer(model, config)
    batch = _drawn_batch(rows, tokens, model.get_input_embeddings().num_embeddings).to(device)

    def step() -> None:
        with record_function(f"{_PHASE}forward"), autocast(device, config.precision):
            loss = training_loss_sum(model, batch)
        with record_function(f"{_PHASE}backward"):
            (loss / batch.loss_tokens).backward()
        with record_function(f"{_PHASE}update"):
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with training_mode(model, config.gradient_checkpointing), _ranges(model):
        step()
        with profile(activities=activities, profile_memory=True, acc_events=True) as seen:
            step()
    if chrome is not None:
        seen.export_chrome_trace(str(chrome))
    return rows_of(seen.events())


@contextlib.contextmanager
def _ranges(model: nn.Module) -> Iterator[None]:
    """Within this, each module's forward pass is a range of the profiler, named by the module's path."""
    paths = {id(module): path for path, module in model.named_modules()}
    opened: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        opened.append(record_function(f"{_MODULE}{paths.get(id(module), '')}").__enter__())

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        opened.pop().__exit__(None, None, None)

    # Recomputing activations ends a forward pass by an exception when it has all that it wants.
    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drawn_batch(rows: int, tokens: int, vocabulary: int) -> Batch:
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    # One row ends a token early, so that attention is given a mask, as in a run.
    short = rows > 1 and tokens > 2
    return collate([Example(r[:-1], r[:-1]) if short and r is ids[-1] else Example(r, r) for r in ids], pad_id=0)


def rows_of(events: Any) -> list[Row]:
    """The rows of a profile's events, the longest time first."""
    operations = [event for event in events if _is_operation(event)]
    recorded = {event.sequence_nr: _module_of(event) for event in operations if _is_forward(event)}
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0])
    for event in operations:
        phase = next((e.name.removeprefix(_PHASE) for e in _parents(event) if e.name.startswith(_PHASE)), None)
        if phase is None:
            continue
        module = _module_of(event)
        if phase == "backward" and module is None:
            numbers = (e.sequence_nr for e in (event, *_parents(event)))
            module = next((recorded[number] for number in numbers if recorded.get(number) is not None), None)
        path = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module or "")
        owner = event
        while owner.name in _ALLOCATIONS and _is_operation(owner.cpu_parent):
            owner = owner.cpu_parent
        name = owner.name.removeprefix(_NODE)
        total = sums[phase, path, name]
        device_time = getattr(event, "self_device_time_total", 0)
        # A node of the backward pass is an event, and within it the function that it calls another.
        total[0] += owner is event and not event.name.startswith(_NODE)
        total[1] += (device_time or event.self_cpu_time_total) / 1000
        total[2] += event.self_cpu_memory_usage + getattr(event, "self_device_memory_usage", 0)
    rows = [Row(*key, int(calls), time, int(nbytes)) for key, (calls, time, nbytes) in sums.items()]
    return sorted(rows, key=lambda row: -row.milliseconds)


def _is_operation(event: Any) -> bool:
    return event is not None and not event.name.startswith((_MODULE, _PHASE, "[memory]", "ProfilerStep"))


def _is_forward(event: Any) -> bool:
    """True for an operation that autograd recorded; those of the backward pass have scope 1."""
    return event.sequence_nr >= 0 and event.scope != 1 and _module_of(event) is not None


def _parents(event: Any) -> Iterator[Any]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def _module_of(event: Any) -> str | None:
    return next((e.name.removeprefix(_MODULE) for e in _parents(event) if e.name.startswith(_MODULE)), None)
