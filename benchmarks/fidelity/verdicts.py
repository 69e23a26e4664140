"""Is the reference ahead of others, level with them or behind, row by row? From the paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..result_files import shown_estimate
from .blocks import KINDS, Block
from .methods import BEST, EKFAC, TRACIN

OTHERS = (BEST, EKFAC, TRACIN)


@dataclass(frozen=True)
class Verdict:
    """By how much the reference's linear datamodeling score exceeds another's, and the 95% interval of that."""

    mean: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """Whether it is ahead or behind, where the interval excludes 0, or level, where it holds 0."""
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "level"

    def __str__(self) -> str:
        return f"{self.word}, {shown_estimate({'mean': self.mean, 'low': self.low, 'high': self.high}, '+')}"


def verdict(block: Block, other: str, kind: str) -> Verdict | None:
    """Of the reference against another method, for "one" run or "all"; None where no paired interval is known."""
    found = block.methods.get(other, {}).get(f"over_{kind}")
    if not found or found["low"] is None or found["high"] is None:
        return None
    return Verdict(*(0.0 - found[end] for end in ("mean", "high", "low")))


def verdict_table(blocks: Sequence[Block]) -> Iterator[str]:
    """Blocks down; the others across, for one run and for all."""
    heads = [f"{other}, {'one run' if kind == 'one' else 'all runs'}" for other in OTHERS for kind in KINDS]
    yield f"| | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    for block in blocks:
        cells = [verdict(block, other, kind) for other in OTHERS for kind in KINDS]
        yield f"| {block.title} | {' | '.join(str(cell or '') for cell in cells)} |"
