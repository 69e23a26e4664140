"""What was fitted, as the query side reads it from the store: curvature blocks, kernels, checkpoints' statistics.

Axes: P parts, O outputs, I inputs of a layer, C checkpoints, F numbers that describe one, Q queries, k features of a
projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import FactorError, StoreError
from ..methods.operators import HEURISTIC_SHARE
from ..methods.plan import (
    CoupledFunction,
    Curvature,
    IterativeInverse,
    Operator,
    Plan,
    Point,
    Preconditioner,
    ProjectedInverse,
    SampledFisher,
    Spectral,
    Term,
    TraceShares,
    curvatures,
    fishers,
    projected,
    spectral,
    trace_shares,
)
from ..methods.spectra import damped_inverse
from ..model.loss_view import LossView
from ..model.tokens import Tokens
from ..stage.context import StageContext
from ..stage.unit_identity import SAMPLING_KEYS, checkpoint_digest, training_identity
from ..store.shared_store import StoredUnit
from ..store.store import MadeFrom
from .coupled import applied, metric_of, stored_coupled
from .kronecker import Gradients
from .layer_shares import Coupling, capped_layers, check_shares, couplings, stored_shares
from .lissa import lissa
from .passes import BATCHING_ERROR
from .preconditioner import PreconditionerBlock
from .projection import join_layers, probes, split_layers
from .second_moments import preconditioner_blocks
from .stored_curvature import StoredCurvature
from .unit_names import (
    at_point,
    coupled_from,
    coupled_unit,
    kernel_from,
    kernel_unit,
    preconditioner_from,
    shares_unit,
    statistics_unit,
)

_INDEFINITE = 1e-3  # by so much of the largest an eigenvalue of a sum of squares may be below 0, for rounding
_STATISTICS = ("gradients", "curvature")


def checkpoint_statistics(context: StageContext, train_from: MadeFrom) -> Tensor:
    """[C, F]: what tells a stage's checkpoints apart, from the units that `fit` made.

    One half of a row are sketches of the training gradients of the same examples, the other half are second moments of
    sketched pseudo-gradients. Each half has a mean square norm of 1 over the checkpoints, so that squared distances are
    relative changes.
    """
    gradients, second_moments = [], []
    for index in range(len(context.trajectory)):
        point = Point.at(context.stage, index)
        made_from = at_point(train_from, context, point)
        unit = context.store.open(statistics_unit(context, point), made_from, (*SAMPLING_KEYS, "dtype"))
        rows = {
            kind: [unit.tensor(f"{name}.{kind}", (None, None)) for name in context.layers.tracked]
            for kind in _STATISTICS
        }
        gradients.append(torch.cat([sketch.flatten() for sketch in rows["gradients"]]))
        second_moments.append(torch.cat([(sketch.mT @ sketch).flatten() for sketch in rows["curvature"]]))
    if (
        len({len(row) for row in gradients}) > 1
        or len({len(row) for row in second_moments}) > 1
        or not len(gradients[0])
    ):
        raise StoreError(
            f"{context.store.on_rank_0.root}: the statistics of the checkpoints are of other examples. Remove the "
            "units called statistics, and run Analyzer.fit() with this store."
        )
    halves = (torch.stack(checkpoints) for checkpoints in (gradients, second_moments))
    return torch.cat([half / half.square().sum(1).mean().sqrt().clamp_min(1e-300) for half in halves], 1) / 2**0.5


class FittedFactors:
    """What `fit` left in the store for every stage of a run, read when asked for; only inside `observing(model)`.

    Its methods answer what a plan's operators need, and remember what was asked for last.

    Args:
        contexts: the context of each stage.
        trains: the training data of each stage.
    """

    def __init__(self, contexts: Sequence[StageContext], trains: Sequence[Any]):
        self.contexts, self.trains = contexts, trains
        self.loss_view = lru_cache(None)(self._loss_view)
        self.train_from = lru_cache(None)(self._train_from)
        self.curvature = lru_cache(2)(self._curvature)
        self.preconditioner = lru_cache(4)(self._preconditioner)
        self.kernel = lru_cache(1)(self._kernel)
        self.shares = lru_cache(None)(self._shares)
        self.couplings = lru_cache(None)(self._couplings)
        self.traces = lru_cache(None)(self._traces)
        self.sampled = lru_cache(1)(self._sampled)

    def _loss_view(self, stage: int) -> LossView:
        """A stage's model seen through its training loss."""
        self.contexts[stage].load(self.contexts[stage].last)
        return self.contexts[stage].loss_view("train", self.trains[stage])

    def _train_from(self, stage: int) -> dict[str, Any]:
        """What the units of a stage's training data are made of."""
        return training_identity(self.contexts[stage], self.trains[stage], self.loss_view(stage))

    def _curvature(self, curvature: Curvature) -> StoredCurvature:
        """A curvature's blocks."""
        stage, scaled = curvature.stage, curvature.scaled
        preconditioner = self.preconditioner(scaled) if scaled is not None else None
        context, train_from, view = self.contexts[stage], self.train_from(stage), self.loss_view(stage)
        return StoredCurvature(context, curvature, train_from, view, preconditioner)

    def _preconditioner(self, preconditioner: Preconditioner) -> Mapping[str, PreconditionerBlock]:
        """A preconditioner's block of each layer."""
        stage = preconditioner.stage
        context, train_from, view = self.contexts[stage], self.train_from(stage), self.loss_view(stage)
        return preconditioner_blocks(context, preconditioner, train_from, view)

    def _shares(self, stage: int) -> dict[str, float]:
        """Of each layer the share of a stage's training examples that reach it."""
        return stored_shares(self.contexts[stage], self.train_from(stage))

    def share(self, operator: Spectral, layer: str) -> float | None:
        """The share of the examples that reach a layer, where an operator on it depends on that; LayerError for 0."""
        context = self.contexts[operator.stage]
        if not operator.needs_share(context.parameter_groups[layer]):
            return None
        shares = self.shares(operator.stage)
        check_shares(context, shares, [layer])
        return shares[layer]

    def _couplings(self, operator: Spectral) -> dict[str, Coupling]:
        """Each layer among coupled ones; nothing for an operator whose layers are apart."""
        shares = operator.trace_shares
        if shares is None:
            return {}
        traces, groups = self.traces(shares.curvature), self.contexts[operator.stage].parameter_groups
        rates = {
            name: operator.counts(groups[name], self.share(operator, name)) * shares.rates[groups[name]]
            for name in traces
        }
        return couplings(traces, rates)

    def _traces(self, curvature: Curvature) -> dict[str, float]:
        """Each layer's trace."""
        return self.curvature(curvature).traces()

    def told_trace_shares(self, plan: Plan) -> dict[str, dict[str, float]]:
        """The layers' shares of rate * trace that a plan uses, for provenance: for each curvature in words."""
        return {
            in_words(self.contexts[operator.stage], operator.trace_shares.curvature.points): {
                name: coupling.share for name, coupling in self.couplings(operator).items()
            }
            for operator in trace_shares(plan)
            if operator.trace_shares is not None
        }

    def _kernel_unit(self, inverse: ProjectedInverse) -> StoredUnit:
        stage = inverse.stage
        context, view = self.contexts[stage], self.loss_view(stage)
        made_from = kernel_from(context, inverse, self.train_from(stage), view, self.trains[stage])
        return context.store.open(kernel_unit(context, inverse), made_from)

    def _kernel(self, inverse: ProjectedInverse) -> tuple[Tensor, Tensor]:
        """The eigenvectors of a projected second moment [k, k], and the damped inverse of its eigenvalues [k]."""
        view = self.loss_view(inverse.stage)
        width = inverse.projection.dimension or sum(
            P * O * I for P, O, I in (each.shape for each in view.layers.values())
        )
        kernel = self._kernel_unit(inverse).tensor("kernel", (width, width), view.device)
        sigma, vectors = torch.linalg.eigh(kernel.double())
        if sigma[0] < -_INDEFINITE * sigma.abs().max():
            raise FactorError(
                f"{kernel_unit(self.contexts[inverse.stage], inverse)}: a second moment with the eigenvalue "
                f"{sigma[0].item():g}, expected none below 0. Remove the unit, and run Analyzer.fit() with this store."
            )
        damping = HEURISTIC_SHARE * sigma.mean() if inverse.damping is None else inverse.damping
        rounding = len(sigma) * torch.finfo(kernel.dtype).eps  # of a sum of outer products in the kernel's precision
        return vectors, damped_inverse(sigma.clamp_min(0), damping, rounding)

    def batching_error(self, plan: Plan) -> float | None:
        """The largest relative error of the plan's batched second moments, as `fit` measured it; None without any."""
        batched = [curvature for curvature in curvatures(plan) if curvature.batch > 1]
        units = [unit for curvature in batched for unit in self.curvature(curvature).eigenvalue_units]
        units += [self._kernel_unit(inverse) for inverse in projected(plan) if inverse.batch > 1]
        return max((unit.tensor(BATCHING_ERROR, (), kind="nonnegative").item() for unit in units), default=None)

    def described(self, operator: Operator) -> dict[str, Any]:
        """What an operator does; its checkpoints are told by their contents, not by their place in a trajectory."""
        described = {"operator": type(operator).__name__, **_as_json(asdict(operator))}  # type: ignore[call-overload]
        context = self.contexts[getattr(operator, "stage", -1)]
        if isinstance(operator, Spectral) and (capped := sorted(capped_layers(context, [operator]))):
            described["shares"] = [self.shares(operator.stage)[layer] for layer in capped]
        for name, value in vars(operator).items():
            described[name] = self._by_contents(described.get(name), value)
        return described

    def _by_contents(self, written: Any, part: Any) -> Any:
        """A part of an operator as it is written down, where its checkpoints are told by their contents."""
        context = self.contexts[getattr(part, "stage", -1)]
        if isinstance(part, Curvature | SampledFisher):
            written |= {"points": [checkpoint_digest(context, point) for point in part.points]}
            if part.scaled is not None:
                written["scaled"] = preconditioner_from(context, part.scaled)
        elif isinstance(part, TraceShares):
            written["curvature"] = self._by_contents(written["curvature"], part.curvature)
        elif isinstance(part, Preconditioner):
            written = preconditioner_from(context, part)
        elif isinstance(part, Point):
            written = checkpoint_digest(context, part)
        return written

    def parameter_group(self, stage: int, layer: str) -> int | None:
        """The optimizer's parameter group of a layer in a stage; None if the stage did not train the layer."""
        return self.contexts[stage].parameter_groups.get(layer)

    def inverse(self, operator: ProjectedInverse | IterativeInverse, values: Gradients) -> Gradients:
        """An inverse that mixes the layers, applied to the gradients of queries."""
        view = self.loss_view(operator.stage)
        if isinstance(operator, ProjectedInverse):
            return self._projected_inverse(operator, view, values)
        context = self.contexts[operator.stage]
        context.load(operator.point)
        weights_N = context.example_weights(operator.point)
        reader = context.train_reader(self.trains[operator.stage])
        return lissa(view, reader, context.settings.views, operator, values, weights_N)

    def _projected_inverse(self, operator: ProjectedInverse, view: LossView, values: Gradients) -> Gradients:
        """R (R^T F R + damping)^-1 R^T of each query, R being the projection and F the second moment."""
        projection, shapes = operator.projection, {name: layer.shape for name, layer in view.layers.items()}
        probes_of = probes(projection, shapes, view.dtype, view.device)
        features_Qk = join_layers({n: probes_of[n].of_gradients(v) for n, v in values.items()}, projection)
        vectors, inverse = self.kernel(operator)
        solved_Qk = (features_Qk.double() @ vectors * inverse) @ vectors.mT
        by_layer = split_layers(solved_Qk.to(view.dtype), probes_of, projection)
        return {name: probe.gradients(by_layer[name]) for name, probe in probes_of.items()}

    def coupled(self, operator: CoupledFunction, values: Gradients) -> Gradients:
        """A function of the curvature of all layers together, applied to the gradients of queries."""
        fisher, context = operator.fisher, self.contexts[operator.stage]
        groups = context.parameter_groups
        metric = metric_of(self.loss_view(operator.stage), fisher, groups, self.preconditioner)
        shifts = {name: operator.shift[groups[name]] for name in values}
        return applied(operator.kind, values, shifts, metric, *self.sampled(fisher), context.memory)

    def _sampled(self, fisher: SampledFisher) -> tuple[dict[str, Tokens], tuple[Tensor, Tensor]]:
        """The pseudo-gradients' tokens, and the spectrum, of a curvature of all layers together."""
        context, view = self.contexts[fisher.stage], self.loss_view(fisher.stage)
        made_from = coupled_from(context, fisher, self.train_from(fisher.stage), view)
        return stored_coupled(context.store.open(coupled_unit(context, fisher), made_from, SAMPLING_KEYS), view)

    def unit_names(self, term: Term) -> tuple[str, ...]:
        """The names of the units that a term's operators are made of."""
        pools = dict.fromkeys(
            unit for curvature in curvatures((term,)) for unit in self.curvature(curvature).unit_names
        )
        kernels = (kernel_unit(self.contexts[inverse.stage], inverse) for inverse in projected((term,)))
        pools |= {coupled_unit(self.contexts[fisher.stage], fisher): None for fisher in fishers((term,))}
        operators = spectral((term,))
        capped = (shares_unit(context) for context in self.contexts if capped_layers(context, operators))
        return (*pools, *kernels, *capped)


def in_words(context: StageContext, points: Sequence[Point]) -> str:
    """Where a curvature is fitted."""
    return "; ".join(context.where(point) for point in points)


def _as_json(nested: Any) -> Any:
    """The same, where a rate that is not known is called so: JSON has no NaN."""
    if isinstance(nested, dict):
        return {key: _as_json(value) for key, value in nested.items()}
    if isinstance(nested, list | tuple):
        return [_as_json(value) for value in nested]
    return "unknown" if isinstance(nested, float) and math.isnan(nested) else nested
