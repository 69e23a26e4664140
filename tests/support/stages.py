"""Training in stages that differ in everything, and dense formulas in float64 for the data of any of its stages.

Stages differ in size, loss, collate function, optimizer, rates, weight decay, parameter groups and, where asked, in how
often their examples were drawn. Nothing here is computed by segflow: whatever a formula takes from the wrong stage
shows in the scores. Letters as in `oracles`: D parameters of a layer, Q queries, K groups, N examples of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

import segflow as sf

from . import oracles
from .helpers import FixedLabels, analyzer_of, mlp, perturbed_states, trajectory_of, vectors

QUERIES, EPS, STEPS, NEAREST = 3, 1e-3, 20, 15  # two checkpoints: the first stands for 15 of 20 steps
LAYERS = ("0", "2", "4")
Weights = tuple[tuple[int, float], ...]
FIRST: Weights = ((0, 1.0),)
LAST: Weights = ((1, 1.0),)


class Recipe(NamedTuple):
    """An optimizer's numbers; coupled: whether weight decay goes through P; preconditioned: whether there is a P."""

    name: str
    lr: float
    weight_decay: float
    momentum: float = 0.0

    @property
    def coupled(self) -> bool:
        return self.name != "AdamW"

    @property
    def preconditioned(self) -> bool:
        return self.name != "SGD"


RECIPES = {
    "SGD": Recipe("SGD", 0.2, 0.05),
    "momentum": Recipe("SGD", 0.1, 0.3, 0.6),
    "AdamW": Recipe("AdamW", 2e-3, 8.0),
    "Adam": Recipe("Adam", 3e-3, 0.01),
    "RMSprop": Recipe("RMSprop", 1e-3, 0.02),
    "Adagrad": Recipe("Adagrad", 4e-3, 0.005),
}


class Scaled(FixedLabels):
    """A loss and an output that are other multiples of the usual ones in each stage."""

    def __init__(self, factor: float):
        super().__init__("margin")
        self.factor = factor

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return self.factor * super().compute_train_loss(batch, model, sample)

    def compute_output(self, batch: Any, model: nn.Module) -> Tensor:
        return self.factor**2 * super().compute_output(batch, model)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.factor**3 * super().compute_output(batch, model)


@dataclass(frozen=True)
class Collate:
    """Stacks examples, scaling and turning the inputs."""

    factor: float
    turn: int

    def __call__(self, examples: list[Any]) -> Any:
        inputs, labels = default_collate(examples)
        return self.factor * inputs.roll(self.turn, 1), labels


@dataclass(frozen=True)
class Stage:
    """One stage: its place and what it was trained with; weighted: whether its examples were drawn unequally."""

    place: int
    recipe: Recipe
    weighted: bool = False

    name = property(lambda self: ("pretrain", "midtrain", "finetune")[self.place])
    size = property(lambda self: (20, 13, 16)[self.place])
    data = property(lambda self: vectors(self.size, seed=21 + self.place))
    task = property(lambda self: Scaled((1.7, 0.6, 1.1)[self.place]))
    collate = property(lambda self: Collate((1.3, 0.8, 1.0)[self.place], self.place + 1))
    states = property(lambda self: perturbed_states(mlp(seed=self.place), 2, 0.2))

    def counts(self, weights: Weights) -> list[int]:
        """How often each example was drawn at a mean of checkpoints, in the least whole numbers."""
        first = [1 + (i + self.place) % 3 for i in range(self.size)]
        rows = (first, [*first[-1:], *first[:-1]]) if self.weighted else ([1] * self.size,) * 2
        means = [sum(weight * rows[index][i] for index, weight in weights) for i in range(self.size)]
        for times in range(1, 5):
            whole = [round(times * mean) for mean in means]
            if all(abs(times * mean - count) < 1e-9 for mean, count in zip(means, whole, strict=True)):
                return whole
        raise AssertionError(f"weights {weights}: expected multiples of a quarter, or no draws")

    def shares(self, weights: Weights) -> Tensor:
        counts = torch.tensor(self.counts(weights), dtype=torch.float64)
        return counts / counts.mean()

    @property
    def moments(self) -> list[dict[str, Tensor]]:
        """Second moments over eight orders of magnitude, others at each checkpoint."""
        generator = torch.Generator().manual_seed(31 + self.place)
        return [
            {n: 10 ** (-8 * torch.rand(v.shape, generator=generator).double()) for n, v in mlp().named_parameters()}
            for _ in range(2)
        ]

    def factor(self, layer: str) -> float:
        """The first and the third stage train the head in a parameter group of its own, at half the rate."""
        return 0.5 if layer.startswith("4") and self.place != 1 else 1.0

    def rates(self, layer: str) -> list[float]:
        """What each step's gradient is multiplied by in all steps: with momentum a geometric sum of those left."""
        lr, m = self.factor(layer) * self.recipe.lr, self.recipe.momentum
        return [lr * (1 - m**left) / (1 - m) for left in range(STEPS, 0, -1)]

    def trajectory(self, folder: Path) -> sf.Trajectory:
        recipe, constants = self.recipe, {"eps": EPS, "beta1": 0.0} if self.recipe.preconditioned else {}
        moments = self.moments if recipe.preconditioned else None
        made = trajectory_of(folder / self.name, self.states, self.size, second_moments=moments, name=recipe.name)
        groups = {name: int(self.factor(name) < 1) for name, _ in mlp().named_parameters()}
        rates = torch.tensor([recipe.lr, recipe.lr / 2][: 1 + max(groups.values())], dtype=torch.float64)
        files = [folder / self.name / f"moments-{index}.safetensors" for index in range(2)]
        optimizer = sf.OptimizerConstants(
            recipe.name, momentum=recipe.momentum, weight_decay=recipe.weight_decay, **constants
        )
        return sf.Trajectory(
            made.checkpoints,
            made.steps,
            rates.expand(STEPS, -1),
            self.size,
            optimizer,
            groups,
            stage=self.name,
            second_moments=files if recipe.preconditioned else None,
            example_weights=torch.stack([self.shares(of) for of in (FIRST, LAST)]) if self.weighted else None,
        )


@dataclass
class Dense:
    """Naive gradients of one stage's data, or of the queries, at one point, and the curvatures made of them.

    weights: of the stage's checkpoints, whose draws count there.
    """

    stage: Stage
    state: dict[str, Tensor]
    data: TensorDataset
    weights: Weights = LAST
    model: nn.Module = field(default_factory=mlp)

    def __post_init__(self) -> None:
        self.model.load_state_dict(self.state)
        self.layers = {name: dict(self.model.named_modules())[name] for name in LAYERS}
        self.drawn = [i for i, count in enumerate(self.stage.counts(self.weights)) for _ in range(count)]
        self.gradients = cache(self._gradients)
        self.fit = cache(self._fit)

    def loss(self, kind: str) -> Callable[[int], Tensor]:
        def of(index: int) -> Tensor:
            batch = self.stage.collate([self.data[index]])
            if kind in ("measurement", "output"):
                return getattr(self.stage.task, f"compute_{kind}")(batch, self.model)
            return self.stage.task.compute_train_loss(batch, self.model, sample=kind == "sample")

        return of

    def _gradients(self, kind: str, drawn: bool = False) -> dict[str, Tensor]:
        examples = self.drawn if drawn else list(range(len(self.data)))
        rows = oracles.example_gradients(self.model, self.layers, lambda k: self.loss(kind)(examples[k]), len(examples))
        return {name: row_nPOI[:, 0] for name, row_nPOI in rows.items()}

    def _fit(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        drawn, sample = self.drawn, self.loss("sample")
        covariances = oracles.naive_covariances(self.model, self.layers, lambda k: sample(drawn[k]), len(drawn))
        sampled = self.gradients("sample", True)
        return {name: (*covariances[name], sampled[name][:, None]) for name in LAYERS}

    def curvature(self, layer: str, kind: str) -> Tensor:
        A, S, sampled = self.fit()[layer]
        if kind == "kfac":
            return torch.kron(S[0], A[0])
        if kind == "diagonal":
            return torch.diag(sampled.square().mean(0).flatten())
        return oracles.dense_curvature(*oracles.pooled_ekfac([(A, S, sampled)]))[0]

    def representations(self) -> Tensor:
        with torch.no_grad():
            return self.model[:4](self.stage.collate([self.data[i] for i in range(len(self.data))])[0])


class Course:
    """Several stages, one after the other; scores of one stage's data by dense formulas, and by segflow.

    Args:
        recipes: each stage's optimizer, by its name in RECIPES.
        weighted: whether each stage drew its examples unequally.
    """

    def __init__(self, *recipes: str, weighted: bool = False):
        self.stages = stages = [Stage(place, RECIPES[name], weighted) for place, name in enumerate(recipes)]
        self.query = vectors(QUERIES, seed=41)
        self.final = stages[-1].states[-1]
        self.at = cache(self._at)
        self.asked = cache(self._asked)

    def groups(self, place: int) -> sf.Groups:
        size = self.stages[place].size
        return sf.Groups.from_lists([[0, 3, 5], range(6, size), [1], [2, 4]], size)

    def trajectory(self, folder: Path) -> sf.Trajectory:
        run, *later = [stage.trajectory(folder) for stage in self.stages]
        for trajectory in later:
            run = trajectory.after(run)
        return run

    def scored(self, folder: Path, method: Any, place: int, **options: Any) -> sf.Scores:
        """segflow's scores of one stage's data, in a store of its own."""
        run = self.trajectory(folder)
        tasks, collates = ({s.name: getattr(s, of) for s in self.stages} for of in ("task", "collate"))
        analyzer = analyzer_of(mlp(), run, folder / "store", task=tasks, method=method, collate_fn=collates)
        data = {stage.name: stage.data for stage in self.stages}
        analyzer.fit(data, batch_size=7)
        return analyzer.score(
            self.groups(place), data, self.query, stage=self.stages[place].name, batch_size=6, **options
        )

    def _at(self, place: int, point: int | str) -> Dense:
        """A stage's data at one of its checkpoints, at their weighted mean ("mean"), or at the end ("final")."""
        stage = self.stages[place]
        states = {"final": self.final, 0: stage.states[0], 1: stage.states[1]}
        if point == "mean":
            one, two = self.weights(place)
            states["mean"] = {n: one * v + two * stage.states[1][n] for n, v in stage.states[0].items()}
        weights = {0: FIRST, "mean": tuple(enumerate(self.weights(place)))}.get(point, LAST)
        return Dense(stage, states[point], stage.data, weights)

    def _asked(self, place: int = -1, checkpoint: int = 1) -> Dense:
        """The queries at a stage's checkpoint, as the last stage's task measures them."""
        return Dense(self.stages[-1], self.stages[place].states[checkpoint], self.query)

    def weights(self, place: int) -> tuple[float, float]:
        """How the stage's two checkpoints weigh."""
        rates = self.stages[place].rates("0")
        return sum(rates[:NEAREST]) / sum(rates), sum(rates[NEAREST:]) / sum(rates)

    def grouped(self, place: int, point: int | str, layer: str, kind: str = "train") -> Tensor:
        """[K, D]: sums of a stage's training gradients, each times its example's share."""
        at = self.at(place, point)
        rows = at.gradients(kind)[layer].flatten(1) * at.stage.shares(at.weights)[:, None]
        return torch.stack([rows[list(members)].sum(0) for members in self.groups(place).members])

    def queries(self, layer: str, *at: int) -> Tensor:
        return self.asked(*at).gradients("measurement")[layer].flatten(1)

    # ---- methods ----

    def over_layers(self, place: int, score: Callable[[str], Tensor]) -> Tensor:
        """The layers' sum of products, over the size of the stage."""
        return torch.stack([score(layer) for layer in LAYERS]).sum(0) / self.stages[place].size

    def dot(self, place: int) -> Tensor:
        return self.over_layers(place, lambda layer: self.queries(layer) @ self.grouped(place, "final", layer).T)

    def cosine(self, place: int) -> Tensor:
        asked = torch.cat([self.queries(layer) for layer in LAYERS], 1)
        rows = torch.cat([self.grouped(place, "final", layer) for layer in LAYERS], 1)
        return (asked / asked.norm(dim=1, keepdim=True)) @ (rows / rows.norm(dim=1, keepdim=True)).T

    def influence(self, place: int, kind: str, damping: float) -> Tensor:
        def score(layer: str) -> Tensor:
            grouped, asked = self.grouped(place, "final", layer), self.queries(layer)
            if kind == "identity":
                return asked @ grouped.T / (1 + damping)
            curvature = self.at(place, "final").curvature(layer, kind)
            return oracles.influence_scores(asked, curvature, damping, grouped, 1)

        return self.over_layers(place, score)

    def rate_weighted(self, place: int, final_query: bool) -> Tensor:
        """TracIn, or Hydra where queries are at the end."""

        def score(layer: str) -> Tensor:
            rates, total = self.stages[place].rates(layer), torch.zeros(())
            for index, own in enumerate((rates[:NEAREST], rates[NEAREST:])):
                asked = self.queries(layer) if final_query else self.queries(layer, place, index)
                total = total + sum(own) * asked @ self.grouped(place, index, layer).T
            return total

        return self.over_layers(place, score)

    def projected(self, place: int, kind: str, damping: float) -> Tensor:
        """TRAK ("output") and the empirical Fisher ("train") where nothing is projected."""
        of = self.at(place, "final").gradients(kind, True)
        features, asked, grouped = (
            torch.cat(parts, 1)
            for parts in (
                [of[layer].flatten(1) for layer in LAYERS],
                [self.queries(layer) for layer in LAYERS],
                [self.grouped(place, "final", layer) for layer in LAYERS],
            )
        )
        kernel = features.T @ features / len(features)
        return oracles.influence_scores(asked, kernel, damping, grouped, self.stages[place].size)

    def similarity(self, place: int, cosine: bool) -> Tensor:
        trained, asked = self.at(place, "final").representations(), self.asked().representations()
        if cosine:
            trained, asked = (rows / rows.norm(dim=1, keepdim=True) for rows in (trained, asked))
        grouped = torch.stack([trained[list(members)].sum(0) for members in self.groups(place).members])
        return asked @ grouped.T / (1 if cosine else self.stages[place].size)

    def exact_inverse(self, place: int, damping: float) -> Tensor:
        """(H + damping)^-1 with the exact Hessian of the stage's mean loss at the end."""
        stage, model = self.stages[place], mlp()
        model.load_state_dict(self.final)
        names = [f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")]
        parameters = dict(model.named_parameters())
        shapes = [parameters[name].shape for name in names]

        def gradient_of(data: Any, task: Callable[..., Tensor], collate: Collate) -> Callable[[Tensor], Tensor]:
            def loss(flat: Tensor) -> Tensor:
                parts = [p.reshape(s) for p, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
                values = dict(zip(names, parts, strict=True))
                return task(collate(data), lambda x: torch.func.functional_call(model, values, (x,)))

            return loss

        flat = torch.cat([parameters[name].detach().flatten() for name in names])
        examples, last = [stage.data[i] for i in range(stage.size)], self.stages[-1]
        whole = gradient_of(examples, stage.task.compute_train_loss, stage.collate)
        hessian = torch.autograd.functional.hessian(whole, flat) / stage.size
        rows, asked = (
            torch.stack([torch.func.grad(gradient_of([one], task, collate))(flat) for one in data])
            for data, task, collate in (
                (examples, stage.task.compute_train_loss, stage.collate),
                ([self.query[i] for i in range(QUERIES)], last.task.compute_measurement, last.collate),
            )
        )
        grouped = torch.stack([rows[list(members)].sum(0) for members in self.groups(place).members])
        return oracles.influence_scores(asked, hessian, damping, grouped, stage.size)

    def source(self, place: int, method: sf.Source) -> Tensor:
        """SOURCE with one segment a stage: each later stage's decay, last to first, then what the stage learned."""

        def score(layer: str) -> Tensor:
            walked = self.queries(layer)
            if method.query_points == "run":
                walked = sum(w * self.queries(layer, -1, index) for index, w in enumerate(self.weights(-1)))
            for later in range(len(self.stages) - 1, place, -1):
                walked = walked @ self.operators(later, layer, method)[1]
            learned = walked @ self.operators(place, layer, method)[0]
            points, weights = self.pool(place, method.fast)
            return learned @ sum(w * self.grouped(place, p, layer) for w, p in zip(weights, points, strict=True)).T

        return self.over_layers(place, score)

    def operators(self, place: int, layer: str, method: sf.Source) -> tuple[Tensor, Tensor]:
        """[D, D]: what a stage learns of a query (a row), and what it forgets of it."""
        stage, share = self.stages[place], self.share(place, layer, method) if method.layers == "coupled" else 1.0
        (sigma, U), rate, decay = (
            self.spectrum(place, layer, method),
            sum(stage.rates(layer)),
            stage.recipe.weight_decay,
        )
        P = self.harmonic(place, layer, method.preconditioner).flatten()
        shifts = rate * decay * (U.square().T @ P if stage.recipe.coupled else torch.ones_like(sigma))
        sigma = sigma / share
        kept = torch.exp(-rate * sigma - shifts)
        if self.hybrid(place, method):
            points, weights = self.pool(place, method.fast)
            fits = [self.at(place, point).fit()[layer] for point in points]
            plain = oracles.dense_curvature(*oracles.pooled_ekfac(fits, weights))[0] / share
            damping = 0.1 * plain.diagonal().mean() + decay * stage.recipe.coupled
            inverse = torch.linalg.inv(plain + damping * torch.eye(len(kept), dtype=torch.float64))
            return torch.diag(1 - kept) @ inverse, torch.diag(kept)
        answer = torch.stack([oracles.response(rate, s.item())(x) for x, s in zip(sigma, shifts, strict=True)])
        learn, forget = (U @ torch.diag(f) @ U.T for f in (answer, kept))
        return P.sqrt()[:, None] * learn * P.sqrt(), P.sqrt()[:, None] * forget / P.sqrt()

    def spectrum(self, place: int, layer: str, method: sf.Source) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the curvature in the exponential, of a layer by itself."""
        P, (points, weights) = self.harmonic(place, layer, method.preconditioner), self.pool(place, method.fast)
        fits = [self.at(place, point).fit()[layer] for point in points]
        if self.hybrid(place, method):
            diagonal = sum(w * fit[2].square().mean(0).flatten() for w, fit in zip(weights, fits, strict=True))
            return P.flatten() * diagonal, torch.eye(P.numel(), dtype=torch.float64)
        Q_A, Q_S, sigma = oracles.pooled_ekfac([oracles.scaled_fit(fit, P) for fit in fits], weights)
        return sigma.flatten(), torch.kron(Q_S[0], Q_A[0])

    def share(self, place: int, layer: str, method: sf.Source) -> float:
        """A layer's share of a stage's rate * trace."""
        traces = {name: float(self.spectrum(place, name, method)[0].sum()) for name in LAYERS}
        return oracles.trace_shares(traces, {name: sum(self.stages[place].rates(name)) for name in LAYERS})[layer]

    def hybrid(self, place: int, method: sf.Source) -> bool:
        """Whether a stage has the hybrid (SOURCE App. C): a diagonal exponential, and damped EK-FAC in the inverse."""
        return method.preconditioner == "diagonal" and self.stages[place].recipe.preconditioned

    def pool(self, place: int, fast: bool) -> tuple[Sequence[Any], Sequence[float]]:
        """Where a stage's gradients and curvature are taken, and how these points weigh."""
        return (("mean",), (1.0,)) if fast else ((0, 1), self.weights(place))

    def harmonic(self, place: int, layer: str, form: str) -> Tensor:
        """P [1, O, I]: one over the weighted mean of sqrt(second moment) + eps, or 1 where there is none."""
        moments = [
            oracles.layer_matrix(dict(mlp().named_modules())[layer], m[f"{layer}.weight"], m[f"{layer}.bias"])
            for m in self.stages[place].moments
        ]
        P = oracles.preconditioner(moments, EPS, self.weights(place))
        return P if self.stages[place].recipe.preconditioned and form != "none" else torch.ones_like(P)
