"""Generators of random numbers that reading a dataset may draw from: global ones, and those that it holds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from .value_identity import attributes, is_library_class

_OBJECTS = 5000  # that are looked through for generators
_LONGEST = 64  # entries of one container: data has more, transforms have fewer
_LEAVES = (str, bytes, bytearray, int, float, complex, bool, type(None), torch.Tensor, np.ndarray)
Generator = random.Random | np.random.RandomState | np.random.Generator | torch.Generator


class States(NamedTuple):
    """Where generators stand: torch's, and all others."""

    of_torch: list[Any]
    others: list[Any]


class Generators:
    """The global generators of Python, NumPy and torch, and those that some objects hold, as transforms may.

    Args:
        roots: objects whose attributes, entries and closures are looked through.
    """

    def __init__(self, *roots: Any):
        own = list(_held(roots))
        seedable = (g for g in own if isinstance(g, random.Random) and not isinstance(g, random.SystemRandom))
        self._python = [random._inst, *seedable]  # type: ignore[attr-defined]
        legacy, states = np.random.mtrand._rand, [g for g in own if isinstance(g, np.random.RandomState)]  # type: ignore[attr-defined]
        self._numpy = [legacy, *(g for g in states if isinstance(g._bit_generator, np.random.MT19937))]
        self._bits = [g.bit_generator for g in own if isinstance(g, np.random.Generator)]
        self._bits += [g._bit_generator for g in states if g not in self._numpy]
        self._torch = [torch.default_generator, *(g for g in own if isinstance(g, torch.Generator))]

    def seed(self, number: int) -> None:
        """Have each of them begin anew at a number, of which NumPy's older ones take 32 bits."""
        for of_python in self._python:
            of_python.seed(number)
        for of_numpy in self._numpy:
            of_numpy.seed(number % 2**32)
        for bits in self._bits:
            bits.state = type(bits)(number).state
        for of_torch in self._torch:
            of_torch.manual_seed(number)

    def states(self) -> States:
        """Where they stand."""
        of_numpy = [g.get_state(legacy=True) for g in self._numpy]
        others = [*(g.getstate() for g in self._python), *of_numpy, *(bits.state for bits in self._bits)]
        return States([g.get_state() for g in self._torch], others)

    def restore(self, states: States) -> None:
        """Put them back to where they stood."""
        of_torch, others = states
        for generator, state in zip(self._torch, of_torch, strict=True):
            generator.set_state(state)
        rest = iter(others)
        for of_python in self._python:
            of_python.setstate(next(rest))
        for of_numpy in self._numpy:
            of_numpy.set_state(next(rest))
        for bits in self._bits:
            bits.state = next(rest)


def moved(before: Any, after: Any) -> bool:
    """Whether two states of generators, or several in lists, differ."""
    if isinstance(before, torch.Tensor):
        return not torch.equal(before, after)
    if isinstance(before, np.ndarray):
        return not np.array_equal(before, after)
    if isinstance(before, dict):
        return any(moved(before[key], after[key]) for key in before)
    if isinstance(before, list | tuple) and not _is_numbers(before):
        return any(moved(*pair) for pair in zip(before, after, strict=True))
    return bool(before != after)


def _is_numbers(state: Any) -> bool:
    """Whether this is the long tuple of Python's generator, which is compared at once."""
    return len(state) > 100 and isinstance(state[0], int)


def _held(roots: tuple[Any, ...]) -> Iterator[Generator]:
    """The generators within some objects; those reached last are left out where there are very many objects."""
    seen: set[int] = set()
    waiting = list(roots)
    while waiting and len(seen) < _OBJECTS:
        subject = waiting.pop(0)
        if isinstance(subject, _LEAVES) or id(subject) in seen:
            continue
        seen.add(id(subject))
        if isinstance(subject, Generator):
            yield subject
            continue
        waiting += _parts(subject)


def _parts(subject: Any) -> list[Any]:
    """What an object holds: entries, attributes, its class; of functions what they reach."""
    if isinstance(subject, Mapping | list | tuple | set | frozenset):
        entries = subject.values() if isinstance(subject, Mapping) else subject
        return list(islice(entries, _LONGEST))
    if isinstance(subject, FunctionType):
        cells = [cell.cell_contents for cell in subject.__closure__ or () if cell != CellType()]
        named = [subject.__globals__.get(name) for name in subject.__code__.co_names]
        return [*cells, *named, subject.__defaults__, subject.__kwdefaults__]
    if isinstance(subject, MethodType | BuiltinMethodType):
        return [subject.__self__, getattr(subject, "__func__", None)]
    if isinstance(subject, partial):
        return [subject.func, subject.args, subject.keywords]
    if isinstance(subject, type | ModuleType):
        counts = isinstance(subject, type) and not is_library_class(subject)
        return [*vars(subject).values(), *subject.__bases__] if counts else []
    return [*attributes(subject).values(), type(subject)]
