"""Seeds of retrainings: one for each subset and repetition, whatever else is trained.

Axis letters: M subsets, K examples or groups, R repetitions.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from ...data.fingerprints import digest
from ...data.streams import stream_seed


def training_seeds(subsets: np.ndarray, repetitions: int, seed: int) -> np.ndarray:
    """[M, R] seeds below 2**31, those of every (seed, subset, repetition) independent of all others.

    A subset counts by what it keeps, so that it has the same seeds among any others; one that comes several times
    among the subsets [M, K] has other seeds each time.
    """
    times: Counter[str] = Counter()
    seeds_MR = np.empty((len(subsets), repetitions), dtype=np.int64)
    for subset, row_K in enumerate(subsets):
        kept = digest(row_K)
        for repetition in range(repetitions):
            seeds_MR[subset, repetition] = stream_seed(seed, "training", kept, times[kept], repetition)
        times[kept] += 1
    return seeds_MR
