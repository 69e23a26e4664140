"""Modules that no kind of layer knows, and bare parameters: exact gradients, and a vector for each tensor."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from ..support.exactness import Calls, Seen, assert_seen_exactly, normal

DTYPE = torch.float64


def _vectors(seen: Seen) -> dict[str, int]:
    """The length of every vector block; there are no others."""
    assert all(shape[0] == shape[2] == 1 for shape in seen.shapes.values())
    return {name: shape[1] for name, shape in seen.shapes.items()}


# ---- modules of a known kind that do otherwise ----


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, 2 * self.weight, self.bias)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.square(), bias)


class MoreParameters(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def __call__(self, *args: Any) -> Any:
        return self.scale * super().__call__(*args)


class Scaled(nn.Linear):
    """A parameter more, within its forward."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)


def _patched() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = MethodType(lambda self, x: functional.linear(x, 2 * self.weight, self.bias), layer)
    return layer


def _pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5)


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(nn.Linear(3, 3))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.mT


def _symmetric() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(3, 3), "weight", Symmetric())


def _doubled() -> nn.Module:
    norm = parametrizations.weight_norm
    return norm(norm(nn.Linear(3, 3)), "bias", dim=None)


ODD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "forward": (lambda: OwnLinear(3, 3), (2, 3), {"weight": 9, "bias": 3}),
    "conv_forward": (lambda: OwnConv(1, 2, 2), (1, 3, 3), {"weight": 8, "bias": 2}),
    "patched forward": (_patched, (2, 3), {"weight": 9, "bias": 3}),
    "more parameters": (Scaled, (2, 3), {"weight": 9, "bias": 3, "scale": 1}),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
        (2, 3),
        {"bias": 3, "parametrizations.weight.original0": 3, "parametrizations.weight.original1": 9},
    ),
    "weight_norm, no bias": (
        lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2, bias=False)),
        (2, 4),
        {"parametrizations.weight.original0": 3, "parametrizations.weight.original1": 12},
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Conv1d(1, 2, 2)),
        (1, 4),
        {"bias": 2, "parametrizations.weight.original": 4},
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
        (2, 3),
        {"bias": 3, "parametrizations.weight.original": 9},
    ),
    "a parametrization of one's own": (_symmetric, (2, 3), {"bias": 3, "parametrizations.weight.original": 9}),
    "weight and bias parametrized": (
        _doubled,
        (2, 3),
        {
            f"parametrizations.{n}.original{i}": k
            for n, i, k in (("weight", 0, 3), ("weight", 1, 9), ("bias", 0, 1), ("bias", 1, 3))
        },
    ),
    "old weight_norm": (_old_weight_norm, (2, 3), {"bias": 3, "weight_g": 3, "weight_v": 9}),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), (2, 3), {"bias": 3, "weight_orig": 9}),
    "pruned": (_pruned, (2, 3), {"bias": 3, "weight_orig": 9}),
    "slopes": (lambda: nn.PReLU(3), (3, 2), {"weight": 3}),
}


@pytest.mark.filterwarnings("ignore:.*nn.utils.spectral_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("case", ODD)
def test_a_module_that_computes_otherwise_than_its_kind_is_exact_for_all_examples_at_once(case: str) -> None:
    make, shape, sizes = ODD[case]
    model = Calls(lambda m, x: m.odd(x.tanh()).cumsum(-1), odd=make()).eval()
    model(normal(4, *shape))
    computed = {name: value.clone() for name, value in vars(model.odd).items() if isinstance(value, Tensor)}
    seen = assert_seen_exactly(model, normal(4, *shape))
    assert _vectors(seen) == {f"odd.{name}": size for name, size in sizes.items()}
    assert not seen.alone
    for name, value in computed.items():
        torch.testing.assert_close(vars(model.odd)[name], value)


def test_a_module_that_changes_its_output_after_its_forward_s_hooks_is_exact_one_by_one() -> None:
    model = Calls(lambda m, x: m.odd(x).cumsum(-1), odd=MoreParameters())
    assert assert_seen_exactly(model, normal(4, 3)).alone


def test_two_arguments_of_several_axes_and_several_outputs_are_exact() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = nn.Bilinear(3, 2, 2)
            self.shift = nn.Parameter(torch.ones(3))

        def forward(self, pair: dict[str, Tensor], factor: float, *, again: Tensor) -> dict[str, Any]:
            moved = pair["x"] + self.shift * factor
            return {"out": self.bilinear(moved, pair["y"]), "both": (again * self.shift.sum(), None, "words")}

    def run(model: Any, x: Tensor) -> Tensor:
        found = model.pair({"x": x[:, 0], "y": x[:, 1, :2]}, 2.0, again=x.transpose(0, 1))
        return found["out"].cumsum(-1).sin() + found["both"][0].sum((0, 2))[:, None].sin()

    seen = assert_seen_exactly(Calls(run, pair=Pair()), normal(5, 2, 3))
    assert _vectors(seen) == {"pair.shift": 3, "pair.bilinear.weight": 12, "pair.bilinear.bias": 2}
    assert not seen.alone


def test_a_module_called_several_times_and_once_for_nothing_is_exact() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        return model.odd(model.odd(x).tanh()).cumsum(-1) + model.odd(3 * x).detach() + model.odd(-x)

    seen = assert_seen_exactly(Calls(run, odd=OwnLinear(3, 3)), normal(4, 3))
    assert not seen.alone


def test_a_module_that_branches_on_its_numbers_is_exact_one_by_one() -> None:
    """vmap has no rule for it."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row * self.gain if row.sum() > 0 else row * self.gain**3 for row in x])

    model = Calls(lambda m, x: m.odd(x).cumsum(-1), odd=Branching())
    nn.init.normal_(model.odd.gain)
    assert not assert_seen_exactly(model, normal(5, 3)).alone


def test_a_module_that_looks_at_the_whole_batch_is_exact_of_each_example_alone() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * (x - x.mean(0) / 2)

    assert assert_seen_exactly(Calls(lambda m, x: m.odd(x).cumsum(-1), odd=Centred()), normal(4, 3)).shapes


# ---- recurrent modules ----


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"batch_first": True, "bidirectional": True, "num_layers": 2},
        {"bias": False, "num_layers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("begun", [False, True])
def test_recurrent_modules_are_exact(kind: Any, options: dict[str, Any], begun: bool) -> None:
    first = options.get("batch_first", False)
    states = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))

    def run(model: Any, x: Tensor) -> Tensor:
        given = x if first else x.transpose(0, 1)
        state = x[:, 0, :2].sin().expand(states, len(x), 2).contiguous() if begun else None
        state = (state, state.cos()) if begun and kind is nn.LSTM else state
        output, last = model.recurrent(given, state)
        last = sum(last) if kind is nn.LSTM else last
        return (output if first else output.transpose(0, 1)).sum(1) + last.sum((0, 2))[:, None]

    model = Calls(run, recurrent=kind(3, 2, **options))
    seen = assert_seen_exactly(model, normal(3, 3, 3), sizes=(1, 3))
    assert _vectors(seen) == {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert not seen.alone


def test_a_recurrent_cell_that_is_called_for_every_step_is_exact() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 2)
        for step in x.unbind(1):
            state = model.cell(step, state)
        return state.cumsum(-1)

    assert not assert_seen_exactly(Calls(run, cell=nn.GRUCell(3, 2)), normal(4, 3, 3)).alone


def test_packed_sequences_are_exact() -> None:
    """Their rows are sorted by steps: no axis counts the examples."""

    def collate(examples: list[Tensor]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(one) for one in examples])
        return nn.utils.rnn.pad_sequence(examples, batch_first=True), lengths

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        packed = pack_padded_sequence(*batch, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(model.recurrent(packed)[0], batch_first=True)
        return model.head(output).sin().sum()

    def last(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        packed = pack_padded_sequence(*batch, batch_first=True, enforce_sorted=False)
        return model.head(model.recurrent(packed)[1][0]).sin().sum()

    data = [normal(length, 3, seed=length) for length in (2, 4, 1, 3)]
    model = Calls(lambda m, x: x, recurrent=nn.GRU(3, 2, batch_first=True), head=nn.Linear(2, 2, bias=False))
    for of in (loss, last):
        seen = assert_seen_exactly(model, data, of, collate=collate)
        assert {name for name in seen.alone if "recurrent" in name}


# ---- bare parameters ----


class Bare(nn.Module):
    """A class token and positions, of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.positions = nn.Parameter(torch.randn(1, 4, 3))
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.fc(x.tanh()).sum(1)


class Gate(nn.Module):
    """Of a child, with a number of no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate.tanh()


class Lists(nn.Module):
    """Lists and dicts of parameters are modules that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(3))})

    def forward(self, x: Tensor) -> Tensor:
        return x * self.many[0] + (x * self.many[1]).sin() + self.named["shift"]


def test_bare_parameters_of_the_model_itself_are_exact_for_all_examples_at_once() -> None:
    seen = assert_seen_exactly(Bare(), normal(5, 3, 3))
    assert seen.shapes == {"token": (1, 3, 1), "positions": (1, 12, 1), "fc": (1, 2, 4)}
    assert not seen.alone


def test_bare_parameters_of_a_child_are_exact_for_all_examples_at_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Gate(), nn.Linear(3, 2))
    seen = assert_seen_exactly(model, normal(5, 2, 3))
    assert seen.shapes["1.gate"] == (1, 1, 1) and not seen.alone


def test_lists_of_parameters_are_exact_one_by_one() -> None:
    model = Calls(lambda m, x: m.fc(m.lists(x)), lists=Lists(), fc=nn.Linear(3, 2))
    seen = assert_seen_exactly(model, normal(4, 3))
    assert set(seen.alone.items()) == {(f"lists.{n}", "gradient") for n in ("many.0", "many.1", "named.shift")}


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3)])
def test_a_table_that_its_module_returns_as_it_is_is_exact(shape: tuple[int, ...]) -> None:
    """Positions [S, E] and [1, S, E] are no example's: each has its copy."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(shape))

        def forward(self) -> Tensor:
            return self.table.sin()

    model = Calls(lambda m, x: m.fc((x + m.positions()).tanh()), positions=Table(), fc=nn.Linear(3, 2))
    for examples in (1, 3, 4):  # also as many as there are positions
        assert not assert_seen_exactly(model, normal(examples, 3, 3), sizes=(1, 2, 3)).alone


# ---- wrappers ----


def test_gradient_checkpointing_is_exact_for_modules_that_are_differentiated_as_a_whole() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        inner = lambda v: model.norm(model.gate(model.fc(v)).tanh())  # noqa: E731
        return checkpoint(inner, checkpoint(inner, x, use_reentrant=False), use_reentrant=False).cumsum(-1)

    model = Calls(run, fc=nn.Linear(3, 3), gate=Gate(), norm=nn.LayerNorm(3))
    assert not assert_seen_exactly(model, normal(4, 3)).alone


def test_warnings_of_a_module_s_own_are_no_errors() -> None:
    import warnings

    class Warning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("soon gone", DeprecationWarning, stacklevel=1)
            return self.gain * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not assert_seen_exactly(Calls(lambda m, x: m.odd(x).cumsum(-1), odd=Warning()), normal(4, 3)).alone
