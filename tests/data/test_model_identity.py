"""What the analysed model is besides its parameters: code that no value shows is told apart all the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import segflow as sf
from segflow.data.changing import settled
from segflow.data.model_identity import model_fingerprint

from ..support.helpers import analyzer_of, perturbed_states, trajectory_of, vectors

CODE = """
class Net(nn.Module):
    def __init__(self, flow, p=0.0):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.drop, self.flow, self.calls = nn.Dropout(p), flow, 0

    def forward(self, x):
        self.calls += 1  # a comment
        h = self.a(x)
        h = self.drop(h + self.b(h).tanh())
        return self.out(self.flow * h + (1 - self.flow) * h.detach())
"""


def net(flow: float = 0.9, edit: tuple[str, str] = ("", ""), **options: float) -> nn.Module:
    """A user's model, whose code may be edited; the gradients of lower layers depend on `flow`, its outputs do not."""
    namespace = {"nn": nn, "__name__": "a_users_module"}
    exec(compile(CODE.replace(*edit) if edit[0] else CODE, "a_users_module.py", "exec"), namespace)
    torch.manual_seed(0)
    model: nn.Module = namespace["Net"](flow, **options).double()  # type: ignore[operator]
    return model


CHANGES = {
    "an attribute": {"flow": 0.1},
    "code that changes gradients only": {"edit": ("self.b(h).tanh()", "self.b(h.detach()).tanh()")},
    "a setting of a module of torch's": {"p": 0.5},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_is_told_by_its_code_and_settings(name: str) -> None:
    assert model_fingerprint(net()) == model_fingerprint(net())
    assert model_fingerprint(net()) != model_fingerprint(net(**CHANGES[name]))  # type: ignore[arg-type]


def test_comments_parameters_and_what_running_changes_do_not_count() -> None:
    model = net()
    before = model_fingerprint(model)
    with torch.no_grad():
        model.out.weight.mul_(2)  # type: ignore[union-attr, operator]
    assert model_fingerprint(model) == before
    run = partial(model, torch.zeros(1, 5).double())
    left, _ = settled(partial(model_fingerprint, model), run, run)
    assert set(before) - set(left) <= {"Net self.calls"}
    assert model_fingerprint(net(edit=("# a comment", "# another"))) == before


@pytest.mark.parametrize("name", ["an attribute", "code that changes gradients only"])
def test_factors_of_a_model_whose_gradients_alone_changed_are_refused(tmp_path: Path, name: str) -> None:
    trajectory = trajectory_of(tmp_path / "run", perturbed_states(net(), 2, 0.3), 20)
    for method in (sf.InfluenceFunction(0.01), sf.Source()):
        analyzer_of(net(), trajectory, tmp_path / type(method).__name__, method=method).fit(vectors(20))
        changed = analyzer_of(net(**CHANGES[name]), trajectory, tmp_path / type(method).__name__, method=method)  # type: ignore[arg-type]
        with pytest.raises(sf.StoreError, match=r"was made from something else .*forward: Net"):
            changed.fit(vectors(20))
