"""What the analysed model is besides its parameters: the code of its modules' forwards, and their plain settings.

Two models may have the same values at every parameter and other gradients (`detach`, a reversed or scaled gradient), so
that no loss tells them apart.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from operator import itemgetter
from typing import Any

from torch import nn

from ..runtime.sharding import named_modules
from .changing import Reached, Seen, Slot, remembered
from .code_identity import read_now
from .fingerprints import digest
from .value_identity import is_library_class, own_parts

_IDLE = ("training", "inplace")
_PLAIN = (bool, int, float, str, type(None))


def model_fingerprint(model: nn.Module) -> Reached:
    """A digest for each thing that forwards of each class of the model's modules reach.

    Modules of installed packages count by their class and their plain settings.
    """
    return remembered(model, ("forward",), partial(_read, model))


def _read(model: nn.Module) -> Reached:
    words: dict[str, list[Any]] = defaultdict(list)
    slots: dict[Slot, Seen] = {}
    own = own_parts(model)
    for name, module in named_modules(model).items():
        kind = _own_class(module)
        told = _settings(module) if is_library_class(kind) else read_now(module, ("forward",), own)
        slots |= told.slots
        for entry, word in {"": "", **told}.items():
            words[f"{kind.__qualname__} {entry}".rstrip()].append((name, word))
    found = Reached({entry: digest(modules)[:16] for entry, modules in words.items()})
    found.slots = slots
    return found


def _own_class(module: nn.Module) -> type:
    """The module's class, before torch sharded it."""
    classes = (base for base in type(module).__mro__ if not base.__module__.startswith("torch.distributed"))
    return next(classes)


def _settings(module: nn.Module) -> Reached:
    """The plain attributes of a module, but for those that change no number."""
    held = sorted(((n, v) for n, v in vars(module).items() if not n.startswith("_")), key=itemgetter(0))
    plain = [(name, repr(value)) for name, value in held if _is_plain(value) and name not in _IDLE]
    found = Reached({"settings": digest(plain)})
    found.slots = {}
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple | list) and all(map(_is_plain, value)))
