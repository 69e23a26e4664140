"""Up to which widths a block's curvature is dense: fixed sizes, never what memory happens to be free."""

from __future__ import annotations

from dataclasses import dataclass

from ...arguments import settle, whole_number
from ...errors import LayerError


@dataclass(frozen=True)
class BlockSizes:
    """The widest curvature that is kept dense; what is wider is diagonal, with memory and time linear in its width.

    Args:
        vector: numbers of a bias, a norm's weight, a bare parameter: of what has a block of its own that is no matrix.
        side: inputs, or outputs, of a matrix, such as the outputs of a language model's head.

    Raises:
        LayerError: a size is no whole number from 0.

    Example:
        >>> BlockSizes(side=4096)
        BlockSizes(vector=1024, side=4096)
    """

    vector: int = 1024
    side: int = 8192

    def __post_init__(self) -> None:
        for name in ("vector", "side"):
            advice = "It counts a block's numbers; 0 keeps none dense."
            settle(self, **{name: whole_number(f"BlockSizes: {name}", getattr(self, name), LayerError, advice=advice)})
