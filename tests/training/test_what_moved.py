"""What a recording says each parameter received, judged by retraining (see `support.retraining_oracle`).

Every situation is a loop as users write it. A score must be the change that retraining shows: slopes within 2% of 1
for the queries of every layer's own weights, for SOURCE and, where it claims as much, for TracIn: it follows the same
sums, but knows neither weight decay nor what divides the steps of Adam.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_  # before anything records, as in most users' scripts
from torch.utils.data import DataLoader, Sampler, TensorDataset

import segflow as sf

from ..support.retraining_oracle import (
    ALL,
    KIND,
    STEPS,
    N,
    Net,
    Queries,
    Run,
    Situation,
    X,
    Y,
    losses,
    measurements,
    slopes,
)

TRAIN = TensorDataset(X, Y, KIND)
# (torch's class, options): so small that the change is of first order, and eps so large that P hardly moves.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 2e-4}),
    "momentum": (torch.optim.SGD, {"lr": 4e-5, "momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"lr": 4e-5, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 4e-5, "eps": 0.3}),
    "AdamW": (torch.optim.AdamW, {"lr": 4e-5, "eps": 0.3, "weight_decay": 30.0}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 4e-5, "eps": 0.3}),
}
each_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)
Parameters = Callable[[Net], Any]


class Task(sf.Task):
    """The loss of `asks` (see `losses`), measured by the queries of the oracle."""

    def __init__(self, asks: str, tracked: list[str] | None = None):
        self.asks, self.tracked = asks, tracked

    def get_influence_tracked_modules(self) -> list[str] | None:
        return self.tracked

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y, kind = batch
        if not sample:
            return losses(model, x, y, kind, self.asks).sum()
        heads = ("a", "b") if self.asks == "both" else (self.asks,)
        drawn = []
        for head in heads:
            with torch.no_grad():
                rows = [losses(model, x, torch.full_like(y, label), kind, head) for label in range(3)]
                labels = torch.multinomial(torch.stack(rows, 1).neg().exp(), 1)[:, 0]
            drawn.append(losses(model, x, labels, kind, head).sum())
        return torch.stack(drawn).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return measurements(model, batch, self.asks).sum()


def optimizer(kind: str, parameters: Parameters = Net.parameters, **options: Any) -> Callable[[Run], Any]:
    made, usual = OPTIMIZERS[kind]
    return lambda run: run.optimizer(made, parameters(run.model), **(usual | options))


def recorded(situation: Situation, folder: Path, **options: Any) -> Run:
    """The situation's first run, recorded."""
    run = situation.begin()
    given = run.optimizers[0] if len(run.optimizers) == 1 else run.optimizers
    options = {"dataset_size": N, "total_steps": situation.steps, "checkpoints": 2} | options
    with sf.record(run.model, given, folder, **options):
        situation.loop(run)
    return run


def scores(situation: Situation, trajectory: sf.Trajectory, method: Any, store: Path) -> Tensor:
    model, task = Net(situation.heads), Task(situation.asks, situation.tracked)
    analyzer = sf.Analyzer(model, task, trajectory, store=store, method=method, progress=False)
    analyzer.fit(TRAIN)
    queries = TensorDataset(*Queries.of(Net(situation.heads)).rows)
    return torch.as_tensor(analyzer.score(sf.Groups.singletons(N), TRAIN, queries).values, dtype=torch.float64)


def methods(run: Run) -> dict[str, Any]:
    """The methods that claim to be right for a run."""
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    plain = all("betas" not in group and "alpha" not in group and not group["weight_decay"] for group in groups)
    return {"SOURCE": sf.Source(query_points="final")} | ({"TracIn": sf.TracIn()} if plain else {})


def check_slopes(
    situation: Situation, folder: Path, only: tuple[str, ...] = (), tolerance: float = 0.02, **options: Any
) -> Run:
    """Record, retrain, score, compare. only: the layers whose slopes the situation is about, "loss" for losses."""
    run = recorded(situation, folder / "run", **options)
    compare(situation, run, sf.Trajectory.load(folder / "run"), folder, only, tolerance=tolerance)
    return run


def compare(
    situation: Situation,
    run: Run,
    trajectory: sf.Trajectory,
    folder: Path,
    only: tuple[str, ...] = (),
    within: dict[str, Any] | None = None,
    tolerance: float = 0.02,
) -> None:
    """Scores of a recorded run against retraining, for some methods (by default those that claim to be right)."""
    truth, found = situation.truth(run), {}
    for name, method in (within or methods(run)).items():
        values = scores(situation, trajectory, method, folder / name)
        for part, slope in slopes(values, truth, Net(situation.heads)).items():
            if not only or part in only:
                found[f"{name}, {part}"] = round(slope, 4)
    wrong = {name: slope for name, slope in found.items() if not abs(slope - 1) <= tolerance}
    assert found and not wrong, f"{wrong} of {found}"


def loop(
    before: Callable[[Run, int], Any] = lambda run, step: None,
    after: Callable[[Run], Any] = lambda run: None,
    set_to_none: bool = True,
    loss: Callable[[Run, int], Tensor] = lambda run, step: run.loss(),
) -> Callable[[Run], None]:
    """A loop over all examples at once. before: a step; after: the backward pass; loss: of a step."""

    def train(run: Run) -> None:
        for step in range(STEPS):
            before(run, step)
            for each in run.optimizers:
                each.zero_grad(set_to_none=set_to_none)
            loss(run, step).backward()
            after(run)
            for each in run.optimizers:
                each.step()

    return train


@each_optimizer
def test_plain_training(kind: str, tmp_path: Path) -> None:
    check_slopes(Situation(optimizer(kind), loop()), tmp_path)


@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam"])
def test_the_sums_of_two_segments(kind: str, tmp_path: Path) -> None:
    situation = Situation(optimizer(kind), loop())
    run = recorded(situation, tmp_path / "run")
    trajectory = sf.Trajectory.load(tmp_path / "run")
    compare(situation, run, trajectory, tmp_path, within={"two segments": sf.Source(segments=2)})


def test_weight_decay_that_passes_through_the_divisor(tmp_path: Path) -> None:
    check_slopes(Situation(optimizer("Adam", weight_decay=1.0), loop()), tmp_path)


@pytest.mark.parametrize(("kind", "options"), [("momentum", {"dampening": 0.5}), ("RMSprop", {"momentum": 0.8})])
def test_other_forms_of_momentum(kind: str, options: dict[str, float], tmp_path: Path) -> None:
    check_slopes(Situation(optimizer(kind, **options), loop()), tmp_path)


# ---- frozen layers ----


def frozen(share: float, first: bool) -> Callable[[Run], None]:
    """The body is frozen for a share of the steps, the first or the last ones."""

    def freeze(run: Run, step: int) -> None:
        run.model.body.requires_grad_((step >= share * STEPS) if first else (step < (1 - share) * STEPS))

    return loop(freeze)


@each_optimizer
def test_a_layer_that_is_frozen_for_most_steps(kind: str, tmp_path: Path) -> None:
    check_slopes(Situation(optimizer(kind), frozen(0.9, first=True)), tmp_path)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "momentum", "AdamW"])
def test_a_layer_that_is_frozen_for_half_of_the_steps(kind: str, first: bool, tmp_path: Path) -> None:
    check_slopes(Situation(optimizer(kind), frozen(0.5, first)), tmp_path)


@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam"])
def test_a_gradient_that_stays_goes_on_moving_its_layer(kind: str, tmp_path: Path) -> None:
    def train(run: Run) -> None:
        for step in range(STEPS):
            run.model.body.requires_grad_(step < STEPS / 2)
            for parameter in run.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = None
            run.loss().backward()
            run.optimizers[0].step()

    check_slopes(Situation(optimizer(kind), train), tmp_path)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "momentum", "AdamW"])
def test_heads_that_are_trained_in_turn_on_the_same_data(kind: str, set_to_none: bool, tmp_path: Path) -> None:
    def freeze(run: Run, step: int) -> None:
        run.model.a.requires_grad_(step % 2 == 0)
        run.model.b.requires_grad_(step % 2 == 1)

    situation = Situation(optimizer(kind), loop(freeze, set_to_none=set_to_none), heads="ab", asks="both")
    check_slopes(situation, tmp_path)


def heads_only(model: Net) -> list[Tensor]:
    model.body.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "momentum", "AdamW"])
def test_heads_whose_losses_take_turns_on_the_same_data(kind: str, set_to_none: bool, tmp_path: Path) -> None:
    def loss(run: Run, step: int) -> Tensor:
        return run.loss(ALL, "ab"[step % 2])

    train = loop(loss=loss, set_to_none=set_to_none)
    check_slopes(Situation(optimizer(kind, heads_only), train, heads="ab", asks="both"), tmp_path)


# ---- heads for data of their own ----


def by_type(run: Run, step: int) -> Tensor:
    """The loss of a batch of one type: 8 of the first, the other 8, the 8 of the second."""
    examples = ALL.view(3, -1)[step % 3]
    return run.loss(examples, "ab"[int(KIND[examples[0]])])


def masked(run: Run, step: int) -> Tensor:
    """The same batches, where a mask decides: the other head's gradient is zero then, not None."""
    return run.loss(ALL.view(3, -1)[step % 3], "own")


SERVED = {
    "None": loop(loss=by_type),
    "zero": loop(loss=by_type, set_to_none=False),
    "masked": loop(loss=masked),
    "mixed": loop(),
}


@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam"])
def test_heads_that_are_served_by_batches_of_their_own_data(kind: str, served: str, tmp_path: Path) -> None:
    """A mask leaves zeros that the backward pass wrote, which are not told from other gradients.

    Each head's gradients are then taken to be spread over all steps; with momentum those of the last ones, which later
    steps take less of, make a difference in so short a run.
    """
    lags = served == "masked" and kind != "SGD"
    situation = Situation(optimizer(kind), SERVED[served], heads="ab", asks="own")
    check_slopes(situation, tmp_path, tolerance=0.08 if lags else 0.02)


def test_a_frozen_head_of_two_that_are_served_by_batches_of_their_own_data(tmp_path: Path) -> None:
    def freeze(run: Run, step: int) -> None:
        run.model.b.requires_grad_(step >= STEPS / 2)

    # A loss in which nothing is trained has no backward pass; the body is.
    check_slopes(Situation(optimizer("SGD"), loop(freeze, loss=by_type), heads="ab", asks="own"), tmp_path)


# ---- clipping by norm ----


def clipped(max_norm: float, clip: Any = clip_grad_norm_, which: Parameters = Net.parameters) -> Callable[[Run], None]:
    return loop(after=lambda run: run.clip(which(run.model), max_norm, clip))


CLIPPED = {0.2: 0.05, 0.02: 0.005}  # max_norm by the factor that it makes


@pytest.mark.parametrize("factor", CLIPPED)
@each_optimizer
def test_clipping_by_norm(kind: str, factor: float, tmp_path: Path) -> None:
    eps = {"eps": 0.3 * factor} if "eps" in OPTIMIZERS[kind][1] else {}
    run = check_slopes(Situation(optimizer(kind, **eps), clipped(CLIPPED[factor])), tmp_path)
    assert 0.7 * factor < sum(run.tape.factors) / STEPS < 1.4 * factor


def through_the_module(parameters: list[Tensor], max_norm: float) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def by_parts(parameters: list[Tensor], max_norm: float) -> Tensor:
    """torch's two halves of clipping by norm, called one by one."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def by_accelerate(parameters: list[Tensor], max_norm: float) -> Tensor:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    return accelerator.clip_grad_norm_(parameters, max_norm)


CALLS: dict[str, Any] = {
    "through the module": through_the_module,
    "foreach": partial(clip_grad_norm_, foreach=True),
    "one by one": partial(clip_grad_norm_, foreach=False),
    "the largest gradient": partial(clip_grad_norm_, norm_type=float("inf")),
    "in two halves": by_parts,
    "accelerate": by_accelerate,
}


@pytest.mark.parametrize("call", CALLS)
def test_clipping_however_it_is_called(call: str, tmp_path: Path) -> None:
    check_slopes(Situation(optimizer("SGD"), clipped(0.05, CALLS[call])), tmp_path)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_clipping_some_of_the_parameters(kind: str, tmp_path: Path) -> None:
    only_body = clipped(0.02, which=lambda model: model.body.parameters())
    check_slopes(Situation(optimizer(kind), only_body), tmp_path)


def test_factors_of_several_calls_multiply(tmp_path: Path) -> None:
    def clip_twice(run: Run) -> None:
        run.clip(run.model.parameters(), 0.1)
        run.clip(run.model.body.parameters(), 0.02)

    check_slopes(Situation(optimizer("momentum"), loop(after=clip_twice)), tmp_path)


def test_clipping_a_frozen_layer_and_then_a_trained_one(tmp_path: Path) -> None:
    def freeze(run: Run, step: int) -> None:
        run.model.body.requires_grad_(step >= STEPS / 2)

    train = loop(freeze, after=lambda run: run.clip(run.model.parameters(), 0.05))
    check_slopes(Situation(optimizer("momentum"), train), tmp_path)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_clipping_leaves_weight_decay_as_it_is(momentum: float, tmp_path: Path) -> None:
    """A decay of .3 in all takes a seventh of what was learnt; with factors on both sums it would take a seventieth.

    Decay moves the gradients too, so that their mean needs checkpoints.
    """
    decaying = optimizer("SGD", lr=1e-3 * (1 - momentum), weight_decay=7.2, momentum=momentum)
    run = check_slopes(Situation(decaying, clipped(0.025)), tmp_path, checkpoints=14)
    assert 0.07 < sum(run.tape.factors) / STEPS < 0.14


def test_the_norm_s_own_dependence_on_the_data_is_not_followed(tmp_path: Path) -> None:
    """Retraining that clips anew is another truth: what scores say of it is in the right order, no more."""
    situation = Situation(optimizer("SGD"), clipped(0.05))
    run = recorded(situation, tmp_path / "run")
    values = scores(situation, sf.Trajectory.load(tmp_path / "run"), sf.Source(), tmp_path / "store")
    truth = situation.truth(run, clip_anew=True)
    assert torch.corrcoef(torch.stack([values.flatten(), truth.flatten()]))[0, 1] > 0.9


# ---- steps that a scaler skips ----


def scaled(skipped: int) -> Callable[[Run], None]:
    """Mixed precision's loop, in which some losses overflow after the fifth step."""

    def train(run: Run) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=10**6)
        (step_with,) = run.optimizers
        for step in range(STEPS + skipped):
            step_with.zero_grad()
            loss = run.loss()
            scaler.scale(loss * float("inf") if 5 <= step < 5 + skipped else loss).backward()
            scaler.step(step_with)
            scaler.update(2.0**4)

    return train


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam", "AdamW"])
def test_steps_that_were_skipped_count_nothing(kind: str, fused: bool, tmp_path: Path) -> None:
    values, runs = [], []
    for skipped in (0, 12):
        situation, folder = Situation(optimizer(kind, fused=fused), scaled(skipped)), tmp_path / str(skipped)
        runs.append(recorded(situation, folder / "run", total_steps=None, checkpoints=1))
        values.append(scores(situation, sf.Trajectory.load(folder / "run"), sf.Source(), folder / "store"))
    for name, parameter in runs[0].model.named_parameters():
        assert torch.equal(parameter, runs[1].model.get_parameter(name)), "the skipped steps moved something"
    torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=0)


# ---- schedules, accumulation, several optimizers ----


def scheduled(make: Callable[[Any], Any]) -> Callable[[Run], None]:
    def train(run: Run) -> None:
        (step_with,) = run.optimizers
        schedule = make(step_with)
        for _ in range(STEPS):
            step_with.zero_grad()
            run.loss().backward()
            step_with.step()
            schedule.step()

    return train


def warmup(step_with: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(step_with, lambda step: min(1.0, step / 20))


def one_cycle(step_with: Any) -> Any:
    """It moves the momentum, and Adam's first beta, against the learning rate."""
    rate = step_with.param_groups[0]["lr"]
    return torch.optim.lr_scheduler.OneCycleLR(step_with, max_lr=2 * rate, total_steps=STEPS + 1)


SCHEDULES = {"from zero": warmup, "one cycle": one_cycle}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam", "AdamW"])
def test_schedules(kind: str, schedule: str, tmp_path: Path) -> None:
    if kind == "SGD" and schedule == "one cycle":
        pytest.skip("OneCycleLR needs a momentum to move")
    check_slopes(Situation(optimizer(kind), scheduled(SCHEDULES[schedule])), tmp_path)


def accumulated(run: Run) -> None:
    (step_with,) = run.optimizers
    for _ in range(STEPS):
        step_with.zero_grad()
        for examples in ALL.view(3, -1):
            (run.loss(examples) / 3).backward()
        step_with.step()


@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
def test_gradients_that_are_accumulated(kind: str, tmp_path: Path) -> None:
    check_slopes(Situation(optimizer(kind), accumulated), tmp_path)


def two_optimizers(first: str, second: str) -> Callable[[Run], None]:
    """One for the body, one for the head."""

    def make(run: Run) -> None:
        optimizer(first, lambda model: model.body.parameters())(run)
        optimizer(second, lambda model: model.a.parameters())(run)

    return make


def every_third(run: Run) -> None:
    """The second optimizer steps in every third round."""
    first, second = run.optimizers
    for step in range(STEPS):
        first.zero_grad()
        second.zero_grad()
        run.loss().backward()
        first.step()
        if step % 3 == 2:
            second.step()


@pytest.mark.parametrize("pair", [("SGD", "AdamW"), ("momentum", "SGD"), ("Adam", "momentum")])
def test_two_optimizers(pair: tuple[str, str], tmp_path: Path) -> None:
    check_slopes(Situation(two_optimizers(*pair), loop()), tmp_path)


@pytest.mark.parametrize("pair", [("SGD", "AdamW"), ("momentum", "SGD"), ("AdamW", "momentum")])
def test_an_optimizer_that_steps_in_every_third_round(pair: tuple[str, str], tmp_path: Path) -> None:
    check_slopes(Situation(two_optimizers(*pair), every_third), tmp_path)


def muon_and_adamw(run: Run) -> None:
    run.optimizer(torch.optim.Muon, [run.model.body.weight], lr=1e-5, weight_decay=0.0)
    optimizer("AdamW", lambda model: model.a.parameters())(run)


def test_muon_s_parameters_are_refused_by_name_and_the_others_are_right(tmp_path: Path) -> None:
    situation = Situation(muon_and_adamw, loop())
    run = recorded(situation, tmp_path / "run")
    trajectory = sf.Trajectory.load(tmp_path / "run")
    for method in (sf.Source(), sf.TracIn()):
        with pytest.raises(sf.SegflowError, match=r"body\.weight") as refused:
            scores(situation, trajectory, method, tmp_path / "refused")
        assert "Muon" in str(refused.value)
    assert scores(situation, trajectory, sf.InfluenceFunction(), tmp_path / "influence").abs().min() > 0
    tracked = replace(situation, tracked=["a"])
    compare(tracked, run, trajectory, tmp_path, only=("a",), within={"SOURCE": sf.Source()})


# ---- resumed runs ----

KILLED, SAVED = 25, 21  # steps taken when a run died, and when the user's own checkpoint was last saved


class Killed(Exception):
    pass


def steps_of(run: Run, count: int) -> None:
    (step_with,) = run.optimizers
    for _ in range(count):
        step_with.zero_grad()
        run.loss().backward()
        step_with.step()


def resumed(situation: Situation, folder: Path, elsewhere: Path | None = None, **options: Any) -> Run:
    """A run that is killed and goes on from the user's own checkpoint. elsewhere: a new recording for its rest."""
    run, given = situation.begin(), {"dataset_size": N, "total_steps": STEPS, "checkpoints": [7, 14, 21, 24, 28, 42]}
    with suppress(Killed), sf.record(run.model, run.optimizers[0], folder, **given):
        steps_of(run, SAVED)
        saved = copy.deepcopy((run.model.state_dict(), run.optimizers[0].state_dict()))
        steps_of(run, KILLED - SAVED)
        raise Killed
    run = situation.begin()
    run.model.load_state_dict(saved[0])
    run.optimizers[0].load_state_dict(saved[1])
    if elsewhere is not None:
        with sf.record(run.model, run.optimizers[0], elsewhere, dataset_size=N, total_steps=STEPS - SAVED):
            steps_of(run, STEPS - SAVED)
    else:
        with sf.record(run.model, run.optimizers[0], folder, **given, resume=True, **options):
            steps_of(run, STEPS - SAVED)
    return run


@pytest.mark.parametrize(("kind", "options"), [("Adam", {}), ("AdamW", {"step": SAVED}), ("momentum", {"step": SAVED})])
def test_a_resumed_recording_is_that_of_the_whole_run(kind: str, options: dict[str, int], tmp_path: Path) -> None:
    situation = Situation(optimizer(kind), loop())
    resumed(situation, tmp_path / "run", **options)
    recorded(situation, tmp_path / "whole", checkpoints=[7, 14, 21, 24, 28, 42])
    parts, whole = (sf.Trajectory.load(tmp_path / name) for name in ("run", "whole"))
    assert parts.steps == whole.steps
    of_parts = scores(situation, parts, sf.Source(), tmp_path / "of parts")
    of_whole = scores(situation, whole, sf.Source(), tmp_path / "of whole")
    torch.testing.assert_close(of_parts, of_whole, rtol=1e-12, atol=0)


def test_a_resumed_recording_refuses_a_gap(tmp_path: Path) -> None:
    """The log holds 25 steps, so the user's checkpoint cannot be of step 30."""
    with pytest.raises(sf.TrajectoryError, match="25"):
        resumed(Situation(optimizer("momentum"), loop()), tmp_path / "run", step=30)


@pytest.mark.parametrize("kind", ["momentum", "Adam"])
def test_the_rest_of_a_run_alone_is_not_taken_for_the_whole(kind: str, tmp_path: Path) -> None:
    situation = Situation(optimizer(kind), loop())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # record may say so at once
        resumed(situation, tmp_path / "run", elsewhere=tmp_path / "rest")
    trajectory = sf.Trajectory.load(tmp_path / "rest")
    for method in (sf.Source(), sf.TracIn()):
        with pytest.raises(sf.SegflowError):
            scores(situation, trajectory, method, tmp_path / "refused")
    assert scores(situation, trajectory, sf.InfluenceFunction(), tmp_path / "influence").abs().min() > 0


# ---- the share each example had ----

WEIGHTS = torch.linspace(0.2, 1.8, N, dtype=torch.float64)[
    torch.randperm(N, generator=torch.Generator().manual_seed(1))
]


@pytest.mark.parametrize("kind", ["momentum", "Adam"])
def test_weights_of_the_examples_losses(kind: str, tmp_path: Path) -> None:
    situation = Situation(optimizer(kind), loop(), weights=WEIGHTS)
    check_slopes(situation, tmp_path, example_weights=WEIGHTS)


def test_weights_of_the_examples_losses_as_numpy_gives_them(tmp_path: Path) -> None:
    situation = Situation(optimizer("SGD"), loop(), weights=WEIGHTS)
    check_slopes(situation, tmp_path, example_weights=WEIGHTS.numpy())


class Uneven(Sampler[int]):
    """A curriculum: some examples come more often than others, in each epoch alike."""

    def __iter__(self) -> Iterator[int]:
        return iter([*range(N), *range(N // 2)])

    def __len__(self) -> int:
        return N + N // 2


def test_a_sampler_that_is_handed_over_tells_each_examples_share(tmp_path: Path) -> None:
    sampler = sf.CountedSampler(Uneven())

    def train(run: Run) -> None:
        loader = DataLoader(TensorDataset(ALL), batch_size=len(sampler), sampler=sampler)
        (step_with,) = run.optimizers
        for _ in range(STEPS):
            for (examples,) in loader:
                step_with.zero_grad()
                run.loss(examples).backward()
                step_with.step()

    check_slopes(Situation(optimizer("SGD"), train), tmp_path, sampler=sampler)


# ---- what recording leaves as it is ----

TRAININGS = {
    **{kind: Situation(optimizer(kind), loop()) for kind in OPTIMIZERS},
    "frozen first": Situation(optimizer("AdamW"), frozen(0.9, first=True)),
    "frozen last": Situation(optimizer("momentum"), frozen(0.5, first=False)),
    "own batches": Situation(optimizer("Adam"), SERVED["None"], heads="ab", asks="own"),
    "own batches, zeros": Situation(optimizer("momentum"), SERVED["zero"], heads="ab", asks="own"),
    **{f"clipped {call}": Situation(optimizer("SGD"), clipped(0.05, CALLS[call])) for call in CALLS},
    **{f"skipped, {kind}": Situation(optimizer(kind), scaled(12)) for kind in ("SGD", "AdamW")},
    **{f"skipped, fused {kind}": Situation(optimizer(kind, fused=True), scaled(12)) for kind in ("SGD", "AdamW")},
    "from zero": Situation(optimizer("momentum"), scheduled(warmup)),
    "one cycle": Situation(optimizer("AdamW"), scheduled(one_cycle)),
    "accumulated": Situation(optimizer("AdamW"), accumulated),
    "two optimizers": Situation(two_optimizers("SGD", "AdamW"), loop()),
    "every third round": Situation(two_optimizers("momentum", "Adam"), every_third),
    "Muon": Situation(muon_and_adamw, loop()),
    "weighted": Situation(optimizer("Adam"), loop(), weights=WEIGHTS),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_recording_changes_no_bit_of_the_training(name: str, tmp_path: Path) -> None:
    situation, ends, torch_s_own = TRAININGS[name], [], vars(torch.nn.utils.clip_grad).copy()
    for folder in (None, tmp_path / "run"):
        torch.manual_seed(5)
        if folder is None:
            run = situation.begin()
            situation.loop(run)
        else:
            weights = {} if situation.weights is None else {"example_weights": situation.weights}
            run = recorded(situation, folder, total_steps=None, **weights)
        ends.append((run, torch.get_rng_state()))
    (bare, bare_rng), (with_record, rng) = ends
    assert bare.losses == with_record.losses
    assert torch.equal(bare_rng, rng)
    for one, other in zip(bare.optimizers, with_record.optimizers, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0, equal_nan=True)
    for (parameter, value), other in zip(bare.model.named_parameters(), with_record.model.parameters(), strict=True):
        assert torch.equal(value, other), parameter
        assert (value.grad is None) == (other.grad is None)
        assert value.grad is None or torch.equal(value.grad, other.grad)
    assert vars(torch.nn.utils.clip_grad) == torch_s_own, "what recording watches is left as it was"


# ---- numbers of any kind in the optimizer's options ----

NUMBERS: dict[str, Callable[[float], Any]] = {
    "numpy": np.float64,
    "numpy, single": np.float32,
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_options_may_be_numbers_of_any_kind(number: str, tmp_path: Path) -> None:
    """Values that single precision holds exactly, so that all kinds must say the same."""
    trajectories = []
    for name, convert in (("plain", float), ("other", NUMBERS[number])):
        made = optimizer("AdamW", eps=convert(0.25), weight_decay=convert(0.5), lr=convert(2.0**-14))
        recorded(Situation(made, loop()), tmp_path / name)
        trajectories.append(sf.Trajectory.load(tmp_path / name))
    plain, other = trajectories
    assert plain.eps == other.eps == (0.25,) * len(plain.eps)
    assert plain.lr_steps(0, STEPS) == other.lr_steps(0, STEPS)
    for column in ("learning_rates", "weight_decay", "momentum", "beta1"):
        assert (getattr(plain.used, column) == getattr(other.used, column)).all(), column


@pytest.mark.parametrize("number", NUMBERS)
def test_momentum_may_be_a_number_of_any_kind(number: str, tmp_path: Path) -> None:
    trajectories = []
    for name, convert in (("plain", float), ("other", NUMBERS[number])):
        recorded(Situation(optimizer("momentum", momentum=convert(0.5), lr=2.0**-14), loop()), tmp_path / name)
        trajectories.append(sf.Trajectory.load(tmp_path / name))
    assert (trajectories[0].used.momentum == trajectories[1].used.momentum).all()
    assert trajectories[0].lr_steps(0, STEPS) == trajectories[1].lr_steps(0, STEPS)


@pytest.mark.parametrize("options", [{}, {"eps": (None, 1e-3)}])
def test_an_optimizer_without_formulas_is_recorded_whatever_its_options_are(options: Any, tmp_path: Path) -> None:
    """torch's Adafactor has a pair where Adam has a number."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01, **options)
    with sf.record(model, optimizer, tmp_path, dataset_size=4, total_steps=2, checkpoints=1, progress=False):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
    trajectory = sf.Trajectory.load(tmp_path)
    assert trajectory.kinds[0].endswith("Adafactor")
    with pytest.raises(sf.TrajectoryError, match=r"trained with .*Adafactor"):
        trajectory.lr_steps(0, 2)
