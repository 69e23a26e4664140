"""Operators: what happens to a query gradient before it meets training gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import real_number, settle, whole_number
from ..errors import MethodError, check_choice
from .plan_numbers import all_of, checked_amounts
from .points import Curvature, Point, Preconditioner, SampledFisher, TraceShares, check_same_stage
from .spectra import damped_inverse, decay, response, saturation

HEURISTIC_SHARE = 0.1  # of a layer's mean eigenvalue; Grosse et al. 2023, arXiv 2308.03296
_LARGEST = 700.0  # an exponent whose exponential is a number
_OF_RATE: dict[str, Callable[[Tensor, float, Tensor | float], Tensor]] = {
    "decay": decay,
    "response": response,
    "saturation": saturation,
}


@dataclass(frozen=True, kw_only=True)
class Spectral:
    """A function of a curvature's eigenvalues (of sigma = 0 without a curvature).

    Args:
        stage: the stage of training whose parameter groups are meant, and whose layers the operator acts on.
        kind: "decay", "response" or "saturation", each of a rate (see `spectra`), "damped_inverse" or "constant".
        amount: the rate (the segment's summed lr_steps), the damping or the constant, one for each parameter group;
            None for a damping of 0.1 times each layer's mean eigenvalue.
        shift: what weight decay adds to rate * eigenvalue, a sum over the segment's steps; for "damped_inverse" what it
            adds to the eigenvalue; one for each parameter group.
        coupled: the part of the shift that is times P, as the coupled weight decay of Adam and its like; one for each
            parameter group, or empty where no group has such a part.
        shifted_by: the P of that part.
        ceilings: where training's batches may have left layers out, how many times the rate of each parameter group may
            count: a layer's is rate * min(1 / share, ceiling), share being that of the training examples that reach
            it. Weight decay is not multiplied. Empty: every rate counts once.
        trace_shares: the layers' shares of the whole curvature, by which eigenvalues are divided (coupled layers); the
            shift is added after. None: every layer's eigenvalues are its own (layers apart).

    What a kind does not use it does not take: a constant has no curvature and no shift, and without a curvature there
    are no mean eigenvalue and, undamped, no inverse.

    Raises:
        MethodError: the kind is not known, a number is missing or out of range, an option would be ignored, or the
            curvature, `shifted_by` or `trace_shares` are of another stage.
    """

    stage: int
    kind: str
    curvature: Curvature | None
    amount: tuple[float | None, ...]
    shift: tuple[float, ...]
    coupled: tuple[float, ...] = ()
    shifted_by: Preconditioner | None = None
    ceilings: tuple[float, ...] = ()
    trace_shares: TraceShares | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, (*_OF_RATE, "damped_inverse", "constant"), MethodError)
        settle(self, stage=whole_number("stage", self.stage, MethodError, advice="It is a place, counted from 0."))
        least = -math.inf if self.kind == "constant" else 0.0
        settle(self, amount=checked_amounts(self._where, "amount", self.amount, least, self._may_be_none))
        for name, least in (("shift", 0.0), ("coupled", 0.0), ("ceilings", 1.0)):
            settle(self, **{name: checked_amounts(self._where, name, getattr(self, name), least)})
        parts = {"curvature": self.curvature, "shifted_by": self.shifted_by, "trace_shares": self.trace_shares}
        check_same_stage(self._where, self.stage, **parts)
        self._check_used()

    @property
    def _where(self) -> str:
        return f"Spectral(stage={self.stage}, kind={self.kind!r})"

    @property
    def _may_be_none(self) -> str:
        """What an amount of None stands for; nothing where it may not be None."""
        return "the heuristic damping" if self.kind == "damped_inverse" else ""

    def _check_used(self) -> None:
        """Raise MethodError where an option would be ignored, or a function be zero for want of a curvature."""
        if bool(self.coupled) != (self.shifted_by is not None):
            raise MethodError(
                f"{self._where}: coupled={self.coupled} and shifted_by={self.shifted_by}: expected both or neither. "
                "The coupled part of a shift is times the P that shifted_by names."
            )
        if self.kind == "constant" and (self.curvature is not None or any(self.shift) or self.coupled):
            raise MethodError(
                f"{self._where}: a constant looks at no eigenvalues, so a curvature, a shift or a coupled part would "
                "be ignored. Expected curvature=None, shift=0 for each parameter group, and no coupled."
            )
        if self.trace_shares is not None and self.curvature is None:
            raise MethodError(
                f"{self._where}: trace_shares without a curvature, whose eigenvalues they divide, would be ignored. "
                "Expected both, or neither."
            )
        if self.kind == "damped_inverse" and self.curvature is None:
            amounts = zip(self.amount, self.shift, strict=False)
            if any(amount is None or not (amount or shift) for amount, shift in amounts):
                raise MethodError(
                    f"{self._where}: amount={self.amount} without a curvature, whose eigenvalues are then 0: there is "
                    "nothing to invert. Give a curvature, or numbers above 0."
                )

    def needs_share(self, parameter_group: int) -> bool:
        """Whether the function of a layer in this group depends on the share of the examples that reach it."""
        return bool(self.ceilings) and self.ceilings[parameter_group] > 1

    def counts(self, parameter_group: int, share: float | None) -> float:
        """How many times the rate of a layer counts; share: of the training examples that reach it, None for all."""
        return 1.0 if share is None else min(1 / share, self.ceilings[parameter_group])

    def on(
        self,
        eigenvalues: Tensor,
        parameter_group: int,
        P: Tensor | float = 1.0,
        share: float | None = None,
        coupling: float | None = None,
    ) -> Tensor:
        """The function's values at a layer's eigenvalues [P, O, I], or [] for a constant.

        parameter_group: the layer's. P: that of `shifted_by`, in the eigenvalues' basis. share: of the training
        examples, those that reach the layer; None where it does not matter. coupling: the layer's rate over its share
        of `trace_shares`, the sum over layers of rate * trace over its own trace; None for layers apart.
        """
        counts = self.counts(parameter_group, share)
        if self.kind == "constant":
            return eigenvalues.new_full((), counts * self._rate(parameter_group))
        shift: Tensor | float = self.shift[parameter_group]
        if self.coupled:
            shift = shift + self.coupled[parameter_group] * P
        if coupling is not None and self.trace_shares is not None:
            own = counts * self.trace_shares.rates[parameter_group]
            if self.kind == "decay" and not own:  # the others undo what the layer's gradient did
                return decay(_times_limit(eigenvalues, coupling, self.trace_shares.power), 1.0, shift)
            eigenvalues = (
                _divided(eigenvalues, own / coupling, self.trace_shares.power) if own and coupling else eigenvalues
            )
        if self.kind == "damped_inverse":
            damping = self.amount[parameter_group]
            heuristic = HEURISTIC_SHARE * eigenvalues.mean()
            # the shift is a sum of weight decay per rate
            return damped_inverse(eigenvalues + shift / counts, heuristic if damping is None else damping)
        return _OF_RATE[self.kind](eigenvalues, counts * self._rate(parameter_group), shift)

    def _rate(self, parameter_group: int) -> float:
        """The amount, which is a number wherever it is no damping."""
        amount = self.amount[parameter_group]
        return math.nan if amount is None else amount


def _divided(eigenvalues: Tensor, share: float, power: float) -> Tensor:
    """Eigenvalues over a layer's share to a power; no number is too large for their precision."""
    most = torch.finfo(eigenvalues.dtype).max
    factor = math.exp(min(-power * math.log(share), _LARGEST))
    return (eigenvalues.double() * factor).clamp_max(most).to(eigenvalues.dtype)


def _times_limit(eigenvalues: Tensor, coupling: float, power: float) -> Tensor:
    """rate * eigenvalues / share^power as the rate goes to 0; eigenvalues that are 0 to rounding stay so."""
    if power == 1:
        return coupling * eigenvalues
    precision = torch.finfo(eigenvalues.dtype)
    above = (eigenvalues > precision.eps * eigenvalues.max()) & (power > 1)
    return torch.zeros_like(eigenvalues).masked_fill(above, precision.max)


@dataclass(frozen=True)
class Scale:
    """Multiplies by P to a power, elementwise, in parameter space: where the exact P enters and leaves."""

    preconditioner: Preconditioner
    power: float

    def __post_init__(self) -> None:
        all_of("Scale: preconditioner", (self.preconditioner,), Preconditioner)
        settle(self, power=real_number("Scale: power", self.power, MethodError))

    @property
    def stage(self) -> int:
        """The stage whose layers it acts on."""
        return self.preconditioner.stage


@dataclass(frozen=True)
class Projection:
    """Random rank-one probes (u_j, w_j) for each layer: feature j of a gradient G is the layers' sum of u_j^T G w_j.

    dimension: the number of features; None: every parameter is a feature of its own, nothing is random.
    """

    dimension: int | None
    seed: int

    def __post_init__(self) -> None:
        settle(self, seed=whole_number("seed", self.seed, MethodError))
        if self.dimension is not None:
            advice = "None projects nothing."
            settle(self, dimension=whole_number("dimension", self.dimension, MethodError, 1, advice=advice))


@dataclass(frozen=True, kw_only=True)
class ProjectedInverse:
    """(R^T F R + damping)^-1 in a projection's features, F being a second moment of per-example gradients.

    Args:
        stage: whose training examples; point: the parameters at which their gradients are taken.
        features: "train" for gradients of the training loss (an empirical Fisher), "output" for those of the task's
            output function (TRAK).
        damping: None for 0.1 times the mean eigenvalue.
        batch: F is that of so many examples' summed gradients, over `batch`.
    """

    stage: int
    point: Point
    projection: Projection
    features: str
    damping: float | None
    batch: int = 1

    def __post_init__(self) -> None:
        settle(self, stage=whole_number("stage", self.stage, MethodError, advice="It is a place, counted from 0."))
        check_choice("features", self.features, ("train", "output"), MethodError)
        all_of("ProjectedInverse: point", (self.point,), Point)
        all_of("ProjectedInverse: projection", (self.projection,), Projection)
        settle(self, batch=whole_number("batch", self.batch, MethodError, 1))
        if self.damping is not None:
            settle(self, damping=real_number("damping", self.damping, MethodError, 0))


@dataclass(frozen=True, kw_only=True)
class IterativeInverse:
    """(H + damping)^-1 by LiSSA: `steps` products with the Hessian H of batches of a stage's training loss at a point.

    Args:
        sample_size: examples of a batch.
        repetitions: independent estimates that are averaged.
        scale: divides the damped Hessian, at least half its largest eigenvalue; None estimates it.
    """

    stage: int
    point: Point
    damping: float
    steps: int
    sample_size: int
    repetitions: int
    seed: int
    scale: float | None

    def __post_init__(self) -> None:
        for name, least in (("stage", 0), ("steps", 1), ("sample_size", 1), ("repetitions", 1), ("seed", 0)):
            settle(self, **{name: whole_number(name, getattr(self, name), MethodError, least)})
        all_of("IterativeInverse: point", (self.point,), Point)
        settle(self, damping=real_number("damping", self.damping, MethodError, 0))
        if self.scale is not None:
            advice = "None estimates it."
            settle(self, scale=real_number("scale", self.scale, MethodError, above=0, advice=advice))


@dataclass(frozen=True, kw_only=True)
class CoupledFunction:
    """A segment's "response" or "decay" as a function of the curvature of all layers together.

    Args:
        stage: the fisher's.
        shift: what weight decay adds, a sum over the segment's steps, one for each parameter group. One number for all
            that move, and for a decay for all: what differs has no function in the span of the pseudo-gradients.

    Raises:
        MethodError: the kind is not known, or the fisher is of another stage.
    """

    stage: int
    kind: str
    fisher: SampledFisher
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("response", "decay"), MethodError)
        settle(self, stage=whole_number("stage", self.stage, MethodError, advice="It is a place, counted from 0."))
        where = f"CoupledFunction(stage={self.stage}, kind={self.kind!r})"
        check_same_stage(where, self.stage, fisher=self.fisher)
        settle(self, shift=checked_amounts(where, "shift", self.shift, 0.0))

    def check_shifts(self, parameter_groups: Iterable[int]) -> None:
        """Raise MethodError where the shifts of layers' parameter groups differ, among those that count."""
        groups = set(parameter_groups)
        counted = {self.shift[group] for group in groups if self.fisher.rates[group] or self.kind == "decay"}
        if len(counted) > 1:
            raise MethodError(
                f"CoupledFunction(stage={self.stage}, kind={self.kind!r}): weight decay adds {sorted(counted)} in the "
                "layers' parameter groups, and a function of all layers together needs one number. Use "
                "curvature='ekfac', whose layers may differ, attribute those of one weight decay alone (layers=, "
                "exclude=), or train all parameters with the same."
            )


@dataclass(frozen=True)
class UnitNorm:
    """Brings each query gradient to norm 1, for cosines."""


Operator = Spectral | Scale | ProjectedInverse | IterativeInverse | CoupledFunction | UnitNorm
