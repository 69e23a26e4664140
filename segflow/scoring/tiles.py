"""Tiles: groups dealt out to the ranks, and walked in batches that keep a group's examples together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import GroupError
from ..groups.groups import Groups
from ..runtime.ranks import balanced

_PADDING = 1.5  # a batch's largest piece times its pieces may exceed its examples by this factor


class GroupBatch(NamedTuple):
    """Examples of consecutive pieces of a tile, piece after piece.

    examples: their indices; sizes: how many belong to each piece; first: the first piece's place in the tile.
    """

    examples: np.ndarray
    sizes: tuple[int, ...]
    first: int


class Tile(NamedTuple):
    """Pieces whose summed gradients are held at once: each one's group, and the batches that walk their examples."""

    groups: np.ndarray
    batches: tuple[GroupBatch, ...]


class Piece(NamedTuple):
    """Examples of one group that one rank sums: the whole group, or a share of a large one."""

    group: int
    members: np.ndarray


def shares(groups: Groups, count: int, whole: bool = False) -> list[list[Piece]]:
    """The pieces of each of `count` ranks, balanced by their sizes.

    A group larger than a quarter of a rank's fair share is cut into even pieces, whose scores add up. A single rank
    gets whole groups, and every rank does if `whole`.
    """
    cuts = count > 1 and not whole
    limit = max(1, int(groups.sizes.sum()) // (4 * count)) if cuts else groups.length
    pieces = [
        Piece(group, examples)
        for group, members in enumerate(groups.members)
        for examples in ([members] if len(members) <= limit else np.array_split(members, -(-len(members) // limit)))
    ]
    owners = balanced([len(piece.members) for piece in pieces], count)
    dealt: list[list[Piece]] = [[] for _ in range(count)]
    for piece, owner in zip(pieces, owners, strict=True):
        dealt[owner].append(piece)
    return dealt


def tiles(pieces: Sequence[Piece], batch_size: int, tile_size: int) -> list[Tile]:
    """All pieces in tiles of at most `tile_size`, largest first, so that those of one batch are of nearly one size.

    A piece of up to `batch_size` examples stays in one batch; a larger one is split evenly over several batches, which
    it has to itself. Raises GroupError for sizes below 1.
    """
    if batch_size < 1 or tile_size < 1:
        raise GroupError(f"batch_size={batch_size}, tile_size={tile_size}: expected at least 1.")
    order = sorted(pieces, key=lambda piece: -len(piece.members))
    return [_tile(order[start : start + tile_size], batch_size) for start in range(0, len(order), tile_size)]


def _tile(pieces: Sequence[Piece], batch_size: int) -> Tile:
    batches: list[GroupBatch] = []
    waiting: list[np.ndarray] = []  # whole pieces that will share a batch
    first = 0

    def flush() -> None:
        nonlocal first
        if waiting:
            batches.append(GroupBatch(np.concatenate(waiting), tuple(map(len, waiting)), first))
        first += len(waiting)
        waiting.clear()

    for place, (_, members) in enumerate(pieces):
        size = sum(map(len, waiting)) + len(members)
        too_uneven = waiting and len(waiting[0]) * (len(waiting) + 1) > _PADDING * size
        if size > batch_size or too_uneven:
            flush()
        if len(members) > batch_size:
            even = np.array_split(members, -(-len(members) // batch_size))
            batches += [GroupBatch(examples, (len(examples),), place) for examples in even]
            first = place + 1
        else:
            waiting.append(members)
    flush()
    return Tile(np.array([piece.group for piece in pieces]), tuple(batches))
