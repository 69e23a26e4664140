"""Averaged weights as the model explained, judged by leave-one-out retraining with the same averaging.

Training is full-batch and unrolled, in float64; each retraining lowers or raises one example's weight a little, and the
measurement is that of the average. Steps are small, so that scores and retraining are of first order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.data import TensorDataset

import segflow as sf
from segflow.training.averaged import averaging

from ..support.helpers import mlp, vectors

N, STEPS, SHIFT = 6, 24, 0.05
TRAIN, QUERY = vectors(N), vectors(3, seed=5)
TASK = sf.tasks.Classification()
# eps is so large that what divides the steps hardly depends on an example, as scores take it.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=2e-3, momentum=0.5),
    "AdamW": partial(torch.optim.AdamW, lr=0.06, eps=30.0, weight_decay=0.05),
}
# (decay, the step of the first copy, steps between updates)
AVERAGES: dict[str, tuple[float | None, int, int]] = {
    "EMA": (0.9, 1, 1),
    "EMA, late and rarely": (0.6, 9, 3),
    "SWA": (None, 12, 2),
}


def averaged(model: nn.Module, decay: float | None) -> AveragedModel:
    update = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)
    return AveragedModel(model, multi_avg_fn=update)


class Stacked(nn.Module):
    """Copies of the network side by side, which optimizers and averages treat as runs of their own."""

    def __init__(self, runs: int):
        super().__init__()
        layers = [layer for layer in mlp() if isinstance(layer, nn.Linear)]
        self.weights = nn.ParameterList(layer.weight.detach().repeat(runs, 1, 1) for layer in layers)
        self.biases = nn.ParameterList(layer.bias.detach().repeat(runs, 1, 1) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """[runs, examples, 3]."""
        first, second, last = (partial(self._linear, place) for place in range(3))
        out: Tensor = last(torch.relu(second(torch.tanh(first(x.expand(len(self.weights[0]), -1, -1))))))
        return out

    def _linear(self, place: int, x: Tensor) -> Tensor:
        return x @ self.weights[place].mT + self.biases[place]


def losses(model: nn.Module, data: TensorDataset) -> Tensor:
    """[..., examples]."""
    x, y = data.tensors
    logits = model(x)
    return nn.functional.cross_entropy(logits.movedim(-1, 1), y.expand(logits.shape[:-1]), reduction="none")


def train(model: nn.Module, optimizer: str, weights: Tensor, average: str) -> Iterator[Any]:
    """A loop that averages; yields the optimizer first, and the average last."""
    decay, start, every = AVERAGES[average]
    made, ema = OPTIMIZERS[optimizer](model.parameters()), averaged(model, decay)
    yield made
    for step in range(1, STEPS + 1):
        made.zero_grad()
        (weights * losses(model, TRAIN)).mean(-1).sum().backward()
        made.step()
        if step >= start and (step - start) % every == 0:
            ema.update_parameters(model)
    yield ema


@cache
def truth(optimizer: str, average: str) -> Tensor:
    """The change of each query's loss under the average, [queries, N], if an example's weight went from 1 to 0."""
    shifts = SHIFT * torch.eye(N, dtype=torch.float64)
    weights = 1 + torch.cat([-shifts, shifts])
    *_, ema = train(Stacked(2 * N), optimizer, weights, average)
    with torch.no_grad():
        lowered, raised = losses(ema, QUERY).split(N)
    return ((lowered - raised) / (2 * SHIFT)).T


def recorded(folder: Path, optimizer: str, average: str) -> AveragedModel:
    model = mlp()
    loop = train(model, optimizer, torch.ones(N, dtype=torch.float64), average)
    with sf.record(model, next(loop), folder, dataset_size=N, total_steps=STEPS, checkpoints=4):
        ema: AveragedModel = next(loop)
    return ema


def slope(run: sf.Trajectory, store: Path, expected: Tensor) -> float:
    """<score, truth> / <truth, truth>."""
    analyzer = sf.Analyzer(mlp(), TASK, run, store=store, progress=False)
    analyzer.fit(TRAIN)
    found = analyzer.score(sf.Groups.singletons(N), TRAIN, QUERY).values
    return float((found * expected).sum() / expected.square().sum())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("average", AVERAGES)
def test_scores_are_what_retraining_does_to_the_average(optimizer: str, average: str, tmp_path: Path) -> None:
    decay, _, every = AVERAGES[average]
    ema = recorded(tmp_path / "run", optimizer, average)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    run, expected = sf.Trajectory.load(tmp_path / "run"), truth(optimizer, average)
    of_average = run.averaged(tmp_path / "ema.pt", decay=decay, every=every, start=AVERAGES[average][1])
    assert slope(of_average, tmp_path / "store", expected) == pytest.approx(1, abs=0.02)
    assert slope(run, tmp_path / "other", expected) > 1.2  # as if the last model were explained


def shares(decay: Any, start: int, every: int, steps: int) -> np.ndarray:
    """What stays of each step, by averaging a model that moves by one in one step."""
    rows = []
    for moved in range(1, steps + 1):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        ema = None
        for step in range(steps + 1):
            with torch.no_grad():
                model.weight += float(step == moved)
            if step >= start and (step - start) % every == 0:
                ema = ema or averaged(model, decay)
                ema.update_parameters(model)
        assert ema is not None
        rows.append(ema.module.weight.item())
    return np.array(rows)


@pytest.mark.parametrize("decay", [None, 0.0, 0.7, 0.99])
@pytest.mark.parametrize(("start", "every"), [(0, 1), (1, 1), (4, 3), (5, 2), (11, 1)])
def test_shares_are_those_that_torch_averages(decay: float | None, start: int, every: int) -> None:
    found = averaging(11, decay, start, every, None).shares(11)
    np.testing.assert_allclose(found, shares(decay, start, every, 11), rtol=1e-6)  # torch's are in float32


def test_decays_that_change_are_those_of_each_update() -> None:
    average = averaging(6, [0.5, 0.8, 0.25], 0, 2, None)
    value, rows = 0.0, []
    for moved in range(1, 7):
        value = 0.0
        for update, decay in enumerate([0.5, 0.8, 0.25], start=1):
            value = decay * value + (1 - decay) * float(2 * update >= moved)
        rows.append(value)
    np.testing.assert_allclose(average.shares(6), rows, rtol=1e-12)


# What the shares overstate of a direction that gradient descent of 60 steps learns, by the rate times the eigenvalue
# summed over all steps: percent, of averages from the start on.
OVERSTATED = {
    1.0: {0.98: 13.5, None: 6.6, 0.9: 0.5},
    2.0: {0.98: 24.5, None: 10.8, 0.9: 0.8},
    5.0: {0.98: 42.6, None: 14.1, 0.9: 0.8},
}


@pytest.mark.parametrize("learned", OVERSTATED)
@pytest.mark.parametrize("decay", [0.98, None, 0.9])
def test_how_much_the_shares_overstate_on_a_quadratic(decay: float | None, learned: float) -> None:
    """The sizes that docs/TRAINING.md gives; exact is a constant change of the gradient in every step of descent."""
    steps, eigenvalue = 60, learned / 60
    deviation, models = 0.0, [0.0]
    for _ in range(steps):
        deviation += 1 - eigenvalue * deviation  # at rate 1
        models.append(deviation)
    average = models[0]
    for update, model in enumerate(models[1:], start=1):
        kept = update / (update + 1) if decay is None else decay
        average = kept * average + (1 - kept) * model
    rate = float(averaging(steps, decay, 0, 1, None).shares(steps).sum())
    found = (1 - np.exp(-rate * eigenvalue)) / eigenvalue
    assert 100 * (found / average - 1) == pytest.approx(OVERSTATED[learned][decay], abs=0.05)


def plain_run(folder: Path, optimizer: str = "AdamW") -> tuple[sf.Trajectory, AveragedModel]:
    ema = recorded(folder / "run", optimizer, "EMA")
    return sf.Trajectory.load(folder / "run"), ema


@pytest.mark.parametrize("form", ["AveragedModel", "module", "safetensors"])
def test_rates_decays_and_state_are_those_of_the_average_in_every_form(form: str, tmp_path: Path) -> None:
    run, ema = plain_run(tmp_path)
    path = tmp_path / ("ema.safetensors" if form == "safetensors" else "ema.pt")
    bare = ema.module.state_dict()
    if form == "safetensors":
        save_file(bare, path)
    else:
        torch.save(ema.state_dict() if form == "AveragedModel" else bare, path)
    found = run.averaged(path, decay=0.9, start=None if form == "AveragedModel" else 1)
    kept = torch.from_numpy(averaging(STEPS, 0.9, 1, 1, None).shares(STEPS))
    lr = [
        0.06 * 0.1 * sum(kept[j] * 0.9 ** (j - k) / (1 - 0.9 ** (j + 1)) for j in range(k, STEPS)) for k in range(STEPS)
    ]
    assert found.lr_steps(0, STEPS)[0] == pytest.approx(float(sum(lr)), rel=1e-9) and lr[0] > lr[-1]
    assert found.decay_steps(6, STEPS)[0] == pytest.approx(float(0.003 * kept[6:].sum()), rel=1e-9)
    model = mlp(seed=3)
    found.load_into(model, 3)
    assert all(torch.equal(value, bare[name]) for name, value in model.state_dict().items())
    assert not torch.equal(run.state(3)["0.weight"], bare["0.weight"])
    for index in range(4):
        assert all(torch.equal(m, found.second_moments(index)[n]) for n, m in run.second_moments(index).items())  # type: ignore[index, union-attr]
        assert index == 3 or all(torch.equal(v, found.state(index)[n]) for n, v in run.state(index).items())
    assert "averaged weights (ema" in found.observed["explained"] and "explained" not in run.observed
    assert "24 models with decay 0.9, from step 1 on, every step" in found.observed["explained"]


def test_a_store_is_bound_to_the_averaged_file(tmp_path: Path) -> None:
    run, ema = plain_run(tmp_path)
    other = copy.deepcopy(ema)
    with torch.no_grad():
        next(other.module.parameters()).add_(0.01)
    for name, model in (("a", ema), ("b", other)):
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    runs = [run.averaged(tmp_path / f"{name}.pt", decay=0.9) for name in ("a", "b")]
    assert runs[0].digest(3) != runs[1].digest(3) != run.digest(3)
    analyzers = [sf.Analyzer(mlp(), TASK, each, store=tmp_path / "store", progress=False) for each in runs]
    analyzers[0].fit(TRAIN)
    with pytest.raises(sf.StoreError, match="made from something else"):
        analyzers[1].fit(TRAIN)


def test_what_the_average_does_not_hold_of_untrained_tensors_is_the_checkpoints(tmp_path: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = averaged(model, 0.5)
    with sf.record(model, optimizer, tmp_path / "run", dataset_size=N, checkpoints=1):
        for _ in range(3):
            nn.functional.cross_entropy(model(TRAIN.tensors[0]), TRAIN.tensors[1]).backward()
            optimizer.step()
            ema.update_parameters(model)
    state = ema.module.state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("0.")}, tmp_path / "ema.pt")
    run = sf.Trajectory.load(tmp_path / "run").averaged(tmp_path / "ema.pt", decay=0.5, start=1)
    loaded = mlp(seed=3)
    run.load_into(loaded, 0)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    torch.save({name: value for name, value in state.items() if name != "4.bias"}, tmp_path / "lost.pt")
    with pytest.raises(sf.TrajectoryError, match=r"4\.bias"):
        sf.Trajectory.load(tmp_path / "run").averaged(tmp_path / "lost.pt", decay=0.5).load_into(loaded, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": 0.9, "start": 0}, r"says that 24 models were averaged, but start=0, every=1 make 25"),
        ({"decay": 0.9, "every": 2}, r"every=2 does not say at which steps the average was updated. Give start="),
        ({"decay": 0.9, "every": 2, "start": 0}, r"24 models were averaged, but start=0, every=2 make 13 in 24 steps"),
        ({"decay": 1.0}, r"decay=1\.0: expected a finite number, at least 0 and below 1"),
        ({"decay": [0.9, 0.9]}, r"decay=\[0\.9, 0\.9\]: expected a number .* one for each of the 23 updates"),
        ({"decay": 0.9, "every": 0}, r"every=0: expected a whole number, 1 to 24"),
        ({"decay": 0.9, "start": 25}, r"start=25: expected a whole number, 0 to 24"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    run, ema = plain_run(tmp_path, "SGD")
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    with pytest.raises(sf.TrajectoryError, match=words):
        run.averaged(tmp_path / "ema.pt", **options)


def test_a_start_is_inferred_only_of_an_average_of_every_step() -> None:
    """Updates at 1, 11, 21 of 30 steps are as many as at 10, 20, 30."""
    assert averaging(30, 0.5, None, 1, 20).start == 11
    for counted in (3, None):
        with pytest.raises(sf.TrajectoryError, match="every=10 does not say at which steps"):
            averaging(30, 0.5, None, 10, counted)
    with pytest.raises(sf.TrajectoryError, match="31 models were averaged, but every=1 makes fewer in 29 steps"):
        averaging(29, 0.5, None, 1, 31)
    assert not np.allclose(averaging(30, 0.5, 1, 10, 3).shares(30), averaging(30, 0.5, 10, 10, 3).shares(30))


def test_equal_weights_without_a_count_ask_for_the_start(tmp_path: Path) -> None:
    run, ema = plain_run(tmp_path, "SGD")
    torch.save(ema.module.state_dict(), tmp_path / "ema.pt")
    with pytest.raises(sf.TrajectoryError, match=r"does not say how often the average was updated\. Give start="):
        run.averaged(tmp_path / "ema.pt", decay=None)
    with pytest.raises(sf.TrajectoryError, match="no such file of averaged weights"):
        run.averaged(tmp_path / "nowhere.pt", decay=None, start=3)
