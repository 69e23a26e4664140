"""What share of the trained parameters is attributed, and what is not, and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from ..model.layers.choice import parameter_aliases
from ..runtime.sharding import named_parameters
from ..stage.context import StageContext

_ENOUGH = 0.95  # of the trained parameters
_NAMED = 3


class LeftOut(NamedTuple):
    """What one reason leaves out: names of modules, of single parameters, or of blocks that are part of a tensor."""

    reason: str
    names: tuple[str, ...]
    parameters: int
    unit: str  # "module", "parameter tensor" or "block"

    def __str__(self) -> str:
        many = "s" if len(self.names) > 1 else ""
        counted = f"{len(self.names):,} {self.unit}{many}, {self.parameters:,} parameters"
        return f"{self.reason}: {counted} ({first_names(self.names)})"


@dataclass(frozen=True)
class Coverage:
    """How many of a stage's parameters are attributed; a tensor with several names counts once.

    Args:
        attributed, trained, total: numbers of parameters: attributed, changed by training, and of the whole model.
        missing: what was trained and is not attributed, by reason, the largest first.
        untrained: what was not trained, likewise.
    """

    attributed: int
    trained: int
    total: int
    missing: tuple[LeftOut, ...]
    untrained: tuple[LeftOut, ...]

    @property
    def share(self) -> float:
        """Of the trained parameters, those that are attributed."""
        return self.attributed / max(1, self.trained)

    def __str__(self) -> str:
        of_all = "" if self.trained == self.total else f"; the model has {self.total:,} in all"
        return f"{self.attributed:,} of {self.trained:,} trained parameters ({self.share:.1%}){of_all}"


def coverage(context: StageContext) -> Coverage:
    """What a stage attributes; where no parameter groups are known, what requires gradients now was trained."""
    tensors = _tensors(context.model)
    why_untrained, skipped = _why_untrained(context), context.layers.skipped
    blocks = {**context.layers.tracked, **context.layers.left_out}
    missing = [(skipped[name], name, blocks[name].size) for name in context.layers.left_out]
    taken = {name for layer in blocks.values() for name in layer.parameter_names}
    untrained: list[tuple[str, str, int]] = []  # the reason, whose it is, and a number of parameters
    for names, size in tensors:
        reasons = [why_untrained(name) for name in names]
        if reasons[0] is not None and None not in reasons:
            untrained.append((reasons[0], names[0], size))
        elif not taken.intersection(names):
            missing.append((*_why_skipped(names, skipped), size))
    total = sum(size for _, size in tensors)
    trained = total - sum(size for _, _, size in untrained)
    units = dict.fromkeys((name for names, _ in tensors for name in names), "parameter tensor")
    units |= {name: "module" for name, _ in context.model.named_modules()}
    return Coverage(context.parameters, trained, total, _by_reason(missing, units), _by_reason(untrained, units))


class Coverages:
    """The coverage of each stage of an analyzer, by its name, and whether it was said that one is low."""

    def __init__(self, contexts: Sequence[StageContext]):
        self._of_stages = {context.trajectory.stage: coverage(context) for context in contexts}
        self._said = False

    def __getitem__(self, stage: str) -> Coverage:
        return self._of_stages[stage]

    def warn(self, trains: Sequence[Any], stacklevel: int) -> None:
        """Warn, the first time, where less than 95% of the trained parameters of a stage are attributed.

        trains: the training data of each stage, None for a stage that does not count. stacklevel: as for warnings.warn.
        """
        if self._said:
            return
        self._said = True
        given = [pair for pair, data in zip(self._of_stages.items(), trains, strict=True) if data is not None]
        low = {stage: found for stage, found in given if found.share < _ENOUGH}
        if low:
            warnings.warn(_warning(low, len(self._of_stages) > 1), UserWarning, stacklevel + 1)


def _warning(low: Mapping[str, Coverage], several: bool) -> str:
    """What to say of stages much of which is not attributed; several: whether stages must be named."""
    of_stages = "; ".join(f"{f'in stage {stage!r} ' if several else ''}{found}" for stage, found in low.items())
    largest = sorted((group for found in low.values() for group in found.missing), key=lambda group: -group.parameters)
    rest = f"; and {len(largest) - _NAMED} reasons more" if len(largest) > _NAMED else ""
    return (
        f"segflow attributes {of_stages}, and scores leave out what the others learned. Not attributed: "
        f"{'; '.join(map(str, largest[:_NAMED]))}{rest}. print(analyzer.check(...)) shows all. Choose more layers "
        "where some were chosen (layers=, exclude=, get_influence_tracked_modules()), or take the scores as those of "
        "the attributed part alone."
    )


def first_names(names: Sequence[str]) -> str:
    """The first three of some names of modules or parameters."""
    more = ", ..." if len(names) > _NAMED else ""
    return ", ".join(name or "the model itself" for name in names[:_NAMED]) + more


def _tensors(model: nn.Module) -> list[tuple[list[str], int]]:
    """All names of each tensor that is a parameter, and its size; 0 of one that is not initialised yet."""
    parameters = named_parameters(model, remove_duplicate=False)
    sizes = {name: 0 if is_lazy(parameter) else parameter.numel() for name, parameter in parameters.items()}
    return [(names, sizes[first]) for first, names in parameter_aliases(model).items()]


def _why_untrained(context: StageContext) -> Callable[[str], str | None]:
    """Tells for a parameter's name why training did not change it, None if it did."""
    if context.trajectory.parameter_groups is not None:
        return context.trajectory.why_untrained
    frozen = {n for n, p in named_parameters(context.model, remove_duplicate=False).items() if not p.requires_grad}
    return lambda name: "it does not require gradients" if name in frozen else None


def _why_skipped(names: Iterable[str], skipped: Mapping[str, str]) -> tuple[str, str]:
    """Why a tensor of these names is not attributed, and whose the reason is: its own, or that of a module it is in."""
    holders = [holder for name in names for holder in _holders(name)]
    holder = next((holder for holder in holders if holder in skipped), None)
    return ("no kind of layer takes it", holders[0]) if holder is None else (skipped[holder], holder)


def _holders(name: str) -> list[str]:
    """A parameter and the modules it is in, the innermost first; the model itself only where it holds it directly."""
    words = name.split(".")
    return [".".join(words[:end]) for end in range(len(words), 0, -1)] + ([""] if len(words) == 1 else [])


def _by_reason(left: Iterable[tuple[str, str, int]], units: Mapping[str, str]) -> tuple[LeftOut, ...]:
    """One entry for each reason, and unit that it is given for; the largest first. units: of modules and parameters."""
    grouped: dict[tuple[str, str], dict[str, int]] = {}
    for reason, holder, size in left:
        sizes = grouped.setdefault((reason, units.get(holder, "block")), {})
        sizes[holder] = sizes.get(holder, 0) + size
    found = [LeftOut(reason, tuple(sizes), sum(sizes.values()), unit) for (reason, unit), sizes in grouped.items()]
    return tuple(sorted(found, key=lambda group: -group.parameters))
