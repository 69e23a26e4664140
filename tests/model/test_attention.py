"""nn.MultiheadAttention and the layers around it: three projections, exact, and the same outputs as untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from segflow.model.layers import choose_layers
from segflow.model.layers.choice import Training
from segflow.model.observing import observing

from ..support.exactness import RANDOMISED, Calls, assert_seen_exactly, normal

DTYPE = torch.float64
WIDTH, HEADS, PLACES = 4, 2, 3


@st.composite
def attention_and_run(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, Callable[[Any, Tensor], Any]]:
    """Self- or cross-attention with every option that changes what is computed."""
    cross = draw(st.booleans())
    widths = {"kdim": 3, "vdim": 5} if cross and draw(st.booleans()) else {}
    batch_first = draw(st.booleans())
    attention = nn.MultiheadAttention(
        WIDTH,
        HEADS,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        batch_first=batch_first,
        **widths,
    )
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    memory = (normal(WIDTH, widths.get("kdim", WIDTH), seed=7), normal(WIDTH, widths.get("vdim", WIDTH), seed=8))
    masked, padded = draw(st.sampled_from([None, "bool", "float", "per head"])), draw(st.booleans())
    weights = draw(st.sampled_from(["none", "average", "each"]))
    causal = masked == "bool" and not padded and attention.bias_k is None and not attention.add_zero_attn

    def run(model: Any, x: Tensor) -> Any:
        key, value = (x.tanh() @ side for side in memory) if cross else (x, x)
        given = [side if batch_first else side.transpose(0, 1) for side in (x, key, value)]
        mask = torch.ones(PLACES, PLACES, dtype=torch.bool).triu(1)
        if masked == "float":
            mask = normal(PLACES, PLACES, seed=9)
        if masked == "per head":
            mask = normal(HEADS, PLACES, PLACES, seed=9).repeat(len(x), 1, 1)
        ignored = (x[:, :, 0] > 1) & (torch.arange(PLACES) > 0)
        output, attended = model.attention(
            *given,
            attn_mask=None if masked is None else mask,
            key_padding_mask=ignored if padded else None,
            need_weights=weights != "none",
            average_attn_weights=weights == "average",
            is_causal=causal,
        )
        output = output if batch_first else output.transpose(0, 1)
        return output if attended is None else torch.cat([output.flatten(1), attended.cumsum(-1).flatten(1)], 1)

    return attention, run


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@settings(RANDOMISED, max_examples=12)
@given(attention_and_run())
def test_attention_is_exact_with_every_option_and_gives_the_untouched_module_s_outputs(
    case: tuple[nn.MultiheadAttention, Callable[[Any, Tensor], Any]],
) -> None:
    attention, run = case
    model, x = Calls(run, attention=attention), normal(4, PLACES, WIDTH)
    untouched = model(x)
    with observing(model):
        torch.testing.assert_close(model(x), untouched)
    assert "forward" not in vars(attention)
    seen = assert_seen_exactly(model, x, sizes=(1, 3))
    whole = attention.bias_k is not None  # such keys and values are no projection's: the module is one function
    parts = ["bias_k", "bias_v"] if whole else ["q", "k", "v"]
    assert {f"attention.{part}" for part in (*parts, "out_proj")} <= seen.shapes.keys()
    assert not seen.alone


def test_projections_are_blocks_with_their_rows_of_the_bias() -> None:
    model = Calls(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    together = assert_seen_exactly(model, normal(4, PLACES, WIDTH)).shapes
    assert {together[f"attention.{part}"] for part in ("q", "k", "v", "out_proj")} == {(1, WIDTH, WIDTH + 1)}
    for training in (
        Training(alike=lambda one, other: "bias" not in one + other),
        Training(apart=["attention.in_proj_bias", "attention.out_proj.bias"]),
    ):
        apart = assert_seen_exactly(model, normal(4, PLACES, WIDTH), training=training).shapes
        assert {apart[f"attention.{part}"] for part in ("q", "k", "v", "out_proj")} == {(1, WIDTH, WIDTH)}
        assert {apart[f"attention.{part}.bias"] for part in ("q", "k", "v", "out_proj")} == {(1, WIDTH, 1)}


def test_one_example_s_calls_without_a_batch_are_exact() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        return torch.stack([model.attention(one, one, one, need_weights=False)[0] for one in x])

    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    assert assert_seen_exactly(Calls(run, attention=attention), normal(4, PLACES, WIDTH)).alone


def test_dropout_is_off_while_observed() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True).train()
    model, x = Calls(lambda m, x: m.attention(x, x, x)[0], attention=attention), normal(4, PLACES, WIDTH)
    expected = model.eval()(x)
    model.train()
    with observing(model):
        torch.testing.assert_close(model(x), expected)


class Scaled(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(*args, **kwargs)
        return 2 * output, weights


def test_a_subclass_with_its_own_forward_is_exact() -> None:
    attention = Scaled(WIDTH, HEADS, batch_first=True)
    seen = assert_seen_exactly(Calls(lambda m, x: m.attention(x, x, x)[0], attention=attention), normal(4, 3, WIDTH))
    assert "attention.in_proj_weight" in seen.shapes


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_decoder_layer_is_exact(batch_first: bool, norm_first: bool) -> None:
    """Attention to its own places and to a memory, with a causal mask."""
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 5, batch_first=batch_first, norm_first=norm_first)

    def run(model: Any, x: Tensor) -> Tensor:
        memory = x[:, :2].sin()
        given = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
        mask = nn.Transformer.generate_square_subsequent_mask(PLACES, dtype=x.dtype)
        output = model.layer(*given, tgt_mask=mask, tgt_is_causal=True)
        return (output if batch_first else output.transpose(0, 1)).cumsum(-1)

    seen = assert_seen_exactly(Calls(run, layer=layer).eval(), normal(4, PLACES, WIDTH))
    assert len(seen.shapes) == 2 * 4 + 2 + 3 * 2 and not seen.alone


def test_a_whole_encoder_is_exact_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 5, batch_first=True)

    def run(model: Any, x: Tensor) -> Tensor:
        ignored = functional.pad(x[:, 1:, 0] > 0.5, (1, 0))
        return (model.encoder(x, src_key_padding_mask=ignored) * ~ignored[..., None]).cumsum(-1)

    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    seen = assert_seen_exactly(Calls(run, encoder=encoder).eval(), normal(4, PLACES, WIDTH))
    assert len(seen.shapes) == 2 * (4 + 2 + 2 * 2) + 2 and not seen.alone
    assert seen.shapes.keys() == choose_layers(seen.view.model).tracked.keys()
