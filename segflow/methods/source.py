"""SOURCE as a plan of terms (Bae et al. 2024, arXiv 2405.12186)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..arguments import plain, real_number, settle, truth, whole_number, whole_numbers
from ..errors import MethodError, check_choice
from ..training.segments import WEIGHTINGS, Segment, Segmentation, Weight, cut, segmentation
from .method import Cuts, batch_of_fisher, ceilings, final_point, run_points, stage_place
from .plan import (
    CoupledFunction,
    Curvature,
    Operator,
    Plan,
    Point,
    Preconditioner,
    SampledFisher,
    Scale,
    Spectral,
    Term,
    TraceShares,
)

if TYPE_CHECKING:
    from ..training.trajectory import Trajectory


@dataclass(frozen=True)
class Source:
    """SOURCE: a query gradient walked back through training (Bae et al. 2024, arXiv 2405.12186).

    The paper's own is `Source(segments=3, checkpoint_weights="equal", layers="apart", query_points="final")`, for Adam
    with `preconditioner="diagonal"`.

    Args:
        segments: how many segments (the paper takes three; see docs/FIDELITY.md for why the default is one), the steps
            at which one ends and the next begins (of a single stage), or "auto": cut where curvature and gradients
            really change, which the scores' provenance then explains.
        fast: Fast-SOURCE: training gradients and curvature at each segment's mean parameters, in which a checkpoint
            weighs by the summed rates of all parameter groups.
        preconditioner: how Adam, AdamW, RMSprop and Adagrad enter. "kronecker": H~ = P^1/2 H P^1/2 as EK-FAC with the
            rank-one part of P inside and the exact P where query and response enter and leave. "diagonal": the paper's
            hybrid (its Appendix C): a diagonal curvature in the exponential, damped EK-FAC in the inverse. "none": as
            if the run had been trained with SGD.
        checkpoint_weights: "nearest": a checkpoint stands for the steps nearest to it, for each parameter group by its
            own rates; "equal", as in the paper.
        penalty: for each segment, of segments="auto": the least drop of scatter, relative to the statistics' mean
            square, that is worth one more cut.
        fisher_batch: square sums of so many examples' pseudo-gradients for EK-FAC's eigenvalues, not each one's (GGDA's
            batched Fisher): cheaper for layers with many positions. Unbiased, as pseudo-gradients have mean zero; the
            scores' provenance tells by how much it differs on some examples.
        layers: "coupled": eigenvalues are divided by their layer's share of rate * trace in the segment, so that the
            layers share one correction (see `TraceShares`; the scores' provenance tells the shares). "apart": every
            layer makes the whole correction by itself, as in the paper.
        query_points: "run": a smoothed query gradient, the mean of the measurement's gradients at the last stage's
            checkpoints, by the steps that each stands for: one query pass for each. "final": the gradient at the end,
            as in the paper.
        shares_power: of the layers' shares; 2 brings sizes of predictions nearer to those of retraining on converged
            runs, and costs agreement on runs that stopped early (docs/FIDELITY.md).
        curvature: "ekfac": a block for each layer. "coupled": for small studies, the function of the curvature of all
            layers together, exactly in the span of up to 7,500 sampled pseudo-gradients (of drawn examples where
            there would be more), with the exact P. It holds their tokens, and the square of their number.
        lr_steps_scale: how many of the run's steps count. Retraining a part of the data for the same epochs takes
            fewer steps: 0.5 suits halves of a run that stopped early.

    Example:
        >>> Source(segments=3).segments
        3
    """

    segments: int | Sequence[int] | str = 1
    fast: bool = False
    preconditioner: str = "kronecker"
    checkpoint_weights: str = "nearest"
    penalty: float = 0.1
    fisher_batch: int = 1
    layers: str = "coupled"
    query_points: str = "run"
    shares_power: float = 1.0
    lr_steps_scale: float = 1.0
    curvature: str = "ekfac"

    def __post_init__(self) -> None:
        settle(self, fast=truth("fast", self.fast, MethodError), fisher_batch=batch_of_fisher(self.fisher_batch))
        check_choice("preconditioner", self.preconditioner, ("kronecker", "diagonal", "none"), MethodError)
        check_choice("checkpoint_weights", self.checkpoint_weights, WEIGHTINGS, MethodError)
        check_choice("layers", self.layers, ("coupled", "apart"), MethodError)
        check_choice("curvature", self.curvature, ("ekfac", "coupled"), MethodError)
        check_choice("query_points", self.query_points, ("run", "final"), MethodError)
        settle(self, penalty=real_number("penalty", self.penalty, MethodError, 0))
        for name in ("shares_power", "lr_steps_scale"):
            settle(self, **{name: real_number(name, getattr(self, name), MethodError, above=0)})
        if self.layers == "apart" and self.shares_power != 1:
            raise MethodError(
                f"shares_power={self.shares_power} with layers='apart', which have no shares, would be ignored. Leave "
                "it out, or give layers='coupled'."
            )
        if self.curvature == "coupled":
            self._check_coupled()
        if not self.automatic:
            settle(self, segments=_count_or_cuts(plain(self.segments)))

    def _check_coupled(self) -> None:
        """Raise MethodError where another option would be ignored, or is the paper's alone."""
        expected = {"layers": "coupled", "shares_power": 1, "fisher_batch": 1}
        given = {name: getattr(self, name) for name, value in expected.items() if getattr(self, name) != value}
        if self.preconditioner == "diagonal":
            given["preconditioner"] = "diagonal"
        if given:
            raise MethodError(
                f"curvature='coupled' with {given}: it takes all layers together, each example alone, and the exact P, "
                "so these would be ignored. Leave them out, or use curvature='ekfac'."
            )

    @property
    def automatic(self) -> bool:
        """Whether a plan needs cuts; see `segflow.methods.Method`."""
        return isinstance(self.segments, str) and self.segments == "auto"

    @property
    def sizes(self) -> str:
        """How far sizes of scores can be trusted; see `segflow.methods.Method` and docs/FIDELITY.md."""
        if self.curvature == "ekfac" and self.layers == "apart":
            return "a score overstates the real change several times, for each layer corrects alone; take ranks"
        return (
            "a score is of the order of the real change for small groups, not exact; docs/FIDELITY.md has slopes, and "
            "Scores.calibrated(bank) fits one to a few retrainings"
        )

    def cuts(self, trajectory: Trajectory, statistics: Mapping[int, Tensor]) -> dict[int, Segmentation]:
        """For segments="auto": where each stage is cut, given its checkpoints' statistics [C, F]."""
        stages = trajectory.stages
        return {stage: segmentation(stages[stage], rows, self.penalty) for stage, rows in statistics.items()}

    def plan(self, trajectory: Trajectory, stage: int = -1, cuts: Cuts | None = None) -> Plan:
        """One term for each segment of the stage, first to last; later stages only let them decay.

        cuts: needed where segments="auto". MethodError if a cut does not fit the trajectory.
        """
        stage, last = stage_place(trajectory, stage), len(trajectory.stages) - 1
        at, at_weights = self._query(trajectory)
        walked: tuple[Operator, ...] = ()  # what later segments have done to the query gradient
        terms: list[Term] = []
        for place in range(last, stage - 1, -1):
            segments = self._segments(trajectory, place, cuts)
            for number, segment in reversed(list(enumerate(segments, start=1))):
                learn, forget = self._operators(trajectory.stages[place], place, segment)
                if place == stage:
                    points, weights = self._points(place, segment)
                    term = Term(
                        label=f"segment {number}: steps {segment.start + 1}-{segment.end}",
                        stage=stage,
                        query=at,
                        query_weights=at_weights,
                        operators=(*walked, *learn),
                        train=points,
                        weights=weights,
                    )
                    terms.append(term)
                walked = (*walked, *forget)
        return tuple(reversed(terms))

    def _segments(self, trajectory: Trajectory, place: int, cuts: Cuts | None) -> tuple[Segment, ...]:
        asked = self.segments
        if isinstance(asked, str):
            if cuts is None:
                raise MethodError("segments='auto' needs the checkpoints' statistics: run Analyzer.fit first.")
            asked = cuts[place].cuts
        elif not isinstance(asked, int) and len(trajectory.stages) > 1:
            raise MethodError(
                f"segments={list(asked)}: the run has {len(trajectory.stages)} stages. Give a count, or 'auto'."
            )
        segments = cut(trajectory.stages[place], asked, self.checkpoint_weights)
        return tuple(self._scaled(segment) for segment in segments)

    def _scaled(self, segment: Segment) -> Segment:
        """The segment with as many steps as count."""
        rates, decay = (
            tuple(self.lr_steps_scale * amount for amount in amounts)
            for amounts in (segment.lr_steps, segment.decay_steps)
        )
        return replace(segment, lr_steps=rates, decay_steps=decay)

    def _query(self, trajectory: Trajectory) -> tuple[tuple[Point, ...], tuple[float, ...]]:
        """Where query gradients are taken, and how the points weigh."""
        if self.query_points == "final":
            return (final_point(trajectory),), (1.0,)
        return run_points(trajectory, self.checkpoint_weights)

    def _shares(self, curvature: Curvature, segment: Segment) -> TraceShares | None:
        """The layers' shares of a segment's curvature; None for layers apart."""
        if self.layers == "apart":
            return None
        rates, power = segment.lr_steps, self.shares_power
        return TraceShares(stage=curvature.stage, curvature=curvature, rates=rates, power=power)

    def _points(self, stage: int, segment: Segment) -> tuple[tuple[Point, ...], tuple[Weight, ...]]:
        """Where a segment's gradients and curvature are taken, and how the points weigh."""
        if self.fast:
            return (Point(stage, tuple(zip(segment.checkpoints, segment.overall, strict=True))),), (1.0,)
        return tuple(Point.at(stage, checkpoint) for checkpoint in segment.checkpoints), segment.weights

    def _operators(
        self, trajectory: Trajectory, stage: int, segment: Segment
    ) -> tuple[tuple[Operator, ...], tuple[Operator, ...]]:
        """What a segment learns of a query, and what it forgets of it on the way back."""
        if self.curvature == "coupled":
            return self._of_all_layers(trajectory, stage, segment)
        plain = Curvature(stage, *self._points(stage, segment), batch=self.fisher_batch)
        capped = partial(Spectral, stage=stage, ceilings=ceilings(trajectory))
        function = partial(capped, amount=segment.lr_steps, shift=segment.decay_steps)
        if not trajectory.preconditioned or self.preconditioner == "none":
            function = partial(function, curvature=plain, trace_shares=self._shares(plain, segment))
            return (function(kind="response"),), (function(kind="decay"),)
        beside_P, through_P = _divided(segment.decay_steps, trajectory.coupled)
        P = _preconditioner(stage, segment, through_P)
        kind = "ekfac" if self.preconditioner == "kronecker" else "diagonal"
        scaled = replace(plain, kind=kind, scaled=P)
        shares = self._shares(scaled, segment)
        function = partial(function, curvature=scaled, shift=beside_P, trace_shares=shares)
        if any(trajectory.coupled):
            function = partial(function, coupled=through_P, shifted_by=P)
        if self.preconditioner == "kronecker":  # P^1/2 f(rate * P^1/2 H P^1/2 + decay) P^+-1/2
            enter, undo = Scale(P, 0.5), Scale(P, -0.5)
            return (enter, function(kind="response"), enter), (enter, function(kind="decay"), undo)
        # (1 - exp(-(rate * P diag(H) + decay))), then H^-1: Bae et al. 2024, Appendix C
        heuristic = (None,) * len(segment.lr_steps)
        per_rate = tuple(shift / rate if rate else 0.0 for shift, rate in zip(through_P, segment.lr_steps, strict=True))
        inverse = capped(kind="damped_inverse", curvature=plain, amount=heuristic, shift=per_rate, trace_shares=shares)
        return (function(kind="saturation"), inverse), (function(kind="decay"),)

    def _of_all_layers(
        self, trajectory: Trajectory, stage: int, segment: Segment
    ) -> tuple[tuple[Operator, ...], tuple[Operator, ...]]:
        """What a segment learns and forgets by the curvature of all layers together."""
        _, through_P = _divided(segment.decay_steps, trajectory.coupled)
        preconditioned = trajectory.preconditioned and self.preconditioner != "none"
        if ceilings(trajectory) or (preconditioned and any(through_P)):
            what = "weight decay that goes through Adam's P" if any(through_P) else "layers that batches left out"
            raise MethodError(
                f"curvature='coupled': the run has {what}, which only curvature='ekfac' can follow. Use that."
            )
        P = _preconditioner(stage, segment, through_P) if preconditioned else None
        points, weights = self._points(stage, segment)
        fisher = SampledFisher(stage=stage, points=points, weights=weights, rates=segment.lr_steps, scaled=P)
        function = partial(CoupledFunction, stage=stage, fisher=fisher, shift=segment.decay_steps)
        return (function(kind="response"),), (function(kind="decay"),)


def _preconditioner(stage: int, segment: Segment, through_P: tuple[float, ...]) -> Preconditioner:
    """A segment's P; through_P: what weight decay adds times it, in each parameter group."""
    moved = tuple(any(through) for through in zip(segment.lr_steps, through_P, strict=True))
    return Preconditioner(stage, tuple(zip(segment.checkpoints, segment.weights, strict=True)), moved)


def _count_or_cuts(segments: object) -> int | tuple[int, ...]:
    """The option `segments` where it is not "auto"; MethodError unless it is a count, or the steps at which to cut."""
    advice = "Give a count, the steps at which to cut, or 'auto'."
    if isinstance(segments, Iterable) and not isinstance(segments, str):
        return whole_numbers("segments", segments, MethodError, advice=advice)
    return whole_number("segments", segments, MethodError, advice=advice)


def _divided(decay: tuple[float, ...], coupled: tuple[bool, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What weight decay adds beside P, and what it adds through P, for each parameter group."""
    through_P = tuple(amount if is_coupled else 0.0 for amount, is_coupled in zip(decay, coupled, strict=True))
    return tuple(a - b for a, b in zip(decay, through_P, strict=True)), through_P
