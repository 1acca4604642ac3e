"""Optimizer state in pages: where each parameter's state lies, which memory it may take, and sweeps over it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.optim.pager import MOVERS, Pager
from minipeft.optim.pages import LAYOUTS, PAGE_UNIT, PageTable, Segment
from minipeft.optim.tiers import CudaDevice, MemoryTier, PagingError, SimulatedDevice, SpillFile, Tier

# Large enough that a copy runs at full speed (a disk's and PCIe's rates level off near 1 MiB), small enough that two
# of them are no burden.
DEFAULT_PAGE_BYTES = 4 << 20
# On a CUDA device: the host takes about 0.3 ms to have a page moved and updated, in which PCIe moves 16 MB.
CUDA_PAGE_BYTES = 32 << 20
# Without a budget nothing moves, and the fewer pieces a large parameter is in, the less is lost between them.
LARGE_PAGE_BYTES = 64 << 20
LEAST_PAGES = 2

DeviceFactory = Callable[[str, int, int], MemoryTier]
Views = tuple[Tensor, ...]


@dataclass(frozen=True)
class Memory:
    """Limits on the memory that the state may take.

    Attributes:
        page_bytes: size of a page, a multiple of 4096; None: see `page_bytes_for`.
        device_budget: bytes on the parameters' device, None: no limit. For parameters in host memory it is a part of
            that, which stands for a device: with it the movements of a device can be watched without one.
        host_budget: bytes of host memory, None: no limit.
        spill_dir: directory of the file that takes what the budgets do not hold.

    Raises:
        ValueError: a number out of range.
    """

    page_bytes: int | None = None
    device_budget: int | None = None
    host_budget: int | None = None
    spill_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if self.page_bytes is not None and (self.page_bytes < PAGE_UNIT or self.page_bytes % PAGE_UNIT):
            raise ValueError(f"page_bytes ({self.page_bytes}) must be a multiple of {PAGE_UNIT}")
        size = self.page_bytes or PAGE_UNIT
        for name in ("device_budget", "host_budget"):
            budget = getattr(self, name)
            if budget is not None and budget < LEAST_PAGES * size:
                raise ValueError(f"{name} ({budget}) must hold {LEAST_PAGES} pages of page_bytes ({size})")

    def page_bytes_for(self, state_bytes: int, on_cuda: bool = False) -> int:
        """The size of a page when none was asked for and so much state is expected, of parameters on a CUDA device."""
        if self.page_bytes is not None:
            return self.page_bytes
        budgets = [budget for budget in (self.device_budget, self.host_budget) if budget is not None]
        if not budgets:
            return max(PAGE_UNIT, min(LARGE_PAGE_BYTES, -(-state_bytes // PAGE_UNIT) * PAGE_UNIT))
        # An eighth of a budget, so that it is used to within an eighth and copies overlap with arithmetic.
        most = CUDA_PAGE_BYTES if on_cuda else DEFAULT_PAGE_BYTES
        return max(PAGE_UNIT, min(most, min(budgets) // 8 // PAGE_UNIT * PAGE_UNIT))


class PagedState:
    """The state of numbered parameters.

    Args:
        bits: 32 or 8.
        memory: the budgets.
        elements: the numbers of elements of the parameters that are expected.
        on_cuda: they are on a CUDA device.
        simulate: makes the tier that stands for a device.

    Attributes:
        steps: for each number the steps taken.
    """

    def __init__(
        self,
        bits: int,
        memory: Memory,
        elements: Iterable[int] = (),
        simulate: DeviceFactory = SimulatedDevice,
        on_cuda: bool = False,
    ) -> None:
        self.memory = memory
        expected = sum(LAYOUTS[bits].bytes(count) for count in elements)
        self.table = PageTable(LAYOUTS[bits], memory.page_bytes_for(expected, on_cuda))
        self.device: torch.device | None = None
        self.steps: list[int] = []
        self._returned: dict[int, list[int]] = {}
        self._simulate = simulate
        self._pager: Pager | None = None
        self._closed = False
        self._broken: BaseException | None = None
        self._backward = False
        self._views: dict[int, tuple[tuple[int, int], list[Views]]] = {}

    @property
    def pager(self) -> Pager:
        """The pager, made with the first parameter."""
        assert self._pager is not None
        return self._pager

    def prepare(self, device: torch.device) -> None:
        """Have room for all parameters that were added, with the arithmetic on `device`.

        Raises:
            ValueError: the budgets do not hold the state and there is no spill_dir; the state is elsewhere already.
            PagingError: the disk has no room.
        """
        self.check()
        if self._pager is not None and device != self.device:
            if self._pager.in_use:
                raise ValueError(f"the parameters are on {device}, their optimizer state is on {self.device}")
            self._pager.close()
            self._pager = None
        self.device = device
        slots = self._slots(device)
        if self._pager is None:
            self._pager = Pager(self._tiers(device))
        for tier, count in zip(self._pager.tiers, slots, strict=True):
            tier.grow(count)
        self._pager.grow(len(self.table))

    def check(self) -> None:
        """Raise PagingError if the state is not whole, or gone."""
        if self._closed:
            raise PagingError("the optimizer is closed, its state is gone")
        if self._broken is not None:
            raise PagingError(
                f"a step was left half taken ({self._broken!r}), so parameters and state do not fit each other: "
                "go on from a checkpoint, in a new optimizer"
            ) from self._broken

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """A change of the state: if it does not end well, the state is not used again."""
        self.check()
        try:
            yield
        except BaseException as error:
            self._broken = error
            raise

    def add(self, elements: int) -> tuple[int, bool]:
        """Give a parameter of so many elements its place, one that was given back if there is one of its size.

        `prepare` must follow. Returns its number, and whether its pages are blank.
        """
        returned = self._returned.get(elements)
        if returned:
            return returned.pop(), False
        self.steps.append(0)
        return self.table.add(elements), True

    def release(self, number: int) -> None:
        """Give a parameter's place back: its state is not needed any more."""
        segments = self.table.of_parameter[number]
        self._returned.setdefault(segments[-1].stop if segments else 0, []).append(number)

    def sweep(self, numbers: Iterable[int]) -> Iterator[list[tuple[Segment, Views]]]:
        """Bring the state of these parameters, page by page; each page stays while the loop is at it.

        The direction alternates: what was used last is still there, and is used first. (Always in one direction, with
        room for k of n pages, whatever was used longest ago has just left when it is needed.)
        """
        self.check()
        wanted = set(numbers)
        pages = sorted({segment.page for number in wanted for segment in self.table.of_parameter[number]})
        order = pages[::-1] if self._backward else pages
        self._backward = not self._backward
        self.pager.begin_sweep(order, order[::-1])
        for page in order:
            with self.pager.use(page) as buffer:
                segments = self.table.of_page[page]
                yield [pair for pair in zip(segments, self._views_of(page, buffer), strict=True)
                       if pair[0].parameter in wanted]  # fmt: skip

    def visit(self, number: int) -> Iterator[list[tuple[Segment, Views]]]:
        """Bring the state of one parameter, within a sweep that has begun: backwards, as backward visits them all."""
        for segment in reversed(self.table.of_parameter[number]):
            with self.pager.use(segment.page) as buffer:
                index = self.table.of_page[segment.page].index(segment)
                yield [(segment, self._views_of(segment.page, buffer)[index])]

    def pages_of(self, number: int) -> Sequence[int]:
        """The pages of one parameter, in the order of `visit`."""
        return [segment.page for segment in reversed(self.table.of_parameter[number])]

    def stats(self) -> dict[str, Any]:
        """See `PagedAdamW.memory_stats`."""
        if self._pager is None:
            return {}
        counts = self._pager.stats
        return {
            "page_bytes": self.table.page_bytes,
            "pages": len(self.table),
            "state_bytes": self.table.state_bytes,
            "tiers": self._pager.bytes_by_tier(),
            "page_ins": counts.page_ins,
            "page_outs": counts.page_outs,
            "bytes_in": counts.bytes_in,
            "bytes_out": counts.bytes_out,
            "bytes_moved": counts.bytes_in + counts.bytes_out,
            "bytes_by_link": dict(counts.by_link),
            "stall_seconds": counts.stall_seconds,
            "trace": list(counts.trace or []),
        }

    def close(self) -> None:
        """Free the state: memory, threads and file."""
        self._closed = True
        self._views.clear()
        if self._pager is not None:
            self._pager.close()

    def _views_of(self, page: int, buffer: Tensor) -> list[Views]:
        # Making them costs more than the update of a small tensor, so they are kept while the page is where it is.
        key, segments = (buffer.data_ptr(), len(self.table.of_page[page])), self.table.of_page[page]
        if page not in self._views or self._views[page][0] != key:
            self._views[page] = (key, [segment.views(buffer, self.table.layout) for segment in segments])
        return self._views[page][1]

    def _slots(self, device: torch.device) -> list[int]:
        """The number of slots that each tier needs."""
        pages, memory = len(self.table), self.memory
        if not self._has_device_tier(device):
            first = min(pages, self._slots_within(memory.host_budget))
            return self._with_disk([first], pages, disk=pages > first)
        first = min(pages, self._slots_within(memory.device_budget))
        if pages == first:
            return self._with_disk([first, 0], pages, disk=False)
        # Beside what the device does not hold: what each mover has in hand, and the slot that is kept free.
        host = min(pages - first + MOVERS + 1, self._slots_within(memory.host_budget))
        return self._with_disk([first, host], pages, disk=host < pages - first + MOVERS + 1)

    def _with_disk(self, slots: list[int], pages: int, disk: bool) -> list[int]:
        if self.memory.spill_dir is not None:
            return [*slots, min(pages, pages - sum(slots) + 2 * MOVERS + 2) if disk else 0]
        if disk:
            raise ValueError(
                f"the optimizer's state takes {pages} pages of {self.table.page_bytes:,} bytes, and device_budget "
                f"({self.memory.device_budget}) and host_budget ({self.memory.host_budget}) hold {max(slots[-1], 0)} "
                "of them in host memory: raise a budget, or give spill_dir"
            )
        return slots

    def _tiers(self, device: torch.device) -> list[Tier]:
        size = self.table.page_bytes
        tiers: list[Tier] = []
        if device.type == "cuda":
            tiers = [CudaDevice("device", 0, size, device), MemoryTier("host", 0, size, pinned=True)]
        elif self._has_device_tier(device):
            tiers = [self._simulate("device", 0, size), MemoryTier("host", 0, size)]
        else:
            tiers = [MemoryTier("host", 0, size)]
        if self.memory.spill_dir is not None:
            tiers.append(SpillFile("disk", 0, size, self.memory.spill_dir))
        return tiers

    def _has_device_tier(self, device: torch.device) -> bool:
        return device.type != "cpu" or self.memory.device_budget is not None

    def _slots_within(self, budget: int | None) -> int:
        return 1 << 40 if budget is None else budget // self.table.page_bytes
