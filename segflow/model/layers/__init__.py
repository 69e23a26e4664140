"""Kinds of layers, one small file for each, and the registry that finds a module's kind.

A kind of your own derives from `TrackedLayer` and is registered with `@register`; the built-in ones are written alike.
"""

from .convolution import ConvolutionLayer
from .linear import LinearLayer
from .registry import register
from .tracked import TrackedLayer

__all__ = ["ConvolutionLayer", "LinearLayer", "TrackedLayer", "register"]
