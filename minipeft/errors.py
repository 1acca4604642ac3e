"""The errors and warnings that have names in PEFT, for scripts that catch or filter them."""

from __future__ import annotations


class PeftError(Exception):
    """The base of PEFT's own errors."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """There is no module, or none that can be adapted, where a config points."""


class NotMergeableError(PeftError, ValueError, NotImplementedError):
    """An adapter that cannot be folded into a module's weights, as PEFT says by a NotImplementedError."""


class PeftWarning(UserWarning):
    """A warning about adapters: what was done, and what it may mean for the result."""


class AdapterNotFoundError(FileNotFoundError, ValueError):
    """There is no adapter under a name: a missing file, which PEFT reports as a ValueError."""


class NotAnAdapterError(TypeError, ValueError):
    """A file is no adapter's configuration, which PEFT reports as a TypeError."""
