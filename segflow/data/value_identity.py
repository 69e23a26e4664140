"""What a value is that a user's function reaches, in a word that is the same in every process: no address, no order."""

from __future__ import annotations

import hashlib
import random
import sys
import sysconfig
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from functools import cached_property, lru_cache, partial, partialmethod
from pathlib import Path
from types import BuiltinFunctionType, BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .code_reading import read_code
from .fingerprints import digest

_DEEPEST, _MOST = 60, 500_000  # what lies deeper, or comes after so many values, counts by its type alone
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice)
_SIMPLE = {bool, int, float, str, type(None)}
_SPELLED = ("datetime", "decimal", "fractions", "pathlib", "re", "uuid", "zoneinfo")  # modules whose values say it all
_TORCH_WORDS = (torch.dtype, torch.Size, torch.layout, torch.memory_format)
# What changes by itself, or is a place rather than a value.
_BY_TYPE = (torch.Generator, torch.device, random.Random, np.random.Generator, np.random.RandomState)
_BY_TYPE += (weakref.ref, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)  # type: ignore[assignment]


class OwnParts(NamedTuple):
    """The analysed model's modules, and where its parameters and buffers lie."""

    modules: frozenset[int]
    storages: frozenset[int]


def own_parts(model: nn.Module | None) -> OwnParts:
    """The parts of the analysed model, which count by type alone."""
    if model is None:
        return OwnParts(frozenset(), frozenset())
    tensors = [*model.parameters(), *model.buffers()]
    return OwnParts(frozenset(map(id, model.modules())), frozenset(map(_storage, tensors)) - {0})


class Values:
    """Words for values.

    Args:
        subject: the object that is described, which is not described again where it stands in a value.
        own: the analysed model's parts.
        changed, filled: names of attributes that running changes, and of the containers it fills; neither count.
        whole: whether contents of tensors and arrays count; without, they are not read.

    Attributes:
        meet: is called with each function, class and module of the user's among the values.
    """

    def __init__(
        self,
        subject: Any,
        own: OwnParts,
        changed: Collection[str] = (),
        filled: Collection[str] = (),
        *,
        whole: bool = False,
    ):
        self.subject, self.own = subject, own
        self.changed, self.filled, self.whole = set(changed), set(filled), whole
        self.meet: Callable[[Any], None] = lambda _thing: None
        self._known: dict[int, tuple[Any, str]] = {}  # with the value itself, so that its id stays its own
        self._around: list[int] = []

    def counts(self, name: str, value: Any) -> bool:
        """Whether an attribute is part of what an object is, and not of what became of it by running."""
        container = isinstance(value, Mapping | set | list | deque)
        return name not in self.changed and not (container and name in self.filled)

    def is_composed(self, value: Any) -> bool:
        """Whether a value is a function that was made of another one."""
        return isinstance(value, partial | MethodType) or hasattr(value, "__wrapped__")

    def word(self, value: Any) -> str:
        """16 characters that tell a value from others."""
        if isinstance(value, _PLAIN) and not isinstance(value, Enum):
            return _hashed(f"{type(value).__name__} {value!r}")
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._around:
            return f"around {len(self._around) - self._around.index(id(value))}"
        if len(self._around) > _DEEPEST or len(self._known) > _MOST:
            return f"beyond {_type_name(value)}"
        self._around.append(id(value))
        try:
            word = _hashed(self._described(value))
        finally:
            self._around.pop()
        self._known[id(value)] = (value, word)
        return word

    def _described(self, value: Any) -> str:
        if value is self.subject:
            return "itself"
        if isinstance(value, Tensor | np.ndarray):
            return self._numbers(value)
        if isinstance(value, Enum):
            return f"{_type_name(value)}.{value.name}"
        if isinstance(value, (np.generic, *_TORCH_WORDS)) or type(value).__module__ in _SPELLED:
            return f"{_type_name(value)} {value!r}"
        return self._contents(value) or self._callable(value) or self._object(value)

    def _contents(self, value: Any) -> str | None:
        """A container by what it holds, in the order of words where it has none of its own; None for other values."""
        if type(value) in (list, tuple) and all(type(item) in _SIMPLE for item in value):
            return f"{_type_name(value)} {value!r}"
        if isinstance(value, Mapping) and not isinstance(value, _BY_TYPE):
            words = sorted(self._pairs(value))
        elif isinstance(value, set | frozenset):
            words = sorted(map(self.word, value))
        elif isinstance(value, list | tuple | deque):
            words = [self.word(item) for item in value]
        else:
            return None
        return f"{_type_name(value)} {words} {self._state(value)}"

    def _pairs(self, mapping: Mapping[Any, Any]) -> list[str]:
        return [
            f"{self.word(key)} {self.word(value)}"
            for key, value in list(mapping.items())
            if not isinstance(key, str) or self.counts(key, value)
        ]

    def _numbers(self, value: Any) -> str:
        """A tensor or array by its content; of the analysed model's, and of those spread over ranks, the shape."""
        like = f"{_type_name(value)} {value.dtype} {tuple(value.shape)}"
        if isinstance(value, Tensor):
            spread = hasattr(value, "full_tensor") or value.is_meta or _storage(value) in self.own.storages
            return like if spread or not self.whole else f"{like} {digest(value)}"
        return f"{like} {digest(value) if self.whole and not value.dtype.hasobject else self.word(value.tolist())}"

    def _callable(self, value: Any) -> str | None:
        """A function, class or module, or what was made of one; None for other values."""
        parts: list[Any] | None = None
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type | ModuleType):
            return self._namespace(value)
        if isinstance(value, partial | partialmethod):
            parts = [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType):
            parts = [value.__func__, value.__self__]
        elif isinstance(value, BuiltinFunctionType | BuiltinMethodType):
            owner = None if isinstance(value.__self__, ModuleType | type) else value.__self__
            parts = [value.__module__, value.__qualname__, owner]
        elif hasattr(value, "__wrapped__"):
            parts = [value.__wrapped__]
        return None if parts is None else f"{_type_name(value)} of {[self.word(part) for part in parts]}"

    def _namespace(self, value: type | ModuleType) -> str:
        """A class or module: of a library by its name, of the user's with what it defines."""
        library = is_library_class(value) if isinstance(value, type) else is_library_module(value)
        if not library:
            self.meet(value)
            return value.__name__
        return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else value.__name__

    def _function(self, value: FunctionType) -> str:
        if not is_library_function(value):
            self.meet(value)
            return f"function {value.__name__} {read_code(value.__code__).digest}"
        inside = [self._cell(cell) for cell in value.__closure__ or ()]
        wrapped = self.word(value.__wrapped__) if hasattr(value, "__wrapped__") else ""
        return f"function {value.__module__}.{value.__qualname__} {inside} {wrapped}"

    def _cell(self, cell: Any) -> str:
        try:
            return self.word(cell.cell_contents)
        except ValueError:  # not assigned yet
            return ""

    def _object(self, value: Any) -> str:
        """Any other object: its class, and its attributes."""
        if isinstance(value, _BY_TYPE) or self._is_own(value):
            return _type_name(value)
        if hasattr(value, "__array_interface__") or hasattr(value, "__array__"):  # a PIL image, a frame of pandas'
            labels = [np.asarray(getattr(value, name, ())) for name in ("index", "columns") if name in dir(type(value))]
            return f"{_type_name(value)} {self.word([np.asarray(value), *labels])}"
        return f"{self.word(type(value))} {self._state(value)}"

    def _state(self, value: Any) -> list[str]:
        """The attributes of an object, but caches."""
        held = dict(getattr(value, "__dict__", {}))
        for base in type(value).__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    held[name] = getattr(value, name)
        return [
            f"{name}={self.word(held[name])}"
            for name in sorted(held, key=str)
            if not is_cached_property(value, name) and self.counts(name, held[name])
        ]

    def _is_own(self, value: Any) -> bool:
        """Whether a value is a part of the analysed model, or shares parameters with it."""
        if not isinstance(value, nn.Module) or not self.own.modules:
            return False
        storages = self.own.storages
        return id(value) in self.own.modules or any(_storage(parameter) in storages for parameter in value.parameters())


def is_plain(value: Any) -> bool:
    """Whether a value's `repr` says all of it."""
    return isinstance(value, _PLAIN) and not isinstance(value, Enum)


def definition_functions(defined: Any) -> list[FunctionType]:
    """The functions behind what a class defines: a method, also a static, cached or decorated one, or a property."""
    if isinstance(defined, FunctionType):
        wrapped = getattr(defined, "__wrapped__", None)
        return [defined] if wrapped is None else [defined, *definition_functions(wrapped)]
    if isinstance(defined, property):
        return definition_functions(defined.fget)
    if isinstance(defined, staticmethod | classmethod):
        return definition_functions(defined.__func__)
    if isinstance(defined, cached_property | partialmethod):
        return definition_functions(defined.func)
    wrapped = None if isinstance(defined, type) else getattr(defined, "__wrapped__", None)
    return [] if wrapped is None else definition_functions(wrapped)


def is_cached_property(value: Any, name: str) -> bool:
    """Whether an attribute is what a cached property computed."""
    return isinstance(getattr(type(value), name, None), cached_property)


def is_library_function(function: FunctionType) -> bool:
    """Whether a function is an installed package's, the standard library's or segflow's."""
    return _is_library_file(function.__code__.co_filename)


def is_library_class(found: type) -> bool:
    """The same of a class; of a module that is not loaded, it is taken as the user's."""
    module = sys.modules.get(found.__module__)
    return found.__module__ == "builtins" or (module is not None and is_library_module(module))


def is_library_module(module: ModuleType) -> bool:
    """The same of a module; one without a file is the interpreter's own, but for __main__ (a notebook)."""
    file = getattr(module, "__file__", None)
    if file is None:
        return module.__name__ != "__main__" and module.__name__.partition(".")[0] in sys.stdlib_module_names
    return _is_library_file(file)


@lru_cache(4096)
def _is_library_file(name: str) -> bool:
    path = name if name.startswith("<") else str(Path(name).resolve())
    return path.startswith(("<frozen", "<__array_function__", *_library_folders()))


@lru_cache(1)
def _library_folders() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = {str(Path(sysconfig.get_paths()[name]).resolve()) for name in names}
    folders |= {str(Path(module.__file__).resolve().parents[1]) for module in (torch, np) if module.__file__}
    return tuple(f"{folder}/" for folder in sorted({*folders, str(Path(__file__).resolve().parents[1])}))


def _storage(tensor: Tensor) -> int:
    """Where a tensor's numbers lie; 0 where nowhere that is known."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    try:
        return local.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse and meta tensors have none
        return 0


def _type_name(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}" if is_library_class(kind) else kind.__name__


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
