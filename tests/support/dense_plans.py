"""What any plan's terms mean, in dense matrices: another reading of `segflow.methods.plan`, layer by layer.

Quantities are those of a `Course`, whose models have layers of one position. Letters as in `oracles`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from segflow.methods import Curvature, Plan, Point, Preconditioner, Scale, Spectral, Term, TraceShares, UnitNorm

from . import oracles
from .helpers import mlp
from .stages import EPS, FIRST, LAST, LAYERS, Course, Dense


class DensePlans:
    """Scores of a course's data by a method's plan."""

    def __init__(self, course: Course):
        self.course = course
        self.at = cache(self._at)

    def scores(self, plan: Plan, place: int) -> dict[str, Tensor]:
        """[Q, K] of each term, by its label."""
        return {term.label: self._term(term, place) for term in plan}

    def _at(self, place: int | None, point: Point) -> Dense:
        """A stage's data (None: the queries) at a point."""
        states = self.course.stages[point.stage].states
        state = {n: sum(w * states[index][n] for index, w in point.weights) for n in states[0]}
        if place is None:
            return Dense(self.course.stages[-1], state, self.course.query)
        weights = point.weights if point.stage == place else LAST if place < point.stage else FIRST
        return Dense(self.course.stages[place], state, self.course.stages[place].data, weights)

    def _group(self, place: int, layer: str) -> int:
        return int(self.course.stages[place].factor(layer) < 1)

    def _term(self, term: Term, place: int) -> Tensor:
        asked = [self.at(None, point).gradients("measurement") for point in term.query_points]
        queries = {
            layer: sum(w * rows[layer].flatten(1) for w, rows in zip(term.query_weights, asked, strict=True))
            for layer in LAYERS
        }
        for operator in term.operators:
            queries = self._applied(operator, queries)
        stage, total = self.course.stages[place], torch.zeros((), dtype=torch.float64)
        for point, weight in zip(term.train, term.weights, strict=True):
            at = self.at(place, point)
            shares, real = stage.shares(at.weights)[:, None], at.gradients("train")
            rows = {layer: shares * real[layer].flatten(1) for layer in LAYERS}
            members = [list(group) for group in self.course.groups(place).members]
            summed = {layer: torch.stack([row[group].sum(0) for group in members]) for layer, row in rows.items()}
            norms = torch.cat([*summed.values()], 1).norm(dim=1) if term.normalized else stage.size
            for layer in LAYERS:
                own = weight[self._group(place, layer)] if isinstance(weight, tuple) else weight
                total = total + own * queries[layer] @ summed[layer].T / norms
        return total

    def _applied(self, operator: Any, queries: dict[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(operator, UnitNorm):
            norms = torch.cat([*queries.values()], 1).norm(dim=1, keepdim=True)
            return {layer: rows / norms for layer, rows in queries.items()}
        if isinstance(operator, Scale):
            P = operator.preconditioner
            return {n: rows * self.preconditioner(P, n).flatten() ** operator.power for n, rows in queries.items()}
        return {layer: rows @ self.function(operator, layer) for layer, rows in queries.items()}

    def function(self, operator: Spectral, layer: str) -> Tensor:
        """[D, D]: f of the curvature of one layer."""
        group, D = self._group(operator.stage, layer), self._shape(layer).numel()
        sigma, U = torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
        if operator.curvature is not None:
            sigma, U = self.eigen(operator.curvature, layer)
        if operator.trace_shares is not None:
            sigma = sigma / self.trace_shares(operator.trace_shares)[layer] ** operator.trace_shares.power
        shift = torch.full_like(sigma, operator.shift[group])
        if operator.shifted_by is not None:
            shift = shift + operator.coupled[group] * (
                U.square().T @ self.preconditioner(operator.shifted_by, layer).flatten()
            )
        return U @ torch.diag(_values(operator.kind, operator.amount[group], sigma, shift)) @ U.T

    def trace_shares(self, shares: TraceShares) -> dict[str, float]:
        """Each layer's share of rate * trace."""
        rates = {layer: shares.rates[self._group(shares.stage, layer)] for layer in LAYERS}
        traces = {layer: float(self.eigen(shares.curvature, layer)[0].sum()) for layer in LAYERS}
        return oracles.trace_shares(traces, rates)

    def eigen(self, curvature: Curvature, layer: str) -> tuple[Tensor, Tensor]:
        """Eigenvalues [D] and eigenvectors [D, D] of a layer's curvature."""
        group = self._group(curvature.stage, layer)
        weights = [weight[group] if isinstance(weight, tuple) else weight for weight in curvature.weights]
        fits = [self.at(curvature.stage, point).fit()[layer] for point in curvature.points]
        P = None if curvature.scaled is None else self.preconditioner(curvature.scaled, layer)
        if curvature.kind == "diagonal":
            squares = sum(w * fit[2].square().mean(0).flatten() for w, fit in zip(weights, fits, strict=True))
            return squares * (1 if P is None else P.flatten()), torch.eye(len(squares), dtype=torch.float64)
        fits = fits if P is None else [oracles.scaled_fit(fit, P) for fit in fits]
        Q_A, Q_S, Lambda = oracles.pooled_ekfac(fits, weights)
        if curvature.kind == "kfac":
            A, S = (sum(w * fit[side] for w, fit in zip(weights, fits, strict=True)) for side in (0, 1))
            Lambda = torch.einsum(
                "po,pi->poi", (Q_S.mT @ S @ Q_S).diagonal(0, 1, 2), (Q_A.mT @ A @ Q_A).diagonal(0, 1, 2)
            )
        return Lambda.flatten(), torch.kron(Q_S[0], Q_A[0])

    def preconditioner(self, preconditioner: Preconditioner, layer: str) -> Tensor:
        """[1, O, I]: one over the weighted mean of sqrt(second moment) + eps; 1 where the optimizer has no P."""
        stage, group = self.course.stages[preconditioner.stage], self._group(preconditioner.stage, layer)
        if not stage.recipe.preconditioned:
            return torch.ones(1, *self._shape(layer), dtype=torch.float64)
        module, moments = dict(mlp().named_modules())[layer], stage.moments
        own = [moments[index] for index, _ in preconditioner.weights]
        weights = [weight[group] if isinstance(weight, tuple) else weight for _, weight in preconditioner.weights]
        matrices = [oracles.layer_matrix(module, m[f"{layer}.weight"], m[f"{layer}.bias"]) for m in own]
        return oracles.preconditioner(matrices, EPS, weights)

    def _shape(self, layer: str) -> torch.Size:
        outputs, inputs = dict(mlp().named_parameters())[f"{layer}.weight"].shape
        return torch.Size((outputs, inputs + 1))


def _values(kind: str, amount: float | None, sigma: Tensor, shift: Tensor) -> Tensor:
    """A function's values at eigenvalues sigma, each with a shift of its own."""
    if kind == "constant":
        return torch.full_like(sigma, amount)
    if kind == "damped_inverse":
        return 1 / (sigma + shift + (0.1 * sigma.mean() if amount is None else amount))
    s = amount * sigma + shift
    if kind == "decay":
        return torch.exp(-s)
    if kind == "saturation":
        return -torch.expm1(-s)
    return torch.where(s == 0, amount, amount * -torch.expm1(-s) / s)
