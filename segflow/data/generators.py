"""Generators of random numbers that reading a dataset may draw from: global ones, and those that it holds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

_OBJECTS = 2000  # that are looked through for generators
_LEAVES = (str, bytes, bytearray, int, float, complex, bool, type(None), torch.Tensor, np.ndarray, type)
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
        self._python = [random._inst, *(g for g in own if isinstance(g, random.Random))]  # type: ignore[attr-defined]
        legacy = np.random.mtrand._rand  # type: ignore[attr-defined]
        self._numpy = [legacy, *(g for g in own if isinstance(g, np.random.RandomState))]
        self._bits = [g.bit_generator for g in own if isinstance(g, np.random.Generator)]
        self._torch = [torch.default_generator, *(g for g in own if isinstance(g, torch.Generator))]

    def seed(self, number: int) -> None:
        """Have each of them begin anew at a number in [0, 2^32)."""
        for of_python in self._python:
            of_python.seed(number)
        for of_numpy in self._numpy:
            of_numpy.seed(number)
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
    """What an object holds: entries, attributes, and of functions their closures, defaults and object."""
    if isinstance(subject, Mapping):
        return list(subject.values())[:_OBJECTS]
    if isinstance(subject, list | tuple | set | frozenset):
        return list(subject)[:_OBJECTS]
    if isinstance(subject, FunctionType):
        cells = [cell.cell_contents for cell in subject.__closure__ or () if cell != CellType()]
        return [*cells, subject.__defaults__, subject.__kwdefaults__]
    if isinstance(subject, MethodType | BuiltinMethodType):
        return [subject.__self__]
    if isinstance(subject, partial):
        return [subject.func, subject.args, subject.keywords]
    return [] if isinstance(subject, ModuleType) else [*getattr(subject, "__dict__", {}).values()]
