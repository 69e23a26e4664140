"""Every trained parameter belongs to one block; names and patterns choose, and what is left out has a reason."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import segflow as sf
from segflow.model.layers import BlockSizes, choose_layers
from segflow.model.layers.choice import LayerChoice, Selection, Training, chosen_layers

from ..support.exactness import Calls, assert_exact, captured, example_matrices, normal

DTYPE = torch.float64


# ---- every trained parameter ----


def test_every_parameter_is_of_one_block_and_every_block_has_its_name() -> None:
    layers = [nn.LayerNorm(6), nn.TransformerEncoderLayer(6, 2, 8), nn.GRU(6, 2), nn.PReLU(), nn.Linear(6, 1)]
    layers += [nn.BatchNorm1d(6, affine=False), nn.ReLU(), parametrizations.orthogonal(nn.Linear(2, 2))]
    model = nn.Sequential(*layers)
    choice = choose_layers(model)
    names = [name for layer in choice.tracked.values() for name in layer.parameter_names]
    assert set(names) == {name for name, _ in model.named_parameters()} and not choice.skipped
    assert sum(layer.size for layer in choice.tracked.values()) == sum(p.numel() for p in model.parameters())
    assert {"0.weight", "1.self_attn.q", "1.norm2.bias", "2.weight_hh_l0", "3.weight", "4"} <= choice.tracked.keys()
    assert all(name == layer.name for name, layer in choice.tracked.items())


def test_a_frozen_weight_is_left_out_and_a_frozen_bias_is_no_input() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4), nn.Conv1d(4, 4, 1, groups=2), nn.Linear(1, 2, bias=False))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    choice = choose_layers(model)
    assert choice.skipped == {
        "0": "it was not trained: it does not require gradients",
        "1.bias": "it was not trained: it does not require gradients",
    }
    assert {name: layer.has_bias for name, layer in choice.tracked.items()} == {"1": False, "2": True, "3": False}
    assert {name: layer.shape for name, layer in choice.tracked.items()} == {
        "1": (1, 4, 3),
        "2": (2, 2, 3),
        "3": (1, 2, 1),
    }
    assert [layer.size for layer in choice.tracked.values()] == [12, 12, 2]

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m[3](m[2](m[1](m[0](x)).tanh()[..., None])).sin().sum()

    x = normal(5, 3)
    _, found = captured(model, choice.tracked, x, loss)
    (weight,) = torch.autograd.grad(loss(model, x), [model[1].weight])
    torch.testing.assert_close(example_matrices(found["1"]).sum(0)[0], weight, rtol=0, atol=1e-10)


def test_what_training_changed_outranks_the_flags() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model.requires_grad_(False)
    choice = choose_layers(model, training=Training(lambda name: None if name == "1.weight" else "it was not"))
    assert list(choice.tracked) == ["1"]
    assert not choice.tracked["1"].has_bias
    assert choice.skipped == {"0": "it was not trained: it was not", "1.bias": "it was not trained: it was not"}


def test_a_tied_tensor_was_trained_if_it_was_under_any_of_its_names() -> None:
    model = Calls(lambda m, x: m.b(m.a(x)), a=nn.Linear(3, 3, bias=False), b=nn.Linear(3, 3, bias=False))
    model.b.weight = model.a.weight
    for trained in ("a.weight", "b.weight"):
        choice = choose_layers(model, training=Training(lambda name, of=trained: None if name == of else "it was not"))
        assert list(choice.tracked) == ["a"]
        assert choice.tracked["a"].names == ("a.weight",), "the first name is the tensor's"


# ---- what is refused ----

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), "max_norm= changes its weight in the forward"),
    "bag max_norm": (lambda: nn.EmbeddingBag(3, 2, max_norm=1.0), "max_norm= changes its weight in the forward"),
    "by frequency": (
        lambda: nn.Embedding(3, 2, scale_grad_by_freq=True),
        "scale_grad_by_freq= makes an example's gradient depend on the rest of the batch",
    ),
    "bag by frequency": (
        lambda: nn.EmbeddingBag(3, 2, scale_grad_by_freq=True),
        "scale_grad_by_freq= makes an example's gradient depend on the rest of the batch",
    ),
    "statistics of the batch": (
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        "track_running_stats=False makes an example's gradient depend on the rest of the batch",
    ),
    "lazy linear": (lambda: nn.LazyLinear(3), "it is lazy and not initialised yet"),
    "lazy convolution": (lambda: nn.LazyConv2d(3, 1), "it is lazy and not initialised yet"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_attributed_is_reported_with_the_reason_and_refused_when_named(case: str) -> None:
    make, reason = REFUSED[case]
    model = Calls(lambda m, x: m.fine(x), fine=nn.Linear(3, 2), other=make())
    choice = choose_layers(model)
    assert list(choice.tracked) == ["fine"]
    assert choice.skipped == {"other": reason}
    with pytest.raises(sf.LayerError, match=rf"get_influence_tracked.*'other' cannot be attributed: {reason}"):
        choose_layers(model, ["fine", "other"])
    with pytest.raises(sf.LayerError, match=rf"layers=: 'other' cannot be attributed: {reason}"):
        choose_layers(model, selection=Selection(["fine", "other"]))
    assert list(choose_layers(model, selection=Selection(exclude=["other"])).tracked) == ["fine"]


def test_numbers_that_have_no_gradients_are_reported() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    choice = choose_layers(model, training=Training(lambda _name: None))
    assert choice.skipped == {"1.weight": "its numbers are torch.int8, whose gradients are not taken"}
    assert list(choice.tracked) == ["0", "1.bias"]


def test_two_parameters_in_one_memory_are_refused_by_the_names_of_both() -> None:
    """An optimizer steps them twice, and autograd gives each its own gradient: they are not one tensor."""
    ways: list[Callable[[Any, Any], None]] = [
        lambda a, b: setattr(b.weight, "data", a.weight.data),
        lambda a, b: setattr(b, "weight", nn.Parameter(a.weight.detach().T)),
    ]
    for tie in ways:
        model = Calls(lambda m, x: m.fine(m.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 3), fine=nn.Linear(3, 3))
        tie(model.a, model.b)
        choice = choose_layers(model)
        assert list(choice.tracked) == ["a.bias", "b.bias", "fine"]
        assert "'a.weight' and 'b.weight' are two parameters in one memory" in choice.skipped["a.weight"]
        with pytest.raises(sf.LayerError, match=r"'b\.weight' cannot be attributed: 'a\.weight' and 'b\.weight' are"):
            choose_layers(model, ["b.weight", "fine"])


def test_two_empty_tensors_share_nothing() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 3))
    assert list(choose_layers(model).tracked) == ["0", "1"]


def test_a_model_with_nothing_to_attribute_is_refused_with_the_reasons() -> None:
    with pytest.raises(sf.LayerError, match=r"no layer can be attributed \(no module has parameters\)"):
        choose_layers(nn.Sequential(nn.ReLU()))
    odd = nn.Sequential(nn.Embedding(2, 2, max_norm=1.0), nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(sf.LayerError, match=r"no layer can be attributed \(0: max_norm= .*; 1: it was not trained: it"):
        choose_layers(odd)


# ---- what may be named ----


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
        self.attention = nn.MultiheadAttention(3, 1)
        self.head = nn.Linear(3, 2)
        self.gate = nn.Parameter(torch.ones(()))


ALL = ["gate", "encoder.0", "encoder.1.weight", "encoder.1.bias", "encoder.2"]
ALL += ["attention.q", "attention.k", "attention.v", "attention.out_proj", "head"]
ATTENTION = ["attention.q", "attention.k", "attention.v", "attention.out_proj"]

CHOSEN: dict[str, tuple[Selection, list[str]]] = {
    "everything": (Selection(), ALL),
    "the model": (Selection([""]), ALL),
    "a module's block": (Selection(["head"]), ["head"]),
    "a container": (Selection(["encoder"]), ["encoder.0", "encoder.1.weight", "encoder.1.bias", "encoder.2"]),
    "a norm": (Selection(["encoder.1"]), ["encoder.1.weight", "encoder.1.bias"]),
    "a pattern": (Selection(["encoder.*"]), ["encoder.0", "encoder.1.weight", "encoder.1.bias", "encoder.2"]),
    "a pattern of parameters": (Selection(["*.1.bias"]), ["encoder.1.bias"]),
    "a projection": (Selection(["attention.k"]), ["attention.k"]),
    "an attention": (Selection(["attention"]), ATTENTION),
    "a tensor of three blocks": (Selection(["attention.in_proj_weight"]), ATTENTION[:3]),
    "a bare parameter": (Selection(["gate"]), ["gate"]),
    "several": (Selection(["head", "enc*.0", "gate"]), ["gate", "encoder.0", "head"]),
    "left out": (Selection(exclude=["encoder", "attention"]), ["gate", "head"]),
    "a pattern left out": (Selection(exclude=["*tion*", "encoder.?*"]), ["gate", "head"]),
    "both": (Selection(["encoder.*", "head"], ["encoder.1.*"]), ["encoder.0", "encoder.2", "head"]),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_names_and_patterns_of_modules_blocks_and_parameters_choose(case: str) -> None:
    selection, expected = CHOSEN[case]
    choice = choose_layers(Nested(), selection=selection)
    assert list(choice.tracked) == expected
    reason = {False: "not among layers=", True: "left out with exclude="}
    for name in set(ALL) - set(expected):
        asked = (
            selection.layers is None or name in choose_layers(Nested(), selection=Selection(selection.layers)).tracked
        )
        assert choice.skipped[name] == reason[asked]


def test_names_are_given_as_one_or_several() -> None:
    assert Selection.of("head", ()) == Selection(("head",), ())
    assert Selection.of(None, ["a", "b"]) == Selection(None, ("a", "b"))
    with pytest.raises(sf.LayerError, match="layers"):
        Selection.of(3, ())
    with pytest.raises(sf.LayerError, match="exclude"):
        Selection.of(None, {"a": 1})


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(exclude=["*bias"]), {"head": (1, 2, 3), "attention.q": (1, 3, 3), "encoder.1.weight": (1, 3, 1)}),
        (Selection(["*bias"]), {"head.bias": (1, 2, 1), "attention.q.bias": (1, 3, 1), "encoder.1.bias": (1, 3, 1)}),
        (Selection(["head.weight"]), {"head": (1, 2, 3)}),
        (Selection(["head"], ["head.weight"]), {"head.bias": (1, 2, 1)}),
        (Selection(["head"], ["encoder.0.bias"]), {"head": (1, 2, 4)}),
    ],
)
def test_a_bias_is_chosen_without_its_weight_and_a_weight_without_its_bias(
    selection: Selection, expected: dict[str, tuple[int, ...]]
) -> None:
    model = Nested()
    tracked = choose_layers(model, selection=selection).tracked
    assert expected.items() <= {name: layer.shape for name, layer in tracked.items()}.items()
    kinds = {name.rpartition(".")[2] for layer in tracked.values() for name in layer.names}
    if "*bias" in (selection.layers or ()):
        assert kinds == {"bias", "in_proj_bias"}
    if "*bias" in selection.exclude:
        assert kinds == {"weight", "in_proj_weight", "gate"}


def test_the_task_s_names_and_the_user_s_are_both_heeded() -> None:
    choice: LayerChoice = choose_layers(Nested(), ["encoder", "head"], selection=Selection(["encoder.0", "attention"]))
    assert list(choice.tracked) == ["encoder.0"]
    assert choice.skipped["gate"] == "not among the tracked modules that the task names"
    assert choice.skipped["head"] == "not among layers="


def test_only_the_named_layers_are_attributed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    choice = choose_layers(model, ("2", "0"))
    assert list(choice.tracked) == ["0", "2"]
    assert choice.skipped == {"1": "not among the tracked modules that the task names"}
    assert list(choose_layers(nn.Linear(2, 2), [""]).tracked) == [""]


@pytest.mark.parametrize("name", ["encodr", "*.conv", "encoder.7"])
@pytest.mark.parametrize("how", ["layers", "exclude", "task", "fitted"])
def test_a_name_or_pattern_that_fits_nothing_is_refused_with_the_closest_ones(name: str, how: str) -> None:
    model = Nested()
    words = {"layers": "layers=", "exclude": "exclude=", "task": "get_influence_tracked_modules()", "fitted": "layers="}
    with pytest.raises(sf.LayerError) as caught:
        if how == "fitted":
            chosen_layers(choose_layers(model).tracked, [name])
        elif how == "task":
            choose_layers(model, ["head", name])
        else:
            choose_layers(model, selection=Selection(**{how: [name]}))
    assert str(caught.value).startswith(
        f"{words[how]}: the model has no module or parameter {name!r}. Did you mean one"
    )
    if name == "encodr" and how != "fitted":
        assert "'encoder'" in str(caught.value)


def test_a_container_of_nothing_is_refused_with_what_is_inside() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.ReLU()), nn.ReLU(), nn.Linear(2, 2))
    inside = r"module '0' has nothing to attribute \(0\.0: it was not trained: it does not require gradients\)"
    with pytest.raises(sf.LayerError, match=inside):
        choose_layers(model, ["0"])
    with pytest.raises(sf.LayerError, match=r"module '1' has nothing to attribute\. Leave it out"):
        choose_layers(model, ["1", "2"])


def test_an_empty_choice_is_refused() -> None:
    with pytest.raises(sf.LayerError, match=r"returned no names\. Return None to track every layer"):
        choose_layers(nn.Linear(2, 2), [])
    with pytest.raises(sf.LayerError, match="no layer can be attributed"):
        choose_layers(nn.Linear(2, 2), selection=Selection(exclude=["*"]))


def test_some_of_the_fitted_blocks_are_chosen_by_the_same_names() -> None:
    model = Nested()
    tracked = choose_layers(model).tracked
    assert list(chosen_layers(tracked, None)) == ALL
    assert list(chosen_layers(tracked, "encoder.*")) == ALL[1:5]
    assert list(chosen_layers(tracked, ["attention.in_proj_bias", "gate"])) == ["gate", *ATTENTION[:3]]


# ---- tensors and modules of several names ----


@pytest.mark.parametrize("names", [None, ["first"], ["second"], ["first", "second"], ["second", "inner.layer"]])
def test_a_module_under_several_names_is_attributed_once_whichever_name_is_asked_for(names: Any) -> None:
    layer = nn.Linear(3, 3)
    inner = nn.Module()
    inner.layer = layer
    model = Calls(lambda m, x: m.second(m.first(x).tanh()), first=layer, second=layer, inner=inner)
    found = assert_exact(model, normal(4, 3), names=names)
    assert list(found) == ["first"] and found["first"].parameter_names == ["first.weight", "first.bias"]


@pytest.mark.parametrize(
    "names", [["head"], ["embedding"], ["head.weight"], ["embedding.weight"], ["emb*"], ["head.w*"]]
)
def test_a_tied_tensor_is_chosen_by_any_of_its_modules_and_parameters(names: Collection[str]) -> None:
    model = Calls(lambda m, x: x, embedding=nn.Embedding(5, 3), head=nn.Linear(3, 5), other=nn.Linear(3, 3))
    model.head.weight = model.embedding.weight
    assert list(choose_layers(model, names).tracked) in (["head"], ["head", "head.bias"])
    left = choose_layers(model, selection=Selection(exclude=names))
    assert "head" not in left.tracked and "other" in left.tracked
    assert choose_layers(model).tracked["head"].parameter_names == ["embedding.weight"], "its first name"


# ---- sizes ----


def test_block_sizes_say_which_sides_are_diagonal() -> None:
    model = Calls(
        lambda m, x: x, wide=nn.Linear(3, 6), deep=nn.Linear(6, 3), norm=nn.LayerNorm(6), words=nn.Embedding(9, 4)
    )

    def sides(**sizes: int) -> dict[str, tuple[bool, bool]]:
        layers = choose_layers(model, sizes=BlockSizes(**sizes)).tracked
        return {name: (layer.diagonal_inputs, layer.diagonal_outputs) for name, layer in layers.items()}

    usual = {"wide": (False, False), "deep": (False, False), "norm.weight": (True, False), "norm.bias": (True, False)}
    usual["words"] = (True, False)
    assert sides() == usual
    assert sides(side=6) == usual | {"deep": (True, False)}, "six inputs and a bias"
    assert sides(side=5) == usual | {"deep": (True, False), "wide": (False, True)}
    assert sides(side=3) == usual | {"deep": (True, False), "wide": (True, True), "words": (True, True)}
    assert sides(vector=5) == usual | {"norm.weight": (True, True), "norm.bias": (True, True)}
    assert sides(vector=6) == usual


@pytest.mark.parametrize("name", ["vector", "side"])
@pytest.mark.parametrize("size", [-1, 1.5, "many"])
def test_a_size_that_is_no_number_is_refused(name: str, size: Any) -> None:
    with pytest.raises(sf.LayerError, match=f"BlockSizes: {name}"):
        BlockSizes(**{name: size})
