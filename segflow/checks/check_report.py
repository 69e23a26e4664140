"""The report of a check that found nothing wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .curvature_scale import CurvatureScale


@dataclass(frozen=True, repr=False)
class CheckReport:
    """What `Analyzer.check` found to be in order; printing it says what is attributed, and what is not, and why.

    Args:
        attributed, parameters: how many of the model's parameters are attributed, and how many there are.
        skipped: the reason for each module that is not attributed, by its name.
        curvature: how far the curvature of `sample=True` is off.
        training: what in the run was unlike a textbook's, as `Trajectory.observed` says it.
        sizes: how far the sizes of the method's scores can be trusted.
        earlier: the reports of earlier stages of training, by the stage's name.
    """

    attributed: int
    parameters: int
    skipped: Mapping[str, str]
    curvature: CurvatureScale
    training: Mapping[str, Any] = field(default_factory=dict)
    sizes: str = ""
    earlier: Mapping[str, CheckReport] = field(default_factory=dict)

    def __str__(self) -> str:
        share = self.attributed / max(1, self.parameters)
        before = [f"stage {name!r}:\n{report}\n\nlast stage:" for name, report in self.earlier.items()]
        lines = [*before, f"attributed: {self.attributed:,} of {self.parameters:,} parameters ({share:.1%})"]
        lines += [f"not attributed: {name or 'the model itself'}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"seen in training: {line}" for line in in_words(self.training)]
        lines += ["the loss is a sum over the batch, repeats itself, and is finite; every tracked layer is reached"]
        lines += [str(self.curvature), *([f"sizes of scores: {self.sizes}"] if self.sizes else [])]
        return "\n".join(lines)

    __repr__ = __str__


def in_words(seen: Any, about: str = "") -> Iterator[str]:
    """A line for each fact of nested mappings.

    Example:
        >>> list(in_words({"clipping": {"mean factor": 0.25, "smallest": 0.1}, "resumed after steps": [30]}))
        ['clipping: mean factor 0.25, smallest 0.1', 'resumed after steps: 30']
    """
    if isinstance(seen, Mapping) and any(isinstance(value, Mapping) for value in seen.values()):
        for name, value in seen.items():
            yield from in_words(value, f"{about}{name}: ")
    elif isinstance(seen, Mapping) and not about:
        for name, value in seen.items():
            yield from in_words(value, f"{name}: ")
    elif isinstance(seen, Mapping):
        yield about + ", ".join(f"{name} {_word(value)}" for name, value in seen.items())
    else:
        yield about + _word(seen)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_word, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
