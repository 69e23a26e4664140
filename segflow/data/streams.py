"""Streams of random numbers: each use of a seed has a name of its own, so that no two uses draw the same numbers.

`numpy.random.default_rng([seed, 0])` is `default_rng(seed)`, the generator that users draw with as well: what was
drawn from it would be the "random" wrong labels of a user's data once more.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A generator that is independent of those of other names or seeds, and of `default_rng(seed)`.

    names: what the numbers are for, and which of several they are, such as ("random order", 3).

    Example:
        >>> a, b = stream(0, "random order", 0), stream(0, "random order", 1)
        >>> a.permutation(5), b.permutation(5), stream(0, "random order", 0).permutation(5)
        (array([1, 3, 2, 4, 0]), array([3, 1, 0, 4, 2]), array([1, 3, 2, 4, 0]))
    """
    return np.random.default_rng(_sequence(seed, names))


def stream_seed(seed: int, *names: str | int) -> int:
    """A seed below 2**31, which every library takes, that belongs to a name as a stream does."""
    return int(_sequence(seed, names).generate_state(1)[0]) >> 1


def _sequence(seed: int, names: tuple[str | int, ...]) -> np.random.SeedSequence:
    """The names are a spawn key, which numpy keeps apart from every seed that is given without one."""
    words = np.frombuffer(hashlib.sha256(repr(names).encode()).digest(), dtype="<u4")
    return np.random.SeedSequence(seed, spawn_key=tuple(words.tolist()))
