"""Kinds of layers, one small file for each, and the registry that finds a module's kind.

A kind of your own derives from `TrackedLayer` and is registered with `@register`; the built-in ones are written alike.
"""

from .attention import AttentionLayer
from .choice import choose_layers
from .convolution import ConvolutionLayer, TransposedConvolutionLayer
from .embedding import EmbeddingBagLayer, EmbeddingLayer
from .linear import LinearLayer, TransposedLinearLayer
from .norm import ChannelNorm, LastAxesNorm
from .registry import register
from .sizes import BlockSizes
from .tracked import Owner, TrackedLayer, VectorLayer

__all__ = [
    "AttentionLayer",
    "BlockSizes",
    "ChannelNorm",
    "ConvolutionLayer",
    "EmbeddingBagLayer",
    "EmbeddingLayer",
    "LastAxesNorm",
    "LinearLayer",
    "Owner",
    "TrackedLayer",
    "TransposedConvolutionLayer",
    "TransposedLinearLayer",
    "VectorLayer",
    "choose_layers",
    "register",
]
