"""Optimizers whose state may be larger than the memory they are allowed."""

from minipeft.optim.errors import PagingError
from minipeft.optim.paged_adamw import PagedAdamW

__all__ = ["PagedAdamW", "PagingError"]
