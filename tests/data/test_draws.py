"""Draws depend on (seed, place, example) only, and have the distributions that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Exponential, Normal, Uniform

import segflow as sf
from segflow.data.draws import drawing

from ..support.helpers import mlp, vectors

X = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [B, S, C]


def _flat_categorical(x: Tensor) -> Tensor:
    return torch.multinomial(x.flatten(0, 1).softmax(-1), 1).reshape(x.shape[:2])


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "multinomial": lambda x: torch.multinomial(x[:, 0].softmax(-1), 1),
    "several": lambda x: torch.multinomial(x[:, 0].softmax(-1), 3, replacement=True),
    "without replacement": lambda x: torch.multinomial(x[:, 0].softmax(-1), 3),
    "categorical": lambda x: Categorical(logits=x).sample(),
    "flat categorical": _flat_categorical,
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape, dtype=torch.float32),
    "normal": lambda x: Normal(x, x.exp()).rsample(),
    "torch.normal": lambda x: torch.normal(x, 1.0),
    "bernoulli": lambda x: Bernoulli(logits=x).sample(),
    "exponential": lambda x: Exponential(x.exp()).sample(),
    "uniform": lambda x: Uniform(x, x + 1).sample(),
    "gumbel": lambda x: (x - torch.empty_like(x).exponential_().log()).argmax(-1),
    "two draws": lambda x: torch.randn_like(x) + torch.rand_like(x),
}


def _drawn(name: str, examples: Sequence[int], seed: int = 0, place: int = 7, positions: int = 6) -> Tensor:
    with drawing(seed, place, examples):
        return DRAWS[name](X[list(examples), :positions])


@pytest.mark.parametrize("name", DRAWS)
def test_an_example_s_draws_do_not_depend_on_its_batch_or_order(name: str) -> None:
    whole = _drawn(name, range(40))
    for batch in (1, 3, 7):
        parts = [_drawn(name, range(start, min(start + batch, 40))) for start in range(0, 40, batch)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(_drawn(name, order), whole[order])


@pytest.mark.parametrize("name", ["categorical", "flat categorical", "randn_like", "bernoulli", "gumbel", "normal"])
def test_padding_to_another_length_leaves_the_earlier_positions_alone(name: str) -> None:
    assert torch.equal(_drawn(name, range(40), positions=4), _drawn(name, range(40))[:, :4])


@pytest.mark.parametrize("name", DRAWS)
def test_seed_place_and_example_each_change_the_draws(name: str) -> None:
    first = _drawn(name, range(40))
    for other in (_drawn(name, range(40), seed=1), _drawn(name, range(40), place=8)):
        assert not torch.equal(first, other)
    same = X[:1].expand(40, -1, -1)
    with drawing(0, 7, range(40)):
        assert len(torch.unique(DRAWS[name](same.clone()), dim=0)) > 1


def test_positions_first_tensors_are_drawn_by_example_too() -> None:
    with drawing(0, 0, range(8)):
        whole = torch.randn_like(torch.zeros(5, 8, 3))
    with drawing(0, 0, range(3, 8)):
        assert torch.equal(torch.randn_like(torch.zeros(5 + 1, 5, 3))[:5], whole[:, 3:])


@pytest.mark.parametrize(
    ("draw", "cdf"),
    [
        (torch.rand_like, stats.uniform.cdf),
        (torch.randn_like, stats.norm.cdf),
        (lambda x: Exponential(torch.ones_like(x)).sample(), stats.expon.cdf),
    ],
)
@pytest.mark.parametrize("shape", [(20_000,), (200, 100)])
def test_draws_have_their_distribution(draw: Callable[[Tensor], Tensor], cdf: object, shape: tuple[int, ...]) -> None:
    with drawing(0, 0, range(shape[0])):
        found = draw(torch.zeros(shape, dtype=torch.float64))
    assert torch.isfinite(found).all()
    assert stats.kstest(found.flatten().numpy(), cdf).pvalue > 1e-3
    for axis in range(len(shape)):  # neighbours are independent
        a, b = found.narrow(axis, 0, shape[axis] - 1), found.narrow(axis, 1, shape[axis] - 1)
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.03


def test_multinomial_frequencies_are_the_probabilities_and_nothing_impossible_is_drawn() -> None:
    p = torch.tensor([0.0, 0.1, 0.0, 0.2, 0.7, 0.0])
    with drawing(0, 0, range(20_000)):
        drawn = torch.multinomial(p.expand(20_000, -1), 1).flatten()
        pairs = torch.multinomial(p.expand(20_000, -1), 2)
    counts = torch.bincount(drawn, minlength=6)
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0].numpy(), (20_000 * p[p > 0]).double().numpy()).pvalue > 1e-3
    assert (pairs[:, 0] != pairs[:, 1]).all()
    firsts = torch.bincount(pairs[:, 0], minlength=6)
    assert stats.chisquare(firsts[p > 0].numpy(), (20_000 * p[p > 0]).double().numpy()).pvalue > 1e-3


def test_uniform_draws_stay_below_one_in_every_precision() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        with drawing(0, 0, range(1000)):
            found = torch.rand_like(torch.zeros(1000, 1000, dtype=dtype))
        assert found.dtype == dtype and found.min() >= 0 and found.max() < 1


def test_what_is_not_known_is_drawn_reproducibly_from_the_batch() -> None:
    def gammas(examples: Sequence[int]) -> Tensor:
        with drawing(0, 0, examples):
            return torch._standard_gamma(torch.ones(4))

    assert torch.equal(gammas([1, 2, 3, 4]), gammas([1, 2, 3, 4]))
    assert not torch.equal(gammas([1, 2, 3, 4]), gammas([1, 2, 3, 5]))


def test_the_callers_random_state_and_a_generator_of_its_own_are_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with pytest.raises(KeyError), drawing(0, 0, [1, 2]):
        torch.randn(2)
        torch._standard_gamma(torch.ones(4))
        raise KeyError
    assert torch.equal(torch.random.get_rng_state(), before)
    own = [torch.Generator().manual_seed(3) for _ in range(2)]
    with drawing(0, 0, range(4)):
        inside = torch.randn(4, generator=own[0])
    assert torch.equal(inside, torch.randn(4, generator=own[1]))


def test_invalid_probabilities_are_refused() -> None:
    for p in ([[0.0, 0.0]], [[float("nan"), 1.0]], [[-1.0, 2.0]]):
        with pytest.raises(sf.TaskError, match="row 0 is"), drawing(0, 0, [0]):
            torch.multinomial(torch.tensor(p), 1)


@pytest.mark.parametrize("task", [sf.tasks.Classification(), sf.tasks.Regression(measurement="prediction")])
def test_the_ready_made_tasks_sample_the_same_alone_and_in_a_batch(task: sf.Task) -> None:
    model, (x, y) = mlp(), vectors(9).tensors
    targets = y if isinstance(task, sf.tasks.Classification) else torch.zeros(9, 3, dtype=torch.float64)

    def loss(examples: list[int], model: nn.Module) -> Tensor:
        with drawing(3, 10, examples):
            return task.compute_train_loss((x[examples], targets[examples]), model, sample=True)

    alone = torch.stack([loss([index], model) for index in range(9)])
    torch.testing.assert_close(alone.sum(), loss(list(range(9)), model))
    torch.testing.assert_close(alone[4:].sum(), loss(list(range(4, 9)), model))
