"""What a method is made of: terms, the operators on their query side, and the curvatures that these need.

    score[q, g] = sum over terms of
        < O . grad f_q(theta_query) ,  sum over points c of weight_c * sum_{i in g} grad l_i(theta_c) > / N

is the predicted change of measurement q if group g were removed from training. A plan is pure data; the engine in
`scoring` gives it its meaning and knows nothing else about a method.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .spectra import damped_inverse, decay, response, saturation

HEURISTIC_SHARE = 0.1  # of a layer's mean eigenvalue; Grosse et al. 2023, arXiv 2308.03296
Weights = tuple[tuple[int, float], ...]  # (index of a checkpoint within its stage, weight); the weights sum to 1


@dataclass(frozen=True)
class Point:
    """Parameters at which something is evaluated: a stage's checkpoint, or the weighted mean of several."""

    stage: int
    weights: Weights

    @classmethod
    def at(cls, stage: int, checkpoint: int) -> Point:
        """One checkpoint."""
        return cls(stage, ((checkpoint, 1.0),))


@dataclass(frozen=True)
class Preconditioner:
    """P of the optimizer, averaged over checkpoints of a stage: 1 / (sqrt(second moment) + eps), elementwise."""

    stage: int
    weights: Weights


@dataclass(frozen=True)
class Curvature:
    """The curvature of a stage's objective, averaged over points.

    kind: "ekfac", "kfac" or "diagonal". scaled: the curvature of P^1/2 H P^1/2 instead of H; for "ekfac" and "kfac"
    with the rank-one part of P. batch: second moments are those of so many examples' summed gradients, over `batch`.
    """

    stage: int
    points: tuple[Point, ...]
    weights: tuple[float, ...]
    kind: str = "ekfac"
    scaled: Preconditioner | None = None
    batch: int = 1


@dataclass(frozen=True)
class Spectral:
    """A function of a curvature's eigenvalues (of sigma = 0 without a curvature).

    kind: "decay", "response", "saturation", "damped_inverse" or "constant". amount: lr_steps, the damping (None: the
    heuristic one) or the constant, and shift: weight decay added to the eigenvalues; one for each parameter group of
    `stage`. shifted_by: where weight decay is coupled, the shift is that of the preconditioned objective, shift * P.
    """

    stage: int
    kind: str
    curvature: Curvature | None
    amount: tuple[float | None, ...]
    shift: tuple[float, ...]
    shifted_by: Preconditioner | None = None

    def on(self, eigenvalues: Tensor, parameter_group: int, unit: Tensor | float = 1.0) -> Tensor:
        """The operator's own eigenvalues for a layer of that parameter group; unit: of the shift, P in that basis."""
        amount = self.amount[parameter_group]
        if self.kind == "constant":
            return eigenvalues.new_full((), amount or 0.0)
        sigma = eigenvalues + self.shift[parameter_group] * unit
        if self.kind == "damped_inverse":
            return damped_inverse(sigma, HEURISTIC_SHARE * eigenvalues.mean() if amount is None else amount)
        function = {"decay": decay, "response": response, "saturation": saturation}[self.kind]
        return function(sigma, amount or 0.0)


@dataclass(frozen=True)
class Scale:
    """Multiplies by P to a power, elementwise, in parameter space: where the exact P enters and leaves."""

    preconditioner: Preconditioner
    power: float


@dataclass(frozen=True)
class Projection:
    """Random rank-one probes (u_j, w_j) for each layer: feature j of a gradient G is the layers' sum of u_j^T G w_j.

    dimension: the number of features; None: every parameter is a feature of its own, nothing is random.
    """

    dimension: int | None
    seed: int


@dataclass(frozen=True)
class ProjectedInverse:
    """(R^T F R + damping)^-1 in a projection's features, F being a second moment of per-example gradients.

    features: of the "train" loss's gradients (an empirical Fisher), or of the task's "output" (TRAK). damping: None
    for 0.1 times the mean eigenvalue. batch: F is that of so many examples' summed gradients, over `batch`.
    """

    stage: int
    point: Point
    projection: Projection
    features: str
    damping: float | None
    batch: int = 1


@dataclass(frozen=True)
class IterativeInverse:
    """(H + damping)^-1 by LiSSA: `steps` products with the Hessian of batches of a stage's training loss.

    scale: divides the Hessian, at least half its largest eigenvalue; None estimates it.
    """

    stage: int
    point: Point
    damping: float
    steps: int
    sample_size: int
    repetitions: int
    seed: int
    scale: float | None


@dataclass(frozen=True)
class UnitNorm:
    """Brings each query gradient to norm 1, for cosines."""


Operator = Spectral | Scale | ProjectedInverse | IterativeInverse | UnitNorm


@dataclass(frozen=True)
class Term:
    """One term of a plan: where the query is, what happens to it, and which training gradients it meets.

    label: the term's name in `Scores.by_term`; stage: whose training data; operators: applied in order to the query
    gradient; train: the points, with `weights`. side: "gradient", or "representation" of the layer named in `layer`
    (None: the last tracked one), brought to norm 1 if `normalized`; of a group's gradient likewise.
    """

    label: str
    stage: int
    query: Point
    operators: tuple[Operator, ...]
    train: tuple[Point, ...]
    weights: tuple[float, ...]
    side: str = "gradient"
    normalized: bool = False
    layer: str | None = None


Plan = tuple[Term, ...]


def curvatures(plan: Plan) -> list[Curvature]:
    """The distinct curvatures that a plan needs, in order of first use."""
    operators = [op for term in plan for op in term.operators if isinstance(op, Spectral)]
    return list(dict.fromkeys(op.curvature for op in operators if op.curvature is not None))


def preconditioners(plan: Plan) -> list[Preconditioner]:
    """The distinct preconditioners that a plan needs."""
    found: list[Preconditioner | None] = []
    for op in (op for term in plan for op in term.operators):
        if isinstance(op, Scale):
            found.append(op.preconditioner)
        elif isinstance(op, Spectral):
            found += [op.shifted_by, op.curvature.scaled if op.curvature else None]
    return list(dict.fromkeys(one for one in found if one is not None))


def projected(plan: Plan) -> list[ProjectedInverse]:
    """The distinct inverses in a projection that a plan needs."""
    return list(dict.fromkeys(op for term in plan for op in term.operators if isinstance(op, ProjectedInverse)))
