"""The global random generators: seeded for a job and restored after it, and watched where nothing may be drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ...data.draws import seeded
from ...data.generators import Generators


@contextmanager
def all_seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators of torch, NumPy and Python begin at a seed; afterwards they are as before.

    NumPy takes 32 bits of a seed, so it gets `seed % 2**32`.
    """
    generators = Generators()
    states = generators.states()
    with seeded(seed):
        generators.seed(seed)
        try:
            yield
        finally:
            generators.restore(states)


@contextmanager
def nothing_drawn(refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Raises the refusal of a generator's name if it is another when the block ends than when it began."""
    before = _states()
    yield
    after = _states()
    for name, state in before.items():
        if after[name] != state:
            raise refusal(name)


def _states() -> dict[str, object]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    states: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "NumPy": (kind, np.asarray(keys).tobytes(), *rest),
        "Python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        states["CUDA"] = torch.cuda.get_rng_state().cpu().numpy().tobytes()
    return states
