"""Optimizers whose state may be larger than the memory they are allowed."""

from minipeft.optim.paged_adamw import PagedAdamW
from minipeft.optim.tiers import PagingError

__all__ = ["PagedAdamW", "PagingError"]
