"""The report of a check that found nothing wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .curvature_scale import CurvatureScale


@dataclass(frozen=True, repr=False)
class CheckReport:
    """What `Analyzer.check` found to be in order; printing it says what is attributed, and what is not, and why.

    Args:
        attributed, parameters: how many of the model's parameters are attributed, and how many there are.
        skipped: the reason for each module that is not attributed, by its name.
        curvature: how far the curvature of `sample=True` is off.
        earlier: the reports of earlier stages of training, by the stage's name.
    """

    attributed: int
    parameters: int
    skipped: Mapping[str, str]
    curvature: CurvatureScale
    earlier: Mapping[str, CheckReport] = field(default_factory=dict)

    def __str__(self) -> str:
        share = self.attributed / max(1, self.parameters)
        before = [f"stage {name!r}:\n{report}\n\nlast stage:" for name, report in self.earlier.items()]
        lines = [*before, f"attributed: {self.attributed:,} of {self.parameters:,} parameters ({share:.1%})"]
        lines += [f"not attributed: {name or 'the model itself'}: {reason}" for name, reason in self.skipped.items()]
        lines += ["the loss is a sum over the batch, repeats itself, and is finite; every tracked layer is reached"]
        return "\n".join([*lines, str(self.curvature)])

    __repr__ = __str__
