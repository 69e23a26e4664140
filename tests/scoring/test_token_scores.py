"""Scores of training examples' tokens are the shares of their positions, found by turning each position's weights.

Axes: S positions, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import segflow as sf

from ..support.gang import Failed, Gang
from ..support.helpers import trajectory_of
from ..support.model_tasks import NO_LABEL, WORDS, ClassTask, Example, MaskedWordTask, causal_data, padded
from ..support.models import CASES, Case, N, Trained, trained
from .test_padding import LENGTHS, OtherWord, Words, collate, texts


class MaskedClassTask(ClassTask):
    def get_attention_mask(self, batch: Example) -> Tensor:
        return batch["attention_mask"]


def padded_left(examples: Sequence[Example]) -> Example:
    turned = padded([{n: v.flip(0) if v.ndim else v for n, v in example.items()} for example in examples])
    return {name: value.flip(1) if value.ndim > 1 else value for name, value in turned.items()}


def second_to_last(lengths: Sequence[int]) -> list[Example]:
    """Words of which the first is no label, so that what pads an example on the left does not tell it."""
    examples = causal_data(lengths)
    for example in examples:
        example["labels"] = example["labels"].clone()
        example["labels"][0] = NO_LABEL
    return examples


KINDS = {
    "gpt2": replace(CASES["gpt2"], task=MaskedWordTask(shift=True)),
    "masked bert": CASES["masked bert"],
    "bert classifier": replace(CASES["bert classifier"], task=MaskedClassTask()),
    "llama, padded left": replace(
        CASES["llama"], task=MaskedWordTask(shift=True), collate=padded_left, make_data=second_to_last
    ),
}


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Trained:
    case = KINDS[request.param]
    return trained(replace(case, collate=padded), tmp_path / "run")


def shares(model: nn.Module, loss: Any, direction: dict[str, Tensor], positions: int) -> Tensor:
    """[1 + S]: the loss's slope along a direction of the parameters, taken at no position, and at each alone.

    Every module's output moves by what its own parameters' direction does to it, at one position after the other. All
    modules here are linear in their own parameters.
    """
    sizes = torch.zeros(1 + positions, dtype=torch.float64, requires_grad=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        own = dict(module.named_parameters(recurse=False))
        if list(module.children()) or not any(names[id(p)] in direction for p in own.values()):
            return output
        along = {n: direction.get(names[id(p)], torch.zeros_like(p)) for n, p in own.items()}
        fixed = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        handles_off = module._forward_hooks.copy()
        module._forward_hooks.clear()
        tangent = functional_call(module, along, fixed, kwargs)
        module._forward_hooks.update(handles_off)
        of_sequence = output.ndim == 3 and output.shape[1] == positions
        return output + tangent * (sizes[1:, None] if of_sequence else sizes[0])

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    try:
        (slope,) = torch.autograd.grad(loss(), sizes)
    finally:
        for handle in handles:
            handle.remove()
    return slope


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tokens_have_the_shares_of_their_positions(
    run: Trained, batch_size: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["run"]
    case: Case = KINDS[name]
    train, query = case.data()
    analyzer = sf.Analyzer(
        run.model,
        case.task,
        sf.Trajectory.load(run.folder),
        store=tmp_path / "store",
        method=sf.GradientDot(),
        collate_fn=case.collate,
        progress=False,
    )
    analyzer.fit(train)
    groups = sf.Groups.singletons(N)
    scores = analyzer.score(groups, train, query, batch_size=batch_size, keep=("token",))
    whole = analyzer.score(groups, train, query, batch_size=batch_size)
    torch.testing.assert_close(scores.values, whole.values, rtol=1e-10, atol=1e-14)
    some_rest = False
    for row, of_query in enumerate(query):
        loss = case.task.compute_measurement(padded([of_query]), run.model)
        slopes = torch.autograd.grad(loss, list(run.changed.values()), allow_unused=True)
        direction = {n: g for n, g in zip(run.changed, slopes, strict=True) if g is not None}
        for place, example in enumerate(train):
            one, size = padded([example]), len(example["input_ids"])
            expected = shares(run.model, lambda one=one: case.task.compute_train_loss(one, run.model), direction, size)
            expected = expected / N
            tokens = scores.tokens(row, place)
            rounding = 1e-4 if "llama" in name else 1e-8  # its norms compute in single precision
            close = partial(torch.testing.assert_close, rtol=rounding, atol=rounding * float(expected.abs().max()))
            close(tokens[:size], expected[1:])
            assert not tokens[size:].any()
            close(scores.by_token["rest"][row, place], expected[0])
            some_rest |= bool(expected[0] != 0)
    assert some_rest == isinstance(case.task, ClassTask)  # the pooler and the head see no positions


def bert(tmp_path: Path, method: Any, **options: Any) -> tuple[sf.Analyzer, list[Example], list[Example]]:
    case = KINDS["masked bert"]
    run = trained(case, tmp_path / "run")
    trajectory = sf.Trajectory.load(run.folder)
    options = {"collate_fn": case.collate, "progress": False, "store": tmp_path / "store", **options}
    return sf.Analyzer(run.model, case.task, trajectory, method=method, **options), *case.data()


@pytest.mark.parametrize(
    ("method", "memory"),
    [
        (sf.Source(2), 2 << 30),
        pytest.param(sf.Source(2), 20_000, marks=pytest.mark.slow),
        (sf.InfluenceFunction(0.1), 20_000),
    ],
    ids=["source", "source, many tiles", "influence, many tiles"],
)
def test_tokens_add_up_for_every_method_and_budget(tmp_path: Path, method: Any, memory: int) -> None:
    analyzer, train, query = bert(tmp_path, method, memory=memory)
    analyzer.fit(train)
    groups = sf.Groups.from_lists([[2], [0], [5]], N, partial=True)
    scores = analyzer.score(groups, train, query, batch_size=2, keep=("token", "term", "layer"))
    whole = analyzer.score(groups, train, query, batch_size=2, keep=("term",))
    torch.testing.assert_close(scores.values, whole.values, rtol=1e-9, atol=1e-13)
    for term, part in whole.by_term.items():
        torch.testing.assert_close(scores.by_term[term], part, rtol=1e-9, atol=1e-13)
    assert scores.by_token.keys() == {"rest", *map(str, range(5))}
    again = analyzer.score(groups, train, query, batch_size=3, keep=("token",))
    torch.testing.assert_close(again.tokens(1, "group 1"), scores.tokens(1, 1), rtol=1e-9, atol=1e-13)
    assert (again.tokens(0, 0)[: len(train[2]["input_ids"])] != 0).all()


def test_tokens_are_saved_and_dropped_where_examples_are_joined(tmp_path: Path) -> None:
    analyzer, train, query = bert(tmp_path, sf.GradientDot())
    analyzer.fit(train)
    groups = sf.Groups.singletons(N)
    scores = analyzer.score(groups, train, query, keep="token")
    scores.save(tmp_path / "scores.safetensors")
    assert torch.equal(sf.Scores.load(tmp_path / "scores.safetensors").tokens(1, 2), scores.tokens(1, 2))
    torch.testing.assert_close(
        scores.total().tokens(0, 3), scores.tokens(0, 3) + scores.tokens(1, 3) + scores.tokens(2, 3)
    )
    assert not scores.rolled_up(groups, sf.Groups.random(N, 3)).by_token


def test_tokens_of_groups_and_of_cosines_are_refused(tmp_path: Path) -> None:
    analyzer, train, query = bert(tmp_path, sf.GradientDot())
    analyzer.fit(train)
    with pytest.raises(sf.ScoreError, match=r"has 2 examples\. Tokens are scored of single examples"):
        analyzer.score(sf.Groups.from_lists([[1], [2, 3]], N, partial=True), train, query, keep=("token",))
    scores = analyzer.score(sf.Groups.singletons(N), train, query)
    with pytest.raises(sf.ScoreError, match='Score with keep=\\("token",\\)'):
        scores.tokens(0, 0)
    cosine, *_ = bert(tmp_path / "cosine", sf.GradientCosine())
    cosine.fit(train)
    with pytest.raises(sf.ScoreError, match="no sums over tokens"):
        cosine.score(sf.Groups.singletons(N), train, query, keep=("token",))


def test_a_task_without_a_mask_has_tokens_by_the_positions_of_its_layers(tmp_path: Path) -> None:
    """Where all examples are as long, which is what a task without a mask asks for."""
    case = replace(CASES["gpt2"], lengths=(6,) * 10)
    run = trained(case, tmp_path / "run")
    analyzer = sf.Analyzer(
        run.model,
        case.task,
        sf.Trajectory.load(run.folder),
        store=tmp_path / "store",
        collate_fn=padded,
        progress=False,
    )
    train, query = case.data()
    train = [{**one, "labels": one["labels"].clone()} for one in train]
    train[3]["labels"][4:] = NO_LABEL  # what comes after the last word that is to be told has no share
    analyzer.fit(train)
    scores = analyzer.score(sf.Groups.singletons(N), train, query, keep=("token",))
    assert len(scores.tokens(0, 0)) == 6
    assert (scores.tokens(0, 0)[:5] != 0).all()
    assert (scores.tokens(0, 3)[:3] != 0).all()
    assert not scores.tokens(0, 3)[3:].any()


@pytest.mark.slow
@pytest.mark.parametrize("memory", [2 << 30, 20_000], ids=["shared queries", "blocks of queries"])
def test_two_ranks_get_the_tokens_of_one_process(gang: Gang, tmp_path: Path, memory: int) -> None:
    trained(KINDS["masked bert"], tmp_path / "run")
    one = scored(str(tmp_path), "one", memory, 2)
    for of_rank in gang.run(2, scored, str(tmp_path), "two", memory, 3):
        assert not isinstance(of_rank, Failed), of_rank
        torch.testing.assert_close(torch.tensor(of_rank), torch.tensor(one), rtol=1e-5, atol=1e-9)


def scored(folder: str, store: str, memory: int, batch_size: int) -> list[Any]:
    case = KINDS["masked bert"]
    analyzer = sf.Analyzer(
        case.model(),
        case.task,
        sf.Trajectory.load(Path(folder) / "run"),
        store=Path(folder) / store,
        memory=memory,
        method=sf.Source(2),
        collate_fn=case.collate,
        progress=False,
    )
    train, query = case.data()
    analyzer.fit(train)
    scores = analyzer.score(sf.Groups.singletons(N), train, query, batch_size=batch_size, keep=("token",))
    return torch.stack(list(scores.by_token.values())).tolist()


def test_what_is_run_alone_as_a_whole_is_of_no_token_and_repeated_calls_share_tokens(tmp_path: Path) -> None:
    model, data = Words(tied=False, table=True), texts(LENGTHS)
    trajectory = trajectory_of(tmp_path / "run", [dict(model.state_dict())], len(data))
    options = {"method": sf.GradientDot(), "collate_fn": collate, "progress": False}
    analyzer = sf.Analyzer(model, OtherWord(), trajectory, store=tmp_path / "store", **options)
    analyzer.fit(data)
    found = []
    for size in (1, 4):
        everything = sf.Groups.singletons(len(data)), data, data[:2]
        scores = analyzer.score(*everything, batch_size=size, keep=("token",))
        used = analyzer.score(*everything, batch_size=size, keep=("token",), layers="used")
        torch.testing.assert_close(used.by_token["rest"], used.values)
        torch.testing.assert_close(scores.by_token["rest"], used.values)
        found.append(torch.stack(list(scores.by_token.values())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-13)
    tokens = found[0][1:].sum(0)
    assert (tokens != 0).all()


def test_tokens_of_several_views_are_their_mean(tmp_path: Path) -> None:
    tokens = []
    for views in (1, 2):  # of data that draws nothing, so that all views are alike
        analyzer, train, query = bert(tmp_path / str(views), sf.GradientDot(), views=views)
        analyzer.fit(train)
        scores = analyzer.score(sf.Groups.singletons(N), train, query, batch_size=4, keep=("token",))
        tokens.append(torch.stack(list(scores.by_token.values())))
    torch.testing.assert_close(tokens[1], tokens[0], rtol=1e-9, atol=1e-13)


class Mixture(nn.Module):
    """Words from 12 on go through one expert, the others through another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, 6), nn.Linear(6, WORDS)
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            chosen = (input_ids >= 12) == bool(number)
            out[chosen] = expert(h[chosen])
        return self.head(torch.tanh(out))


def test_rows_that_are_routed_are_of_no_token(tmp_path: Path) -> None:
    model = Mixture().double()
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, WORDS, (6, 5))]
    trajectory = trajectory_of(tmp_path / "run", [dict(model.state_dict())], 6)
    task = sf.tasks.CausalLM("token sum", measurement="log_probability")
    options = {"method": sf.GradientDot(), "collate_fn": sf.tasks.pad, "progress": False}
    analyzer = sf.Analyzer(model, task, trajectory, store=tmp_path / "store", **options)
    analyzer.fit(data)
    scores = analyzer.score(sf.Groups.singletons(6), data, data[:2], keep=("token",), layers="experts.1")
    torch.testing.assert_close(scores.by_token["rest"], scores.values)


def test_an_example_of_one_token_has_the_same_shares_in_every_batch(tmp_path: Path) -> None:
    case = replace(KINDS["bert classifier"], lengths=(4, 1, 1, 5, 1, 4, 3, 6, 5, 4))
    run = trained(case, tmp_path / "run")
    train, query = case.data()
    options = {"method": sf.GradientDot(), "collate_fn": case.collate, "progress": False}
    analyzer = sf.Analyzer(run.model, case.task, sf.Trajectory.load(run.folder), store=tmp_path / "store", **options)
    analyzer.fit(train)
    groups = sf.Groups.from_lists([[1], [2], [4]], N, partial=True)
    found = [analyzer.score(groups, train, query, batch_size=size, keep=("token",)) for size in (1, 3)]
    every = analyzer.score(sf.Groups.singletons(N), train, query, batch_size=7, keep=("token",))
    for scores in found:
        for column, example in enumerate((1, 2, 4)):
            torch.testing.assert_close(scores.by_token["rest"][:, column], every.by_token["rest"][:, example])
            torch.testing.assert_close(scores.by_token["0"][:, column], every.by_token["0"][:, example])
    assert (every.by_token["rest"] != 0).all()
