"""The emulator of compiled kernels: the public names of `minipeft_kernels.emulator`.

Imported from here, it runs minipeft's own operations too, within `emulate`.
"""

from minipeft_kernels.emulator import *  # noqa: F403
from minipeft_kernels.emulator import __all__ as __all__
from minipeft_kernels.lab import emulation as _emulation  # noqa: F401, registers the emulator with the operations
