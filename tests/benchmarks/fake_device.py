"""A device whose clock stands still until a call moves it."""

from typing import Any

import torch


class FakeDevice:
    torch_device = torch.device("cpu")
    warmups = 1
    clock = "stands still"

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []
        self.synchronized = 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, stop: float) -> float:
        assert stop <= self.synchronized, "read before it was waited for"
        return stop - start

    def flush(self) -> None:
        self.now += 1000.0
        self.events.append("flush")

    def expect(self, host_seconds: float) -> None:
        self.events.append("expect")

    def synchronize(self) -> None:
        self.synchronized = self.now

    def call(self, name: str, *seconds: float) -> Any:
        """A run that takes these seconds, one after the other, then the last for ever."""
        left = list(seconds)

        def run() -> torch.Tensor:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.events.append(name)
            return torch.ones(2)

        return run
