"""Groups are dealt out, and their batches keep them together."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import segflow as sf
from segflow.scoring.tiles import shares, tiles


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.just(1), st.integers(1, 6), st.integers(1, 60)), min_size=1, max_size=40),
    batch_size=st.integers(1, 40),
    tile_size=st.integers(1, 45),
    left_out=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_tiles_walk_every_group_once_within_the_batch_size_and_the_padding(
    sizes: list[int], batch_size: int, tile_size: int, left_out: int, seed: int
) -> None:
    length = sum(sizes) + left_out
    shuffled = np.random.default_rng(seed).permutation(length)[: sum(sizes)]
    members = np.split(shuffled, np.cumsum(sizes)[:-1])
    groups = sf.Groups.from_lists(members, length, partial=True)
    planned = tiles(shares(groups, 1)[0], batch_size, tile_size)
    assert sorted(np.concatenate([tile.groups for tile in planned]).tolist()) == list(range(len(sizes)))
    for tile in planned:
        assert 1 <= len(tile.groups) <= tile_size
        walked: dict[int, list[np.ndarray]] = {}
        for batch in tile.batches:
            assert len(batch.examples) == sum(batch.sizes) <= batch_size
            assert max(batch.sizes) * len(batch.sizes) <= 1.5 * len(batch.examples)
            for offset, piece in enumerate(np.split(batch.examples, np.cumsum(batch.sizes)[:-1])):
                walked.setdefault(int(tile.groups[batch.first + offset]), []).append(piece)
        assert set(walked) == set(tile.groups.tolist())
        for group, pieces in walked.items():
            assert np.concatenate(pieces).tolist() == members[group].tolist()
            assert len(pieces) == -(-sizes[group] // batch_size), "kept together, or in as few pieces as can be"
            assert max(map(len, pieces)) - min(map(len, pieces)) <= 1, "split evenly"


def test_small_groups_share_batches() -> None:
    [tile] = tiles(shares(sf.Groups.random(60, 3), 1)[0], batch_size=32, tile_size=100)
    assert [len(batch.examples) for batch in tile.batches] == [30, 30]
