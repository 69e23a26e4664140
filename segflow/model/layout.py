"""How the layers see a batch: on which axis of a call's input its examples are counted, found by running copies.

Axes: B examples, R rows (examples, or several of each).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CallLayout(NamedTuple):
    """Where a tensor counts the examples of a batch.

    axis: None for a tensor that all examples share, as position indices of shape [1, S]; folded: whether every example
    has several rows in a row on it, as where frames of clips are flattened into one axis; unit: whether the first axis
    of a shared tensor has length one in the place of the examples.
    """

    axis: int | None
    folded: bool = False
    unit: bool = False

    @property
    def plain(self) -> bool:
        """Whether each example has a row of its own, so that nothing has to be verified."""
        return self.axis is not None and not self.folded


ALL_ROWS = CallLayout(0, folded=True)  # of a batch of one: whatever there is belongs to the example


class FunctionLayout(NamedTuple):
    """Of all tensors among a module's arguments, and among what it returns (None for what is no tensor)."""

    inputs: tuple[CallLayout | None, ...]
    outputs: tuple[CallLayout | None, ...]


class Layout(NamedTuple):
    """How the layers see a batch.

    Args:
        calls: of each use of a layer by its name; functions: of each module that is differentiated as a whole, by its
            first block's name.
        shapes: of the first reached use's input for two examples, by the block's name.
        reached: the blocks that the loss reaches.
        alone: the blocks whose examples cannot be told apart in a batch, and so are run one by one, and whether their
            "tokens" or their "gradient" are taken there.
        times: how often a forward calls each block, over all of its uses.
        coarse: True if some layer computes in 16 bits.
    """

    calls: dict[str, CallLayout]
    functions: dict[str, FunctionLayout]
    shapes: dict[str, torch.Size]
    reached: tuple[str, ...]
    alone: dict[str, str]
    times: dict[str, int]
    coarse: bool


def call_layout(two: Sequence[int], three: Sequence[int]) -> CallLayout | None:
    """The layout of a tensor of these shapes for two and for three examples; None where there is none.

    Example:
        >>> call_layout((2, 7, 5), (3, 7, 5)), call_layout((14, 5), (21, 5))
        (CallLayout(axis=0, folded=False, unit=False), CallLayout(axis=0, folded=True, unit=False))
        >>> call_layout((1, 7, 5), (1, 7, 5))
        CallLayout(axis=None, folded=False, unit=True)
    """
    if len(two) != len(three):
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if not differing:
        return CallLayout(None, unit=len(two) > 2 and two[0] == 1)
    axis = differing[0]
    if len(differing) > 1 or 3 * two[axis] != 2 * three[axis]:
        return None
    if two[axis] == 2:
        return CallLayout(axis)
    return CallLayout(0, folded=True) if axis == 0 else None


def rows_first(tensor: Tensor, layout: CallLayout, examples: int) -> Tensor:
    """The tensor with its rows on the first axis; one that is shared has a row for each example."""
    if layout.axis is None:
        return shared(tensor, layout, examples)
    return tensor.movedim(layout.axis, 0)


def shared(tensor: Tensor, layout: CallLayout, examples: int) -> Tensor:
    """A row for every example of a tensor that they share; a first axis of length one may stand for them."""
    row = tensor[0] if layout.unit and tensor.shape[0] == 1 else tensor
    return row.expand(examples, *row.shape)


def spread(tensor: Tensor, layout: CallLayout, examples: int) -> Tensor:
    """A copy for every example of a tensor that they share, so that each has a gradient of its own."""
    return shared(tensor, layout, examples).clone()
