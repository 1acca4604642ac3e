"""Updates within backward, parameter by parameter: PagedAdamW's `fuse_backward`."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minipeft.optim.pager import MOVERS

if TYPE_CHECKING:
    from minipeft.optim.paged_adamw import PagedAdamW

# Uses fetched ahead while backward updates: enough for every mover to be at work.
AHEAD = MOVERS + 1


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
        # Parameters with a hook, by id.
        self._attached: dict[int, weakref.ref[Tensor]] = {}
        # The group of each parameter, by id: as the groups are when backward begins.
        self._groups: dict[int, dict[str, Any]] = {}

    def attach(self, p: Tensor) -> None:
        """Update `p` when it gets a gradient."""
        known = self._attached.get(id(p))
        if known is None or known() is not p:
            self._attached[id(p)] = weakref.ref(p)
            p.register_post_accumulate_grad_hook(self._on_gradient)

    def end(self) -> None:
        """The next gradient belongs to the next step."""
        if self._done:
            self._expected, self._seen, self._done, self._groups = self._seen, [], set(), {}

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if not self._done:
            self._groups = {id(q): group for group in optimizer.param_groups for q in group["params"]}
        group = self._groups.get(id(p))
        if group is None:
            # The parameter was taken out of its group: its gradient is nothing to this optimizer.
            return
        pages, jobs = optimizer.pages, optimizer.jobs_of([(group, [p])])
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
