"""Calls of the raw operations with arguments that need not fit each other: made at random, made once, compared.

An operation either refuses a call, by ValueError, TypeError or RuntimeError, or its results have the shapes and dtypes
that its fake form gives. It refuses what its fake form refuses, and beside that only what the numbers in a tensor say.
"""

import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any

import torch
from test_ops import operation, some_arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

REFUSALS = (ValueError, TypeError, RuntimeError)
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int8, torch.int64, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn),
)
INTEGERS = (-(2**63), -(2**31), -64, -1, 0, 1, 2, 3, 31, 33, 48, 64, 96, 128, 256, 4096, 2**31, 2**40, 2**62, 2**63 - 1)
FLOATS = (0.0, -1.0, 1.0, 2.0, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
# Why an operation may refuse what its fake form does not: the numbers in a tensor, and torch's rule for what it writes.
BY_DATA = ("NF4 needs finite weights", "passes float32", "refers to a single memory location")
# It logs every refusal of a fake form with its traceback.
logging.getLogger("torch._subclasses.fake_tensor").disabled = True
# Experts' operations check by themselves.
NAMES = [name for name in some_arguments(torch.float32, True) if not name.startswith("experts")]


def call_many(calls: int, seed: int, started: Callable[[int], object] = lambda seed: None) -> tuple[int, int]:
    """Make `calls` calls, each from a seed of its own, counted up from `seed`, which `started` is told first.

    Returns:
        How many were computed, and how many refused.

    Raises:
        AssertionError: something else came of one; names its seed.
    """
    computed = 0
    for one in range(seed, seed + calls):
        started(one)
        torch.manual_seed(one)
        try:
            *_, done = call_at_random(random.Random(one))
        except Exception as error:
            raise AssertionError(f"seed {one}: {type(error).__name__}: {error}") from error
        computed += done
    return computed, calls - computed


def call_at_random(choose: random.Random) -> tuple[str, str, bool]:
    """Call an operation once, with one to three of its arguments changed.

    Returns:
        The call in words, what came of it, and whether it was computed.

    Raises:
        AssertionError: the operation and its fake form do not agree.
        Exception: whatever an operation raises that is no refusal.
    """
    name = choose.choice(NAMES)
    dtype, double = choose.choice([(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
    arguments = list(some_arguments(dtype, double)[name])
    for _ in range(choose.randint(1, 3)):
        place = choose.randrange(len(arguments))
        arguments[place] = changed(arguments[place], choose)
    words = f"{name}({', '.join(map(in_words, arguments))})"
    fake, why_not_fake = attempt(name, as_fake(arguments))
    real, why_not = attempt(name, arguments)
    assert why_not or not why_not_fake, f"the fake form alone refuses {words}: {why_not_fake}"
    assert why_not_fake or not why_not or any(said in why_not for said in BY_DATA), f"{words} alone refuses: {why_not}"
    if not why_not:
        assert outline(real) == outline(fake), f"{words} gives {outline(real)}, and its fake form {outline(fake)}"
    return words, why_not or f"gives {outline(real)}", not why_not


def attempt(name: str, arguments: list[Any]) -> tuple[Any, str]:
    """The results of a call, and the reason why it was refused, "" where it was not."""
    try:
        return operation(name)(*arguments), ""
    except REFUSALS as error:
        return None, f"{type(error).__name__}: {error}"


def outline(results: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes."""
    tensors = results if isinstance(results, tuple) else () if results is None else (results,)
    return [(tuple(t.shape), t.dtype) for t in tensors]


def as_fake(arguments: list[Any]) -> list[Any]:
    """The arguments without data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(a: Any) -> Any:
        if isinstance(a, list):
            return [faked(item) for item in a]
        return mode.from_tensor(a.detach()) if isinstance(a, Tensor) and a.layout == torch.strided else a

    return [faked(a) for a in arguments]


def changed(argument: Any, choose: random.Random) -> Any:
    """Another argument of the kind that stood there, or now and then of another kind."""
    if choose.random() < 0.03:
        return choose.choice([None, 1, 0.5, [], torch.zeros(3), torch.float32])
    if isinstance(argument, list):
        return changed_list(argument, choose)
    if isinstance(argument, Tensor):
        with contextlib.suppress(RuntimeError):  # a change that torch does not make of such a tensor
            return changed_tensor(argument, choose)
        return argument
    if isinstance(argument, bool):
        return not argument
    if isinstance(argument, int):
        return choose.choice([*INTEGERS, argument - 1, argument + 1, 2 * argument])
    if isinstance(argument, float):
        return choose.choice(FLOATS)
    if isinstance(argument, torch.dtype):
        return choose.choice(DTYPES)
    return torch.randn(choose.choice([(), (48,), (4, 128), (48, 4), (6, 4), (2, 3, 128)]))


def changed_list(items: list[Any], choose: random.Random) -> list[Any]:
    items = list(items)
    kind = choose.randrange(4)
    if kind == 0 or not items:
        return items[:-1]
    if kind == 1:
        return [*items, items[0]]
    if kind == 2:
        return items[::-1]
    place = choose.randrange(len(items))
    items[place] = changed(items[place], choose)
    return items


def changed_tensor(t: Tensor, choose: random.Random) -> Tensor:
    flat = t.detach().reshape(-1)
    kind = choose.randrange(14)
    if kind == 0:
        return flat[: choose.randrange(flat.numel() + 1)]
    if kind == 1:
        return torch.cat([flat, flat])
    if kind == 2:
        return t.detach().unsqueeze(choose.randrange(t.dim() + 1))
    if kind == 3:
        return t.detach().movedim(0, -1) if t.dim() else t
    if kind == 4:
        return t.detach().to(choose.choice(DTYPES))
    if kind == 5:
        return t.detach().to("meta")
    if kind == 6:
        return flat.new_empty(0) if choose.random() < 0.5 else flat[:1].reshape(())
    if kind == 7 and t.dim():
        place = choose.randrange(t.dim())
        return t.detach().narrow(place, 0, choose.randrange(t.shape[place] + 1))
    if kind == 8 and t.dim():
        return torch.cat([t.detach(), t.detach()], choose.randrange(t.dim()))
    if kind == 9:
        return flat[:1].expand(t.shape)  # one element in every place
    if kind == 10:
        return torch.stack([flat, flat], 1)[:, 0].reshape(t.shape)
    if kind == 11 and t.dim() == 2 and t.is_floating_point():
        return t.detach().to_sparse()
    if kind == 12 and t.is_floating_point():
        return torch.full_like(t, choose.choice(FLOATS))
    return torch.stack([flat, flat]).view(2, -1)[1].view(t.shape)  # at an odd place of a larger storage


def in_words(argument: Any) -> str:
    if isinstance(argument, list):
        return f"[{', '.join(map(in_words, argument))}]"
    if isinstance(argument, Tensor):
        return f"{argument.dtype} {tuple(argument.shape)} {argument.device} {argument.layout}".replace("torch.", "")
    return repr(argument)
