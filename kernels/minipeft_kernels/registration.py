"""Registration of an operation as one of torch's own: `torch.ops.minipeft.<name>`.

Registered so, an operation is opaque to torch.compile (no graph break, no tracing into it), has a fake form that gives
shapes without data, and works under every mode of the dispatcher. `torch.library.custom_op` with `register_autograd`
does the same, and costs 45 microseconds a call more when a gradient is recorded: as much as a small layer, of which a
model has hundreds. The plain registrations below cost 5.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("minipeft", "FRAGMENT")


def define_op(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an operation, and return it.

    Args:
        schema: "name(arguments) -> results", in PyTorch's schema language.
        run: computes it, on any device, without autograd.
        fake: gives empty results of the right shapes, dtypes and strides.
        autograd: computes it with a gradient, by an autograd function that calls the operation within
            `below_autograd()`; None if it has no gradient: then it is computed without recording.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minipeft::{name}", fake, lib=LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.minipeft, name).default
    LIBRARY.impl(name, _recorded(op, autograd), "Autograd")
    return op


def below_autograd() -> Any:
    """A context in which operations are computed and not recorded."""
    return torch._C._AutoDispatchBelowAutograd()


def without_autocast() -> Any:
    """A context without autocast: an operation has chosen its dtypes. `torch.autocast` does it in 7 microseconds."""
    return torch._C._DisableAutocast()


def is_plain_call(x: Tensor, forward_mode_too: bool = False) -> bool:
    """True if nothing but the operation itself would happen in a call with x, a gradient aside.

    Nothing traces, compiles or watches the call, no derivative is taken forward, and x is a plain tensor with data that
    lies as it reads (no view that changes the sign, as of a conjugate's imaginary part). Then an operation's arithmetic
    or its autograd function may be called directly: going through the dispatcher takes 12 microseconds, more than a
    small layer's product.

    Args:
        forward_mode_too: True even if derivatives are taken forward.
    """
    if torch.compiler.is_compiling() or (type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter):
        return False
    return not (x.is_meta or x.is_neg()) and (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and (forward_mode_too or forward_ad._current_level < 0)
    )


def forward_mode() -> bool:
    """True if derivatives are taken forward, as they may be where none is recorded. No operation here has any."""
    return forward_ad._current_level >= 0


def _recorded(op: Callable[..., Any], autograd: Callable[..., Any] | None) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if autograd is not None and (torch.is_grad_enabled() or forward_mode()):
            return autograd(*args)
        with below_autograd():
            return op(*args)

    return run
