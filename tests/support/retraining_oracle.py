"""What removing an example really changes: the training loop run again with that example's weight a little lower.

Nothing here imports segflow. A situation is a loop as a user would write it. It runs once with torch's optimizers, and
once more for all retrainings together: of R retrainings each layer's weight is [R, O, I] there, and the losses [R, B]
are weighted by [R, N]. What attribution holds fixed by design is replayed as the first run had it: the second moments
that Adam and its like divide by, clip factors, and the whole path of what another optimizer (Muon) trained. All steps
are so small that the change is of first order: what curvature does is below the tolerance.

Letters: B examples of a batch, C classes, I and O a layer's inputs and outputs, N training examples, Q queries, R runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_  # bound before anything records, as in most users' scripts

N, STEPS, INPUTS, HIDDEN, CLASSES = 24, 42, 5, 4, 3
LOWERED = 1e-3  # by how much a retraining raises or lowers one example's weight
ALL = torch.arange(N)
_draws = torch.Generator().manual_seed(7)
X = torch.randn(N, INPUTS, generator=_draws, dtype=torch.float64)
Y = torch.randint(0, CLASSES, (N,), generator=_draws)
KIND = (ALL >= 2 * N // 3).long()  # the type of each example's data, 0 or 1, where a model has a head for each


class Net(nn.Module):
    """tanh(body x) into one head or two; no biases."""

    def __init__(self, heads: str = "a"):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(INPUTS, HIDDEN, bias=False)
        for head in heads:
            self.add_module(head, nn.Linear(HIDDEN, CLASSES, bias=False))
        self.double()

    def forward(self, x: Tensor, head: str = "a") -> Tensor:
        return self.get_submodule(head)(torch.tanh(self.body(x)))

    def layers(self) -> dict[str, nn.Module]:
        return dict(self.named_children())


class _Stacked(nn.Module):
    """A linear layer of many runs: weight [R, O, I]."""

    def __init__(self, layer: nn.Linear, runs: int):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().repeat(runs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


def stacked(model: Net, runs: int) -> Net:
    """The model of many runs that begin alike."""
    many = copy.deepcopy(model)
    for name, layer in model.layers().items():
        many.add_module(name, _Stacked(layer, runs))
    return many


def losses(model: nn.Module, x: Tensor, y: Tensor, kind: Tensor, asks: str) -> Tensor:
    """Each example's training loss, [B] or [R, B].

    asks: the head that is asked, "both" for the sum of the two heads' losses, or "own" for that of the example's kind.
    """
    if asks == "both":
        return losses(model, x, y, kind, "a") + losses(model, x, y, kind, "b")
    logits = torch.where(kind[:, None] == 0, model(x, "a"), model(x, "b")) if asks == "own" else model(x, asks)
    return -(logits.log_softmax(-1) * nn.functional.one_hot(y, CLASSES)).sum(-1)


# ---- queries: linear functions of one layer's final weights, and losses ----


@dataclass(frozen=True)
class Queries:
    """Rows (place, inputs, outputs, x, y, kind): y^T W x of the layer at `place`, or of place -1 the loss of (x, y)."""

    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: Net, each: int = 3) -> Queries:
        generator = torch.Generator().manual_seed(8)
        places = [-1, *range(len(model.layers()))]
        place = torch.tensor(places).repeat_interleave(each)
        sizes = (len(place), INPUTS), (len(place), HIDDEN), (len(place), INPUTS)
        inputs, outputs, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
        y = torch.randint(0, CLASSES, (len(place),), generator=generator)
        return cls((place, inputs, outputs, x, y, torch.arange(len(place)) % 2))


def measurements(model: nn.Module, batch: Sequence[Tensor], asks: str) -> Tensor:
    """Each query's value, [Q] or [R, Q]."""
    place, inputs, outputs, x, y, kind = batch
    values = (place == -1) * losses(model, x, y, kind, asks)
    for number, layer in enumerate(dict(model.named_children()).values()):
        O, I = layer.weight.shape[-2:]
        values = values + (place == number) * (layer(inputs[:, :I]) * outputs[:, :O]).sum(-1)
    return values


# ---- runs ----


@dataclass
class Tape:
    """What the first run had and the retrainings replay, in the order of the steps."""

    factors: list[float] = field(default_factory=list)  # of clipping by norm, one for each call
    divisors: dict[int, list[list[Tensor | None]]] = field(default_factory=dict)  # [optimizer][step][parameter]
    paths: dict[int, list[list[Tensor]]] = field(default_factory=dict)  # of optimizers that are replayed as a whole


class Run:
    """One run as its loop sees it: the first, which fills the tape, or all retrainings, which read it.

    weights: of the examples, [N] in the first run and [R, N] in retrainings.
    """

    def __init__(self, model: Net, weights: Tensor, tape: Tape | None = None, asks: str = "a", clip_anew: bool = False):
        self.model, self.weights, self.asks, self.clip_anew = model, weights, asks, clip_anew
        self.tape, self.first = tape or Tape(), tape is None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.losses: list[float] = []
        self._factors: Iterator[float] = iter(self.tape.factors)

    def optimizer(self, kind: type[torch.optim.Optimizer], parameters: Any, **options: Any) -> torch.optim.Optimizer:
        """torch's optimizer in the first run; in retrainings one that replays what is held fixed."""
        number = len(self.optimizers)
        if kind is torch.optim.Muon and not self.first:
            made: torch.optim.Optimizer = _Replayed(parameters, self.tape.paths[number])
        else:
            made = kind(parameters, **options)
            if self.first:
                made.register_step_post_hook(lambda optimizer, *_: self._note(number, optimizer))
            elif kind is not torch.optim.SGD:
                made = _Divided(made, self.tape.divisors[number])
        self.optimizers.append(made)
        return made

    def _note(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        divisors = [divisor(optimizer, p, group) for group in optimizer.param_groups for p in group["params"]]
        self.tape.divisors.setdefault(number, []).append(divisors)
        if isinstance(optimizer, torch.optim.Muon):
            path = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
            self.tape.paths.setdefault(number, []).append(path)

    def loss(self, examples: Tensor = ALL, asks: str | None = None) -> Tensor:
        """The mean of some examples' losses, of retrainings summed over runs."""
        values = losses(self.model, X[examples], Y[examples], KIND[examples], asks or self.asks)
        loss = (self.weights[..., examples] * values).mean(-1).sum()
        self.losses.append(loss.item())
        return loss

    def clip(self, parameters: Any, max_norm: float, clip: Callable[..., Tensor] = clip_grad_norm_) -> None:
        """Clip by norm; retrainings multiply by the first run's factor, or each by its own where they clip anew."""
        parameters = list(parameters)
        if self.first:
            norm = clip(parameters, max_norm)
            self.tape.factors.append(min(1.0, max_norm / (float(norm) + 1e-6)))
            return
        factor: Any = next(self._factors)
        if self.clip_anew:
            squares = [p.grad.square().sum((1, 2), keepdim=True) for p in parameters if p.grad is not None]
            factor = (max_norm / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp_max(1)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def divisor(optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]) -> Tensor | None:
    """What a step that was just taken divided by, sqrt(v_hat) + eps; None where nothing moved or nothing divides."""
    state = optimizer.state.get(parameter, {})
    if parameter.grad is None or not {"exp_avg_sq", "square_avg"} & set(state):
        return None
    if "square_avg" in state:
        return state["square_avg"].sqrt() + float(group["eps"])
    corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    return corrected.sqrt() + float(group["eps"])


class _Divided(torch.optim.Optimizer):
    """Adam, AdamW and RMSprop as their papers write them, but with given divisors."""

    def __init__(self, like: torch.optim.Optimizer, divisors: list[list[Tensor | None]]):
        super().__init__(like.param_groups, like.defaults)
        self._rms, self._divisors = isinstance(like, torch.optim.RMSprop), iter(divisors)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        divisors = iter(next(self._divisors))
        for group in self.param_groups:
            for parameter in group["params"]:
                divisor = next(divisors)
                if parameter.grad is not None:
                    assert divisor is not None, "the first run did not move this parameter in this step"
                    (self._rms_move if self._rms else self._adam_move)(parameter, group, divisor)

    def _adam_move(self, parameter: Tensor, group: dict[str, Any], divisor: Tensor) -> None:
        state, (beta, _), lr, decay = self.state[parameter], group["betas"], group["lr"], group["weight_decay"]
        gradient = parameter.grad if group["decoupled_weight_decay"] else parameter.grad + decay * parameter
        if group["decoupled_weight_decay"]:
            parameter.mul_(1 - lr * decay)
        state["step"] = state.get("step", 0) + 1
        state["mean"] = beta * state.get("mean", 0) + (1 - beta) * gradient
        parameter.sub_(lr / (1 - beta ** state["step"]) * state["mean"] / divisor)

    def _rms_move(self, parameter: Tensor, group: dict[str, Any], divisor: Tensor) -> None:
        state = self.state[parameter]
        gradient = parameter.grad + group["weight_decay"] * parameter
        state["velocity"] = group["momentum"] * state.get("velocity", 0) + gradient / divisor
        parameter.sub_(group["lr"] * state["velocity"])


class _Replayed(torch.optim.Optimizer):
    """Walks its parameters along the path that they took in the first run."""

    def __init__(self, parameters: Any, path: list[list[Tensor]]):
        super().__init__(parameters, {})
        self._path = iter(path)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        moved = next(self._path)
        for parameter, value in zip((p for group in self.param_groups for p in group["params"]), moved, strict=True):
            parameter.copy_(value.expand_as(parameter))


# ---- situations and their truth ----


@dataclass(frozen=True)
class Situation:
    """A user's training. optimizers: makes them, into run.optimizers. weights: of the examples' losses, [N].

    tracked: the layers that are attributed, by default all.
    """

    optimizers: Callable[[Run], Any]
    loop: Callable[[Run], None]
    heads: str = "a"
    asks: str = "a"
    steps: int = STEPS
    weights: Tensor | None = None
    tracked: list[str] | None = None

    def begin(self) -> Run:
        """The first run, before its loop."""
        run = Run(Net(self.heads), torch.ones(N, dtype=torch.float64) if self.weights is None else self.weights, None)
        run.asks = self.asks
        self.optimizers(run)
        return run

    def retrained(self, first: Run, shifts_RN: Tensor, clip_anew: bool = False) -> Run:
        """All retrainings, to their end; shifts: by how much the examples' weights differ, as shares of them."""
        model = stacked(Net(self.heads), len(shifts_RN))
        run = Run(model, first.weights * (1 + shifts_RN), first.tape, self.asks, clip_anew)
        self.optimizers(run)
        self.loop(run)
        return run

    def truth(self, first: Run, clip_anew: bool = False) -> Tensor:
        """The change of every query [Q, N] if an example's weight went from 1 to 0, at the rate it has at 1.

        The run that nothing is lowered in must be the first run again: this proves the replay.
        """
        eye = torch.eye(N, dtype=torch.float64)
        shifts = torch.cat([LOWERED * eye, -LOWERED * eye, torch.zeros(1, N, dtype=torch.float64)])
        run = self.retrained(first, shifts, clip_anew)
        for name, parameter in first.model.named_parameters():
            again = run.model.get_parameter(name)[-1]
            torch.testing.assert_close(again, parameter, rtol=1e-10, atol=1e-13, msg=f"{name} does not replay")
        with torch.no_grad():
            values = measurements(run.model, Queries.of(Net(self.heads)).rows, self.asks)
        return ((values[N : 2 * N] - values[:N]) / (2 * LOWERED)).T


def slopes(scores_QN: Tensor, truth_QN: Tensor, model: Net) -> dict[str, float]:
    """<score, truth> / <truth, truth> of the queries of each layer's weights, and of the losses, by name.

    Layers that nothing moved are left out.
    """
    place = Queries.of(model).rows[0]
    parts = {"loss": place == -1} | {name: place == number for number, name in enumerate(model.layers())}
    squares = {name: truth_QN[rows].square().sum() for name, rows in parts.items()}
    products = {name: (scores_QN[rows] * truth_QN[rows]).sum() for name, rows in parts.items()}
    return {name: float(products[name] / square) for name, square in squares.items() if square > 0}
