"""Lightning's trainer with the callback: its numbers stay as they are, and the recording is that of a plain loop."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import segflow as sf

from ..support.helpers import FixedLabels, mlp, vectors

pl: Any = pytest.importorskip("lightning.pytorch")
from segflow.integrations.lightning import RecordCallback  # noqa: E402 (needs Lightning)

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:.*(does not have many workers|no `val_dataloader`|shuffling)"),
]
N, BATCH, EPOCHS = 24, 4, 3
SINGLE = sf.Groups.singletons(N)


class Wrapped(pl.LightningModule):
    """A network as Lightning users hold it, with a loss, a validation step, and optimizers of one's choice."""

    def __init__(self, optimizer: Callable[..., Any], noisy: bool = False):
        super().__init__()
        self.model, self.drop, self.make = mlp(), nn.Dropout(0.3 if noisy else 0.0), optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.model(x))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Manual(Wrapped):
    """Two optimizers, of the network's two ends, stepped by hand."""

    def __init__(self) -> None:
        super().__init__(torch.optim.Adam)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return two_optimizers(self.model)

    def training_step(self, batch: Any, index: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()


def two_optimizers(model: nn.Sequential) -> list[torch.optim.Optimizer]:
    last = torch.optim.SGD(model[4].parameters(), lr=0.05, momentum=0.5)
    return [torch.optim.Adam([*model[0].parameters(), *model[2].parameters()], lr=0.01), last]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def with_schedule(parameters: Any) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(shuffle: bool = False) -> DataLoader:
    return DataLoader(vectors(N), batch_size=BATCH, shuffle=shuffle)


def trainer(*callbacks: Any, package: Any = pl, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": EPOCHS, "enable_checkpointing": False, **options}
    return package.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **quiet, **options)


def plain(
    module: Wrapped, folder: Path, *, accumulate: int = 1, clip: float | None = None, epochs: int = EPOCHS
) -> None:
    """The same training as a loop of one's own, recorded by `record`."""
    made = module.configure_optimizers()
    schedule = made["lr_scheduler"]["scheduler"] if isinstance(made, dict) else None
    optimizers = [made["optimizer"]] if schedule else made if isinstance(made, list) else [made]
    with sf.record(
        module, optimizers, folder, dataset_size=N, total_steps=epochs * (N // BATCH // accumulate), checkpoints=3
    ):
        for _ in range(epochs):
            for index, batch in enumerate(loader(), start=1):
                (module.loss(batch) / accumulate).backward()
                if index % accumulate:
                    continue
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                if schedule is not None:
                    schedule.step()


def scores(model: nn.Module, folder: Path, store: Path) -> Tensor:
    train, query = vectors(N), vectors(4, seed=5)
    analyzer = sf.Analyzer(model, FixedLabels(), sf.Trajectory.load(folder), store=store, progress=False)
    analyzer.fit(train, batch_size=8)
    return analyzer.score(SINGLE, train, query).values


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# A module, the Trainer's options, and those of the plain loop that does the same.
CASES: dict[str, tuple[Callable[[], Wrapped], dict[str, Any], dict[str, Any]]] = {
    "AdamW with a validation loop": (lambda: Wrapped(adamw), {}, {}),
    "schedule": (lambda: Wrapped(with_schedule), {}, {}),
    "accumulation": (lambda: Wrapped(adamw), {"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "clipping": (lambda: Wrapped(with_schedule), {"gradient_clip_val": 0.5}, {"clip": 0.5}),
    "two optimizers": (Manual, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_recording_of_the_trainer_is_that_of_a_plain_loop(case: str, tmp_path: Path) -> None:
    make, options, same = CASES[case]
    module, other = make(), make()
    told = {} if module.automatic_optimization else {"total_steps": 18}
    callback = RecordCallback(tmp_path / "run", checkpoints=3, **told)
    trainer(callback, **options).fit(module, loader(), loader() if "validation" in case else None)
    plain(other, tmp_path / "plain", **same)
    run, expected = sf.Trajectory.load(tmp_path / "run"), sf.Trajectory.load(tmp_path / "plain")
    assert run.dataset_size == N and run.steps == expected.steps and len(run) == 3
    assert not run.observed or run.observed == expected.observed
    found, wanted = scores(module, tmp_path / "run", tmp_path / "a"), scores(other, tmp_path / "plain", tmp_path / "b")
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
    assert (wanted.abs() > 0).any()


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_either_package_records_and_the_numbers_of_training_stay_bit_identical(name: str, tmp_path: Path) -> None:
    package: Any = pytest.importorskip(name)
    ends = []
    for number, recorded in enumerate((False, True)):
        torch.manual_seed(3)
        inner = Wrapped(with_schedule, noisy=True)
        module = inner if package is pl else of_package(package, inner)
        callbacks = [RecordCallback(tmp_path / "run")] * recorded
        trainer(*callbacks, package=package, gradient_clip_val=0.5).fit(module, loader(shuffle=True))
        ends.append([state(module), torch.rand(3)])
        assert (tmp_path / "run").exists() == bool(number)
    assert all(torch.equal(ends[0][0][key], ends[1][0][key]) for key in ends[0][0])
    assert torch.equal(ends[0][1], ends[1][1])


def of_package(package: Any, inner: Wrapped) -> Any:
    """The module as one of another package's LightningModule."""

    class Other(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.drop, self.make = inner.model, inner.drop, inner.make

        forward, loss = Wrapped.forward, Wrapped.loss
        training_step, configure_optimizers = Wrapped.training_step, Wrapped.configure_optimizers

    return Other()


@pytest.mark.parametrize("make", [adamw, with_schedule], ids=["AdamW", "SGD"])
def test_a_fit_that_goes_on_from_a_checkpoint_goes_on_with_the_recording(make: Any, tmp_path: Path) -> None:
    """SGD does not count its steps: the Trainer's count tells where training goes on."""

    class Saving(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    plain(Wrapped(make), tmp_path / "plain")
    first = trainer(RecordCallback(tmp_path / "run", checkpoints=[4, 9, 15]), Saving(), max_epochs=2)
    with pytest.warns(UserWarning, match=r"checkpoints at \[15\] were never reached"):
        first.fit(Wrapped(make), loader())
    assert sf.Trajectory.load(tmp_path / "run").steps == (4, 9, 12)
    again = trainer(RecordCallback(tmp_path / "run", checkpoints=[4, 9, 15], overwrite=True))
    again.fit(Wrapped(make), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    run, expected = sf.Trajectory.load(tmp_path / "run"), sf.Trajectory.load(tmp_path / "plain")
    assert run.steps == (4, 9, 15, 18)
    torch.testing.assert_close(torch.tensor(run.lr_steps(0, 18)), torch.tensor(expected.lr_steps(0, 18)))


def test_a_fit_that_fails_leaves_a_recording_that_can_go_on(tmp_path: Path) -> None:
    class Failing(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 7:
                raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        trainer(RecordCallback(tmp_path / "run"), Failing()).fit(Wrapped(adamw), loader())
    with pytest.raises(sf.TrajectoryError, match="did not finish"):
        sf.Trajectory.load(tmp_path / "run")
    assert sf.Trajectory.load(tmp_path / "run", unfinished=True).steps == (3, 6)


def test_the_analyzer_takes_the_lightning_module_and_refuses_the_network_in_it(tmp_path: Path) -> None:
    module = Wrapped(adamw)
    trainer(RecordCallback(tmp_path / "run", checkpoints=1, stage="tuning")).fit(module, loader())
    run = sf.Trajectory.load(tmp_path / "run")
    assert run.stage == "tuning" and run.parameter_groups is not None and "model.0.weight" in run.parameter_groups
    attached = scores(module, tmp_path / "run", tmp_path / "store")
    files = sorted((tmp_path / "store").rglob("*"))
    assert torch.equal(scores(Wrapped(adamw), tmp_path / "run", tmp_path / "store"), attached)
    assert sorted((tmp_path / "store").rglob("*")) == files  # what the module that was fitted had left in the store
    with pytest.raises(sf.TrajectoryError, match=r"model\.0\.weight"):
        sf.Analyzer(module.model, FixedLabels(), run, store=tmp_path / "other", progress=False)


class Endless(IterableDataset[Any]):
    """Batches without a length."""

    def __iter__(self) -> Iterator[Any]:
        yield from loader()


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (lambda: DataLoader(Endless(), batch_size=None), {"max_steps": 6, "max_epochs": -1}, "number of examples"),
        (lambda: {"a": loader(), "b": loader()}, {}, "number of examples is not told"),
        (loader, {"limit_train_batches": 3}, "of 6 batches the Trainer reads the first 3"),
        (lambda: loader(shuffle=True), {"overfit_batches": 2}, "of 6 batches the Trainer reads the first 2"),
    ],
)
def test_a_dataset_size_that_is_not_told_is_asked_for(data: Any, options: Any, words: str, tmp_path: Path) -> None:
    class First(Wrapped):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch["a"] if isinstance(batch, dict) else batch, index)

    with pytest.raises(sf.TrajectoryError, match=words):
        trainer(RecordCallback(tmp_path / "run"), **options).fit(First(adamw), data())
    trainer(RecordCallback(tmp_path / "run", dataset_size=12, checkpoints=2), **options).fit(First(adamw), data())
    run = sf.Trajectory.load(tmp_path / "run")
    assert run.dataset_size == 12 and len(run) == 2


def test_training_whose_steps_cannot_be_foreseen_is_recorded_without_their_number(tmp_path: Path) -> None:
    schedule = pl.callbacks.GradientAccumulationScheduler({1: 3})
    callback = RecordCallback(tmp_path / "run", checkpoints=2)
    trainer(callback, schedule).fit(Wrapped(adamw), loader())
    assert callback.recording is not None and callback.recording.schedule.total_steps is None
    assert sf.Trajectory.load(tmp_path / "run").total_steps == 6 + 2 + 2


def test_an_accumulation_that_an_epoch_ends_early_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="last step gathers 2 of 4 batches, and Lightning divides"):
        trainer(RecordCallback(tmp_path, checkpoints=1), accumulate_grad_batches=4).fit(Wrapped(adamw), loader())


def test_an_option_that_record_does_not_have_is_refused_where_the_callback_is_made() -> None:
    with pytest.raises(TypeError, match=r"no option 'checkpoint': expected some of .*'batch_size'"):
        RecordCallback("run", checkpoint=3)


def test_without_lightning_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("segflow.integrations.lightning")
    monkeypatch.setattr(module, "_PACKAGES", {"lightning_that_is_nowhere": None})
    with pytest.raises(ImportError, match="pip install lightning"):
        module._callback_classes()


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_after_backward"])
def test_gradients_that_a_hook_of_the_module_changes_are_named(hook: str, tmp_path: Path) -> None:
    class Changing(Wrapped):
        pass

    def double(module: Any, *_: Any) -> None:
        for parameter in module.parameters():
            parameter.grad.mul_(2)

    setattr(Changing, hook, double)
    with pytest.warns(UserWarning, match="changed between the backward pass and the step"):
        trainer(RecordCallback(tmp_path / "run")).fit(Changing(adamw), loader())


@pytest.mark.parametrize("kind", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_weights_that_lightning_averages_are_not_what_is_recorded(kind: str, tmp_path: Path) -> None:
    average = pl.callbacks.StochasticWeightAveraging(0.01) if kind[0] == "S" else pl.callbacks.EMAWeightAveraging()
    module = Wrapped(adamw)
    with pytest.warns(UserWarning, match=r"WeightAveraging leaves averaged weights .* see Trajectory.averaged"):
        trainer(RecordCallback(tmp_path / "run", checkpoints=2), average).fit(module, loader())
    run, last = sf.Trajectory.load(tmp_path / "run"), module.state_dict()
    assert not all(torch.equal(value, last[name]) for name, value in run.state(len(run) - 1).items())
