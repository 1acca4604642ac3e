"""The processes that train one model together, one a device, as torchrun and `accelerate launch` start them.

Each takes every count-th micro-batch of an optimizer step. Either it holds the whole base model and adapter, and
torch's DistributedDataParallel averages the gradients, so that all take the same step; or a part of every tensor
(`shard`), and torch's FSDP2 gathers a layer when it is needed and gives each the averaged gradient of its own part. The
first process alone writes and prints.
One process alone is the case of count 1, in which nothing of torch.distributed is touched.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minipeft.shards import is_sharded
from minipeft.train.batches import Batch
from minipeft.train.errors import OtherProcessError, TrainingError
from minipeft.train.loss import training_loss_sum

T = TypeVar("T")

# Seconds in which a process that fails waits for the first one's own words on the same mistake.
_SAME_MISTAKE = 5.0


class Processes:
    """This process, among those that train together.

    Attributes:
        rank: its number, from 0 on.
        count: of all of them.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count, self._store = rank, count, store
        self._parallel: Any = None

    @property
    def first(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This process's part of `items`, each with True; as many in every process, the last ones repeated with False.

        Every process makes as many passes through the model, since the passes meet in it.
        """
        own = [(item, True) for item in items[self.rank :: self.count]]
        most = -(-len(items) // self.count)
        return own + [(items[-1], False)] * (most - len(own))

    def sum(self, *numbers: float) -> list[float]:
        """Each number, added up over all processes, in float64."""
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        with self.meeting():
            torch.distributed.all_reduce(total)
        return total.tolist()

    def by_first(self, compute: Callable[[], T]) -> T:
        """The result of `compute` in the first process, in all of them; it must be what JSON can hold.

        Raises what `compute` raises, in the first process; OtherProcessError in the others then.
        """
        if self.count == 1:
            return compute()
        if self.first:
            try:
                value = compute()
            except Exception:
                self._tell({"failed": True})
                raise
            self._tell({"value": value})
            return value
        told = self._hear()
        if told.get("failed"):
            raise OtherProcessError("the first process could not go on")
        return told["value"]

    def _tell(self, message: dict[str, Any]) -> None:
        data = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)
        with self.meeting():
            torch.distributed.broadcast(torch.tensor(len(data)), 0)
            torch.distributed.broadcast(data, 0)

    def _hear(self) -> dict[str, Any]:
        length = torch.tensor(0)
        with self.meeting():
            torch.distributed.broadcast(length, 0)
            data = torch.empty(int(length), dtype=torch.uint8)
            torch.distributed.broadcast(data, 0)
        told: dict[str, Any] = json.loads(bytes(data.tolist()))
        return told

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes, those of process r > 0 under "rank<r>/<name>": of equal names and shapes."""
        gathered = dict(tensors)
        if self.count == 1:
            return gathered
        for name, tensor in tensors.items():
            parts = [torch.empty_like(tensor) for _ in range(self.count)]
            with self.meeting():
                torch.distributed.all_gather(parts, tensor.contiguous())
            gathered |= {f"rank{rank}/{name}": part for rank, part in enumerate(parts) if rank}
        return gathered

    def loss_of(self, model: Any) -> Callable[[Batch, bool], Tensor]:
        """`training_loss_sum` of a batch; where there are several processes, its gradients are averaged over them.

        Returns:
            (batch, last) -> the sum; backward averages the gradients only of the pass that is the `last` of a step.
        """
        if self.count == 1:
            return lambda batch, last: training_loss_sum(model, batch)
        if any(is_sharded(parameter) for parameter in model.parameters()):
            return _loss_of_shards(model)
        whole = _Loss(model)
        frozen = [name for name, parameter in whole.named_parameters() if not parameter.requires_grad]
        kind = nn.parallel.DistributedDataParallel
        # What is frozen is the same in all processes already: nothing of it needs to be sent.
        kind._set_params_and_buffers_to_ignore_for_model(whole, [*frozen, *(n for n, _ in whole.named_buffers())])
        # A batch need not reach all of an adapter, such as the experts that no token was sent to.
        parallel = self._parallel = kind(whole, find_unused_parameters=True)

        def loss(batch: Batch, last: bool) -> Tensor:
            with contextlib.nullcontext() if last else parallel.no_sync():
                out: Tensor = parallel(batch)
                return out

        return loss

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Inside it, a call to the others that fails because one of them is gone raises TrainingError."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_of_connection(error):
                raise
            raise TrainingError(
                f"process {self.rank} of {self.count} lost another one, which ended or was killed; the checkpoints "
                "that were saved are whole: start all of them again with --resume"
            ) from error

    def speaks(self, message: str) -> bool:
        """True in the process that is to print an error: the first that fails, or that which fails alone."""
        if self.count == 1:
            return True
        try:
            if self.first:
                self._store.set("minipeft/failed", message)
                return True
            deadline = time.monotonic() + _SAME_MISTAKE
            while time.monotonic() < deadline:
                if self._store.check(["minipeft/failed"]):
                    return False
                time.sleep(0.05)
            # Of several that lost another one, one speaks.
            return int(self._store.add("minipeft/spoken", 1)) == 1
        except RuntimeError:  # the store was the first process's, and is gone with it
            return self.rank == 1

    def leave(self) -> None:
        """End the meeting of processes."""
        if self._parallel is not None:
            # They hold the process group. Were they the last to do so, its threads would wait for Python's lock, and
            # Python, which holds that lock while it frees them, for its threads: seen with gloo in torch 2.13.
            for part in ("reducer", "logger"):
                vars(self._parallel).pop(part, None)
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _loss_of_shards(model: Any) -> Callable[[Batch, bool], Tensor]:
    """The result of `Processes.loss_of` for a model whose gradients FSDP2 averages."""
    if hasattr(model, "set_reduce_scatter_unused_params"):  # from torch 2.13 on
        # As DistributedDataParallel is told to: a batch need not reach all of an adapter.
        model.set_reduce_scatter_unused_params(True)

    def loss(batch: Batch, last: bool) -> Tensor:
        model.set_requires_gradient_sync(last)
        return training_loss_sum(model, batch)

    return loss


class _Loss(nn.Module):
    """The loss as a module, whose forward DistributedDataParallel sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return training_loss_sum(self.model, batch)


def _is_of_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    words = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "socket")
    return any(word in text for word in words)


def join(timeout: float = 600.0) -> Processes:
    """This process among those that a launcher has started, which torchrun's environment variables tell; or it alone.

    Args:
        timeout: seconds to wait for the others, now and at every meeting.

    Raises:
        TrainingError: some have not come in that time; names them.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if count == 1:
        return Processes()
    limit = datetime.timedelta(seconds=timeout)
    address, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", 29500))
    # torchrun keeps the store itself.
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = torch.distributed.TCPStore(address, port, count, keeps, limit, wait_for_workers=False)
        # A launcher that starts processes again counts how often: those of a former start are not these.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = torch.distributed.PrefixStore(f"minipeft/{start}", store)
        own.set(f"here/{rank}", socket.gethostname())
    except RuntimeError as error:
        raise TrainingError(f"process {rank} of {count} found no first process at {address}:{port}: {error}") from None
    deadline = time.monotonic() + timeout
    absent = list(range(count))
    while absent:
        absent = [other for other in absent if not own.check([f"here/{other}"])]
        if absent and time.monotonic() > deadline:
            # The first one keeps the store that the others ask: it goes last.
            time.sleep(1 if keeps else 0)
            names = ", ".join(map(str, absent))
            raise TrainingError(
                f"process {rank} of {count} has waited {timeout:g} s for {names}, which did not come: start as many as "
                "the launcher was told, or look at why they ended"
            )
        if absent:
            time.sleep(0.05)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=limit)
    return Processes(rank, count, own)


def shard(model: Any, device: str | torch.device) -> None:
    """Leave each process its part of every parameter of `model`, on `device`: FSDP2, by decoder layers.

    The layers are those that transformers does not split either (`_no_split_modules`). What is left of the model, its
    embeddings and head among it, is gathered as one more layer.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    whole_layers = set(getattr(model, "_no_split_modules", None) or ())
    units: list[list[nn.Module]] = []
    for layer in (module for module in model.modules() if type(module).__name__ in whole_layers):
        # Layers that share parameters (replicated ones) are gathered together.
        own = set(layer.parameters())
        akin = [unit for unit in units if not own.isdisjoint(p for other in unit for p in other.parameters())]
        units = [unit for unit in units if unit not in akin] + [[*itertools.chain.from_iterable(akin), layer]]
    for unit in (*units, [model]):
        # The outermost too: what reads a parameter between two passes must find this process's part of it.
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, reshard_after_forward=True)


def own_device() -> str:
    """The device of this process where none was chosen: the GPU of its number on this machine."""
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        torch.cuda.set_device(device)
        return f"cuda:{device}"
    return "cpu"
