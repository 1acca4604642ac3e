"""An object gets another class in place: mixins go in front of its own, and out again.

A mixed class is made once, is called as the plain one, and can be pickled and copied.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    # The mixins stand in front of an nn.Module class; for the type checker they are modules themselves.
    _Base = nn.Module
else:
    _Base = object

_mixed_classes: dict[tuple[type, type, tuple[str, ...]], type] = {}


def mix_in(obj: Any, mixin: Any, offered: tuple[str, ...] = ()) -> None:
    """Put `mixin` in front of the class of `obj`, in place. The class is made once, and named `mixin.name_prefix` more.

    Args:
        offered: Names of attributes that the class gets besides (`Face.offer`).
    """
    plain = type(obj)
    if (mixin, plain, offered) not in _mixed_classes:
        name = f"{mixin.name_prefix}{plain.__name__}"
        namespace = {"__module__": plain.__module__, "__qualname__": name, "_plain_class": plain, "_offered": offered}
        namespace.update({attribute: mixin.offer(attribute) for attribute in offered})
        _mixed_classes[mixin, plain, offered] = type(name, (mixin, plain), namespace)
    obj.__class__ = _mixed_classes[mixin, plain, offered]


def mix_out(obj: Any, kind: type) -> list[tuple[Any, tuple[str, ...]]]:
    """Take the mixins of `kind` out of the class of `obj`, in place; others stay. Returns those taken, outer last."""
    plain, mixins = taken_apart(type(obj))
    obj.__class__ = plain
    behind = []
    if plain.__bases__[0].__name__ == "FSDPModule":
        # torch's `fully_shard` puts a class of its own in front of all that is there by then.
        front: Any = plain.__bases__[0]
        obj.__class__ = plain.__bases__[1]
        behind = mix_out(obj, kind)
        inner: Any = type(obj)
        obj.__class__ = _sharded_class(front, inner, vars(plain).get("__deepcopy__")) if behind else plain
    for mixin, offered in mixins:
        if not issubclass(mixin, kind):
            mix_in(obj, mixin, offered)
    return behind + [(mixin, offered) for mixin, offered in mixins if issubclass(mixin, kind)]


@functools.cache
def _sharded_class(front: Any, plain: Any, deepcopy: Any) -> type:
    return type(f"FSDP{plain.__name__}", (front, plain), {"__module__": plain.__module__, "__deepcopy__": deepcopy})


def plain_class(obj: Any) -> Any:
    """The class that `obj` had before any mixin."""
    return taken_apart(type(obj))[0]


def taken_apart(cls: Any) -> tuple[Any, list[tuple[Any, tuple[str, ...]]]]:
    """A plain class, and the mixins in front of it with what they offer, outer last."""
    mixins = []
    while "_plain_class" in vars(cls):
        mixins.append((cls.__mro__[1], vars(cls)["_offered"]))
        cls = cls._plain_class
    return cls, mixins[::-1]


class Mixin(_Base):
    """The base of every mixin: an object whose class was put together at run time can be pickled and copied."""

    # An adapted `Linear` is shown as `<name_prefix>Linear`.
    name_prefix: ClassVar[str] = ""
    # A mixin stays in front of those that are put in later and have a smaller number.
    outermost: ClassVar[int] = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _put_together, taken_apart(type(self)), state


def _put_together(plain: Any, mixins: list[tuple[Any, tuple[str, ...]]]) -> Any:
    obj = plain.__new__(plain)
    for mixin, offered in mixins:
        mix_in(obj, mixin, offered)
    return obj


class Face(Mixin):
    """The public verbs of a model, in front of all else: also of what adapts the model as one module."""

    outermost: ClassVar[int] = 2

    @classmethod
    def offer(cls, name: str) -> Any:
        """The descriptor of an attribute that an object has by this mixin where it has none of that name itself."""
        raise NotImplementedError


def behind_face(module: Any) -> Any:
    """`module` as its adapters' mixins see it: a model's verb may have the name of a module's."""
    return super(Face, module) if isinstance(module, Face) else module


def own_attributes(module: Any) -> tuple[str, ...]:
    """The names of the attributes that the mixins in front of `module` have added to it."""
    adapted: Any = type(module)
    return _own_attributes_of(adapted)


@functools.cache
def _own_attributes_of(adapted: type) -> tuple[str, ...]:
    return tuple(name for cls in adapted.__mro__ for name in vars(cls).get("_own_attributes", ()))
