"""The adapters that act: one switch for a whole model, and one for a module that was set by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn


@dataclasses.dataclass
class Switch:
    """The adapters that act, shared by reference by a model and all its adapted modules.

    Attributes:
        paused: The parameters that will get gradients again when the adapters are enabled.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    paused: list[nn.Parameter] = dataclasses.field(default_factory=list)
    # Set while each row of a batch goes through an adapter of its own (`Registration.rows`).
    by_row: Any = None

    @property
    def acting(self) -> tuple[str, ...]:
        """The adapters that change the model's whole output now."""
        return self.active if self.enabled and self.by_row is None else ()

    @property
    def rows(self) -> Any:
        """The assignment of adapters to the rows of the model's output, if there is one now."""
        return self.by_row if self.enabled else None

    @property
    def shared(self) -> Switch:
        """The model's switch."""
        return self


class OwnSwitch(Switch):
    """The switch of one module that was set by itself (`LayerCalls`): what was not set there is the model's.

    Attributes:
        own_active: The adapters that act in this module; None for the model's.
        own_enabled: True if they do; None for the model's.
    """

    def __init__(self, shared: Switch) -> None:
        self._shared = shared
        self.own_active: tuple[str, ...] | None = None
        self.own_enabled: bool | None = None

    @property
    def shared(self) -> Switch:
        return self._shared

    # These stand in the places of the three fields, so that `acting` and `rows` read them.

    @property
    def active(self) -> tuple[str, ...]:  # type: ignore[override]
        """The adapters that act in this module while it is enabled."""
        return self._shared.active if self.own_active is None else self.own_active

    @property
    def enabled(self) -> bool:  # type: ignore[override]
        """True if adapters act in this module."""
        return self._shared.enabled if self.own_enabled is None else self.own_enabled

    @property
    def by_row(self) -> Any:
        """As the model's."""
        return self._shared.by_row
