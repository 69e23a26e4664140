"""What a value is that a user's function reaches, in a word that is the same in every process: no address, no order."""

from __future__ import annotations

import contextvars
import hashlib
import logging
import random
import struct
import sys
import sysconfig
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import cached_property, lru_cache, partial, partialmethod
from pathlib import Path
from types import BuiltinFunctionType, BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TaskError
from .as_written import as_written
from .changing import Seen, Slot, counted, digest_once
from .code_reading import read_code
from .fingerprints import _state as pickled_state
from .fingerprints import digest

_DEEPEST, _MOST = 60, 500_000  # what lies deeper, or comes after so many values, counts by its type alone
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice)
_SIMPLE = {bool, int, float, str, type(None)}
_FAST = 10_000  # a mapping of more plain values than these counts as a whole, not entry by entry
_TIED = 100  # elements of a set that nothing plain tells apart are described apart from the others, if so few
_SPELLED = ("datetime", "decimal", "fractions", "pathlib", "re", "uuid", "zoneinfo")  # modules whose values say it all
_TORCH_WORDS = (torch.dtype, torch.Size, torch.layout, torch.memory_format)
# What changes by itself, or is a place rather than a value.
_BY_TYPE = (torch.Generator, torch.device, random.Random, np.random.Generator, np.random.RandomState)
_BY_TYPE += (weakref.ref, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)  # type: ignore[assignment]
_BY_NAME = (logging.Logger, logging.LoggerAdapter, logging.Handler, logging.Manager)


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

    Attributes:
        meet: is called with each function, class and module of the user's among the values.
        slots: the values that attributes, entries of mappings and globals held.
    """

    def __init__(self, subject: Any, own: OwnParts):
        self.subject, self.own = subject, own
        self.meet: Callable[[Any], None] = lambda _thing: None
        self.slots: dict[Slot, Seen] = {}
        # Words with the value itself, so that its id stays its own.
        self._known: dict[int, tuple[Any, str, str]] = {}
        self._around: list[int] = []
        self._inside: list[dict[str, str]] = [{}]  # of the values around: words of what they hold, and shallow ones
        self._holders: set[int] = set()
        self._apart = False

    def slot(self, holder: Any, name: str, value: Any) -> str | None:
        """The word that a value counts as in what holds it under a name; None where it does not count."""
        value = as_written(value)
        word, slot = self.word(value), (id(holder), name)
        self._holders.add(id(holder))
        shallow = self._inside[-1].get(word, word)
        kind = f"{_type_name(value)} {getattr(value, 'dtype', '')}"
        number = counted(holder, name, word)
        self.slots[slot] = Seen(holder, kind, shallow, word, number)
        return number

    def is_composed(self, value: Any) -> bool:
        """Whether a value is a function that was made of another one."""
        return isinstance(value, partial | MethodType) or hasattr(value, "__wrapped__")

    def word(self, value: Any) -> str:
        """16 characters that tell a value from others; NumPy's numbers are what Python's are."""
        value = value.item() if isinstance(value, np.bool_ | np.integer | np.floating) else as_written(value)
        if isinstance(value, _PLAIN) and not isinstance(value, Enum):
            return _hashed(f"{type(value).__name__} {value!r}")
        if id(value) in self._known:
            _, word, shallow = self._known[id(value)]
            self._inside[-1][word] = shallow
            return word
        if id(value) in self._around:
            return f"around {len(self._around) - self._around.index(id(value))}"
        if len(self._around) > _DEEPEST or len(self._known) > _MOST:
            return f"beyond {_type_name(value)}"
        self._around.append(id(value))
        self._inside.append({})
        try:
            text = self._described(value)
        finally:
            self._around.pop()
            inside = self._inside.pop()
        word, shallow = _hashed(text), self._shallow(value, text, inside)
        self._known[id(value)] = (value, word, shallow)
        self._inside[-1][word] = shallow
        return word

    def _shallow(self, value: Any, text: str, inside: Mapping[str, str]) -> str:
        """A word for a value that does not change with what lies in slots of its own, or of what it holds."""
        if id(value) in self._holders and not isinstance(value, list | tuple | deque | set | frozenset):
            return f"at {id(value)}"
        for word, shallow in inside.items():
            if word != shallow:
                text = text.replace(word, shallow)
        return _hashed(text)

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
        if (spelled := _plainly(value)) is not None:
            return f"{_type_name(value)} {spelled}"
        if isinstance(value, Mapping) and not isinstance(value, _BY_TYPE):
            words = list(self._pairs(value)) if isinstance(value, OrderedDict) else sorted(self._pairs(value))
        elif isinstance(value, set | frozenset):
            words = sorted(self._elements(value))
        elif isinstance(value, list | tuple | deque):
            words = [self.word(item) for item in value]
        else:
            return None
        return f"{_type_name(value)} {words} {self._state(value)}"

    def _pairs(self, mapping: Mapping[Any, Any]) -> list[str]:
        self._holders.add(id(mapping))
        self.slots[id(mapping), ""] = Seen(mapping, "", "", "", None)  # an empty one was there as well
        keys = [(self.word(key), value) for key, value in list(mapping.items())]
        pairs = [(key, self.slot(mapping, key, value)) for key, value in keys]
        return [f"{key} {word}" for key, word in pairs if word is not None]

    def _elements(self, elements: Iterable[Any]) -> Iterator[str]:
        """Words for a set's elements, whatever the order: those alike in all that is plain are described apart."""
        alike: dict[str, list[Any]] = {}
        for element in elements:
            alike.setdefault(self._flat(element), []).append(element)
        for flat in sorted(alike):
            for element in alike[flat]:
                yield self.word(element) if len(alike[flat]) == 1 else self._described_apart(element, len(alike[flat]))

    def _described_apart(self, element: Any, count: int) -> str:
        """The word of an element that does not depend on what was described before it."""
        if not hasattr(element, "__dict__") or isinstance(element, type | FunctionType):
            return self.word(element)
        if self._apart or count > _TIED:
            return self._flat(element)
        other = Values(self.subject, self.own)
        other.meet, other.slots, other._apart = self.meet, self.slots, True
        return other.word(element)

    def _flat(self, element: Any) -> str:
        """A word for an object's class, and for its attributes that hold numbers, texts and tensors."""
        if is_plain(element):
            return repr(element)
        held = sorted(getattr(element, "__dict__", {}).items()) if not isinstance(element, type) else []
        flat = {name: value for name, value in held if is_plain(value) or isinstance(value, Tensor | np.ndarray)}
        return f"{_type_name(element)} {[(name, self.word(value)) for name, value in flat.items()]}"

    def _numbers(self, value: Any) -> str:
        """A tensor or array by its content; of the analysed model's, and of those spread over ranks, the shape."""
        like = f"{_type_name(value)} {value.dtype} {tuple(value.shape)}"
        if isinstance(value, Tensor):
            spread = hasattr(value, "full_tensor") or value.is_meta or _storage(value) in self.own.storages
            frozen = " frozen" if isinstance(value, nn.Parameter) and not value.requires_grad else ""
            return like if spread else f"{like}{frozen} {digest_once(value, _version(value), digest)}"
        if isinstance(value, np.ma.MaskedArray):
            like = f"{like} {digest(np.ma.getmaskarray(value))}"
        return f"{like} {self.word(value.tolist()) if value.dtype.hasobject else digest(value)}"

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
        if isinstance(value, _BY_TYPE) or id(value) in self.own.modules:
            return _type_name(value)
        if isinstance(value, _BY_NAME):
            return f"{_type_name(value)} {getattr(value, 'name', '')}"
        if hasattr(value, "__array_interface__") or hasattr(value, "__array__"):  # a PIL image, a frame of pandas'
            labels = [np.asarray(getattr(value, name, ())) for name in ("index", "columns") if name in dir(type(value))]
            return f"{_type_name(value)} {self.word([np.asarray(value), *labels])}"
        return f"{self.word(type(value))} {self._state(value)} {self._opaque(value)}"

    def _opaque(self, value: Any) -> str:  # noqa: PLR0911
        """What an object holds out of sight of Python's attributes: its bytes, or what pickle would keep of it."""
        try:
            return hashlib.sha256(memoryview(value)).hexdigest()
        except (TypeError, ValueError, BufferError):  # it has none, or they do not lie in a row
            pass
        if isinstance(value, memoryview):
            return hashlib.sha256(value.tobytes()).hexdigest()
        if isinstance(value, contextvars.ContextVar):
            return f"{value.name} {self.word(value.get(None))}"
        if isinstance(value, struct.Struct):
            return value.format
        if hasattr(value, "__dict__") or any("__slots__" in vars(base) for base in type(value).__mro__):
            return ""
        try:
            return self.word(pickled_state(value))
        except (TaskError, RecursionError):
            return ""

    def _state(self, value: Any) -> list[str]:
        """The attributes of an object, but caches."""
        held = attributes(value)
        names = [name for name in sorted(held, key=str) if not is_cached_property(value, name)]
        words = {name: self.slot(value, str(name), held[name]) for name in names}
        return [f"{name}={word}" for name, word in words.items() if word is not None]


def attributes(value: Any) -> dict[str, Any]:
    """An object's own attributes, also those in slots."""
    held = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                held[name] = getattr(value, name)
    return held


def is_plain(value: Any) -> bool:
    """Whether a value's `repr` says all of it."""
    return isinstance(value, _PLAIN) and not isinstance(value, Enum)


def definition_functions(defined: Any) -> list[FunctionType]:
    """The functions behind what a class defines: a method, also a static, cached or decorated one, or a property."""
    defined = as_written(defined)
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


def _plainly(value: Any) -> str | None:
    """A list or tuple of numbers and texts, or a larger mapping or set of them, spelled out; None for other values.

    Of a mapping or set, values may be lists and tuples of them.
    """
    kind = type(value)
    if kind in (list, tuple):
        return repr(value) if _SIMPLE.issuperset(map(type, value)) else None
    if kind in (set, frozenset):
        return repr(sorted(map(repr, value))) if _SIMPLE.issuperset(map(type, value)) else None
    if kind is not dict or len(value) <= _FAST or not _SIMPLE.issuperset(map(type, value)):
        return None
    held = [one for one in value.values() if type(one) not in _SIMPLE]
    if all(type(one) in (list, tuple) and _SIMPLE.issuperset(map(type, one)) for one in held):
        return repr(sorted([f"{key!r}: {one!r}" for key, one in value.items()]))
    return None


def _version(tensor: Tensor) -> Any:
    """What changes where a tensor's numbers may: how often they were written, and where they lie; None: unknown."""
    try:
        return tensor._version, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    except (NotImplementedError, RuntimeError):  # of inference, or without numbers in a row
        return None


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
