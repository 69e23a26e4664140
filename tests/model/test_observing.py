"""The model is left as it was, whatever is done to it and whatever is thrown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segflow as sf
from segflow.model.capture import capture
from segflow.model.find_layout import find_layout
from segflow.model.layers import choose_layers
from segflow.model.layout import CallLayout, Layout
from segflow.model.observing import observing

from ..support.exactness import normal, sines
from ..support.helpers import analyzer_of, mlp, perturbed_states, trajectory_of, vectors

DTYPE = torch.float64
ROWS = CallLayout(0)  # each example has a row of its own
PLAIN = Layout(dict.fromkeys(("first", "norm.weight", "norm.bias", "second"), ROWS), {}, {}, (), {}, {}, False)


class Kept(nn.Module):
    """Everything that could be left changed: modes, flags, buffers of both kinds, gradients, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("last", None)
        self.computed = torch.ones(2)
        self.first.bias.requires_grad_(False)
        self.norm.eval()
        self.second.weight.grad = torch.ones_like(self.second.weight)
        self.first.register_forward_hook(lambda _m, _a, output: output + 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # another tensor in its place
        self.norm.running_mean += 1
        self.last = x
        self.computed = self.second.weight.mean(1)
        return self.second(self.drop(self.norm(self.first(x))))


def _snapshot(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "registers": [(list(m._parameters), list(m._buffers)) for m in model.modules()],
        "computed": [(id(t), t.tolist()) for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)],
        "values": {name: tensor.detach().clone().numpy().tobytes() for name, tensor in tensors.items()},
        "gradients": {name: None if p.grad is None else (id(p.grad), p.grad.tolist()) for name, p in tensors.items()},
        "hooks": [[list(getattr(module, kind)) for kind in hooks] for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "fused attention": torch.backends.mha.get_fastpath_enabled(),
        "gradients on": torch.is_grad_enabled(),
    }


def _observe(model: Kept, fault: str | None) -> None:
    """Capture within `observing`, doing all the damage that a session may do; `fault` says where to stop."""
    tracked = choose_layers(model).tracked
    x = normal(4, 3)

    def loss() -> Tensor:
        model.drop.train()
        output = model(x)
        torch.randn(3)
        if fault == "loss":
            raise KeyError("the user's loss")
        return output.sum()

    def consume(_layer: Any, _tokens: Any) -> None:
        if fault == "consumer":
            raise ZeroDivisionError("the consumer")

    with observing(model):
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
        if fault == "before":
            raise OSError("loading")
        assert not any(module.training for module in model.modules())
        capture(tracked, PLAIN, loss, consume, torch.float64, len(x))
        model.train().requires_grad_(True)
        model.first.weight = nn.Parameter(torch.zeros(3, 3))
        if fault == "after":
            raise KeyboardInterrupt


FAULTS: dict[str | None, type[BaseException] | None] = {
    None: None,
    "before": OSError,
    "loss": KeyError,
    "consumer": ZeroDivisionError,
    "after": KeyboardInterrupt,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("fused", [True, False])
def test_observing_leaves_no_trace_whatever_is_thrown(fault: str | None, fused: bool) -> None:
    model = Kept()
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        before = _snapshot(model)
        if fault is None:
            _observe(model, fault)
        else:
            with pytest.raises(FAULTS[fault]):
                _observe(model, fault)
        assert _snapshot(model) == before
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_hooks_are_gone_when_finding_the_layout_fails() -> None:
    model = Kept()
    before = _snapshot(model)

    def run(_copies: int) -> None:
        raise ValueError("the user's collate")

    tracked = choose_layers(model).tracked
    with pytest.raises(ValueError, match="collate"), observing(model):
        find_layout(tracked, run)
    assert _snapshot(model) == before


def test_hooks_are_gone_before_observing_ends() -> None:
    model = mlp()
    tracked = choose_layers(model).tracked
    with observing(model):
        with pytest.raises(ZeroDivisionError):
            layout = find_layout(tracked, lambda copies: sines(model, normal(copies, 5)))
            capture(tracked, layout, lambda: sines(model, normal(4, 5)), lambda *_: 1 / 0, torch.float64, 4)
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("stage", ["check", "fit", "score"])
@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_an_exception_in_the_users_loss_leaves_the_model_as_it_was(tmp_path: Path, stage: str, at: int) -> None:
    model, data, calls = mlp(), vectors(10), []
    model[2].eval()
    model[0].bias.requires_grad_(False)

    class Failing(sf.tasks.Classification):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            calls.append(sample)
            loss = super().compute_train_loss(batch, model, sample)
            if armed and len(calls) >= at:
                raise ArithmeticError("the user's own")
            return loss

    trajectory = trajectory_of(tmp_path / "run", perturbed_states(model, 2), len(data))
    analyzer = analyzer_of(model, trajectory, tmp_path / "store", Failing(), method=sf.Source(segments=1))
    armed = False
    if stage == "score":
        analyzer.fit(data, batch_size=4)
    calls.clear()
    before, armed = _snapshot(model), True
    with pytest.raises(sf.TaskError, match="raised ArithmeticError: the user's own"):
        if stage == "check":
            analyzer.check(data)
        elif stage == "fit":
            analyzer.fit(data, batch_size=2)
        else:
            analyzer.score(sf.Groups.singletons(len(data)), data, vectors(3, seed=5), batch_size=2)
    assert _snapshot(model) == before


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_model_with_uninitialised_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with (
        pytest.raises(sf.LayerError, match=r"parameter '1\.weight' is lazy .*Run the model on one batch"),
        observing(model),
    ):
        pass
    model(torch.ones(1, 2))
    with observing(model):
        pass
