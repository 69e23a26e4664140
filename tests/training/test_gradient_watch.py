"""What happens to gradients between the backward pass and the step: seen, and torch left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import segflow as sf
from segflow.training.gradient_watch import BY_HAND, BY_VALUE, ON_CLIPPED

from ..support.helpers import mlp, vectors

STEPS, N = 6, 24

# As torch 2.4 and 2.5 have it: one function, which looks everything up in the same module.
MONOLITH = """
def old_clip_grad_norm_(parameters, max_norm, norm_type=2.0, foreach=None):
    grads = [p.grad for p in parameters if p.grad is not None]
    grouped_grads = _group_tensors_by_device_and_dtype([grads])
    norms = []
    for ((device, _), ([device_grads], _)) in grouped_grads.items():
        norms.extend(torch._foreach_norm(device_grads, norm_type))
    total_norm = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    clip_coef = float(max_norm) / (total_norm + 1e-6)
    clip_coef_clamped = torch.clamp(clip_coef, max=1.0)
    for ((device, _), ([device_grads], _)) in grouped_grads.items():
        torch._foreach_mul_(device_grads, clip_coef_clamped.to(device))
    return total_norm
"""


def old_clip(parameters: Any, max_norm: float) -> Tensor:
    exec(MONOLITH, clip_grad.__dict__)
    try:
        with torch.no_grad():
            total: Tensor = clip_grad.old_clip_grad_norm_(list(parameters), max_norm)  # type: ignore[attr-defined]
            return total
    finally:
        del clip_grad.__dict__["old_clip_grad_norm_"]


def by_parts(parameters: Any, max_norm: float) -> Tensor:
    parameters = list(parameters)
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total


Watched = Callable[[nn.Module, int], Any]


def run(folder: Path, between: Watched, before: Watched = lambda _m, _s: None, model: Any = None) -> sf.Trajectory:
    """Six steps; between: what the loop does between the backward pass and the step."""
    model = model or mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    x, y = vectors(N).tensors
    with sf.record(model, optimizer, folder, dataset_size=N, checkpoints=2):
        for step in range(STEPS):
            optimizer.zero_grad()
            before(model, step)
            nn.functional.cross_entropy(model(x), y).backward()
            between(model, step)
            optimizer.step()
    return sf.Trajectory.load(folder)


@pytest.mark.parametrize("clip", [clip_grad_norm_, old_clip, by_parts, torch.nn.utils.clip_grad_norm_])
def test_factors_of_clipping_by_norm_are_those_that_torch_multiplied_by(tmp_path: Path, clip: Any) -> None:
    expected: list[float] = []

    def between(model: nn.Module, _step: int) -> None:
        expected.append(min(1.0, 0.3 / (float(clip(model.parameters(), 0.3)) + 1e-6)))

    found = run(tmp_path, between)
    assert min(expected) < 0.9
    assert found.used.clip_factors[:, 0].tolist() == pytest.approx(expected, rel=1e-12)
    assert set(found.parameter_groups.values()) == {0}
    assert found.observed["clipping"]["mean factor"] == pytest.approx(sum(expected) / STEPS)
    assert "gradients, not followed" not in found.observed


def test_factors_of_gradients_that_were_made_by_hand_do_not_add_up(tmp_path: Path) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    x, y = vectors(N).tensors
    expected = []
    with sf.record(model, optimizer, tmp_path, dataset_size=N, checkpoints=2):
        for _ in range(STEPS):
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            expected.append(min(1.0, 0.3 / (float(clip_grad_norm_(parameters, 0.3)) + 1e-6)))
            optimizer.step()
    assert sf.Trajectory.load(tmp_path).used.clip_factors[:, 0].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_norm_that_is_only_measured_clips_nothing(tmp_path: Path) -> None:
    found = run(tmp_path, lambda model, _s: clip_grad_norm_(model.parameters(), float("inf")))
    assert (found.used.clip_factors == 1).all() and "clipping" not in found.observed


def test_factors_of_several_calls_multiply_parameter_by_parameter(tmp_path: Path) -> None:
    norms: list[tuple[float, float]] = []

    def between(model: nn.Module, _step: int) -> None:
        first = float(clip_grad_norm_(model[0].parameters(), 0.02))
        norms.append((first, float(clip_grad_norm_(model.parameters(), 0.2))))

    found = run(tmp_path, between)
    own, every = (
        torch.tensor([min(1.0, limit / (norm[place] + 1e-6)) for norm in norms], dtype=torch.float64)
        for place, limit in ((0, 0.02), (1, 0.2))
    )
    for name, expected in (("0.weight", own * every), ("0.bias", own * every), ("4.weight", every)):
        factors = torch.from_numpy(found.used.clip_factors[:, found.group_of(name)])
        torch.testing.assert_close(factors, expected, rtol=1e-12, atol=0)
    assert (own * every != every).any()


def test_a_factor_is_gone_with_its_gradient(tmp_path: Path) -> None:
    """A step that is left out after clipping, as by GradScaler, does not scale the next gradient."""
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    x, y = vectors(N).tensors
    for none in (True, False):
        with sf.record(model, optimizer, tmp_path / str(none), dataset_size=N, checkpoints=1):
            for step in range(2 * STEPS):
                optimizer.zero_grad(set_to_none=none)
                nn.functional.cross_entropy(model(x), y).backward()
                if step % 2 == 0:
                    clip_grad_norm_(model.parameters(), 0.1)
                else:
                    optimizer.step()
        found = sf.Trajectory.load(tmp_path / str(none))
        assert found.total_steps == STEPS and (found.used.clip_factors == 1).all()


@pytest.mark.parametrize(
    ("between", "what"),
    [
        (lambda m, _s: clip_grad_value_(m.parameters(), 0.01, foreach=True), BY_VALUE),
        (lambda m, _s: clip_grad_value_(m.parameters(), 0.01, foreach=False), BY_HAND),
        (lambda m, s: [p.grad.mul_(0.5) for p in m.parameters()] if s == 3 else None, BY_HAND),
        (lambda m, _s: [setattr(p, "grad", p.grad * 0.5) for p in m.parameters()], BY_HAND),
        (lambda m, _s: (m[0].weight.grad.add_(0.1), clip_grad_norm_(m.parameters(), 0.1)), BY_HAND),
    ],
    ids=["by value", "by value, one by one", "by hand, once", "replaced", "noise before clipping"],
)
def test_what_no_factor_follows_is_named(tmp_path: Path, between: Watched, what: str) -> None:
    with pytest.warns(UserWarning, match=rf"record\(\): gradients were {what}, which scores do not follow"):
        found = run(tmp_path, between)
    assert what in found.observed["gradients, not followed"]


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gradients_that_a_closure_changes_are_named(tmp_path: Path, by_name: bool, factor: float) -> None:
    model, (x, y) = mlp(), vectors(N).tensors
    optimizer = SGD(model.parameters(), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.1)
        for parameter in model.parameters() if factor != 1 else ():
            parameter.grad.mul_(factor)
        return loss.item()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sf.record(model, optimizer, tmp_path, dataset_size=N, checkpoints=2):
            losses = [optimizer.step(closure=closure) if by_name else optimizer.step(closure) for _ in range(STEPS)]
    assert [BY_HAND in str(warning.message) for warning in caught] == [True] * (factor != 1)
    assert losses[0] > losses[-1] > 0  # what the closure returned


def test_gradients_that_are_accumulated_onto_clipped_ones_are_named(tmp_path: Path) -> None:
    x, y = vectors(N).tensors

    def clip_each_part(model: nn.Module, _step: int) -> None:
        clip_grad_norm_(model.parameters(), 0.1)
        nn.functional.cross_entropy(model(x), y).backward()

    with pytest.warns(UserWarning, match=ON_CLIPPED):
        run(tmp_path, clip_each_part)


def test_plain_loops_of_many_kinds_name_nothing(tmp_path: Path) -> None:
    x, y = vectors(N).tensors

    def accumulate(model: nn.Module, _step: int) -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        clip_grad_norm_(model.parameters(), 0.1)

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self.net[:2], x.requires_grad_(), use_reentrant=True)
            return self.net[2:](hidden)

    for name, between, model in (("accumulated", accumulate, None), ("recomputed", lambda _m, _s: None, Recomputed())):
        found = run(tmp_path / name, between, model=model)
        assert "gradients, not followed" not in found.observed, name
        assert (found.used.carried == 1).all(), name


def test_torchs_functions_are_put_back_also_after_an_error_and_of_two_recordings_the_last(tmp_path: Path) -> None:
    scaler = torch.amp.grad_scaler.GradScaler
    before = (torch.autograd.backward, scaler._unscale_grads_, dict(vars(clip_grad)))
    model, other = mlp(), mlp()
    outer = sf.record(model, SGD(model.parameters(), lr=0.1), tmp_path / "a", dataset_size=N)
    inner = sf.record(other, SGD(other.parameters(), lr=0.1), tmp_path / "b", dataset_size=N)
    with pytest.raises(KeyboardInterrupt), outer, inner:
        assert torch.autograd.backward is not before[0] and clip_grad.torch is not torch
        raise KeyboardInterrupt
    assert (torch.autograd.backward, scaler._unscale_grads_, dict(vars(clip_grad))) == before


def test_each_of_two_recordings_sees_its_own_model(tmp_path: Path) -> None:
    models = [mlp(), mlp(seed=3)]
    optimizers = [SGD(model.parameters(), lr=0.1) for model in models]
    x, y = vectors(N).tensors
    records = [
        sf.record(m, o, tmp_path / str(place), dataset_size=N, checkpoints=1)
        for place, (m, o) in enumerate(zip(models, optimizers, strict=True))
    ]
    with records[0], records[1]:
        for _ in range(STEPS):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            clip_grad_norm_(models[1].parameters(), 1e-3)
    for place in range(2):
        found = sf.Trajectory.load(tmp_path / str(place))
        assert found.total_steps == STEPS and (found.used.carried == 1).all() and (found.used.clip_factors == 1).all()
