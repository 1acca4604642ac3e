"""AdamW whose state may be larger than the memory it is allowed.

Adam keeps two moments for every parameter, twice the parameters' own size in float32. Here they lie in pages
(`pages.py`), which a pager moves between device, host memory and disk ahead of the arithmetic (`pager.py`, `tiers.py`,
`spill.py`), after the paged optimizers of QLoRA (Dettmers et al. 2023, section 3), with two differences. Pages are
shared by parameters of any size, so that the many small matrices of an adapter are paged as well; and the order of
access, which an optimizer knows, decides what moves, rather than the faults of a processor that does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from minipeft.optim.adamw import Hyper, Pieces, update_32bit
from minipeft.optim.paged_state import Memory, PagedState
from minipeft.optim.tiers import MemoryTier, SimulatedDevice

UPDATES = {32: update_32bit}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PagedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW, with its state paged.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW. Parameters may be float32, bfloat16 or
            float16; the moments and the arithmetic are float32 for all of them.
        state_bits: 32, or 8: moments in blocks of 256 with 8 bits each (Dettmers et al. 2022).
        page_bytes: size of a page, a multiple of 4096. None: 4 MiB, or an eighth of the smallest budget.
        device_budget: bytes of state on the parameters' GPU at most. None: all of it may be there.
        host_budget: bytes of state in host memory at most. None: whatever is not on the device may be there.
        spill_dir: directory, on a disk, for what the budgets do not hold. Needed only then.
        fuse_backward: update a parameter as soon as backward has its gradient, and free the gradient: then they never
            all exist. Excludes gradient accumulation, clipping and GradScaler, which need all gradients at once.
        foreach, fused: accepted, without effect: they choose between torch's own implementations.
        amsgrad, capturable, differentiable: only False.

    Raises:
        ValueError: an argument out of range or not supported; state that the budgets do not hold, without spill_dir.
        TypeError: a parameter of another dtype.
        PagingError: no room in spill_dir; later on, from any call: state that could not be moved.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_bits: int = 32,
        page_bytes: int | None = None,
        device_budget: int | None = None,
        host_budget: int | None = None,
        spill_dir: str | Path | None = None,
        fuse_backward: bool = False,
        simulate: Callable[[str, int, int], MemoryTier] = SimulatedDevice,
    ) -> None:
        if state_bits not in UPDATES:
            raise ValueError(f"state_bits must be one of {', '.join(map(str, UPDATES))}, got {state_bits}")
        memory = Memory(page_bytes, device_budget, host_budget, spill_dir)
        self.state_bits, self.fuse_backward = state_bits, fuse_backward
        self._update = UPDATES[state_bits]
        self._pages = PagedState(state_bits, memory, simulate)
        self._numbers: dict[Tensor, int] = {}
        self._steps: list[int] = []
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)
        self._close = weakref.finalize(self, self._pages.close)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group)
        for index, p in enumerate(group["params"]):
            _check_parameter(p, _name(self.param_groups, len(self.param_groups) - 1, index))
        self._lay_out([p for p in group["params"] if p.requires_grad])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Raises:
            RuntimeError: a sparse gradient.
            PagingError: a page could not be moved: the step is half taken, and the state is no longer whole.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def memory_stats(self) -> dict[str, Any]:
        """Bytes of state by tier, and what has moved so far."""
        return self._pages.stats()

    def close(self) -> None:
        """Free the state: memory, thread and file. The optimizer cannot be used afterwards."""
        self._close()

    def _step(self) -> None:
        jobs: dict[int, tuple[Hyper, Tensor, Tensor]] = {}
        for number_of_group, group in enumerate(self.param_groups):
            hyper = Hyper.of_group(group)
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    name = _name(self.param_groups, number_of_group, index)
                    raise RuntimeError(f"PagedAdamW does not support sparse gradients, and that of {name} is one")
                jobs[self._number(p)] = (hyper, p, p.grad)
        if not jobs:
            return
        for number in jobs:
            self._steps[number] += 1
        flat = {number: (_flat(p), g.reshape(-1)) for number, (_, p, g) in jobs.items()}
        for segments in self._pages.sweep(jobs):
            calls: dict[tuple[Any, ...], Pieces] = {}
            for segment, views in segments:
                number, part = segment.parameter, slice(segment.start, segment.stop)
                p, g = flat[number]
                pieces = calls.setdefault((jobs[number][0], p.dtype), Pieces.none())
                pieces.add(p[part], g[part], views, self._steps[number])
            for (hyper, _), pieces in calls.items():
                self._update(pieces, hyper)
        for number, (_, p, _) in jobs.items():
            if not p.is_contiguous():
                p.copy_(flat[number][0].view(p.shape))

    def _number(self, p: Tensor) -> int:
        if p not in self._numbers:
            self._lay_out([p])
        return self._numbers[p]

    def _lay_out(self, parameters: list[Tensor]) -> None:
        """Give parameters their places in the pages."""
        new = [p for p in parameters if p not in self._numbers]
        for p in new:
            self._numbers[p] = self._pages.table.add(p.numel())
            self._steps.append(0)
        if new:
            self._pages.prepare(new[0].device)


def _flat(p: Tensor) -> Tensor:
    return p.view(-1) if p.is_contiguous() else p.reshape(-1)


def _name(groups: list[dict[str, Any]], group: int, index: int) -> str:
    """How a parameter is called in messages."""
    shape = tuple(groups[group]["params"][index].shape)
    names = groups[group].get("param_names")
    which = f"{names[index]!r}" if names else f"{index} of group {group}"
    return f"parameter {which} {shape}"


def _check_group(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "capturable", "differentiable"):
        if group[name]:
            raise ValueError(f"PagedAdamW does not support {name}={group[name]!r}: leave it False")
    beta1, beta2 = group["betas"]
    for name, value in (("lr", group["lr"]), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or greater, got {value}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be in [0, 1), got {group['betas']}")


def _check_parameter(p: Tensor, name: str) -> None:
    if p.dtype not in DTYPES:
        raise TypeError(f"{name} is {p.dtype}: PagedAdamW updates {', '.join(map(str, DTYPES))}")
