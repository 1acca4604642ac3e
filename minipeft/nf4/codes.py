"""The bytes of a packed weight, which are codes and not numbers: averaging models leaves them as they are.

Whoever averages a model's tensors (stochastic weight averaging, an exponential moving average) computes in floating
point and copies the result back. torch would cut 118.99999, the average of two equal codes, to 118, another code, and
say nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from minipeft.nf4.format import read_scale

_DATA: Any = vars(torch._C.TensorBase)["data"]
# Far less than the step between two codes, far more than the rounding of an average of equal ones in float32.
_ROUNDING = 0.01


class PackedCodes(Tensor):
    """A uint8 tensor into which codes can be copied, and averages of codes that are all its own, which change nothing.

    Operations take and give ordinary tensors, at the cost of an ordinary `nn.Parameter`: only methods of this object
    differ. It is saved as an ordinary tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        return torch.Tensor._make_subclass(cls, data, requires_grad)

    def detach(self) -> Any:
        """The same bytes, still codes."""
        return super().detach().as_subclass(PackedCodes)

    @property
    def data(self) -> Any:
        """The same bytes, still codes; for torch itself, whose compiled functions ask for the exact type, a tensor."""
        plain = _DATA.__get__(self)
        inside = sys._getframe(1).f_globals.get("__name__", "").startswith("torch.")
        return plain if inside else plain.as_subclass(PackedCodes)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.is_floating_point() and not (value.is_meta or self.is_meta):
            self._check_same(value, "data")
        else:
            _DATA.__set__(self, value)

    def copy_(self, src: Tensor, non_blocking: bool = False) -> Any:
        """As `Tensor.copy_`; what is floating point must be, but for rounding, what is here, and changes nothing.

        Raises TypeError for other values in floating point.
        """
        if src.is_floating_point() and not (src.is_meta or self.is_meta):
            self._check_same(src, "copy_")
            return self
        return super().copy_(src, non_blocking)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point()):
            self[index].as_subclass(PackedCodes)._check_same(torch.as_tensor(value), "an assignment")
        else:
            super().__setitem__(index, value)

    def _check_same(self, values: Tensor, call: str) -> None:
        here = self.as_subclass(Tensor)
        if bool(((values.detach().to(here.device, torch.float32) - here).abs() > _ROUNDING).any()):
            self._refuse(call)

    def _refuse(self, call: str) -> NoReturn:
        raise TypeError(
            f"{call}: the {self.numel()} bytes are codes of a packed weight, not numbers, and would stand for another "
            "weight; leave out what is no floating point (tensor.is_floating_point()), or dequantize() the layer"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = self._alike(self.as_subclass(Tensor).clone(memory_format=torch.preserve_format))
        return memo[id(self)]

    def _alike(self, data: Tensor) -> Any:
        """`data` as codes; a parameter if this is one."""
        codes = data.as_subclass(PackedCodes)
        return nn.Parameter(codes, requires_grad=False) if getattr(self, "_is_param", False) else codes

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.as_subclass(Tensor)
        if getattr(self, "_is_param", False):
            plain = nn.Parameter(plain, requires_grad=False)
        return plain.__reduce_ex__(protocol)


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: PackedCodes, *args: Any, **kwargs: Any) -> Any:
        self._refuse(name)

    method.__name__ = name
    method.__doc__ = "Refused: arithmetic on codes."
    return method


for _name in ("add", "sub", "mul", "div", "lerp", "pow", "addcmul", "addcdiv"):
    setattr(PackedCodes, f"{_name}_", _refusing(f"{_name}_"))
for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(PackedCodes, f"__i{_name}__", _refusing(f"__i{_name}__"))


class HoldsCodes(nn.Module):
    """A module whose own uint8 tensors are codes: it holds them as `PackedCodes`.

    They are parameters, also among the buffers: compiled functions take a parameter of any class.
    """

    def stored_scales(self) -> dict[str, tuple[str, str]]:
        """The name of each buffer of scales -> the parameter in whose state it is stored, and its name there."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        super().__setattr__(name, value)
        if name == "_hf_hook":
            # accelerate offloads buffers, where that is asked for, by a state dict, and looks for them by their names.
            hook: Any
            for hook in getattr(value, "hooks", (value,)):
                if getattr(hook, "offload_buffers", False) and hook.weights_map is not None:
                    hook.weights_map = _ByBuffer(hook.weights_map, self.stored_scales())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's."""
        super().register_parameter(name, param)
        _keep(self._parameters, (name,))

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As nn.Module's."""
        super().register_buffer(name, tensor, persistent)
        _keep(self._buffers, (name,))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._keep_codes()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_codes()

    def _keep_codes(self) -> None:
        _keep(self._parameters, tuple(self._parameters))
        _keep(self._buffers, tuple(self._buffers))


class _ByBuffer(Mapping[str, Tensor]):
    """The weights of a hook of accelerate's, where scales are found by the names of their buffers, too."""

    def __init__(self, under: Mapping[str, Tensor], scales: Mapping[str, tuple[str, str]]) -> None:
        self.under, self.scales = under, scales

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.under[name]
        except KeyError:
            if name not in self.scales:
                raise
            return read_scale(self.under, *self.scales[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.under)

    def __len__(self) -> int:
        return len(self.under)


def _keep(held: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        tensor = held[name]
        # Not what another library has in the place of a tensor, such as a shard of one (DTensor).
        if type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.uint8:
            held[name] = nn.Parameter(tensor.detach().as_subclass(PackedCodes), requires_grad=False)
