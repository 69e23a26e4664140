"""Where examples cannot be told apart in a batch they are run one by one, and every gradient stays exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..support.exactness import Calls, assert_seen_exactly, normal

DTYPE = torch.float64


# ---- inputs in which the layers' calls do not count the examples plainly ----


def _flattened(model: Any, x: Tensor) -> Tensor:
    return model.fc(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _position_major(model: Any, x: Tensor) -> Tensor:
    turned = x.transpose(0, 1)
    return model.fc(turned.flatten(0, 1)).unflatten(0, turned.shape[:2]).transpose(0, 1)


def _frames(model: Any, x: Tensor) -> Tensor:
    return model.fc(x.flatten(0, 1)[:, None]).squeeze(1).unflatten(0, x.shape[:2])


def _shared_by_the_batch(model: Any, x: Tensor) -> Tensor:
    return x @ model.fc(torch.ones(2, 3)).T


def _broadcast(model: Any, x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)[:, None] * model.fc(torch.ones(1, 3))


def _one_by_one(model: Any, x: Tensor) -> Tensor:
    return torch.stack([model.fc(row) for row in x])


def _features_alone(model: Any, x: Tensor) -> Tensor:
    return torch.stack([torch.stack([model.fc(place) for place in row]) for row in x])


def _two_layouts(model: Any, x: Tensor) -> Tensor:
    return model.fc(x).sum(1) + model.fc(x.transpose(0, 1)).sum(0)


def _routed(model: Any, x: Tensor) -> Tensor:
    """A mixture of experts: all examples' rows by the expert that is theirs; some examples have none for the second."""
    rows = x.flatten(0, 1)
    first = rows[:, 0] > -0.8
    output = rows.new_zeros(len(rows), 2)
    output[first] = model.fc(rows[first])
    output[~first] = model.other(rows[~first])
    return output.unflatten(0, x.shape[:2])


def _of_both(model: Any, x: Tensor) -> Tensor:
    """Examples one after the other, and again: which rows are whose does not follow from their number."""
    return sum(model.fc(torch.cat([x, 2 * x]).flatten(0, 1)).unflatten(0, (2, len(x), -1)).unbind(0))


FOLDED: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module], bool]] = {
    "example-major": (_flattened, lambda: nn.Linear(3, 2), True),
    "frames": (_frames, lambda: nn.Conv1d(1, 1, 2), True),
    "broadcast": (_broadcast, lambda: nn.Linear(3, 2), False),
    "position-major": (_position_major, lambda: nn.Linear(3, 2), False),
    "shared": (_shared_by_the_batch, lambda: nn.Linear(3, 3), False),
    "one by one": (_one_by_one, lambda: nn.Linear(3, 2), False),
    "features alone": (_features_alone, lambda: nn.Linear(3, 2), False),
    "two layouts": (_two_layouts, lambda: nn.Linear(3, 2), False),
    "routed": (_routed, lambda: nn.Linear(3, 2), False),
    "of both": (_of_both, lambda: nn.Linear(3, 2), False),
}


@pytest.mark.parametrize("case", FOLDED)
@pytest.mark.parametrize("positions", [2, 3, 4])
def test_gradients_are_exact_wherever_a_call_counts_the_examples(case: str, positions: int) -> None:
    run, layer, together = FOLDED[case]
    more = {"other": nn.Linear(3, 2)} if case == "routed" else {}
    x = normal(5, positions, 3, seed=1)
    x[:, :, 0] = x[:, :, 0].abs()
    x[0, 0, 0], x[1, :2, 0] = -1, -1  # routed: one row of the first example to the second expert, two of another, ...
    seen = assert_seen_exactly(Calls(run, fc=layer(), **more), x, sizes=(1, 2, 3, 5))
    assert (not seen.alone) == together


def test_a_convolution_that_sees_no_row_of_an_example_has_a_gradient_of_zero_there() -> None:
    """Images routed to one of two convolutions: each batch of one leaves the other without any."""

    def run(model: Any, x: Tensor) -> Tensor:
        left = x[:, 0, 0] > 0
        output = x.new_zeros(len(x), 2, 3)
        output[left], output[~left] = model.left(x[left]), model.right(x[~left])
        return output

    x = normal(5, 1, 4)
    x[:, 0, 0] = torch.tensor([1.0, -1, 1, 1, -1])
    model = Calls(run, left=nn.Conv1d(1, 2, 2), right=nn.Conv1d(1, 2, 2))
    assert assert_seen_exactly(model, x).alone.keys() == {"left", "right"}


def test_a_loss_that_mixes_its_examples_is_taken_of_each_alone() -> None:
    seen = assert_seen_exactly(
        Calls(lambda m, x: m.fc(x[:, None] + x[None, :]).sum(1), fc=nn.Linear(3, 2)), normal(4, 3)
    )
    assert seen.alone


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_convolution_along_the_examples_is_run_alone(axis: int) -> None:
    """Its features do not stand on the axis that it takes for the channels'."""

    def run(model: Any, x: Tensor) -> Tensor:
        return model.conv(x.movedim(0, axis)[None])[0].movedim(axis, 0)

    assert assert_seen_exactly(Calls(run, conv=nn.Conv2d(2, 3, 1)), normal(3, 2, 4)).alone


def test_examples_of_several_lengths_that_are_flattened_together_are_exact_one_by_one() -> None:
    """The first has one position, so that two copies of it look like rows of their own."""
    data = [normal(length, 3, seed=length) for length in (1, 2, 3, 2)]
    assert assert_seen_exactly(nn.Linear(3, 2), data, collate=torch.cat).alone == {"": "tokens"}


def test_examples_routed_to_one_of_two_layers_are_exact() -> None:
    """A batch in which one of the layers sees nothing at all, and an example that the first one did not reach."""

    def routed(model: Any, x: Tensor) -> Tensor:
        left = x[:, 0] > 0
        return torch.cat([model.left(x[left]), model.right(x[~left])])

    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [2.0, 1.0], [0.3, 0.4], [-2.0, 1.0]])
    model = Calls(routed, left=nn.Linear(2, 2), right=nn.Linear(2, 2))
    assert assert_seen_exactly(model, x).alone.keys() == {"left", "right"}


# ---- weights that are used outside of their layers' calls ----


OUTSIDE: dict[str, Callable[..., Tensor]] = {
    "tied head": lambda m, x: functional.linear(torch.tanh(m.fc(x)), m.fc.weight),
    "transposed": lambda m, x: torch.tanh(m.fc(x)) @ m.fc.weight,
    "only bias": lambda m, x: torch.tanh(m.fc(x)) * m.fc.bias,
    "called for nothing": lambda m, x: functional.linear(x, m.fc.weight, m.fc.bias) + m.fc(x).detach(),
    "never called": lambda m, x: functional.linear(x, m.fc.weight, m.fc.bias),
    "penalty": lambda m, x: m.fc(x) + m.fc.weight.norm(),
}


@pytest.mark.parametrize("kind", ["train", "measurement"])
@pytest.mark.parametrize("case", OUTSIDE)
def test_a_weight_used_outside_of_its_layers_calls_is_exact(case: str, kind: str) -> None:
    model = Calls(lambda m, x: OUTSIDE[case](m, x) + m.other(x), fc=nn.Linear(3, 3), other=nn.Linear(3, 3))
    seen = assert_seen_exactly(model, normal(4, 3), kind=kind)
    assert seen.alone == {"fc": "gradient"}, "the other layer is seen in the batch"
