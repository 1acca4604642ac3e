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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from minipeft.optim.adamw import Pieces, update_8bit, update_32bit
from minipeft.optim.backward import BackwardSweep
from minipeft.optim.checks import check_group, check_parameter, check_supported, common_device, parameter_name
from minipeft.optim.pages import Segment
from minipeft.optim.parameter_state import ParameterState, read_states
from minipeft.optim.state import Memory, PagedState, Views
from minipeft.optim.state_dicts import (
    check_state,
    checked_states,
    load_states,
    merged_groups,
    own_state,
    save_states,
    write_states,
)
from minipeft.optim.tiers import MemoryTier, SimulatedDevice
from minipeft.shards import is_sharded, own_part, part_of
from minipeft.stored import naming
from minipeft_kernels.adamw.reference import Hyper

UPDATES = {32: update_32bit, 8: update_8bit}
# A parameter to be updated: (which hyperparameters, its dtype, its gradient's), its elements, its gradient's.
Job = tuple[tuple[Hyper, torch.dtype, torch.dtype], Tensor, Tensor]
# A parameter group and those of its parameters that are looked at.
Chosen = tuple[dict[str, Any], Sequence[Tensor]]


class PagedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW, with its state paged.

    Of sharded parameters (DTensors, as FSDP2's `fully_shard` makes of them) every process pages the state of its own
    part; nothing is gathered but by `save_state`.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW. Parameters may be float32, bfloat16 or
            float16; the moments and the arithmetic are float32 for all of them.
        state_bits: 32, or 8: moments in blocks of 256 with 8 bits each (Dettmers et al. 2022).
        page_bytes: size of a page, a multiple of 4096. None: 4 MiB, on a CUDA device 32 MiB, or an eighth of
            the smallest budget; 64 MiB without a budget.
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
        TypeError: a parameter of another dtype; a sharded one with 8 bits.
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
        self._make_pages(state_bits, memory, fuse_backward, simulate)

    def _make_pages(
        self, state_bits: int, memory: Memory, fuse_backward: bool, simulate: Callable[[str, int, int], MemoryTier]
    ) -> None:
        """Have room for the state of all parameters that are trained."""
        # What a copy of this optimizer is made with.
        self._paging = (state_bits, memory, fuse_backward, simulate)
        self._update = UPDATES[state_bits]
        # Places of parameters that have no state yet.
        self._reserved: dict[Tensor, ParameterState] = {}
        # States that were read or edited before the step that is on.
        self._lent: list[ParameterState] = []
        self._backward = BackwardSweep(self) if fuse_backward else None
        every = [p for group in self.param_groups for p in group["params"]]
        own = [own_part(p) for p in every if p.requires_grad]
        on_cuda = any(p.is_cuda for p in own)
        self.pages = PagedState(state_bits, memory, [p.numel() for p in own], simulate, on_cuda)
        self._close = weakref.finalize(self, self.pages.close)
        try:
            self._reserve(p for p in every if p.requires_grad)
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
        # The first groups are laid out together, when all are known.
        if hasattr(self, "pages"):
            self._reserve(p for p in group["params"] if p.requires_grad)

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
            jobs = self.jobs_of([(group, group["params"]) for group in self.param_groups])
            if jobs:
                every = [p for group in self.param_groups for p in group["params"]]
                updated = [p for p in every if p.grad is not None] if self._backward is not None else []
                self.pages.prepare(common_device(p for _, p, _ in jobs.values()))
                self.update(jobs, self.pages.sweep(jobs))
                for p in updated:
                    # A parameter that backward did not know yet: from here on its gradient is freed as all are.
                    p.grad = None
            self._return_to_holders()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._backward is not None:
            self._backward.end()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, and, for 32 bits, to be loaded there: copies of all state, in host memory.

        `save_state` writes the same to a file without having it all in memory.

        Raises:
            ValueError: there is state of a parameter that is in no group.
        """
        self._check_owners()
        in_pages = self.state
        self.state = self._copied_state()
        try:
            return super().state_dict()
        finally:
            self.state = in_pages

    @torch.no_grad()
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
        self._reserve(p for p in states if self._own(p) is None)
        self.param_groups = groups
        owned = {p: self._own(p) for p in states}
        loaded = {p: self._reserved.pop(p) if state is None else state for p, state in owned.items()}
        self.state = defaultdict(dict, loaded)
        for p, state in states.items():
            self.pages.steps[loaded[p].number] = int(state["step"])
            loaded[p].settle(p, {})
        write_states(self.pages, {loaded[p].number: own_state(state, p) for p, state in states.items()}, set())
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def save_state(self, path: str | Path, *, is_main_process: bool = True) -> None:
        """Write the state to a safetensors file, atomically, holding no more than a page of it at a time.

        Of sharded parameters (FSDP2) the whole of each moment, one after the other: every process must call, and the
        file is that of a single process.

        Args:
            is_main_process: False writes nothing: another process does.

        Raises:
            ValueError: state that does not fit its parameter, or of a parameter that is in no group.
        """
        self._check_owners()
        every = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            self._settle([p for p in every if self.state.get(p)])
            self._return_to_holders()
        numbers = {}
        for index, p in enumerate(every):
            if self.state.get(p):
                number = self.state[p].number
                numbers[number] = (index, p.shape, self.pages.steps[number])
        sharded = {p: state for p in every if is_sharded(p) and (state := self.state.get(p))}
        save_states(path if is_main_process else None, self.pages, numbers, self._packed_groups(), sharded.values())

    def load_state(self, path: str | Path) -> None:
        """Take over what `save_state` wrote, without having it all in memory.

        Raises:
            ValueError: not such a file, a damaged one, or the state of other parameters.
        """
        with load_states(path) as state_dict, naming(path):
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
        """As torch's optimizers', with copies of all state, in host memory, and how it is paged."""
        return {
            "defaults": self.defaults,
            "state": self._copied_state(),
            "param_groups": self.param_groups,
            "paging": self._paging,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` gave, into pages of this copy's own; or a part, as torch's optimizers do."""
        super().__setstate__({key: value for key, value in state.items() if key != "paging"})
        if not hasattr(self, "pages"):
            self._make_pages(*state["paging"])
            with torch.no_grad():
                self._settle([p for group in self.param_groups for p in group["params"] if self.state.get(p)])
            self._lent.clear()

    def __copy__(self) -> PagedAdamW:
        raise TypeError("a shallow copy of PagedAdamW would have the same state: use copy.deepcopy, or state_dict")

    def jobs_of(self, chosen: Iterable[Chosen]) -> dict[int, Job]:
        """The pending update of each parameter that has a gradient, by the parameter's number in the pages.

        Groups and state are taken as they are now, whatever was done to them since the last step.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: a parameter is there twice, its group or its state are not what can be used.
        """
        chosen, known, pages = list(chosen), self.state.get, self.pages
        jobs: dict[int, Job] = {}
        strangers: dict[int, Tensor] = {}
        for group, parameters in chosen:
            check_supported(group)
            hyper = Hyper.of_group(group)
            key: Any = (None, None, None)
            for p in parameters:
                g = p.grad
                if g is None:
                    continue
                # One look-up for everything: a tensor's hash is slow, and there may be hundreds of small ones.
                state = known(p)
                if (
                    type(state) is not ParameterState
                    or state.settled_for is not p
                    or state.shape != p.shape
                    or state.pages is not pages
                ):
                    strangers[id(p)] = p
                    continue
                if g.is_sparse or state.number in jobs:
                    self._refuse(p, g)
                if state.sharded:
                    p, g = own_part(p), part_of(g, p)
                if key[1] is not p.dtype or key[2] is not g.dtype:
                    key = (hyper, p.dtype, g.dtype)
                jobs[state.number] = (key, p, g)
        if not strangers:
            return jobs
        self._settle(list(strangers.values()))
        return self.jobs_of(chosen)

    def _refuse(self, p: Tensor, g: Tensor) -> None:
        name = self._name(p)
        if g.is_sparse:
            raise RuntimeError(f"PagedAdamW does not support sparse gradients, such as that of {name}")
        raise ValueError(f"{name} is in the parameter groups twice: leave it in one of them")

    def _name(self, p: Tensor) -> str:
        """The parameter's name, for messages."""
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is p:
                    return parameter_name(group, number, index)
        return f"a parameter {tuple(p.shape)} that is in no group"

    def _own(self, p: Tensor) -> ParameterState | None:
        """The parameter's entry in `state`, if its pages are this optimizer's and of the parameter's shape.

        Raises:
            ValueError: the entry is another parameter's, too.
        """
        state: Any = self.state.get(p)
        if not isinstance(state, ParameterState):
            return None
        other = state.owner
        if other is not p and self.state.get(other) is state:
            names = f"{self._name(p)} and {self._name(other)}"
            raise ValueError(
                f"{names} have one state: give one of them a copy of it, copy.deepcopy(optimizer.state[p])"
            )
        return state if state.pages is self.pages and state.fits(p) else None

    def _settle(self, parameters: Sequence[Tensor]) -> None:
        """Have all state of these parameters in the pages: a new one for those without, the given one for the others.

        Raises:
            ValueError, TypeError: state that is not one, or does not fit its parameter. Nothing was changed.
        """
        own, given = {p: self._own(p) for p in parameters}, {p: self._given(p) for p in parameters}
        names = {
            id(p): parameter_name(group, number, index)
            for number, group in enumerate(self.param_groups)
            for index, p in enumerate(group["params"])
        }
        for p in parameters:
            check_parameter(p, names[id(p)])
            if given[p]:
                check_state(given[p], p, names[id(p)])
        self._reserve(p for p in parameters if own[p] is None)
        written: dict[int, Mapping[str, Any]] = {}
        stale: set[int] = set()
        for p in parameters:
            state, outside = own[p], given[p]
            if state is None:
                state = self._reserved.pop(p)
            else:
                outside = state.outside()
            if not given[p]:
                self.pages.steps[state.number] = 0
                stale |= set() if state.blank else {state.number}
            elif outside:
                self.pages.steps[state.number] = int(outside.get("step", self.pages.steps[state.number]))
                if outside.keys() - {"step"}:
                    written[state.number] = own_state(outside, p)
            if state.settle(p, outside):
                self._lent.append(state)
            self.state[p] = state
            if self._backward is not None and p.requires_grad:
                self._backward.attach(p)
        write_states(self.pages, written, stale)

    def _given(self, p: Tensor) -> Mapping[str, Any]:
        """The parameter's entry in `state`; of pages that are not the parameter's, copies."""
        state = self.state.get(p, {})
        if not isinstance(state, Mapping):
            raise TypeError(f"the state of {self._name(p)} must be a dict, and is {state!r}")
        if isinstance(state, ParameterState) and state is not self._own(p):
            return {**state.snapshot(), **state.outside()}
        return state

    def _return_to_holders(self) -> None:
        for state in self._lent:
            state.return_to_holders()
        self._lent.clear()

    def _copied_state(self) -> defaultdict[Any, Any]:
        """`state` with copies, in host memory, in the place of what lies in pages."""
        copies = read_states({key: value for key, value in self.state.items() if isinstance(value, ParameterState)})
        return defaultdict(dict, {key: copies.get(key, value) for key, value in self.state.items()})

    def _check_owners(self) -> None:
        every = {id(p) for group in self.param_groups for p in group["params"]}
        for p in self.state:
            if isinstance(p, Tensor) and id(p) not in every:
                raise ValueError(
                    f"there is state of {self._name(p)}: delete it (del optimizer.state[p]), or put p back"
                )

    def _packed_groups(self) -> list[dict[str, Any]]:
        """The groups as a state dict has them."""
        in_pages = self.state
        self.state = defaultdict(dict)
        try:
            return super().state_dict()["param_groups"]
        finally:
            self.state = in_pages

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
        copies, steps = [], self.pages.steps
        for number, (key, p, g) in jobs.items():
            steps[number] += 1
            if not (p.is_contiguous() and g.is_contiguous()):
                jobs[number] = (key, p.contiguous(), g.contiguous())
                if not p.is_contiguous():
                    copies.append((p, jobs[number][1]))
        return copies

    def _collect(
        self, segments: Iterable[tuple[Segment, Views]], jobs: dict[int, Job], calls: dict[Any, Pieces]
    ) -> None:
        steps, known, pieces = self.pages.steps, None, Pieces.none()
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

    def _reserve(self, parameters: Iterable[Tensor]) -> None:
        """Give parameters without state their places in the pages.

        Raises:
            ValueError: there is no room for them, or they are elsewhere.
        """
        wanted = list(parameters)
        if self._paging[0] != 32 and any(is_sharded(p) for p in wanted):
            # Blocks that share a scale would be cut where the processes' parts end: of another number of them, no more.
            raise TypeError("state of 8 bits cannot be that of sharded parameters (DTensor): take state_bits=32")
        if self._reserved:
            # Of parameters that were taken out of the groups: others can have their places.
            kept = {id(p) for group in self.param_groups for p in group["params"]} | {id(p) for p in wanted}
            self._reserved = {p: state for p, state in self._reserved.items() if id(p) in kept}
        new = [p for p in wanted if p not in self._reserved or not self._reserved[p].fits(p)]
        for p in new:
            self._reserved[p] = ParameterState(self.pages, p)
            if self._backward is not None and p.requires_grad:
                self._backward.attach(p)
        if new:
            self.pages.prepare(common_device(new))
