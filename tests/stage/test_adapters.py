"""An adapter's files alone: the scores of whole states, bound to the base that the model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import segflow as sf
from segflow.methods.plan import Point
from segflow.model.observing import observing
from segflow.stage.unfilled import forget, unfilled
from segflow.stage.unit_identity import checkpoint_digest

from ..support.helpers import FixedLabels, analyzer_of, vectors

N, STEPS = 12, 6
DATA = vectors(N)


class Integers(nn.Module):
    """Stands in for a quantised layer: weights in whole numbers, in buffers."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("codes", torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8))
        self.register_buffer("scale", torch.tensor(0.1, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, (self.codes * self.scale).to(x.dtype))


class Net(nn.Module):
    """Two layers to adapt, one of whole numbers between them, and a head; in double precision unless told otherwise."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.whole, self.mid, self.head = nn.Linear(5, 6), Integers(6, 6), nn.Linear(6, 4), nn.Linear(4, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.whole(torch.tanh(self.up(x.to(self.head.weight.dtype)))))
        return self.head(torch.tanh(self.mid(h)))


def adapted(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["up", "mid"], "modules_to_save": ["head"], **options}
    model = get_peft_model(Net(seed, dtype), LoraConfig(**options))  # type: ignore[arg-type]
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            precise = torch.float64 if dtype == torch.float64 else torch.float32
            parameter.data = 0.5 * torch.randn(parameter.shape, dtype=torch.float64).to(precise)
    return model


class Run:
    """A LoRA run, saved at two steps: whole states, adapters' folders, and its recording; with its second moments."""

    def __init__(self, folder: Path, model: Any):
        self.folder, self.steps, self.model = folder, (3, 6), model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam(trained.values(), lr=0.05)
        with sf.record(model, optimizer, folder / "run", dataset_size=N, total_steps=STEPS, checkpoints=2):
            for step in range(1, STEPS + 1):
                optimizer.zero_grad()
                functional.cross_entropy(model(DATA.tensors[0]), DATA.tensors[1]).backward()
                optimizer.step()
                if step in self.steps:
                    model.save_pretrained(folder / f"checkpoint-{step}")
                    save_file({n: v.clone() for n, v in model.state_dict().items()}, folder / f"{step}.safetensors")
                    moments = {
                        name: optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**step) for name, p in trained.items()
                    }
                    save_file(moments, folder / f"v-{step}.safetensors")

    def trajectory(self, *files: Path, **options: Any) -> sf.Trajectory:
        optimizer = sf.OptimizerConstants("Adam", batch_size=N)
        return sf.Trajectory(files, self.steps, 0.05, N, optimizer, **options)

    def whole(self, **options: Any) -> sf.Trajectory:
        return self.trajectory(
            *(self.folder / f"{step}.safetensors" for step in self.steps), **self._moments(), **options
        )

    def adapters(self, **options: Any) -> sf.Trajectory:
        return self.trajectory(
            *(self.folder / f"checkpoint-{step}" for step in self.steps), **self._moments(), **options
        )

    def _moments(self) -> dict[str, Any]:
        return {"second_moments": [self.folder / f"v-{step}.safetensors" for step in self.steps]}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, adapted())


def scores(model: Any, trajectory: sf.Trajectory, store: Path, method: Any = None) -> np.ndarray:
    analyzer = analyzer_of(model, trajectory, store, method=method or sf.Source(1))
    analyzer.fit(DATA)
    return np.asarray(analyzer.score(sf.Groups.singletons(N), DATA, DATA).values)


def test_an_adapters_folders_give_the_scores_of_whole_states(run: Run, tmp_path: Path) -> None:
    expected = scores(adapted(), run.whole(), tmp_path / "s1")
    recorded = scores(adapted(), sf.Trajectory.load(tmp_path / "run"), tmp_path / "s2")
    found = scores(adapted(), run.adapters(), tmp_path / "s3")
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(recorded, expected, rtol=1e-6)
    compiled = torch.compile(adapted(), backend="eager")
    np.testing.assert_allclose(scores(compiled, run.adapters(), tmp_path / "s4"), expected, rtol=1e-10)


def test_gradients_of_an_adapter_are_autograds(run: Run, tmp_path: Path) -> None:
    model = adapted()
    found = scores(model, run.adapters(), tmp_path / "s", sf.GradientDot())
    run.whole().load_into(model, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x, y in zip(*DATA.tensors, strict=True):
        gradients = torch.autograd.grad(functional.cross_entropy(model(x[None]), y[None]), trained)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    products = torch.stack(rows) @ torch.stack(rows).T / N
    np.testing.assert_allclose(found, products.numpy(), rtol=1e-9, atol=1e-14)


def test_loading_an_adapter_leaves_the_base_as_it_is(run: Run) -> None:
    model = adapted(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run.adapters().load_into(model, 0)
    expected = load_file(run.folder / "3.safetensors")
    left = run.adapters().left_alone(model, 0)
    assert left == {name for name in before if "lora" not in name and "modules_to_save" not in name}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in left else expected[name]), name


def test_a_mean_of_adapters_is_the_mean_of_whole_states(run: Run) -> None:
    models = adapted(), adapted()
    run.adapters().load_into(models[0], {0: 1.0, 1: 3.0})
    run.whole().load_into(models[1], {0: 1.0, 1: 3.0})
    for (name, found), expected in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.allclose(found.double(), expected.double(), rtol=1e-12), name


def test_nothing_that_segflow_does_changes_the_base_for_what_comes_after(run: Run, tmp_path: Path) -> None:
    """Probes of a loss perturb parameters, which the next checkpoint puts back; an adapter's does not."""
    model = adapted()
    analyzer = analyzer_of(model, run.adapters(), tmp_path / "s", method=sf.Source(1))
    base = {
        name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name or "whole" in name
    }
    seen: list[bool] = []
    inner = FixedLabels.compute_train_loss

    class Watching(FixedLabels):
        def compute_train_loss(self, batch: Any, of: nn.Module, sample: bool = False) -> Tensor:
            state = of.state_dict()
            seen.append(all(torch.equal(state[name], value) for name, value in base.items()))
            return inner(self, batch, of, sample)

    analyzer = analyzer_of(model, run.adapters(), tmp_path / "s", Watching(), method=sf.Source(1))
    analyzer.fit(DATA)
    assert len(seen) > 10 and all(seen)


def _another_base(model: Any) -> None:
    with torch.no_grad():
        model.base_model.model.mid.base_layer.weight[0, 0] += 1e-3


def _another_code(model: Any) -> None:
    model.base_model.model.whole.codes[0, 0] += 1


def _another_scale(model: Any) -> None:
    model.base_model.model.whole.scale *= 1.001


def _swapped_base(model: Any) -> None:
    weight = model.base_model.model.up.base_layer.weight
    weight.data = weight.data.flip(0)


def _another_value_behind_torchs_back(model: Any) -> None:
    model.base_model.model.up.base_layer.bias.data[0] += 1e-3


@pytest.mark.parametrize(
    "change", [_another_base, _another_code, _another_scale, _swapped_base, _another_value_behind_torchs_back]
)
def test_a_store_is_bound_to_the_base_that_adapters_leave(change: Any, run: Run, tmp_path: Path) -> None:
    model = adapted()
    analyzer = analyzer_of(model, run.adapters(), tmp_path / "s", method=sf.Source(1))
    analyzer.fit(DATA)
    change(model)
    with pytest.raises(sf.StoreError, match="was made from something else"):
        analyzer.fit(DATA)


@pytest.mark.parametrize("name", ["head.original_module.bias", "whole.codes", "whole.scale"])
def test_the_base_alone_tells_points_apart_where_losses_do_not(name: str, run: Run, tmp_path: Path) -> None:
    """What binds a unit is a digest of the base, not only the losses of a few probes."""
    model = adapted()
    context = analyzer_of(model, run.adapters(), tmp_path / "s").context
    first = checkpoint_digest(context, Point.at(0, 0))
    assert first.startswith(run.adapters().digest(0)) and checkpoint_digest(context, Point.at(0, 0)) == first
    changed = {**dict(model.named_parameters()), **dict(model.named_buffers())}[f"base_model.model.{name}"]
    changed.data += 1  # torch does not see it
    forget(model)
    assert checkpoint_digest(context, Point.at(0, 0)) != first


def test_whole_states_are_told_apart_by_their_files_alone(run: Run, tmp_path: Path) -> None:
    context = analyzer_of(adapted(), run.whole(), tmp_path / "s").context
    assert checkpoint_digest(context, Point.at(0, 0)) == run.whole().digest(0)
    assert not unfilled(context, Point.at(0, 0))


def test_whole_states_and_adapters_in_one_run_are_refused(run: Run, tmp_path: Path) -> None:
    mixed = run.trajectory(tmp_path / "3.safetensors", tmp_path / "checkpoint-6")
    with pytest.raises(sf.TrajectoryError, match=r"checkpoint-6 one leaves \['base_model.* as they are"):
        analyzer_of(adapted(), mixed, tmp_path / "s")
    with pytest.raises(sf.TrajectoryError, match="Give whole states at all checkpoints, or an adapter's alone at all"):
        analyzer_of(adapted(), [run.whole(), run.adapters()], tmp_path / "s")  # type: ignore[arg-type]


# What does not fit


def _edit(run: Run, edit: Any) -> None:
    path = run.folder / "checkpoint-6" / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path)


def _lacking(name: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if key != name}


ODD = {
    "a matrix of the adapter": (
        _lacking("base_model.model.mid.lora_B.weight"),
        r"lacks \['base_model.model.mid.lora_B.default",
    ),
    "a module to save": (
        _lacking("base_model.model.head.bias"),
        r"lacks \['base_model.model.head.modules_to_save.default",
    ),
    "a tensor of another model": (lambda s: s | {"other.weight": torch.ones(2)}, r"holds \['other.weight'\] besides"),
    "a part of the base": (
        lambda s: s | {"base_model.model.mid.base_layer.bias": torch.ones(4)},
        r"holds \['base_model.model.mid.base_layer.bias'\] besides",
    ),
    "a name with and without the adapter's": (
        lambda s: s | {"base_model.model.up.lora_A.default.weight": s["base_model.model.up.lora_A.weight"].clone()},
        "holds one tensor under the names",
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_a_file_that_is_not_the_adapters_is_refused_by_name(what: str, run: Run, tmp_path: Path) -> None:
    edit, text = ODD[what]
    _edit(run, edit)
    with pytest.raises(sf.TrajectoryError, match=text):
        run.adapters().load_into(adapted(), 1)
    with pytest.raises(sf.TrajectoryError, match=rf"checkpoint at step 6 .*{text}"):
        analyzer_of(adapted(), run.adapters(), tmp_path / "s")


@pytest.mark.parametrize("groups", [None, {"base_model.model.mid.base_layer.weight": 0}])
def test_what_was_trained_and_is_not_in_the_file_is_refused(groups: Any, run: Run, tmp_path: Path) -> None:
    model = adapted()
    if groups is None:
        model.base_model.model.mid.base_layer.weight.requires_grad_(True)
    found = run.trajectory(*run.adapters().checkpoints, parameter_groups=groups)
    with pytest.raises(
        sf.TrajectoryError, match=r"the adapter only, without \['base_model.model.mid.base_layer.weight'"
    ):
        analyzer_of(model, found, tmp_path / "s")


def test_an_adapter_of_another_scale_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(sf.TrajectoryError, match="was trained with lora_alpha=4, the model has 8"):
        analyzer_of(adapted(lora_alpha=8), run.adapters(), tmp_path / "s")


def test_of_several_adapters_the_active_one_is_meant(run: Run, tmp_path: Path) -> None:
    expected = scores(adapted(), run.adapters(), tmp_path / "s1")
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["up", "mid"], modules_to_save=["head"]))
    model.double()
    np.testing.assert_allclose(scores(model, run.adapters(), tmp_path / "s2"), expected, rtol=1e-10)
    model = adapted(modules_to_save=None)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up", "mid"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(sf.TrajectoryError, match=r"runs with the adapters \['default', 'other'\]"):
        run.adapters().load_into(model, 0)


def test_second_moments_go_by_the_adapters_names_as_well(run: Run) -> None:
    model = adapted()
    short = {
        value: name
        for name, value in zip(
            get_peft_model_state_dict(model),
            get_peft_model_state_dict(model, {n: n for n in model.state_dict()}).values(),
            strict=True,
        )
    }
    expected = run.adapters().of_model(model).second_moments(1)
    path = run.folder / "v-6.safetensors"
    save_file({short[name]: value for name, value in load_file(path).items()}, path)
    found = run.adapters().of_model(model)
    loaded = found.second_moments(1)
    assert expected and loaded and found.saved_moments(1) == set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


# Precisions


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_in_single_precision_on_a_coarse_base_are_attributed(autocast: bool, tmp_path: Path) -> None:
    class Coarse(FixedLabels):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return super().compute_train_loss(batch, model, sample).float()

    dtype = torch.float32 if autocast else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "modules_to_save": ["head"] if autocast else None}
    run, model = Run(tmp_path, adapted(**options)), adapted(**options)
    found = analyzer_of(model, run.adapters(), tmp_path / "s", Coarse(), method=sf.GradientDot())
    values = np.asarray(found.score(sf.Groups.singletons(N), DATA, DATA).values)
    run.adapters().load_into(model, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    with observing(model):
        for parameter in trained:
            parameter.requires_grad_(True)
        for x, y in zip(*DATA.tensors, strict=True):
            loss = Coarse().compute_train_loss((x[None], y[None]), model)
            rows.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, trained)]))
    expected = (torch.stack(rows) @ torch.stack(rows).T / N).numpy()
    assert np.linalg.norm(values - expected) < 0.03 * np.linalg.norm(expected)
    whole = analyzer_of(adapted(**options), run.whole(), tmp_path / "t", Coarse(), method=sf.GradientDot())
    np.testing.assert_array_equal(values, np.asarray(whole.score(sf.Groups.singletons(N), DATA, DATA).values))


def test_the_configuration_beside_an_adapter_says_how_it_was_made(run: Run) -> None:
    content = json.loads((run.folder / "checkpoint-3" / "adapter_config.json").read_text())
    assert content["lora_alpha"] == 4 and content["r"] == 2  # what check_config reads, as this peft writes it
