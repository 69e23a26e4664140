"""The model behind wrappers, in any order, and its names without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from segflow.runtime.sharding import (
    named_modules,
    named_parameters,
    parallel_prefix,
    plain_name,
    state_of,
    unwrap,
)

compiled: Callable[[Any], Any] = partial(torch.compile, backend="eager")


@pytest.fixture
def alone() -> Iterator[None]:
    """One process of a group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_the_users_module_is_found_behind_wrappers_in_any_order(alone: None) -> None:
    model = nn.Linear(2, 2)
    for wrap in (
        compiled,
        DistributedDataParallel,
        nn.DataParallel,
        lambda m: compiled(DistributedDataParallel(m)),
        lambda m: DistributedDataParallel(compiled(m)),
        lambda m: compiled(DistributedDataParallel(compiled(m))),
        lambda m: nn.DataParallel(compiled(m)),
    ):
        assert unwrap(wrap(model)) is model
    assert unwrap(model) is model


def test_looking_behind_wrappers_leaves_them_as_they_are(alone: None) -> None:
    """accelerate's own unwrapping takes a parallel wrapper out of a compiled model, whose ranks then drift apart."""
    parallel = DistributedDataParallel(nn.Linear(2, 2))
    outer = compiled(parallel)
    unwrap(outer)
    assert outer._orig_mod is parallel


def test_names_are_those_of_the_bare_model() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.BatchNorm1d(2))

    bare, wrapped = net(), net()
    inner = wrapped[0]
    wrapped[0] = compiled(inner)
    assert [*named_modules(wrapped)] == [*named_modules(bare)] and named_modules(wrapped)["0"] is inner
    assert [*named_parameters(wrapped)] == [*named_parameters(bare)]
    assert [*state_of(wrapped)] == [*state_of(bare)] != [*wrapped.state_dict()]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.a.weight", "a.weight"),
        ("a._orig_mod.weight", "a.weight"),
        ("_orig_mod", ""),
        ("a._checkpoint_wrapped_module.b", "a.b"),
        ("a_orig_mod.b", "a_orig_mod.b"),
        ("module.a", "module.a"),
    ],
)
def test_a_plain_name_lacks_what_wrappers_inside_a_model_add(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_a_prefix_is_a_parallel_wrappers_where_all_names_have_it_and_the_model_has_none_of_them() -> None:
    assert parallel_prefix(["module.a", "module.b"], ["a", "b"]) == "module."
    assert parallel_prefix(["module.a", "b"], ["a", "b"]) == ""
    assert parallel_prefix(["module.a", "module.b"], ["module.a", "module.b"]) == ""
    assert parallel_prefix([]) == ""
