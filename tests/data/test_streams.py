"""Streams of random numbers: independent of each other, and of the generators that users draw from."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import segflow as sf
from segflow.data.streams import stream, stream_seed
from segflow.evaluation import random_subsets

N = 400


@pytest.mark.parametrize("seed", range(4))
def test_streams_differ_from_each_other_and_from_users_own_generators(seed: int) -> None:
    orders = {f"default_rng({other})": np.random.default_rng(other).permutation(N) for other in range(5)}
    orders |= {f"default_rng([{seed}, {k}])": np.random.default_rng([seed, k]).permutation(N) for k in range(3)}
    orders |= {str(names): stream(seed, *names).permutation(N) for names in [("a",), ("b",), ("a", 0), ("a", 1)]}
    orders["random groups"] = np.concatenate(sf.Groups.random(N, 1, seed).members)
    orders["random subsets"] = np.argsort(~random_subsets(1, N, 0.5, seed)[0], kind="stable")
    for (one, first), (other, second) in combinations(orders.items(), 2):
        if {one, other} != {f"default_rng({seed})", f"default_rng([{seed}, 0])"}:  # which numpy takes for one
            shared = len(np.intersect1d(first[:40], second[:40]))
            assert shared <= 12, f"{one} and {other} share {shared} of their first 40; 4 are expected"


def test_a_seed_of_a_stream_belongs_to_its_seed_and_names() -> None:
    seeds = [stream_seed(seed, name, number) for seed in range(10) for name in "ab" for number in range(50)]
    assert len(set(seeds)) == 1000
    assert 0 <= min(seeds) < max(seeds) < 2**31
    assert stream_seed(3, "a", 1) == stream_seed(3, "a", 1)


def test_the_library_draws_from_streams_only() -> None:
    for path in Path(sf.__file__).parent.rglob("*.py"):
        code = re.sub(r'"""(.*?)"""', "", path.read_text(), flags=re.DOTALL)
        assert "default_rng(" not in code or path.name == "streams.py", path
