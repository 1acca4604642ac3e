"""minipeft: parameter-efficient fine-tuning, written to be read and good enough to be used.

The names below are Hugging Face PEFT's, with its arguments; each is imported when it is first used.
"""

from minipeft import compat, public

compat.check_versions()

# The release of PEFT whose names, arguments and files these are, and which scripts compare with what they need.
__version__ = public.PEFT_VERSION

__all__ = sorted(public.HOMES)

public.register()
__getattr__, __dir__ = public.attributes_of("")
