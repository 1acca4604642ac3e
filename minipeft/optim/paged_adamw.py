"""AdamW whose state may be larger than the memory it is allowed.

Adam keeps two moments for every parameter, twice the parameters' own size in float32. Here they lie in pages
(`pages.py`), which a pager moves between device, host memory and disk ahead of the arithmetic (`pager.py`, `tiers.py`),
after the paged optimizers of QLoRA (Dettmers et al. 2023, section 3), with two differences. Pages are
shared by parameters of any size, so that the many small matrices of an adapter are paged as well; and the order of
access, which an optimizer knows, decides what moves, rather than the faults of a processor that does not.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from minipeft.optim.adamw import Pieces, update_8bit, update_32bit
from minipeft.optim.checks import check_group, check_parameter, common_device, parameter_name
from minipeft.optim.pager import MOVERS
from minipeft.optim.pages import Segment
from minipeft.optim.state import Memory, PagedState, Views
from minipeft.optim.state_dicts import (
    ParameterState,
    checked_states,
    load_states,
    merged_groups,
    read_states,
    save_states,
    write_states,
)
from minipeft.optim.tiers import MemoryTier, SimulatedDevice
from minipeft_kernels.adamw.reference import Hyper

UPDATES = {32: update_32bit, 8: update_8bit}
# Uses fetched ahead while backward updates: enough for every mover to be at work.
AHEAD = MOVERS + 1

# A parameter to be updated: (which hyperparameters, its dtype, its gradient's), its elements, its gradient's.
Job = tuple[tuple[Hyper, torch.dtype, torch.dtype], Tensor, Tensor]


@dataclass(slots=True)
class _ParameterPlace:
    """A parameter's group, its index in that group, and its number in the pages (-1 until it has one)."""

    group: int
    index: int
    number: int = -1


class BackwardSweep:
    """Updates parameters while backward is still at work, each as soon as its gradient is there.

    The gradient is freed at once, so that gradients of all parameters never exist together (Lv et al. 2023, "Full
    Parameter Fine-tuning for Large Language Models with Limited Resources", section 3). Backward visits the parameters
    in much the same order every time, and always in one direction: so the order of the last step is what the pager
    expects of the next.
    """

    def __init__(self, optimizer: PagedAdamW) -> None:
        # Parameters hold the hooks: they must not hold the optimizer.
        self._optimizer = weakref.ref(optimizer)
        self._expected: list[int] = []
        self._seen: list[int] = []
        self._done: set[int] = set()

    def attach(self, p: Tensor) -> None:
        """Update `p` when it gets a gradient."""
        p.register_post_accumulate_grad_hook(self._on_gradient)

    def end(self) -> None:
        """The next gradient belongs to the next step."""
        if self._done:
            self._expected, self._seen, self._done = self._seen, [], set()

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        pages, jobs = optimizer.pages, optimizer.jobs_of([p])
        (number,) = jobs
        if number in self._done:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} had a second gradient before step() was called: with "
                "fuse_backward every backward is a step, so gradients cannot be accumulated"
            )
        if not self._done:
            pages.prepare(p.device)
            expected = self._expected or list(range(len(pages.table)))[::-1]
            pages.pager.begin_sweep(expected, expected, AHEAD)
        self._done.add(number)
        self._seen += pages.pages_of(number)
        optimizer.update(jobs, pages.visit(number))
        p.grad = None


class PagedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW, with its state paged.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW. Parameters may be float32, bfloat16 or
            float16; the moments and the arithmetic are float32 for all of them.
        state_bits: 32, or 8: moments in blocks of 256 with 8 bits each (Dettmers et al. 2022).
        page_bytes: size of a page, a multiple of 4096. None: 4 MiB, or an eighth of the smallest budget; 64 MiB
            without a budget.
        device_budget: bytes of state on the parameters' GPU at most. None: all of it may be there.
        host_budget: bytes of state in host memory at most. None: whatever is not on the device may be there.
        spill_dir: directory, on a disk, for what the budgets do not hold. Needed only then.
        fuse_backward: update a parameter as soon as backward has its gradient, and free the gradient: then they never
            all exist. Excludes gradient accumulation, clipping and GradScaler, which need all gradients at once.
        foreach, fused: accepted, without effect: they choose between torch's own implementations.
        amsgrad, capturable, differentiable: only False.
        simulate: what stands for a device when parameters in host memory are given a device_budget.

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
        self._update = UPDATES[state_bits]
        self._places: dict[Tensor, _ParameterPlace] = {}
        self._steps: list[int] = []
        self._backward = BackwardSweep(self) if fuse_backward else None
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
        every = [p for group in self.param_groups for p in group["params"]]
        self.pages = PagedState(state_bits, memory, [p.numel() for p in every if p.requires_grad], simulate)
        self._close = weakref.finalize(self, self.pages.close)
        try:
            self._lay_out(every)
        except BaseException:
            self.close()
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        number = len(self.param_groups) - 1
        for index, p in enumerate(group["params"]):
            check_parameter(p, parameter_name(group, number, index))
            self._places[p] = _ParameterPlace(number, index)
        # The first groups are laid out together, when all are known.
        if hasattr(self, "pages"):
            self._lay_out(group["params"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. With `fuse_backward` they are updated already: end the step.

        Raises:
            RuntimeError: a sparse gradient.
            PagingError: a page could not be moved: the step is half taken, and the state is no longer whole.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._backward is not None:
            self._backward.end()
        with torch.no_grad():
            jobs = self.jobs_of(p for group in self.param_groups for p in group["params"])
            if jobs:
                self.pages.prepare(common_device(p for _, p, _ in jobs.values()))
                self.update(jobs, self.pages.sweep(jobs))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._backward is not None:
            self._backward.end()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, and, for 32 bits, to be loaded there: copies of all state, in host memory.

        `save_state` writes the same to a file without having it all in memory.
        """
        lazy = self.state
        self.state = defaultdict(dict, read_states(self.pages, self.state))
        try:
            return super().state_dict()
        finally:
            self.state = lazy

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, page by page: of a PagedAdamW of either number of bits, or of torch.optim.AdamW.

        Raises:
            ValueError: it does not fit; names the parameter. Nothing was changed.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = merged_groups(self.param_groups, state_dict)
        states = checked_states(groups, state_dict)
        self._lay_out(list(states), frozen=True)
        self.param_groups = groups
        stale = {self._places[p].number for p in self.state}
        self._steps[:] = [0] * len(self._steps)
        self.state.clear()
        for p, state in states.items():
            self._steps[self._places[p].number] = int(state["step"])
            self._expose(p)
        write_states(self.pages, {self._places[p].number: state for p, state in states.items()}, stale)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def save_state(self, path: str | Path) -> None:
        """Write the state to a safetensors file, atomically, holding no more than a page of it at a time."""
        numbers = {}
        for index, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p in self.state:
                numbers[self._places[p].number] = (index, p.shape, self._steps[self._places[p].number])
        save_states(path, self.pages, numbers, super().state_dict()["param_groups"])

    def load_state(self, path: str | Path) -> None:
        """Take over what `save_state` wrote, without having it all in memory.

        Raises:
            ValueError: not such a file, a damaged one, or the state of other parameters.
        """
        with load_states(path) as state_dict:
            self.load_state_dict(state_dict)

    def memory_stats(self) -> dict[str, Any]:
        """Bytes of state by tier ("tiers": bytes, peak_bytes, budget_bytes), and what has moved so far.

        Also "page_bytes", "pages", "state_bytes"; counted since the start: "page_ins" and "page_outs" (into and out of
        the first tier), "bytes_in" and "bytes_out" (towards it and away, over all tiers), "bytes_moved",
        "bytes_by_link", "stall_seconds" (how long the arithmetic waited for pages); and "trace", see `trace_pages`.
        """
        return self.pages.stats()

    def trace_pages(self, on: bool = True) -> None:
        """Note from now on where pages are, in `memory_stats()["trace"]`: (seconds, event, page, tier).

        Events: "is" for every page at the start of the record; "created", "used" by the arithmetic, "in" and "out" (has
        moved to this tier, towards the arithmetic and away).
        """
        self.pages.pager.trace(on)

    def close(self) -> None:
        """Free the state: memory, thread and file. The optimizer cannot be used afterwards."""
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("PagedAdamW cannot be copied or pickled: its state lies in pages; use state_dict or save_state")

    def jobs_of(self, parameters: Iterable[Tensor]) -> dict[int, Job]:
        """The pending update of each parameter that has a gradient, by the parameter's number in the pages.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        hypers = [Hyper.of_group(group) for group in self.param_groups]
        places = self._places
        jobs: dict[int, Job] = {}
        key: Any = (None, None, None)
        for p in parameters:
            g = p.grad
            if g is None:
                continue
            # One look-up for everything: a tensor's hash is slow, and there may be hundreds of small ones.
            place = places[p]
            if g.is_sparse or place.number < 0:
                self._admit(p, g, place)
            hyper = hypers[place.group]
            if key[0] is not hyper or key[1] is not p.dtype or key[2] is not g.dtype:
                key = (hyper, p.dtype, g.dtype)
            jobs[place.number] = (key, p, g)
        return jobs

    def _admit(self, p: Tensor, g: Tensor, place: _ParameterPlace) -> None:
        """Refuse a sparse gradient; lay out a parameter that was frozen until now."""
        if g.is_sparse:
            name = parameter_name(self.param_groups[place.group], place.group, place.index)
            raise RuntimeError(f"PagedAdamW does not support sparse gradients, such as that of {name}")
        self._lay_out([p], frozen=True)

    def update(self, jobs: dict[int, Job], sweep: Iterable[list[tuple[Segment, Views]]]) -> None:
        """Do the jobs, taking the pages as they come."""
        with self.pages.all_or_nothing():
            copies = self._begin_update(jobs)
            calls: dict[Any, Pieces] = {}
            for segments in sweep:
                self._collect(segments, jobs, calls)
                # Where nothing moves, all pages are updated in one call.
                if not self.pages.pager.all_fit:
                    self._run(calls)
            self._run(calls)
            for p, copy in copies:
                p.copy_(copy)

    def _begin_update(self, jobs: dict[int, Job]) -> list[tuple[Tensor, Tensor]]:
        """Count the step. What is not contiguous is copied; returns parameters with the copies that replace them."""
        copies = []
        for number, (key, p, g) in jobs.items():
            self._steps[number] += 1
            if self._steps[number] == 1:
                self._expose(p)
            if not (p.is_contiguous() and g.is_contiguous()):
                jobs[number] = (key, p.contiguous(), g.contiguous())
                if not p.is_contiguous():
                    copies.append((p, jobs[number][1]))
        return copies

    def _collect(
        self, segments: Iterable[tuple[Segment, Views]], jobs: dict[int, Job], calls: dict[Any, Pieces]
    ) -> None:
        steps, known, pieces = self._steps, None, Pieces.none()
        for segment, views in segments:
            number = segment.parameter
            key, p, g = jobs[number]
            if key is not known:
                known, pieces = key, calls.setdefault(key, Pieces.none())
            if not segment.whole:
                part = slice(segment.start, segment.stop)
                p, g = p.view(-1)[part], g.view(-1)[part]
            pieces.add(p, g, views, steps[number])

    def _run(self, calls: dict[Any, Pieces]) -> None:
        for (hyper, _, _), pieces in calls.items():
            self._update(pieces, hyper)
        calls.clear()

    def _lay_out(self, parameters: list[Tensor], frozen: bool = False) -> None:
        """Give parameters their places in the pages. A frozen one gets its place with its first gradient."""
        new = [p for p in parameters if self._places[p].number < 0 and (p.requires_grad or frozen)]
        for p in new:
            self._places[p].number = self.pages.add(p.numel())
            self._steps.append(0)
            if self._backward is not None and p.requires_grad:
                self._backward.attach(p)
        if new:
            self.pages.prepare(common_device(new))

    def _expose(self, p: Tensor) -> None:
        self.state[p] = ParameterState(self.pages, self._places[p].number, p.shape, self._steps)
