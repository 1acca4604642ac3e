"""PEFT beside minipeft: tools that ask for PEFT's models and configs take minipeft's, too.

TRL, accelerate and transformers' Trainer ask `isinstance(model, peft.PeftModel)` and `isinstance(config,
peft.PeftConfig)`, and call `peft.get_peft_model` with a config. Nothing here imports PEFT: whoever asks has done so,
and until then objects have no other class than their own.

`isinstance` looks at the type of an object, then at its attribute `__class__`. Ours is a class that nothing is made
of (`_appearance`): it derives from the object's own, and has PEFT's at the very end of its order of lookup, behind
`object`, so that not one attribute is found in PEFT's that the object did not have. (A common subclass of both
is impossible: transformers and PEFT name their bases in opposite orders.) `type(obj)` is what it was.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, ClassVar

from minipeft import public

# The descriptor by which every object has its class.
_CLASS: Any = object.__dict__["__class__"]


class KnownToPeft:
    """The base of what answers `isinstance` as PEFT's class `peft_root`, or its subclass of the same name, would.

    Attributes:
        peft_root: The name in `peft` of the class from which PEFT's own of this kind derive.
    """

    peft_root: ClassVar[str] = "PeftModel"

    @property
    def __class__(self) -> Any:
        own = _CLASS.__get__(self)
        root = getattr(sys.modules.get("peft"), own.peft_root, None)
        # minipeft itself may stand in under the name of PEFT.
        return own if not isinstance(root, type) or issubclass(own, root) else _appearance(own, root)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        _CLASS.__set__(self, _real(value))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The usual way has pickle compare the class with the attribute.
        return object.__new__, (_CLASS.__get__(self),), dict(vars(self))


class _Appearance(type):
    """The class of the classes that nothing is made of; to call one is to call the class that it stands for."""

    def mro(cls) -> list[type]:
        order = super().mro()
        return [*order, *(one for one in vars(cls).get("_behind_object", ()) if one not in order)]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        own = vars(cls).get("_own_class")
        return super().__call__(*args, **kwargs) if own is None else own(*args, **kwargs)


@functools.cache
def _appearance(own: Any, root: type) -> type:
    """The class that has both `own` and PEFT's class of the same name, else `root`, among its bases."""
    _share(root)
    alike = (getattr(sys.modules["peft"], cls.__name__, None) for cls in own.__mro__)
    kind = next((cls for cls in alike if isinstance(cls, type) and issubclass(cls, root)), root)
    meta: Any = _Appearance if type(own) is type else type("_Appearance", (_Appearance, type(own)), {})
    namespace = {name: vars(own)[name] for name in ("__module__", "__qualname__", "__doc__") if name in vars(own)}
    namespace |= {"_own_class": own, "_behind_object": tuple(cls for cls in kind.__mro__ if issubclass(cls, root))}
    appearance: type = meta(own.__name__, (own,), namespace)
    return appearance


@functools.cache
def _real(cls: type) -> type:
    """`cls`, or, if it was made of an appearance (as FSDP's second version makes a class), that made of the real one.

    An object of a class with an appearance among its bases would find PEFT's attributes in its class.
    """
    own = vars(cls).get("_own_class")
    if own is not None:
        return _real(own)
    if not isinstance(cls, _Appearance):
        return cls
    kinds: Any = type(cls).__mro__
    meta: Any = next((kind for kind in kinds if not issubclass(kind, _Appearance)), type)
    left_out = ("__dict__", "__weakref__")
    namespace = {name: value for name, value in vars(cls).items() if name not in left_out}
    real: type = meta(cls.__name__, tuple(_real(base) for base in cls.__bases__), namespace)
    return real


def _share(root: type) -> None:
    """Have PEFT's classes, of which one is `root`, leave to minipeft what is minipeft's.

    `peft.get_peft_model`, which TRL calls with the config that it was given, calls one of PEFT's model classes: with
    one of minipeft's configs that makes minipeft's model. What else would mix the two raises TypeError, since PEFT's
    tuners write into the `peft_config` of the model that they wrap, and read fields that minipeft's configs lack.
    """
    peft, inside = sys.modules["peft"], sys.modules["peft.tuners.tuners_utils"]
    for cls in (peft.PeftModel, peft.PeftMixedModel, inside.BaseTuner):
        if "__new__" not in vars(cls):
            cls.__new__ = _new_beside(cls, makes_models=cls is not inside.BaseTuner)


def _new_beside(cls: Any, makes_models: bool) -> Any:
    """`__new__` of PEFT's class `cls`, whose objects are made of a model and a config (or several by name)."""

    def new(made: Any, model: Any = None, peft_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        configs = peft_config.values() if isinstance(peft_config, dict) else (peft_config,)
        if any(isinstance(config, KnownToPeft) for config in configs):
            if makes_models:
                named = dict(zip(("adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage"), args, strict=False))
                return public.fetch(public.HOMES["get_peft_model"])(model, peft_config, **named, **kwargs)
            raise TypeError(
                f"peft's {made.__name__} cannot be made of a config of minipeft's: call minipeft.get_peft_model or "
                "minipeft.inject_adapter_in_model, or take the config from peft"
            )
        if isinstance(model, KnownToPeft):
            raise TypeError(
                f"the model has adapters of minipeft's, and peft's {made.__name__} would write into their peft_config: "
                "call the model's add_adapter with a config of minipeft's, or its unload() first"
            )
        return super(cls, made).__new__(made)

    return staticmethod(new)
