"""Tied tensors: all uses are summed in each example, in the orientation of the first that is no embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from segflow.model.layers import choose_layers
from segflow.model.layers.choice import Training
from segflow.model.layers.tied import TiedLayer, TiedVector

from ..support.exactness import Calls, Seen, assert_seen_exactly, normal

DTYPE = torch.float64
WORDS, WIDTH = 6, 3


def _words(*shape: int) -> Tensor:
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(1))


def _tie(model: nn.Module, first: str, *others: str) -> nn.Module:
    """The first name's parameter under the other names too."""
    for name in others:
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, model.get_parameter(first))
    return model


def _language_model(padding: int | None = None, head_first: bool = False, bias: bool = False) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.fc(m.words(x)).tanh()).cumsum(-1)

    words, head = nn.Embedding(WORDS, WIDTH, padding_idx=padding), nn.Linear(WIDTH, WORDS, bias=bias)
    order = {"head": head, "words": words} if head_first else {"words": words, "head": head}
    return _tie(Calls(run, fc=nn.Linear(WIDTH, WIDTH), **order), "words.weight", "head.weight")


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head_first", [True, False])
def test_an_embedding_and_a_head_are_one_block_in_the_head_s_orientation(
    padding: int | None, bias: bool, head_first: bool
) -> None:
    model, words = _language_model(padding, head_first, bias), _words(5, 4)
    assert (words == 2).any()
    seen = assert_seen_exactly(model, words)
    blocks = {"fc": (1, WIDTH, WIDTH + 1), "head": (1, WORDS, WIDTH)}
    assert seen.shapes == (blocks | {"head.bias": (1, WORDS, 1)} if bias else blocks)
    layer = seen.view.layers["head"]
    assert isinstance(layer, TiedLayer) and {use.name for use in layer.uses} == {"head", "words"}
    assert not layer.diagonal_inputs and not layer.exact_P and not seen.alone


def _positions_of(seen: Seen, name: str) -> int:
    return seen.view.positions(name)


def test_a_tied_block_has_the_positions_of_all_of_its_uses() -> None:
    assert _positions_of(assert_seen_exactly(_language_model(), _words(3, 4)), "head") == 8


TIED: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int, int]]] = {}


def _case(name: str, block: str, shape: tuple[int, int, int]) -> Callable[..., Any]:
    def keep(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        TIED[name] = (make, block, shape)
        return make

    return keep


@_case("two linear layers", "a", (1, WIDTH, WIDTH))
def _two() -> nn.Module:
    model = Calls(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, WIDTH))
    return _tie(model, "a.weight", "b.weight")


@_case("three, one called twice", "a", (1, WIDTH, WIDTH))
def _three() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(m.a(x).tanh())).tanh()).unsqueeze(1) + m.a(x[:, None].expand(-1, 2, -1))

    layers = {name: nn.Linear(WIDTH, WIDTH, bias=name != "b") for name in "abc"}
    return _tie(Calls(run, **layers), "a.weight", "b.weight", "c.weight")


@_case("all but one use reaches the loss", "a", (1, WIDTH, WIDTH))
def _one_used() -> nn.Module:
    model = Calls(lambda m, x: m.b(x) + m.a(x).detach(), a=nn.Linear(WIDTH, WIDTH, bias=False), b=nn.Linear(WIDTH, 3))
    return _tie(model, "a.weight", "b.weight")


@_case("a use that nothing calls", "a", (1, WIDTH, WIDTH))
def _one_called() -> nn.Module:
    model = Calls(lambda m, x: m.b(x), a=nn.Linear(WIDTH, WIDTH, bias=False), b=nn.Linear(WIDTH, 3, bias=False))
    return _tie(model, "a.weight", "b.weight")


@_case("vectors", "a.bias", (1, WIDTH, 1))
def _vectors() -> nn.Module:
    """Biases of a linear layer, of a norm, and of a convolution."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.a(x).tanh()).cumsum(-1) + m.conv(x.exp()[:, :, None])[..., 0].sin()

    model = Calls(run, a=nn.Linear(WIDTH, WIDTH), norm=nn.LayerNorm(WIDTH), conv=nn.Conv1d(WIDTH, WIDTH, 1))
    return _tie(model, "a.bias", "norm.bias", "conv.bias")


@_case("scales of two norms", "a.weight", (1, WIDTH, 1))
def _norms() -> nn.Module:
    model = Calls(lambda m, x: m.b(m.a(x.exp()).sin() + x).cumsum(-1), a=nn.LayerNorm(WIDTH), b=nn.LayerNorm(WIDTH))
    return _tie(model, "a.weight", "b.weight")


@_case("with a transposed linear layer", "a", (1, WIDTH, WIDTH))
def _turned() -> nn.Module:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = Calls(lambda m, x: m.turned(m.a(x).tanh()).cumsum(-1), a=nn.Linear(WIDTH, WIDTH), turned=Conv1D(3, 3))
    return _tie(model, "a.weight", "turned.weight")


@_case("with a plain use", "a", (1, WIDTH, WIDTH))
def _outside() -> nn.Module:
    """A layer that is called, and whose weight is used transposed as an auto-encoder's, where nothing is called."""
    return Calls(lambda m, x: functional.linear(m.a(x).tanh(), m.a.weight.T), a=nn.Linear(WIDTH, WIDTH, bias=False))


@_case("a parameter of the model itself", "a", (1, WIDTH, WIDTH))
def _held() -> nn.Module:
    model = Calls(lambda m, x: m.a(x).tanh() @ m.table, a=nn.Linear(WIDTH, WIDTH, bias=False))
    model.register_parameter("table", model.a.weight)
    return model


@_case("convolutions", "a.weight", (1, WIDTH * WIDTH, 1))
def _convolutions() -> nn.Module:
    layers = {name: nn.Conv1d(WIDTH, WIDTH, 1, bias=False) for name in "ab"}
    model = Calls(lambda m, x: m.b(m.a(x[:, :, None]).tanh())[..., 0], **layers)
    return _tie(model, "a.weight", "b.weight")


@_case("two modules that are differentiated as a whole", "a.weight", (1, WIDTH, 1))
def _wholes() -> nn.Module:
    model = Calls(lambda m, x: m.b(m.a(x)).cumsum(-1), a=nn.PReLU(WIDTH), b=nn.PReLU(WIDTH))
    return _tie(model, "a.weight", "b.weight")


@pytest.mark.parametrize("case", TIED)
def test_tied_tensors_are_one_block_whose_gradient_is_the_sum_over_all_uses(case: str) -> None:
    make, block, shape = TIED[case]
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    seen = assert_seen_exactly(model, normal(4, WIDTH))
    assert seen.shapes[block] == shape
    names = [name for layer in seen.view.layers.values() for name in layer.parameter_names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters()), "each once, by its first name"


def test_embeddings_of_an_encoder_and_a_decoder_and_their_head_are_one_block() -> None:
    """As in T5 and BART: three uses, in two orientations."""

    def run(m: Any, x: Tensor) -> Tensor:
        seen = m.mix(m.encoder(x[:, :3])).tanh().mean(1, keepdim=True)
        return m.head((m.decoder(x[:, 3:]) + seen).tanh()).cumsum(-1)

    parts = {"encoder": nn.Embedding(WORDS, WIDTH), "decoder": nn.Embedding(WORDS, WIDTH)}
    model = Calls(run, shared=nn.Embedding(WORDS, WIDTH), **parts, mix=nn.Linear(3, 3), head=nn.Linear(WIDTH, WORDS))
    _tie(model, "shared.weight", "encoder.weight", "decoder.weight", "head.weight")
    seen = assert_seen_exactly(model, _words(4, 5))
    assert seen.shapes["head"] == (1, WORDS, WIDTH) and not seen.alone
    assert seen.view.layers["head"].names == ("shared.weight",)


def test_two_embeddings_alone_keep_their_inputs_one_hot() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return (m.a(x[:, :2]).sum(1) * m.b(x[:, 2:]).sum(1).tanh()).cumsum(-1)

    model = _tie(Calls(run, a=nn.Embedding(WORDS, 2), b=nn.Embedding(WORDS, 2, padding_idx=0)), "a.weight", "b.weight")
    seen = assert_seen_exactly(model, _words(4, 5))
    assert seen.shapes == {"a": (1, 2, WORDS)} and seen.view.layers["a"].diagonal_inputs


def test_a_tied_weight_s_biases_are_blocks_of_their_own() -> None:
    layers = choose_layers(_two(), training=Training()).tracked
    assert set(layers) == {"a", "a.bias", "b.bias"}
    assert isinstance(choose_layers(_vectors()).tracked["a.bias"], TiedVector)


def test_projections_of_tied_attentions_are_exact() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        once = m.a(x, x, x)[0]
        return m.b(once, x, once)[0].cumsum(-1)

    attentions = {name: nn.MultiheadAttention(4, 2, batch_first=True) for name in "ab"}
    model = _tie(Calls(run, **attentions), "a.in_proj_weight", "b.in_proj_weight")
    seen = assert_seen_exactly(model, normal(4, 3, 4))
    assert {"a.q", "a.k", "a.v", "a.q.bias", "b.q.bias"} <= seen.shapes.keys() and not seen.alone
