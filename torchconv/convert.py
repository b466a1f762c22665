"""Swap the layers of a model in place: `convert` to torchconv's, `restore` back to torch.nn's.

A layer is swapped by changing its class and nothing else. torchconv's layers keep no state beyond
torch.nn's, so parameters, buffers, hooks, names, flags and every reference that somebody holds to
the layer (an optimizer, a second parent, an fx graph) stay what they are: nothing is copied.
torch.nn.utils.parametrize works the same way: it gives a layer a class of its own, with a property
for each parametrized tensor. Such a class is rebuilt over the other base. A subclass that changes
nothing of what is computed gets a class of its own over both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

from torchconv import nn
from torchconv._coverage import FLOATS

__all__ = ["convert", "restore"]

_Model = TypeVar("_Model", bound=torch.nn.Module)

_OURS: dict[type, type] = {
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.LazyConv2d: nn.LazyConv2d,
    torch.nn.Linear: nn.Linear,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.MaxPool2d: nn.MaxPool2d,
    torch.nn.AvgPool2d: nn.AvgPool2d,
    torch.nn.AdaptiveMaxPool2d: nn.AdaptiveMaxPool2d,
    torch.nn.AdaptiveAvgPool2d: nn.AdaptiveAvgPool2d,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}

# What an instance gains with its class: 'activation', 'flip_kernel' and a few private names.
_ADDED = {ours: frozenset(dir(ours)) - frozenset(dir(theirs)) for theirs, ours in _OURS.items()}

# What a subclass may define and still compute what its base does.
_HARMLESS = frozenset(
    (
        *("__annotations__", "__constants__", "__doc__", "__firstlineno__", "__init__"),
        *("__module__", "__orig_bases__", "__parameters__", "__static_attributes__"),
        *("extra_repr", "reset_parameters"),
    )
)

# On a class made for a layer: the class in whose place it stands.
_ORIGINAL = "_torchconv_original_class"


def convert(model: _Model) -> _Model:
    """Makes every torch.nn.Conv2d, LazyConv2d, Linear, BatchNorm2d, MaxPool2d, AvgPool2d,
    AdaptiveMaxPool2d and AdaptiveAvgPool2d in `model`, `model` itself included, one of torchconv's,
    in place, and returns `model`. A Linear runs in torchconv over images with channels last, as in
    ConvNeXt, and a BatchNorm2d on a CPU; over everything else they are PyTorch's.

    The layers keep their parameters (the same objects, so an optimizer goes on), buffers, hooks,
    names, flags, parametrizations and every other attribute. Input for which torchconv has no
    kernel, on a GPU or quantized for example, they still hand to PyTorch.

    Left alone are subclasses that may compute something else, since they define more than how they
    are built (`torchconv.patch` reaches the functions that they call), layers whose `forward` was
    replaced on the instance, layers with parameters other than float16, bfloat16, float32 and
    float64, scripted and quantized modules, and layers that carry an attribute `activation` or
    `flip_kernel` of somebody else's.
    Converting twice does nothing. Script or quantize a model before, or after `restore`.
    """
    for module in _modules(model):
        ours = _OURS.get(_layer_class(module))
        if ours is None or not _swappable(module, ours):
            continue
        cls: Any = type(module)
        if _has_own_class(module):
            module.__class__ = _rebase(cls, ours, {_ORIGINAL: cls})
        else:
            module.__class__ = ours if cls in _OURS else _over_both(cls)
        vars(module)["_converted"] = True
    return model


def restore(model: _Model) -> _Model:
    """Undoes `convert`, in place: every layer that it swapped has its former class again and keeps
    nothing of torchconv's. Returns `model`.

    Layers built as torchconv.nn's stay, and so does a converted layer that was since given an
    activation or a flipped kernel, for which torch.nn has no form.
    """
    for module in _modules(model):
        ours = _layer_class(module)
        if ours not in _THEIRS or "_converted" not in vars(module):
            continue
        if any(getattr(module, name, None) for name in ("activation", "flip_kernel")):
            continue
        module.__class__ = _former_class(module, _THEIRS[ours])
        for name in _ADDED[ours]:
            vars(module).pop(name, None)
    return model


def _modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")
    return model.modules()


def _properties(cls: type) -> dict[str, Any]:
    """The names that a class defines, but for Python's own and ours."""
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith("__") and name != _ORIGINAL
    }


def _has_own_class(module: torch.nn.Module) -> bool:
    """Whether the class of `module` is one that parametrize made for it."""
    return parametrize.is_parametrized(module) and all(
        name in module.parametrizations  # type: ignore[operator]
        for name in _properties(type(module))
    )


def plain_class(cls: type) -> type:
    """The class of torch.nn or torchconv.nn that computes what `cls` does; `cls` itself where it
    may compute something else."""
    bases = cls.__mro__
    for i, base in enumerate(bases):
        if base in _OURS or base in _THEIRS:
            # Of several bases, some come after this one and yet before what all modules have.
            own, end = base.__mro__, bases.index(torch.nn.Module)
            others = (b for b in bases[i:end] if b not in own)
            return base if all(vars(b).keys() <= _HARMLESS for b in others) else cls
        if not vars(base).keys() <= _HARMLESS:
            break
    return cls


@functools.cache
def _over_both(cls: type) -> type:
    """For layers of a subclass of torch.nn's: one of torchconv's that is still one of theirs."""
    ours: Any = _OURS[plain_class(cls)]

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = ours.__reduce_ex__(self, protocol)
        return (_blank, (cls,), *state)

    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": reduce}
    return type(cls.__name__, (ours, cls), {**body, _ORIGINAL: cls})


def _blank(cls: type) -> Any:
    made: Any = _over_both(cls)
    return made.__new__(made)


def _layer_class(module: torch.nn.Module) -> type:
    cls = type(module)
    if _has_own_class(module) or _ORIGINAL in vars(cls):
        return cls.__bases__[0]
    return plain_class(cls)


def _swappable(module: torch.nn.Module, ours: type) -> bool:
    if vars(module).keys() & {"forward", "_conv_forward"}:
        return False
    if any(hasattr(module, name) for name in _ADDED[ours]):
        return False
    return all(parameter.dtype in FLOATS for parameter in module.parameters())


def _rebase(cls: type, base: type, extra: dict[str, Any]) -> type:
    """The class that parametrize would have made over `base` where it made `cls`."""
    body = {name: value for name, value in vars(cls).items() if name != _ORIGINAL}
    return type(cls.__name__, (base,), {**body, **extra})


def _former_class(module: torch.nn.Module, theirs: type) -> type:
    cls = type(module)
    original: type | None = vars(cls).get(_ORIGINAL)
    if not _has_own_class(module):
        return original or theirs
    if original is not None and _properties(original) == _properties(cls):
        return original
    return _rebase(cls, theirs, {})  # parametrizations came or went after `convert`
