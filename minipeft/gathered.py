"""Merging into weights of which each process has a part (FSDP2): whole inside a block, in parts again after it.

FSDP2 keeps the parameters that it was given, and puts them back after each pass. So a merged weight is written into
the part that a process has, in place, and the part that was there is kept for `unmerge`. One module is whole at a time.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import NotMergeableError
from minipeft.shards import check_not_split, is_sharded, own_part, part_of, whole

# A shard's attribute: a weak reference to what it held before adapters were merged into it, which modules keep
# (`_originals`) until they unmerge or become plain.
_BEFORE = "_before_merging"


def _before(shard: Any) -> Any:
    return getattr(shard, _BEFORE, lambda: None)()


def share_out(model: nn.Module) -> None:
    """Let FSDP2 take back what it left gathered after a pass, so that every module has its parts.

    Raises NotMergeableError during a pass, which needs what is gathered.
    """
    if not _several():
        return
    units: list[Any] = [part for part in model.modules() if hasattr(part, "set_requires_all_reduce")]
    for unit in units:
        if unit._get_fsdp_state()._training_state.name != "IDLE":
            raise NotMergeableError(
                "adapters cannot be attached, merged or unmerged during a pass of a sharded model (FSDP2)"
            )
    for unit in units:
        unit.reshard()


def check_comes_first(model: nn.Module) -> None:
    """Raise ValueError if `model` is sharded already, so that FSDP2 would not average an adapter's gradients.

    And if it is split by tensor parallelism, whose parts look like shards.
    """
    check_not_split(model)
    if _shards(model):
        raise ValueError(
            "the model is sharded over processes (FSDP2), which does not average the gradients of an adapter that "
            "comes later: attach the adapter, or load it with is_trainable=True, before fully_shard"
        )


@contextlib.contextmanager
def beside_shards(model: nn.Module, adapter: str) -> Iterator[None]:
    """The block makes the tensors of `adapter`, which FSDP2 does not know if it has sharded `model` before.

    Raises ValueError if they are made of base weights: those are parts, which nobody would gather in the copies.
    """
    share_out(model)
    before = _shards(model)
    refusal = (
        f"adapter {adapter!r} holds what is made of the base weights, of which each process has a part (FSDP2): load "
        "it before fully_shard"
    )
    try:
        yield
    except RuntimeError as error:
        if before and "DTensor" in str(error):
            raise ValueError(refusal) from error
        raise
    if before and _shards(model) - before:
        raise ValueError(refusal)


def _several() -> bool:
    """True if this process has met others, which comes before any shard."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _shards(model: nn.Module) -> set[int]:
    if not _several():
        return set()
    return {id(t) for own in (model.parameters(), model.buffers()) for t in own if is_sharded(t)}


def check_shared(model: nn.Module, modules: list[tuple[str, Any]], merging: Mapping[str, tuple[str, ...]]) -> None:
    """Raise NotMergeableError if merging would change a sharded weight that a module without the adapters has, too.

    In one process such modules part. In FSDP2 they cannot: both have the one part of the one weight.

    Args:
        modules: the adapted modules of `model`, by dotted name.
        merging: dotted name -> the adapters that are to be merged there.
    """
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and is_sharded(parameter):
                owners.setdefault(parameter, []).append(module)
    for path, module in modules:
        names = module.adapter_names() & set(merging[path])
        for name, parameter in module._parameters.items() if names else ():
            others = [other for other in owners.get(parameter, ()) if other is not module]
            if not all(_follows(module, other, names) or _follows(other, module, names) for other in others):
                raise NotMergeableError(
                    f"{path}: its {name} is another module's, too, and sharded over processes (FSDP2), where the two "
                    f"cannot part (adapters {sorted(names)}): save the adapter, and merge it into the model in one "
                    "process"
                )


def _leaders(module: nn.Module) -> dict[str, Any]:
    """adapter -> the module of which `module` has the adapter's tensors."""
    return {**vars(module).get("tied_to", {}), **vars(module).get("row_leaders", {})}


def _follows(module: Any, leader: nn.Module, names: set[str]) -> bool:
    """True if each of the adapters `names` is the same in `module` as in `leader`, so that both merge to one weight."""
    found = _leaders(module)
    return all(found.get(name) is leader for name in names)


@contextlib.contextmanager
def gathered(module: Any) -> Iterator[list[bool]]:
    """Inside the block, sharded parameters in `module` are whole, without the adapters that are merged elsewhere.

    Those that the block replaced are written into their shards in the end; the originals that the module keeps of them
    become shards. All processes must enter. What one of them raises in the block is raised in it, and
    NotMergeableError in the others, with nothing written: none goes on to a meeting at which another is missing.

    Yields: a list; what is added to it is True after the block if it is in all processes.
    """
    parts = dict.fromkeys(part for owner in (module, *_leaders(module).values()) for part in owner.modules())
    wholes: dict[nn.Parameter, nn.Parameter] = {}
    places = [
        (part._parameters, name, parameter)
        for part in parts
        for name, parameter in part._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    for held, name, shard in places:
        if shard not in wholes:
            values = whole((shard if _before(shard) is None else _before(shard)).detach())
            wholes[shard] = nn.Parameter(values, requires_grad=shard.requires_grad)
        held[name] = wholes[shard]
    answers: list[bool] = []
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    error: Exception | None = None
    try:
        yield answers
        replaced = {s: new for held, name, s in places if (new := held[name]) is not wholes[s] and new is not None}
    except Exception as raised:
        error = raised
    finally:
        for held, name, shard in places:
            held[name] = shard
    worst = _worst(wholes, 2 if error else int(not all(answers)))
    if worst == 1:
        answers[:] = [False] * len(answers)
    if worst == 2:
        unwritten = set(wholes.values())
        for part in parts:
            originals = vars(part).get("_originals", {})
            for name in [name for name, held in originals.items() if held in unwritten]:
                del originals[name]
        raise error or NotMergeableError("another process could not merge its part of a module: see what it says")
    shards = {}
    for shard, all_of_it in wholes.items():
        before = _before(shard)
        if before is None and shard in replaced:
            before = nn.Parameter(shard.detach().clone(), requires_grad=False)
            setattr(shard, _BEFORE, weakref.ref(before))
        if before is not None:
            shards[all_of_it] = before
        if shard in replaced:
            _write(shard, replaced[shard])
    for part in parts:
        originals = vars(part).get("_originals", {})
        originals.update({name: shards[held] for name, held in originals.items() if held in shards})


def _worst(shards: Iterable[Any], here: int) -> int:
    """The greatest `here` of all processes that have a part of the shards; without shards, `here`."""
    mesh = next((shard.device_mesh for shard in shards), None)
    if mesh is None:
        return here
    worst = torch.tensor(here, device=mesh.device_type)
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX, mesh.get_group(axis))
    return int(worst)


def put_back_shard(shard: Any, original: nn.Parameter) -> None:
    """Let `shard` hold what it held before adapters were merged into it."""
    _write(shard, original)


@torch.no_grad()
def _write(shard: Any, values: Tensor) -> None:
    own_part(shard).copy_(part_of(values, shard))
