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
    check: Callable[..., None] | None = None,
    autograd: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an operation, and return it.

    Args:
        schema: "name(arguments) -> results", in PyTorch's schema language.
        run: computes it, on any device, without autograd.
        fake: gives empty results of the right shapes, dtypes and strides.
        check: raises ValueError or TypeError for arguments that do not fit each other, by what is known without their
            data. Both `run` and `fake` come after it, so neither reads beyond a tensor, and they refuse the same calls.
            None where `run` does that itself.
        autograd: computes it with a gradient, by an autograd function that calls the operation within
            `below_autograd()`; None if it has no gradient: then it is computed without recording.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.minipeft, name).default
    tensors = [(i, a.name) for i, a in enumerate(op._schema.arguments) if str(a.type) == "Tensor"]
    LIBRARY.impl(name, _after(tensors, check, run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"minipeft::{name}", _after(tensors, check, fake), lib=LIBRARY)
    LIBRARY.impl(name, _recorded(op, autograd), "Autograd")
    return op


def below_autograd() -> Any:
    """A context in which operations are computed and not recorded."""
    return torch._C._AutoDispatchBelowAutograd()


def without_autocast() -> Any:
    """A context without autocast: an operation has chosen its dtypes. `torch.autocast` does it in 7 microseconds."""
    return torch._C._DisableAutocast()


def is_plain_call(x: Tensor) -> bool:
    """True if nothing but the operation itself would happen in a call with x, a gradient aside.

    Nothing traces, compiles or watches the call, no derivative is taken forward, and x is a plain tensor with data that
    lies as it reads (no view that changes the sign, as of a conjugate's imaginary part). Then an operation's arithmetic
    or its autograd function may be called directly: going through the dispatcher takes 12 microseconds, more than a
    small layer's product.
    """
    if torch.compiler.is_compiling() or (type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter):
        return False
    return not (x.is_meta or x.is_neg()) and (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def is_transformed() -> bool:
    """True under torch.func's transforms and where derivatives are taken forward: what only torch's own operations do.

    What torch.compile traces goes its own way.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_mode() or torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode() -> bool:
    """True if derivatives are taken forward, as they may be where none is recorded. No operation here has any."""
    return forward_ad._current_level >= 0


def _after(
    tensors: list[tuple[int, str]], check: Callable[..., None] | None, then: Callable[..., Any]
) -> Callable[..., Any]:
    """`then` after `check`, and after a look at the arguments that must be tensors: torch lets None pass for one."""

    def run(*args: Any) -> Any:
        for place, name in tensors:
            if args[place] is None:
                raise TypeError(f"{name} must be a tensor, got None")
        if check is not None:
            check(*args)
        return then(*args)

    return run


def _recorded(op: Callable[..., Any], autograd: Callable[..., Any] | None) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if autograd is not None and (torch.is_grad_enabled() or forward_mode()):
            return autograd(*args)
        with below_autograd():
            return op(*args)

    return run
