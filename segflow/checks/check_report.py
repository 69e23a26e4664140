"""The report of a check that found nothing wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .coverage import Coverage, first_names
from .curvature_scale import CurvatureScale


@dataclass(frozen=True, repr=False)
class CheckReport:
    """What `Analyzer.check` found to be in order; printing it says what is attributed, and what is not, and why.

    Args:
        coverage: how many of the trained parameters are attributed, and what is left out, by reason.
        skipped: the reason for each module or parameter that is not attributed, by its name.
        curvature: how far the curvature of `sample=True` is off.
        training: what in the run was unlike a textbook's, as `Trajectory.observed` says it.
        slow: how each block that is computed in a slow way is computed, by its name.
        sizes: how far the sizes of the method's scores can be trusted.
        earlier: the reports of earlier stages of training, by the stage's name.
    """

    coverage: Coverage
    skipped: Mapping[str, str]
    curvature: CurvatureScale
    training: Mapping[str, Any] = field(default_factory=dict)
    slow: Mapping[str, str] = field(default_factory=dict)
    sizes: str = ""
    earlier: Mapping[str, CheckReport] = field(default_factory=dict)

    @property
    def attributed(self) -> int:
        """How many parameters are attributed."""
        return self.coverage.attributed

    @property
    def parameters(self) -> int:
        """How many parameters training changed."""
        return self.coverage.trained

    @property
    def total(self) -> int:
        """How many parameters the model has."""
        return self.coverage.total

    def __str__(self) -> str:
        lines = [f"stage {name!r}:\n{report}\n\nlast stage:" for name, report in self.earlier.items()]
        lines += [f"attributed: {self.coverage}"]
        lines += [f"not attributed: {group}" for group in self.coverage.missing]
        lines += [f"not trained: {group}" for group in self.coverage.untrained]
        lines += [f"slow: {line}" for line in _grouped(self.slow)]
        lines += [f"seen in training: {line}" for line in in_words(self.training)]
        lines += ["the loss is a sum over the batch, repeats itself, and is finite; every tracked layer is reached"]
        lines += [str(self.curvature), *([f"sizes of scores: {self.sizes}"] if self.sizes else [])]
        return "\n".join(lines)

    __repr__ = __str__


def _grouped(ways: Mapping[str, str]) -> Iterator[str]:
    """A line for each way in which blocks are computed, that of most blocks first."""
    names: dict[str, list[str]] = {}
    for name, way in ways.items():
        names.setdefault(way, []).append(name)
    for way, of_way in sorted(names.items(), key=lambda pair: -len(pair[1])):
        yield f"{way}: {len(of_way):,} block{'s' if len(of_way) > 1 else ''} ({first_names(of_way)})"


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
