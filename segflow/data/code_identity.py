"""What a task, a measurement, an output function or a property is: what its functions reach, entry by entry.

A function reaches its code (not lines, comments or the names of local variables), its defaults and closure, the globals
that it names, the methods and attributes of its object that it names, and what these reach in turn. Code of installed
packages, of the standard library and of segflow counts by its name. The analysed model's own parameters do not count,
for they are another checkpoint's each time, nor does what running the functions is seen to change (see changing.py):
there, and where code cannot be read, values of probes decide (see stage/unit_identity.py).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from functools import partial
from importlib.util import resolve_name
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

from torch import nn

from .as_written import COMPILED, as_written, hides_method
from .changing import Reached, remembered
from .code_reading import Reading, read_code
from .fingerprints import digest
from .value_identity import (
    OwnParts,
    Values,
    definition_functions,
    is_cached_property,
    is_library_class,
    is_library_function,
    is_library_module,
    is_plain,
    own_parts,
)

_TRAINING = ("compute_train_loss", "get_attention_mask")
_STARTING = ("__init__", "__new__", "__post_init__", "__setstate__")  # what they set is no change by running
_ABOUT_CLASSES = {"__module__", "__doc__", "__dict__", "__weakref__", "__qualname__", "__annotations__", "__slots__"}
_ABOUT_CLASSES |= {"__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__", "__match_args__"}
_ABOUT_CLASSES |= {
    "__slotnames__",
    "__dataclass_fields__",
    "__dataclass_params__",
    "__parameters__",
    "__orig_bases__",
    "__repr__",
}
_LONGEST = 60  # of a plain value that an identity spells out


def task_fingerprint(task: Any, model: nn.Module | None = None) -> Reached:
    """What tells apart the factors fitted for a task: its class, and what its training loss reaches.

    Attributes that only the measurement depends on, by the task's `measurement_options`, do not count.
    """
    ignored = getattr(task, "measurement_options", ())
    return _remembered(task, _TRAINING, model, ignored, {"class": type(task).__qualname__})


def measurement_fingerprint(task: Any, model: nn.Module | None = None) -> Reached:
    """What tells apart scores of a task: what its measurement reaches."""
    return reached(task, ("compute_measurement",), model)


def output_fingerprint(task: Any, model: nn.Module | None = None) -> Reached:
    """What tells apart kernels of a task's output function: what that function reaches."""
    return reached(task, ("compute_output",), model)


def collate_fingerprint(collate_fn: Any) -> Reached:
    """What tells apart what a function makes of a list of examples; collate_fn: None for torch's own."""
    return reached(collate_fn, ("__call__",))


def plain_options(subject: Any) -> dict[str, str]:
    """The `repr` of each attribute of an object that holds a number, a text, None, or a list or tuple."""
    return {
        key: repr(value)
        for key, value in sorted(getattr(subject, "__dict__", {}).items())
        if is_plain(value) or isinstance(value, list | tuple)
    }


def reached(
    subject: Any, methods: Collection[str], model: nn.Module | None = None, ignored: Collection[str] = ()
) -> Reached:
    """A word or digest for each thing that some methods of an object (or a function) reach, the same in every process.

    model: the analysed one, whose parameters do not count; ignored: attributes of the object that do not either.
    """
    return _remembered(subject, methods, model, ignored, {})


def _remembered(
    subject: Any, methods: Collection[str], model: nn.Module | None, ignored: Collection[str], more: Mapping[str, str]
) -> Reached:
    read = partial(read_now, subject, methods, own_parts(model), ignored, more)
    return remembered(subject, (tuple(methods), tuple(ignored), id(model)), read)


def read_now(
    subject: Any,
    methods: Collection[str],
    own: OwnParts,
    ignored: Collection[str] = (),
    more: Mapping[str, str] = MappingProxyType({}),
) -> Reached:
    """What some methods of an object reach as it is now; own: parts of the analysed model; more: entries besides."""
    walk = _Walk(subject, ignored, Values(subject, own))
    walk.run(methods)
    found = Reached({**more, **dict(sorted(walk.joined().items()))})
    found.slots = walk.values.slots
    return found


class _Walk:
    """One walk from an object's methods over all that they reach; each attribute's name is looked up on the object."""

    def __init__(self, subject: Any, ignored: Collection[str], values: Values):
        self.subject, self.ignored, self.values = subject, set(ignored), values
        values.meet = self._meet
        self.entries: dict[str, set[str]] = {}
        self.names: dict[str, bool] = {}  # attributes' names: whether they were looked up
        self.modules: list[ModuleType] = []
        self._met: dict[int, Any] = {}
        self._every_base = False

    def run(self, methods: Collection[str]) -> None:
        """Follow some methods, and all that is named on the way."""
        if isinstance(self.subject, FunctionType):
            self._function(self.subject)
        elif self.values.is_composed(self.subject):  # a partial, a bound method
            self._put("function", self.values.word(self.subject))
        self._name(methods)
        while waiting := [name for name, done in self.names.items() if not done]:
            for name in waiting:
                self.names[name] = True
                self._attribute(name)
                for module in self.modules:
                    self._global(name, vars(module))

    def joined(self) -> dict[str, str]:
        """The entries; of several things of one name, one digest."""
        return {
            key: next(iter(words)) if len(words) == 1 else digest(sorted(words))[:16]
            for key, words in self.entries.items()
        }

    def _put(self, key: str, word: str) -> None:
        self.entries.setdefault(key, set()).add(word)

    def _name(self, names: Collection[str]) -> None:
        for name in sorted(names):
            self.names.setdefault(name, False)

    def _attribute(self, name: str) -> None:
        """Follow what the object, and each class that it is of, has under a name."""
        if name == "__dict__":
            self._everything()
        for base in type(self.subject).__mro__:
            if name in vars(base) and name not in self.ignored and not isinstance(self.subject, FunctionType):
                self._definition(base, name, vars(base)[name])
                if not self._every_base:
                    break
        self._own(name)

    def _own(self, name: str) -> None:
        """The object's own attribute of a name, if it has one that counts."""
        own = {} if isinstance(self.subject, FunctionType) else getattr(self.subject, "__dict__", {})
        told_apart = name in self.ignored or name in COMPILED or is_cached_property(self.subject, name)
        if name in own and not told_apart and hides_method(self.subject, name):
            self._value(f"self.{name}", self.subject, name, own[name])

    def _everything(self, methods: bool = False) -> None:
        """Take all that the object has, for it is handed on as a whole; methods: also those that its classes define."""
        self._name(getattr(self.subject, "__dict__", {}))
        for base in type(self.subject).__mro__:
            if not is_library_class(base):
                own = {
                    name
                    for name, value in vars(base).items()
                    if methods or not callable(value) or name.startswith("__")
                }
                self._name(own - _ABOUT_CLASSES - set(_STARTING))

    def _all_bases(self) -> None:
        """Look up all names in every base class, for methods that are overridden are called as well."""
        if not self._every_base:
            self._every_base = True
            self.names = dict.fromkeys(self.names, False)

    def _definition(self, base: type, name: str, defined: Any) -> None:
        """What a class of the object defines: a method, a property, or a value."""
        functions = definition_functions(defined)
        for function in functions:
            if is_library_function(function):  # what segflow's or a package's method calls on the object
                reading = read_code(function.__code__)
                self._name(reading.names)
                if "super" in reading.globals:
                    self._all_bases()
            else:
                reading = self._function(function)
            if reading.hands_on and not isinstance(defined, staticmethod):
                self._everything(methods=reading.computes_names)
        hidden = name in _ABOUT_CLASSES or name in getattr(self.subject, "__dict__", {})
        if not functions and not hidden and not is_library_class(base):
            self._value(f"self.{name}", base, name, defined)

    def _value(self, key: str, holder: Any, name: str, value: Any) -> None:
        """An entry for what stands in a holder under a name."""
        word = None if value is self.subject else self.values.slot(holder, name, value)
        if word is not None:
            spelled = repr(value) if is_plain(value) and word == self.values.word(value) else ""
            self._put(key, spelled if 0 < len(spelled) <= _LONGEST else word)

    def _meet(self, thing: Any) -> None:
        """Follow a function or class of the user's that stands in a value."""
        if isinstance(thing, FunctionType):
            self._function(thing)
        elif isinstance(thing, ModuleType):
            self._module(thing)
        else:
            self._class(thing)

    def _class(self, met: type) -> None:
        """All that a class of the user's defines; of a base of the object, only what is named."""
        if met in type(self.subject).__mro__:
            self._all_bases()
            return
        if id(met) in self._met:
            return
        self._met[id(met)] = met
        for base in [one for one in met.__mro__ if not is_library_class(one)]:
            for name, value in vars(base).items():
                functions = [] if name in _ABOUT_CLASSES else definition_functions(value)
                for function in functions:
                    self.values.word(function)
                if not functions and name not in _ABOUT_CLASSES:
                    self._value(f"{base.__name__}.{name}", base, name, value)

    def _module(self, module: ModuleType) -> None:
        """Look up the names in a module of the user's as well."""
        if not is_library_module(module) and module not in self.modules:
            self.modules.append(module)
            for name in [name for name, done in self.names.items() if done]:
                self._global(name, vars(module))

    def _function(self, function: FunctionType) -> Reading:
        """A function of the user's: its code, defaults, closure, and the globals that it names."""
        reading, name = read_code(function.__code__), function.__name__
        if id(function) in self._met:
            return reading
        self._met[id(function)] = function
        self._put(f"{name}()", reading.digest)
        if function.__defaults__ or function.__kwdefaults__:
            defaults = (function.__defaults__, function.__kwdefaults__)
            self._value(f"{name}() defaults", function, "defaults", defaults)
        for cell_name, content in closure_of(function).items():
            self._value(f"{name}() {cell_name}", function, f"cell {cell_name}", content)
        for key, value in vars(function).items():
            self._value(f"{name}() attribute {key}", function, key, value)
        self._name(reading.names)
        if "super" in reading.globals:
            self._all_bases()
        for global_name in sorted(reading.globals):
            self._global(global_name, function.__globals__)
        self._import(reading, function.__globals__)
        return reading

    def _global(self, name: str, where: Mapping[str, Any]) -> None:
        """What a module of the user's has under a name."""
        value = as_written(where.get(name, where))
        if value is where or value is self.subject:
            return
        if isinstance(value, FunctionType) and not is_library_function(value):
            self._function(value)
        elif isinstance(value, ModuleType):
            self._module(value)
        else:
            self._value(name, where, name, value)

    def _import(self, reading: Reading, where: Mapping[str, Any]) -> None:
        """Follow the modules that a function imports when it runs."""
        for module, level in sorted(reading.imports):
            package = where.get("__package__") or ""
            full = resolve_name("." * level + module, package) if level and package else module
            for name in (full, full.partition(".")[0]):
                if name in sys.modules:
                    self._module(sys.modules[name])


def closure_of(function: FunctionType) -> dict[str, Any]:
    """The values of a function's closure by name."""
    contents = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__":
            try:
                contents[name] = cell.cell_contents
            except ValueError:  # not assigned yet
                contents[name] = None
    return contents
