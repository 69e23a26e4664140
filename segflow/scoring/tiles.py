"""Tiling: groups dealt out to the ranks, and walked in batches that keep a group together."""

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
    """Examples of one group that stay together: the whole group, or a part of one that is large."""

    group: int
    members: np.ndarray


def shares(groups: Groups, count: int, whole: bool = False) -> list[list[Piece]]:
    """Deal groups out to `count` ranks, balanced by their sizes.

    A group larger than a quarter of a rank's fair share is cut into even pieces, whose scores add up; one rank gets
    whole groups, as do all if `whole`.
    """
    cuts = count > 1 and not whole
    limit = max(1, int(groups.sizes.sum()) // (4 * count)) if cuts else groups.length
    pieces = [
        Piece(group, part)
        for group, members in enumerate(groups.members)
        for part in ([members] if len(members) <= limit else np.array_split(members, -(-len(members) // limit)))
    ]
    owners = balanced([len(piece.members) for piece in pieces], count)
    dealt: list[list[Piece]] = [[] for _ in range(count)]
    for piece, owner in zip(pieces, owners, strict=True):
        dealt[owner].append(piece)
    return dealt


def tiles(pieces: Sequence[Piece], batch_size: int, tile_size: int) -> list[Tile]:
    """Plan the walk over all pieces: largest first, so that those of one batch are of nearly one size.

    A piece of up to `batch_size` examples stays in one batch; a larger one is split evenly, each part a batch of its
    own.
    """
    if batch_size < 1 or tile_size < 1:
        raise GroupError(f"batch_size={batch_size}, tile_size={tile_size}: expected at least 1.")
    order = sorted(pieces, key=lambda piece: -len(piece.members))
    return [_tile(order[start : start + tile_size], batch_size) for start in range(0, len(order), tile_size)]


def _tile(chosen: Sequence[Piece], batch_size: int) -> Tile:
    walked: list[GroupBatch] = []
    waiting: list[np.ndarray] = []  # whole groups that will share a batch
    first = 0

    def flush() -> None:
        nonlocal first
        if waiting:
            walked.append(GroupBatch(np.concatenate(waiting), tuple(map(len, waiting)), first))
        first += len(waiting)
        waiting.clear()

    for place, (_, member) in enumerate(chosen):
        held = sum(map(len, waiting))
        blow_up = waiting and len(waiting[0]) * (len(waiting) + 1) > _PADDING * (held + len(member))
        if held + len(member) > batch_size or blow_up:
            flush()
        if len(member) > batch_size:
            pieces = np.array_split(member, -(-len(member) // batch_size))
            walked += [GroupBatch(piece, (len(piece),), place) for piece in pieces]
            first = place + 1
        else:
            waiting.append(member)
    flush()
    return Tile(np.array([piece.group for piece in chosen]), tuple(walked))
