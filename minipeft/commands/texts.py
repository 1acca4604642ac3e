"""What several commands say in the same words."""

from __future__ import annotations

from typing import Any


def loss_text(result: Any) -> str:
    return f"loss {result.loss:.4f} (perplexity {result.perplexity:.4g})"
