"""The emulator of compiled kernels: the public names of `minipeft_kernels.emulator`."""

from minipeft_kernels.emulator import *  # noqa: F403
from minipeft_kernels.emulator import __all__ as __all__
